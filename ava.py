"""Action detection on AVA v2.2 (Sec. 4.3, Table 4): which of 80 actions each person in a key frame is doing.

    torchrun ava.py                                                # made-up movies, from the default fine-tuning
    torchrun --nproc_per_node=8 ava.py --data ava/ --model mvitv2_l --init out/finetune/last.pt
    torchrun --nproc_per_node=8 ava.py --data ava/ --eval out/ava/last.pt --view full --draw detections.png
    python ava.py --model mvitv2_l --expand attn --dry-run         # FLOPs and memory of a step

Persons come from somebody else's detector, as a csv of boxes. The features of a clip around the key frame are averaged
over time, cut out for each box by RoIAlign and classified, one logit per action: they do not exclude each other.

DIR (--data) holds the published files as they are, in DIR/annotations or DIR itself: ava_{train,val}_v2.2.csv,
ava_{train,val}_predicted_boxes.csv (or the release's person_box_67091280_iou90/), the val part's excluded timestamps,
ava_action_list_v2.2_for_activitynet_2019.pbtxt; and either the movies, DIR/videos/**/NAME.*, or their frames,
DIR/frames/, with DIR/frame_lists/{train,val}.csv. Movies cut at second 900 need --movie-start 900.

Writes OUT/last.pt, OUT/log.jsonl, OUT/last_{centre,full}.csv (scores for the official evaluator), .json, OUT/last.png.

Release: SlowFast's AVA loader, MViT's detection head and the ActivityNet evaluator, which does not import there.
Differences, the first two with the release's way as an option:
- boxes that a crop leaves empty are dropped (--no-drop-empty: they train as the head's bias alone);
- boxes are scaled along each axis as the picture is (--no-box-per-axis: both by the longer side's ratio);
- the loss is the mean over all boxes of a batch; the release averages the means of its GPUs;
- RoIAlign's stride is the model's own, 32. The release's default is 16, which puts every box at twice its place.
"""
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import layouts
import mvit
from tools import synthetic
from convert import foreign_recipe, load_weights
from models import build_classifier
from engine import (MAX_SKIPPED, Logger, StopSignal, check_positive, gather_list, init_distributed, loader_workers,
                    lr_at, mixed_precision, option, param_groups, parse_recipe, peak_memory, plan_batch,
                    read_checkpoint, reduce_mean, refuse_other_run, report_unreadable, run_main, save_checkpoint,
                    seed_all)
from tools.flops import count_flops

CLASSES = 80                    # in the csv from 1; 60 of them are evaluated
FIRST, LAST = 902, 1798         # seconds that have boxes
FRAMES_START, FPS = 900, 30     # of frames on disk: the second of a movie's first one, and their rate
STARTS = ("out/finetune/last.pt", "out/pretrain/last.pt")


# ------------------------------------------------------------------------------------------------------------ recipes
# The appendix with MaskFeat's recipe for AVA (C.2) is not public to us. The large rows are MViTv1's and MViTv2's own,
# the last one VideoMAE's; what they do not say is as in MaskFeat's fine-tuning on Kinetics.

@dataclass(frozen=True)
class Recipe:
    # model and input
    model: str = option("mvitv2_l", "encoder preset", tuple(mvit.MODELS))
    init: str = option("auto", f"checkpoint whose weights to start from; auto: {' or '.join(STARTS)}; '': from scratch")
    image_size: tuple = option((312, 312), "height and width in pixels, of training crops and the centre view")
    num_frames: int = option(40, "frames per clip", alias="--frames")                 # Table 4: 40x3 at 312
    sampling_rate: int = option(3, "stride between frames, at 30 fps")
    expand: str = option("mlp", "where MViT widens", ("mlp", "attn"))
    drop_path: float = option(0.4, "stochastic depth rate at the last block")         # MViT
    dropout: float = option(0.0, "before the head")
    head_init_scale: float = option(0.001, "factor on a new head's initial weights")  # MaskFeat fine-tuning
    mean: tuple = option((0.45, 0.45, 0.45), "RGB mean of the input in [0, 1]")
    std: tuple = option((0.225, 0.225, 0.225), "RGB standard deviation")
    # boxes and crops
    box_score: float = option(0.8, "least score of a predicted box")                  # release's configs; its code: 0.9
    predicted: bool = option(True, "train on predicted boxes as well as on true ones")
    drop_empty: bool = option(True, "in training, drop boxes that the crop leaves empty")
    box_per_axis: bool = option(True, "scale boxes along each axis as the picture; else both by the longer side's ratio")
    # Release: 256 to 320 for crops of 224. For 312 nothing is published: the same in proportion.
    jitter: tuple = option((356, 446), "range of the picture's shorter side in training")
    flip: float = option(0.5, "probability of a horizontal flip")
    # optimization
    optimizer: str = option("sgd", "adamw, or sgd with Nesterov momentum 0.9", ("adamw", "sgd"))
    epochs: int = option(30, "passes over the key frames")
    batch_size: int = option(512, "clips per update over all GPUs; if not given, at most 1/16 of the key frames")
    lr: float = option(0.6, "peak learning rate at lr_batch clips per update")
    lr_batch: int = option(512, "batch that the three learning rates belong to")
    warmup_epochs: float = option(5.0, "epochs of linear warm-up")
    warmup_lr: float = option(1e-6, "learning rate at the start")                     # ours
    min_lr: float = option(1e-6, "learning rate at the end")                          # ours
    layer_decay: float = option(1.0, "factor on the learning rate from each block to the one below")
    weight_decay: float = option(1e-8, "on tensors of two or more dimensions")
    beta2: float = option(0.999, "AdamW")
    clip_grad: float = option(5.0, "largest total gradient norm; 0: no clipping")
    seed: int = option(0, "of everything random")
    # testing
    view: str = option("centre", "of a test: centre crop, or full picture", ("centre", "full"))
    match: str = option("file", "boxes meet true ones in file order, as in the official evaluator, or best score first",
                        ("file", "score"))
    val_epochs: int = option(5, "epochs between validations on every fourth second; 0: never")
    # the run
    data: str = option("", "folder with the data; none: movies are made in data/synthetic_ava")
    movie_start: float = option(0.0, "second of the movie at which the files in DIR/videos begin")
    out: str = option("out/ava", "folder for checkpoint, log and results")
    resume: bool = option(False, "go on from OUT/last.pt if there is one; --init is then not read again")
    baseline: bool = option(False, "also test the untrained head")
    device_batch: int = option(1, "most clips per GPU and forward pass; the rest is accumulated")
    amp: str = option("auto", "auto: bf16 on GPU (fp16 before Ampere), fp32 on CPU", ("auto", "fp32", "bf16", "fp16"))
    compile: str = option("auto", "torch.compile the encoder; auto: on GPU", ("auto", "on", "off"))
    checkpointing: bool = option(True, "recompute activations: less memory, a third more time")
    workers: int = option(-1, "loader processes per GPU; -1: by the number of CPU cores, 1 without GPU")
    save_minutes: float = option(15.0, "minutes between checkpoints; there is one per epoch as well")
    log_every: int = option(10, "steps between lines of the log, after the first ten")
    # instead of training
    eval: str = option("", "checkpoint to test")
    draw: str = option("", "with --eval: write a picture of key frames, boxes and classes")
    dry_run: bool = option(False, "print FLOPs and memory of a training step; a real one if there is a GPU")


