"""Checkpoints that an earlier version wrote load, and their runs go on from them.

Both runs were stopped by SIGTERM after step 4 of 9, on golden/old_clips, with `tiny` below.
"""
import shutil
from types import SimpleNamespace

import pytest
import runs
import torch
import torch.nn.functional as F
from conftest import GOLDEN

import data
import models
import mvit
import video
from checkpoints import read_checkpoint
from convert import load_weights

FLAGS = ["--model", "mvit_tiny", "--image-size", 32, "--frames", 4, "--sampling-rate", 2,
         "--batch-size", 4, "--epochs", 3, "--warmup-epochs", 1, "--log-every", 1, "--workers", 0,
         "--drop-path", 0.2]
# script: (its further flags, the losses of steps 5 to 9 by the version that wrote the file)
RUNS = {
    "pretrain": (["--output-stride", 8], [0.10979, 0.10394, 0.09896, 0.09812, 0.10092]),
    "finetune": (["--init", "out/pretrain/last.pt", "--no-baseline", "--dropout", 0.1,
                  "--erase", 0.5, "--rand-augment", "rand-m7-mstd0.5-inc1", "--repeats", 2,
                  "--layer-decay", 0.75, "--mixup", 0.8, "--cutmix", 1, "--smoothing", 0.1,
                  "--val-epochs", 2, "--clips", 2],
                 [0.69289, 0.69407, 0.69775, 0.68699, 0.69390])}


def tiny(**kw):
    return mvit.MViT(8, 1, (1, 1), **{"output_stride": 8, "kv_stride": 4, **kw})


def restore_pixels(patch, script):
    """The pixels as they were: frames scaled bilinearly, and in pre-training to a short side of
    256, from which crops were scaled without antialiasing."""
    patch.setattr(video, "SCALING", "BILINEAR")
    if script == "pretrain":
        patch.setattr(data, "decoded_side", lambda image_size: 256)
        patch.setattr(data, "F", SimpleNamespace(
            interpolate=lambda *args, antialias, **kw: F.interpolate(*args, **kw)))


@pytest.mark.parametrize("script", RUNS)
def test_loads(script, monkeypatch):
    """Every tensor finds its place in the model of its recipe; from pre-training the trunk does."""
    monkeypatch.setitem(models.MODELS, "mvit_tiny", tiny)
    path = str(GOLDEN / f"old_{script}.pt")
    checkpoint = read_checkpoint(path)
    recipe, state = checkpoint["recipe"], checkpoint["model"]
    model = (models.build_maskfeat if script == "pretrain" else models.build_classifier)(recipe)
    model.load_state_dict(state)
    report = load_weights(model, path, verbose=False)
    assert len(report["loaded"]) == len(state) == len(model.state_dict())
    classifier = models.build_classifier({**recipe, "num_classes": 5, "pool": "mean"})
    report = load_weights(classifier, path, verbose=False)
    trunk = [name for name in classifier.state_dict() if not name.startswith(("head.", "norm."))]
    assert set(trunk) <= set(report["loaded"]) and "head.projection.weight" in report["fresh"]
    prefix = "encoder." if script == "pretrain" else ""
    assert all(torch.equal(classifier.state_dict()[name], state[prefix + name]) for name in trunk)


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_resumes(script, tmp_path, monkeypatch):
    """The run goes on to its end, with the losses that the earlier version had."""
    more, losses = RUNS[script]
    shutil.copy(GOLDEN / f"old_{script}.pt", tmp_path / "last.pt")
    monkeypatch.setitem(models.MODELS, "mvit_tiny", tiny)
    restore_pixels(monkeypatch, script)
    runs.run_well(f"{script}.py", "--data", GOLDEN / "old_clips", "--out", tmp_path, "--resume",
                  *FLAGS, *more)
    assert read_checkpoint(str(tmp_path / "last.pt"))["step"] == 9
    log = [line for line in runs.log_of(tmp_path) if "loss" in line]
    assert [line["step"] for line in log] == [5, 6, 7, 8, 9]
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-3)
