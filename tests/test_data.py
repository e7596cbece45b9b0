"""data.py: crops, samples, batches, loaders and their faults, views for a test, --check."""
import functools
import hashlib
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, in_this_process
from PIL import Image
from test_video import cut_off, expected_numbers, read_numbers, write_video

import data
import layouts
import masking
import video

# ------------------------------------------------------------------------------------------- crops


def test_crop_box_stays_inside_and_follows_its_law():
    rng, areas, logs = random.Random(0), [], []
    for _ in range(4000):
        top, left, h, w = data.random_resized_crop_box(1000, 1000, rng, (0.08, 0.5))
        assert 0 <= top <= 1000 - h and 0 <= left <= 1000 - w and h > 0 and w > 0
        areas.append(h * w / 1e6)
        logs.append(np.log(w / h))
    # With these limits every first box fits, so both draws are uniform: 4 standard errors.
    assert abs(np.mean(areas) - 0.29) < 4 * 0.42 / 12 ** 0.5 / 4000 ** 0.5
    assert abs(np.mean(logs)) < 4 * 2 * np.log(4 / 3) / 12 ** 0.5 / 4000 ** 0.5
    assert min(areas) > 0.079 and max(areas) < 0.501
    assert max(abs(np.array(logs))) < np.log(4 / 3) + 0.01


def test_crop_box_falls_back_to_the_center():
    draw = data.random_resized_crop_box
    assert draw(10, 100, random.Random(0), (0.9, 1)) == (0, 43, 10, 13)
    assert draw(100, 10, random.Random(0), (0.9, 1)) == (43, 0, 13, 10)


def test_crop_resize_is_plain_bilinear_and_pil_bicubic():
    clip = np.random.default_rng(0).integers(0, 256, (3, 3, 50, 70), dtype=np.uint8)
    clip, box, size = torch.from_numpy(clip), (5, 7, 41, 32), (16, 24)
    for rows, antialias in ((32, False), (41, True)):    # to half the height, and to less
        exact = F.interpolate(clip[..., 5:5 + rows, 7:39].double(), size, mode="bilinear",
                              align_corners=False, antialias=antialias)
        result = data.crop_resize(clip, (5, 7, rows, 32), size)
        assert result.shape == (3, 3, 16, 24) and result.dtype == torch.uint8
        assert (result.double() - exact).abs().max() <= 0.5 + 1e-4
    image = Image.fromarray(clip[0].permute(1, 2, 0).numpy())
    reference = np.asarray(image.crop((7, 5, 39, 46)).resize((24, 16), Image.BICUBIC))
    result = data.crop_resize(image, box, size)
    assert np.array_equal(result.permute(1, 2, 0).numpy(), reference)


# ----------------------------------------------------------------------------------------- samples


def random_mask(rng):
    return np.array([rng.random() < 0.4 for _ in range(24)]).reshape(2, 3, 4)


@pytest.fixture(scope="module")
def clip_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    for k in range(6):
        write_video(root / "train" / "ab"[k % 2] / f"{k}.mp4", range(30 + 5 * k),
                    options={"preset": "ultrafast"})
    (root / "train/a/broken.mp4").write_text("not a video")
    return layouts.find_samples(root)


def pretrain_dataset(samples, **more):
    return data.PretrainDataset(samples, (32, 40), 4, 2, random_mask, 3, short_side=48, **more)


def finetune_dataset(samples, **more):
    return data.FinetuneDataset(samples, (32, 40), 4, 2, 3, short_side=48, **more)


def assert_same(one, two):
    assert one.keys() == two.keys() and one["unreadable"] == two["unreadable"]
    for name in one.keys() - {"unreadable"}:
        assert torch.equal(one[name], two[name]), name


def test_item_layout_and_replacement_of_an_unreadable_file(clip_set):
    broken = [k for k, path in enumerate(clip_set.paths) if "broken" in path][0]
    items, labels = pretrain_dataset(clip_set), set()
    for epoch in range(8):
        item = items[epoch, broken]
        x, mask = item["x"], item["mask"]
        assert x.shape == (3, 4, 32, 40) and x.dtype == torch.uint8 and x.is_contiguous()
        assert mask.shape == (2, 3, 4) and mask.dtype == torch.bool
        (path, reason), = item["unreadable"]
        assert path == clip_set.paths[broken] and reason
        assert item["index"] == broken and torch.equal(x, items[epoch, broken]["x"])
        labels.add(item["label"])
    assert labels == {0, 1}  # the label is that of the file which stands in
    assert items[0, (broken + 1) % len(items)]["unreadable"] == []


