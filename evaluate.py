"""What a trained model is worth: accuracy over views, answers for single files, features, a linear probe.

Paper: Sec. 4.1, Tables 3 and 5: a video is tested by several clips x crops, softmax scores averaged over all of them.
Every file counts exactly once, under any number of processes; one that cannot be read is named and left out.
"""
import json
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from engine import gather_list, seed_all


@torch.no_grad()
def over_views(forward, dataset, device, device_batch, workers, rank, world, what):
    """Run `forward` over all views of every file of a data.ViewDataset, each rank on its share.

    forward: uint8 views (n, 3, [T,] H, W) on the device -> (n, D).
    Returns, the same on all ranks and in order: [(index, label, outputs (views, D) float32 array)], and the unreadable
    files as [(path, reason)]. All ranks must call it.
    """
    records, unreadable = [], []
    loader = data.make_view_loader(dataset, range(rank, len(dataset), world), max(device_batch // dataset.views, 1),
                                   workers, pin_memory=device.type == "cuda")
    with tqdm(total=len(range(rank, len(dataset), world)), unit=dataset.samples.kind, desc=what, disable=rank > 0,
              dynamic_ncols=True, leave=False) as bar:
        for batch in loader:
            views = batch["x"].flatten(0, 1).split(device_batch)              # (files * views, 3, [T,] H, W), in parts
            outputs = torch.cat([forward(part.to(device, non_blocking=True)).float().cpu() for part in views])
            outputs = outputs.unflatten(0, batch["x"].shape[:2]).numpy()      # (files, views, D)
            bad = {path for path, _ in batch["unreadable"]}
            unreadable += batch["unreadable"]
            records += [(index, label, output) for index, label, output in
                        zip(batch["index"].tolist(), batch["label"].tolist(), outputs)
                        if dataset.samples.paths[index] not in bad]
            bar.update(len(outputs))
    return sorted(gather_list(records), key=lambda record: record[0]), sorted(gather_list(unreadable))


def accuracy(scores, labels, k):
    """Share of rows whose label is among the k best; of equal scores the lower class is better. scores: (n, K)."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)                 # (n, 1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    return float((((scores > own) | (scores == own) & before).sum(axis=1) < k).mean())


def test(forward, dataset, classes, device, device_batch, workers, rank, world):
    """Accuracies of a classifier. forward: uint8 views -> logits (n, K). classes: K names.

    Returns a dict: "view_top1", "view_top5" (each view judged alone), "top1", "top5" (softmax averaged over the views of a
    file), "files", "unreadable", "per_class" {name: [accuracy, files]}, "confusion" (rows: truth). Same on all ranks.
    """
    records, unreadable = over_views(lambda x: forward(x).float().softmax(dim=1), dataset, device, device_batch, workers,
                                     rank, world, "testing")
    if not records:
        raise ValueError(f"none of the {len(unreadable)} files to test can be read, the first: {unreadable[0]}")
    labels = np.array([label for _, label, _ in records])
    views = np.stack([output for _, _, output in records])                    # (files, views, K)
    if not np.isfinite(views).all():
        raise ValueError("the model gives scores that are not finite: its weights are unusable, or --amp fp16 is too narrow")
    scores = views.mean(axis=1, dtype=np.float64)
    flat, repeated = views.reshape(-1, views.shape[2]), labels.repeat(views.shape[1])
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels, np.argsort(-scores, axis=1, kind="stable")[:, 0]), 1)
    return {"files": len(records), "unreadable": [list(entry) for entry in unreadable], "clips": dataset.clips,
            "crops": dataset.crops, "view_top1": accuracy(flat, repeated, 1), "view_top5": accuracy(flat, repeated, 5),
            "top1": accuracy(scores, labels, 1), "top5": accuracy(scores, labels, 5),
            "per_class": {name: [row[i] / max(row.sum(), 1), int(row.sum())]
                          for i, (name, row) in enumerate(zip(classes, confusion))},
            "confusion": confusion.tolist()}


def describe(results, kind):
    """The lines to print of a test: accuracies, the classes (all, or the worst ten), what could not be read."""
    view = "clip" if kind == "video" else "crop"
    lines = [f"{results['clips']} clips x {results['crops']} crops, {results['files']} {kind}s: " if kind == "video" else
             f"{results['crops']} crops, {results['files']} images: "]
    lines[0] += (f"{kind}-level top-1 {100 * results['top1']:.2f}, top-5 {100 * results['top5']:.2f}; "
                 f"{view}-level top-1 {100 * results['view_top1']:.2f}, top-5 {100 * results['view_top5']:.2f}")
    ranked = sorted(results["per_class"].items(), key=lambda entry: (entry[1][0], entry[0]))
    ranked = [(name, values) for name, values in ranked if values[1]]
    if len(ranked) > 40:
        lines.append("the ten worst classes:")
        ranked = ranked[:10]
    width = max(len(name) for name, _ in ranked)
    lines += [f"  {name:{width}}  {100 * share:6.2f}  of {count}" for name, (share, count) in ranked]
    if results["unreadable"]:
        lines.append(f"{len(results['unreadable'])} {kind}s could not be read and are not counted:")
        lines += [f"  {path}: {reason}" for path, reason in results["unreadable"]]
    return lines


def draw_confusion(confusion, classes, path):
    """The confusion matrix as a PNG: rows are the true classes; brightness is the share of a row."""
    confusion = np.asarray(confusion)
    K = len(confusion)
    side = max(2, min(28, 1200 // K))                                         # pixels of a cell
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)   # (K, K)
    dark, bright = np.array([24, 26, 40]), np.array([255, 226, 120])
    cells = (dark + (bright - dark) * np.sqrt(share)[..., None]).astype(np.uint8).repeat(side, 0).repeat(side, 1)
    named = side >= 14
    font = ImageFont.load_default(12)
    margin = 8 + int(max(font.getlength(name) for name in classes)) if named else 8
    caption = "rows: true class; columns: predicted"
    width = max(margin + cells.shape[1], int(font.getlength(caption))) + 8
    sheet = Image.new("RGB", (width, margin + cells.shape[0] + 24), "white")
    sheet.paste(Image.fromarray(cells), (margin, margin))
    draw = ImageDraw.Draw(sheet)
    if named:
        for i, name in enumerate(classes):
            draw.text((margin - 4, margin + (i + 0.5) * side), name, "black", font, anchor="rm")
            label = Image.new("L", (margin - 4, side), 255)                   # column names, turned by 90 degrees
            ImageDraw.Draw(label).text((0, side / 2), name, 0, font, anchor="lm")
            sheet.paste(label.rotate(90, expand=True).convert("RGB"), (margin + i * side, 0))
            for j, count in enumerate(confusion[i]):
                if count:
                    color = "black" if share[i, j] > 0.25 else "white"
                    draw.text((margin + (j + 0.5) * side, margin + (i + 0.5) * side), str(count), color, font, anchor="mm")
    draw.text((4, sheet.height - 18), caption, "black", font)
    sheet.save(path)


def write_results(results, stem, classes):
    """STEM.json and STEM.png; each appears whole or not at all. Returns the two paths."""
    paths = [stem + ".json", stem + ".png"]
    with open(paths[0] + ".tmp", "w") as f:
        json.dump(results, f, indent=1)
    os.replace(paths[0] + ".tmp", paths[0])
    draw_confusion(results["confusion"], classes, stem + ".tmp.png")
    os.replace(stem + ".tmp.png", paths[1])
    return paths


def top_classes(forward, views, device_batch, classes, k=5):
    """The k most probable classes of one file's views (V, 3, [T,] H, W) uint8: [(name, probability)]."""
    with torch.no_grad():
        scores = torch.cat([forward(part).float().softmax(dim=1) for part in views.split(device_batch)]).mean(dim=0)
    return [(classes[i], p) for p, i in zip(*(part.tolist() for part in scores.topk(min(k, len(scores)))))]


def write_features(path, records, samples):
    """records as over_views gives them -> an npz of features (n, D) float32, labels (n,), paths (n,), classes (K,)."""
    with open(path + ".tmp", "wb") as f:
        np.savez(f, features=np.stack([output.mean(axis=0) for _, _, output in records]),
                 labels=np.array([label for _, label, _ in records]),
                 paths=np.array([os.path.relpath(samples.paths[index], samples.root or ".") for index, _, _ in records]),
                 classes=np.array(samples.classes))
    os.replace(path + ".tmp", path)


def linear_probe(train, val, num_classes, device, lrs=(0.03, 0.1, 0.3, 1.0, 3.0), epochs=100, batch_size=256, seed=0):
    """A linear classifier on frozen features for each learning rate, all trained in one pass by SGD without decay.

    train, val: (features, labels), lists of n vectors (D,) and n numbers. Features are standardised by the training set's
    mean and deviation.
    Returns [(lr, top-1 on train, top-1 on val)]. The best of them is chosen on the data it is measured on: say so.
    """
    (x, y), (x_val, y_val) = ((torch.tensor(np.stack(features), device=device), torch.tensor(labels, device=device))
                              for features, labels in (train, val))
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, x_val = (x - mean) / std, (x_val - mean) / std
    seed_all(seed)
    heads = nn.ModuleList(nn.Linear(x.shape[1], num_classes) for _ in lrs).to(device)
    for head in heads:
        nn.init.zeros_(head.weight)
    batch_size = min(batch_size, len(x))
    groups = [{"params": head.parameters(), "lr": lr * batch_size / 256} for head, lr in zip(heads, lrs)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), device=device).split(batch_size):
            if len(rows) == batch_size:
                loss = sum(F.cross_entropy(head(x[rows]), y[rows]) for head in heads)  # each head sees its own term only
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        return [(lr, *((head(f).argmax(dim=1) == t).float().mean().item() for f, t in ((x, y), (x_val, y_val))))
                for lr, head in zip(lrs, heads)]
