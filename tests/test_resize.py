"""tools/resize.py: what its copy of a data set shows, and when."""
import os
import shutil

import numpy as np
import pytest
from conftest import ROOT, in_this_process, slow
from PIL import Image
from test_video import VIDEOS, decode_all, read_numbers, write_video

import layouts
import video
from tools import resize


def copy(monkeypatch, source, target, short_side=48):
    monkeypatch.setattr(resize, "ProcessPoolExecutor", in_this_process)
    return resize.resize(source, target, short_side, 1)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [
    name if name in ("open_gop.mp4", "irregular.mp4", "vp8.webm", "b_frames.avi") else slow(name)
    for name in VIDEOS])
def test_a_copy_shows_the_same_frames_at_the_same_times(name, videos, tmp_path):
    target = tmp_path / name
    resize.convert((name, os.path.dirname(videos[name]), str(tmp_path), 24))
    times = decode_all(videos[name])[0]
    moments = [time - times[0] for time in times[::3]]
    assert read_numbers(video.read_moments(target, moments)) == list(range(0, len(times), 3))
    with video.open_video(target) as (container, stream):
        frames = list(container.decode(stream))
        assert container.format.name in video.EXACT_HEADERS and len(container.streams) == 1
        assert (frames[0].height, frames[0].width) == (24, 32)
        assert all(frame.key_frame for frame in frames[::16])
        first, duration = video.extent(target, container, stream)
    assert first == 0 and duration == pytest.approx(times[-1] - times[0], abs=0.6)


def test_a_data_set_is_copied_upright_whole_and_again_after_a_kill(tmp_path, monkeypatch, capsys):
    source = tmp_path / "source"
    write_video(source / "a b/turned.MOV", range(9), rotation=90)
    write_video(source / "x.webm", range(9), codec="libvpx")
    (source / "broken.mp4").write_text("not a video")
    (source / "notes.bin").touch()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    for name in ("large.JPEG", "large.png", "small.png"):
        Image.fromarray(pixels[:30] if "small" in name else pixels).save(source / name)
    (source / "train.csv").write_text(f"x.webm 0\na b/turned.MOV 1\n{source}/x.webm 1\n")
    before = content(source)
    assert copy(monkeypatch, source, tmp_path / "whole") == 1
    assert "broken.mp4: Invalid data" in capsys.readouterr().out
    whole = content(tmp_path / "whole")
    assert set(before) - set(whole) == {"broken.mp4", "notes.bin"} and content(source) == before
    assert whole["small.png"] == before["small.png"]
    expected = Image.open(source / "large.png").resize((72, 48), Image.BICUBIC)
    assert np.array_equal(Image.open(tmp_path / "whole/large.png"), expected)
    with Image.open(tmp_path / "whole/large.JPEG") as image:
        assert image.size == (72, 48)
    samples = layouts.find_samples(tmp_path / "whole")   # an absolute path leads into the copy
    assert [os.path.relpath(path, samples.root) for path in samples.paths] == [
        "x.webm", "a b/turned.MOV", "x.webm"]
    for path in samples.paths[:2]:
        own = video.read_clip(source / os.path.relpath(path, samples.root), 3, 1, short_side=None)
        clip = video.read_clip(path, 3, 1, short_side=None)
        assert clip.shape == own.shape and (clip.float() - own.float()).abs().mean() < 5

    def killed(*paths, replace=os.replace):
        if "x.webm" in paths[1]:
            raise KeyboardInterrupt
        replace(*paths)
    shutil.rmtree(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        copy(patch, source, tmp_path / "whole")
    assert "x.webm.part" in content(tmp_path / "whole")
    copy(monkeypatch, source, tmp_path / "whole")
    assert content(tmp_path / "whole") == whole


def test_refusals(tmp_path, monkeypatch):
    Image.new("RGB", (60, 90)).save(tmp_path / "a.png")
    (tmp_path / "up").symlink_to(tmp_path)
    for target in (tmp_path, tmp_path / "copy", tmp_path / "up/copy", tmp_path.parent):
        with pytest.raises(ValueError, match="lie in each other"):
            copy(monkeypatch, tmp_path, target)
    assert not (tmp_path / "copy").exists()
    with pytest.raises(ValueError, match="holds other files"):
        copy(monkeypatch, tmp_path, ROOT / "tests")
    with pytest.raises(ValueError, match="--short-side 4 is below"):
        copy(monkeypatch, tmp_path, ROOT / "tests", 4)
