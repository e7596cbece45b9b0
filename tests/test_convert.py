"""Other people's checkpoints, and what must be refused."""
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mvit
import vit
from conftest import ROOT
from convert import build_maskfeat, load_weights, read_checkpoint, recognise, released_recipe, rename, resize_positions
from engine import save_checkpoint

TINY = dict(model="vit_tiny", target="hog", image_size=(64, 64), num_frames=4, output_stride=16, patch_size=8,
            expand="mlp", drop_path=0.0, checkpointing=False, bins=9, cell=8, norm="l2", color="rgb", gradient="sobel")


@pytest.fixture
def tiny(tmp_path):
    """A model and a checkpoint of it in our format."""
    torch.manual_seed(1)
    model = build_maskfeat(TINY)
    path = str(tmp_path / "last.pt")
    save_checkpoint(path, {"model": model.state_dict(), "recipe": TINY})
    return model, path


def test_our_own_round_trip(tiny, capsys):
    model, path = tiny
    other = build_maskfeat(TINY)
    report = load_weights(other, path)
    assert "(ours)" in capsys.readouterr().out
    assert len(report["loaded"]) == len(model.state_dict()) and not report["fresh"] + report["left out"]
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_pretrained_into_classifier(tiny):
    """Fine-tuning's load: the trunk goes in, the head is fresh, prediction head and mask token are left out, named."""
    model, path = tiny
    classifier = vit.MODELS["vit_tiny"](num_classes=7)
    head = classifier.head.weight.clone()
    report = load_weights(classifier, path, verbose=False)
    assert torch.equal(classifier.blocks[3].mlp.fc1.weight, model.encoder.blocks[3].mlp.fc1.weight)
    assert torch.equal(classifier.head.weight, head)
    assert sorted(report["fresh"]) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert {n.removeprefix("maskfeat.") for n in report["left out"]} == \
        {"mask_token", "norm.weight", "norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("name, kind", [("mvitv2_s_pt", "mvitv2_s"), ("vit_b_pt", "vit_b")])
def test_released_names(name, kind, released):
    state = recognise(read_checkpoint(released(name)))[1]
    recipe = released_recipe(state)
    assert recipe["model"] == kind and recipe["num_frames"] == 16 and recipe["image_size"] == (224, 224)
    model = build_maskfeat(recipe)
    report = load_weights(model, released(name), verbose=False)
    assert not report["fresh"] + report["resized"] + report["left out"]
    assert torch.equal(model.head.weight, state["pred_head.projections.0.weight"])
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])


def test_released_pretraining_into_finetuning_resizes_tables(released):
    """Block 15's spatial tables go from 27 to 13 rows, by linear interpolation (reference figures of the release)."""
    model = mvit.mvitv2_s()
    report = load_weights(model, released("mvitv2_s_pt"), verbose=False)
    assert report["resized"] == [f"blocks.15.attn.rel_pos_{axis} (27, 96) -> (13, 96)" for axis in "hw"]
    table = recognise(read_checkpoint(released("mvitv2_s_pt")))[1]["blocks.15.attn.rel_pos_h"].double().numpy()
    places = (np.arange(13) + 0.5) * 27 / 13 - 0.5                            # half-pixel centres
    want = [np.interp(places, np.arange(27), column) for column in table.T]
    np.testing.assert_allclose(model.blocks[15].attn.rel_pos_h.detach(), np.array(want).T, atol=1e-6)


def test_position_embedding_is_resized(tiny):
    _, path = tiny
    big = vit.MODELS["vit_tiny"](num_classes=3, image_size=96)
    report = load_weights(big, path, verbose=False)
    assert report["resized"] == ["pos_embed (1, 65, 128) -> (1, 145, 128)"]
    table = read_checkpoint(path)["model"]["encoder.pos_embed"]
    assert torch.equal(big.pos_embed[:, 0], table[:, 0])
    grid = F.interpolate(table[:, 1:].view(1, 8, 8, 128).permute(0, 3, 1, 2), size=12, mode="bicubic")
    torch.testing.assert_close(big.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2))
    assert resize_positions("blocks.0.mlp.fc1.weight", torch.zeros(4, 4), (5, 4)) is None


def test_every_name_of_a_table_is_used():
    renamed = rename({"hogs.0.weight_x": 1, "x.b": 2, "y": 3}, [(r"^hogs\.", None), (r"^x\.", "z."), (r"^", "encoder.")])
    assert renamed == {"z.b": 2, "encoder.y": 3}


def test_another_model_is_an_error(tiny, released):
    _, path = tiny
    with pytest.raises(ValueError, match="checkpoint of another model.*tensors do not fit"):
        load_weights(vit.ViT(128, 5, 4, num_classes=0, patch_size=8, image_size=64), path)    # a block too few
    with pytest.raises(ValueError, match="checkpoint of another model"):
        load_weights(vit.ViT(128, 7, 4, num_classes=0, patch_size=8, image_size=64), path)    # one too many
    with pytest.raises(ValueError, match="checkpoint of another model"):
        load_weights(vit.vit_b(), released("mvitv2_s_pt"))


class Hostile:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_checkpoint_runs_nothing(tmp_path, legacy):
    path, trace = tmp_path / "bad.pth", str(tmp_path / "made")
    if legacy:
        path.write_bytes(pickle.dumps({"model": Hostile(trace)}))
    else:
        torch.save({"model": Hostile(trace)}, path)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        load_weights(mvit.mvit_tiny(), str(path))
    assert not os.path.exists(trace)


def test_damaged_checkpoints(tiny, tmp_path):
    model, path = tiny
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


def test_command_line(released, tmp_path):
    command = [sys.executable, str(ROOT / "convert.py"), released("vit_b_pt"), str(tmp_path / "vit.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "153 loaded" in done.stdout and "vit_b" in done.stdout
    checkpoint = read_checkpoint(str(tmp_path / "vit.pt"))
    build_maskfeat(checkpoint["recipe"]).load_state_dict(checkpoint["model"])
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "exists" in again.stderr and "Traceback" not in again.stderr
