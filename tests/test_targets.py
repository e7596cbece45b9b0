"""Targets of teachers and label maps: goals, losses, the views they come from, and pre-training with each."""
import math
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import layouts
import pretrain
import runs
import targets
import teachers
import vit
import visualize
from engine import read_checkpoint
from tools.flops import count_flops
from test_teachers import Hostile, keys, save


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> path of a teacher with random weights; "dino" is small, the others as large as the public ones."""
    folder = tmp_path_factory.mktemp("teachers")

    def make(name):
        path = folder / f"{name}.pt"
        if not path.exists():
            generator = torch.Generator().manual_seed(0)
            shapes = keys(name) if name != "dino" else {
                key: x.shape for key, x in vit.vit_tiny(num_classes=1, image_size=32).state_dict().items()}
            ones = [key for key, shape in shapes.items() if len(shape) == 1 and key.endswith(("weight", "running_var"))]
            torch.save({key: torch.ones(shape) if key in ones else
                        torch.randn(shape, generator=generator) / max(math.prod(shape[1:]), 50) ** 0.5
                        for key, shape in shapes.items()}, path)
        return str(path)

    return make


def feature_target(path, load=teachers.load_vit, grid=(4, 4), size=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3, **kw):
    return targets.FeatureTarget(load, teacher=path, grid=grid, image_size=size, mean=mean, std=std, **kw)


# ----------------------------------------------------------------------------------------------------- goals and losses

def test_features_are_the_teachers(made):
    """Goals are unit vectors of the teacher's tokens, frame by frame, however the student's input is normalised."""
    teacher, frames = teachers.load_vit(made("dino")), torch.rand(2, 3, 3, 32, 32)         # RGB in [0, 1]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in teachers.IMAGENET)
    with torch.no_grad():
        want = F.normalize(teacher((frames[1, 2:] - mean) / std)[0].flatten(1).T, dim=-1)             # (16, 128)
        for own in (teachers.IMAGENET, teachers.KINETICS, ((0.0,) * 3, (1.0,) * 3)):
            student = [torch.tensor(v).view(3, 1, 1) for v in own]
            target = feature_target(made("dino"), mean=own[0], std=own[1])
            goal = target((frames - student[0]) / student[1])                 # (2, 3*4*4, 128)
            assert goal.shape == (2, 48, target.dim) and target.dim == 128
            torch.testing.assert_close(goal[1, 32:], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("align", ["bilinear", "nearest", "dilated"])
def test_alignment_of_a_cnn(made, align):
    target = feature_target(made("resnet50"), teachers.load_resnet50, (4, 6), (64, 96), align=align)
    with torch.no_grad():
        x = torch.randn(1, 1, 3, 64, 96)
        goal = target(x)[0].T.unflatten(1, (4, 6))                            # (2048, 4, 6)
        coarse = target.teacher(x[0] * target.scale.view(3, 1, 1) + target.shift.view(3, 1, 1))[0]
    assert coarse.shape[1:] == ((4, 6) if align == "dilated" else (2, 3))
    if align == "nearest":
        want = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    elif align == "dilated":
        want = coarse
    else:                                                                     # halfway between cell centres: 9:3:3:1
        want = None
        inner = (9 * coarse[:, 0, 1] + 3 * coarse[:, 1, 1] + 3 * coarse[:, 0, 2] + coarse[:, 1, 2]) / 16
        torch.testing.assert_close(goal[:, 1, 3], F.normalize(inner, dim=0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(goal[:, 0, 0], F.normalize(coarse[:, 0, 0], dim=0), atol=1e-5, rtol=1e-4)
    if want is not None:
        torch.testing.assert_close(goal, F.normalize(want, dim=0), atol=1e-5, rtol=1e-4)


def test_video_teacher(made):
    """MViT-B takes the whole clip and gives a vector per token, time first."""
    target = feature_target(made("mvit_b"), teachers.load_mvit_b, (2, 2), (32, 32), input_kind="clip", **dict(zip(
        ("mean", "std"), teachers.KINETICS)))
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        goal, want = target(x), F.normalize(target.teacher(x)[0], dim=0)      # (1, 8, 768), (768, 2, 1, 1)
    for token in range(8):
        torch.testing.assert_close(goal[0, token], want[:, token // 4, 0, 0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="48 is not a multiple of its 32"):
        feature_target(made("mvit_b"), teachers.load_mvit_b, (3, 3), (48, 48), input_kind="clip")


def test_teacher_is_frozen_and_hidden(made):
    """Not in the checkpoint or among the parameters, always in eval mode, its statistics untouched; still it moves."""
    target = feature_target(made("resnet50"), teachers.load_resnet50, (1, 1))
    before = {key: x.clone() for key, x in target.named_buffers()}
    model = torch.nn.Sequential(target).train()
    model(torch.randn(4, 1, 3, 32, 32))
    assert not model.state_dict() and not list(model.parameters()) and model[0].teacher.bn1.training is False
    assert all(torch.equal(x, before[key]) for key, x in target.named_buffers())
    assert all(x.dtype in (torch.float64, torch.int64) for x in model.double().buffers())


def test_losses():
    """Each against its definition, over masked tokens only, with gradients there and nowhere else."""
    torch.manual_seed(0)
    mask = torch.rand(2, 12) < 0.5
    assert mask.any() and not mask.all()
    unit, classes, soft = F.normalize(torch.randn(2, 12, 10), dim=-1), torch.randint(10, (2, 12)), \
        torch.randn(2, 12, 10).softmax(-1)
    for target, goal, definition in (
            (targets.FeatureTarget, unit, lambda p: (2 - 2 * torch.cosine_similarity(p[mask], unit[mask])).mean() / 10),
            (targets.TokenTarget, classes, lambda p: F.cross_entropy(p[mask], classes[mask])),
            (targets.LabelTarget, soft, lambda p: F.cross_entropy(p[mask], soft[mask]))):
        prediction = torch.randn(2, 12, 10, requires_grad=True)
        loss = target.loss(prediction, goal, mask)
        torch.testing.assert_close(loss, definition(prediction))
        loss.backward()
        assert torch.equal(prediction.grad.abs().sum(-1) > 0, mask)


def test_dvae_takes_raw_pixels(made):
    target = targets.TokenTarget(made("dvae"))
    view = torch.randint(0, 256, (2, 3, 3, 8, 16), dtype=torch.uint8)
    with torch.no_grad():
        logits = target.teacher(view[1, 2:].float() / 255)[0]                 # (8192, 1, 2)
        assert torch.equal(target(view)[1, 4:], logits.argmax(0).flatten())
    assert target(view).shape == (2, 6) and target.dim == 8192


# -------------------------------------------------------------------------------------------------------- pseudo-labels

def label_input(scores_and_classes, box):
    labels = torch.zeros(3, *scores_and_classes.shape[1:])
    labels[:2] = scores_and_classes
    labels[2].view(-1)[:4] = torch.tensor(box)
    return labels[None]


@pytest.mark.parametrize("order, prefix", [("released", "released"), ("xy", "xy_corrected")])
def test_label_map(golden, order, prefix):
    z = golden("token_label.npz")
    labels = label_input(torch.from_numpy(z["label_map_fp16"].astype(np.float32)), z["crop_top_left_h_w"])
    goal = targets.LabelTarget((14, 14), order=order)(labels)
    assert goal.shape == (1, 196, 1000)
    torch.testing.assert_close(goal.sum(-1), torch.ones(1, 196))
    probability, classes = goal[0].unflatten(0, (14, 14)).topk(5)
    np.testing.assert_array_equal(classes, z[prefix + "_top5_class"])
    np.testing.assert_allclose(probability, z[prefix + "_top5_prob"], atol=1e-5)


def slow_roi_align(channel, top, left, h, w, bins):
    """RoIAlign of one channel (H, W), sample by sample; box in cells, adaptive number of samples, not "aligned"."""
    H, W = channel.shape

    def at(y, x):
        if not (-1 <= y <= H and -1 <= x <= W):
            return 0.0
        y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
        y0, x0 = min(int(y), H - 2), min(int(x), W - 2)
        a, b = y - y0, x - x0
        return ((1 - a) * (1 - b) * channel[y0, x0] + (1 - a) * b * channel[y0, x0 + 1]
                + a * (1 - b) * channel[y0 + 1, x0] + a * b * channel[y0 + 1, x0 + 1])

    bin_h, bin_w = max(h, 1) / bins[0], max(w, 1) / bins[1]
    ny, nx = math.ceil(bin_h), math.ceil(bin_w)
    means = np.empty(bins)
    for i, j in np.ndindex(*bins):
        means[i, j] = np.mean([at(top + (i + (k + .5) / ny) * bin_h, left + (j + (m + .5) / nx) * bin_w)
                               for k in range(ny) for m in range(nx)])
    return means


def test_boxes_by_the_loop():
    rng, H, W, bins = np.random.default_rng(0), 9, 7, (4, 3)
    for top, left, h, w in [(0, 0, 1, 1), (0.3, 0.5, 0.02, 0.5), (0.9, 0.2, 0.1, 0.8), *rng.uniform(0, 0.5, (6, 4))]:
        channel = rng.standard_normal((H, W))
        rows, columns = (targets.box_weights(torch.tensor([start * n]), torch.tensor([length * n]), n, k)[0].double()
                         for start, length, n, k in ((top, h, H, bins[0]), (left, w, W, bins[1])))
        want = slow_roi_align(channel, top * H - 0.5, left * W - 0.5, h * H, w * W, bins)
        np.testing.assert_allclose(rows @ torch.from_numpy(channel) @ columns.T, want, atol=1e-5)


# ------------------------------------------------------------------------------------ views: crop and flip are the same

def position_image(path, height=192, width=256):
    """Red is the place along the width, green along the height."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([255 * (x + 0.5) / width, 255 * (y + 0.5) / height, np.full_like(x, 99.0)], -1)
    Image.fromarray(picture.round().astype(np.uint8)).save(path)


