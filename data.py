"""Data sets for pre-training, fine-tuning and tests: crops, samples, batches, loaders.

Paper: Wei et al., Masked Feature Prediction, CVPR 2022, Sec. 4 and 5.
Release: SlowFast's Kinetics, SSv2 and ImageNet loaders with the MaskFeat settings. Differences:
- Samples stay uint8, a quarter of the bytes. The scripts normalize them on the device.
- A random number depends on (seed, epoch, index) only. The number of workers, processes or restarts
  changes no sample.

    python data.py --check DIR      # decode every file under DIR; exit status 1 if there is a fault
    python data.py --stats DIR      # mean and deviation of its colors, as flags for the scripts
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
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import engine

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import layouts
import video
from video import UnreadableFile, read_clip, read_image

ATTEMPTS = 10        # files tried for one sample before giving up
PREFETCH = 2         # batches that a worker prepares ahead
LARGE = 2 ** 24      # pixels of a picture that slows down a loader, for --check
BATCH_TIMEOUT = 600  # s that a batch may take
MORE_SHARED_MEMORY = "give it more (docker run --shm-size=2g or --ipc=host) or use fewer --workers"


# -------------------------------------------------------------------------------------------- crops


def random_resized_crop_box(height, width, rng, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)):
    """Draws (top, left, h, w) in pixels: area by a share in scale, aspect w/h log-uniform in ratio.

    After ten boxes that do not fit: the largest centered box with an aspect in ratio. Release.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return center_box(height, width, min(max(width / height, ratio[0]), ratio[1]))


def center_box(height, width, aspect):
    """The largest centered box (top, left, h, w) of aspect w/h."""
    h = min(height, max(round(width / aspect), 1))
    w = min(width, max(round(height * aspect), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def decoded_side(image_size):
    """Shorter side of the clips that random crops are cut from: 256 for 224 (release)."""
    return round(max(image_size) / 0.875)


def crop_resize(frames, box, size, resample=Image.BICUBIC):
    """Cuts a box (top, left, h, w) out of a clip or an image and scales it to size (H, W).

    frames: (T, 3, H, W) uint8, scaled bilinearly, without antialiasing (release) unless a side gets
    less than half as long, or a PIL image, scaled by `resample` (release: bicubic).
    Returns uint8 (T, 3, *size) or (3, *size).
    """
    top, left, h, w = box
    if isinstance(frames, Image.Image):
        image = frames.crop((left, top, left + w, top + h)).resize(size[::-1], resample)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    crop = frames[:, :, top:top + h, left:left + w].float()
    much_smaller = h > 2 * size[0] or w > 2 * size[1]
    crop = F.interpolate(crop, size, mode="bilinear", align_corners=False, antialias=much_smaller)
    return crop.round_().to(torch.uint8)


def crop_flip(frames, box, size, flip):
    """A crop as the input of a model, mirrored if flip: uint8 (3, T, *size) or (3, *size)."""
    x = crop_resize(frames, box, size)
    if x.ndim == 4:
        x = x.transpose(0, 1).contiguous()      # before the flip, which is slow on the other layout
    return x.flip(-1) if flip else x


def to_pictures(frames):
    """(T, 3, H, W) uint8 -> list of PIL images; a PIL image -> a list of it."""
    if isinstance(frames, Image.Image):
        return [frames]
    return [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).numpy()]


def picture_shape(frames):
    """(height, width) of a clip (T, 3, H, W) or a PIL image."""
    return frames.size[::-1] if isinstance(frames, Image.Image) else tuple(frames.shape[-2:])


# --------------------------------------------------------------- what targets need beside the input


def find_maps(paths, folder=""):
    """Paths of the label maps of images: <folder>/<the image's folder>/<stem>.pt (Token Labeling).

    The stem ends at the first dot. Without a folder the maps lie beside the images.
    Raises FileNotFoundError if any is missing.
    """
    maps, names = [], {}                        # names: one listing per folder, not a look-up each
    for path in paths:
        place, name = os.path.split(path)
        place = os.path.join(folder, os.path.basename(place)) if folder else place
        if place not in names:
            names[place] = set(os.listdir(place)) if os.path.isdir(place) else set()
        maps.append((place, name.split(".")[0] + ".pt"))
    missing = [os.path.join(*item) for item in maps if item[1] not in names[item[0]]]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(maps)} images have no label map, such as {missing[0]}: name "
            "the folder of the maps with --teacher, or put them beside the images")
    return [os.path.join(*item) for item in maps]


