"""Action detection on AVA v2.2 (Sec. 4.2, Table 4): which of 80 actions each person is doing.

    torchrun ava.py                                               # recipe `tiny`, made-up movies
    torchrun --nproc_per_node=8 ava.py --data ava/ --model mvitv2_l --init out/finetune/last.pt
    torchrun --nproc_per_node=8 ava.py --data ava/ --eval out/ava/last.pt --view full --draw a.png
    python ava.py --model mvitv2_l --expand attn --dry-run

The boxes of persons come from a separate detector. The model encodes the clip around a key frame.
RoIAlign cuts each box out of the features, and a linear layer gives one logit per action.

--data DIR has the published TABLES in DIR/annotations or DIR, and the movies, DIR/videos/**/NAME.*
(with --movie-start 900 if cut there), or their frames in DIR/frames and DIR/frame_lists.
Writes OUT/last.pt, log.jsonl, recipe.json, last_{center,full}.csv (for the official evaluator),
.json, last.png.

Release: SlowFast's AVA loader, MViT's detection head, the ActivityNet evaluator. Differences:
- Boxes that a crop leaves empty are dropped (release: --no-drop-empty).
- Boxes are scaled along each axis as the picture is (release: --no-box-per-axis).
- The loss is the mean over all boxes of a batch. The release averages the means of its GPUs.
- The features' stride is their own, 32. The release's default of 16 doubles all coordinates.
"""
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import engine
from engine import option

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import checkpoints
import data
import layouts
import models
import mvit
import video
from convert import foreign_recipe, load_weights
from tools import synthetic
from tools.flops import count_flops
from video import UnreadableFile

CLASSES = 80                 # numbered from 1 in the tables; 60 of them are evaluated
FIRST, LAST = 902, 1798      # seconds that have boxes
FRAMES_START, FPS = 900, 30  # second of the first frame in DIR/frames, frames per second
COLUMNS = "video, second, x1, y1, x2, y2, class, score or person"
STARTS = ("out/finetune/last.pt", "out/pretrain/last.pt")


# ---------------------------------------------------------------------------------------- recipes
# The paper's AVA recipe is in its appendix, which is not public to us. The large rows are those of
# MViTv1 and MViTv2, and the last one is VideoMAE's. The rest is as in MaskFeat's fine-tuning.

@dataclass(frozen=True)
class Recipe:
    model: str = option("mvitv2_l", "encoder", tuple(mvit.MODELS), group="model and input")
    init: str = option("auto", f"checkpoint to start from; auto: {' or '.join(STARTS)}; '': none")
    image_size: tuple = option((312, 312), "height and width of crops")      # Table 4: 312, 40x3
    num_frames: int = option(40, "frames per clip", alias="--frames")
    sampling_rate: int = option(3, "stride between frames, at 30 fps")
    expand: str = option("mlp", "where MViT widens", ("mlp", "attn"))
    drop_path: float = option(0.4, "stochastic depth rate at the last block")             # MViT
    dropout: float = option(0.0, "before the head")
    head_init_scale: float = option(0.001, "factor on a new head's weights")
    mean: tuple = option((0.45, 0.45, 0.45), "RGB mean of the input in [0, 1]")
    std: tuple = option((0.225, 0.225, 0.225), "RGB standard deviation")
    box_score: float = option(0.8, "least score of a predicted box",
                              group="boxes and crops")  # release
    predicted: bool = option(True, "train on predicted boxes, too")
    drop_empty: bool = option(True, "drop training boxes that the crop leaves empty")
    box_per_axis: bool = option(True, "scale boxes per axis, else by the longer side's ratio")
    jitter: tuple = option((356, 446), "range of the shorter side in training")  # as 256-320 to 224
    flip: float = option(0.5, "probability of a horizontal flip")
    optimizer: str = option("sgd", "with momentum 0.9, or adamw", ("adamw", "sgd"),
                            group="optimization")
    epochs: int = option(30, "passes over the key frames")
    batch_size: int = option(512, "clips per update over all GPUs, at most 1/16 of all")
    lr: float = option(0.6, "peak learning rate at lr_batch clips per update")
    lr_batch: int = option(512, "batch that the three learning rates belong to")
    warmup_epochs: float = option(5.0, "epochs of linear warm-up")
    warmup_lr: float = option(1e-6, "learning rate at the start")                         # ours
    min_lr: float = option(1e-6, "learning rate at the end")                              # ours
    layer_decay: float = option(1.0, "factor on the learning rate from a block to the one below")
    weight_decay: float = option(1e-8, "on tensors of two or more dimensions")
    beta2: float = option(0.999, "AdamW")
    clip_grad: float = option(5.0, "largest total gradient norm, 0: no clipping")
    seed: int = option(0, "of everything random")
    view: str = option("center", "center crop, or the full picture", ("center", "full"),
                       group="testing")
    match: str = option("file", "match boxes in file order, as officially, or best score first",
                        ("file", "score"))
    val_epochs: int = option(5, "epochs between tests on every fourth second, 0: never")
    baseline: bool = option(False, "also test the untrained head")
    eval: str = option("", "checkpoint to test, without training")
    draw: str = option("", "with --eval: picture to write")
    data: str = option("", "folder with the data; without one, movies are made in data/",
                       group="the run")
    movie_start: float = option(0.0, "second at which the files in DIR/videos begin")
    out: str = option("out/ava", "folder for checkpoint, log and results")
    resume: bool = option(False, "go on from OUT/last.pt if there is one")
    device_batch: int = option(1, "most clips per GPU and forward pass")
    amp: str = option("auto", "precision", ("auto", "fp32", "bf16", "fp16"))
    compile: str = option("auto", "torch.compile; auto: on a GPU", ("auto", "on", "off"))
    checkpointing: bool = option(True, "recompute activations: less memory, a third more time")
    workers: int = option(-1, "loader processes per GPU; -1: one per CPU core")
    save_minutes: float = option(15.0, "minutes between checkpoints; one per epoch as well")
    log_every: int = option(10, "steps between lines of the log, after the first ten")
    dry_run: bool = option(False, "print FLOPs, and on a GPU memory and time of a step")


