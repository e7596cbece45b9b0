"""evaluate.py: tests over views and ranks, predictions, features, the linear probe."""
import json
import re
import shutil

import numpy as np
import pytest
import runs
import test_old_checkpoints
from conftest import GOLDEN
from PIL import Image

import models
from evaluate import accuracy


@pytest.mark.slow
def test_ranks_and_views(clips, finetuned, tmp_path):
    """A test over two ranks, of a number of files that does not divide, equals one over one."""
    odd, checkpoint = tmp_path / "odd", tmp_path / "last.pt"
    shutil.copytree(clips, odd)
    (odd / "val/level_left_right/0.mp4").unlink()
    shutil.copy(finetuned[0] / "last.pt", checkpoint)
    found = {}
    for processes in (1, 2):
        output = runs.run_well("evaluate.py", checkpoint, "--data", odd, "--clips", 3, "--crops", 3,
                               "--workers", 0, processes=processes)
        assert "3 clips x 3 crops, 3 videos" in output
        found[processes] = json.loads((tmp_path / "last_3x3.json").read_text())
    assert found[1] == found[2] and found[1]["files"] == 3


@pytest.mark.slow
def test_unreadable_video_is_named_not_replaced(clips, finetuned, tmp_path):
    bad, checkpoint = tmp_path / "bad", tmp_path / "last.pt"
    shutil.copytree(clips, bad)
    (bad / "val/level_left_right/0.mp4").write_bytes(b"not a video")
    shutil.copy(finetuned[0] / "last.pt", checkpoint)
    output = runs.run_well("evaluate.py", checkpoint, "--data", bad, "--clips", 1, "--workers", 0)
    assert "1 videos could not be read and are not counted" in output
    assert "level_left_right/0.mp4" in output
    result = json.loads((tmp_path / "last_1x1.json").read_text())
    assert result["files"] == 3 and len(result["unreadable"]) == 1
    assert [count for _, count in result["per_class"].values()] == [1, 2]


def test_data_of_another_kind_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "mvit_tiny", test_old_checkpoints.tiny)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "1.png")
    for flags in ([], ["--features", tmp_path / "f.npz"], ["--probe"]):
        name = "finetune" if not flags else "pretrain"
        error = runs.refusal(monkeypatch, capsys, "evaluate", GOLDEN / f"old_{name}.pt", "--data",
                             tmp_path, *flags)
        assert "takes videos" in error and "holds images" in error


@pytest.mark.slow
def test_predict_features_probe(clips, finetuned, pretrained, tmp_path):
    checkpoint, video = finetuned[0] / "last.pt", clips / "val/level_left_right/0.mp4"
    done = runs.run("evaluate.py", checkpoint, "--predict", video, tmp_path / "none.mp4",
                    finetuned[0] / "last_2x1.png")
    output = done.stdout + done.stderr
    assert done.returncode == 2
    for words in ("none.mp4", "2 of 3 files cannot be read", "takes videos"):
        assert words in output, words
    shares = {name: float(p) for p, name in re.findall(r"([\d.]+) %  (\w+)", output)}
    assert set(shares) == {"level_left_right", "rings_up_down"}
    assert sum(shares.values()) == pytest.approx(100, abs=0.02)
    out = tmp_path / "features.npz"
    runs.run_well("evaluate.py", pretrained[0] / "last.pt", "--data", clips, "--features", out)
    output = runs.run_well("evaluate.py", pretrained[0] / "last.pt", "--data", clips, "--probe")
    found = np.load(out)
    assert found["features"].shape == (4, 64) and np.isfinite(found["features"]).all()
    assert found["features"].std() > 0 and found["labels"].tolist() == [0, 0, 1, 1]
    assert found["paths"][3] == "val/rings_up_down/1.mp4"
    assert re.search(r"best on val: [\d.]+ with lr [\d.]+ \(chosen on val itself", output)


@pytest.mark.parametrize("flags, words", [
    ("nothing.pt", "no checkpoint at nothing.pt"),
    ("", "checkpoint"),
    ("nothing.pt --predict a.mp4 --probe", "--predict"),
    ("nothing.pt --clips 0", "clips=0"),
])
def test_wrong_flags_are_one_line(monkeypatch, capsys, flags, words):
    assert words in runs.refusal(monkeypatch, capsys, "evaluate", *flags.split())


def test_accuracy_against_sorting():
    """Also with ties, where the lower class goes first, and with fewer than five classes."""
    rng = np.random.default_rng(0)
    for classes in (3, 12):
        scores = rng.integers(0, 6, (200, classes)) / 6
        labels = rng.integers(0, classes, 200)
        for k in (1, 5):
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            right = [label in row for label, row in zip(labels, best)]
            assert accuracy(scores, labels, k) == np.mean(right)
