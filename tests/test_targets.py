"""Targets of teachers and label maps: values, losses, their views, pre-training with each."""
import math
import os
import re
import signal

import engine

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from conftest import slow
from PIL import Image
from test_teachers import Hostile, keys, save

import checkpoints
import data
import layouts
import targets
import teachers
import vit
from tools.flops import count_flops


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """A dVAE of an eighth of the width. test_teachers.py has it in full."""
    conv = teachers.Conv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "Conv", lambda dim, dim_out, kernel: conv(
            dim // 8 or dim, dim_out if dim_out == 8192 else dim_out // 8, kernel))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, narrow):
    """made(name) -> path of a teacher with random weights. "dino" and "dvae" are small."""
    folder = tmp_path_factory.mktemp("teachers")

    def make(name):
        path = folder / f"{name}.pt"
        if not path.exists():
            generator = torch.Generator().manual_seed(0)
            small = {"dino": lambda: vit.vit_tiny(num_classes=1, image_size=32),
                     "dvae": teachers.Encoder}
            shapes = {key: x.shape for key, x in small[name]().state_dict().items()} \
                if name in small else keys(name)
            state = {}
            for key, shape in shapes.items():
                scale = max(math.prod(shape[1:]), 50) ** -0.5
                state[key] = scale * torch.randn(shape, generator=generator)
                if len(shape) == 1 and key.endswith(("weight", "running_var")):
                    state[key] = torch.ones(shape)
            torch.save(state, path)
        return str(path)

    return make


def feature_target(path, load=teachers.load_vit, grid=(4, 4), size=(32, 32), **kw):
    options = {"mean": (0.0,) * 3, "std": (1.0,) * 3, **kw}
    return targets.FeatureTarget(load, teacher=path, grid=grid, image_size=size, **options)


# ------------------------------------------------------------------------------- values and losses

def test_features_are_the_teachers(made):
    """Unit vectors of the teacher's tokens, frame by frame, for any normalization of the input."""
    teacher = teachers.load_vit(made("dino"))
    frames = torch.rand(2, 3, 3, 32, 32)                                  # RGB in [0, 1]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in teachers.IMAGENET)
    with torch.no_grad():
        want = F.normalize(teacher((frames[1, 2:] - mean) / std)[0].flatten(1).T, dim=-1)
        for own in (teachers.IMAGENET, teachers.KINETICS, ((0.0,) * 3, (1.0,) * 3)):
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in own)
            target = feature_target(made("dino"), mean=own[0], std=own[1])
            features = target((frames - mean) / std)                      # (2, 3*4*4, 128)
            assert features.shape == (2, 48, target.dim) and target.dim == 128
            torch.testing.assert_close(features[1, 32:], want, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("align", ["bilinear", "nearest", "dilated"])
def test_alignment_of_a_cnn(made, align):
    load = teachers.load_resnet50
    target = feature_target(made("resnet50"), load, (4, 6), (64, 96), align=align)
    with torch.no_grad():
        x = torch.randn(1, 1, 3, 64, 96)
        features = target(x)[0].T.unflatten(1, (4, 6))                    # (2048, 4, 6)
        coarse = target.teacher(x[0] * target.scale.view(3, 1, 1) + target.shift.view(3, 1, 1))[0]
    assert coarse.shape[1:] == ((4, 6) if align == "dilated" else (2, 3))
    if align == "bilinear":                             # halfway between cell centers: 9:3:3:1
        inner = 9 * coarse[:, 0, 1] + 3 * coarse[:, 1, 1] + 3 * coarse[:, 0, 2] + coarse[:, 1, 2]
        features, want = features[:, [0, 1], [0, 3]], torch.stack([coarse[:, 0, 0], inner], dim=1)
    elif align == "nearest":
        want = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    else:
        want = coarse
    torch.testing.assert_close(features, F.normalize(want, dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_video_teacher(made):
    """MViT-B takes the whole clip and gives a vector per token, time first."""
    load, (mean, std) = teachers.load_mvit_b, teachers.KINETICS
    options = {"input_kind": "clip", "mean": mean, "std": std}
    target = feature_target(made("mvit_b"), load, (2, 2), (32, 32), **options)
    x = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        features, want = target(x), F.normalize(target.teacher(x)[0], dim=0)      # (768, 2, 1, 1)
    want = want.flatten(1).T.repeat_interleave(4, 0)                      # (8, 768)
    torch.testing.assert_close(features[0], want, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="48 .* 32"):
        feature_target(made("mvit_b"), load, (3, 3), (48, 48), input_kind="clip")


@pytest.mark.slow
def test_teacher_is_frozen_and_hidden(made):
    """Neither saved nor trained, always in eval mode, but it moves with the model."""
    target = feature_target(made("resnet50"), teachers.load_resnet50, (1, 1))
    before = {key: x.clone() for key, x in target.named_buffers()}
    model = torch.nn.Sequential(target).train()
    model(torch.randn(4, 1, 3, 32, 32))
    assert not model.state_dict() and not list(model.parameters())
    assert model[0].teacher.bn1.training is False
    assert all(torch.equal(x, before[key]) for key, x in target.named_buffers())
    assert all(x.dtype in (torch.float64, torch.int64) for x in model.double().buffers())


def test_losses():
    """Each against its definition, over masked tokens only, with gradients only there."""
    torch.manual_seed(0)
    mask = torch.rand(2, 12) < 0.5
    assert mask.any() and not mask.all()
    unit, soft = F.normalize(torch.randn(2, 12, 10), dim=-1), torch.randn(2, 12, 10).softmax(-1)
    classes = torch.randint(10, (2, 12))

    def distance(p):
        return (2 - 2 * torch.cosine_similarity(p[mask], unit[mask])).mean() / 10
    for kind, target, definition in (
            (targets.FeatureTarget, unit, distance),
            (targets.TokenTarget, classes, lambda p: F.cross_entropy(p[mask], classes[mask])),
            (targets.LabelTarget, soft, lambda p: F.cross_entropy(p[mask], soft[mask]))):
        prediction = torch.randn(2, 12, 10, requires_grad=True)
        loss = kind.loss(prediction, target, mask)
        torch.testing.assert_close(loss, definition(prediction))
        loss.backward()
        assert torch.equal(prediction.grad.abs().sum(-1) > 0, mask)


@pytest.mark.slow
def test_dvae_takes_raw_pixels(made):
    target = targets.TokenTarget(made("dvae"))
    view = torch.randint(0, 256, (2, 3, 3, 8, 16), dtype=torch.uint8)
    with torch.no_grad():
        logits = target.teacher(view[1, 2:].float() / 255)[0]              # (8192, 1, 2)
        assert torch.equal(target(view)[1, 4:], logits.argmax(0).flatten())
    tokens = target(view)
    assert tokens.shape == (2, 6) and target.dim == 8192
    with torch.autocast("cpu", torch.bfloat16):                            # float32 all the same
        logits = target.teacher(view.flatten(0, 1).float() / 255)
        assert logits.dtype == torch.bfloat16 and torch.equal(target(view), tokens)


def test_scale_of_hog():
    frames = torch.rand(1, 2, 3, 32, 32)
    plain, scaled = (targets.HOGTarget(norm="none", scale=scale) for scale in (1.0, 0.0115))
    assert torch.equal(scaled(frames), plain(frames) * 0.0115)


# ----------------------------------------------------------------------------------- pseudo-labels

def label_input(scores_and_classes, box):
    labels = torch.zeros(3, *scores_and_classes.shape[1:])
    labels[:2] = scores_and_classes
    labels[2].view(-1)[:4] = torch.tensor(box)
    return labels[None]


@pytest.mark.parametrize("order, prefix", [("released", "released"), ("xy", "xy_corrected")])
def test_label_map(golden, order, prefix):
    z = golden("token_label.npz")
    label_map = torch.from_numpy(z["label_map_fp16"].astype(np.float32))
    labels = label_input(label_map, z["crop_top_left_h_w"])
    target = targets.LabelTarget((14, 14), order=order)(labels)
    assert target.shape == (1, 196, 1000)
    torch.testing.assert_close(target.sum(-1), torch.ones(1, 196))
    probability, classes = target[0].unflatten(0, (14, 14)).topk(5)
    np.testing.assert_array_equal(classes, z[prefix + "_top5_class"])
    np.testing.assert_allclose(probability, z[prefix + "_top5_prob"], atol=1e-5)


def slow_roi_align(channel, top, left, h, w, bins):
    """RoIAlign of one channel (H, W), sample by sample. The box is in cells."""
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
        rows = [top + (i + (k + .5) / ny) * bin_h for k in range(ny)]
        columns = [left + (j + (m + .5) / nx) * bin_w for m in range(nx)]
        means[i, j] = np.mean([at(y, x) for y in rows for x in columns])
    return means


def test_boxes_by_the_loop():
    rng, H, W, bins = np.random.default_rng(0), 9, 7, (4, 3)
    for top, left, h, w in [(0, 0, 1, 1), (0.3, 0.5, 0.02, 0.5), (0.9, 0.2, 0.1, 0.8),
                            *rng.uniform(0, 0.5, (6, 4))]:
        channel = rng.standard_normal((H, W))
        axes = torch.tensor([[top * H], [h * H]]), torch.tensor([[left * W], [w * W]])
        rows, columns = (targets.box_weights(*axis, n, k)[0].double()
                         for axis, n, k in zip(axes, (H, W), bins))
        want = slow_roi_align(channel, top * H - 0.5, left * W - 0.5, h * H, w * W, bins)
        np.testing.assert_allclose(rows @ torch.from_numpy(channel) @ columns.T, want, atol=1e-5)


# ----------------------------------------------------------- views: crop and flip are the same

def position_image(path, height=192, width=256):
    """Red is the place along the width, green along the height."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * (x + 0.5) / width, 255 * (y + 0.5) / height
    picture = np.stack([red, green, np.full_like(x, 99.0)], -1)
    Image.fromarray(picture.round().astype(np.uint8)).save(path)


def position_map(path, side=64):
    """Logits of class 0 and 1 are the place along the width and the height, of others zero."""
    place = (torch.arange(side) + 0.5) / side
    x, y = place.expand(side, side), place[:, None].expand(side, side)
    classes = torch.arange(5.0)[:, None, None].expand(5, side, side)
    torch.save(torch.stack([torch.stack([x, y, *torch.zeros(3, side, side)]), classes]), path)


def patch_means(x, patch):
    """(..., 3, H, W) -> (..., 3, h, w)"""
    return x.float().unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch)).mean((-3, -1))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_views_of_an_image_agree(tmp_path, flip):
    """The color of an image is the position: crop, view and label map name the same places."""
    (tmp_path / "train/a").mkdir(parents=True)
    position_image(tmp_path / "train/a/one.two.png")
    position_map(tmp_path / "train/a/one.pt")
    samples = layouts.find_samples(tmp_path, "train")
    target = targets.LabelTarget((4, 6), classes=5)
    token_target = type("Token", (), {"input_kind": "view", "dim": 8192})
    extras = data.target_inputs(target, samples.paths, (4, 6))
    extras |= data.target_inputs(token_target, samples.paths, (4, 6))
    items = data.PretrainDataset(samples, (64, 96), seed=1, flip=flip, **extras)
    plain = data.PretrainDataset(samples, (64, 96), seed=1, flip=flip)
    wrong, astray = targets.LabelTarget((4, 6), classes=5, order="released"), 0.0
    for epoch in range(4):
        item = items[epoch, 0]
        assert torch.equal(item["x"], plain[epoch, 0]["x"])       # the same crops
        crop = patch_means(item["x"], 16)[:2] / 255             # (2, 4, 6): x and y of patches
        view = patch_means(item["view"][0], 8)[:2] / 255
        logits = target(item["labels"][None]).log()[0].unflatten(0, (4, 6)).permute(2, 0, 1)
        place = logits[:2] - logits[2]
        assert item["view"].shape == (1, 3, 32, 48)
        torch.testing.assert_close(view, crop, atol=0.004, rtol=0)  # a patch is 0.1 wide
        torch.testing.assert_close(place, crop, atol=0.02, rtol=0)
        assert (crop[0, :, 0] > crop[0, :, -1]).all() == bool(flip)
        logits = wrong(item["labels"][None]).log()[0].unflatten(0, (4, 6)).permute(2, 0, 1)
        astray = max(astray, (logits[:2] - logits[2] - crop).abs().max())
    assert astray > 0.05                                        # the released order


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_view_of_a_clip_agrees(clips, flip):
    """Frames 0, 2, ... of the clip with the same crop and flip. Other frames or places differ."""
    samples = layouts.find_samples(clips, "train")
    view = {"view_size": (64, 64), "view_stride": 2}
    items = data.PretrainDataset(samples, (64, 64), 8, 4, seed=2, flip=flip, **view)
    plain = data.PretrainDataset(samples, (64, 64), 8, 4, seed=2, flip=flip)
    for index in range(3):
        item = items[0, index]
        assert torch.equal(item["x"], plain[0, index]["x"])
        assert item["view"].shape == (4, 3, 64, 64)
        frames = patch_means(item["x"].transpose(0, 1)[::2], 16)
        view = patch_means(item["view"], 16)
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
    with pytest.raises(FileNotFoundError, match="2 of 2 .*elsewhere/a/p.pt"):
        data.target_inputs(target, samples.paths, (2, 2), folder=str(tmp_path / "elsewhere"))
    maps = data.target_inputs(target, samples.paths, (2, 2))
    items, trace = data.PretrainDataset(samples, (32, 32), **maps), tmp_path / "trace"
    for content, words in ((torch.zeros(2, 5, 4, 4), "8, 8"), ({"a": 1}, "dict"),
                           (torch.full((2, 5, 8, 8), 7.0), "classes 7 to 7 of 5"),
                           (Hostile(os.mkdir, str(trace)), "")):
        save(tmp_path / "train/a/q.pt", content)
        item = items[0, 1]                                      # replaced by the other
        [(path, reason)] = item["unreadable"]
        assert path.endswith("q.pt") and words in reason and not trace.exists()
        assert item["labels"].shape == (3, 5, 8, 8)


# ------------------------------------------------------------------------------------ pre-training

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


IMAGES = ["--model", "vit_tiny", "--image-size", 32, "--epochs", 1, "--batch-size", 4,
          "--workers", 0]
CLIPS = ["--image-size", 32, "--num-frames", 4, "--sampling-rate", 2, "--epochs", 1,
         "--batch-size", 6, "--workers", 0]


@pytest.mark.parametrize("kind, target, teacher, flags, width", [
    slow("images", "dvae", "dvae", [], 8192), slow("images", "dino", "dino", [], 128),
    slow("images", "deit", "dino", ["--align", "nearest"], 128),
    slow("images", "mocov2", "mocov2", [], 2048),
    slow("images", "resnet50", "resnet50", ["--align", "dilated"], 2048),
    ("images", "label", "", ["--label-classes", 5, "--label-order", "released"], 5),
    slow("clips", "dvae", "dvae", [], 8192), slow("clips", "dino", "dino", [], 128),
    slow("clips", "mvit_b", "mvit_b", [], 768)])
def test_pretraining(kind, target, teacher, flags, width, images, clips, made, tmp_path):
    """Two steps: a log, a checkpoint of the student only, and pictures."""
    folder, out = images if kind == "images" else clips, tmp_path / "out"
    teacher = ["--teacher", made(teacher)] if teacher else []
    output = runs.run_well("pretrain.py", "--data", folder, "--out", out, "--target", target,
                           *teacher, *flags, *(IMAGES if kind == "images" else CLIPS))
    log = [line for line in runs.log_of(out) if "loss" in line]
    assert [line["step"] for line in log] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in log)
    assert all(line["unreadable"] == 0 for line in log)
    state = checkpoints.read_checkpoint(out / "last.pt")["model"]
    assert not any(name.startswith("target") for name in state)
    assert len(state["head.bias"]) == width
    if teacher:
        assert f"parameters from {teacher[1]}" in output
    picture = tmp_path / "again.png"
    sample = next((folder / "train").rglob("*.png" if kind == "images" else "*.mp4"))
    runs.run_well("visualize.py", "--checkpoint", out / "last.pt", "--input", sample, "--output",
                  picture)
    for path in (out / "prediction.png", picture):
        assert np.asarray(Image.open(path).convert("RGB")).std() > 10


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pixel", "dvae", "dino", "label"])
def test_stopped_and_resumed(target, images, made, tmp_path, monkeypatch):
    """Stopped after three of four steps and resumed, a run gives the weights of a whole one."""
    flags = ["--data", images, "--target", target, *IMAGES, "--epochs", 2, "--drop-path", 0.2]
    if target == "label":
        flags += ["--label-classes", 5]
    elif target != "pixel":
        flags += ["--teacher", made(target)]
    runs.run_well("pretrain.py", *flags, "--out", tmp_path / "whole")
    asked = iter(["", "", "", "SIGTERM"])
    with monkeypatch.context() as patch:
        patch.setattr(engine.StopSignal, "agreed", lambda self: next(asked))
        done = runs.run("pretrain.py", *flags, "--out", tmp_path / "stopped")
    assert done.returncode == 128 + signal.SIGTERM
    assert checkpoints.read_checkpoint(tmp_path / "stopped/last.pt")["step"] == 3
    runs.run_well("pretrain.py", *flags, "--out", tmp_path / "stopped", "--resume")
    runs.assert_same_weights(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_dry_run(images, made, tmp_path):
    """Tells the cost of student and teacher, and writes nothing."""
    output = runs.run_well("pretrain.py", "--data", images, "--out", tmp_path / "out", "--target",
                           "dino", "--teacher", made("dino"), *IMAGES, "--epochs", 30, "--dry-run")
    report = output.split("dry run, nothing written: ")[1]
    teacher = count_flops(vit.vit_tiny(num_classes=0, image_size=32), (1, 3, 32, 32))
    for words in ("student 1.2 M parameters", "target dino 1.2 M parameters", "GiB", "s per step",
                  "for 60 steps"):
        assert words in report
    said = float(re.search(r"target dino .* M parameters, (\S+) GFLOPs", report)[1])
    assert said == pytest.approx(teacher["flops"] / 1e9, rel=0.01)
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    (["--target", "dino"], "--teacher"),
    (["--target", "dino", "--teacher", "nothing.pt"], "nothing.pt"),
    (["--target", "resnet50", "--teacher", "DINO"], "no tensor layer1"),
    (["--target", "dino", "--teacher", "DINO", "--image-size", 36, "--patch-size", 4], "36 .* 8"),
    (["--target", "hog", "--teacher", "DINO"], "has no teacher"),
    (["--target", "mvit_b", "--teacher", "DINO"], "mvit_b is not for images"),
    (["--target", "label", "--teacher", "nowhere"], "8 of 8"),
    (["--target", "label", "--label-classes", 3], "classes 0 to 4 of 3")])
def test_refused_before_training(images, made, tmp_path, monkeypatch, capsys, flags, words):
    flags = [made("dino") if flag == "DINO" else flag for flag in flags]
    error = runs.refusal(monkeypatch, capsys, "pretrain", "--data", images, "--out",
                         tmp_path / "out", *IMAGES, *flags)
    assert re.search(words, error)
    assert not (tmp_path / "out").exists()