AVA = Recipe()  # MViTv1, MViTv2: SGD, 0.6 at 512, 30 epochs, drop path 0.4
RECIPES = {
    "tiny": Recipe(  # ours: minutes on two CPU cores
        model="mvit_nano", image_size=(64, 64), num_frames=8, sampling_rate=4, jitter=(64, 80),
        drop_path=0.0, optimizer="adamw", epochs=30, batch_size=8, lr=2e-3, lr_batch=8,
        warmup_epochs=1.0, warmup_lr=1e-5, min_lr=1e-5, weight_decay=0.05, clip_grad=1.0,
        val_epochs=10, baseline=True, device_batch=8, checkpointing=False, compile="off"),
    "ava_mvitv2_l_312_40x3": AVA,  # Table 4, from Kinetics-400: 36.3 center, 37.5 full
    "ava_mvitv2_s_16x4": replace(
        AVA, model="mvitv2_s", image_size=(224, 224), num_frames=16, sampling_rate=4,
        jitter=(256, 320), device_batch=8, checkpointing=False),
    "ava_mvitv2_l_adamw": replace(  # VideoMAE, ViT-L
        AVA, optimizer="adamw", predicted=False, lr=5e-4, lr_batch=256, batch_size=128,
        weight_decay=0.05, epochs=20, drop_path=0.2, layer_decay=0.8),
}
# What may change when a run is resumed, and what a test takes from its checkpoint.
RUN_FIELDS = {
    "data", "out", "init", "resume", "baseline", "device_batch", "amp", "compile", "checkpointing",
    "workers", "save_minutes", "log_every", "movie_start", "view", "match", "val_epochs", "eval",
    "draw", "dry_run"}
MODEL_FIELDS = ("model", "image_size", "num_frames", "sampling_rate", "expand", "mean", "std",
                "box_score", "box_per_axis", "data", "movie_start")


def check(recipe):
    """Raise ValueError for flags out of range or in contradiction."""
    engine.check_numbers(
        recipe, not_negative=("clip_grad", "val_epochs", "warmup_epochs", "warmup_lr", "min_lr",
                              "weight_decay", "save_minutes", "movie_start"),
        positive=("epochs", "batch_size", "lr", "lr_batch", "device_batch", "log_every",
                  "layer_decay"),
        shares=("flip", "box_score", "beta2"))
    models.check_sizes(vars(recipe))
    if not max(recipe.image_size) <= recipe.jitter[0] <= recipe.jitter[1] <= 4096:
        raise ValueError(f"jitter={recipe.jitter} is no range from image_size={recipe.image_size} "
                         "up to 4096: set --jitter with --image-size")
    if recipe.draw and not recipe.eval:
        raise ValueError(f"--draw {recipe.draw} needs --eval CKPT")


# ------------------------------------------------------------------------------------------- data

class KeyFrame(NamedTuple):
    """The boxes of one second of a movie."""
    movie: str
    second: int
    boxes: np.ndarray    # (n, 4) float64: x1, y1, x2, y2 in fractions of width and height
    targets: np.ndarray  # (n, 80) bool


DETECTED = "person_box_67091280_iou90/ava_detection_{0}_boxes_and_labels"
TABLES = {
    "truth": ["ava_{0}_v2.2.csv"],
    "predicted": ["ava_{0}_predicted_boxes.csv", DETECTED + "_include_negative_v2.2.csv",
                  DETECTED + ".csv"],
    "excluded": ["ava_{0}_excluded_timestamps_v2.2.csv"],
    "actions": ["ava_action_list_v2.2_for_activitynet_2019.pbtxt",
                "ava_action_list_v2.1_for_activitynet_2018.pbtxt"],
    "frames": ["frame_lists/{0}.csv"],
}


def locate(folder, table, split="", needed=True):
    """Path of a published table in folder/annotations or `folder`. None if it lacks and may."""
    names = [name.format(split) for name in TABLES[table]]
    for place in [os.path.join(folder, "annotations"), folder]:
        for path in [os.path.join(place, name) for name in names]:
            if os.path.isfile(path):
                return path
    if needed and not os.path.isdir(folder):
        raise FileNotFoundError(f"no data folder {folder}")
    if needed:
        raise FileNotFoundError(f"{folder} and its annotations/ have no {' or '.join(names)}")


