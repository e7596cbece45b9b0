"""pretrain.py: it trains, counts what it skips, and refuses what it should."""
import json
import os
import re
import shutil

import engine

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import log_of

import pretrain
from checkpoints import read_checkpoint


def flags_of(data, out, *flags):
    return "--data", data, "--out", out, *runs.PRETRAIN, *flags


@pytest.mark.slow
def test_run(pretrained):
    out, output = pretrained
    lines = [line for line in log_of(out) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 10))
    held_out = [line for line in log_of(out) if "loss" not in line]
    assert list(held_out[0]["levels"]) == ["mean", "own mean", "copy"]
    assert [line["step"] for line in held_out] == [0, 3, 6, 9]
    assert held_out[1]["val_loss"] > held_out[3]["val_loss"] > held_out[0]["levels"]["mean"] / 2
    assert all(0 < line["loss"] < 1 for line in lines)
    assert all(line["skipped"] == line["unreadable"] == 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    checkpoint = read_checkpoint(out / "last.pt")
    recipe = checkpoint["recipe"]
    assert lines[0]["lr"] == pytest.approx(1e-5 * recipe["batch_size"] / recipe["lr_batch"])
    for words in ("12 videos", "3 steps per epoch, 3 epochs, 9 steps",
                  "batch 4 = processes 1 x samples 4", "peak memory", "prediction.png"):
        assert words in output, words
    assert not any(name.startswith(("module.", "_orig_mod.")) or "hog" in name
                   for name in checkpoint["model"])
    pictures = ["loss.png", "prediction.gif", "prediction.png"]
    names = [".lock", "last.pt", "log.jsonl", *pictures, "recipe.json"]
    assert sorted(os.listdir(out)) == names
    start, = json.loads((out / "recipe.json").read_text())
    assert start == json.loads(json.dumps(checkpoint["about"]))
    assert start["recipe"]["epochs"] == 3 and start["files"] == 12
    assert torch.__version__.startswith(start["torch"][:4]) and "--epochs 3" in start["command"]
    for name in pictures:
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10              # not blank


@pytest.mark.slow
def test_moved_data_resume_and_changed_data_are_refused(clips, tmp_path, pretrained, monkeypatch,
                                                        capsys):
    copy, out = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(clips, copy)
    shutil.copytree(pretrained[0], out)
    runs.run_well("pretrain.py", *flags_of(copy, out, "--resume"))
    os.rename(copy / "train/level_left_right/0.mp4", copy / "train/level_left_right/new.mp4")
    flags = flags_of(copy, out, "--resume")
    assert "are not those" in runs.refusal(monkeypatch, capsys, "pretrain", *flags)


@pytest.mark.slow
def test_unreadable_files_are_named_once(clips, tmp_path):
    salted = tmp_path / "salted"
    shutil.copytree(clips / "train", salted / "train")
    folder = salted / "train/level_left_right"
    for i in range(6):
        shutil.copy(folder / "0.mp4", folder / f"more{i}.mp4")
    (folder / "bad.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("hello")
    output = runs.run_well("pretrain.py", *flags_of(salted, tmp_path / "out", "--epochs", 6,
                                                    "--workers", 2))
    assert len(re.findall(r"unreadable, replaced by another: \S*bad.mp4", output)) == 1
    for words in ("other files ignored: 1", "unreadable files replaced: 1", "no validation part"):
        assert words in output, words
    for i in range(3):
        (salted / f"train/rings_up_down/text{i}.mp4").write_text("not a video")
    done = runs.run("pretrain.py", *flags_of(salted, tmp_path / "out2", "--epochs", 20))
    assert done.returncode == 2
    assert re.search(r"of 22 files cannot be read, more than 10%.*bad.mp4", done.stderr)


@pytest.mark.slow
def test_non_finite_steps_are_skipped_then_stop(clips, tmp_path):
    """A learning rate that blows the weights up: skipped steps are counted, and the run ends."""
    out = tmp_path / "out"
    done = runs.run("pretrain.py", *flags_of(clips, out, "--lr", "1e35", "--warmup-epochs", 0,
                                             "--epochs", 20))
    assert done.returncode == 2 and "non-finite loss or gradient" in done.stderr, done.stderr
    last = [line for line in log_of(out) if "loss" in line][-1]
    assert last["skipped"] >= 10 and last["loss"] is None


@pytest.mark.parametrize("flags, words", [
    ("--data nowhere", "nowhere"),
    ("--model mvit_huge", "mvit_huge"),
    ("--model vit_tiny", "takes images"),
    ("--mask block", "mask=block does not suit"),
    ("--image-size 36", "H=36, use 32 or 40"),
    ("--cell 6", "multiple of HOG cell 6"),
    ("--mask-ratio 1.5", "mask_ratio=1.5"),
    ("--batch-size 13", "13"),
    ("--lr -1", "lr=-1.0 is not positive"),
    ("--weight-decay nan", "weight_decay=nan is not finite"),
    ("--std 0.2 0.2 inf", "is not finite"),
    ("--warmup-epochs -1", "warmup_epochs=-1.0"),
    ("--num-frames 3", "num_frames=3"),
    ("--no-such-flag", "--no-such-flag"),
])
def test_wrong_flags_are_one_line(clips, tmp_path, monkeypatch, capsys, flags, words):
    flags = flags_of(clips, tmp_path / "out", *flags.split())
    assert words in runs.refusal(monkeypatch, capsys, "pretrain", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, name", [
    ("", "tiny"), ("--model mvitv2_s", "k400_mvitv2_s"), ("--model mvitv2_l", "k400_mvitv2_l"),
    ("--model vit_b", "in1k_vit_b"), ("--model vit_l", "in1k_vit_l"),
    ("--model mvit_tiny", "mvit_tiny"), ("--model vit_tiny", "vit_tiny"),
    ("--recipe clips_mvitv2_s", "clips_mvitv2_s")])
def test_a_model_picks_the_papers_recipe(flags, name):
    found, recipe, _ = engine.parse_recipe(pretrain.RECIPES, "", flags.split())
    assert found == name and recipe == pretrain.RECIPES[name]


def test_empty_and_damaged(clips, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty/train").mkdir(parents=True)
    flags = flags_of(tmp_path / "empty", tmp_path / "out")
    assert "no sample" in runs.refusal(monkeypatch, capsys, "pretrain", *flags)
    out = tmp_path / "damaged"
    out.mkdir()
    (out / "last.pt").write_bytes(b"PK\3\4 cut short")
    flags = flags_of(clips, out, "--resume")
    assert "damaged" in runs.refusal(monkeypatch, capsys, "pretrain", *flags)
    assert (out / "last.pt").read_bytes() == b"PK\3\4 cut short"


@pytest.mark.slow
def test_images_and_visualize(tmp_path):
    """ViT on image files with pixels as target, a dry run, and visualize.py."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        folder = tmp_path / "data" / split / "a"
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    out, picture = tmp_path / "out", tmp_path / "figure.png"
    flags = ["--data", tmp_path / "data", "--out", out, "--model", "vit_tiny", "--image-size", 32,
             "--epochs", 1, "--batch-size", 4, "--workers", 0, "--target", "pixel", "--pixel-norm",
             "patch"]
    output = runs.run_well("pretrain.py", *flags, "--dry-run")
    assert "nothing written: student 1.2 M parameters" in output and not out.exists()
    runs.run_well("pretrain.py", *flags)
    drawn = ["--checkpoint", out / "last.pt", "--output", picture, "--input"]
    runs.run_well("visualize.py", *drawn, tmp_path / "data/val/a/0.png")
    assert np.asarray(Image.open(picture)).std() > 10
    done = runs.run("visualize.py", *drawn, "nothing.png")
    assert done.returncode == 2 and "nothing.png" in done.stderr and "Traceback" not in done.stderr
