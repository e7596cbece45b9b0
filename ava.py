"""Action detection on AVA v2.2 (Sec. 4.2, Table 4): which of 80 actions each person is doing.

    torchrun ava.py    # recipe `tiny`, made-up movies
    torchrun --nproc_per_node=8 ava.py --data ava/ --model mvitv2_l --init out/finetune/last.pt
    python ava.py --data ava/ --eval out/ava/last.pt --view full --draw a.png
    python ava.py --model mvitv2_l --dry-run

A separate detector has found the persons. The model encodes the clip around a key frame.
RoIAlign cuts each box out of the features, and a linear layer gives one logit per action.

docs/ava.md lists the files in --data DIR, and the differences from the release (SlowFast's loader,
MViT's head, ActivityNet's evaluator). Writes OUT/last.pt, log.jsonl, last.png, and
last_{center,full}.csv and .json. Flags without a text are those of finetune.py.
"""
import hashlib
import json
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import engine
from engine import option

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import layouts
import mvit
import video
from convert import foreign_recipe, load_weights
from models import build_classifier
from tools import synthetic
from tools.flops import count_flops

CLASSES = 80  # numbered from 1 in the tables
FIRST, LAST = 902, 1798  # seconds that have boxes
FRAMES_START, FPS = 900, 30  # DIR/frames: second of the first, frames per second
STARTS = ("out/finetune/last.pt", "out/pretrain/last.pt")


# ---------------------------------------------------------------------------------------- recipes
# The paper's appendix, which is not public to us, has its recipe. This one is of MViTv1 and MViTv2
# (SGD, 0.6 at 512, 30 epochs, drop path 0.4), and else as in MaskFeat's fine-tuning.

@dataclass(frozen=True)
class Recipe:
    # model and input
    model: str = option("mvitv2_l", choices=tuple(mvit.MODELS))
    init: str = option("auto", f"checkpoint; auto: {' or '.join(STARTS)}; '': none")
    image_size: tuple = (312, 312)  # Table 4: 312, 40x3
    num_frames: int = option(40, alias="--frames")
    sampling_rate: int = 3
    expand: str = option("mlp", choices=("mlp", "attn"))
    drop_path: float = 0.4
    dropout: float = 0.0
    head_init_scale: float = 0.001
    mean: tuple = (0.45, 0.45, 0.45)
    std: tuple = (0.225, 0.225, 0.225)
    # boxes and crops
    box_score: float = option(0.8, "least score of a predicted box")  # release
    predicted: bool = option(True, "train on predicted boxes, too")
    drop_empty: bool = option(True, "drop training boxes that a crop empties")
    box_per_axis: bool = option(True, "scale boxes along each axis")
    jitter: tuple = option((356, 446), "range of the shorter side in training")  # as 256-320 to 224
    flip: float = 0.5
    # optimization
    optimizer: str = option("sgd", choices=("adamw", "sgd"))
    epochs: int = 30
    batch_size: int = 512
    lr: float = 0.6
    lr_batch: int = 512
    warmup_epochs: float = 5.0
    warmup_lr: float = 1e-6  # ours
    min_lr: float = 1e-6  # ours
    layer_decay: float = 1.0
    weight_decay: float = 1e-8
    beta2: float = 0.999
    clip_grad: float = 5.0
    seed: int = 0
    # testing and the run: all may change with --resume
    view: str = option("center", choices=("center", "full"))
    match: str = option("file", "order of matching; file: official", ("file", "score"))
    val_epochs: int = option(5, "epochs between tests on every fourth second; 0: never")
    baseline: bool = option(False, "also test the untrained head")
    eval: str = option("", "checkpoint to test, without training")
    draw: str = option("", "picture to write, with --eval")
    data: str = option("", "folder with the data; none: movies are made in data/")
    movie_start: float = option(0.0, "second at which the files in DIR/videos begin")
    out: str = "out/ava"
    resume: bool = False
    device_batch: int = 1
    amp: str = option("auto", choices=("auto", "fp32", "bf16", "fp16"))
    compile: str = option("auto", choices=("auto", "on", "off"))
    checkpointing: bool = True
    workers: int = -1
    save_minutes: float = 15.0
    log_every: int = 10
    dry_run: bool = option(False, "only print parameters and FLOPs")


