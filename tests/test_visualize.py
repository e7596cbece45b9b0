import numpy as np
import torch

from models import build_maskfeat
from visualize import panels, sheet

RECIPE = dict(model="vit_tiny", target="hog", image_size=(64, 64), patch_size=8, drop_path=0.0,
              checkpointing=False, bins=9, cell=8, norm="l2", color="rgb", gradient="sobel",
              pixel_norm="dataset", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))


def show(**changes):
    """The four pictures of one image with the left half masked, and the zoom they come in."""
    torch.manual_seed(0)
    recipe = {**RECIPE, **changes}
    model = build_maskfeat(recipe).eval()
    image = torch.randint(0, 256, (3, 64, 64)).repeat_interleave(1, 0)
    mean, std = (torch.tensor(recipe[key]).view(3, 1, 1) for key in ("mean", "std"))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :4] = True
    columns = panels(model, recipe, (image / 255 - mean) / std, mask)
    return image.permute(1, 2, 0).numpy(), columns


def test_rows_show_what_they_say():
    image, columns = show(target="pixel")
    masked, guess, target, original = columns[0]
    zoom = len(original) // 64
    assert zoom >= 2 and np.array_equal(original[::zoom, ::zoom], image)      # de-normalised exactly
    assert (masked[:, :32 * zoom] == 110).all() and np.array_equal(masked[:, 32 * zoom:], original[:, 32 * zoom:])
    assert np.array_equal(target, original)                                   # the pixel target is the image
    assert not np.array_equal(guess[:, :32 * zoom], target[:, :32 * zoom])
    assert (guess[:, 32 * zoom:] <= target[:, 32 * zoom:]).all()              # visible: dimmed target


def test_patch_normalised_pixels_are_given_back():
    _, columns = show(target="pixel", pixel_norm="patch")
    masked, _, target, original = columns[0]
    assert np.abs(target.astype(int) - original).max() <= 1


def test_glyphs_and_sheet():
    _, columns = show()
    masked, guess, target, original = columns[0]
    assert guess.shape == target.shape == original.shape and target.std() > 10
    picture = sheet(columns * 9, ["a"] * 9)                                   # a second block of rows below the first
    height = len(original)
    assert picture.height > 8 * height and picture.width > 8 * original.shape[1]
