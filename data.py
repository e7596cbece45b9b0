"""Videos and images: finding the files, sampling clips in time, crops, loaders.

Paper: Wei et al., Masked Feature Prediction, CVPR 2022, Sec. 4 (16x4 clips, random resized crop, flip) and Sec. 5.
Release: SlowFast's Kinetics and ImageNet loaders with the MaskFeat pre-training settings.
Differences:
- time is counted in seconds, so any frame rate, fixed or not, gives the same motion (see `read_clip`);
- normalisation is left to the training script: a loader hands over uint8, a quarter of the bytes;
- a random number depends on (seed, epoch, index) only: the number of workers, ranks or restarts changes no sample.

    python data.py --check DIR       decode every file under DIR; exit status 1 if one is unusable
"""

import argparse
import atexit
import csv
import functools
import hashlib
import math
import multiprocessing
import os
import random
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

VIDEO = ("mp4", "webm", "mkv", "avi", "mov")
IMAGE = ("jpg", "jpeg", "png", "bmp", "webp")
TARGET_FPS = 30      # release: sampling_rate counts frames of a 30 fps video
CLOCK_SLACK = 6e-4   # s; Matroska rounds a frame's time to a millisecond, so it is up to half of one late
MAY_LACK = 0.5       # s by which a video may end before its header says so and still count as whole
ATTEMPTS = 10        # files tried for one sample before giving up

LAYOUTS = """accepted layouts:
  DIR/train/<class>/* and DIR/val/<class>/*   videos or images
  DIR/train.csv and DIR/val.csv               a line is: path label (or: path, or: path ignored label)
  the same files in the official Kinetics form, with the header label,youtube_id,time_start,time_end,split
  a folder of unlabelled files, searched recursively (training only)"""


class UnreadableFile(ValueError):
    """A media file that does not decode at the wanted place; `path` and `reason` say which and why."""

    def __init__(self, path, reason):
        super().__init__(f"cannot read {path}: {reason}")
        self.path, self.reason = str(path), str(reason)


# ---------------------------------------------------------------- finding files


@dataclass(frozen=True)
class Samples:
    """The files of one split. All videos or all images."""
    kind: str                                    # "video" or "image"
    paths: list
    labels: list                                 # int per path, -1 = unlabelled
    classes: list                                # names by label; empty if the data set names none
    ignored: list = field(default_factory=list)  # files that are there but are no media
    missing: list = field(default_factory=list)  # files named in a csv but not there
    root: str = ""

    def __len__(self):
        return len(self.paths)