AVA = Recipe()                                       # MViTv1, MViTv2: SGD, 0.6 at 512, 30 epochs, drop path 0.4
RECIPES = {
    "default": Recipe(  # ours: on made-up movies, in minutes on two CPU cores
        model="mvit_tiny", image_size=(64, 64), num_frames=8, sampling_rate=4, drop_path=0.0, jitter=(64, 80), flip=0.5,
        optimizer="adamw", epochs=14, batch_size=8, lr=2e-3, lr_batch=8, warmup_epochs=1, warmup_lr=1e-5, min_lr=1e-5,
        weight_decay=0.05, clip_grad=1.0, val_epochs=4, baseline=True, device_batch=8, checkpointing=False),
    "ava_mvitv2_l_312_40x3": AVA,                    # Table 4: 36.3 centre, 37.5 full from Kinetics-400
    "ava_mvitv2_s_16x4": replace(
        AVA, model="mvitv2_s", image_size=(224, 224), num_frames=16, sampling_rate=4, jitter=(256, 320), device_batch=8,
        checkpointing=False),
    "ava_mvitv2_l_adamw": replace(                   # VideoMAE, ViT-L
        AVA, optimizer="adamw", predicted=False, lr=5e-4, lr_batch=256, batch_size=128, weight_decay=0.05, epochs=20,
        drop_path=0.2, layer_decay=0.8),
}
# What may change when a run is resumed: where and how it runs, and how it is tested.
RUN_FIELDS = {"data", "out", "init", "resume", "baseline", "device_batch", "amp", "compile", "checkpointing", "workers",
              "save_minutes", "log_every", "movie_start", "view", "match", "val_epochs", "eval", "draw", "dry_run"}
# What a checkpoint says of itself when it is tested.
MODEL_FIELDS = ("model", "image_size", "num_frames", "sampling_rate", "expand", "mean", "std", "box_score",
                "box_per_axis", "data", "movie_start")


def check(recipe):
    """Flags that contradict each other, before anything is built."""
    check_positive(recipe, "epochs", "batch_size", "lr", "lr_batch", "device_batch", "log_every", "sampling_rate",
                   "layer_decay")
    for name in ("clip_grad", "val_epochs", "warmup_epochs", "movie_start"):
        if getattr(recipe, name) < 0:
            raise ValueError(f"{name}={getattr(recipe, name)} is negative")
    for name in ("drop_path", "dropout", "flip", "box_score"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"{name}={getattr(recipe, name)} is not between 0 and 1")
    if not (recipe.eval or recipe.dry_run or max(recipe.image_size) <= recipe.jitter[0] <= recipe.jitter[1]):
        raise ValueError(f"jitter={recipe.jitter} is not an increasing range of at least the crop's "
                         f"{max(recipe.image_size)} pixels: set --jitter with --image-size")
    if recipe.draw and not recipe.eval:
        raise ValueError(f"--draw {recipe.draw} needs --eval CKPT")


# --------------------------------------------------------------------------------------------------------------- data

class KeyFrame(NamedTuple):
    """The boxes of one second of a movie."""
    video: str
    second: int
    boxes: np.ndarray    # (n, 4) float64: x1, y1, x2, y2 in fractions of width and height
    targets: np.ndarray  # (n, 80) bool


TABLES = {
    "truth": ("ava_{0}_v2.2.csv",),
    "predicted": ("ava_{0}_predicted_boxes.csv",
                  "person_box_67091280_iou90/ava_detection_{0}_boxes_and_labels_include_negative_v2.2.csv",   # train
                  "person_box_67091280_iou90/ava_detection_{0}_boxes_and_labels.csv"),                        # val
    "excluded": ("ava_{0}_excluded_timestamps_v2.2.csv",),
    "actions": ("ava_action_list_v2.2_for_activitynet_2019.pbtxt", "ava_action_list_v2.1_for_activitynet_2018.pbtxt"),
    "frames": ("frame_lists/{0}.csv",),
}


def locate(folder, table, split="", needed=True):
    """Path of a published file in `folder` or its annotations/; None if it is not there and not needed."""
    names = [name.format(split) for name in TABLES[table]]
    for path in [os.path.join(folder, sub, name) for name in names for sub in ("annotations", "")]:
        if os.path.isfile(path):
            return path
    if needed:
        raise FileNotFoundError(f"{folder} has no {' or '.join(names)}, neither in annotations/ nor beside it")


def find_media(folder, split):
    """{movie: path}, or {movie: paths of its frames in order} if there is a frame list."""
    table = locate(folder, "frames", split, needed=False)
    if table is None:
        return {os.path.splitext(name)[0]: os.path.join(root, name)
                for root, _, names in os.walk(os.path.join(folder, "videos"), followlinks=True)
                for name in sorted(names) if layouts.media_kind(name) == "video"}
    frames = {}
    with open(table) as f:
        next(f)                                                               # header
        for line in f:
            video, _, _, path, *_ = line.split(" ")
            frames.setdefault(video, []).append(path.encode())
    # millions of names: in arrays of bytes, which workers share without copying
    return {video: np.array(sorted(paths)) for video, paths in frames.items()}


