"""Videos and images: decoding, sampling clips in time, crops, training samples, views for a test, loaders.

Paper: Wei et al., Masked Feature Prediction, CVPR 2022, Sec. 4 (16x4 clips, random resized crop, flip) and Sec. 5.
Release: SlowFast's Kinetics, SSv2 and ImageNet loaders with the MaskFeat settings.
Differences:
- time is counted in seconds, so any frame rate, fixed or not, gives the same motion (see `read_clip`);
- normalisation is left to the training script: a loader hands over uint8, a quarter of the bytes;
- a random number depends on (seed, epoch, index) only: the number of workers, ranks or restarts changes no sample.

    python data.py --check DIR       decode every file under DIR; exit status 1 if one is unusable
"""

import argparse
import atexit
import functools
import itertools
import math
import multiprocessing
import os
import random
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import layouts

TARGET_FPS = 30      # release: sampling_rate counts frames of a 30 fps video
CLOCK_SLACK = 6e-4   # s; Matroska rounds a frame's time to a millisecond, so it is up to half of one late
MAY_LACK = 0.5       # s by which a video may end before its header says so and still count as whole
LOOK_AHEAD = 60      # s from keyframe to end of clip, up to which packets are held to tell which frames to skip
REORDERED = 1        # s by which a packet may come after one that is shown later
ATTEMPTS = 10        # files tried for one sample before giving up


class UnreadableFile(ValueError):
    """A media file that does not decode at the wanted place; `path` and `reason` say which and why."""

    def __init__(self, path, reason):
        super().__init__(f"cannot read {path}: {reason}")
        self.path, self.reason = str(path), str(reason)


# ---------------------------------------------------------------- reading


@contextmanager
def _open_video(path, quick=False):
    """(container, best video stream), decoded by one thread: parallelism is over workers. Raises UnreadableFile.

    quick: decode nothing to learn more than the header says, but look at one second's packets (0.4 ms, not 12, at
    1280x720). H.264 then has no pix_fmt, and a frame may come out too soon, which `_frames_at` notices.
    """
    import av
    try:
        options = {"skip_frame": "all", "analyzeduration": "1000000"} if quick else {}
        try:
            container = av.open(os.fspath(path), options=options)
        except UnicodeDecodeError:  # a title in Latin-1: PyAV before 19 must be told to go on
            container = av.open(os.fspath(path), options=options, metadata_errors="replace")
        with container:
            stream = container.streams.best("video")  # not a cover picture
            if stream is None:
                raise UnreadableFile(path, "it has no video stream")
            if stream.codec_context is None:
                raise UnreadableFile(path, "no decoder for its codec")
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise UnreadableFile(path, getattr(error, "strerror", None) or error) from error


def _extent(container, stream):
    """(first time, duration) in s. Moves the container on if the header does not say (Matroska, WebM)."""
    unit = float(stream.time_base)
    if stream.duration and stream.start_time is not None:
        return stream.start_time * unit, stream.duration * unit
    # The container's duration covers the sound too, so go through the packets, undecoded: 1 ms for ten seconds.
    packets = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.size]
    ends = [(pts, pts + length) for pts, length in packets if pts is not None]
    if len(ends) < len(packets) or not ends:
        return 0.0, len(packets) / _rate(stream)
    first = min(ends)[0]
    return first * unit, (max(end for _, end in ends) - first) * unit


def _rate(stream):
    """Frames per second by the header, or 30; only used for files whose packets carry no times."""
    return float(stream.average_rate or stream.guessed_rate or TARGET_FPS)


def _rgb(frame, cover):
    """(3, H, W) uint8 array of a decoded frame: scaled and converted in one pass, then turned upright."""
    scale = 1
    if cover:
        high, wide = (cover, cover) if isinstance(cover, int) else cover
        if round(frame.rotation / 90) % 2:
            high, wide = wide, high
        scale = max(high / frame.height, wide / frame.width)
    small = frame.reformat(round(frame.width * scale), round(frame.height * scale), "rgb24", threads=1)
    return np.rot90(small.to_ndarray(), round(frame.rotation / 90)).transpose(2, 0, 1)


def clip_times(first, duration, num_frames, sampling_rate, position):
    """Moments (s) of a clip: sampling_rate/30 s apart, at `position` in [0, 1] of what the clip leaves free."""
    start = first + position * max(duration - num_frames * sampling_rate / TARGET_FPS, 0)
    return [start + j * sampling_rate / TARGET_FPS for j in range(num_frames)]