AVA = Recipe()
RECIPES = {
    "tiny": Recipe(  # ours: minutes on two CPU cores
        model="mvit_tiny", image_size=(64, 64), num_frames=8, sampling_rate=4, jitter=(64, 80),
        drop_path=0.0, optimizer="adamw", epochs=14, batch_size=8, lr=2e-3, lr_batch=8,
        warmup_epochs=1, warmup_lr=1e-5, min_lr=1e-5, weight_decay=0.05, clip_grad=1.0,
        val_epochs=4, baseline=True, device_batch=8, checkpointing=False),
    "ava_mvitv2_l_312_40x3": AVA,  # Table 4: 36.3 center, 37.5 full
    "ava_mvitv2_s_16x4": replace(
        AVA, model="mvitv2_s", image_size=(224, 224), num_frames=16, sampling_rate=4,
        jitter=(256, 320), device_batch=8, checkpointing=False),
}
# What may change with --resume, and what a test takes from its checkpoint.
FIELDS = list(Recipe.__dataclass_fields__)
RUN_FIELDS = {"init", *FIELDS[FIELDS.index("view"):]}
TEST_FIELDS = set(FIELDS) - RUN_FIELDS | {"data", "movie_start"}


def check(recipe):
    """Raise ValueError for flags out of range."""
    engine.check_numbers(
        recipe, not_negative=("clip_grad", "val_epochs", "warmup_epochs", "movie_start"),
        positive=("epochs", "batch_size", "lr", "lr_batch", "device_batch", "log_every",
                  "sampling_rate", "layer_decay"),
        shares=("drop_path", "dropout", "flip", "box_score"))
    if not max(recipe.image_size) <= recipe.jitter[0] <= recipe.jitter[1]:
        raise ValueError(f"jitter={recipe.jitter} is no range from image_size={recipe.image_size} "
                         "up: set --jitter with --image-size")


# ------------------------------------------------------------------------------------------- data

DETECTED = "person_box_67091280_iou90/ava_detection_{0}_boxes_and_labels"
TABLES = {
    "truth": ["ava_{0}_v2.2.csv"],
    "predicted": ["ava_{0}_predicted_boxes.csv", DETECTED + "_include_negative_v2.2.csv",
                  DETECTED + ".csv"],
    "excluded": ["ava_{0}_excluded_timestamps_v2.2.csv"],
    "actions": ["ava_action_list_v2.2_for_activitynet_2019.pbtxt",
                "ava_action_list_v2.1_for_activitynet_2018.pbtxt"],
}
ROW = np.dtype([("key", object),      # "movie,second" with four digits
                ("box", float, 4),    # x1, y1, x2, y2 in fractions of width and height
                ("label", int),       # -1: none
                ("score", float)])    # 1 of a true box


def locate(folder, table, split="val"):
    """Path of a published table in folder/annotations or `folder`."""
    names = [name.format(split) for name in TABLES[table]]
    for place in ("annotations", ""):
        for path in (os.path.join(folder, place, name) for name in names):
            if os.path.isfile(path):
                return path
    raise FileNotFoundError(f"{folder}/annotations lacks {' or '.join(names)}")


def read_boxes(path, scored=False):
    """The rows of a table as an array of ROW. scored: the last column is a score, not a person.

    Raises ValueError for another line.
    """
    rows = []
    with open(path) as f:
        for number, line in enumerate(f, 1):
            row = line.split(",")
            try:
                x1, y1, x2, y2 = map(float, row[2:6])
                rows.append((key_of(*row[:2]), (x1, y1, x2, y2), int(row[6] or -1),
                             float(row[7]) if scored else 1.0))
            except (ValueError, IndexError):
                raise ValueError(f"{path}, line {number}: {line.strip()!r} is not video, second, "
                                 "x1, y1, x2, y2, class, score or person") from None
    return np.array(rows, ROW)


def key_of(movie, second):
    return f"{movie},{int(second):04d}"


def read_truth(folder):
    """({class: name} to evaluate, true boxes, keys that do not count) of a test."""
    with open(locate(folder, "actions")) as f:
        names = re.findall(r'name:\s*"(.*?)"\s*(?:label_)?id:\s*(\d+)', f.read())
    with open(locate(folder, "excluded")) as f:
        excluded = {key_of(*line.split(",")) for line in f if line.strip()}
    return ({int(label): name for name, label in names}, read_boxes(locate(folder, "truth")),
            excluded)


