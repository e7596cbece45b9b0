"""Checkpoints of others, and our own, into our models.

    python convert.py MVITv2_S_MaskFeat_PT.pyth out/released.pt      # then: visualize.py --checkpoint out/released.pt

Formats are recognised by their keys. Known: ours (pretrain.py), and the official MaskFeat release (SlowFast `.pyth`,
MViTv2 and ViT, pre-trained and fine-tuned). `load_weights(model, path)` is the call.
"""
import argparse
import math
import os
import re

import torch
import torch.nn.functional as F

import mvit
import vit
from engine import read_checkpoint, run_main, save_checkpoint
from maskfeat import MaskFeat
from targets import TARGETS

ENCODERS = {**mvit.MODELS, **vit.MODELS}

# Names in the file -> names in MaskFeat(encoder, target); the first pattern that matches counts, None drops the tensor.
OURS = [(r"", r"")]
RELEASE = [
    (r"^hogs\.", None),                                     # Sobel filters: constants, ours are no parameters
    (r"^mask_token$", "mask_token"),
    (r"^pred_head\.transforms\.0\.0\.", "norm."),
    (r"^pred_head\.projections\.0\.", "head."),
    (r"^", "encoder."),                                     # mvit.py keeps the release's names
]
RELEASE_VIT = [(r"^head\.projection\.", "encoder.head."), *RELEASE]           # vit.py has timm's


def build_maskfeat(recipe):
    """The pre-training model that a recipe (a dict, as stored in a checkpoint) describes.

    Reads model, target, image_size, num_frames, output_stride, patch_size, expand, drop_path, checkpointing, and for the
    target bins, cell, norm, color, gradient (HOG) or pixel_norm (pixels).
    """
    name, target, (H, W) = recipe["model"], recipe["target"], recipe["image_size"]
    if name not in ENCODERS:
        raise ValueError(f"model={name!r}: use one of {', '.join(ENCODERS)}")
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: use one of {', '.join(TARGETS)}")
    shared = dict(num_classes=0, image_size=(H, W), drop_path=recipe["drop_path"], checkpointing=recipe["checkpointing"])
    if name in mvit.MODELS:
        T, stride = recipe["num_frames"], recipe["output_stride"]
        for axis, side in zip("HW", (H, W)):
            if side % stride:
                low = side - side % stride
                raise ValueError(f"clip {T}x{H}x{W} is not divisible by the output stride {stride}: {axis}={side}, use "
                                 f"{low or stride} or {low + stride}")
        encoder = mvit.MODELS[name](num_frames=T, output_stride=stride, expand=recipe["expand"], **shared)
    else:
        encoder = vit.MODELS[name](patch_size=recipe["patch_size"], **shared)
    if target == "hog":
        options = {key: recipe[key] for key in ("bins", "cell", "norm", "color", "gradient")}
    else:
        options = {"norm": recipe["pixel_norm"]}
    return MaskFeat(encoder, TARGETS[target](patch_size=encoder.patch_stride[-1], **options))


def recognise(checkpoint):
    """(format, state dict) of a checkpoint's content."""
    for key, name in (("model", "ours"), ("model_state", "release")):
        state = checkpoint.get(key)
        if isinstance(state, dict) and state and all(hasattr(v, "shape") for v in state.values()):
            return name, state
    raise ValueError(f"no known checkpoint format: top-level keys {sorted(map(str, checkpoint))[:8]}; known are ours "
                     "(model) and the MaskFeat release's (model_state)")


def rename(state, table):
    """The state dict under the names that `table` gives."""
    renamed = {}
    for name, tensor in state.items():
        pattern, new = next((pattern, new) for pattern, new in table if re.search(pattern, name))
        if new is not None:
            renamed[re.sub(pattern, new, name, count=1)] = tensor
    return renamed


def resize_positions(name, tensor, shape):
    """A position table brought to `shape`, or None if `name` is no table. Relative: linear (release); absolute: bicubic."""
    if ".rel_pos_" in name and tensor.shape[1:] == shape[1:]:
        return F.interpolate(tensor.T[None].float(), size=shape[0], mode="linear")[0].T.to(tensor.dtype)
    if name.endswith("pos_embed") and tensor.shape[2:] == shape[2:]:
        old, new = (math.isqrt(n - 1) for n in (tensor.shape[1], shape[1]))
        if old * old + 1 == tensor.shape[1] and new * new + 1 == shape[1]:    # square grids and a class token
            table = tensor[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2).float()
            table = F.interpolate(table, size=(new, new), mode="bicubic").flatten(2).transpose(1, 2)
            return torch.cat([tensor[:, :1], table.to(tensor.dtype)], dim=1)
    return None