def read_lines(path):
    """(number, line) of all lines of a table, from 1. Raises ValueError for one not in UTF-8."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise ValueError(f"{path}, line {number} is not UTF-8: save the file as "
                                 "UTF-8") from None


def refuse(path, number, line, wanted):
    """Raise ValueError for a line of a table."""
    raise ValueError(f"{path}, line {number}: {line[:80]!r} is not {wanted}: correct it or take it "
                     "out") from None


def find_media(folder, split):
    """{movie: path}, or {movie: paths of its frames in order} if there is a frame list."""
    frame_list, media = locate(folder, "frames", split, needed=False), {}
    if frame_list is None:
        for root, _, names in os.walk(os.path.join(folder, "videos"), followlinks=True):
            media |= {os.path.splitext(name)[0]: os.path.join(root, name)
                      for name in sorted(names) if layouts.media_kind(name) == "video"}
        return media
    for number, line in itertools.islice(read_lines(frame_list), 1, None):             # no header
        row = line.split()
        if 0 < len(row) < 4:
            refuse(frame_list, number, line, "movie, number, number, path, labels")
        elif row:
            media.setdefault(row[0], []).append(row[3].encode())
    if not media:
        raise ValueError(f"{frame_list} lists no frames: write a header and a line for each")
    # Millions of paths: workers share arrays of bytes without a copy.
    return {movie: np.array(sorted(paths)) for movie, paths in media.items()}


def parse_row(line, scored):
    """(movie, second, coordinates as written, class or -1, score) of a line whose last column is a
    score, or a person. Raises ValueError with the reason if it cannot be used."""
    row = [value.strip() for value in line.split(",")]
    try:
        movie, second, box, label = row[0], int(row[1]), tuple(row[2:6]), int(row[6] or -1)
        x1, y1, x2, y2 = map(float, box)
        score = float(row[7]) if scored else 1.0
        if math.isnan(score):
            raise ValueError
    except (ValueError, IndexError):
        raise ValueError(f"not {COLUMNS}") from None
    if not FIRST <= second <= LAST:
        raise ValueError(f"second outside {FIRST} to {LAST}")
    if not (x1 <= x2 and y1 <= y2):  # or nan
        raise ValueError("box inverted")
    if min(x1, y1) < -0.1 or max(x2, y2) > 1.1:  # a detector may go a little beyond the picture
        raise ValueError("box outside the picture, write fractions of its sides, not pixels")
    if label != -1 and not 1 <= label <= CLASSES:
        raise ValueError(f"class outside 1 to {CLASSES}")
    return movie, second, box, label, score


def find_key_frames(recipe, split, print0):
    """(the key frames of a split that have boxes, {movie: its media}).

    Training takes true boxes, and predicted ones from recipe.box_score up. Validation takes the
    latter. Coordinates that are written alike are one box (release). A box without class is a
    person with no action. Rows that cannot be used are counted, and one is shown.
    """
    media, frames, left_out = find_media(recipe.data, split), {}, {}
    kinds = ["truth"] * (split == "train") + ["predicted"] * (split == "val" or recipe.predicted)
    for kind in kinds:
        path = locate(recipe.data, kind, split, needed=kinds[0] == kind)
        if path is None:
            print0(f"{recipe.data} has no predicted boxes for training: only true ones are used")
            continue
        for number, line in read_lines(path):
            try:
                movie, second, box, label, score = parse_row(line, kind == "predicted")
                if score < recipe.box_score:
                    continue
                if movie not in media:
                    raise ValueError("movie missing (in a test its persons count as missed)")
            except ValueError as error:
                where = f"{os.path.basename(path)} line {number}"
                left_out.setdefault(str(error), []).append(f"{where}: {line}")
                continue
            labels = frames.setdefault((movie, second), {}).setdefault(box, set())
            labels.update({label} - {-1})
    for reason, rows in left_out.items():
        print0(f"{split}: rows left out, {reason}: {len(rows)}, such as {rows[0]}")
    if not frames:
        raise ValueError(f"{recipe.data}: no box of its {split} part and {len(media)} movies is "
                         "of use")
    classes = range(1, CLASSES + 1)
    return [KeyFrame(*key, np.array(list(boxes), float),
                     np.array([[c in labels for c in classes] for labels in boxes.values()]))
            for key, boxes in frames.items()], media


def fingerprint_of(frames):
    """A hex digest, by which a resumed run knows its data."""
    digest = hashlib.sha256()
    for f in frames:
        digest.update(f"{f.movie},{f.second}".encode() + f.boxes.tobytes() + f.targets.tobytes())
    return digest.hexdigest()[:16]


def clip_offsets(num_frames, sampling_rate):
    """Numbers of a clip's frames, from the key frame, which is the T/2-th (release)."""
    half = num_frames * sampling_rate // 2
    return range(-half, num_frames * sampling_rate - half, sampling_rate)


def read_clip(media, frame, num_frames, sampling_rate, movie_start, min_size, folder):
    """The clip around a key frame, scaled so that it just covers `min_size` (int or (H, W)).

    media: path of the movie, or an array of the names of its frames in folder/frames.
    Returns (T, 3, h, w) uint8 and the original (height, width). Raises UnreadableFile.
    """
    offsets = clip_offsets(num_frames, sampling_rate)
    try:
        if isinstance(media, str):
            if frame.second < movie_start:
                raise UnreadableFile(media, "the movie begins after that")
            times = [frame.second - movie_start + offset / FPS for offset in offsets]
            return video.read_moments(media, times, min_size), video.picture_size(media)
        center = (frame.second - FRAMES_START) * FPS
        if center >= len(media):
            raise UnreadableFile("frames", f"number {center} is wanted of {len(media)}")
        names = media[np.clip(center + np.array(offsets), 0, len(media) - 1)]
        images = [video.read_image(os.path.join(folder, "frames", str(name, "utf8")))
                  for name in names]
    except UnreadableFile as error:
        raise UnreadableFile(f"{frame.movie} at second {frame.second}",
                             f"{error} (--movie-start {movie_start:g} is the second at which "
                             "the movies begin)") from error
    W, H = images[0].size
    h, w = (min_size, min_size) if isinstance(min_size, int) else min_size
    scale = max(h / H, w / W)
    size = round(W * scale), round(H * scale)
    images = [np.asarray(image.resize(size, Image.BILINEAR)) for image in images]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), (H, W)


