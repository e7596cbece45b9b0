"""ava.py: RoIAlign, boxes, head and mean average precision against golden figures; data; the script as a process."""
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ava
import data
import runs
from tools import synthetic
from conftest import GOLDEN, ROOT, golden_input
from models import build_classifier
from engine import read_checkpoint
from runs import assert_same_weights, log_of


# ------------------------------------------------------------------------------------------------- golden: RoIAlign

@pytest.mark.parametrize("scale", [32, 16])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_golden(golden, scale, ratio):
    z = golden("ava_roi_align.npz")
    features = torch.from_numpy(np.random.default_rng(7).standard_normal((2, 5, 10, 18), dtype=np.float32))
    assert features.double().sum().item() == pytest.approx(float(z["feat_sum"]), abs=1e-4)
    out = ava.roi_align(features, torch.from_numpy(z["rois"]), 1 / scale, ratio=ratio).numpy()
    np.testing.assert_allclose(out, z[f"out_s{scale}_sr{ratio}"], rtol=0, atol=5e-6)
    if ratio == 0:                                                            # empty and inverted boxes: exactly 0
        assert not out[[3, 4, 5, 15]].any()


def test_roi_align_gradient():
    """Against finite differences, in double precision; and no gradient outside of what the boxes see."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 2, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 3, 5, 90, 70], [1, -40, 20, 60, 300], [1, 10, 10, 10, 50]], dtype=torch.float64)
    for ratio in (0, 2):
        assert torch.autograd.gradcheck(lambda f: ava.roi_align(f, rois, 1 / 32, bins=3, ratio=ratio), features)
    rois = torch.tensor([[1, 0, 0, 20, 20]], dtype=torch.float64)
    grad, = torch.autograd.grad(ava.roi_align(features, rois, 1 / 32).sum(), features)
    assert grad[0].abs().max() == 0 and grad[1, :, 0, 0].min() > 0 and grad[1, :, 2:].abs().max() == 0
    assert ava.roi_align(features, rois[:0], 1 / 32).shape == (0, 2, 7, 7)


def test_roi_align_gradient_repeats(two_threads):
    """Boxes of one clip share its cells: their gradients are summed in one order, however many threads there are."""
    torch.manual_seed(0)
    features = torch.randn(4, 14, 14, 768).permute(0, 3, 1, 2).requires_grad_()
    rois = torch.cat([torch.arange(40)[:, None] % 4, torch.rand(40, 2) * 100, 100 + torch.rand(40, 2) * 100], dim=1)
    gradients = [torch.autograd.grad(ava.roi_align(features, rois, 1 / 16).square().sum(), features)[0] for _ in range(20)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# ---------------------------------------------------------------------------------------------------- golden: boxes

def test_transform_boxes_golden():
    z = json.load(open(GOLDEN / "ava_box_transforms.json"))
    (W, H), boxes = z["image_wh"], np.array(z["normalised_boxes"])
    whole = ava.transform_boxes(boxes, (H, W), (H, W), (0, 0, H, W))
    np.testing.assert_allclose(whole, z["pixel_boxes_clipped"], rtol=1e-15, atol=0)
    sizes = {case["size"]: case["resized_wh"] for case in z["cases"] if case["kind"] == "test_full"}
    for case in z["cases"]:
        if case["kind"] == "train":
            rng, (w, h), side = np.random.RandomState(case["seed"]), case["resized_wh"], case["crop"]
            assert min(w, h) == round(1 / rng.uniform(1 / case["jitter"][1], 1 / case["jitter"][0]))
            top, left = rng.randint(0, h - side), rng.randint(0, w - side)
            crop, flip = (top, left, side, side), rng.uniform() < 0.5
            assert flip == case["flipped"]
        else:
            (w, h), side, flip = sizes[case["size"]], case["size"], False
            crop = (0, 0, h, w) if case["kind"] == "test_full" else (-(-(h - side) // 2), -(-(w - side) // 2), side, side)
        found = ava.transform_boxes(boxes, (H, W), (h, w), crop, flip, per_axis=False)
        # the release scales by w / W in tests and by w and 1 / W in training: two roundings of the last bit
        np.testing.assert_allclose(found, np.array(case["boxes"]), rtol=0, atol=2e-13, err_msg=case["kind"])


def test_transform_boxes_per_axis_and_flip():
    """Per axis, a box keeps its share of the picture; flipped twice it is itself; outside the crop it has no area."""
    boxes = np.array([[0.1, 0.2, 0.5, 0.6], [0.0, 0.3, 0.2, 0.9], [0.9, 0.9, 0.95, 0.95]])
    found = ava.transform_boxes(boxes, (100, 200), (50, 77), (0, 0, 50, 77))
    np.testing.assert_allclose(found, boxes * [77, 50, 77, 50], rtol=1e-12)
    once = ava.transform_boxes(boxes, (100, 200), (100, 200), (10, 20, 60, 100), flip=True)
    plain = ava.transform_boxes(boxes, (100, 200), (100, 200), (10, 20, 60, 100))
    np.testing.assert_allclose(99 - once[:, [2, 0]], plain[:, [0, 2]], atol=1e-12)
    assert np.prod(plain[:, 2:] - plain[:, :2], axis=1)[2] == 0 and (plain[:2, 2:] > plain[:2, :2]).all()


# ------------------------------------------------------------------------------------------------------ golden: mAP

MAP = GOLDEN / "ava_map"


def precisions_of(name, excluded=True, match="file"):
    keys = ava.read_excluded(MAP / "excluded_timestamps.csv") if excluded else ()
    return ava.average_precisions(ava.read_boxes(MAP / "groundtruth.csv"), ava.read_boxes(MAP / f"{name}.csv", scored=True),
                                  ava.read_label_map(MAP / "label_map.pbtxt"), keys, match)


@pytest.mark.parametrize("result, name, excluded", [
    ("detections", "detections", True), ("detections_shuffled", "detections_shuffled", True),
    ("detections_no_exclusion", "detections", False), ("detections_ties_stable_then_reversed", "detections_ties", True)])
def test_mean_average_precision_golden(result, name, excluded):
    wanted = json.load(open(MAP / "expected.json"))["results"][result]
    names, found = ava.read_label_map(MAP / "label_map.pbtxt"), precisions_of(name, excluded)
    assert [names[label] for label in found] == list(wanted["AP"])
    np.testing.assert_allclose(list(found.values()), [np.nan if v is None else v for v in wanted["AP"].values()], rtol=0,
                               atol=1e-12)
    assert np.nanmean(list(found.values())) == pytest.approx(wanted["mAP"], abs=1e-12)


def test_matching_by_score():
    """Best score first, the order of the file does not matter. Figure: golden data's README."""
    for name in ("detections", "detections_shuffled"):
        assert np.nanmean(list(precisions_of(name, match="score").values())) == pytest.approx(0.305928, abs=5e-7)