def segment_times(first, duration, places):
    """One moment (s) in each of len(places) equal parts of a video, at places[j] in [0, 1] of part j. Release: SSv2."""
    return [first + (j + place) * duration / len(places) for j, place in enumerate(places)]


def read_clip(path, num_frames=16, sampling_rate=4, position=0.5, short_side=256, places=None):
    """Reads the frames on display at num_frames moments, sampling_rate/30 s apart.

    position: in [0, 1], where the clip of num_frames*sampling_rate/30 s lies in the video. A shorter video starts at
    its beginning and repeats its last frame.
    places: num_frames numbers in [0, 1]; given them, the moments are `segment_times`, over the whole video.
    short_side: height or width in pixels to which the shorter one is scaled, up or down; None keeps the size.
    Returns (num_frames, 3, H, W) uint8 RGB. Pixels are taken as square, as in the release.
    Raises UnreadableFile if the file does not decode there.
    Paper: Sec. 4, 16x4. Release: 16 indices in linspace(start, start + 63), a step of 4.2 frames instead of 4.
    """
    if places is not None:
        return _read_at(path, lambda first, duration: segment_times(first, duration, places), short_side)
    return _read_at(path, lambda *extent: clip_times(*extent, num_frames, sampling_rate, position), short_side)


def read_moments(path, times, cover=None):
    """Frames (N, 3, H, W) uint8 on display `times` seconds after a video's first frame; cover as in `_read_at`.

    However long the video is, only what is near the moments is read. Raises UnreadableFile, also for one after the end.
    """
    return _read_at(path, list(times), cover)


@functools.lru_cache(maxsize=1024)
def picture_size(path):
    """(height, width) of a video's frames, upright, in pixels. Raises UnreadableFile."""
    with _open_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise UnreadableFile(path, "no frame decodes")
        return (frame.width, frame.height) if round(frame.rotation / 90) % 2 else (frame.height, frame.width)


def _read_at(path, choose, cover):
    """Frames (N, 3, H, W) uint8 on display at the N moments that choose(first time, duration) names, in any order.

    choose: or a list of the N moments, in s after the first frame; the duration is then not asked for.
    cover: (H, W), the frames are scaled so as to just cover it; an int, a square of that side; or None.
    """
    times = None
    for way in ("skip", "seek", "start", "count"):  # the quick way first; most files never need another
        try:
            with _open_video(path, quick=way == "skip") as (container, stream):
                if way in ("skip", "seek"):
                    if callable(choose):
                        first, duration = _extent(container, stream)
                        times = choose(first, duration)
                    else:  # of a film in Matroska, `_extent` would read all; the container's rough duration will do
                        first, duration = float((stream.start_time or 0) * stream.time_base), math.inf
                        known = stream.duration * stream.time_base if stream.duration else container.duration / 1e6 \
                            if container.duration else math.inf
                        if max(choose) > known + MAY_LACK:
                            raise UnreadableFile(path, f"it lasts {float(known):.2f} s, {max(choose):.2f} s is wanted")
                        times = [first + max(time, 0) for time in choose]
                    order = np.argsort(times, kind="stable")
                    ascending = [times[k] for k in order]
                    container.seek(round(ascending[0] / stream.time_base), stream=stream)  # to a keyframe before
                frames = _frames_at(path, container, stream, ascending, first, duration, cover, way)
        except UnreadableFile:
            if way not in ("skip", "seek") or times is None:
                raise
            continue  # the seek itself may be at fault, so the verdict is left to the next way
        if frames is not None:
            if any(frame.shape != frames[0].shape for frame in frames):
                raise UnreadableFile(path, "the picture changes its shape within the clip")
            return torch.from_numpy(np.stack([frames[k] for k in np.argsort(order)]))