class Clips(torch.utils.data.Dataset):
    """Clips and boxes, indexed by (epoch, index) in training, else by index.

    view: "train" (random size in recipe.jitter, crop and flip), "center" (crop) or "full".
    An item is a dict of "x" uint8 (3, T, h, w), "boxes" float32 (n, 4) in pixels of x, "targets"
    float32 (n, 80), "index" and "unreadable", a list of (name, reason). In training another clip
    replaces an unreadable one. In a test its item has the last two entries only.
    """

    def __init__(self, frames, media, recipe, view):
        self.frames, self.media, self.recipe, self.view = frames, media, recipe, view
        self.item_bytes = 3 * recipe.num_frames * math.prod(recipe.image_size)

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        if self.view == "train":
            epoch, index = key
            rng = data.sample_rng(self.recipe.seed, epoch, index)
            item, _, unreadable = data.read_or_replace(
                lambda i: self.sample(self.frames[i], rng), index, len(self), rng)
            return {**item, "index": index, "unreadable": unreadable}
        try:
            return {**self.sample(self.frames[key]), "index": key, "unreadable": []}
        except UnreadableFile as error:
            return {"index": key, "unreadable": [(error.path, error.reason)]}

    def sample(self, frame, rng=None):
        r, (H, W) = self.recipe, self.recipe.image_size
        min_size = (H, W) if self.view == "center" else min(H, W)
        if self.view == "train":
            min_size = round(1 / rng.uniform(1 / r.jitter[1], 1 / r.jitter[0]))
        x, picture = read_clip(self.media[frame.movie], frame, r.num_frames, r.sampling_rate,
                               r.movie_start, min_size, r.data)       # (T, 3, h, w)
        h, w = x.shape[2:]
        top, left, flip = math.ceil((h - H) / 2), math.ceil((w - W) / 2), False
        if self.view == "full":
            top, left, H, W = 0, 0, h, w
        elif self.view == "train":
            top, left = rng.randint(0, h - H), rng.randint(0, w - W)
            flip = rng.random() < r.flip
        x = x[:, :, top:top + H, left:left + W].transpose(0, 1)       # (3, T, H, W)
        boxes = transform_boxes(frame.boxes, picture, (h, w), (top, left, H, W), flip,
                                r.box_per_axis)                       # (n, 4)
        keep = np.ones(len(boxes), bool)
        if self.view == "train" and r.drop_empty:
            keep = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
        return {"x": (x.flip(-1) if flip else x).contiguous(),
                "boxes": torch.from_numpy(boxes[keep]).float(),
                "targets": torch.from_numpy(frame.targets[keep]).float()}


def collate(items):
    """"x" (B, 3, T, H, W), "targets" (n, 80), and "rois" (n, 5): place in the batch and box."""
    rois = [F.pad(item["boxes"], (1, 0), value=i) for i, item in enumerate(items)]
    return {"x": torch.stack([item["x"] for item in items]), "rois": torch.cat(rois),
            "targets": torch.cat([item["targets"] for item in items]),
            "unreadable": [entry for item in items for entry in item["unreadable"]]}


def make_loader(clips, batches, device, collate):
    """The loader of `batches`, on the number of workers that the recipe asks for."""
    workers = engine.loader_workers(clips.recipe.workers, device)
    return data.make_loader(clips, batches, workers, device.type == "cuda", collate)


# ------------------------------------------------------------------------------------------ boxes

def transform_boxes(boxes, picture, scaled, crop, flip=False, per_axis=True):
    """Boxes as fractions of a picture -> pixels of a crop of the scaled picture.

    boxes: (n, 4) float64 x1, y1, x2, y2. picture, scaled: (H, W) before and after scaling.
    crop: (top, left, h, w). per_axis=False scales by the ratio of the longer sides (release).
    Returns (n, 4) within the crop. A box outside has no area left.
    """
    (H, W), (h, w), (top, left, crop_h, crop_w) = picture, scaled, crop
    boxes = np.clip(boxes * [W, H, W, H], 0, [W - 1, H - 1, W - 1, H - 1])
    if per_axis:
        boxes = boxes * [w, h, w, h] / [W, H, W, H]
    else:
        boxes = boxes * max(w, h) / max(W, H)
    boxes = boxes - [left, top, left, top]
    if flip:
        boxes[:, [0, 2]] = crop_w - 1 - boxes[:, [2, 0]]
    return np.clip(boxes, 0, [crop_w - 1, crop_h - 1, crop_w - 1, crop_h - 1])


