"""Other people's checkpoints into our models, and ours into their layouts.

    python convert.py MVITv2_S_MaskFeat_PT.pyth out/released.pt    # theirs -> ours
    python convert.py out/finetune/last.pt vit.pth --to timm       # ours -> timm: ViT's default
    python convert.py out/finetune/last.pt mvit.pyth --to release  # ours -> release

Formats are recognized by the names of the tensors: ours; the official release (SlowFast `.pyth`:
MaskFeat, supervised MViTv2); torchvision's `mvit_v2_s`; ViT of timm, DeiT, DINO and MAE.
"""
import json
import math
import os
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from engine import read_checkpoint, run_main, save_checkpoint

import torch
import torch.nn.functional as F

import mvit
import vit
from models import build_classifier, build_maskfeat

# Tables of (fragment of their name, fragment of ours), at the start of a name or after a dot. The
# first row that matches counts. None drops the tensor. Our names are those of mvit.py and vit.py
# with "head." for "head.projection.", and with "maskfeat." before what only pre-training has.
# Export reads a table backwards.
HEAD = ("head.projection.", "head.")
PRETRAINED = [("encoder.", ""), ("", "maskfeat.")]
# Format: (what its names show and the formats further down lack, table)
FORMATS = {
    "ours": (r"^encoder\.", [HEAD]),
    "torchvision": (r"\.pool_[qkv]\.pool\.", [
        ("conv_proj.", "patch_embed.proj."), ("pos_encoding.class_token", "cls_token"),
        ("attn.project.0.", "attn.proj."), ("project.", "proj."),
        *((f"attn.pool_{x}.pool.", f"attn.pool_{x}.") for x in "qkv"),
        *((f"attn.pool_{x}.norm_act.0.", f"attn.norm_{x}.") for x in "qkv"),
        ("mlp.0.", "mlp.fc1."), ("mlp.3.", "mlp.fc2."), ("head.1.", "head.")]),
    "DINO": (r"^backbone\.", [("backbone.", ""), ("head.", None)]),  # its head is no classifier
    "MAE": (r"^decoder_", [("decoder_", None), ("mask_token", None)]),
    "release": (r"\.pool_[qkv]\.|^pred_head\.|^head\.projection\.", [
        HEAD, ("hogs.", None), ("mask_token", "maskfeat.mask_token"),  # hogs: constant filters
        ("pred_head.transforms.0.0.", "maskfeat.norm."),
        ("pred_head.projections.0.", "maskfeat.head.")]),
    # Also DeiT, DINO's trunk and fine-tuned MAE. fc_norm follows mean pooling.
    "timm": (r"^blocks\.\d+\.attn\.qkv\.", [("fc_norm.", "norm.")])}

# (axes of the stem's kernel, width, depth) -> model
KINDS = {(5, 64, 3): "mvit_tiny", (5, 96, 16): "mvitv2_s", (5, 96, 24): "mvitv2_b",
         (5, 144, 48): "mvitv2_l", (4, 128, 6): "vit_tiny", (4, 768, 12): "vit_b",
         (4, 1024, 24): "vit_l"}


def recognize(checkpoint):
    """(format, state dict) of a checkpoint or a bare state dict. Names lose DDP's "module."."""
    for key in ("model_state", "model", "teacher", "student", "state_dict", None):
        state = checkpoint if key is None else checkpoint.get(key)
        if isinstance(state, dict) and all(torch.is_tensor(value) for value in state.values()):
            state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
            if key == "model" and "recipe" in checkpoint:
                return "ours", state
            for form, (sign, _) in FORMATS.items():
                if any(re.search(sign, name) for name in state):
                    return form, state
    raise ValueError(f"no known checkpoint format: keys {sorted(map(str, checkpoint))[:8]}; "
                     f"known formats are {', '.join(FORMATS)}")


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
    pretrained = form == "ours" and any(name.startswith("encoder.") for name in state)
    return rename(state, PRETRAINED if pretrained else FORMATS[form][1])


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
    match = re.fullmatch(r"((maskfeat\.)?(norm|head)|maskfeat\.mask_token)(\.weight|\.bias|)", name)
    return match and match[1]


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
    report = {"loaded": [], "resized": [], "fresh": [],
              "left out": [old for old in found if old not in set(origin.values())]}
    parts, wrong = {part(new) for new in state}, []
    for new, place in places.items():
        name, old = names[new], origin.pop(new, None)
        if old is None:
            (report["fresh"] if part(new) and part(new) not in parts else wrong).append(name)
            continue
        tensor = state[new]
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
    recipe = {"model": name, "num_classes": len(state.get("head.weight", ())), "num_frames": 16,
              "sampling_rate": 4, "crop_ratio": 0.875, "patch_size": 16, "output_stride": 16,
              "drop_path": 0.0, "checkpointing": False, "expand": expand}
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


def export(checkpoint, to):
    """(our checkpoint in another layout, names of the tensors that it has no place for).

    to="timm", ViT only: a flat state dict, of pre-training the trunk. pool="mean" gives fc_norm
    (global_pool="avg" in timm), "cls" gives norm. to="release": {"epoch", "model_state",
    "optimizer_state", "cfg"}, without optimizer and `hogs`; `cfg` says what shapes do not.
    """
    recipe, (state, origin) = foreign_recipe(checkpoint), translate(*recognize(checkpoint))
    if to == "timm":
        if recipe["model"] not in vit.MODELS:
            raise ValueError(f"timm has no {recipe['model']} for video: use --to release")
        trunk = {new: state[new] for new in state if not new.startswith("maskfeat.")}
        table = FORMATS["timm"][1] if recipe["pool"] == "mean" else []
        return rename(trunk, table, back=True)[0], [origin[new] for new in state if new not in trunk]
    state, _ = rename(state, FORMATS["release"][1], back=True)
    data = {key.upper(): recipe[key] for key in ("sampling_rate", "mean", "std") if key in recipe}
    cfg = json.dumps({"MVIT": {"USE_MEAN_POOLING": recipe["pool"] == "mean"}, "DATA": data})
    cfg = cfg.replace('"', "")
    return {"epoch": 0, "model_state": state, "optimizer_state": {}, "cfg": cfg}, []


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--to", choices=("release", "timm"), help="layout; default: timm for ViT")
    args = parser.parse_args()
    if os.path.exists(args.destination):
        raise ValueError(f"{args.destination} exists: choose another name")
    checkpoint = read_checkpoint(args.source)
    form, recipe = recognize(checkpoint)[0], foreign_recipe(checkpoint)
    if form == "ours":
        to = args.to or ("timm" if recipe["model"] in vit.MODELS else "release")
        result, left_out = export(checkpoint, to)
        count = len(result.get("model_state", result))
        print(f"{args.source} (ours): {count} to {to}, {len(left_out)} left out")
        for name in left_out:
            print(f"  left out: {name}")
    elif args.to:
        raise ValueError(f"{args.source} ({form}) is not ours: convert it without --to first")
    else:
        model = build_maskfeat(recipe) if "target" in recipe else build_classifier(recipe)
        report = load_weights(model, args.source)
        if differs := report["fresh"] + report["resized"]:
            raise ValueError(f"{args.source} is like {recipe['model']}, but not it: {differs[:3]}")
        result = {"model": model.state_dict(), "recipe": recipe}
    os.makedirs(os.path.dirname(args.destination) or ".", exist_ok=True)
    save_checkpoint(args.destination, result)
    print(f"wrote {args.destination}: {recipe['model']}")


if __name__ == "__main__":
    run_main(main)