def read_map(path, classes, shape=None):
    """A label map (2, 5, H, W) float: top-5 scores and their classes. Raises UnreadableFile."""
    try:
        x = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                  # a damaged or hostile file can raise anything
        raise UnreadableFile(path, str(error).partition("\n")[0]) from error
    found = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
    if len(found) != 4 or found[:2] != (2, 5) or shape and found != shape:
        raise UnreadableFile(path, f"it holds {found}, no label map of {shape or '(2, 5, H, W)'}")
    low, high = x[1].min(), x[1].max()
    if not 0 <= low <= high < classes:
        raise UnreadableFile(
            path, f"it has classes {low:g} to {high:g} of {classes}: see --label-classes")
    return x.float()


def target_inputs(target, paths, grid, frame_stride=1, folder=""):
    """The arguments of PretrainDataset by a target's input_kind (targets.py).

    grid: (h, w) of tokens. frame_stride: frames per token. folder: of the maps, see `find_maps`.
    """
    if target.input_kind == "view":             # dVAE: 8 pixels per token
        return {"view_size": tuple(8 * n for n in grid), "view_stride": frame_stride}
    if target.input_kind == "labels":
        return {"maps": find_maps(paths, folder), "map_classes": target.dim}
    return {}


# ------------------------------------------------------------------------------------------ samples


def sample_rng(seed, epoch, index, purpose=""):
    """The random numbers of one sample in one epoch. A purpose names a stream of its own."""
    return random.Random(f"{seed} {epoch} {index} {purpose}")


def check_kind(kind, num_frames):
    """Raises ValueError unless num_frames is a number for videos and None for images."""
    if (kind == "video") != (num_frames is not None):
        raise ValueError(
            f"num_frames={num_frames} does not go with {kind} data: a number for videos, None for "
            "images; or choose another recipe or data folder")


def read_or_replace(read, index, count, rng):
    """read(index), or of another of `count` samples, drawn from rng, if that file is unreadable.

    Returns (what was read, its index, [(path, reason)] of the unreadable files).
    Raises ValueError after ATTEMPTS files.
    """
    unreadable = []
    while len(unreadable) < ATTEMPTS:
        try:
            return read(index), index, unreadable
        except UnreadableFile as error:
            unreadable.append((error.path, error.reason))
        index = (index + 1 + rng.randrange(max(count - 1, 1))) % count
    raise ValueError(
        f"{ATTEMPTS} files in a row are unreadable, check with python data.py --check DIR: "
        + "; ".join(f"{path} ({reason})" for path, reason in unreadable))


