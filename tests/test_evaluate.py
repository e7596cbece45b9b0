"""evaluate.py and features.py: tests over views and ranks, predictions, features, probes."""
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import test_old_checkpoints
import torch
from conftest import GOLDEN
from PIL import Image
from test_video import read_numbers, write_video

import evaluate
import features
import layouts
import models
import probe
from evaluate import accuracy

CLIPS = GOLDEN / "old_clips"


@pytest.fixture
def evaluated(monkeypatch, capsys):
    """What evaluate.py prints, run in this process, with the model of the old checkpoints."""
    monkeypatch.setitem(models.MODELS, "mvit_tiny", test_old_checkpoints.tiny)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--workers", "0"])
        evaluate.main()
        return capsys.readouterr().out
    return run


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
        assert "videos: 3, clips x crops: 3 x 3" in output
        found[processes] = json.loads((tmp_path / "last_3x3.json").read_text())
    about = [results.pop("about") for results in found.values()]
    assert found[1] == found[2] and found[1]["files"] == about[0]["files"] == 3
    assert about[0]["data"] == about[1]["data"] and about[0]["recipe"]["model"] == "mvit_nano"


def test_unreadable_video_is_named_not_replaced(evaluated, tmp_path):
    """The names of the classes come from a file; without top-5 of two classes."""
    shutil.copytree(CLIPS, tmp_path / "bad")
    (tmp_path / "bad/val/circle_growing/0.mp4").write_bytes(b"not a video")
    shutil.copy(GOLDEN / "old_finetune.pt", tmp_path / "last.pt")
    (tmp_path / "names.txt").write_text("square_up_down\n\ncircle_growing\n")
    output = evaluated(tmp_path / "last.pt", "--data", tmp_path / "bad", "--clips", 1, "--classes",
                       tmp_path / "names.txt", "--mean", 0.4, 0.4, 0.4)
    assert "videos that could not be read and are not counted: 1" in output
    assert "circle_growing/0.mp4" in output and "top-1: 50.00" in output and "top-5" not in output
    result = json.loads((tmp_path / "last_1x1.json").read_text())
    assert result["files"] == 3 and len(result["unreadable"]) == 1
    assert {name: n for name, (_, n) in result["per_class"].items()} == {
        "square_up_down": 2, "circle_growing": 1}
    assert probe.percent(result["top1"], 3) in output


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
        assert "takes clips" in error and "holds images" in error


