"""Other people's checkpoints into our models, and ours into their layouts.

    python convert.py MVITv2_S_MaskFeat_PT.pyth out/released.pt    # theirs -> ours
    python convert.py out/finetune/last.pt mvit.pyth --to release  # ours -> release (or timm)
    python convert.py out/vit/last.pt vit/ --to hub                # ours -> a folder for timm

Formats are recognized by the names of the tensors: ours; the official release (SlowFast `.pyth`:
MaskFeat, supervised MViTv2); torchvision's ViT and `mvit_v2_s`; OpenMMLab's ViT and MViTv2, also of
their MaskFeat; ViT of timm, DeiT, DINO and MAE.
"""
import json
import math
import os
import re
import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from engine import run_main

import torch
import torch.nn.functional as F

from checkpoints import read_checkpoint, save_checkpoint, write_safetensors
from models import build_classifier, build_maskfeat, check_checkpoint, takes_clips
from teachers import IMAGENET, KINETICS

# Format: (pattern of names that no format below has, rows of a fragment of their and of our names).
# The first row found at the start of a name or after a dot counts. None drops the tensor. Our names
# are those of the models, with one name for heads and "maskfeat." before what pre-training adds.
# Sources: torchvision/models/{vision_transformer,video/mvit}.py; mmpretrain/models/backbones/
# vision_transformer.py, heads/{linear_head,vision_transformer_head}.py, necks/linear_neck.py;
# mmaction/models/backbones/mvit.py, heads/mvit_head.py.
FORMATS = {
    "ours": (r"^encoder\.cls_token$", [("head.projection.", "head.")]),
    "torchvision": (r"\.pool_[qkv]\.pool\.|^encoder\.layers\.encoder_layer_", [
        ("conv_proj.", "patch_embed.proj."), ("pos_encoding.class_token", "cls_token"),
        ("class_token", "cls_token"), ("encoder.pos_embedding", "pos_embed"),
        ("encoder.ln.", "norm."), ("heads.head.", "head."), ("ln_1.", "norm1."),
        ("ln_2.", "norm2."), ("self_attention.in_proj_", "attn.qkv."),  # q, k, v as ours
        ("self_attention.out_proj.", "attn.proj."),
        ("mlp.linear_1.", "mlp.fc1."), ("mlp.linear_2.", "mlp.fc2."),  # in old files
        ("attn.project.0.", "attn.proj."), ("project.", "proj."),
        *((f"attn.pool_{x}.pool.", f"attn.pool_{x}.") for x in "qkv"),
        *((f"attn.pool_{x}.norm_act.0.", f"attn.norm_{x}.") for x in "qkv"),
        ("mlp.0.", "mlp.fc1."), ("mlp.3.", "mlp.fc2."), ("head.1.", "head.")]),
    # Of pre-training, the encoder: their HOG has a Gaussian window, so their head is for another
    # target. ln2 is the norm after mean pooling, norm2 and norm3 are MViT's last one.
    "OpenMMLab": (r"^backbone\.patch_embed\.projection\.", [
        ("neck.", None), ("target_generator.", None), ("backbone.mask_token", None),
        ("backbone.patch_embed.projection.", "patch_embed.proj."),
        *((f"backbone.{norm}.", "norm.") for norm in ("ln1", "ln2", "norm2", "norm3")),
        ("head.fc.", "head."), ("head.layers.head.", "head."), ("cls_head.fc_cls.", "head."),
        ("ln1.", "norm1."), ("ln2.", "norm2."), ("ffn.layers.0.0.", "mlp.fc1."),
        ("ffn.layers.1.", "mlp.fc2."), ("backbone.", "")]),
    "DINO": (r"^backbone\.", [("backbone.", ""), ("head.", None)]),  # its head is no classifier
    "MAE": (r"^decoder_", [("decoder_", None), ("mask_token", None)]),
    "release": (r"\.pool_[qkv]\.|^pred_head\.|^head\.projection\.", [
        ("head.projection.", "head."), ("mask_token", "maskfeat.mask_token"), ("hogs.", None),
        ("pred_head.transforms.0.0.", "maskfeat.norm."),
        ("pred_head.projections.0.", "maskfeat.head.")]),
    "timm": (r"^blocks\.\d+\.attn\.qkv\.", [("fc_norm.", "norm.")])}
