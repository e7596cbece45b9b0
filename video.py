"""Decoding: the frames of a video on display at given moments, and images.

Paper: Wei et al., Masked Feature Prediction, CVPR 2022, Sec. 4 (16x4 clips).
Release: SlowFast's video loader. Difference: time is counted in seconds, so that any frame rate,
fixed or not, gives the same motion.
"""

import errno
import functools
import itertools
import math
import os
import struct
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, PngImagePlugin

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28  # long, but no attack

TARGET_FPS = 30      # release: sampling_rate counts frames of a 30 fps video
CLOCK_SLACK = 6e-4   # s; Matroska rounds the time of a frame to a millisecond
MAY_LACK = 0.5       # s by which a video may end before its header says so
SCALING = "AREA"     # each pixel is the mean over its area, as in the release's torchvision decoder
REORDERED = 1        # s by which a packet may come after one that is shown later
LOOK_AHEAD = 2000    # packets held in memory to learn which frames to skip
MAX_ASPECT = 32      # scaling the short side of a longer picture to 256 would take gigabytes
MAX_FRAME = 2 ** 26  # pixels of a video's frame, twice 8K: a decoder holds 16 frames or more
MAX_IMAGE = 2 ** 30  # bytes of a decoded image
EXACT_HEADERS = "mov,mp4,m4a,3gp,3g2,mj2", "avi", "mpegts"    # they time the picture by itself


class UnreadableFile(ValueError):
    """A media file that does not decode at the requested place, with `path` and `reason`."""

    def __init__(self, path, reason):
        super().__init__(f"cannot read {path}: {reason}")
        self.path, self.reason = str(path), str(reason)


def file_limit():
    """How many files this process may have open at once."""
    try:
        import resource
    except ImportError:                         # Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit if limit >= 0 else math.inf


def out_of_files():
    """The error for too many open files, which is no fault of the file that was to be opened."""
    return OSError(f"too many open files, the limit is {file_limit()}: raise it (ulimit -n 4096) "
                   "or use fewer --workers")


def unreadable(path, error):
    """The error to raise for one that came up while reading a file."""
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return out_of_files()
    return UnreadableFile(path, getattr(error, "strerror", None) or error)


def check_regular(path):
    """Raises UnreadableFile for a named pipe or a device, since opening one can block for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UnreadableFile(path, "not a regular file")


def check_size(path, width, height, most):
    """Raises UnreadableFile for a picture of more than `most` pixels or of too long a shape."""
    if width * height > most or max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableFile(path, f"{width}x{height} pixels, more than {most} or more than "
                             f"{MAX_ASPECT} times as long as wide: crop it or make it smaller")


@contextmanager
def open_video(path, quick=False):
    """Yields (container, video stream), decoded by one thread: a loader has a worker per core.

    quick: learn from the header and a second of packets, without decoding a frame.
    Raises UnreadableFile, also for what fails inside the `with` block, and for a frame of more than
    67 million pixels (MAX_FRAME) or 32 times as long as wide (MAX_ASPECT).
    """
    import av
    check_regular(path)
    options = {"skip_frame": "all", "analyzeduration": "1000000"} if quick else {}
    place = os.path.abspath(path)               # FFmpeg would take 12:30.mp4 for a protocol
    try:
        try:
            container = av.open(place, options=options)
        except UnicodeDecodeError:              # a title in Latin-1, in PyAV before 19
            container = av.open(place, options=options, metadata_errors="replace")
        with container:
            stream = container.streams.best("video")              # not a cover picture
            if stream is None or stream.codec_context is None:
                raise UnreadableFile(path, "no decoder for its codec" if stream
                                     else "it has no video stream")
            check_size(path, stream.width, stream.height, MAX_FRAME)
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise unreadable(path, error) from error


# ------------------------------------------------------------------------------------------- times


def frame_rate(stream):
    """Frames per second by the header, or 30. Only for files whose packets carry no times."""
    return float(stream.average_rate or stream.guessed_rate or TARGET_FPS)


def extent(path, container, stream):
    """(first time, duration) of the picture in s."""
    start, duration, unit = stream.start_time, stream.duration, float(stream.time_base)
    if container.format.name in EXACT_HEADERS and duration and start is not None:
        return start * unit, duration * unit
    status = os.stat(path)
    return packet_extent(os.fspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=100_000)
def packet_extent(path, size, modified):
    """`extent` by the first packets and those after the last keyframe.

    Matroska's header gives the start and the duration of the longest stream, perhaps the sound.
    """
    with open_video(path, quick=True) as (container, stream):
        unit, starts = float(stream.time_base), []
        for packet in container.demux(stream):
            if packet.pts is None or packet.pts * unit > min(starts, default=math.inf) + REORDERED:
                break
            starts.append(packet.pts * unit)
        container.seek(2 ** 40, stream=stream)  # far beyond the end: to the last keyframe
        ends = [(packet.pts + (packet.duration or 0)) * unit for packet in container.demux(stream)
                if packet.pts is not None]
        if not starts or not ends:
            raise UnreadableFile(path, "its packets carry no times")
        return min(starts), max(ends) - min(starts)


def clip_times(first, duration, num_frames, sampling_rate, position):
    """Moments (s) of a clip, sampling_rate/30 s apart. position: in [0, 1] of the free time."""
    start = first + position * max(duration - num_frames * sampling_rate / TARGET_FPS, 0)
    return [start + j * sampling_rate / TARGET_FPS for j in range(num_frames)]


def segment_times(first, duration, places):
    """A moment (s) in each of len(places) equal parts, at places[j] in [0, 1] of part j (SSv2)."""
    return [first + (j + place) * duration / len(places) for j, place in enumerate(places)]


# ------------------------------------------------------------------------------------------ frames


def read_clip(path, num_frames=16, sampling_rate=4, position=0.5, short_side=256, places=None):
    """Reads the frames on display at num_frames moments, sampling_rate/30 s apart.

    position: in [0, 1], where the clip lies in the video. A video that is shorter than the clip
    starts at its beginning and repeats its last frame.
    places: num_frames numbers in [0, 1], for the moments of `segment_times` instead.
    short_side: pixels to which the shorter side is scaled, up or down. None keeps the size.
    Returns (num_frames, 3, H, W) uint8 RGB. Pixels are taken as square, as in the release.
    Raises UnreadableFile if the file does not decode there.
    Paper: Sec. 4, 16x4. Release: 16 indices in linspace(start, start + 63), so every 4.2 frames.
    """
    if places is not None:
        return read_at(path, lambda *extent: segment_times(*extent, places), short_side)
    return read_at(path, lambda *extent: clip_times(*extent, num_frames, sampling_rate, position),
                   short_side)


def read_moments(path, times, min_size=None):
    """Frames (N, 3, H, W) uint8 on display `times` seconds after the first frame; see `read_at`.

    Raises UnreadableFile, also for a moment after the end.
    """
    def choose(first, duration):
        if max(times) > duration + MAY_LACK:
            raise UnreadableFile(
                path, f"it lasts {duration:.2f} s, {max(times):.2f} s is wanted")
        return [first + max(time, 0) for time in times]
    return read_at(path, choose, min_size)


@functools.lru_cache(maxsize=1024)
def picture_size(path):
    """(height, width) in pixels of a video's frames, upright. Raises UnreadableFile."""
    with open_video(path) as (container, stream):
        for frame in container.decode(stream):
            size = frame.height, frame.width
            return size[::-1] if orientation(frame)[0] else size
    raise UnreadableFile(path, "no frame decodes")


