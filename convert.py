"""Checkpoints of others into our models, and ours into theirs.

    python convert.py MVITv2_S_MaskFeat_PT.pyth out/released.pt      # theirs -> ours; visualize.py, finetune.py read it
    python convert.py out/finetune/last.pt vit.pth --to timm         # ours -> theirs: ViT to timm (default for ViT) ...
    python convert.py out/finetune/last.pt mvit.pyth --to release    # ... MViT and ViT to the MaskFeat release's layout

Formats are recognised by the names inside, never by file names. Known: ours (pretrain.py, finetune.py); the official
release (SlowFast `.pyth`: MaskFeat pre-trained and fine-tuned, MViTv2 and ViT; supervised MViTv2 for Kinetics);
torchvision's `mvit_v2_s`; timm's, DeiT's, DINO's and MAE's ViT-B and ViT-L. `load_weights(model, path)` is the call.
"""
import argparse
import json
import math
import os
import re

import torch
import torch.nn.functional as F

import mvit
import vit
from engine import read_checkpoint, run_main, save_checkpoint
from models import build_classifier, build_maskfeat

# Tables: (fragment of their names, of ours), at a name's start or after a dot; the first that occurs counts, None drops
# the tensor, other names stay. Ours are mvit.py's and vit.py's, with "maskfeat." before what only pre-training has.
# Export reads the same tables from bottom to top and from right to left.
PRETRAINED = [("encoder.", ""), ("", "maskfeat.")]                            # as MaskFeat(encoder, target) has them
RELEASE = [                                                                   # mvit.py keeps the release's names
    ("hogs.", None),                                                          # Sobel filters: constants, not exported
    ("mask_token", "maskfeat.mask_token"),
    ("pred_head.transforms.0.0.", "maskfeat.norm."),
    ("pred_head.projections.0.", "maskfeat.head."),
]
RELEASE_VIT = [("head.projection.", "head."), *RELEASE]                       # vit.py has timm's
# torchvision computes what expand="attn", pool="cls" does; only, it sizes the tables of height and width by the longer
# side (the same for squares), and its class token has one axis.
TORCHVISION = [
    ("conv_proj.", "patch_embed.proj."),
    ("pos_encoding.class_token", "cls_token"),
    ("attn.project.0.", "attn.proj."),
    ("project.", "proj."),
    *((f"attn.pool_{x}.pool.", f"attn.pool_{x}.") for x in "qkv"),
    *((f"attn.pool_{x}.norm_act.0.", f"attn.norm_{x}.") for x in "qkv"),
    ("mlp.0.", "mlp.fc1."),
    ("mlp.3.", "mlp.fc2."),
    ("head.1.", "head.projection."),
]
TIMM = [("fc_norm.", "norm.")]                                                # named so where it follows mean pooling
DINO = [("backbone.", ""), ("head.", None)]                                   # training file; its head is no classifier
MAE = [("mask_token", None), *((f"decoder_{x}", None) for x in ("pos_embed", "embed.", "blocks.", "norm.", "pred."))]
TABLES = {"torchvision": TORCHVISION, "timm": TIMM, "DINO": DINO, "MAE": MAE}

# Formats in the order of asking, each with names that those below lack. DeiT, DINO's trunk, fine-tuned MAE: timm's.
SIGNS = [("ours", r"^encoder\."), ("torchvision", r"\.pool_[qkv]\.pool\."), ("DINO", r"^backbone\."),
         ("MAE", r"^decoder_"), ("release", r"\.pool_[qkv]\.|^pred_head\.|^head\.projection\."),
         ("timm", r"^blocks\.\d+\.attn\.qkv\.")]

# (axes of the stem's kernel, width, depth) -> model
KINDS = {(5, 64, 3): "mvit_tiny", (5, 96, 16): "mvitv2_s", (5, 96, 24): "mvitv2_b", (5, 144, 48): "mvitv2_l",
         (4, 128, 6): "vit_tiny", (4, 768, 12): "vit_b", (4, 1024, 24): "vit_l"}


