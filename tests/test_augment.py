"""Random augmentation: operations against plain formulas, strength, probabilities."""
import math
import random
import sys

import numpy as np
import pytest
import torch
from conftest import golden_input
from PIL import Image

import augment
from augment import OPERATIONS, color_jitter, draw_operations, erase, erasing_box, mix, rand_augment
from tools import augmentations

UNLEVELED = ("AutoContrast", "Equalize", "Invert")
MOVING = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def picture(seed=0, height=48, width=64):
    """Smooth colors with some noise, uint8 (H, W, 3), values from 20 to 235."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / rng.uniform(4, 9) + rng.uniform(0, 6)) + np.cos(x / rng.uniform(4, 9))
             for _ in range(3)]
    noise = rng.uniform(-17, 17, (height, width, 3))
    return (127 + 45 * np.stack(waves, -1) + noise).astype(np.uint8)


def run(name, argument, array, **options):
    images = [Image.fromarray(array)]
    return np.asarray(augment.apply_operations(images, [(name, argument)], **options)[0])


def argument_at(name, magnitude, sign=1):
    return OPERATIONS[name][0](sign * magnitude / 10)


def content(images):
    return [image.tobytes() for image in images]


def likely(count, trials, p):
    """Within 4.5 standard deviations of the binomial distribution."""
    return abs(count - trials * p) < 4.5 * math.sqrt(trials * p * (1 - p))


def test_arguments_at_full_magnitude():
    """The ranges of the release's "increasing" list."""
    full = {name: entry[0](1) for name, entry in OPERATIONS.items() if entry[0]}
    assert full == {"Rotate": 30, "Posterize": 0, "Solarize": 0, "SolarizeAdd": 110, "Color": 1.9,
                    "Contrast": 1.9, "Brightness": 1.9, "Sharpness": 1.9, "ShearX": 0.3,
                    "ShearY": 0.3, "TranslateX": 0.45, "TranslateY": 0.45}
    assert [name for name in OPERATIONS if name not in full] == list(UNLEVELED)
    unsigned = {"Posterize", "Solarize", "SolarizeAdd"}
    assert {name for name, entry in OPERATIONS.items() if entry[1]} == set(full) - unsigned
    # Whole numbers are cut off, not rounded: at magnitude 7 the last is 256 - 179.
    assert [argument_at(name, 7) for name in sorted(unsigned)] == [2, 77, 77]
    assert argument_at("SolarizeAdd", 6.5) == 71
    assert argument_at("Brightness", 7, -1) == pytest.approx(0.37)


