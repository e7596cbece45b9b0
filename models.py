"""Models by name: the pre-training model and the classifier that a recipe describes."""
import math

import checkpoints
import mvit
import vit
from maskfeat import MaskFeat
from targets import TARGETS

MODELS = {**mvit.MODELS, **vit.MODELS}
# The numbers that describe a model and its input: least and greatest.
LIMITS = {
    "image_size": (1, 4096), "num_frames": (1, 4096), "sampling_rate": (1, 4096),
    "patch_size": (1, 4096), "output_stride": (0, 4096), "bins": (1, 4096), "cell": (1, 4096),
    "num_classes": (0, 10 ** 5), "label_classes": (1, 10 ** 5), "repeats": (1, 64),
    "clips": (1, 4096), "crops": (1, 3), "drop_path": (0.0, 0.99), "dropout": (0.0, 0.99),
    "mask_ratio": (0.0, 1.0), "crop_ratio": (0.01, 1.0), "hog_scale": (1e-9, 1e9),
    "mean": (0.0, 1e3), "std": (1e-6, 1e3)}
MOST_TOKENS = 2 ** 16  # of a picture in a ViT, whose table of positions is as long
FIELDS = {             # examples of what a checkpoint says of its model, by which types are checked
    **{name: least for name, (least, _) in LIMITS.items()},
    "image_size": (1, 1), "mean": (0.0,) * 3, "std": (0.0,) * 3,
    **dict.fromkeys(("model", "expand", "pool", "target", "mask", "norm", "color", "gradient",
                     "pixel_norm", "teacher", "align", "label_order", "data"), ""),
    **dict.fromkeys(("checkpointing", "segments", "frame_runs"), False)}


def takes_clips(name):
    """True for the models of video, False for those of images."""
    return name in mvit.MODELS


def check_kind(name, samples):
    """Raise ValueError unless the model takes what the samples (layouts.Samples) are."""
    if takes_clips(name) != (samples.kind == "video"):
        kind, others = ("clips", vit.MODELS) if takes_clips(name) else ("images", mvit.MODELS)
        raise ValueError(f"model={name} takes {kind}, but {samples.root} holds {samples.kind}s: "
                         f"choose other data, or another model ({', '.join(others)})")


def check_sizes(recipe, where=""):
    """Raise ValueError for a number of a recipe, a dict, outside LIMITS. where: names its file."""
    for name in LIMITS.keys() & recipe.keys():
        (least, most), value = LIMITS[name], recipe[name]
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if not all(least <= v <= most for v in numbers):
            remedy = "choose another" if where else f"change --{name.replace('_', '-')}"
            raise ValueError(f"{where}{name}={value} is not from {least} to {most}: {remedy}")
    sides, patch = recipe.get("image_size", (1, 1)), recipe.get("patch_size", 1)
    if not takes_clips(recipe["model"]) and math.prod(sides) > MOST_TOKENS * patch ** 2:
        raise ValueError(f"{where}image_size={sides} at patch_size={patch} is more than "
                         f"{MOST_TOKENS} tokens: use a smaller image")


def check_checkpoint(path, checkpoint):
    """Raise ValueError if a checkpoint of ours describes no model. Those of others pass."""
    if "recipe" in checkpoint:
        recipe, names = checkpoint["recipe"], checkpoint.get("classes", [])
        checkpoints.check_stored(path, recipe, FIELDS)
        checkpoints.check_stored(path, {"model": None, **checkpoint}, {"model": {}})
        if lacking := {"model", "image_size"} - recipe.keys():
            raise ValueError(f"{path} is no checkpoint of ours, its recipe lacks {min(lacking)}: "
                             "choose another")
        check_sizes(recipe, f"{path} is damaged: ")
        if not (isinstance(names, list) and all(checkpoints.is_like(name, "") for name in names)
                and len(names) in (0, recipe.get("num_classes"))):
            raise ValueError(f"{path} is damaged: its class names are not a list of "
                             f"{recipe.get('num_classes')} texts, choose another checkpoint")


def build_encoder(recipe, **options):
    """The encoder of a recipe. Raises ValueError for an unknown name or setting."""
    name = recipe["model"]
    if name not in MODELS:
        raise ValueError(f"model={name!r}: use one of {', '.join(MODELS)}")
    check_sizes(recipe)
    keys = ("num_frames", "expand") if takes_clips(name) else ("patch_size",)
    options |= {key: recipe[key] for key in ("image_size", "drop_path", "checkpointing", *keys)}
    if takes_clips(name) and recipe.get("output_stride"):  # else the model's own
        options["output_stride"] = recipe["output_stride"]
    return MODELS[name](**options)


def build_maskfeat(recipe):
    """The pre-training model of a recipe, a dict of the fields of pretrain.Recipe.

    Reads the file of a teacher. Raises ValueError for an unknown target or sides that do not fit.
    """
    target, (H, W) = recipe["target"], recipe["image_size"]
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: use one of {', '.join(TARGETS)}")
    encoder = build_encoder(recipe, num_classes=0)
    patch = encoder.patch_stride[-1]
    for axis, side in zip("HW", (H, W)):
        if side % patch:
            low = side - side % patch
            raise ValueError(f"clip {recipe['num_frames']}x{H}x{W} is not divisible by the output "
                             f"stride {patch}: {axis}={side}, use {low or patch} or {low + patch}")
    grid, fields = (H // patch, W // patch), lambda *keys: {key: recipe[key] for key in keys}
    if target == "hog":
        options = {"patch_size": patch, "scale": recipe.get("hog_scale", 1.0),
                   **fields("bins", "cell", "norm", "color", "gradient")}
    elif target == "pixel":
        options = {"patch_size": patch, "norm": recipe["pixel_norm"]}
    elif target == "dvae":
        options = fields("teacher")
    elif target == "label":
        options = {"grid": grid, "classes": recipe["label_classes"], "order": recipe["label_order"]}
    else:
        options = {"grid": grid, **fields("teacher", "image_size", "mean", "std", "align")}
    return MaskFeat(encoder, TARGETS[target](**options))


def token_grid(recipe, encoder):
    """(t, h, w) of the tokens that a clip becomes, (h, w) of those of an image."""
    sides = (recipe["num_frames"], *recipe["image_size"]) if takes_clips(recipe["model"]) \
        else recipe["image_size"]
    return tuple(side // stride for side, stride in zip(sides, encoder.patch_stride))


def build_classifier(recipe):
    """The fine-tuning model of a recipe, a dict of the fields of finetune.Recipe."""
    return build_encoder(recipe, num_classes=recipe["num_classes"], pool=recipe["pool"],
                         dropout=recipe.get("dropout", 0.0))