def find(recipe, split, say):
    """The key frames of a split that have boxes, in file order, and {movie: its media}.

    Training: true boxes, and predicted ones from recipe.box_score up, merged if their coordinates are written alike
    (release); a box without label is a person who does nothing listed. Validation: predicted ones only.
    Rows that make no sense are counted and named through `say`.
    """
    media, frames, left_out, missing = find_media(recipe.data, split), {}, {}, {}
    tables = [("truth", locate(recipe.data, "truth", split))] if split == "train" else []
    if split != "train" or recipe.predicted:
        path = locate(recipe.data, "predicted", split, needed=split != "train")
        if path is None:
            say(f"{recipe.data}: no predicted boxes for training, only the true ones are used")
        else:
            tables.append(("predicted", path))
    for kind, path in tables:
        with open(path) as f:
            for number, line in enumerate(f, 1):
                reason, row = None, [value.strip() for value in line.split(",")]
                try:
                    video, second, box, label = row[0], int(row[1]), tuple(row[2:6]), int(row[6] or -1)
                    x1, y1, x2, y2 = map(float, box)
                    score = float(row[7]) if kind == "predicted" else 1.0
                except (ValueError, IndexError):
                    reason = "not video, second, x1, y1, x2, y2, class, score or person"
                else:
                    if not FIRST <= second <= LAST:
                        reason = f"second outside {FIRST} to {LAST}"
                    elif not (x1 <= x2 and y1 <= y2):
                        reason = "box inverted"
                    elif label != -1 and not 1 <= label <= CLASSES:
                        reason = f"class outside 1 to {CLASSES}"
                if reason:
                    left_out.setdefault(reason, []).append(f"{os.path.basename(path)} line {number}: {line.strip()}")
                elif score >= recipe.box_score:
                    if video not in media:
                        missing[video] = missing.get(video, 0) + 1
                        continue
                    labels = frames.setdefault((video, second), {}).setdefault(box, set())
                    labels.update({label} - {-1})
    for reason, rows in left_out.items():
        say(f"{split}: {len(rows)} rows left out, {reason}, such as {rows[0]}")
    if missing:
        say(f"{split}: {sum(missing.values())} rows left out, {len(missing)} movies missing in {recipe.data}: "
            + ", ".join(list(missing)[:10]) + ("" if split == "train" else "; in a test their people count as missed"))
    if not frames:
        raise ValueError(f"{recipe.data}: no box of its {split} part is of use, among {len(media)} movies there")
    return [KeyFrame(*key, np.array(list(boxes), float),
                     np.array([[c in labels for c in range(1, CLASSES + 1)] for labels in boxes.values()]))
            for key, boxes in frames.items()], media


def fingerprint_of(frames):
    """Hex digest of key frames, boxes and labels: tells a resumed run that its data changed."""
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(f"{frame.video},{frame.second}".encode() + frame.boxes.tobytes() + frame.targets.tobytes())
    return digest.hexdigest()[:16]


def clip_offsets(num_frames, sampling_rate):
    """Frames (at 30 fps) from the key frame to those of its clip: -T*tau/2, ..., so it is number T/2. Release."""
    half = num_frames * sampling_rate // 2
    return range(-half, num_frames * sampling_rate - half, sampling_rate)


def read_clip(media, frame, num_frames, sampling_rate, movie_start, cover, folder):
    """The clip around a key frame, scaled so as to just cover `cover` (int or (H, W)).

    media: path of the movie, or an array of names of its frames under folder/frames.
    Returns (T, 3, h, w) uint8 and the (height, width) that the pictures had. Raises data.UnreadableFile.
    """
    offsets = clip_offsets(num_frames, sampling_rate)
    if isinstance(media, str):
        times = [frame.second - movie_start + offset / FPS for offset in offsets]
        return data.read_moments(media, times, cover), data.picture_size(media)
    centre = (frame.second - FRAMES_START) * FPS
    if centre >= len(media):
        raise data.UnreadableFile(frame.video, f"it has {len(media)} frames, second {frame.second} is frame {centre}")
    names = [media[min(max(centre + offset, 0), len(media) - 1)].decode() for offset in offsets]
    images = [data.read_image(os.path.join(folder, "frames", name)) for name in names]
    wide, high = images[0].size
    h, w = (cover, cover) if isinstance(cover, int) else cover
    scale = max(h / high, w / wide)
    size = round(wide * scale), round(high * scale)
    images = [np.asarray(image.resize(size, Image.BILINEAR)) for image in images]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), (high, wide)


class Clips(torch.utils.data.Dataset):
    """Clips and boxes of key frames, indexed by (epoch, index) in training (view="train"), by index in a test.

    view: "train" (a random size in recipe.jitter, crop and flip), "centre" (shorter side = crop) or "full" (no crop).
    An item is a dict of "x" uint8 (3, T, h, w), "boxes" float32 (n, 4) in pixels of x, "targets" float32 (n, 80) of 0
    and 1, "index", and "unreadable", a list of (name, reason): in training such a clip is replaced by another, in a
    test it comes without the first three. In a test the boxes are those of the key frame, in their order.
    """

    def __init__(self, frames, media, recipe, view):
        self.frames, self.media, self.recipe, self.view = frames, media, recipe, view

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        epoch, index = key if self.view == "train" else (0, key)
        rng, chosen, unreadable = data.sample_rng(self.recipe.seed, epoch, index), index, []
        while True:
            try:
                return {**self.sample(self.frames[chosen], rng), "index": index, "unreadable": unreadable}
            except data.UnreadableFile as error:
                unreadable.append((f"{self.frames[chosen].video} at second {self.frames[chosen].second}", str(error)))
            if self.view != "train":
                return {"index": index, "unreadable": unreadable}
            if len(unreadable) == data.ATTEMPTS:
                raise ValueError(f"{data.ATTEMPTS} clips in a row are unreadable (movies cut at second 900 need "
                                 "--movie-start 900): " + "; ".join(f"{name} ({reason})" for name, reason in unreadable))
            chosen = (chosen + 1 + rng.randrange(max(len(self) - 1, 1))) % len(self)

    def sample(self, frame, rng):
        r, (H, W) = self.recipe, self.recipe.image_size
        cover = {"train": round(1 / rng.uniform(1 / r.jitter[1], 1 / r.jitter[0])), "centre": (H, W), "full": min(H, W)}
        x, picture = read_clip(self.media[frame.video], frame, r.num_frames, r.sampling_rate, r.movie_start,
                               cover[self.view], r.data)                      # (T, 3, h, w)
        h, w = x.shape[2:]
        top, left, flip = 0, 0, False
        if self.view == "full":
            H, W = h, w
        elif self.view == "centre":
            top, left = math.ceil((h - H) / 2), math.ceil((w - W) / 2)
        else:
            top, left, flip = rng.randint(0, h - H), rng.randint(0, w - W), rng.random() < r.flip
        x = x[:, :, top:top + H, left:left + W]
        boxes = transform_boxes(frame.boxes, picture, (h, w), (top, left, H, W), flip, r.box_per_axis)    # (n, 4)
        targets = frame.targets.astype(np.float32)                            # (n, 80)
        if self.view == "train" and r.drop_empty:
            kept = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
            boxes, targets = boxes[kept], targets[kept]
        return {"x": (x.flip(-1) if flip else x).transpose(0, 1).contiguous(),
                "boxes": torch.from_numpy(boxes.astype(np.float32)), "targets": torch.from_numpy(targets)}


def collate(items):
    """A batch: "x" (B, 3, T, H, W), "rois" (n, 5) with the clip's place in the batch first, "targets" (n, 80)."""
    rois = [F.pad(item["boxes"], (1, 0), value=i) for i, item in enumerate(items)]
    return {"x": torch.stack([item["x"] for item in items]), "rois": torch.cat(rois),
            "targets": torch.cat([item["targets"] for item in items]),
            "unreadable": [entry for item in items for entry in item["unreadable"]]}


# -------------------------------------------------------------------------------------------------------------- boxes

