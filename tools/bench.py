"""How fast this machine does what MaskFeat needs, against the plain forms in tests/plain.py.

    python -m tools.bench --quick                            # MViTv2-S only, three rounds
    python -m tools.bench --models vit_b --batch 64 --json out/bench.json

Both sides take turns. The ratio of ours to the plain form is the median of the rounds' ratios, ±
half their interquartile range. The precision is that of training, and nothing is compiled. A step
is forward, HOG, loss, backward, clipping and AdamW. A sample is read and cropped by one thread.
"""
import argparse
import contextlib
import copy
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import timeit
from pathlib import Path
from unittest import mock

import engine

import numpy as np
import torch
from PIL import Image

import data
import layouts
import masking
import models
import mvit
import pretrain
import vit
from hog import HOG
from tools import synthetic

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import plain  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AUTOCAST = engine.mixed_precision("auto", DEVICE)[1]
BATCH = {"mvitv2_s": (1, 8), "mvitv2_l": (1, 4), "vit_b": (4, 64), "vit_l": (2, 32)}  # CPU, GPU
PLAIN = {                                                     # what -> its plain form
    (mvit, "attention"): plain.plain_attention,
    (mvit.MultiScaleAttention, "pool"): plain.plain_pool,
    (vit.Attention, "forward"): plain.plain_vit_attention,
    (HOG, "forward"): torch.autocast(DEVICE.type, enabled=False)(
        lambda self, images: plain.plain_hog(images.float()))}


def plainly(function):
    """The same function, run with the plain forms."""
    def run():
        with contextlib.ExitStack() as stack:
            for place, form in PLAIN.items():
                stack.enter_context(mock.patch.object(*place, form))
            return function()
    return run


def take_turns(sides, rounds):
    """Seconds per call in each round: a tuple for each function. A turn takes 0.2 s or more."""
    sync = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    timers = [timeit.Timer(lambda side=side: (side(), sync())) for side in sides]
    calls = [timer.autorange()[0] for timer in timers]        # this also warms up
    return [*zip(*([t.timeit(n) / n for t, n in zip(timers, calls)] for _ in range(rounds)))]