def read_at(path, choose, min_size=None):
    """Frames (N, 3, H, W) uint8 on display at the N moments choose(first time, duration) in s.

    min_size: (H, W) that the scaled frames just cover, an int for a square, None to keep the size.
    Raises UnreadableFile.
    """
    times = None
    for strategy in ("seek", "start", "count"):  # most files need only the first
        try:
            with open_video(path, quick=strategy == "seek") as (container, stream):
                if times is None:
                    first, duration = extent(path, container, stream)
                    times = choose(first, duration)
                    order = np.argsort(times, kind="stable")
                frames = read_frames(path, container, stream, [times[k] for k in order],
                                     first, duration, min_size, strategy)
        except UnreadableFile:
            if strategy != "seek" or times is None:
                raise
            continue                            # the seek itself may be at fault
        if frames is not None:
            if any(frame.shape != frames[0].shape for frame in frames):
                raise UnreadableFile(path, "the picture changes its shape within the clip")
            return torch.from_numpy(np.stack([frames[k] for k in np.argsort(order)]))


def packets_from_keyframe(container, stream, time):
    """The packets of the stream from a keyframe at or before `time` (s) on.

    An MPEG transport stream has no index: a seek lands between keyframes, so the next is earlier.
    """
    for back in (0, 1, 4, 16, 64):
        container.seek(round((time - back) / stream.time_base), stream=stream)
        packets = itertools.dropwhile(lambda packet: not packet.is_keyframe,
                                      container.demux(stream))
        first = next(packets, None)
        if first and (first.pts is None or first.pts * stream.time_base <= time + CLOCK_SLACK):
            return itertools.chain([first], packets)
    return iter(())


def decode_needed(packets, stream, times):
    """Decodes; in H.264, without the frames that are neither on display at `times` nor referred to.

    That takes 60 to 90 % of the time of decoding all frames. times: ascending, in s.
    Returns (iterator of frames, pts of the frame on display at each time, or None if unknown).
    """
    unit, context = float(stream.time_base), stream.codec_context
    ahead, expected, idle = [], None, set()
    if context.name == "h264":                  # in other codecs it gains nothing
        for packet in itertools.islice(packets, LOOK_AHEAD):
            ahead.append(packet)
            time = packet.pts if packet.dts is None else packet.dts
            if time is None or time * unit > times[-1] + REORDERED:
                pts = [packet.pts for packet in ahead if packet.size and not packet.is_discard]
                if pts and None not in pts:
                    pts = np.sort(pts)
                    after = np.searchsorted(pts * unit, np.array(times) + CLOCK_SLACK, "right")
                    expected = pts[after - 1].tolist()
                    idle = {packet.pts for packet in ahead}.difference(expected)
                break

    def frames():
        for packet in itertools.chain(ahead, packets):
            context.skip_frame = "NONREF" if packet.pts in idle else "DEFAULT"
            yield from packet.decode()
    return frames(), expected