BLOCKS = r"^(encoder\.layers\.encoder_layer_|backbone\.layers\.)(?=\d)"  # ours: "blocks."

# (axes of the stem's kernel, width, depth) -> model
KINDS = {(5, 32, 3): "mvit_nano", (5, 64, 3): "mvit_tiny", (5, 96, 16): "mvitv2_s",
         (5, 96, 24): "mvitv2_b", (5, 144, 48): "mvitv2_l", (4, 128, 6): "vit_tiny",
         (4, 768, 12): "vit_b", (4, 1024, 24): "vit_l"}
# Model -> timm's model and the options that make it ours
TIMM = {"vit_tiny": ("vit_tiny_patch16_224", dict(embed_dim=128, depth=6, num_heads=4)),
        "vit_b": ("vit_base_patch16_224", {}), "vit_l": ("vit_large_patch16_224", {})}


def unknown_format(names):
    """The error for a file of these names of tensors."""
    return ValueError("a checkpoint of an unknown format: names such as "
                      f"{', '.join(map(str, names))[:80]}; give one of {', '.join(FORMATS)}")


def recognize(checkpoint):
    """(format, state dict) of a checkpoint or a bare state dict. Names lose what DDP, torch.compile
    and Lightning put before them. Averaged weights count where there are no others."""
    names = []
    for key in ("model_state", "model", "teacher", "student", "state_dict", "state_dict_ema",
                "model_ema", None):
        state = checkpoint if key is None else checkpoint.get(key)
        if isinstance(state, dict) and all(isinstance(name, str) and torch.is_tensor(value)
                                           for name, value in state.items()):
            state = {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): tensor
                     for name, tensor in state.items()}
            if key == "model" and "recipe" in checkpoint:
                return "ours", state
            for form, (sign, _) in FORMATS.items():
                if any(re.search(sign, name) for name in state):
                    return form, state
            names = names or list(state)
    raise unknown_format(names or list(checkpoint))


def rename(form, state, back=False):
    """(state dict by new names, {new name: old}), from a format to our names, or back."""
    table, origin = FORMATS[form][1], {}
    if form == "ours" and any(name.startswith("encoder.") for name in state):
        table = [("encoder.", ""), ("", "maskfeat.")]
    if back:
        table = [(ours, theirs) for theirs, ours in reversed(table) if ours is not None]
    for name in state:
        dotted = "." + re.sub(BLOCKS, "blocks.", name)
        old, by = next((row for row in table if "." + row[0] in dotted), ("", ""))
        if by is not None:
            new = dotted.replace("." + old, "." + by, 1)[1:]
            if new in origin:
                raise ValueError(f"{name} and {origin[new]} both mean {new}: not one model's file")
            origin[new] = name
    return {new: state[name] for new, name in origin.items()}, origin


def signature(state):
    """(key in KINDS, MViT's `expand`) of a state dict with our names."""
    stem = state.get("patch_embed.proj.weight", torch.empty(0))
    qkv = [tensor for name, tensor in state.items() if name.endswith("attn.qkv.weight")
           and tensor.ndim == 2]
    wider = any(len(tensor) != 3 * tensor.shape[1] for tensor in qkv)
    return (stem.ndim, *stem.shape[:1], len(qkv)), "attn" if wider else "mlp"


def square(tokens):
    """The grid (side, side) of a class token and a square, or None."""
    side = math.isqrt(tokens - 1)
    return (side, side) if side * side == tokens - 1 else None