class KeyFrame(NamedTuple):
    movie: str
    second: int
    boxes: np.ndarray    # (n, 4) float64, as in ROW
    targets: np.ndarray  # (n, 80) bool


def find_media(folder, split):
    """{movie: path}, or {movie: sorted paths of its frames} if there is a frame list."""
    frame_list, media = os.path.join(folder, "frame_lists", f"{split}.csv"), {}
    if not os.path.isfile(frame_list):
        for root, _, names in os.walk(os.path.join(folder, "videos"), followlinks=True):
            media |= {os.path.splitext(name)[0]: os.path.join(root, name)
                      for name in sorted(names) if layouts.media_kind(name) == "video"}
        return media
    with open(frame_list) as f:
        next(f)  # the header
        for movie, _, _, path, *_ in map(str.split, f):
            media.setdefault(movie, []).append(path.encode())
    # Millions of paths: workers share arrays of bytes without a copy.
    return {movie: np.array(sorted(paths)) for movie, paths in media.items()}


def find_key_frames(recipe, split, print0):
    """(the key frames of a split, {movie: its media}).

    Only training takes true boxes. A box without class is a person with no action. A row is left
    out if its movie is missing, its box inverted, or its second or class out of range.
    """
    media, frames, left_out = find_media(recipe.data, split), {}, []
    kinds = ["truth"] * (split == "train") + ["predicted"] * (split == "val" or recipe.predicted)
    for kind in kinds:
        rows = read_boxes(locate(recipe.data, kind, split), scored=kind == "predicted")
        for key, box, label, _ in rows[rows["score"] >= recipe.box_score]:
            movie, second, (x1, y1, x2, y2) = key[:-5], int(key[-4:]), box
            if FIRST <= second <= LAST and x1 <= x2 and y1 <= y2 and movie in media \
                    and (label == -1 or 1 <= label <= CLASSES):
                boxes = frames.setdefault((movie, second), {})
                targets = boxes.setdefault(tuple(box), np.zeros(CLASSES, bool))
                if label > 0:
                    targets[label - 1] = True
            else:
                left_out.append(f"{key}, box {box}, class {label}")
    if left_out:
        print0(f"{split}: {len(left_out)} rows left out, such as {left_out[0]}")
    if not frames:
        raise ValueError(f"{recipe.data} has no box of use for its {len(media)} {split} movies")
    return [KeyFrame(*key, np.array(list(boxes)), np.array(list(boxes.values())))
            for key, boxes in frames.items()], media


def fingerprint_of(frames):
    """By which a resumed run knows its data."""
    rows = [f"{f.movie},{f.second}".encode() + f.boxes.tobytes() + f.targets.tobytes()
            for f in frames]
    return hashlib.sha256(b"".join(rows)).hexdigest()[:16]


def read_clip(recipe, media, frame, min_size):
    """The clip around a key frame, scaled so that it just covers `min_size`, (H, W).

    media: path of the movie, or an array of the names of its frames in DIR/frames.
    Returns (T, 3, h, w) uint8 and the original (height, width). Raises UnreadableFile.
    """
    T = recipe.num_frames
    offsets = (np.arange(T) - T // 2) * recipe.sampling_rate  # the key frame is the T/2-th: release
    try:
        if isinstance(media, str):
            times = (frame.second - recipe.movie_start + offsets / FPS).tolist()
            return video.read_moments(media, times, min_size), video.picture_size(media)
        center = (frame.second - FRAMES_START) * FPS
        if center >= len(media):
            raise video.UnreadableFile("frames", f"number {center} is wanted of {len(media)}")
        names = media[np.clip(center + offsets, 0, len(media) - 1)]
        images = [video.read_image(os.path.join(recipe.data, "frames", name.decode()))
                  for name in names]
    except video.UnreadableFile as error:
        raise video.UnreadableFile(f"{frame.movie} at second {frame.second}",
                             f"{error} (--movie-start {recipe.movie_start:g})") from error
    W, H = images[0].size
    scale = max(min_size[0] / H, min_size[1] / W)
    size = round(W * scale), round(H * scale)
    images = [np.asarray(image.resize(size, Image.BILINEAR)) for image in images]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), (H, W)


