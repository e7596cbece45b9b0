"""Masks against the release's seeded draws and statistics, and their promises on any grid."""
import hashlib
import math
import random

import numpy as np
import pytest
from conftest import GOLDEN as FOLDER
from conftest import slow

from masking import block_mask, cube_mask, draw_mask, frame_mask, tube_mask

GOLDEN = np.load(FOLDER / "masks_seeded.npz")
COUNT = 2000  # masks per statistic


def near(measured, share):
    """Within four standard errors of both, plus 0.0005, since references are rounded."""
    error = math.sqrt(share * (1 - share) * (1 / COUNT + 1 / 4000))       # theirs: of 4000 masks
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
    assert counts.max() == 78 and 66 <= counts.min() <= 74      # reference: 70 to 78, mean 77.56
    assert abs(counts.mean() - 77.56) < 4 * counts.std() * math.sqrt(1 / COUNT + 1 / 4000)
    assert near((counts == 78).mean(), 0.707)


@pytest.mark.slow
def test_cube_statistics():
    rng = random.Random(0)
    masks = np.stack([cube_mask((8, 7, 7), 0.4, rng, coarse=1) for _ in range(COUNT)])
    counts, error = masks.sum((1, 2, 3)), 4 * math.sqrt(1 / COUNT + 1 / 4000)
    assert counts.max() == 157 and 139 <= counts.min() <= 150   # reference: 143 to 157, mean 155.7
    assert abs(counts.mean() - 155.7) < error * counts.std() + 0.05           # 0.05: rounding
    assert near((counts == 157).mean(), 0.367)
    # Coverage: reference shares in whole percent, hence 0.005. The cells of a mask depend on each
    # other, so the standard error is that of the masks' own shares.
    time, corner = masks.mean((2, 3)), masks[:, :, ::6, ::6].mean((1, 2, 3))
    center = masks[:, :, 3, 3].mean(1)
    for samples, share in ((time[:, 0], 0.24), (time[:, 7], 0.24), (time[:, 3], 0.51),
                           (time[:, 4], 0.51), (corner, 0.12), (center, 0.70)):
        assert abs(samples.mean() - share) < error * samples.std() + 0.005
    # Long runs in time, yet no tube. Independent cells would give about 0.4.
    for axis in (1, 2, 3):
        first, second = np.take(masks, range(3), axis), np.take(masks, range(1, 4), axis)
        assert (first & second).sum() / first.sum() > 0.7
    assert (masks[:, 1:] != masks[:, :-1]).any((1, 2, 3)).mean() > 0.99


@pytest.mark.slow
def test_tube_statistics_and_constancy_in_time():
    rng = random.Random(0)
    masks = [tube_mask((8, 14, 14), 0.4, rng) for _ in range(COUNT)]
    assert all((mask == mask[:1]).all() for mask in masks)
    counts = np.array([mask[0, ::2, ::2].sum() for mask in masks])
    assert counts.max() == 20 and near((counts == 20).mean(), 0.967)
    expected = block_mask((7, 7), 0.4, random.Random(5)).repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(tube_mask((8, 14, 14), 0.4, random.Random(5))[3], expected)


def test_enlarged_cells_stay_whole():
    mask = cube_mask((4, 9, 14), 0.4, random.Random(2))
    coarse = mask[:, ::2, ::2]
    assert coarse.shape == (4, 5, 7)
    assert np.array_equal(coarse.repeat(2, axis=1).repeat(2, axis=2)[:, :9], mask)


@pytest.mark.parametrize("t, ratio, count", [(8, 0.4, 3), (8, 0.9, 7), (2, 0.1, 1), (5, 0.01, 1)])
def test_frame_masks(t, ratio, count):
    rng = random.Random(0)
    for consecutive in (True, False):
        masks = np.stack([frame_mask((t, 3, 2), ratio, rng, consecutive) for _ in range(200)])
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


GRIDS = [(1, 2), (2, 1), (2, 2), (1, 14), (3, 3), (3, 7)]


@pytest.mark.parametrize("grid", [
    *GRIDS, *map(slow, ((7, 12), (2, 50), (14, 14), (5, 60), (200, 150)))])
def test_any_grid_and_ratio_gives_both_values(grid):
    rng = random.Random(0)
    for ratio in (0.001, 0.1, 0.4, 0.75, 0.999):
        tokens = math.prod(grid)
        mask = block_mask(grid, ratio, rng)
        assert mask.shape == grid and mask.dtype == bool
        assert 1 <= mask.sum() <= min(max(round(ratio * tokens), 1), tokens - 1)
        for shape in ((1, *grid), (3, *grid)):
            for mask in (cube_mask(shape, ratio, rng), tube_mask(shape, ratio, rng),
                         cube_mask(shape, ratio, rng, 3)):
                assert mask.shape == shape and mask.dtype == bool and 0 < mask.mean() < 1
            most = min(max(round(ratio * math.prod(shape)), 1), math.prod(shape) - 1)
            assert cube_mask(shape, ratio, rng, coarse=1).sum() <= most
        assert 0 < frame_mask((3, *grid), ratio, rng).mean() < 1


def test_long_narrow_grids_reach_the_ratio():
    rng = random.Random(0)
    for grid in ((1, 100), (100, 1), (2, 100), (4, 100), (60, 5)):
        assert np.mean([block_mask(grid, 0.4, rng).mean() for _ in range(30)]) > 0.38
    assert 0 < cube_mask((8, 1, 1), 0.4, rng).sum() <= 3


def test_high_ratios_are_reached():
    """Ten failed attempts at the first block used to leave a single token."""
    for grid in ((7, 7), (8, 8), (14, 14)):
        for ratio in (0.8, 0.9, 0.95):
            shares = [block_mask(grid, ratio, random.Random(seed)).mean() for seed in range(60)]
            assert min(shares) > 0.6 and abs(np.mean(shares) - ratio) < 0.03


def test_the_generator_alone_decides():
    for make, grid in ((block_mask, (14, 14)), (cube_mask, (8, 14, 14)), (tube_mask, (8, 14, 14)),
                       (frame_mask, (8, 14, 14))):
        runs = []
        for seed in (0, 1):
            random.seed(seed)
            np.random.seed(seed)
            rng = random.Random(7)
            runs.append([make(grid, 0.4, rng) for _ in range(5)])
        assert np.array_equal(*runs) and len({mask.tobytes() for mask in runs[0]}) > 1


def test_errors_name_the_value():
    rng = random.Random(0)
    for make, axes in ((block_mask, 2), (cube_mask, 3), (tube_mask, 3), (frame_mask, 3)):
        for grid in (axes * (1,), (axes - 1) * (4,)):
            with pytest.raises(ValueError, match=f"{axes} positive sides"):
                make(grid, 0.4, rng)
        for ratio in (0, 1, 1.5, -0.1, float("nan")):
            with pytest.raises(ValueError, match=f"ratio {ratio}"):
                make(axes * (4,), ratio, rng)
    with pytest.raises(ValueError, match="tube_mask"):
        frame_mask((1, 4, 4), 0.4, rng)
    with pytest.raises(ValueError, match=r"Generator: give a random.Random\(seed\)"):
        block_mask((4, 4), 0.4, np.random.default_rng(0))
    for coarse in (0, -2, 1.5):
        with pytest.raises(ValueError, match=f"coarse={coarse}"):
            cube_mask((4, 8, 8), 0.4, rng, coarse=coarse)
