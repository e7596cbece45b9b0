"""ava.py: RoIAlign, boxes, head and mAP against golden figures, the data, and the script."""
import json
import os
import shutil
import signal

import engine

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from conftest import GOLDEN, apart, golden_input
from PIL import Image
from runs import assert_same_weights, log_of

import ava
import video
from checkpoints import read_checkpoint
from models import build_classifier
from tools import synthetic

# ------------------------------------------------------------------------------------------ golden

@pytest.mark.parametrize("scale", [32, 16])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_golden(golden, scale, ratio):
    z = golden("ava_roi_align.npz")
    rng = np.random.default_rng(7)
    features = torch.from_numpy(rng.standard_normal((2, 5, 10, 18), dtype=np.float32))
    assert features.double().sum().item() == pytest.approx(float(z["feat_sum"]), abs=1e-4)
    out = ava.roi_align(features, torch.from_numpy(z["rois"]), 1 / scale, ratio=ratio).numpy()
    np.testing.assert_allclose(out, z[f"out_s{scale}_sr{ratio}"], rtol=0, atol=5e-6)
    if ratio == 0:                                            # empty and inverted boxes: exactly 0
        assert not out[[3, 4, 5, 15]].any()


@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_gradient(ratio):
    """Against finite differences; and no gradient outside of what the boxes see."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 1, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 3, 5, 90, 70], [1, -40, 20, 60, 300], [1, 10, 10, 10, 50]]).double()
    align = lambda f: ava.roi_align(f, rois, 1 / 32, bins=3, ratio=ratio)
    assert torch.autograd.gradcheck(align, features)
    rois = torch.tensor([[1, 0, 0, 20, 20]], dtype=torch.float64)
    grad, = torch.autograd.grad(align(features).sum(), features)
    assert grad[0].abs().max() == 0 and grad[1, :, 0, 0].min() > 0
    assert grad[1, :, 2:].abs().max() == 0
    assert ava.roi_align(features, rois[:0], 1 / 32).shape == (0, 1, 7, 7)


@pytest.mark.slow
def test_roi_align_gradient_repeats(two_threads):
    """Boxes of one clip share cells: their gradients are summed in one order on many threads."""
    torch.manual_seed(0)
    features = torch.randn(4, 14, 14, 768).permute(0, 3, 1, 2).requires_grad_()
    corners = torch.rand(40, 2) * 100
    rois = torch.cat([torch.arange(40)[:, None] % 4, corners, corners + 50], dim=1)
    gradients = [torch.autograd.grad(ava.roi_align(features, rois, 1 / 16).square().sum(),
                                     features)[0] for _ in range(10)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_transform_boxes_golden():
    z = json.loads((GOLDEN / "ava_box_transforms.json").read_text())
    (W, H), boxes = z["image_wh"], np.array(z["normalised_boxes"])
    whole = ava.transform_boxes(boxes, (H, W), (H, W), (0, 0, H, W))
    np.testing.assert_allclose(whole, z["pixel_boxes_clipped"], rtol=1e-15, atol=0)
    sizes = {c["size"]: c["resized_wh"] for c in z["cases"] if c["kind"] == "test_full"}
    for case in z["cases"]:
        if case["kind"] == "train":
            rng = np.random.RandomState(case["seed"])
            (w, h), side, (low, high) = case["resized_wh"], case["crop"], case["jitter"]
            assert min(w, h) == round(1 / rng.uniform(1 / high, 1 / low))
            top, left = rng.randint(0, h - side), rng.randint(0, w - side)
            crop, flip = (top, left, side, side), rng.uniform() < 0.5
            assert flip == case["flipped"]
        else:
            (w, h), side, flip = sizes[case["size"]], case["size"], False
            crop = (-(-(h - side) // 2), -(-(w - side) // 2), side, side)
            crop = (0, 0, h, w) if case["kind"] == "test_full" else crop
        found = ava.transform_boxes(boxes, (H, W), (h, w), crop, flip, per_axis=False)
        # the release scales by w / W in tests, by w and 1 / W in training: the last bit differs
        np.testing.assert_allclose(found, np.array(case["boxes"]), rtol=0, atol=2e-13)


def test_transform_boxes_per_axis_and_flip():
    """A box keeps its share of the picture. Flipped twice it is itself. Outside it has no area."""
    boxes = np.array([[0.1, 0.2, 0.5, 0.6], [0.0, 0.3, 0.2, 0.9], [0.9, 0.9, 0.95, 0.95]])
    found = ava.transform_boxes(boxes, (100, 200), (50, 77), (0, 0, 50, 77))
    np.testing.assert_allclose(found, boxes * [77, 50, 77, 50], rtol=1e-12)
    once, plain = (ava.transform_boxes(boxes, (100, 200), (100, 200), (10, 20, 60, 100), flip=flip)
                   for flip in (True, False))
    np.testing.assert_allclose(99 - once[:, [2, 0]], plain[:, [0, 2]], atol=1e-12)
    assert np.prod(plain[:, 2:] - plain[:, :2], axis=1)[2] == 0
    assert (plain[:2, 2:] > plain[:2, :2]).all()


MAP = GOLDEN / "ava_map"


@pytest.mark.parametrize("result, name, excluded, match", [
    ("detections", "detections", True, "file"),
    ("detections_shuffled", "detections_shuffled", True, "file"),
    ("detections_no_exclusion", "detections", False, "file"),
    ("detections_ties_stable_then_reversed", "detections_ties", True, "file"),
    ("", "detections", True, "score"), ("", "detections_shuffled", True, "score")])
def test_mean_average_precision_golden(result, name, excluded, match):
    """Best score first, the order of the file does not matter. Figure: golden data's README."""
    names = ava.read_label_map(MAP / "label_map.pbtxt")
    truth, found = (ava.read_boxes(MAP / f"{file}.csv", file == name)
                    for file in ("groundtruth", name))
    keys = ava.read_excluded(MAP / "excluded_timestamps.csv") if excluded else ()
    precisions = ava.average_precisions(truth, found, names, keys, match)
    mean = np.nanmean(list(precisions.values()))
    if match == "score":
        assert mean == pytest.approx(0.305928, abs=5e-7)
        return
    expected = json.loads((MAP / "expected.json").read_text())["results"][result]
    assert [names[label] for label in precisions] == list(expected["AP"])
    np.testing.assert_allclose(list(precisions.values()), np.array(
        list(expected["AP"].values()), float), rtol=0, atol=1e-12)
    assert mean == pytest.approx(expected["mAP"], abs=1e-12)


