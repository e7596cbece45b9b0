"""data.py: crops, samples, batches, loaders and their faults, views for a test, --check."""
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from test_video import cut_off, expected_numbers, read_numbers, write_video

import data
import layouts
import video


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# ---------------------------------------------------------------- crops


def test_crop_box_stays_inside_and_follows_its_law():
    rng = random.Random(0)
    areas, logs = [], []
    for _ in range(4000):
        top, left, h, w = data.random_resized_crop_box(1000, 1000, rng, (0.08, 0.5))
        assert 0 <= top <= 1000 - h and 0 <= left <= 1000 - w and h > 0 and w > 0
        areas.append(h * w / 1e6)
        logs.append(np.log(w / h))
    # With these limits every first box fits, so both draws are uniform: standard errors of the means over 4000.
    assert abs(np.mean(areas) - 0.29) < 4 * 0.42 / 12 ** 0.5 / 4000 ** 0.5
    assert abs(np.mean(logs)) < 4 * 2 * np.log(4 / 3) / 12 ** 0.5 / 4000 ** 0.5
    assert min(areas) > 0.079 and max(areas) < 0.501 and max(abs(np.array(logs))) < np.log(4 / 3) + 0.01


def test_crop_box_falls_back_to_the_center():
    assert data.random_resized_crop_box(10, 100, random.Random(0), (0.9, 1)) == (0, 43, 10, 13)
    assert data.random_resized_crop_box(100, 10, random.Random(0), (0.9, 1)) == (43, 0, 13, 10)


