"""How fast the pre-training step and HOG are, against the plain forms in tests/plain.py; no data needed.

    python bench.py                    # mvitv2_s on clips of 16x224x224, batch 1

Both sides alternate in one process, so that a busy machine slows both; the ratio of medians is what counts. Peak memory
is that of a process of its own (CPU), or of the allocator (GPU), beyond what the model and its input take.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import mvit
from convert import build_maskfeat
from engine import peak_memory
from hog import HOG

sys.path.append(str(Path(__file__).parent / "tests"))
from plain import plain_attention, plain_hog, plain_pool  # noqa: E402

OURS = mvit.attention, mvit.MultiScaleAttention.pool, HOG.forward
PLAIN = plain_attention, plain_pool, lambda self, images: plain_hog(images)


def use(forms):
    mvit.attention, mvit.MultiScaleAttention.pool, HOG.forward = forms


def make_step(model, device):
    """A function that does one forward and backward pass at batch 1."""
    recipe = dict(model=model, target="hog", image_size=(224, 224), num_frames=16, output_stride=16, patch_size=16,
                  expand="mlp", drop_path=0.0, checkpointing=False, bins=9, cell=8, norm="l2", color="rgb",
                  gradient="sobel")
    net = build_maskfeat(recipe).to(device)
    video = model in mvit.MODELS
    x = torch.randn(1, 3, *([16] if video else []), 224, 224, device=device)
    mask = torch.rand(1, *([8] if video else []), 14, 14, device=device) < 0.4

    def step():
        loss, _ = net(x, mask)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        for p in net.parameters():
            p.grad = None
    return step


def alternate(function, rounds):
    """Seconds of `function` in our and in the plain forms, median over rounds after one for warm-up."""
    times = ([], [])
    for _ in range(rounds + 1):
        for forms, kept in ((OURS, times[0]), (PLAIN, times[1])):
            use(forms)
            start = time.perf_counter()
            function()
            kept.append(time.perf_counter() - start)
    use(OURS)
    return [sorted(kept[1:])[rounds // 2] for kept in times]


def memory_of_a_step(model, form):
    """GiB that a first step adds, measured in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--model", model, "--memory", form], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mvitv2_s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=("ours", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.memory:
        step = make_step(args.model, device)
        before = peak_memory(device)
        use(OURS if args.memory == "ours" else PLAIN)
        step()
        print(json.dumps(peak_memory(device) - before))
        return
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}\n{'':34}{'ours':>10}{'plain':>10}{'ratio':>8}")
    images, hog = torch.randn(16, 3, 224, 224), HOG()
    step = make_step(args.model, device)
    for label, unit, (ours, plain) in (
            ("HOG, 16 images of 224x224, CPU", "s", alternate(lambda: hog(images), 4 * args.rounds)),
            (f"{args.model} step, time", "s", alternate(step, args.rounds)),
            (f"{args.model} step, peak memory", "GiB", [memory_of_a_step(args.model, f) for f in ("ours", "plain")])):
        print(f"{label:34}{ours:10.3f}{plain:10.3f}{ours / plain:8.2f}  {unit}")


if __name__ == "__main__":
    main()