def read_frames(path, container, stream, times, first, duration, min_size, strategy):
    """One RGB array for each of `times` (ascending, s). Only the frames on display are converted.

    strategy: "seek" starts at a keyframe and decodes no more than it must, "start" decodes from the
    beginning, "count" does too and takes the times from the frame rate.
    Returns None if the strategy does not suit the file. Raises UnreadableFile if the video ends
    before the last moment and before its header says.
    """
    unit, pictures, expected = float(stream.time_base), [], None
    if strategy == "seek":
        packets = packets_from_keyframe(container, stream, times[0])
        frames, expected = decode_needed(packets, stream, times)
    else:
        frames = container.decode(stream)
    shown, shown_time, picture = None, -math.inf, None
    for count, frame in enumerate(itertools.chain(frames, [None])):
        if frame is None:                       # the end: the last frame stays on display
            if shown is None:
                raise UnreadableFile(path, "no frame decodes")
            end = shown_time + (shown.duration or 0) * unit
            if min(times[-1], first + duration) > end + MAY_LACK:
                raise UnreadableFile(path, f"cut off: it ends after {end - first:.2f} s, "
                                           f"its header promises {duration:.2f} s")
            time = math.inf
        elif strategy == "count":
            time = first + count / frame_rate(stream)
        elif frame.pts is None or frame.pts * unit < shown_time:
            return None                         # H.264 in AVI
        elif strategy == "seek" and shown is None and not frame.key_frame:
            return None                         # intra refresh: no clean picture to start from
        elif strategy == "seek" and "444" in frame.format.name:
            return None                         # a fault of old encoders shows in frame 0 only
        else:
            time = frame.pts * unit
        while time > times[len(pictures)] + CLOCK_SLACK:          # the frame before was on display
            if shown is None:
                if strategy == "seek":
                    return None
                shown = frame                   # nothing comes earlier
            if expected and shown.pts != expected[len(pictures)]:
                return None
            if picture is None:
                picture = to_rgb(shown, min_size)
            pictures.append(picture)
            if len(pictures) == len(times):
                return pictures
        shown, shown_time, picture = frame, time, None


def orientation(frame):
    """How to set a decoded frame upright: (swap rows and columns, then mirror rows, columns)."""
    from av.sidedata.sidedata import Type
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # x, y on display: ax + cy, bx + dy
    swap = abs(b) > abs(a)
    return swap, (b if swap else d) < 0, (c if swap else a) < 0


def to_rgb(frame, min_size):
    """(3, H, W) uint8 of a decoded frame: scaled and converted in one pass, then set upright."""
    scale, (swap, mirror_rows, mirror_columns) = 1, orientation(frame)
    if min_size:
        high, wide = (min_size, min_size) if isinstance(min_size, int) else min_size
        if swap:
            high, wide = wide, high
        scale = max(high / frame.height, wide / frame.width)
    size = round(frame.width * scale), round(frame.height * scale)
    rgb = frame.reformat(*size, "rgb24", interpolation=SCALING, threads=1).to_ndarray()
    upright = rgb.swapaxes(0, 1) if swap else rgb
    upright = upright[::-1 if mirror_rows else 1, ::-1 if mirror_columns else 1]
    return upright.transpose(2, 0, 1)


def to_rgb_image(image):
    """RGB without alpha of a PIL image of any mode."""
    image.info.pop("transparency", None)        # of a palette: Pillow would warn
    if image.mode.startswith("I"):              # 16 bits per pixel: convert() would clip to white
        high_bytes = np.asarray(image).astype(np.uint32) >> 8
        image = Image.fromarray(high_bytes.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def read_image(path):
    """Reads an image as PIL RGB, without alpha and the EXIF orientation, as the release does.

    Above the size at which Pillow suspects an attack (179 million pixels) it is halved until below.
    Raises UnreadableFile if it is damaged, cut off, takes more than 1 GiB before it is converted
    (MAX_IMAGE), or is more than 32 times as long as wide (MAX_ASPECT).
    """
    check_regular(path)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            (W, H), n = image.size, 1
            check_size(path, W, H, MAX_IMAGE // (1 if image.mode in ("1", "L", "P") else 4))
            image.load()
            while limit and (W // n + 1) * (H // n + 1) > 2 * limit:  # Pillow would not crop it
                n *= 2
            if n == 1:
                return to_rgb_image(image)
            small = Image.new("RGB", (math.ceil(W / n), math.ceil(H / n)))
            for top in range(0, H, 64 * n):     # in strips, since RGB takes four bytes a pixel
                strip = image.crop((0, top, W, min(top + 64 * n, H)))
                small.paste(to_rgb_image(strip).reduce(n), (0, top // n))
            return small
    except UnreadableFile:
        raise
    except Exception as error:                  # a damaged file can raise anything in Pillow
        raise unreadable(path, error) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
