"""How fast this machine does what MaskFeat needs, against the plain forms in tests/plain.py.

    python -m tools.bench --quick                            # MViTv2-S only, three rounds
    python -m tools.bench --models vit_b --batch 64 --json out/bench.json

Both sides take turns, so that a busy machine slows both. The ratio of ours to the plain form is the
median of the rounds' ratios, ± half their interquartile range. The precision is that of training:
fp32 on a CPU, bf16 on a GPU. The plain forms materialize logits and bias, scatter the votes of HOG,
and decode every frame. A step is forward, HOG, loss, backward, clipping and AdamW. Its peak memory
is what it takes beyond weights, AdamW's state and input, on a CPU in a process of its own. A sample
is read, cropped and masked on one core, as by a worker of the loader. No data are needed.
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
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
import vit
from hog import HOG
from tools import synthetic

ROOT, CPU = Path(__file__).resolve().parent.parent, torch.device("cpu")
sys.path.append(str(ROOT / "tests"))
import plain  # noqa: E402

BATCH = {"mvitv2_s": (1, 8), "mvitv2_l": (1, 4), "vit_b": (4, 64), "vit_l": (2, 32)}  # CPU, GPU
TURN = 0.1                                                    # shortest turn in s


# ----------------------------------------------------------------------------------- turns, lines

def plain_hog_forward(self, images):
    with torch.autocast(images.device.type, enabled=False):
        return plain.plain_hog(images.float())


FORMS = {                                                     # what -> its plain form
    (mvit, "attention"): plain.plain_attention,
    (mvit.MultiScaleAttention, "pool"): plain.plain_pool,
    (vit.Attention, "forward"): plain.plain_vit_attention,
    (HOG, "forward"): plain_hog_forward}


def plainly(function):
    """The same function, run with the plain forms."""
    def run():
        with contextlib.ExitStack() as stack:
            for (owner, name), form in FORMS.items():
                stack.enter_context(mock.patch.object(owner, name, form))
            return function()
    return run


def take_turns(sides, rounds, device=CPU):
    """Seconds per call of the functions in `sides`, {name: [s in each round]}, after a warm-up.

    Short functions are called many times in a turn.
    """
    def seconds(function, calls=1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls
    calls, times = {}, {name: [] for name in sides}
    for name, function in sides.items():
        first = seconds(function)                             # with compilation on a GPU
        long = first > TURN and device == CPU
        calls[name] = 1 if long else math.ceil(TURN / seconds(function))
    for _ in range(rounds):
        for name, function in sides.items():
            times[name].append(seconds(function, calls[name]))
    return times


def make_line(name, unit, ours, other=()):
    """A row of the table from the values of each round. Times are given in s and kept in ms."""
    scale = 1e3 if unit == "ms" else 1
    line = {"name": name, "unit": unit, "ours": scale * statistics.median(ours)}
    if other:
        ratios = [a / b for a, b in zip(ours, other, strict=True)]
        low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        line |= {"plain": scale * statistics.median(other), "ratio": ratio,
                 "spread": (high - low) / 2 if len(ratios) > 1 else None}
    return line


def format_line(line):
    text = f"{line['name']:46} {line['ours']:9.4g} {line['unit']:3}"
    if "ratio" in line:
        text += f" {line['plain']:9.4g}  {line['ratio']:.3f}"
    if line.get("spread") is not None:
        text += f" ± {line['spread']:.3f}"
    return text


# ----------------------------------------------------------------------------------------- the step

def make_step(model, batch, device, size=224, frames=16):
    """(network, step): step(forward) does one update by the network or its compiled form."""
    video = model in mvit.MODELS
    net = models.build_maskfeat(dict(
        model=model, target="hog", image_size=(size, size), num_frames=frames, output_stride=16,
        patch_size=16, expand="mlp", drop_path=0.0, checkpointing=False, bins=9, cell=8, norm="l2",
        color="rgb", gradient="sobel")).to(device)
    x = torch.randn(batch, 3, *([frames] if video else []), size, size, device=device)
    grid = [n // s for n, s in zip(x.shape[2:], net.encoder.patch_stride)]
    kind = "cube" if video else "block"
    mask = torch.stack([torch.from_numpy(masking.draw_mask(kind, grid, 0.4, random.Random(i)))
                        for i in range(batch)]).to(device)
    optimizer = torch.optim.AdamW(engine.param_groups(net, 0.05), lr=1e-5, fused=True)
    for p in net.parameters():                                # a first step allocates AdamW's state
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def step(forward=net):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, _ = forward(x, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.02)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return net, step


def peak_of(step, device):
    """GiB that a step takes at most, beyond what there is before it."""
    if device.type == "cuda":
        step()                                                # compilation takes memory, too
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:                                                     # Linux
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        before = pages * os.sysconf("SC_PAGE_SIZE")
    step()
    return engine.peak_memory(device) - before / 2 ** 30


def peak_on_cpu(kind, model, batch):
    _, step = make_step(model, batch, CPU)
    return peak_of(plainly(step) if kind == "plain" else step, CPU)


def in_own_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def bench_step(model, batch, device, rounds, compiled, add):
    net, step = make_step(model, batch, device)
    steps = {"eager": step, "plain": plainly(step)}
    if compiled:
        fast = torch.compile(net)
        steps["compiled"] = lambda: step(fast)
    times = take_turns(steps, rounds, device)
    for kind in sorted(set(steps) - {"plain"}):
        add(f"{model}, batch {batch}, {kind}: step", "ms", times[kind], times["plain"])
        if device.type == "cuda":
            peaks = [peak_of(steps[side], device) for side in (kind, "plain")]
        elif kind == "eager":
            peaks = [in_own_process(peak_on_cpu, side, model, batch) for side in (kind, "plain")]
        else:
            continue
        add(f"{model}, batch {batch}, {kind}: peak memory", "GiB", peaks[:1], peaks[1:])


# ---------------------------------------------------------------------------------------- the parts

def bench_parts(device, rounds, compiled, add):
    """HOG, masks, and attention with pooling in each stage of MViTv2-S, forward and backward."""
    images, hog = torch.randn(16, 3, 224, 224, device=device), HOG().to(device)
    sides = {"eager": lambda: hog(images), "plain": plainly(lambda: hog(images))}
    if compiled:
        fast = torch.compile(hog)
        sides["compiled"] = lambda: fast(images)
    times = take_turns(sides, rounds, device)
    for kind in sorted(set(sides) - {"plain"}):
        add(f"HOG of 16 images of 224, {kind}", "ms", times[kind], times["plain"])
    for kind in masking.MASKS:
        grid, rng = (14, 14) if kind == "block" else (8, 14, 14), random.Random(0)
        draw = lambda kind=kind, grid=grid, rng=rng: masking.draw_mask(kind, grid, 0.4, rng)
        add(f"{kind} mask", "ms", take_turns({"": draw}, rounds)[""])

    batch = BATCH["mvitv2_s"][device.type == "cuda"]
    trunk = mvit.mvitv2_s(num_classes=0, output_stride=16).to(device)
    for i, thw in ((0, (8, 56, 56)), (2, (8, 28, 28)), (5, (8, 14, 14)), (15, (8, 14, 14))):
        attention = trunk.blocks[i].attn
        x = torch.randn(batch, 1 + math.prod(thw), attention.qkv.in_features, device=device,
                        requires_grad=True)

        def run(attention=attention, x=x, thw=thw):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                y, _ = attention(x, thw)
            y.float().sum().backward()
        times = take_turns({"ours": run, "plain": plainly(run)}, rounds, device)
        add(f"attention, {'x'.join(map(str, thw))}, {attention.num_heads} heads", "ms",
            times["ours"], times["plain"])


# --------------------------------------------------------------------------------------- the loader

def texture(height, width):
    """uint8 (height, width, 3): noise of three sizes."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (height // n, width // n, 3), np.uint8))
             for n in (32, 8, 2)]
    return np.mean([image.resize((width, height)) for image in noise], axis=0).astype(np.uint8)