@pytest.mark.slow
def test_detection_head_golden(golden, released):
    """Features, logits, loss and gradients of MViTv2-S on boxes, from a file of the release."""
    z = golden("ava_det_head.npz")
    recipe = ava.replace(ava.AVA, eval=released("mvitv2_s_detection"), data="somewhere")
    recipe, detector = ava.load_for_test(recipe, {"data"}, lambda line: None)
    assert (recipe.model, recipe.image_size, recipe.num_frames, recipe.expand) == (
        "mvitv2_s", (224, 224), 16, "mlp")
    assert sum(p.numel() for p in detector.eval().parameters()) == 36_229_040
    rois = torch.from_numpy(z["b1_boxes"])
    features = detector.feature_map(golden_input((1, 3, 16, 224, 224)))       # (1, 768, 7, 7)

    def near(found, name):
        np.testing.assert_allclose(found.detach(), z[name], rtol=0, atol=1e-5)
    near(features[:, :8], "b1_tmean_first8channels")
    assert detector.scale == 1 / 32
    for stride in (16, 32):
        detector.scale = 1 / stride
        aligned = ava.roi_align(features, rois, detector.scale)
        near(aligned[:, 0], f"b1_s{stride}_roi_first7x7")
        near(aligned.amax((2, 3)), f"b1_s{stride}_roi_feature")
        logits = detector.classify(features, rois)
        near(logits, f"b1_s{stride}_logits")
        near(logits.sigmoid(), f"b1_s{stride}_scores")
    targets = torch.zeros_like(logits)
    targets[z["b1_s32_labels_rows"], z["b1_s32_labels_cols"]] = 1
    loss = F.binary_cross_entropy_with_logits(logits, targets)
    assert loss.item() == pytest.approx(float(z["b1_s32_loss"]), abs=1e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in detector.model.named_parameters()}
    for name, norm, first in zip(z["grad_names"], z["grad_norms"], z["grad_first4"]):
        gradient = gradients[str(name)]
        assert gradient.double().norm().item() == pytest.approx(norm, rel=1e-4), name
        np.testing.assert_allclose(gradient.flatten()[:4], first, rtol=1e-3, atol=1e-6)
    total = sum(g.double().square().sum() for g in gradients.values() if g is not None) ** 0.5
    assert total.item() == pytest.approx(float(z["grad_total_norm"]), rel=1e-4)


