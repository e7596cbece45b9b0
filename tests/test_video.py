"""video.py against videos that carry their frame numbers, written by PyAV on the spot."""
import functools
import gc
import os
import random
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, slow
from PIL import Image, PngImagePlugin
from plain import plain_clip

import layouts
import video

av = pytest.importorskip("av")


# ------------------------------------------------------------ videos whose frames show their number

def numbered_frame(number, width=64, height=48):
    """Eight vertical bars, black or white: the bits of the number, lowest first."""
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    row = np.array(bits, np.uint8).repeat(width // 8)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def read_numbers(clip):
    """(T, 3, H, W) -> the numbers shown, read from the middle of the bars."""
    columns = [int((bit + 0.5) * clip.shape[-1] / 8) for bit in range(8)]
    bits = clip[:, :, clip.shape[2] // 2, columns].float().mean(1) > 127
    return [sum(int(bit) << k for k, bit in enumerate(row)) for row in bits]


def write_video(path, pts, unit=Fraction(1, 30), codec="libx264", options=None, rotation=0,
                metadata=(), sound=0, noise=False):
    """A numbered frame for each time in `pts` (in units of `unit` s). sound: seconds of silence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata)
        rate = round(1 / unit) if unit > Fraction(1, 100) else 30
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = unit
        stream.options = options or {}
        if rotation:
            stream.set_display_rotation(rotation)
        packets = []
        if sound:
            voice = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for k in range(round(sound * 10)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, 800 * k, Fraction(1, 8000)
            packets += voice.encode(frame)
        for number, when in enumerate(pts):
            pixels = numbered_frame(number)
            if noise:
                pixels[:12] = np.random.default_rng(number).integers(0, 256, (12, 64, 3))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = when, unit
            packets += stream.encode(frame)
        packets += stream.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return str(path)


def decode_all(path):
    """Slow reference: (times, duration) of all frames in s. Frame k shows number k."""
    return decode_file(path, os.path.getsize(path))


@functools.lru_cache
def decode_file(path, size):
    with av.open(path) as container:
        stream = container.streams.video[0]
        unit = float(stream.time_base)
        frames = [(frame.pts * unit, (frame.duration or 0) * unit)
                  for frame in container.decode(stream)]
        times = [time for time, _ in frames]
        if times != sorted(times):  # H.264 in AVI: the order is right, the times are not
            times = [k / 30 for k in range(len(times))]
        if stream.duration and "matroska" not in container.format.name:
            return times, float(stream.duration * stream.time_base)
        return times, max(sum(frame) for frame in frames) - times[0]


def expected_numbers(path, num_frames, rate, position):
    times, duration = decode_all(path)
    start = times[0] + position * max(duration - num_frames * rate / 30, 0)
    moments = [start + j * rate / 30 + 6e-4 for j in range(num_frames)]
    return [max([k for k, time in enumerate(times) if time <= moment], default=0)
            for moment in moments]


IRREGULAR = [0, 40, 50, 140, 150, 160, 400, 410, 433, 500, 900, 901, 950, 1000, 1033, 1066, 1100,
             1500, 2400, 2500]
FAST_VP8 = {"deadline": "realtime", "cpu-used": "8"}
VIDEOS = {
    "b_frames.mp4": dict(pts=range(120), options={"bf": "3", "g": "40", "b-pyramid": "normal"}),
    "open_gop.mp4": dict(pts=range(120), options={
        "bf": "3", "g": "20", "x264-params": "open-gop=1:keyint=20"}),
    "keyframe_first_only.mkv": dict(pts=range(100), options={"g": "999"}),
    "irregular.mp4": dict(pts=[t * 15 for t in IRREGULAR], unit=Fraction(1, 15000)),
    "odd_rate.mp4": dict(pts=range(90), unit=Fraction(1001, 24000)),
    "slow.mkv": dict(pts=range(12), unit=Fraction(1, 2)),
    "late_start.mp4": dict(pts=range(70, 170)),
    "vp8.webm": dict(pts=range(80), codec="libvpx", options=FAST_VP8),
    "mpeg4.avi": dict(pts=range(80), codec="mpeg4", options={"g": "15"}),
    "b_frames.avi": dict(pts=range(80), options={"bf": "2", "g": "30"}),  # packets without times
    "transport.ts": dict(pts=range(200), options={"bf": "2", "g": "30"}),
    "long_sound.mkv": dict(pts=range(100), options={"g": "30"}, sound=5),
    "late_picture.mkv": dict(pts=range(30, 120), options={"g": "30"}, sound=3.5),
    "refresh.mp4": dict(pts=range(120), options={"x264-params": "intra-refresh=1:keyint=30"}),
    "short.mp4": dict(pts=range(7)),
}


@pytest.fixture
def strategies(monkeypatch):
    """The strategies of all readings, in order."""
    used, read_frames = [], video.read_frames
    monkeypatch.setattr(video, "read_frames", lambda *a: used.append(a[-1]) or read_frames(*a))
    return used


# ------------------------------------------------------------------------------------ moments

@pytest.mark.parametrize("name", VIDEOS)
def test_read_clip_shows_the_frames_of_a_slow_reference(videos, name):
    for num_frames, rate in ((16, 4), (5, 1)):
        for position in (0, 0.31, 0.5, 0.77, 1):
            clip = video.read_clip(videos[name], num_frames, rate, position, short_side=None)
            assert clip.shape == (num_frames, 3, 48, 64) and clip.dtype == torch.uint8
            assert read_numbers(clip) == expected_numbers(videos[name], num_frames, rate, position)


@pytest.mark.parametrize("name", [
    "b_frames.mp4", "open_gop.mp4", "odd_rate.mp4", "late_start.mp4", "mpeg4.avi"])
def test_read_clip_is_the_naive_form(videos, name):
    for position in (0, 0.4, 1):
        for side in (48, 96):
            fast = video.read_clip(videos[name], 8, 3, position, side)
            naive = plain_clip(videos[name], 8, 3, position, side)
            assert read_numbers(fast) == read_numbers(naive)
            if side == 48:  # unscaled: the same pixels
                assert torch.equal(fast, naive)
            assert (fast.float() - naive.float()).abs().mean() < 2  # of 255, at the bars' edges


def test_read_clip_16x4_at_30_fps_steps_by_4(videos):
    for position, first in ((0, 0), (1, 56)):
        clip = video.read_clip(videos["b_frames.mp4"], position=position)
        assert read_numbers(clip) == list(range(first, first + 64, 4))


@pytest.mark.parametrize("name", VIDEOS)
def test_segments_split_the_video_into_equal_parts(videos, name):
    times, duration = decode_all(videos[name])
    rng = random.Random(name)
    for places in ([0.5] * 8, [0] * 5, [1] * 5, [rng.random() for _ in range(16)]):
        moments = video.segment_times(times[0], duration, places)
        assert moments == sorted(moments)
        for j, moment in enumerate(moments):
            assert j <= (moment - times[0]) / duration * len(places) + 1e-9
            assert moment <= times[0] + duration + 1e-9
        clip = video.read_clip(videos[name], len(places), short_side=None, places=places)
        assert read_numbers(clip) == [
            max([k for k, time in enumerate(times) if time <= moment + 6e-4]) for moment in moments]
    if name != "irregular.mp4":  # its header counts less than it holds
        places = [0, 0.5, 1 - 1.5 / len(times)]
        clip = video.read_clip(videos[name], 3, short_side=None, places=places)
        assert read_numbers(clip)[2] == len(times) - 1  # half a frame before the end


def test_short_video_repeats_its_last_frame(videos):
    assert read_numbers(video.read_clip(videos["short.mp4"], 5, 2, 0.9)) == [0, 2, 4, 6, 6]


def test_moments_count_from_the_first_frame(videos):
    for name in ("b_frames.mp4", "late_picture.mkv", "transport.ts"):
        frames = video.read_moments(videos[name], [1.5, 0, -1, 2.01])
        assert read_numbers(frames) == [45, 0, 0, 60]
        with pytest.raises(video.UnreadableFile, match="wanted"):
            video.read_moments(videos[name], [0, 60])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs /proc")
@pytest.mark.parametrize("ending", ["mkv", slow("ts")])
def test_a_clip_reads_little_of_a_long_file(tmp_path, ending):
    path = write_video(tmp_path / f"v.{ending}", range(1000), Fraction(1, 5), noise=True,
                       options={"g": "10", "preset": "ultrafast", "qp": "1"})
    counts = []
    for position in (0, 0.2, 0.9):
        numbers = read_numbers(video.read_clip(path, 4, 4, position, None))
        assert numbers == [n % 256 for n in expected_numbers(path, 4, 4, position)]
        before = int(Path("/proc/self/io").read_text().split()[1])
        video.read_clip(path, 4, 4, position, None)
        counts.append(int(Path("/proc/self/io").read_text().split()[1]) - before)
    assert max(counts) < 0.4 * os.path.getsize(path)


# ------------------------------------------------------------------------------------ strategies

def test_frames_that_nobody_needs_are_not_decoded(videos, monkeypatch):
    decoded, decode_needed = [], video.decode_needed

    def spy(*arguments):
        frames, expected = decode_needed(*arguments)
        return (decoded.append(frame) or frame for frame in frames), expected
    monkeypatch.setattr(video, "decode_needed", spy)
    clip = video.read_clip(videos["b_frames.mp4"], 4, 10, 0, None)
    assert read_numbers(clip) == [0, 10, 20, 30] and 4 <= len(decoded) < 20  # of 31


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_one_reading_is_enough(ending, tmp_path, strategies):
    """Matroska's packets carry no decoding times. Those that libav makes up go back and forth."""
    options = {"g": "48", "bf": "8", "b-pyramid": "normal"}
    path = write_video(tmp_path / f"v.{ending}", range(240), options=options)
    for k in range(8):
        clip = video.read_clip(path, 8, 3, k / 7, None)
        assert read_numbers(clip) == expected_numbers(path, 8, 3, k / 7)
    assert strategies == ["seek"] * 8


def test_a_frame_on_display_that_does_not_come_is_not_replaced(videos, monkeypatch, strategies):
    def lossy(*arguments):
        frames, expected = decode_needed(*arguments)
        return (frame for frame in frames if frame.pts != expected[2]), expected
    decode_needed = video.decode_needed
    monkeypatch.setattr(video, "decode_needed", lossy)
    clip = video.read_clip(videos["b_frames.mp4"], 8, 3, 0.5, None)
    assert read_numbers(clip) == expected_numbers(videos["b_frames.mp4"], 8, 3, 0.5)
    assert strategies == ["seek", "start"]


# ------------------------------------------------------------------------------------ pictures

def test_read_clip_scales_the_short_side(videos):
    assert video.read_clip(videos["short.mp4"], 2, 1, short_side=96).shape == (2, 3, 96, 128)
    small = video.read_clip(videos["short.mp4"], 2, 1, short_side=24)
    assert small.shape == (2, 3, 24, 32) and read_numbers(small) == [2, 3]


@pytest.mark.parametrize("degrees", (90, 180, 270))
def test_rotation_is_applied(tmp_path, videos, degrees):
    path = write_video(tmp_path / "rotated.mp4", range(7), rotation=degrees)
    with av.open(path) as container:
        stored = next(container.decode(video=0)).rotation  # counterclockwise
    assert stored % 180 == degrees % 180
    upright = video.read_clip(videos["short.mp4"], 3, 1, short_side=None)
    turned = video.read_clip(path, 3, 1, short_side=None)
    assert torch.equal(turned, torch.rot90(upright, stored // 90, (2, 3)))
    assert video.picture_size(path) == tuple(turned.shape[2:])


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
                                    (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0)])
def test_whole_display_matrix_is_applied(tmp_path, videos, matrix):
    """Mirrors as well as rotations, written into the track header of an mp4."""
    a, b, c, d = matrix
    content = bytearray(Path(videos["short.mp4"]).read_bytes())
    place = content.index(b"tkhd") + 44                  # nine big-endian numbers
    content[place:place + 36] = struct.pack(
        ">9i", *(65536 * n for n in (a, b)), 0, *(65536 * n for n in (c, d)), 0, 0, 0, 2 ** 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(content)
    frames = video.read_clip(videos["short.mp4"], 2, 1, short_side=None)
    turned = video.read_clip(path, 2, 1, short_side=None)
    H, W = frames.shape[2:]
    assert tuple(turned.shape[2:]) == video.picture_size(path) == ((H, W) if a else (W, H))
    for y, x in ((0, 0), (0, W - 1), (H - 1, 0), (3, 5), (H // 2, 7)):
        column, row = a * x + c * y, b * x + d * y       # negative: counted from the other side
        column, row = column - (a + c < 0), row - (b + d < 0)
        assert torch.equal(turned[:, :, row, column], frames[:, :, y, x])


def test_names_with_a_colon_and_other_endings(tmp_path, videos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2024-01-01T12:30:05.mp4", "a.m4v"):
        Path(name).write_bytes(Path(videos["short.mp4"]).read_bytes())
        assert len(video.read_clip(name, 2, 1)) == 2
    names = ("A.M4V", "a.mpg", "a.mpeg", "a.ts", "a.flv")
    assert {layouts.media_kind(name) for name in names} == {"video"}


def test_long_text_in_a_png(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("profile", "x" * 3_000_000, zip=True)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png", pnginfo=text)
    assert video.read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def test_color_range_is_respected(tmp_path):
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
        clip = video.read_clip(tmp_path / name, 1, 1, short_side=None)
        shown.append(int(clip.float().mean().round()))
    assert abs(shown[0] - 255) <= 1 and abs(shown[1] - 235) <= 1  # limited range: 235 is white


def test_read_image_modes(tmp_path):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for mode in ("L", "RGB", "P", "LA", "RGBA"):
        Image.fromarray(gray).convert(mode).save(tmp_path / f"{mode}.png")
    for name in ("deep", "L", "RGB", "P", "LA", "RGBA"):
        image = video.read_image(tmp_path / f"{name}.png")
        assert image.mode == "RGB", name
        assert np.array_equal(np.asarray(image), gray[..., None].repeat(3, 2)), name
    Image.fromarray(gray).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    image = np.asarray(video.read_image(tmp_path / "cmyk.jpg")).astype(int)
    assert abs(image - gray[..., None]).mean() < 3


def test_image_too_large_for_pillow_is_read(tmp_path, monkeypatch):
    ramp = np.arange(200, dtype=np.uint8)[None].repeat(90, 0)
    Image.fromarray(ramp).save(tmp_path / "big.jpg", quality=95)
    whole = video.read_image(tmp_path / "big.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)  # refused by Pillow from 5000 pixels on
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "big.jpg")
    small = video.read_image(tmp_path / "big.jpg")
    assert small.size == (100, 45)
    assert np.abs(np.asarray(small).astype(float) - np.asarray(whole.reduce(2))).max() == 0
    assert small.crop((0, 0, 100, 45)).resize((8, 8)).size == (8, 8)
    with pytest.raises(video.UnreadableFile):
        video.read_image(tmp_path / "absent.jpg")
    assert Image.MAX_IMAGE_PIXELS == 2500


def test_pictures_that_would_take_gigabytes(tmp_path, videos, monkeypatch):
    """Refused before they are decoded, or read in strips, as if halved as a whole."""
    pixels = np.random.default_rng(0).integers(0, 2, (301, 77), np.uint8)
    Image.fromarray(255 * pixels).convert("1").save(tmp_path / "bits.png")
    whole = video.read_image(tmp_path / "bits.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)  # more than one strip, quartered
    assert np.array_equal(video.read_image(tmp_path / "bits.png"), whole.reduce(4))
    Image.new("L", (330, 10)).save(tmp_path / "long.png")
    monkeypatch.setattr(video, "MAX_IMAGE", 5000)
    monkeypatch.setattr(video, "MAX_FRAME", 64 * 48 - 1)
    for read, path, words in ((video.read_image, tmp_path / "bits.png", "77x301.*more than 5000"),
                              (video.read_image, tmp_path / "long.png", "32 times as long"),
                              (video.read_clip, videos["short.mp4"], "64x48.*more than 3071")):
        with pytest.raises(video.UnreadableFile, match=words):
            read(path)


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency_keeps_its_colors(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "p.png", transparency=b"\x00\x80\xff")
    pixels = np.asarray(video.read_image(tmp_path / "p.png"))
    assert pixels.tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


# ------------------------------------------------------------------------------------ damaged files

def test_unreadable_files_name_file_and_reason(tmp_path, videos):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    damaged = {"empty.mp4": b"", "text.mp4": b"no video at all\n" * 20, "absent.mp4": None,
               "no_index.mp4": Path(videos["short.mp4"]).read_bytes()[:900],
               "cut.jpg": (tmp_path / "whole.jpg").read_bytes()[:1500]}
    for name, content in damaged.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(video.UnreadableFile, match=name):
            (video.read_image if name == "cut.jpg" else video.read_clip)(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for read in (video.read_clip, video.read_image, video.picture_size):
        with pytest.raises(video.UnreadableFile, match="regular file"):
            read(tmp_path / "pipe.mp4")


def test_title_in_latin_1_is_no_obstacle(tmp_path):
    path = Path(write_video(tmp_path / "title.mkv", range(7), metadata={"title": "Caf? noir"}))
    path.write_bytes(path.read_bytes().replace(b"Caf?", b"Caf\xe9"))
    assert read_numbers(video.read_clip(path, 7, 1)) == list(range(7))


def test_webm_cut_off_is_a_shorter_video(tmp_path, videos):
    whole = Path(videos["vp8.webm"]).read_bytes()
    path = tmp_path / "cut.webm"
    for share in (0.66, 0.4):  # the second is a file that changes after it was read
        path.write_bytes(whole[:int(len(whole) * share)])
        for position in (0, 0.47, 1):
            numbers = read_numbers(video.read_clip(path, 8, 2, position, None))
            assert numbers == expected_numbers(str(path), 8, 2, position) and numbers[-1] < 79


def cut_off(folder):
    """An MP4 whose header comes first and promises 4 s, of which 60 % of the bytes are there."""
    path = write_video(folder / "a.mp4", range(120), options={"g": "30"})
    with av.open(path) as source, \
            av.open(str(folder / "f.mp4"), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    whole = (folder / "f.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[:int(len(whole) * 0.6)])
    return str(folder / "cut.mp4")


def test_video_cut_off_after_its_header_is_not_filled_up(tmp_path):
    path = cut_off(tmp_path)
    assert read_numbers(video.read_clip(path, 4, 2, 0, None)) == [0, 2, 4, 6]
    for position in (0.7, 1):
        with pytest.raises(video.UnreadableFile):
            video.read_clip(path, 16, 2, position)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_reading_leaves_nothing_open(videos):
    video.read_clip(videos["vp8.webm"])
    gc.collect()                                         # what earlier tests left
    before = len(os.listdir("/proc/self/fd"))
    for k in range(15):
        video.read_clip(videos["b_frames.mp4"], 4, 1, k / 30, 24)
        with pytest.raises(video.UnreadableFile):
            video.read_clip(ROOT / "video.py")
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_many_open_files_is_no_fault_of_a_file(videos, tmp_path):
    resource = pytest.importorskip("resource")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    video.read_image(tmp_path / "a.png")  # Pillow's plugins are loaded
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        for read, path in ((video.read_clip, videos["short.mp4"]),
                           (video.read_image, tmp_path / "a.png")):
            with pytest.raises(OSError, match="limit is 3.*ulimit -n"):
                read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
