"""HOG against the release's figures, a loop over pixels, and the plain conv + atan2 + scatter form."""
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hog import HOG, draw_hog, patch_hog, unpatch_hog  # noqa: E402
from plain import plain_hog  # noqa: E402

GOLDEN = np.load(Path(__file__).parent / "golden" / "hog_image.npz")


def golden_image():
    """The (1, 3, 224, 224) image of the golden file, and the sum of it before normalisation."""
    i, p = np.arange(224) / 224, 2 * np.pi
    y, x = i[:, None], i[None]
    image = np.stack([0.5 + 0.25 * np.sin(p * (3 * x + 1.5 * y)) + 0.15 * np.cos(p * (11 * x - 7 * y)) + 0.1 * x,
                      0.5 + 0.2 * np.sin(20 * p * ((x - 0.5) ** 2 + (y - 0.5) ** 2)) + 0.2 * (y - 0.5),
                      0.3 + 0.4 * x * y + 0.15 * np.sin(20 * p * x) * np.sin(13 * p * y)])
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return torch.from_numpy(((image - mean) / std).astype(np.float32))[None], image.sum()


def random_image(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def loop_hog(images, bins, cell, norm, color, gradient):
    """One pixel at a time in float64, with atan2, straight from the description."""
    images = images.double().numpy()
    R, G, B = images[:, 0], images[:, 1], images[:, 2]
    if color == "gray":
        images = np.stack([0.299 * R + 0.587 * G + 0.114 * B], 1)
    if color == "opponent":
        images = np.stack([(R - G) / 2 ** 0.5, (R + G - 2 * B) / 6 ** 0.5, (R + G + B) / 3 ** 0.5], 1)
    N, C, H, W = images.shape
    weights = (1, 2, 1) if gradient == "sobel" else (0, 1, 0)
    out = np.zeros((N, C, bins, H // cell, W // cell))
    for n, c, y, x in itertools.product(range(N), range(C), range(H), range(W)):
        at = lambda v, u: images[n, c, H - 1 - abs(H - 1 - abs(v)), W - 1 - abs(W - 1 - abs(u))]  # noqa: E731
        gx = sum(w * (at(y + d, x - 1) - at(y + d, x + 1)) for d, w in zip((-1, 0, 1), weights))
        gy = sum(w * (at(y - 1, x + d) - at(y + 1, x + d)) for d, w in zip((-1, 0, 1), weights))
        k = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
        out[n, c, k, y // cell, x // cell] += math.hypot(gx, gy)
    if norm != "none":
        out /= np.maximum(np.linalg.norm(out, ord=int(norm[1]), axis=2, keepdims=True), 1e-12)
    return torch.from_numpy(out)



# --- reference ---------------------------------------------------------------------------------------------------

def test_golden_image():
    image, total = golden_image()
    assert abs(total - GOLDEN["image_sum"]) < 1e-6
    assert np.array_equal(image[0, 0, 0, :8].numpy(), GOLDEN["norm_first8"])
    assert np.abs(HOG()(image)[0].numpy() - GOLDEN["hog"]).max() < 1e-6


def test_golden_random_images():
    hog = HOG()(random_image(2, 3, 224, 224))
    assert hog.shape == (2, 3, 9, 28, 28) and hog.dtype == torch.float32
    assert np.abs(hog.flatten()[:64].numpy() - GOLDEN["hog_rand_first64"]).max() < 1e-6
    assert np.allclose((hog.mean(), hog.std(unbiased=False)), GOLDEN["hog_rand_mean_std"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["central", "sobel"])
@pytest.mark.parametrize("color", ["gray", "rgb", "opponent"])
def test_all_options_against_loops(color, gradient):
    sizes = itertools.cycle([(16, 32), (32, 16), (16, 16), (48, 16)])
    for norm, bins, cell in itertools.product(("none", "l1", "l2"), (1, 6, 9, 12), (4, 8, 16)):
        if (bins == 1 or norm == "l1") and cell != 8:
            continue
        H, W = next(sizes)
        image = random_image(1, 3, H, W, seed=bins * cell)
        hog = HOG(bins, cell, norm, color, gradient)(image)
        assert hog.shape == (1, 1 if color == "gray" else 3, bins, H // cell, W // cell)
        # relative to the size of the votes: up to 256 pixels in one cell
        assert (hog - loop_hog(image, bins, cell, norm, color, gradient)).abs().max() < 1e-6 * max(1, hog.max())


@pytest.mark.parametrize("bins", [1, 2, 3, 4, 6, 8, 9, 12])
def test_ties_fall_where_atan2_puts_them(bins):
    """Small whole numbers: gradients are exact and many lie just on a border (0, 45, 90, 135 degrees) or vanish."""
    image = torch.from_numpy(np.random.default_rng(bins).integers(0, 3, (1, 3, 24, 40))).float()
    for gradient in ("central", "sobel"):
        hog = HOG(bins, 8, "none", "rgb", gradient)(image)
        assert (hog - loop_hog(image, bins, 8, "none", "rgb", gradient)).abs().max() < 1e-4  # sums of up to 300
    if bins % 4:  # else 45 degrees is a border, where vectorised float32 atan2 itself is off by one rounding
        assert (HOG(bins)(image) - plain_hog(image, bins)).abs().max() < 1e-6


def test_plain_form_on_large_images():
    images = random_image(9, 3, 96, 160, seed=5)                              # several pieces, the last one shorter
    assert (HOG()(images) - plain_hog(images)).abs().max() < 1e-6


def test_gradient_is_the_two_channel_convolution():
    images = random_image(2, 3, 17, 23, seed=3)
    padded = F.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    for gradient, across in (("sobel", (1.0, 2.0, 1.0)), ("central", (0.0, 1.0, 0.0))):
        kernel = torch.tensor(across)[:, None] * torch.tensor((1.0, 0.0, -1.0))
        wanted = F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None]).unflatten(0, (2, 3))
        found = HOG(gradient=gradient)._gradient(images)                       # (B, 3, 2, H, W)
        assert found.shape == wanted.shape and (found - wanted).abs().max() < 1e-5


# --- edge cases --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", ["none", "l1", "l2"])
def test_flat_images_give_zero(norm):
    for value in (0.0, 0.3, -117.7):
        hog = HOG(norm=norm)(torch.full((1, 3, 16, 24), value))
        assert hog.shape == (1, 3, 9, 2, 3) and (hog == 0).all()


def test_axis_gradients_and_border():
    ramp = torch.linspace(0, 3, 32).expand(1, 3, 32, 32)
    for image, own in ((ramp, 4), (ramp.mT, 0), (-ramp, 4), (-ramp.mT, 0)):   # gy = 0: bin 4; gx = 0: bin 0
        hog = HOG(norm="none")(image)
        assert (hog[:, :, own] > 0).all() and (hog[:, :, [k for k in range(9) if k != own]] == 0).all()
    noise = random_image(1, 3, 32, 32)
    column = HOG(cell=1, norm="none")(noise)[..., [0, -1]]                     # reflected: gx = 0 exactly
    row = HOG(cell=1, norm="none")(noise)[..., [0, -1], 1:-1]                  # gy = 0 exactly
    assert (column[:, :, 1:] == 0).all() and (row.sum(2) == row[:, :, 4]).all() and (row > 0).any()


def test_norms():
    image = random_image(2, 3, 32, 48)
    raw, l1, l2 = (HOG(norm=norm)(image) for norm in ("none", "l1", "l2"))
    assert torch.allclose(l1.sum(2), torch.ones(2, 3, 4, 6)) and torch.allclose(l2.norm(dim=2), torch.ones(2, 3, 4, 6))
    assert torch.allclose(raw / raw.norm(dim=2, keepdim=True), l2) and raw.max() > 10


def test_float32_under_autocast_and_for_any_input():
    image = random_image(1, 3, 32, 32)
    for color in ("gray", "rgb", "opponent"):
        hog = HOG(color=color)
        plain = hog(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = hog(image)
        assert cast.dtype == torch.float32 and torch.equal(cast, plain)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            other = hog.to(dtype)(image.to(dtype))
            assert other.dtype == torch.float32 and torch.equal(other, hog(image.to(dtype).float()))


def test_any_memory_layout():
    image = random_image(2, 3, 16, 24)
    for options in ({}, {"gradient": "central"}, {"color": "opponent"}):
        hog = HOG(**options)
        for other in (image.contiguous(memory_format=torch.channels_last), image.mT.contiguous().mT):
            assert torch.equal(hog(other), hog(image)) and hog(other).is_contiguous()
    assert torch.equal(HOG()(image[:, :, :8, :8].expand(2, 3, 8, 8)), HOG()(image[:, :, :8, :8].clone()))
    assert HOG()(image[:0]).shape == (0, 3, 9, 2, 3)


def test_leaves_no_trace():
    """No state in a checkpoint, no gradient, and the input as it was."""
    image = random_image(1, 3, 16, 16).requires_grad_()
    before = image.detach().clone()
    for color in ("gray", "rgb", "opponent"):
        hog = HOG(color=color)
        assert not hog(image).requires_grad and torch.equal(image, before)
        assert not hog.state_dict() and not list(hog.parameters())


def test_no_array_of_pixel_bins():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    image = random_image(1, 3, 64, 64)
    with Watch():
        HOG()(image)
    assert image.numel() <= largest <= 2 * 3 * 66 * 66  # nine bins for each pixel would be 110592


@pytest.mark.parametrize("options", [{}, {"color": "opponent", "norm": "l1", "bins": 12},
                                     {"color": "gray", "norm": "none", "gradient": "central"}])
def test_compiles_without_a_graph_break(options):
    hog, image = HOG(**options), random_image(2, 3, 32, 48)
    assert torch.equal(torch.compile(hog, fullgraph=True, backend="aot_eager")(image), hog(image))


# --- patches -----------------------------------------------------------------------------------------------------

def test_patch_order_is_colour_bin_y_x():
    hog = torch.arange(2 * 3 * 9 * 6 * 10.0).view(2, 3, 9, 6, 10)
    vectors = patch_hog(hog, 2)
    assert vectors.shape == (2, 15, 108)
    for b, c, k, cy, cx, row, col in ((0, 0, 0, 0, 0, 0, 0), (1, 2, 8, 1, 1, 2, 4), (1, 0, 5, 1, 0, 1, 3),
                                      (0, 2, 3, 0, 1, 2, 0)):
        assert vectors[b, row * 5 + col, ((c * 9 + k) * 2 + cy) * 2 + cx] == hog[b, c, k, 2 * row + cy, 2 * col + cx]


@pytest.mark.parametrize("C, bins, patch", [(3, 9, 2), (1, 6, 1), (3, 12, 4), (3, 9, 3)])
def test_patch_round_trip(C, bins, patch):
    hog = torch.randn(2, C, bins, 3 * patch, 5 * patch)
    assert torch.equal(unpatch_hog(patch_hog(hog, patch), (3, 5), patch, bins), hog)


# --- drawing -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", range(9))
def test_glyph_runs_along_the_edge(k):
    slope = math.radians(20 * k + 10)                       # of the edge, counter-clockwise from the x axis, y up
    y, x = torch.meshgrid(torch.arange(24.0) - 11.5, torch.arange(24.0) - 11.5, indexing="ij")
    across = x * math.sin(slope) + y * math.cos(slope)      # signed distance to the edge; image rows run downwards
    image = torch.tanh(across / 4).expand(1, 3, 24, 24)
    glyph = np.array(draw_hog(HOG(norm="none")(image)[0], glyph=32), dtype=float)[32:64, 32:64]  # the middle cell
    assert glyph.max() > 100
    v, u = np.mgrid[:32, :32] - 15.5
    # direction of the drawn line, y up, from its second moments
    drawn = 0.5 * math.atan2(-2 * (glyph * u * v).sum(), (glyph * (u * u - v * v)).sum())
    off = (math.degrees(drawn - slope) + 90) % 180 - 90
    assert abs(off) < 2


def test_drawing_adds_up_and_scales():
    from PIL import Image

    hog = torch.zeros(3, 9, 2, 3)
    hog[:, 4, 0, 1] = 1.0                                   # colours add up: weight 3, a vertical edge
    hog[0, 0, 1, 2] = 1.5
    hog[1, 0, 0, 0] = -5.0                                  # a negative prediction shows nothing
    picture = draw_hog(hog, glyph=16)
    assert isinstance(picture, Image.Image) and picture.mode == "L" and picture.size == (48, 32)
    pixels = np.array(picture).astype(int)
    assert pixels[:16, :16].max() == 0 and pixels[:16, 16:32].max() == 255 and 120 <= pixels[16:, 32:].max() <= 128
    assert np.array_equal(np.array(draw_hog(hog.numpy(), glyph=16)), pixels)
    assert np.array(draw_hog(hog, glyph=16, scale=6.0)).max() in (127, 128)
    both = hog.clone()
    both[:, 0, 0, 1] = 1.0
    alone = hog.clone()
    alone[:, 4, 0, 1] = 0
    alone[:, 0, 0, 1] = 1.0
    two, upright, level = (np.array(draw_hog(h, scale=8.0)).astype(int) for h in (both, hog, alone))
    assert np.abs(two[:16, 16:32] - upright[:16, 16:32] - level[:16, 16:32]).max() <= 1     # additive
    assert np.array(draw_hog(torch.zeros(1, 9, 2, 2))).max() == 0


# --- errors ------------------------------------------------------------------------------------------------------

def test_errors_name_value_and_remedy():
    for options, message in (({"bins": 0}, "bins=0"), ({"bins": 9.0}, "bins=9.0"), ({"cell": -8}, "cell=-8"),
                             ({"norm": "L2"}, "'L2' is unknown: use one of none, l1, l2"),
                             ({"color": "hsv"}, "'hsv' is unknown: use one of gray, rgb, opponent"),
                             ({"gradient": "prewitt"}, "'prewitt' is unknown: use one of central, sobel")):
        with pytest.raises(ValueError, match=message):
            HOG(**options)
    with pytest.raises(ValueError, match="H=220 is not divisible by cell 8: use 216 or 224"):
        HOG()(torch.zeros(1, 3, 220, 224))
    with pytest.raises(ValueError, match="W=4 is not divisible by cell 8: use 8"):
        HOG()(torch.zeros(1, 3, 8, 4))
    with pytest.raises(ValueError, match="H=1 .* use 2"):
        HOG(cell=1)(torch.zeros(1, 3, 1, 4))
    for shape in ((3, 16, 16), (1, 1, 16, 16), (1, 3, 4, 16, 16)):
        with pytest.raises(ValueError, match="fold frames into the batch"):
            HOG()(torch.zeros(shape))
    with pytest.raises(ValueError, match="torch.uint8"):
        HOG()(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="7x8 cells cannot be cut into patches of 2x2"):
        patch_hog(torch.zeros(1, 3, 9, 7, 8), 2)
    with pytest.raises(ValueError, match="15 vectors of 108 do not fit a 4x4 grid"):
        unpatch_hog(torch.zeros(1, 15, 108), (4, 4), 2)
    with pytest.raises(ValueError, match="one image without its batch axis"):
        draw_hog(torch.zeros(1, 3, 9, 4, 4))