# ------------------------------------------------------------------------------------------------ reading checkpoints

def recognize(checkpoint):
    """(format, state dict) of a checkpoint's content, or of a bare state dict. Names lose DDP's "module."."""
    for key in ("model_state", "model", "teacher", "student", "state_dict", None):        # of DINO, the teacher counts
        state = checkpoint if key is None else checkpoint.get(key)
        if isinstance(state, dict) and state and all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
            if key == "model" and "recipe" in checkpoint:
                return "ours", state
            for form, sign in SIGNS:
                if any(re.search(sign, name) for name in state):
                    return form, state
    raise ValueError(f"no known checkpoint format: top-level keys {sorted(map(str, checkpoint))[:8]}; known are ours, "
                     "the official release's, torchvision's mvit_v2_s, and ViTs of timm, DeiT, DINO and MAE")


def rename(state, table, back=False):
    """{new name: (old name, tensor)}, and the old names of what the table drops. back: from our names to theirs."""
    renamed, dropped = {}, []
    for name, tensor in state.items():
        new = name
        for old, by in [(ours, theirs) for theirs, ours in table[::-1]] if back else table:
            match = old is not None and re.search(rf"(?:^|(?<=\.)){re.escape(old)}", name)
            if match:
                new = None if by is None else name[:match.start()] + by + name[match.end():]
                break
        if new is None:
            dropped.append(name)
        elif new in renamed:
            raise ValueError(f"{name} and {renamed[new][0]} both mean {new}: not a checkpoint of one model")
        else:
            renamed[new] = name, tensor
    return renamed, dropped


def translate(form, state):
    """rename() of a state dict in a known format to our names."""
    if form == "ours":
        return rename(state, PRETRAINED if any(name.startswith("encoder.") for name in state) else [])
    if form == "release":
        return rename(state, RELEASE if any(".pool_q." in name for name in state) else RELEASE_VIT)
    return rename(state, TABLES[form])


def resize_positions(name, tensor, shape):
    """A position table brought to `shape`; None if `name` is none. Relative: linear (release); absolute: bicubic."""
    if ".rel_pos_" in name and tensor.shape[1:] == shape[1:]:
        return F.interpolate(tensor.T[None].float(), size=shape[0], mode="linear")[0].T.to(tensor.dtype)
    if name == "pos_embed" and tensor.shape[2:] == shape[2:]:
        old, new = (math.isqrt(n - 1) for n in (tensor.shape[1], shape[1]))
        if old * old + 1 == tensor.shape[1] and new * new + 1 == shape[1]:    # square grids and a class token
            table = tensor[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2).float()
            table = F.interpolate(table, size=(new, new), mode="bicubic").flatten(2).transpose(1, 2)
            return torch.cat([tensor[:, :1], table.to(tensor.dtype)], dim=1)
    return None


def part(name):
    """Of which part that may differ between pre-training and fine-tuning `name` is, such as "head"; else None."""
    match = re.fullmatch(r"((maskfeat\.)?(norm|head))(\.projection)?\.(weight|bias)|maskfeat\.mask_token", name)
    return match and (match[1] or name)


def load_weights(model, path, verbose=True):
    """Load a checkpoint file of any known format into `model`: a MaskFeat, or an encoder or classifier (mvit, vit).

    Returns {"loaded", "resized", "fresh", "left out"}: lists of names, also printed, that cover the model's tensors and
    the file's (the last under the file's names). Head, mask token and final norm may be fresh or left out, each as a
    whole, as pre-training and fine-tuning differ in them; so may a head of another size. Any other tensor that finds no
    place, or gets none, means another model and raises ValueError with its name.
    """
    form, state = recognize(read_checkpoint(path))
    state, dropped = translate(form, state)
    own = model.state_dict()
    parts = {part(name) for name in state}
    report = {"loaded": [], "resized": [], "fresh": [], "left out": dropped}
    wrong = []
    for new, (name, wanted) in translate("ours", own)[0].items():
        if new not in state:
            (report["fresh"] if part(new) and part(new) not in parts else wrong).append(name)
            continue
        old, tensor = state.pop(new)
        tensor = tensor.reshape(1, 1, -1) if new == "cls_token" else tensor   # torchvision: one axis
        change = f"{tuple(tensor.shape)} -> {tuple(wanted.shape)}"
        resized = None if tensor.shape == wanted.shape else resize_positions(new, tensor, wanted.shape)
        if tensor.shape == wanted.shape:
            own[name] = tensor
            report["loaded"].append(name)
        elif resized is not None:
            own[name] = resized
            report["resized"].append(f"{name} {change}")
        elif part(new) in ("head", "maskfeat.head"):                          # other classes, another target
            report["fresh"].append(name)
            report["left out"].append(f"{old} {tuple(tensor.shape)}")
        else:
            wrong.append(f"{old} {change}")
    for new, (old, _) in state.items():                                       # what found no place
        (report["left out"] if part(new) else wrong).append(old)
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