def transform_boxes(boxes, picture, scaled, crop, flip=False, per_axis=True):
    """Boxes as fractions of a picture -> pixels of a crop of the scaled picture.

    boxes: (n, 4) float64 x1, y1, x2, y2. picture, scaled: (H, W) before and after scaling. crop: (top, left, h, w).
    per_axis: scale along each axis as the picture was; False: by the longer side's ratio (release).
    Returns (n, 4) within the crop; what lies outside of it has no area left.
    """
    (H, W), (h, w), (top, left, high, wide) = picture, scaled, crop
    limit = np.array([W - 1, H - 1, W - 1, H - 1])
    boxes = np.clip(boxes * [W, H, W, H], 0, limit)
    if per_axis:
        boxes = boxes * [w, h, w, h] / [W, H, W, H]
    else:
        boxes = boxes * max(w, h) / max(W, H)
    boxes = boxes - [left, top, left, top]
    if flip:
        boxes[:, [0, 2]] = wide - 1 - boxes[:, [2, 0]]
    return np.clip(boxes, 0, np.array([wide - 1, high - 1, wide - 1, high - 1]))


def box_iou(a, b):
    """Intersection over union of every pair: (n, 4), (m, 4) -> (n, m)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=2)
    area_a, area_b = (np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (a, b))
    return both / (area_a[:, None] + area_b[None] - both)


# --------------------------------------------------------------------------------------------------------------- head

def roi_weights(start, size, length, bins, ratio):
    """Weight of each cell of a row of `length` cells in each of `bins` parts of n intervals.

    start, size: (n,) in cells. Parts are means over `ratio` samples, or over as many as a part has cells if 0.
    Returns (n, bins, length).
    """
    part = size / bins
    count = torch.full_like(size, ratio) if ratio else part.ceil().clamp(min=0)        # (n,) samples per part
    k = torch.arange(max(int(count.max()), 1) if len(count) else 1, device=size.device)
    step = (part / count.clamp(min=1))[:, None, None]
    place = torch.arange(bins, device=size.device)[:, None] * part[:, None, None] + (k + 0.5) * step
    place = start[:, None, None] + place                                       # (n, bins, K)
    counted = (k < count[:, None, None]) & (place >= -1) & (place <= length)   # those outside give 0, yet divide
    place = place.clamp(0, length - 1)
    cells = torch.arange(length, device=size.device)
    weight = (1 - (place[..., None] - cells).abs()).clamp(min=0) * counted[..., None]  # (n, bins, K, length): linear
    return weight.sum(dim=2) / count.clamp(min=1)[:, None, None]


def roi_align(features, rois, scale, bins=7, ratio=0):
    """Mean of bilinear samples in each of bins x bins parts of each box (aligned: by half a cell).

    features: (B, C, H, W). rois: (n, 5), place in the batch and x1, y1, x2, y2 in pixels; scale: cells per pixel.
    ratio: samples per part along each axis; 0: as many as a part has cells, so none, and a value of 0, in an empty box.
    Samples more than a cell outside count as 0. Returns (n, C, bins, bins); gradients flow to the features only.

    Samples lie on a grid and are bilinear, so the weight of a cell is a product of one for its row and one for its
    column: all boxes are one batched matrix product.
    """
    x1, y1, x2, y2 = (rois[:, 1:] * scale - 0.5).unbind(1)
    rows = roi_weights(y1, y2 - y1, features.shape[2], bins, ratio)            # (n, bins, H)
    columns = roi_weights(x1, x2 - x1, features.shape[3], bins, ratio)         # (n, bins, W)
    weights = torch.einsum("nph,nqw->npqhw", rows, columns).flatten(3).flatten(1, 2)   # (n, bins * bins, H * W)
    # features[place in the batch], with a gradient summed in a fixed order: runs repeat to the bit.
    cells = F.embedding(rois[:, 0].long(), features.permute(0, 2, 3, 1).flatten(1)).unflatten(1, (-1, features.shape[1]))
    return (weights.to(cells.dtype) @ cells).transpose(1, 2).unflatten(2, (bins, bins))


class Detector(nn.Module):
    """An MViT with a classifier, used on boxes: clips and rois -> one row of logits per roi."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.scale = 1 / model.patch_stride[-1]

    def feature_map(self, x):
        """(B, 3, T, H, W) -> (B, D, h, w): all tokens normed, class token dropped, mean over time. Static: compiled."""
        tokens, grid = self.model.encode(*self.model.embed(x))
        tokens = self.model.norm(tokens)[:, 1:].unflatten(1, grid)             # (B, t, h, w, D)
        return tokens.mean(dim=1).permute(0, 3, 1, 2)

    def classify(self, features, rois):
        """(B, D, h, w), (n, 5) in pixels -> logits (n, 80) float32."""
        with torch.autocast(features.device.type, enabled=False):
            x = roi_align(features.float(), rois, self.scale).amax(dim=(2, 3))         # (n, D)
            return self.model.head(F.dropout(x, self.model.dropout, self.training))

    def forward(self, x, rois):
        return self.classify(self.feature_map(x), rois)


def build(recipe):
    return Detector(build_classifier({**dataclasses.asdict(recipe), "num_classes": CLASSES, "pool": "mean"}))


