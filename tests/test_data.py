"""data.py against videos that carry their frame numbers, written by PyAV on the spot."""

import hashlib
import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import layouts
from plain import plain_clip

av = pytest.importorskip("av")


# ---------------------------------------------------------------- videos whose frames show their number


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def numbered_frame(number, width=64, height=48):
    """Eight vertical bars, black or white: the bits of the number, lowest first."""
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    return np.repeat(np.array(bits, np.uint8).repeat(width // 8)[None, :, None], height, 0).repeat(3, 2)


def read_numbers(clip):
    """(T, 3, H, W) -> the numbers shown, read from the middle of the bars."""
    width = clip.shape[-1]
    columns = [int((bit + 0.5) * width / 8) for bit in range(8)]
    bits = clip[:, :, clip.shape[2] // 2, columns].float().mean(1) > 127
    return [sum(int(bit) << k for k, bit in enumerate(row)) for row in bits]


def write_video(path, pts, unit=Fraction(1, 30), codec="libx264", options=None, rotation=0, metadata=()):
    """One numbered frame for each time in `pts` (in units of `unit` seconds)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata)
        stream = container.add_stream(codec, rate=round(1 / unit) if unit > Fraction(1, 100) else 30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = unit
        stream.options = options or {}
        if rotation:
            stream.set_display_rotation(rotation)
        for number, when in enumerate(pts):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            frame.pts, frame.time_base = when, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def decode_all(path):
    """Slow reference: (times, duration) of all frames in s; frame k shows number k."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = [(f.pts * stream.time_base, (f.duration or 0) * stream.time_base) for f in container.decode(stream)]
        times = [float(time) for time, _ in frames]
        if times != sorted(times):  # H.264 in AVI: the order is right, the times are not
            times = [k / 30 for k in range(len(times))]
        ends = [float(time + length) for time, length in frames]
        return times, float(stream.duration * stream.time_base) if stream.duration else max(ends) - times[0]


def expected_numbers(path, num_frames, rate, position):
    times, duration = decode_all(path)
    start = times[0] + position * max(duration - num_frames * rate / 30, 0)
    return [max([k for k, t in enumerate(times) if t <= start + j * rate / 30 + 6e-4], default=0)
            for j in range(num_frames)]


IRREGULAR = [0, 40, 50, 140, 150, 160, 400, 410, 433, 500, 900, 901, 950, 1000, 1033, 1066, 1100, 1500, 2400, 2500]
VIDEOS = {
    "b_frames.mp4": dict(pts=range(120), options={"bf": "3", "g": "40", "b-pyramid": "normal"}),
    "open_gop.mp4": dict(pts=range(120), options={"bf": "3", "g": "20", "x264-params": "open-gop=1:keyint=20"}),
    "keyframe_first_only.mkv": dict(pts=range(100), options={"g": "999"}),
    "irregular.mp4": dict(pts=[t * 15 for t in IRREGULAR], unit=Fraction(1, 15000)),
    "odd_rate.mp4": dict(pts=range(90), unit=Fraction(1001, 24000)),
    "slow.mkv": dict(pts=range(12), unit=Fraction(1, 2)),
    "late_start.mp4": dict(pts=range(70, 170)),
    "vp8.webm": dict(pts=range(80), codec="libvpx", options={"deadline": "realtime", "cpu-used": "8"}),
    "mpeg4.avi": dict(pts=range(80), codec="mpeg4", options={"g": "15"}),
    "b_frames.avi": dict(pts=range(80), options={"bf": "2", "g": "30"}),  # packets without times
    "short.mp4": dict(pts=range(7)),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / name, **spec) for name, spec in VIDEOS.items()}


@pytest.mark.parametrize("name", VIDEOS)
def test_read_clip_shows_the_frames_of_a_slow_reference(videos, name):
    for num_frames, rate in ((16, 4), (8, 2), (5, 1)):
        for position in (0, 0.31, 0.5, 0.77, 1):
            clip = data.read_clip(videos[name], num_frames, rate, position, short_side=None)
            assert clip.shape == (num_frames, 3, 48, 64) and clip.dtype == torch.uint8
            assert read_numbers(clip) == expected_numbers(videos[name], num_frames, rate, position)


@pytest.mark.parametrize("name", ["b_frames.mp4", "open_gop.mp4", "odd_rate.mp4", "late_start.mp4", "mpeg4.avi"])
def test_read_clip_is_the_naive_form(videos, name):
    for position in (0, 0.4, 1):
        for side in (48, 24, 96):
            fast = data.read_clip(videos[name], 8, 3, position, side)
            naive = plain_clip(videos[name], 8, 3, position, side)
            assert read_numbers(fast) == read_numbers(naive)
            if side == 48:  # unscaled: the same pixels
                assert torch.equal(fast, naive)
            assert (fast.float() - naive.float()).abs().mean() < 2  # of 255, along the edges of the bars


def test_frames_that_nobody_needs_are_not_decoded(videos, monkeypatch):
    decoded, decode_needed = [], data._decode_needed

    def spy(*arguments):
        frames, wanted = decode_needed(*arguments)
        return (decoded.append(frame) or frame for frame in frames), wanted
    monkeypatch.setattr(data, "_decode_needed", spy)
    clip = data.read_clip(videos["b_frames.mp4"], 4, 10, 0, None)
    assert read_numbers(clip) == [0, 10, 20, 30] and 4 <= len(decoded) < 20  # of 31


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_one_reading_is_enough(container, tmp_path, monkeypatch):
    """Matroska's packets carry no decoding times, and libav makes up some that go back and forth."""
    path = write_video(tmp_path / f"v.{container}", range(240), options={"g": "48", "bf": "8", "b-pyramid": "normal"})
    ways, frames_at = [], data._frames_at
    monkeypatch.setattr(data, "_frames_at", lambda *arguments: ways.append(arguments[-1]) or frames_at(*arguments))
    for k in range(25):
        clip = data.read_clip(path, 8, 3, k / 24, None)
        assert read_numbers(clip) == expected_numbers(path, 8, 3, k / 24)
    assert ways == ["skip"] * 25


def test_a_frame_on_display_that_does_not_come_is_not_replaced(videos, monkeypatch):
    def lossy(*arguments):
        frames, wanted = decode_needed(*arguments)
        return (frame for frame in frames if frame.pts != wanted[2]), wanted
    decode_needed = data._decode_needed
    monkeypatch.setattr(data, "_decode_needed", lossy)
    assert read_numbers(data.read_clip(videos["b_frames.mp4"], 8, 3, 0.5, None)) == expected_numbers(
        videos["b_frames.mp4"], 8, 3, 0.5)  # decoded from the beginning instead


def test_read_clip_16x4_at_30_fps_steps_by_4(videos):
    assert read_numbers(data.read_clip(videos["b_frames.mp4"], position=0)) == list(range(0, 64, 4))
    assert read_numbers(data.read_clip(videos["b_frames.mp4"], position=1)) == list(range(56, 120, 4))


@pytest.mark.parametrize("name", VIDEOS)
def test_segments_split_the_video_into_equal_parts(videos, name):
    times, duration = decode_all(videos[name])
    rng = random.Random(name)
    for places in ([0.5] * 8, [0] * 5, [1] * 5, [rng.random() for _ in range(16)]):
        moments = data.segment_times(times[0], duration, places)
        assert moments == sorted(moments)
        for j, moment in enumerate(moments):
            assert j <= (moment - times[0]) / duration * len(places) + 1e-9 and moment <= times[0] + duration + 1e-9
        assert read_numbers(data.read_clip(videos[name], len(places), short_side=None, places=places)) == [
            max([k for k, time in enumerate(times) if time <= moment + 6e-4]) for moment in moments]
    if name != "irregular.mp4":  # its header counts less than it holds
        clip = data.read_clip(videos[name], 3, short_side=None, places=[0, 0.5, 1 - 1.5 / len(times)])
        assert read_numbers(clip)[2] == len(times) - 1  # half a frame before the end the last frame is on display


def test_short_video_repeats_its_last_frame(videos):
    assert read_numbers(data.read_clip(videos["short.mp4"], 5, 2, 0.9)) == [0, 2, 4, 6, 6]


def test_read_clip_scales_the_short_side(videos):
    assert data.read_clip(videos["short.mp4"], 2, 1, short_side=96).shape == (2, 3, 96, 128)
    small = data.read_clip(videos["short.mp4"], 2, 1, short_side=24)
    assert small.shape == (2, 3, 24, 32) and read_numbers(small) == [2, 3]


@pytest.mark.parametrize("degrees", (90, 180, 270))
def test_rotation_is_applied(tmp_path, videos, degrees):
    path = write_video(tmp_path / "rotated.mp4", range(7), rotation=degrees)
    with av.open(path) as container:
        stored = next(container.decode(video=0)).rotation  # counterclockwise; the sign is the writer's affair
    assert stored % 180 == degrees % 180
    upright = data.read_clip(videos["short.mp4"], 3, 1, short_side=None)
    assert torch.equal(data.read_clip(path, 3, 1, short_side=None), torch.rot90(upright, stored // 90, (2, 3)))


def test_colour_range_is_respected(tmp_path):
    shown = []
    for name, color_range in (("tv.mkv", 1), ("pc.mkv", 2)):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("ffv1", rate=30)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            stream.codec_context.color_range = color_range
            frame = av.VideoFrame(16, 16, "yuv420p")
            for plane, value in zip(frame.planes, (235, 128, 128)):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.color_range = color_range
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        shown.append(int(data.read_clip(tmp_path / name, 1, 1, short_side=None).float().mean().round()))
    assert abs(shown[0] - 255) <= 1 and abs(shown[1] - 235) <= 1  # limited range: 235 is white


def test_reading_leaves_nothing_open(videos):
    def open_files():
        return len(os.listdir("/proc/self/fd"))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    data.read_clip(videos["vp8.webm"])
    before = open_files()
    for k in range(100):
        data.read_clip(videos["b_frames.mp4"], 4, 1, k / 100, 24)
        with pytest.raises(data.UnreadableFile):
            data.read_clip(__file__)
    assert open_files() == before


# ---------------------------------------------------------------- damaged files, images


def test_unreadable_videos_name_file_and_reason(tmp_path, videos):
    damaged = {"empty.mp4": b"", "text.mp4": b"no video at all\n" * 20,
               "no_index.mp4": Path(videos["short.mp4"]).read_bytes()[:900]}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(data.UnreadableFile, match=name):
            data.read_clip(tmp_path / name)
    with pytest.raises(data.UnreadableFile, match="absent.mp4"):
        data.read_clip(tmp_path / "absent.mp4")


def test_title_in_latin_1_is_no_obstacle(tmp_path):
    path = Path(write_video(tmp_path / "title.mkv", range(7), metadata={"title": "Caf? noir"}))
    path.write_bytes(path.read_bytes().replace(b"Caf?", b"Caf\xe9"))
    assert read_numbers(data.read_clip(path, 7, 1)) == list(range(7))


def test_webm_cut_off_is_a_shorter_video(tmp_path, videos):
    whole = Path(videos["vp8.webm"]).read_bytes()
    (tmp_path / "cut.webm").write_bytes(whole[:len(whole) * 2 // 3])  # no length in the header, so nothing is promised
    for position in (0, 0.47, 1):
        numbers = read_numbers(data.read_clip(tmp_path / "cut.webm", 8, 2, position, None))
        assert numbers == expected_numbers(str(tmp_path / "cut.webm"), 8, 2, position) and numbers[-1] < 79


def test_video_cut_off_after_its_header_is_not_filled_up(tmp_path):
    path, faststart = write_video(tmp_path / "a.mp4", range(120), options={"g": "30"}), {"movflags": "faststart"}
    with av.open(path) as source, av.open(str(tmp_path / "f.mp4"), "w", options=faststart) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    whole = (tmp_path / "f.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:int(len(whole) * 0.6)])
    assert read_numbers(data.read_clip(tmp_path / "cut.mp4", 4, 2, 0, None)) == [0, 2, 4, 6]
    for position in (0.7, 1):
        with pytest.raises(data.UnreadableFile):
            data.read_clip(tmp_path / "cut.mp4", 16, 2, position)
    assert not data.check_file(tmp_path / "cut.mp4")[0]


def test_read_image_modes(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for mode in ("L", "RGB", "P", "LA", "RGBA"):
        Image.fromarray(grey).convert(mode).save(tmp_path / f"{mode}.png")
    for name in ("deep", "L", "RGB", "P", "LA", "RGBA"):
        image = data.read_image(tmp_path / f"{name}.png")
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), grey[..., None].repeat(3, 2)), name
    Image.fromarray(grey).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert abs(np.asarray(data.read_image(tmp_path / "cmyk.jpg")).astype(int) - grey[..., None]).mean() < 3
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:1500])
    with pytest.raises(data.UnreadableFile, match="cut.jpg"):
        data.read_image(tmp_path / "cut.jpg")


def test_image_too_large_for_pillow_is_read(tmp_path, monkeypatch):
    Image.fromarray(np.arange(200, dtype=np.uint8)[None].repeat(90, 0)).save(tmp_path / "big.jpg", quality=95)
    whole = data.read_image(tmp_path / "big.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)  # refused by Pillow from 5000 pixels on
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "big.jpg")
    small = data.read_image(tmp_path / "big.jpg")
    assert Image.MAX_IMAGE_PIXELS == 2500 and small.size == (100, 45)
    assert np.abs(np.asarray(small).astype(float) - np.asarray(whole.reduce(2))).max() == 0
    assert data.crop_resize(small, (0, 0, 45, 100), (8, 8)).shape == (3, 8, 8)
    with pytest.raises(data.UnreadableFile):
        data.read_image(tmp_path / "absent.jpg")
    assert Image.MAX_IMAGE_PIXELS == 2500


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency_keeps_its_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "p.png", transparency=b"\x00\x80\xff")
    assert np.asarray(data.read_image(tmp_path / "p.png")).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


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


def test_crop_box_falls_back_to_the_centre():
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
    return data.TrainDataset(samples, (32, 40), num_frames=4, sampling_rate=2, mask=random_mask, seed=3,
                                short_side=48, **more)


def all_batches(samples, workers=0, **more):
    batches = data.EpochBatches(len(samples), 4, epochs=2, seed=3, **more)
    loader = data.make_loader(dataset(samples), batches, workers)
    found = list(loader)
    assert len(found) == len(batches)
    return found


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert one["unreadable"] == two["unreadable"]
    for name in ("x", "mask", "label", "index"):
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
    evaluation = dataset(clip_set, train=False)
    assert torch.equal(evaluation[0, 1]["x"], evaluation[1, 1]["x"])
    middle = data.read_clip(clip_set.paths[1], 4, 2, 0.5, 48)
    centred = data.crop_resize(middle, (0, 2, 48, 60), (32, 40))
    assert torch.equal(evaluation[0, 1]["x"], centred.transpose(0, 1))


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
        items = data.TrainDataset(samples, (32, 40), frames, 2, random_mask, 3)
        for epoch in range(3):
            for index in range(5):
                item = items[epoch, index]
                log.append((item["x"].flatten()[0].item(), item["label"], item["mask"].flatten().tolist()))
    assert hashlib.sha256(repr(log).encode()).hexdigest()[:16] == "2662b4e76e5bf37a"


def test_flip_mirrors_half_of_the_samples(tmp_path):
    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    items = data.TrainDataset(layouts.find_samples(tmp_path), (16, 16))
    flipped = [bool(x[0, 0, 0] > x[0, 0, -1]) for x in (items[epoch, 0]["x"] for epoch in range(400))]
    assert abs(np.mean(flipped) - 0.5) < 4 * 0.5 / 400 ** 0.5
    assert items[0, 0]["x"].shape == (3, 16, 16) and "mask" not in items[0, 0]


def test_num_frames_must_go_with_the_data(clip_set):
    with pytest.raises(ValueError, match="num_frames=None does not go with video"):
        data.TrainDataset(clip_set, (32, 32))


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
    (dict(device_batch=3), "divisor of 8"), (dict(start_step=13), "start_step=13")])
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
    items, single = dataset(clip_set, repeats=3, **more), dataset(clip_set, **more)
    for index in range(3):
        item, one = items[1, index], single[1, index]
        assert item["x"].shape == (3, 3, 4, 32, 40) and item["boxes"].shape == (3, 4) and item["seeds"].shape == (3,)
        assert item["boxes"].dtype == item["seeds"].dtype == torch.int64
        assert torch.equal(item["x"][0], one["x"]) and torch.equal(item["boxes"][:1], one["boxes"])
        assert len({view.numpy().tobytes() for view in item["x"]}) == len(set(item["seeds"].tolist())) == 3
    # Without crop, flip and augmentation the views are one clip.
    still = dataset(clip_set, repeats=2, scale=(1, 1), ratio=(4 / 3, 4 / 3), flip=0)[0, 1]["x"]
    assert torch.equal(still[0], still[1])


def test_augmentation_comes_before_the_crop_of_a_clip_and_after_that_of_an_image(clip_set, tmp_path):
    seen = []

    def look(pictures, rng):
        seen.append([picture.size for picture in pictures])
        return pictures
    augmented = dataset(clip_set, augment=look)[0, 1]["x"]
    assert seen == [[(64, 48)] * 4] and torch.equal(augmented, dataset(clip_set)[0, 1]["x"])
    Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (50, 1))).save(tmp_path / "ramp.png")
    images = layouts.find_samples(tmp_path)
    item = data.TrainDataset(images, (16, 24), augment=look)[3, 0]["x"]
    assert seen[1:] == [[(24, 16)]] and torch.equal(item, data.TrainDataset(images, (16, 24))[3, 0]["x"])


