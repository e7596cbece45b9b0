"""Which tokens MaskFeat hides: blocks for images; cubes, tubes and frames for video.

Paper: Sec. 4.3 and Table 6 (cube, tube, frame), Sec. 5 (block-wise masking of images, after BEiT).
Release: the mask generators in the data loaders of SlowFast. Block and cube masks make the same
draws from Python's generator, so the same seed gives the same mask. Differences: frames can be
consecutive as in the paper, and grids of any shape give a usable mask.

Every function returns a numpy bool array over the token grid, True = masked, holding both values.
The number of masked tokens aims at round(ratio * tokens). Block, tube and cube masks never exceed
it on the grid that they are sampled on. They fall short of it when no further block fits: on
average by 0.3 % of the tokens at a ratio of 0.4.

    rng = random.Random(0)
    block_mask((14, 14), 0.4, rng)            # an image of 14x14 patches
    cube_mask((8, 14, 14), 0.4, rng)          # a clip of 8x14x14 tokens
"""
import math

import numpy as np


def block_mask(grid, ratio, rng):
    """Blocks on the tokens of an image (Sec. 5).

    grid: (h, w) tokens. ratio: share to mask. rng: a random.Random.
    Returns (h, w) bool. Raises ValueError for an unusable grid or ratio.
    """
    _check(grid, ratio, rng, 2)
    count = _num_masked(grid, ratio)
    return _sample((1, *grid), count, count // 5, None, 10, rng)[0]


def cube_mask(grid, ratio, rng, coarse=2):
    """Blocks that last for a random number of time steps (Sec. 4.3, Table 6: the default).

    grid: (t, h, w) tokens. coarse: the mask is sampled on (t, h / coarse, w / coarse), rounded up,
    and each cell is enlarged to coarse x coarse tokens (release: 8x7x7 for 8x14x14 tokens). With
    odd sides the ratio is only approximate. If h or w is below 2 * coarse, it is sampled on the
    grid itself. Returns (t, h, w) bool, errors as block_mask.
    """
    _check(grid, ratio, rng, 3)
    t, h, w = _coarsen(grid, coarse)
    count = _num_masked((t, h, w), ratio)
    return _enlarge(_sample((t, h, w), count, h * w // 5, h * w, 100, rng), grid)


def tube_mask(grid, ratio, rng, coarse=2):
    """One block mask for all time steps (Sec. 4.3, Table 6). Arguments as for cube_mask."""
    _check(grid, ratio, rng, 3)
    t, h, w = _coarsen(grid, coarse)
    return _enlarge(np.repeat(block_mask((h, w), ratio, rng)[None], t, axis=0), grid)


def frame_mask(grid, ratio, rng, consecutive=True):
    """Whole time steps, round(t * ratio) of them (Sec. 4.3, Table 6).

    grid: (t, h, w) tokens, t > 1. consecutive: True, runs of neighboring steps (paper), the last of
    which may be one step; False, any distinct steps (release). Returns (t, h, w) bool. Errors: see
    block_mask.
    """
    _check(grid, ratio, rng, 3)
    t, h, w = grid
    if t < 2:
        raise ValueError(f"grid {t}x{h}x{w} has only one time step: use tube_mask")
    count = _num_masked((t,), ratio)
    steps = np.zeros(t, bool)
    if not consecutive:
        steps[rng.sample(range(t), count)] = True
    while (missing := count - int(steps.sum())) > 0:
        length = rng.randint(min(2, missing), missing)      # the paper does not give the length
        starts = [i for i in range(t - length + 1) if not steps[i:i + length].all()]
        start = rng.choice(starts)
        steps[start:start + length] = True
    return np.repeat(steps, h * w).reshape(t, h, w)


def _check(grid, ratio, rng, axes):
    """Raise ValueError for an unusable grid, ratio or generator."""
    if not hasattr(rng, "randrange"):
        raise ValueError(f"rng is a {type(rng).__name__}: give a random.Random(seed)")
    if len(grid) != axes or min(grid) < 1 or math.prod(grid) < 2:
        raise ValueError(f"grid {tuple(grid)} cannot be masked: give {axes} positive sides "
                         "and more than one token")
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio} is not between 0 and 1: the paper's is 0.4")


def _num_masked(grid, ratio):
    """Number of tokens to mask: round(ratio * tokens), at least one, and not all."""
    tokens = math.prod(grid)
    return min(max(round(ratio * tokens), 1), tokens - 1)


def _coarsen(grid, coarse):
    """The coarser grid, or the grid itself if a side is too short for two coarse cells."""
    t, h, w = grid
    if not isinstance(coarse, int) or coarse < 1:
        raise ValueError(f"coarse={coarse!r} is not a positive integer: the release's is 2")
    return (t, -(-h // coarse), -(-w // coarse)) if min(h, w) >= 2 * coarse else (t, h, w)


def _enlarge(mask, grid):
    """Nearest-neighbor enlargement of a coarse (t, y, x) mask to the (t, h, w) grid."""
    (_, h, w), (_, y, x) = grid, mask.shape
    return mask[:, np.arange(h)[:, None] * y // h, np.arange(w) * x // w]


def _sample(grid, count, min_area, max_area, attempts, rng):
    """Place cubes on a (t, h, w) grid until `count` cells are masked or `attempts` in a row fail.

    A cube is accepted if it adds at least one cell and no more than are missing. max_area bounds
    its area in space. None means the number of missing cells, for images (t = 1, no draws in time).
    The order of the draws is the release's: area, aspect, duration, top, left, first step.
    """
    t, h, w = grid
    max_height, max_width = max(h - 1, 1), max(w - 1, 1)    # smaller than the grid (release)
    mask = np.zeros(grid, bool)
    missing, failed = count, 0
    # Few cubes fit a small grid, so the first one gets 100 times as many attempts (ours).
    while missing and (failed < attempts or missing == count and failed < 100 * attempts):
        failed += 1
        area = rng.uniform(min_area, missing if max_area is None else max_area)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        duration = 1 if max_area is None else 1 + rng.randrange(t)
        if max(h, w) > 2 * min(h, w):                       # ours, hardly any block fits it
            height, width = min(height, max_height), min(width, max_width)
        if height > max_height or width > max_width:
            continue
        y, x = rng.randrange(h - height + 1), rng.randrange(w - width + 1)
        f = 0 if max_area is None else rng.randrange(t - duration + 1)
        cube = mask[f:f + duration, y:y + height, x:x + width]
        added = cube.size - np.count_nonzero(cube)
        if 0 < added <= missing:
            cube[:] = True                                  # a view: this writes into the mask
            missing, failed = missing - added, 0
    if missing == count:                                    # on tiny grids only (ours)
        mask.flat[rng.randrange(mask.size)] = True
    return mask


MASKS = {"cube": cube_mask, "tube": tube_mask, "frame": frame_mask, "block": block_mask}


def draw_mask(kind, grid, ratio, rng, frame_runs=True):
    """A mask of a kind in MASKS. frame_runs: see `consecutive` of frame_mask."""
    if kind == "frame":
        return frame_mask(grid, ratio, rng, consecutive=frame_runs)
    return MASKS[kind](grid, ratio, rng)
