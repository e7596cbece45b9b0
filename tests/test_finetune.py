"""finetune.py: it trains, tests over views, and refuses what it should."""
import json
import re
import shutil
import signal
import sys

import engine
from engine import layer_id, param_groups

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import SCRATCH, log_of

import finetune
import layouts
from checkpoints import read_checkpoint
from models import build_classifier


def flags_of(data, out, *flags):
    return "--data", data, "--out", out, *runs.FINETUNE, *flags


@pytest.mark.slow
def test_run(finetuned, pretrained):
    out, output = finetuned
    for folder in (out, out / "scratch"):
        lines = [line for line in log_of(folder) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, 10))
        assert all(0 < line["loss"] < 3 and line["skipped"] == line["unreadable"] == 0
                   for line in lines)
        assert [line["step"] for line in log_of(folder) if "val_top1" in line] == [6]
        result = json.loads((folder / "last_2x1.json").read_text())
        truth, predicted, files = np.array(result["confusion"]).T
        assert result["files"] == files.sum() == 4
        assert result["top1"] == pytest.approx(files[truth == predicted].sum() / 4)
        shares = list(result["per_class"].values())
        assert result["top1"] == pytest.approx(sum(share * n for share, n in shares) / 4)
        with Image.open(folder / "last_2x1.png") as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10
    for words in ("fresh: head.projection.weight", "left out: mask_token", "clips x crops: 2 x 1",
                  "clip-level top-1", "video-level top-1", "GFLOPs a view", "from scratch",
                  "same budget"):
        assert words in output, words
    checkpoint = read_checkpoint(out / "last.pt")
    assert checkpoint["classes"] == ["level_left_right", "rings_up_down"]
    assert checkpoint["recipe"]["num_classes"] == 2
    before, after = read_checkpoint(pretrained[0] / "last.pt")["model"], checkpoint["model"]
    moved = [(after[name] - before["encoder." + name]).abs().max()
             for name in ("patch_embed.proj.weight", "blocks.2.attn.proj.weight")]
    assert 0 < moved[0] < moved[1]                            # the stem moved least: layer decay


@pytest.mark.slow
def test_images(tmp_path, monkeypatch):
    """ViT on image files in ImageNet's layout, stopped and resumed, three crops a picture."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("n01440764", "n02084071")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (40, 50, 3) if i % 2 else (50, 40, 3), np.uint8)
                Image.fromarray(pixels + 120 * np.uint8(label)).save(folder / f"{i}.JPEG")
    out = tmp_path / "out"
    flags = ["--data", tmp_path / "data", "--out", out, "--model", "vit_tiny", "--image-size", 32,
             "--epochs", 20, "--batch-size", 8, "--workers", 0, "--warmup-epochs", 1, "--crops", 3,
             "--drop-path", 0.1, "--log-every", 1]
    asked = iter([""] * 5 + ["SIGTERM"])
    with monkeypatch.context() as patch:
        patch.setattr(engine.StopSignal, "agreed", lambda self: next(asked))
        assert runs.run("finetune.py", *flags).returncode == 128 + signal.SIGTERM
    output = runs.run_well("finetune.py", *flags, "--resume")
    assert "images: 4, clips x crops: 1 x 3, image-level top-1 100.00" in output
    assert "crop-level" in output


@pytest.mark.parametrize("flags, words", [
    ("--data nowhere", "nowhere"),
    ("--model vit_tiny", "takes images"),
    ("--num-classes 5", "has 2 classes, not 5"),
    ("--init nothing.pt", "no checkpoint at nothing.pt"),
    ("--rand-augment rand-x7", "rand-x7"),
    ("--batch-size 13", "13"),
    ("--crops 2", "invalid choice"),
    ("--drop-path 1.5", "drop_path=1.5"),
    ("--frames 3", "num_frames=3"),
    ("--eval nothing.pt", "evaluate.py CHECKPOINT"),
    ("--probe", "evaluate.py CHECKPOINT"),
    ("--flops", "tools.flops"),
    ("--device-batch 1 --repeats 1", "mixup and cutmix pair the samples"),
    ("--color-jitter 0.4", "--rand-augment ''"),
    ("--smoothing 1", "smoothing=1.0"),
    ("--model mvitv2_x", "invalid choice"),
])
def test_wrong_flags_are_one_line(clips, tmp_path, monkeypatch, capsys, flags, words):
    flags = flags_of(clips, tmp_path / "out", *SCRATCH, *flags.split())
    assert words in runs.refusal(monkeypatch, capsys, "finetune", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_other_model_other_classes_empty_validation(clips, pretrained, finetuned, tmp_path,
                                                    monkeypatch, capsys):
    def refused(data, *flags):
        return runs.refusal(monkeypatch, capsys, "finetune",
                            *flags_of(data, tmp_path / "out", "--no-baseline", *flags))
    error = refused(clips, "--init", pretrained[0] / "last.pt", "--expand", "attn")
    assert "is a checkpoint of another model" in error and "blocks.0" in error
    more = tmp_path / "more"                                  # a third class
    shutil.copytree(clips, more)
    for split in ("train", "val"):
        shutil.copytree(clips / split / "level_left_right", more / split / "checks_left_right")
    assert "3 classes, not 2" in runs.refusal(monkeypatch, capsys, "evaluate",
                                              finetuned[0] / "last.pt", "--data", more)
    output = runs.run_well("finetune.py", *flags_of(
        more, tmp_path / "three", "--no-baseline", "--init", finetuned[0] / "last.pt", "--epochs",
        1, "--val-epochs", 0))                                # another data set is a new head
    assert re.search(r"left out: head.projection.weight.*\(2, 64\)", output)
    shutil.rmtree(more / "val")
    assert "no val split" in refused(more, *SCRATCH)
    (more / "val").mkdir()
    assert "no sample in the val split" in refused(more, *SCRATCH)
    assert not (tmp_path / "out").exists()


def test_comparison_over_seeds(monkeypatch, capsys, tmp_path):
    """Without data: few labels, three seeds of both, each in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "i").touch()
    seen, scratch = {}, {}

    def train(name, recipe, *_):
        seen[recipe.out] = recipe.seed, recipe.init, recipe.limit_per_class
        samples = layouts.Samples("video", ["a.mp4"] * 300, [0] * 300, [])
        top1 = 0.5 + 0.01 * recipe.seed if recipe.init else scratch["top1"]
        return {"top1": top1, "files": 400, "per_class": dict.fromkeys("abcd")}, samples

    monkeypatch.setattr(finetune, "train", train)
    monkeypatch.setattr(finetune.synthetic, "make_dataset", lambda folder, print0: folder)
    monkeypatch.setattr(finetune.layouts, "find_samples", lambda *args: None)
    monkeypatch.setattr(finetune.data, "notes_on_files", lambda *args: ["a note on the files"])
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--out", "o", "--seed", "4", "--init", "i"])
    for scratch["top1"], apart in ((0.2, True), (0.545, False)):
        finetune.main()
        output = capsys.readouterr().out
        assert output.count("a note on the files") == 1
        assert "labels a class: 2" in output and ("is above each run" in output) == apart
        assert "chance: 25.00, one standard error: at most 2.50\n" in output
        assert re.search(r"fine-tuned +54.00 +55.00 +56.00 +55.00\n", output)
    assert f"pre-training: {55 - 54.5:+.1f} points" in output
    assert seen == {
        "o": (4, "i", 2), "o/scratch": (4, "", 2), "o/seed5": (5, "i", 2),
        "o/seed5/scratch": (5, "", 2), "o/seed6": (6, "i", 2), "o/seed6/scratch": (6, "", 2)}