def test_look_up_operations():
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    v = array.astype(int)
    for name, argument, want in (
            ("Invert", None, 255 - v), ("Solarize", 77, np.where(v < 77, v, 255 - v)),
            ("SolarizeAdd", 110, np.where(v < 128, v + 110, v)), ("Posterize", 2, v // 64 * 64),
            ("Posterize", 0, 0 * v)):  # newer Pillow's own function refuses 0 bits
        assert (run(name, argument, array) == want).all(), name


def test_enhancements():
    array = picture()
    value = array.astype(float)
    gray = np.asarray(Image.fromarray(array).convert("L")).astype(float)
    for factor in (0.1, 0.6, 1.9):
        for name, base in (("Brightness", 0), ("Color", gray[..., None]),
                           ("Contrast", int(gray.mean() + 0.5))):
            want = (base + factor * (value - base)).clip(0, 255)
            assert np.abs(run(name, factor, array) - want).max() <= 1, (name, factor)
    edges = lambda image: np.abs(np.diff(image.astype(float), axis=1)).mean()
    smooth, sharp = (run("Sharpness", factor, array) for factor in (0.1, 1.9))
    assert edges(smooth) < edges(array) < edges(sharp)


def test_histogram_operations():
    array = picture()
    low, high = array.min((0, 1)).astype(float), array.max((0, 1)).astype(float)
    want = (array - low) * 255 / (high - low)
    assert np.abs(run("AutoContrast", None, array) - want).max() <= 1
    share = lambda image: np.histogram(image, bins=8, range=(0, 256))[0] / array.size
    error = [np.abs(share(image) - 1 / 8).max() for image in (run("Equalize", None, array), array)]
    assert error[0] < 0.01 < error[1]


@pytest.mark.parametrize("name, axis", [("TranslateX", 1), ("TranslateY", 0)])
@pytest.mark.parametrize("pixels", [6, -9])
def test_translation_moves_whole_pixels(name, axis, pixels):
    array = picture(width=60, height=40)
    want = np.roll(array, -pixels, axis)
    outside = slice(-pixels, None) if pixels > 0 else slice(None, -pixels)
    want[(slice(None),) * axis + (outside,)] = (1, 2, 3)
    assert (run(name, pixels / array.shape[axis], array, fill=(1, 2, 3)) == want).all()


def test_shear_and_rotation_move_a_point():
    """A spot lands where the map says: (x, y) shows (x + ay, y), (x, y + ax) or turned left."""
    array = np.zeros((65, 65, 3), np.uint8)
    array[19:22, 39:42] = 255  # center at x = 40.5, y = 20.5
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    y, x = np.mgrid[:65, :65] + 0.5
    for name, argument, place in (
            ("ShearX", 0.3, (40.5 - 0.3 * 20.5, 20.5)), ("ShearY", -0.2, (40.5, 20.5 + 0.2 * 40.5)),
            ("Rotate", 30, (32.5 + 8 * cos - 12 * sin, 32.5 - 8 * sin - 12 * cos))):
        weight = run(name, argument, array, fill=(0, 0, 0))[..., 0].astype(float)
        weight *= weight > 40
        spot = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
        assert spot == pytest.approx(place, abs=0.1), name


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in UNLEVELED])
def test_strength_grows_with_magnitude(name):
    array, black = picture(), np.zeros((48, 64, 3), np.uint8)
    for sign in (1, -1) if OPERATIONS[name][1] else (1,):
        arguments = [argument_at(name, magnitude, sign) for magnitude in (0, 2.5, 5, 7.5, 10)]
        change = [np.abs(run(name, a, array) - array.astype(float)).mean() for a in arguments]
        if name == "Posterize":
            assert arguments[0] == 4 and (run(name, 4, array) == array // 16 * 16).all()
        else:
            assert change[0] == 0
        if name in MOVING:  # a periodic picture may come to match itself again
            assert min(change[1:]) > 5
            change = [(run(name, a, black) == 128).mean() for a in arguments]
            assert change[0] == 0
        assert all(a < b for a, b in zip(change, change[1:])), change


def test_one_draw_for_a_clip():
    """The seed decides the draw. All frames get the same, each as if it were alone."""
    clip = [Image.fromarray(np.roll(picture(), 5 * i, axis=1)) for i in range(3)]
    results = set()
    for seed in range(30):
        result = content(rand_augment(clip, random.Random(seed)))
        alone = [rand_augment([frame], random.Random(seed))[0] for frame in clip]
        assert result == content(alone) == content(rand_augment(clip, random.Random(seed)))
        results.add(tuple(result))
        same = color_jitter(clip[:1] * 3, random.Random(seed))
        assert len(set(content(same))) == 1 and same[0].size == clip[0].size
    assert len(results) > 15  # about a quarter of them draw no operation


def test_draw_probabilities():
    """20000 clips: how many operations, which, with which sign and magnitude."""
    rng = random.Random(0)
    draws = [draw_operations(rng) for _ in range(20000)]
    for number, p in enumerate((0.25, 0.5, 0.25)):
        assert likely(sum(len(operations) == number for operations in draws), 20000, p)
    flat = [operation for operations in draws for operation in operations]
    for name in OPERATIONS:
        assert likely(sum(n == name for n, _ in flat), 40000, 0.5 / 15), name
    angles = np.array([argument for name, argument in flat if name == "Rotate"])
    assert likely((angles < 0).sum(), len(angles), 0.5)
    magnitude, error = np.abs(angles) / 3, 4.5 * 0.5 / math.sqrt(len(angles))
    assert magnitude.mean() == pytest.approx(7, abs=error)
    assert magnitude.std() == pytest.approx(0.5, abs=error / math.sqrt(2))
    twice = sum(len(o) == 2 and o[0][0] == o[1][0] for o in draws)
    assert likely(twice, 20000, 0.25 / 15)  # with replacement


def test_magnitude_is_cut_to_its_range():
    rng = random.Random(1)
    high, low = ([abs(argument) for _ in range(2000)
                  for name, argument in draw_operations(rng, magnitude, 3, num_ops=4, prob=1)
                  if name == "Rotate"] for magnitude in (9.5, 0.5))
    assert max(high) == 30 and 0.3 < np.mean(np.array(high) == 30) < 0.6 and min(low) == 0
    assert draw_operations(rng, prob=0) == []
    assert len(draw_operations(rng, num_ops=4, prob=1)) == 4


@pytest.mark.parametrize("text, want", [
    ("rand-m9-n4-mstd0.5-inc1", {"magnitude": 9.0, "std": 0.5, "num_ops": 4}),
    ("rand-m7-mstd0.5-inc1", {"magnitude": 7.0, "std": 0.5, "num_ops": 2}),
    ("rand-inc1", {"magnitude": 10.0, "std": 0.0, "num_ops": 2}),
    ("rand-m9-w0-inc1", "'w0'"), ("rand-m9-inc0", "'inc0'"), ("rand-m9-n1.5-inc1", "'n1.5'"),
    ("rand-m9-mstd0.5", "inc1"), ("augmix-m9-inc1", "augmix"), ("rand-m12-inc1", "m12"),
    ("rand-m9--inc1", "''"), ("", "inc1")])
def test_parse(text, want):
    if isinstance(want, dict):
        assert augment.parse_rand_augment(text) == want
        return
    with pytest.raises(ValueError, match=want):
        augment.parse_rand_augment(text)


def test_color_jitter():
    image = Image.fromarray(picture())
    assert content(color_jitter([image], random.Random(0), 0)) == content([image])
    mean = lambda strength: np.array([
        np.asarray(color_jitter([image], random.Random(seed), strength)[0]).mean()
        for seed in range(200)]) / np.asarray(image).mean()
    factor = mean(0.4)  # nearly that of brightness, as color and contrast keep the mean
    assert 0.55 < factor.min() < 0.68 and 1.3 < factor.max() < 1.45
    assert factor.mean() == pytest.approx(1, abs=4.5 * 0.4 / math.sqrt(3 * 200))
    assert mean(0.1).std() < factor.std() / 2


def test_erasing_box_within_bounds():
    rng = random.Random(0)
    boxes = [erasing_box(112, 160, rng) for _ in range(8000)]
    drawn = [box for box in boxes if box[2]]
    assert likely(len(drawn), 8000, 0.25)
    assert all(box == (0, 0, 0, 0) for box in boxes if not box[2])
    top, left, h, w = np.array(drawn).T
    assert min(top.min(), left.min()) >= 0 and (top + h).max() <= 112 and (left + w).max() <= 160
    share, aspect, rounding = h * w / (112 * 160), h / w, 0.5 / h + 0.5 / w
    assert (share > 0.02 * (1 - rounding) - 1e-3).all()
    assert (share < (1 + rounding) / 3 + 1e-3).all()
    assert (aspect > 0.3 * (1 - 2 * rounding)).all() and (aspect < (1 + 2 * rounding) / 0.3).all()
    log = np.log(aspect[share < 0.2])
    assert abs(log.mean()) < 4.5 * 0.7 / math.sqrt(len(log))  # uniform in the logarithm
    assert share.min() < 0.03 and share.max() > 0.32 and aspect.min() < 0.35 and aspect.max() > 2.9
    assert erasing_box(112, 160, rng, prob=0)[2] == 0 < erasing_box(112, 160, rng, prob=1)[2]
    assert erasing_box(1, 1, rng, prob=1) == (0, 0, 0, 0)  # nothing fits


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
            noise = sample[..., inside].float()  # (3, T, pixels)
            assert abs(noise.mean()) < 4.5 / math.sqrt(noise.numel())
            assert abs(noise.var() - 1) < 4.5 * math.sqrt(2 / noise.numel())
            between = torch.corrcoef(noise.flatten(0, 1)) - torch.eye(18)
            assert between.abs().max() < 5 / math.sqrt(h * w)  # independent colors and frames


def test_erase_does_not_depend_on_the_batch():
    x, seeds = golden_input((4, 3, 5, 16, 16)), torch.tensor([5, 6, 5, 7])
    boxes = torch.tensor([[2, 3, 9, 7]] * 3 + [[0, 0, 0, 0]])
    before = torch.get_rng_state()
    together = erase(x.clone(), boxes, seeds)
    assert torch.equal(torch.get_rng_state(), before)  # the common generator is not touched
    order = torch.tensor([3, 1, 2, 0])
    assert torch.equal(erase(x[order], boxes[order], seeds[order]), together[order])
    assert torch.equal(erase(x[1:2].clone(), boxes[1:2], seeds[1:2]), together[1:2])
    hole = together[..., 2:11, 3:10]
    assert torch.equal(hole[0], hole[2]) and not (hole[0] == hole[1]).any()
    changed = erase(x[:, :, 0].clone(), boxes, seeds) != x[:, :, 0]  # images
    assert changed[:3, :, 2:11, 3:10].all() and changed.sum() == 3 * 3 * 9 * 7


class Fixed(random.Random):
    """A generator whose beta draw is known."""

    def betavariate(self, alpha, beta):
        return 0.7


def smoothed(labels, classes, smoothing=0.1):
    return np.eye(classes)[labels.numpy()] * (1 - smoothing) + smoothing / classes


@pytest.mark.parametrize("shape", [(4, 3, 2, 6, 8), (5, 3, 6, 8), (1, 3, 6, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixup_formula(shape, dtype):
    x, labels = golden_input(shape).to(dtype), torch.arange(shape[0]) % 3
    mixed, targets = mix(x, labels, 6, Fixed(0), cutmix=0)
    assert mixed.dtype == dtype and targets.dtype == torch.float32
    assert torch.equal(x, golden_input(shape).to(dtype))  # the batch itself is not changed
    want, eps = 0.7 * x.double() + 0.3 * x.double().flip(0), torch.finfo(dtype).eps
    torch.testing.assert_close(mixed, want.to(dtype), rtol=2 * eps, atol=4 * eps)
    own = smoothed(labels, 6)
    np.testing.assert_allclose(targets, 0.7 * own + 0.3 * own[::-1], rtol=1e-6)
    _, targets = mix(x, labels, 6, Fixed(0), mixup=0, cutmix=0)
    np.testing.assert_allclose(targets, own, rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 3, 3, 20, 30), (3, 3, 20, 30)])
def test_cutmix_share_is_exact(shape):
    """Each sample holds its own number, so the share of other pixels can be counted."""
    B = shape[0]
    x = torch.arange(B).view(B, *[1] * (len(shape) - 1)).expand(shape).float()
    shares = []
    for seed in range(200):
        mixed, targets = mix(x, torch.arange(B), B, random.Random(seed), mixup=0, smoothing=0)
        assert ((mixed == x) | (mixed == x.flip(0))).all()
        shares.append((mixed == x)[0].float().mean().item())
        want = torch.eye(B) * shares[-1] + torch.eye(B).flip(0) * (1 - shares[-1])
        torch.testing.assert_close(targets, want, rtol=0, atol=1e-6)
        other = (mixed != x)[0].flatten(0, -3)  # one box, in all colors and frames
        assert (other == other[0]).all()
        assert other[0].sum() == other[0].any(0).sum() * other[0].any(1).sum()
    assert min(shares) < 0.2 and max(shares) > 0.95


def test_cutmix_box_side():
    """A box that no border cuts has sides sqrt(1 - lambda) of the image: 0.548 of 100 and 200."""
    boxes = {augment._cutmix_box(100, 200, 0.7, random.Random(seed)) for seed in range(300)}
    inner = [(b - t, r - l) for t, b, l, r in boxes if t > 0 and l > 0 and b < 100 and r < 200]
    assert len(inner) > 30 and set(inner) == {(54, 108)}
    assert any(t == 0 for t, _, _, _ in boxes) and any(r == 200 for _, _, _, r in boxes)


@pytest.mark.slow
def test_mix_draws():
    """Shares over many batches: both kinds by turns, mean lambda one half for mixup."""
    x, labels, rng = torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), random.Random(0)
    x[1] = 1
    pure = lambda mixed: bool(((mixed == 0) | (mixed == 1)).all())
    draws = [mix(x, labels, 2, rng, smoothing=0) for _ in range(3000)]
    cut = np.array([pure(mixed) for mixed, _ in draws])
    lams = np.array([targets[0, 0].item() for _, targets in draws])
    assert likely(cut.sum(), 3000, 0.5)
    error = 4.5 * lams[~cut].std() / math.sqrt((~cut).sum())
    assert lams[~cut].mean() == pytest.approx(0.5, abs=error)
    assert lams[~cut].var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.1)  # Beta(0.8, 0.8)
    assert lams[cut].mean() > 0.55  # what lies beyond the border is not cut out
    for options in ({"prob": 0}, {"mixup": 0, "cutmix": 0}):
        mixed, targets = mix(x, labels, 2, random.Random(3), smoothing=0, **options)
        assert torch.equal(mixed, x) and torch.equal(targets, torch.eye(2))
    for only, is_cut in (({"cutmix": 0}, False), ({"mixup": 0}, True),
                         ({"switch": 0}, False), ({"switch": 1}, True)):
        assert {pure(mix(x, labels, 2, random.Random(seed), **only)[0])
                for seed in range(20)} == {is_cut}