def _decode_needed(container, stream, times):
    """Decodes H.264 onwards but for frames that are neither on display at `times` (ascending, s) nor needed by others.

    Returns (frames, the pts of the frame on display at each of `times`), or None if the packets do not tell which.
    With B-frames, takes two thirds to nine tenths of the time of decoding all.
    """
    unit, context, packets, ahead = float(stream.time_base), stream.codec_context, container.demux(stream), []
    for packet in packets:
        ahead.append(packet)
        time = packet.pts if packet.dts is None else packet.dts
        if time is None or time * unit > times[-1] + REORDERED:
            break
        if time * unit < times[-1] - LOOK_AHEAD:
            return None
    pts = [packet.pts for packet in ahead if packet.size and not packet.is_discard]
    if not pts or None in pts:
        return None
    pts = np.sort(pts)
    wanted = pts[np.searchsorted(pts * unit, np.array(times) + CLOCK_SLACK, "right") - 1].tolist()

    def frames():
        idle = {packet.pts for packet in ahead}.difference(wanted)
        for packet in itertools.chain(ahead, packets):
            context.skip_frame = "NONREF" if packet.pts in idle else "DEFAULT"  # skips it unless others refer to it
            yield from packet.decode()
    return frames(), wanted


def _frames_at(path, container, stream, times, first, duration, cover, way):
    """Decodes onwards, converting only the frames on display at `times` (ascending, s); one array for each time.

    way: "skip" and "seek" start at a keyframe, the first decodes no more than it must; "start" begins at the beginning,
    "count" there too, and makes up times from the rate.
    Returns None if the way turns out wrong: it began too late, a frame on display did not come, or the frames' times
    are missing or go backwards (H.264 in AVI). Raises UnreadableFile if the video ends before `first + duration` and
    before the clip.
    """
    unit, kept, count = float(stream.time_base), [], 0
    shown, shown_time, picture = None, -math.inf, None
    frames, wanted = container.decode(stream), None
    if way == "skip" and stream.codec_context.name == "h264":  # in others "no reference" may mean less, or cost nothing
        needed = _decode_needed(container, stream, times)
        if needed is None:
            return None
        frames, wanted = needed
    for frame in itertools.chain(frames, [None]):
        if frame is None:  # the end, whose last frame stays on display
            if shown is None:
                raise UnreadableFile(path, "no frame decodes")
            end = shown_time + (shown.duration or 0) * unit
            if min(times[-1], first + duration) > end + MAY_LACK:  # cut off, so not to be filled up with its last frame
                raise UnreadableFile(path, f"it ends after {end - first:.2f} s, " + (
                    f"its header promises {duration:.2f} s" if duration < math.inf
                    else f"{times[-1] - first:.2f} s is wanted"))
            time = math.inf
        elif way == "count":
            time = first + count / _rate(stream)
        elif frame.pts is None or frame.pts * unit < shown_time:
            return None
        elif way in ("skip", "seek") and "444" in frame.format.name:  # old x264 tells of a fault in the first frame only
            return None
        else:
            time = frame.pts * unit
        count += 1
        while time > times[len(kept)] + CLOCK_SLACK:  # the frame before was on display
            if shown is None:
                if way in ("skip", "seek"):
                    return None
                shown = frame  # nothing comes earlier
            if wanted and shown.pts != wanted[len(kept)]:
                return None
            if picture is None:
                picture = _rgb(shown, cover)
            kept.append(picture)
            if len(kept) == len(times):
                return kept
        shown, shown_time, picture = frame, time, None


def read_image(path):
    """Reads an image as PIL RGB. Like the release it drops alpha and does not apply the EXIF orientation.

    One beyond the size at which Pillow suspects an attack (179 million pixels) is read too, and halved until below.
    Raises UnreadableFile if it is damaged or cut off.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            image.load()
            image.info.pop("transparency", None)  # of a palette; Pillow would warn that it is dropped
            if image.mode.startswith("I"):  # 16 bits per pixel: convert() would clip to white
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
        while limit and image.width * image.height > 2 * limit:  # a crop would be refused
            image = image.reduce(2)
        return image
    except Exception as error:  # on damaged files Pillow raises about anything; the reason is kept
        raise UnreadableFile(path, error) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# ---------------------------------------------------------------- crops


def random_resized_crop_box(height, width, rng, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)):
    """Draws (top, left, h, w) in pixels: area by a share in `scale`, aspect w/h log-uniform in `ratio`.

    After ten boxes that do not fit: the largest centred box with an aspect in `ratio`. Release.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return center_box(height, width, min(max(width / height, ratio[0]), ratio[1]))