def test_batches_of_repeats_are_flat_and_the_same_with_workers(clip_set):
    items = dataset(clip_set, repeats=2, augment=invert, erase=some_box, segments=True)
    batches = data.EpochBatches(len(clip_set), 3, 2, 3)
    for one, two in zip(data.make_loader(items, batches, 0), data.make_loader(items, batches, 2), strict=True):
        assert one["x"].shape == (6, 3, 4, 32, 40) and one["boxes"].shape == (6, 4)
        assert one["label"].shape == one["index"].shape == one["seeds"].shape == (6,) and one["mask"].shape[0] == 6
        assert torch.equal(one["index"][0::2], one["index"][1::2]) and len(set(one["index"].tolist())) == 3
        assert_same(one, two)
        assert torch.equal(one["boxes"], two["boxes"]) and torch.equal(one["seeds"], two["seeds"])
    first = items[0, one["index"][0].item()]
    assert first["x"].shape[0] == 2


def test_segments_draw_each_moment_in_its_own_part(videos, monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "read_clip", lambda *_, places, **more: drawn.append(places) or torch.zeros(
        8, 3, 48, 64, dtype=torch.uint8))
    samples = layouts.Samples("video", [videos["b_frames.mp4"]], [0], [])
    items = data.TrainDataset(samples, (32, 32), 8, segments=True)
    for epoch in range(200):
        items[epoch, 0]
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
        frames = data.read_clip(videos["open_gop.mp4"], 4, 4, c / 3, short_side=27)
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
    whole = data.read_clip(path, 3, 1, 1, short_side=min(round(height * scale), round(width * scale))).transpose(0, 1)
    left, centre, right = views[3:]
    axis, side = (2, size[0]) if rotation else (3, size[1])
    long = whole.shape[axis]
    assert whole.shape[2:] == (round(height * scale), round(width * scale)) and long <= 3 * side
    for crop, start in ((left, 0), (centre, (long - side) // 2), (right, long - side)):
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


# ---------------------------------------------------------------- the end of a process


def test_signals_to_the_group_spare_workers_and_exit_is_quick(tmp_path):
    """SIGINT and SIGTERM leave the workers alone; a parent that ends with a live loader does not hang on them."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    script = tmp_path / "run.py"
    script.write_text(f"""
import multiprocessing, os, signal, sys, time
sys.path.insert(0, {os.path.dirname(data.__file__)!r})
import data
import layouts
items = data.TrainDataset(layouts.find_samples({str(tmp_path)!r}), (16, 16))
batches = iter(data.make_loader(items, data.EpochBatches(1, 1, 500), 2))
next(batches), next(batches)  # one from each worker: both have started
for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
print(sum(1 for _ in zip(range(300), batches)), "av" in sys.modules)
raise SystemExit(5)
""")
    start = time.time()
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.split()) == (5, ["300", "False"]), result.stderr
    assert time.time() - start < 40


# ---------------------------------------------------------------- python data.py --check


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
