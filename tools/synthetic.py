"""Small made-up data sets, for trying the code without a download. They are not part of the paper.

Clips: 6 patterns x 2 motions, 30 for training and 25 for validation of each class, 96x72, 30 fps,
36 to 48 frames. A shape of a pattern moves over an even ground under changing light. The contrast
is high: from clips of low contrast a short pre-training learns the mean histogram and no more.
Movies (--ava): 100 in AVA's layout, 160x120, with boxes and classes. The content depends on the
seed only.

    python -m tools.synthetic FOLDER [--ava] [--seed N]
"""
import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
VERSION, FPS, TURN = 2, 30, 2 * np.pi
SHAPES = ("circle", "square", "triangle")
PATTERNS = ("upright", "rising", "level", "falling", "checks", "rings")  # four stripes, two more
MOTIONS = ("left_right", "up_down")
CLIPS = {"train": 30, "val": 25}             # of each class
MOVIES = {"train": 80, "val": 20}
MOVIE_START, SECONDS = 901, (902, 903, 904)  # AVA's boxes begin at second 902
ACTIONS = ("move left and right", "move up and down", "turn round", "grow and shrink")
SHAPE_CLASS = 11                             # to 13: the shape, a class that is not evaluated


def make_dataset(folder, seed=0, print0=print, what="videos"):
    """Make {train,val}/<pattern>_<motion>/NNN.mp4 in the folder, or with what="movies"
    {annotations, videos} in the layout of AVA v2.2, unless it was made before. Returns the folder.

    Raises ValueError if the folder holds something else, OSError if the videos cannot be made.
    """
    path, mark = Path(folder).absolute(), f"synthetic {what}, version {VERSION}, seed {seed}\n"
    if not path.exists() or not any(path.iterdir()):
        print0(f"no --data: making {what} in {folder}, once")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{path.name}-unfinished-", dir=path.parent,
                                         ignore_cleanup_errors=True) as making:
            new = Path(making, "new")
            # In a child, since no video library may be loaded before the data workers fork.
            code = f"from tools import synthetic; synthetic.write_{what}({str(new)!r}, {seed})"
            if subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode:
                raise OSError(f"making {folder} failed; the reason is printed above")
            (new / "synthetic.txt").write_text(mark)
            with contextlib.suppress(OSError):              # another process was faster
                new.rename(path)
    else:
        print0(f"no --data: the {what} in {folder}")
    found = (path / "synthetic.txt").read_text() if (path / "synthetic.txt").is_file() else ""
    if found != mark:
        raise ValueError(f"{folder} holds {found.strip() or 'something else'}, not {mark.strip()}: "
                         "remove it, or name it with --data")
    return folder


def write_videos(folder, seed):
    jobs = [(folder, seed, split, f"{pattern}_{motion}", number) for split, count in CLIPS.items()
            for pattern, motion, number in itertools.product(PATTERNS, MOTIONS, range(count))]
    with ProcessPoolExecutor(min(os.cpu_count(), 8)) as pool:
        list(_bar(pool.map(_write_clip, *zip(*jobs)), jobs))


def _bar(results, jobs):
    return tqdm(results, "making", len(jobs), leave=False, unit="video", disable=None)


def _write_clip(folder, seed, split, name, number):
    path = Path(folder, split, name, f"{number:03d}.mp4")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, draw_clip(_generator(seed, split, name, number), name))


def write_movies(folder, seed):
    """Write the movies, a table of true and of predicted boxes, and AVA's other two files."""
    for name in ("annotations", "videos"):
        Path(folder, name).mkdir(parents=True)
    table = f"{folder}/annotations/ava_"
    for split, count in MOVIES.items():
        with ProcessPoolExecutor(min(os.cpu_count(), 8)) as pool:
            jobs = [(folder, seed, split, number) for number in range(count)]
            true_lines, found_lines = zip(*_bar(pool.map(_write_movie, *zip(*jobs)), jobs))
        Path(f"{table}{split}_v2.2.csv").write_text("".join(true_lines))
        Path(f"{table}{split}_predicted_boxes.csv").write_text("".join(found_lines))
        excluded = f"{split}_000,{SECONDS[-1]:04d}\n"
        Path(f"{table}{split}_excluded_timestamps_v2.2.csv").write_text(excluded)
    items = [f'item {{\n  name: "{name}"\n  id: {i}\n}}\n' for i, name in enumerate(ACTIONS, 1)]
    Path(f"{table}action_list_v2.2_for_activitynet_2019.pbtxt").write_text("".join(items))


