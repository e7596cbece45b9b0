"""Random augmentation: operations against plain formulas, strength, probabilities, one draw for a whole clip."""
import math
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import augment
from augment import (OPERATIONS, apply_operations, color_jitter, draw_operations, erase, erasing_box, mix,
                     parse_rand_augment, rand_augment, soft_cross_entropy)
from conftest import golden_input

UNLEVELLED = ("AutoContrast", "Equalize", "Invert")


def picture(seed=0, height=48, width=64):
    """Smooth colours with some noise, uint8 (H, W, 3), values from 20 to 235."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / rng.uniform(4, 9) + rng.uniform(0, 6)) + np.cos(x / rng.uniform(4, 9)) for _ in range(3)]
    return (127 + 45 * np.stack(waves, -1) + rng.uniform(-17, 17, (height, width, 3))).astype(np.uint8)


def run(name, argument, array, **options):
    return np.asarray(apply_operations([Image.fromarray(array)], [(name, argument)], **options)[0])


def argument_at(name, magnitude, sign=1):
    return OPERATIONS[name][0](sign * magnitude / 10)


# ---------------------------------------------------------------- single operations


def test_arguments_at_full_magnitude():
    """The ranges of the release's "increasing" list."""
    full = {name: entry[0](1) for name, entry in OPERATIONS.items() if entry[0]}
    assert full == {"Rotate": 30, "Posterize": 0, "Solarize": 0, "SolarizeAdd": 110, "Color": 1.9, "Contrast": 1.9,
                    "Brightness": 1.9, "Sharpness": 1.9, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 0.45,
                    "TranslateY": 0.45}
    assert [name for name in OPERATIONS if name not in full] == list(UNLEVELLED)
    assert {name for name, entry in OPERATIONS.items() if entry[1]} == set(full) - {"Posterize", "Solarize",
                                                                                    "SolarizeAdd"}
    # whole numbers are cut off, not rounded: at magnitude 7 the arguments are 2 bits, 77 and 256 - 179
    assert [argument_at(name, 7) for name in ("Posterize", "SolarizeAdd", "Solarize")] == [2, 77, 77]
    assert argument_at("SolarizeAdd", 6.5) == 71
    assert argument_at("Brightness", 7, -1) == pytest.approx(0.37)


def test_look_up_operations():
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    value = array.astype(int)
    assert (run("Invert", None, array) == 255 - value).all()
    assert (run("Solarize", 77, array) == np.where(value < 77, value, 255 - value)).all()
    assert (run("SolarizeAdd", 110, array) == np.where(value < 128, value + 110, value)).all()
    assert (run("Posterize", 2, array) == value // 64 * 64).all()
    assert (run("Posterize", 0, array) == 0).all()             # newer Pillow's own function refuses 0 bits


def test_enhancements():
    array = picture()
    value = array.astype(float)
    grey = np.asarray(Image.fromarray(array).convert("L")).astype(float)
    for factor in (0.1, 0.6, 1.9):
        for name, base in (("Brightness", 0), ("Color", grey[..., None]), ("Contrast", int(grey.mean() + 0.5))):
            wanted = (base + factor * (value - base)).clip(0, 255)
            assert np.abs(run(name, factor, array) - wanted).max() <= 1, (name, factor)
    edges = lambda image: np.abs(np.diff(image.astype(float), axis=1)).mean()
    assert edges(run("Sharpness", 0.1, array)) < edges(array) < edges(run("Sharpness", 1.9, array))


def test_histogram_operations():
    array = picture()
    stretched = run("AutoContrast", None, array)
    low, high = array.min((0, 1)).astype(float), array.max((0, 1)).astype(float)
    assert np.abs(stretched - (array - low) * 255 / (high - low)).max() <= 1
    counts = np.histogram(run("Equalize", None, array), bins=8, range=(0, 256))[0] / array.size
    assert np.abs(counts - 1 / 8).max() < 0.01 < np.abs(np.histogram(array, 8, (0, 256))[0] / array.size - 1 / 8).max()


def test_translation_moves_whole_pixels():
    array = picture(width=60, height=40)
    for pixels in (6, -9):
        moved = np.full_like(array, 128)
        inside = slice(0, 60 - pixels) if pixels > 0 else slice(-pixels, 60)
        moved[:, inside] = array[:, max(pixels, 0):60 + min(pixels, 0)]
        assert (run("TranslateX", pixels / 60, array) == moved).all()
        moved = np.full_like(array, 128)
        inside = slice(0, 40 - pixels) if pixels > 0 else slice(-pixels, 40)
        moved[inside] = array[max(pixels, 0):40 + min(pixels, 0)]
        assert (run("TranslateY", pixels / 40, array) == moved).all()
    assert (run("TranslateX", 0.25, array, fill=(1, 2, 3))[0, -1] == (1, 2, 3)).all()


def test_shear_and_rotation_move_a_point():
    """A bright spot lands where the map says: (x, y) shows (x + a y, y), (x, y + a x), or is turned anticlockwise."""
    array = np.zeros((65, 65, 3), np.uint8)
    array[19:22, 39:42] = 255                                  # centre at x = 40.5, y = 20.5 in continuous coordinates

    def spot(image):
        weight = image[..., 0].astype(float) * (image[..., 0] > 40)
        y, x = np.mgrid[:65, :65] + 0.5
        return (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()

    black = {"fill": (0, 0, 0)}
    assert spot(run("ShearX", 0.3, array, **black)) == pytest.approx((40.5 - 0.3 * 20.5, 20.5), abs=0.1)
    assert spot(run("ShearY", -0.2, array, **black)) == pytest.approx((40.5, 20.5 + 0.2 * 40.5), abs=0.1)
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    assert spot(run("Rotate", 30, array, **black)) == pytest.approx(
        (32.5 + 8 * cos - 12 * sin, 32.5 - 8 * sin - 12 * cos), abs=0.1)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in UNLEVELLED])