def fingerprint(samples):
    """Hex digest (16 letters) of relative names and labels: tells a resumed run that its data changed."""
    digest = hashlib.sha256()
    for path, label in zip(samples.paths, samples.labels):
        digest.update(f"{os.path.relpath(path, samples.root or '.')}\0{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def media_kind(path):
    """"video", "image" or None, by the ending in any letter case; hidden files (._a.mp4) are no media."""
    name = os.path.basename(path).lower()
    ending = name.rpartition(".")[2]
    if name.startswith("."):
        return None
    return "video" if ending in VIDEO else "image" if ending in IMAGE else None


def find_samples(root, split="train"):
    """Lists the media files of one split, in a fixed order (that of the csv, or sorted).

    root: folder in one of LAYOUTS; a csv goes before folders. split: "train" or "val".
    Returns Samples. Labels index `classes`, which are the same for both splits.
    Raises FileNotFoundError if there is no such folder, ValueError if it yields no sample or mixes videos and images.
    """
    root = os.fspath(root)
    if split not in ("train", "val"):
        raise ValueError(f'split is "train" or "val", not {split!r}')
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no data folder {root}; {LAYOUTS}")
    tables = {name: _find_table(root, name) for name in ("train", "val")}
    folders = {name: os.path.join(root, name) for name in ("train", "val")}
    ignored, missing = [], []
    if tables[split]:
        with open(tables[split], encoding="utf-8-sig", errors="surrogateescape") as file:
            official = file.readline().replace(" ", "").startswith("label,youtube_id,time_start")
        reader = _read_kinetics_table if official else _read_path_table
        paths, labels, classes, missing = reader(root, tables, split)
    elif any(tables.values()):
        raise ValueError(f"{root} has no {split} split: there is a csv, but no {split}.csv beside it; {LAYOUTS}")
    elif any(os.path.isdir(folder) for folder in folders.values()):
        if not os.path.isdir(folders[split]):
            raise ValueError(f"{root} has no {split} split: no folder {folders[split]}; {LAYOUTS}")
        classes = sorted({entry.name for folder in folders.values() if os.path.isdir(folder)
                          for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")})
        paths, ignored = _walk(folders[split])
        first = [os.path.relpath(path, folders[split]).split(os.sep) for path in paths]
        if classes:  # what lies beside the class folders has no label
            ignored += [path for path, parts in zip(paths, first) if len(parts) == 1]
            paths = [path for path, parts in zip(paths, first) if len(parts) > 1]
            number = {name: label for label, name in enumerate(classes)}
            labels = [number[parts[0]] for parts in first if len(parts) > 1]
        else:
            labels = [-1] * len(paths)
    else:
        if split == "val":
            raise ValueError(f"{root} has no val split: neither a folder val nor val.csv; {LAYOUTS}")
        paths, ignored = _walk(root)
        labels, classes = [-1] * len(paths), []
    if not paths:
        raise ValueError(f"no sample in the {split} split of {root} ({len(ignored)} files are no media, {len(missing)} "
                         f"listed files are missing, first: {missing[:1]}); media are {VIDEO + IMAGE}; {LAYOUTS}")
    videos = sum(media_kind(path) == "video" for path in paths)
    if 0 < videos < len(paths):
        raise ValueError(f"the {split} split of {root} mixes {videos} videos and {len(paths) - videos} images; "
                         "put them into separate data folders")
    return Samples("video" if videos else "image", paths, labels, classes, ignored, missing, root)


def _walk(folder):
    """Media files and other files below a folder, both sorted; hidden folders are left out."""
    media, other = [], []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(parent, name)
            (media if media_kind(path) else other).append(path)
    return sorted(media), sorted(other)


def _find_table(root, split):
    """The csv of a split in root (train.csv, validate.csv, kinetics_400_train.csv) or None; shortest name first."""
    word = {"train": "train", "val": "(val|validate|validation)"}[split]
    names = [name for name in os.listdir(root) if re.fullmatch(rf"(kinetics[-_]?\d*[-_])?{word}\.csv", name.lower())]
    return os.path.join(root, min(names, key=lambda name: (len(name), name))) if names else None


def _read_path_table(root, tables, split):
    """Release layout: no header, columns separated by a space; relative paths start at the csv's folder."""
    # An unquoted path may hold spaces and quotes: it reaches as far as the last media ending in the line.
    line_form = re.compile(rf'(?:"(?P<quoted>(?:[^"]|"")+)"|(?P<plain>.+\.(?:{"|".join(VIDEO + IMAGE)})))'
                           r"(?:(?:\s+\S+)?\s+(?P<label>-?\d+))?", re.IGNORECASE)
    names = {}  # folder -> the names in it: one listing per folder, not one look-up per line
    paths, labels, missing = [], [], []
    with open(tables[split], encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            match = line_form.fullmatch(line.strip())
            if not match:
                raise ValueError(f"{tables[split]}, line {number}: {line.strip()!r} is not 'path label'; "
                                 "separate by a space, end the path in a media ending or put it in double quotes")
            name = match["plain"] or match["quoted"].replace('""', '"')
            path = os.path.normpath(os.path.join(os.path.dirname(tables[split]), name))
            parent, name = os.path.split(path)
            if parent not in names:
                names[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
            if name not in names[parent]:
                missing.append(path)
                continue
            if media_kind(path) is None:
                raise ValueError(f"{tables[split]}, line {number}: {path} is no media file; take the line out")
            paths.append(path)
            labels.append(int(match["label"] or 0))  # release: one column means label 0
    return paths, labels, [], missing


def _read_kinetics_table(root, tables, split):
    """Official Kinetics csv; a video is called <youtube_id>_<start>_<end> (six digits each) or <youtube_id>."""
    rows, classes = [], set()
    for name, table in tables.items():
        if table:  # both splits are read, so that a class gets the same label in each
            with open(table, encoding="utf-8-sig", newline="") as file:
                found = list(csv.DictReader(file, skipinitialspace=True))
            classes |= {row["label"] for row in found}
            rows = found if name == split else rows
    classes = sorted(classes)
    number = {name: label for label, name in enumerate(classes)}
    files = {}
    for path in reversed(_walk(root)[0]):  # one walk; of two files with one name the first in order counts
        files[os.path.splitext(os.path.basename(path))[0]] = path
    paths, labels, missing = [], [], []
    for row in rows:
        start, end = float(row["time_start"] or 0), float(row.get("time_end") or 0)
        name = f"{row['youtube_id']}_{start:06.0f}_{end:06.0f}"
        path = files.get(name) or files.get(row["youtube_id"])
        if path:
            paths.append(path)
            labels.append(number[row["label"]])
        else:
            missing.append(name)
    return paths, labels, classes, missing


# ---------------------------------------------------------------- reading


@contextmanager
def _open_video(path):
    """(container, best video stream), decoded by one thread: parallelism is over workers. Raises UnreadableFile."""
    import av
    try:
        with av.open(os.fspath(path), metadata_errors="replace") as container:
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


def _rgb(frame, short_side):
    """(3, H, W) uint8 array of a decoded frame: scaled and converted in one pass, then turned upright."""
    scale = short_side / min(frame.width, frame.height) if short_side else 1
    small = frame.reformat(round(frame.width * scale), round(frame.height * scale), "rgb24", threads=1)
    return np.rot90(small.to_ndarray(), round(frame.rotation / 90)).transpose(2, 0, 1)


def read_clip(path, num_frames=16, sampling_rate=4, position=0.5, short_side=256):
    """Reads the frames on display at num_frames moments, sampling_rate/30 s apart.

    position: in [0, 1], where the clip of num_frames*sampling_rate/30 s lies in the video. A shorter video starts at
    its beginning and repeats its last frame.
    short_side: height or width in pixels to which the shorter one is scaled, up or down; None keeps the size.
    Returns (num_frames, 3, H, W) uint8 RGB. Pixels are taken as square, as in the release.
    Raises UnreadableFile if the file does not decode there.
    Paper: Sec. 4, 16x4. Release: 16 indices in linspace(start, start + 63), a step of 4.2 frames instead of 4.
    """
    times = None
    for way in ("seek", "start", "count"):  # the quick way first; most files never need another
        try:
            with _open_video(path) as (container, stream):
                if way == "seek":
                    first, duration = _extent(container, stream)
                    start = first + position * max(duration - num_frames * sampling_rate / TARGET_FPS, 0)
                    times = [start + j * sampling_rate / TARGET_FPS for j in range(num_frames)]
                    if "444" in (stream.codec_context.pix_fmt or ""):
                        continue  # old x264 announces a fault of its 4:4:4 coding in the first frame only
                    container.seek(round(start / stream.time_base), stream=stream)  # to a keyframe before
                frames = _frames_at(path, container, stream, times, first, duration, short_side, way)
        except UnreadableFile:
            if way != "seek" or times is None:
                raise
            continue  # the seek itself may be at fault, so the verdict is left to the next way
        if frames is not None:
            if any(frame.shape != frames[0].shape for frame in frames):
                raise UnreadableFile(path, "the picture changes its shape within the clip")
            return torch.from_numpy(np.stack(frames))  # (T, 3, H, W)


def _frames_at(path, container, stream, times, first, duration, short_side, way):
    """Decodes onwards, converting only the frames on display at `times` (ascending, s); one array for each time.

    way: "seek" starts at a keyframe, "start" at the beginning, "count" there too, and makes up times from the rate.
    Returns None if the way turns out wrong: it began too late, or the frames' times are missing or go backwards
    (H.264 in AVI). Raises UnreadableFile if the video ends before `first + duration` and before the clip.
    """
    unit, kept, count = float(stream.time_base), [], 0
    shown, shown_time, picture = None, -math.inf, None
    for frame in container.decode(stream):
        if way == "count":
            time = first + count / _rate(stream)
        elif frame.pts is None or frame.pts * unit < shown_time:
            return None
        else:
            time = frame.pts * unit
        count += 1
        while time > times[len(kept)] + CLOCK_SLACK:  # the frame before was on display
            if shown is None:
                if way == "seek":
                    return None
                shown = frame  # nothing comes earlier
            if picture is None:
                picture = _rgb(shown, short_side)
            kept.append(picture)
            if len(kept) == len(times):
                return kept
        shown, shown_time, picture = frame, time, None
    if shown is None:
        raise UnreadableFile(path, "no frame decodes")
    end = shown_time + (shown.duration or 0) * unit
    if min(times[-1], first + duration) > end + MAY_LACK:  # cut off, so not to be filled up with its last frame
        raise UnreadableFile(path, f"it ends after {end - first:.2f} s, its header promises {duration:.2f} s")
    picture = _rgb(shown, short_side) if picture is None else picture
    return kept + [picture] * (len(times) - len(kept))


def read_image(path):
    """Reads an image as PIL RGB. Like the release it drops alpha and does not apply the EXIF orientation.

    Raises UnreadableFile if it is damaged or cut off.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I"):  # 16 bits per pixel: convert() would clip to white
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # on damaged files Pillow raises about anything; the reason is kept
        raise UnreadableFile(path, error) from error


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


def crop_resize(frames, box, size):
    """Cuts a box out of a clip or image and scales it.

    frames: (T, 3, H, W) uint8, scaled bilinearly without antialiasing (release); or a PIL image, bicubic (release).
    box: (top, left, h, w). size: (H, W).
    Returns uint8 (T, 3, *size) or (3, *size).
    """
    top, left, h, w = box
    if isinstance(frames, Image.Image):
        image = frames.crop((left, top, left + w, top + h)).resize((size[1], size[0]), Image.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    crop = frames[:, :, top:top + h, left:left + w].float()
    return F.interpolate(crop, size, mode="bilinear", align_corners=False).round_().to(torch.uint8)


# ---------------------------------------------------------------- samples and batches


def sample_rng(seed, epoch, index, purpose=""):
    """The random numbers of one sample in one epoch; a purpose names a stream of its own."""
    return random.Random(f"{seed} {epoch} {index} {purpose}")


class PretrainDataset(torch.utils.data.Dataset):
    """Augmented clips or images with their masks, indexed by (epoch, index).

    samples: Samples. image_size: (H, W). num_frames: T, for videos only. mask: rng -> bool array, or None.
    scale, ratio, flip: random resized crop and chance of a horizontal flip (release: 0.5-1, 3/4-4/3, 0.5).
    train=False: middle clip, largest centred crop, no flip.
    An item is a dict of "x" uint8 (3, T, H, W) or (3, H, W), "mask" bool (if any), "label" int, "index" int and
    "unreadable", a list of (path, reason): such a file is replaced by one drawn from the sample's own generator.
    """

    def __init__(self, samples, image_size, num_frames=None, sampling_rate=4, mask=None, seed=0, scale=(0.5, 1.0),
                 ratio=(3 / 4, 4 / 3), flip=0.5, short_side=256, train=True):
        if (samples.kind == "video") != (num_frames is not None):
            raise ValueError(f"num_frames={num_frames} does not go with {samples.kind} data: a number for videos, "
                             "None for images; or choose another recipe or data folder")
        self.samples, self.image_size, self.num_frames = samples, tuple(image_size), num_frames
        self.sampling_rate, self.mask, self.seed, self.scale = sampling_rate, mask, seed, scale
        self.ratio, self.flip, self.short_side, self.train = ratio, flip, short_side, train

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, index = key
        rng, chosen, unreadable = sample_rng(self.seed, epoch, index), index, []
        while True:
            try:
                x = self.load(self.samples.paths[chosen], rng)
                break
            except UnreadableFile as error:
                unreadable.append((error.path, error.reason))
            if len(unreadable) == ATTEMPTS:
                raise ValueError(f"{ATTEMPTS} files in a row are unreadable, check with python data.py --check DIR: "
                                 + "; ".join(f"{path} ({reason})" for path, reason in unreadable))
            chosen = (chosen + 1 + rng.randrange(max(len(self) - 1, 1))) % len(self)  # another one
        item = {"x": x, "label": self.samples.labels[chosen], "index": index, "unreadable": unreadable}
        if self.mask is not None:  # a stream of its own, so that other crops leave the masks as they are
            item["mask"] = torch.from_numpy(self.mask(sample_rng(self.seed, epoch, index, "mask")))
        return item

    def load(self, path, rng=None):
        """One file, augmented if train. Draws in this order: clip position, crop, flip."""
        if self.num_frames:
            position = rng.random() if self.train else 0.5
            frames = read_clip(path, self.num_frames, self.sampling_rate, position, self.short_side)
            height, width = frames.shape[-2:]
        else:
            frames = read_image(path)
            width, height = frames.size
        if self.train:
            box = random_resized_crop_box(height, width, rng, self.scale, self.ratio)
        else:
            box = center_box(height, width, self.image_size[1] / self.image_size[0])
        x = crop_resize(frames, box, self.image_size)
        if self.train and rng.random() < self.flip:
            x = x.flip(-1)
        return x.transpose(0, 1).contiguous() if self.num_frames else x  # (3, T, H, W) or (3, H, W)


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
    """Stacks x, mask, label and index over the batch; joins the lists of unreadable files."""
    batch = {name: torch.stack([item[name] for item in items]) for name in ("x", "mask") if name in items[0]}
    batch |= {name: torch.tensor([item[name] for item in items]) for name in ("label", "index")}
    batch["unreadable"] = [entry for item in items for entry in item["unreadable"]]
    return batch


def _start_worker(closing, worker_id):
    """A signal to the whole process group must not kill the workers: the parent saves first, then stops them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python ends leftover workers at exit by SIGTERM and waits for them, so that one has to count.
    signal.signal(signal.SIGTERM, lambda *_: closing.is_set() and os._exit(0))
    torch.set_num_threads(1)


def make_loader(dataset, batches, workers, pin_memory=False):
    """DataLoader over EpochBatches; iterate over it once for the whole run. workers=0 gives the same batches."""
    if not workers:
        return torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=collate, pin_memory=pin_memory)
    context = multiprocessing.get_context("fork")
    closing = context.Event()
    atexit.register(closing.set)
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=pin_memory,
        multiprocessing_context=context, worker_init_fn=functools.partial(_start_worker, closing))


# ---------------------------------------------------------------- python data.py --check DIR


def check_file(path):
    """Decodes a whole file. Returns (usable, what it holds or how far it decodes and what stops it)."""
    if media_kind(path) == "image":
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
    media, ignored = _walk(folder)
    missing = []
    for split in ("train", "val"):
        try:
            found = find_samples(folder, split)
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