def box_iou(a, b):
    """Intersection over union of every pair: (n, 4), (m, 4) -> (n, m)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=2)
    area_a, area_b = (np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (a, b))
    return both / (area_a[:, None] + area_b[None] - both)


# ------------------------------------------------------------------------------------------- head

def roi_weights(start, size, length, bins, ratio):
    """Weight of each cell of a row of `length` cells in each of `bins` parts of n intervals.

    start, size: (n,) in cells. A part is the mean of `ratio` samples, or if that is 0, of as many
    as it has cells. Returns (n, bins, length).
    """
    part = size / bins
    count = torch.full_like(size, ratio) if ratio else part.ceil().clamp(min=0)   # (n,) samples
    # Enough for a box of `bins` times the map. The largest count would be a wait for the GPU.
    k = torch.arange(ratio or length, device=size.device)
    step = (part / count.clamp(min=1))[:, None, None]
    place = torch.arange(bins, device=size.device)[:, None] * part[:, None, None]
    place = start[:, None, None] + (place + (k + 0.5) * step)                     # (n, bins, K)
    # A sample more than a cell outside counts in the mean as 0.
    counted = (k < count[:, None, None]) & (place >= -1) & (place <= length)
    cells = torch.arange(length, device=size.device)
    distance = (place.clamp(0, length - 1)[..., None] - cells).abs()              # (.., K, length)
    weight = (1 - distance).clamp(min=0) * counted[..., None]                     # linear
    return weight.sum(dim=2) / count.clamp(min=1)[:, None, None]


def roi_align(features, rois, scale, bins=7, ratio=0):
    """Mean of bilinear samples in each of bins x bins parts of each box (aligned=True).

    features: (B, C, H, W). rois: (n, 5), place in the batch, then x1, y1, x2, y2 in pixels.
    scale: cells per pixel. ratio: samples per part along each axis. 0: as many as the part has
    cells, and none in an empty box, whose value is 0.
    Returns (n, C, bins, bins). Gradients flow to the features only.

    The samples lie on a grid, so the bilinear weight of a cell is that of its row times that of
    its column. All boxes are one batched matrix product.
    """
    x1, y1, x2, y2 = (rois[:, 1:] * scale - 0.5).unbind(1)
    rows = roi_weights(y1, y2 - y1, features.shape[2], bins, ratio)               # (n, bins, H)
    columns = roi_weights(x1, x2 - x1, features.shape[3], bins, ratio)            # (n, bins, W)
    weights = torch.einsum("nph,nqw->npqhw", rows, columns).flatten(3).flatten(1, 2)
    # Each box's own map. The gradient of an embedding is summed in a fixed order: runs repeat.
    maps = F.embedding(rois[:, 0].long(), features.permute(0, 2, 3, 1).flatten(1))
    maps = maps.unflatten(1, (-1, features.shape[1]))                             # (n, H*W, C)
    return (weights.to(maps.dtype) @ maps).transpose(1, 2).unflatten(2, (bins, bins))


class Detector(nn.Module):
    """An MViT classifier applied to boxes: clips and rois -> one row of logits per roi."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.scale = 1 / model.patch_stride[-1]

    def feature_map(self, x):
        """(B, 3, T, H, W) -> (B, D, h, w): normed patch tokens, mean over time."""
        tokens, grid = self.model.encode(*self.model.embed(x))
        tokens = self.model.norm(tokens)[:, 1:].unflatten(1, grid)                # (B, t, h, w, D)
        return tokens.mean(dim=1).permute(0, 3, 1, 2)

    def classify(self, features, rois):
        """(B, D, h, w), (n, 5) in pixels -> logits (n, 80) float32."""
        with torch.autocast("cpu" if features.is_meta else features.device.type, enabled=False):
            x = roi_align(features.float(), rois, self.scale).amax(dim=(2, 3))    # (n, D)
            return self.model.head(F.dropout(x, self.model.dropout, self.training))

    def forward(self, x, rois):
        return self.classify(self.feature_map(x), rois)


def model_recipe(recipe):
    """The recipe as a dict, complete for build_classifier. Checkpoints hold it."""
    return {**dataclasses.asdict(recipe), "num_classes": CLASSES, "pool": "mean"}


def build(recipe):
    return Detector(models.build_classifier(model_recipe(recipe)))


def start_weights(detector, recipe, print0):
    """Load --init, a checkpoint of the same model. Make the weights of a new head small."""
    path, new = recipe.init, ["head"]
    if path == "auto":
        path = next(filter(os.path.isfile, STARTS), None)
        if path is None:
            raise FileNotFoundError(f"there is no {' or '.join(STARTS)}: run pretrain.py first, or "
                                    "give --init CKPT, or --init '' to start from scratch")
    if path:
        checkpoint = checkpoints.read_checkpoint(path)
        models.check_checkpoint(path, checkpoint)
        stored = foreign_recipe(checkpoint)
        for key in ("model", "expand"):
            if stored.get(key, getattr(recipe, key)) != getattr(recipe, key):
                raise ValueError(f"--init {path} has another {key}: add --{key} {stored[key]}")
        new = load_weights(detector.model, path, verbose=False)["fresh"]
    print0(f"starting from {path or 'scratch'}, new weights: {', '.join(new) or 'none'}")
    if any(name.startswith("head") for name in new):
        with torch.no_grad():
            for p in detector.model.head.parameters():
                p.mul_(recipe.head_init_scale)


# ------------------------------------------------------------------------------------------ train

def train(name, recipe, overrides, rank, world, device, print0):
    """Train, with a test every few epochs and at the end."""
    frames, media = find_key_frames(recipe, "train", print0)
    val = find_key_frames(recipe, "val", print0)
    read_truth(recipe.data)  # what a test needs fails now, not then
    recipe, device_batch, accumulate = engine.plan_batch(
        recipe, len(frames), world, "batch_size" in overrides, print0)
    steps_per_epoch = len(frames) // recipe.batch_size

    checkpoint = checkpoints.find_checkpoint(recipe)
    engine.seed_all(recipe.seed)
    detector = build(recipe)
    if not checkpoint:
        start_weights(detector, recipe, print0)
    detector.to(device)
    amp, autocast, scaler = engine.mixed_precision(recipe.amp, device)
    optimizer = engine.make_optimizer(detector.model, recipe)
    test = partial(run_test, detector, recipe, *val, print0)
    untrained = {view.replace("centre", "center"): mean for view, mean in
                 (checkpoint or {}).get("untrained", {}).items()}  # older files: British
    if recipe.baseline and not checkpoint:
        print0("before training:")
        untrained = {view: test(view)["mAP"] for view in ("center", "full")}
    engine.print_setup(RECIPES, name, recipe, detector, optimizer, world, device_batch, amp,
                       print0)
    print0(f"{len(frames)} key frames of {len({frame.movie for frame in frames})} movies to train, "
           f"{len(val[0])} to test; {recipe.epochs * steps_per_epoch} steps; features of stride "
           f"{1 / detector.scale:g}")
    run = engine.Run(
        recipe, detector.model, optimizer, scaler, steps_per_epoch=steps_per_epoch, device=device,
        fingerprint=fingerprint_of(frames), num_files=len(frames), unit="clip",
        checkpoint=checkpoint, run_fields=RUN_FIELDS,
        extra={"untrained": untrained, "recipe": model_recipe(recipe)})
    batches = data.EpochBatches(len(frames), recipe.batch_size, recipe.epochs, recipe.seed, rank,
                                world, device_batch, run.step)
    loader = iter(make_loader(Clips(frames, media, recipe, "train"), batches, device, collate))
    trained = Detector(detector.model)  # a second one, since tests take other sizes: not compiled
    if engine.should_compile(recipe.compile, device, print0):
        trained.feature_map = torch.compile(trained.feature_map)  # the number of boxes varies
    ddp = engine.wrap_ddp(trained)
    trained.train()

    while run.step < run.total_steps:
        lr = run.start_step()
        parts = [run.next_batch(loader) for _ in range(accumulate)]
        boxes = engine.reduce_mean(sum(len(part["rois"]) for part in parts),
                                   torch.device("cpu"))       # per rank, without a wait for the GPU
        step_loss = torch.zeros((), device=device)
        for micro, part in enumerate(parts):
            run.exit_on_signal()
            x, rois, targets = (part[key].to(device, non_blocking=True)
                                for key in ("x", "rois", "targets"))
            with engine.sync(ddp, last=micro == accumulate - 1):
                with autocast():
                    logits = ddp(data.normalize(x, recipe.mean, recipe.std), rois)    # (n, 80)
                # The mean over all boxes of the step, as DDP averages over ranks. Without boxes it
                # is 0 and so are all gradients, but every parameter has one, which DDP needs.
                loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
                loss = loss / (CLASSES * max(boxes, 1 / world))
                scaler.scale(loss).backward()
            step_loss += loss.detach()
        run.end_step(step_loss, lr, boxes=round(boxes * world))  # clip, step or skip, log
        if recipe.val_epochs and run.step < run.total_steps \
                and run.step % (recipe.val_epochs * steps_per_epoch) == 0:
            run.log(step=run.step, val_mAP=test("center", every=4)["mAP"])
            trained.train()
            run.restart_clock()
    run.finish()

    stem = run.checkpoint_path.removesuffix(".pt")
    tested = {view: test(view, stem=stem) for view in ("center", "full")}
    if rank == 0:
        draw_detections(tested["center"], val[1], recipe, stem + ".png")
    print0(f"wrote {run.checkpoint_path}, {run.log_path}, {stem}.png")
    for view, results in tested.items():
        print0(f"{view} view: mAP@0.5 {percent(results['mAP'])}"
               + (f", of the untrained head {percent(untrained[view])}" if untrained else ""))


