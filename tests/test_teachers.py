"""Teachers against figures of the official classes. Public, pickled, hostile and partial files."""
import argparse
import json
import os
import pickle
import sys
import types
import zlib

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import GOLDEN, golden_input, slow

import teachers
import vit
from checkpoints import read_checkpoint
from tools.flops import Counter

KEYS = {"dvae": "dvae_encoder", "dino": "dino_vitb16_backbone",
        "dino_full": "dino_vitb16_teacher_wrapped", "deit": "deit_base_patch16_224_model",
        "mocov3": "moco_v3_vit_b_state_dict", "resnet50": "torchvision_resnet50",
        "mocov2": "moco_v2_resnet50_state_dict", "mvit_b": "mvit_b_16x4"}


def keys(name):
    """{name in a public file: shape}"""
    listing = json.loads((GOLDEN / f"keys_{KEYS[name]}.json").read_text())
    return {key: shape for key, shape, _ in listing["state_dict"]}


def draw(name, shape):
    """The golden files' weights before scaling, as their README says."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def constants(name):
    """A public file's state dict. Each tensor repeats one number of its own, to save space."""
    return {key: torch.tensor(zlib.crc32(key.encode()) / 2 ** 32).expand(shape)
            for key, shape in keys(name).items()}


def save(path, content):
    torch.save(content, path)
    return str(path)


# --------------------------------------------------------------------------------- golden figures

def synthetic_image():
    i = np.arange(112) / 112
    y, x = np.meshgrid(i, i, indexing="ij")
    p = 2 * np.pi
    red = .5 + .25 * np.sin(p * (3 * x + 1.5 * y)) + .15 * np.cos(p * (11 * x - 7 * y)) + .1 * x
    green = .5 + .2 * np.sin(20 * p * ((x - .5) ** 2 + (y - .5) ** 2)) + .2 * (y - .5)
    blue = .3 + .4 * x * y + .15 * np.sin(20 * p * x) * np.sin(13 * p * y)
    return torch.from_numpy(np.stack([red, green, blue]).clip(0, 1).astype(np.float32))[None]


@pytest.mark.slow
def test_dvae(golden, tmp_path):
    z, shapes = golden("dvae_encoder.npz"), keys("dvae")
    state = {key: draw(key, shape) * (np.prod(shape[1:]) ** -0.5 if len(shape) == 4 else 0.02)
             for key, shape in shapes.items()}
    teacher = teachers.load_dvae(save(tmp_path / "a.pt", state))
    assert teacher.size == 53_786_240 and len(shapes) == 74
    for key in state:                                           # fill b
        gain = 32 if key.endswith("conv_4.w") else 1
        state[key] *= 25 if key.endswith(".b") else 2 ** 0.5 * gain
    louder = teachers.load_dvae(save(tmp_path / "b.pt", state))
    noise = torch.from_numpy(np.random.default_rng(3).random((3, 112, 112), np.float32))[None]
    with torch.no_grad():
        for prefix, model, image, atol in (
                ("", teacher, synthetic_image(), 5e-6),
                ("b_synth_", louder, synthetic_image(), 5e-5),
                ("b_noise_", louder, noise, 5e-5)):
            logits = model(image)[0]                            # (8192, 14, 14)
            top = logits.topk(2, dim=0).values
            np.testing.assert_array_equal(logits.argmax(0), z[prefix + "argmax_14x14"])
            want = z[prefix + "logits_at_6_9_first64"], z[prefix + "margin_14x14"]
            np.testing.assert_allclose(logits[:64, 6, 9], want[0], atol=atol)
            np.testing.assert_allclose(top[0] - top[1], want[1], atol=2 * atol)
            stats = [logits.double().mean(), logits.double().std(correction=0), logits.abs().max()]
            np.testing.assert_allclose(stats, z[prefix + "logits_mean_std_max"], rtol=1e-5)


@pytest.mark.slow
def test_dino_tokens(golden, tmp_path):
    z = golden("dino_vitb16.npz")
    state = {key: 0.02 * draw(key, shape) + ("norm" in key and key.endswith("weight"))
             for key, shape in keys("dino").items()}
    teacher = teachers.load_vit(save(tmp_path / "dino.pt", state))
    assert teacher.size == 85_798_656
    with torch.no_grad():
        x = teacher(golden_input((2, 3, 224, 224))).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(x[0, :, :8], z["patch_first8_all_tokens_img0"], atol=1e-5)
    np.testing.assert_allclose(x[0, 0], z["patch_token0_full"], atol=1e-5)
    np.testing.assert_allclose(x[1, 195], z["patch_token195_img1_full"], atol=1e-5)
    np.testing.assert_allclose(x.norm(dim=-1), z["patch_norms"], rtol=1e-5)