def test_strength_grows_with_magnitude(name):
    array = picture()
    for sign in (1, -1) if OPERATIONS[name][1] else (1,):
        distance = [np.abs(run(name, argument_at(name, m, sign), array) - array.astype(float)).mean()
                    for m in (0, 2.5, 5, 7.5, 10)]
        if name == "Posterize":
            assert (run(name, 4, array) == array // 16 * 16).all() and argument_at(name, 0) == 4
        else:
            assert distance[0] == 0                            # magnitude 0 leaves the image as it is
        if name in ("TranslateX", "TranslateY", "ShearX", "ShearY", "Rotate"):
            assert min(distance[1:]) > 5                       # a periodic picture may come to match itself again
            grey = [(run(name, argument_at(name, m, sign), np.zeros_like(array)) == 128).mean()
                    for m in (0, 2.5, 5, 7.5, 10)]
            assert grey[0] == 0 and all(a < b for a, b in zip(grey, grey[1:]))
        else:
            assert all(a < b for a, b in zip(distance, distance[1:])), distance


# ---------------------------------------------------------------- draws


def test_same_seed_same_draw():
    clip = [Image.fromarray(picture(i)) for i in range(3)]
    results = {}
    for seed in range(20):
        first, again = (rand_augment(clip, random.Random(seed)) for _ in range(2))
        assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
        assert len(first) == 3 and first[0].size == clip[0].size
        results[b"".join(image.tobytes() for image in first)] = seed
    assert len(results) > 10                                   # a quarter of them, at most, draws no operation


def test_one_draw_for_a_clip():
    same = [Image.fromarray(picture())] * 4
    for seed in range(60):
        frames = rand_augment(same, random.Random(seed), prob=1) + color_jitter(same, random.Random(seed))
        assert len({image.tobytes() for image in frames[:4]}) == len({image.tobytes() for image in frames[4:]}) == 1
    moving = [np.roll(picture(), 5 * i, axis=1) for i in range(4)]
    for seed in range(30):                                     # frames that differ: each as if it were alone
        clip = rand_augment([Image.fromarray(frame) for frame in moving], random.Random(seed))
        for frame, result in zip(moving, clip):
            alone, = rand_augment([Image.fromarray(frame)], random.Random(seed))
            assert alone.tobytes() == result.tobytes()


def test_same_affine_map_for_frames_of_a_moving_clip():
    """Where a map takes a pixel is seen from outside: the grey corners are the same in all frames."""
    clip = [Image.new("RGB", (64, 48), colour) for colour in ("red", "white", "blue", "black")]
    for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        for sign in (1, -1):
            outside = [(np.asarray(image) == 128).all(-1)
                       for image in apply_operations(clip, [(name, argument_at(name, 7, sign))])]
            assert 0.02 < outside[0].mean() < 0.5 and all((o == outside[0]).all() for o in outside)


def test_draw_probabilities():
    """20000 clips: counts within 4.5 standard deviations of the binomial, magnitudes as promised."""
    rng = random.Random(0)
    draws = [draw_operations(rng) for _ in range(20000)]

    def likely(count, trials, p):
        return abs(count - trials * p) < 4.5 * math.sqrt(trials * p * (1 - p))

    for number, p in enumerate((0.25, 0.5, 0.25)):
        assert likely(sum(len(operations) == number for operations in draws), 20000, p)
    flat = [operation for operations in draws for operation in operations]
    for name in OPERATIONS:
        assert likely(sum(n == name for n, _ in flat), 40000, 0.5 / 15), name
    angles = np.array([argument for name, argument in flat if name == "Rotate"])
    assert likely((angles < 0).sum(), len(angles), 0.5)
    magnitude = np.abs(angles) / 3
    assert magnitude.mean() == pytest.approx(7, abs=4.5 * 0.5 / math.sqrt(len(angles)))
    assert magnitude.std() == pytest.approx(0.5, abs=4.5 * 0.5 / math.sqrt(2 * len(angles)))
    twice = sum(len(o) == 2 and o[0][0] == o[1][0] for o in draws)
    assert likely(twice, 20000, 0.25 / 15)                     # with replacement


def test_magnitude_is_cut_to_its_range():
    rng = random.Random(1)
    drawn = [operation for _ in range(2000) for operation in draw_operations(rng, 9.5, 3, num_ops=4, prob=1)]
    angles = [abs(argument) for name, argument in drawn if name == "Rotate"]
    assert max(angles) == 30 and 0.3 < np.mean(np.array(angles) == 30) < 0.6
    drawn = [operation for _ in range(500) for operation in draw_operations(rng, 0.5, 3, num_ops=4, prob=1)]
    assert min(abs(argument) for name, argument in drawn if name == "Rotate") == 0
    assert draw_operations(rng, prob=0) == [] and len(draw_operations(rng, num_ops=4, prob=1)) == 4


def test_parse():
    assert parse_rand_augment("rand-m9-n4-mstd0.5-inc1") == {"magnitude": 9.0, "std": 0.5, "num_ops": 4}
    assert parse_rand_augment("rand-m7-mstd0.5-inc1") == {"magnitude": 7.0, "std": 0.5, "num_ops": 2}
    assert parse_rand_augment("rand-inc1") == {"magnitude": 10.0, "std": 0.0, "num_ops": 2}
    for text, part in (("rand-m9-w0-inc1", "'w0'"), ("rand-m9-inc0", "'inc0'"), ("rand-m9-n1.5-inc1", "'n1.5'"),
                       ("rand-m9-mstd0.5", "inc1"), ("augmix-m9-inc1", "augmix"), ("rand-m12-inc1", "m12"),
                       ("rand-m9--inc1", "''"), ("", "inc1")):
        with pytest.raises(ValueError, match=part):
            parse_rand_augment(text)


def test_other_modes_are_refused():
    with pytest.raises(ValueError, match='mode L .*"RGB"'):
        rand_augment([Image.new("L", (8, 8))], random.Random(0))


def test_color_jitter():
    image = Image.fromarray(picture())
    assert color_jitter([image], random.Random(0), 0)[0].tobytes() == image.tobytes()
    mean = lambda strength: np.array([np.asarray(color_jitter([image], random.Random(seed), strength)[0]).mean()
                                      for seed in range(200)]) / np.asarray(image).mean()
    factor = mean(0.4)                # colour and contrast keep the mean nearly, so this is the brightness factor
    assert 0.55 < factor.min() < 0.68 and 1.3 < factor.max() < 1.45
    assert factor.mean() == pytest.approx(1, abs=4.5 * 0.4 / math.sqrt(3 * 200))
    assert mean(0.1).std() < factor.std() / 2
    with pytest.raises(ValueError, match="-1"):
        color_jitter([image], random.Random(0), -1)


# ---------------------------------------------------------------- erasing


def test_erasing_box_within_bounds():
    rng = random.Random(0)
    boxes = [erasing_box(112, 160, rng) for _ in range(8000)]
    drawn = [box for box in boxes if box[2]]
    assert abs(len(drawn) - 2000) < 4.5 * math.sqrt(8000 * 0.25 * 0.75)
    assert all(box == (0, 0, 0, 0) for box in boxes if not box[2])
    top, left, h, w = np.array(drawn).T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 112).all() and (left + w <= 160).all()
    assert h.max() < 112 and w.max() < 160
    rounding = 0.5 / h + 0.5 / w
    share, aspect = h * w / (112 * 160), h / w
    assert (share > 0.02 * (1 - rounding) - 1e-3).all() and (share < (1 + rounding) / 3 + 1e-3).all()
    assert (aspect > 0.3 * (1 - 2 * rounding)).all() and (aspect < (1 + 2 * rounding) / 0.3).all()
    assert abs(np.log(aspect[share < 0.2]).mean()) < 4.5 * 0.7 / math.sqrt((share < 0.2).sum())  # log-uniform
    assert share.min() < 0.03 and share.max() > 0.32 and aspect.min() < 0.35 and aspect.max() > 2.9
    assert erasing_box(112, 160, rng, prob=0) == (0, 0, 0, 0) and erasing_box(112, 160, rng, prob=1)[2] > 0
    assert erasing_box(1, 1, rng, prob=1) == (0, 0, 0, 0)      # nothing fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_erase(dtype):
    x = torch.full((3, 3, 6, 40, 50), 7.0, dtype=dtype)
    boxes = torch.tensor([[5, 10, 30, 20], [0, 0, 0, 0], [0, 45, 40, 5]])
    assert erase(x, boxes, torch.tensor([11, 12, 13])) is x
    for sample, (top, left, h, w) in zip(x, boxes.tolist()):
        inside = torch.zeros(40, 50, dtype=torch.bool)
        inside[top:top + h, left:left + w] = True
        assert (sample[..., ~inside] == 7).all() and not (sample[..., inside] == 7).any()
        if h:
            noise = sample[..., inside].float()                # (3, T, pixels)
            assert abs(noise.mean()) < 4.5 / math.sqrt(noise.numel())
            assert abs(noise.var() - 1) < 4.5 * math.sqrt(2 / noise.numel())
            between = torch.corrcoef(noise.flatten(0, 1)) - torch.eye(18)  # each colour of each frame has its own
            assert between.abs().max() < 5 / math.sqrt(h * w)


