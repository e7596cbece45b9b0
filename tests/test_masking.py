"""Masks against the release's seeded draws and statistics, and what every mask promises on any grid."""
import hashlib
import math
import random

import numpy as np
import pytest

from conftest import GOLDEN as FOLDER
from masking import block_mask, cube_mask, draw_mask, frame_mask, tube_mask

GOLDEN = np.load(FOLDER / "masks_seeded.npz")
COUNT = 2000  # masks per statistic


def near(measured, share, tokens=COUNT):
    """Within four binomial standard errors, plus the rounding of a reference share given in whole or tenth per cent.

    The reference shares come from 4000 masks and carry a standard error of their own, added here.
    """
    error = math.sqrt(share * (1 - share) * (1 / tokens + 1 / 4000))
    return abs(measured - share) < 4 * error + 0.0005


def test_block_masks_reproduce_the_seeded_release():
    rng = random.Random(123)
    for golden in GOLDEN["image"]:
        assert np.array_equal(block_mask((14, 14), 0.4, rng), golden.astype(bool))


def test_cube_masks_reproduce_the_seeded_release():
    rng, fine = random.Random(123), random.Random(123)
    for golden in GOLDEN["cube"]:
        assert np.array_equal(cube_mask((8, 7, 7), 0.4, rng, coarse=1), golden.astype(bool))
        enlarged = golden.astype(bool).repeat(2, axis=1).repeat(2, axis=2)
        assert np.array_equal(cube_mask((8, 14, 14), 0.4, fine), enlarged)


@pytest.mark.parametrize("kind, grid, ratio, digest", [
    ("block", (14, 14), 0.4, "c50c1f520716b506"),
    ("block", (5, 9), 0.4, "fbc05e796c460721"),
    ("block", (2, 50), 0.25, "3b94bb1f2ca0458b"),
    ("block", (1, 7), 0.4, "b15427f4114b0db6"),
    ("block", (2, 2), 0.4, "3f2f72bb3bfe6603"),
    ("cube", (8, 14, 14), 0.4, "e89d90c3974e3357"),
    ("cube", (4, 9, 14), 0.4, "ac368c235234d231"),
    ("cube", (3, 5, 60), 0.75, "be40a5d714503d87"),
    ("cube", (8, 1, 1), 0.4, "dd368dee27583496"),
    ("cube", (5, 3, 3), 0.1, "1aee1a4fcf01a30a"),
    ("tube", (8, 14, 14), 0.4, "855824cc8bef8ad9"),
    ("tube", (3, 9, 13), 0.4, "cc28d3c06cba9242"),
    ("frame", (8, 14, 14), 0.4, "e1cc180305630798"),
    ("runs", (8, 14, 14), 0.4, "89ae8e247d4e92a7")])
def test_a_seed_gives_the_same_mask_as_ever(kind, grid, ratio, digest):
    """A resumed run repeats its masks: 200 seeds, digests recorded from an earlier version."""
    masks = hashlib.sha256()
    for seed in range(200):
        rng, name = random.Random(seed), "frame" if kind == "runs" else kind
        mask = draw_mask(name, grid, ratio, rng, frame_runs=kind == "runs")
        masks.update(np.packbits(mask).tobytes())
    assert masks.hexdigest()[:16] == digest


def test_block_statistics():
    rng = random.Random(0)
    counts = np.array([block_mask((14, 14), 0.4, rng).sum() for _ in range(COUNT)])
    assert counts.max() == 78 and 66 <= counts.min() <= 74  # reference: 70 to 78, mean 77.56
    assert abs(counts.mean() - 77.56) < 4 * counts.std() * math.sqrt(1 / COUNT + 1 / 4000)
    assert near((counts == 78).mean(), 0.707)


def test_cube_statistics():
    rng = random.Random(0)
    masks = np.stack([cube_mask((8, 7, 7), 0.4, rng, coarse=1) for _ in range(COUNT)])
    counts = masks.sum((1, 2, 3))
    assert counts.max() == 157 and 139 <= counts.min() <= 150  # reference: 143 to 157, mean 155.7
    assert abs(counts.mean() - 155.7) < 4 * counts.std() * math.sqrt(1 / COUNT + 1 / 4000) + 0.05  # 0.05: rounding
    assert near((counts == 157).mean(), 0.367)
    # coverage: reference shares in whole per cent, hence 0.005; the cells of one mask depend on each other,
    # so the standard error is that of the masks' own shares, not of single cells
    time, corner = masks.mean((2, 3)), masks[:, :, ::6, ::6].mean((1, 2, 3))
    for samples, share in ((time[:, 0], 0.24), (time[:, 7], 0.24), (time[:, 3], 0.51), (time[:, 4], 0.51),
                           (corner, 0.12), (masks[:, :, 3, 3].mean(1), 0.70)):
        assert abs(samples.mean() - share) < 4 * samples.std() * math.sqrt(1 / COUNT + 1 / 4000) + 0.005


def test_tube_statistics_and_constancy_in_time():
    rng = random.Random(0)
    masks = [tube_mask((8, 14, 14), 0.4, rng) for _ in range(COUNT)]
    assert all((mask == mask[:1]).all() for mask in masks)
    counts = np.array([mask[0, ::2, ::2].sum() for mask in masks])
    assert counts.max() == 20 and near((counts == 20).mean(), 0.967)
    expected = block_mask((7, 7), 0.4, random.Random(5)).repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(tube_mask((8, 14, 14), 0.4, random.Random(5))[3], expected)