# ----------------------------------------------------------------------------------------------------- golden: head

def test_detection_head_golden(golden, released):
    """Features, logits and loss of MViTv2-S on boxes, and the gradient's norms, from a checkpoint in the release's layout."""
    z = golden("ava_det_head.npz")
    recipe = ava.replace(ava.AVA, eval=released("mvitv2_s_detection"))
    recipe, detector = ava.load_for_test(recipe, set(), lambda line: None)    # everything that it is stands in the file
    assert (recipe.model, recipe.image_size, recipe.num_frames, recipe.expand) == ("mvitv2_s", (224, 224), 16, "mlp")
    assert sum(p.numel() for p in detector.eval().parameters()) == 36_229_040
    rois = torch.from_numpy(z["b1_boxes"])
    features = detector.feature_map(golden_input((1, 3, 16, 224, 224)))       # (1, 768, 7, 7)
    np.testing.assert_allclose(features[:, :8].detach(), z["b1_tmean_first8channels"], rtol=0, atol=1e-5)
    assert detector.scale == 1 / 32
    for stride in (16, 32):
        detector.scale = 1 / stride
        aligned = ava.roi_align(features, rois, detector.scale)
        np.testing.assert_allclose(aligned[:, 0].detach(), z[f"b1_s{stride}_roi_first7x7"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(aligned.amax((2, 3)).detach(), z[f"b1_s{stride}_roi_feature"], rtol=0, atol=1e-5)
        logits = detector.classify(features, rois)
        np.testing.assert_allclose(logits.detach(), z[f"b1_s{stride}_logits"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(logits.sigmoid().detach(), z[f"b1_s{stride}_scores"], rtol=0, atol=1e-5)
    targets = torch.zeros_like(logits)
    targets[z["b1_s32_labels_rows"], z["b1_s32_labels_cols"]] = 1
    loss = F.binary_cross_entropy_with_logits(logits, targets)
    assert loss.item() == pytest.approx(float(z["b1_s32_loss"]), abs=1e-5)
    loss.backward()
    parameters = dict(detector.model.named_parameters())
    for name, norm, first in zip(z["grad_names"], z["grad_norms"], z["grad_first4"]):
        assert parameters[str(name)].grad.double().norm().item() == pytest.approx(norm, rel=1e-4), name
        np.testing.assert_allclose(parameters[str(name)].grad.flatten()[:4], first, rtol=1e-3, atol=1e-6)
    total = sum(p.grad.double().square().sum() for p in parameters.values() if p.grad is not None) ** 0.5
    assert total.item() == pytest.approx(float(z["grad_total_norm"]), rel=1e-4)


TINY = dict(model="mvit_tiny", image_size=(32, 32), num_frames=4, sampling_rate=2, jitter=(32, 40), checkpointing=False,
            drop_path=0.0, data="", movie_start=901.0, workers=0)


@pytest.mark.parametrize("count", [0, 1, 700])
def test_any_number_of_boxes(count):
    """Every parameter gets a finite gradient, zero without boxes; the maps need no fixed size."""
    torch.manual_seed(0)
    detector = ava.build(ava.replace(ava.AVA, **TINY)).train()
    rois = torch.rand(count, 5) * 30 + torch.tensor([0, 0, 0, 10.0, 10])
    rois[:, 0] = torch.randint(2, (count,))
    for shape in ((2, 3, 4, 32, 32), (2, 3, 4, 32, 56)):
        detector.zero_grad()
        logits = detector(torch.randn(shape), rois)
        assert logits.shape == (count, 80)
        F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="sum").backward()
        grads = [p.grad for p in detector.parameters()]
        assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
        assert all((grad != 0).any() for grad in grads[-2:]) == (count > 0)


# ------------------------------------------------------------------------------------------------------------- data

@pytest.fixture(scope="session")
def movies(tmp_path_factory):
    """4 training and 2 validation movies in AVA's layout, with 12 and 6 key frames."""
    folder = tmp_path_factory.mktemp("ava")
    subprocess.run([sys.executable, "-c", "import sys; from tools import synthetic; from pathlib import Path\n"
                    "synthetic.MOVIES = {'train': 4, 'val': 2}\n"
                    "synthetic.make_ava_part(sys.argv[1], 0, 0, 1); synthetic._join_tables(Path(sys.argv[1], 'annotations'))",
                    str(folder)], check=True, cwd=ROOT)
    return folder


def changed(movies, tmp_path, **tables):
    """A copy of the set with lines added to some tables."""
    shutil.copytree(movies / "annotations", tmp_path / "annotations")
    (tmp_path / "videos").symlink_to(movies / "videos")
    for name, lines in tables.items():
        with open(tmp_path / "annotations" / f"ava_{name}.csv", "a") as f:
            f.writelines(line + "\n" for line in lines)
    return tmp_path


def find(folder, split, **more):
    lines = []
    frames, media = ava.find(ava.replace(ava.AVA, **{**TINY, "data": str(folder), **more}), split, lines.append)
    return frames, media, "\n".join(lines)


def test_clip_around_the_key_frame():
    assert list(ava.clip_offsets(40, 3)) == list(range(-60, 58, 3)) and ava.clip_offsets(40, 3)[20] == 0
    assert list(ava.clip_offsets(16, 4)) == list(range(-32, 29, 4)) and ava.clip_offsets(16, 4)[8] == 0


def test_rows_without_sense_are_counted_and_named(movies, tmp_path):
    before, _, silence = find(movies, "train")
    assert silence == ""
    good = "train_000,0902,0.1,0.2,0.3,0.4,"
    folder = changed(movies, tmp_path, train_predicted_boxes=[
        good + "3,0.95", good + "7,0.85", good + "-1,0.9", good + ",0.9", good + "9,0.5",      # merged; the last scores low
        "train_000,902,0.10,0.2,0.3,0.4,5,0.95",                              # the same place, written otherwise: a box
        "train_000,0901,0.1,0.2,0.3,0.4,1,0.9", "train_000,1799,0.1,0.2,0.3,0.4,1,0.9", "train_000,0902,0.3,0.2,0.1,0.4,1,0.9",
        "train_000,0902,0.3,nan,0.1,0.4,1,0.9", good + "81,0.9", good + "0,0.9", "train_000,0902,0.1", "video,second,x,y,x,y,a,b",
        "nowhere,0902,0.1,0.2,0.3,0.4,1,0.9"])
    frames, _, said = find(folder, "train")
    assert [(f.video, f.second) for f in frames] == [(f.video, f.second) for f in before]
    assert np.array_equal(frames[0].boxes, [*before[0].boxes, (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)])
    assert [np.flatnonzero(row).tolist() for row in frames[0].targets[-2:]] == [[2, 6], [4]]
    assert all(np.array_equal(a.boxes, b.boxes) and np.array_equal(a.targets, b.targets) for a, b in zip(frames[1:], before[1:]))
    for words in ("2 rows left out, second outside 902 to 1798", "2 rows left out, box inverted", "2 rows left out, class "
                  "outside 1 to 80", "2 rows left out, not video", "1 movies missing", "nowhere"):
        assert words in said, words
    assert find(folder, "train", box_score=0.4)[0][0].targets[:, 8].any()
    truth = {}                                                                # the first key frame's true boxes
    for row in (line.split(",") for line in open(movies / "annotations" / "ava_train_v2.2.csv")):
        truth.setdefault((row[0], row[1]), {})[tuple(map(float, row[2:6]))] = None
    only = find(folder, "train", predicted=False)[0]
    assert [list(map(tuple, f.boxes)) for f in only] == [list(boxes) for boxes in truth.values()]
    val = find(movies, "val")[0]                                              # predicted boxes only, of 0.8 or more
    lines = [line.split(",") for line in open(movies / "annotations" / "ava_val_predicted_boxes.csv")]
    assert [(f.video, f.second, *box) for f in val for box in f.boxes] == list(dict.fromkeys(
        (row[0], int(row[1]), *map(float, row[2:6])) for row in lines if float(row[7]) >= 0.8))
    with pytest.raises(ValueError, match="no box of its val part"):
        find(changed(movies, tmp_path / "more"), "val", box_score=1.0)
    with pytest.raises(FileNotFoundError, match="ava_val_predicted_boxes.csv"):
        find(tmp_path / "nothing", "val")


def test_boxes_follow_the_pixels(tmp_path):
    """A white person on black, through jitter, crop and flip: the box is where the white is."""
    (tmp_path / "frames").mkdir()
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[20:44, 50:80] = 255
    Image.fromarray(picture).save(tmp_path / "frames" / "only.png")
    frame = ava.KeyFrame("movie", 902, np.array([[50 / 96, 20 / 64, 80 / 96, 44 / 64]]), np.zeros((1, 80), bool))
    recipe = ava.replace(ava.AVA, **{**TINY, "data": str(tmp_path), "jitter": (40, 80)})
    clips = ava.Clips([frame], {"movie": np.array([b"only.png"] * 100)}, recipe, "train")
    kept = 0
    for epoch in range(30):
        item = clips[epoch, 0]
        white = np.argwhere(item["x"][0, 1].numpy() > 127)
        assert (len(item["boxes"]) == 1) == (len(white) > 0), epoch
        if len(white):
            (y1, x1), (y2, x2) = white.min(axis=0), white.max(axis=0)
            np.testing.assert_allclose(item["boxes"][0], [x1, y1, x2, y2], atol=1.6)
            kept += 1
    assert 10 < kept < 30


def test_views_and_empty_boxes(movies):
    """Some crops leave no box; the release keeps them. The centre view is the middle of the full one, boxes and all."""
    frames, media, _ = find(movies, "train", predicted=False)
    recipe = ava.replace(ava.AVA, **{**TINY, "data": str(movies), "predicted": False, "jitter": (40, 120)})
    dropped, kept = (ava.Clips(frames, media, ava.replace(recipe, drop_empty=drop), "train") for drop in (True, False))
    counts = []
    for epoch in range(6):
        few, all_of_them = dropped[epoch, 0], kept[epoch, 0]
        assert few["x"].shape == (3, 4, 32, 32) and torch.equal(few["x"], all_of_them["x"])
        boxes = all_of_them["boxes"]
        assert len(boxes) == len(frames[0].boxes) and (boxes >= 0).all() and (boxes <= 31).all()
        full = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        assert torch.equal(few["boxes"], boxes[full]) and torch.equal(few["targets"], all_of_them["targets"][full])
        assert (few["targets"].sum(1) == 2).all()
        counts.append(len(few["boxes"]))
        assert all(torch.equal(few[key], dropped[epoch, 0][key]) for key in ("x", "boxes", "targets"))
    assert len(set(counts)) > 1
    full = ava.Clips(frames, media, ava.replace(recipe, image_size=(120, 160)), "full")[0]
    centre = ava.Clips(frames, media, ava.replace(recipe, image_size=(120, 120)), "centre")[0]
    assert full["x"].shape == (3, 4, 120, 160) and centre["x"].shape == (3, 4, 120, 120)
    shifted = full["boxes"] - torch.tensor([20.0, 0, 20, 0])
    assert torch.allclose(centre["boxes"], shifted.clamp(0, 119)) and torch.equal(centre["x"], full["x"][..., 20:140])


def numbered(path, count, size=(64, 48)):
    """A movie whose frame i is grey of 37i % 256: made by a process of its own, as the workers of other tests fork."""
    subprocess.run([sys.executable, "-c", "import sys, numpy as np; from tools import synthetic\n"
                    "n, w, h = map(int, sys.argv[2:]); grey = (37 * np.arange(n) % 256).astype(np.uint8)\n"
                    "synthetic.write_video(sys.argv[1], np.broadcast_to(grey[:, None, None, None], (n, h, w, 3)))",
                    str(path), str(count), *map(str, size)], check=True, cwd=ROOT)


def test_movies_and_frames_on_disk_agree(tmp_path):
    """The clip around second 902 of a movie from 900 on, and of its frames, of which number 61 is the key frame."""
    numbered(tmp_path / "movie.mp4", 110)
    (tmp_path / "frames" / "movie").mkdir(parents=True)
    (tmp_path / "frame_lists").mkdir()
    names = [f"movie/movie_{i:06d}.png" for i in range(1, 111)]
    for i, name in enumerate(names):
        Image.new("RGB", (64, 48), (37 * i % 256,) * 3).save(tmp_path / "frames" / name)
    with open(tmp_path / "frame_lists" / "train.csv", "w") as f:
        f.write("original_vido_id video_id frame_id path labels\n")
        f.writelines(f'movie 0 {i} {name} ""\n' for i, name in reversed(list(enumerate(names))))
    frame, args = ava.KeyFrame("movie", 902, None, None), (8, 4, 900.0, (24, 32), str(tmp_path))
    listed = ava.find_media(str(tmp_path), "train")["movie"]
    clips = [ava.read_clip(media, frame, *args) for media in (str(tmp_path / "movie.mp4"), listed)]
    for (x, size), off in zip(clips, (4, 0)):                                 # the movie's colours are coded, with losses
        assert x.shape == (8, 3, 24, 32) and size == (48, 64)
        grey = [37 * (60 + offset) % 256 for offset in range(-16, 13, 4)]
        np.testing.assert_allclose(x.float().mean((1, 2, 3)), grey, rtol=0, atol=off)
    late = ava.KeyFrame("movie", 904, None, None)
    for media in (str(tmp_path / "movie.mp4"), listed):
        with pytest.raises(data.UnreadableFile, match="wanted|second 904"):
            ava.read_clip(media, late, *args)


def test_made_up_movies():
    """The same from the same seed; boxes are tight: along the motion they move, otherwise they stay."""
    movie, truth = synthetic.draw_movie(np.random.default_rng(5))
    again, _ = synthetic.draw_movie(np.random.default_rng(5))
    assert movie.shape == (120, 120, 160, 3) and np.array_equal(movie, again)
    assert {second for second, *_ in truth} == {902, 903, 904}
    moved = {1: [], 2: [], 3: [], 4: []}
    for seed in range(8):
        tracks = {}
        for _, box, labels, person in synthetic.draw_movie(np.random.default_rng(seed))[1]:
            assert 0 <= min(box) < max(box) <= 1 and 1 <= labels[0] <= 4 and 11 <= labels[1] <= 13
            tracks.setdefault((person, *labels), []).append(box)
        for (_, motion, shape), boxes in tracks.items():
            assert len(boxes) == 3
            if shape == 11:                                                   # circles: turning leaves their box alone
                moved[motion].append(np.ptp(np.array(boxes) * [160, 120, 160, 120], axis=0))
    assert all((x[:, [0, 2]] > 2).all() and (x[:, [1, 3]] <= 1.5).all() for x in [np.array(moved[1])])
    assert all((x[:, [1, 3]] > 2).all() and (x[:, [0, 2]] <= 1.5).all() for x in [np.array(moved[2])])
    assert (np.array(moved[3]) <= 1.5).all() and (np.array(moved[4]) > 1).all()


# ------------------------------------------------------------------------------------------------------- the script

# 16 key frames, one at a time: 16 steps per epoch, 32 in all; 4 key frames have no box left, one has 300 more.
FLAGS = ["--movie-start", 901, "--image-size", 32, "--jitter", 32, 48, "--frames", 4, "--sampling-rate", 2, "--batch-size", 1,
         "--epochs", 2, "--log-every", 1, "--workers", 0, "--drop-path", 0.2, "--dropout", 0.1, "--val-epochs", 1, "--init", ""]


@pytest.fixture(scope="session")
def script():
    """script(flag, ...) runs ava.main() here, on one thread as the processes do; returns what it printed."""
    def call(*flags):
        text, arguments, threads = io.StringIO(), sys.argv, torch.get_num_threads()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            sys.argv = ["ava.py", *map(str, flags)]
            torch.set_num_threads(1)
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                ava.main()
        finally:
            sys.argv = arguments
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return text.getvalue()
    return call


@pytest.fixture(scope="session")
def odd(movies, tmp_path_factory):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (300, 2, 2)), axis=1).reshape(-1, 4)
    return changed(movies, tmp_path_factory.mktemp("odd"), train_predicted_boxes=[
        f"train_001,0903,{','.join(f'{v:.4f}' for v in box)},{rng.integers(1, 8)},0.9" for box in corners],
        **{"train_v2.2": [f"train_00{i},0905,0.5,0.2,0.5,0.4,1,0" for i in range(4)]})


@pytest.fixture(scope="session")
def finished(odd, script, tmp_path_factory):
    """An uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp("detector") / "run"
    return out, script("--data", odd, "--out", out, *FLAGS)


def test_run(odd, finished):
    out, text = finished
    lines = [d for d in log_of(out) if "loss" in d]
    assert [d["step"] for d in lines] == list(range(1, 33))
    assert sum(d["boxes"] == 0 for d in lines) == 8 and max(d["boxes"] for d in lines) > 200
    for d in lines:
        assert (d["loss"] == d["grad_norm"] == 0) if d["boxes"] == 0 else (0 < d["loss"] < 1 and d["grad_norm"] > 0)
    assert [d["step"] for d in log_of(out) if "val_mAP" in d] == [16]
    for words in ("from scratch", "every 4th second", "file order", "of the untrained head", "centre view", "full view",
                  "stride 8", "16 key frames of 4 movies"):
        assert words in text, words
    names = ava.read_label_map(odd / "annotations" / "ava_action_list_v2.2_for_activitynet_2019.pbtxt")
    truth = ava.read_boxes(odd / "annotations" / "ava_val_v2.2.csv")
    excluded = ava.read_excluded(odd / "annotations" / "ava_val_excluded_timestamps_v2.2.csv")
    assert excluded == {"val_000,0904"}
    for view in ("centre", "full"):                                           # the csv is worth what was printed
        results, found = json.load(open(out / f"last_{view}.json")), ava.read_boxes(out / f"last_{view}.csv", scored=True)
        assert len(found.keys) == 4 * results["boxes"] and results["key_frames"] == 6
        again = ava.average_precisions(truth, found, names, excluded)
        assert np.nanmean(list(again.values())) == pytest.approx(results["mAP"], abs=1e-12)
        assert f"{view} view: mAP@0.5 {100 * results['mAP']:.2f}, of the untrained head" in text
    with Image.open(out / "last.png") as picture:
        colours = {tuple(c) for c in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    assert (255, 255, 255) in colours and {(0, 255, 0), (255, 165, 0)} & colours


def test_killed_stopped_and_resumed_is_bit_equal(odd, finished, script, tmp_path, monkeypatch):
    out, flags = tmp_path / "killed", ["--data", odd, "--out", tmp_path / "killed", *FLAGS, "--resume", "--save-minutes", "0.0001"]
    step = int(np.random.default_rng().integers(2, 12))
    runs.kill_at(step, out, "ava.py", *flags, "--workers", 1)                 # SIGKILL

    def lr_at(epoch, *rest):                                                  # the schedule, and SIGTERM when it comes to step 20
        if epoch * 16 == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(epoch, *rest)
    schedule = ava.lr_at
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(ava, "lr_at", lr_at)
        script(*flags)
    assert stopped.value.code == 128 + signal.SIGTERM and read_checkpoint(out / "last.pt")["step"] == 20
    assert f"resumed {out / 'last.pt'} at step 20" in script(*flags)
    assert_same_weights(finished[0], out)
    for name in ("last_centre.csv", "last_full.csv"):
        assert (out / name).read_text() == (finished[0] / name).read_text()
    assert read_checkpoint(out / "last.pt")["untrained"] == read_checkpoint(finished[0] / "last.pt")["untrained"]


def test_ranks_and_accumulation(odd, script, tmp_path):
    """Two ranks and accumulation average the same boxes as one batch, also where a clip has none: losses agree but for
    rounding. And two ranks test every key frame once, with the scores of one rank to the bit."""
    flags = ["--data", odd, *FLAGS, "--batch-size", 4, "--drop-path", 0, "--dropout", 0, "--epochs", 1, "--val-epochs", 0,
             "--no-baseline"]
    script("--out", tmp_path / "one", *flags)
    done = runs.run("ava.py", "--out", tmp_path / "two", *flags, "--device-batch", 1, processes=2)
    assert done.returncode == 0, done.stderr
    losses = [[d["loss"] for d in log_of(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    for view in ("centre", "full"):
        shutil.copy(tmp_path / "two" / "last.pt", tmp_path / "again.pt")
        script("--data", odd, "--eval", tmp_path / "again.pt", "--view", view, "--workers", 0, "--device-batch", 1,
               "--draw", tmp_path / f"{view}.png")
        for ending in ("csv", "json"):
            again = (tmp_path / f"again_{view}.{ending}").read_text()
            assert again == (tmp_path / "two" / f"last_{view}.{ending}").read_text()
        assert (tmp_path / f"{view}.png").exists()
    script("--data", odd, "--eval", tmp_path / "again.pt", "--match", "score", "--workers", 0)
    assert json.load(open(tmp_path / "again_centre.json"))["match"] == "score"


def test_starting_weights(movies, finished, script, tmp_path):
    """From a classifier of other classes only the head is new; a detector is taken over whole."""
    model = build_classifier({**read_checkpoint(finished[0] / "last.pt")["recipe"], "num_classes": 12})
    recipe = {**read_checkpoint(finished[0] / "last.pt")["recipe"], "num_classes": 12}
    torch.save({"model": model.state_dict(), "recipe": recipe}, tmp_path / "twelve.pt")
    for path, fresh in ((tmp_path / "twelve.pt", ["head.projection.weight", "head.projection.bias"]),
                        (finished[0] / "last.pt", [])):
        torch.manual_seed(1)
        detector, lines = ava.build(ava.replace(ava.AVA, **TINY)), []
        before = detector.model.head.projection.weight.clone()
        ava.start_weights(detector, ava.replace(ava.AVA, **TINY, init=str(path)), lines.append)
        assert f"new weights: {', '.join(fresh) or 'none'}" in lines
        wanted = before * 0.001 if fresh else read_checkpoint(path)["model"]["head.projection.weight"]
        assert torch.equal(detector.model.head.projection.weight, wanted)
        assert torch.equal(detector.model.norm.weight, read_checkpoint(path)["model"]["norm.weight"])


def test_refusals(movies, finished, script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    last = finished[0] / "last.pt"
    for error, words, flags in (
            (FileNotFoundError, "run pretrain.py first", ["--data", movies]),
            (ValueError, "jitter", ["--image-size", 112]),
            (ValueError, "--draw", ["--draw", "a.png"]),
            (ValueError, "which data", ["--eval", last, "--data", ""]),
            (ValueError, "go on with --resume", ["--data", movies, "--out", finished[0], "--init", ""]),
            (ValueError, "add --model mvit_tiny", ["--data", movies, "--init", last, "--recipe", "ava_mvitv2_s_16x4"]),
            (ValueError, "add --expand mlp", ["--data", movies, "--init", last, "--expand", "attn"]),
            (ValueError, "made by another recipe.*lr=1", ["--data", movies, "--out", finished[0], *FLAGS, "--resume", "--lr", 1]),
            (ValueError, "lasts|ends", ["--data", movies, *FLAGS, "--movie-start", 0, "--no-baseline"])):
        with pytest.raises(error, match=words):
            script(*flags)
    assert set(os.listdir(tmp_path)) <= {"out"}                               # of the last one, which had begun


def test_dry_run(script):
    """FLOPs as in Table 3; recomputing activations saves most of their memory."""
    text = script("--recipe", "ava_mvitv2_s_16x4", "--dry-run", "--expand", "mlp")
    assert "36,229,040 parameters, 71.41 GFLOPs" in text and "output grid 8x7x7" in text
    kept, less = map(float, re.search(r"blocks keep ([\d.]+) GiB .* with --checkpointing ([\d.]+)", text).groups())
    assert 0 < less < kept / 3