TINY = dict(model="mvit_tiny", image_size=(32, 32), num_frames=4, sampling_rate=2, workers=0,
            jitter=(32, 40), checkpointing=False, drop_path=0.0, data="", movie_start=901.0)


@pytest.mark.parametrize("count", [0, 1, 700])
def test_any_number_of_boxes(count):
    """Every parameter gets a finite gradient, zero without boxes. Maps need no fixed size."""
    torch.manual_seed(0)
    detector = ava.build(ava.replace(ava.AVA, **TINY)).train()
    rois = torch.rand(count, 5) * 30 + torch.tensor([0, 0, 0, 10.0, 10])
    rois[:, 0] = torch.randint(2, (count,))
    for shape in ((2, 3, 4, 32, 32), (2, 3, 4, 32, 56)):
        detector.zero_grad()
        logits = detector(torch.randn(shape), rois)
        assert logits.shape == (count, 80)
        F.binary_cross_entropy_with_logits(
            logits, torch.zeros_like(logits), reduction="sum").backward()
        grads = [p.grad for p in detector.parameters()]
        assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
        assert all((grad != 0).any() for grad in grads[-2:]) == (count > 0)


# --------------------------------------------------------------------------------------------- data

def write_movies(folder):
    """At half the rate, which is drawn in half the time."""
    synthetic.MOVIES, synthetic.FPS = {"train": 2, "val": 2}, 15
    synthetic.write_movies(folder, 0)


@pytest.fixture(scope="session")
def movies(tmp_path_factory):
    """2 training and 2 validation movies in AVA's layout, with 6 key frames each."""
    folder = tmp_path_factory.mktemp("ava")
    apart(write_movies, folder)
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
    recipe, lines = ava.replace(ava.AVA, **{**TINY, "data": str(folder), **more}), []
    frames, media = ava.find_key_frames(recipe, split, lines.append)
    return frames, media, "\n".join(lines)


def test_clip_around_the_key_frame():
    for num_frames, stride, offsets in ((40, 3, range(-60, 58, 3)), (16, 4, range(-32, 29, 4))):
        assert ava.clip_offsets(num_frames, stride) == offsets and offsets[num_frames // 2] == 0


def test_rows_that_cannot_be_used_are_counted_and_named(movies, tmp_path):
    before, _, silence = find(movies, "train")
    assert silence == ""
    good, box = "train_000,0902,0.1,0.2,0.3,0.4,", "0.1,0.2,0.3,0.4,1,0.9"
    rows = [*(good + end for end in ("3,0.95", "7,0.85", "-1,0.9", ",0.9", "9,0.5")),  # one box
            "train_000,902,0.10,0.2,0.3,0.4,5,0.95",                # written otherwise: another box
            f"train_000,0901,{box}", f"train_000,1799,{box}", f"nowhere,0902,{box}",
            "train_000,0902,0.3,0.2,0.1,0.4,1,0.9", "train_000,0902,0.3,nan,0.1,0.4,1,0.9",
            "train_000,0902,41.0,22.0,96.5,118.0,1,0.9",
            good + "81,0.9", good + "0,0.9", "train_000,0902,0.1", "video,second,x,y,x,y,a,b"]
    folder = changed(movies, tmp_path, train_predicted_boxes=rows)
    frames, _, said = find(folder, "train")
    assert [frame[:2] for frame in frames] == [frame[:2] for frame in before]
    assert np.array_equal(frames[0].boxes, [*before[0].boxes, *[(0.1, 0.2, 0.3, 0.4)] * 2])
    assert [np.flatnonzero(row).tolist() for row in frames[0].targets[-2:]] == [[2, 6], [4]]
    assert ava.fingerprint_of(frames[1:]) == ava.fingerprint_of(before[1:])
    for words in ("left out, second outside 902 to 1798: 2", "left out, box inverted: 2",
                  "left out, class outside 1 to 80: 2", "score or person: 2",
                  "persons count as missed): 1", "nowhere", "not pixels: 1"):
        assert words in said, words
    assert find(folder, "train", box_score=0.4)[0][0].targets[:, 8].any()
    truth = {}                                                      # the true boxes of key frames
    table = (folder / "annotations" / "ava_train_v2.2.csv").read_text()
    for row in (line.split(",") for line in table.splitlines()):
        truth.setdefault((row[0], row[1]), {})[tuple(map(float, row[2:6]))] = None
    only = find(folder, "train", predicted=False)[0]
    assert [list(map(tuple, f.boxes)) for f in only] == [list(boxes) for boxes in truth.values()]
    val, path = find(movies, "val")[0], movies / "annotations" / "ava_val_predicted_boxes.csv"
    lines = path.read_text().splitlines()
    rows = [row for row in (line.split(",") for line in lines) if float(row[7]) >= 0.8]
    assert [(f.movie, f.second, *box) for f in val for box in f.boxes] == list(dict.fromkeys(
        (row[0], int(row[1]), *map(float, row[2:6])) for row in rows))
    with pytest.raises(ValueError, match="no box"):
        find(folder, "val", box_score=1.0)
    with pytest.raises(FileNotFoundError, match="no data folder"):
        find(tmp_path / "nothing", "val")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="ava_val_predicted_boxes.csv"):
        find(tmp_path / "nothing", "val")