# --------------------------------------------------------------------------------------- recipes of other checkpoints

def foreign_recipe(checkpoint):
    """The recipe, as far as it concerns the model and its input, behind a checkpoint's content or a bare state dict.

    Model, sizes, classes, expand and pool come from names and shapes; pool, sampling rate, mean and std also from the
    release's `cfg`. Pre-training gets the release's target and mask. Without head, num_classes is 0. Raises ValueError.
    """
    form, state = recognize(checkpoint)
    if form == "ours" and "recipe" in checkpoint:
        return {"pool": "mean", **checkpoint["recipe"]}
    mean_pooled = form in ("ours", "release") or any(name.startswith("fc_norm.") for name in state)
    state = {new: tensor for new, (_, tensor) in translate(form, state)[0].items()}
    stem = state.get("patch_embed.proj.weight", torch.empty(0))
    depth = 1 + max((int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)), default=-1)
    name = KINDS.get((stem.ndim, len(stem), depth))
    if name is None:
        raise ValueError(f"{form} checkpoint of no known model: stem {tuple(stem.shape)}, depth {depth}; known are "
                         + ", ".join(KINDS.values()))
    video = name in mvit.MODELS
    tables = [f"blocks.0.attn.rel_pos_{axis}" for axis in "thw"] + [f"blocks.{depth - 1}.attn.rel_pos_h"]
    for table in tables if video else ["pos_embed"]:
        if table not in state:
            raise ValueError(f"{form} checkpoint of {name} lacks {table}")

    head = next((tensor for key, tensor in state.items() if re.fullmatch(r"head\.(projection\.)?weight", key)), ())
    recipe = {"model": name, "num_classes": len(head), "num_frames": 16, "sampling_rate": 4, "crop_ratio": 0.875,
              "patch_size": 16, "expand": "mlp", "output_stride": 16, "drop_path": 0.0, "checkpointing": False}
    if video:
        t, h, w, last = ((len(state[table]) + 1) // 2 for table in tables)    # n positions have 2n-1 distances
        recipe |= {"num_frames": 2 * t, "image_size": (4 * h, 4 * w), "mean": (0.45,) * 3, "std": (0.225,) * 3,
                   "output_stride": 4 * 2 ** round(math.log2(h / last))}      # rounded, as 78/9 is: halves are floored
        if any(len(tensor) != 3 * tensor.shape[1] for key, tensor in state.items() if key.endswith("qkv.weight")):
            recipe["expand"] = "attn"
            mean_pooled = False                                               # the release's supervised models
    else:
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        if side * side + 1 != state["pos_embed"].shape[1]:
            raise ValueError(f"pos_embed {tuple(state['pos_embed'].shape)} is not a class token and a square grid")
        # ImageNet's mean and std. Some of timm's ViTs (augreg) want 0.5 and 0.5, which no checkpoint tells: set them.
        recipe |= {"patch_size": stem.shape[-1], "image_size": (side * stem.shape[-1],) * 2,
                   "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    recipe["pool"] = "mean" if mean_pooled else "cls"
    if "maskfeat.mask_token" in state:
        recipe |= {"target": "hog", "bins": 9, "cell": 8, "norm": "l2", "color": "rgb", "gradient": "sobel",
                   "pixel_norm": "dataset", "mask": "cube" if video else "block", "mask_ratio": 0.4}

    cfg = str(checkpoint.get("cfg", ""))                                      # YAML
    if said := re.search(r"\bUSE_MEAN_POOLING:\s*(\w+)", cfg):
        recipe["pool"] = "mean" if said[1].lower() == "true" else "cls"
    if said := re.search(r"\bSAMPLING_RATE:\s*(\d+)", cfg):
        recipe["sampling_rate"] = int(said[1])
    for key in ("mean", "std"):
        if said := re.search(rf"\b{key.upper()}:((?:[\s\[,-]+[\d.]+){{3}})", cfg):
            recipe[key] = tuple(float(number) for number in re.findall(r"[\d.]+", said[1]))
    return recipe


# ------------------------------------------------------------------------------------------------------- command line

def import_foreign(path):
    """A foreign file in our format, {"model", "recipe"}. Without a head it becomes a trunk, which has no final norm."""
    recipe = foreign_recipe(read_checkpoint(path))
    model = build_maskfeat(recipe) if "target" in recipe else build_classifier(recipe)
    report = load_weights(model, path)
    if report["fresh"] or report["resized"]:
        raise ValueError(f"{path} is like {recipe['model']}, but not it: {(report['fresh'] + report['resized'])[:3]}")
    return {"model": model.state_dict(), "recipe": recipe}


def export(checkpoint, to):
    """(our checkpoint in another layout, names that it has no place for).

    to: "timm", ViT only: a flat state dict; of pre-training the trunk. pool="mean" gives fc_norm (global_pool="avg" in
    timm), "cls" gives norm. "release": {"epoch", "model_state", "optimizer_state", "cfg"}, without the constant `hogs`
    buffers and without optimizer; `cfg` says what shapes do not.
    """
    recipe, state = foreign_recipe(checkpoint), translate(*recognize(checkpoint))[0]
    image, left_out = recipe["model"] in vit.MODELS, []
    if to == "timm":
        if not image:
            raise ValueError(f"timm has no {recipe['model']} for video: use --to release")
        left_out = [state.pop(name)[0] for name in list(state) if name.startswith("maskfeat.")]
        table = TIMM if recipe["pool"] == "mean" else []
    else:
        table = RELEASE_VIT if image else RELEASE
    state, _ = rename({name: tensor for name, (_, tensor) in state.items()}, table, back=True)
    state = {name: tensor for name, (_, tensor) in state.items()}
    if to == "timm":
        return state, left_out
    data = {key.upper(): recipe[key] for key in ("sampling_rate", "mean", "std") if key in recipe}
    cfg = json.dumps({"MVIT": {"USE_MEAN_POOLING": recipe["pool"] == "mean"}, "DATA": data})
    return {"epoch": 0, "model_state": state, "optimizer_state": {}, "cfg": cfg.replace('"', "")}, left_out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--to", choices=("release", "timm"), help="layout for ours; by default timm for ViT")
    args = parser.parse_args()
    if os.path.exists(args.destination):
        raise ValueError(f"{args.destination} exists: nothing is written over it")
    checkpoint = read_checkpoint(args.source)
    form, _ = recognize(checkpoint)
    if form != "ours":
        if args.to:
            raise ValueError(f"{args.source} ({form}) is not ours: convert it without --to, then the result with it")
        result = import_foreign(args.source)
    else:
        to = args.to or ("timm" if foreign_recipe(checkpoint)["model"] in vit.MODELS else "release")
        result, left_out = export(checkpoint, to)
        print(f"{args.source} (ours): {len(result.get('model_state', result))} to {to}, {len(left_out)} left out")
        for name in left_out:
            print(f"  left out: {name}")
    os.makedirs(os.path.dirname(args.destination) or ".", exist_ok=True)
    save_checkpoint(args.destination, result)
    print(f"wrote {args.destination}: {foreign_recipe(checkpoint)['model']}")


if __name__ == "__main__":
    run_main(main)
