"""Small made-up data sets, for trying the code without a download. They are not part of the paper.

Clips: 3 shapes x 4 motions, 20 for training and 5 for validation of each class, 128x96, 30 fps, 48
to 64 frames. Striped shapes move over a striped background under changing light. Movies (--ava):
100 in AVA's layout, 160x120, with boxes and classes. The content depends on the seed only.

    python -m tools.synthetic FOLDER [--ava] [--seed N]
"""
import argparse
import contextlib
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
FPS, MARGIN, TURN = 30, 8, 2 * np.pi         # MARGIN: pixels that the background may move
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left_right", "up_down", "rotating", "growing")
CLIPS, MOVIES = {"train": 20, "val": 5}, {"train": 80, "val": 20}  # clips of each class, all movies
MOVIE_START, SECONDS = 901, (902, 903, 904)  # AVA's boxes begin at second 902
ACTIONS = ("move left and right", "move up and down", "turn round", "grow and shrink")
SHAPE_CLASS = 11                             # to 13: the shape, a class that is not evaluated


def make_dataset(folder, seed=0, print0=print, what="videos"):
    """Make {train,val}/<shape>_<motion>/NNN.mp4 in the folder, or with what="movies" {annotations,
    videos} in the layout of AVA v2.2, unless it was made before. Returns the folder.

    Raises ValueError if the folder holds something else, OSError if the videos cannot be made.
    """
    path, mark = Path(folder).absolute(), f"synthetic {what}, version 1, seed {seed}\n"
    if not path.exists() or not any(path.iterdir()):
        print0(f"no --data: making {what} in {folder}, once")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as making:
            new = Path(making, "new")
            # In a child, since no video library may be loaded before the data workers fork.
            code = f"from tools import synthetic; synthetic.write_{what}({str(new)!r}, {seed})"
            if subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode:
                raise OSError(f"making {folder} failed; the reason is printed above")
            (new / "synthetic.txt").write_text(mark)
            with contextlib.suppress(OSError):              # another process was faster
                new.rename(path)
    if not (path / "synthetic.txt").is_file() or (path / "synthetic.txt").read_text() != mark:
        raise ValueError(f"{folder} holds something else than {mark.strip()}: "
                         "name another folder or remove it")
    return folder


def write_videos(folder, seed):
    for split, count in CLIPS.items():
        for shape, motion, number in itertools.product(SHAPES, MOTIONS, range(count)):
            name = f"{shape}_{motion}"
            path = Path(folder, split, name, f"{number:03d}.mp4")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, draw_clip(_generator(seed, split, name, number), name))


def write_movies(folder, seed):
    """Write the movies, a table of true and of predicted boxes, and AVA's other two files."""
    for name in ("annotations", "videos"):
        Path(folder, name).mkdir(parents=True)
    table = f"{folder}/annotations/ava_"
    for split, count in MOVIES.items():
        true_lines, found_lines = [], []
        for number in range(count):
            name, rng = f"{split}_{number:03d}", _generator(seed, split, number, "ava")
            frames, truth = draw_movie(rng)
            write_video(Path(folder, "videos", f"{name}.mp4"), frames)
            for second, box, labels, person in truth:
                key = f"{name},{second:04d},{{}},{{}},{{}}\n".format
                true_lines += [key(_csv(box), label, person) for label in labels]
                found_lines += [key(*found) for found in _detections(rng, box, labels)]
        Path(f"{table}{split}_v2.2.csv").write_text("".join(true_lines))
        Path(f"{table}{split}_predicted_boxes.csv").write_text("".join(found_lines))
        excluded = f"{split}_000,{SECONDS[-1]:04d}\n"
        Path(f"{table}{split}_excluded_timestamps_v2.2.csv").write_text(excluded)
    items = [f'item {{\n  name: "{name}"\n  id: {i}\n}}\n' for i, name in enumerate(ACTIONS, 1)]
    Path(f"{table}action_list_v2.2_for_activitynet_2019.pbtxt").write_text("".join(items))


