"""Shared by the tests: the project on the path, runs of the scripts, golden inputs."""
import contextlib
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path[:0] = [str(ROOT), str(GOLDEN)]


@pytest.fixture
def golden():
    return lambda name: np.load(GOLDEN / name)


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """released("mvitv2_s_pt") -> path of a checkpoint in the release's layout."""
    from make_checkpoint import main
    folder = tmp_path_factory.mktemp("released")

    def make(name):
        path = folder / f"{name}.pyth"
        if not path.exists():
            main(str(GOLDEN / f"keys_{name}.json"), str(path))
        return str(path)

    return make


def apart(function, *arguments):
    """Call it in a fork: an encoder starts threads, which forks of this process must not meet."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def write_clips(folder):
    from tools import synthetic
    for split, count in (("train", 6), ("val", 2)):
        for name in ("level_left_right", "rings_up_down"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng([i, len(split), len(name)])
                clip = synthetic.draw_clip(rng, name)[:24]
                synthetic.write_video(folder / split / name / f"{i}.mp4", clip)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder with 12 training and 4 validation clips."""
    folder = tmp_path_factory.mktemp("clips")
    apart(write_clips, folder)
    return folder


@pytest.fixture(scope="session")
def pretrained(clips, tmp_path_factory):
    """(folder, output) of an uninterrupted pre-training with one process."""
    import runs
    out = tmp_path_factory.mktemp("pretrained") / "run"
    return out, runs.run_well("pretrain.py", "--data", clips, "--out", out, *runs.PRETRAIN)


@pytest.fixture(scope="session")
def finetuned(clips, pretrained, tmp_path_factory):
    """(folder, output) of an uninterrupted fine-tuning of it, and its baseline from scratch."""
    import runs
    out = tmp_path_factory.mktemp("finetuned") / "run"
    return out, runs.run_well("finetune.py", "--data", clips, "--out", out, *runs.FINETUNE,
                              "--init", pretrained[0] / "last.pt", "--baseline")


def slow(*row):
    """A row of a parametrization that takes more than about a second."""
    return pytest.param(*row, marks=pytest.mark.slow)


def in_this_process(*_):
    """Stands for a ProcessPoolExecutor, whose processes take seconds to start."""
    return contextlib.nullcontext(SimpleNamespace(map=map))


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """{name: path} of the numbered videos of test_video.py."""
    from test_video import VIDEOS, write_video
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / name, **spec) for name, spec in VIDEOS.items()}


@pytest.fixture
def two_threads():
    """At least two, as sums whose order is left to chance need."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, 2))
    yield
    torch.set_num_threads(before)


def golden_input(shape):
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


def golden_mask(shape):
    return torch.from_numpy(np.random.default_rng(1).random(shape) < 0.4)
