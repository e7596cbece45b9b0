"""How fast this machine does what MaskFeat takes, against the plain forms in tests/plain.py; needs no data.

    python bench.py --quick                                  # MViTv2-S, eager: under two minutes on two cores
    python bench.py                                          # four models, eager and compiled, fp32 and bf16
    python bench.py --models vit_b --batch 64 --json out/bench.json --chart out/bench.png

A line compares two quantities: ours, and the plain form's or the whole that ours is a part of. The sides take turns, so
that a busy machine slows both; the ratio is the median of the rounds' ratios, ± half their interquartile range. A round
for warm-up comes first, and GPU work is waited for. Plain forms are eager, of the same precision, and do what equations
say: logits and bias materialised, every key projected, every token computed to the end, all samples at once, everything
kept for the backward pass, HOG by scatter, every frame decoded at full size.

A step is forward, HOG, loss, backward, clipping, AdamW. Its peak memory is what it takes beyond weights, AdamW's state
and input: of a process of its own (CPU, eager only), or of the allocator. Model FLOPs: three forward passes by
flops.py, two per multiply-add, of the whole model, though ours leaves a part of them out. A sample is read, cropped and
masked on one core, as a loader's worker does it.
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

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import layouts
import masking
import mvit
import vit
from models import build_maskfeat
from engine import loader_workers, param_groups, peak_memory, run_main
from tools.flops import count_flops
from hog import HOG
from maskfeat import MaskFeat

ROOT, CPU = Path(__file__).resolve().parent, torch.device("cpu")
sys.path.append(str(ROOT / "tests"))
from plain import plain_attention, plain_clip, plain_hog, plain_pool, plain_vit_attention  # noqa: E402

BATCH = {"mvitv2_s": (1, 8), "mvitv2_l": (1, 4), "vit_b": (4, 64), "vit_l": (2, 32)}     # on a CPU, on a GPU
TURN = 0.1                                                                    # s that a turn takes at least


# ------------------------------------------------------------------------------------------------ turns, ratios, lines

def plain_hog_forward(self, images):
    with torch.autocast(images.device.type, enabled=False):
        return plain_hog(images.float())


FORMS = {                                                                     # where: what -> its plain form
    (mvit, "attention"): plain_attention, (mvit.MultiScaleAttention, "pool"): plain_pool,
    (mvit, "seen_by_windows"): lambda x, thw, stride: (x, thw, None),         # every key and value
    (mvit, "recomputed"): lambda function, *inputs: function(*inputs),        # everything kept
    (mvit, "PIECE"): sys.maxsize,                                                # a batch at once
    (vit.Attention, "forward"): plain_vit_attention, (HOG, "forward"): plain_hog_forward,
    (MaskFeat, "wanted"): lambda self, masked: None}                          # every token to the end


def plainly(function):
    """The same function, run with the plain forms."""
    def run():
        with contextlib.ExitStack() as stack:
            for (owner, name), plain in FORMS.items():
                stack.enter_context(mock.patch.object(owner, name, plain))
            return function()
    return run


def take_turns(sides, rounds, device):
    """Seconds per call of the functions in `sides`, {name: [s in each round]}; short ones are called many times."""
    def seconds(function, calls=1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls
    calls, times = {}, {name: [] for name in sides}
    for name, function in sides.items():                                      # warm-up, compilation
        first = seconds(function)
        calls[name] = 1 if first > TURN and device == CPU else math.ceil(TURN / seconds(function))
    for _ in range(rounds):
        for name, function in sides.items():
            times[name].append(seconds(function, calls[name]))
    return times


def ratio_of(ours, other):
    """Median of the rounds' ratios, and half their interquartile range (None of one round)."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    if len(ratios) == 1:
        return ratios[0], None
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, (high - low) / 2


def make_line(name, unit, ours, other=None, against="plain form", items=0):
    """A row of the table. ours, other: values per round, other None if there is nothing to compare with; times come
    in s and kept in ms. items: samples that one call of ours gets done."""
    ratio, spread = ratio_of(ours, other) if other else (None, None)
    middle = lambda values: statistics.median(values) * (1e3 if unit == "ms" else 1)
    return {"name": name, "ours": middle(ours), "other": middle(other) if other else None, "unit": unit, "ratio": ratio,
            "spread": spread, "per_second": items / statistics.median(ours) if items else None,
            "against": against if other else None}