@pytest.mark.slow
def test_resnet50(golden, tmp_path):
    z, state = golden("resnet50.npz"), {}
    for key, shape in keys("resnet50").items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
        elif len(shape) == 4:
            state[key] = draw(key, shape) / np.prod(shape[1:]) ** 0.5
        else:
            one = key.endswith(("weight", "running_var")) and not key.startswith("fc.")
            state[key] = one + 0.02 * draw(key, shape)
    path = save(tmp_path / "resnet50.pt", state)
    teacher, dilated = teachers.load_resnet50(path), teachers.load_resnet50(path, "dilated")
    assert teacher.size == 25_557_032 - 2048 * 1000 - 1000
    with torch.no_grad():
        x = golden_input((1, 3, 224, 224))
        coarse, fine = teacher(x)[0], dilated(x)[0]             # (2048, 7, 7), (2048, 14, 14)
    np.testing.assert_allclose(coarse[:8], z["b_layer4_ch_first8_map"], atol=2e-5)
    np.testing.assert_allclose(coarse[:, 3, 4], z["b_layer4_at_3_4_full"], atol=2e-5)
    np.testing.assert_allclose(fine[:4], z["b_dilated_layer4_ch_first4"], atol=2e-5)
    torch.testing.assert_close(fine[:, ::2, ::2], coarse, atol=2e-5, rtol=0)
    for mode, options in (("bilinear", {"align_corners": False}), ("nearest", {})):
        channels = 4 if mode == "bilinear" else 2
        resized = nn.functional.interpolate(coarse[None, :channels], (14, 14), mode=mode, **options)
        np.testing.assert_allclose(resized[0], z[f"b_{mode}14_ch_first{channels}"], atol=2e-5)


@pytest.mark.slow
def test_mvit_b():
    """Names, shapes and grids of the release, and its FLOPs. No golden output exists."""
    with torch.device("meta"):
        model = teachers.MViTB()
    head = {"head.projection.weight": [400, 768], "head.projection.bias": [400]}
    assert {key: list(x.shape) for key, x in model.state_dict().items()} | head == keys("mvit_b")
    assert sum(p.numel() for p in model.parameters()) == 36_610_672 - 400 * 769
    grids, counter = [], Counter()
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: grids.append(out[1]))
    with torch.no_grad(), counter:
        assert model(torch.empty(1, 3, 16, 224, 224, device="meta")).shape == (1, 768, 8, 7, 7)
    blocks = json.loads((GOLDEN / "blocks_mvit_b_16x4.json").read_text())
    assert [list(grid) for grid in grids] == [block["thw"] for block in blocks["blocks"]]
    assert (counter.macs + 5 * counter.normed) / 1e9 == pytest.approx(70.8, abs=0.05)
    with torch.device("meta"):
        assert teachers.MViTB(16)(torch.empty(1, 3, 16, 224, 224)).shape == (1, 768, 8, 14, 14)


@pytest.mark.slow
def test_mvit_b_by_the_loop():
    """Pooled attention against its definition, head by head, and the order of positions."""
    torch.manual_seed(0)
    model = teachers.MViTB().eval()
    attn, thw, x = model.blocks[1].attn, (2, 4, 4), torch.randn(1, 33, 192)
    with torch.no_grad():
        got, grid = attn(x, thw)
        q, k, v = attn.qkv(x)[0].view(33, 3, 2, 96).permute(1, 2, 0, 3)   # (2 heads, 33, 96)
        heads = []
        for h in range(2):
            pooled = []
            for name, y in (("q", q), ("k", k), ("v", v)):
                conv, norm = getattr(attn, f"pool_{name}"), getattr(attn, f"norm_{name}")
                cells = conv(y[h, 1:].T.reshape(1, 96, *thw)).flatten(2)[0].T
                pooled.append(norm(torch.cat([y[h, :1], cells])))
            heads.append((pooled[0] @ pooled[1].T / 96 ** 0.5).softmax(-1) @ pooled[2])
        torch.testing.assert_close(got[0], attn.proj(torch.cat(heads, -1)), atol=1e-5, rtol=1e-5)
        assert grid == (2, 2, 2) and not hasattr(model.blocks[2].attn, "pool_q")
        for p in (model.pos_embed_class, model.pos_embed_spatial, model.pos_embed_temporal):
            p.normal_()
        table = model.positions((8, 56, 56))[0]
        want = model.pos_embed_spatial[0, 5 * 56 + 7] + model.pos_embed_temporal[0, 3]
        torch.testing.assert_close(table[1 + (3 * 56 + 5) * 56 + 7], want)
        assert model.positions((2, 8, 8)).shape == (1, 129, 96)