class PretrainDataset(torch.utils.data.Dataset):
    """Masked clips or images, indexed by (epoch, index): random crop, flip, what a target needs.

    samples: layouts.Samples. image_size: (H, W). num_frames: T of a clip, None for images.
    mask: rng -> bool array, or None. scale: area of a crop. flip: its chance (both release).
    short_side: of a decoded clip, by default `decoded_side`.
    view_size: (h, w) of a second view of every view_stride-th frame, same crop, by Lanczos (BEiT).
    maps: the file of each sample's label map, with classes below map_classes.
    An item is a dict of
        "x" uint8 (3, T, H, W) or (3, H, W), "label" int, "index" int, "mask" bool (if any),
        "unreadable" [(path, reason)] of the files that another sample replaces,
        "view" uint8 (t, 3, h, w) (if view_size),
        "labels" float32 (3, 5, H, W) (if maps): the map, flipped like x, and a plane whose first
        four numbers are the crop (top, left, h, w) in fractions of the flipped image.
    """

    def __init__(self, samples, image_size, num_frames=None, sampling_rate=4, mask=None, seed=0,
                 scale=(0.5, 1.0), flip=0.5, short_side=None, view_size=None, view_stride=1,
                 maps=None, map_classes=1000):
        check_kind(samples.kind, num_frames)
        self.samples, self.image_size, self.num_frames = samples, tuple(image_size), num_frames
        self.sampling_rate, self.mask, self.seed = sampling_rate, mask, seed
        self.scale, self.flip = scale, flip
        self.short_side = short_side or decoded_side(image_size)
        self.view_size, self.view_stride = view_size, view_stride
        self.maps, self.map_classes = maps, map_classes
        self.map_shape = tuple(read_map(maps[0], map_classes).shape) if maps else None
        self.item_bytes = 3 * (num_frames or 1) * math.prod(image_size)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, index = key
        rng = sample_rng(self.seed, epoch, index)
        (frames, label_map), chosen, unreadable = read_or_replace(
            lambda i: self.read(i, rng), index, len(self), rng)
        box = random_resized_crop_box(*picture_shape(frames), rng, self.scale)
        item = self.view(frames, label_map, box, rng.random() < self.flip)
        item |= {"label": self.samples.labels[chosen], "index": index, "unreadable": unreadable}
        if self.mask is not None:               # a stream of its own: other crops, the same masks
            item["mask"] = torch.from_numpy(self.mask(sample_rng(self.seed, epoch, index, "mask")))
        return item

    def center(self, index):
        """The item of the middle clip and the largest centered crop. Nothing is random."""
        frames, label_map = self.read(index)
        H, W = self.image_size
        return self.view(frames, label_map, center_box(*picture_shape(frames), W / H))

    def read(self, index, rng=None):
        """(frames, label map or None); frames (T, 3, H, W) uint8 at a random place, or PIL RGB."""
        path, label_map = self.samples.paths[index], None
        if self.num_frames:
            position = rng.random() if rng else 0.5
            frames = read_clip(
                path, self.num_frames, self.sampling_rate, position, self.short_side)
        else:
            frames = read_image(path)
        if self.maps:
            label_map = read_map(self.maps[index], self.map_classes, self.map_shape)
        return frames, label_map

    def view(self, frames, label_map, box, flip=False):
        """"x", and "view" and "labels" if asked for, of one crop."""
        item = {"x": crop_flip(frames, box, self.image_size, flip)}
        if self.view_size:
            view = torch.stack([crop_resize(picture, box, self.view_size, Image.LANCZOS)
                                for picture in to_pictures(frames)[::self.view_stride]])
            item["view"] = view.flip(-1) if flip else view                    # (t, 3, h, w)
        if label_map is not None:
            height, width = picture_shape(frames)
            top, left, h, w = box[0] / height, box[1] / width, box[2] / height, box[3] / width
            labels = torch.zeros(3, *label_map.shape[1:])
            labels[:2] = label_map.flip(-1) if flip else label_map
            labels[2].view(-1)[:4] = torch.tensor([top, 1 - left - w if flip else left, h, w])
            item["labels"] = labels
        return item