def make_step(recipe, batch):
    """A function that does one update on random input, as pretrain.py does."""
    model = models.build_maskfeat(vars(recipe)).to(DEVICE)
    T = [recipe.num_frames] if models.takes_clips(recipe.model) else []
    x = torch.randn(batch, 3, *T, *recipe.image_size, device=DEVICE)
    grid = [side // stride for side, stride in zip(x.shape[2:], model.encoder.patch_stride)]
    mask = torch.rand(batch, *grid, device=DEVICE) < recipe.mask_ratio
    optimizer = torch.optim.AdamW(engine.param_groups(model, recipe.weight_decay), fused=True)

    def step():
        with AUTOCAST():
            loss, _ = model(x, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return step


def peak_memory(form, name, batch):
    """GiB that two steps take at most, with weights and AdamW's state."""
    step = form(make_step(pretrain.Recipe(model=name), batch))
    step()
    step()
    return engine.peak_memory(DEVICE)


def bench_step(rounds, name, batch):
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        ours, other = (pool.apply(peak_memory, (form, name, batch)) for form in (copy.copy, plainly))
    yield f"{name}, batch {batch}: peak memory of a step", "GiB", [ours], [other]
    step = make_step(pretrain.Recipe(model=name), batch)
    yield f"{name}, batch {batch}: step", "ms", *take_turns([step, plainly(step)], rounds)


def bench_parts(rounds):
    """HOG, masks, and attention with pooling in an early and a late stage of MViTv2-S."""
    images, hog = torch.randn(16, 3, 224, 224, device=DEVICE), HOG().to(DEVICE)
    run = lambda: hog(images)
    yield "HOG of 16 images of 224", "ms", *take_turns([run, plainly(run)], rounds)
    for kind in masking.MASKS:
        grid = (14, 14) if kind == "block" else (8, 14, 14)
        draw = lambda kind=kind, grid=grid: masking.draw_mask(kind, grid, 0.4, random)
        yield f"{kind} mask", "ms", *take_turns([draw], rounds)
    trunk, batch = mvit.mvitv2_s(output_stride=16), BATCH["mvitv2_s"][DEVICE.type == "cuda"]
    for block, side in ((0, 56), (15, 14)):
        attention = trunk.blocks[block].attn.to(DEVICE)
        x = torch.randn(batch, 1 + 8 * side ** 2, attention.qkv.in_features, device=DEVICE)

        def run(attention=attention, x=x.requires_grad_(), side=side):
            with AUTOCAST():
                attention(x, (8, side, side))[0].float().sum().backward()
        name = f"attention, 8x{side}x{side}, {attention.num_heads} heads"
        yield name, "ms", *take_turns([run, plainly(run)], rounds)


def bench_sample(rounds, kind, width, height):
    """A random sample of an image of noise, or of a video of 10 s that pans over it."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 4, 3), np.uint8)
    noise = np.asarray(Image.fromarray(noise).resize((2 * width, height)))
    views = np.lib.stride_tricks.sliding_window_view(noise, width, axis=1)    # (H, T, 3, W)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "video":
            path, T = f"{folder}/clip.mp4", 16
            synthetic.write_video(path, views[:, :300].transpose(1, 0, 3, 2))
        else:
            path, T = f"{folder}/image.jpg", None
            Image.fromarray(noise[:, :width]).save(path, quality=90)
        dataset = data.PretrainDataset(layouts.Samples(kind, [path], [0], []), (224, 224), T)

        def plain_sample():
            clip = plain.plain_clip(path, position=random.random())
            box = data.random_resized_crop_box(*clip.shape[-2:], random)
            return data.crop_resize(clip, box, (224, 224))
        torch.set_num_threads(1)                              # as in a worker of the loader
        times = take_turns([lambda: dataset[random.random(), 0], plain_sample][:1 if T is None else 2], rounds)
        yield f"{kind} of {width}x{height}, sample", "ms", *times


def summarize(name, unit, ours, other=()):
    """A line of the table. Times in s become ms."""
    scale = 1e3 if unit == "ms" else 1
    line = {"name": name, "unit": unit, "ours": scale * np.median(ours)}
    if other:
        low, ratio, high = np.quantile(np.divide(ours, other), (0.25, 0.5, 0.75))
        line |= {"plain": scale * np.median(other), "ratio": ratio, "spread": (high - low) / 2}
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="mvitv2_s, three rounds")
    parser.add_argument("--models", nargs="*", choices=BATCH, help="whose step; default: all four")
    parser.add_argument("--batch", type=int, help="samples per step; default: by model and device")
    parser.add_argument("--rounds", type=int, help="turns of each side; default 7")
    parser.add_argument("--json", help="file for all lines")
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 7)
    chip = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    machine = f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}, {rounds} rounds\n{'':44}{'ours':>9}{'plain':>14}  ratio")
    lines, benches = [], [bench_parts(rounds)]
    for name in args.models or (["mvitv2_s"] if args.quick else BATCH):
        batch = args.batch or BATCH[name][DEVICE.type == "cuda"]
        benches.append(bench_step(rounds, name, batch))
    for file in (("video", 340, 256), ("video", 1280, 720), ("image", 500, 375)):
        benches.append(bench_sample(rounds, *file))
    for row in itertools.chain(*benches):
        lines.append(summarize(*row))
        text = "{name:44}{ours:9.4g} {unit:3}" + "{plain:10.4g}  {ratio:.3f} ± {spread:.3f}" * (len(row) > 3)
        print(text.format(**lines[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "lines": lines}, indent=1))


if __name__ == "__main__":
    engine.run_main(main)