class Clips(torch.utils.data.Dataset):
    """Clips and boxes, indexed by (epoch, index) in training, else by index.

    view: "train" (random size in recipe.jitter, crop and flip), "center" (crop) or "full".
    Items: "x" (1, 3, T, h, w) uint8, "boxes" (n, 4) in pixels of x, "targets" (n, 80), "count" [n]
    and "unreadable" [(name, reason)]. In training another clip replaces an unreadable one. In a
    test it has no box.
    """

    def __init__(self, frames, media, recipe, view):
        self.frames, self.media, self.recipe, self.view = frames, media, recipe, view
        self.item_bytes = 3 * recipe.num_frames * math.prod(recipe.image_size)

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        if self.view == "train":
            rng = data.sample_rng(self.recipe.seed, *key)
            item, _, unreadable = data.read_or_replace(
                lambda i: self.sample(self.frames[i], rng), key[1], len(self), rng)
            return {**item, "unreadable": unreadable}
        try:
            return {**self.sample(self.frames[key]), "unreadable": []}
        except video.UnreadableFile as error:
            shape = 1, 3, self.recipe.num_frames, *self.recipe.image_size
            return {"x": torch.zeros(shape, dtype=torch.uint8), "boxes": torch.zeros(0, 4),
                    "targets": torch.zeros(0, CLASSES), "count": [0],
                    "unreadable": [(error.path, error.reason)]}

    def loader(self, batches, device):
        """A loader of lists of keys."""
        workers = engine.loader_workers(self.recipe.workers, device)
        return data.make_loader(self, batches, workers, device.type == "cuda", data.collate_repeats)

    def sample(self, frame, rng=None):
        r, (H, W) = self.recipe, self.recipe.image_size
        min_size = (H, W) if self.view == "center" else (min(H, W),) * 2
        if self.view == "train":
            min_size = (round(1 / rng.uniform(1 / r.jitter[1], 1 / r.jitter[0])),) * 2
        x, picture = read_clip(r, self.media[frame.movie], frame, min_size)  # (T, 3, h, w)
        h, w = x.shape[2:]
        top, left, flip = math.ceil((h - H) / 2), math.ceil((w - W) / 2), False
        if self.view == "full":
            top, left, H, W = 0, 0, h, w
        elif self.view == "train":
            top, left = rng.randint(0, h - H), rng.randint(0, w - W)
            flip = rng.random() < r.flip
        x = x[:, :, top:top + H, left:left + W].transpose(0, 1)              # (3, T, H, W)
        boxes = transform_boxes(frame.boxes, picture, (h, w), (top, left, H, W), flip,
                                r.box_per_axis)
        keep = np.ones(len(boxes), bool)
        if self.view == "train" and r.drop_empty:
            keep = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
        return {"x": (x.flip(-1) if flip else x)[None].contiguous(), "count": [keep.sum()],
                "boxes": np.float32(boxes[keep]), "targets": np.float32(frame.targets[keep])}


# ---------------------------------------------------------------------------------- boxes and head

def transform_boxes(boxes, picture, scaled, crop, flip=False, per_axis=True):
    """Boxes as fractions of a picture -> pixels of a crop of the scaled picture.

    boxes: (n, 4). picture, scaled: (H, W) before and after scaling. crop: (top, left, h, w).
    per_axis=False scales by the ratio of the longer sides (release).
    """
    (H, W), (h, w), (top, left, crop_h, crop_w) = picture, scaled, crop
    boxes = np.clip(boxes * [W, H, W, H], 0, [W - 1, H - 1, W - 1, H - 1])
    ratios = [w / W, h / H] if per_axis else [max(w, h) / max(W, H)] * 2
    boxes = boxes * np.tile(ratios, 2) - [left, top, left, top]
    if flip:
        boxes[:, [0, 2]] = crop_w - 1 - boxes[:, [2, 0]]
    return np.clip(boxes, 0, [crop_w - 1, crop_h - 1, crop_w - 1, crop_h - 1])