def _write_movie(folder, seed, split, number):
    """Write a movie. Returns its lines of the tables of true and of predicted boxes."""
    name, rng = f"{split}_{number:03d}", _generator(seed, split, number, "ava")
    frames, truth = draw_movie(rng)
    write_video(Path(folder, "videos", f"{name}.mp4"), frames)
    true_lines, found_lines = "", ""
    for second, box, labels, person in truth:
        key = f"{name},{second:04d},{{}},{{}},{{}}\n".format
        true_lines += "".join(key(_csv(box), label, person) for label in labels)
        found_lines += "".join(key(*found) for found in _detections(rng, box, labels))
    return true_lines, found_lines


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
    """Draw a clip of one class, such as "rising_up_down". Returns (T, 72, 96, 3) uint8."""
    pattern, motion = name.split("_", 1)
    ground, colors = _draw_colors(rng)
    shape = dict(kind=SHAPES[rng.integers(3)], motion=MOTIONS.index(motion),
                 radius=rng.uniform(26, 36), amplitudes=np.array([16, 12, 0]),
                 paint=_draw_pattern(rng, pattern, colors), angle=rng.uniform(0, TURN),
                 center=(48, 36) + rng.uniform(-8, 8, 2), period=rng.uniform(36, 48),
                 phase=rng.uniform(0, TURN))
    light, phase = rng.uniform(0.05, 0.2), rng.uniform(0, TURN)
    light = 1 + light * np.sin(TURN * np.arange(rng.integers(36, 49)) / 40 + phase)
    return _render(ground, (72, 96), [shape], light)[0]


def draw_movie(rng):
    """Draw two or three shapes, each with one motion. Returns (T, 120, 160, 3) uint8, and a list of
    (second, box in fractions of the width and height, labels from 1, person)."""
    count, (ground, _) = rng.integers(2, 4), _draw_colors(rng)
    shapes = [dict(                                         # side by side, drawn in any order
        kind=SHAPES[rng.integers(3)], motion=rng.integers(4), amplitudes=np.array([13, 13, 0.35]),
        radius=rng.uniform(14, 19),
        center=(160 * (column + 0.5) / count + rng.uniform(-6, 6), 60 + rng.uniform(-28, 28)),
        angle=rng.uniform(0, TURN), turn=rng.choice([-1, 1]) * TURN / rng.uniform(50, 80),
        period=rng.uniform(24, 40), phase=rng.uniform(0, TURN),
        paint=_draw_pattern(rng, PATTERNS[rng.integers(4)], _draw_colors(rng)[1]))
        for column in rng.permutation(count)]
    light = [1] * FPS * (SECONDS[-1] + 1 - MOVIE_START)
    movie, boxes = _render(ground, (120, 160), shapes, light)
    labels = [(s["motion"] + 1, SHAPES.index(s["kind"]) + SHAPE_CLASS) for s in shapes]
    return movie, [(second, boxes[FPS * (second - MOVIE_START)][i], labels[i], i)
                   for second in SECONDS for i in range(count)]


def _render(ground, size, shapes, light):
    """(T, H, W, 3) uint8, and for each frame the boxes of the shapes in fractions."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    movie, boxes = [], [[] for _ in light]
    for t, brightness in enumerate(light):
        picture = np.broadcast_to(ground, (height, width, 3))
        for s in shapes:
            right, down, larger = s["amplitudes"] * np.sin(TURN * t / s["period"] + s["phase"])
            u = x - s["center"][0] - (s["motion"] == 0) * right
            v = y - s["center"][1] - (s["motion"] == 1) * down
            r = s["radius"] * (1 + (s["motion"] == 3) * larger)
            turn = (s["motion"] == 2) * s["turn"] * t if "turn" in s else 0
            inside = _inside(s["kind"], *_rotate(u, v, s["angle"] + turn), r)
            u, v = _rotate(u * s["radius"] / r, v * s["radius"] / r, turn)
            picture = picture + (s["paint"](u, v) - picture) * inside    # moves with the shape
            rows, columns = np.nonzero(inside[..., 0] > 0.5)
            corners = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            boxes[t].append(corners / (width, height, width, height))
        movie.append(np.clip(picture * brightness, 0, 255).round().astype(np.uint8))
    return np.stack(movie), boxes


def _draw_colors(rng):
    """The color of an even ground, of a middle tone, and a dark and a bright color for a shape."""
    return rng.uniform(70, 170, 3), (rng.uniform(10, 110, 3), rng.uniform(140, 250, 3))


def _draw_pattern(rng, pattern, colors):
    """A function that paints points u, v from the center of a shape: (H, W, 3)."""
    length, phase = rng.uniform(8, 12), rng.uniform(0, TURN)
    tilt = np.deg2rad(rng.uniform(-12, 12) + 45 * (PATTERNS[:4].index(pattern)
                                                   if pattern in PATTERNS[:4] else 0))

    def paint(u, v):
        across, along = _rotate(u, v, tilt)
        if pattern == "rings":
            wave = np.sin(TURN * np.hypot(u, v) / length + phase)
        elif pattern == "checks":
            wave = 2 * np.sin(TURN * across / length + phase) * np.sin(TURN * along / length)
        else:
            wave = np.sin(TURN * across / length + phase)
        return colors[0] + (colors[1] - colors[0]) * np.clip(0.5 + 0.7 * wave, 0, 1)[..., None]
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
    import engine  # not above: it loads torch, which the child above does without

    engine.run_main(main)