def write_clip(path, width, height, seconds=10):
    """H.264, 30 fps: a view that pans over a texture."""
    picture = texture(height, width + 30 * seconds)
    views = np.lib.stride_tricks.sliding_window_view(picture, width, axis=1)  # (H, T, 3, W)
    synthetic.write_video(path, views.transpose(1, 0, 3, 2))


def sample_times(kind, path, rounds):
    """Seconds of a random sample of a file, ours and for a video in plain form.

    It runs as in a worker: in a process with one thread and a heap of its own.
    """
    torch.set_num_threads(1)
    mask, grid, frames = ("cube", (8, 14, 14), 16) if kind == "video" else ("block", (14, 14), None)
    draw = lambda rng: masking.draw_mask(mask, grid, 0.4, rng)
    samples = layouts.Samples(kind, [str(path)] * 8, [0] * 8, [])
    dataset = data.PretrainDataset(samples, (224, 224), frames, mask=draw)

    def plain_sample():
        rng = random.Random(0)
        clip = plain.plain_clip(path, 16, 4, rng.random())
        box = data.random_resized_crop_box(*clip.shape[-2:], rng)
        return data.crop_resize(clip, box, (224, 224)), draw(rng)
    sides = {"ours": lambda: [dataset[0, i] for i in range(8)]}
    times = take_turns(sides | ({"plain": plain_sample} if kind == "video" else {}), rounds)
    return [seconds / 8 for seconds in times["ours"]], times.get("plain", ())