def roi_weights(start, size, length, bins, ratio):
    """Weights of `length` cells in the mean of the samples in each of `bins` parts of n intervals.

    start, size: (n,) in cells. ratio: see roi_align. Returns (n, bins, length).
    """
    start, part = start[:, None, None], size[:, None, None] / bins               # (n, 1, 1)
    count = torch.full_like(part, ratio) if ratio else part.ceil().clamp(min=0)  # samples
    k = torch.arange(max(int(count.max()), 1) if len(count) else 1, device=size.device)
    place = torch.arange(bins, device=size.device)[:, None] * part               # (n, bins, 1)
    place = start + (place + (k + 0.5) * (part / count.clamp(min=1)))            # (n, bins, K)
    # A sample more than a cell outside counts as 0.
    counted = (k < count) & (place >= -1) & (place <= length)
    cells = torch.arange(length, device=size.device)
    distance = (place.clamp(0, length - 1)[..., None] - cells).abs()             # (.., K, length)
    weight = (1 - distance).clamp(min=0) * counted[..., None]                    # linear
    return weight.sum(dim=2) / count.clamp(min=1)


def roi_align(features, rois, scale, bins=7, ratio=0):
    """Mean of bilinear samples in each of bins x bins parts of each box (aligned=True).

    features: (B, C, H, W). rois: (n, 5), place in the batch, then x1, y1, x2, y2 in pixels.
    scale: cells per pixel. ratio: samples per part along each axis. 0: as many as the part has
    cells, and none in an empty box, whose value is 0. Returns (n, C, bins, bins).
    """
    # The weight of a cell is its row's times its column's.
    x1, y1, x2, y2 = (rois[:, 1:] * scale - 0.5).unbind(1)
    rows = roi_weights(y1, y2 - y1, features.shape[2], bins, ratio)          # (n, bins, H)
    columns = roi_weights(x1, x2 - x1, features.shape[3], bins, ratio)       # (n, bins, W)
    weights = torch.einsum("nph,nqw->npqhw", rows, columns).flatten(3).flatten(1, 2)
    # Each box's own map. The gradient of an embedding is summed in a fixed order: runs repeat.
    maps = F.embedding(rois[:, 0].long(), features.permute(0, 2, 3, 1).flatten(1))
    maps = maps.unflatten(1, (-1, features.shape[1]))                        # (n, H*W, C)
    return (weights.to(maps.dtype) @ maps).transpose(1, 2).unflatten(2, (bins, bins))


def model_recipe(recipe):
    """The recipe as a dict, for build_classifier and in checkpoints."""
    return {**asdict(recipe), "num_classes": CLASSES, "pool": "mean"}


class Detector(torch.nn.Module):
    """An MViT classifier, applied to boxes (release)."""

    def __init__(self, recipe):
        super().__init__()
        self.model = build_classifier(model_recipe(recipe))
        self.scale = 1 / self.model.patch_stride[-1]
        self.train_features = self.feature_map  # train() compiles it: only tests vary in size

    def feature_map(self, x):
        """(B, 3, T, H, W) -> (B, D, h, w): normed patch tokens, mean over time."""
        tokens, grid = self.model.encode(*self.model.embed(x))
        tokens = self.model.norm(tokens)[:, 1:].unflatten(1, grid)          # (B, t, h, w, D)
        return tokens.mean(dim=1).permute(0, 3, 1, 2)

    def classify(self, features, rois):
        """(B, D, h, w), (n, 5) in pixels -> logits (n, 80) float32."""
        with torch.autocast(features.device.type, enabled=False):
            x = roi_align(features.float(), rois, self.scale).amax((2, 3))  # (n, D)
            return self.model.head(F.dropout(x, self.model.dropout, self.training))

    def forward(self, x, boxes, counts):
        """(B, 3, T, H, W), (n, 4) in pixels, boxes per clip (B,) -> logits (n, 80)."""
        features = (self.train_features if self.training else self.feature_map)(x)
        places = torch.arange(len(x), device=x.device).repeat_interleave(counts)
        return self.classify(features, torch.cat([places[:, None], boxes], dim=1))


