"""What a trained model is worth: accuracy over views, answers for single files, features, a linear
probe.

    torchrun --nproc_per_node=8 evaluate.py out/finetune/last.pt --data k400/ --clips 10 --crops 1
    python evaluate.py out/finetune/last.pt --predict clip.mp4 other.mp4
    python evaluate.py out/pretrain/last.pt --data k400/ --features features.npz
    python evaluate.py out/pretrain/last.pt --data k400/ --probe

A checkpoint of any format that convert.py knows will do. Model, sizes and number of views come from
it unless flags say otherwise. A video is tested by several clips x crops, and the softmax is
averaged over all of them (Tables 3, 5). Every file counts exactly once, under any number of
processes. A file that cannot be read is named and left out. The test writes
<checkpoint>_<clips>x<crops>.json and .png.
"""
import argparse
import json
import os

import engine

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import convert
import data
import layouts
import models
from tools.flops import count_flops
from video import UnreadableFile

# What a checkpoint says of itself. These are the values where it says nothing.
DEFAULTS = {
    "num_classes": 0, "image_size": (224, 224), "num_frames": 16, "sampling_rate": 4,
    "segments": False, "patch_size": 16, "expand": "mlp", "pool": "mean", "mean": (0.45,) * 3,
    "std": (0.225,) * 3, "clips": 10, "crops": 1, "crop_ratio": 0.875, "data": ""}


# ------------------------------------------------------------------------------------------- views

def view_dataset(samples, recipe, clips=1, crops=1):
    """All views of every file, by default the central one."""
    video = samples.kind == "video"
    return data.ViewDataset(
        samples, recipe.image_size, recipe.num_frames if video else None, recipe.sampling_rate,
        clips if video else 1, crops, recipe.crop_ratio, recipe.segments)


def on_views(function, recipe, device):
    """`function` (of a model) made to take uint8 views (n, 3, [T,] H, W) on the device."""
    _, autocast, _ = engine.mixed_precision(recipe.amp, device)

    def forward(x):
        with autocast():
            return function(data.normalize(x, recipe.mean, recipe.std))
    return forward