def center_box(height, width, aspect):
    """The largest centred box (top, left, h, w) of aspect w/h."""
    h, w = min(height, max(round(width / aspect), 1)), min(width, max(round(height * aspect), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_resize(frames, box, size, resample=Image.BICUBIC):
    """Cuts a box out of a clip or image and scales it.

    frames: (T, 3, H, W) uint8, scaled bilinearly without antialiasing (release); or a PIL image, by `resample`: bicubic
    (release).
    box: (top, left, h, w). size: (H, W).
    Returns uint8 (T, 3, *size) or (3, *size).
    """
    top, left, h, w = box
    if isinstance(frames, Image.Image):
        image = frames.crop((left, top, left + w, top + h)).resize((size[1], size[0]), resample)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    crop = frames[:, :, top:top + h, left:left + w].float()
    return F.interpolate(crop, size, mode="bilinear", align_corners=False).round_().to(torch.uint8)


# ---------------------------------------------------------------- what targets need beside the input


def find_maps(paths, folder=""):
    """Label map of each image: <folder>/<the image's folder>/<stem>.pt, the stem cut at its first dot (Token Labeling);
    without a folder, beside the image. Raises FileNotFoundError if any is missing."""
    maps, there = [], {}
    for path in paths:
        place, name = os.path.split(path)
        place = os.path.join(folder, os.path.basename(place)) if folder else place
        if place not in there:  # one listing per folder: a million files are not asked for one by one
            there[place] = set(os.listdir(place)) if os.path.isdir(place) else set()
        maps.append(os.path.join(place, name.split(".")[0] + ".pt"))
    missing = [path for path in maps if os.path.basename(path) not in there[os.path.dirname(path)]]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(maps)} images have no label map, such as {missing[0]}: name "
                                "the folder of the maps with --teacher, or put them beside the images")
    return maps


def read_map(path, classes, shape=None):
    """A label map: (2, 5, H, W) float, top-5 scores and their classes, of `shape` if given. Raises UnreadableFile."""
    try:
        x = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file raises about anything
        raise UnreadableFile(path, str(error).partition("\n")[0]) from error
    found = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
    if len(found) != 4 or found[:2] != (2, 5) or shape and found != shape:
        raise UnreadableFile(path, f"it holds {found}, not a label map of {shape or '(2, 5, H, W)'}")
    if not 0 <= x[1].min() <= x[1].max() < classes:
        raise UnreadableFile(path, f"it has classes {x[1].min():g} to {x[1].max():g} of {classes}: see --label-classes")
    return x.float()


def extras(target, paths, grid, frame_stride=1, folder=""):
    """The arguments of TrainDataset for what a target (targets.py) needs. grid: (h, w) of tokens; frame_stride: frames
    per token step; folder: of the label maps, see `find_maps`."""
    if target.input_kind == "view":
        return {"view_size": tuple(8 * n for n in grid), "view_stride": frame_stride}  # dVAE: 8 pixels per token
    return {"maps": find_maps(paths, folder), "map_classes": target.dim} if target.input_kind == "labels" else {}


# ---------------------------------------------------------------- samples and batches


def sample_rng(seed, epoch, index, purpose=""):
    """The random numbers of one sample in one epoch; a purpose names a stream of its own."""
    return random.Random(f"{seed} {epoch} {index} {purpose}")


def check_kind(kind, num_frames):
    """Raises ValueError unless num_frames is a number for videos and None for images."""
    if (kind == "video") != (num_frames is not None):
        raise ValueError(f"num_frames={num_frames} does not go with {kind} data: a number for videos, "
                         "None for images; or choose another recipe or data folder")