def start_weights(detector, recipe, print0):
    """Load --init. A new head gets small weights."""
    path, new = recipe.init, ["head"]
    if path == "auto":
        path = next(filter(os.path.isfile, STARTS), None)
        if path is None:
            raise FileNotFoundError(f"no {' or '.join(STARTS)}: run finetune.py, or use --init ''")
    if path:
        new = load_weights(detector.model, path, verbose=False)["fresh"]
    print0(f"starting from {path or 'scratch'}, new weights: {', '.join(new) or 'none'}")
    if any(name.startswith("head") for name in new):
        with torch.no_grad():
            for p in detector.model.head.parameters():
                p.mul_(recipe.head_init_scale)


# ------------------------------------------------------------------------------------------ train

def train(name, recipe, overrides, rank, world, device, print0):
    """Train, and test every few epochs and at the end."""
    frames, media = find_key_frames(recipe, "train", print0)
    val = find_key_frames(recipe, "val", print0)
    read_truth(recipe.data)  # what a test needs fails now
    recipe, device_batch, accumulate = engine.plan_batch(
        recipe, len(frames), world, "batch_size" in overrides, print0)
    steps_per_epoch = len(frames) // recipe.batch_size

    checkpoint = engine.find_checkpoint(recipe)
    engine.seed_all(recipe.seed)
    detector = Detector(recipe)
    if not checkpoint:
        start_weights(detector, recipe, print0)
    detector.to(device)
    amp, autocast, scaler = engine.mixed_precision(recipe.amp, device)
    optimizer = engine.make_optimizer(detector.model, recipe)
    test = partial(run_test, detector, recipe, *val, print0)
    untrained = (checkpoint or {}).get("untrained", {})
    if recipe.baseline and not checkpoint:
        untrained = {view: test(view)["mAP"] for view in ("center", "full")}
    engine.print_setup(name, recipe, detector, optimizer, world, device_batch, amp, print0)
    run = engine.Run(
        recipe, detector.model, optimizer, scaler, steps_per_epoch=steps_per_epoch, device=device,
        fingerprint=fingerprint_of(frames), num_files=len(frames), unit="clip",
        checkpoint=checkpoint, run_fields=RUN_FIELDS,
        extra={"untrained": untrained, "recipe": model_recipe(recipe)})
    batches = data.EpochBatches(len(frames), recipe.batch_size, recipe.epochs, recipe.seed, rank,
                                world, device_batch, run.step)
    loader = iter(Clips(frames, media, recipe, "train").loader(batches, device))
    if engine.should_compile(recipe.compile, device, print0):
        detector.train_features = torch.compile(detector.feature_map)
    ddp = engine.wrap_ddp(detector.train())

    while run.step < run.total_steps:
        lr = run.start_step()
        parts = [run.next_batch(loader) for _ in range(accumulate)]
        count = engine.reduce_mean(sum(len(part["boxes"]) for part in parts), device)
        step_loss = torch.zeros((), device=device)
        for micro, part in enumerate(parts):
            run.exit_on_signal()
            x, boxes, counts, targets = (part[key].to(device, non_blocking=True)
                                         for key in ("x", "boxes", "count", "targets"))
            with engine.sync(ddp, last=micro == accumulate - 1):
                with autocast():
                    logits = ddp(data.normalize(x, recipe.mean, recipe.std), boxes, counts)
                # The mean over all boxes of the step, as DDP averages over ranks. Without boxes
                # all gradients are 0. Every parameter has one, as DDP needs.
                loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
                loss = loss / (CLASSES * max(count, 1 / world))
                scaler.scale(loss).backward()
            step_loss += loss.detach()
        run.end_step(step_loss, lr, boxes=round(count * world))  # clip, step or skip, log, save
        every = recipe.val_epochs * steps_per_epoch
        if every and run.step % every == 0 and run.step < run.total_steps:
            run.log(step=run.step, val_mAP=test("center", every=4)["mAP"])
            detector.train()
            run.restart_clock()
    run.finish()

    stem = run.checkpoint_path.removesuffix(".pt")
    tested = {view: test(view, stem=stem) for view in ("center", "full")}
    if rank == 0:
        draw_detections(tested["center"]["rows"], val[1], recipe, stem + ".png")
    for view in sorted(tested.keys() & untrained):
        print0(f"{view} view: mAP@0.5 {100 * tested[view]['mAP']:.2f}, of the untrained head "
               f"{100 * untrained[view]:.2f}")


# ------------------------------------------------------------------------------------------- test

