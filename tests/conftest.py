"""Shared by the tests: the project on the path, and the inputs that tests/golden was measured on."""
import sys
from pathlib import Path

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
    """released("mvitv2_s_pt") -> path of a checkpoint in the release's layout with deterministic weights."""
    from make_checkpoint import main
    folder = tmp_path_factory.mktemp("released")

    def make(name):
        path = folder / f"{name}.pyth"
        if not path.exists():
            main(str(GOLDEN / f"keys_{name}.json"), str(path))
        return str(path)

    return make


def golden_input(shape):
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


def golden_mask(shape):
    return torch.from_numpy(np.random.default_rng(1).random(shape) < 0.4)