# ----------------------------------------------------------------------------------------- metric

ROW = np.dtype([("key", object),      # "movie,second" with four digits
                ("box", float, 4),    # x1, y1, x2, y2
                ("label", int), ("score", float)])


def read_boxes(path, scored=False):
    """All rows of a table as an array of ROW, usable or not: the official evaluator counts them."""
    rows = []
    for number, line in read_lines(path):
        row = line.split(",")
        try:
            *box, score = map(float, [*row[2:6], row[7] if scored else 0])
            if not np.isfinite([*box, score]).all():
                raise ValueError
            rows.append((f"{row[0]},{int(row[1]):04d}", tuple(box), int(row[6]), score))
        except (ValueError, IndexError):
            refuse(path, number, line, COLUMNS)
    return np.array(rows, ROW)


def read_label_map(path):
    """{class: name} of the classes to evaluate, from a pbtxt."""
    text, names = "\n".join(line for _, line in read_lines(path)), {}
    for item in re.finditer(r'name:\s*"([^"]*)"\s*(?:label_)?id:\s*(\d{1,9})', text):
        name, label = item[1], int(item[2])
        if label in names or not 1 <= label <= CLASSES:
            refuse(path, text.count("\n", 0, item.end()) + 1, f"id: {label}",
                   f"another number from 1 to {CLASSES}")
        names[label] = name
    count = len(re.findall(r"\b(?:label_)?id:", text))
    if not len(names) == count > 0:
        raise ValueError(f'{path} lists items of another form than name: "..." id: N, usable '
                         f"are {len(names)} of {count}: get it again")
    return names


def read_excluded(path):
    """Keys of the timestamps that do not count. path: None if there are none."""
    keys = set()
    for number, line in read_lines(path) if path else ():
        movie, _, second = line.partition(",")
        if second.strip().isdecimal():
            keys.add(f"{movie},{int(second):04d}")
        elif line:
            refuse(path, number, line, "movie, second")
    return keys


def read_truth(folder):
    """(the classes to evaluate, true boxes, keys that do not count) of a test."""
    return (read_label_map(locate(folder, "actions")), read_boxes(locate(folder, "truth", "val")),
            read_excluded(locate(folder, "excluded", "val", needed=False)))


def match_boxes(truth, found, threshold):
    """Which of the found boxes of a class hit a true one: (n,) bool.

    A found box is compared only with the true box of its key that it overlaps most. It misses if
    they overlap less than the threshold, or if an earlier one has hit that box.
    """
    places, hit, used = {}, np.zeros(len(found), bool), set()
    for place, key in enumerate(truth["key"]):
        places.setdefault(key, []).append(place)
    for i, (key, box) in enumerate(zip(found["key"], found["box"])):
        if key in places:
            iou = box_iou(box[None], truth["box"][places[key]])[0]
            best = places[key][iou.argmax()]
            hit[i] = iou.max() >= threshold and best not in used
            if hit[i]:
                used.add(best)
    return hit


def average_precisions(truth, found, classes, excluded=(), match="file", threshold=0.5):
    """{class: average precision}, NaN for a class without true boxes. Their nanmean is the mAP.

    truth, found: arrays of ROW. Found boxes without area do not count. excluded: keys to leave out.
    match: found boxes take their turn as in the "file" (official), or by "score", best first.
    Among equal scores the last counts first (the official order depends on the CPU).
    """
    truth, found = (rows[[key not in excluded for key in rows["key"]]] for rows in (truth, found))
    found = found[(found["box"][:, :2] < found["box"][:, 2:]).all(axis=1)]
    precisions = {}
    for label in classes:
        true, tried = truth[truth["label"] == label], found[found["label"] == label]
        if match == "score":
            tried = tried[np.argsort(-tried["score"], kind="stable")]
        hits = match_boxes(true, tried, threshold)
        hits = hits[np.argsort(tried["score"], kind="stable")[::-1]].cumsum()
        precision = np.concatenate([hits / np.arange(1, len(hits) + 1), [0.0]])
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        recall = np.concatenate([[0.0], hits / max(len(true), 1), [1.0]])
        area = float(np.sum(np.diff(recall) * envelope))
        precisions[label] = area if len(true) else float("nan")
    return precisions


