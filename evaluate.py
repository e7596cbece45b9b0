"""What a trained model is worth: accuracy over views, answers for single files, features, probes.

    torchrun --nproc_per_node=8 evaluate.py out/finetune/last.pt --data k400/ --clips 10 --crops 1
    python evaluate.py out/finetune/last.pt --predict clip.mp4 other.mp4
    python evaluate.py out/pretrain/last.pt --data films/ --features out/films.npz --every 10
    python evaluate.py out/pretrain/last.pt --data k400/ --probe --shots 5 10 --seeds 5

A checkpoint of any format that convert.py knows will do. Model, sizes and number of views come from
it unless flags say otherwise. A video is tested by several clips x crops, and the softmax is
averaged over all of them (Tables 3, 5). Every file counts exactly once, under any number of
processes. A file that cannot be read is named and left out. The test writes
<checkpoint>_<clips>x<crops>.json and, of up to 2000 classes, .png.

--features writes an npz, a row for each file (or clip, with --every) of labeled or unlabeled data:
features (n, D), labels (n,) with -1 for none, paths (n,), split (n,) train or val, classes (K,),
and with --every time (n,), the beginning of the clip in seconds.
--probe trains on the train part and tests on the val part, see probe.py. The learning rate is
chosen on a fifth of the training files, never on the val part. It is fixed if these are few.
"""
import argparse
import json
import os

import engine

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import checkpoints
import convert
import data
import features
import layouts
import models
import probe
from features import on_views, over_views, view_dataset
from tools.flops import count_flops
from video import UnreadableFile

FINETUNED = "out/finetune/last.pt"  # where finetune.py writes
MAX_DRAWN = 2000                    # classes in the picture of the confusion matrix