def normalize(x, recipe):
    """uint8 (B, 3, T, H, W) -> float."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1, 1) for v in (recipe.mean, recipe.std))
    return x.float().div(255).sub(mean).div(std)


# --------------------------------------------------------------------------------------------------------------- loop

def start_weights(detector, recipe, say):
    """Load --init into a new detector, which must be of the same model. Returns the path that was read, or ""."""
    path = recipe.init
    if path == "auto":
        path = next(filter(os.path.isfile, STARTS), None)
        if path is None:
            raise FileNotFoundError(f"none of {', '.join(STARTS)} is there to start from: run pretrain.py first, or "
                                    "give --init CKPT, or start from scratch with --init ''")
    fresh = ["head"]
    if path:
        say(f"starting from {path}")
        stored = foreign_recipe(read_checkpoint(path))
        for key in ("model", "expand"):
            if stored.get(key, getattr(recipe, key)) != getattr(recipe, key):
                raise ValueError(f"--init: {path} is of {key} {stored[key]}, not {getattr(recipe, key)}: add --{key} "
                                 f"{stored[key]}, or choose another checkpoint")
        fresh = load_weights(detector.model, path, verbose=False)["fresh"]
        say(f"new weights: {', '.join(fresh) or 'none'}")
    if any(name.startswith("head") for name in fresh):
        with torch.no_grad():
            for p in detector.model.head.parameters():
                p.mul_(recipe.head_init_scale)
    return path


def train(name, recipe, given, rank, world, device, stop, say):
    """One run from start to end, and its tests."""
    # ------------------------------------------------------------------------------------------------------------ data
    frames, media = find(recipe, "train", say)
    val_frames, val_media = find(recipe, "val", say)                          # what a test needs fails now, not then
    read_label_map(locate(recipe.data, "actions")), read_boxes(locate(recipe.data, "truth", "val"))
    size, accumulate = plan_batch(recipe.batch_size, len(frames), recipe.device_batch, world, "batch_size" in given)
    if size != recipe.batch_size:
        say(f"batch_size {recipe.batch_size} -> {size}: there are only {len(frames)} key frames")
    recipe = replace(recipe, batch_size=size)
    device_batch = size // world // accumulate
    steps_per_epoch = len(frames) // size
    total_steps = recipe.epochs * steps_per_epoch

    # ----------------------------------------------------------------------------------------- model, optimizer, resume
    last, lines = os.path.join(recipe.out, "last.pt"), os.path.join(recipe.out, "log.jsonl")
    for path in (last, lines):
        if os.path.exists(path) and not recipe.resume:
            raise ValueError(f"{path} exists: go on with --resume, or choose another --out; nothing is written over it")
    resumed = recipe.resume and os.path.exists(last)
    seed_all(recipe.seed)
    detector = build(recipe)
    model = detector.model
    init = "" if resumed else start_weights(detector, recipe, say)
    model.to(device)
    amp, autocast, scaler = mixed_precision(recipe.amp, device)
    groups = param_groups(model, recipe.weight_decay, recipe.layer_decay)
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, recipe.beta2), fused=True)
    fingerprint, step, skipped, untrained = fingerprint_of(frames), 0, 0, {}
    if resumed:
        checkpoint = read_checkpoint(last)
        refuse_other_run(last, checkpoint, recipe, fingerprint, RUN_FIELDS)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:                                              # empty but for fp16
            scaler.load_state_dict(checkpoint["scaler"])
        step, skipped, untrained = checkpoint["step"], checkpoint["skipped"], checkpoint["untrained"]
        say(f"resumed {last} at step {step}; --init is not read again")
    if len(set(gather_list([step]))) > 1:
        raise ValueError(f"not all nodes see the same {last}: put --out on a file system that they share")
    os.makedirs(recipe.out, exist_ok=True)
    log = Logger(lines, step, rank)
    test = functools.partial(run_test, detector, recipe, val_frames, val_media, device, rank, world, say)
    if recipe.baseline and not untrained and not step:
        untrained = {view: test(view)["mAP"] for view in ("centre", "full")}

    trained = Detector(model)                                                 # tests take other sizes: not compiled
    if recipe.compile == "on" or recipe.compile == "auto" and device.type == "cuda":
        trained.feature_map = torch.compile(trained.feature_map)              # the number of boxes varies: not the rest
    ddp = torch.nn.parallel.DistributedDataParallel(trained, gradient_as_bucket_view=True) if world > 1 else trained
    batches = data.EpochBatches(len(frames), size, recipe.epochs, recipe.seed, rank, world, device_batch, step)
    loader = data.make_loader(Clips(frames, media, recipe, "train"), batches, loader_workers(recipe.workers, device),
                              pin_memory=device.type == "cuda", collate=collate)

    scale = size / recipe.lr_batch
    say(f"recipe {name}: " + ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(recipe).items()))
    labelled = np.concatenate([frame.targets.any(axis=1) for frame in frames])
    say(f"{len(frames)} key frames of {len({frame.video for frame in frames})} movies to train, {len(labelled)} boxes, "
        f"{labelled.sum()} of them labelled; {len(val_frames)} key frames to test; {steps_per_epoch} steps per epoch, "
        f"{recipe.epochs} epochs, {total_steps} steps")
    say(f"batch {size} = {world} processes x {device_batch} clips x {accumulate} accumulated; "
        f"peak lr {recipe.lr:g} x {size}/{recipe.lr_batch} = {recipe.lr * scale:g}; {amp} on {device}; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, boxes on a grid of stride "
        f"{model.patch_stride[-1]}" + ("" if resumed else f", from {init or 'scratch'}"))

    def sound():
        """Weights about to blow up are not saved; one or two steps skipped by fp16 are its loss scale settling."""
        return skipped_in_row < (3 if scaler.is_enabled() else 1)

    def save():
        nonlocal saved_step
        saved_step = step
        if rank == 0:
            save_checkpoint(last, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "step": step, "skipped": skipped, "untrained": untrained,
                "recipe": {**dataclasses.asdict(recipe), "num_classes": CLASSES, "pool": "mean"}, "data": fingerprint})

    # ------------------------------------------------------------------------------------------------------------ loop
    trained.train()
    loss_sum, steps_summed, skipped_in_row = torch.zeros((), device=device), 0, 0
    logged, saved_step, unreadable, newly_unreadable = step, step, {}, {}
    bar = tqdm(total=total_steps, initial=step, unit="step", disable=rank > 0, dynamic_ncols=True, smoothing=0.1)
    iterator, waited, mark, saved, stopped, due = iter(loader), 0.0, time.perf_counter(), time.monotonic(), "", False
    while step < total_steps and not stopped:
        seed_all(recipe.seed, step, rank)                                     # drop path draws by step: exact resume
        lr = scale * lr_at(step / steps_per_epoch, recipe.lr, recipe.epochs, recipe.warmup_epochs, recipe.warmup_lr,
                           recipe.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        start = time.perf_counter()
        parts = [next(iterator) for _ in range(accumulate)]
        waited += time.perf_counter() - start
        total = reduce_mean(sum(len(part["rois"]) for part in parts), device)          # boxes per rank, on average
        step_loss = torch.zeros((), device=device)
        for micro, batch in enumerate(parts):
            stopped = stop.agreed()
            if stopped:                                                       # half a step is dropped, it can be long
                break
            newly_unreadable.update(batch["unreadable"])
            x, rois, targets = (batch[key].to(device, non_blocking=True) for key in ("x", "rois", "targets"))
            with ddp.no_sync() if world > 1 and micro < accumulate - 1 else nullcontext():
                with autocast():
                    logits = ddp(normalize(x, recipe), rois)                  # (n, 80)
                # Without boxes this is 0 and all gradients are, but every parameter has one, as DDP wants.
                loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
                loss = loss / (CLASSES * max(total, 1 / world))               # their mean, after DDP's over ranks
                scaler.scale(loss).backward()
            step_loss += loss.detach()
        if stopped:
            break
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or float("inf"))
        finite = torch.isfinite(grad_norm).item()                             # of the mean over ranks: all decide alike
        if finite:
            scaler.step(optimizer)
            skipped_in_row, loss_sum, steps_summed = 0, loss_sum + step_loss, steps_summed + 1
        else:
            skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if skipped_in_row == MAX_SKIPPED:
            raise ValueError(f"the {skipped_in_row} steps up to {step} gave a non-finite loss or gradient: lower --lr, "
                             f"or use --amp fp32; {last} is as it was before them")

        # --------------------------------------------------------------------------------- log, validate, stop, save
        if step % recipe.log_every == 0 or step % steps_per_epoch == 0 or step <= 10:
            seconds = time.perf_counter() - mark
            speed, wait = (step - logged) * size / seconds, reduce_mean(waited / seconds, device)
            loss_mean = reduce_mean(loss_sum / steps_summed, device) if steps_summed else None
            report_unreadable(gather_list(list(newly_unreadable.items())), unreadable, len(frames), say)
            bar.set_postfix_str(f"loss {loss_mean:.4f}, lr {lr:.1e}, {speed:.1f} clips/s, waits {wait:.0%}"
                                if steps_summed else f"{skipped} steps skipped", refresh=False)
            log(step=step, epoch=step / steps_per_epoch, loss=loss_mean, lr=lr, samples_per_second=speed,
                data_wait=wait, boxes=round(total * world), grad_norm=grad_norm.item() if finite else None,
                skipped=skipped, unreadable=len(unreadable))
            loss_sum, steps_summed, waited, newly_unreadable = torch.zeros_like(loss_sum), 0, 0.0, {}
            logged, mark = step, time.perf_counter()
        bar.update()
        due = due or step % steps_per_epoch == 0 or time.monotonic() - saved > 60 * recipe.save_minutes
        if due and sound():
            save()
            saved, due = time.monotonic(), False
        if recipe.val_epochs and step < total_steps and step % (recipe.val_epochs * steps_per_epoch) == 0:
            results = test("centre", every=4)
            trained.train()
            log(step=step, val_mAP=results["mAP"])
            mark = time.perf_counter()
    bar.close()
    if stopped:
        if sound():
            save()
        say(f"stopped by {stopped} after step {step} of {total_steps}; {last} holds step {saved_step}, go on with "
            "--resume")
        sys.exit(128 + signal.Signals[stopped])
    if saved_step < step and sound():
        save()
    say(f"{step} steps, {skipped} skipped for non-finite gradients, {len(unreadable)} unreadable clips replaced; "
        f"peak memory {peak_memory(device):.2f} GiB; wrote {last}, {lines}")
    stem = last.removesuffix(".pt")
    tested = {view: test(view, stem=stem) for view in ("centre", "full")}
    if rank == 0:
        say("wrote " + draw_detections(tested["centre"], val_media, recipe, stem + ".png"))
    for view, results in tested.items():
        say(f"{view} view: mAP@0.5 {percent(results['mAP'])}"
            + (f", of the untrained head {percent(untrained[view])}" if untrained else ""))


# ------------------------------------------------------------------------------------------------------------- metric

class Rows(NamedTuple):
    """Boxes of a csv, a class each."""
    keys: list           # n times "movie,second" with four digits
    boxes: np.ndarray    # (n, 4) x1, y1, x2, y2
    labels: np.ndarray   # (n,) int
    scores: np.ndarray   # (n,) float64; zeros for true boxes


def read_boxes(path, scored=False):
    """Every row of a csv in AVA's format, sensible or not: this is what the official evaluator counts."""
    keys, numbers, labels, scores = [], [], [], []
    with open(path) as f:
        for number, line in enumerate(f, 1):
            row = line.strip().split(",")
            try:
                keys.append(f"{row[0]},{int(row[1]):04d}")
                numbers.append([float(v) for v in row[2:6]])
                labels.append(int(row[6]))
                scores.append(float(row[7]) if scored else 0.0)
            except (ValueError, IndexError):
                raise ValueError(f"{path}, line {number}: {line.strip()!r} is not video,second,x1,y1,x2,y2,class"
                                 + (",score" if scored else "")) from None
    return Rows(keys, np.array(numbers).reshape(-1, 4), np.array(labels, int), np.array(scores))