def test_unlabeled_data_are_refused(clips, tmp_path, monkeypatch, capsys):
    def refused(data):
        return runs.refusal(monkeypatch, capsys, "finetune",
                            *flags_of(data, tmp_path / "out", *SCRATCH))
    flat, one = tmp_path / "flat", tmp_path / "one"
    for split in ("train", "val"):
        shutil.copytree(clips / split / "level_left_right", flat / split)
        shutil.copytree(clips / split / "level_left_right", one / split / "level_left_right")
    assert "no label" in refused(flat)
    for split in ("train", "val"):                            # a csv of paths alone
        paths = "".join(f"{path}\n" for path in (flat / split).iterdir())
        (tmp_path / f"{split}.csv").write_text(paths)
    assert "6 of the 6 files" in refused(tmp_path)
    assert "one class only, level_left_right" in refused(one)


@pytest.mark.parametrize("model, decay, stem", [
    ("mvitv2_s", 0.75, 0.75 ** 17), ("mvitv2_l", 0.875, 0.875 ** 49), ("vit_b", 0.65, 0.65 ** 13)])
def test_layer_decay(model, decay, stem):
    """Groups against the release's rule, parameter by parameter."""
    with torch.device("meta"):
        net = build_classifier({
            "model": model, "num_classes": 400, "image_size": (224, 224), "num_frames": 16,
            "patch_size": 16, "expand": "mlp", "drop_path": 0.0, "dropout": 0.0,
            "checkpointing": False, "pool": "mean"})
    depth, groups = len(net.blocks), param_groups(net, 0.05, decay)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == len(list(net.parameters()))
    for name, p in net.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        is_stem = name in ("cls_token", "pos_embed") or "patch_embed" in name
        layer = int(block[1]) + 1 if block else 0 if is_stem else depth + 1
        plain, group = len(p.shape) == 1 or name.endswith(".bias"), found[id(p)]
        assert layer_id(name, depth) == layer
        assert group["lr_scale"] == pytest.approx(decay ** (depth + 1 - layer), rel=1e-12)
        assert group["weight_decay"] == (0.0 if plain else 0.05), name
    assert found[id(net.cls_token)]["lr_scale"] == pytest.approx(stem)
    assert found[id(net.cls_token)]["weight_decay"] == 0.05
    assert found[id(net.blocks[-1].mlp.fc1.weight)]["lr_scale"] == pytest.approx(decay)
    assert len(param_groups(net, 0.05)) == 2                  # one layer only