def test_erase_does_not_depend_on_the_batch():
    x = golden_input((4, 3, 5, 16, 16))
    boxes, seeds = torch.tensor([[2, 3, 9, 7]] * 3 + [[0, 0, 0, 0]]), torch.tensor([5, 6, 5, 7])
    together = erase(x.clone(), boxes, seeds)
    order = torch.tensor([3, 1, 2, 0])
    assert torch.equal(erase(x[order], boxes[order], seeds[order]), together[order])
    assert torch.equal(erase(x[1:2].clone(), boxes[1:2], seeds[1:2]), together[1:2])
    hole = together[..., 2:11, 3:10]
    assert torch.equal(hole[0], hole[2]) and not (hole[0] == hole[1]).any()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    erase(x.clone(), boxes, seeds)
    assert torch.equal(torch.get_rng_state(), before)          # the common generator is not touched
    image = erase(x[:, :, 0].clone(), boxes, seeds)
    assert torch.equal(image[3], x[3, :, 0]) and not (image[0, :, 2:11, 3:10] == x[0, :, 0, 2:11, 3:10]).any()


def test_erase_errors():
    box, seed = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="uint8"):
        erase(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), box, seed)
    with pytest.raises(ValueError, match="2 samples with 1 boxes"):
        erase(torch.zeros(2, 3, 8, 8), box, seed)