def match_boxes(truth, found):
    """Which found boxes of a class hit a true one: (n,) bool.

    A found box is compared only with the true box of its key that it overlaps most. It misses if
    their IoU is below 0.5, or if an earlier one has hit that box.
    """
    places, hit, used = {}, np.zeros(len(found), bool), set()
    for place, key in enumerate(truth["key"]):
        places.setdefault(key, []).append(place)
    for i, (key, box) in enumerate(zip(found["key"], found["box"])):
        if key in places:
            boxes = truth["box"][places[key]]  # (m, 4)
            low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
            both = np.prod(np.maximum(high - low, 0), axis=1)
            areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(box[2:] - box[:2])
            iou = both / (areas - both)
            best = places[key][iou.argmax()]
            hit[i] = iou.max() >= 0.5 and best not in used
            if hit[i]:
                used.add(best)
    return hit


def average_precisions(truth, found, classes, excluded=(), match="file"):
    """{class: average precision}, NaN for a class without true boxes. Their nanmean is the mAP.

    truth, found: arrays of ROW. excluded: keys to leave out. match: found boxes take their turn as
    in the "file" (official), or by "score", best first. Those without area do not count. Among
    equal scores the last counts first (the official order depends on the CPU).
    """
    truth, found = (rows[[key not in excluded for key in rows["key"]]] for rows in (truth, found))
    found = found[(found["box"][:, :2] < found["box"][:, 2:]).all(axis=1)]
    precisions = {}
    for label in classes:
        true, tried = truth[truth["label"] == label], found[found["label"] == label]
        if match == "score":
            tried = tried[np.argsort(-tried["score"], kind="stable")]
        hits = match_boxes(true, tried)
        hits = hits[np.argsort(tried["score"], kind="stable")[::-1]].cumsum()
        precision = np.concatenate([hits / np.arange(1, len(hits) + 1), [0.0]])
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        recall = np.concatenate([[0.0], hits / max(len(true), 1), [1.0]])
        precisions[label] = float(np.sum(np.diff(recall) * envelope)) if len(true) else math.nan
    return precisions