class TrainDataset(torch.utils.data.Dataset):
    """Augmented clips or images for training, with masks if wanted, indexed by (epoch, index).

    samples: Samples. image_size: (H, W). num_frames: T, for videos only. mask: rng -> bool array, or None.
    scale, ratio, flip: random resized crop and chance of a horizontal flip (release: 0.5-1, 3/4-4/3, 0.5).
    segments: one random moment in each of T equal parts of the video instead of a clip (release: SSv2).
    augment: (list of PIL RGB images, rng) -> the same, for a whole clip at its decoded size or one cropped image.
    erase: (H, W, rng) -> box (top, left, h, w) whose pixels the training step is to erase, with noise from a seed.
    repeats: R views of one decoded file, augmented independently (release: NUM_SAMPLE).
    train=False: middle clip, largest centred crop, nothing random.
    view_size: (h, w) of a second view of the same crop and flip, cut from the original with Lanczos (BEiT); for clips,
    of every view_stride-th frame. maps: the file of each sample's label map, with classes below map_classes.
    An item is a dict of "x" uint8 (3, T, H, W) or (3, H, W), with R before that if R > 1; "label" int, "index" int and
    "unreadable", a list of (path, reason): such a file is replaced by one drawn from the sample's own generator; "mask"
    bool (if any); "boxes" int64 (R, 4) and "seeds" int64 (R,) (if erase); "view" uint8 (R, t, 3, h, w) (if view_size);
    "labels" float32 (R, 3, 5, H, W) (if maps): the map, flipped like x, and a plane whose first four numbers are the
    crop (top, left, h, w) in fractions of the flipped image; "repeats" R.
    """

    def __init__(self, samples, image_size, num_frames=None, sampling_rate=4, mask=None, seed=0, scale=(0.5, 1.0),
                 ratio=(3 / 4, 4 / 3), flip=0.5, short_side=256, train=True, segments=False, augment=None, erase=None,
                 repeats=1, view_size=None, view_stride=1, maps=None, map_classes=1000):
        check_kind(samples.kind, num_frames)
        self.samples, self.image_size, self.num_frames = samples, tuple(image_size), num_frames
        self.sampling_rate, self.mask, self.seed, self.scale = sampling_rate, mask, seed, scale
        self.ratio, self.flip, self.short_side, self.train = ratio, flip, short_side, train
        self.segments, self.augment, self.erase, self.repeats = segments, augment, erase, repeats
        self.view_size, self.view_stride, self.maps, self.map_classes = view_size, view_stride, maps, map_classes
        self.map_shape = tuple(read_map(maps[0], map_classes).shape) if maps else None  # one for all, to be stacked

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, index = key
        rng, chosen, unreadable = sample_rng(self.seed, epoch, index), index, []
        while True:
            try:
                frames = self.read(self.samples.paths[chosen], rng)
                label_map = self.label_map(chosen)
                break
            except UnreadableFile as error:
                unreadable.append((error.path, error.reason))
            if len(unreadable) == ATTEMPTS:
                raise ValueError(f"{ATTEMPTS} files in a row are unreadable, check with python data.py --check DIR: "
                                 + "; ".join(f"{path} ({reason})" for path, reason in unreadable))
            chosen = (chosen + 1 + rng.randrange(max(len(self) - 1, 1))) % len(self)  # another one
        # The first view goes on with the sample's own stream, so it is the same for any number of repeats.
        rngs = [rng] + [sample_rng(self.seed, epoch, index, f"view {r}") for r in range(1, self.repeats)]
        views = [self.view(frames, view_rng, label_map) for view_rng in rngs]
        item = {name: torch.stack([view[name] for view in views]) for name in views[0]}    # (R, ...) each
        item |= {"x": item["x"] if self.repeats > 1 else item["x"][0], "label": self.samples.labels[chosen],
                 "index": index, "unreadable": unreadable, "repeats": self.repeats}
        if self.mask is not None:  # a stream of its own, so that other crops leave the masks as they are
            item["mask"] = torch.from_numpy(self.mask(sample_rng(self.seed, epoch, index, "mask")))
        if self.erase is not None:
            item["boxes"] = torch.tensor([self.erase(*self.image_size, view_rng) for view_rng in rngs])  # (R, 4)
            item["seeds"] = torch.tensor([view_rng.getrandbits(63) for view_rng in rngs])                # (R,)
        return item

    def label_map(self, index):
        """The label map of sample `index`, (2, 5, H, W), or None."""
        return read_map(self.maps[index], self.map_classes, self.map_shape) if self.maps else None

    def read(self, path, rng=None):
        """One file: (T, 3, H, W) uint8 with moments drawn if train, or PIL RGB."""
        if not self.num_frames:
            return read_image(path)
        if self.segments:
            places = [rng.random() if self.train else 0.5 for _ in range(self.num_frames)]
            return read_clip(path, self.num_frames, short_side=self.short_side, places=places)
        position = rng.random() if self.train else 0.5
        return read_clip(path, self.num_frames, self.sampling_rate, position, self.short_side)

    def view(self, frames, rng=None, label_map=None):
        """One view of what `read` returned, as entries of an item: "x", and "view" and "labels" if wanted.
        Release: clips are augmented before they are cropped, images after it."""
        video = self.num_frames is not None
        if video and self.augment:
            frames = self.augmented(frames, rng)
        height, width = frames.shape[-2:] if video else frames.size[::-1]
        if self.train:
            box = random_resized_crop_box(height, width, rng, self.scale, self.ratio)
        else:
            box = center_box(height, width, self.image_size[1] / self.image_size[0])
        x, flipped = crop_resize(frames, box, self.image_size), self.train and rng.random() < self.flip
        if video:
            x = x.transpose(0, 1).contiguous()  # (3, T, H, W); before the flip, which is slow on colours side by side
        if flipped:
            x = x.flip(-1)
        if self.augment and not video:
            x = self.augmented(x[None], rng)[0]
        item = {"x": x.contiguous()}  # (3, T, H, W) or (3, H, W)
        if self.view_size:
            images = [Image.fromarray(frame) for frame in frames[::self.view_stride].permute(0, 2, 3, 1).numpy()] \
                if video else [frames]
            small = torch.stack([crop_resize(image, box, self.view_size, Image.LANCZOS) for image in images])
            item["view"] = small.flip(-1) if flipped else small  # (t, 3, h, w)
        if label_map is not None:
            top, left, h, w = box[0] / height, box[1] / width, box[2] / height, box[3] / width
            labels = torch.zeros(3, *label_map.shape[1:])
            labels[:2] = label_map.flip(-1) if flipped else label_map
            labels[2].view(-1)[:4] = torch.tensor([top, 1 - left - w if flipped else left, h, w])
            item["labels"] = labels
        return item

    def augmented(self, frames, rng):
        """(T, 3, H, W) uint8, all of them through one call of `augment`."""
        pictures = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).numpy()]
        return torch.from_numpy(np.stack(self.augment(pictures, rng))).permute(0, 3, 1, 2)