def _detections(rng, box, labels):
    """The predicted boxes for a true box: noisy, sometimes missed or invented."""
    found = box + rng.normal(0, 0.03, 4) * np.tile(box[2:] - box[:2], 2)
    if rng.uniform() < 0.05:                                # missed: a box of the background
        found = _random_box(rng)
    shared = np.concatenate([np.maximum(box, found)[:2], np.minimum(box, found)[2:]])
    shared, *areas = (np.prod(np.maximum(b[2:] - b[:2], 0)) for b in (shared, box, found))
    labels = labels if shared / (sum(areas) - shared) >= 0.9 else ("",)  # as in AVA's own lists
    score = rng.uniform(0.82, 1)
    yield from ((_csv(found), label, f"{score:.6f}") for label in labels)
    if rng.uniform() < 0.2:                                 # invented: mostly of low score
        yield _csv(_random_box(rng)), "", f"{rng.uniform(0.3, 0.85):.6f}"


def _generator(*key):
    return np.random.default_rng(list(" ".join(map(str, key)).encode()))


def _csv(box):
    return ",".join(f"{v:.3f}" for v in np.clip(box, 0, 1))


def _random_box(rng):
    size = rng.uniform(0.15, 0.3, 2)
    corner = rng.uniform(0, 1 - size)
    return np.concatenate([corner, corner + size])


def draw_clip(rng, name):
    """Draw a clip of one class, such as "circle_up_down". Returns (T, 96, 128, 3) uint8."""
    kind, motion = name.split("_", 1)
    frames, paint = rng.integers(48, 65), _random_stripes(rng, 7, 12, [0.8, 0.35])
    background, colors = _draw_background(rng, rng.uniform() < 0.5, 96, 128)
    drift = rng.uniform(-MARGIN / 64, MARGIN / 64, 2)       # pixels per frame
    shape = dict(kind=kind, motion=MOTIONS.index(motion), amplitudes=np.array([34, 22, 0.45]),
                 paint=paint, radius=rng.uniform(15, 23), angle=rng.uniform(0, TURN),
                 center=(64, 48) + rng.uniform(-8, 8, 2), period=rng.uniform(36, 56),
                 phase=rng.uniform(0, TURN))
    angle, period, phase = rng.uniform(0, TURN), rng.uniform(60, 120), rng.uniform(0, TURN)
    shape["turn"] = rng.choice([-1, 1]) * TURN / rng.uniform(40, 70)
    y, x = np.mgrid[:96, :128].astype(np.float32)
    slope = 0.7 + 0.6 * (_rotate(x - 64, y - 48, angle)[0][..., None] / 128)
    light = [1 + 0.25 * np.sin(TURN * t / period + phase) * slope for t in range(frames)]
    return _render(background, drift, [shape], colors, light)[0]


def draw_movie(rng):
    """Draw two or three shapes, each with one motion. Returns (T, 120, 160, 3) uint8, and a list of
    (second, box in fractions of the width and height, labels from 1, person)."""
    dark, count = rng.uniform() < 0.5, rng.integers(2, 4)
    background, colors = _draw_background(rng, dark, 120, 160)
    drift = rng.uniform(-MARGIN / 128, MARGIN / 128, 2)
    shapes = [dict(                                         # side by side, drawn in any order
        kind=SHAPES[rng.integers(3)], motion=rng.integers(4), amplitudes=np.array([13, 13, 0.35]),
        radius=rng.uniform(14, 19),
        center=(160 * (column + 0.5) / count + rng.uniform(-6, 6), 60 + rng.uniform(-28, 28)),
        angle=rng.uniform(0, TURN), turn=rng.choice([-1, 1]) * TURN / rng.uniform(50, 80),
        period=rng.uniform(24, 40), phase=rng.uniform(0, TURN),
        paint=_random_stripes(rng, 12, 20, [0.8, 0.35])) for column in rng.permutation(count)]
    light = [1] * FPS * (SECONDS[-1] + 1 - MOVIE_START)
    movie, boxes = _render(background, drift, shapes, colors, light)
    labels = [(s["motion"] + 1, SHAPES.index(s["kind"]) + SHAPE_CLASS) for s in shapes]
    return movie, [(second, boxes[FPS * (second - MOVIE_START)][i], labels[i], i)
                   for second in SECONDS for i in range(count)]