class FinetuneDataset(torch.utils.data.Dataset):
    """R augmented views of each labeled clip or image, indexed by (epoch, index).

    Arguments as of PretrainDataset, and
    repeats: R. The file is decoded once (release: NUM_SAMPLE).
    segments: a random moment in each of T equal parts of the video, not a clip (release: SSv2).
    augment: (list of PIL images, rng) -> the same. Release: of a clip before its crop, of an image
    after it. erase: (H, W, rng) -> box (top, left, h, w) that the step fills with noise of a seed.
    An item is a dict of "x" uint8 (R, 3, T, H, W) or (R, 3, H, W), "label" and "index" (R,),
    "unreadable", and with erase "boxes" int64 (R, 4) and "seeds" int64 (R,).
    """

    def __init__(self, samples, image_size, num_frames=None, sampling_rate=4, seed=0,
                 scale=(0.5, 1.0), flip=0.5, short_side=None, segments=False, augment=None,
                 erase=None, repeats=1):
        check_kind(samples.kind, num_frames)
        self.samples, self.image_size, self.num_frames = samples, tuple(image_size), num_frames
        self.sampling_rate, self.seed, self.scale, self.flip = sampling_rate, seed, scale, flip
        self.short_side = short_side or decoded_side(image_size)
        self.segments, self.augment, self.erase, self.repeats = segments, augment, erase, repeats
        self.item_bytes = repeats * 3 * (num_frames or 1) * math.prod(image_size)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, index = key
        rng = sample_rng(self.seed, epoch, index)
        frames, chosen, unreadable = read_or_replace(
            lambda i: self.read(self.samples.paths[i], rng), index, len(self), rng)
        # The first view goes on with the sample's stream: it is the same for any number of repeats.
        rngs = [rng] + [sample_rng(self.seed, epoch, index, f"view {r}")
                        for r in range(1, self.repeats)]
        item = {"x": torch.stack([self.view(frames, rng) for rng in rngs]),
                "label": torch.full((self.repeats,), self.samples.labels[chosen]),
                "index": torch.full((self.repeats,), index), "unreadable": unreadable}
        if self.erase is not None:
            item["boxes"] = torch.tensor([self.erase(*self.image_size, rng) for rng in rngs])
            item["seeds"] = torch.tensor([rng.getrandbits(63) for rng in rngs])
        return item

    def read(self, path, rng):
        """One file: (T, 3, H, W) uint8 at random moments, or PIL RGB."""
        if not self.num_frames:
            return read_image(path)
        if self.segments:
            places = [rng.random() for _ in range(self.num_frames)]
            return read_clip(path, self.num_frames, short_side=self.short_side, places=places)
        return read_clip(
            path, self.num_frames, self.sampling_rate, rng.random(), self.short_side)

    def view(self, frames, rng):
        """One augmented view of what `read` returned: (3, T, H, W) or (3, H, W) uint8."""
        if self.augment and self.num_frames:
            frames = self.augmented(frames, rng)
        box = random_resized_crop_box(*picture_shape(frames), rng, self.scale)
        x = crop_flip(frames, box, self.image_size, rng.random() < self.flip)
        if self.augment and not self.num_frames:
            x = self.augmented(x[None], rng)[0]
        return x

    def augmented(self, frames, rng):
        """(T, 3, H, W) uint8 after one call of `augment`."""
        pictures = self.augment(to_pictures(frames), rng)
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def normalize(x, mean, std):
    """uint8 (B, 3, [T,] H, W) -> float, less the mean and over the deviation of each color."""
    x = x.float().div(255)
    for color, m, s in zip(x.unbind(1), mean, std):             # of views: this writes into x
        color.sub_(m).div_(s)                   # numbers, since copying a tensor to a GPU waits
    return x


