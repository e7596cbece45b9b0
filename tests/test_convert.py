"""Foreign checkpoints in and out, and what must be refused. Layouts follow the public models."""
import argparse
import json
import os
import pickle
import sys

from engine import read_checkpoint, save_checkpoint

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN

import convert
import mvit
import vit
from convert import export, foreign_recipe, load_weights, recognize, rename
from models import build_classifier, build_maskfeat

SHARED = dict(patch_size=8, expand="mlp", drop_path=0.0, checkpointing=False, num_frames=4,
              image_size=(64, 64))
PRETRAIN = dict(SHARED, target="hog", bins=9, cell=8, norm="l2", color="rgb", gradient="sobel")
FINETUNE = dict(SHARED, num_classes=7, pool="mean", mean=(0.4, 0.45, 0.5), std=(0.2, 0.2, 0.25),
                sampling_rate=3)
TINY = (128, 6, 8, 64)  # vit_tiny
TINY_CLIP = (64, 2, (1, 2), 4, 4, 64, 7)  # mvit_tiny(expand="attn")
SLOW = pytest.mark.slow
STAGE_ONLY = ["head.bias", "head.weight", "norm.bias", "norm.weight"]


def affine(name, out, *dim):
    """Weight and bias of a linear layer or, without dim, of a norm."""
    return {f"{name}.weight": (out, *dim), f"{name}.bias": (out,)}


def vit_layout(dim, depth, patch, side, classes=0, last="norm"):
    """timm's ViT; also DeiT's, DINO's backbone, MAE's encoder and, with fc_norm, fine-tuned MAE."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + (side // patch) ** 2, dim),
              "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for b in (f"blocks.{i}." for i in range(depth)):
        shapes |= affine(b + "norm1", dim) | affine(b + "norm2", dim)
        shapes |= affine(b + "attn.qkv", 3 * dim, dim) | affine(b + "attn.proj", dim, dim)
        shapes |= affine(b + "mlp.fc1", 4 * dim, dim) | affine(b + "mlp.fc2", dim, 4 * dim)
    return shapes | affine(last, dim) | (affine("head", classes, dim) if classes else {})


def mae_layout(dim, depth, patch, side, width=64):
    """MAE in pre-training: the encoder, and a decoder of its own width with the mask token."""
    names = vit_layout(width, 2, patch, side)
    decoder = {key: names[key] for key in names if key.startswith(("blocks.", "pos_embed", "norm"))}
    decoder |= affine("embed", width, dim) | affine("pred", 3 * patch ** 2, width)
    return {**vit_layout(dim, depth, patch, side), "mask_token": (1, 1, width),
            **{f"decoder_{key}": shape for key, shape in decoder.items()}}


def dino_layout(prefix):
    """The student ("module.") or teacher ("") of DINO's training file, with its projection head."""
    head = affine("mlp.0", 32, 128) | {"last_layer.weight_g": (50, 1)}
    return {**{f"{prefix}backbone.{key}": shape for key, shape in vit_layout(*TINY).items()},
            **{f"{prefix}head.{key}": shape for key, shape in head.items()}}


