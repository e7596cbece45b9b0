"""A model over files: all views of each, on all ranks. Features of frozen weights.

evaluate.py tests with the first part, and calls the second for --features and --probe.
"""
import os
from dataclasses import replace

import engine

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import layouts
import models
import probe
import video
from video import UnreadableFile

# ------------------------------------------------------------------------------------------- views

def view_dataset(samples, recipe, clips=1, crops=1, starts=None):
    """All views of every file, by default the central one, or the clips that begin at `starts`."""
    frames = recipe.num_frames if samples.kind == "video" else None
    return data.ViewDataset(
        samples, recipe.image_size, frames, recipe.sampling_rate, clips if frames else 1, crops,
        recipe.crop_ratio, recipe.segments, starts)


def on_views(function, recipe, device):
    """`function` (of a model) made to take uint8 views (n, 3, [T,] H, W) on the device."""
    _, autocast, _ = engine.mixed_precision(recipe.amp, device)

    def forward(x):
        with autocast():
            return function(data.normalize(x, recipe.mean, recipe.std))
    return forward


@torch.no_grad()
def over_views(function, dataset, recipe, device, rank, world, what):
    """Run `function` over all views of every file of a data.ViewDataset, each rank on its share.

    function: normalized views (n, 3, [T,] H, W) on the device -> a list of tensors (n, ...).
    recipe: with device_batch, workers, amp, mean and std. Returns, the same on all ranks, arrays of
    the readable files in order, [index (n,), labels (n,), then (n, views, ...) of each tensor], and
    the others as [(path, reason)]. All ranks must call it. Raises ValueError if there are none.
    """
    forward = on_views(function, recipe, device)
    records, unreadable, share = [], [], range(rank, len(dataset), world)
    loader = data.make_view_loader(
        dataset, share, max(recipe.device_batch // dataset.views, 1),
        engine.loader_workers(recipe.workers, device), pin_memory=device.type == "cuda")
    unit = dataset.samples.kind if dataset.starts[0] is None else "clip"
    with tqdm(total=len(share), unit=unit, desc=what, disable=rank > 0 or None,
              dynamic_ncols=True, leave=False) as bar:
        for batch in loader:
            views = batch["x"].flatten(0, 1).split(recipe.device_batch)
            parts = [forward(part.to(device, non_blocking=True)) for part in views]
            outputs = [torch.cat(tensors).cpu().unflatten(0, batch["x"].shape[:2]).numpy()
                       for tensors in zip(*parts)]                            # (files, views, ...)
            unreadable += batch["unreadable"]
            entries = zip(batch["index"].tolist(), batch["label"].tolist(), *outputs)
            records += [entry for entry, good in zip(entries, batch["readable"]) if good]
            bar.update(len(batch["x"]))
    records = sorted(engine.gather_list(records), key=lambda record: record[0])
    unreadable = sorted(engine.gather_list(unreadable))
    if not records:
        raise ValueError(f"none of the {len(dataset)} files in {dataset.samples.root} can be read, "
                         f"the first: {unreadable[0]}")
    columns = [np.stack(column) for column in zip(*records)]
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError("the model gives numbers that are not finite: choose another checkpoint, "
                         "or another --amp")
    return columns, unreadable


# ---------------------------------------------------------------------------------------- features

def pooled_and_tokens(model, x):
    """model.features (B, D), and all tokens (B, 1 + N, D), each of unit variance, in float16."""
    tokens, _ = model.encode(*model.embed(x))
    pooled = tokens[:, 1:].mean(dim=1) if model.pool == "mean" else tokens[:, 0]
    pooled = model.norm(pooled) if hasattr(model, "head") else pooled
    return [pooled.float(), F.layer_norm(tokens.float(), tokens.shape[-1:]).half()]


def extract(function, recipe, dataset, device, rank, world, print0):
    """The arrays of `over_views`, after naming the files that cannot be read."""
    arrays, unreadable = over_views(function, dataset, recipe, device, rank, world, "features")
    for path, reason in unreadable:
        print0(f"unreadable, left out: {path}: {reason}")
    return arrays


def clip_starts(path, recipe):
    """The moments in s, one each recipe.every s, at which whole clips of a video begin."""
    try:
        with video.open_video(path, quick=True) as (container, stream):
            _, duration = video.extent(path, container, stream)
    except UnreadableFile:
        return [0.0]                                          # it is named when it is read
    free = min(duration, 86400) - recipe.num_frames * recipe.sampling_rate / video.TARGET_FPS
    return [i * recipe.every for i in range(int(max(free, 0) / recipe.every) + 1)]


def all_starts(paths, recipe):
    """For each file its `clip_starts`, or [None], which means the views of a test."""
    if not recipe.every:
        return [[None]] * len(paths)
    return [clip_starts(path, recipe) for path in
            tqdm(paths, desc="lengths", unit="video", disable=None, leave=False)]


def write_features(model, recipe, device, rank, world, print0):
    """--features: pooled features of all splits, or of those named. evaluate.py lists the keys."""
    if recipe.every and (not models.takes_clips(recipe.model) or recipe.segments
                         or recipe.clips > 1):
        raise ValueError("--every takes single clips of consecutive frames of videos: leave it out,"
                         " or use --no-segments and one clip")
    parts = {split: layouts.find_samples(recipe.data, split)
             for split in recipe.split or layouts.splits_of(recipe.data)}
    for samples in parts.values():
        models.check_kind(recipe.model, samples)
    files = [(path, label, split) for split, samples in parts.items()
             for path, label in zip(samples.paths, samples.labels)]
    starts = engine.from_rank0(all_starts, [path for path, *_ in files], recipe)
    rows = [(*file, start) for file, own in zip(files, starts) for start in own]
    paths, labels, splits, starts = map(list, zip(*rows))
    first = next(iter(parts.values()))
    dataset = view_dataset(replace(first, paths=paths, labels=labels), recipe, recipe.clips,
                           recipe.crops, starts)
    index, labels, features = extract(lambda x: [model.features(x).float()], recipe, dataset,
                                      device, rank, world, print0)
    names = [os.path.relpath(path, first.root or ".") for path in paths]
    table = {"features": features.mean(axis=1), "labels": labels, "paths": np.array(names)[index],
             "split": np.array(splits)[index], "classes": np.array(first.classes, str)}
    if recipe.every:
        table["time"] = np.array(starts)[index]
    if rank == 0:
        os.makedirs(os.path.dirname(recipe.features) or ".", exist_ok=True)
        with open(recipe.features + ".tmp", "wb") as f:
            np.savez(f, **table)
        os.replace(recipe.features + ".tmp", recipe.features)
    print0(f"wrote {recipe.features}: {len(index)} x {features.shape[2]} features of "
           + " and ".join(f"{(table['split'] == split).sum()} {split}" for split in parts))


def run_probe(model, recipe, device, rank, world, print0):
    """--probe: print the accuracy of each probe for each number of labels."""
    train, classes = layouts.find_labeled(recipe.data, "train")
    val, _ = layouts.find_labeled(recipe.data, "val", classes=classes)
    layouts.check_splits(train, val)
    models.check_kind(recipe.model, val)
    numbers = replace(train, paths=list(range(len(train))))   # a draw is a list of numbers
    draws = {shots: [layouts.draw_per_class(numbers, shots, recipe.seed + i).paths if shots
                     else numbers.paths for i in range(recipe.seeds)] for shots in recipe.shots}
    used = sorted({i for draw in draws.values() for rows in draw for i in rows})
    samples = replace(train, paths=[train.paths[i] for i in used] + val.paths,
                      labels=[train.labels[i] for i in used] + val.labels)
    dataset = view_dataset(samples, recipe, recipe.clips, recipe.crops)
    function = lambda x: [model.features(x).float()]
    if recipe.attentive:
        check_token_memory(model, recipe, dataset, device)
        function = lambda x: pooled_and_tokens(model, x)
    index, labels, features, *tokens = extract(function, recipe, dataset, device, rank, world,
                                               print0)
    features, labels = torch.from_numpy(features).mean(dim=1), torch.from_numpy(labels)
    tokens = torch.from_numpy(tokens[0]).flatten(1, 2) if tokens else None    # (n, views * N, D)
    own = np.array(used + [-1] * len(val))[index]             # number in the train part, -1 for val
    test = torch.from_numpy(np.flatnonzero(own < 0))
    for shots, draw in draws.items():
        rows = [torch.from_numpy(np.flatnonzero(np.isin(own, chosen))) for chosen in draw]
        if not all(map(len, [test, *rows])):
            raise ValueError(f"no file of one part of {recipe.data} can be read: run python "
                             f"data.py --check {recipe.data}")
        print0(f"labels a class: {shots or 'all'}; mean top-1 in percent ± one standard error, "
               f"{val.kind}s: {len(test)}, chance: {100 / len(classes):.2f}, draws: {len(rows)}")
        found = probe.compare(features, tokens, labels, rows, test, len(classes), device,
                              recipe.seed)
        for name, top1 in found.items():
            spread = f", deviation over draws {100 * np.std(top1, ddof=1):.2f}" if top1[1:] else ""
            print0(f"  {name:12}  {probe.percent(np.mean(top1), len(test))}{spread}")


def check_token_memory(model, recipe, dataset, device):
    """Raise ValueError if the tokens of all files need more than --token-memory."""
    with torch.no_grad():
        tokens, _ = model.encode(*model.embed(torch.zeros(1, *dataset.shape[1:], device=device)))
    needed = 2 * 2 * len(dataset) * dataset.views * tokens.numel() / 2 ** 30  # float16, twice
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))      # each process keeps all
    if needed > recipe.token_memory:
        raise ValueError(f"the attentive probe needs {needed:.2g} GiB for the tokens of "
                         f"{len(dataset)} files, --token-memory is {recipe.token_memory:g}: raise "
                         "it, take fewer labels (--shots 10), or leave it out (--no-attentive)")
