"""How fast we are beside what a user would take instead, where that is installed.

    python -m tools.peers [--rounds 3] [--small]

Peers: torchvision, timm, scikit-image, decord, torchcodec. None is a requirement, and one that is
missing is named and left out. Each measurement runs in a process of its own, since what a
process did before changes its speed. Both sides take turns, and the ratio of a round is ours to
theirs.
"""
import argparse
import importlib
import importlib.metadata
import random
import statistics
import tempfile

import engine

import torch

import models
import video
from hog import HOG
from tools import bench, synthetic

GPU, DEVICE = bench.GPU, bench.DEVICE


def trainer(model, *shape):
    """Forward and backward pass of a classifier."""
    model, x = model.to(DEVICE).train(), torch.randn(shape, device=DEVICE)

    def step():
        with bench.AUTOCAST():
            loss = model(x).float().logsumexp(1).mean()
        loss.backward()
        model.zero_grad()
        if GPU:
            torch.cuda.synchronize()
    return step


def vit_b(package, small):
    shape = (64 if GPU else 1 if small else 4), 3, 224, 224
    if package == "timm":
        import timm
        return trainer(timm.create_model("vit_base_patch16_224"), *shape)
    return trainer(models.MODELS["vit_b"](pool="cls"), *shape)


def mvitv2_s(package, small):
    shape = (8 if GPU else 1), 3, 16, 224, 224
    if package == "torchvision":
        from torchvision.models.video import mvit_v2_s
        return trainer(mvit_v2_s(), *shape)
    return trainer(models.MODELS["mvitv2_s"](expand="attn", pool="cls"), *shape)


def hog_16(package, small):
    """Of 16 color images of 224x224."""
    images = torch.rand(16, 3, 224, 224)
    if package == "skimage":
        from skimage.feature import hog
        pictures = images.permute(0, 2, 3, 1).numpy()
        return lambda: [hog(picture, 9, (8, 8), (1, 1), channel_axis=-1) for picture in pictures]
    hog, images = HOG().to(DEVICE), images.to(DEVICE)
    return lambda: hog(images).sum().item()


def clip(package, small):
    """A random 16x4 clip of a file of 340x256 and 10 s, on one thread."""
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    path = f"{folder.name}/file.mp4"
    synthetic.write_video(path, bench.draw_noise(340, 256, 300))

    def read(folder=folder):                                  # kept as long as the function
        start = random.randrange(300 - 61)
        if package == "decord":
            reader = decord.VideoReader(path, num_threads=1)
            return reader.get_batch(range(start, start + 61, 4)).asnumpy()
        if package == "torchcodec":
            decoder = torchcodec.decoders.VideoDecoder(path, num_ffmpeg_threads=1)
            return decoder.get_frames_in_range(start, start + 61, 4)
        return video.read_clip(path, position=random.random())
    if package == "decord":
        import decord
    if package == "torchcodec":
        import torchcodec.decoders
    return read


PAIRS = [(vit_b, "timm", "timm"), (mvitv2_s, "torchvision", "torchvision"),
         (hog_16, "skimage", "scikit-image"), (clip, "decord", "decord"),
         (clip, "torchcodec", "torchcodec")]


def time_of(what, package, small):
    """ms of a call, the median of five after a warm-up."""
    side = what(package, small)
    side()
    times, = bench.take_turns([side], 1 if small else 5)
    return statistics.median(times)


def apart(*arguments):
    """time_of in a process of its own."""
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(time_of, arguments)


def rows(rounds=3, small=False):
    """A dict for each peer."""
    for what, package, name in PAIRS:
        row = {"what": what.__name__, "peer": name}
        try:
            importlib.import_module(package)
            turns = [(apart(what, "", small), apart(what, package, small)) for _ in range(rounds)]
        except Exception as error:                            # a broken installation is no peer
            yield row | {"note": f"does not run here: {str(error).splitlines()[0][:60]}"}
            continue
        ours, theirs = map(statistics.median, zip(*turns))
        ratios = [a / b for a, b in turns]
        yield row | {"version": importlib.metadata.version(name), "ours, ms": ours,
                     "theirs, ms": theirs, "ratio": statistics.median(ratios),
                     "from": min(ratios), "to": max(ratios)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="smaller and shorter")
    args = parser.parse_args()
    engine.check_numbers(args, positive=("rounds",))
    print(f"{bench.machine()}, rounds: {args.rounds}\n")
    print(bench.table(list(rows(args.rounds, args.small))))


if __name__ == "__main__":
    engine.run_main(main)
