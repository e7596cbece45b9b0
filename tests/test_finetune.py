"""finetune.py as a process: trains, is killed and goes on, tests over ranks and views, and refuses what it should."""
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import runs
from models import build_classifier
from engine import layer_id, param_groups, read_checkpoint
from evaluate import accuracy
from runs import assert_same_weights, log_of

# 12 clips of 2 classes, batch 4: 3 steps per epoch, 9 steps; every augmentation on.
TINY = ["--image-size", 32, "--frames", 4, "--sampling-rate", 2, "--batch-size", 4, "--epochs", 3, "--warmup-epochs", 1,
        "--log-every", 1, "--workers", 0, "--drop-path", 0.2, "--dropout", 0.1, "--rand-augment", "rand-m7-mstd0.5-inc1",
        "--erase", 0.5, "--repeats", 2, "--layer-decay", 0.75, "--mixup", 0.8, "--cutmix", 1, "--smoothing", 0.1, "--val-epochs", 2, "--clips", 2]
SCRATCH = ["--init", "", "--no-baseline"]


def flags_of(data, out, *flags):
    return "--data", data, "--out", out, *TINY, *flags


def run(data, out, *flags, **kw):
    return runs.run("finetune.py", *flags_of(data, out, *flags), **kw)


def kill_at(step, data, out, *flags, **kw):
    return runs.kill_at(step, out, "finetune.py", *flags_of(data, out, *flags), **kw)


