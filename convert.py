"""Other people's checkpoints into our models, and ours into their layouts.

    python convert.py MVITv2_S_MaskFeat_PT.pyth out/released.pt    # theirs -> ours
    python convert.py out/finetune/last.pt vit.pth --to timm       # ours -> timm: ViT's default
    python convert.py out/finetune/last.pt mvit.pyth --to release  # ours -> release

Formats are recognized by the names of the tensors: ours; the official release (SlowFast `.pyth`:
MaskFeat, supervised MViTv2); torchvision's `mvit_v2_s`; ViT of timm, DeiT, DINO and MAE.
"""
import argparse
import json
import math
import os
import re

from engine import read_checkpoint, run_main, save_checkpoint  # isort: skip (before torch)
import torch
import torch.nn.functional as F

import mvit
import vit
from models import build_classifier, build_maskfeat

# Tables of (fragment of their name, fragment of ours), at the start of a name or after a dot. The
# first row that matches counts; None drops the tensor. Our names are those of mvit.py and vit.py,
# with "maskfeat." before what only pre-training has. Export reads a table backwards.
PRETRAINED = [("encoder.", ""), ("", "maskfeat.")]  # as in MaskFeat(encoder, target)
RELEASE = [("hogs.", None), ("mask_token", "maskfeat.mask_token"),  # hogs: constant filters
           ("pred_head.transforms.0.0.", "maskfeat.norm."),
           ("pred_head.projections.0.", "maskfeat.head.")]
RELEASE_VIT = [("head.projection.", "head."), *RELEASE]
TORCHVISION = [("conv_proj.", "patch_embed.proj."), ("pos_encoding.class_token", "cls_token"),
               ("attn.project.0.", "attn.proj."), ("project.", "proj."),
               *((f"attn.pool_{x}.pool.", f"attn.pool_{x}.") for x in "qkv"),
               *((f"attn.pool_{x}.norm_act.0.", f"attn.norm_{x}.") for x in "qkv"),
               ("mlp.0.", "mlp.fc1."), ("mlp.3.", "mlp.fc2."), ("head.1.", "head.projection.")]
TIMM = [("fc_norm.", "norm.")]  # the norm after mean pooling
DINO = [("backbone.", ""), ("head.", None)]  # its head is no classifier
MAE = [(f"decoder_{x}", None) for x in ("pos_embed", "embed.", "blocks.", "norm.", "pred.")]
MAE += [("mask_token", None)]  # belongs to the decoder
TABLES = {"torchvision": TORCHVISION, "timm": TIMM, "DINO": DINO, "MAE": MAE}

# Names that the formats further down lack. DeiT, DINO's trunk and fine-tuned MAE have timm's names.
SIGNS = {"ours": r"^encoder\.", "torchvision": r"\.pool_[qkv]\.pool\.", "DINO": r"^backbone\.",
         "MAE": r"^decoder_", "release": r"\.pool_[qkv]\.|^pred_head\.|^head\.projection\.",
         "timm": r"^blocks\.\d+\.attn\.qkv\."}

# (axes of the stem's kernel, width, depth) -> model
KINDS = {(5, 64, 3): "mvit_tiny", (5, 96, 16): "mvitv2_s", (5, 96, 24): "mvitv2_b",
         (5, 144, 48): "mvitv2_l", (4, 128, 6): "vit_tiny", (4, 768, 12): "vit_b",
         (4, 1024, 24): "vit_l"}


def recognize(checkpoint):
    """(format, state dict) of a checkpoint or a bare state dict. Names lose DDP's "module."."""
    # A file of DINO has a student and a teacher, which counts.
    for key in ("model_state", "model", "teacher", "student", "state_dict", None):
        state = checkpoint if key is None else checkpoint.get(key)
        if isinstance(state, dict) and all(torch.is_tensor(value) for value in state.values()):
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
            if key == "model" and "recipe" in checkpoint:
                return "ours", state
            for form, sign in SIGNS.items():
                if any(re.search(sign, name) for name in state):
                    return form, state
    raise ValueError(f"no known checkpoint format: keys {sorted(map(str, checkpoint))[:8]}; "
                     f"known formats are {', '.join(SIGNS)}")


