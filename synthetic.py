"""A small made-up video data set, for trying the code without downloading anything.

Striped shapes move over a background of striped boxes and discs, under changing light: clean edges at every angle, so
that HOG has something to say; one frame does not tell the motion. Not part of the paper.
240 training and 60 validation clips of 12 classes (3 shapes x 4 motions), 128x96, 30 fps, 48 to 64 frames, H.264.

    python synthetic.py FOLDER [--seed N]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

WIDTH, HEIGHT, FPS = 128, 96, 30
MARGIN = 8                       # pixels that the background may move
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left_right", "up_down", "rotating", "growing")
CLIPS = {"train": 20, "val": 5}  # per class
MARK = "synthetic.txt"           # written last; says that the folder is complete, and of which seed


def make_dataset(folder, seed=0):
    """Makes folder/{train,val}/<shape>_<motion>/NNN.mp4 unless it is there; returns the folder.

    The content depends on the seed only. It is made beside the folder and moved there when complete, by child
    processes, so that the caller loads no video library before its data workers fork.
    Raises ValueError if the folder holds something else.
    """
    folder, mark = Path(folder), f"synthetic videos, version 1, seed {seed}\n"
    if _is_complete(folder, mark):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
    parts = min(os.cpu_count() or 1, 8)
    children = []
    try:
        for part in range(parts):
            command = [sys.executable, __file__, making, "--seed", str(seed), "--part", str(part), str(parts)]
            children.append(subprocess.Popen(command))
        if any([child.wait() for child in children]):
            raise OSError(f"making the synthetic videos for {folder} failed; the reason is printed above")
        Path(making, MARK).write_text(mark)
        os.chmod(making, 0o755)  # mkdtemp lets in the owner only
        try:
            os.rename(making, folder)
        except OSError:  # another process was faster
            if not _is_complete(folder, mark):
                raise
    finally:
        for child in children:
            child.kill()
            child.wait()
        shutil.rmtree(making, ignore_errors=True)  # already gone if all went well
    return folder


def _is_complete(folder, mark):
    """Whether the data set is there; False if there is nothing. Raises ValueError if there is something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MARK).is_file() or (folder / MARK).read_text() != mark:
        raise ValueError(f"{folder} holds something else than {mark.strip()}; name another folder or remove it")
    return True