def read_label_map(path):
    """{class: name} of the classes to evaluate, from a pbtxt."""
    with open(path) as f:
        items = re.findall(r"item\s*\{(.*?)\}", f.read(), re.DOTALL)
    names = {}
    for item in items:
        name, number = re.search(r'name:\s*"(.*?)"', item), re.search(r"\b(?:label_)?id:\s*(\d+)", item)
        if not (name and number):
            raise ValueError(f"{path}: an item without name or id: {' '.join(item.split())}")
        names[int(number[1])] = name[1]
    if not names:
        raise ValueError(f"{path} lists no classes")
    return names


def average_precisions(truth, found, classes, excluded=(), match="file", threshold=0.5):
    """Average precision of every class: {class: value}, NaN for a class without true boxes. Their mean is np.nanmean.

    truth, found: Rows; found ones must have a positive width and height to count. excluded: keys to leave out.
    A found box is compared only with the true box of its class and key that it overlaps most; if that was met before,
    or overlaps less than `threshold`, it is false. match: found boxes take their turn as in the file, whatever their
    scores (official evaluator), or "score", best first. Then the area under the envelope of precision over recall,
    among equal scores the last in the file first (the official order among them depends on the CPU).
    """
    excluded, precisions = set(excluded), {}
    truth_kept = np.array([key not in excluded for key in truth.keys], bool)
    found_kept = np.array([key not in excluded for key in found.keys], bool)
    found_kept &= (found.boxes[:, 0] < found.boxes[:, 2]) & (found.boxes[:, 1] < found.boxes[:, 3])
    for label in classes:
        true_rows, rows = (np.flatnonzero((table.labels == label) & kept)
                           for table, kept in ((truth, truth_kept), (found, found_kept)))
        if not len(true_rows):
            precisions[label] = float("nan")
            continue
        if match == "score":
            rows = rows[np.argsort(-found.scores[rows], kind="stable")]
        targets, tries = {}, {}                                               # by key: true rows, and places in `rows`
        for i in true_rows:
            targets.setdefault(truth.keys[i], []).append(i)
        for place, i in enumerate(rows):
            if found.keys[i] in targets:
                tries.setdefault(found.keys[i], []).append(place)
        hit = np.zeros(len(rows), bool)
        for key, places in tries.items():
            iou, met = box_iou(found.boxes[rows[places]], truth.boxes[targets[key]]), set()
            for place, best, overlap in zip(places, iou.argmax(axis=1), iou.max(axis=1)):
                hit[place] = overlap >= threshold and best not in met
                if hit[place]:
                    met.add(best)
        hits = hit[np.argsort(found.scores[rows], kind="stable")[::-1]].cumsum()
        precision = np.concatenate([hits / np.arange(1, len(hits) + 1), [0.0]])
        recall = np.concatenate([[0.0], hits / len(true_rows), [1.0]])
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        precisions[label] = float(np.sum(np.diff(recall) * envelope))
    return precisions


