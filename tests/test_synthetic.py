"""tools/synthetic.py: the same content everywhere, and folders that are complete or not there."""
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tools import synthetic


def test_content_depends_on_the_seed_only(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "CLIPS", {"train": 1, "val": 1})
    synthetic.make_part(tmp_path / "one", 0, 1, 8)
    synthetic.make_part(tmp_path / "two", 0, 1, 4)  # other parts
    clips = sorted((tmp_path / "one").rglob("*.mp4"))
    assert len(list((tmp_path / "two").rglob("*.mp4"))) > len(clips) > 0
    for path in clips:
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.skipif(np.__version__ < "2", reason="numpy 1 promotes float32 otherwise")
def test_pixels_of_version_1():
    digest = lambda frames: hashlib.sha256(frames.tobytes()).hexdigest()[:16]
    clip = synthetic.draw_clip(np.random.default_rng([7]), "triangle_rotating")
    movie, truth = synthetic.draw_movie(np.random.default_rng(5))
    assert digest(clip) == "298e2a97eac89639" and digest(movie) == "c506c8feeef8358d"
    assert clip.shape[1:] == (96, 128, 3) and clip.std() > 10
    assert abs(clip[0].astype(float) - clip[20]).mean() > 1  # it moves
    assert {second for second, *_ in truth} == set(synthetic.SECONDS)


def test_folder_is_made_once_and_whole(tmp_path, monkeypatch):
    started = []

    class Child:
        """Stands for a child process; writes at once or fails."""
        def __init__(self, command, cwd):
            started.append((command, cwd))
            Path(command[3], "train").mkdir(exist_ok=True)
            self.wait = lambda: int((tmp_path / "fail").exists())
            self.kill = lambda: None

    popen = synthetic.subprocess.Popen
    monkeypatch.setattr(synthetic.subprocess, "Popen", Child)
    (tmp_path / "fail").touch()
    with pytest.raises(OSError, match="failed"):
        synthetic.make_dataset(tmp_path / "set")
    assert os.listdir(tmp_path) == ["fail"]
    os.remove(tmp_path / "fail")
    assert (synthetic.make_dataset(tmp_path / "set") / "train").is_dir()
    count = len(started)
    synthetic.make_dataset(tmp_path / "set")
    assert len(started) == count and os.listdir(tmp_path) == ["set"]
    with pytest.raises(ValueError, match="something else"):
        synthetic.make_dataset(tmp_path / "set", seed=1)
    monkeypatch.setattr(synthetic.subprocess, "Popen", popen)
    command, cwd = started[0]                               # what a child would do, for one clip
    command = [*command[:3], tmp_path / "one", *command[4:-2], "7", "300"]
    subprocess.run(command, cwd=cwd, check=True)
    assert len(list((tmp_path / "one").rglob("*.mp4"))) == 1