def test_crop_resize_is_plain_bilinear_and_pil_bicubic():
    clip = torch.randint(0, 256, (3, 3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    box, size = (5, 7, 41, 32), (16, 24)
    exact = F.interpolate(clip[..., 5:46, 7:39].double(), size, mode="bilinear", align_corners=False, antialias=False)
    result = data.crop_resize(clip, box, size)
    assert result.shape == (3, 3, 16, 24) and result.dtype == torch.uint8
    assert (result.double() - exact).abs().max() <= 0.5 + 1e-4
    image = Image.fromarray(clip[0].permute(1, 2, 0).numpy())
    reference = np.asarray(image.crop((7, 5, 39, 46)).resize((24, 16), Image.BICUBIC))
    assert np.array_equal(data.crop_resize(image, box, size).permute(1, 2, 0).numpy(), reference)


# ---------------------------------------------------------------- samples, batches, loaders


def random_mask(rng):
    return np.array([rng.random() < 0.4 for _ in range(24)]).reshape(2, 3, 4)


@pytest.fixture(scope="module")
def clip_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    for k in range(6):
        write_video(root / "train" / "ab"[k % 2] / f"{k}.mp4", range(30 + 5 * k), options={"preset": "ultrafast"})
    (root / "train/a/broken.mp4").write_text("not a video")
    return layouts.find_samples(root)


def dataset(samples, **more):
    return data.PretrainDataset(samples, (32, 40), num_frames=4, sampling_rate=2, mask=random_mask, seed=3,
                                short_side=48, **more)


def finetune_dataset(samples, **more):
    return data.FinetuneDataset(samples, (32, 40), num_frames=4, sampling_rate=2, seed=3, short_side=48, **more)


def all_batches(samples, workers=0, **more):
    batches = data.EpochBatches(len(samples), 4, epochs=2, seed=3, **more)
    loader = data.make_loader(dataset(samples), batches, workers)
    found = list(loader)
    assert len(found) == len(batches)
    return found


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert one["unreadable"] == two["unreadable"]
    for name in one.keys() - {"unreadable"}:
        assert torch.equal(one[name], two[name]), name


def test_item_layout_and_replacement_of_an_unreadable_file(clip_set):
    broken = [k for k, path in enumerate(clip_set.paths) if "broken" in path][0]
    items = dataset(clip_set)
    replaced = set()
    for epoch in range(8):
        item = items[epoch, broken]
        assert item["x"].shape == (3, 4, 32, 40) and item["x"].dtype == torch.uint8 and item["x"].is_contiguous()
        assert item["mask"].shape == (2, 3, 4) and item["mask"].dtype == torch.bool
        (path, reason), = item["unreadable"]
        assert path == clip_set.paths[broken] and reason
        assert item["index"] == broken and torch.equal(item["x"], items[epoch, broken]["x"])
        replaced.add(item["label"])
    assert replaced == {0, 1}  # the label is that of the file which stands in
    assert items[0, (broken + 1) % len(items)]["unreadable"] == []


def test_only_unreadable_files_is_an_error_naming_them(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    with pytest.raises(ValueError, match="(?s)a.mp4.*b.mp4|b.mp4.*a.mp4"):
        dataset(layouts.find_samples(tmp_path))[0, 0]


def test_randomness_depends_on_epoch_and_index_and_the_mask_has_its_own(clip_set):
    items, plain = dataset(clip_set), dataset(clip_set, scale=(0.2, 0.3), flip=0)
    assert not torch.equal(items[0, 1]["x"], items[1, 1]["x"])
    assert not torch.equal(items[0, 1]["mask"], items[1, 1]["mask"])
    assert not torch.equal(items[0, 1]["mask"], items[0, 2]["mask"])
    assert not torch.equal(items[0, 1]["x"], plain[0, 1]["x"])
    assert torch.equal(items[0, 1]["mask"], plain[0, 1]["mask"])
    middle = video.read_clip(clip_set.paths[1], 4, 2, 0.5, 48)
    centered = data.crop_resize(middle, (0, 2, 48, 60), (32, 40))
    assert torch.equal(items.center(1)["x"], centered.transpose(0, 1))


def test_pretraining_draws_what_it_always_drew(monkeypatch):
    """Positions, boxes, flips, labels and masks, undecoded, as they were when the first checkpoints were trained."""
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

    monkeypatch.setattr(data, "read_clip", read_clip)
    monkeypatch.setattr(data, "read_image", lambda path: Image.new("RGB", (500, 375 + 10 * int(path[0]))))
    monkeypatch.setattr(data, "crop_resize", crop_resize)
    for kind, ending, frames in (("video", "mp4", 4), ("image", "jpg", None)):
        samples = layouts.Samples(kind, [f"{k}.{ending}" for k in range(5)], [0, 1, 2, 3, 4], [])
        items = data.PretrainDataset(samples, (32, 40), frames, 2, random_mask, 3)
        for epoch in range(3):
            for index in range(5):
                item = items[epoch, index]
                log.append((item["x"].flatten()[0].item(), item["label"], item["mask"].flatten().tolist()))
    assert hashlib.sha256(repr(log).encode()).hexdigest()[:16] == "2662b4e76e5bf37a"


def test_flip_mirrors_half_of_the_samples(tmp_path):
    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    items = data.PretrainDataset(layouts.find_samples(tmp_path), (16, 16))
    flipped = [bool(x[0, 0, 0] > x[0, 0, -1]) for x in (items[epoch, 0]["x"] for epoch in range(400))]
    assert abs(np.mean(flipped) - 0.5) < 4 * 0.5 / 400 ** 0.5
    assert items[0, 0]["x"].shape == (3, 16, 16) and "mask" not in items[0, 0]


def test_num_frames_must_go_with_the_data(clip_set):
    with pytest.raises(ValueError, match="num_frames=None does not go with video"):
        data.PretrainDataset(clip_set, (32, 32))


def test_workers_and_resuming_change_no_sample(clip_set):
    whole = all_batches(clip_set, workers=0, device_batch=2)
    for one, two in zip(whole, all_batches(clip_set, workers=2, device_batch=2), strict=True):
        assert_same(one, two)
    for one, two in zip(whole[2:], all_batches(clip_set, workers=0, device_batch=2, start_step=1), strict=True):
        assert_same(one, two)
    assert sum(len(batch["unreadable"]) for batch in whole) == sum(
        clip_set.paths[index].endswith("broken.mp4") for batch in whole for index in batch["index"])


def test_epoch_batches_do_not_depend_on_ranks_and_accumulation():
    def steps(world_size, device_batch, start_step=0):
        ranks = [list(data.EpochBatches(29, 8, 3, 5, rank, world_size, device_batch, start_step))
                 for rank in range(world_size)]
        micro = 8 // world_size // (device_batch or 8 // world_size)
        return [[pair for rank in ranks for part in rank[s * micro:(s + 1) * micro] for pair in part]
                for s in range(len(ranks[0]) // micro)]
    reference = steps(1, None)
    assert len(reference) == 9 and all(len(step) == 8 for step in reference)
    assert steps(2, 2) == steps(4, None) == steps(1, 1) == reference
    assert steps(2, 4, start_step=4) == reference[4:]
    for epoch in range(3):
        seen = [index for step in reference[3 * epoch:3 * epoch + 3] for e, index in step if e == epoch]
        assert len(set(seen)) == 24 and set(seen) <= set(range(29))
    assert [index for _, index in reference[0]] != [index for _, index in reference[3]]
    assert len(data.EpochBatches(29, 8, 3, device_batch=2, start_step=4)) == 20


@pytest.mark.parametrize("wrong, message", [
    (dict(num_samples=7), "batch_size <= 7"), (dict(world_size=3), "multiple of 3"),
    (dict(device_batch=3), "device_batch=3"), (dict(start_step=13), "start_step=13")])
def test_epoch_batches_refuse(wrong, message):
    with pytest.raises(ValueError, match=message):
        data.EpochBatches(**{"num_samples": 32, "batch_size": 8, "epochs": 3} | wrong)


# ---------------------------------------------------------------- fine-tuning: augmentation, repeats, segments


def invert(pictures, rng):
    """Stands for an augmentation: inverts all pictures of a clip or none."""
    inverted = rng.random() < 0.5
    return [Image.fromarray(255 - np.asarray(picture)) if inverted else picture for picture in pictures]


def some_box(height, width, rng):
    return rng.randrange(height), rng.randrange(width), 1, 1


def test_repeats_share_the_clip_and_nothing_else(clip_set):
    more = dict(augment=invert, erase=some_box, flip=0.5)
    items, single = finetune_dataset(clip_set, repeats=3, **more), finetune_dataset(clip_set, **more)
    for index in range(3):
        item, one = items[1, index], single[1, index]
        assert item["x"].shape == (3, 3, 4, 32, 40) and item["boxes"].shape == (3, 4) and item["seeds"].shape == (3,)
        assert item["boxes"].dtype == item["seeds"].dtype == torch.int64
        assert torch.equal(item["x"][:1], one["x"]) and torch.equal(item["boxes"][:1], one["boxes"])
        assert len({view.numpy().tobytes() for view in item["x"]}) == len(set(item["seeds"].tolist())) == 3
    # Without crop, flip and augmentation the views are one clip.
    still = finetune_dataset(clip_set, repeats=2, scale=(1, 1), flip=0)[0, 1]["x"]
    assert torch.equal(still[0], still[1])


def test_augmentation_comes_before_the_crop_of_a_clip_and_after_that_of_an_image(clip_set, tmp_path):
    seen = []

    def look(pictures, rng):
        seen.append([picture.size for picture in pictures])
        return pictures
    augmented = finetune_dataset(clip_set, augment=look)[0, 1]["x"]
    assert seen == [[(64, 48)] * 4] and torch.equal(augmented, finetune_dataset(clip_set)[0, 1]["x"])
    Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (50, 1))).save(tmp_path / "ramp.png")
    images = layouts.find_samples(tmp_path)
    item = data.FinetuneDataset(images, (16, 24), augment=look)[3, 0]["x"]
    assert seen[1:] == [[(24, 16)]] and torch.equal(item, data.FinetuneDataset(images, (16, 24))[3, 0]["x"])


def test_batches_of_repeats_are_flat_and_the_same_with_workers(clip_set):
    items = finetune_dataset(clip_set, repeats=2, augment=invert, erase=some_box, segments=True)
    batches = data.EpochBatches(len(clip_set), 3, 2, 3)
    for one, two in zip(*(data.make_loader(items, batches, workers, collate=data.collate_repeats) for workers in (0, 2)), strict=True):
        assert one["x"].shape == (6, 3, 4, 32, 40) and one["boxes"].shape == (6, 4)
        assert one["label"].shape == one["index"].shape == one["seeds"].shape == (6,)
        assert torch.equal(one["index"][0::2], one["index"][1::2]) and len(set(one["index"].tolist())) == 3
        assert_same(one, two)
    first = items[0, one["index"][0].item()]
    assert first["x"].shape[0] == 2


def test_segments_draw_each_moment_in_its_own_part(videos, monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "read_clip", lambda *_, places, **more: drawn.append(places) or torch.zeros(
        8, 3, 48, 64, dtype=torch.uint8))
    samples = layouts.Samples("video", [videos["b_frames.mp4"]], [0], [])
    items = data.FinetuneDataset(samples, (32, 32), 8, segments=True)
    for epoch in range(200):
        items.read(samples.paths[0], random.Random(epoch))
    drawn = np.array(drawn)
    assert drawn.shape == (200, 8) and drawn.min() >= 0 and drawn.max() < 1
    assert (np.abs(drawn.mean(0) - 0.5) < 4 * 12 ** -0.5 / 200 ** 0.5).all()
    assert np.abs(np.corrcoef(drawn.T) - np.eye(8)).max() < 4 / 200 ** 0.5


# ---------------------------------------------------------------- views for a test


def test_views_are_spread_from_the_first_frame_to_the_last(videos):
    for name, frames in (("b_frames.mp4", 120), ("mpeg4.avi", 80), ("late_start.mp4", 100)):
        views = data.read_views(videos[name], (48, 64), 16, 2, clips=5, crop_ratio=1)
        assert views.shape == (5, 3, 16, 48, 64) and views.dtype == torch.uint8 and views.is_contiguous()
        numbers = [read_numbers(clip.transpose(0, 1)) for clip in views]
        assert numbers[0][0] == 0 and numbers[-1][-1] + 2 == frames  # the last of 16 frames stands for two
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
def test_three_crops_cover_the_frame(tmp_path, videos, size, rotation):
    path = write_video(tmp_path / "r.mp4", range(7), rotation=rotation) if rotation else videos["short.mp4"]
    size = size[::-1] if rotation else size
    height, width = (64, 48) if rotation else (48, 64)
    views = data.read_views(path, size, 3, 1, clips=2, crops=3)
    assert views.shape == (6, 3, 3, *size)
    scale = max(size[0] / height, size[1] / width)
    whole = video.read_clip(path, 3, 1, 1, short_side=min(round(height * scale), round(width * scale))).transpose(0, 1)
    left, center, right = views[3:]
    axis, side = (2, size[0]) if rotation else (3, size[1])
    long = whole.shape[axis]
    assert whole.shape[2:] == (round(height * scale), round(width * scale)) and long <= 3 * side
    for crop, start in ((left, 0), (center, (long - side) // 2), (right, long - side)):
        assert torch.equal(crop, whole.narrow(axis, start, side))


def test_views_of_images(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    one, = data.read_views(tmp_path / "a.png", (28, 28))
    reference = np.asarray(Image.fromarray(noise).resize((53, 32), Image.BICUBIC))[2:30, 12:40]
    assert np.array_equal(one.permute(1, 2, 0).numpy(), reference)
    three = data.read_views(tmp_path / "a.png", (30, 30), crops=3)
    reference = np.asarray(Image.fromarray(noise).resize((50, 30), Image.BICUBIC))
    for view, left in zip(three, (0, 10, 20), strict=True):
        assert np.array_equal(view.permute(1, 2, 0).numpy(), reference[:, left:left + 30])
    assert data.read_views(tmp_path / "a.png", (20, 61)).shape == (1, 3, 20, 61)


def test_view_dataset_draws_nothing_and_counts_every_file(clip_set, monkeypatch):
    items = data.ViewDataset(clip_set, (24, 32), 4, 2, clips=2, crops=3)
    broken = [k for k, path in enumerate(clip_set.paths) if "broken" in path][0]
    before = random.getstate(), torch.get_rng_state()
    monkeypatch.setattr(data, "sample_rng", None)  # nor from a generator of its own
    batches = list(data.make_view_loader(items, range(7), 3, 0))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert [batch["x"].shape for batch in batches] == [(n, 6, 3, 4, 24, 32) for n in (3, 3, 1)]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(7)) and items.views == 6
    assert torch.cat([batch["label"] for batch in batches]).tolist() == clip_set.labels
    assert [path for batch in batches for path, _ in batch["unreadable"]] == [clip_set.paths[broken]]
    x = torch.cat([batch["x"] for batch in batches])
    assert x[broken].max() == 0 and all(x[k].float().std() > 1 for k in range(7) if k != broken)
    shares = [list(data.make_view_loader(items, range(rank, 7, 2), 2, 2)) for rank in range(2)]  # two ranks, workers
    for rank, share in enumerate(shares):
        assert torch.equal(torch.cat([batch["x"] for batch in share]), x[rank::2])
    assert list(data.make_view_loader(items, range(7, 7), 2, 2)) == []


def test_views_refuse(clip_set):
    for wrong, message in ((dict(crops=2), "crops=2"), (dict(clips=0), "clips=0"),
                           (dict(crop_ratio=1.2), "crop_ratio=1.2"),
                           (dict(num_frames=None), "num_frames=None does not go with video")):
        with pytest.raises(ValueError, match=message):
            data.ViewDataset(clip_set, **{"image_size": (24, 24), "num_frames": 4} | wrong)


# ---------------------------------------------------------------- faults of a loader


class Faulty(torch.utils.data.Dataset):
    """Sample 5 calls `fault`. Stands for storage that hangs, a worker that dies."""

    def __init__(self, fault, shape=(3, 8, 8)):
        self.samples, self.fault, self.shape = layouts.Samples("image", [f"{k}.png" for k in range(20)], [], []), fault, shape
        self.item_bytes = torch.Size(shape).numel()

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


@pytest.mark.parametrize("fault, words", [(hang, "no batch for 2 s.* 4.png, 5.png"), (lambda: os._exit(3), "died")])
def test_a_worker_that_hangs_or_dies_is_an_error(monkeypatch, fault, words):
    monkeypatch.setattr(data, "BATCH_TIMEOUT", 2)
    with pytest.raises(OSError, match=words):
        list(data.make_view_loader(Faulty(fault), range(20), 2, 2))
    assert multiprocessing.active_children() == []


def test_limits_are_checked_before_the_first_batch(monkeypatch):
    items = Faulty(hang, (1024, 1024))
    monkeypatch.setattr(data, "free_shared_memory", lambda: 15 << 20)
    data.make_loader(items, [[1, 2, 3]], 2)                     # 2 workers x 2 batches x 3 MB
    data.make_loader(items, [[1, 2, 3, 4]], 0)
    with pytest.raises(ValueError, match="15.0 MB free.*2 workers x 2 batches of 4.0 MB.*--shm-size"):
        data.make_loader(items, [[1], [1, 2, 3, 4]], 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes"):
        data.make_loader(items, data.EpochBatches(20, 3, 1), 2)
    monkeypatch.setattr(video, "file_limit", lambda: 24)
    with pytest.raises(OSError, match="limit is 24.*ulimit -n"):
        data.make_loader(items, [[1]], 1)
    for item, labels in ((data.PretrainDataset, []), (data.FinetuneDataset, []), (data.ViewDataset, [])):
        samples = layouts.Samples("video", ["a.mp4"], labels, [])
        assert item(samples, (32, 40), 4).item_bytes == 3 * 4 * 32 * 40


def run_script(path, text, *prefix):
    path.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n" + text)
    return subprocess.run([*prefix, sys.executable, path], capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_full_shared_memory_is_an_error(tmp_path):
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"', "sh"]
    if not sys.platform.startswith("linux") or subprocess.run([*small, "true"], capture_output=True).returncode:
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
    """SIGINT and SIGTERM leave the workers alone. A parent that ends with a live loader does not hang."""
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


# ---------------------------------------------------------------- python data.py --check


@pytest.mark.slow
def test_check_names_the_unusable_files(tmp_path):
    def run():
        return subprocess.run([sys.executable, data.__file__, "--check", str(tmp_path), "--workers", "1"],
                              capture_output=True, text=True, timeout=60)
    write_video(tmp_path / "good.mp4", range(30))
    touch(tmp_path, "notes.txt")
    result = run()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "64x48, 30 frames, 30.00 fps, 1.00 s" in result.stdout and "h264" in result.stdout
    (tmp_path / "bad.mp4").write_text("not a video")
    result = run()
    assert result.returncode == 1 and "1 usable, 1 unusable, 0 missing, 1 ignored" in result.stdout
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("UNUSABLE")] == [
        f"{tmp_path / 'bad.mp4'}:"]