# ---------------------------------------------------------------- mixing


class Fixed(random.Random):
    """A generator whose beta draw is known."""

    def betavariate(self, alpha, beta):
        return 0.7


def smoothed(label, classes, smoothing=0.1):
    return [smoothing / classes + (1 - smoothing) * (label == c) for c in range(classes)]


@pytest.mark.parametrize("shape", [(4, 3, 2, 6, 8), (5, 3, 6, 8), (1, 3, 6, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixup_formula(shape, dtype):
    x, labels = golden_input(shape).to(dtype), torch.arange(shape[0]) % 3
    mixed, targets = mix(x, labels, 6, Fixed(0), cutmix=0)
    assert mixed.dtype == dtype and targets.dtype == torch.float32
    assert torch.equal(x, golden_input(shape).to(dtype))       # the batch itself is not changed
    B = shape[0]
    for i in range(B):
        wanted = 0.7 * x[i].double() + 0.3 * x[B - 1 - i].double()
        torch.testing.assert_close(mixed[i], wanted.to(dtype), rtol=2 * torch.finfo(dtype).eps,
                                   atol=4 * torch.finfo(dtype).eps)
        own, partner = smoothed(labels[i], 6), smoothed(labels[B - 1 - i], 6)
        np.testing.assert_allclose(targets[i], [0.7 * a + 0.3 * b for a, b in zip(own, partner)], rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 3, 3, 20, 30), (3, 3, 20, 30)])
def test_cutmix_share_is_exact(shape):
    """Each sample holds its own number, so the share of other pixels can be counted."""
    B = shape[0]
    x = torch.arange(B).view(B, *[1] * (len(shape) - 1)).expand(shape).float()
    shares = []
    for seed in range(200):
        mixed, targets = mix(x, torch.arange(B), B, random.Random(seed), mixup=0, smoothing=0)
        own = (mixed == x).float().flatten(1).mean(1)          # (B,)
        share = own[0].item()
        shares.append(share)
        assert ((mixed == x) | (mixed == x.flip(0))).all()
        wanted = torch.eye(B) * share + torch.eye(B).flip(0) * (1 - share)
        torch.testing.assert_close(targets, wanted, rtol=0, atol=1e-6)
        other = (mixed != x)[0]                                # one box, in all colours and frames
        assert (other == other[(0,) * (len(shape) - 3)]).all()
        rows, columns = other.flatten(0, -3).any(0).any(1), other.flatten(0, -3).any(0).any(0)
        assert other.float().mean().item() == pytest.approx((rows.sum() * columns.sum() / 600).item())
    assert min(shares) < 0.2 and max(shares) > 0.95


def test_cutmix_box_side():
    """A box that no border cuts has sides sqrt(1 - lambda) of the image's: here 0.548 of 100 and 200."""
    sides = {augment._cutmix_box(100, 200, 0.7, random.Random(seed)) for seed in range(300)}
    inner = [(b - t, r - l) for t, b, l, r in sides if t > 0 and l > 0 and b < 100 and r < 200]
    assert len(inner) > 30 and set(inner) == {(54, 108)}
    assert any(t == 0 for t, _, _, _ in sides) and any(r == 200 for _, _, _, r in sides)


def test_mix_draws():
    """Shares over many batches: both kinds by turns, mean lambda one half for mixup."""
    x, labels = torch.zeros(2, 3, 64, 64), torch.tensor([0, 1])
    x[1] = 1
    rng = random.Random(0)
    cut, lams = [], []
    for _ in range(3000):
        mixed, targets = mix(x, labels, 2, rng, smoothing=0)
        lams.append(targets[0, 0].item())
        cut.append(bool(((mixed == 0) | (mixed == 1)).all()))
    cut, lams = np.array(cut), np.array(lams)
    assert abs(cut.sum() - 1500) < 4.5 * math.sqrt(3000 / 4)
    assert lams[~cut].mean() == pytest.approx(0.5, abs=4.5 * lams[~cut].std() / math.sqrt((~cut).sum()))
    assert lams[~cut].var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1)     # Beta(0.8, 0.8)
    assert lams[cut].mean() > 0.55                             # what lies beyond the border is not cut out
    same = lambda **options: mix(x, labels, 2, random.Random(3), smoothing=0, **options)
    assert torch.equal(same()[0], same()[0])
    for options in ({"prob": 0}, {"mixup": 0, "cutmix": 0}):
        mixed, targets = same(**options)
        assert torch.equal(mixed, x) and torch.equal(targets, torch.eye(2))
    for only, is_cut in (({"cutmix": 0}, False), ({"mixup": 0}, True), ({"switch": 0}, False), ({"switch": 1}, True)):
        found = {bool(((m == 0) | (m == 1)).all()) for m in
                 (mix(x, labels, 2, random.Random(seed), **only)[0] for seed in range(20))}
        assert found == {is_cut}