def position_map(path, side=64):
    """Logits of class 0 and 1 are the place along the width and the height, of classes 2 to 4 zero."""
    place = (torch.arange(side) + 0.5) / side
    scores = torch.stack([place.expand(side, side), place[:, None].expand(side, side), *torch.zeros(3, side, side)])
    torch.save(torch.stack([scores, torch.arange(5.0)[:, None, None].expand(5, side, side)]), path)


def patch_means(x, patch):
    """(..., 3, H, W) -> (..., 3, h, w)"""
    return x.float().unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch)).mean((-3, -1))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_views_of_an_image_agree(tmp_path, flip):
    """An image whose colour is the position: crop, dVAE view and label map name the same place for every patch."""
    (tmp_path / "train/a").mkdir(parents=True)
    position_image(tmp_path / "train/a/one.two.png")
    position_map(tmp_path / "train/a/one.pt")
    samples = layouts.find_samples(tmp_path, "train")
    target = targets.LabelTarget((4, 6), classes=5)
    token_target = type("Token", (), {"input_kind": "view", "dim": 8192})
    extras = data.target_inputs(target, samples.paths, (4, 6)) | data.target_inputs(token_target, samples.paths, (4, 6))
    items = data.PretrainDataset(samples, (64, 96), seed=1, flip=flip, **extras)
    plain = data.PretrainDataset(samples, (64, 96), seed=1, flip=flip)
    wrong, astray = targets.LabelTarget((4, 6), classes=5, order="released"), 0.0
    for epoch in range(4):
        item = items[epoch, 0]
        assert torch.equal(item["x"], plain[epoch, 0]["x"])                   # the same crops with and without
        crop = patch_means(item["x"], 16)[:2] / 255                           # (2, 4, 6): x and y of each patch
        view = patch_means(item["view"][0], 8)[:2] / 255
        logits = target(item["labels"][None]).log()[0].unflatten(0, (4, 6)).permute(2, 0, 1)
        place = logits[:2] - logits[2]
        assert item["view"].shape == (1, 3, 32, 48)
        torch.testing.assert_close(view, crop, atol=0.004, rtol=0)            # a patch is 0.1 wide
        torch.testing.assert_close(place, crop, atol=0.02, rtol=0)
        assert (crop[0, :, 0] > crop[0, :, -1]).all() == bool(flip)           # flips show
        logits = wrong(item["labels"][None]).log()[0].unflatten(0, (4, 6)).permute(2, 0, 1)
        astray = max(astray, (logits[:2] - logits[2] - crop).abs().max())
    assert astray > 0.05                                                      # where the released order puts boxes


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_view_of_a_clip_agrees(clips, flip):
    """Frames 0, 2, ... of the clip, same crop and flip, for every patch; another frame or no flip would not do."""
    samples = layouts.find_samples(clips, "train")
    items = data.PretrainDataset(samples, (64, 64), 8, 4, seed=2, flip=flip, view_size=(64, 64), view_stride=2)
    plain = data.PretrainDataset(samples, (64, 64), 8, 4, seed=2, flip=flip)
    for index in range(3):
        item = items[0, index]
        assert torch.equal(item["x"], plain[0, index]["x"]) and item["view"].shape == (4, 3, 64, 64)
        frames, view = patch_means(item["x"].transpose(0, 1)[::2], 16), patch_means(item["view"], 16)
        error = (frames - view).abs().mean()
        assert error < 2 < 2.5 * error + 2
        for other in (view.flip(-1), view.roll(1, 0), view.roll(1, -1)):
            assert (frames - other).abs().mean() > 3 * error