@pytest.mark.parametrize("call, words", [
    (lambda x, i: rand_augment([Image.new("L", (8, 8))], random.Random(0)), 'mode L.*"RGB"'),
    (lambda x, i: color_jitter([Image.new("RGB", (8, 8))], random.Random(0), -1), "-1"),
    (lambda x, i: erase(x.byte(), torch.zeros(2, 4).int(), i), "uint8"),
    (lambda x, i: erase(x, torch.zeros(1, 4).int(), i), "2 samples with 1 boxes"),
    (lambda x, i: mix(x.byte(), i, 2, random.Random(0)), "uint8"),
    (lambda x, i: mix(x, i, 2, random.Random(0), mixup=-1), "mixup=-1"),
    (lambda x, i: mix(x, i, 2, random.Random(0), cutmix=-0.5), "cutmix=-0.5"),
    (lambda x, i: mix(x, i, 2, random.Random(0), smoothing=1), "smoothing=1")])
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))


@pytest.mark.parametrize("name, classes", [("vit_b_ft", 1000), ("mvitv2_s_ft", 400)])
def test_golden_loss(name, classes, golden):
    """The release's loss of its logits, labels 3 and 4, lambda 0.7, smoothing 0.1."""
    z = golden(f"{name}.npz")
    _, targets = mix(torch.zeros(2, 3, 4, 4), torch.tensor([3, 4]), classes, Fixed(0), cutmix=0)
    loss = augment.soft_cross_entropy(torch.from_numpy(z["logits"]), targets)
    assert loss.item() == pytest.approx(float(z["loss"]), rel=1e-6)