@pytest.fixture(scope="session")
def pretrained(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrained") / "run"
    done = runs.run("pretrain.py", "--data", clips, "--out", out, "--image-size", 32, "--frames", 4, "--output-stride", 8,
                    "--sampling-rate", 2, "--batch-size", 4, "--epochs", 1, "--workers", 0)
    assert done.returncode == 0, done.stderr
    return out / "last.pt"


@pytest.fixture(scope="session")
def finished(clips, pretrained, tmp_path_factory):
    """An uninterrupted run from pre-trained weights, and its baseline from scratch."""
    out = tmp_path_factory.mktemp("finetuned") / "run"
    done = run(clips, out, "--init", pretrained, "--baseline")
    assert done.returncode == 0, done.stderr
    return out, done


def test_run(finished, pretrained):
    out, done = finished
    for folder in (out, out / "scratch"):
        lines = [d for d in log_of(folder) if "loss" in d]
        assert [d["step"] for d in lines] == list(range(1, 10))
        assert all(0 < d["loss"] < 3 and d["skipped"] == d["unreadable"] == 0 for d in lines)
        assert [d["step"] for d in log_of(folder) if "val_top1" in d] == [6]
        result = json.load(open(folder / "last_2x1.json"))
        assert result["files"] == 4 and np.sum(result["confusion"]) == 4
        assert result["top1"] == pytest.approx(np.trace(result["confusion"]) / 4)
        with Image.open(folder / "last_2x1.png") as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10
    text = done.stdout + done.stderr
    for words in ("fresh: head.projection.weight", "left out: mask_token", "2 clips x 1 crops", "clip-level top-1",
                  "video-level top-1", "GFLOPs x 2 clips x 1 crops", "from scratch", "same budget"):
        assert words in text, words
    checkpoint = read_checkpoint(out / "last.pt")
    assert checkpoint["classes"] == ["circle_growing", "square_up_down"] and checkpoint["recipe"]["num_classes"] == 2
    # the stem moved least: layer decay
    before, after = (c["model"] for c in (read_checkpoint(pretrained), checkpoint))
    moved = [(after[n] - before["encoder." + n]).abs().max() for n in ("patch_embed.proj.weight", "blocks.2.attn.proj.weight")]
    assert 0 < moved[0] < moved[1]


@pytest.mark.parametrize("processes, workers", [(1, 2), (2, 0)])
def test_killed_and_resumed_is_bit_equal(clips, pretrained, tmp_path, finished, processes, workers):
    whole, out = finished[0], tmp_path / "killed"
    if processes == 2:
        whole = tmp_path / "whole"
        assert run(clips, whole, "--init", pretrained, "--no-baseline", processes=2).returncode == 0
    flags = ["--init", pretrained, "--no-baseline", "--resume", "--workers", workers, "--save-minutes", "0.0001"]
    for step in np.random.default_rng(processes + workers).choice(range(2, 9), 2, replace=False).tolist():
        kill_at(step, clips, out, *flags, processes=processes)
    done = run(clips, out, *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stdout + done.stderr and "not --init" in done.stdout + done.stderr
    assert_same_weights(whole, out)
    assert json.load(open(whole / "last_2x1.json")) == json.load(open(out / "last_2x1.json"))


def test_sigterm_saves_the_step(clips, tmp_path):
    out = tmp_path / "stopped"
    code, output = kill_at(4, clips, out, *SCRATCH, "--epochs", 30, sent=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "stopped by SIGTERM" in output and "--resume" in output
    assert read_checkpoint(out / "last.pt")["step"] == log_of(out)[-1]["step"] >= 4


def test_accumulation_and_ranks_see_the_same_samples(clips, tmp_path):
    """One process, accumulation and two processes average the same global batch: losses agree but for rounding."""
    flags = [*SCRATCH, "--drop-path", 0, "--dropout", 0, "--mixup", 0, "--cutmix", 0, "--epochs", 1, "--val-epochs", 0]
    losses = []
    for name, extra, kw in (("one", [], {}), ("accumulated", ["--device-batch", 2], {}), ("two", [], {"processes": 2})):
        done = run(clips, tmp_path / name, *flags, *extra, **kw)
        assert done.returncode == 0, done.stderr
        losses.append([d["loss"] for d in log_of(tmp_path / name)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_ranks_and_views(clips, finished, tmp_path):
    """The test over two ranks, of a number of files that does not divide, equals the one over one rank; more views differ."""
    odd, checkpoint = tmp_path / "odd", tmp_path / "last.pt"
    shutil.copytree(clips, odd)
    (odd / "val/circle_growing/0.mp4").unlink()
    shutil.copy(finished[0] / "last.pt", checkpoint)
    found = {}
    for processes in (1, 2):
        done = runs.run("evaluate.py", checkpoint, "--data", odd, "--clips", 3, "--crops", 3, "--workers", 0,
                        processes=processes)
        assert done.returncode == 0, done.stderr
        assert "3 clips x 3 crops, 3 videos" in done.stdout + done.stderr
        found[processes] = json.load(open(tmp_path / "last_3x3.json"))
    assert found[1] == found[2] and found[1]["files"] == 3


def test_unreadable_validation_video_is_named_not_replaced(clips, finished, tmp_path):
    bad, checkpoint = tmp_path / "bad", tmp_path / "last.pt"
    shutil.copytree(clips, bad)
    (bad / "val/circle_growing/0.mp4").write_bytes(b"not a video")
    shutil.copy(finished[0] / "last.pt", checkpoint)
    done = runs.run("evaluate.py", checkpoint, "--data", bad, "--clips", 1, "--workers", 0)
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert "1 videos could not be read and are not counted" in text and "circle_growing/0.mp4" in text
    result = json.load(open(tmp_path / "last_1x1.json"))
    assert result["files"] == 3 and len(result["unreadable"]) == 1
    assert result["per_class"]["circle_growing"][1] == 1 and result["per_class"]["square_up_down"][1] == 2


def test_predict_features_probe(clips, finished, pretrained, tmp_path):
    video = clips / "val/circle_growing/0.mp4"
    done = runs.run("evaluate.py", finished[0] / "last.pt", "--predict", video, tmp_path / "none.mp4",
                    finished[0] / "last_2x1.png")
    text = done.stdout + done.stderr
    assert done.returncode == 2 and "none.mp4" in text and "2 of 3 files cannot be read" in text and "takes videos" in text
    shares = dict((name, float(p)) for p, name in re.findall(r"([\d.]+) %  (\w+)", text))
    assert set(shares) == {"circle_growing", "square_up_down"} and sum(shares.values()) == pytest.approx(100, abs=0.02)
    out = tmp_path / "features.npz"
    done = runs.run("evaluate.py", pretrained, "--data", clips, "--features", out, "--probe")
    assert done.returncode == 0, done.stderr
    found = np.load(out)
    assert found["features"].shape == (4, 128) and np.isfinite(found["features"]).all() and found["features"].std() > 0
    assert found["labels"].tolist() == [0, 0, 1, 1] and found["paths"][3] == "val/square_up_down/1.mp4"
    assert re.search(r"best on val: [\d.]+ with lr [\d.]+ \(chosen on val itself", done.stdout + done.stderr)


def test_images(tmp_path):
    """ViT on image files in ImageNet's layout, resuming from a kill, three crops of upright and lying images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("n01440764", "n02084071")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (40, 50, 3) if i % 2 else (50, 40, 3), np.uint8) + 120 * np.uint8(label)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.JPEG")
    out = tmp_path / "out"
    flags = ["--data", tmp_path / "data", "--out", out, "--model", "vit_tiny", "--image-size", 32, "--epochs", 20, "--batch-size",
             8, "--workers", 0, "--warmup-epochs", 1, "--crops", 3, "--drop-path", 0.1, "--log-every", 1]
    runs.kill_at(5, out, "finetune.py", *flags)
    done = runs.run("finetune.py", *flags, "--resume")
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert "3 crops, 4 images: image-level top-1 100.00" in text and "crop-level" in text


def test_never_overwrites(clips, finished, pretrained):
    out = finished[0]
    before = (out / "last.pt").read_bytes(), (out / "log.jsonl").read_bytes()
    done = run(clips, out, "--init", pretrained)
    assert done.returncode == 2 and "--resume" in done.stderr
    done = run(clips, out, "--init", pretrained, "--resume", "--layer-decay", 0.5)
    assert done.returncode == 2 and "layer_decay=0.5 (was 0.75)" in done.stderr
    assert before == ((out / "last.pt").read_bytes(), (out / "log.jsonl").read_bytes())


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], "nowhere"),
    (["--model", "vit_tiny"], "takes images"),
    (["--num-classes", 5], "has 2 classes, not 5"),
    (["--init", "nothing.pt"], "no checkpoint at nothing.pt: run pretrain.py before"),
    (["--rand-augment", "rand-x7"], "rand-x7"),
    (["--batch-size", 13], "13"),
    (["--crops", 2], "invalid choice"),
    (["--drop-path", 1.5], "drop_path=1.5"),
    (["--frames", 3], "num_frames=3"),
    (["--eval", "nothing.pt"], "evaluate.py CHECKPOINT"),
    (["--probe"], "evaluate.py CHECKPOINT"),
    (["--device-batch", 1, "--repeats", 1], "mixup and cutmix pair the samples"),
    (["--color-jitter", 0.4], "add --rand-augment ''"),
    (["--smoothing", 1], "smoothing=1.0"),
    (["--model", "mvitv2_x"], "invalid choice"),
])
def test_wrong_flags_are_one_line(clips, tmp_path, flags, words):
    done = run(clips, tmp_path / "out", *SCRATCH, *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_model_other_classes_empty_validation(clips, pretrained, finished, tmp_path):
    done = run(clips, tmp_path / "out", "--no-baseline", "--init", pretrained, "--expand", "attn")
    assert done.returncode == 2 and "is a checkpoint of another model" in done.stderr and "blocks.0" in done.stderr
    more = tmp_path / "more"                                                  # a third class
    shutil.copytree(clips, more)
    for split in ("train", "val"):
        shutil.copytree(clips / split / "circle_growing", more / split / "triangle_rotating")
    done = runs.run("evaluate.py", finished[0] / "last.pt", "--data", more)
    assert done.returncode == 2 and "3 classes, not 2" in done.stderr and "Traceback" not in done.stderr
    done = run(more, tmp_path / "three", "--no-baseline", "--init", finished[0] / "last.pt", "--epochs", 1, "--val-epochs", 0)
    assert done.returncode == 0, done.stderr                                  # another data set is a new head, said so
    assert re.search(r"left out: head.projection.weight.*\(2, 128\)", done.stdout + done.stderr)
    shutil.rmtree(more / "val")
    done = run(more, tmp_path / "empty", *SCRATCH)
    assert done.returncode == 2 and "no val split" in done.stderr and not (tmp_path / "empty").exists()
    (more / "val").mkdir()
    done = run(more, tmp_path / "empty", *SCRATCH)
    assert done.returncode == 2 and "no sample in the val split" in done.stderr and not (tmp_path / "empty").exists()


def test_unlabelled_data_are_refused(clips, tmp_path):
    flat = tmp_path / "flat"
    for split in ("train", "val"):
        shutil.copytree(clips / split / "circle_growing", flat / split)
    done = run(flat, tmp_path / "out", *SCRATCH)
    assert done.returncode == 2 and "have no label" in done.stderr
    for split in ("train", "val"):                                            # a csv of paths alone
        (tmp_path / f"{split}.csv").write_text("".join(f"{path}\n" for path in (flat / split).iterdir()))
    done = run(tmp_path, tmp_path / "out", *SCRATCH)
    assert done.returncode == 2 and "6 of the 6 files" in done.stderr
    one = tmp_path / "one"
    for split in ("train", "val"):
        shutil.copytree(clips / split / "circle_growing", one / split / "circle_growing")
    done = run(one, tmp_path / "out", *SCRATCH)
    assert done.returncode == 2 and "one class only, circle_growing" in done.stderr


def test_accuracy_against_sorting():
    """Also with ties, where the lower class goes first, and with fewer than five classes."""
    rng = np.random.default_rng(0)
    for classes in (3, 12):
        scores, labels = rng.integers(0, 6, (200, classes)) / 6, rng.integers(0, classes, 200)
        for k in (1, 5):
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            assert accuracy(scores, labels, k) == np.mean([label in row for label, row in zip(labels, best)])


@pytest.mark.parametrize("model, decay, stem", [("mvitv2_s", 0.75, 0.75 ** 17), ("mvitv2_l", 0.875, 0.875 ** 49),
                                                ("vit_b", 0.65, 0.65 ** 13)])
def test_layer_decay(model, decay, stem):
    """Groups against the reference's rule, parameter by parameter."""
    with torch.device("meta"):
        net = build_classifier({"model": model, "num_classes": 400, "image_size": (224, 224), "num_frames": 16, "patch_size": 16,
                                "expand": "mlp", "drop_path": 0.0, "dropout": 0.0, "checkpointing": False, "pool": "mean"})
    depth, groups = len(net.blocks), param_groups(net, 0.05, decay)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == len(list(net.parameters()))
    for name, p in net.named_parameters():
        i = re.match(r"blocks\.(\d+)\.", name)
        layer = int(i[1]) + 1 if i else 0 if name in ("cls_token", "pos_embed") or "patch_embed" in name else depth + 1
        assert layer_id(name, depth) == layer
        assert found[id(p)]["lr_scale"] == pytest.approx(decay ** (depth + 1 - layer), rel=1e-12)
        assert found[id(p)]["weight_decay"] == (0.0 if len(p.shape) == 1 or name.endswith(".bias") else 0.05), name
    assert found[id(net.cls_token)]["lr_scale"] == pytest.approx(stem) and found[id(net.cls_token)]["weight_decay"] == 0.05
    assert found[id(net.blocks[-1].mlp.fc1.weight)]["lr_scale"] == pytest.approx(decay)
    assert len(param_groups(net, 0.05)) == 2                                  # one layer only