def rename(state, table, back=False):
    """A state dict by its new names, and {new name: old name}. back: from our names to theirs."""
    if back:
        table = [(ours, theirs) for theirs, ours in reversed(table) if ours is not None]
    renamed, origin = {}, {}
    for name, tensor in state.items():
        new = name
        for old, by in table:
            if match := re.search(rf"(?:^|(?<=\.)){re.escape(old)}", name):
                new = None if by is None else name[:match.start()] + by + name[match.end():]
                break
        if new in renamed:
            raise ValueError(f"{name} and {origin[new]} both mean {new}: not one model's file")
        if new is not None:
            renamed[new], origin[new] = tensor, name
    return renamed, origin


def translate(form, state):
    """rename() of a state dict in a known format to our names."""
    if form == "ours":
        table = PRETRAINED if any(name.startswith("encoder.") for name in state) else []
    elif form == "release":
        table = RELEASE if any(".pool_q." in name for name in state) else RELEASE_VIT
    else:
        table = TABLES[form]
    return rename(state, table)


def signature(state):
    """(key in KINDS, MViT's `expand`) of a state dict with our names."""
    stem = state.get("patch_embed.proj.weight", torch.empty(0))
    qkv = [tensor for name, tensor in state.items() if name.endswith("attn.qkv.weight")]
    wider = any(len(tensor) != 3 * tensor.shape[1] for tensor in qkv)
    return (stem.ndim, len(stem), len(qkv)), "attn" if wider else "mlp"


def resize_positions(name, tensor, shape):
    """A table of positions in another shape, else None. Release: relative tables linearly."""
    if ".rel_pos_" in name and tensor.shape[1:] == shape[1:]:
        return F.interpolate(tensor.T[None].float(), size=shape[0], mode="linear")[0].T
    if name == "pos_embed" and tensor.shape[2:] == shape[2:]:
        old, new = (math.isqrt(n - 1) for n in (tensor.shape[1], shape[1]))
        if old * old + 1 == tensor.shape[1] and new * new + 1 == shape[1]:  # squares, class token
            table = tensor[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2).float()
            table = F.interpolate(table, size=(new, new), mode="bicubic").flatten(2).mT
            return torch.cat([tensor[:, :1], table], dim=1)
    return None


def part(name):
    """The head, norm or mask token that `name` belongs to, else None. Stages differ in these."""
    match = re.fullmatch(r"((maskfeat\.)?(norm|head))(\.projection)?\.(weight|bias)", name)
    return match[1] if match else name if name == "maskfeat.mask_token" else None


def load_weights(model, path, verbose=True):
    """Load a checkpoint file of any known format into a MaskFeat, an encoder or a classifier.

    Returns {"loaded", "resized", "fresh", "left out"}: lists of names, also printed. The last one
    names tensors of the file. Head, final norm and mask token may be fresh or left out, each as a
    whole, and so may a head of another size. Raises ValueError if other tensors do not fit.
    """
    checkpoint, own = read_checkpoint(path), model.state_dict()
    form, found = recognize(checkpoint)
    state, origin = translate(form, found)
    places, names = translate("ours", own)
    dropped = [old for old in found if old not in set(origin.values())]
    report = {"loaded": [], "resized": [], "fresh": [], "left out": dropped}
    parts, wrong = {part(new) for new in state}, []
    for new, place in places.items():
        name = names[new]
        if new not in state:
            (report["fresh"] if part(new) and part(new) not in parts else wrong).append(name)
            continue
        old, tensor = origin.pop(new), state[new]
        if new == "cls_token":
            tensor = tensor.reshape(1, 1, -1)  # torchvision: one axis
        change = f"{tuple(tensor.shape)} -> {tuple(place.shape)}"
        if tensor.shape == place.shape:
            own[name] = tensor
            report["loaded"].append(name)
        elif (resized := resize_positions(new, tensor, place.shape)) is not None:
            own[name] = resized
            report["resized"].append(f"{name} {change}")
        elif part(new) in ("head", "maskfeat.head"):  # other classes, another target
            report["fresh"].append(name)
            report["left out"].append(f"{old} {tuple(tensor.shape)}")
        else:
            wrong.append(f"{old} {change}")
    for new, old in origin.items():
        (report["left out"] if part(new) else wrong).append(old)
    if wrong:
        raise ValueError(f"{path} ({form}) is a checkpoint of another model: {len(wrong)} tensors "
                         f"do not fit, such as {'; '.join(wrong[:3])}"
                         + expand_hint(checkpoint, state, places))
    model.load_state_dict(own)
    if verbose:
        counts = ", ".join(f"{len(names)} {what}" for what, names in report.items())
        print(f"{path} ({form}): {counts}")
        for what in ("resized", "fresh", "left out"):
            for name in report[what]:
                print(f"  {what}: {name}")
    return report