def torchvision_layout(dim, heads, stages, kv, frames, side, classes):
    """mvit_v2_s: the width doubles inside the attention of each transition."""
    shapes = {"conv_proj.weight": (dim, 3, 3, 7, 7), "conv_proj.bias": (dim,),
              "pos_encoding.class_token": (dim,)}
    c, n, head = dim, side // 4, dim // heads
    starts = [sum(stages[:s]) for s in range(len(stages))]
    for i in range(sum(stages)):
        out = dim * 2 ** (sum(i >= start for start in starts) - 1)
        q, b = 2 if i and i in starts else 1, f"blocks.{i}."
        kv = max(kv // q, 1)
        table = 2 * max(n // q, n // kv) - 1
        shapes |= affine(b + "norm1", c) | affine(b + "norm2", out)
        shapes |= {f"{b}attn.rel_pos_{axis}": (table, head) for axis in "hw"}
        shapes |= {b + "attn.rel_pos_t": (frames - 1, head)}
        shapes |= affine(b + "attn.qkv", 3 * out, c) | affine(b + "attn.project.0", out, out)
        for pool in (f"{b}attn.pool_{x}." for x in "qkv"):
            shapes |= {pool + "pool.weight": (head, 1, 3, 3, 3)} | affine(pool + "norm_act.0", head)
        shapes |= affine(b + "mlp.0", 4 * out, out) | affine(b + "mlp.3", out, 4 * out)
        if c != out:
            shapes |= affine(b + "project", out, c)
        c, n = out, n // q
    return shapes | affine("norm", c) | affine("head.1", classes, c)


TORCHVISION_S = torchvision_layout(96, 1, (1, 2, 11, 2), 8, 16, 224, 400)


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


def build(recipe):
    return build_maskfeat(recipe) if "target" in recipe else build_classifier(recipe)


def classifier(name, **changes):
    return build_classifier({**FINETUNE, "model": name, **changes})


def ours(name, stage=FINETUNE, **changes):
    """A checkpoint of ours and its model, with random weights throughout."""
    recipe = {**stage, "model": name, "output_stride": 8 if name == "mvit_tiny" else 16, **changes}
    model = build(recipe)
    model.load_state_dict(filled(shapes_of(model.state_dict())))
    return {"model": model.state_dict(), "recipe": recipe, "step": 3}, model


def vit_file(last="norm", prefix="", classes=7):
    return filled({prefix + key: s for key, s in vit_layout(*TINY, classes, last).items()})


# Format -> checkpoint, and what foreign_recipe must see in it. The name starts with the format.
FOREIGN = {
    "torchvision": (lambda: filled(torchvision_layout(*TINY_CLIP)), dict(
        model="mvit_tiny", num_classes=7, num_frames=4, expand="attn", pool="cls")),
    "timm": (vit_file, dict(model="vit_tiny", num_classes=7, pool="cls")),
    "timm, mean": (lambda: vit_file("fc_norm"), dict(num_classes=7, pool="mean")),
    "timm, DeiT": (lambda: {"model": vit_file()}, dict(num_classes=7, pool="cls")),
    "timm, DDP": (lambda: {"state_dict": vit_file(prefix="module.")}, dict(num_classes=7)),
    "timm, DINO": (lambda: vit_file(classes=0), dict(num_classes=0, pool="cls")),
    "timm, MAE fine-tuned": (lambda: {"model": vit_file("fc_norm"), "epoch": 99}, dict(
        num_classes=7, pool="mean", std=(0.229, 0.224, 0.225))),
    "DINO": (lambda: {
        "student": filled(dino_layout("module."), 1), "teacher": filled(dino_layout("")),
        "args": argparse.Namespace(arch="vit_base")}, dict(num_classes=0, pool="cls")),
    "DINO, student": (lambda: {"student": filled(dino_layout("module."))}, dict(num_classes=0)),
    "MAE": (lambda: {"model": filled(mae_layout(*TINY))}, dict(num_classes=0, model="vit_tiny")),
    "release": (lambda: export(ours("mvit_tiny")[0], "release")[0], dict(
        num_classes=7, pool="mean", expand="mlp", sampling_rate=3, mean=(0.4, 0.45, 0.5))),
    "release, ViT": (lambda: export(ours("vit_tiny")[0], "release")[0], dict(pool="mean")),
    "release, pre-training": (lambda: export(ours("mvit_tiny", PRETRAIN)[0], "release")[0], dict(
        target="hog", output_stride=8, num_classes=0)),
    "ours": (lambda: ours("mvit_tiny")[0], dict(num_classes=7)),
    "ours, pre-training": (lambda: ours("vit_tiny", PRETRAIN)[0], dict(model="vit_tiny")),
}


def place_of(checkpoint):
    """(the state dict in a checkpoint, function that puts another one into its place)."""
    keys = ("model_state", "model", "teacher", "student", "state_dict")
    key = next((key for key in keys if key in checkpoint), None)
    if key is None:
        return checkpoint, lambda state: state
    return checkpoint[key], lambda state: {**checkpoint, key: state}


@pytest.fixture
def serve(monkeypatch):
    """serve(checkpoint): from now on any path holds it. Tensors may be on the meta device."""
    return lambda content: monkeypatch.setattr(convert, "read_checkpoint", lambda path: content)


# ---------------------------------------------------------------------------- every format

@pytest.mark.parametrize("form", FOREIGN)
def test_formats(form, tmp_path):
    """Recognized, described, and loaded whole: every tensor of the model comes from the file."""
    make, want = FOREIGN[form]
    checkpoint = make()
    assert recognize(checkpoint)[0] == form.split(",")[0]
    recipe = foreign_recipe(checkpoint)
    assert {key: recipe[key] for key in want} == want and tuple(recipe["image_size"]) == (64, 64)
    torch.save(checkpoint, tmp_path / "file")
    model = build(recipe)
    report = load_weights(model, str(tmp_path / "file"), verbose=False)
    assert not report["fresh"] and not report["resized"]
    assert sorted(report["loaded"]) == sorted(model.state_dict())
    state = recognize(checkpoint)[1]
    assert len(report["loaded"]) + len(report["left out"]) == len(state)
    sums = [{round(float(tensor.double().sum()), 9) for tensor in x.values()}
            for x in (model.state_dict(), state)]
    assert sums[0] <= sums[1]
    dropped = ["head.mlp.", "head.last_layer.", "decoder_"] + ["mask_token"] * (form == "MAE")
    if "target" not in recipe and not recipe["num_classes"]:  # a trunk has no norm of its own
        dropped += ["norm.", "backbone.norm."]
    assert set(report["left out"]) == {name for name in state if name.startswith(tuple(dropped))}


@pytest.mark.parametrize("form", FOREIGN)
def test_one_renamed_tensor_is_refused(form, serve):
    """Whichever it is, except where the whole head or decoder of another method is dropped."""
    checkpoint = FOREIGN[form][0]()
    model = build(foreign_recipe(checkpoint))
    state, put = place_of(checkpoint)
    dropped = ("decoder_", "head.mlp.", "head.last_layer.", "module.head.")
    dropped += ("mask_token",) * (form == "MAE")
    names = [name for name in state if not name.startswith(dropped)]
    for name in names[::5]:  # all kinds of names
        serve(put({old + "_" * (old == name): tensor for old, tensor in state.items()}))
        with pytest.raises(ValueError, match="another model") as error:
            load_weights(model, "file", verbose=False)
        assert name.removeprefix("module.") + "_" in str(error.value)


@pytest.mark.parametrize("form", ["torchvision", "timm", "release", "ours"])
def test_one_missing_or_added_tensor_is_refused(form, serve):
    checkpoint = FOREIGN[form][0]()
    model = build(foreign_recipe(checkpoint))
    state, put = place_of(checkpoint)
    for end in ("norm.weight", "qkv.bias", next(n for n in state if n.startswith("head."))):
        name = next(name for name in reversed(state) if name.endswith(end))
        serve(put({n: tensor for n, tensor in state.items() if n != name}))
        with pytest.raises(ValueError, match="1 tensors do not fit"):
            load_weights(model, "file", verbose=False)
    serve(put({**state, "blocks.0.ls1.gamma": torch.ones(128)}))  # layer scale
    with pytest.raises(ValueError, match="blocks.0.ls1.gamma"):
        load_weights(model, "file", verbose=False)


@pytest.mark.parametrize("form, expand, pool, other", [
    ("torchvision", "attn", "cls", "mlp"), ("release", "mlp", "mean", "attn"),
    ("release", "attn", "cls", "mlp"), ("ours", "attn", "mean", "mlp")])
def test_expand_and_pool_that_would_fit_are_named(form, expand, pool, other, serve):
    checkpoint = ours("mvit_tiny", expand=expand, pool=pool)[0]
    checkpoint = export(checkpoint, form)[0] if form == "release" else checkpoint
    serve(FOREIGN[form][0]() if form == "torchvision" else checkpoint)
    with pytest.raises(ValueError, match="another model") as error:
        load_weights(classifier("mvit_tiny", expand=other), "file")
    assert f'expand="{expand}", pool="{pool}" (--expand {expand} --pool {pool})' in str(error.value)
    with pytest.raises(ValueError, match=f"[(]--expand {expand}[)]"):
        load_weights(ours("mvit_tiny", PRETRAIN, expand=other)[1], "file")
    load_weights(classifier("mvit_tiny", expand=expand, pool=pool), "file", verbose=False)
    with pytest.raises(ValueError) as error:  # another depth: no expand would help
        load_weights(mvit.MViT(64, 2, (1, 1), num_frames=4, image_size=64, expand=other), "file")
    assert "--expand" not in str(error.value)


def test_another_model_is_an_error(serve):
    serve(ours("vit_tiny", PRETRAIN)[0])
    for model in (vit.ViT(128, 5, 4, num_classes=0, patch_size=8, image_size=64),
                  vit.ViT(128, 7, 4, num_classes=0, patch_size=8, image_size=64),
                  mvit.mvit_tiny(num_frames=4, image_size=64)):
        with pytest.raises(ValueError, match="checkpoint of another model.*tensors do not fit"):
            load_weights(model, "file")


@pytest.mark.parametrize("layout, kind", [
    (vit_layout(768, 12, 16, 224, 1000), dict(model="vit_b", num_classes=1000, pool="cls")),
    (vit_layout(768, 12, 16, 384, 1000), dict(model="vit_b", image_size=(384, 384), patch_size=16)),
    (vit_layout(768, 12, 8, 224), dict(patch_size=8, image_size=(224, 224), num_classes=0)),
    (vit_layout(1024, 24, 16, 224, 21843, "fc_norm"), dict(model="vit_l", num_classes=21843)),
    (mae_layout(1024, 24, 16, 224, 512), dict(model="vit_l", num_classes=0)),
    (TORCHVISION_S, dict(model="mvitv2_s", num_classes=400, num_frames=16, image_size=(224, 224),
                         expand="attn", pool="cls")),
    (golden_layout("mvitv2_s_ft"), dict(model="mvitv2_s", expand="mlp", pool="mean", num_frames=16,
                                        mean=(0.45,) * 3)),
    (golden_layout("mvitv2_s_ft_dimmulatt"), dict(expand="attn", pool="cls", num_classes=400)),
    pytest.param(golden_layout("mvitv2_l_312_40x3_dimmulatt"), dict(
        num_frames=40, image_size=(312, 312)), marks=SLOW),
    pytest.param(golden_layout("mvitv2_l_pt"), dict(
        target="hog", output_stride=16, mask="cube"), marks=SLOW),
    (golden_layout("vit_b_pt"), dict(target="hog", mask="block", image_size=(224, 224))),
    (golden_layout("vit_b_ft"), dict(model="vit_b", pool="mean", num_classes=1000)),
])
def test_full_size(layout, kind, serve):
    """The public models, by name and shape only."""
    recipe = foreign_recipe(meta(layout))
    assert {key: recipe[key] for key in kind} == kind
    with torch.device("meta"):
        model = build(recipe)
    serve(meta(layout))
    report = load_weights(model, "file", verbose=False)
    assert not report["fresh"] and not report["resized"]
    assert len(report["loaded"]) == len(model.state_dict())


def test_torchvision_parameter_count():
    """As torchvision states for mvit_v2_s: the layout above is the public one."""
    assert sum(np.prod(shape) for shape in TORCHVISION_S.values()) == 34_537_744


def test_config_of_the_release_counts_more_than_guesses():
    state = meta(golden_layout("mvitv2_s_ft_dimmulatt"))
    cfg = ("DATA:\n  MEAN:\n  - 0.485\n  - 0.456\n  - 0.406\n  SAMPLING_RATE: 3\n"
           "  STD: [0.229, 0.224, 0.225]\nMVIT:\n  USE_MEAN_POOLING: true\n")
    for text, pool, rate, mean, std in (
            (cfg, "mean", 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ("USE_MEAN_POOLING: False", "cls", 4, (0.45,) * 3, (0.225,) * 3),
            ("", "cls", 4, (0.45,) * 3, (0.225,) * 3)):
        recipe = foreign_recipe({"model_state": state, "cfg": text})
        assert recipe["pool"] == pool and recipe["sampling_rate"] == rate
        assert recipe["mean"] == mean and recipe["std"] == std


@pytest.mark.parametrize("layout, words", [
    (vit_layout(384, 12, 16, 224, 1000), r"no known model: \(4, 384, 12\)"),
    ({**vit_layout(*TINY, 7), "pos_embed": (1, 66, 128)}, "pos_embed of 66"),  # DeiT, distilled
    ({k: v for k, v in vit_layout(*TINY, 7).items() if k != "pos_embed"}, "lacks pos_embed"),
    ({k: v for k, v in golden_layout("mvitv2_s_ft").items() if ".rel_pos_t" not in k},
     "lacks blocks.0.attn.rel_pos_t"),
    ({**golden_layout("mvitv2_s_ft"), "patch_embed.proj.weight": (96, 3, 7, 7)}, "no known model")])
def test_other_models_are_named(layout, words):
    with pytest.raises(ValueError, match=words):
        foreign_recipe(meta(layout))


def test_rename_takes_whole_components_and_refuses_collisions():
    table = [("hogs.", None), ("fc_norm.", "norm."), ("x.", "z.")]
    renamed, origin = rename({"hogs.0.w": 1, "a.fc_norm.b": 2, "xx.b": 3, "x.x.b": 4}, table)
    assert renamed == {"a.norm.b": 2, "xx.b": 3, "z.x.b": 4}
    assert origin == {"a.norm.b": "a.fc_norm.b", "xx.b": "xx.b", "z.x.b": "x.x.b"}
    assert rename({"a.norm.b": 2}, table, back=True)[0] == {"a.fc_norm.b": 2}
    with pytest.raises(ValueError, match="fc_norm.weight and norm.weight both mean norm.weight"):
        rename({"norm.weight": 1, "fc_norm.weight": 2}, table)


def timm_forward(state, x, heads, pool):
    """timm's VisionTransformer as plain functions. x: (B, 3, H, W)."""
    def ln(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def fc(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    stem = state["patch_embed.proj.weight"]
    x = F.conv2d(x, stem, state["patch_embed.proj.bias"], stem.shape[-1]).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for b in (f"blocks.{i}" for i in range(6)):
        q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2)
                   for y in fc(ln(x, f"{b}.norm1"), f"{b}.attn.qkv").chunk(3, -1))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + fc((weights @ v).transpose(1, 2).flatten(2), f"{b}.attn.proj")
        x = x + fc(F.gelu(fc(ln(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    return fc(ln(x, "norm")[:, 0] if pool == "cls" else ln(x[:, 1:].mean(1), "fc_norm"), "head")


@pytest.mark.parametrize("form, pool", [("timm", "cls"), ("timm, mean", "mean")])
def test_logits_of_timm(form, pool, serve):
    checkpoint = FOREIGN[form][0]()
    serve(checkpoint)
    model = build(foreign_recipe(checkpoint)).eval()
    load_weights(model, "file", verbose=False)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want, got = timm_forward(checkpoint, x, 4, pool), model(x)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- round trips

def call(*arguments):
    """convert.py with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        convert.main()


@pytest.mark.parametrize("name, stage, to, changes", [
    ("mvit_tiny", PRETRAIN, "release", {}), ("vit_tiny", PRETRAIN, "release", {}),
    ("mvit_tiny", FINETUNE, "release", {}), ("mvit_tiny", FINETUNE, "release", dict(expand="attn")),
    ("mvit_tiny", FINETUNE, "release", dict(expand="attn", pool="cls")),
    ("mvit_tiny", FINETUNE, "release", dict(pool="cls")),
    ("mvit_tiny", FINETUNE, "release", dict(num_frames=8, image_size=(64, 96))),
    ("vit_tiny", FINETUNE, "release", {}), ("vit_tiny", FINETUNE, "release", dict(pool="cls")),
    ("vit_tiny", FINETUNE, "timm", {}), ("vit_tiny", FINETUNE, "timm", dict(pool="cls"))])
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
    pytest.param("mvitv2_l", PRETRAIN, {}, "mvitv2_l_pt", marks=SLOW),
    pytest.param("mvitv2_l", FINETUNE, {}, "mvitv2_l_ft", marks=SLOW),
    pytest.param("mvitv2_l", FINETUNE, dict(expand="attn", image_size=(312, 312), num_frames=40),
                 "mvitv2_l_312_40x3_dimmulatt", marks=SLOW),
    ("vit_b", PRETRAIN, {}, "vit_b_pt"), ("vit_b", FINETUNE, dict(num_classes=1000), "vit_b_ft")])
def test_export_has_the_keys_of_the_release(name, stage, changes, golden_name):
    """All names and shapes, except the constant buffers `hogs`."""
    recipe = {**stage, "model": name, "num_frames": 16, "image_size": (224, 224), "patch_size": 16,
              **({"output_stride": 16} if stage is PRETRAIN else {"num_classes": 400}), **changes}
    with torch.device("meta"):
        model = build(recipe)
    exported, left_out = export({"model": model.state_dict(), "recipe": recipe}, "release")
    assert set(exported) == {"epoch", "model_state", "optimizer_state", "cfg"} and not left_out
    want = {k: s for k, s in golden_layout(golden_name).items() if not k.startswith("hogs.")}
    assert shapes_of(exported["model_state"]) == want


def test_export_to_timm_has_its_keys():
    for pool, last in (("mean", "fc_norm"), ("cls", "norm")):
        with torch.device("meta"):
            model = classifier("vit_b", image_size=(224, 224), patch_size=16, num_classes=1000)
        recipe = {"model": "vit_b", "pool": pool}
        state, left_out = export({"model": model.state_dict(), "recipe": recipe}, "timm")
        assert shapes_of(state) == vit_layout(768, 12, 16, 224, 1000, last) and not left_out
    checkpoint, model = ours("vit_tiny", PRETRAIN)  # of pre-training, the trunk
    state, left_out = export(checkpoint, "timm")
    assert set(state) == {name for name in vit_layout(*TINY) if not name.startswith("norm.")}
    assert torch.equal(state["blocks.5.mlp.fc2.weight"], model.encoder.blocks[5].mlp.fc2.weight)
    assert sorted(left_out) == sorted([*STAGE_ONLY, "mask_token"])
    with pytest.raises(ValueError, match="timm has no mvit_tiny.*--to release"):
        export(ours("mvit_tiny")[0], "timm")


@pytest.mark.parametrize("name, blocks", [
    ("mvitv2_s", [15]), pytest.param("mvitv2_l", [45, 46, 47], marks=SLOW), ("vit_b", [])])
def test_transfer(name, blocks, serve):
    """The tensors resized, dropped and added are those that the release resizes, drops, adds."""
    before, after = golden_layout(f"{name}_pt"), golden_layout(f"{name}_ft")
    serve({"model_state": meta(before)})
    with torch.device("meta"):
        model = build_classifier(foreign_recipe(meta(after)))
    report = load_weights(model, "file", verbose=False)
    C = {"mvitv2_s": 96, "mvitv2_l": 72}.get(name)
    assert report["resized"] == [f"blocks.{i}.attn.rel_pos_{axis} (27, {C}) -> (13, {C})"
                                 for i in blocks for axis in "hw"]
    dropped = {key for key in before if key.startswith(("mask_token", "hogs.", "pred_head."))}
    assert set(report["left out"]) == dropped == set(before) - set(after)
    head = "head.projection" if blocks else "head"
    assert set(report["fresh"]) == {"norm.weight", "norm.bias", f"{head}.weight", f"{head}.bias"}
    assert sum(len(report[what]) for what in ("loaded", "resized", "fresh")) == len(after)


def test_relative_tables_are_resized_linearly(serve):
    checkpoint = ours("mvit_tiny", PRETRAIN)[0]
    serve(checkpoint)
    model = classifier("mvit_tiny", image_size=(96, 96), num_frames=8)
    resized = load_weights(model, "file", verbose=False)["resized"]
    assert len(resized) == 9 and "blocks.0.attn.rel_pos_h (31, 32) -> (47, 32)" in resized
    table = checkpoint["model"]["encoder.blocks.0.attn.rel_pos_h"].double().numpy()
    places = (np.arange(47) + 0.5) * 31 / 47 - 0.5  # half-pixel centers
    want = np.array([np.interp(places, np.arange(31), column) for column in table.T]).T
    np.testing.assert_allclose(model.blocks[0].attn.rel_pos_h.detach(), want, atol=1e-6)


def test_position_embedding_is_resized_bicubically(serve):
    state = vit_file()
    serve(state)
    big = classifier("vit_tiny", image_size=(96, 96), num_classes=3)
    report = load_weights(big, "file", verbose=False)
    assert report["resized"] == ["pos_embed (1, 65, 128) -> (1, 145, 128)"]
    assert report["left out"] == ["head.weight (7, 128)", "head.bias (7,)"]
    assert report["fresh"] == ["head.weight", "head.bias"]
    assert torch.equal(big.pos_embed[:, 0], state["pos_embed"][:, 0])
    grid = state["pos_embed"][:, 1:].view(1, 8, 8, 128).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=12, mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(big.pos_embed[:, 1:], grid)
    assert convert.resize_positions("blocks.0.mlp.fc1.weight", torch.zeros(4, 4), (5, 4)) is None


def test_pretrained_into_classifier_and_back(serve):
    """The trunk goes in; what only one stage has stays fresh or is left out, by name."""
    checkpoint, model = ours("vit_tiny", PRETRAIN)
    serve(checkpoint)
    net = classifier("vit_tiny")
    head = net.head.weight.clone()
    report = load_weights(net, "file", verbose=False)
    assert torch.equal(net.blocks[3].mlp.fc1.weight, model.encoder.blocks[3].mlp.fc1.weight)
    assert torch.equal(net.head.weight, head) and sorted(report["fresh"]) == STAGE_ONLY
    assert sorted(report["left out"]) == sorted([*STAGE_ONLY, "mask_token"])
    serve(vit_file())  # a supervised ViT into a MaskFeat
    report = load_weights(model, "file", verbose=False)
    assert sorted(report["fresh"]) == sorted([*STAGE_ONLY, "mask_token"])
    assert sorted(report["left out"]) == STAGE_ONLY


class Hostile:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_checkpoint_runs_nothing(tmp_path, legacy):
    path, trace = tmp_path / "bad.pth", tmp_path / "made"
    content = {"model": {}, "args": argparse.Namespace(arch=Hostile(str(trace)))}
    if legacy:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_weights(mvit.mvit_tiny(), str(path))
    assert not trace.exists()


def test_damaged_checkpoints(tmp_path):
    checkpoint, model = ours("vit_tiny", PRETRAIN)
    save_checkpoint(str(tmp_path / "last.pt"), checkpoint)
    (tmp_path / "cut").write_bytes((tmp_path / "last.pt").read_bytes()[:100_000])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"weights": {}}, tmp_path / "unknown")
    for name, words in (("cut", "damaged"), ("empty", "damaged"), ("text", "damaged"),
                        ("list", "holds a list"), ("unknown", "no known .*format.*weights")):
        with pytest.raises(ValueError, match=words):
            load_weights(model, str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_weights(model, str(tmp_path / "nowhere.pt"))


@pytest.mark.parametrize("name, keys, said", [
    ("vit_tiny", {"cls_token", "fc_norm.weight"}, "(timm): 80 loaded, 0 resized, 0 fresh, 0 left"),
    ("mvit_tiny", {"model_state", "cfg"}, "(release): 81 loaded, 0 resized, 0 fresh, 0 left")])
def test_command_line(name, keys, said, tmp_path, capsys):
    """ViT goes to timm, MViT to the release. Nothing is written over."""
    before, theirs, after = (tmp_path / x for x in ("ours.pt", "theirs.pth", "new/again.pt"))
    save_checkpoint(str(before), ours(name)[0])
    call(before, theirs)
    assert keys <= set(read_checkpoint(str(theirs))) and "0 left out" in capsys.readouterr().out
    call(theirs, after)
    assert said in capsys.readouterr().out
    content = after.read_bytes()
    with pytest.raises(ValueError, match="again.pt exists"):
        call(theirs, after)
    assert after.read_bytes() == content
    with pytest.raises(ValueError, match="without --to"):
        call(theirs, tmp_path / "x.pth", "--to", "release")


def test_a_file_that_is_almost_a_model_is_refused(tmp_path):
    pixels = ours("vit_tiny", PRETRAIN, target="pixel", pixel_norm="patch")[0]
    torch.save(export(pixels, "release")[0], tmp_path / "pixels.pyth")  # a head that is not HOG's
    with pytest.raises(ValueError, match="like vit_tiny, but not it.*head.weight"):
        import_foreign(str(tmp_path / "pixels.pyth"))