HEAD = f"{'':50}{'ours':>9}{'other':>9}  {'unit':8}{'ratio':<15}{'ours per s':>10}  other is"


def show_ratio(line, digits=3):
    if line["ratio"] is None:
        return ""
    return f"{line['ratio']:.{digits}f}" + ("" if line["spread"] is None else f" ± {line['spread']:.{digits}f}")


def format_line(line):
    ours, other, rate = ("" if value is None else f"{value:.0f}" if value > 999 else f"{value:.3g}"
                         for value in (line["ours"], line["other"], line["per_second"]))
    return (f"{line['name']:50}{ours:>9}{other:>9}  {line['unit']:8}{show_ratio(line):15}{rate:>10}  "
            f"{line['against'] or ''}").rstrip()


def name_of(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    known = open("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else []
    model = next((line.partition(":")[2].strip() for line in known if line.startswith("model name")), "CPU")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def draw_chart(lines, title, path):
    """Bars of all ratios to a plain form, and a line at 1."""
    lines = [line for line in lines if line["against"] == "plain form"]
    font, left, step = ImageFont.load_default(13), 400, 22
    scale = 360 / max([1.0] + [line["ratio"] for line in lines])              # pixels
    sheet = Image.new("RGB", (left + 480, step * (len(lines) + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((10, 6), f"Ours over the plain form, less is better. {title}", "black", font)
    pen.line((left + scale, step + 4, left + scale, sheet.height - 8), "#c83c28")
    for i, line in enumerate(lines, 1):
        label, y, end = f"{line['name']}, {line['unit']}", step * i + 8, left + scale * line["ratio"]
        pen.text((left - 8 - font.getlength(label), y), label, "black", font)
        pen.rectangle((left, y, end, y + 15), "#586ea0")
        pen.text((max(end, left + scale) + 8, y), show_ratio(line, 2), "black", font)
    sheet.save(path)


# ------------------------------------------------------------------------------------------------------------ the step

def make_step(model, batch, amp, device, size=224, frames=16):
    """(network, input, step): step(forward) does one update as pretrain.py does, by the network or a compiled one."""
    video = model in mvit.MODELS
    net = build_maskfeat(dict(
        model=model, target="hog", image_size=(size, size), num_frames=frames, output_stride=16, patch_size=16,
        expand="mlp", drop_path=0.0, checkpointing=False, bins=9, cell=8, norm="l2", color="rgb",
        gradient="sobel")).to(device)
    x = torch.randn(batch, 3, *([frames] if video else []), size, size, device=device)
    mask = draw_masks(net, x).to(device)
    net.most_masked = masking.most_masked(*masks_of(net, x))
    optimizer = torch.optim.AdamW(param_groups(net, 0.05), lr=1e-5, fused=True)
    for p in net.parameters():                                                # a step, so that AdamW has its memory
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def step(forward=net):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
            loss, _ = forward(x, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.02)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return net, x, step


def masks_of(net, x):
    """Kind, grid and ratio of the masks for x."""
    return "cube" if x.ndim == 5 else "block", [n // s for n, s in zip(x.shape[2:], net.encoder.patch_stride)], 0.4


def draw_masks(net, x):
    """Masks for the batch x as the loader draws them, bool (B, *grid)."""
    return torch.stack([torch.from_numpy(masking.draw_mask(*masks_of(net, x), random.Random(i))) for i in range(len(x))])


def peak_of_step(kind, *how):
    """GiB that a step takes at its most beyond what there is before it, in a fresh process."""
    _, _, step = make_step(*how)
    before = peak_memory(CPU)
    if os.path.exists("/proc/self/statm"):                                    # Linux: what is in use, not its peak
        with open("/proc/self/statm") as file:
            before = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    (plainly(step) if kind == "plain" else step)()
    return peak_memory(CPU) - before


def in_own_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def matrix_product(amp, device):
    """(a function that multiplies two large matrices, its FLOPs)."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if amp == "bf16" else torch.float32)
    return lambda: a @ a, 2 * n ** 3


def bench_step(model, batch, amp, device, rounds, compiled, add, memory=True, **size):
    what, how = f"{model} {amp}, batch {batch}", (model, batch, amp, device)
    net, x, step = make_step(*how, **size)
    kinds, goals = {"eager": step}, {"eager": net.compute_target}
    if compiled:
        fast, goals["compiled"] = torch.compile(net), torch.compile(net.compute_target)
        kinds["compiled"] = lambda: step(fast)
    steps, peaks = {**kinds, "plain": plainly(step)}, {}
    if device.type == "cuda":
        for kind, function in steps.items():
            function()                                                        # compilation takes memory, too
            torch.cuda.reset_peak_memory_stats()
            before = peak_memory(device)
            function()
            peaks[kind] = peak_memory(device) - before
    elif memory:
        peaks = {kind: in_own_process(peak_of_step, kind, *how) for kind in ("eager", "plain")}

    product, operations = matrix_product(amp, device)
    times = take_turns({**steps, "product": product, "masks": lambda: draw_masks(net, x),
                        **{f"{kind} HOG": lambda goal=goal: goal(x) for kind, goal in goals.items()}}, rounds, device)
    most = [operations / t / 1e12 for t in times["product"]]
    flops = 3 * 2 * batch * count_flops(net, (1, *x.shape[1:]))["macs"]
    for kind in kinds:
        add(f"{what}, {kind}: step", "ms", times[kind], times["plain"], items=batch)
        if kind in peaks:
            add(f"{what}, {kind}: peak memory", "GiB", [peaks[kind]], [peaks["plain"]])
        rate = [flops / t / 1e12 for t in times[kind]]
        add(f"{what}, {kind}: model FLOPs", "TFLOP/s", rate, most, "matrix product")
        add(f"{what}, {kind}: HOG", "ms", times[f"{kind} HOG"], times[kind], "whole step")
    add(f"{what}: masks", "ms", times["masks"], times["eager"], "whole step")


# ------------------------------------------------------------------------------------------------------------ the parts

def bench_parts(amps, device, rounds, compiled, add):
    """HOG, masks, and the attention of each stage of MViTv2-S with its pooling, forward and backward."""
    images, hog = torch.randn(16, 3, 224, 224, device=device), HOG().to(device)
    sides = {"eager": lambda: hog(images), "plain": plainly(lambda: hog(images))}
    if compiled:
        fast = torch.compile(hog)
        sides["compiled"] = lambda: fast(images)
    times = take_turns(sides, 3 * rounds, device)
    for kind in sides:
        if kind != "plain":
            add(f"HOG, 16 images of 224, {kind}", "ms", times[kind], times["plain"], items=16)
    for kind in masking.MASKS:
        grid, rng = (14, 14) if kind == "block" else (8, 14, 14), random.Random(0)
        times = take_turns({"draw": lambda: masking.draw_mask(kind, grid, 0.4, rng)}, rounds, CPU)
        add(f"{kind} mask of {'x'.join(map(str, grid))}", "ms", times["draw"], items=1)

    batch, trunk = BATCH["mvitv2_s"][device.type == "cuda"], mvit.mvitv2_s(num_classes=0, output_stride=16).to(device)
    for i, thw in ((0, (8, 56, 56)), (2, (8, 28, 28)), (5, (8, 14, 14)), (15, (8, 14, 14))):
        attention = trunk.blocks[i].attn
        x = torch.randn(batch, 1 + math.prod(thw), attention.qkv.in_features, device=device, requires_grad=True)
        for amp in amps:
            def run():
                with torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
                    y, _ = attention(x, thw)
                y.float().sum().backward()
            times = take_turns({"ours": run, "plain": plainly(run)}, rounds, device)
            add(f"attention and pooling {amp}, {'x'.join(map(str, thw))}, {attention.num_heads} heads", "ms",
                times["ours"], times["plain"], items=batch)


# ----------------------------------------------------------------------------------------------------------- the loader

def texture(height, width, rng):
    """uint8 (height, width, 3): colour noise with the 1/f spectrum of photographs."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    spectrum = rng.standard_normal((3, height, len(fx), 2)) @ [1, 1j] / np.maximum(np.hypot(fy, fx), 2 / width)
    picture = np.fft.irfft2(spectrum, (height, width))
    picture = picture.sum(0) / 2 + picture                                    # mostly gray
    return (128 + 50 * picture / picture.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def write_clip(path, width, height, bit_rate, seconds=10, fps=30, keyframes=60):
    """H.264: a textured square that circles over a texture, which moves as well. A keyframe every two seconds."""
    rng = np.random.default_rng(0)
    back, front = texture(2 * height, 2 * width, rng), texture(height // 2, height // 2, rng)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "g": str(keyframes)})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", bit_rate
        for i in range(seconds * fps):
            a, b = (1 + math.sin(i / 40)) / 2, (1 + math.cos(i / 40)) / 2
            y, x, top, left = (round(n) for n in (a * height, b * width, b * height / 2, a * (width - height / 2)))
            frame = back[y:y + height, x:x + width].copy()
            frame[top:top + height // 2, left:left + height // 2] = front
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def bench_loader(folder, files, rounds, add):
    """Samples as a worker with its one thread makes them, of random clips of a file in turn."""
    cube = lambda rng: masking.draw_mask("cube", (8, 14, 14), 0.4, rng)
    rngs = [data.sample_rng(0, 0, i) for i in range(8)]
    places = [rng.random() for rng in rngs]                                   # of the clips, as PretrainDataset draws them
    for name, path in files.items():
        dataset = data.PretrainDataset(layouts.Samples("video", [str(path)] * 8, [0] * 8, []), (224, 224), 16, mask=cube)

        def plain():                                                          # takes as long for any part of a file
            frames = plain_clip(path, 16, 4, places[0])
            box = data.random_resized_crop_box(*frames.shape[-2:], rngs[0])
            return data.crop_resize(frames, box, (224, 224)).transpose(0, 1).contiguous(), cube(rngs[0])

        def seek(place):
            with video.open_video(path, quick=True) as (container, stream):
                container.seek(round(place * 8 / stream.time_base), stream=stream)

        def read_unconverted(place):
            with mock.patch("video._rgb", lambda frame, min_size: np.zeros((3, 1, 1), np.uint8)):
                data.read_clip(path, position=place)

        frames = data.read_clip(path)
        times = take_turns({
            "seek": lambda: [seek(place) for place in places],
            "read": lambda: [read_unconverted(place) for place in places],
            "crop": lambda: dataset.view(frames, None, data.random_resized_crop_box(*frames.shape[-2:], rngs[0])), "mask": lambda: cube(rngs[0]),
            "sample": lambda: [dataset[0, i] for i in range(8)], "plain": plain}, rounds, CPU)
        seek, read, sample = (np.array(times[side]) / 8 for side in ("seek", "read", "sample"))
        crop, mask = np.array(times["crop"]), np.array(times["mask"])
        add(f"{name}, sample on one core", "ms", list(sample), times["plain"], items=1)
        for stage, part in (("open and seek", seek), ("decode", read - seek), ("convert", sample - read - crop - mask),
                            ("crop", crop), ("mask", mask)):
            add(f"{name}, {stage}", "ms", list(part), list(sample), "sample")

    path = folder / "image.jpg"
    Image.fromarray(texture(375, 500, np.random.default_rng(0))).save(path, quality=90)
    dataset = data.PretrainDataset(layouts.Samples("image", [str(path)], [0], []), (224, 224),
                                mask=lambda rng: masking.draw_mask("block", (14, 14), 0.4, rng))
    add("JPEG of 500x375, sample on one core", "ms", take_turns({"": lambda: dataset[0, 0]}, rounds, CPU)[""], items=1)


def loader_lines(*arguments):
    """What bench_loader would add, for a process of its own: a worker is one, with one thread and a heap of its own."""
    torch.set_num_threads(1)
    lines = []
    bench_loader(*arguments, lambda *values, **more: lines.append((values, more)))
    return lines


def bench_loop(folder, file, workers, device, add):
    """pretrain.py on copies of one clip: how long the device waits for data, by its own log."""
    recipe, batch, steps = *(("k400_mvitv2_s", 8) if device.type == "cuda" else ("default", 4)), 40
    clips, out = folder / "clips" / "train" / "one", folder / f"workers{workers}"
    clips.mkdir(parents=True, exist_ok=True)
    for i in range(steps * batch):
        if not (clips / f"{i}.mp4").exists():
            os.link(file, clips / f"{i}.mp4")
    done = subprocess.run(
        [sys.executable, ROOT / "pretrain.py", "--recipe", recipe, "--data", folder / "clips", "--out", out,
         "--workers", str(workers), "--batch-size", str(batch), "--epochs", "1"], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pretrain.py ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    spans = [((b["step"] - a["step"]) * batch / b["samples_per_second"], b["data_wait"])
             for a, b in zip(log, log[1:]) if a["step"] >= 10]                # the first steps compile, or find a queue
    add(f"pretrain.py, {recipe}, {workers} workers: waiting", "s", [span * wait for span, wait in spans],
        [span for span, _ in spans], "wall time")


# ---------------------------------------------------------------------------------------------------------------- main

def why_not_compiled(device):
    """What keeps torch.compile from working here, or "" if nothing does."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        return ""
    except Exception as error:                                                # no C++ compiler, no Triton, a new Python
        return str(error).strip().splitlines()[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="mvitv2_s, eager, three rounds, bf16 where it pays")
    parser.add_argument("--models", nargs="*", choices=list(BATCH), help="whose step to measure; default: all four")
    parser.add_argument("--batch", type=int, help="samples per step; default: by model and device")
    parser.add_argument("--rounds", type=int, help="turns of each side; default 7")
    parser.add_argument("--workers", type=int, nargs="+", default=[-1], help="loader processes; -1: by cores")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compiled forms, too")
    parser.add_argument("--json", help="file for all lines")
    parser.add_argument("--chart", default="bench.png", help="file for the bars")
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 7)
    if rounds < 2 or args.batch is not None and args.batch < 1:
        raise ValueError(f"--rounds {rounds} --batch {args.batch}: a spread takes two rounds, a step one sample")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")                            # as engine.py does
    start, lines, threads = time.perf_counter(), [], torch.get_num_threads()

    def add(*values, **more):
        lines.append(make_line(*values, **more))
        print(format_line(lines[-1]), flush=True)
    title = f"{name_of(device)}, {threads} threads, torch {torch.__version__}"
    print(f"{title}, {rounds} rounds\n{HEAD}")

    compiled = not args.quick if args.compile is None else args.compile
    if compiled and (reason := why_not_compiled(device)):
        print(f"compiled forms left out: {reason}")
        compiled = False
    amps = ["fp32", "bf16"]
    times = take_turns({amp: matrix_product(amp, device)[0] for amp in amps}, rounds, device)
    add("matrix product, bf16 against fp32", "ms", times["bf16"], times["fp32"], "fp32")
    if args.quick and lines[0]["ratio"] > 1:
        print("bf16 left out: this machine has no fast instructions for it; without --quick it is measured, too")
        amps = ["fp32"]
    bench_parts(amps, device, rounds, compiled, add)                          # first: a grown heap helps HOG by scatter
    for model in (["mvitv2_s"] if args.quick else BATCH) if args.models is None else args.models:
        batch = args.batch or BATCH[model][device.type == "cuda"]
        for amp in amps:
            try:
                bench_step(model, batch, amp, device, rounds, compiled, add)
            except torch.OutOfMemoryError:                                    # CUDA
                print(f"{model} {amp}: out of memory at batch {batch}, choose a smaller --batch")
            torch.compiler.reset()
    if "libx264" in av.codecs_available:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            files = {"340x256": folder / "small.mp4", "1280x720": folder / "large.mp4"}
            write_clip(files["340x256"], 340, 256, 500_000)
            write_clip(files["1280x720"], 1280, 720, 2_500_000)
            for values, more in in_own_process(loader_lines, folder, files, rounds):
                add(*values, **more)
            for workers in args.workers:
                bench_loop(folder, files["340x256"], loader_workers(workers, device), device, add)
    else:
        print("loader and loop left out: this PyAV cannot write H.264 (libx264) to read")

    draw_chart(lines, title, args.chart)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"device": name_of(device), "threads": threads, "torch": torch.__version__, "rounds": rounds,
                       "lines": lines}, file, indent=1)
    print(f"{time.perf_counter() - start:.0f} s; wrote {args.chart}" + (f" and {args.json}" if args.json else ""))


if __name__ == "__main__":
    run_main(main)