PretrainDataset, target_inputs = TrainDataset, extras


def normalize(x, mean, std):
    """uint8 (B, 3, [T,] H, W) -> float, less the mean, over the deviation of each color."""
    shape = (3, *[1] * (x.ndim - 2))
    mean, std = (torch.tensor(v, device=x.device).view(shape) for v in (mean, std))
    return x.float().div(255).sub(mean).div(std)


def read_views(path, image_size, num_frames=None, sampling_rate=4, clips=1, crops=1, crop_ratio=0.875, segments=False):
    """All views of one file for a test; nothing random. The file is decoded once.

    num_frames: T for a video, None for an image. image_size: (H, W).
    clips: evenly spread from the video's beginning to its end, 1 = the middle. segments: each clip is instead a moment
    in each of T equal parts of the video, its midpoint for one clip.
    crops: 1 = the centre of the picture scaled to cover image_size / crop_ratio; 3 = left, centre and right (upright
    ones: top, middle, bottom) of the picture scaled to cover image_size, together all of it up to an aspect of 3:1.
    Returns uint8 (clips*crops, 3, T, H, W), clip by clip, or (crops, 3, H, W). Images are scaled bicubically (release).
    Raises UnreadableFile, or ValueError for numbers that `check_views` refuses.
    """
    check_views(clips, crops, crop_ratio)
    H, W = image_size
    cover = (H, W) if crops == 3 else (round(H / crop_ratio), round(W / crop_ratio))
    if not num_frames:
        image = read_image(path)
        scale = max(cover[0] / image.height, cover[1] / image.width)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
        frames = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, h, w)
    else:
        def moments(first, duration):
            if segments:
                each = [segment_times(first, duration, [(c + 0.5) / clips] * num_frames) for c in range(clips)]
            else:  # release: with offset sampling the last clip ends with the video
                each = [clip_times(first, duration, num_frames, sampling_rate, c / (clips - 1) if clips > 1 else 0.5)
                        for c in range(clips)]
            return sum(each, [])
        frames = _read_at(path, moments, cover)                            # (clips*T, 3, h, w)
    top, left = frames.shape[2] - H, frames.shape[3] - W                   # to spare; for 3 crops on one axis only
    x = torch.stack([frames[:, :, top * k // 2:top * k // 2 + H, left * k // 2:left * k // 2 + W]
                     for k in ((0, 1, 2) if crops == 3 else (1,))], 1)     # (clips*T, crops, 3, H, W)
    if not num_frames:
        return x[0]
    return x.unflatten(0, (clips, num_frames)).permute(0, 2, 3, 1, 4, 5).flatten(0, 1).contiguous()


def check_views(clips, crops, crop_ratio):
    """Raises ValueError for views that there is no way to cut."""
    if clips < 1 or crops not in (1, 3) or not 0 < crop_ratio <= 1:
        raise ValueError(f"clips={clips}, crops={crops}, crop_ratio={crop_ratio}: use 1 or more clips, 1 or 3 crops "
                         "and a ratio in (0, 1]")


class ViewDataset(torch.utils.data.Dataset):
    """Item i is all views of file i, for validation and testing; the arguments are those of `read_views`.

    views, clips, crops: how many there are of a file, views = clips * crops.
    An item is a dict of "x" as there, "label" int, "index" int and "unreadable": empty, or [(path, reason)] and x zero.
    """

    def __init__(self, samples, image_size, num_frames=None, sampling_rate=4, clips=1, crops=1, crop_ratio=0.875,
                 segments=False):
        check_kind(samples.kind, num_frames)
        check_views(clips, crops, crop_ratio)
        self.samples, self.clips, self.crops = samples, clips if num_frames else 1, crops
        self.views = self.clips * crops
        self.shape = (self.views, 3, *((num_frames,) if num_frames else ()), *image_size)
        self.arguments = image_size, num_frames, sampling_rate, clips, crops, crop_ratio, segments

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        unreadable = []
        try:
            x = read_views(self.samples.paths[index], *self.arguments)
        except UnreadableFile as error:  # reported, and never replaced: a test counts every file
            x, unreadable = torch.zeros(self.shape, dtype=torch.uint8), [(error.path, error.reason)]
        return {"x": x, "label": self.samples.labels[index], "index": index, "unreadable": unreadable}


class EpochBatches:
    """Batch sampler for a whole run: lists of (epoch, index), so that the workers live as long as the run.

    batch_size is global. Step s takes the s-th slice of its epoch's permutation, which depends on (seed, epoch) only;
    a rank takes its share of the slice in micro-batches of device_batch (None: one). The rest of an epoch is dropped.
    start_step: steps done before, to resume. len() is the number of micro-batches left.
    Raises ValueError if the sizes do not divide or an epoch has no full batch.
    """

    def __init__(self, num_samples, batch_size, epochs, seed=0, rank=0, world_size=1, device_batch=None, start_step=0):
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} is not a multiple of {world_size} processes; it is global")
        share = batch_size // world_size
        device_batch = device_batch or share
        if share % device_batch:
            raise ValueError(f"device_batch={device_batch} does not divide the {share} samples of a process "
                             f"(batch_size={batch_size} over {world_size}); use a divisor of {share}")
        if num_samples < batch_size:
            raise ValueError(f"{num_samples} samples do not fill one batch; use batch_size <= {num_samples}, "
                             f"not {batch_size}")
        self.steps_per_epoch = num_samples // batch_size
        self.num_steps = epochs * self.steps_per_epoch
        if not 0 <= start_step <= self.num_steps:
            raise ValueError(f"start_step={start_step} is outside the run of {self.num_steps} steps; use more epochs")
        self.num_samples, self.batch_size, self.seed, self.start_step = num_samples, batch_size, seed, start_step
        self.begin, self.end, self.device_batch = rank * share, (rank + 1) * share, device_batch

    def __len__(self):
        return (self.num_steps - self.start_step) * ((self.end - self.begin) // self.device_batch)

    def __iter__(self):
        for step in range(self.start_step, self.num_steps):
            epoch, slice_number = divmod(step, self.steps_per_epoch)
            if step == self.start_step or slice_number == 0:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples).tolist()
            offset = slice_number * self.batch_size
            for first in range(offset + self.begin, offset + self.end, self.device_batch):
                yield [(epoch, index) for index in order[first:first + self.device_batch]]