def _render(background, drift, shapes, colors, light):
    """(T, H, W, 3) uint8, and for each frame the boxes of the shapes in fractions."""
    height, width = (side - 2 * MARGIN for side in background.shape[:2])
    y, x = np.mgrid[:height, :width]
    movie, boxes = [], [[] for _ in light]
    for t, brightness in enumerate(light):
        left, top = (MARGIN + drift * t).round().astype(int)
        picture = background[top:top + height, left:left + width].copy()
        for s in shapes:
            right, down, larger = s["amplitudes"] * np.sin(TURN * t / s["period"] + s["phase"])
            cx = s["center"][0] + (s["motion"] == 0) * right
            cy = s["center"][1] + (s["motion"] == 1) * down
            r = s["radius"] * (1 + (s["motion"] == 3) * larger)
            u, v = _rotate(x - cx, y - cy, s["angle"] + (s["motion"] == 2) * s["turn"] * t)
            inside = _inside(s["kind"], u, v, r)            # the texture moves with the shape
            front = s["paint"](u * s["radius"] / r, v * s["radius"] / r, *colors)
            picture += (front - picture) * inside
            rows, columns = np.nonzero(inside[..., 0] > 0.5)
            corners = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            boxes[t].append(corners / (width, height, width, height))
        movie.append(np.clip(picture * brightness, 0, 255).round().astype(np.uint8))
    return np.stack(movie), boxes


def _draw_background(rng, dark, height, width):
    """Overlapping striped boxes and discs: (height, width, 3), plus MARGIN on all sides. Returns
    two colors for the shapes as well. dark: the shapes are darker."""
    low = np.array([rng.uniform(10, 60, 3), rng.uniform(70, 130, 3)])
    high = np.array([rng.uniform(140, 180, 3), rng.uniform(200, 250, 3)])
    colors, shape_colors = (high, low) if dark else (low, high)
    y, x = np.mgrid[:height + 2 * MARGIN, :width + 2 * MARGIN].astype(np.float32)
    picture = _random_stripes(rng, 10, 16, [0.8])(x, y, *colors)
    for _ in range(16):
        a, cx, cy = (rng.uniform(0, end) for end in (np.pi, x.shape[1], x.shape[0]))
        u, v = _rotate(x - cx, y - cy, a)
        shape, flatness = rng.choice(SHAPES[:2]), rng.uniform(0.5, 1)
        inside = _inside(shape, u, v * flatness, rng.uniform(14, 30))
        stripes = _random_stripes(rng, 10, 16, [0.8])(x, y, *colors)
        picture = picture + (stripes - picture) * inside
    return picture, shape_colors


def _random_stripes(rng, shortest, longest, weights):
    """A function that paints waves of any direction: points x, y -> (H, W, 3), a mix of colors."""
    waves = [(rng.uniform(0, np.pi), rng.uniform(shortest, longest), rng.uniform(0, TURN), weight)
             for weight in weights]

    def paint(x, y, one, other):
        wave = sum(weight * np.sin(TURN * (x * np.cos(a) + y * np.sin(a)) / length + phase)
                   for a, length, phase, weight in waves)
        return one + (other - one) * np.clip(0.5 + 0.5 * wave, 0, 1)[..., None]
    return paint


def _rotate(x, y, angle):
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _inside(shape, u, v, r):
    """1 inside a shape, 0 outside, smooth at its outline. r is a circle's radius. (H, W, 1)."""
    if shape == "circle":
        distance = np.hypot(u, v) - r
    elif shape == "square":
        distance = np.maximum(abs(u), abs(v)) - 0.89 * r
    else:
        sides = [u * np.cos(a) + v * np.sin(a) for a in (np.pi / 2, np.pi * 7 / 6, np.pi * 11 / 6)]
        distance = np.maximum.reduce(sides) - 0.78 * r
    return np.clip(0.5 - distance, 0, 1)[..., None]


def write_video(path, frames):
    """Write (T, H, W, 3) uint8 RGB as H.264. With one thread the bytes are the same anywhere."""
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", FPS, options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--ava", action="store_true", help="movies with boxes, in AVA's layout")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_dataset(args.folder, args.seed, what="movies" if args.ava else "videos")


if __name__ == "__main__":
    main()
