"""Models by name: the pre-training model and the classifier that a recipe describes."""
import mvit
import vit
from maskfeat import MaskFeat
from targets import TARGETS

MODELS = {**mvit.MODELS, **vit.MODELS}


def takes_clips(name):
    return name in mvit.MODELS


def check_kind(name, samples):
    """Raise ValueError unless the model takes what the samples (layouts.Samples) are."""
    if takes_clips(name) != (samples.kind == "video"):
        kind, others = ("clips", vit.MODELS) if takes_clips(name) else ("images", mvit.MODELS)
        raise ValueError(f"model={name} takes {kind}, but {samples.root} holds {samples.kind}s: use "
                         f"--model {' or '.join(others)}")


def builder(name):
    """The constructor of an encoder, by name."""
    if name not in MODELS:
        raise ValueError(f"model={name!r}: use one of {', '.join(MODELS)}")
    return MODELS[name]


def build_maskfeat(recipe):
    """The pre-training model that a recipe (a dict, as stored in a checkpoint) describes.

    Reads model, target, image_size, num_frames, output_stride, patch_size, expand, drop_path, checkpointing, and for
    the target bins, cell, norm, color, gradient (HOG), pixel_norm (pixels), label_classes, label_order (pseudo-labels)
    or teacher, and with it align, mean, std (features). The teacher's file is read.
    """
    name, target, (H, W) = recipe["model"], recipe["target"], recipe["image_size"]
    build = builder(name)
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: use one of {', '.join(TARGETS)}")
    shared = {"num_classes": 0, **{key: recipe[key] for key in ("image_size", "drop_path", "checkpointing")}}
    if name in mvit.MODELS:
        T, stride = recipe["num_frames"], recipe["output_stride"]
        for axis, side in zip("HW", (H, W)):
            if side % stride:
                low = side - side % stride
                raise ValueError(f"clip {T}x{H}x{W} is not divisible by the output stride {stride}: {axis}={side}, use "
                                 f"{low or stride} or {low + stride}")
        encoder = build(num_frames=T, output_stride=stride, expand=recipe["expand"], **shared)
    else:
        encoder = build(patch_size=recipe["patch_size"], **shared)
    patch = encoder.patch_stride[-1]
    grid = H // patch, W // patch
    if target == "hog":
        options = {"patch_size": patch, **{key: recipe[key] for key in ("bins", "cell", "norm", "color", "gradient")}}
    elif target == "pixel":
        options = {"patch_size": patch, "norm": recipe["pixel_norm"]}
    elif target == "dvae":
        options = {"teacher": recipe["teacher"]}
    elif target == "label":
        options = {"grid": grid, "classes": recipe["label_classes"], "order": recipe["label_order"]}
    else:
        options = {"grid": grid, **{key: recipe[key] for key in ("teacher", "image_size", "mean", "std", "align")}}
    return MaskFeat(encoder, TARGETS[target](**options))


def build_classifier(recipe):
    """The fine-tuning model that a recipe describes: a bare encoder with norm and head.

    Reads model, num_classes, image_size (H, W), drop_path, dropout (0 if absent), checkpointing, pool; num_frames and
    expand (MViT) or patch_size (ViT). The output stride, unless given, is the model's own: 32, and 8 for mvit_tiny.
    """
    options = {key: recipe[key] for key in ("num_classes", "image_size", "drop_path", "checkpointing", "pool")}
    keys = ("num_frames", "expand") if recipe["model"] in mvit.MODELS else ("patch_size",)
    options |= {key: recipe[key] for key in keys}
    if recipe["model"] in mvit.MODELS and recipe.get("output_stride"):
        options["output_stride"] = recipe["output_stride"]
    return builder(recipe["model"])(dropout=recipe.get("dropout", 0.0), **options)
