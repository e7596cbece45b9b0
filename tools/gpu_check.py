"""What only a GPU can show: the numbers, the speed, faults, the example.

    python -m tools.gpu_check [--small] [--parts numbers mvitv2_s] [--out out/gpu_check]

Each part runs in a process of its own and writes OUT/part.json, so that one that fails or is killed
costs the others nothing. A part whose file is there is not run again. At the end, OUT/table.md
holds all tables. --small takes small models on any machine, to see that each part works.
"""
import argparse
import functools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import engine

import numpy as np
import torch

import checkpoints
import convert
import data
import layouts
import masking
import models
import pretrain
from hog import HOG
from tests.golden import make_checkpoint
from tools import bench, peers, synthetic
from tools.flops import count_flops

GPU, DEVICE = bench.GPU, bench.DEVICE
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
LIMIT = 900                                                   # seconds for a part


def wait():
    if GPU:
        torch.cuda.synchronize()


def seconds_of(function, calls):
    """Median time of a call, after two to warm up."""
    times = []
    for _ in range(2 + calls):
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def product_rate(small):
    """FLOPs per second of one large matrix product (bf16 on a GPU): the most a step can reach."""
    n = 512 if small else 8192
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    return 2 * n ** 3 / seconds_of(lambda: a @ b, 20)


# ------------------------------------------------------------------------------------- the numbers

