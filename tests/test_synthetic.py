"""tools/synthetic.py: the same content everywhere, and folders that are complete or not there."""
import contextlib
import hashlib
import os
from types import SimpleNamespace

import numpy as np
import pytest

from tools import synthetic

run = synthetic.subprocess.run


def digest(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def test_pixels_of_version_2():
    clip = synthetic.draw_clip(np.random.default_rng([7]), "rising_up_down")
    movie, truth = synthetic.draw_movie(np.random.default_rng(5))
    assert synthetic.VERSION == 2
    if np.__version__ >= "2":                                # numpy 1 promotes float32 otherwise
        assert digest(clip) == "b36ed64306a3466f" and digest(movie) == "e8f940fb77d0ade2"
    assert clip.shape[1:] == (72, 96, 3) and movie.shape == (120, 120, 160, 3)
    assert abs(clip[0].astype(float) - clip[20]).mean() > 1  # it moves
    assert {second for second, *_ in truth} == set(synthetic.SECONDS)
    assert all(0 <= min(box) < max(box) <= 1 and labels[0] in (1, 2, 3, 4)
               and labels[1] in (11, 12, 13) for _, box, labels, _ in truth)


@pytest.fixture
def first_frames(monkeypatch):
    """A function that draws the first frame of a clip alone."""
    render = synthetic._render
    monkeypatch.setattr(synthetic, "_render", lambda *args: render(*args[:3], args[3][:1]))
    return lambda seed, name: synthetic.draw_clip(np.random.default_rng(seed), name)[0]


def test_clips_of_high_contrast(first_frames):
    """Their deviation is at least half of what the recipes divide by."""
    clips = [first_frames(i, f"{pattern}_left_right") / 255
             for i, pattern in enumerate(synthetic.PATTERNS)]
    assert np.std(clips, axis=(0, 1, 2)).min() > 0.5 * 0.225
    assert abs(np.mean(clips) - 0.45) < 0.1


@pytest.mark.parametrize("pattern, angle", [("upright", 0), ("rising", 45), ("level", 90),
                                            ("falling", 135)])
def test_stripes_have_their_direction(pattern, angle, first_frames):
    """The mean direction of the gradient, doubled so that opposite ones agree."""
    for seed in range(5):
        frame = first_frames(seed, f"{pattern}_up_down").mean(-1)
        dy, dx = np.gradient(frame[26:46, 38:58])            # inside the shape
        mean = np.angle(np.sum((dx + 1j * dy) ** 2), deg=True) / 2
        assert abs((mean - angle + 90) % 180 - 90) < 20


def test_jobs_cover_classes_and_splits(monkeypatch):
    """360 clips to train and 300 to validate, 12 classes, none like another."""
    written = []
    pool = SimpleNamespace(map=lambda _, *columns: written.extend(zip(*columns)) or ())
    monkeypatch.setattr(synthetic, "ProcessPoolExecutor", lambda _: contextlib.nullcontext(pool))
    synthetic.write_videos("folder", 3)
    assert len(written) == len(set(written)) == 660 and {job[:2] for job in written} == {
        ("folder", 3)}
    assert sum(split == "val" for _, _, split, *_ in written) == 300
    assert len({name for *_, name, _ in written}) == 12


def small(command, **kw):
    """What a child does, with a video a class, or fails to do."""
    few = "synthetic.CLIPS = synthetic.MOVIES = {'train': 1, 'val': 1}; "
    change = few + "synthetic.PATTERNS = ('level',); synthetic.MOTIONS = ('up_down',); "
    return run([*command[:2], command[2].replace("synthetic; ", f"synthetic; {change}")], **kw)


@pytest.mark.slow
def test_folder_is_made_once_and_whole(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    monkeypatch.setattr(synthetic.subprocess, "run", lambda command, cwd: run(["false"]))
    with pytest.raises(OSError, match="failed"):
        synthetic.make_dataset(folder)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(synthetic.subprocess, "run", small)
    assert synthetic.make_dataset(folder) == folder
    monkeypatch.setattr(synthetic.subprocess, "run", None)   # not called again
    synthetic.make_dataset(folder)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    clips = {f"{split}/level_up_down/000.mp4" for split in ("train", "val")}
    assert os.listdir(tmp_path) == ["set"] and files == clips | {"synthetic.txt"}
    for other in ({"seed": 1}, {"what": "movies"}):
        with pytest.raises(ValueError, match="not synthetic (videos|movies), version 2"):
            synthetic.make_dataset(folder, **other)
    (folder / "synthetic.txt").write_text("synthetic videos, version 1, seed 0\n")
    with pytest.raises(ValueError, match="version 1, seed 0.*version 2"):
        synthetic.make_dataset(folder)
