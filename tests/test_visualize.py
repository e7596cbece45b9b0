import numpy as np
import torch

from models import build_maskfeat
from visualize import panels, sheet

RECIPE = dict(model="vit_tiny", target="hog", image_size=(64, 64), patch_size=8, drop_path=0.0,
              checkpointing=False, bins=9, cell=8, norm="l2", color="rgb", gradient="sobel",
              pixel_norm="dataset", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))


def show(**changes):
    """An image, and its four pictures with the left half masked, of a random prediction."""
    torch.manual_seed(0)
    recipe = {**RECIPE, **changes}
    image = torch.randint(0, 256, (3, 64, 64))
    mean, std = (torch.tensor(recipe[key]).view(3, 1, 1) for key in ("mean", "std"))
    frames = ((image / 255 - mean) / std)[None]
    target = build_maskfeat(recipe).compute_target(frames)
    mask = torch.arange(8).expand(1, 8, 8) < 4
    return image.permute(1, 2, 0), panels(recipe, frames, mask, torch.randn_like(target), target)


def test_rows_show_what_they_say():
    image, columns = show(target="pixel")
    masked, prediction, target, original = columns[0]
    zoom, middle = len(original) // 64, len(original) // 2  # masked left of the middle
    assert zoom >= 2 and np.array_equal(original[::zoom, ::zoom], image)  # as before normalization
    assert (masked[:, :middle] == 110).all()
    assert np.array_equal(masked[:, middle:], original[:, middle:])
    assert np.array_equal(target, original)  # the pixel target is the image
    assert not np.array_equal(prediction[:, :middle], target[:, :middle])
    assert (prediction[:, middle:] <= target[:, middle:]).all()  # visible: dimmed target
    _, _, target, original = show(target="pixel", pixel_norm="patch")[1][0].astype(int)
    assert np.abs(target - original).max() <= 1  # mean and spread are given back


def test_glyphs_and_sheet():
    columns = show()[1]
    assert columns[0, 2].std() > 10
    picture = sheet(columns.repeat(9, 0), ["a"] * 9)  # the ninth stands in a second block
    assert picture.height > 8 * columns.shape[2] and picture.width > 8 * columns.shape[3]


def test_tokens_have_the_color_of_their_class_or_direction():
    eye, frames, mask = torch.eye(4)[None], torch.zeros(1, 3, 8, 32), torch.ones(1, 1, 4).bool()
    for kind, target in ("dvae", torch.tensor([[3.0, 2, 1, 0]])), ("dino", eye[:, [3, 2, 1, 0]]):
        rows = panels({**RECIPE, "target": kind}, frames, mask, 9 * eye[:, [3, 2, 0, 1]], target)
        right, wrong = np.split((rows[0, 1] == rows[0, 2]).all((0, 2)), 2)
        assert right.all() and not wrong.any()