def golden_rows(name, x_shape, mask_shape):
    """Loss and gradient norm of the release's model, in each precision."""
    x = np.random.default_rng(0).standard_normal(x_shape, dtype=np.float32)
    mask = np.random.default_rng(1).random(mask_shape) < 0.4
    x, mask = torch.from_numpy(x).to(DEVICE), torch.from_numpy(mask).to(DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{name}.pyth"
        make_checkpoint.main(str(GOLDEN / f"keys_{name}.json"), path)
        recipe = convert.foreign_recipe(convert.recognize(checkpoints.read_checkpoint(path))[1])
        model = models.build_maskfeat(recipe)
        convert.load_weights(model, path, verbose=False)
    model, z = model.to(DEVICE), np.load(GOLDEN / f"{name}.npz")
    for amp, matmul in ("fp32", "highest"), ("fp32", "high"), ("bf16", "high"), ("fp16", "high"):
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = matmul == "high"
        scale = 1024 if amp == "fp16" else 1
        with engine.mixed_precision(amp, DEVICE)[1]():
            loss, _ = model(x, mask)
        (loss * scale).backward()
        norms = [p.grad.double().norm().item() / scale for p in model.parameters()]
        model.zero_grad()
        yield {"what": name, "precision": amp + (", TF32" if amp + matmul == "fp32high" else ""),
               "loss, off by": abs(loss.item() / float(z["loss"]) - 1),
               "gradient norm, off by": abs(math.hypot(*norms) / float(z["grad_total_norm"]) - 1)}


def numbers(small):
    """HOG against the CPU's, and two models against the golden figures of the release."""
    hog, images = HOG(), torch.randn(4, 3, 224, 224)
    want = hog(images)
    for form in ("eager", "compiled"):
        on_device = HOG().to(DEVICE)
        if form == "compiled":
            on_device.compile()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            off = on_device(images.to(DEVICE)).cpu() - want
        yield {"what": f"HOG, {form}", "largest difference": off.abs().max().item(),
               "share over 1e-5": (off.abs() > 1e-5).float().mean().item()}
    if not small:
        yield from golden_rows("vit_b_pt", (2, 3, 224, 224), (2, 14, 14))
        yield from golden_rows("mvitv2_s_pt", (2, 3, 16, 224, 224), (2, 8, 14, 14))


# --------------------------------------------------------------------------------------- the speed

def one_step(name, small, compiled=False, places=(), amp="auto"):
    """A row: time, memory and use of the GPU by a pre-training step on random input.

    places: of bench.PLAIN, whose plain form is taken.
    """
    recipe, batch = next(r for r in pretrain.RECIPES.values() if r.model == name), 2
    if not small:
        batch = bench.BATCH[name][GPU]
    x_shape = (1, 3, *[recipe.num_frames] * models.takes_clips(name), *recipe.image_size)
    flops = 6 * batch * count_flops(models.build_maskfeat(vars(recipe)), x_shape)["macs"]
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    backend = "aot_eager" if small else "inductor"
    step = bench.plainly(bench.make_step(recipe, batch, amp, backend if compiled else None), places)
    start = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - start
    seconds = seconds_of(step, 3 if small else 15)
    return {"step": name, "form": "compiled" if compiled else "eager",
            "plain": ", ".join(form for _, form in places), "precision": amp, "batch": batch,
            "first step, s": first, "step, ms": 1e3 * seconds, "samples/s": batch / seconds,
            "peak, GiB": engine.peak_memory(DEVICE),
            "share of a product's rate": flops / seconds / product_rate(small)}


def steps(name, small):
    """The recipe's step, eager and compiled."""
    name = {"v": "vit_tiny", "m": "mvit_nano"}[name[0]] if small else name
    for compiled in (False, True):
        yield one_step(name, small, compiled)


def hog_alone(small):
    """What HOG takes, beside a step of 8 clips (8 frames each) or 64 images."""
    for compiled in (False, True):
        images, hog = torch.randn(2 if small else 64, 3, 224, 224, device=DEVICE), HOG().to(DEVICE)
        if compiled:
            hog.compile(backend="aot_eager" if small else "inductor")
        yield {"HOG": f"{len(images)} images of 224", "form": "compiled" if compiled else "eager",
               "ms": 1e3 * seconds_of(lambda hog=hog, images=images: hog(images), 10)}


def forms(small):
    """MViTv2-S with one hot path after the other in its plain form (tests/plain.py)."""
    attention, pool = (bench.mvit, "attention"), (bench.mvit.MultiScaleAttention, "pool")
    for places in [attention], [pool]:
        for compiled in (False,) if small else (False, True):
            torch._dynamo.reset()
            yield one_step("mvit_nano" if small else "mvitv2_s", small, compiled, places)


def fp16(small):
    """A step in fp16 with a gradient scaler."""
    yield one_step("mvit_nano" if small else "mvitv2_s", small, amp="fp16")


def make_videos(folder, number, width, height, frames):
    path = Path(folder, "train", "noise")
    path.mkdir(parents=True)
    for i in range(number):
        synthetic.write_video(path / f"{i}.mp4", bench.draw_noise(width, height, frames))
    return layouts.find_samples(folder, "train")


def loader(small):
    """Clips per second that processes read from files of 340x256 and 10 s."""
    with tempfile.TemporaryDirectory() as folder:
        samples = make_videos(folder, 2 if small else 16, 340, 256, 60 if small else 300)
        draw = functools.partial(masking.draw_mask, "cube", (8, 14, 14), 0.4)
        dataset = data.PretrainDataset(samples, (224, 224), 16, 4, draw)
        for workers in [1] if small else [8, 16]:
            keys = [[(0, i % len(samples)) for i in range(8)]] * (2 if small else 64)
            batches = iter(data.make_loader(dataset, keys, workers, pin_memory=GPU))
            next(batches)
            start = time.perf_counter()
            count = sum(len(batch["x"]) for batch in batches)
            yield {"loader": "16x4 clips of 340x256", "processes": workers,
                   "clips/s": count / (time.perf_counter() - start)}


# -------------------------------------------------------------------------------------- whole runs

def script(name, *flags, kill_at=None):
    """Run a script of the project in the current folder. Returns (seconds, its output)."""
    start, log = time.perf_counter(), Path(flags[flags.index("--out") + 1], "log.jsonl")
    with open("output", "w") as output:
        run = subprocess.Popen([sys.executable, str(ROOT / name), *map(str, flags)],
                               stdout=output, stderr=subprocess.STDOUT)
        while run.poll() is None:
            time.sleep(0.1)
            if kill_at and log.exists() and log.read_text().count("\n") >= kill_at:
                run.send_signal(signal.SIGKILL)
    text = Path("output").read_text()
    if run.returncode and not kill_at:
        raise RuntimeError(f"{name} {' '.join(map(str, flags))}: {text[-2000:]}")
    return time.perf_counter() - start, text


def runs(small):
    """Pre-training, compiled, whole and killed and resumed: the losses must agree."""
    flags = ["--log-every", 1, "--epochs", 2]
    if small:
        make_videos("videos", 6, 96, 72, 30)
        flags += ["--data", "videos", "--batch-size", 2]
    for amp in ("bf16", "fp16") if GPU else ("fp32",):
        whole, killed = f"out/{amp}", f"out/{amp}_killed"
        more = [*flags, "--amp", amp, *(["--compile", "on"] if GPU else [])]
        seconds, _ = script("pretrain.py", "--out", whole, *more)
        script("pretrain.py", "--out", killed, *more, "--save-minutes", 1e-4, kill_at=4)
        script("pretrain.py", "--out", killed, "--resume")
        logs = [[line for line in engine.read_log(f"{out}/log.jsonl")[0] if "loss" in line]
                for out in (whole, killed)]
        same = [a["loss"] == b["loss"] for a, b in zip(*logs)]
        yield {"run": f"pretrain.py --amp {amp}", "s": seconds, "steps": len(logs[0]),
               "skipped": logs[0][-1]["skipped"],
               "losses equal after kill and resume": f"{sum(same)} of {len(logs[0])}"}


def example(small):
    """Both README commands."""
    if small:
        return
    seconds, _ = script("pretrain.py", "--out", "out/pretrain")
    yield {"run": "pretrain.py", "s": seconds}
    seconds, text = script("finetune.py", "--out", "out/finetune")
    yield {"run": "finetune.py", "s": seconds, "says": text.strip().splitlines()[-1]}


PARTS = {"numbers": numbers, "mvitv2_s": functools.partial(steps, "mvitv2_s"),
         "vit_b": functools.partial(steps, "vit_b"), "hog": hog_alone, "runs": runs,
         "forms": forms, "peers": lambda small: peers.rows(1, small), "loader": loader,
         "example": example, "fp16": fp16, "vit_l": functools.partial(steps, "vit_l"),
         "mvitv2_l": functools.partial(steps, "mvitv2_l")}    # most valuable first


def run_part(part, small, path):
    """A part in this process, in a folder of its own. Writes its rows."""
    if GPU:
        torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = list(PARTS[part](small))
        os.chdir(ROOT)
    Path(path + ".tmp").write_text(json.dumps(rows))
    os.replace(path + ".tmp", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small models, on any machine")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", default="out/gpu_check", help="folder of the results")
    args = parser.parse_args()
    if not (GPU or args.small):
        raise ValueError("no GPU is found: use --small to try the parts on a CPU")
    out, failed = Path(args.out).resolve(), []
    out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if GPU else "CPU"
    pages = [f"{name}, torch {torch.__version__}, one matrix product: "
             f"{product_rate(args.small) / 1e12:.3g} TFLOP/s"]
    context = torch.multiprocessing.get_context("spawn")
    for part in args.parts:
        path, start = out / f"{part}.json", time.perf_counter()
        if not path.is_file():
            process = context.Process(target=run_part, args=(part, args.small, str(path)))
            process.start()
            process.join(LIMIT)
            process.kill()
        if not path.is_file():
            failed.append(part)
            continue
        rows = json.loads(path.read_text())
        seconds = time.perf_counter() - start
        pages.append(f"{part}, {seconds:.0f} s:\n\n{bench.table(rows)}" if rows else
                     f"{part}: left out")
        print(pages[-1] + "\n", flush=True)
        (out / "table.md").write_text("\n\n".join(pages) + "\n")
    if failed:
        raise ValueError(f"{', '.join(failed)} ended with an error, see above: the others are in "
                         f"{out / 'table.md'}")
    print(f"wrote {out / 'table.md'}")


if __name__ == "__main__":
    engine.run_main(main)
