"""Other people's checkpoints in and out, and what must be refused. Layouts are written from the public models."""
import argparse
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import convert
import mvit
import vit
from conftest import GOLDEN, ROOT
from convert import export, foreign_recipe, import_foreign, load_weights, recognize, rename, resize_positions
from models import build_classifier, build_maskfeat
from engine import read_checkpoint, save_checkpoint

PRETRAIN = dict(target="hog", output_stride=16, patch_size=8, expand="mlp", drop_path=0.0, checkpointing=False, bins=9,
                cell=8, norm="l2", color="rgb", gradient="sobel", image_size=(64, 64), num_frames=4)
FINETUNE = dict(num_classes=7, image_size=(64, 64), num_frames=4, patch_size=8, expand="mlp", drop_path=0.0,
                checkpointing=False, pool="mean", mean=(0.4, 0.45, 0.5), std=(0.2, 0.2, 0.25), sampling_rate=3)


# ----------------------------------------------------------------------------------------------------- public layouts

def linear(name, out, dim):
    return {f"{name}.weight": (out, dim), f"{name}.bias": (out,)}


def norm(name, dim):
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def vit_layout(dim, depth, patch, side, classes=0, last="norm"):
    """timm's VisionTransformer; also DeiT's, DINO's backbone, MAE's encoder and (last="fc_norm") fine-tuned MAE."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + (side // patch) ** 2, dim),
              "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        b = f"blocks.{i}."
        shapes |= norm(b + "norm1", dim) | linear(b + "attn.qkv", 3 * dim, dim) | linear(b + "attn.proj", dim, dim)
        shapes |= norm(b + "norm2", dim) | linear(b + "mlp.fc1", 4 * dim, dim) | linear(b + "mlp.fc2", dim, 4 * dim)
    return shapes | norm(last, dim) | (linear("head", classes, dim) if classes else {})


def mae_layout(dim, depth, patch, side, width=64):
    """MAE in pre-training: the encoder, and a decoder of its own width; the mask token is the decoder's."""
    decoder = vit_layout(width, 2, patch, side)
    return {**vit_layout(dim, depth, patch, side), "mask_token": (1, 1, width),
            "decoder_pos_embed": decoder["pos_embed"], **linear("decoder_embed", width, dim),
            **norm("decoder_norm", width), **linear("decoder_pred", 3 * patch ** 2, width),
            **{"decoder_" + name: shape for name, shape in decoder.items() if name.startswith("blocks.")}}


def dino_layout(dim, depth, patch, side, prefix):
    """The student ("module.") or teacher ("") of DINO's training file, with its projection head."""
    return {**{f"{prefix}backbone.{name}": shape for name, shape in vit_layout(dim, depth, patch, side).items()},
            **{f"{prefix}head.{name}": shape for name, shape in {
                **linear("mlp.0", 32, dim), **linear("mlp.2", 32, 32), **linear("mlp.4", 16, 32),
                "last_layer.weight_g": (50, 1), "last_layer.weight_v": (50, 16)}.items()}}


def torchvision_layout(dim, heads, stages, kv, frames, side, classes):
    """mvit_v2_s: the width doubles inside the attention of each transition."""
    shapes = {"conv_proj.weight": (dim, 3, 3, 7, 7), "conv_proj.bias": (dim,), "pos_encoding.class_token": (dim,)}
    c, n, head = dim, side // 4, dim // heads
    for i in range(sum(stages)):
        stage = next(s for s in range(len(stages)) if i < sum(stages[:s + 1]))
        out, q = dim * 2 ** stage, 2 if stage and i == sum(stages[:stage]) else 1
        kv, b = max(kv // q, 1), f"blocks.{i}."
        table = 2 * max(n // q, n // kv) - 1
        shapes |= {**norm(b + "norm1", c), **norm(b + "norm2", out),
                   b + "attn.rel_pos_h": (table, head), b + "attn.rel_pos_w": (table, head),
                   b + "attn.rel_pos_t": (frames - 1, head),
                   **linear(b + "attn.qkv", 3 * out, c), **linear(b + "attn.project.0", out, out)}
        for x in "qkv":
            pool = f"{b}attn.pool_{x}."
            shapes |= {pool + "pool.weight": (head, 1, 3, 3, 3), **norm(pool + "norm_act.0", head)}
        shapes |= {**linear(b + "mlp.0", 4 * out, out), **linear(b + "mlp.3", out, 4 * out)}
        if c != out:
            shapes |= linear(b + "project", out, c)
        c, n = out, n // q
    return shapes | norm("norm", c) | linear("head.1", classes, c)


def golden_layout(name):
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / f"keys_{name}.json").read_text())["state_dict"]}