@torch.no_grad()
def over_views(forward, dataset, recipe, device, rank, world, what):
    """Run `forward` over all views of every file of a data.ViewDataset, each rank on its share.

    forward: uint8 views (n, 3, [T,] H, W) on the device -> (n, D). recipe: with device_batch and
    workers. Returns, the same on all ranks and in order: [(index, label, outputs (views, D) float32
    array)], and the unreadable files as [(path, reason)]. All ranks must call it.
    """
    records, unreadable, share = [], [], range(rank, len(dataset), world)
    loader = data.make_view_loader(
        dataset, share, max(recipe.device_batch // dataset.views, 1),
        engine.loader_workers(recipe.workers, device), pin_memory=device.type == "cuda")
    with tqdm(total=len(share), unit=dataset.samples.kind, desc=what, disable=rank > 0,
              dynamic_ncols=True, leave=False) as bar:
        for batch in loader:
            views = batch["x"].flatten(0, 1).split(recipe.device_batch)
            outputs = torch.cat([forward(part.to(device, non_blocking=True)).float().cpu()
                                 for part in views])
            outputs = outputs.unflatten(0, batch["x"].shape[:2]).numpy()      # (files, views, D)
            bad = {path for path, _ in batch["unreadable"]}
            unreadable += batch["unreadable"]
            records += [(index, label, output) for index, label, output in
                        zip(batch["index"].tolist(), batch["label"].tolist(), outputs)
                        if dataset.samples.paths[index] not in bad]
            bar.update(len(outputs))
    records = sorted(engine.gather_list(records), key=lambda record: record[0])
    return records, sorted(engine.gather_list(unreadable))


# -------------------------------------------------------------------------------------------- test

def accuracy(scores, labels, k):
    """Share of rows whose label is among the k best. Of equal scores the lower class is better.
    scores: (n, K)."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)                 # (n, 1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    return float((((scores > own) | (scores == own) & before).sum(axis=1) < k).mean())


def test(model, recipe, dataset, classes, device, rank, world):
    """Accuracies of a classifier on a data.ViewDataset. classes: K names. Puts it in eval mode.

    Returns a dict, the same on all ranks: "view_top1", "view_top5" (each view judged alone),
    "top1", "top5" (softmax averaged over the views of a file), "files", "unreadable", "clips",
    "crops", "per_class" {name: [accuracy, files]}, "confusion" (rows: truth).
    """
    # model.forward, not model: one compiled for training would be compiled again for each shape.
    forward = on_views(model.eval().forward, recipe, device)
    records, unreadable = over_views(lambda x: forward(x).float().softmax(dim=1), dataset, recipe,
                                     device, rank, world, "testing")
    if not records:
        raise ValueError(f"none of the {len(unreadable)} files to test can be read, the first: "
                         f"{unreadable[0]}")
    labels = np.array([label for _, label, _ in records])
    views = np.stack([output for _, _, output in records])                    # (files, views, K)
    if not np.isfinite(views).all():
        raise ValueError("the model gives scores that are not finite: its weights are unusable, or "
                         "--amp fp16 is too narrow")
    scores = views.mean(axis=1, dtype=np.float64)
    flat, repeated = views.reshape(-1, views.shape[2]), labels.repeat(views.shape[1])
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels, np.argsort(-scores, axis=1, kind="stable")[:, 0]), 1)
    return {
        "files": len(records), "unreadable": [list(entry) for entry in unreadable],
        "clips": dataset.clips, "crops": dataset.crops,
        "view_top1": accuracy(flat, repeated, 1), "view_top5": accuracy(flat, repeated, 5),
        "top1": accuracy(scores, labels, 1), "top5": accuracy(scores, labels, 5),
        "per_class": {name: [row[i] / max(row.sum(), 1), int(row.sum())]
                      for i, (name, row) in enumerate(zip(classes, confusion))},
        "confusion": confusion.tolist()}


def run_test(model, recipe, samples, classes, stem, device, rank, world, print0):
    """Test over recipe.clips x recipe.crops views, print, and write STEM_<clips>x<crops>.json and
    .png. Returns the results of `test`."""
    dataset = view_dataset(samples, recipe, recipe.clips, recipe.crops)
    frames = (recipe.num_frames,) if samples.kind == "video" else ()
    cost = count_flops(model, (1, 3, *frames, *recipe.image_size))
    print0(f"testing {len(samples)} {samples.kind}s, {dataset.views} views each: "
           f"{cost['flops'] / 1e9:.4g} GFLOPs x {dataset.clips} clips x {dataset.crops} crops, "
           f"{cost['parameters'] / 1e6:.4g} M parameters, in "
           + engine.mixed_precision(recipe.amp, device)[0])
    results = test(model, recipe, dataset, classes, device, rank, world)
    for line in describe(results, samples.kind):
        print0(line)
    if rank == 0:
        stem = f"{stem}_{dataset.clips}x{dataset.crops}"
        with open(stem + ".json.tmp", "w") as f:
            json.dump(results, f, indent=1)
        os.replace(stem + ".json.tmp", stem + ".json")        # each appears whole or not at all
        draw_confusion(results["confusion"], classes, stem + ".tmp.png")
        os.replace(stem + ".tmp.png", stem + ".png")
        print0(f"wrote {stem}.json, {stem}.png")
    return results


def describe(results, kind):
    """The lines to print: accuracies, classes (all, or the worst ten), what could not be read."""
    view = "clip" if kind == "video" else "crop"
    clips = f"{results['clips']} clips x " if kind == "video" else ""
    lines = [f"{clips}{results['crops']} crops, {results['files']} {kind}s: {kind}-level top-1 "
             f"{100 * results['top1']:.2f}, top-5 {100 * results['top5']:.2f}; {view}-level top-1 "
             f"{100 * results['view_top1']:.2f}, top-5 {100 * results['view_top5']:.2f}"]
    ranked = sorted(((share, name, count) for name, (share, count) in results["per_class"].items()
                     if count), key=lambda entry: entry[:2])
    if len(ranked) > 40:
        lines.append("the ten worst classes:")
        ranked = ranked[:10]
    width = max(len(name) for _, name, _ in ranked)
    lines += [f"  {name:{width}}  {100 * share:6.2f}  of {count}" for share, name, count in ranked]
    if results["unreadable"]:
        lines.append(f"{len(results['unreadable'])} {kind}s could not be read and are not counted:")
        lines += [f"  {path}: {reason}" for path, reason in results["unreadable"]]
    return lines


def draw_confusion(confusion, classes, path):
    """The confusion matrix as a PNG: rows are true classes, brightness is the share of a row."""
    confusion = np.asarray(confusion)
    side = max(2, min(28, 1200 // len(confusion)))                            # pixels of a cell
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)   # (K, K)
    dark, bright = np.array([24, 26, 40]), np.array([255, 226, 120])
    cells = (dark + (bright - dark) * np.sqrt(share)[..., None]).astype(np.uint8)
    cells = cells.repeat(side, 0).repeat(side, 1)
    named, font = side >= 14, ImageFont.load_default(12)
    margin = 8 + int(max(font.getlength(name) for name in classes)) if named else 8
    caption = "rows: true class; columns: predicted"
    width = max(margin + cells.shape[1], int(font.getlength(caption))) + 8
    sheet = Image.new("RGB", (width, margin + cells.shape[0] + 24), "white")
    sheet.paste(Image.fromarray(cells), (margin, margin))
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(classes if named else ()):
        middle = margin + (i + 0.5) * side
        pen.text((margin - 4, middle), name, "black", font, anchor="rm")
        label = Image.new("L", (margin - 4, side), 255)                       # turned by 90 degrees
        ImageDraw.Draw(label).text((0, side / 2), name, 0, font, anchor="lm")
        sheet.paste(label.rotate(90, expand=True).convert("RGB"), (margin + i * side, 0))
        for j in np.flatnonzero(confusion[i]):
            color = "black" if share[i, j] > 0.25 else "white"
            pen.text((margin + (j + 0.5) * side, middle), str(confusion[i, j]), color, font, "mm")
    pen.text((4, sheet.height - 18), caption, "black", font)
    sheet.save(path)


# -------------------------------------------------------------------- predictions, features, probe

def predict(model, recipe, classes, device, print0):
    """Print the five most probable classes of each file. ValueError if one cannot be read."""
    forward, failed = on_views(model, recipe, device), 0
    kind = "video" if models.takes_clips(recipe.model) else "image"
    for path in recipe.predict:
        try:
            if layouts.media_kind(path) != kind:
                raise UnreadableFile(path, f"{recipe.model} takes {kind}s")
            views = data.read_views(
                path, recipe.image_size, recipe.num_frames if kind == "video" else None,
                recipe.sampling_rate, recipe.clips if kind == "video" else 1, recipe.crops,
                recipe.crop_ratio, recipe.segments)                           # (V, 3, [T,] H, W)
        except UnreadableFile as error:
            failed += 1
            print0(str(error))
            continue
        with torch.no_grad():
            scores = torch.cat([forward(part.to(device)).float().softmax(dim=1)
                                for part in views.split(recipe.device_batch)]).mean(dim=0)
        print0(path)
        for share, i in zip(*(part.tolist() for part in scores.topk(min(5, len(scores))))):
            print0(f"  {100 * share:6.2f} %  {classes[i]}")
    if failed:
        raise ValueError(f"{failed} of {len(recipe.predict)} files cannot be read")


def write_features(path, records, samples):
    """Write an npz of features (n, D), labels (n,), paths (n,), classes (K,)."""
    paths = [os.path.relpath(samples.paths[index], samples.root or ".") for index, _, _ in records]
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "wb") as f:
        np.savez(f, features=np.stack([output.mean(axis=0) for _, _, output in records]),
                 labels=np.array([label for _, label, _ in records]), paths=np.array(paths),
                 classes=np.array(samples.classes))
    os.replace(path + ".tmp", path)


def linear_probe(train, val, num_classes, device, lrs=(0.03, 0.1, 0.3, 1.0, 3.0), epochs=100,
                 batch_size=256, seed=0):
    """A linear classifier on frozen features for each learning rate, by SGD without decay.

    train, val: (features, labels), lists of n vectors (D,) and n numbers. Features are standardized
    by the training set's mean and deviation. Returns [(lr, top-1 on train, top-1 on val)].
    """
    (x, y), (x_val, y_val) = (
        (torch.tensor(np.stack(features), device=device), torch.tensor(labels, device=device))
        for features, labels in (train, val))
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, x_val = (x - mean) / std, (x_val - mean) / std
    engine.seed_all(seed)
    heads = nn.ModuleList(nn.Linear(x.shape[1], num_classes) for _ in lrs).to(device)
    for head in heads:
        nn.init.zeros_(head.weight)
    batch_size = min(batch_size, len(x))
    groups = [{"params": head.parameters(), "lr": lr * batch_size / 256}
              for head, lr in zip(heads, lrs)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(x), device=device)
        for rows in order[:len(x) // batch_size * batch_size].split(batch_size):
            loss = sum(F.cross_entropy(head(x[rows]), y[rows]) for head in heads)
            optimizer.zero_grad()
            loss.backward()                                   # each head sees its own term only
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return [(lr, *((head(f).argmax(dim=1) == t).float().mean().item()
                       for f, t in ((x, y), (x_val, y_val)))) for lr, head in zip(lrs, heads)]


def check_kind(recipe, samples):
    """Raise ValueError unless the samples are what the checkpoint's model takes."""
    kind = "video" if models.takes_clips(recipe.model) else "image"
    if samples.kind != kind:
        raise ValueError(f"{recipe.checkpoint} is {recipe.model} and takes {kind}s, but "
                         f"{samples.root} holds {samples.kind}s: choose other data or another "
                         "checkpoint")


def extract(model, recipe, classes, device, rank, world, print0):
    """--features and --probe: pooled features of frozen weights."""
    forward, features = on_views(model.features, recipe, device), {}
    for split in ("train", "val") if recipe.probe else ("val",):
        samples = layouts.find_samples(recipe.data, split,
                                       recipe.limit_per_class if split == "train" else 0,
                                       recipe.seed)
        check_kind(recipe, samples)
        dataset = view_dataset(samples, recipe, recipe.clips, recipe.crops)
        records, unreadable = over_views(forward, dataset, recipe, device, rank, world,
                                         f"features of {split}")
        for path, reason in unreadable:
            print0(f"unreadable, left out: {path}: {reason}")
        if not records:
            raise ValueError(f"none of the {len(samples)} files in the {split} part of "
                             f"{recipe.data} can be read")
        features[split] = ([output.mean(axis=0) for _, _, output in records],
                           [label for _, label, _ in records])
    if recipe.features and rank == 0:
        write_features(recipe.features, records, samples)
        print0(f"wrote {recipe.features}: {len(records)} x {len(features['val'][0][0])} features "
               "of the validation part")
    if recipe.probe:
        scores = linear_probe(features["train"], features["val"], len(classes), device,
                              seed=recipe.seed)
        for lr, fit, top1 in scores:
            print0(f"linear probe, lr {lr:g}: top-1 {100 * fit:.2f} on train, {100 * top1:.2f} on "
                   "val")
        lr, _, top1 = max(scores, key=lambda score: score[2])
        print0(f"best on val: {100 * top1:.2f} with lr {lr:g} (chosen on val itself; "
               f"{dataset.clips} clips x {dataset.crops} crops, no augmentation)")


# --------------------------------------------------------------------------------------------- main

def load(flags, print0):
    """(recipe, model, class names or []) of the checkpoint. recipe: a Namespace of what the
    checkpoint says of itself, unless flags say otherwise."""
    checkpoint = engine.read_checkpoint(flags.checkpoint)
    models.check_checkpoint(flags.checkpoint, checkpoint)
    stored = convert.foreign_recipe(checkpoint)
    given = {key: value for key, value in vars(flags).items() if value is not None}
    if flags.features or flags.probe:
        stored = {**stored, "clips": 1, "crops": 1}
    known = {key: stored.get(key, value) for key, value in DEFAULTS.items()}
    recipe = argparse.Namespace(**known | {"model": stored["model"]} | given)
    build = {**vars(recipe), "drop_path": 0.0, "dropout": 0.0, "checkpointing": False}
    if not recipe.num_classes:                                # features as they were pre-trained
        build["output_stride"] = stored.get("output_stride", 0)
    model = models.build_classifier(build)
    report = convert.load_weights(model, flags.checkpoint, verbose=False)
    clip = (f"{recipe.num_frames} frames at stride {recipe.sampling_rate}, "
            if models.takes_clips(recipe.model) else "")
    print0(f"{flags.checkpoint}: {recipe.model}, {recipe.num_classes} classes, {clip}"
           f"{recipe.image_size[0]}x{recipe.image_size[1]} pixels"
           + "".join(f", {len(report[what])} tensors {what}" for what in ("resized", "left out")
                     if report[what]))
    return recipe, model, list(checkpoint.get("classes", []))


def parse_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint")
    add("--data", help="folder with the data, by default that of the checkpoint")
    add("--predict", nargs="+", help="print the top five classes of these files")
    add("--features", default="", help="write pooled features of the validation part to this npz")
    add("--probe", action="store_true", help="train a linear classifier on frozen features")
    add("--clips", type=int, help="clips per video, from its start to its end")
    add("--crops", type=int, choices=(1, 3), help="crops per clip: center, or 3 along a side")
    add("--crop-ratio", type=float, help="one crop: its side over the picture's shorter side")
    add("--image-size", type=int, nargs="+", help="height and width, or one for both")
    add("--num-frames", "--frames", type=int, help="frames per clip")
    add("--sampling-rate", type=int, help="stride between frames, at 30 fps")
    add("--segments", action=argparse.BooleanOptionalAction, help="one frame from each part")
    add("--mean", type=float, nargs=3, help="RGB mean of the input in [0, 1]")
    add("--std", type=float, nargs=3, help="RGB standard deviation")
    add("--limit-per-class", type=int, default=0, help="--probe: train on that many files a class")
    add("--device-batch", type=int, default=8, help="most views per forward pass")
    add("--amp", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="precision")
    add("--workers", type=int, default=-1, help="loader processes per GPU; -1: by the cores")
    add("--seed", type=int, default=0, help="of the probe")
    flags = parser.parse_args()
    if flags.image_size:
        flags.image_size = tuple(flags.image_size * 2)[:2]
    if flags.predict and (flags.features or flags.probe):
        raise ValueError("--predict goes with neither --features nor --probe: run it apart")
    engine.check_numbers(flags, positive=["device_batch"] + [
        name for name in ("clips", "crop_ratio", "num_frames", "sampling_rate")
        if getattr(flags, name) is not None])
    return flags


def main():
    flags = parse_flags()
    rank, world, device = engine.init_distributed()
    print0 = tqdm.write if rank == 0 else lambda line: None
    recipe, model, classes = load(flags, print0)
    stored_names = bool(classes)
    model.to(device).eval()
    needs_head = not (flags.features or flags.probe)
    if needs_head and not recipe.num_classes:
        raise ValueError(f"{flags.checkpoint} has no classification head: fine-tune it first, or "
                         "use --probe")
    if flags.predict:
        if not classes and flags.data:
            _, classes = layouts.find_labeled(flags.data, "val", num_classes=recipe.num_classes)
        classes = classes or [f"class {i}" for i in range(recipe.num_classes)]
        return predict(model, recipe, classes, device, print0)
    if not recipe.data:
        raise ValueError("--data is required")
    if flags.probe:
        _, classes = layouts.find_labeled(recipe.data, "train")
        layouts.check_splits(layouts.find_labeled(recipe.data, "train")[0],
                             layouts.find_labeled(recipe.data, "val", classes=classes)[0])
    if not needs_head:
        return extract(model, recipe, classes, device, rank, world, print0)
    check_kind(recipe, layouts.find_samples(recipe.data, "val"))
    samples, classes = layouts.find_labeled(recipe.data, "val", classes=classes,
                                            num_classes=recipe.num_classes)
    if samples.classes and not stored_names:
        print0(f"note: the checkpoint names none of its {len(classes)} classes: they are taken to "
               f"be those of the data in this order: {', '.join(classes[:3])} ...")
    stem = os.path.splitext(flags.checkpoint)[0]
    run_test(model, recipe, samples, classes, stem, device, rank, world, print0)


if __name__ == "__main__":
    engine.run_main(main)
