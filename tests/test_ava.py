"""ava.py: RoIAlign, boxes, head and mAP against golden figures, the data, and the script."""
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ROOT, golden_input
from PIL import Image
from runs import assert_same_weights, log_of, read_checkpoint, run_well

import ava
import video
from models import build_classifier


@pytest.mark.parametrize("scale", [32, 16])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_golden(golden, scale, ratio):
    z = golden("ava_roi_align.npz")
    features = np.random.default_rng(7).standard_normal((2, 5, 10, 18), dtype=np.float32)
    out = ava.roi_align(*map(torch.from_numpy, (features, z["rois"])), 1 / scale, ratio=ratio)
    np.testing.assert_allclose(out, z[f"out_s{scale}_sr{ratio}"], rtol=0, atol=5e-6)
    assert ratio or not out[[3, 4, 5, 15]].any()              # empty and inverted boxes: exactly 0


@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_gradient(ratio):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 1, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 3, 5, 90, 70], [1, -40, 20, 60, 90], [1, 10, 10, 10, 50]]).double()
    align = lambda f: ava.roi_align(f, rois, 1 / 32, bins=2, ratio=ratio)
    assert torch.autograd.gradcheck(align, features)
    assert ava.roi_align(features, rois[:0], 1 / 32).shape == (0, 1, 7, 7)


def test_roi_align_gradient_repeats(two_threads):
    """Boxes of one clip share cells: their gradients are summed in one order on many threads."""
    torch.manual_seed(0)
    features = torch.randn(4, 14, 14, 768).permute(0, 3, 1, 2).requires_grad_()
    boxes = torch.rand(40, 4) * 100 + torch.tensor([0, 0, 100, 100])
    rois = torch.cat([torch.arange(40)[:, None] % 4, boxes], dim=1)
    loss = ava.roi_align(features, rois, 1 / 16).square().sum()
    first, *others = (torch.autograd.grad(loss, features, retain_graph=True)[0] for _ in range(6))
    assert all(torch.equal(first, other) for other in others)


