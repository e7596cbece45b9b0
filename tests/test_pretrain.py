"""The script itself, as a process: it trains, is killed, goes on, and refuses what it should."""
import os
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

import runs
from engine import read_checkpoint
from runs import assert_same_weights, log_of

# 12 clips, batch 4: 3 steps per epoch, 9 steps. Batches, masks and lr come from the recipe alone.
TINY = ["--image-size", "32", "--num-frames", "4", "--output-stride", "8", "--sampling-rate", "2", "--batch-size", "4",
        "--epochs", "3", "--warmup-epochs", "1", "--log-every", "1", "--workers", "0", "--drop-path", "0.2"]


def flags_of(data, out, *flags):
    return "--data", data, "--out", out, *TINY, *flags


def run(data, out, *flags, **kw):
    return runs.run("pretrain.py", *flags_of(data, out, *flags), **kw)


def kill_at(step, data, out, *flags, **kw):
    return runs.kill_at(step, out, "pretrain.py", *flags_of(data, out, *flags), **kw)


@pytest.fixture(scope="session")
def finished(clips, tmp_path_factory):
    """An uninterrupted run with one process."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = run(clips, out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_run(finished):
    out, done = finished
    lines = log_of(out)
    assert [d["step"] for d in lines] == list(range(1, 10))
    assert all(0 < d["loss"] < 1 and d["skipped"] == d["unreadable"] == 0 for d in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["lr"] == pytest.approx(1e-5 * read_checkpoint(out / "last.pt")["recipe"]["batch_size"]
                                           / read_checkpoint(out / "last.pt")["recipe"]["lr_batch"])
    for words in ("12 videos", "3 steps per epoch, 3 effective epochs, 9 steps", "batch 4 = 1 processes x 4 samples",
                  "peak memory", "prediction.png"):
        assert words in done.stdout + done.stderr, words
    names = read_checkpoint(out / "last.pt")["model"]
    assert not any(n.startswith(("module.", "_orig_mod.")) or "hog" in n for n in names)
    for name in ("prediction.png", "prediction.gif", "loss.png"):
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10              # not blank
    assert sorted(os.listdir(out)) == ["last.pt", "log.jsonl", "loss.png", "prediction.gif", "prediction.png"]


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0)])
def test_killed_and_resumed_is_bit_equal(clips, tmp_path, finished, processes, workers):
    """SIGKILL at three steps; what comes out at last equals the run that nobody disturbed, to the bit."""
    whole, out = finished[0], tmp_path / "killed"
    if processes == 2:
        whole = tmp_path / "whole"
        assert run(clips, whole, processes=2).returncode == 0
    flags = ["--resume", "--workers", workers, "--save-minutes", "0.0001"]     # after nearly every step
    for step in np.random.default_rng(processes + workers).choice(range(2, 9), 3, replace=False).tolist():
        kill_at(step, clips, out, *flags, processes=processes)
    done = run(clips, out, *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stdout + done.stderr
    assert_same_weights(whole, out)
    drop = {"time", "samples_per_second", "data_wait"}
    assert [{k: v for k, v in d.items() if k not in drop} for d in log_of(whole)] == \
        [{k: v for k, v in d.items() if k not in drop} for d in log_of(out)]


def test_sigterm_saves_the_step(clips, tmp_path, finished):
    out = tmp_path / "stopped"
    code, output = kill_at(4, clips, out, "--workers", 2, sent=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "stopped by SIGTERM" in output and "--resume" in output
    assert read_checkpoint(out / "last.pt")["step"] == log_of(out)[-1]["step"] >= 4
    assert run(clips, out, "--resume").returncode == 0
    assert_same_weights(finished[0], out)


def test_accumulation_and_ranks_see_the_same_samples(clips, tmp_path):
    """One process, accumulation and two processes average the same global batch: losses agree but for rounding.

    Every sample has a mask of the same size here, so that means over micro-batches are means over the batch."""
    flags = ["--mask", "frame", "--drop-path", "0", "--epochs", "1"]
    losses = []
    for name, extra, kw in (("one", [], {}), ("accumulated", ["--device-batch", "1"], {}), ("two", [], {"processes": 2})):
        done = run(clips, tmp_path / name, *flags, *extra, **kw)
        assert done.returncode == 0, done.stderr
        losses.append([d["loss"] for d in log_of(tmp_path / name)])
    assert "1 samples x 4 accumulated" in run(clips, tmp_path / "again", *flags, "--device-batch", "1").stdout
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_never_overwrites(clips, finished):
    out = finished[0]
    before = (out / "last.pt").read_bytes(), (out / "log.jsonl").read_bytes()
    done = run(clips, out)
    assert done.returncode == 2 and "--resume" in done.stderr
    done = run(clips, out, "--resume", "--mask-ratio", "0.6", "--lr", "1")
    assert done.returncode == 2 and "mask_ratio=0.6 (was 0.4)" in done.stderr and "lr=1.0" in done.stderr
    assert before == ((out / "last.pt").read_bytes(), (out / "log.jsonl").read_bytes())
    done = run(clips, out, "--resume")                                        # a finished run has nothing to add
    assert done.returncode == 0 and "9 steps" in done.stdout + done.stderr


def test_changed_data_are_refused(clips, tmp_path, finished):
    copy, out = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(clips, copy)
    shutil.copytree(finished[0], out)
    assert run(copy, out, "--resume").returncode == 0                         # moved, but the same
    os.rename(copy / "train/circle_growing/0.mp4", copy / "train/circle_growing/new.mp4")
    done = run(copy, out, "--resume")
    assert done.returncode == 2 and "are not those" in done.stderr


def test_unreadable_files_are_named_once(clips, tmp_path):
    salted = tmp_path / "salted"
    shutil.copytree(clips / "train", salted / "train")
    for i in range(6):
        shutil.copy(clips / "train/circle_growing/0.mp4", salted / f"train/circle_growing/more{i}.mp4")
    (salted / "train/circle_growing/bad.mp4").write_bytes(b"")
    (salted / "train/circle_growing/notes.txt").write_text("hello")
    done = run(salted, tmp_path / "out", "--epochs", 6, "--workers", 2)
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    assert len(re.findall(r"unreadable, replaced by another: \S*bad.mp4", output)) == 1
    assert "1 other files ignored" in output and "1 unreadable files replaced" in output
    assert "no validation part" in output
    for i in range(3):
        (salted / f"train/square_up_down/text{i}.mp4").write_text("not a video")
    done = run(salted, tmp_path / "out2", "--epochs", 20)
    assert done.returncode == 2 and re.search(r"of 22 files cannot be read, more than 10%.*bad.mp4", done.stderr)


def test_non_finite_steps_are_skipped_then_stop(clips, tmp_path):
    """A learning rate that blows the weights up: skipped steps are counted, and the run gives up with a word."""
    out = tmp_path / "out"
    done = run(clips, out, "--lr", "1e35", "--warmup-epochs", "0", "--epochs", "20")
    assert done.returncode == 2 and "non-finite loss or gradient" in done.stderr, done.stderr
    assert log_of(out)[-1]["skipped"] >= 10 and log_of(out)[-1]["loss"] is None


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], "nowhere"),
    (["--model", "mvit_huge"], "mvit_huge"),
    (["--model", "vit_tiny"], "takes images"),
    (["--mask", "block"], "mask=block does not suit"),
    (["--image-size", "36"], "H=36, use 32 or 40"),
    (["--cell", "6"], "multiple of HOG cell 6"),
    (["--mask-ratio", "1.5"], "mask_ratio=1.5"),
    (["--batch-size", "13"], "13"),
    (["--lr", "-1"], "lr=-1.0 is not positive"),
    (["--num-frames", "3"], "num_frames=3"),
    (["--no-such-flag"], "--no-such-flag"),
])
def test_wrong_flags_are_one_line(clips, tmp_path, flags, words):
    done = run(clips, tmp_path / "out", *flags)
    assert done.returncode != 0 and words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_empty_and_damaged(clips, tmp_path):
    (tmp_path / "empty/train").mkdir(parents=True)
    done = run(tmp_path / "empty", tmp_path / "out")
    assert done.returncode == 2 and "empty" in done.stderr and "Traceback" not in done.stderr
    out = tmp_path / "damaged"
    out.mkdir()
    (out / "last.pt").write_bytes(b"PK\3\4 cut short")
    done = run(clips, out, "--resume")
    assert done.returncode == 2 and "damaged" in done.stderr and "Traceback" not in done.stderr
    assert (out / "last.pt").read_bytes() == b"PK\3\4 cut short"


def test_images_and_visualize(tmp_path):
    """ViT on image files, with pixels as target; then visualize.py from the command line."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / "data" / split / f"a/{i}.png")
    out = tmp_path / "out"
    done = runs.run("pretrain.py", "--data", tmp_path / "data", "--out", out, "--model", "vit_tiny", "--image-size", 32,
                    "--epochs", 1, "--batch-size", 4, "--workers", 0, "--target", "pixel", "--pixel-norm", "patch")
    assert done.returncode == 0, done.stderr
    picture = tmp_path / "figure.png"
    done = runs.run("visualize.py", "--checkpoint", out / "last.pt", "--input", tmp_path / "data/val/a/0.png", "--output",
                    picture)
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(picture)).std() > 10
    done = runs.run("visualize.py", "--checkpoint", out / "last.pt", "--input", "nothing.png", "--output", picture)
    assert done.returncode == 2 and "nothing.png" in done.stderr and "Traceback" not in done.stderr
