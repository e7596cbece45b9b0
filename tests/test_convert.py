"""Foreign checkpoints in and out, and what must be refused. Layouts follow the public models."""
import argparse
import json
import os
import pickle
import re
import struct
import sys

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from conftest import GOLDEN, slow
from test_teachers import Hostile

import convert
import mvit
from checkpoints import read_checkpoint, read_safetensors, save_checkpoint, write_safetensors
from convert import export, foreign_recipe, load_weights, recognize, rename
from models import build_classifier, build_maskfeat
from vit import ViT

SHARED = dict(patch_size=8, expand="mlp", drop_path=0.0, checkpointing=False, num_frames=4,
              image_size=(64, 64))
PRETRAIN = dict(SHARED, target="hog", bins=9, cell=8, norm="l2", color="rgb", gradient="sobel")
FINETUNE = dict(SHARED, num_classes=7, pool="mean", mean=(0.4, 0.45, 0.5), std=(0.2, 0.2, 0.25),
                sampling_rate=3)
TINY = (128, 6, 8, 64)  # vit_tiny
STAGE_ONLY = ["head.bias", "head.weight", "norm.bias", "norm.weight"]


def affine(name, out, *dim):
    """Weight and bias of a linear layer or, without dim, of a norm."""
    return {f"{name}.weight": (out, *dim), f"{name}.bias": (out,)}


def vit_layout(dim, depth, patch, side, classes=0, last="norm", prefix=""):
    """timm's ViT; also DeiT's, DINO's backbone, MAE's encoder and, with fc_norm, fine-tuned MAE."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + (side // patch) ** 2, dim),
              "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for b in (f"blocks.{i}." for i in range(depth)):
        shapes |= affine(b + "norm1", dim) | affine(b + "norm2", dim)
        shapes |= affine(b + "attn.qkv", 3 * dim, dim) | affine(b + "attn.proj", dim, dim)
        shapes |= affine(b + "mlp.fc1", 4 * dim, dim) | affine(b + "mlp.fc2", dim, 4 * dim)
    shapes |= affine(last, dim) | (affine("head", classes, dim) if classes else {})
    return {prefix + name: shape for name, shape in shapes.items()}


def dino_layout(prefix):
    """The student ("module.") or teacher ("") of DINO's training file, with its projection head."""
    return {**vit_layout(*TINY, prefix=prefix + "backbone."),
            **affine(prefix + "head.mlp.0", 32, 128), prefix + "head.last_layer.weight_g": (50, 1)}