def load_weights(model, path, verbose=True):
    """Load a checkpoint file into `model`: a MaskFeat, or an encoder alone (mvit.py, vit.py).

    Returns {"loaded", "resized", "fresh", "left out"}: lists of names, also printed. The head, the mask token and the
    final norm may be fresh or left out, since they differ between pre-training and fine-tuning; any other tensor that
    finds no place, or gets none, means another model and raises ValueError.
    """
    form, state = recognise(read_checkpoint(path))
    own = model.state_dict()
    state = rename(state, OURS if form == "ours" else RELEASE if "blocks.0.attn.pool_q.weight" in state else RELEASE_VIT)
    if "mask_token" not in own:                                               # an encoder alone
        state = {name.removeprefix("encoder.") if name.startswith("encoder.") else "maskfeat." + name: tensor
                 for name, tensor in state.items()}

    def ends(name):                                                           # what may differ between the two stages
        return name.startswith("maskfeat.") or re.match(r"(encoder\.)?(mask_token|norm\.|head\.)", name)

    report = {"loaded": [], "resized": [], "fresh": [], "left out": []}
    wrong = []
    for name, tensor in state.items():
        if name not in own:
            (report["left out"] if ends(name) else wrong).append(name)
        elif tensor.shape == own[name].shape:
            own[name] = tensor
            report["loaded"].append(name)
        else:
            resized = resize_positions(name, tensor, own[name].shape)
            if resized is not None:
                own[name] = resized
                report["resized"].append(f"{name} {tuple(tensor.shape)} -> {tuple(resized.shape)}")
            elif ends(name):
                report["left out"].append(f"{name} {tuple(tensor.shape)}")
            else:
                wrong.append(f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}")
    done = set(report["loaded"]) | {line.split()[0] for line in report["resized"]}
    for name in own:
        if name not in done:
            (report["fresh"] if ends(name) else wrong).append(name)
    if wrong:
        raise ValueError(f"{path} ({form}) is a checkpoint of another model: {len(wrong)} tensors do not fit, such as "
                         + "; ".join(wrong[:3]))
    model.load_state_dict(own)
    if verbose:
        print(f"{path} ({form}): " + ", ".join(f"{len(names)} {what}" for what, names in report.items()))
        for what in ("resized", "fresh", "left out"):
            for name in report[what]:
                print(f"  {what}: {name}")
    return report


# What a pre-training checkpoint of the release does not say of itself: (stem width, depth) -> model.
RELEASED = {(96, 16): "mvitv2_s", (144, 48): "mvitv2_l", (768, 12): "vit_b", (1024, 24): "vit_l"}


def released_recipe(state):
    """The recipe, as far as it describes the model and its input, behind a released pre-training checkpoint."""
    stem = state.get("patch_embed.proj.weight", torch.empty(0))
    depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    name = RELEASED.get((len(stem), depth))
    if name is None or "mask_token" not in state:
        raise ValueError(f"not a released pre-training checkpoint: stem width {len(stem)}, depth {depth}, "
                         f"{'with' if 'mask_token' in state else 'without'} mask token; for a fine-tuned one use "
                         "load_weights(model, path)")
    video = name in mvit.MODELS
    return {"model": name, "target": "hog", "image_size": (224, 224), "num_frames": 16, "sampling_rate": 4,
            "output_stride": 16, "patch_size": 16, "expand": "mlp", "drop_path": 0.0, "checkpointing": False,
            "bins": 9, "cell": 8, "norm": "l2", "color": "rgb", "gradient": "sobel", "pixel_norm": "dataset",
            "mask": "cube" if video else "block", "mask_ratio": 0.4,
            "mean": (0.45,) * 3 if video else (0.485, 0.456, 0.406),
            "std": (0.225,) * 3 if video else (0.229, 0.224, 0.225)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("destination")
    args = parser.parse_args()
    if os.path.exists(args.destination):
        raise ValueError(f"{args.destination} exists: nothing is written over it")
    form, state = recognise(read_checkpoint(args.source))
    if form == "ours":
        raise ValueError(f"{args.source} is in our format already")
    recipe = released_recipe(state)
    model = build_maskfeat(recipe)
    load_weights(model, args.source)
    os.makedirs(os.path.dirname(args.destination) or ".", exist_ok=True)
    save_checkpoint(args.destination, {"model": model.state_dict(), "recipe": recipe})
    print(f"wrote {args.destination}: {recipe['model']}")


if __name__ == "__main__":
    run_main(main)
