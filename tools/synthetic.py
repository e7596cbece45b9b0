"""A small made-up video data set, for trying the code without downloading anything.

Striped shapes move over a background of striped boxes and discs, under changing light: clean edges at every angle, so
that HOG has something to say; one frame does not tell the motion. Not part of the paper.
240 training and 60 validation clips of 12 classes (3 shapes x 4 motions), 128x96, 30 fps, 48 to 64 frames, H.264.
For action detection (--ava), in AVA's layout: 100 movies of 160x120 with two or three such shapes each, their boxes and
classes, and noisy "detected" boxes.

    python synthetic.py FOLDER [--ava] [--seed N]
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

MOVIES = {"train": 80, "val": 20}
MOVIE_WIDTH, MOVIE_HEIGHT = 160, 120
MOVIE_START, SECONDS = 901, (902, 903, 904)   # AVA's first second with boxes is 902: each film begins one before
ACTIONS = ("move left and right", "move up and down", "turn round", "grow and shrink")   # classes 1 to 4
SHAPE_CLASS = 11                 # to 13: the shape is a second class of every box, one of those that are not evaluated


def make_dataset(folder, seed=0, print0=print):
    """Makes folder/{train,val}/<shape>_<motion>/NNN.mp4 unless it is there; returns the folder.

    The content depends on the seed only. It is made beside the folder and moved there when complete, by child
    processes, so that the caller loads no video library before its data workers fork.
    Raises ValueError if the folder holds something else.
    """
    return _make(folder, seed, f"synthetic videos, version 1, seed {seed}\n", print0)


def make_ava_dataset(folder, seed=0, print0=print):
    """Makes folder/{annotations,videos}, laid out as AVA v2.2, as make_dataset does."""
    return _make(folder, seed, f"synthetic movies, version 1, seed {seed}\n", print0, "--ava")


def _make(name, seed, mark, print0, *kind):
    folder = Path(name)
    if _is_complete(folder, mark):
        return name
    print0(f"no --data: making videos in {name}, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
    parts = min(os.cpu_count() or 1, 8)
    children = []
    try:
        for part in range(parts):
            command = [sys.executable, __file__, making, *kind, "--seed", str(seed), "--part", str(part), str(parts)]
            children.append(subprocess.Popen(command))
        if any([child.wait() for child in children]):
            raise OSError(f"making the synthetic videos for {folder} failed; the reason is printed above")
        if kind:
            _join_tables(Path(making, "annotations"))
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
    return name


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


def make_ava_part(folder, seed, part, parts):
    """Writes every parts-th movie, beginning with number `part`, and the lines of the tables that belong to it."""
    names = [(split, number) for split, count in MOVIES.items() for number in range(count)]
    for path in (Path(folder, "videos"), Path(folder, "annotations")):
        path.mkdir(parents=True, exist_ok=True)
    for split, number in names[part::parts]:
        rng, name = np.random.default_rng(list(f"{seed} {split} {number} ava".encode())), f"{split}_{number:03d}"
        frames, truth = draw_movie(rng)
        write_video(Path(folder, "videos", name + ".mp4"), frames)
        lines = {"v2.2": [], "predicted_boxes": []}
        for second, box, labels, person in truth:
            where = f"{name},{second:04d},"
            lines["v2.2"] += [where + _csv(box) + f",{label},{person}" for label in labels]
            found = np.array(box) + rng.normal(0, 0.03, 4) * np.tile([box[2] - box[0], box[3] - box[1]], 2)
            if rng.uniform() < 0.05:                                 # missed: a box of the background instead
                found, labels = _somewhere(rng), ()
            labels = labels if _iou(box, found) >= 0.9 else ("",)    # AVA's own lists do the same
            score = rng.uniform(0.82, 1)
            lines["predicted_boxes"] += [where + _csv(found) + f",{label},{score:.6f}" for label in labels]
            if rng.uniform() < 0.2:                                  # another of the background, mostly of low score
                lines["predicted_boxes"].append(where + _csv(_somewhere(rng)) + f",,{rng.uniform(0.3, 0.85):.6f}")
        for table, content in lines.items():
            Path(folder, "annotations", f"{name}.{table}").write_text("".join(line + "\n" for line in content))


def _join_tables(folder):
    """One csv per table and split out of those of the movies, in their order; the list of actions, the exclusions."""
    for table in ("v2.2", "predicted_boxes"):
        for split in MOVIES:
            parts = sorted(folder.glob(f"{split}_*.{table}"))
            (folder / f"ava_{split}_{table}.csv").write_text("".join(part.read_text() for part in parts))
            for part in parts:
                part.unlink()
    for split in MOVIES:
        (folder / f"ava_{split}_excluded_timestamps_v2.2.csv").write_text(f"{split}_000,{SECONDS[-1]:04d}\n")
    items = "".join(f'item {{\n  name: "{name}"\n  id: {i}\n}}\n' for i, name in enumerate(ACTIONS, 1))
    (folder / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text(items)


def _csv(box):
    return ",".join(f"{min(max(v, 0), 1):.3f}" for v in box)


def _somewhere(rng):
    w, h = rng.uniform(0.15, 0.3, 2)
    x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
    return x, y, x + w, y + h


def _iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def draw_movie(rng):
    """Two or three shapes, each keeping to one motion.

    Returns (T, MOVIE_HEIGHT, MOVIE_WIDTH, 3) uint8, and a list of (second, box, labels, person) with the box in
    fractions of width and height, labels from 1.
    """
    dark, count = rng.uniform() < 0.5, int(rng.integers(2, 4))
    back_colors = np.array([rng.uniform(10, 60, 3), rng.uniform(70, 130, 3)])
    colors = np.array([rng.uniform(140, 180, 3), rng.uniform(200, 250, 3)])
    if dark:
        back_colors, colors = colors, back_colors
    background = _draw_background(rng, back_colors, MOVIE_HEIGHT, MOVIE_WIDTH)
    drift = rng.uniform(-MARGIN / 128, MARGIN / 128, 2)
    shapes = []
    for column in rng.permutation(count):                               # side by side, in any order of drawing
        shapes.append(dict(
            kind=int(rng.integers(3)), motion=int(rng.integers(4)), radius=rng.uniform(14, 19),
            x=MOVIE_WIDTH * (column + 0.5) / count + rng.uniform(-6, 6), y=MOVIE_HEIGHT / 2 + rng.uniform(-28, 28),
            angle=rng.uniform(0, 2 * np.pi), turn=rng.choice([-1, 1]) * 2 * np.pi / rng.uniform(50, 80),
            period=rng.uniform(24, 40), phase=rng.uniform(0, 2 * np.pi),
            texture=_random_texture(rng, 12, 20, [0.8, 0.35])))
    frames = FPS * (SECONDS[-1] + 1 - MOVIE_START)
    movie, truth = np.empty((frames, MOVIE_HEIGHT, MOVIE_WIDTH, 3), np.uint8), []
    for t in range(frames):
        left, top = (MARGIN + drift * t).round().astype(int)
        picture = background[top:top + MOVIE_HEIGHT, left:left + MOVIE_WIDTH].copy()
        second, rest = divmod(t, FPS)
        for person, s in enumerate(shapes):
            swing = np.sin(2 * np.pi * t / s["period"] + s["phase"])
            cx, cy = s["x"] + (s["motion"] == 0) * 13 * swing, s["y"] + (s["motion"] == 1) * 13 * swing
            a = s["angle"] + (s["motion"] == 2) * s["turn"] * t
            r = s["radius"] * (1 + (s["motion"] == 3) * 0.35 * swing)
            x1, y1 = max(int(cx - 1.6 * r) - 1, 0), max(int(cy - 1.6 * r) - 1, 0)
            y, x = np.mgrid[y1:min(int(cy + 1.6 * r) + 2, MOVIE_HEIGHT), x1:min(int(cx + 1.6 * r) + 2, MOVIE_WIDTH)]
            u, v = (x - cx) * np.cos(a) + (y - cy) * np.sin(a), (y - cy) * np.cos(a) - (x - cx) * np.sin(a)
            inside = np.clip(0.5 - _distance(SHAPES[s["kind"]], u, v, r), 0, 1)[..., None]
            front = _paint(s["texture"], u * s["radius"] / r, v * s["radius"] / r, colors)
            window = picture[y1:y1 + len(x), x1:x1 + x.shape[1]]
            window += (front - window) * inside
            if rest == 0 and second + MOVIE_START in SECONDS:
                rows, columns = np.nonzero(inside[..., 0] > 0.5)
                box = ((x1 + columns.min()) / MOVIE_WIDTH, (y1 + rows.min()) / MOVIE_HEIGHT,
                       (x1 + columns.max() + 1) / MOVIE_WIDTH, (y1 + rows.max() + 1) / MOVIE_HEIGHT)
                truth.append((second + MOVIE_START, box, (s["motion"] + 1, s["kind"] + SHAPE_CLASS), person))
        movie[t] = np.clip(picture, 0, 255).round()
    return movie, truth


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


def _draw_background(rng, colors, height=HEIGHT, width=WIDTH):
    """Striped boxes and discs lying on one another: (height, width, 3) plus MARGIN on all sides."""
    y, x = np.mgrid[:height + 2 * MARGIN, :width + 2 * MARGIN].astype(np.float32)
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
    parser.add_argument("--ava", action="store_true", help="movies with boxes, in AVA's layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=int, nargs=2, metavar=("NUMBER", "OF"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        (make_ava_part if options.ava else make_part)(options.folder, options.seed, *options.part)
    else:
        print((make_ava_dataset if options.ava else make_dataset)(options.folder, options.seed))
