"""Small made-up data sets, for trying the code without a download. They are not part of the paper.

Striped shapes move over a striped background under changing light: clean edges at every angle for
HOG, and no single frame tells the motion. Clips: 3 shapes x 4 motions, 20 for training and 5 for
validation of each class, 128x96, 30 fps, 48 to 64 frames. Movies (--ava): 100 in AVA's layout,
160x120, with two or three shapes, their boxes and classes, and noisy "detected" boxes.
The content depends on the seed only.

    python -m tools.synthetic FOLDER [--ava] [--seed N]
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT, FPS = 128, 96, 30
MARGIN = 8                       # pixels that the background may move
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left_right", "up_down", "rotating", "growing")
CLIPS = {"train": 20, "val": 5}  # per class
MARK = "synthetic.txt"           # written last: the folder is complete, and of which seed

MOVIES = {"train": 80, "val": 20}
MOVIE_WIDTH, MOVIE_HEIGHT = 160, 120
MOVIE_START, SECONDS = 901, (902, 903, 904)  # AVA's boxes begin at second 902
ACTIONS = ("move left and right", "move up and down", "turn round", "grow and shrink")
SHAPE_CLASS = 11                 # to 13: the shape, as a second class that is not evaluated


def make_dataset(folder, seed=0, print0=print):
    """Make folder/{train,val}/<shape>_<motion>/NNN.mp4 unless it exists. Returns the folder.

    Raises ValueError if the folder holds something else, OSError if the videos cannot be made.
    """
    return _make(folder, seed, "videos", print0)


def make_ava_dataset(folder, seed=0, print0=print):
    """Make folder/{annotations,videos} in the layout of AVA v2.2, as make_dataset does."""
    return _make(folder, seed, "movies", print0, "--ava")


def _make(name, seed, what, print0, *flags):
    """Child processes make the data beside the folder, and it is moved there when it is complete.

    Thus the caller loads no video library before its data workers fork.
    """
    from engine import usable_cores  # here, since the children need no torch
    folder, mark = Path(name), f"synthetic {what}, version 1, seed {seed}\n"
    if _is_complete(folder, mark):
        return name
    print0(f"no --data: making {what} in {name}, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = os.path.abspath(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    command = [sys.executable, "-m", "tools.synthetic", making, *flags, "--seed", str(seed)]
    parts, children = min(usable_cores(), 8), []
    try:
        for part in range(parts):
            children.append(subprocess.Popen([*command, "--part", str(part), str(parts)], cwd=ROOT))
        if any([child.wait() for child in children]):
            raise OSError(f"making the {what} for {folder} failed; the reason is printed above")
        if what == "movies":
            _join_tables(Path(making, "annotations"))
        Path(making, MARK).write_text(mark)
        os.chmod(making, 0o755)  # mkdtemp gives access to the owner only
        try:
            os.rename(making, folder)
        except OSError:  # another process was faster
            if not _is_complete(folder, mark):
                raise
    finally:
        for child in children:
            child.kill()
            child.wait()
        shutil.rmtree(making, ignore_errors=True)
    return name


def _is_complete(folder, mark):
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MARK).is_file() or (folder / MARK).read_text() != mark:
        raise ValueError(f"{folder} holds something else than {mark.strip()}: "
                         "name another folder or remove it")
    return True


def make_part(folder, seed, part, parts):
    """Write every parts-th clip, starting with number `part`."""
    names = [(split, f"{shape}_{motion}", number) for split, count in CLIPS.items()
             for shape in SHAPES for motion in MOTIONS for number in range(count)]
    for split, name, number in names[part::parts]:
        path = Path(folder, split, name, f"{number:03d}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, draw_clip(_generator(seed, split, name, number), name))


def make_ava_part(folder, seed, part, parts):
    """Write every parts-th movie, starting with number `part`, and its lines of the tables."""
    names = [(split, number) for split, count in MOVIES.items() for number in range(count)]
    Path(folder, "videos").mkdir(parents=True, exist_ok=True)
    Path(folder, "annotations").mkdir(exist_ok=True)
    for split, number in names[part::parts]:
        name, rng = f"{split}_{number:03d}", _generator(seed, split, number, "ava")
        frames, truth = draw_movie(rng)
        write_video(Path(folder, "videos", f"{name}.mp4"), frames)
        true_lines = found_lines = ""
        for second, box, labels, person in truth:
            key = f"{name},{second:04d},"
            true_lines += "".join(f"{key}{_csv(box)},{label},{person}\n" for label in labels)
            found_lines += "".join(_detections(rng, key, box, labels))
        Path(folder, "annotations", f"{name}.v2.2").write_text(true_lines)
        Path(folder, "annotations", f"{name}.predicted_boxes").write_text(found_lines)


def _generator(*key):
    return np.random.default_rng(list(" ".join(map(str, key)).encode()))


def _detections(rng, key, box, labels):
    """Lines of the predicted boxes for one true box: noisy, sometimes missed or invented."""
    size = np.tile([box[2] - box[0], box[3] - box[1]], 2)
    found = np.array(box) + rng.normal(0, 0.03, 4) * size
    if rng.uniform() < 0.05:                                # missed: a box of the background
        found, labels = _random_box(rng), ()
    labels = labels if _iou(box, found) >= 0.9 else ("",)   # as in AVA's own lists
    score = rng.uniform(0.82, 1)
    lines = [f"{key}{_csv(found)},{label},{score:.6f}\n" for label in labels]
    if rng.uniform() < 0.2:                                 # invented: mostly of low score
        lines.append(f"{key}{_csv(_random_box(rng))},,{rng.uniform(0.3, 0.85):.6f}\n")
    return lines


def _join_tables(folder):
    """One csv per table and split, the list of actions, and the excluded moments."""
    for split in MOVIES:
        for table in ("v2.2", "predicted_boxes"):
            parts = sorted(folder.glob(f"{split}_*.{table}"))
            text = "".join(part.read_text() for part in parts)
            (folder / f"ava_{split}_{table}.csv").write_text(text)
            for part in parts:
                part.unlink()
        excluded = folder / f"ava_{split}_excluded_timestamps_v2.2.csv"
        excluded.write_text(f"{split}_000,{SECONDS[-1]:04d}\n")
    items = "".join(f'item {{\n  name: "{name}"\n  id: {number}\n}}\n'
                    for number, name in enumerate(ACTIONS, 1))
    (folder / "ava_action_list_v2.2_for_activitynet_2019.pbtxt").write_text(items)


def _csv(box):
    return ",".join(f"{min(max(v, 0), 1):.3f}" for v in box)


def _random_box(rng):
    w, h = rng.uniform(0.15, 0.3, 2)
    x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
    return x, y, x + w, y + h


def _iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def draw_clip(rng, name):
    """Draw a clip of one class, such as "circle_up_down". Returns (T, HEIGHT, WIDTH, 3) uint8."""
    kind, motion = name.split("_", 1)
    frames = int(rng.integers(48, 65))
    texture = _random_texture(rng, 7, 12, [0.8, 0.35])
    back_colors, colors = _random_colors(rng, rng.uniform() < 0.5)
    background = _draw_background(rng, back_colors, HEIGHT, WIDTH)
    drift = rng.uniform(-MARGIN / 64, MARGIN / 64, 2)      # pixels per frame
    radius, angle = rng.uniform(15, 23), rng.uniform(0, 2 * np.pi)
    x, y = np.array([WIDTH, HEIGHT]) / 2 + rng.uniform(-8, 8, 2)
    period, phase = rng.uniform(36, 56), rng.uniform(0, 2 * np.pi)
    light_angle, light_period = rng.uniform(0, 2 * np.pi), rng.uniform(60, 120)
    light_phase = rng.uniform(0, 2 * np.pi)
    turn = rng.choice([-1, 1]) * 2 * np.pi / rng.uniform(40, 70)
    shape = dict(kind=kind, motion=MOTIONS.index(motion), amplitudes=(34, 22, 0.45), x=x, y=y,
                 radius=radius, angle=angle, turn=turn, period=period, phase=phase, texture=texture)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    slope = _rotate(columns - WIDTH / 2, rows - HEIGHT / 2, light_angle)[0] / WIDTH
    clip = np.empty((frames, HEIGHT, WIDTH, 3), np.uint8)
    for t in range(frames):
        picture = _cut(background, drift * t, HEIGHT, WIDTH)
        _draw_shape(picture, shape, t, colors)
        wave = np.sin(2 * np.pi * t / light_period + light_phase)
        light = 1 + 0.25 * wave * (0.7 + 0.6 * slope)
        clip[t] = np.clip(picture * light[..., None], 0, 255).round()
    return clip


def draw_movie(rng):
    """Draw two or three shapes, each with one motion.

    Returns (T, MOVIE_HEIGHT, MOVIE_WIDTH, 3) uint8, and a list of (second, box in fractions of the
    width and height, labels from 1, person).
    """
    dark, count = rng.uniform() < 0.5, int(rng.integers(2, 4))
    back_colors, colors = _random_colors(rng, dark)
    background = _draw_background(rng, back_colors, MOVIE_HEIGHT, MOVIE_WIDTH)
    drift = rng.uniform(-MARGIN / 128, MARGIN / 128, 2)
    shapes = [dict(                                        # side by side, drawn in any order
        kind=SHAPES[rng.integers(3)], motion=int(rng.integers(4)), amplitudes=(13, 13, 0.35),
        radius=rng.uniform(14, 19), x=MOVIE_WIDTH * (column + 0.5) / count + rng.uniform(-6, 6),
        y=MOVIE_HEIGHT / 2 + rng.uniform(-28, 28), angle=rng.uniform(0, 2 * np.pi),
        turn=rng.choice([-1, 1]) * 2 * np.pi / rng.uniform(50, 80), period=rng.uniform(24, 40),
        phase=rng.uniform(0, 2 * np.pi), texture=_random_texture(rng, 12, 20, [0.8, 0.35]))
        for column in rng.permutation(count)]
    frames = FPS * (SECONDS[-1] + 1 - MOVIE_START)
    movie, truth = np.empty((frames, MOVIE_HEIGHT, MOVIE_WIDTH, 3), np.uint8), []
    for t in range(frames):
        picture = _cut(background, drift * t, MOVIE_HEIGHT, MOVIE_WIDTH)
        second = MOVIE_START + t / FPS
        for person, shape in enumerate(shapes):
            box = _draw_shape(picture, shape, t, colors)
            if second in SECONDS:
                labels = (shape["motion"] + 1, SHAPES.index(shape["kind"]) + SHAPE_CLASS)
                truth.append((int(second), box, labels, person))
        movie[t] = np.clip(picture, 0, 255).round()
    return movie, truth


def _draw_shape(picture, s, t, colors):
    """Draw the shape s at frame t into the picture. Returns its box in fractions."""
    height, width = picture.shape[:2]
    swing = np.sin(2 * np.pi * t / s["period"] + s["phase"])
    right, down, larger = s["amplitudes"]
    cx, cy = s["x"] + (s["motion"] == 0) * right * swing, s["y"] + (s["motion"] == 1) * down * swing
    a = s["angle"] + (s["motion"] == 2) * s["turn"] * t
    r = s["radius"] * (1 + (s["motion"] == 3) * larger * swing)
    x1, y1 = max(int(cx - 1.6 * r) - 1, 0), max(int(cy - 1.6 * r) - 1, 0)
    x2, y2 = min(int(cx + 1.6 * r) + 2, width), min(int(cy + 1.6 * r) + 2, height)
    y, x = np.mgrid[y1:y2, x1:x2]
    u, v = _rotate(x - cx, y - cy, a)                      # the texture moves with the shape
    inside = _inside(s["kind"], u, v, r)
    front = _paint(s["texture"], u * s["radius"] / r, v * s["radius"] / r, colors)
    window = picture[y1:y2, x1:x2]
    window += (front - window) * inside
    rows, columns = np.nonzero(inside[..., 0] > 0.5)
    return ((x1 + columns.min()) / width, (y1 + rows.min()) / height,
            (x1 + columns.max() + 1) / width, (y1 + rows.max() + 1) / height)


def _cut(background, shift, height, width):
    left, top = (MARGIN + shift).round().astype(int)
    return background[top:top + height, left:left + width].copy()


def _draw_background(rng, colors, height, width):
    """Overlapping striped boxes and discs: (height, width, 3), plus MARGIN on all sides."""
    y, x = np.mgrid[:height + 2 * MARGIN, :width + 2 * MARGIN].astype(np.float32)
    picture = _paint(_random_texture(rng, 10, 16, [0.8]), x, y, colors)
    for _ in range(16):
        a, cx, cy = rng.uniform(0, np.pi), rng.uniform(0, x.shape[1]), rng.uniform(0, x.shape[0])
        u, v = _rotate(x - cx, y - cy, a)
        shape, flatness = rng.choice(SHAPES[:2]), rng.uniform(0.5, 1)
        inside = _inside(shape, u, v * flatness, rng.uniform(14, 30))
        stripes = _paint(_random_texture(rng, 10, 16, [0.8]), x, y, colors)
        picture = picture + (stripes - picture) * inside
    return picture


def _random_colors(rng, dark):
    """Two colors of the background and two of the shapes. dark: the shapes are the darker ones."""
    low = np.array([rng.uniform(10, 60, 3), rng.uniform(70, 130, 3)])
    high = np.array([rng.uniform(140, 180, 3), rng.uniform(200, 250, 3)])
    return (high, low) if dark else (low, high)


def _random_texture(rng, shortest, longest, weights):
    """Waves of any direction: (direction in radians, wavelength in pixels, phase, weight)."""
    return [(rng.uniform(0, np.pi), rng.uniform(shortest, longest), rng.uniform(0, 2 * np.pi), w)
            for w in weights]


def _paint(texture, x, y, colors):
    """Colors (H, W, 3) of a texture at the points x, y: a mix of two colors."""
    wave = sum(weight * np.sin(2 * np.pi * (x * np.cos(a) + y * np.sin(a)) / length + phase)
               for a, length, phase, weight in texture)
    share = np.clip(0.5 + 0.5 * wave, 0, 1)[..., None]
    return colors[0] + (colors[1] - colors[0]) * share


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
        options = {"crf": "20", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main():
    parser = argparse.ArgumentParser(description="Make the synthetic video data set.")
    parser.add_argument("folder")
    parser.add_argument("--ava", action="store_true", help="movies with boxes, in AVA's layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        (make_ava_part if args.ava else make_part)(args.folder, args.seed, *args.part)
    else:
        print((make_ava_dataset if args.ava else make_dataset)(args.folder, args.seed))


if __name__ == "__main__":
    main()