def test_only_unreadable_files_is_an_error_naming_them(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.mp4").touch()
    with pytest.raises(ValueError, match="(?s)a.mp4.*b.mp4|b.mp4.*a.mp4"):
        pretrain_dataset(layouts.find_samples(tmp_path))[0, 0]


def test_randomness_depends_on_epoch_and_index_and_the_mask_has_its_own(clip_set):
    items, other = pretrain_dataset(clip_set), pretrain_dataset(clip_set, scale=(0.2, 0.3), flip=0)
    assert not torch.equal(items[0, 1]["x"], items[1, 1]["x"])
    assert not torch.equal(items[0, 1]["mask"], items[1, 1]["mask"])
    assert not torch.equal(items[0, 1]["mask"], items[0, 2]["mask"])
    assert not torch.equal(items[0, 1]["x"], other[0, 1]["x"])
    assert torch.equal(items[0, 1]["mask"], other[0, 1]["mask"])
    middle = video.read_clip(clip_set.paths[1], 4, 2, 0.5, 48)
    centered = data.crop_resize(middle, (0, 2, 48, 60), (32, 40)).transpose(0, 1)
    assert torch.equal(items.center(1)["x"], centered)


def test_pretraining_draws_what_it_always_drew(monkeypatch):
    """Positions, boxes, flips, labels and masks, undecoded, as for the first checkpoints."""
    log = []

    def read_clip(path, *arguments, **_):
        log.append((path, arguments[:4]))
        if path == "2.mp4":
            raise data.UnreadableFile(path, "damaged")
        return torch.zeros(4, 3, *[(256, 340), (455, 256)][int(path[0]) % 2], dtype=torch.uint8)

    def crop_resize(frames, box, size):
        log.append(box)
        ramp = torch.arange(size[1], dtype=torch.uint8).expand(4, 3, *size)
        return ramp[0] if isinstance(frames, Image.Image) else ramp

    def read_image(path):
        return Image.new("RGB", (500, 375 + 10 * int(path[0])))

    for function in (read_clip, crop_resize, read_image):
        monkeypatch.setattr(data, function.__name__, function)
    for kind, ending, frames in (("video", "mp4", 4), ("image", "jpg", None)):
        paths = [f"{k}.{ending}" for k in range(5)]
        samples = layouts.Samples(kind, paths, [0, 1, 2, 3, 4], [])
        items = data.PretrainDataset(samples, (32, 40), frames, 2, random_mask, 3, short_side=256)
        for item in (items[epoch, index] for epoch in range(3) for index in range(5)):
            x, mask = item["x"].flatten(), item["mask"].flatten()
            log.append((x[0].item(), item["label"], mask.tolist()))
    assert hashlib.sha256(repr(log).encode()).hexdigest()[:16] == "2662b4e76e5bf37a"


def test_flip_mirrors_half_of_the_samples(tmp_path):
    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    items = data.PretrainDataset(layouts.find_samples(tmp_path), (16, 16))
    views = [items[epoch, 0]["x"] for epoch in range(400)]
    flipped = [bool(x[0, 0, 0] > x[0, 0, -1]) for x in views]
    assert abs(np.mean(flipped) - 0.5) < 4 * 0.5 / 400 ** 0.5
    assert views[0].shape == (3, 16, 16) and "mask" not in items[0, 0]


def test_num_frames_must_go_with_the_data(clip_set):
    for kind in (data.PretrainDataset, data.FinetuneDataset, data.ViewDataset):
        with pytest.raises(ValueError, match="num_frames=None does not go with video"):
            kind(clip_set, (32, 32))


# ------------------------------------------------ fine-tuning: augmentation, repeats, segments


def invert(pictures, rng):
    """Stands for an augmentation: inverts all pictures of a clip or none."""
    inverted = rng.random() < 0.5
    return [Image.fromarray(255 - np.asarray(p)) if inverted else p for p in pictures]


def some_box(height, width, rng):
    return rng.randrange(height), rng.randrange(width), 1, 1


def test_repeats_share_the_clip_and_nothing_else(clip_set):
    more = dict(augment=invert, erase=some_box)
    items = finetune_dataset(clip_set, repeats=3, **more)
    single = finetune_dataset(clip_set, **more)
    for index in range(3):
        item, one = items[1, index], single[1, index]
        assert item["x"].shape == (3, 3, 4, 32, 40)
        assert item["boxes"].shape == (3, 4) and item["seeds"].shape == (3,)
        assert item["boxes"].dtype == item["seeds"].dtype == torch.int64
        assert torch.equal(item["x"][:1], one["x"])
        assert torch.equal(item["boxes"][:1], one["boxes"])
        assert len({view.numpy().tobytes() for view in item["x"]}) == 3
        assert len(set(item["seeds"].tolist())) == 3
    # Without crop, flip and augmentation the views are one clip.
    still = finetune_dataset(clip_set, repeats=2, scale=(1, 1), flip=0)[0, 1]["x"]
    assert torch.equal(still[0], still[1])


def test_augmentation_precedes_the_crop_of_a_clip_and_follows_that_of_an_image(clip_set, tmp_path):
    seen = []

    def look(pictures, rng):
        seen.append([picture.size for picture in pictures])
        return pictures
    augmented = finetune_dataset(clip_set, augment=look)[0, 1]["x"]
    assert seen == [[(64, 48)] * 4]
    assert torch.equal(augmented, finetune_dataset(clip_set)[0, 1]["x"])
    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (50, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    images = layouts.find_samples(tmp_path)
    x = data.FinetuneDataset(images, (16, 24), augment=look)[3, 0]["x"]
    assert seen[1:] == [[(24, 16)]]
    assert torch.equal(x, data.FinetuneDataset(images, (16, 24))[3, 0]["x"])


def test_segments_draw_each_moment_in_its_own_part(monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "read_clip", lambda *_, places, **more: drawn.append(places))
    samples = layouts.Samples("video", ["a.mp4"], [0], [])
    items = data.FinetuneDataset(samples, (32, 32), 8, segments=True)
    for epoch in range(200):
        items.read("a.mp4", data.sample_rng(0, epoch, 0))
    drawn = np.array(drawn)
    assert drawn.shape == (200, 8) and drawn.min() >= 0 and drawn.max() < 1
    assert (np.abs(drawn.mean(0) - 0.5) < 4 * 12 ** -0.5 / 200 ** 0.5).all()
    assert np.abs(np.corrcoef(drawn.T) - np.eye(8)).max() < 4 / 200 ** 0.5


# ----------------------------------------------------------------------------------------- batches


def test_workers_and_resuming_change_no_sample(clip_set):
    def batches(workers, **more):
        keys = data.EpochBatches(len(clip_set), 4, epochs=2, seed=3, device_batch=2, **more)
        found = list(data.make_loader(pretrain_dataset(clip_set), keys, workers))
        assert len(found) == len(keys)
        return found
    whole = batches(0)
    for one, two in zip(whole, batches(2), strict=True):
        assert_same(one, two)
    for one, two in zip(whole[2:], batches(0, start_step=1), strict=True):
        assert_same(one, two)
    assert sum(len(batch["unreadable"]) for batch in whole) == sum(
        "broken" in clip_set.paths[index] for batch in whole for index in batch["index"])


@pytest.mark.slow
def test_workers_where_there_is_no_fork(clip_set, monkeypatch):
    """As on Windows, which has neither fork nor the module resource."""
    monkeypatch.setattr(data.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setitem(sys.modules, "resource", None)
    mask = functools.partial(masking.draw_mask, "tube", (2, 4, 5), 0.4, frame_runs=True)
    items = data.PretrainDataset(clip_set, (32, 40), 4, 2, mask)
    batches = data.EpochBatches(len(clip_set), 4, 1, 3)
    for one, two in zip(*(data.make_loader(items, batches, workers) for workers in (0, 1)),
                        strict=True):
        assert_same(one, two)
    assert data.video.file_limit() == math.inf


def test_batches_of_repeats_are_flat_and_the_same_with_workers(clip_set):
    items = finetune_dataset(clip_set, repeats=2, augment=invert, erase=some_box, segments=True)
    batches = data.EpochBatches(len(clip_set), 3, 2, 3)
    for one, two in zip(*(data.make_loader(items, batches, workers, collate=data.collate_repeats)
                          for workers in (0, 2)), strict=True):
        assert one["x"].shape == (6, 3, 4, 32, 40) and one["boxes"].shape == (6, 4)
        assert one["label"].shape == one["index"].shape == one["seeds"].shape == (6,)
        assert torch.equal(one["index"][0::2], one["index"][1::2])
        assert len(set(one["index"].tolist())) == 3
        assert_same(one, two)


def test_epoch_batches_do_not_depend_on_ranks_and_accumulation():
    def steps(world_size, device_batch, start_step=0):
        ranks = [list(data.EpochBatches(29, 8, 3, 5, rank, world_size, device_batch, start_step))
                 for rank in range(world_size)]
        micro = 8 // world_size // (device_batch or 8 // world_size)
        return [[key for rank in ranks for part in rank[s * micro:(s + 1) * micro] for key in part]
                for s in range(len(ranks[0]) // micro)]
    reference = steps(1, None)
    assert len(reference) == 9 and all(len(step) == 8 for step in reference)
    assert steps(2, 2) == steps(4, None) == steps(1, 1) == reference
    assert steps(2, 4, start_step=4) == reference[4:]
    for epoch in range(3):
        keys = [key for step in reference[3 * epoch:3 * epoch + 3] for key in step]
        assert {e for e, _ in keys} == {epoch}
        assert len({index for _, index in keys} & set(range(29))) == 24
    assert [index for _, index in reference[0]] != [index for _, index in reference[3]]
    assert len(data.EpochBatches(29, 8, 3, device_batch=2, start_step=4)) == 20


@pytest.mark.parametrize("wrong, message", [
    (dict(num_samples=7), "batch_size <= 7"), (dict(world_size=3), "multiple of 3"),
    (dict(device_batch=3), "device_batch=3"), (dict(start_step=13), "start_step=13")])
def test_epoch_batches_refuse(wrong, message):
    with pytest.raises(ValueError, match=message):
        data.EpochBatches(**{"num_samples": 32, "batch_size": 8, "epochs": 3} | wrong)


# -------------------------------------------------------------------------------- views for a test


def test_views_are_spread_from_the_first_frame_to_the_last(videos):
    for name, frames in (("b_frames.mp4", 120), ("mpeg4.avi", 80), ("late_start.mp4", 100)):
        views = data.read_views(videos[name], (48, 64), 16, 2, clips=5, crop_ratio=1)
        assert views.shape == (5, 3, 16, 48, 64) and views.dtype == torch.uint8
        numbers = [read_numbers(clip.transpose(0, 1)) for clip in views]
        assert numbers[0][0] == 0 and numbers[-1][-1] + 2 == frames  # the last one stands for two
        assert numbers == [expected_numbers(videos[name], 16, 2, c / 4) for c in range(5)]
        middle, = data.read_views(videos[name], (48, 64), 16, 2, crop_ratio=1)
        assert read_numbers(middle.transpose(0, 1)) == numbers[2]
        midpoints, = data.read_views(videos[name], (48, 64), 4, segments=True, crop_ratio=1)
        assert read_numbers(midpoints.transpose(0, 1)) == [
            int((j + 0.5) / 4 * frames + 6e-3) for j in range(4)]


def test_one_decode_gives_what_a_decode_per_clip_gives(videos):
    views = data.read_views(videos["open_gop.mp4"], (24, 24), 4, 4, clips=4)
    for c, view in enumerate(views):
        frames = video.read_clip(videos["open_gop.mp4"], 4, 4, c / 3, short_side=27)
        assert torch.equal(view, frames[:, :, 1:25, 6:30].transpose(0, 1))  # of 27 x 36


@pytest.mark.parametrize("size", [(48, 48), (48, 40), (24, 24)])
@pytest.mark.parametrize("rotation", [0, 90])
def test_three_crops_cover_the_frame(tmp_path, size, rotation):
    path = write_video(tmp_path / "r.mp4", range(7), rotation=rotation)
    size = size[::-1] if rotation else size
    height, width = (64, 48) if rotation else (48, 64)
    views = data.read_views(path, size, 3, 1, clips=2, crops=3)
    assert views.shape == (6, 3, 3, *size)
    scale = max(size[0] / height, size[1] / width)
    shape = round(height * scale), round(width * scale)
    whole = video.read_clip(path, 3, 1, 1, short_side=min(shape)).transpose(0, 1)
    axis, side = (2, size[0]) if rotation else (3, size[1])
    long = whole.shape[axis]
    assert whole.shape[2:] == shape and long <= 3 * side
    for crop, start in zip(views[3:], (0, (long - side) // 2, long - side), strict=True):
        assert torch.equal(crop, whole.narrow(axis, start, side))


def test_views_of_images(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    one, = data.read_views(tmp_path / "a.png", (28, 28))
    reference = np.asarray(image.resize((53, 32), Image.BICUBIC))[2:30, 12:40]
    assert np.array_equal(one.permute(1, 2, 0).numpy(), reference)
    three = data.read_views(tmp_path / "a.png", (30, 30), crops=3)
    reference = np.asarray(image.resize((50, 30), Image.BICUBIC))
    for view, left in zip(three, (0, 10, 20), strict=True):
        assert np.array_equal(view.permute(1, 2, 0).numpy(), reference[:, left:left + 30])
    assert data.read_views(tmp_path / "a.png", (20, 61)).shape == (1, 3, 20, 61)


def test_center_of_a_clip_is_rounded_up(monkeypatch):
    frames = torch.arange(33, dtype=torch.uint8).expand(2, 3, 29, 33)
    monkeypatch.setattr(data.video, "read_at", lambda *_: frames)
    for crops, lefts in ((1, [3]), (3, [0, 3, 5])):      # (33 - 28) / 2 = 2.5
        views = data.read_views("a.mp4", (28, 28), 2, crops=crops)
        assert views[:, 0, 0, 0, 0].tolist() == lefts


def test_color_stats_and_their_warning(tmp_path):
    colors = [(0, 50, 100), (40, 90, 140)]
    for i, color in enumerate(colors):
        Image.new("RGB", (8 + i, 9), color).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_text("no image")
    samples = layouts.Samples("image", [str(tmp_path / f"{i}.png") for i in range(3)], [0] * 3, [],
                              root=str(tmp_path))
    mean, std, side = data.color_stats(samples, 3)       # 20 of 255 about each mean
    assert mean == [0.078, 0.275, 0.471] and std == [0.078] * 3 and side == 8
    notes = lambda mean, std, size=8: data.notes_on_files(
        samples, SimpleNamespace(mean=mean, std=std, image_size=(size, size)), 3)
    assert notes(mean, std) == notes([m + 0.03 for m in mean], [2.9 * s for s in std]) == []
    for wrong in (([m + 0.05 for m in mean], std), (mean, [3.1 * s for s in std])):
        note, = notes(*wrong)
        assert "--mean 0.078 0.275 0.471 --std 0.078 0.078 0.078" in note
    note, = notes(mean, std, 9)
    assert "files of 8 pixels" in note and "--image-size 9" in note
    samples = layouts.Samples("image", samples.paths[2:], [0], [], root=str(tmp_path))
    with pytest.raises(ValueError, match="can be read"):
        data.color_stats(samples, 3)


def test_training_and_test_see_clips_alike(videos):
    """Random crops are cut from frames about as large as those of a test, at any image size."""
    samples = layouts.Samples("video", [str(videos["short.mp4"])], [0], [])
    for data_set in (data.PretrainDataset, data.FinetuneDataset):
        for size, side in ((224, 256), (64, 73), (48, 55)):
            assert data_set(samples, (size, size), 2).short_side == side


def test_view_dataset_draws_nothing_and_counts_every_file(clip_set, monkeypatch):
    items = data.ViewDataset(clip_set, (24, 32), 4, 2, clips=2, crops=3)
    broken = [k for k, path in enumerate(clip_set.paths) if "broken" in path][0]
    before = random.getstate(), torch.get_rng_state()
    monkeypatch.setattr(data, "sample_rng", None)  # nor from a generator of its own
    batches = list(data.make_view_loader(items, range(7), 3, 0))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert [batch["x"].shape for batch in batches] == [(n, 6, 3, 4, 24, 32) for n in (3, 3, 1)]
    x, index, label = (torch.cat([b[name] for b in batches]) for name in ("x", "index", "label"))
    assert index.tolist() == list(range(7)) and label.tolist() == clip_set.labels
    assert [path for b in batches for path, _ in b["unreadable"]] == [clip_set.paths[broken]]
    assert x[broken].max() == 0 and items.views == 6
    assert all(x[k].float().std() > 1 for k in range(7) if k != broken)
    for rank in range(2):  # two ranks, workers
        share = list(data.make_view_loader(items, range(rank, 7, 2), 2, 2))
        assert torch.equal(torch.cat([batch["x"] for batch in share]), x[rank::2])
    assert list(data.make_view_loader(items, range(7, 7), 2, 2)) == []


def test_views_refuse(clip_set):
    for wrong, message in ((dict(crops=2), "crops=2"), (dict(clips=0), "clips=0"),
                           (dict(crop_ratio=1.2), "crop_ratio=1.2")):
        with pytest.raises(ValueError, match=message):
            data.ViewDataset(clip_set, (24, 24), 4, **wrong)


# ------------------------------------------------------------------------------ faults of a loader


class Faulty(torch.utils.data.Dataset):
    """Sample 5 calls `fault`. Stands for storage that hangs or a worker that dies."""

    def __init__(self, fault, shape=(3, 8, 8)):
        self.samples = layouts.Samples("image", [f"{k}.png" for k in range(20)], [], [])
        self.fault, self.shape, self.item_bytes = fault, shape, int(np.prod(shape))

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 5:
            self.fault()
        return {"x": torch.zeros(self.shape, dtype=torch.uint8), "unreadable": []}


def hang():
    time.sleep(1000)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_the_waiting_for_data(workers):
    def stop(*_):
        raise KeyError("stopped")
    usual, start = signal.signal(signal.SIGALRM, stop), time.monotonic()
    loader = iter(data.make_view_loader(Faulty(hang), range(20), 2, workers))
    try:
        assert next(loader)["x"].shape == next(loader)["x"].shape == (2, 3, 8, 8)
        signal.alarm(1)
        with pytest.raises(KeyError, match="stopped"):
            next(loader)
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert multiprocessing.active_children() == [] and time.monotonic() - start < 8


@pytest.mark.parametrize("fault, words", [
    (hang, "no batch for 1 s.* 4.png, 5.png"), (lambda: os._exit(3), "died")])
def test_a_worker_that_hangs_or_dies_is_an_error(monkeypatch, fault, words):
    monkeypatch.setattr(data, "BATCH_TIMEOUT", 1)
    with pytest.raises(OSError, match=words):
        list(data.make_view_loader(Faulty(fault), range(20), 2, 2))
    assert multiprocessing.active_children() == []


def test_limits_are_checked_before_the_first_batch(monkeypatch):
    items = Faulty(hang, (1024, 1024))
    monkeypatch.setattr(data, "free_shared_memory", lambda: 15 << 20)
    data.make_loader(items, [[1, 2, 3]], 2)                     # 2 workers x 2 batches x 3 MB
    data.make_loader(items, [[1, 2, 3, 4]], 0)
    with pytest.raises(ValueError, match="15.0 MB.*2 workers x 2 batches of 4.0 MB.*--shm-size"):
        data.make_loader(items, [[1], [1, 2, 3, 4]], 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes"):
        data.make_loader(items, data.EpochBatches(20, 3, 1), 2)
    monkeypatch.setattr(video, "file_limit", lambda: 24)
    with pytest.raises(OSError, match="limit is 24.*ulimit -n"):
        data.make_loader(items, [[1]], 1)
    samples = layouts.Samples("video", ["a.mp4"], [0], [])
    for kind in (data.PretrainDataset, data.FinetuneDataset, data.ViewDataset):
        assert kind(samples, (32, 40), 4).item_bytes == 3 * 4 * 32 * 40


def run_script(path, text, *prefix):
    path.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n{text}")
    return subprocess.run([*prefix, sys.executable, path], capture_output=True, text=True,
                          timeout=60)


@pytest.mark.slow
def test_full_shared_memory_is_an_error(tmp_path):
    mount = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"'
    small = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if not sys.platform.startswith("linux") or \
            subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    result = run_script(tmp_path / "run.py", """
import engine, data
from test_data import Faulty
items = Faulty(print, (700, 1024))
items.item_bytes = 0  # not refused in advance
engine.run_main(lambda: list(data.make_view_loader(items, range(20), 1, 2)))
""", *small)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "/dev/shm" in result.stderr and "--shm-size" in result.stderr


@pytest.mark.slow
def test_signals_to_the_group_spare_workers_and_exit_is_quick(tmp_path):
    """SIGINT and SIGTERM spare the workers. A parent that ends with a live loader does not hang."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    start = time.time()
    result = run_script(tmp_path / "run.py", f"""
import multiprocessing, os, signal, data, layouts
items = data.PretrainDataset(layouts.find_samples({str(tmp_path)!r}), (16, 16))
batches = iter(data.make_loader(items, data.EpochBatches(1, 1, 500), 2))
next(batches), next(batches)  # one from each worker: both have started
for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
print(sum(1 for _ in zip(range(300), batches)), "av" in sys.modules)
raise SystemExit(5)
""")
    assert (result.returncode, result.stdout.split()) == (5, ["300", "False"]), result.stderr
    assert time.time() - start < 40


# ------------------------------------------------------------------------- python data.py --check


def test_check_file_says_what_a_file_holds(tmp_path, videos):
    assert data.check_file(videos["b_frames.mp4"]) == (
        "h264, 64x48, 120 frames, 30.00 fps, 4.00 s", (64, 48, 30, 4))
    text, facts = data.check_file(cut_off(tmp_path))
    assert facts is None and "frames" in text
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png")
    assert data.check_file(tmp_path / "a.png") == ("image, 32x16", (32, 16, None, None))
    assert data.check_file(tmp_path / "absent.png")[1] is None


def test_check_names_what_is_wrong_before_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "ProcessPoolExecutor", in_this_process)
    for k, place in enumerate(("train/a", "train/b", "val/a", "val/c", "test")):
        write_video(tmp_path / place / f"{k}.mp4", range(30))
    assert data.check(tmp_path, 1, 48, verbose=True) == 1
    output = capsys.readouterr().out
    for words in ("FAULT     val: 1 classes", "'c'", f"{tmp_path}/test: 1 files are in no split",
                  "64x48 to 64x48 pixels", "below 48 in 0%", "0.00 hours, 1.00 to 1.00 s each",
                  "30.00 to 30.00 fps", "5 usable, 0 unusable, 0 missing, 0 other", "usable    "):
        assert words in output, (words, output)
    (tmp_path / "train.csv").write_text("train/a/0.mp4 0\ntrain/b/1.mp4 2\ngone.mp4 0\n")
    (tmp_path / "val.csv").write_text("val/a/2.mp4 0\nval/c/3.mp4;1\n")
    (tmp_path / "test/bad.mp4").write_text("not a video")
    Image.new("RGB", (640, 10)).save(tmp_path / "long.png")
    monkeypatch.setattr(data, "LARGE", 64 * 48 - 1)
    assert data.check(tmp_path, 1, 224, verbose=False) == 1
    output = capsys.readouterr().out
    for words in ("train: .* 1 gaps", "val.csv, line 2", "MISSING .*gone.mp4", "below 224 in 100%",
                  "UNUSABLE  .*bad.mp4", "UNUSABLE  .*long.png.*640x10", "large     .*0.mp4"):
        assert re.search(words, output), (words, output)
    assert "\nusable" not in output


def test_check_of_a_sound_folder_is_short(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "ProcessPoolExecutor", in_this_process)
    for k in range(3):
        Image.new("RGB", (32 + k, 16)).save(tmp_path / f"{k}.png")
    assert data.check(tmp_path, 1, 224, verbose=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "32x16 to 34x16 pixels" in lines[2]