def bench_loader(folder, rounds, add):
    write_clip(folder / "340x256.mp4", 340, 256)
    write_clip(folder / "1280x720.mp4", 1280, 720)
    Image.fromarray(texture(375, 500)).save(folder / "500x375.jpg", quality=90)
    for name in ("340x256.mp4", "1280x720.mp4", "500x375.jpg"):
        kind = "image" if name.endswith("jpg") else "video"
        times = in_own_process(sample_times, kind, folder / name, rounds)
        add(f"{kind} {name}, sample on one core", "ms", *times)


def bench_wait(folder, workers, device, add):
    """The share of time that pretrain.py waits for data, on copies of one clip, by its own log."""
    recipe, batch = ("k400_mvitv2_s", 8) if device.type == "cuda" else ("tiny", 4)
    clips, out, steps = folder / "clips/train/one", folder / f"workers{workers}", 40
    clips.mkdir(parents=True, exist_ok=True)
    for i in range(steps * batch):
        if not (clips / f"{i}.mp4").exists():
            os.link(folder / "340x256.mp4", clips / f"{i}.mp4")
    done = subprocess.run(
        [sys.executable, ROOT / "pretrain.py", "--recipe", recipe, "--data", folder / "clips",
         "--out", out, "--workers", str(workers), "--batch-size", str(batch), "--epochs", "1"],
        capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pretrain.py failed: {done.stderr.strip().splitlines()[-1]}")
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    waits = [line["data_wait"] for line in log if line["step"] > 10]  # the first steps compile
    add(f"pretrain.py, {recipe}, {workers} workers: wait", "%", [100 * wait for wait in waits])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flag = parser.add_argument
    add_flag("--quick", action="store_true", help="mvitv2_s, three rounds")
    add_flag("--models", nargs="*", choices=list(BATCH), help="whose step; default: all four")
    add_flag("--batch", type=int, help="samples per step; default: by model and device")
    add_flag("--rounds", type=int, help="turns of each side; default 7")
    add_flag("--workers", type=int, nargs="+", default=[-1], help="loader processes; -1: by cores")
    add_flag("--compile", action="store_true", help="compiled forms as well; always on a GPU")
    add_flag("--json", help="file for all lines")
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 7)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")                # as engine.py does on a GPU
    compiled = engine.should_compile("on" if args.compile else "auto", device)
    chosen = args.models if args.models is not None else ["mvitv2_s"] if args.quick else list(BATCH)
    lines = []

    def add(*values):
        lines.append(make_line(*values))
        print(format_line(lines[-1]), flush=True)
    title = (f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, "
             f"{torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds")
    print(f"{title}\n{'':46} {'ours':>9}     {'plain':>9}  ratio")
    bench_parts(device, rounds, compiled, add)                # first: a grown heap helps plain HOG
    for model in chosen:
        batch = args.batch or BATCH[model][device.type == "cuda"]
        bench_step(model, batch, device, rounds, compiled, add)
        torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder:
        bench_loader(Path(folder), rounds, add)
        for workers in args.workers:
            bench_wait(Path(folder), engine.loader_workers(workers, device), device, add)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": title, "lines": lines}, indent=1))


if __name__ == "__main__":
    engine.run_main(main)
