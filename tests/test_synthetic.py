"""tools/synthetic.py: the same content everywhere, and folders that are complete or not there."""
import hashlib
import os

import numpy as np
import pytest

from tools import synthetic

run = synthetic.subprocess.run


def digest(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


@pytest.mark.skipif(np.__version__ < "2", reason="numpy 1 promotes float32 otherwise")
def test_pixels_of_version_1():
    clip = synthetic.draw_clip(np.random.default_rng([7]), "triangle_rotating")
    movie, truth = synthetic.draw_movie(np.random.default_rng(5))
    assert digest(clip) == "298e2a97eac89639" and digest(movie) == "c506c8feeef8358d"
    assert clip.shape[1:] == (96, 128, 3) and clip.std() > 10
    assert abs(clip[0].astype(float) - clip[20]).mean() > 1  # it moves
    assert {second for second, *_ in truth} == set(synthetic.SECONDS)


def small(command, **kw):
    """What a child does, with a video a class, or fails to do."""
    few = "synthetic.CLIPS = synthetic.MOVIES = {'train': 1, 'val': 1}; "
    change = few + "synthetic.SHAPES = synthetic.SHAPES[:1]; synthetic.MOTIONS = ('growing',); "
    return run([*command[:2], command[2].replace("synthetic; ", f"synthetic; {change}")], **kw)


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
    clips = {f"{split}/circle_growing/000.mp4" for split in ("train", "val")}
    assert os.listdir(tmp_path) == ["set"] and files == clips | {"synthetic.txt"}
    for other in ({"seed": 1}, {"what": "movies"}):
        with pytest.raises(ValueError, match="something else"):
            synthetic.make_dataset(folder, **other)
