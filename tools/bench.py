"""How fast this machine does what MaskFeat needs, against the plain forms in tests/plain.py.

    python -m tools.bench [--quick] [--models vit_b --batch 64] [--json out/bench.json]

Both sides take turns. The ratio of ours to the plain form is the median of the rounds' ratios, ±
half their interquartile range. The precision is that of training, but nothing is compiled.
"""
import argparse
import json
import random
import tempfile
import timeit
from pathlib import Path
from unittest import mock

import engine

import numpy as np
import torch
from PIL import Image

import masking
import models
import mvit
import pretrain
import video
import vit
from hog import HOG
from tests import plain
from tools import synthetic

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
AUTOCAST = engine.mixed_precision("auto", DEVICE)[1]
BATCH = {"mvitv2_s": (1, 8), "mvitv2_l": (1, 4), "vit_b": (4, 64), "vit_l": (2, 32)}  # CPU, GPU
PLAIN = {                                                     # what -> its plain form
    (mvit, "attention"): plain.plain_attention,
    (mvit.MultiScaleAttention, "pool"): plain.plain_pool,
    (vit.Attention, "forward"): plain.plain_vit_attention,
    (HOG, "forward"): torch.autocast(DEVICE.type, enabled=False)(
        lambda self, images: plain.plain_hog(images.float()))}


def machine():
    return (f"{torch.cuda.get_device_name() if GPU else 'CPU'}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}")


def plainly(function, places=tuple(PLAIN)):
    """The same function, run with the plain forms of these places."""
    for place in places:
        function = mock.patch.object(*place, PLAIN[place])(function)
    return function


def take_turns(sides, rounds):
    """ms per call in each round: a tuple for each function. A turn takes 0.2 s or more."""
    sync = torch.cuda.synchronize if GPU else lambda: None
    timers = [timeit.Timer(lambda side=side: (side(), sync())) for side in sides]
    calls = [timer.autorange()[0] for timer in timers]        # this also warms up
    return [*zip(*([1e3 * t.timeit(n) / n for t, n in zip(timers, calls)] for _ in range(rounds)))]


def make_step(recipe, batch, amp="auto", backend=None):
    """A function that does one update on random input, as pretrain.py does. backend: of
    torch.compile, None for eager."""
    model = models.build_maskfeat(vars(recipe)).to(DEVICE)
    if backend:
        model.compile(backend=backend)
    _, autocast, scaler = engine.mixed_precision(amp, DEVICE)
    T = [recipe.num_frames] if models.takes_clips(recipe.model) else []
    x = torch.randn(batch, 3, *T, *recipe.image_size, device=DEVICE)
    grid = [side // stride for side, stride in zip(x.shape[2:], model.encoder.patch_stride)]
    mask = torch.rand(batch, *grid, device=DEVICE) < recipe.mask_ratio
    optimizer = torch.optim.AdamW(engine.param_groups(model, recipe.weight_decay), fused=True)

    def step():
        with autocast():
            loss, _ = model(x, mask)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        scaler.step(optimizer)
        scaler.update()
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
    with torch.multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        forms = torch.nn.Identity(), plainly
        peaks = [[pool.apply(peak_memory, (form, name, batch))] for form in forms]
    yield f"{name}, batch {batch}: peak memory of a step", "GiB", *peaks
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
    trunk, batch = mvit.mvitv2_s(output_stride=16), BATCH["mvitv2_s"][GPU]
    for block, side, D in ((0, 56, 96), (15, 14, 768)):
        attention = trunk.blocks[block].attn.to(DEVICE)
        x = torch.randn(batch, 1 + 8 * side ** 2, D, device=DEVICE, requires_grad=True)

        def run(attention=attention, x=x, side=side):
            with AUTOCAST():
                attention(x, (8, side, side))[0].float().sum().backward()
        name = f"attention, 8x{side}x{side}, {attention.num_heads} heads"
        yield name, "ms", *take_turns([run, plainly(run)], rounds)


def draw_noise(width, height, frames):
    """Frames of a pan over noise, (T, H, W, 3)."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 4, 3), np.uint8)
    noise = np.asarray(Image.fromarray(noise).resize((2 * width, height)))
    views = np.lib.stride_tricks.sliding_window_view(noise, width, axis=1)    # (H, T, 3, W)
    return views[:, :frames].transpose(1, 0, 3, 2)


def bench_reading(rounds, kind, width, height):
    """A random clip of a video of 10 s that pans over noise, or a JPEG of noise."""
    frames = draw_noise(width, height, 300)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/file.{kind}"
        if kind == "mp4":
            synthetic.write_video(path, frames)
            sides = [lambda form=form: form(path, position=random.random())
                     for form in (video.read_clip, plain.plain_clip)]
        else:
            Image.fromarray(frames[0]).save(path, quality=90)
            sides = [lambda: video.read_image(path)]
        torch.set_num_threads(1)                              # as in a worker of the loader
        yield f"{kind} of {width}x{height}", "ms", *take_turns(sides, rounds)


def summarize(name, unit, ours, other=()):
    """A line of the table, from the values of all rounds."""
    line = {"name": name, "unit": unit, "ours": np.median(ours)}
    if other:
        low, ratio, high = np.quantile(np.divide(ours, other), (0.25, 0.5, 0.75))
        line |= {"plain": np.median(other), "ratio": ratio, "spread": (high - low) / 2}
    return line


def table(rows):
    """Rows as a Markdown table, with the columns that any of them has."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if value != ""))
    show = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
    lines = [columns, ["---"] * len(columns),
             *([show(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="mvitv2_s, three rounds")
    parser.add_argument("--models", nargs="+", choices=BATCH, help="whose step; default: all four")
    parser.add_argument("--batch", type=int, help="samples per step; default: by model and device")
    parser.add_argument("--rounds", type=int, help="turns of each side; default 7")
    parser.add_argument("--json", help="file for all lines")
    args = parser.parse_args()
    engine.check_numbers(args, positive=("batch", "rounds"))
    rounds = args.rounds or (3 if args.quick else 7)
    files = ("mp4", 340, 256), ("mp4", 1280, 720), ("jpg", 500, 375)
    about = f"{machine()}, rounds: {rounds}"
    print(f"{about}\n{'':44}{'ours':>9}{'plain':>14}  ratio")
    benches = [bench_parts(rounds)]
    for name in args.models or (["mvitv2_s"] if args.quick else BATCH):
        benches.append(bench_step(rounds, name, args.batch or BATCH[name][GPU]))
    benches += [bench_reading(rounds, *file) for file in files]
    lines = []
    for line in (summarize(*row) for bench in benches for row in bench):
        ratio = "{plain:10.4g}  {ratio:.3f} ± {spread:.3f}" if "plain" in line else ""
        print(("{name:44}{ours:9.4g} {unit:3}" + ratio).format(**line), flush=True)
        lines.append(line)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": about, "lines": lines}, indent=1))


if __name__ == "__main__":
    engine.run_main(main)