def test_missing_and_damaged_maps(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    for name in "pq":
        position_image(tmp_path / f"train/a/{name}.png", 40, 40)
        position_map(tmp_path / f"train/a/{name}.pt", 8)
    samples = layouts.find_samples(tmp_path, "train")
    target = targets.LabelTarget((2, 2), classes=5)
    with pytest.raises(FileNotFoundError, match="2 of 2 images have no label map, such as .*elsewhere/a/p.pt"):
        data.target_inputs(target, samples.paths, (2, 2), folder=str(tmp_path / "elsewhere"))
    items = data.PretrainDataset(samples, (32, 32), **data.target_inputs(target, samples.paths, (2, 2)))
    trace = tmp_path / "trace"
    for content, words in ((torch.zeros(2, 5, 4, 4), "8, 8"), (torch.full((2, 5, 8, 8), 7.0), "classes 7 to 7 of 5"),
                           ({"a": 1}, "dict"), (Hostile(os.mkdir, str(trace)), "")):
        save(tmp_path / "train/a/q.pt", content)
        item = items[0, 1]                                                    # replaced by the other
        [(path, reason)] = item["unreadable"]
        assert path.endswith("q.pt") and words in reason and not trace.exists()
        assert item["labels"].shape == (3, 5, 8, 8)


# --------------------------------------------------------------------------------------------------------- pre-training

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 8 + 2 images with label maps of 5 classes beside the training images."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("val", 2)):
        (folder / split / "a").mkdir(parents=True)
        for i in range(count):
            position_image(folder / split / f"a/{i}.png", 40, 40 + i)
            if split == "train":
                position_map(folder / split / f"a/{i}.pt", 6)
    return folder


@pytest.fixture
def script(monkeypatch):
    """script(module, flags) runs main() of a script in this process; signals and threads are as before afterwards."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        module.main()

    yield run
    for number, handler in kept.items():
        signal.signal(number, handler)


IMAGES = ["--model", "vit_tiny", "--image-size", 32, "--epochs", 1, "--batch-size", 4, "--workers", 0]
CLIPS = ["--image-size", 32, "--num-frames", 4, "--sampling-rate", 2, "--epochs", 1, "--batch-size", 6, "--workers", 0]


@pytest.mark.parametrize("kind, target, teacher, flags", [
    ("images", "dvae", "dvae", []), ("images", "dino", "dino", []), ("images", "mocov3", "dino", []),
    ("images", "deit", "dino", ["--align", "nearest"]), ("images", "mocov2", "mocov2", []),
    ("images", "resnet50", "resnet50", ["--align", "dilated"]),
    ("images", "label", "", ["--label-classes", 5, "--label-order", "released"]),
    ("clips", "dvae", "dvae", []), ("clips", "dino", "dino", []), ("clips", "mvit_b", "mvit_b", [])])
def test_pretraining(kind, target, teacher, flags, images, clips, made, script, tmp_path, capsys):
    """Two steps with every target: learns something, logs, draws; the file has the student only; visualize reads it."""
    folder, out = images if kind == "images" else clips, tmp_path / "out"
    teacher = ["--teacher", made(teacher)] if teacher else []
    script(pretrain, "--data", folder, "--out", out, "--target", target, *teacher, *flags,
           *(IMAGES if kind == "images" else CLIPS))
    log = runs.log_of(out)
    assert [line["step"] for line in log] == [1, 2] and all(math.isfinite(line["loss"]) for line in log)
    assert all(line["grad_norm"] > 0 and line["unreadable"] == 0 for line in log)
    state = read_checkpoint(out / "last.pt")["model"]
    assert not any(name.startswith("target") for name in state)
    width = {"dvae": 8192, "label": 5, "mocov2": 2048, "resnet50": 2048, "mvit_b": 768}.get(target, 128)
    assert len(state["head.bias"]) == width
    if teacher:
        assert f"parameters from {teacher[1]}" in capsys.readouterr().out
    picture = tmp_path / "again.png"
    sample = next((folder / "train").rglob("*.png" if kind == "images" else "*.mp4"))
    script(visualize, "--checkpoint", out / "last.pt", "--input", sample, "--output", picture)
    for path in (out / "prediction.png", picture):
        assert np.asarray(Image.open(path).convert("RGB")).std() > 10


@pytest.mark.parametrize("target", ["pixel", "dvae", "dino", "mocov2", "label"])
def test_stopped_and_resumed(target, images, made, script, tmp_path, monkeypatch):
    """Stopped after three of six steps and gone on with, a run ends in the bits of an undisturbed one."""
    flags = ["--data", images, "--target", target, *IMAGES, "--epochs", 3, "--drop-path", 0.2]
    flags += ["--label-classes", 5] if target == "label" else ["--teacher", made(target)] if target != "pixel" else []
    script(pretrain, *flags, "--out", tmp_path / "whole")
    asked = iter(["", "", "", "SIGTERM"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(pretrain.StopSignal, "agreed", lambda self: next(asked))
        script(pretrain, *flags, "--out", tmp_path / "stopped")
    assert read_checkpoint(tmp_path / "stopped/last.pt")["step"] == 3
    script(pretrain, *flags, "--out", tmp_path / "stopped", "--resume")
    runs.assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_dry_run(images, made, script, tmp_path, capsys):
    """Tells the cost of student and teacher, and writes nothing."""
    script(pretrain, "--data", images, "--out", tmp_path / "out", "--target", "dino", "--teacher", made("dino"),
           *IMAGES, "--epochs", 30, "--dry-run")
    report = capsys.readouterr().out.split("dry run, nothing written: ")[1]
    teacher = count_flops(vit.vit_tiny(num_classes=0, image_size=32), (1, 3, 32, 32))
    for words in ("student 1.2 M parameters", "target dino 1.2 M parameters", "GiB", "s per step", "for 60 steps"):
        assert words in report
    said = float(re.search(r"target dino .* M parameters, (\S+) GFLOPs", report)[1])
    assert said == pytest.approx(teacher["flops"] / 1e9, rel=0.01)
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    (["--target", "dino"], "--teacher"),
    (["--target", "dino", "--teacher", "nothing.pt"], "nothing.pt"),
    (["--target", "resnet50", "--teacher", "DINO"], "no tensor layer1"),
    (["--target", "dino", "--teacher", "DINO", "--image-size", 36, "--patch-size", 4], "36 is not a multiple of its 8"),
    (["--target", "hog", "--teacher", "DINO"], "has no teacher"),
    (["--target", "mvit_b", "--teacher", "DINO"], "is for clips"),
    (["--target", "label", "--teacher", "nowhere"], "8 of 8 images have no label map"),
    (["--target", "label", "--label-classes", 3], "classes 0 to 4 of 3")])
def test_refused_before_training(images, made, script, tmp_path, flags, words):
    flags = [made("dino") if flag == "DINO" else flag for flag in flags]
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        script(pretrain, "--data", images, "--out", tmp_path / "out", *IMAGES, *flags)
    assert not (tmp_path / "out").exists()