@torch.no_grad()
def detect(detector, frames, media, recipe, view, device, rank, world):
    """Scores of every box of every key frame, each rank on its share of them.

    Returns, the same on all ranks: a list over `frames` of (n, 80) float32 arrays, None for those that cannot be read,
    and the latter as [(name, reason)]. Batches are the same for any number of ranks, so scores are to the bit.
    """
    _, autocast, _ = mixed_precision(recipe.amp, device)
    groups = [range(i, min(i + recipe.device_batch, len(frames))) for i in range(0, len(frames), recipe.device_batch)]
    # Each pass over a DataLoader draws a seed; with its own generator a test amid training leaves torch's alone.
    loader = data.make_loader(Clips(frames, media, recipe, view), groups[rank::world],
                              loader_workers(recipe.workers, device), device.type == "cuda", torch.Generator(), list)
    records, unreadable = [], []
    for items in tqdm(loader, desc=f"{view} view", unit="batch", disable=rank > 0, dynamic_ncols=True, leave=False):
        unreadable += [entry for item in items for entry in item["unreadable"]]
        usable = [item for item in items if "x" in item]
        for _, same in itertools.groupby(usable, lambda item: item["x"].shape):        # full pictures differ in shape
            same = list(same)
            batch = collate(same)
            with autocast():
                logits = detector(normalize(batch["x"].to(device, non_blocking=True), recipe), batch["rois"].to(device))
            scores = logits.sigmoid().cpu().split([len(item["boxes"]) for item in same])
            records += [(item["index"], part.numpy()) for item, part in zip(same, scores)]
    scores = dict(gather_list(records))
    return [scores.get(i) for i in range(len(frames))], sorted(gather_list(unreadable))


def run_test(detector, recipe, frames, media, device, rank, world, say, view, every=1, stem=""):
    """Detect and evaluate: prints, writes STEM_<view>.csv and .json if there is a stem, returns the results.

    every: only seconds that it divides (release: 4 for validation during training). The results are the same on all
    ranks and hold "scores", (n, 80) for each of "frames".
    """
    if every > 1:
        frames = [frame for frame in frames if frame.second % every == 0]
    detector.eval()
    scores, unreadable = detect(detector, frames, media, recipe, view, device, rank, world)
    names = read_label_map(locate(recipe.data, "actions"))
    summary = []
    if rank == 0:
        found = to_rows(frames, scores, names)
        truth = read_boxes(locate(recipe.data, "truth", "val"))
        if every > 1:
            kept = [i for i, key in enumerate(truth.keys) if int(key[-4:]) % every == 0]
            truth = Rows([truth.keys[i] for i in kept], truth.boxes[kept], truth.labels[kept], truth.scores[kept])
        excluded = read_excluded(locate(recipe.data, "excluded", "val", needed=False))
        precisions = average_precisions(truth, found, names, excluded, recipe.match)
        counted = truth.labels[[key not in excluded for key in truth.keys]]
        known = {label: value for label, value in precisions.items() if not math.isnan(value)}
        summary = [{"view": view, "match": recipe.match, "mAP": float(np.mean(list(known.values()))) if known else None,
                    "per_class": {name: [known.get(label), int((counted == label).sum())] for label, name in names.items()},
                    "key_frames": len(frames), "boxes": sum(len(s) for s in scores if s is not None),
                    "unreadable": [list(entry) for entry in unreadable]}]
        if stem:
            write_rows(f"{stem}_{view}.csv", found)
            with open(f"{stem}_{view}.json.tmp", "w") as f:
                json.dump(summary[0], f, indent=1)
            os.replace(f"{stem}_{view}.json.tmp", f"{stem}_{view}.json")
    results = gather_list(summary)[0]
    for line in describe(results, every):
        say(line)
    if stem:
        say(f"wrote {stem}_{view}.csv, {stem}_{view}.json")
    return {**results, "frames": frames, "scores": scores}


def to_rows(frames, scores, names):
    """Rows of every box that has scores and every listed class, in the order of the predicted boxes."""
    read = [(f, s) for f, s in zip(frames, scores) if s is not None]
    keys = [key for f, _ in read for key in [f"{f.video},{f.second:04d}"] * (len(f.boxes) * len(names))]
    boxes = np.concatenate([f.boxes for f, _ in read] or [np.zeros((0, 4))])
    values = np.concatenate([s[:, [label - 1 for label in names]] for _, s in read] or [np.zeros((0, len(names)))])
    return Rows(keys, boxes.repeat(len(names), axis=0), np.tile(list(names), len(boxes)), values.ravel())


def read_excluded(path):
    """Keys of the timestamps that do not count."""
    if path is None:
        return set()
    with open(path) as f:
        rows = [line.strip().split(",") for line in f if line.strip()]
    return {f"{video},{int(second):04d}" for video, second in rows}


def write_rows(path, rows):
    """The csv that the official evaluator reads: movie, second, box, class, score (nine digits: any float32)."""
    with open(path + ".tmp", "w") as f:
        f.writelines(f"{key},{','.join(map(str, box))},{label},{score:.9g}\n" for key, box, label, score in
                     zip(rows.keys, rows.boxes.tolist(), rows.labels.tolist(), rows.scores.tolist()))
    os.replace(path + ".tmp", path)


def percent(share):
    return "unknown" if share is None else f"{100 * share:.2f}"


def describe(results, every):
    """The lines to print of a test; the classes only of a whole one."""
    classes = {name: values for name, values in results["per_class"].items() if values[0] is not None}
    order = "file order, as officially" if results["match"] == "file" else "order of their scores, not as officially"
    lines = [f"{results['view']} view, {results['boxes']} boxes in {results['key_frames']} key frames"
             f"{f' (every {every}th second)' if every > 1 else ''}: mAP@0.5 {percent(results['mAP'])} over "
             f"{len(classes)} classes, boxes matched in {order}"]
    if every == 1:
        width = max(map(len, classes), default=0)
        lines += [f"  {name:{width}}  {100 * value:6.2f}  of {count}" for name, (value, count) in
                  sorted(classes.items(), key=lambda entry: -entry[1][0])]
    if results["unreadable"]:
        lines.append(f"{len(results['unreadable'])} clips could not be read, their people count as missed:")
        lines += [f"  {name}: {reason}" for name, reason in results["unreadable"]]
    return lines