# What a checkpoint says of itself. These are the values where it says nothing.
DEFAULTS = {
    "num_classes": 0, "image_size": (224, 224), "num_frames": 16, "sampling_rate": 4,
    "segments": False, "patch_size": 16, "expand": "mlp", "pool": "mean", "mean": (0.45,) * 3,
    "std": (0.225,) * 3, "clips": 10, "crops": 1, "crop_ratio": 0.875, "data": ""}


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
    "crops", "per_class" {name: [accuracy, files]}, "confusion" [[true class, predicted, files]].
    """
    # model.forward, not model: one compiled for training would be compiled again for each shape.
    forward = model.eval().forward
    (_, labels, views), unreadable = over_views(          # views: (files, views, K)
        lambda x: [forward(x).float().softmax(dim=1)], dataset, recipe, device, rank, world,
        "testing")
    scores = views.mean(axis=1, dtype=np.float64)
    flat, repeated = views.reshape(-1, views.shape[2]), labels.repeat(views.shape[1])
    predicted, count = np.argsort(-scores, axis=1, kind="stable")[:, 0], len(classes)
    files, right = np.bincount(labels, minlength=count), labels[labels == predicted]
    shares = np.bincount(right, minlength=count) / np.maximum(files, 1)
    pairs, times = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)
    return {
        "files": len(labels), "unreadable": [list(entry) for entry in unreadable],
        "clips": dataset.clips, "crops": dataset.crops,
        "view_top1": accuracy(flat, repeated, 1), "view_top5": accuracy(flat, repeated, 5),
        "top1": accuracy(scores, labels, 1), "top5": accuracy(scores, labels, 5),
        "per_class": dict(zip(classes, map(list, zip(shares.tolist(), files.tolist())))),
        "confusion": np.stack([*pairs, times], axis=1).tolist()}


def run_test(model, recipe, samples, classes, stem, device, rank, world, print0):
    """Test over recipe.clips x recipe.crops views, print, and write STEM_<clips>x<crops>.json and
    .png. Returns the results of `test`."""
    dataset = view_dataset(samples, recipe, recipe.clips, recipe.crops)
    frames = (recipe.num_frames,) if samples.kind == "video" else ()
    cost = count_flops(model, (1, 3, *frames, *recipe.image_size))
    print0(f"{samples.kind}s to test: {len(samples)}, clips x crops: {dataset.clips} x "
           f"{dataset.crops}, {cost['flops'] / 1e9:.4g} GFLOPs a view, "
           f"{cost['parameters'] / 1e6:.4g} M parameters, in "
           + engine.mixed_precision(recipe.amp, device)[0])
    results = test(model, recipe, dataset, classes, device, rank, world)
    for line in describe(results, samples.kind):
        print0(line)
    if rank == 0:
        results["about"] = engine.provenance(recipe, layouts.fingerprint(samples), len(samples))
        stem = f"{stem}_{dataset.clips}x{dataset.crops}"
        with open(stem + ".json.tmp", "w") as f:
            json.dump(results, f, indent=1)
        os.replace(stem + ".json.tmp", stem + ".json")        # each appears whole or not at all
        written = [stem + ".json"]
        if len(classes) <= MAX_DRAWN:
            draw_confusion(results["confusion"], classes, stem + ".tmp.png")
            os.replace(stem + ".tmp.png", stem + ".png")
            written.append(stem + ".png")
        print0(f"wrote {', '.join(written)}")
    return results


def describe(results, kind):
    """The lines to print: accuracies, classes (all, or the worst ten), what could not be read."""
    files, classes = results["files"], len(results["per_class"])
    line = f"{kind}s: {files}, clips x crops: {results['clips']} x {results['crops']}"
    levels = [(kind, ""), ("clip" if kind == "video" else "crop", "view_")]
    for level, key in levels[:results["clips"] * results["crops"]]:
        for k in (1, 5) if classes > 5 else (1,):
            line += f", {level}-level top-{k} {probe.percent(results[f'{key}top{k}'], files)}"
    lines = [f"{line} (± one standard error; chance of top-1: {100 / classes:.2f})"]
    ranked = sorted(((share, name, count) for name, (share, count) in results["per_class"].items()
                     if count), key=lambda entry: entry[:2])
    if len(ranked) > 40:
        lines.append("the ten worst classes:")
        ranked = ranked[:10]
    width = max(len(name) for _, name, _ in ranked)
    lines += [f"  {name:{width}}  {100 * share:6.2f}  of {count}" for share, name, count in ranked]
    if results["unreadable"]:
        lines.append(f"{kind}s that could not be read and are not counted: "
                     f"{len(results['unreadable'])}")
        lines += [f"  {path}: {reason}" for path, reason in results["unreadable"]]
    return lines


def draw_confusion(confusion, classes, path):
    """The confusion matrix as a PNG: rows are true classes, brightness is the share of a row.

    confusion: as of `test`.
    """
    truth, predicted, files = np.array(confusion).T
    confusion = np.zeros((len(classes), len(classes)), int)
    confusion[truth, predicted] = files
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


# ------------------------------------------------------------------------------------- predictions

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


# --------------------------------------------------------------------------------------------- main

def load(flags, print0):
    """(recipe, model, class names or []) of the checkpoint. recipe: a Namespace of what the
    checkpoint says of itself, unless flags say otherwise."""
    checkpoint = checkpoints.read_checkpoint(flags.checkpoint)
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
    head = f"{recipe.num_classes} classes" if recipe.num_classes else "no head"
    print0(f"{flags.checkpoint}: {recipe.model}, {head}, {clip}"
           f"{recipe.image_size[0]}x{recipe.image_size[1]} pixels"
           + "".join(f", tensors {what}: {len(report[what])}" for what in ("resized", "left out")
                     if report[what]))
    classes = list(checkpoint.get("classes", []))
    if flags.classes:
        with open(flags.classes, encoding="utf-8") as f:
            classes = [line.strip() for line in f if line.strip()]
        if len(classes) != recipe.num_classes:
            raise ValueError(f"{flags.classes} names {len(classes)} classes, not the checkpoint's "
                             f"{recipe.num_classes}: write one name a line")
    return recipe, model, classes


def parse_flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", help=f"of any known format; for --predict {FINETUNED} if left out")
    add("--data", help="folder with the data, by default that of the checkpoint")
    add("--classes", default="", help="file that names the checkpoint's classes, one a line")
    add("--predict", nargs="+", help="print the top five classes of these files")
    add = parser.add_argument_group("features").add_argument
    add("--features", default="", help="write pooled features of all files to this npz")
    add("--split", nargs="+", choices=("train", "val"), default=(), help="of these parts only")
    add("--every", type=float, default=0.0, help="a clip each that many s of a video [off]")
    add = parser.add_argument_group("probes").add_argument
    add("--probe", action="store_true", help="compare small classifiers of frozen features")
    add("--shots", "--limit-per-class", type=int, nargs="+", default=[0],
        help="train on that many files a class; several are compared; 0: all [0]")
    add("--seeds", type=int, default=1, help="draws of labels, from --seed on [1]")
    add("--seed", type=int, default=0, help="of the first draw [0]")
    add("--attentive", action=argparse.BooleanOptionalAction, default=True,
        help="the attentive probe, too, which keeps all tokens in memory [yes]")
    add("--token-memory", type=float, default=4.0, help="GiB that these tokens may take [4]")
    add = parser.add_argument_group("views, by default as the checkpoint says").add_argument
    add("--clips", type=int, help="clips per video, from its start to its end")
    add("--crops", type=int, choices=(1, 3), help="crops per clip: center, or 3 along a side")
    add("--crop-ratio", type=float, help="one crop: its side over the picture's shorter side")
    add("--image-size", type=int, nargs="+", help="height and width, or one for both")
    add("--num-frames", "--frames", type=int, help="frames per clip")
    add("--sampling-rate", type=int, help="stride between frames, at 30 fps")
    add("--segments", action=argparse.BooleanOptionalAction, help="one frame from each part")
    add("--mean", type=float, nargs=3, help="RGB mean of the input in [0, 1]")
    add("--std", type=float, nargs=3, help="RGB standard deviation")
    add = parser.add_argument_group("the run").add_argument
    add("--device-batch", type=int, default=8, help="most views per forward pass [8]")
    add("--amp", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="precision [auto]")
    add("--workers", type=int, default=-1, help="loader processes per GPU; -1: by the cores [-1]")
    flags = parser.parse_args()
    if not flags.checkpoint:
        if not flags.predict:
            raise ValueError("name a checkpoint, such as out/pretrain/last.pt: see --help")
        flags.checkpoint = FINETUNED
        if not os.path.isfile(FINETUNED):
            raise ValueError(f"no checkpoint at {FINETUNED}, where finetune.py writes: name one "
                             "before --predict")
    for task, options in (("features", ("every", "split")), ("probe", ("shots", "seeds"))):
        for name in options:
            if getattr(flags, name) != parser.get_default(name) and not getattr(flags, task):
                raise ValueError(f"--{name} goes with --{task} only")
    if 0 < flags.every < 0.1:
        raise ValueError(f"--every {flags.every}: use 0.1 s or more")
    if min(flags.shots) < 0:
        raise ValueError(f"--shots {min(flags.shots)}: use numbers of files, or 0 for all")
    if flags.image_size:
        flags.image_size = tuple(flags.image_size * 2)[:2]
    if flags.predict and (flags.features or flags.probe):
        raise ValueError("--predict goes with neither --features nor --probe: run it apart")
    given = [name for name in ("clips", "crop_ratio", "num_frames", "sampling_rate")
             if getattr(flags, name) is not None]
    engine.check_numbers(flags, ["device_batch", "seeds", "token_memory", *given], ["every"])
    return flags


def main():
    flags = parse_flags()
    rank, world, device = engine.init_distributed()
    print0 = tqdm.write if rank == 0 else lambda line: None
    recipe, model, classes = load(flags, print0)
    model.to(device).eval()
    if not (flags.features or flags.probe or recipe.num_classes):
        raise ValueError(f"{flags.checkpoint} has no classification head: fine-tune it first, or "
                         "use --probe")
    if flags.predict:
        if not classes and flags.data:
            _, classes = layouts.find_labeled(flags.data, "val", num_classes=recipe.num_classes)
        classes = classes or [f"class {i}" for i in range(recipe.num_classes)]
        return predict(model, recipe, classes, device, print0)
    if not recipe.data:
        raise ValueError("--data is required")
    if flags.features:
        features.write_features(model, recipe, device, rank, world, print0)
    if flags.probe:
        features.run_probe(model, recipe, device, rank, world, print0)
    if flags.features or flags.probe:
        return
    models.check_kind(recipe.model, layouts.find_samples(recipe.data, "val"))
    samples, names = layouts.find_labeled(recipe.data, "val", classes=classes,
                                          num_classes=recipe.num_classes)
    if samples.classes and not classes:
        print0(f"note: the checkpoint names none of its {len(names)} classes: they are taken to "
               f"be those of the data in this order: {', '.join(names[:3])} ...")
    stem = os.path.splitext(flags.checkpoint)[0]
    run_test(model, recipe, samples, names, stem, device, rank, world, print0)


if __name__ == "__main__":
    engine.run_main(main)