def test_boxes_follow_the_pixels(tmp_path):
    """A white person on black, through jitter, crop and flip: the box is where the white is."""
    (tmp_path / "frames").mkdir()
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[20:44, 50:80] = 255
    Image.fromarray(picture).save(tmp_path / "frames" / "only.png")
    boxes = np.array([[50 / 96, 20 / 64, 80 / 96, 44 / 64]])
    frame = ava.KeyFrame("movie", 902, boxes, np.zeros((1, 80), bool))
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
    """Some crops leave no box. The release keeps it. The center view is a part of the full one."""
    frames, media, _ = find(movies, "train", predicted=False)
    recipe = ava.replace(ava.AVA, **{**TINY, "data": str(movies), "jitter": (40, 120)})
    dropped, kept = (ava.Clips(frames, media, ava.replace(recipe, drop_empty=drop), "train")
                     for drop in (True, False))
    counts = set()
    for epoch in range(6):
        few, whole, again = dropped[epoch, 0], kept[epoch, 0], dropped[epoch, 0]
        assert few["x"].shape == (3, 4, 32, 32) and torch.equal(few["x"], whole["x"])
        assert torch.equal(few["x"], again["x"]) and torch.equal(few["boxes"], again["boxes"])
        boxes = whole["boxes"]
        assert len(boxes) == len(frames[0].boxes) and boxes.min() >= 0 and boxes.max() <= 31
        full = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        assert torch.equal(few["boxes"], boxes[full])
        assert torch.equal(few["targets"], whole["targets"][full])
        assert (few["targets"].sum(1) == 2).all()
        counts.add(len(few["boxes"]))
    assert len(counts) > 1
    full = ava.Clips(frames, media, ava.replace(recipe, image_size=(120, 160)), "full")[0]
    center = ava.Clips(frames, media, ava.replace(recipe, image_size=(120, 120)), "center")[0]
    assert full["x"].shape == (3, 4, 120, 160)
    assert torch.equal(center["x"], full["x"][..., 20:140])
    shifted = full["boxes"] - torch.tensor([20.0, 0, 20, 0])
    assert torch.allclose(center["boxes"], shifted.clamp(0, 119))


def test_movies_and_frames_on_disk_agree(tmp_path):
    """The clip around second 902 of a movie from 900 on, and of its frames. Frame i is gray of
    37i % 256."""
    gray, path = (37 * np.arange(110) % 256).astype(np.uint8), str(tmp_path / "movie.mp4")
    movie = np.broadcast_to(gray[:, None, None, None], (110, 48, 64, 3))
    apart(synthetic.write_video, path, movie)
    (tmp_path / "frames" / "movie").mkdir(parents=True)
    (tmp_path / "frame_lists").mkdir()
    names = [f"movie/movie_{i:06d}.png" for i in range(1, 111)]
    for i, name in enumerate(names):
        Image.new("RGB", (64, 48), (37 * i % 256,) * 3).save(tmp_path / "frames" / name)
    with open(tmp_path / "frame_lists" / "train.csv", "w") as f:
        f.write("original_vido_id video_id frame_id path labels\n")
        f.writelines(f'movie 0 0 {name} ""\n' for name in reversed(names))
    args = 8, 4, 900.0, (24, 32), str(tmp_path)
    listed = ava.find_media(str(tmp_path), "train")["movie"]
    for media, tolerance in ((path, 4), (listed, 0)):                     # coding has losses
        x, size = ava.read_clip(media, ava.KeyFrame("movie", 902, None, None), *args)
        assert x.shape == (8, 3, 24, 32) and size == (48, 64)
        gray = [37 * (60 + offset) % 256 for offset in range(-16, 13, 4)]
        np.testing.assert_allclose(x.float().mean((1, 2, 3)), gray, rtol=0, atol=tolerance)
        with pytest.raises(video.UnreadableFile, match="second 904.*wanted"):
            ava.read_clip(media, ava.KeyFrame("movie", 904, None, None), *args)


