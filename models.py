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
        raise ValueError(f"model={name} takes {kind}, but {samples.root} holds {samples.kind}s: "
                         f"use --model {' or '.join(others)}")


def builder(name):
    """The constructor of an encoder, by name."""
    if name not in MODELS:
        raise ValueError(f"model={name!r}: use one of {', '.join(MODELS)}")
    return MODELS[name]


def build_encoder(recipe):
    """The trunk of a pre-training recipe, on an image size that its output stride divides."""
    build, size = builder(recipe["model"]), recipe["image_size"]
    shared = {key: recipe[key] for key in ("image_size", "drop_path", "checkpointing")}
    if not takes_clips(recipe["model"]):
        return build(num_classes=0, patch_size=recipe["patch_size"], **shared)
    T, stride = recipe["num_frames"], recipe["output_stride"]
    for axis, side in zip("HW", size):
        if side % stride:
            low = side - side % stride
            raise ValueError(f"clip {T}x{size[0]}x{size[1]} is not divisible by the output stride "
                             f"{stride}: {axis}={side}, use {low or stride} or {low + stride}")
    return build(num_classes=0, num_frames=T, output_stride=stride, expand=recipe["expand"],
                 **shared)


def build_maskfeat(recipe):
    """The pre-training model that a recipe describes (a dict, as stored in a checkpoint).

    The keys that are read: see build_encoder and below. A teacher's file is read, too.
    """
    name = recipe["target"]
    if name not in TARGETS:
        raise ValueError(f"target={name!r}: use one of {', '.join(TARGETS)}")
    encoder = build_encoder(recipe)
    patch = encoder.patch_stride[-1]
    grid = tuple(side // patch for side in recipe["image_size"])
    if name == "hog":
        keys = ("bins", "cell", "norm", "color", "gradient")
        options = {"patch_size": patch, **{key: recipe[key] for key in keys}}
    elif name == "pixel":
        options = {"patch_size": patch, "norm": recipe["pixel_norm"]}
    elif name == "dvae":
        options = {"teacher": recipe["teacher"]}
    elif name == "label":
        options = {"grid": grid, "classes": recipe["label_classes"], "order": recipe["label_order"]}
    else:
        keys = ("teacher", "image_size", "mean", "std", "align")
        options = {"grid": grid, **{key: recipe[key] for key in keys}}
    return MaskFeat(encoder, TARGETS[name](**options))


def build_classifier(recipe):
    """The fine-tuning model that a recipe describes: an encoder with norm and head.

    The output stride, unless given, is the model's own: 32, and 8 for mvit_tiny.
    """
    keys = ["num_classes", "image_size", "drop_path", "checkpointing", "pool"]
    if takes_clips(recipe["model"]):
        keys += ["num_frames", "expand"] + ["output_stride"] * bool(recipe.get("output_stride"))
    else:
        keys += ["patch_size"]
    options = {key: recipe[key] for key in keys}
    return builder(recipe["model"])(dropout=recipe.get("dropout", 0.0), **options)