def test_predict_without_a_checkpoint(evaluated, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "out/finetune/last.pt" in runs.refusal(monkeypatch, capsys, "evaluate", "--predict", "a")
    (tmp_path / "out/finetune").mkdir(parents=True)
    shutil.copy(GOLDEN / "old_finetune.pt", "out/finetune/last.pt")
    video = CLIPS / "val/circle_growing/0.mp4"
    with pytest.raises(ValueError, match="2 of 3 files cannot be read"):
        evaluated("--predict", video, "none.mp4", "out/finetune/last.pt")
    output = capsys.readouterr().out
    for words in ("out/finetune/last.pt: mvit_tiny", "none.mp4", "takes videos"):
        assert words in output, words
    shares = {name: float(p) for p, name in re.findall(r"([\d.]+) %  (\w+)", output)}
    assert set(shares) == {"circle_growing", "square_up_down"}
    assert sum(shares.values()) == pytest.approx(100, abs=0.02)


@pytest.mark.slow
def test_features_of_both_splits_and_of_unlabeled_files(evaluated, tmp_path):
    def table(data, *flags):
        evaluated(GOLDEN / "old_pretrain.pt", "--data", data, "--features", tmp_path / "f.npz",
                  *flags)
        with np.load(tmp_path / "f.npz") as found:
            return {key: found[key] for key in found}
    both, val = table(CLIPS), table(CLIPS, "--split", "val")
    assert both["split"].tolist() == ["train"] * 12 + ["val"] * 4
    assert both["labels"].tolist() == [0] * 6 + [1] * 6 + [0, 0, 1, 1]
    assert both["paths"][15] == "val/square_up_down/1.mp4" and len(both["classes"]) == 2
    assert both["features"].shape == (16, 16) and both["features"].std(axis=0).min() > 0
    np.testing.assert_array_equal(val["features"], both["features"][12:])
    flat = table(CLIPS / "val/square_up_down")
    assert flat["labels"].tolist() == [-1, -1] and flat["paths"].tolist() == ["0.mp4", "1.mp4"]
    np.testing.assert_array_equal(flat["features"], val["features"][2:])
    write_video(tmp_path / "long/a.mp4", range(90))
    shutil.copy(CLIPS / "val/square_up_down/0.mp4", tmp_path / "long/b.mp4")
    long = table(tmp_path / "long", "--every", 1)
    assert long["paths"].tolist() == ["a.mp4"] * 3 + ["b.mp4"]
    assert long["time"].tolist() == [0, 1, 2, 0]


def test_a_clip_each_second(tmp_path):
    """Whole clips only: the last one that fits in 3 s begins at 2 s, or at 2.6 s."""
    path = write_video(tmp_path / "a.mp4", range(90))
    recipe = SimpleNamespace(every=1.0, num_frames=4, sampling_rate=3, image_size=(48, 64),
                             crop_ratio=1.0, segments=False)
    starts = features.clip_starts(path, recipe)
    assert starts == [0, 1, 2] and len(features.clip_starts(path, recipe.__class__(
        **{**vars(recipe), "every": 1.3}))) == 3
    samples = layouts.Samples("video", [path] * 3, [-1] * 3, [])
    views = features.view_dataset(samples, recipe, starts=starts)
    for start, item in zip((0, 30, 60), views):
        assert read_numbers(item["x"][0].transpose(0, 1)) == [start + j for j in (0, 3, 6, 9)]


def test_probe_draws_labels_as_fine_tuning_does(evaluated, monkeypatch):
    """And computes features of no other training files."""
    draws = [layouts.find_samples(CLIPS, "train", shots, seed).paths
             for shots in (1, 2) for seed in (5, 6)]
    used, seen = sorted(set(sum(draws, []))), []

    def compare(features, tokens, y, draws, test, num_classes, device, seed):
        assert tokens.shape == (len(used) + 4, 33, 16) and tokens.dtype == torch.float16
        assert test.tolist() == list(range(len(used), len(used) + 4))
        seen.extend([used[row] for row in draw.tolist()] for draw in draws)
        return {"linear": [0.5, 0.75]}

    monkeypatch.setattr(probe, "compare", compare)
    flags = GOLDEN / "old_pretrain.pt", "--data", CLIPS, "--probe", "--shots", 1, 2
    output = evaluated(*flags, "--seeds", 2, "--seed", 5)
    assert "linear        62.50 ± 24.21, deviation over draws 17.68" in output
    assert seen == draws and len(used) < 12
    with pytest.raises(ValueError, match="--no-attentive"):
        evaluated(*flags, "--token-memory", 1e-6)


@pytest.mark.parametrize("options", [
    {"num_classes": 0}, {"num_classes": 3}, {"num_classes": 3, "pool": "cls"}])
def test_pooled_and_tokens_are_the_models(options):
    for name, shape in (("vit_tiny", (2, 3, 64, 64)), ("mvit_nano", (2, 3, 4, 32, 32))):
        model, x = models.MODELS[name](**options), torch.randn(shape)
        pooled, tokens = features.pooled_and_tokens(model, x)
        torch.testing.assert_close(pooled, model.features(x))
        encoded = model.encode(*model.embed(x))[0]
        encoded = encoded - encoded.mean(dim=2, keepdim=True)
        encoded = encoded / (encoded.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(tokens.float(), encoded, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("flags, words", [
    ("nothing.pt", "no checkpoint at nothing.pt"),
    ("", "checkpoint"),
    ("nothing.pt --predict a.mp4 --probe", "--predict"),
    ("nothing.pt --clips 0", "clips=0"),
    ("nothing.pt --every 2", "--every goes with --features"),
    ("nothing.pt --shots 5", "--shots goes with --probe"),
    ("nothing.pt --probe --shots -1", "--shots -1"),
    (f"{GOLDEN}/old_finetune.pt --classes {GOLDEN}/make_checkpoint.py", "one name a line"),
])
def test_wrong_flags_are_one_line(monkeypatch, capsys, flags, words):
    monkeypatch.setitem(models.MODELS, "mvit_tiny", test_old_checkpoints.tiny)
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