def expand_hint(checkpoint, state, places):
    """The `expand` and `pool` that a model needs, if it is like the checkpoint's in the rest."""
    (kind, expand), (other_kind, other) = signature(state), signature(places)
    if kind != other_kind or expand == other:
        return ""
    if "maskfeat.mask_token" in places:  # no pooling
        return f'; use expand="{expand}" (--expand {expand})'
    pool = foreign_recipe(checkpoint)["pool"]
    return f'; use expand="{expand}", pool="{pool}" (--expand {expand} --pool {pool})'


def foreign_recipe(checkpoint):
    """The recipe of the model and its input, of a checkpoint or a bare state dict.

    Names and shapes tell most of it, the release's `cfg` the pooling, sampling rate, mean and std.
    Pre-training gets the release's target and mask. num_classes is 0 without a head.
    Raises ValueError for an unknown model.
    """
    form, state = recognize(checkpoint)
    if form == "ours" and "recipe" in checkpoint:
        return {"pool": "mean", **checkpoint["recipe"]}
    pool = "mean" if form in ("ours", "release") or "fc_norm.weight" in state else "cls"
    state, _ = translate(form, state)
    kind, expand = signature(state)
    if kind not in KINDS:
        raise ValueError(f"{form} checkpoint of no known model: {kind} is not in {KINDS}")
    name, video = KINDS[kind], KINDS[kind] in mvit.MODELS
    tables = [f"blocks.0.attn.rel_pos_{axis}" for axis in "thw"]
    tables += [f"blocks.{kind[2] - 1}.attn.rel_pos_h"]
    for table in tables if video else ["pos_embed"]:
        if table not in state:
            raise ValueError(f"{form} checkpoint of {name} lacks {table}")
    head = state.get("head.projection.weight", state.get("head.weight", ()))
    recipe = {"model": name, "num_classes": len(head), "num_frames": 16, "sampling_rate": 4,
              "crop_ratio": 0.875, "patch_size": 16, "output_stride": 16, "drop_path": 0.0,
              "checkpointing": False, "expand": expand}
    if video:
        t, h, w, last = ((len(state[table]) + 1) // 2 for table in tables)  # 2n - 1 distances
        recipe |= {"num_frames": 2 * t, "image_size": (4 * h, 4 * w), "mean": (0.45,) * 3,
                   "std": (0.225,) * 3,  # of Kinetics, release
                   "output_stride": 4 * 2 ** round(math.log2(h / last))}  # 78 / 9 counts as 8
        if expand == "attn":  # the release's supervised models
            pool = "cls"
    else:
        tokens, patch = state["pos_embed"].shape[1], state["patch_embed.proj.weight"].shape[-1]
        side = math.isqrt(tokens - 1)
        if side * side + 1 != tokens:
            raise ValueError(f"pos_embed of {tokens} tokens is not a class token and a square grid")
        # ImageNet's mean and std. Some of timm's ViTs (augreg) want 0.5, which no file tells.
        recipe |= {"patch_size": patch, "image_size": (side * patch,) * 2,
                   "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    if "maskfeat.mask_token" in state:
        recipe |= {"target": "hog", "bins": 9, "cell": 8, "norm": "l2", "color": "rgb",
                   "gradient": "sobel", "pixel_norm": "dataset", "mask_ratio": 0.4,
                   "mask": "cube" if video else "block"}
    return {**recipe, "pool": pool, **read_cfg(str(checkpoint.get("cfg", "")))}


def read_cfg(cfg):
    """Pooling, sampling rate, mean and std, as far as the release's YAML text gives them."""
    recipe = {}
    if match := re.search(r"\bUSE_MEAN_POOLING:\s*(\w+)", cfg):
        recipe["pool"] = "mean" if match[1].lower() == "true" else "cls"
    if match := re.search(r"\bSAMPLING_RATE:\s*(\d+)", cfg):
        recipe["sampling_rate"] = int(match[1])
    for key in ("mean", "std"):
        if match := re.search(rf"\b{key.upper()}:((?:[\s\[,-]+[\d.]+){{3}})", cfg):
            recipe[key] = tuple(map(float, re.findall(r"[\d.]+", match[1])))
    return recipe


def import_foreign(path):
    """A foreign file as {"model", "recipe"}. A file without a head becomes a trunk without norm."""
    recipe = foreign_recipe(read_checkpoint(path))
    model = build_maskfeat(recipe) if "target" in recipe else build_classifier(recipe)
    report = load_weights(model, path)
    if differs := report["fresh"] + report["resized"]:
        raise ValueError(f"{path} is like {recipe['model']}, but not it: {differs[:3]}")
    return {"model": model.state_dict(), "recipe": recipe}


def export(checkpoint, to):
    """(our checkpoint in another layout, names of the tensors that it has no place for).

    to="timm", ViT only: a flat state dict, of pre-training the trunk. pool="mean" gives fc_norm
    (global_pool="avg" in timm), "cls" gives norm. to="release": {"epoch", "model_state",
    "optimizer_state", "cfg"}, without optimizer and `hogs`; `cfg` says what shapes do not.
    """
    recipe, (state, origin) = foreign_recipe(checkpoint), translate(*recognize(checkpoint))
    is_vit = recipe["model"] in vit.MODELS
    if to == "timm":
        if not is_vit:
            raise ValueError(f"timm has no {recipe['model']} for video: use --to release")
        trunk = {new: state[new] for new in state if not new.startswith("maskfeat.")}
        state, _ = rename(trunk, TIMM if recipe["pool"] == "mean" else [], back=True)
        return state, [old for new, old in origin.items() if new not in trunk]
    state, _ = rename(state, RELEASE_VIT if is_vit else RELEASE, back=True)
    data = {key.upper(): recipe[key] for key in ("sampling_rate", "mean", "std") if key in recipe}
    cfg = json.dumps({"MVIT": {"USE_MEAN_POOLING": recipe["pool"] == "mean"}, "DATA": data})
    cfg = cfg.replace('"', "")
    return {"epoch": 0, "model_state": state, "optimizer_state": {}, "cfg": cfg}, []


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--to", choices=("release", "timm"), help="layout; default: timm for ViT")
    args = parser.parse_args()
    if os.path.exists(args.destination):
        raise ValueError(f"{args.destination} exists: choose another name")
    checkpoint = read_checkpoint(args.source)
    form, model = recognize(checkpoint)[0], foreign_recipe(checkpoint)["model"]
    if form == "ours":
        to = args.to or ("timm" if model in vit.MODELS else "release")
        result, left_out = export(checkpoint, to)
        count = len(result.get("model_state", result))
        print(f"{args.source} (ours): {count} to {to}, {len(left_out)} left out")
        for name in left_out:
            print(f"  left out: {name}")
    elif args.to:
        raise ValueError(f"{args.source} ({form}) is not ours: convert it without --to first")
    else:
        result = import_foreign(args.source)
    os.makedirs(os.path.dirname(args.destination) or ".", exist_ok=True)
    save_checkpoint(args.destination, result)
    print(f"wrote {args.destination}: {model}")


if __name__ == "__main__":
    run_main(main)