def collate(items):
    """Stacks items over the batch, flattening the repeats of a TrainDataset; joins the lists of unreadable files.

    Returns "x" (B*R, ...), "boxes", "seeds", "view", "labels" (B*R, ...), "label", "index" and "mask" per entry of x; R
    views of a sample lie side by side. For a ViewDataset x stays (B, V, ...).
    """
    repeats = items[0].get("repeats", 1)
    batch = {"x": torch.stack([item["x"] for item in items])}
    if repeats > 1:
        batch["x"] = batch["x"].flatten(0, 1)
    batch |= {name: torch.cat([item[name] for item in items]) for name in ("boxes", "seeds", "view", "labels")
              if name in items[0]}
    batch |= {name: torch.stack([torch.as_tensor(item[name]) for item in items]).repeat_interleave(repeats, 0)
              for name in ("mask", "label", "index") if name in items[0]}
    batch["unreadable"] = [entry for item in items for entry in item["unreadable"]]
    return batch


def _start_worker(closing, worker_id):
    """A signal to the whole process group must not kill the workers: the parent saves first, then stops them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python ends leftover workers at exit by SIGTERM and waits for them, so that one has to count.
    signal.signal(signal.SIGTERM, lambda *_: closing.is_set() and os._exit(0))
    torch.set_num_threads(1)


def make_loader(dataset, batches, workers, pin_memory=False, generator=None, collate=collate):
    """DataLoader over batches of keys; iterate over EpochBatches once for the whole run. workers=0 gives the same."""
    more = {"collate_fn": collate, "pin_memory": pin_memory, "generator": generator}
    if workers:
        context = multiprocessing.get_context("fork")
        closing = context.Event()
        atexit.register(closing.set)
        more |= {"num_workers": workers, "multiprocessing_context": context,
                 "worker_init_fn": functools.partial(_start_worker, closing)}
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, **more)


def make_view_loader(dataset, indices, batch_size, workers, pin_memory=False):
    """The files `indices` of a ViewDataset in order, batch_size at a time; the last batch may be smaller."""
    batches = [indices[first:first + batch_size] for first in range(0, len(indices), batch_size)]
    # Each pass over a DataLoader draws a seed; with its own generator a test amid training leaves torch's alone.
    return make_loader(dataset, batches, workers, pin_memory, torch.Generator())


# ---------------------------------------------------------------- python data.py --check DIR


def check_file(path):
    """Decodes a whole file. Returns (usable, what it holds or how far it decodes and what stops it)."""
    if layouts.media_kind(path) == "image":
        try:
            width, height = read_image(path).size
            return True, f"image, {width}x{height}"
        except UnreadableFile as error:
            return False, error.reason
    count, end, text = 0, 0.0, ""
    try:
        with _open_video(path) as (container, stream):
            promised = float((stream.duration or 0) * stream.time_base)
            text = f"{stream.codec_context.name}, {stream.width}x{stream.height}"
            first = None
            for frame in container.decode(stream):
                time = count / _rate(stream) if frame.pts is None else frame.time
                first = time if first is None else first
                end = time - first + float((frame.duration or 0) * stream.time_base)
                count += 1
    except UnreadableFile as error:
        return False, f"{error.reason}; {end:.2f} s ({count} frames) decode before that" if count else error.reason
    if not count:
        return False, "no frame decodes"
    if promised > end + MAY_LACK:
        return False, f"cut off: {end:.2f} s ({count} frames) decode, the header promises {promised:.2f} s"
    return True, f"{text}, {count} frames, {count / end if end else 0:.2f} fps, {end:.2f} s"


def check(folder, workers):
    """Decodes every media file below a folder and every file its csvs name; prints a line for each. Returns 0 or 1."""
    from tqdm import tqdm
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no data folder {folder}")
    media, ignored = layouts.walk(folder)
    missing = []
    for split in ("train", "val"):
        try:
            found = layouts.find_samples(folder, split)
            media += sorted(set(found.paths) - set(media))  # a csv may point elsewhere
            missing += found.missing
            print(f"{split}: {len(found)} {found.kind}s, {len(found.classes)} named classes, "
                  f"{len(found.missing)} missing")
        except ValueError as error:
            print(f"{split}: {str(error).partition(';')[0]}")
    bad = len(missing)
    for path in ignored:
        print(f"ignored   {path}: no media file")
    for path in missing:
        print(f"MISSING   {path}")
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for path, (usable, text) in zip(media, tqdm(pool.map(check_file, media), total=len(media), unit="file")):
            bad += not usable
            tqdm.write(f"{'usable   ' if usable else 'UNUSABLE '} {path}: {text}")
    print(f"{len(media) + len(missing) - bad} usable, {bad - len(missing)} unusable, {len(missing)} missing, "
          f"{len(ignored)} ignored")
    return int(bad > 0 or not media)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check that every file of a data set decodes.")
    parser.add_argument("--check", metavar="DIR", required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    sys.exit(check(options.check, options.workers))