def test_targets_sum_to_one():
    labels = torch.tensor([4, 0, 2])
    for seed in range(30):
        _, targets = mix(torch.zeros(3, 3, 16, 16), labels, 7, random.Random(seed))
        torch.testing.assert_close(targets.sum(1), torch.ones(3), rtol=0, atol=1e-6)
        assert targets.min() == pytest.approx(0.1 / 7) and targets[1].argmax() == 0   # the middle one meets itself
    _, targets = mix(torch.zeros(3, 3, 16, 16), labels, 7, random.Random(0), mixup=0, cutmix=0)
    np.testing.assert_allclose(targets, [smoothed(label, 7) for label in labels], rtol=1e-6)


def test_mix_errors():
    x, labels = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="uint8"):
        mix(x.byte(), labels, 2, random.Random(0))
    for option in ({"mixup": -1}, {"cutmix": -0.5}, {"smoothing": 1}):
        with pytest.raises(ValueError, match="{}={}".format(*next(iter(option.items())))):
            mix(x, labels, 2, random.Random(0), **option)


@pytest.mark.parametrize("name, classes", [("vit_b_ft", 1000), ("mvitv2_s_ft", 400)])
def test_golden_loss(name, classes, golden):
    """The release's loss of the released layout's logits, labels 3 and 4, lambda 0.7, smoothing 0.1."""
    z = golden(f"{name}.npz")
    _, targets = mix(torch.zeros(2, 3, 4, 4), torch.tensor([3, 4]), classes, Fixed(0), cutmix=0)
    loss = soft_cross_entropy(torch.from_numpy(z["logits"]), targets)
    assert loss.item() == pytest.approx(float(z["loss"]), rel=1e-6)


