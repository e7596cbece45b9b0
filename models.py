"""Models by name: the pre-training model and the classifier that a recipe describes."""
import mvit
import vit
from maskfeat import MaskFeat
from targets import TARGETS

MODELS = {**mvit.MODELS, **vit.MODELS}


def takes_clips(name):
    """True for the models of video, False for those of images."""
    return name in mvit.MODELS


def check_kind(name, samples):
    """Raise ValueError unless the model takes what the samples (layouts.Samples) are."""
    if takes_clips(name) != (samples.kind == "video"):
        kind, others = ("clips", vit.MODELS) if takes_clips(name) else ("images", mvit.MODELS)
        raise ValueError(f"model={name} takes {kind}, but {samples.root} holds {samples.kind}s: "
                         f"use --model {' or '.join(others)}")


def build_encoder(recipe, **options):
    """The encoder of a recipe. Raises ValueError for an unknown name or setting."""
    name = recipe["model"]
    if name not in MODELS:
        raise ValueError(f"model={name!r}: use one of {', '.join(MODELS)}")
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
    if takes_clips(recipe["model"]):
        T, stride = recipe["num_frames"], recipe["output_stride"]
        for axis, side in zip("HW", (H, W)):
            if side % stride:
                low = side - side % stride
                raise ValueError(f"clip {T}x{H}x{W} is not divisible by the output stride "
                                 f"{stride}: {axis}={side}, use {low or stride} or {low + stride}")
    encoder = build_encoder(recipe, num_classes=0)
    patch = encoder.patch_stride[-1]
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


def build_classifier(recipe):
    """The fine-tuning model of a recipe, a dict of the fields of finetune.Recipe."""
    return build_encoder(recipe, num_classes=recipe["num_classes"], pool=recipe["pool"],
                         dropout=recipe.get("dropout", 0.0))