def test_soft_cross_entropy_is_float32_inside():
    logits, labels = golden_input((4, 10)) * 20, torch.tensor([1, 2, 3, 9])
    targets, low = torch.full((4, 10), 0.1), logits.bfloat16()
    loss = augment.soft_cross_entropy(low, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, augment.soft_cross_entropy(low.float(), targets))
    hard = torch.nn.functional.one_hot(labels, 10).float()
    want = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(augment.soft_cross_entropy(logits, hard), want)


def test_contact_sheet(tmp_path, monkeypatch):
    array = picture(height=128, width=128)
    Image.fromarray(array).save(tmp_path / "a.png")
    sheets = []
    for seed in (0, 0, 1):
        flags = str(tmp_path / "a.png"), str(tmp_path / "new" / "out.png"), "--seed", str(seed)
        monkeypatch.setattr(sys, "argv", ["augmentations.py", *flags])
        augmentations.main()
        sheets.append(np.asarray(Image.open(flags[1])))
    assert (sheets[0] == sheets[1]).all() and (sheets[0] != sheets[2]).any()
    assert sheets[0].shape == (9 * 132, 190 + 132, 3) and (sheets[0][:128, 190:-4] == array).all()
    monkeypatch.setattr(sys, "argv", ["augmentations.py", str(tmp_path / "none.mp4"), "b.png"])
    with pytest.raises(FileNotFoundError, match="none.mp4"):
        augmentations.main()