def color_stats(samples, count):
    """(mean, deviation, smallest side in pixels) of `count` files, spread over the samples.

    Mean and deviation are of the colors in [0, 1], two lists of three numbers, in the middle frame.
    Unreadable files are left out. Raises ValueError if there is no other.
    """
    sums, sides = [], []
    for path in samples.paths[::max(len(samples) // count, 1)][:count]:
        try:
            image = read_image(path) if samples.kind == "image" else read_clip(
                path, 1, position=0.5, short_side=None)[0].permute(1, 2, 0).numpy()
        except UnreadableFile:
            continue
        pixels = np.asarray(image)
        sides.append(min(pixels.shape[:2]))
        pixels = pixels.reshape(-1, 3) / 255
        sums.append([pixels.mean(axis=0), np.square(pixels).mean(axis=0)])
    if not sums:
        raise ValueError(f"none of {count} files in {samples.root} can be read")
    mean, square = np.mean(sums, axis=0)
    return mean.round(3).tolist(), np.sqrt(square - mean ** 2).round(3).tolist(), min(sides)


def stats_flags(mean, std):
    return f"--mean {' '.join(map(str, mean))} --std {' '.join(map(str, std))}"


def notes_on_files(samples, recipe, count=16):
    """Lines for what in `count` files is far from what the recipe expects.

    Far: the mean is off by more than half a deviation, the contrast is less than a third, or a file
    is smaller than image_size.
    """
    mean, std, side = color_stats(samples, count)
    notes, size = [], max(recipe.image_size)
    offset = max(abs(a - b) / s for a, b, s in zip(mean, recipe.mean, recipe.std))
    if offset > 0.5 or min(a / s for a, s in zip(std, recipe.std)) < 1 / 3:
        notes.append(f"note: the colors of {samples.root} are far from "
                     f"{stats_flags(recipe.mean, recipe.std)}; in up to {count} files: "
                     f"{stats_flags(mean, std)}")
    if side < size:
        notes.append(f"note: {samples.root} has files of {side} pixels on the shorter side, which "
                     f"are enlarged: --image-size {size} is more than they hold")
    return notes


# --------------------------------------------------------------------------------- views for a test


def check_views(clips, crops, crop_ratio):
    """Raises ValueError for views that cannot be cut."""
    if clips < 1 or crops not in (1, 3) or not 0 < crop_ratio <= 1:
        raise ValueError(f"clips={clips}, crops={crops}, crop_ratio={crop_ratio}: use 1 or more "
                         "clips, 1 or 3 crops and a ratio in (0, 1]")


def read_views(path, image_size, num_frames=None, sampling_rate=4, clips=1, crops=1,
               crop_ratio=0.875, segments=False, start=None):
    """All views of one file for a test, decoded once. Nothing is random.

    num_frames: T of a video, None for an image. image_size: (H, W).
    clips: spread evenly from the beginning of the video to its end, 1 is the middle. With segments
    a clip is a moment in each of T equal parts of the video, their midpoints if it is the only one.
    crops: 1 is the center of the picture scaled to cover image_size / crop_ratio. 3 are left,
    center and right (or top, middle, bottom) of the picture scaled to cover image_size.
    start: where the only clip begins, in seconds after the beginning of the video.
    Returns uint8 (clips*crops, 3, T, H, W), clip by clip, or (crops, 3, H, W). Images are scaled
    bicubically (release). Raises UnreadableFile, or ValueError by `check_views`.
    """
    check_views(clips, crops, crop_ratio)
    H, W = image_size
    min_size = (H, W) if crops == 3 else (round(H / crop_ratio), round(W / crop_ratio))

    def moments(first, duration):
        if segments:
            each = [video.segment_times(first, duration, [(c + 0.5) / clips] * num_frames)
                    for c in range(clips)]
        elif start is not None:
            each = [video.clip_times(first + start, 0, num_frames, sampling_rate, 0)]
        else:                                   # release: the last clip ends with the video
            each = [video.clip_times(first, duration, num_frames, sampling_rate,
                                     c / (clips - 1) if clips > 1 else 0.5) for c in range(clips)]
        return sum(each, [])

    if num_frames:
        frames = video.read_at(path, moments, min_size)                        # (clips*T, 3, h, w)
    else:
        image = read_image(path)
        scale = max(min_size[0] / image.height, min_size[1] / image.width)
        image = image.resize((round(image.width * scale), round(image.height * scale)),
                             Image.BICUBIC)
        frames = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]      # (1, 3, h, w)
    top, left = frames.shape[2] - H, frames.shape[3] - W                       # pixels left free
    middle = math.ceil if num_frames else round  # release: its own crops, torchvision's of images
    x = torch.stack([
        frames[:, :, y:y + H, x:x + W]
        for y, x in [(middle(top * k / 2), middle(left * k / 2))
                     for k in ((0, 1, 2) if crops == 3 else (1,))]], 1)  # (clips*T, crops, 3, H, W)
    if not num_frames:
        return x[0]
    return x.unflatten(0, (clips, num_frames)).permute(0, 2, 3, 1, 4, 5).flatten(0, 1).contiguous()


class ViewDataset(torch.utils.data.Dataset):
    """Item i is all views of file i, for validation and test. Arguments as of `read_views`.

    starts: of each file's only clip, in seconds; None: the clips of `read_views`.
    views: their number per file. An item is a dict of "x" as there, "label" int, "index" int,
    "readable" bool and "unreadable": [], or [(path, reason)] and x is zero.
    """

    def __init__(self, samples, image_size, num_frames=None, sampling_rate=4, clips=1, crops=1,
                 crop_ratio=0.875, segments=False, starts=None):
        check_kind(samples.kind, num_frames)
        check_views(clips, crops, crop_ratio)
        self.starts = starts or [None] * len(samples)
        self.samples, self.clips, self.crops = samples, clips if num_frames else 1, crops
        self.views = self.clips * crops
        self.shape = (self.views, 3, *((num_frames,) if num_frames else ()), *image_size)
        self.item_bytes = math.prod(self.shape)
        self.arguments = (image_size, num_frames, sampling_rate, clips, crops, crop_ratio, segments)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        unreadable = []
        try:
            x = read_views(self.samples.paths[index], *self.arguments, self.starts[index])
        except UnreadableFile as error:
            x = torch.zeros(self.shape, dtype=torch.uint8)
            start = self.starts[index]
            where = f", in its clip from {start:g} s on" if start is not None else ""
            unreadable = [(error.path, error.reason + where)]
        return {"x": x, "label": self.samples.labels[index], "index": index,
                "readable": not unreadable, "unreadable": unreadable}


# ------------------------------------------------------------------------------ batches and loaders


class EpochBatches:
    """Batch sampler for a whole run: lists of (epoch, index), so that workers live as long as it.

    batch_size is global. Step s takes the s-th slice of its epoch's permutation, which depends on
    (seed, epoch) only. A process takes its share of the slice in micro-batches of device_batch
    (None: one). The rest of an epoch is dropped. start_step: steps done before a restart.
    Raises ValueError if the sizes do not divide or an epoch has no full batch.
    """

    def __init__(self, num_samples, batch_size, epochs, seed=0, rank=0, world_size=1,
                 device_batch=None, start_step=0):
        self.share = batch_size // world_size
        self.device_batch = device_batch or self.share
        self.steps_per_epoch = num_samples // batch_size
        self.num_steps = epochs * self.steps_per_epoch
        if batch_size % (world_size * self.device_batch):
            raise ValueError(f"batch_size={batch_size} is not a multiple of {world_size} processes "
                             f"x device_batch={self.device_batch}")
        if not self.steps_per_epoch or not 0 <= start_step <= self.num_steps:
            raise ValueError(f"start_step={start_step} of {self.num_steps}: {num_samples} samples "
                             f"fill {self.steps_per_epoch} batches of {batch_size} in an epoch; "
                             f"use batch_size <= {num_samples}, or more epochs")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.start_step = rank, start_step

    def __len__(self):
        """The number of micro-batches left."""
        return (self.num_steps - self.start_step) * (self.share // self.device_batch)

    def __iter__(self):
        for step in range(self.start_step, self.num_steps):
            epoch, number = divmod(step, self.steps_per_epoch)
            if step == self.start_step or number == 0:
                rng = np.random.default_rng([self.seed, epoch])
                order = rng.permutation(self.num_samples).tolist()
            begin = number * self.batch_size + self.rank * self.share
            for first in range(begin, begin + self.share, self.device_batch):
                yield [(epoch, index) for index in order[first:first + self.device_batch]]


def collate(items, join=torch.stack):
    """A batch: the entries of the items, stacked; one list of all unreadable files."""
    batch = {name: join([torch.as_tensor(item[name]) for item in items])
             for name in items[0] if name != "unreadable"}
    return batch | {"unreadable": [entry for item in items for entry in item["unreadable"]]}


def collate_repeats(items):
    """A batch of FinetuneDataset: (B*R, ...), with the R views of a sample side by side."""
    return collate(items, torch.cat)


def free_shared_memory():
    """Bytes free in /dev/shm, through which workers hand over their batches."""
    status = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    return status.f_bavail * status.f_frsize if status else math.inf


def check_shared_memory(batch_bytes, workers):
    """Raises ValueError if /dev/shm has no room for what the workers of all processes prepare."""
    processes, free = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), free_shared_memory()
    if processes * workers * PREFETCH * batch_bytes > free:
        raise ValueError(
            f"/dev/shm has {free / 2 ** 20:.1f} MB free, too little for {processes} processes x "
            f"{workers} workers x {PREFETCH} batches of {batch_bytes / 2 ** 20:.1f} MB: "
            + MORE_SHARED_MEMORY)


def tensors_of(batch):
    """All tensors in nested dicts and lists."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (dict, list)):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from tensors_of(part)


def collate_in_worker(collate, items):
    """`collate`, then the move into shared memory, if in a worker.

    The queue of a worker would move the tensors in a thread whose errors nobody sees.
    """
    batch = collate(items)
    if torch.utils.data.get_worker_info() is not None:
        try:
            for tensor in tensors_of(batch):
                tensor.share_memory_()
        except RuntimeError as error:
            if "Too many open files" in str(error):
                raise video.out_of_files() from error
            raise OSError(f"no room for a batch in /dev/shm, {free_shared_memory() / 2 ** 20:.1f} "
                          f"MB are free: {MORE_SHARED_MEMORY}") from error
    return batch


def start_worker(worker_id):
    """A signal to the whole process group spares the workers: the parent saves, then kills them.

    It may be taking over a tensor just then. The worker's side of this would print a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = lambda *_: None            # errors of a sample travel with its batch
    torch.set_num_threads(1)


def kill(workers):
    """Ends loader processes at once, also those that hang."""
    workers = [worker for worker in workers if worker.is_alive()]
    if workers:
        child_ended = getattr(signal, "SIGCHLD", None)           # not on Windows
        handler = child_ended and signal.signal(child_ended, signal.SIG_DFL)  # torch's would raise
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(5)
        if child_ended:
            signal.signal(child_ended, handler)


class Loader:
    """A DataLoader whose workers end with the iteration, however that ends.

    Iterating raises OSError, one line, if a worker dies or a batch takes longer than BATCH_TIMEOUT.
    """

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        before = multiprocessing.active_children()
        batches = iter(self.loader)
        started = [child for child in multiprocessing.active_children() if child not in before]
        kill_started = functools.partial(kill, started)
        atexit.register(kill_started)           # Python waits at exit for its children to end
        number = 0
        try:
            for batch in batches:
                yield batch
                number += 1
        except RuntimeError as error:
            raise self.explain(error, number) from error
        finally:
            kill_started()
            atexit.unregister(kill_started)

    def explain(self, error, number):
        """The error to raise for a RuntimeError of the DataLoader at batch `number`."""
        text = str(error)
        if "timed out" in text:
            keys = next(itertools.islice(self.loader.batch_sampler, number, None))[:3]
            indices = [key[1] if isinstance(key, tuple) else key for key in keys]
            samples = getattr(self.loader.dataset, "samples", None)
            names = [samples.paths[i] if samples else f"sample {i}" for i in indices]
            return OSError(f"no batch for {self.loader.timeout} s, a loader process hangs or the "
                           f"storage does; it reads {', '.join(names)}")
        if "Too many open files" in text:
            return video.out_of_files()
        if "exited unexpectedly" in text or "killed by signal" in text:
            return OSError(f"a loader process died, try fewer --workers if memory is short: {text}")
        return error


def make_loader(dataset, batches, workers, pin_memory=False, collate=collate):
    """Loader over `batches`, lists of keys of the data set. Iterate over EpochBatches once.

    workers: processes that read, 0 for none. They change no batch.
    Raises ValueError if there is too little shared memory for batches of dataset.item_bytes (if it
    has any) each, OSError if too few files may be open.
    """
    options = {"pin_memory": pin_memory,
               "collate_fn": functools.partial(collate_in_worker, collate),
               "generator": torch.Generator()}  # a pass draws a seed: not from the training's
    if workers:
        largest = getattr(batches, "device_batch", 0) or max(map(len, batches), default=0)
        check_shared_memory(largest * getattr(dataset, "item_bytes", 0), workers)
        if video.file_limit() < 64 + 20 * workers:              # pipes, and a file per tensor
            raise video.out_of_files()
        fork = "fork" in multiprocessing.get_all_start_methods()              # not on Windows
        options |= {"num_workers": workers, "multiprocessing_context": "fork" if fork else "spawn",
                    "prefetch_factor": PREFETCH, "timeout": BATCH_TIMEOUT,
                    "worker_init_fn": start_worker}
    return Loader(torch.utils.data.DataLoader(dataset, batch_sampler=batches, **options))


def make_view_loader(dataset, indices, batch_size, workers, pin_memory=False):
    """The files `indices` of a ViewDataset in order, batch_size at a time."""
    batches = [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
    return make_loader(dataset, batches, workers, pin_memory)


# ------------------------------------------------------------- python data.py --check, --stats DIR


def check_file(path):
    """Decodes a whole file. Returns what it holds or what stops it, as text, and, if it is usable,
    (width, height, frames per second, seconds), the last two None for an image, else None."""
    count, times, last = 0, [], None
    try:
        if layouts.media_kind(path) == "image":
            width, height = read_image(path).size
            return f"image, {width}x{height}", (width, height, None, None)
        with video.open_video(path) as (container, stream):
            codec, width, height = stream.codec_context.name, stream.width, stream.height
            promised = float((stream.duration or 0) * stream.time_base)
            for count, last in enumerate(container.decode(stream), 1):
                times.append(last.time if last.pts is not None
                             else (count - 1) / video.frame_rate(stream))
            if not count:
                return "no frame decodes", None
            seconds = times[-1] - times[0] + float((last.duration or 0) * stream.time_base)
    except UnreadableFile as error:
        return error.reason + (f"; {count} frames decode before that" if count else ""), None
    if promised > seconds + video.MAY_LACK:
        return f"cut off: {seconds:.2f} s ({count} frames) decode, not {promised:.2f} s", None
    fps = count / (seconds or 1)
    return (f"{codec}, {width}x{height}, {count} frames, {fps:.2f} fps, {seconds:.2f} s",
            (width, height, fps, seconds))


def check_layout(folder):
    """Prints what the splits of a folder hold. Returns (list of their Samples, faults found)."""
    found, classes, faults = [], (), 0
    for split in ("train", "val"):
        try:
            samples = layouts.find_samples(folder, split)
            found.append(samples)
            labels = set(samples.labels) - {-1}
            print(f"{split}: {len(samples)} {samples.kind}s, {len(labels)} classes, "
                  f"{len(samples.missing)} missing, {len(samples.ignored)} ignored")
            if labels:
                _, classes = layouts.find_labeled(folder, split, classes)
            if labels and len(found) == 2 and max(found[0].labels) >= 0:
                layouts.check_splits(*found)
        except layouts.MissingSplit as error:
            print(f"note      {str(error).splitlines()[0]}")
        except ValueError as error:
            faults += 1
            print(f"FAULT     {split}: {str(error).splitlines()[0]}")
    return found, faults


def check(folder, workers, image_size, verbose):
    """Decodes every media file below a folder and in its lists, and prints what it has: unusable
    files, missing ones, faults of the layout, a summary. Returns 0, or 1 if there is a fault.
    The files of AVA are checked by ava.py when it starts."""
    from tqdm import tqdm
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no data folder {folder}")
    (media, others), (found, faults) = layouts.walk(folder), check_layout(folder)
    media = [os.path.normpath(path) for path in media]
    listed = {os.path.normpath(path) for samples in found for path in samples.paths}
    strays = Counter(os.path.dirname(path) for path in media if path not in listed and found)
    for place, count in sorted(strays.items()):
        print(f"note      {place}: {count} files are in no split")
    missing = [path for samples in found for path in samples.missing]
    for path in missing:
        print(f"MISSING   {path}")
    media += sorted(listed - set(media))        # a list may name files elsewhere
    facts = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        results = tqdm(pool.map(check_file, media), total=len(media), unit="file",
                       disable=None)            # None: only on a terminal
        for (text, fact), path in zip(results, media):
            if fact:
                facts.append(fact)
            large = fact and fact[0] * fact[1] > LARGE
            if verbose or large or not fact:
                state = "large" if large else "usable" if fact else "UNUSABLE"
                tqdm.write(f"{state:9} {path}: {text}")
    for line in summary(facts, image_size):
        print(line)
    unusable = len(media) - len(facts)
    print(f"{len(facts)} usable, {unusable} unusable, {len(missing)} missing, {len(others)} other "
          "files")
    return int(unusable + len(missing) + faults > 0 or not media)


def summary(facts, image_size):
    """Lines on sizes, rates and lengths. facts: of the usable files, as of `check_file`."""
    if not facts:
        return
    sizes = sorted({fact[:2] for fact in facts}, key=math.prod)
    small = sum(min(fact[:2]) < image_size for fact in facts)
    yield (f"sizes: {sizes[0][0]}x{sizes[0][1]} to {sizes[-1][0]}x{sizes[-1][1]} pixels; the "
           f"shorter side is below {image_size} in {small / len(facts):.0%} of the files")
    if clips := [fact[2:] for fact in facts if fact[2]]:
        rates, seconds = zip(*clips)
        yield (f"videos: {sum(seconds) / 3600:.2f} hours, {min(seconds):.2f} to {max(seconds):.2f} "
               f"s each, {min(rates):.2f} to {max(rates):.2f} fps")


def main():
    parser = argparse.ArgumentParser(description="Check a data set, or measure its colors.")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", metavar="DIR", help="decode every file")
    task.add_argument("--stats", metavar="DIR", help="mean and deviation of up to 200 files")
    parser.add_argument("--workers", type=int, default=engine.usable_cores(),
                        help="of --check [one per core]")
    parser.add_argument("--image-size", type=int, default=224,
                        help="--check: count smaller files [224]")
    parser.add_argument("--verbose", action="store_true", help="--check: name usable files, too")
    options = parser.parse_args()
    engine.check_numbers(options, positive=("workers",))
    if options.check:
        sys.exit(check(options.check, options.workers, options.image_size, options.verbose))
    mean, std, _ = color_stats(layouts.find_samples(options.stats, "train"), 200)
    print(stats_flags(mean, std))


if __name__ == "__main__":
    engine.run_main(main)
