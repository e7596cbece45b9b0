"""Which tokens MaskFeat hides: block masks for images; cube, tube and frame masks for video.

Paper: Sec. 4.3 and Table 6 (cube, tube, frame), Sec. 5 (block-wise masking of images).
Release: the mask generators in the data loaders of the SlowFast code; block and cube masks make the same
draws from Python's generator, so the same seed gives the same mask. Differences: frame masks can be
consecutive as in the paper, tube masks need no extra setting, grids of any shape give a usable mask.

All return a numpy bool array over the token grid, True = masked, holding both values. The target is
round(ratio * tokens); block, tube and cube masks never exceed it on the grid they are sampled on, and stop short
of it when no block fits any more (at ratio 0.4 by 0.2 to 0.3 % of the tokens on average).
"""
import math
import random
from itertools import accumulate

import numpy as np

LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)  # height over width of a block, uniform in the logarithm


def block_mask(grid, ratio, rng):
    """Blocks on an image's tokens, in BEiT's manner.

    grid: (h, w) tokens, more than one; ratio: share to mask, between 0 and 1; rng: a random.Random.
    Returns (h, w) bool. Raises ValueError for an unusable grid or ratio. Paper: Sec. 5. Release: images.
    """
    target = _target(grid, ratio, 2)
    h, w = grid
    return _sample((1, h, w), target, target // 5, None, 10, rng)[0]


def cube_mask(grid, ratio, rng, coarse=2):
    """Blocks that also last for a random number of time steps, the default for video.

    grid: (t, h, w) tokens; ratio, rng as in block_mask.
    coarse: sampled on (t, h / coarse, w / coarse), rounded up, then each cell is enlarged to coarse x coarse tokens,
        so that with odd sides the masked share is kept only approximately. 1 samples on the grid itself.
    Returns (t, h, w) bool. Raises ValueError for an unusable grid, ratio or coarse.
    Paper: Sec. 4.3, Table 6. Release: window (8, 7, 7) for 8x14x14 tokens.
    """
    _target(grid, ratio, 3)
    t, h, w = _window(grid, coarse)
    target = _target((t, h, w), ratio, 3)
    return _enlarge(_sample((t, h, w), target, h * w // 5, h * w, 100, rng), grid)


def tube_mask(grid, ratio, rng, coarse=2):
    """One block mask for all time steps; arguments, result and errors as in cube_mask.

    Paper: Sec. 4.3, Table 6. Release: works only if its window setting is cut down to two numbers by hand.
    """
    _target(grid, ratio, 3)
    t, h, w = _window(grid, coarse)
    return _enlarge(np.repeat(block_mask((h, w), ratio, rng)[None], t, axis=0), grid)


def frame_mask(grid, ratio, rng, consecutive=True):
    """Whole time steps, round(t * ratio) of them, at least one masked and one visible.

    grid: (t, h, w) tokens with t > 1; ratio, rng as in block_mask.
    consecutive: True, as the paper describes it: runs of neighbouring steps; False, the release: any distinct steps.
    Returns (t, h, w) bool. Raises ValueError for an unusable grid or ratio. Paper: Sec. 4.3, Table 6.
    """
    _target(grid, ratio, 3)
    t, h, w = grid
    if t < 2:
        raise ValueError(f"grid {t}x{h}x{w} has one time step, masking it would hide everything: use tube_mask")
    count = _target((t, 1), ratio, 2)
    steps = np.zeros(t, bool)
    if not consecutive:
        steps[rng.sample(range(t), count)] = True
    while (missing := count - int(steps.sum())) > 0:
        length = rng.randint(min(2, missing), missing)  # the paper does not give the length of a run
        starts = [i for i in range(t - length + 1) if not steps[i:i + length].all()]
        start = rng.choice(starts)
        steps[start:start + length] = True
    return np.repeat(steps, h * w).reshape(t, h, w)


def most_masked(kind, grid, ratio):
    """The largest number of tokens that draw_mask can hide: MaskFeat's `most_masked`. Arguments and errors as there.

    Cells of a coarser window have about the same size: a mask hides the most if it takes the largest.
    """
    if kind == "block":
        return _target(grid, ratio, 2)
    _target(grid, ratio, 3)
    t, h, w = grid
    if kind == "frame":
        return int(frame_mask(grid, ratio, random.Random(0)).sum())           # always as many
    t, y, x = _window(grid, 2)
    cells = np.outer(np.bincount(np.arange(h) * y // h), np.bincount(np.arange(w) * x // w))   # (y, x): tokens of each
    if kind == "tube":
        return t * int(np.sort(cells, axis=None)[-_target((y, x), ratio, 2):].sum())
    return int(np.sort(np.tile(cells, t), axis=None)[-_target((t, y, x), ratio, 3):].sum())


def _target(grid, ratio, axes):
    """Number of tokens to mask, round(ratio * tokens), but at least one and not all. Checks grid and ratio."""
    if len(grid) != axes or min(grid) < 1 or math.prod(grid) < 2:
        raise ValueError(f"grid {tuple(grid)} cannot be masked: give {axes} positive sides and more than one token")
    if not 0 < ratio < 1:
        raise ValueError(f"mask ratio {ratio} is not between 0 and 1: the paper's is 0.4")
    tokens = math.prod(grid)
    return min(max(round(ratio * tokens), 1), tokens - 1)


def _window(grid, coarse):
    """The coarser grid to sample on; the grid itself if a side is too short for two coarse cells."""
    t, h, w = grid
    if not isinstance(coarse, int) or coarse < 1:
        raise ValueError(f"coarse={coarse!r} is not a positive whole number: the release's is 2, 1 turns it off")
    return (t, -(-h // coarse), -(-w // coarse)) if min(h, w) >= 2 * coarse else (t, h, w)


def _enlarge(mask, grid):
    """Nearest-neighbour enlargement of a coarse (t, y, x) mask to the (t, h, w) grid. Each cell keeps a token."""
    _, h, w = grid
    _, y, x = mask.shape
    return mask[:, np.arange(h)[:, None] * y // h, np.arange(w) * x // w]


def _sample(window, target, min_area, max_area, attempts, rng):
    """Place cubes on a (t, h, w) window until `target` cells are masked or `attempts` tries in a row add nothing.

    A cube is accepted if it adds at least one cell and no more than are missing. max_area bounds its spatial area;
    None limits the area to what is missing and leaves time aside (t = 1): the release's rule for images.
    The order of the draws is the release's and must stay: area, aspect, duration, then top, left, first step.
    """
    t, h, w = window
    max_height, max_width = max(h - 1, 1), max(w - 1, 1)  # strictly smaller than the grid, except for a side of 1
    elongated = max(h, w) > 2 * min(h, w)
    # A set of cells is one whole number, a bit per cell: numpy takes twice as long on so few.
    rows = [0, *accumulate(1 << w * y for y in range(h))]                   # rows[n]: the first cell of n rows
    steps = [0, *accumulate(1 << h * w * z for z in range(t))]              # steps[n]: the first cell of n time steps
    visible = (1 << t * h * w) - 1
    missing = target
    random, bits, exp, sqrt = rng.random, rng.getrandbits, math.exp, math.sqrt  # names of their own are faster
    low, log_range = LOG_ASPECT[0], LOG_ASPECT[1] - LOG_ASPECT[0]

    def below(n):  # rng.randrange(n), draw for draw, in half the time
        length = n.bit_length()
        while (draw := bits(length)) >= n:
            pass
        return draw

    while missing:
        area_range = (missing if max_area is None else max_area) - min_area
        for _ in range(attempts):
            area = min_area + area_range * random()                         # as rng.uniform does
            aspect = exp(low + log_range * random())
            height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            duration = 1 if max_area is None else 1 + below(t)
            if elongated:  # hardly any block would fit a long narrow grid (none in the release): trim it
                height, width = min(height, max_height), min(width, max_width)
            if height > max_height or width > max_width:
                continue
            top, left = below(h - height + 1), below(w - width + 1)
            first = 0 if max_area is None else below(t - duration + 1)
            cube = ((1 << width) - 1) * rows[height] * steps[duration] << (first * h + top) * w + left
            added = (cube & visible).bit_count()
            if 0 < added <= missing:
                visible &= ~cube
                missing -= added
                break
        else:
            break
    if missing == target:  # only on tiny grids: never leave everything visible
        visible &= ~(1 << rng.randrange(t * h * w))
    flags = np.frombuffer(visible.to_bytes(t * h * w // 8 + 1, "little"), np.uint8)
    return np.unpackbits(flags, count=t * h * w, bitorder="little").reshape(window) == 0


MASKS = {"cube": cube_mask, "tube": tube_mask, "frame": frame_mask, "block": block_mask}


def draw_mask(kind, grid, ratio, rng, frame_runs=True):
    """A mask by the name of its kind, see MASKS; frame_runs: frame_mask's `consecutive`."""
    if kind == "frame":
        return frame_mask(grid, ratio, rng, consecutive=frame_runs)
    return MASKS[kind](grid, ratio, rng)