# ------------------------------------------------------------------------------------------- test

@torch.no_grad()
def detect(detector, frames, media, recipe, view):
    """Scores of every box. Each rank does its share of the key frames.

    Returns, on all ranks: a list of (n, 80) float32 arrays, None for an unreadable clip, and the
    sorted (name, reason) of these. The batches do not depend on the number of ranks.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(detector.parameters()).device
    _, autocast, _ = engine.mixed_precision(recipe.amp, device)
    size = 1 if view == "full" else recipe.device_batch  # full pictures differ in shape
    groups = [range(len(frames))[i:i + size] for i in range(0, len(frames), size)]
    loader = make_loader(Clips(frames, media, recipe, view), groups[rank::world], device, list)
    scores, unreadable = [], []
    for items in tqdm(loader, desc=f"{view} view", disable=rank > 0 or None, leave=False):
        unreadable += [entry for item in items for entry in item["unreadable"]]
        items = [item for item in items if "x" in item]
        if items:
            batch = collate(items)
            x = data.normalize(batch["x"].to(device), recipe.mean, recipe.std)
            with autocast():
                logits = detector(x, batch["rois"].to(device))
            parts = logits.sigmoid().cpu().split([len(item["boxes"]) for item in items])
            scores += [(item["index"], part.numpy()) for item, part in zip(items, parts)]
    scores = dict(engine.gather_list(scores))
    return [scores.get(i) for i in range(len(frames))], sorted(engine.gather_list(unreadable))


def to_rows(frames, scores, classes):
    """An array of ROW: every listed class of every box that has scores."""
    parts, columns = [np.zeros(0, ROW)], [label - 1 for label in classes]
    for frame, frame_scores in zip(frames, scores):
        if frame_scores is not None:
            part = np.zeros((len(frame.boxes), len(classes)), ROW)
            part["key"] = f"{frame.movie},{frame.second:04d}"
            part["box"], part["label"] = frame.boxes[:, None], list(classes)
            part["score"] = frame_scores[:, columns]
            parts.append(part.ravel())
    return np.concatenate(parts)


def evaluate(recipe, frames, scores, unreadable, view, every, stem):
    """The results of a test, a dict for json. With a stem, write STEM_<view>.csv and .json."""
    names, truth, excluded = read_truth(recipe.data)
    truth = truth[[int(key[-4:]) % every == 0 for key in truth["key"]]]
    found = to_rows(frames, scores, names)
    counted = truth["label"][[key not in excluded for key in truth["key"]]]
    precisions = average_precisions(truth, found, names, excluded, recipe.match)
    known = {label: value for label, value in precisions.items() if not math.isnan(value)}
    results = {
        "view": view, "match": recipe.match,
        "mAP": float(np.mean(list(known.values()))) if known else None,
        "per_class": {name: [known.get(label), int((counted == label).sum())]
                      for label, name in names.items()},
        "key_frames": len(frames), "boxes": sum(len(s) for s in scores if s is not None),
        "unreadable": [list(entry) for entry in unreadable],
        "about": engine.provenance(recipe, fingerprint_of(frames), len(frames))}
    if stem:
        with open(f"{stem}_{view}.csv", "w") as f:
            for key, box, label, score in found:  # nine digits tell any float32
                f.write(f"{key},{','.join(map(str, box))},{label},{score:.9g}\n")
        with open(f"{stem}_{view}.json", "w") as f:
            json.dump(results, f, indent=1)
    return results


def run_test(detector, recipe, frames, media, print0, view, every=1, stem=""):
    """Detect, evaluate and print. With a stem, write STEM_<view>.csv and .json.

    every: only seconds that it divides (release: 4 for validation during training).
    Returns the content of the json, "frames" and "scores", the same on all ranks.
    """
    frames = [frame for frame in frames if frame.second % every == 0]
    scores, unreadable = detect(detector.eval(), frames, media, recipe, view)
    results = engine.from_rank0(evaluate, recipe, frames, scores, unreadable, view, every, stem)
    classes = [(value, count, name) for name, (value, count) in results["per_class"].items()
               if value is not None]
    order = "file order, as officially" if recipe.match == "file" else "order of their scores"
    print0(f"{view} view, {results['boxes']} boxes in {len(frames)} key frames"
           f"{f' (every {every}th second)' if every > 1 else ''}: mAP@0.5 "
           f"{percent(results['mAP'])} over {len(classes)} classes, matched in {order}")
    for name, reason in unreadable:
        print0(f"unreadable, its persons count as missed: {name}: {reason}")
    if stem:
        for value, count, name in sorted(classes, reverse=True):
            print0(f"{percent(value):>8}  {name}, of {count}")
        print0(f"wrote {stem}_{view}.csv, {stem}_{view}.json")
    return {**results, "frames": frames, "scores": scores}


def percent(share):
    return "unknown" if share is None else f"{100 * share:.2f}"


def draw_detections(results, media, recipe, path, count=6, height=240):
    """Write a picture of `count` of the tested key frames.

    White: true boxes. Color: the classified boxes with their two best classes, green if a true box
    of an IoU of 0.5 or more has the class, else orange.
    """
    names, truth, _ = read_truth(recipe.data)
    read = [(f, s) for f, s in zip(results["frames"], results["scores"]) if s is not None]
    read, pictures = read[::max(len(read) // count, 1)][:count], []
    font = ImageFont.load_default(13)
    style = {"font": font, "stroke_width": 2, "stroke_fill": "black"}
    for frame, scores in read:
        x, _ = read_clip(media[frame.movie], frame, 1, 1, recipe.movie_start, height, recipe.data)
        picture = Image.fromarray(x[0].permute(1, 2, 0).numpy())
        pen, size = ImageDraw.Draw(picture), np.array(picture.size * 2)
        true = truth[truth["key"] == f"{frame.movie},{frame.second:04d}"]
        for box in true["box"]:
            pen.rectangle((box * size).tolist(), outline="white")
        for box, row in zip(frame.boxes, scores):
            right = set(true["label"][box_iou(true["box"], box[None])[:, 0] >= 0.5])
            corners = (box * size).tolist()
            for line, label in enumerate(sorted(names, key=lambda label: -row[label - 1])[:2]):
                color = "lime" if label in right else "orange"
                if line == 0:
                    pen.rectangle(corners, outline=color, width=2)
                text = f"{names[label]} {100 * row[label - 1]:.0f}%"
                left = min(corners[0] + 3, picture.width - font.getlength(text))
                pen.text((left, corners[1] + 2 + 14 * line), text, color, **style)
        pen.text((4, height - 18), f"{frame.movie}, {frame.second} s", "white", **style)
        pictures.append(picture)
    if not pictures:
        raise ValueError(f"no clip that was tested can be read: {path} is not drawn")
    width = max(picture.width for picture in pictures)
    sheet = Image.new("RGB", (min(3, len(pictures)) * width, -(-len(pictures) // 3) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % 3 * width, i // 3 * height))
    sheet.save(path)


# ------------------------------------------------------------------------------------------- main

def dry_run(recipe, device, print0):
    """Print parameters and FLOPs. On a GPU, also memory and time of a training step."""
    shape = (3, recipe.num_frames, *recipe.image_size)
    with torch.device("meta"):
        model = build(recipe).model
        _, grid = model.encode(*model.embed(torch.empty(1, *shape)))
    cost = count_flops(model, (1, *shape))
    print0(f"{recipe.model}, expand={recipe.expand}: {cost['parameters']:,} parameters, "
           f"{cost['flops'] / 1e9:.2f} GFLOPs per clip, output grid {'x'.join(map(str, grid))}")
    if device.type != "cuda":
        return print0("no GPU: memory and time of a training step are not measured")
    _, autocast, _ = engine.mixed_precision(recipe.amp, device)
    detector = build(recipe).to(device).train()
    optimizer = engine.make_optimizer(detector.model, recipe)
    x = torch.randn(recipe.device_batch, *shape, device=device)
    rois = torch.tensor([[i, 0, 0, *shape[2:]] for i in range(len(x))] * 3, device=device)
    for _ in range(2):  # the first step is slower than others
        start = time.perf_counter()
        with autocast():
            loss = detector(x, rois).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
    print0(f"a step of a batch of {len(x)} on {torch.cuda.get_device_name()}: "
           f"{engine.peak_memory(device):.2f} GiB at most, {time.perf_counter() - start:.2f} s")


def load_for_test(recipe, overrides, print0):
    """(recipe, detector) of the checkpoint recipe.eval. Flags that were given come first."""
    checkpoint = checkpoints.read_checkpoint(recipe.eval)
    models.check_checkpoint(recipe.eval, checkpoint)
    stored = foreign_recipe(checkpoint)
    checkpoints.check_stored(recipe.eval, stored, dataclasses.asdict(Recipe()))
    if stored.get("num_classes") != CLASSES:
        raise ValueError(f"--eval {recipe.eval} has {stored.get('num_classes') or 'no'} classes, "
                         f"not {CLASSES}: use it for --init")
    recipe = replace(recipe, **{key: stored[key] for key in MODEL_FIELDS
                                if key in stored and key not in overrides})
    if not recipe.data:
        raise ValueError("--data DIR is required")
    detector = build(replace(recipe, drop_path=0.0, dropout=0.0))
    report = load_weights(detector.model, recipe.eval, verbose=False)
    if report["fresh"]:
        raise ValueError(f"--eval {recipe.eval} lacks {', '.join(report['fresh'])}")
    print0(f"{recipe.eval}: "
           + ", ".join(f"{key}={getattr(recipe, key)}" for key in MODEL_FIELDS))
    return recipe, detector


def main():
    name, recipe, overrides = engine.parse_recipe(RECIPES, __doc__, check=models.check_checkpoint)
    check(recipe)
    rank, world, device = engine.init_distributed()
    print0 = tqdm.write if rank == 0 else lambda line: None
    if recipe.eval:
        recipe, detector = load_for_test(recipe, overrides, print0)
    small = recipe.model.endswith(("_nano", "_tiny"))
    if device.type == "cpu" and not small and "device_batch" not in overrides:
        recipe = replace(recipe, device_batch=1)              # faster on a CPU, and less memory
    if recipe.dry_run:
        return dry_run(recipe, device, print0)
    if not recipe.data and not recipe.eval:
        checkpoints.find_checkpoint(recipe)                   # refuses before movies are made
        folder = synthetic.make_dataset("data/synthetic_ava", print0=print0, what="movies")
        recipe = replace(recipe, data=folder, movie_start=float(synthetic.MOVIE_START))
    if not recipe.eval:
        return train(name, recipe, overrides, rank, world, device, print0)
    frames, media = find_key_frames(recipe, "val", print0)
    results = run_test(detector.to(device), recipe, frames, media, print0, recipe.view,
                       stem=os.path.splitext(recipe.eval)[0])
    if recipe.draw and rank == 0:
        draw_detections(results, media, recipe, recipe.draw)
        print0(f"wrote {recipe.draw}")


if __name__ == "__main__":
    engine.run_main(main)