def torchvision_layout(dim, heads, stages, kv, frames, side, classes):
    """mvit_v2_s: the width doubles inside the attention of each transition."""
    shapes = {"pos_encoding.class_token": (dim,), "conv_proj.weight": (dim, 3, 3, 7, 7),
              "conv_proj.bias": (dim,)}
    c, n, head = dim, side // 4, dim // heads
    starts = [sum(stages[:s]) for s in range(len(stages))]
    for i in range(sum(stages)):
        out = dim * 2 ** (sum(i >= start for start in starts) - 1)
        q, b = 2 if i and i in starts else 1, f"blocks.{i}."
        kv = max(kv // q, 1)
        shapes |= affine(b + "norm1", c) | affine(b + "norm2", out)
        for axis, length in zip("thw", (frames - 1, *[2 * max(n // q, n // kv) - 1] * 2)):
            shapes[f"{b}attn.rel_pos_{axis}"] = (length, head)
        for pool in (f"{b}attn.pool_{x}." for x in "qkv"):
            shapes |= {pool + "pool.weight": (head, 1, 3, 3, 3)} | affine(pool + "norm_act.0", head)
        shapes |= affine(b + "attn.qkv", 3 * out, c) | affine(b + "attn.project.0", out, out)
        shapes |= affine(b + "mlp.0", 4 * out, out) | affine(b + "mlp.3", out, 4 * out)
        shapes |= affine(b + "project", out, c) if c != out else {}
        c, n = out, n // q
    return shapes | affine("norm", c) | affine("head.1", classes, c)


# timm's names -> torchvision's and OpenMMLab's for a ViT, read from their model files
TORCHVISION = {
    r"^cls_token": "class_token", r"^patch_embed\.proj": "conv_proj", r"^norm": "encoder.ln",
    r"^pos_embed": "encoder.pos_embedding", r"^blocks\.": "encoder.layers.encoder_layer_",
    r"\.norm(\d)": r".ln_\1", r"attn\.qkv\.": "self_attention.in_proj_", r"^head": "heads.head",
    r"attn\.proj": "self_attention.out_proj", r"mlp\.fc1": "mlp.0", r"mlp\.fc2": "mlp.3"}
OPENMMLAB = {
    r"^(?!head)": "backbone.", r"patch_embed\.proj": "patch_embed.projection",
    r"\.blocks": ".layers", r"\.norm(\d)": r".ln\1", r"^backbone\.norm": "backbone.ln1",
    r"mlp\.fc1": "ffn.layers.0.0", r"mlp\.fc2": "ffn.layers.1", r"^head": "head.layers.head"}


def renamed(state, rules):
    """A state dict with its names rewritten by regular expressions, one after the other."""
    def new(name):
        for pattern, by in rules.items():
            name = re.sub(pattern, by, name)
        return name
    return {new(name): value for name, value in state.items()}


def golden_layout(name):
    keys = json.loads((GOLDEN / f"keys_{name}.json").read_text())["state_dict"]
    return {key: tuple(shape) for key, shape in keys}


def filled(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def build(recipe, device="cpu"):
    with torch.device(device):
        return build_maskfeat(recipe) if "target" in recipe else build_classifier(recipe)


def ours(name, stage=FINETUNE, **changes):
    """A checkpoint of ours and its model, with random weights throughout."""
    recipe = {**stage, "model": name, "output_stride": 8 if name == "mvit_tiny" else 16, **changes}
    model = build(recipe)
    model.load_state_dict(filled(shapes_of(model.state_dict())))
    return {"model": model.state_dict(), "recipe": recipe, "step": 3}, model


def released(*arguments, **changes):
    return export(ours(*arguments, **changes)[0], "release")[0]


def vit(*arguments, **changes):
    return filled(vit_layout(*TINY, *arguments, **changes))


# MAE in pre-training: the encoder, and a decoder of its own width with the mask token
MAE = {**vit_layout(*TINY), **vit_layout(64, 2, 8, 64, prefix="decoder_"), "mask_token": (1, 1, 64)}
# OpenMMLab's MaskFeat: a linear layer, with batch norm in newer versions, predicts HOG
NECK = {**affine("neck.fc", 108, 128), **affine("neck.norm", 108),
        "target_generator.weight_x": (3, 1, 3, 3), "target_generator.gaussian_kernel": (16, 16)}
# Format -> checkpoint, and what foreign_recipe must see in it. The name starts with the format.
FOREIGN = {
    "torchvision": (lambda: filled(torchvision_layout(64, 2, (1, 2), 4, 4, 64, 7)), dict(
        model="mvit_tiny", num_classes=7, num_frames=4, expand="attn", pool="cls")),
    "torchvision, ViT": (lambda: renamed(vit(7), TORCHVISION), dict(num_classes=7, pool="cls")),
    "torchvision, old ViT": (lambda: renamed(vit(7), {
        **TORCHVISION, r"mlp\.0": "mlp.linear_1", r"mlp\.3": "mlp.linear_2"}), dict(pool="cls")),
    "OpenMMLab, ViT": (lambda: {"state_dict": renamed(vit(7), OPENMMLAB)}, dict(pool="cls")),
    "OpenMMLab, fine-tuned": (lambda: renamed(vit(7), {
        **OPENMMLAB, r"backbone\.ln1": "backbone.ln2", r"^head.*\.": "head.fc."}),
        dict(pool="mean")),
    "OpenMMLab, pre-training": (lambda: {"meta": {"epoch": 3}, "state_dict": {
        **renamed(vit(), OPENMMLAB), **filled({**NECK, "backbone.mask_token": (1, 1, 128)})}},
        dict(num_classes=0, pool="mean", std=(0.229, 0.224, 0.225))),
    "OpenMMLab, MViT": (lambda: renamed(released("mvit_tiny")["model_state"], {
        r"^": "backbone.", r"patch_embed\.proj": "patch_embed.projection",
        r"backbone\.norm": "backbone.norm3", r"backbone\.head.projection": "cls_head.fc_cls"}),
        dict(model="mvit_tiny", pool="cls", expand="mlp", std=(0.225,) * 3)),
    "timm": (lambda: vit(7), dict(model="vit_tiny", pool="cls", std=(0.229, 0.224, 0.225))),
    "timm, DeiT": (lambda: {"model": vit(7)}, dict(num_classes=7)),
    "timm, DDP": (lambda: {"state_dict": vit(7, prefix="module.")}, dict(num_classes=7)),
    "timm, DINO": (lambda: vit(), dict(num_classes=0, pool="cls")),
    "timm, MAE fine-tuned": (lambda: {"model": vit(7, "fc_norm"), "epoch": 9}, dict(pool="mean")),
    "DINO": (lambda: {"student": filled(dino_layout("module."), 1), "args": argparse.Namespace(a=1),
                      "teacher": filled(dino_layout(""))}, dict(num_classes=0, pool="cls")),
    "DINO, student": (lambda: {"student": filled(dino_layout("module."))}, dict(num_classes=0)),
    "MAE": (lambda: {"model": filled(MAE)}, dict(num_classes=0, model="vit_tiny")),
    "release": (lambda: released("mvit_tiny"), dict(
        num_classes=7, pool="mean", expand="mlp", sampling_rate=3, mean=(0.4, 0.45, 0.5))),
    "release, ViT": (lambda: released("vit_tiny"), dict(pool="mean")),
    "release, pre-training": (lambda: released("mvit_tiny", PRETRAIN), dict(
        target="hog", output_stride=8, num_classes=0)),
    "ours": (lambda: ours("mvit_tiny")[0], dict(num_classes=7)),
    "ours, pre-training": (lambda: ours("vit_tiny", PRETRAIN)[0], dict(model="vit_tiny")),
}


def dropped(form, recipe):
    """How names begin that no model of ours has: parts of other methods, the norm of a trunk."""
    trunk = "target" not in recipe and not recipe["num_classes"]
    return ("head.mlp.", "head.last_layer.", "decoder_", *["mask_token"] * (form == "MAE"),
            "neck.", "target_generator.", "backbone.mask_token",
            *["norm.", "backbone.norm.", "backbone.ln1."] * trunk)


@pytest.fixture
def load(monkeypatch):
    """load(checkpoint, model): load_weights from a file of this content, also of meta tensors."""
    def load(content, model):
        monkeypatch.setattr(convert, "read_checkpoint", lambda path: content)
        return load_weights(model, "file", verbose=False)
    return load


# One of each format is quick.
FORMS = [slow(form) if "," in form else form for form in FOREIGN]


@pytest.mark.parametrize("form", FORMS)
def test_formats(form, tmp_path):
    """Recognized, described, and loaded whole: every tensor of the model comes from the file."""
    checkpoint, want = FOREIGN[form][0](), FOREIGN[form][1]
    found, state = recognize(checkpoint)
    recipe = foreign_recipe(checkpoint)
    assert found == form.split(",")[0] and tuple(recipe["image_size"]) == (64, 64)
    assert {key: recipe[key] for key in want} == want
    torch.save(checkpoint, tmp_path / "file")
    model = build(recipe)
    report = load_weights(model, str(tmp_path / "file"), verbose=False)
    assert not report["fresh"] and not report["resized"]
    assert sorted(report["loaded"]) == sorted(model.state_dict())
    sums = [{round(float(tensor.double().sum()), 9) for tensor in x.values()}
            for x in (model.state_dict(), state)]
    assert sums[0] <= sums[1]
    want = {name for name in state if name.startswith(dropped(form, recipe))}
    assert set(report["left out"]) == want


@pytest.mark.parametrize("form", FORMS)
def test_one_missing_or_renamed_tensor_is_refused(form, load):
    checkpoint = FOREIGN[form][0]()
    recipe, state = foreign_recipe(checkpoint), recognize(checkpoint)[1]
    model = build(recipe)
    optional = ("mask_token", "encoder.cls_token", *dropped(form, recipe))  # it is our sign
    names = [name for name in state if not name.startswith(optional)]
    for name in names[::7] + names[-4:]:  # all kinds of names, norm and head
        missing = {other: tensor for other, tensor in state.items() if other != name}
        renamed = {**missing, name + "_": state[name]}
        for changed, words in (missing, "1 tensors"), (renamed, name + "_"):
            with pytest.raises(ValueError, match=f"another model.*{words}"):
                load(changed, model)


def test_vit_of_torchvision_computes_the_same(load):
    """Each tensor is where torchvision's equation has it: LayerNorm, nn.MultiheadAttention, MLP."""
    state = renamed(vit(7), TORCHVISION)
    model = build(foreign_recipe(state)).eval()
    load(state, model)
    images = torch.randn(2, 3, 64, 64)
    x = F.conv2d(images, state["conv_proj.weight"], state["conv_proj.bias"], 8).flatten(2).mT
    x = torch.cat([state["class_token"].expand(2, 1, 128), x], 1) + state["encoder.pos_embedding"]

    def linear(x, name):
        return F.linear(x, state[name + ".weight"], state[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, (128,), state[name + ".weight"], state[name + ".bias"], 1e-6)

    for block in (f"encoder.layers.encoder_layer_{i}." for i in range(6)):
        attention = torch.nn.MultiheadAttention(128, 4, batch_first=True)
        attention.load_state_dict({name: state[f"{block}self_attention.{name}"]
                                   for name in attention.state_dict()})
        y = norm(x, block + "ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = norm(x, block + "ln_2")
        x = x + linear(F.gelu(linear(y, block + "mlp.0")), block + "mlp.3")
    torch.testing.assert_close(model(images), linear(norm(x, "encoder.ln")[:, 0], "heads.head"))


@pytest.mark.parametrize("form", [form for form in FOREIGN if form.startswith("OpenMMLab, ")])
def test_tensors_of_openmmlab_get_the_names_of_timm(form):
    """The values of `vit` and `filled` are those of the same name in timm's or our layout."""
    checkpoint, state = FOREIGN[form][0](), released("mvit_tiny")["model_state"]
    if "MViT" not in form:
        state = vit(0 if "pre" in form else 7)
    found = rename(*recognize(checkpoint))[0]
    state = {name.replace("head.projection.", "head."): value for name, value in state.items()}
    assert found.keys() == state.keys() and all(torch.equal(found[x], state[x]) for x in state)


@pytest.mark.parametrize("expand, pool, other", [("mlp", "mean", "attn"), ("attn", "cls", "mlp")])
def test_expand_and_pool_that_would_fit_are_named(expand, pool, other, load):
    checkpoint = released("mvit_tiny", expand=expand, pool=pool)
    for stage, words in (FINETUNE, f'pool="{pool}" .--expand {expand} --pool {pool}'), \
            (PRETRAIN, f"--expand {expand}.$"):
        with pytest.raises(ValueError, match=f'another.*expand="{expand}".*{words}'):
            load(checkpoint, ours("mvit_tiny", stage, expand=other)[1])
    if (expand, pool) == ("attn", "cls"):
        with pytest.raises(ValueError, match="torchvision.*--expand attn --pool cls"):
            load(FOREIGN["torchvision"][0](), ours("mvit_tiny", FINETUNE, expand="mlp")[1])
    with pytest.raises(ValueError) as error:  # another depth: no expand would help
        load(checkpoint, mvit.MViT(64, 2, (1, 1), num_frames=4, image_size=64, expand=other))
    assert "--expand" not in str(error.value)


@pytest.mark.parametrize("layout, kind", [
    (vit_layout(768, 12, 16, 384, 1000), dict(model="vit_b", image_size=(384, 384), pool="cls")),
    (vit_layout(1024, 24, 8, 224, 0, "fc_norm"), dict(model="vit_l", patch_size=8, num_classes=0)),
    (torchvision_layout(96, 1, (1, 2, 11, 2), 8, 16, 224, 400), dict(
        model="mvitv2_s", num_classes=400, num_frames=16, image_size=(224, 224), expand="attn")),
    (golden_layout("mvitv2_s_ft"), dict(
        model="mvitv2_s", expand="mlp", pool="mean", num_frames=16, mean=(0.45,) * 3)),
    slow(golden_layout("mvitv2_l_312_40x3_dimmulatt"), dict(
        num_frames=40, image_size=(312, 312))),
    slow(golden_layout("mvitv2_l_pt"), dict(output_stride=16, mask="cube")),
    slow(golden_layout("vit_b_pt"), dict(target="hog", mask="block"))])
def test_full_size(layout, kind, load):
    """The public models, by name and shape only."""
    recipe = foreign_recipe(meta(layout))
    assert {key: recipe[key] for key in kind} == kind
    model = build(recipe, "meta")
    report = load(meta(layout), model)
    assert len(report["loaded"]) == len(model.state_dict())


def test_config_of_the_release_counts_more_than_guesses():
    state = meta(golden_layout("mvitv2_s_ft_dimmulatt"))
    cfg = ("DATA:\n  MEAN:\n  - 0.485\n  - 0.456\n  - 0.406\n  SAMPLING_RATE: 3\n"
           "  STD: [0.229, 0.224, 0.225]\nMVIT:\n  USE_MEAN_POOLING: true\n")
    for text, *want in ((cfg, "mean", 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                        ("USE_MEAN_POOLING: False", "cls", 4, (0.45,) * 3, (0.225,) * 3)):
        recipe = foreign_recipe({"model_state": state, "cfg": text})
        assert [recipe[key] for key in ("pool", "sampling_rate", "mean", "std")] == want


@pytest.mark.parametrize("layout, words", [
    (vit_layout(384, 12, 16, 224, 1000), r"no known model: \(4, 384, 12\)"),
    ({**vit_layout(*TINY, 7), "pos_embed": (1, 66, 128)}, "pos_embed of 66"),  # DeiT, distilled
    ({k: v for k, v in vit_layout(*TINY, 7).items() if k != "pos_embed"}, "lacks pos_embed")])
def test_other_models_are_named(layout, words):
    with pytest.raises(ValueError, match=words):
        foreign_recipe(meta(layout))


def test_rename_takes_whole_components_and_refuses_collisions():
    renamed, origin = rename("release", {"hogs.0.w": 1, "xhogs.b": 2, "head.projection.w": 3})
    assert renamed == {"xhogs.b": 2, "head.w": 3} and origin["head.w"] == "head.projection.w"
    with pytest.raises(ValueError, match="fc_norm.weight and norm.weight both mean norm.weight"):
        rename("timm", {"norm.weight": 1, "fc_norm.weight": 2})


def call(*arguments):
    """convert.py with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        convert.main()


@pytest.mark.parametrize("name, stage, to, changes", [
    ("mvit_tiny", PRETRAIN, "release", {}), slow("vit_tiny", PRETRAIN, "release", {}),
    ("mvit_tiny", FINETUNE, "release", dict(expand="attn", pool="cls")),
    slow("mvit_tiny", FINETUNE, "release", dict(num_frames=8, image_size=(64, 96))),
    slow("vit_tiny", FINETUNE, "release", {}),
    slow("vit_tiny", FINETUNE, "release", dict(pool="cls")),
    ("vit_tiny", FINETUNE, "timm", {}), slow("vit_tiny", FINETUNE, "timm", dict(pool="cls"))])
def test_round_trip(name, stage, to, changes, tmp_path):
    """Ours -> theirs -> ours: bit-equal weights, and a recipe that builds the same model."""
    checkpoint = ours(name, stage, **changes)[0]
    before, theirs, after = (str(tmp_path / file) for file in ("ours.pt", "theirs.pth", "again.pt"))
    save_checkpoint(before, checkpoint)
    call(before, theirs, "--to", to)
    call(theirs, after)
    again = read_checkpoint(after)
    assert list(again["model"]) == list(checkpoint["model"])
    assert all(torch.equal(again["model"][key], checkpoint["model"][key]) for key in again["model"])
    keys = set(stage) - {"patch_size" if name == "mvit_tiny" else "num_frames"}
    keys -= {"mean", "std", "sampling_rate"} if to == "timm" else set()  # no place for them
    assert all(again["recipe"][key] == checkpoint["recipe"][key] for key in keys)


@pytest.mark.parametrize("name, stage, changes, golden_name", [
    ("mvitv2_s", PRETRAIN, {}, "mvitv2_s_pt"), ("mvitv2_s", FINETUNE, {}, "mvitv2_s_ft"),
    ("mvitv2_s", FINETUNE, dict(expand="attn"), "mvitv2_s_ft_dimmulatt"),
    slow("mvitv2_l", PRETRAIN, {}, "mvitv2_l_pt"),
    ("vit_b", PRETRAIN, {}, "vit_b_pt"), ("vit_b", FINETUNE, dict(num_classes=1000), "vit_b_ft")])
def test_export_has_the_keys_of_the_release(name, stage, changes, golden_name):
    """All names and shapes, except the constant buffers `hogs`."""
    recipe = {**stage, "model": name, "num_frames": 16, "image_size": (224, 224), "patch_size": 16,
              **({"output_stride": 16} if stage is PRETRAIN else {"num_classes": 400}), **changes}
    model = build(recipe, "meta")
    exported, left_out = export({"model": model.state_dict(), "recipe": recipe}, "release")
    assert set(exported) == {"epoch", "model_state", "optimizer_state", "cfg"} and not left_out
    want = {k: s for k, s in golden_layout(golden_name).items() if not k.startswith("hogs.")}
    assert shapes_of(exported["model_state"]) == want


def test_export_to_timm_has_its_keys():
    for pool, last in (("mean", "fc_norm"), ("cls", "norm")):
        state, left_out = export(ours("vit_tiny", pool=pool)[0], "timm")
        assert shapes_of(state) == vit_layout(*TINY, 7, last) and not left_out
    checkpoint, model = ours("vit_tiny", PRETRAIN)  # of pre-training, the trunk
    state, left_out = export(checkpoint, "timm")
    assert set(state) == {name for name in vit_layout(*TINY) if not name.startswith("norm.")}
    assert torch.equal(state["blocks.5.mlp.fc2.weight"], model.encoder.blocks[5].mlp.fc2.weight)
    assert sorted(left_out) == sorted([*STAGE_ONLY, "mask_token"])
    with pytest.raises(ValueError, match="timm has no mvit_tiny.*--to release"):
        export(ours("mvit_tiny")[0], "timm")


@pytest.mark.parametrize("name, blocks", [
    ("mvitv2_s", [15]), slow("mvitv2_l", [45, 46, 47]), ("vit_b", [])])
def test_transfer(name, blocks, load):
    """The tensors resized, dropped and added are those that the release resizes, drops, adds."""
    before, after = golden_layout(f"{name}_pt"), golden_layout(f"{name}_ft")
    model = build(foreign_recipe(meta(after)), "meta")
    report = load({"model_state": meta(before)}, model)
    C = {"mvitv2_s": 96, "mvitv2_l": 72}.get(name)
    assert report["resized"] == [f"blocks.{i}.attn.rel_pos_{axis} (27, {C}) -> (13, {C})"
                                 for i in blocks for axis in "hw"]
    dropped = {key for key in before if key.startswith(("mask_token", "hogs.", "pred_head."))}
    assert set(report["left out"]) == dropped == set(before) - set(after)
    assert sorted(key.replace("head.projection", "head") for key in report["fresh"]) == STAGE_ONLY
    assert sum(len(report[what]) for what in ("loaded", "resized", "fresh")) == len(after)


def test_relative_tables_are_resized_linearly(load):
    checkpoint = ours("mvit_tiny", PRETRAIN)[0]
    model = ours("mvit_tiny", image_size=(96, 96), num_frames=8)[1]
    resized = load(checkpoint, model)["resized"]
    assert len(resized) == 9 and "blocks.0.attn.rel_pos_h (31, 32) -> (47, 32)" in resized
    table = checkpoint["model"]["encoder.blocks.0.attn.rel_pos_h"].double().numpy()
    places = (np.arange(47) + 0.5) * 31 / 47 - 0.5  # half-pixel centers
    want = np.array([np.interp(places, np.arange(31), column) for column in table.T]).T
    np.testing.assert_allclose(model.blocks[0].attn.rel_pos_h.detach(), want, atol=1e-6)


def test_vit_into_another_size_and_into_pretraining(load):
    """Positions are resized bicubically. What only one model has is fresh or left out, by name."""
    state, big = vit(7), ours("vit_tiny", image_size=(96, 96), num_classes=3)[1]
    report = load(state, big)
    assert report["resized"] == ["pos_embed (1, 65, 128) -> (1, 145, 128)"]
    assert report["left out"] == ["head.weight (7, 128)", "head.bias (7,)"]
    assert report["fresh"] == ["head.weight", "head.bias"]
    assert torch.equal(big.pos_embed[:, 0], state["pos_embed"][:, 0])
    grid = state["pos_embed"][:, 1:].view(1, 8, 8, 128).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=12, mode="bicubic")
    torch.testing.assert_close(big.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2))
    report = load(state, ours("vit_tiny", PRETRAIN)[1])
    assert sorted(report["fresh"]) == sorted([*STAGE_ONLY, "mask_token"])
    assert sorted(report["left out"]) == STAGE_ONLY


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_and_hostile_files_are_refused(tmp_path):
    checkpoint, model = ours("vit_tiny", PRETRAIN)
    hostile = {"args": argparse.Namespace(arch=Hostile(os.mkdir, str(tmp_path / "made")))}
    torch.save(hostile, tmp_path / "hostile")
    (tmp_path / "legacy").write_bytes(pickle.dumps(hostile))
    save_checkpoint(str(tmp_path / "last.pt"), checkpoint)
    (tmp_path / "cut").write_bytes((tmp_path / "last.pt").read_bytes()[:100_000])
    torch.save([1, 2], tmp_path / "list")
    torch.save({"weights": {}}, tmp_path / "unknown")
    for name, words in (("hostile", "damaged"), ("legacy", "damaged"), ("cut", "damaged"),
                        ("list", "holds a list"), ("unknown", "unknown format.*weights")):
        with pytest.raises(ValueError, match=words):
            load_weights(model, str(tmp_path / name))
    assert not (tmp_path / "made").exists()
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_weights(model, str(tmp_path / "nowhere.pt"))


@pytest.mark.parametrize("name, key, said", [
    ("vit_tiny", "fc_norm.weight", "(timm): 80 loaded, 0 resized, 0 fresh, 0 left"),
    ("mvit_tiny", "model_state", "(release): 81 loaded, 0 resized, 0 fresh, 0 left")])
def test_command_line(name, key, said, tmp_path, capsys):
    """ViT goes to timm, MViT to the release. Nothing is written over."""
    before, theirs, after = (tmp_path / x for x in ("ours.pt", "theirs.pth", "new/again.pt"))
    save_checkpoint(str(before), ours(name)[0])
    call(before, theirs)
    assert key in read_checkpoint(str(theirs)) and "0 left out" in capsys.readouterr().out
    call(theirs, after)
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match="again.pt exists"):
        call(theirs, after)
    with pytest.raises(ValueError, match="without --to"):
        call(theirs, tmp_path / "x.pth", "--to", "release")


def test_a_file_that_is_almost_a_model_is_refused(tmp_path):
    pixels = released("vit_tiny", PRETRAIN, target="pixel", pixel_norm="patch")
    torch.save(pixels, tmp_path / "pixels.pyth")  # a head that is not HOG's
    with pytest.raises(ValueError, match="like vit_tiny, but not it.*head.weight"):
        call(tmp_path / "pixels.pyth", tmp_path / "x.pt")


# -------------------------------------------------------------------------- rectangles and prefixes

def save_vit(path, image_size):
    """A ViT with a table of positions that is a plane: row + 10 column."""
    model = ViT(8, 2, 2, num_classes=3, image_size=image_size, patch_size=8)
    h, w = model.grid
    plane = torch.arange(h)[:, None] + 10.0 * torch.arange(w)
    with torch.no_grad():
        model.pos_embed[0, 1:] = plane.flatten()[:, None]
    recipe = {"model": "vit_tiny", "image_size": image_size, "patch_size": 8}
    torch.save({"model": model.state_dict(), "recipe": recipe}, path)
    return model


def test_positions_follow_the_grid_of_the_checkpoint(tmp_path):
    """Also where another grid has as many tokens: 8x8 is not laid over 4x16."""
    path = str(tmp_path / "vit.pt")
    for old, new in (((64, 64), (64, 96)), ((64, 64), (32, 128)), ((32, 128), (64, 64)),
                     ((64, 96), (64, 96))):
        saved = save_vit(path, old)
        model = ViT(8, 2, 2, num_classes=3, image_size=new, patch_size=8)
        report = load_weights(model, path, verbose=False)
        plane, found = (net.pos_embed[0, 1:, 0].detach().view(1, 1, *net.grid)
                        for net in (saved, model))
        assert torch.equal(found, F.interpolate(plane, size=model.grid, mode="bicubic"))
        assert bool(report["resized"]) == (old != new)
        assert all((found.diff(dim=axis) > 0).all() for axis in (2, 3))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "model.", "model.module."])
@pytest.mark.parametrize("key", ["model", "state_dict_ema", "model_ema"])
def test_prefixes_and_averaged_weights(prefix, key, tmp_path):
    saved = save_vit(tmp_path / "a.pt", (64, 64))
    state = {prefix + name: x for name, x in saved.state_dict().items()}
    torch.save({key: state, "epoch": 3}, tmp_path / "b.pt")
    model = ViT(8, 2, 2, num_classes=3, image_size=64, patch_size=8)
    report = load_weights(model, str(tmp_path / "b.pt"), verbose=False)
    assert len(report["loaded"]) == len(state)
    assert all(torch.equal(x, saved.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("name", [
    "vit.encoder.layer.0.attention.attention.query.weight",  # Hugging Face, with and without "vit."
    "encoder.layer.0.attention.attention.query.weight", "encoder.blocks.0.attn.q_bias",  # VideoMAE
    "backbone.layers.0.ln1.weight"])
def test_an_unknown_format_is_called_so(name, tmp_path):
    for content in {name: torch.zeros(1)}, {"epoch": 1, "model": {name: torch.zeros(1)}}:
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=f"unknown format: .*{name}.*give one of"):
            foreign_recipe(read_checkpoint(str(tmp_path / "file.pt")))


def test_a_checkpoint_of_another_model_names_both(load):
    with pytest.raises(ValueError, match="another model, vit_b and not vit_tiny: .*--model vit_b"):
        load(meta(vit_layout(768, 12, 16, 224, 7)), ours("vit_tiny")[1])
    with pytest.raises(ValueError, match="another model, one of other sizes and not vit_tiny: "):
        load(meta(vit_layout(384, 12, 16, 224, 7)), ours("vit_tiny")[1])


# ------------------------------------------------------------------------------------- safetensors

# A file that the package `safetensors` 0.8.0 wrote
REAL = (b'\x90\0\0\0\0\0\0\0{"__metadata__":{"by":"x"},"count":{"dtype":"I64","shape":[],'
        b'"data_offsets":[0,8]},"half":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}} '
        b'\x07\0\0\0\0\0\0\0\xc0?\0\xc0')
ENTRY = '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'


def test_safetensors_of_the_original(tmp_path):
    path = str(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(REAL)
    found = read_checkpoint(path)
    assert found["half"].dtype == torch.bfloat16 and found["half"].tolist() == [[1.5, -2.0]]
    assert found["count"].dtype == torch.int64 and found["count"].item() == 7
    tensors = {**found, "turned": torch.arange(6.0).view(2, 3).T, "none": torch.empty(0, 3)}
    write_safetensors(path, tensors)
    again = read_safetensors(path)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("old, new, word", [
    ("F32", "F4", "F4"), ("[2]", "[3]", "cannot be"), ("[0, 8]", "[8, 16]", "cannot be"),
    ("[0, 8]", "[0, 4]", "cannot be"), ("[2]", "[-1, -2]", "negative"), ("[2]", '"ab"', ""),
    ('"shape": [2], ', "", "shape"), (ENTRY, "[1]", ""), (ENTRY, "[" * 9999, ""), ("{", "{{", ""),
    ("[2]", "[1000000000000]", "cannot be"), (ENTRY, "", ""), (ENTRY, "{}", "more than the 0"),
    ("}}", '}, "b": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}', "cannot be")])
def test_damaged_safetensors_are_refused(old, new, word, tmp_path):
    path, header = tmp_path / "a.safetensors", ENTRY.replace(old, new, 1).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(8)
    for content in whole, whole[:-1], whole[:9], whole[:3], struct.pack("<Q", 2 ** 63) + b"{}":
        path.write_bytes(content)
        reason = word if content is whole else ""
        with pytest.raises(ValueError, match=f"a.safetensors is damaged.*{reason}"):
            read_checkpoint(str(path))


@pytest.mark.parametrize("stage, changes, options", [
    (FINETUNE, {}, dict(global_pool="avg", final_norm=True)),
    (FINETUNE, dict(pool="cls", image_size=(64, 96)), dict(global_pool="token")),
    (PRETRAIN, dict(mean=(0.5,) * 3, std=(0.5,) * 3), dict(global_pool="avg", final_norm=False))])
def test_folder_for_timm(stage, changes, options, tmp_path):
    """Weights by timm's names, and what timm needs to build the model and to prepare images."""
    checkpoint, model = ours("vit_tiny", stage, **changes)
    names = [f"class {i}" for i in range(checkpoint["recipe"].get("num_classes", 0))]
    save_checkpoint(str(tmp_path / "ours.pt"), {**checkpoint, "classes": names})
    call(tmp_path / "ours.pt", f"{tmp_path}/hub/", "--to", "hub")
    assert sorted(os.listdir(tmp_path)) == ["hub", "ours.pt"]
    state = read_checkpoint(str(tmp_path / "hub/model.safetensors"))
    want = export(checkpoint, "timm")[0]
    assert state.keys() == want.keys() and all(torch.equal(state[x], want[x]) for x in want)
    config, recipe = json.loads((tmp_path / "hub/config.json").read_text()), checkpoint["recipe"]
    assert config["architecture"] == "vit_tiny_patch16_224" and len(names) == config["num_classes"]
    assert config.get("label_names", []) == names
    assert config["model_args"].items() >= dict(
        options, embed_dim=128, depth=6, num_heads=4, patch_size=8).items()
    assert config["model_args"]["img_size"] == list(recipe["image_size"])
    assert config["pretrained_cfg"]["input_size"] == [3, *recipe["image_size"]]
    assert [config["pretrained_cfg"][key] for key in ("mean", "std")] == [
        list(recipe[key]) for key in ("mean", "std")]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    save_checkpoint(str(tmp_path / "ours.pt"), ours("vit_tiny")[0])

    def full(path, tensors):
        raise OSError("No space left")

    monkeypatch.setattr(convert, "write_safetensors", full)
    flags = tmp_path / "ours.pt", tmp_path / "hub", "--to", "hub"
    assert "No space" in runs.refusal(monkeypatch, capsys, "convert", *flags)
    assert os.listdir(tmp_path) == ["ours.pt"]
    save_checkpoint(str(tmp_path / "ours.pt"), ours("mvit_tiny")[0])
    assert "--to release" in runs.refusal(monkeypatch, capsys, "convert", *flags)