def filled(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


TINY = (128, 6, 8, 64)                                                        # vit_tiny
TINY_CLIP = (64, 2, (1, 2), 4, 4, 64, 7)                                      # mvit_tiny(expand="attn"), 7 classes


def classifier(name, **changes):
    return build_classifier({**FINETUNE, "model": name, **changes})


def ours(name, stage, **changes):
    """A checkpoint of ours and its model, with random weights throughout."""
    recipe = {**(PRETRAIN if stage == "pretrain" else FINETUNE), "model": name, **changes}
    recipe["output_stride"] = 8 if name == "mvit_tiny" else 16
    model = (build_maskfeat if stage == "pretrain" else build_classifier)(recipe)
    model.load_state_dict(filled(shapes_of(model.state_dict())))
    return {"model": model.state_dict(), "recipe": recipe, "step": 3}, model


# Format -> checkpoint, and what foreign_recipe must see in it. `recognize` says the name's first word.
FOREIGN = {
    "torchvision": (lambda: filled(torchvision_layout(*TINY_CLIP)),
                    dict(model="mvit_tiny", num_classes=7, num_frames=4, expand="attn", pool="cls", mean=(0.45,) * 3)),
    "timm": (lambda: filled(vit_layout(*TINY, 7)), dict(model="vit_tiny", num_classes=7, pool="cls")),
    "timm, mean": (lambda: filled(vit_layout(*TINY, 7, "fc_norm")), dict(model="vit_tiny", num_classes=7, pool="mean")),
    "timm, DeiT": (lambda: {"model": filled(vit_layout(*TINY, 7))}, dict(num_classes=7, pool="cls")),
    "timm, DDP": (lambda: {"state_dict": filled({f"module.{name}": s for name, s in vit_layout(*TINY, 7).items()})},
                  dict(num_classes=7, pool="cls")),
    "timm, DINO": (lambda: filled(vit_layout(*TINY)), dict(num_classes=0, pool="cls")),
    "timm, MAE fine-tuned": (lambda: {"model": filled(vit_layout(*TINY, 7, "fc_norm")), "epoch": 99},
                             dict(num_classes=7, pool="mean", std=(0.229, 0.224, 0.225))),
    "DINO": (lambda: {"student": filled(dino_layout(*TINY, "module."), 1), "teacher": filled(dino_layout(*TINY, "")),
                      "epoch": 100, "args": argparse.Namespace(arch="vit_base")}, dict(num_classes=0, pool="cls")),
    "DINO, student": (lambda: {"student": filled(dino_layout(*TINY, "module."))}, dict(num_classes=0)),
    "MAE": (lambda: {"model": filled(mae_layout(*TINY))}, dict(num_classes=0, model="vit_tiny", image_size=(64, 64))),
    "release": (lambda: export(ours("mvit_tiny", "finetune")[0], "release")[0],
                dict(model="mvit_tiny", num_classes=7, pool="mean", expand="mlp", sampling_rate=3, mean=(.4, .45, .5))),
    "release, ViT": (lambda: export(ours("vit_tiny", "finetune")[0], "release")[0], dict(num_classes=7, pool="mean")),
    "release, pre-training": (lambda: export(ours("mvit_tiny", "pretrain")[0], "release")[0],
                              dict(target="hog", output_stride=8, num_classes=0)),
    "ours": (lambda: ours("mvit_tiny", "finetune")[0], dict(num_classes=7)),
    "ours, pre-training": (lambda: ours("vit_tiny", "pretrain")[0], dict(model="vit_tiny")),
}


def model_for(checkpoint):
    recipe = foreign_recipe(checkpoint)
    return build_maskfeat(recipe) if "target" in recipe else build_classifier(recipe)


@pytest.fixture
def serve(monkeypatch):
    """serve(checkpoint): from now on any path holds it. No file is written, so tensors may be on the meta device."""
    return lambda checkpoint: monkeypatch.setattr(convert, "read_checkpoint", lambda path: checkpoint)


# --------------------------------------------------------------------------------------------------------- every format

@pytest.mark.parametrize("form", FOREIGN)
def test_formats(form, tmp_path):
    """Recognised, described, and loaded whole into the model described: every tensor of it comes from the file."""
    make, want = FOREIGN[form]
    checkpoint = make()
    assert recognize(checkpoint)[0] == form.split(",")[0]
    recipe = foreign_recipe(checkpoint)
    assert {key: recipe[key] for key in want} == want
    assert tuple(recipe["image_size"]) == (64, 64)
    torch.save(checkpoint, tmp_path / "file")
    model = model_for(checkpoint)
    report = load_weights(model, str(tmp_path / "file"), verbose=False)
    assert not report["fresh"] and not report["resized"]
    assert sorted(report["loaded"]) == sorted(model.state_dict())
    state = recognize(checkpoint)[1]
    assert len(report["loaded"]) + len(report["left out"]) == len(state)
    sums = {round(float(tensor.double().sum()), 9) for tensor in state.values()}          # each tensor is a file's one
    assert {round(float(tensor.double().sum()), 9) for tensor in model.state_dict().values()} <= sums
    want_out = ["head.mlp.", "head.last_layer.", "decoder_"] + ["mask_token"] * (form == "MAE")
    if "target" not in recipe and not recipe["num_classes"]:                  # a trunk has no norm of its own
        want_out += ["norm.", "backbone.norm."]
    assert set(report["left out"]) == {name for name in state if name.startswith(tuple(want_out))}


@pytest.mark.parametrize("form", FOREIGN)
def test_one_renamed_tensor_is_refused(form, serve):
    """Whichever tensor it is, except where the whole head or decoder of another method is dropped."""
    checkpoint = FOREIGN[form][0]()
    model = model_for(checkpoint)
    key = next((k for k in ("model_state", "model", "teacher", "student", "state_dict") if k in checkpoint), None)
    state = checkpoint if key is None else checkpoint[key]
    dropped = ("decoder_", "head.mlp.", "head.last_layer.", "module.head.", *(["mask_token"] if form == "MAE" else []))
    names = [name for name in state if not name.startswith(dropped)]
    for name in names:
        renamed = {old + "_" if old == name else old: tensor for old, tensor in state.items()}
        serve(renamed if key is None else {**checkpoint, key: renamed})
        with pytest.raises(ValueError, match="checkpoint of another model") as error:
            load_weights(model, "file", verbose=False)
        assert name.removeprefix("module.") + "_" in str(error.value)


@pytest.mark.parametrize("form", ["torchvision", "timm", "release", "ours"])
def test_one_missing_or_added_tensor_is_refused(form, serve):
    checkpoint = FOREIGN[form][0]()
    model = model_for(checkpoint)
    key = next((k for k in ("model_state", "model") if k in checkpoint), None)
    state = checkpoint if key is None else checkpoint[key]
    for name in ("norm.weight", next(n for n in state if n.startswith("head.") and n.endswith("bias")),
                 next(n for n in state if n.endswith("qkv.bias"))):
        short = {n: tensor for n, tensor in state.items() if n != name}
        serve(short if key is None else {**checkpoint, key: short})
        with pytest.raises(ValueError, match="1 tensors do not fit"):
            load_weights(model, "file", verbose=False)
    more = {**state, "blocks.0.ls1.gamma": torch.ones(128)}                                # layer scale
    serve(more if key is None else {**checkpoint, key: more})
    with pytest.raises(ValueError, match="blocks.0.ls1.gamma"):
        load_weights(model, "file", verbose=False)


@pytest.mark.parametrize("layout, kind", [
    (vit_layout(768, 12, 16, 224, 1000), dict(model="vit_b", num_classes=1000, pool="cls", patch_size=16)),
    (vit_layout(768, 12, 16, 384, 1000), dict(model="vit_b", image_size=(384, 384))),
    (vit_layout(768, 12, 8, 224), dict(model="vit_b", patch_size=8, image_size=(224, 224), num_classes=0)),
    (vit_layout(1024, 24, 16, 224, 21843, "fc_norm"), dict(model="vit_l", num_classes=21843, pool="mean")),
    (mae_layout(1024, 24, 16, 224, 512), dict(model="vit_l", num_classes=0)),
    (torchvision_layout(96, 1, (1, 2, 11, 2), 8, 16, 224, 400),
     dict(model="mvitv2_s", num_classes=400, num_frames=16, image_size=(224, 224), expand="attn", pool="cls")),
    (golden_layout("mvitv2_s_ft"), dict(model="mvitv2_s", expand="mlp", pool="mean", num_frames=16, mean=(0.45,) * 3)),
    (golden_layout("mvitv2_s_ft_dimmulatt"), dict(model="mvitv2_s", expand="attn", pool="cls", num_classes=400)),
    (golden_layout("mvitv2_l_312_40x3_dimmulatt"), dict(model="mvitv2_l", num_frames=40, image_size=(312, 312))),
    (golden_layout("mvitv2_l_pt"), dict(model="mvitv2_l", target="hog", output_stride=16, mask="cube")),
    (golden_layout("vit_b_pt"), dict(model="vit_b", target="hog", mask="block", image_size=(224, 224))),
    (golden_layout("vit_b_ft"), dict(model="vit_b", pool="mean", num_classes=1000)),
])
def test_full_size(layout, kind, serve):
    """The public models, by name and shape only."""
    recipe = foreign_recipe(meta(layout))
    assert {key: recipe[key] for key in kind} == kind
    with torch.device("meta"):
        model = model_for(meta(layout))
    serve(meta(layout))
    report = load_weights(model, "file", verbose=False)
    assert not report["fresh"] and not report["resized"] and len(report["loaded"]) == len(model.state_dict())


def test_torchvision_parameter_count():
    """34,537,744, as torchvision states for mvit_v2_s: the layout above is the public one."""
    layout = torchvision_layout(96, 1, (1, 2, 11, 2), 8, 16, 224, 400)
    assert sum(np.prod(shape) for shape in layout.values()) == 34_537_744


def test_config_of_the_release_counts_more_than_guesses():
    state = meta(golden_layout("mvitv2_s_ft_dimmulatt"))
    cfg = ("DATA:\n  MEAN:\n  - 0.485\n  - 0.456\n  - 0.406\n  SAMPLING_RATE: 3\n  STD: [0.229, 0.224, 0.225]\n"
           "MVIT:\n  DIM_MUL_IN_ATT: true\n  USE_MEAN_POOLING: true\n")
    recipe = foreign_recipe({"model_state": state, "cfg": cfg})
    assert recipe["pool"] == "mean" and recipe["sampling_rate"] == 3
    assert recipe["mean"] == (0.485, 0.456, 0.406) and recipe["std"] == (0.229, 0.224, 0.225)
    cfg = cfg.replace("USE_MEAN_POOLING: true", "USE_MEAN_POOLING: False")
    assert foreign_recipe({"model_state": state, "cfg": cfg})["pool"] == "cls"
    plain = foreign_recipe({"model_state": state, "cfg": ""})
    assert plain["pool"] == "cls" and plain["mean"] == (0.45,) * 3 and plain["sampling_rate"] == 4


@pytest.mark.parametrize("layout, words", [
    (vit_layout(384, 12, 16, 224, 1000), r"no known model: stem \(384, 3, 16, 16\), depth 12"),
    ({**vit_layout(*TINY, 7), "pos_embed": (1, 66, 128)}, "not a class token and a square grid"),      # DeiT, distilled
    ({k: v for k, v in vit_layout(*TINY, 7).items() if k != "pos_embed"}, "lacks pos_embed"),
    ({k: v for k, v in golden_layout("mvitv2_s_ft").items() if ".rel_pos_t" not in k}, "lacks blocks.0.attn.rel_pos_t"),
    ({**golden_layout("mvitv2_s_ft"), "patch_embed.proj.weight": (96, 3, 7, 7)}, "no known model")])   # for images
def test_other_models_are_named(layout, words):
    with pytest.raises(ValueError, match=words):
        foreign_recipe(meta(layout))


def test_rename_takes_whole_components_and_refuses_collisions():
    table = [("hogs.", None), ("fc_norm.", "norm."), ("x.", "z.")]
    renamed, origin = rename({"hogs.0.w": 1, "a.fc_norm.b": 2, "xx.b": 3, "x.x.b": 4}, table)
    assert renamed == {"a.norm.b": ("a.fc_norm.b", 2), "xx.b": ("xx.b", 3), "z.x.b": ("x.x.b", 4)}
    assert dropped == ["hogs.0.w"]
    assert rename({"a.norm.b": 2}, table, back=True) == ({"a.fc_norm.b": ("a.norm.b", 2)}, [])
    with pytest.raises(ValueError, match="fc_norm.weight and norm.weight both mean norm.weight"):
        rename({"norm.weight": 1, "fc_norm.weight": 2}, table)


# --------------------------------------------------------------------------------------------------------------- logits

def timm_forward(state, x, heads, pooled):
    """timm's VisionTransformer as plain functions. x: (B, 3, H, W)."""
    def ln(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def fc(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    stem = state["patch_embed.proj.weight"]
    x = F.conv2d(x, stem, state["patch_embed.proj.bias"], stem.shape[-1])
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + state["pos_embed"]
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2)
                   for part in fc(ln(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + fc((weights @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + fc(F.gelu(fc(ln(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    x = ln(x, "norm")[:, 0] if pooled == "cls" else ln(x[:, 1:].mean(1), "fc_norm")
    return fc(x, "head")


@pytest.mark.parametrize("form, pooled", [("timm", "cls"), ("timm, DeiT", "cls"), ("timm, mean", "mean")])
def test_logits_of_timm(form, pooled, serve):
    checkpoint = FOREIGN[form][0]()
    serve(checkpoint)
    model = model_for(checkpoint).eval()
    load_weights(model, "file", verbose=False)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        want, got = timm_forward(recognize(checkpoint)[1], x, 4, pooled), model(x)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, shape", [("mvit_tiny", (2, 3, 4, 64, 64)), ("vit_tiny", (2, 3, 64, 64))])
def test_pool(name, shape):
    model = ours(name, "finetune", pool="cls")[1].eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        tokens, _ = model.encode(*model.embed(x))
        torch.testing.assert_close(model(x), model.head(model.norm(tokens[:, 0])))
        by_mean = classifier(name).eval()
        by_mean.load_state_dict(model.state_dict())
        torch.testing.assert_close(by_mean(x), model.head(model.norm(tokens[:, 1:].mean(1))))
        assert (by_mean(x) - model(x)).abs().max() > 1e-3
        del model.norm, model.head                                            # as with num_classes=0
        torch.testing.assert_close(model(x), tokens[:, 0])
    with pytest.raises(ValueError, match="pool='max'"):
        classifier(name, pool="max")


def test_build_classifier():
    assert classifier("vit_tiny").dropout == 0 and classifier("vit_tiny", dropout=0.5).dropout == 0.5
    with torch.device("meta"):
        assert classifier("mvitv2_s", image_size=(224, 224), num_frames=16).patch_stride == (2, 32, 32)
        assert classifier("mvit_tiny").patch_stride == (2, 8, 8)
        for side, frames in ((312, 40), (352, 32)):
            model = classifier("mvitv2_l", image_size=(side, side), num_frames=frames, expand="attn", num_classes=400)
            assert model.blocks[0].attn.rel_pos_h.shape[0] == 2 * (side // 4) - 1
    with pytest.raises(ValueError, match="W=60, use 56 or 64"):
        classifier("vit_tiny", image_size=(64, 60))
    with pytest.raises(ValueError, match="model='resnet'.*mvitv2_s"):
        classifier("resnet")


# ---------------------------------------------------------------------------------------------------------- round trips

TRIPS = [("mvit_tiny", "pretrain", "release", {}), ("vit_tiny", "pretrain", "release", {}),
         ("mvit_tiny", "finetune", "release", {}), ("mvit_tiny", "finetune", "release", dict(expand="attn")),
         ("mvit_tiny", "finetune", "release", dict(expand="attn", pool="cls")),
         ("mvit_tiny", "finetune", "release", dict(pool="cls")),
         ("mvit_tiny", "finetune", "release", dict(num_frames=8, image_size=(64, 96))),
         ("vit_tiny", "finetune", "release", {}), ("vit_tiny", "finetune", "release", dict(pool="cls")),
         ("vit_tiny", "finetune", "timm", {}), ("vit_tiny", "finetune", "timm", dict(pool="cls"))]


@pytest.mark.parametrize("name, stage, to, changes", TRIPS)
def test_round_trip(name, stage, to, changes, tmp_path):
    """Ours -> theirs -> ours through the script: bit-equal weights, and a recipe that builds the same model."""
    checkpoint, model = ours(name, stage, **changes)
    paths = [str(tmp_path / part) for part in ("ours.pt", "theirs.pth", "again.pt")]
    save_checkpoint(paths[0], checkpoint)
    for source, destination, flags in ((paths[0], paths[1], ["--to", to]), (paths[1], paths[2], [])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["convert.py", source, destination, *flags])
            convert.main()
    again = read_checkpoint(paths[2])
    assert list(again["model"]) == list(checkpoint["model"])
    assert all(torch.equal(again["model"][key], tensor) for key, tensor in checkpoint["model"].items())
    keys = set(FINETUNE) if stage == "finetune" else set(PRETRAIN)
    keys -= {"patch_size"} if name == "mvit_tiny" else {"num_frames"}
    keys -= {"mean", "std", "sampling_rate"} if to == "timm" else set()       # a flat state dict has no place for them
    assert {key: again["recipe"][key] for key in keys} == {key: checkpoint["recipe"][key] for key in keys}


@pytest.mark.parametrize("name, stage, changes, golden_name", [
    ("mvitv2_s", "pretrain", {}, "mvitv2_s_pt"), ("mvitv2_l", "pretrain", {}, "mvitv2_l_pt"),
    ("mvitv2_s", "finetune", {}, "mvitv2_s_ft"), ("mvitv2_l", "finetune", {}, "mvitv2_l_ft"),
    ("mvitv2_s", "finetune", dict(expand="attn"), "mvitv2_s_ft_dimmulatt"),
    ("mvitv2_l", "finetune", dict(expand="attn", image_size=(312, 312), num_frames=40), "mvitv2_l_312_40x3_dimmulatt"),
    ("vit_b", "pretrain", {}, "vit_b_pt"), ("vit_b", "finetune", dict(num_classes=1000), "vit_b_ft")])
def test_export_has_the_keys_of_the_release(name, stage, changes, golden_name):
    """All names and shapes, except the constant buffers `hogs`."""
    recipe = {**(PRETRAIN if stage == "pretrain" else FINETUNE), "model": name, "num_frames": 16, "num_classes": 400,
              "image_size": (224, 224), "patch_size": 16, **changes}
    with torch.device("meta"):
        model = (build_maskfeat if stage == "pretrain" else build_classifier)(recipe)
    exported, left_out = export({"model": model.state_dict(), "recipe": recipe}, "release")
    assert set(exported) == {"epoch", "model_state", "optimizer_state", "cfg"} and not left_out
    want = {key: shape for key, shape in golden_layout(golden_name).items() if not key.startswith("hogs.")}
    assert shapes_of(exported["model_state"]) == want


def test_export_to_timm_has_its_keys():
    for pool, last in (("mean", "fc_norm"), ("cls", "norm")):
        with torch.device("meta"):
            model = classifier("vit_b", image_size=(224, 224), patch_size=16, num_classes=1000)
        recipe = {"model": "vit_b", "pool": pool}
        state, left_out = export({"model": model.state_dict(), "recipe": recipe}, "timm")
        assert shapes_of(state) == vit_layout(768, 12, 16, 224, 1000, last) and not left_out


def test_export_of_pretraining_to_timm_is_the_trunk():
    checkpoint, model = ours("vit_tiny", "pretrain")
    state, left_out = export(checkpoint, "timm")
    assert set(state) == {name for name in vit_layout(*TINY) if not name.startswith("norm.")}
    assert torch.equal(state["blocks.5.mlp.fc2.weight"], model.encoder.blocks[5].mlp.fc2.weight)
    assert sorted(left_out) == ["head.bias", "head.weight", "mask_token", "norm.bias", "norm.weight"]
    with pytest.raises(ValueError, match="timm has no mvit_tiny.*--to release"):
        export(ours("mvit_tiny", "finetune")[0], "timm")


# ----------------------------------------------------------------------------------- from pre-training to fine-tuning

@pytest.mark.parametrize("name, blocks", [("mvitv2_s", [15]), ("mvitv2_l", [45, 46, 47]), ("vit_b", [])])
def test_transfer(name, blocks, serve):
    """Exactly the tables resized, the tensors dropped and those added that the release resizes, drops and adds."""
    before, after = golden_layout(f"{name}_pt"), golden_layout(f"{name}_ft")
    state = meta(before)
    serve({"model_state": state})
    with torch.device("meta"):
        model = build_classifier(foreign_recipe(meta(after)))
    report = load_weights(model, "file", verbose=False)
    C = {"mvitv2_s": 96, "mvitv2_l": 72}.get(name)
    want = [f"blocks.{i}.attn.rel_pos_{axis} (27, {C}) -> (13, {C})" for i in blocks for axis in "hw"]
    assert report["resized"] == want
    dropped = {name for name in before if name.startswith(("mask_token", "hogs.", "pred_head."))}
    assert set(report["left out"]) == dropped == set(before) - set(after)
    head = "head.projection" if blocks else "head"
    assert set(report["fresh"]) == {"norm.weight", "norm.bias", f"{head}.weight", f"{head}.bias"}
    assert len(report["loaded"]) + len(report["resized"]) + len(report["fresh"]) == len(after)


def test_relative_tables_are_resized_linearly(serve):
    checkpoint, _ = ours("mvit_tiny", "pretrain")
    serve(checkpoint)
    model = classifier("mvit_tiny", image_size=(96, 96), num_frames=8)
    report = load_weights(model, "file", verbose=False)
    assert len(report["resized"]) == 9 and "blocks.0.attn.rel_pos_h (31, 32) -> (47, 32)" in report["resized"]
    table = checkpoint["model"]["encoder.blocks.0.attn.rel_pos_h"].double().numpy()
    places = (np.arange(47) + 0.5) * 31 / 47 - 0.5                            # half-pixel centres
    want = [np.interp(places, np.arange(31), column) for column in table.T]
    np.testing.assert_allclose(model.blocks[0].attn.rel_pos_h.detach(), np.array(want).T, atol=1e-6)


def test_position_embedding_is_resized_bicubically(serve):
    state = FOREIGN["timm"][0]()
    serve(state)
    big = classifier("vit_tiny", image_size=(96, 96), num_classes=3)
    report = load_weights(big, "file", verbose=False)
    assert report["resized"] == ["pos_embed (1, 65, 128) -> (1, 145, 128)"]
    assert report["left out"] == ["head.weight (7, 128)", "head.bias (7,)"]
    assert report["fresh"] == ["head.weight", "head.bias"]
    assert torch.equal(big.pos_embed[:, 0], state["pos_embed"][:, 0])
    grid = F.interpolate(state["pos_embed"][:, 1:].view(1, 8, 8, 128).permute(0, 3, 1, 2), size=12, mode="bicubic")
    torch.testing.assert_close(big.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2))
    assert resize_positions("blocks.0.mlp.fc1.weight", torch.zeros(4, 4), (5, 4)) is None


def test_pretrained_into_classifier_and_back(serve):
    """The trunk goes in; what only one stage has stays fresh or is left out, by name."""
    checkpoint, model = ours("vit_tiny", "pretrain")
    serve(checkpoint)
    net = classifier("vit_tiny")
    head = net.head.weight.clone()
    report = load_weights(net, "file", verbose=False)
    assert torch.equal(net.blocks[3].mlp.fc1.weight, model.encoder.blocks[3].mlp.fc1.weight)
    assert torch.equal(net.head.weight, head)
    assert sorted(report["fresh"]) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert sorted(report["left out"]) == ["head.bias", "head.weight", "mask_token", "norm.bias", "norm.weight"]

    serve(FOREIGN["timm"][0]())                                               # a supervised ViT into a MaskFeat
    report = load_weights(model, "file", verbose=False)
    assert sorted(report["fresh"]) == ["head.bias", "head.weight", "mask_token", "norm.bias", "norm.weight"]
    assert sorted(report["left out"]) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]


def test_another_model_is_an_error(serve):
    serve(ours("vit_tiny", "pretrain")[0])
    for depth in (5, 7):
        with pytest.raises(ValueError, match="checkpoint of another model.*tensors do not fit"):
            load_weights(vit.ViT(128, depth, 4, num_classes=0, patch_size=8, image_size=64), "file")
    with pytest.raises(ValueError, match="checkpoint of another model"):
        load_weights(mvit.mvit_tiny(num_frames=4, image_size=64), "file")
    serve(FOREIGN["torchvision"][0]())                                        # widens elsewhere
    with pytest.raises(ValueError, match="another model"):
        load_weights(classifier("mvit_tiny", expand="mlp"), "file")


# -------------------------------------------------------------------------------------------------- hostile and damaged

class Hostile:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_checkpoint_runs_nothing(tmp_path, legacy):
    path, trace = tmp_path / "bad.pth", str(tmp_path / "made")
    content = {"model": {}, "args": argparse.Namespace(arch=Hostile(trace))}               # Namespace itself is allowed
    if legacy:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_weights(mvit.mvit_tiny(), str(path))
    assert not os.path.exists(trace)


def test_damaged_checkpoints(tmp_path):
    checkpoint, model = ours("vit_tiny", "pretrain")
    path = str(tmp_path / "last.pt")
    save_checkpoint(path, checkpoint)
    whole = open(path, "rb").read()
    for name, content, words in (("cut", whole[:len(whole) // 2], "damaged"), ("empty", b"", "damaged"),
                                 ("text", b"not a checkpoint", "damaged")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_weights(model, str(tmp_path / name))
    torch.save([1, 2], tmp_path / "list")
    torch.save({"weights": {}}, tmp_path / "unknown")
    for name, words in (("list", "holds a list"), ("unknown", "no known checkpoint format.*weights")):
        with pytest.raises(ValueError, match=words):
            load_weights(model, str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_weights(model, str(tmp_path / "nowhere.pt"))


# ------------------------------------------------------------------------------------------------------- command line

def test_command_line(tmp_path, monkeypatch):
    source, destination = str(tmp_path / "deit.pth"), str(tmp_path / "out" / "deit.pt")
    torch.save({"model": filled(vit_layout(*TINY, 7))}, source)
    command = [str(ROOT / "convert.py"), source, destination]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(timm): 80 loaded, 0 resized, 0 fresh, 0 left out" in done.stdout and "vit_tiny" in done.stdout
    checkpoint = read_checkpoint(destination)
    build_classifier(checkpoint["recipe"]).load_state_dict(checkpoint["model"])
    before = open(destination, "rb").read()
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match="deit.pt exists"):
        convert.main()
    assert open(destination, "rb").read() == before


def test_command_line_by_default(tmp_path, monkeypatch, capsys):
    """ViT goes to timm, MViT to the release; a foreign file with --to is an error, as is one that is almost a model."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        convert.main()

    for name, keys in (("vit_tiny", {"cls_token", "fc_norm.weight"}), ("mvit_tiny", {"model_state", "cfg"})):
        save_checkpoint(str(tmp_path / f"{name}.pt"), ours(name, "finetune")[0])
        call(tmp_path / f"{name}.pt", tmp_path / f"{name}.pth")
        assert keys <= set(read_checkpoint(str(tmp_path / f"{name}.pth")))
        assert "0 left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not ours: convert it without --to"):
        call(tmp_path / "vit_tiny.pth", tmp_path / "x.pth", "--to", "release")
    pixels = {"recipe": {**PRETRAIN, "model": "vit_tiny", "target": "pixel", "pixel_norm": "patch"}}
    pixels["model"] = build_maskfeat(pixels["recipe"]).state_dict()
    torch.save(export(pixels, "release")[0], tmp_path / "pixels.pyth")        # a head that is not HOG's
    with pytest.raises(ValueError, match="like vit_tiny, but not it.*head.weight"):
        import_foreign(str(tmp_path / "pixels.pyth"))