def test_cubes_last_in_time_and_spread_in_space():
    """Long runs in time, yet no tube; a cell's neighbours are masked far more often than the ratio."""
    rng = random.Random(1)
    masks = np.stack([cube_mask((8, 7, 7), 0.4, rng, coarse=1) for _ in range(200)])
    for axis in (1, 2, 3):
        first, second = np.take(masks, range(3), axis), np.take(masks, range(1, 4), axis)
        assert (first & second).sum() / first.sum() > 0.7      # independent cells would give about 0.4
    changes = (masks[:, 1:] != masks[:, :-1]).any((1, 2, 3))
    assert changes.all()


def test_enlarged_cells_stay_whole():
    mask = cube_mask((4, 9, 14), 0.4, random.Random(2))
    coarse = mask[:, ::2, ::2]
    assert coarse.shape == (4, 5, 7)
    assert np.array_equal(coarse.repeat(2, axis=1).repeat(2, axis=2)[:, :9], mask)


@pytest.mark.parametrize("t, ratio, count", [(8, 0.4, 3), (8, 0.9, 7), (2, 0.1, 1), (16, 0.5, 8), (5, 0.01, 1)])
def test_frame_masks(t, ratio, count):
    rng = random.Random(0)
    for consecutive in (True, False):
        masks = np.stack([frame_mask((t, 3, 2), ratio, rng, consecutive=consecutive) for _ in range(200)])
        assert (masks == masks[:, :, :1, :1]).all()
        assert (masks[:, :, 0, 0].sum(1) == count).all()
        assert masks[:, :, 0, 0].any(0).all()                   # every step has its turn


def test_consecutive_frames_form_fewer_runs():
    def runs(consecutive):
        rng = random.Random(0)
        steps = [frame_mask((16, 1, 1), 0.4, rng, consecutive).ravel() for _ in range(500)]
        return np.mean([steps_[0] + (steps_[1:] & ~steps_[:-1]).sum() for steps_ in steps])

    # six steps of 16 at random form 6 * 11 / 16 = 4.1 runs on average
    assert abs(runs(False) - 6 * 11 / 16) < 0.2
    assert runs(True) < 2.5


GRIDS = [(1, 2), (2, 1), (2, 2), (1, 14), (14, 1), (2, 50), (50, 2), (3, 3), (4, 4), (3, 7), (7, 7), (7, 12), (8, 5),
         (14, 14), (13, 16), (5, 60), (40, 40), (200, 150)]
RATIOS = [0.001, 0.1, 0.25, 0.4, 0.5, 0.75, 0.9, 0.999]


@pytest.mark.parametrize("grid", GRIDS)
def test_any_grid_and_ratio_gives_both_values(grid):
    rng = random.Random(0)
    for ratio in RATIOS:
        tokens = math.prod(grid)
        target = min(max(round(ratio * tokens), 1), tokens - 1)
        mask = block_mask(grid, ratio, rng)
        assert mask.shape == grid and mask.dtype == bool and 1 <= mask.sum() <= target
        for t in (1, 3):
            shape, tokens = (t, *grid), t * math.prod(grid)
            for mask in (cube_mask(shape, ratio, rng), tube_mask(shape, ratio, rng), cube_mask(shape, ratio, rng, 3)):
                assert mask.shape == shape and mask.dtype == bool and 0 < mask.sum() < tokens
            assert cube_mask(shape, ratio, rng, coarse=1).sum() <= min(max(round(ratio * tokens), 1), tokens - 1)
        assert 0 < frame_mask((3, *grid), ratio, rng).mean() < 1


def test_long_narrow_grids_reach_the_ratio():
    rng = random.Random(0)
    for grid in ((1, 100), (100, 1), (2, 100), (4, 100), (60, 5)):
        assert np.mean([block_mask(grid, 0.4, rng).mean() for _ in range(30)]) > 0.38
    assert 0 < cube_mask((8, 1, 1), 0.4, rng).sum() <= 3


@pytest.mark.parametrize("make, grid", [(block_mask, (14, 14)), (cube_mask, (8, 14, 14)), (tube_mask, (8, 14, 14)),
                                        (frame_mask, (8, 14, 14))])
def test_the_generator_alone_decides(make, grid):
    random.seed(0)
    np.random.seed(0)
    once = [make(grid, 0.4, rng) for rng in [random.Random(7)] for _ in range(5)]
    random.seed(1)
    np.random.seed(1)
    again = [make(grid, 0.4, rng) for rng in [random.Random(7)] for _ in range(5)]
    assert np.array_equal(once, again)
    assert len({mask.tobytes() for mask in once}) > 1


def test_errors_name_value_and_remedy():
    rng = random.Random(0)
    for make, one, grid in ((block_mask, (1, 1), (4, 4)), (cube_mask, (1, 1, 1), (4, 4, 4)),
                            (tube_mask, (1, 1, 1), (4, 4, 4)), (frame_mask, (1, 1, 1), (4, 4, 4))):
        with pytest.raises(ValueError, match="more than one token"):
            make(one, 0.4, rng)
        with pytest.raises(ValueError, match="cannot be masked"):
            make(grid[1:], 0.4, rng)
        for ratio in (0, 1, 1.5, -0.1, 40, float("nan")):
            with pytest.raises(ValueError, match=f"{ratio} is not between 0 and 1"):
                make(grid, ratio, rng)
    with pytest.raises(ValueError, match="one time step.*tube_mask"):
        frame_mask((1, 4, 4), 0.4, rng)
    with pytest.raises(ValueError, match="more than one token"):
        tube_mask((8, 1, 1), 0.4, rng)
    for coarse in (0, -2, 1.5):
        with pytest.raises(ValueError, match=f"coarse={coarse} is not"):
            cube_mask((4, 8, 8), 0.4, rng, coarse=coarse)
