"""HOG against the release's figures, a loop over pixels, and the plain scatter form."""
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN as FOLDER
from plain import plain_hog

from hog import HOG, draw_hog, patch_hog, unpatch_hog

GOLDEN = np.load(FOLDER / "hog_image.npz")


def golden_image():
    """The (1, 3, 224, 224) image of the golden file, and its sum before normalization."""
    i, p = np.arange(224) / 224, 2 * np.pi
    y, x = i[:, None], i[None]
    red = 0.25 * np.sin(p * (3 * x + 1.5 * y)) + 0.15 * np.cos(p * (11 * x - 7 * y)) + 0.1 * x
    green = 0.2 * np.sin(20 * p * ((x - 0.5) ** 2 + (y - 0.5) ** 2)) + 0.2 * (y - 0.5)
    blue = 0.4 * x * y + 0.15 * np.sin(20 * p * x) * np.sin(13 * p * y)
    image = np.stack([0.5 + red, 0.5 + green, 0.3 + blue])
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return torch.from_numpy(((image - mean) / std).astype(np.float32))[None], image.sum()


def random_image(*shape, seed=0):
    numbers = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(numbers)


def loop_hog(images, bins, cell, color, gradient):
    """One pixel at a time in float64, straight from the description, without a norm."""
    images = images.double().numpy()
    R, G, B = images[:, 0], images[:, 1], images[:, 2]
    if color == "gray":
        images = np.stack([0.299 * R + 0.587 * G + 0.114 * B], 1)
    if color == "opponent":
        images = np.stack([(R - G) / 2 ** 0.5, (R + G - 2 * B) / 6 ** 0.5,
                           (R + G + B) / 3 ** 0.5], 1)
    N, C, H, W = images.shape
    x = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    weights = (1, 2, 1) if gradient == "sobel" else (0, 1, 0)
    out = np.zeros((N, C, bins, H // cell, W // cell))
    for n, c, v, u in itertools.product(range(N), range(C), range(H), range(W)):
        window = x[n, c, v:v + 3, u:u + 3]
        gx = sum(w * (row[0] - row[2]) for w, row in zip(weights, window))
        gy = sum(w * (column[0] - column[2]) for w, column in zip(weights, window.T))
        k = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
        out[n, c, k, v // cell, u // cell] += math.hypot(gx, gy)
    return torch.from_numpy(out)


# --- reference -----------------------------------------------------------------------------------

def test_golden_image():
    image, total = golden_image()
    assert abs(total - GOLDEN["image_sum"]) < 1e-6
    assert np.array_equal(image[0, 0, 0, :8].numpy(), GOLDEN["norm_first8"])
    assert np.abs(HOG()(image)[0].numpy() - GOLDEN["hog"]).max() < 1e-6


def test_golden_random_images():
    hog = HOG()(random_image(2, 3, 224, 224))
    assert hog.shape == (2, 3, 9, 28, 28) and hog.dtype == torch.float32
    assert np.abs(hog.flatten()[:64].numpy() - GOLDEN["hog_rand_first64"]).max() < 1e-6
    statistics = hog.mean(), hog.std(unbiased=False)
    assert np.allclose(statistics, GOLDEN["hog_rand_mean_std"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["central", "sobel"])
@pytest.mark.parametrize("color", ["gray", "rgb", "opponent"])
def test_all_options_against_loops(color, gradient):
    sizes = itertools.cycle([(16, 32), (32, 16), (16, 16), (48, 16)])
    for bins, cell in ((1, 8), (6, 8), (6, 16), (9, 4), (9, 8), (9, 16), (12, 4), (12, 8)):
        H, W = next(sizes)
        image = random_image(1, 3, H, W, seed=bins * cell)
        # Reflection makes gy zero in the first and last row. For an even number of bins that is the
        # border of two of them, where rounding must not decide.
        sums = loop_hog(image, bins, cell, color, gradient)
        for norm in ("none", "l1", "l2"):
            hog, want = HOG(bins, cell, norm, color, gradient)(image), sums
            assert hog.shape == (1, 1 if color == "gray" else 3, bins, H // cell, W // cell)
            if norm != "none":
                want = sums / sums.norm(p=int(norm[1]), dim=2, keepdim=True).clamp(min=1e-12)
            # relative to the size of the votes: up to 256 pixels in one cell
            assert (hog - want).abs().max() < 1e-6 * max(1, hog.max())


@pytest.mark.parametrize("bins", [1, 2, 3, 6, 9])
def test_ties_fall_where_atan2_puts_them(bins):
    """Small integers: gradients are exact, and many lie on a border of bins or vanish."""
    numbers = np.random.default_rng(bins).integers(0, 3, (1, 3, 24, 40))
    image = torch.from_numpy(numbers).float()
    for gradient in ("central", "sobel"):
        hog = HOG(bins, 8, "none", "rgb", gradient)(image)
        want = loop_hog(image, bins, 8, "rgb", gradient)
        assert (hog - want).abs().max() < 1e-4                              # sums of up to 300
    assert (HOG(bins)(image) - plain_hog(image, bins)).abs().max() < 1e-6


def test_plain_form_on_large_images():
    images = random_image(9, 3, 96, 160, seed=5)
    assert (HOG()(images) - plain_hog(images)).abs().max() < 1e-6


# --- edge cases ----------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", ["none", "l1", "l2"])
def test_flat_images_give_zero(norm):
    """One step of an 8-bit image, in contrast, gives a histogram of unit length."""
    for value in (0.0, 0.3, -2.1, 2.6):
        image = torch.full((1, 3, 16, 24), value)
        assert not HOG(norm=norm)(image).any()
        image[..., 12:] += 1 / 255
        if norm != "none":
            hog = HOG(norm=norm)(image)[:, :, :, :, 1]
            assert (hog.norm(p=int(norm[1]), dim=2) > 0.99).all()


def test_axis_gradients_and_border():
    ramp = torch.linspace(0, 3, 32).expand(1, 3, 32, 32)
    for image, own in ((ramp, 4), (ramp.mT, 0), (-ramp, 4), (-ramp.mT, 0)):
        hog = HOG(norm="none")(image)                       # gy = 0: bin 4, gx = 0: bin 0
        others = [k for k in range(9) if k != own]
        assert (hog[:, :, own] > 1).all() and hog[:, :, others].max() < 1e-5
    noise = HOG(cell=1, norm="none")(random_image(1, 3, 32, 32))
    column, row = noise[..., [0, -1]], noise[..., [0, -1], 1:-1]            # reflected
    assert (column[:, :, 1:] == 0).all()
    assert (row.sum(2) == row[:, :, 4]).all() and (row > 0).any()


def test_norms():
    image = random_image(2, 3, 32, 48)
    raw, l1, l2 = (HOG(norm=norm)(image) for norm in ("none", "l1", "l2"))
    ones = torch.ones(2, 3, 4, 6)
    assert torch.allclose(l1.sum(2), ones) and torch.allclose(l2.norm(dim=2), ones)
    assert torch.allclose(raw / raw.norm(dim=2, keepdim=True), l2) and raw.max() > 10


def test_float32_under_autocast_and_for_any_input():
    image = random_image(1, 3, 32, 32)
    for color in ("gray", "rgb", "opponent"):
        hog = HOG(color=color)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = hog(image)
        assert cast.dtype == torch.float32 and torch.equal(cast, hog(image))
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            other = hog.to(dtype)(image.to(dtype))
            assert other.dtype == torch.float32
            assert torch.equal(other, hog(image.to(dtype).float()))


def test_any_memory_layout_and_device():
    image = random_image(2, 3, 16, 24)
    for options in ({}, {"gradient": "central"}, {"color": "opponent"}):
        hog = HOG(**options)
        last = image.contiguous(memory_format=torch.channels_last)
        for other in (last, image.mT.contiguous().mT):
            assert torch.equal(hog(other), hog(image))
    assert HOG().to("meta")(image.to("meta")).shape == HOG()(image).shape
    assert HOG()(image[:0]).shape == (0, 3, 9, 2, 3)


def test_leaves_no_trace():
    """No state in a checkpoint, no gradient, and the input as it was."""
    image = random_image(1, 3, 16, 16).requires_grad_()
    before = image.detach().clone()
    hog = HOG()
    assert not hog(image).requires_grad and torch.equal(image, before)
    assert not hog.state_dict() and not list(hog.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"color": "opponent", "norm": "l1", "bins": 12},
                                     {"color": "gray", "norm": "none", "gradient": "central"}])
def test_compiles_without_a_graph_break(options):
    hog, image = HOG(**options), random_image(2, 3, 32, 48)
    compiled = torch.compile(hog, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image), hog(image))


# --- patches -------------------------------------------------------------------------------------

def test_patch_order_is_color_bin_y_x():
    hog = torch.arange(2 * 3 * 9 * 6 * 10.0).view(2, 3, 9, 6, 10)
    vectors = patch_hog(hog, 2)
    assert vectors.shape == (2, 15, 108)
    for b, c, k, cy, cx, row, col in ((0, 0, 0, 0, 0, 0, 0), (1, 2, 8, 1, 1, 2, 4),
                                      (1, 0, 5, 1, 0, 1, 3), (0, 2, 3, 0, 1, 2, 0)):
        number = vectors[b, row * 5 + col, ((c * 9 + k) * 2 + cy) * 2 + cx]
        assert number == hog[b, c, k, 2 * row + cy, 2 * col + cx]


@pytest.mark.parametrize("C, bins, patch", [(3, 9, 2), (1, 6, 1), (3, 12, 4), (3, 9, 3)])
def test_patch_round_trip(C, bins, patch):
    hog = torch.randn(2, C, bins, 3 * patch, 5 * patch)
    assert torch.equal(unpatch_hog(patch_hog(hog, patch), (3, 5), patch, bins), hog)


# --- drawing -------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", range(9))
def test_glyph_runs_along_the_edge(k):
    slope = math.radians(20 * k + 10)               # of the edge, from the x axis, y up
    y, x = torch.meshgrid(torch.arange(24.0) - 11.5, torch.arange(24.0) - 11.5, indexing="ij")
    across = x * math.sin(slope) + y * math.cos(slope)      # signed distance to the edge
    image = torch.tanh(across / 4).expand(1, 3, 24, 24)
    picture = draw_hog(HOG(norm="none")(image)[0], glyph=32)
    glyph = np.array(picture, dtype=float)[32:64, 32:64]    # the middle cell
    assert glyph.max() > 100
    v, u = np.mgrid[:32, :32] - 15.5
    # direction of the drawn line, y up, from its second moments
    drawn = 0.5 * math.atan2(-2 * (glyph * u * v).sum(), (glyph * (u * u - v * v)).sum())
    assert abs((math.degrees(drawn - slope) + 90) % 180 - 90) < 2


def test_drawing_adds_up_and_scales():
    hog = torch.zeros(3, 9, 2, 3)
    hog[:, 4, 0, 1] = 1.0                                   # colors add up: weight 3
    hog[0, 0, 1, 2] = 1.5
    hog[1, 0, 0, 0] = -5.0                                  # negative predictions show nothing
    picture = draw_hog(hog, glyph=16)
    assert picture.mode == "L" and picture.size == (48, 32)
    pixels = np.array(picture).astype(int)
    assert pixels[:16, :16].max() == 0 and pixels[:16, 16:32].max() == 255
    assert 120 <= pixels[16:, 32:].max() <= 128
    assert np.array_equal(np.array(draw_hog(hog.numpy(), glyph=16)), pixels)
    assert np.array(draw_hog(hog, glyph=16, scale=6.0)).max() in (127, 128)
    assert np.array(draw_hog(torch.zeros(1, 9, 2, 2))).max() == 0


# --- errors --------------------------------------------------------------------------------------

def test_errors_name_the_value():
    for options, word in (({"bins": 0}, "bins=0"), ({"bins": 9.0}, "bins=9.0"),
                          ({"cell": -8}, "cell=-8"), ({"norm": "L2"}, "'L2'"),
                          ({"color": "hsv"}, "'hsv'"), ({"gradient": "prewitt"}, "'prewitt'")):
        with pytest.raises(ValueError, match=word):
            HOG(**options)
    for shape, word in (((1, 3, 220, 224), "H=220.*216 or 224"), ((1, 3, 8, 4), "W=4"),
                        ((3, 16, 16), "16, 16"), ((1, 1, 16, 16), "1, 1"),
                        ((1, 3, 4, 16, 16), "4, 16")):
        with pytest.raises(ValueError, match=word):
            HOG()(torch.zeros(shape))
    with pytest.raises(ValueError, match="7x8"):
        patch_hog(torch.zeros(1, 3, 9, 7, 8), 2)
    with pytest.raises(ValueError, match="4x4"):
        unpatch_hog(torch.zeros(1, 15, 108), (4, 4), 2)
    with pytest.raises(ValueError, match="batch axis"):
        draw_hog(torch.zeros(1, 3, 9, 4, 4))


def test_rounding_does_not_choose_the_bin():
    """Where rows are constant, gx is 0 but for rounding of either sign: the vote is for bin 0."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.integers(0, 256, (2, 3, 32, 1))).float().expand(-1, -1, -1, 48)
    images = (rows / 255 - 0.45) / 0.225
    noise = torch.from_numpy(rng.uniform(-1e-7, 1e-7, images.shape)).float()
    for x in (images, images + noise):
        histogram = HOG(norm="none")(x)
        assert histogram[:, :, 0].min() > 1 and histogram[:, :, 1:].max() < 1e-2