@torch.no_grad()
def detect(detector, frames, media, recipe, view):
    """(a list of (n, 80) scores, [(name, reason)] of unreadable clips), on all ranks.

    Each rank does its share of the batches.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(detector.parameters()).device
    _, autocast, _ = engine.mixed_precision(recipe.amp, device)
    size = 1 if view == "full" else recipe.device_batch  # full pictures differ in shape
    batches = [range(len(frames))[i:i + size] for i in range(0, len(frames), size)][rank::world]
    loader = Clips(frames, media, recipe, view).loader(batches, device)
    scores, unreadable = [], []
    for batch, indices in zip(tqdm(loader, desc=f"{view} view", disable=rank > 0, leave=False),
                              batches):
        x = data.normalize(batch["x"].to(device), recipe.mean, recipe.std)
        with autocast():
            logits = detector(x, batch["boxes"].to(device), batch["count"].to(device))
        parts = logits.sigmoid().cpu().split(batch["count"].tolist())
        scores += [(index, part.numpy()) for index, part in zip(indices, parts)]
        unreadable += batch["unreadable"]
    scores = dict(engine.gather_list(scores))
    return [scores[i] for i in range(len(frames))], sorted(engine.gather_list(unreadable))


def run_test(detector, recipe, frames, media, print0, view, every=1, stem=""):
    """Detect, evaluate and print. With a stem, rank 0 writes STEM_<view>.csv and .json.

    every: only seconds that it divides (release: 4 during training).
    Returns what the json holds, and "rows", [(frame, box, its 80 scores)].
    """
    names, truth, excluded = read_truth(recipe.data)
    truth = truth[[int(key[-4:]) % every == 0 for key in truth["key"]]]
    frames = [frame for frame in frames if frame.second % every == 0]
    scores, unreadable = detect(detector.eval(), frames, media, recipe, view)
    rows = [(frame, box, row) for frame, boxes in zip(frames, scores)
            for box, row in zip(frame.boxes, boxes)]
    found = np.zeros((len(rows), len(names)), ROW)
    for part, (frame, box, row) in zip(found, rows):
        part["key"], part["box"], part["label"] = key_of(*frame[:2]), box, list(names)
        part["score"] = row[[label - 1 for label in names]]
    found = found.ravel()
    precisions = average_precisions(truth, found, names, excluded, recipe.match)
    known = {label: value for label, value in precisions.items() if not math.isnan(value)}
    results = {"view": view, "match": recipe.match,
               "mAP": sum(known.values()) / max(len(known), 1),
               "per_class": {name: known.get(label) for label, name in names.items()},
               "key_frames": len(frames), "boxes": len(rows), "unreadable": unreadable}
    print0(f"{view} view, {len(rows)} boxes in {len(frames)} key frames, {len(unreadable)} "
           f"unreadable: mAP@0.5 {100 * results['mAP']:.2f}")
    if stem and (not dist.is_initialized() or dist.get_rank() == 0):
        with open(f"{stem}_{view}.csv", "w") as f:
            for key, box, label, score in found:  # nine digits tell any float32
                f.write(f"{key},{','.join(map(str, box))},{label},{score:.9g}\n")
        with open(f"{stem}_{view}.json", "w") as f:
            json.dump(results, f, indent=1)
    return {**results, "rows": rows}


def draw_detections(rows, media, recipe, path):
    """Write a picture of a key frame of a test. White: true boxes. Orange: scored ones."""
    names, truth, _ = read_truth(recipe.data)
    shown = rows[len(rows) // 2][0]
    clip, _ = read_clip(replace(recipe, num_frames=1), media[shown.movie], shown, (480, 480))
    picture = Image.fromarray(clip[0].permute(1, 2, 0).numpy())
    pen, size = ImageDraw.Draw(picture), np.array(picture.size * 2)
    for box in truth["box"][truth["key"] == key_of(*shown[:2])]:
        pen.rectangle((box * size).tolist(), outline="white")
    for box, row in [(box * size, row) for frame, box, row in rows if frame is shown]:
        best = max(names, key=lambda label: row[label - 1])
        pen.rectangle(box.tolist(), outline="orange", width=2)
        pen.text(box[:2].tolist(), f" {names[best]} {100 * row[best - 1]:.0f}%", "orange")
    picture.save(path)


def dry_run(recipe):
    """Print parameters, FLOPs and output grid."""
    shape = (1, 3, recipe.num_frames, *recipe.image_size)
    with torch.device("meta"):
        model = Detector(recipe).model
        _, grid = model.encode(*model.embed(torch.empty(shape)))
    cost = count_flops(model, shape)
    print(f"{cost['parameters']:,} parameters, {cost['flops'] / 1e9:.2f} GFLOPs per clip, "
          f"output grid {'x'.join(map(str, grid))}")


def load_for_test(recipe, overrides):
    """(recipe, detector) of the checkpoint recipe.eval. Flags that were given come first."""
    stored = foreign_recipe(engine.read_checkpoint(recipe.eval))
    recipe = replace(recipe, **{key: stored[key] for key in TEST_FIELDS
                                if key in stored and key not in overrides})
    detector = Detector(replace(recipe, drop_path=0.0, dropout=0.0))
    if fresh := load_weights(detector.model, recipe.eval, verbose=False)["fresh"]:
        raise ValueError(f"--eval {recipe.eval} lacks {', '.join(fresh)}: use it for --init")
    return recipe, detector


def main():
    name, recipe, overrides = engine.parse_recipe(RECIPES, __doc__)
    check(recipe)
    if recipe.dry_run:
        return dry_run(recipe)
    rank, world, device = engine.init_distributed()
    print0 = tqdm.write if rank == 0 else lambda line: None
    if recipe.eval:
        recipe, detector = load_for_test(recipe, overrides)
    if not recipe.data:
        folder = synthetic.make_dataset("data/synthetic_ava", print0=print0, what="movies")
        recipe = replace(recipe, data=folder, movie_start=float(synthetic.MOVIE_START))
    if not recipe.eval:
        return train(name, recipe, overrides, rank, world, device, print0)
    frames, media = find_key_frames(recipe, "val", print0)
    results = run_test(detector.to(device), recipe, frames, media, print0, recipe.view,
                       stem=os.path.splitext(recipe.eval)[0])
    if recipe.draw and rank == 0 and results["rows"]:
        draw_detections(results["rows"], media, recipe, recipe.draw)


if __name__ == "__main__":
    engine.run_main(main)