# --------------------------------------------------------------------------------------- the script

# 8 key frames, one per step, so 32 steps. 2 key frames have no box left, one has 300 more.
FLAGS = ["--movie-start", 901, "--image-size", 32, "--jitter", 32, 48, "--frames", 4,
         "--sampling-rate", 2, "--batch-size", 1, "--epochs", 4, "--log-every", 1, "--workers", 0,
         "--drop-path", 0.2, "--dropout", 0.1, "--val-epochs", 2, "--init", ""]


def script(*flags):
    return runs.run_well("ava.py", *flags)


@pytest.fixture(scope="session")
def odd(movies, tmp_path_factory):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (300, 2, 2)), axis=1).reshape(-1, 4)
    return changed(movies, tmp_path_factory.mktemp("odd"), **{
        "train_predicted_boxes": [f"train_001,0903,{','.join(f'{v:.4f}' for v in box)},"
                                  f"{rng.integers(1, 8)},0.9" for box in corners],
        "train_v2.2": [f"train_00{i},0905,0.5,0.2,0.5,0.4,1,0" for i in range(2)]})


@pytest.fixture(scope="session")
def finished(odd, tmp_path_factory):
    """An uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp("detector") / "run"
    return out, script("--data", odd, "--out", out, *FLAGS)


@pytest.mark.slow
def test_run(odd, finished):
    out, text = finished
    lines = [d for d in log_of(out) if "loss" in d]
    assert [d["step"] for d in lines] == list(range(1, 33))
    assert sum(d["boxes"] == 0 for d in lines) == 8 and max(d["boxes"] for d in lines) > 200
    assert all((d["loss"] > 0) == (d["grad_norm"] > 0) == (d["boxes"] > 0) for d in lines)
    assert [d["step"] for d in log_of(out) if "val_mAP" in d] == [16]
    for words in ("scratch", "every 4th second", "file order", "stride 8", "8 key frames of 2"):
        assert words in text, words
    names = ava.read_label_map(ava.locate(odd, "actions"))
    truth = ava.read_boxes(ava.locate(odd, "truth", "val"))
    excluded = ava.read_excluded(ava.locate(odd, "excluded", "val"))
    assert excluded == {"val_000,0904"}
    for view in ("center", "full"):                           # the csv is worth what was printed
        results = json.loads((out / f"last_{view}.json").read_text())
        found = ava.read_boxes(out / f"last_{view}.csv", scored=True)
        assert len(found) == 4 * results["boxes"] and results["key_frames"] == 6
        again = list(ava.average_precisions(truth, found, names, excluded).values())
        assert np.nanmean(again) == pytest.approx(results["mAP"], abs=1e-12)
        assert f"{view} view: mAP@0.5 {100 * results['mAP']:.2f}, of the untrained head" in text
    with Image.open(out / "last.png") as picture:
        colors = {tuple(c) for c in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    assert (255, 255, 255) in colors and {(0, 255, 0), (255, 165, 0)} & colors


@pytest.mark.slow
def test_killed_stopped_and_resumed_is_bit_equal(odd, finished, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    flags = ["--data", odd, "--out", out, *FLAGS, "--resume",
             "--save-minutes", "0.0001"]
    step = int(np.random.default_rng().integers(2, 12))
    runs.kill_at(step, out, "ava.py", *flags, "--workers", 1)             # SIGKILL

    def lr_at(epoch, *rest):                                  # SIGTERM when it comes to step 20
        if epoch * 8 == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(epoch, *rest)
    schedule = engine.lr_at
    with monkeypatch.context() as patch:
        patch.setattr(engine, "lr_at", lr_at)
        assert runs.run("ava.py", *flags).returncode == 128 + signal.SIGTERM
    assert read_checkpoint(out / "last.pt")["step"] == 20
    assert "at step 20" in script(*flags)
    assert_same_weights(finished[0], out)
    for name in ("last_center.csv", "last_full.csv"):
        assert (out / name).read_text() == (finished[0] / name).read_text()
    untrained = read_checkpoint(finished[0] / "last.pt")["untrained"]
    assert read_checkpoint(out / "last.pt")["untrained"] == untrained and len(untrained) == 2


@pytest.mark.slow
def test_signal_between_micro_batches(odd, tmp_path, monkeypatch):
    """The unfinished step is discarded."""
    normalize, calls = ava.data.normalize, []

    def signal_in_the_second_step(*args):
        calls.append(0)
        if len(calls) == 6:                                   # of 4 micro-batches each
            os.kill(os.getpid(), signal.SIGTERM)
        return normalize(*args)
    monkeypatch.setattr(ava.data, "normalize", signal_in_the_second_step)
    done = runs.run("ava.py", "--data", odd, "--out", tmp_path, *FLAGS, "--batch-size", 4,
                    "--device-batch", 1, "--no-baseline")
    assert done.returncode == 128 + signal.SIGTERM and len(calls) == 6
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1


@pytest.mark.slow
def test_ranks_and_accumulation(odd, tmp_path):
    """Two ranks and accumulation average the same boxes as one batch, also where a clip has none.
    Two ranks test every key frame once, with bit-identical scores."""
    flags = ["--data", odd, *FLAGS, "--batch-size", 4, "--drop-path", 0, "--dropout", 0,
             "--epochs", 2, "--val-epochs", 0, "--no-baseline", "--device-batch", 1]
    script("--out", tmp_path / "one", *flags, "--device-batch", 4)
    runs.run_well("ava.py", "--out", tmp_path / "two", *flags, processes=2)
    losses = [[d["loss"] for d in log_of(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    shutil.copy(tmp_path / "two" / "last.pt", tmp_path / "again.pt")
    for view in ("center", "full"):
        script("--data", odd, "--eval", tmp_path / "again.pt", "--view", view, "--workers", 0,
               "--device-batch", 1, "--draw", tmp_path / f"{view}.png")
        files = [tmp_path / f"again_{view}", tmp_path / f"two/last_{view}"]
        assert len({file.with_suffix(".csv").read_text() for file in files}) == 1
        again, result = (json.loads(file.with_suffix(".json").read_text()) for file in files)
        assert again.pop("about")["command"] != result.pop("about")["command"]
        assert again == result
        assert (tmp_path / f"{view}.png").exists()
    script("--data", odd, "--eval", tmp_path / "again.pt", "--match", "score", "--workers", 0)
    assert json.loads((tmp_path / "again_center.json").read_text())["match"] == "score"


def test_starting_weights(tmp_path):
    """From a classifier of other classes only the head is new. A detector is taken over whole."""
    torch.manual_seed(1)
    recipe = ava.replace(ava.AVA, **TINY)
    for classes in (12, 80):
        stored = {**ava.model_recipe(recipe), "num_classes": classes}
        model, path = build_classifier(stored), tmp_path / f"{classes}.pt"
        torch.save({"model": model.state_dict(), "recipe": stored}, path)
        detector = ava.build(recipe)
        new = detector.model.head.projection.weight.clone() * recipe.head_init_scale
        ava.start_weights(detector, ava.replace(recipe, init=str(path)), lambda line: None)
        expected = new if classes == 12 else model.head.projection.weight
        assert torch.equal(detector.model.head.projection.weight, expected)
        assert torch.equal(detector.model.blocks[0].attn.qkv.weight,
                           model.blocks[0].attn.qkv.weight)


@pytest.mark.slow
def test_errors(movies, finished, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    out, data = finished[0], ["--data", movies]
    last = out / "last.pt"
    for words, flags in (
            ("pretrain.py", data),
            ("jitter", ["--image-size", 112]),
            ("--draw", ["--draw", "a.png"]),
            ("--data", ["--eval", last, "--data", ""]),
            ("--resume", [*data, "--out", out, "--init", ""]),
            ("--model mvit_nano",
             [*data, "--init", last, "--recipe", "ava_mvitv2_s_16x4"]),
            ("--expand mlp", [*data, "--init", last, "--expand", "attn"]),
            ("lr=1", [*data, "--out", out, *FLAGS, "--resume", "--lr", 1]),
            ("--movie-start 0", [*data, *FLAGS, "--movie-start", 0])):
        assert words in runs.refusal(monkeypatch, capsys, "ava", *flags, "--no-baseline")
    assert set(os.listdir(tmp_path)) <= {"out"}               # of the last one, which had begun


@pytest.mark.slow
def test_dry_run():
    """FLOPs as in Table 3."""
    text = script("--recipe", "ava_mvitv2_s_16x4", "--dry-run", "--expand", "mlp")
    assert "36,229,040 parameters, 71.41 GFLOPs" in text and "output grid 8x7x7" in text