def test_moco_v3_positions(golden):
    table = teachers.sincos_positions((14, 14), 768)[0, :, ::16]
    want = golden("moco_v3_pos_embed.npz")["pos_embed_every16"]
    np.testing.assert_allclose(table, want, atol=1e-6)


# ---------------------------------------------------------------------------------------- layouts

def dino_full(state):
    """Student and teacher, with what else DINO saves."""
    student = {"module." + key: torch.tensor(-1.0).expand(x.shape) for key, x in state.items()}
    return {"student": student, "teacher": state, "epoch": 1, "optimizer": {"state": {}},
            "args": argparse.Namespace(arch="vit_base", lr=0.1),
            "dino_loss": {"center": torch.zeros(1, 8)}}


def wrapped(key):
    return lambda state: {"epoch": 1, "arch": "vit_base", key: state, "optimizer": {}, "cfg": ""}


LAYOUTS = {  # name: (loader, what precedes our names, what is around the state dict)
    "dino": (teachers.load_vit, "", dict),
    "dino_full": (teachers.load_vit, "backbone.", dino_full),
    "mocov3": (teachers.load_vit, "module.base_encoder.", wrapped("state_dict")),
    "deit": (teachers.load_vit, "", wrapped("model")),
    "resnet50": (teachers.load_resnet50, "", dict),
    "mocov2": (teachers.load_resnet50, "module.encoder_q.", wrapped("state_dict")),
    "mvit_b": (teachers.load_mvit_b, "", wrapped("model_state")),
    "dvae": (teachers.load_dvae, "", dict),
}


@pytest.mark.parametrize("name", [name if name in ("dino_full", "resnet50") else slow(name)
                                  for name in LAYOUTS])
def test_public_layout(name, tmp_path):
    """Every tensor comes from its place in the file. Without one of them, the file is refused."""
    load, prefix, around = LAYOUTS[name]
    state = constants(name)
    teacher = load(save(tmp_path / "teacher.pt", around(state)))
    filled = dict(getattr(teacher, "trunk", teacher).named_buffers())
    filled = {key: x for key, x in filled.items() if not key.endswith("num_batches_tracked")}
    for key, x in filled.items():
        assert torch.equal(x, state[prefix + key].contiguous()), key
    assert len(list(teacher.parameters())) == len(teacher.state_dict()) == 0
    assert not teacher.training
    assert teacher.size == sum(x.numel() for key, x in filled.items()
                               if not key.endswith(("running_mean", "running_var")))
    lost = list(filled)[-1]
    del state[prefix + lost]
    with pytest.raises(ValueError, match=lost.replace(".", r"\.")):
        load(save(tmp_path / "partial.pt", around(state)))


def test_flava_names(tmp_path):
    """The codebook as transformers publishes it."""
    state = {}
    for key, x in constants("dvae").items():
        key = key.replace(".block_", ".group.block_").replace(".res_path.", ".res_path.path.")
        state[key[:-2] + (".weight" if key.endswith(".w") else ".bias")] = x
    teacher = teachers.load_dvae(save(tmp_path / "flava.pt", state))
    assert torch.equal(teacher.blocks.group_2.block_1.id_path.b,
                       constants("dvae")["blocks.group_2.block_1.id_path.b"].contiguous())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