def test_transform_boxes_golden():
    z = json.load(open(GOLDEN / "ava_box_transforms.json"))
    (W, H), boxes = z["image_wh"], np.array(z["normalised_boxes"])
    whole = ava.transform_boxes(boxes, (H, W), (H, W), (0, 0, H, W))
    np.testing.assert_allclose(whole, z["pixel_boxes_clipped"], rtol=1e-15, atol=0)
    sizes = {c["size"]: c["resized_wh"] for c in z["cases"] if c["kind"] == "test_full"}
    for case in z["cases"]:
        if case["kind"] == "train":
            rng = np.random.RandomState(case["seed"])
            (w, h), side, (low, high) = case["resized_wh"], case["crop"], case["jitter"]
            assert min(w, h) == round(1 / rng.uniform(1 / high, 1 / low))
            crop = (rng.randint(0, h - side), rng.randint(0, w - side), side, side)
            flip = case["flipped"]
        else:
            (w, h), side, flip = sizes[case["size"]], case["size"], False
            crop = (-(-(h - side) // 2), -(-(w - side) // 2), side, side)
            crop = (0, 0, h, w) if case["kind"] == "test_full" else crop
        found = ava.transform_boxes(boxes, (H, W), (h, w), crop, flip, per_axis=False)
        # the release scales by w / W in tests, by w and 1 / W in training: the last bit differs
        np.testing.assert_allclose(found, np.array(case["boxes"]), rtol=0, atol=2e-13)
    found = ava.transform_boxes(boxes.clip(0, 0.9), (100, 200), (50, 77), (0, 0, 50, 77))
    np.testing.assert_allclose(found, boxes.clip(0, 0.9) * [77, 50, 77, 50], rtol=1e-12)


@pytest.mark.parametrize("result, name, excluded, match", [
    ("detections", "detections", True, "file"),
    ("detections_shuffled", "detections_shuffled", True, "file"),
    ("detections_no_exclusion", "detections", False, "file"),
    ("detections_ties_stable_then_reversed", "detections_ties", True, "file"),
    ("", "detections_shuffled", True, "score")])
def test_mean_average_precision_golden(tmp_path, result, name, excluded, match):
    golden = GOLDEN / "ava_map"
    for table, file in (("actions", "label_map.pbtxt"), ("truth", "groundtruth.csv"),
                        ("excluded", "excluded_timestamps.csv")):
        shutil.copy(golden / file, tmp_path / ava.TABLES[table][0].format("val"))
    names, truth, keys = ava.read_truth(tmp_path)
    found = ava.read_boxes(golden / f"{name}.csv", scored=True)
    precisions = ava.average_precisions(truth, found, names, keys if excluded else (), match)
    mean = np.nanmean(list(precisions.values()))
    if match == "score":
        assert mean == pytest.approx(0.305928, abs=5e-7)
        return
    expected = json.load(open(golden / "expected.json"))["results"][result]
    np.testing.assert_allclose(list(precisions.values()), np.array(
        list(expected["AP"].values()), float), rtol=0, atol=1e-12)
    assert mean == pytest.approx(expected["mAP"], abs=1e-12)


@pytest.mark.slow
def test_detection_head_golden(golden, released, capsys):
    """Features, logits, loss and gradients of MViTv2-S, from a file of the release."""
    z = golden("ava_det_head.npz")
    recipe = ava.replace(ava.AVA, eval=released("mvitv2_s_detection"), data="somewhere")
    recipe, detector = ava.load_for_test(recipe, {"data"})
    ava.dry_run(recipe)
    assert "36,229,040 parameters, 71.41 GFLOPs" in capsys.readouterr().out        # Table 3
    rois = torch.from_numpy(z["b1_boxes"])
    features = detector.eval().feature_map(golden_input((1, 3, 16, 224, 224)))  # (1, 768, 7, 7)

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


TINY = ava.replace(ava.AVA, model="mvit_tiny", image_size=(32, 32), num_frames=4, sampling_rate=2,
                   jitter=(32, 40), workers=0, checkpointing=False, drop_path=0.0)


@pytest.mark.parametrize("count, width", [(0, 32), (1, 32), (700, 56)])
def test_any_number_of_boxes(count, width):
    """Every parameter gets a finite gradient, zero without boxes. Maps need no fixed size."""
    detector = ava.Detector(TINY).train()
    boxes = torch.rand(count, 4) * 30 + torch.tensor([0, 0, 10.0, 10])
    counts = torch.tensor([count // 3, count - count // 3])
    logits = detector(torch.randn(2, 3, 4, 32, width), boxes, counts)
    assert logits.shape == (count, 80)
    logits.square().sum().backward()
    grads = [p.grad for p in detector.parameters()]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
    assert all((grad != 0).any() for grad in grads[-2:]) == (count > 0)


@pytest.mark.parametrize("classes", [12, 80])
def test_starting_weights(tmp_path, classes):
    """From a classifier of other classes only the head is new. A detector is taken over whole."""
    stored = {**ava.model_recipe(TINY), "num_classes": classes}
    model, detector, path = build_classifier(stored), ava.Detector(TINY), str(tmp_path / "a.pt")
    torch.save({"model": model.state_dict(), "recipe": stored}, path)
    new = detector.model.head.projection.weight.clone() * TINY.head_init_scale
    ava.start_weights(detector, ava.replace(TINY, init=path), lambda line: None)
    new = new if classes == 12 else model.head.projection.weight
    assert torch.equal(detector.model.head.projection.weight, new)
    assert torch.equal(detector.model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def find(folder, split, **more):
    lines = []
    recipe = ava.replace(TINY, data=str(folder), **more)
    frames, _ = ava.find_key_frames(recipe, split, lines.append)
    return frames, [[np.flatnonzero(row).tolist() for row in f.targets] for f in frames], lines


def test_rows(tmp_path):
    """Equal boxes are one, with all labels. Rows that cannot be used are counted, not fatal."""
    good, box = "a,0902,0.1,0.2,0.3,0.4,", "0.1,0.2,0.3,0.4,1,0.9"
    bad = [f"a,0901,{box}", f"a,1799,{box}", f"nowhere,0902,{box}", good + "81,0.9", good + "0,0.9",
           "a,0902,0.3,0.2,0.1,0.4,1,0.9", "a,0902,0.3,nan,0.1,0.4,1,0.9"]
    tables = {"train_v2.2": [good + "3,7", "a,903,0.5,0.5,0.6,0.6,80,8"],
              "train_predicted_boxes": [good + "7,0.85", good + "-1,0.9", good + ",0.9",
                                        good + "9,0.5", "a,0902,0.1,0.2,0.3,0.5,,0.95", *bad],
              "val_predicted_boxes": [good + "1,0.8", good + "2,0.79"]}
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    (tmp_path / "videos" / "sub" / "a.mkv").touch()
    for name, lines in tables.items():
        (tmp_path / f"ava_{name}.csv").write_text("\n".join(lines) + "\n")
    frames, labels, said = find(tmp_path, "train")
    assert [frame[:2] for frame in frames] == [("a", 902), ("a", 903)]
    assert frames[0].boxes.tolist() == [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.5]]
    assert labels == [[[2, 6], []], [[79]]] and "7 rows" in said[0] and "a,0901" in said[0]
    assert find(tmp_path, "train", predicted=False)[1] == [[[2]], [[79]]]
    assert find(tmp_path, "val")[1:] == ([[[0]]], [])
    (tmp_path / "ava_val_predicted_boxes.csv").write_text("a,0902,0.1\n")
    with pytest.raises(ValueError, match="line 1.*a,0902,0.1"):
        find(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="ava_val_predicted_boxes.csv"):
        find(tmp_path / "videos", "val")


def still(folder, picture, boxes, **more):
    """clips(view) of one key frame: second 902 of a still movie, in frames on disk."""
    (folder / "frames").mkdir()
    Image.fromarray(picture).save(folder / "frames" / "only.png")
    frame = ava.KeyFrame("movie", 902, np.array(boxes), np.ones((len(boxes), 80), bool))
    recipe = ava.replace(TINY, data=str(folder), **more)
    return lambda view, **change: ava.Clips(
        [frame], {"movie": np.array([b"only.png"] * 100)}, ava.replace(recipe, **change), view)


def test_boxes_follow_the_pixels(tmp_path):
    """A white person on black, through jitter, crop and flip: the box is where the white is."""
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[20:44, 50:80] = 255
    clips = still(tmp_path, picture, [[50 / 96, 20 / 64, 80 / 96, 44 / 64]], jitter=(40, 80))
    counts = set()
    for epoch in range(30):
        item, released = clips("train")[epoch, 0], clips("train", drop_empty=False)[epoch, 0]
        white = np.argwhere(item["x"][0, 0, 1].numpy() > 127)
        assert item["x"].shape == (1, 3, 4, 32, 32) and torch.equal(item["x"], released["x"])
        assert len(item["boxes"]) == len(item["targets"]) == (len(white) > 0)
        assert len(released["boxes"]) == 1
        if len(white):
            (y1, x1), (y2, x2) = white.min(axis=0), white.max(axis=0)
            np.testing.assert_allclose(item["boxes"][0], [x1, y1, x2, y2], atol=1.6)
        counts.add(len(item["boxes"]))
    assert counts == {0, 1}


def test_views(tmp_path):
    """The center view is a part of the full one. An unreadable clip of a test has no box."""
    picture = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    clips = still(tmp_path, picture, [[0.1, 0.2, 0.5, 0.6], [0.0, 0.3, 0.9, 0.9]])
    full = clips("full", image_size=(120, 160))[0]
    center = clips("center", image_size=(120, 120))[0]
    assert torch.equal(center["x"], full["x"][..., 20:140])
    shifted = full["boxes"] - np.float32([20, 0, 20, 0])
    np.testing.assert_allclose(center["boxes"], shifted.clip(0, 119), atol=1e-4)
    (tmp_path / "frames" / "only.png").unlink()
    item = clips("center")[0]
    assert "902" in item["unreadable"][0][0] and item["count"] == [len(item["boxes"])] == [0]


def test_clip_around_the_key_frame(tmp_path, monkeypatch):
    """Frame i on disk is gray of i. Of a movie, the same moments are read."""
    (tmp_path / "frames" / "movie").mkdir(parents=True)
    (tmp_path / "frame_lists").mkdir()
    lines = ["header\n"]
    for i in reversed(range(130)):
        lines.append(f'movie 0 0 movie/movie_{i + 1:06d}.png ""\n')
        Image.new("RGB", (64, 48), (i, i, i)).save(tmp_path / "frames" / lines[-1].split()[3])
    (tmp_path / "frame_lists" / "train.csv").write_text("".join(lines))
    media = ava.find_media(tmp_path, "train")["movie"]
    frame, late = (ava.KeyFrame("movie", second, None, None) for second in (902, 905))
    monkeypatch.setattr(video, "read_moments", lambda path, times, min_size: times)
    monkeypatch.setattr(video, "picture_size", lambda path: (48, 64))
    for length, rate in ((8, 4), (40, 3), (16, 4)):           # the last two: release
        recipe = ava.replace(TINY, data=str(tmp_path), num_frames=length, sampling_rate=rate,
                             movie_start=900.0)
        places = list(range(60 - length * rate // 2, 60 + length * rate // 2, rate))
        x, size = ava.read_clip(recipe, media, frame, (24, 32))
        assert x.shape[1:] == (3, 24, 32) and size == (48, 64) and x[:, 0, 0, 0].tolist() == places
        times, _ = ava.read_clip(recipe, "movie.mp4", frame, (24, 32))
        assert times == pytest.approx([place / 30 for place in places])
        with pytest.raises(video.UnreadableFile, match="second 905.*wanted"):
            ava.read_clip(recipe, media, late, (24, 32))


# 8 key frames, one per step, so 32 steps. 2 key frames have no box left, one has 300 more.
FLAGS = ["--movie-start", 901, "--image-size", 32, "--jitter", 32, 48, "--frames", 4,
         "--sampling-rate", 2, "--batch-size", 1, "--epochs", 4, "--log-every", 1, "--workers", 0,
         "--drop-path", 0.2, "--dropout", 0.1, "--val-epochs", 2, "--init", ""]


@pytest.fixture(scope="session")
def movies(tmp_path_factory):
    """2 training and 2 validation movies in AVA's layout, with odd boxes in the training ones."""
    folder = tmp_path_factory.mktemp("ava")
    code = ("import sys; from tools import synthetic\n"
            "synthetic.MOVIES = {'train': 2, 'val': 2}\n"
            "synthetic.write_movies(sys.argv[1], 0)")
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT)
    with open(folder / "annotations" / "ava_train_predicted_boxes.csv", "a") as f:
        f.writelines(f"train_001,0903,0.{i},0.1,0.{i + 100},0.9,{i % 7 + 1},0.9\n"
                     for i in range(100, 400))
    with open(folder / "annotations" / "ava_train_v2.2.csv", "a") as f:
        f.writelines(f"train_00{i},0905,0.5,0.2,0.5,0.4,1,0\n" for i in range(2))
    return folder


@pytest.fixture(scope="session")
def finished(movies, tmp_path_factory):
    """An uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp("detector") / "run"
    return out, run_well("ava.py", "--data", movies, "--out", out, *FLAGS)


@pytest.mark.slow
def test_run(movies, finished):
    out, text = finished
    lines = [d for d in log_of(out) if "loss" in d]
    assert [d["step"] for d in lines] == list(range(1, 33))
    assert sum(d["boxes"] == 0 for d in lines) == 8 and max(d["boxes"] for d in lines) > 200
    assert all((d["loss"] > 0) == (d["grad_norm"] > 0) == (d["boxes"] > 0) for d in lines)
    assert [d["step"] for d in log_of(out) if "val_mAP" in d] == [16]
    names, truth, excluded = ava.read_truth(movies)
    for view in ("center", "full"):                           # the csv is worth what was printed
        results = json.load(open(out / f"last_{view}.json"))
        found = ava.read_boxes(out / f"last_{view}.csv", scored=True)
        assert len(found) == 4 * results["boxes"] and results["key_frames"] == 6
        again = list(ava.average_precisions(truth, found, names, excluded).values())
        assert np.nanmean(again) == pytest.approx(results["mAP"], abs=1e-12)
        assert f"{view} view: mAP@0.5 {100 * results['mAP']:.2f}, of the untrained head" in text
    pixels = np.asarray(Image.open(out / "last.png")).reshape(-1, 3).tolist()
    assert [255, 255, 255] in pixels and [255, 165, 0] in pixels


@pytest.mark.slow
def test_killed_stopped_and_resumed_is_bit_equal(movies, finished, tmp_path):
    out = tmp_path / "killed"
    flags = ["--data", movies, "--out", out, *FLAGS, "--resume", "--save-minutes", "0.0001"]
    for low, sent, workers in ((2, signal.SIGKILL, 1), (14, signal.SIGTERM, 0)):
        step = int(np.random.default_rng().integers(low, low + 10))
        runs.kill_at(step, out, "ava.py", *flags, "--workers", workers, sent=sent)
        assert 0 < read_checkpoint(out / "last.pt")["step"] < 32
    run_well("ava.py", *flags)
    assert_same_weights(finished[0], out)
    for name in ("last_center.csv", "last_full.csv"):
        assert (out / name).read_text() == (finished[0] / name).read_text()
    untrained = read_checkpoint(out / "last.pt")["untrained"]
    assert untrained == read_checkpoint(finished[0] / "last.pt")["untrained"] != {}


@pytest.mark.slow
def test_ranks_and_accumulation(movies, tmp_path):
    """Two ranks and accumulation average the same boxes as one batch, also where a clip has none.
    Two ranks test every key frame once, with bit-identical scores."""
    flags = ["--data", movies, *FLAGS, "--batch-size", 4, "--drop-path", 0, "--dropout", 0,
             "--epochs", 2, "--val-epochs", 0, "--no-baseline", "--device-batch", 1]
    run_well("ava.py", "--out", tmp_path / "one", *flags, "--device-batch", 4)
    run_well("ava.py", "--out", tmp_path / "two", *flags, processes=2)
    one, two = ([d["loss"] for d in log_of(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-5)
    shutil.copy(tmp_path / "two" / "last.pt", tmp_path / "again.pt")
    for view in ("center", "full"):
        run_well("ava.py", "--eval", tmp_path / "again.pt", "--view", view, "--workers", 0,
                 "--device-batch", 1, "--draw", tmp_path / f"{view}.png")
        for ending in ("csv", "json"):
            again = (tmp_path / f"again_{view}.{ending}").read_text()
            assert again == (tmp_path / "two" / f"last_{view}.{ending}").read_text()


@pytest.mark.slow
def test_errors(movies, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words, *flags in (["out/finetune"], ["jitter", "--image-size", 112],
                          ["--movie-start 0", *FLAGS, "--movie-start", 0, "--no-baseline"]):
        assert words in runs.refusal(monkeypatch, capsys, "ava", "--data", movies, *flags)