def resize_positions(name, tensor, shape, grids):
    """A table of positions in another shape, else None. Release: relative tables linearly.

    grids: (h, w) of the table and of the model, for absolute positions. None: unknown.
    """
    if ".rel_pos_" in name and tensor.shape[1:] == shape[1:] and tensor.numel():
        return F.interpolate(tensor.T[None].float(), size=shape[0], mode="linear")[0].T
    if name == "pos_embed" and tensor.shape[2:] == shape[2:] and None not in grids \
            and tensor.shape[1] == 1 + math.prod(grids[0]):
        table = tensor[:, 1:].mT.unflatten(2, grids[0]).float()
        table = F.interpolate(table, size=grids[1], mode="bicubic").flatten(2).mT
        return torch.cat([tensor[:, :1], table], dim=1)


def part(name):
    """The head, norm or mask token that `name` belongs to, else None. Stages differ in these."""
    match = re.fullmatch(r"((maskfeat\.)?(norm|head)|maskfeat\.mask_token)(\.weight|\.bias|)", name)
    return match and match[1]


def load_weights(model, path, verbose=True):
    """Load a checkpoint file of any known format into a MaskFeat, an encoder or a classifier.

    Returns lists of names, {"loaded", "resized", "fresh", "left out"}, the last of the file. Head,
    norm and mask token may be fresh or left out. Raises ValueError if other tensors do not fit.
    """
    checkpoint, own = read_checkpoint(path), model.state_dict()
    check_checkpoint(path, checkpoint)
    form, found = recognize(checkpoint)
    state, origin = rename(form, found)
    places, names = rename("ours", own)
    report = {"loaded": [], "resized": [], "fresh": [],
              "left out": [old for old in found if old not in set(origin.values())]}
    parts, wrong = {part(new) for new in state}, []
    grids = None, getattr(getattr(model, "encoder", model), "grid", None)
    if state.get("pos_embed", torch.empty(0)).ndim == 3:
        recipe = checkpoint.get("recipe", {}) if form == "ours" else {}
        known = "image_size" in recipe and "patch_size" in recipe
        grids = (tuple(side // recipe["patch_size"] for side in recipe["image_size"]) if known
                 else square(state["pos_embed"].shape[1])), grids[1]
    for new, name in names.items():
        if new not in state:
            (report["fresh"] if part(new) and part(new) not in parts else wrong).append(name)
    for new, tensor in state.items():
        old, name, shape = origin[new], names.get(new), tuple(tensor.shape)
        if new == "cls_token":
            tensor = tensor.reshape(1, 1, -1)  # torchvision: one axis
        if name is None:
            (report["left out"] if part(new) else wrong).append(old)
        elif tensor.shape == own[name].shape and (new != "pos_embed" or grids[0] == grids[1]):
            own[name] = tensor
            report["loaded"].append(name)
        elif (resized := resize_positions(new, tensor, own[name].shape, grids)) is not None:
            report["resized"].append(f"{name} {shape} -> {tuple(resized.shape)}")
            own[name] = resized
        elif part(new) in ("head", "maskfeat.head"):  # other classes, another target
            report["fresh"].append(name)
            report["left out"].append(f"{old} {shape}")
        else:
            wrong.append(f"{old} {shape} -> {tuple(own[name].shape)}")
    if wrong:
        hint, (kind, expand), (own_kind, own_expand) = "", signature(state), signature(places)
        which = ""
        if kind != own_kind:
            name, own_name = (KINDS.get(k, "one of other sizes") for k in (kind, own_kind))
            which = f", {name} and not {own_name}"
            hint = f"; use --model {name}" if kind in KINDS else ""
        if kind == own_kind and expand != own_expand:
            pool = foreign_recipe(checkpoint)["pool"]
            hint = f'; use expand="{expand}", pool="{pool}" (--expand {expand} --pool {pool})'
            if any(name.startswith("maskfeat.") for name in places):  # pre-training does not pool
                hint = f'; use expand="{expand}" (--expand {expand})'
        raise ValueError(f"{path} ({form}) is a checkpoint of another model{which}: {len(wrong)} "
                         f"tensors do not fit, such as {'; '.join(wrong[:3])}{hint}")
    model.load_state_dict(own)
    if verbose:
        print(f"{path} ({form}):", ", ".join(f"{len(v)} {what}" for what, v in report.items()))
        for what in ("resized", "fresh", "left out"):
            print(*(f"  {what}: {name}\n" for name in report[what]), sep="", end="")
    return report


def foreign_recipe(checkpoint):
    """The recipe of the model and its input, of a checkpoint or a bare state dict.

    Names and shapes tell most of it, the release's `cfg` (YAML) pooling, sampling rate, mean, std.
    Pre-training gets the release's target and mask. Raises ValueError for an unknown model.
    """
    form, found = recognize(checkpoint)
    if form == "ours" and "recipe" in checkpoint:
        return {"pool": "mean", **checkpoint["recipe"]}
    state, _ = rename(form, found)
    kind, expand = signature(state)
    if "patch_embed.proj.weight" not in state:
        raise unknown_format(found)
    if kind not in KINDS:
        raise ValueError(f"{form} checkpoint of no known model: {kind} is not in {KINDS}")
    name, video = KINDS[kind], takes_clips(KINDS[kind])
    tables = [f"blocks.0.attn.rel_pos_{axis}" for axis in "thw"] if video else ["pos_embed"]
    tables += [f"blocks.{kind[2] - 1}.attn.rel_pos_h"] * video
    if missing := [table for table in tables if table not in state or state[table].ndim < 2
                   or not state[table].numel()]:
        raise ValueError(f"{form} checkpoint of {name} lacks {missing[0]}")
    # Mean pooling: fine-tuned MAE, OpenMMLab's ViTs that pool, OpenMMLab's MaskFeat. The release's
    # supervised models, which expand in the attention, have none.
    signs = {"fc_norm.weight", "backbone.ln2.weight", "backbone.mask_token"}
    pooled = signs & set(found) or form in ("ours", "release") and expand == "mlp"
    head = torch.atleast_1d(state.get("head.weight", torch.empty(0)))
    recipe = dict(model=name, num_classes=len(head), num_frames=16,
                  sampling_rate=4, crop_ratio=0.875, patch_size=16, output_stride=16, drop_path=0.0,
                  checkpointing=False, expand=expand, pool="mean" if pooled else "cls")
    recipe["mean"], recipe["std"] = KINETICS if video else IMAGENET  # 0.5 in timm's augreg ViTs
    if video:
        t, h, w, last = ((len(state[table]) + 1) // 2 for table in tables)  # 2n - 1 distances
        stride = 4 * 2 ** round(math.log2(h / last))  # 78 / 9 counts as 8
        recipe.update(num_frames=2 * t, image_size=(4 * h, 4 * w), output_stride=stride)
    else:
        tokens, patch = state["pos_embed"].shape[1], state["patch_embed.proj.weight"].shape[-1]
        if square(tokens) is None:
            raise ValueError(f"pos_embed of {tokens} tokens is not a class token and a square grid")
        recipe.update(patch_size=patch, image_size=tuple(side * patch for side in square(tokens)))
    if "maskfeat.mask_token" in state:
        recipe.update(target="hog", bins=9, cell=8, norm="l2", color="rgb", gradient="sobel",
                      pixel_norm="dataset", mask="cube" if video else "block", mask_ratio=0.4)
    cfg = checkpoint.get("cfg")
    cfg = cfg if isinstance(cfg, str) else ""  # nested lists may print without end
    if match := re.search(r"\bUSE_MEAN_POOLING:\s*(\w+)", cfg):
        recipe["pool"] = "mean" if match[1].lower() == "true" else "cls"
    for key, count in ("sampling_rate", 1), ("mean", 3), ("std", 3):
        if match := re.search(rf"\b{key.upper()}:((?:[\s\[,-]+[\d.]+)+)", cfg):
            numbers = tuple(map(float, re.findall(r"\d{0,9}\.?\d{1,20}", match[1])))
            if len(numbers) == count:
                recipe[key] = int(numbers[0]) if count == 1 else numbers
    return recipe


def export(checkpoint, to):
    """(our checkpoint in another layout, names of the tensors that it has no place for).

    timm: a ViT's state dict, with fc_norm if pool="mean". release: a dict like SlowFast's.
    """
    recipe, (state, origin) = foreign_recipe(checkpoint), rename(*recognize(checkpoint))
    if to == "timm":
        if takes_clips(recipe["model"]):
            raise ValueError(f"timm has no {recipe['model']} for video: use --to release")
        left_out = [origin[new] for new in state if new.startswith("maskfeat.")]
        state = {new: state[new] for new in state if not new.startswith("maskfeat.")}
        return rename("timm", state, back=True)[0] if recipe["pool"] == "mean" else state, left_out
    state, _ = rename("release", state, back=True)
    data = {key.upper(): recipe[key] for key in ("sampling_rate", "mean", "std") if key in recipe}
    cfg = json.dumps({"MVIT": {"USE_MEAN_POOLING": recipe["pool"] == "mean"}, "DATA": data})
    return dict(epoch=0, model_state=state, optimizer_state={}, cfg=cfg.replace('"', "")), []


def save_folder(folder, state, recipe, classes):
    """A folder for timm.create_model("local-dir:FOLDER", pretrained=True), complete or not there.

    state: of export(..., "timm"). classes: names of the classes, or empty.
    """
    architecture, options = TIMM[recipe["model"]]
    size, count = list(recipe["image_size"]), recipe.get("num_classes", 0)
    options = {**options, "img_size": size, "patch_size": recipe["patch_size"],
               "global_pool": "avg" if recipe["pool"] == "mean" else "token",
               "final_norm": count > 0}  # a trunk ends without one
    config = {"architecture": architecture, "num_classes": count, "model_args": options,
              "pretrained_cfg": {"input_size": [3, *size], "mean": recipe["mean"],
                                 "std": recipe["std"], "crop_pct": recipe.get("crop_ratio", 0.875),
                                 "interpolation": "bicubic", "fixed_input_size": True,
                                 "first_conv": "patch_embed.proj", "classifier": "head"}}
    if classes:
        config["label_names"] = classes
    beside = folder + ".tmp"                  # what a kill leaves, the next save replaces
    os.makedirs(beside, exist_ok=True)
    try:
        write_safetensors(os.path.join(beside, "model.safetensors"), state)
        with open(os.path.join(beside, "config.json"), "w") as f:
            json.dump(config, f, indent=2)
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--to", choices=("release", "timm", "hub"),
                        help="layout; default: timm for ViT, release for MViT")
    args = parser.parse_args()
    destination = os.path.normpath(args.destination)
    if os.path.exists(destination):
        raise ValueError(f"{destination} exists: choose another name")
    checkpoint = read_checkpoint(args.source)
    check_checkpoint(args.source, checkpoint)
    form, recipe = recognize(checkpoint)[0], foreign_recipe(checkpoint)
    if form == "ours":
        to = args.to or ("release" if takes_clips(recipe["model"]) else "timm")
        result, left_out = export(checkpoint, "timm" if to == "hub" else to)
        print(f"{args.source} (ours) to {to}: {len(left_out)} left out", *left_out)
    elif args.to:
        raise ValueError(f"{args.source} ({form}) is not ours: convert it without --to first")
    else:
        model = build_maskfeat(recipe) if "target" in recipe else build_classifier(recipe)
        report = load_weights(model, args.source)
        if differs := report["fresh"] + report["resized"]:
            raise ValueError(f"{args.source} is like {recipe['model']}, but not it: {differs[:3]}")
        result = {"model": model.state_dict(), "recipe": recipe}
    os.makedirs(os.path.dirname(destination) or ".", exist_ok=True)
    if args.to == "hub":
        save_folder(destination, result, recipe, list(checkpoint.get("classes", [])))
    else:
        save_checkpoint(destination, result)
    print(f"wrote {destination}: {recipe['model']}")


if __name__ == "__main__":
    run_main(main)