def make_part(folder, seed, part, parts):
    """Writes every parts-th clip, beginning with number `part`."""
    names = [(split, f"{shape}_{motion}", number) for split, count in CLIPS.items()
             for shape in SHAPES for motion in MOTIONS for number in range(count)]
    for split, name, number in names[part::parts]:
        path = Path(folder, split, name, f"{number:03d}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, draw_clip(np.random.default_rng(list(f"{seed} {split} {name} {number}".encode())), name))


def draw_clip(rng, name):
    """Draws a clip of one class, e.g. "circle_up_down": (T, HEIGHT, WIDTH, 3) uint8."""
    shape, motion = name.split("_", 1)
    frames = int(rng.integers(48, 65))
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    texture = _random_texture(rng, 7, 12, [0.8, 0.35])
    dark = rng.uniform(0, 1) < 0.5  # the shape stands out against the background, either way
    back_colors = np.array([rng.uniform(10, 60, 3), rng.uniform(70, 130, 3)])
    shape_colors = np.array([rng.uniform(140, 180, 3), rng.uniform(200, 250, 3)])
    if dark:
        back_colors, shape_colors = shape_colors, back_colors
    background = _draw_background(rng, back_colors)
    drift = rng.uniform(-MARGIN / 64, MARGIN / 64, 2)     # pixels per frame
    radius, angle = rng.uniform(15, 23), rng.uniform(0, 2 * np.pi)
    center = np.array([WIDTH, HEIGHT]) / 2 + rng.uniform(-8, 8, 2)
    period, phase = rng.uniform(36, 56), rng.uniform(0, 2 * np.pi)
    light_angle, light_period, light_phase = rng.uniform(0, 2 * np.pi), rng.uniform(60, 120), rng.uniform(0, 2 * np.pi)
    slope = ((x - WIDTH / 2) * np.cos(light_angle) + (y - HEIGHT / 2) * np.sin(light_angle)) / WIDTH
    turn = rng.choice([-1, 1]) * 2 * np.pi / rng.uniform(40, 70)
    clip = np.empty((frames, HEIGHT, WIDTH, 3), np.uint8)
    for t in range(frames):
        swing = np.sin(2 * np.pi * t / period + phase)
        cx = center[0] + (34 * swing if motion == "left_right" else 0)
        cy = center[1] + (22 * swing if motion == "up_down" else 0)
        r = radius * (1 + 0.45 * swing if motion == "growing" else 1)
        a = angle + (turn * t if motion == "rotating" else 0)
        u = (x - cx) * np.cos(a) + (y - cy) * np.sin(a)   # the shape's own axes: its texture moves with it
        v = (y - cy) * np.cos(a) - (x - cx) * np.sin(a)
        inside = np.clip(0.5 - _distance(shape, u, v, r), 0, 1)[..., None]
        left, top = (MARGIN + drift * t).round().astype(int)
        back = background[top:top + HEIGHT, left:left + WIDTH]
        front = _paint(texture, u * radius / r, v * radius / r, shape_colors)
        light = 1 + 0.25 * np.sin(2 * np.pi * t / light_period + light_phase) * (0.7 + 0.6 * slope)
        clip[t] = np.clip((back + (front - back) * inside) * light[..., None], 0, 255).round()
    return clip


def _draw_background(rng, colors):
    """Striped boxes and discs lying on one another: (HEIGHT, WIDTH, 3) plus MARGIN on all sides."""
    y, x = np.mgrid[:HEIGHT + 2 * MARGIN, :WIDTH + 2 * MARGIN].astype(np.float32)
    picture = _paint(_random_texture(rng, 10, 16, [0.8]), x, y, colors)
    for _ in range(16):
        a, cx, cy = rng.uniform(0, np.pi), rng.uniform(0, x.shape[1]), rng.uniform(0, x.shape[0])
        u, v = (x - cx) * np.cos(a) + (y - cy) * np.sin(a), (y - cy) * np.cos(a) - (x - cx) * np.sin(a)
        inside = np.clip(0.5 - _distance(rng.choice(SHAPES[:2]), u, v * rng.uniform(0.5, 1), rng.uniform(14, 30)), 0, 1)
        stripes = _paint(_random_texture(rng, 10, 16, [0.8]), x, y, colors)
        picture = picture + (stripes - picture) * inside[..., None]
    return picture


def _random_texture(rng, shortest, longest, weights):
    """Waves of any direction: (direction in radians, wavelength in pixels, phase, weight) each."""
    return [(rng.uniform(0, np.pi), rng.uniform(shortest, longest), rng.uniform(0, 2 * np.pi), weight)
            for weight in weights]


def _paint(texture, x, y, colors):
    """Colours (H, W, 3) of a texture at the points x, y: a mix of two colours."""
    wave = sum(weight * np.sin(2 * np.pi * (x * np.cos(a) + y * np.sin(a)) / length + phase)
               for a, length, phase, weight in texture)
    share = np.clip(0.5 + 0.5 * wave, 0, 1)[..., None]
    return colors[0] + (colors[1] - colors[0]) * share


def _distance(shape, u, v, r):
    """Signed distance in pixels to the outline, negative inside; r is the circle's radius, the areas are alike."""
    if shape == "circle":
        return np.hypot(u, v) - r
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.89 * r
    sides = [u * np.cos(a) + v * np.sin(a) for a in (np.pi / 2, np.pi * 7 / 6, np.pi * 11 / 6)]
    return np.maximum.reduce(sides) - 0.78 * r


def write_video(path, frames):
    """Writes (T, H, W, 3) uint8 RGB as H.264. One thread: the bytes do not depend on the machine's cores."""
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the synthetic video data set.")
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=int, nargs=2, metavar=("NUMBER", "OF"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        make_part(options.folder, options.seed, *options.part)
    else:
        print(make_dataset(options.folder, options.seed))