def test_pickled_dalle_encoder(tmp_path, monkeypatch):
    """A module with the original's class names is read without these classes."""
    names = {teachers.Encoder: ("dall_e.encoder", "Encoder"),
             teachers.EncoderBlock: ("dall_e.encoder", "EncoderBlock"),
             teachers.Conv: ("dall_e.utils", "Conv2d")}
    kinds = {kind: type(name, (nn.Module,), {"__module__": module})
             for kind, (module, name) in names.items()}

    def twin(module):
        """The same module, of the class that the original names."""
        copy = nn.Module.__new__(kinds.get(type(module), type(module)))
        copy.__dict__.update(module.__dict__, device=torch.device("cpu"), post_gain=1 / 64)
        children = {name: twin(child) for name, child in module.named_children()}
        copy.__dict__["_modules"] = children
        return copy

    with torch.device("meta"):
        model = teachers.Encoder()
    model.load_state_dict(constants("dvae"), assign=True)
    old = tmp_path / "old.pkl"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
        for kind, (module, name) in names.items():
            found = sys.modules.get(module) or types.ModuleType(module)
            patch.setitem(sys.modules, module, found)
            setattr(sys.modules[module], name, kinds[kind])
        path = save(tmp_path / "encoder.pkl", twin(model))
        torch.save(twin(model), old, _use_new_zipfile_serialization=False)
    assert not any(name.startswith("dall_e") for name in sys.modules)
    teacher = teachers.load_dvae(path)
    for key, x in teacher.named_buffers():
        assert torch.equal(x, constants("dvae")[key].contiguous()), key
    with pytest.raises(ValueError, match="old.pkl"):            # torch's old format
        teachers.load_dvae(str(old))
    with pytest.raises(ValueError, match="encoder.pkl"):
        teachers.load_vit(path)


class Hostile:
    """What pickle would run on loading: function(*arguments)."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("load", [teachers.load_dvae, teachers.load_vit,
                                  teachers.load_resnet50, teachers.load_mvit_b])
def test_hostile_files_do_nothing(load, tmp_path):
    trace = str(tmp_path / "trace")
    content = {"model": Hostile(os.system, f"touch {trace}"),
               "args": argparse.Namespace(x=Hostile(os.mkdir, trace)),
               "blocks.input.w": Hostile(eval, f"open({trace!r}, 'w')")}
    save(tmp_path / "zip.pt", content)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content, 2))
    for name in ("zip.pt", "old.pt", "plain.pt"):
        with pytest.raises(ValueError, match=name):
            load(str(tmp_path / name))
    assert not os.path.exists(trace)


def test_inert_holders_do_nothing(tmp_path):
    """An allowed class name stands for an object that stores and runs nothing."""
    content = {"blocks.input.w": nn.Sequential(nn.ReLU()), "b": nn.Identity()}
    path = save(tmp_path / "sequential.pt", content)
    with pytest.raises(ValueError, match="not this kind of teacher"):
        teachers.load_dvae(path)
    with pytest.raises(ValueError, match="sequential.pt"):      # not allowed elsewhere
        read_checkpoint(path)


def test_wrong_files(tmp_path):
    with pytest.raises(ValueError, match="--teacher"):
        teachers.load_vit("")
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        teachers.load_vit(str(tmp_path / "nothing.pt"))
    with pytest.raises(ValueError, match="no tensor patch_embed"):
        teachers.load_vit(save(tmp_path / "resnet.pt", constants("resnet50")))
    distilled = {**constants("deit"), "dist_token": torch.zeros(1, 1, 768),
                 "pos_embed": torch.zeros(1, 198, 768)}
    with pytest.raises(ValueError, match="pos_embed of 198"):
        teachers.load_vit(save(tmp_path / "distilled.pt", {"model": distilled}))
    odd = {**constants("resnet50"), "layer5.0.conv1.weight": torch.zeros(3, 3)}
    odd["layer2.0.conv1.weight"] = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="2 tensors .* layer2.0.conv1.weight"):
        teachers.load_resnet50(save(tmp_path / "odd.pt", odd))


def test_teachers_made_here(tmp_path):
    """A small ViT of this project, fine-tuned with its norm or pre-trained with MaskFeat's."""
    torch.manual_seed(0)
    model, x = vit.vit_tiny(num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    nn.init.normal_(model.norm.weight)
    state = model.state_dict()
    ours = {"encoder." + key: t for key, t in state.items()
            if not key.startswith(("norm.", "head."))}
    ours |= {key: state[key] for key in ("norm.weight", "norm.bias")}
    ours["mask_token"] = torch.zeros(1, 1, 128)
    with torch.no_grad():
        want = model.norm(model.encode(*model.embed(x))[0][:, 1:])
        for weights in (state, ours):
            content = {"model": weights, "step": 1, "recipe": {}}
            got = teachers.load_vit(save(tmp_path / "made.pt", content))(x)
            assert torch.equal(got.flatten(2).transpose(1, 2), want)