def test_soft_cross_entropy_is_float32_inside():
    logits = golden_input((4, 10)) * 20
    targets = torch.full((4, 10), 0.1)
    low = logits.bfloat16()
    assert soft_cross_entropy(low, targets).dtype == torch.float32
    assert torch.equal(soft_cross_entropy(low, targets), soft_cross_entropy(low.float(), targets))
    hard = torch.nn.functional.one_hot(torch.tensor([1, 2, 3, 9]), 10).float()
    torch.testing.assert_close(soft_cross_entropy(logits, hard),
                               torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2, 3, 9])))


# ---------------------------------------------------------------- the contact sheet


def test_contact_sheet(tmp_path, monkeypatch):
    array = picture(height=128, width=128)
    Image.fromarray(array).save(tmp_path / "a.png")
    sheets = []
    for name, seed in (("one.png", 0), ("two.png", 0), ("three.png", 1)):
        output = tmp_path / "new" / name
        monkeypatch.setattr(sys, "argv", ["augment.py", str(tmp_path / "a.png"), str(output), "--seed", str(seed)])
        augment.main()
        sheets.append(np.asarray(Image.open(output)))
    assert (sheets[0] == sheets[1]).all() and (sheets[0] != sheets[2]).any()
    assert sheets[0].shape == (9 * 132, 190 + 132, 3) and (sheets[0][:128, 190:-4] == array).all()
    monkeypatch.setattr(sys, "argv", ["augment.py", str(tmp_path / "none.mp4"), "b.png"])
    with pytest.raises(FileNotFoundError, match="none.mp4"):
        augment.main()
