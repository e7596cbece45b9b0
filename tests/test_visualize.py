import numpy as np
import torch

from models import build_maskfeat
from visualize import panels, sheet, token_colors

RECIPE = dict(model="vit_tiny", target="hog", image_size=(64, 64), patch_size=8, drop_path=0.0,
              checkpointing=False, bins=9, cell=8, norm="l2", color="rgb", gradient="sobel",
              pixel_norm="dataset", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))


def show(**changes):
    """The four pictures of one image with the left half masked, and the zoom they come in."""
    torch.manual_seed(0)
    recipe = {**RECIPE, **changes}
    model = build_maskfeat(recipe).eval()
    image = torch.randint(0, 256, (3, 64, 64))
    mean, std = (torch.tensor(recipe[key]).view(3, 1, 1) for key in ("mean", "std"))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :4] = True
    columns = panels(model, recipe, (image / 255 - mean) / std, mask)
    return image.permute(1, 2, 0).numpy(), columns


def test_rows_show_what_they_say():
    image, columns = show(target="pixel")
    masked, prediction, target, original = columns[0]
    zoom = len(original) // 64
    middle = 32 * zoom  # masked left of it
    assert zoom >= 2 and np.array_equal(original[::zoom, ::zoom], image)  # as before normalization
    assert (masked[:, :middle] == 110).all()
    assert np.array_equal(masked[:, middle:], original[:, middle:])
    assert np.array_equal(target, original)  # the pixel target is the image
    assert not np.array_equal(prediction[:, :middle], target[:, :middle])
    assert (prediction[:, middle:] <= target[:, middle:]).all()  # visible: dimmed target


def test_patch_normalized_pixels_are_given_back():
    _, columns = show(target="pixel", pixel_norm="patch")
    _, _, target, original = columns[0]
    assert np.abs(target.astype(int) - original).max() <= 1


def test_glyphs_and_sheet():
    _, columns = show()
    _, prediction, target, original = columns[0]
    assert prediction.shape == target.shape == original.shape and target.std() > 10
    picture = sheet(columns * 9, ["a"] * 9)  # the ninth stands in a second block
    assert picture.height > 8 * len(original) and picture.width > 8 * original.shape[1]


def test_token_colors():
    """Right tokens are green, wrong ones red; the color of a target is that of its token."""
    target = torch.tensor([[[2.0], [0.0]]])  # (t, N, 1)
    prediction, tokens = token_colors("dvae", 9 * torch.eye(3)[None, [2, 1]], target)
    assert prediction[0, 0].argmax() == 1 and prediction[0, 1].argmax() == 0
    assert (tokens[0, 0] != tokens[0, 1]).any()
    same, _ = token_colors("dino", torch.eye(4)[None], torch.eye(4)[None])
    assert (same == 255).all()  # cosine similarity 1