def draw_detections(results, media, recipe, path, count=6, height=240):
    """Write a picture of `count` key frames, spread over those tested. Returns the path.

    White: true boxes. Coloured: the boxes that were classified, with their two best classes, green if a true box that
    they overlap by half or more has the class, else orange.
    """
    names = read_label_map(locate(recipe.data, "actions"))
    truth, true_boxes = read_boxes(locate(recipe.data, "truth", "val")), {}
    for key, box, label in zip(truth.keys, truth.boxes, truth.labels):
        true_boxes.setdefault(key, []).append((box, label))
    usable = [(f, s) for f, s in zip(results["frames"], results["scores"]) if s is not None]
    pictures, font = [], ImageFont.load_default(13)
    for i in range(min(count, len(usable))):
        frame, scores = usable[i * len(usable) // min(count, len(usable))]
        x, _ = read_clip(media[frame.video], frame, 1, 1, recipe.movie_start, height, recipe.data)
        picture = Image.fromarray(x[0].permute(1, 2, 0).numpy())
        pen, size = ImageDraw.Draw(picture), np.array(picture.size * 2)
        here = true_boxes.get(f"{frame.video},{frame.second:04d}", [])
        for box, _ in here:
            pen.rectangle((box * size).tolist(), outline="white")
        for box, row in zip(frame.boxes, scores):
            right = {label for true, label in here if box_iou(box[None], true[None])[0, 0] >= 0.5}
            best = sorted(names, key=lambda label: -row[label - 1])[:2]
            place = (box * size).tolist()
            pen.rectangle(place, outline="lime" if best[0] in right else "orange", width=2)
            for line, label in enumerate(best):
                text = f"{names[label]} {100 * row[label - 1]:.0f}%"
                at = max(min(place[0] + 3, picture.width - font.getlength(text)), 0), place[1] + 2 + 14 * line
                pen.rectangle(pen.textbbox(at, text, font), "black")
                pen.text(at, text, "lime" if label in right else "orange", font)
        pen.text((4, height - 18), f"{frame.video}, {frame.second} s", "white", font, stroke_width=2,
                 stroke_fill="black")
        pictures.append(picture)
    columns = min(3, len(pictures))
    wide = max(picture.width for picture in pictures) + 4
    sheet = Image.new("RGB", (columns * wide, -(-len(pictures) // columns) * (height + 4)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * wide, i // columns * (height + 4)))
    sheet.save(path)
    return path


# --------------------------------------------------------------------------------------------------------------- main

class Fused(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward pass, q, k, v and the output, without computing anything."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def dry_run(recipe, device, say, boxes=3):
    """FLOPs, and memory of a training step of device_batch clips: by shapes, and of a real step if there is a GPU."""
    B, shape = recipe.device_batch, (3, recipe.num_frames, *recipe.image_size)
    with torch.device("meta"):
        model = build(replace(recipe, checkpointing=False)).model.train()
        tokens, grid = model.embed(torch.empty(B, *shape))
    cost, inputs, inside = count_flops(model, (1, *shape)), [], []
    tokens = torch.cat([model.cls_token.expand(B, -1, -1), tokens], dim=1)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    for block in model.blocks:
        kept = {}                                                             # whatever autograd keeps, once

        def keep(x):
            kept[x.untyped_storage()._cdata] = x
            return x
        inputs.append(tokens.nbytes)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), \
                mock.patch.object(F, "scaled_dot_product_attention", lambda q, k, v, scale: Fused.apply(q, k, v)):
            tokens, grid = block(tokens, grid)
        inside.append(sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights))
    tokens.sum().backward()
    states = 4 * cost["parameters"] * (3 if recipe.optimizer == "sgd" else 4) # weights, gradients, one or two moments
    gib = 2 ** 30
    say(f"{recipe.model}, {'x'.join(map(str, shape[1:]))}, expand={recipe.expand}: {cost['parameters']:,} parameters, "
        f"{cost['flops'] / 1e9:.2f} GFLOPs a clip ({cost['macs'] / 1e9:.2f} without LayerNorm), output grid "
        f"{'x'.join(map(str, grid))}")
    say(f"by shapes, a step of {B} clips in float32: {states / gib:.2f} GiB of weights, gradients and optimizer; blocks "
        f"keep {sum(inside) / gib:.2f} GiB for the backward pass, with --checkpointing "
        f"{(sum(inputs) + max(inside)) / gib:.2f}")
    if device.type != "cuda":
        say("no GPU: no real step")
        return
    _, autocast, scaler = mixed_precision(recipe.amp, device)
    detector = build(recipe).to(device).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-9, momentum=0.9)
    x = torch.randn(B, *shape, device=device)
    rois = torch.tensor([[i, 0, 0, shape[3] / 2, shape[2] - 1] for i in range(B) for _ in range(boxes)], device=device)
    for _ in range(2):                                                        # the second finds the momentum there
        start = time.perf_counter()
        with autocast():
            logits = detector(x, rois)
        scaler.scale(F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        torch.cuda.synchronize()
    say(f"a real step of {B} clips on {torch.cuda.get_device_name()}: {peak_memory(device):.2f} GiB at most, "
        f"{time.perf_counter() - start:.2f} s")


def load_for_test(recipe, given, say):
    """(recipe, detector) of the checkpoint recipe.eval; flags that were given count more than it."""
    stored = foreign_recipe(read_checkpoint(recipe.eval))
    recipe = replace(recipe, **{key: stored[key] for key in MODEL_FIELDS if key in stored and key not in given})
    if stored.get("num_classes") != CLASSES:
        raise ValueError(f"{recipe.eval} has {stored.get('num_classes') or 'no'} classes, not AVA's {CLASSES}: use it "
                         "for --init, not --eval")
    detector = build(replace(recipe, drop_path=0.0, dropout=0.0))
    report = load_weights(detector.model, recipe.eval, verbose=False)
    if report["fresh"]:
        raise ValueError(f"{recipe.eval} lacks {', '.join(report['fresh'])}")
    say(f"{recipe.eval}: {recipe.model}, {recipe.num_frames} frames at stride {recipe.sampling_rate}, "
        f"{recipe.image_size[0]}x{recipe.image_size[1]} pixels, boxes of score {recipe.box_score} or more"
        + "".join(f", {len(report[what])} tensors {what}" for what in ("resized", "left out") if report[what]))
    return recipe, detector


def main():
    name, recipe, given = parse_recipe(RECIPES, __doc__)
    check(recipe)
    rank, world, device = init_distributed()
    say = tqdm.write if rank == 0 else lambda line: None
    if recipe.dry_run:
        return dry_run(recipe, device, say)
    if recipe.eval:
        recipe, detector = load_for_test(recipe, given, say)
        if not recipe.data:
            raise ValueError("--data DIR: which data?")
        frames, media = find(recipe, "val", say)
        results = run_test(detector.to(device), recipe, frames, media, device, rank, world, say, recipe.view,
                           stem=os.path.splitext(recipe.eval)[0])
        if recipe.draw and rank == 0:
            say("wrote " + draw_detections(results, media, recipe, recipe.draw))
        return
    stop = StopSignal()
    if not recipe.data:
        recipe = replace(recipe, data="data/synthetic_ava", movie_start=float(synthetic.MOVIE_START))
        if rank == 0 and not os.path.isdir(recipe.data):
            say(f"no --data: making movies in {recipe.data}, once")
        synthetic.make_ava_dataset(recipe.data)                               # safe if all ranks do it at once
    train(name, recipe, given, rank, world, device, stop, say)


if __name__ == "__main__":
    run_main(main)
