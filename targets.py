"""What MaskFeat predicts (Sec. 2.2, Tables 1, 2): one class per kind of target, with one signature.

    target.input_kind     what the target is computed from:
                          "frames": the center frame of each cube, (B, t, 3, H, W)
                          "clip":   the whole input, (B, 3, T, H, W)
                          "view", "labels": what the loader adds under this name (data.py)
    target.dim            numbers per output token
    target(x)             x: as above, intact -> target (B, t*h*w, ...), tokens row by row
    target.loss(prediction, target, mask)
                          (B, N, dim), the target, bool (B, N) -> scalar mean over masked tokens
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

import teachers
from hog import HOG, patch_hog


def masked_mean(values, mask):
    """Mean over the masked tokens of the batch. values: (B, N). mask: bool (B, N)."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_mse(prediction, target, mask):
    """Mean squared error over masked tokens and their numbers (Sec. 2.2: l2, release: mean)."""
    return masked_mean((prediction - target).square().mean(dim=-1), mask)


# ---------------------------------------------------------------------------------- of pixels alone

class HOGTarget(nn.Module):
    """HOG of each patch (Sec. 2.2, Table 8): 3 colors x 9 bins x 2x2 cells = 108 numbers.

    patch_size: pixels per output token, a multiple of `cell`. scale: factor on all numbers. Other
    arguments: see `hog.HOG`.
    """
    input_kind = "frames"

    def __init__(self, patch_size=16, bins=9, cell=8, norm="l2", color="rgb", gradient="sobel",
                 scale=1.0):
        super().__init__()
        self.hog, self.scale = HOG(bins, cell, norm, color, gradient), scale
        if patch_size % cell:
            raise ValueError(f"patch of {patch_size} pixels is not a multiple of HOG cell {cell}: "
                             f"use a cell that divides {patch_size}")
        self.cells = patch_size // cell                             # along a side of a patch
        self.dim = (1 if color == "gray" else 3) * bins * self.cells ** 2

    def forward(self, frames):
        histograms = self.hog(frames.flatten(0, 1))                 # (B*t, C, bins, H/cell, W/cell)
        return patch_hog(histograms, self.cells).reshape(len(frames), -1, self.dim) * self.scale

    loss = staticmethod(masked_mse)


class PixelTarget(nn.Module):
    """RGB of each patch, 3*16*16 = 768 numbers in order (color, y, x) (Sec. 2.2, Tables 1, 2).

    norm: "dataset", normalized by the mean and std of the data set, as the input is (paper).
    "patch": each patch is also brought to zero mean and unit variance (the release's default).
    """
    input_kind = "frames"

    def __init__(self, patch_size=16, norm="dataset"):
        super().__init__()
        if norm not in ("dataset", "patch"):
            raise ValueError(f'pixel norm={norm!r}: use "dataset" (paper) or "patch" (release)')
        self.patch_size, self.norm = patch_size, norm
        self.dim = 3 * patch_size ** 2

    def forward(self, frames):
        p = self.patch_size
        x = frames.float().unflatten(4, (-1, p)).unflatten(3, (-1, p))      # (B, t, 3, h, p, w, p)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)         # (B, t*h*w, 3*p*p)
        if self.norm == "patch":
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
        return x

    loss = staticmethod(masked_mse)


# ------------------------------------------------------------------------------------- of teachers

class FeatureTarget(nn.Module):
    """Features of a frozen teacher, one unit vector per token (Sec. 2.2, Tables 1, 2).

    load: a loader of teachers.py. teacher: path of the weights.
    grid: (h, w) of the student's tokens. image_size: (H, W) of its input.
    mean, std: the normalization of the student's input. The teacher gets its own.
    align: how a teacher's map of another size, such as 7x7, meets the grid. The paper does not say.
        "bilinear" (default): the features as they were trained, and no two patches share a target.
        "nearest": 2x2 patches share a target.
        "dilated" (CNN, MViT): the last stage keeps 14x14 with the same weights. A ResNet then takes
        1.5 times the compute, and only every second row and column is as in training.
    Raises ValueError for an unknown align, a file that is not this teacher, or sides that are no
    multiples of its patches.
    """
    MODES = {"bilinear": {"mode": "bilinear", "align_corners": False},
             "nearest": {"mode": "nearest"}}
    MODES["dilated"] = MODES["bilinear"]                            # if the size still differs

    def __init__(self, load, input_kind="frames", *, teacher, grid, image_size, mean, std,
                 align="bilinear"):
        super().__init__()
        if align not in self.MODES:
            raise ValueError(f"align={align!r}: use one of {', '.join(self.MODES)}")
        self.input_kind, self.grid, self.align = input_kind, tuple(grid), align
        self.teacher = load(teacher, align)
        self.dim = self.teacher.dim
        for side in image_size:
            if side % self.teacher.patch:
                raise ValueError(f"image_size={image_size} does not suit the teacher {teacher}: "
                                 f"{side} is not a multiple of its {self.teacher.patch} pixels "
                                 "per token")
        own_mean, own_std, mean, std = (
            torch.tensor(v) for v in (self.teacher.mean, self.teacher.std, mean, std))
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def train(self, mode=True):
        return super().train(False)                                 # keeps BatchNorm's statistics

    def forward(self, x):
        B, video = len(x), self.input_kind == "clip"
        x = x if video else x.flatten(0, 1)                         # (B, 3, T, H, W), (B*t, ...)
        shape = (3, *[1] * (x.ndim - 2))
        x = self.teacher(x * self.scale.view(shape) + self.shift.view(shape)).float()
        x = x.transpose(1, 2).flatten(0, 1) if video else x         # (B*t, D, h', w')
        if tuple(x.shape[2:]) != self.grid:
            x = F.interpolate(x, size=self.grid, **self.MODES[self.align])    # (B*t, D, h, w)
        return F.normalize(x.flatten(2).transpose(1, 2).reshape(B, -1, self.dim), dim=-1)

    @staticmethod
    def loss(prediction, target, mask):
        """Mean squared error of unit vectors, (2 - 2 cos) / dim (Sec. 2.2: cosine distance)."""
        return masked_mse(F.normalize(prediction, dim=-1), target, mask)


class TokenTarget(nn.Module):
    """Tokens of DALL-E's dVAE encoder, 8192-way classification (Sec. 2.2, Tables 1, 2).

    The input is a second view of the same crop and flip, with 8 pixels per token (BEiT).
    teacher: path of the encoder's weights.
    """
    input_kind = "view"

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teachers.load_dvae(teacher)
        self.dim = self.teacher.dim

    def train(self, mode=True):
        return super().train(False)

    def forward(self, view):
        """(B, t, 3, 8h, 8w) uint8 -> (B, t*h*w) int64."""
        # bfloat16 would change up to 5 % of the tokens.
        with torch.autocast("cpu" if view.is_meta else view.device.type, enabled=False):
            logits = self.teacher(view.flatten(0, 1).float() / 255)            # (B*t, 8192, h, w)
        return logits.argmax(1).reshape(len(view), -1)

    @staticmethod
    def loss(prediction, target, mask):
        """Cross-entropy (Sec. 2.2)."""
        losses = F.cross_entropy(prediction.transpose(1, 2), target, reduction="none")
        return masked_mean(losses, mask)


# ----------------------------------------------------------------------------------- pseudo-labels

def box_weights(start, length, size, bins):
    """Weights (B, bins, size) by which RoIAlign averages one axis of a map: row i is bin i.

    start, length: (B,), the box on this axis in cells of the map, with centers at 0.5, 1.5, ...
    Each bin is the mean of ceil(length / bins) samples, interpolated linearly between cells.
    """
    width = length.clamp(min=1) / bins                              # (B,); at least one cell in all
    count = width.ceil()                                            # samples in a bin
    k = torch.arange(size, device=start.device)
    bin = torch.arange(bins, device=start.device)[:, None]
    place = (bin + (k + 0.5) / count[:, None, None]) * width[:, None, None]
    place = (start[:, None, None] - 0.5 + place)[..., None]         # (B, bins, samples, 1)
    weights = (1 - (place.clamp(0, size - 1) - k).abs()).clamp(min=0)     # (B, bins, samples, size)
    inside = (place >= -1) & (place <= size)                        # far outside counts as 0
    used = (k < count[:, None])[:, None, :, None] & inside
    return (weights * used).sum(2) / count[:, None, None]


class LabelTarget(nn.Module):
    """Pseudo-labels: a class distribution per token, from the maps of Token Labeling (Sec. 2.2).

    RoIAlign cuts the box of the crop out of the map, then a softmax over all classes follows.
    Classes that the map does not name at a place have logit 0. grid: (h, w) of tokens.
    order: "xy" cuts the box where the crop is. "released" swaps the axes of its corner and sides,
    as the released code of Token Labeling does. Neither corrects that the maps were made from the
    central square of each image, whereas boxes are fractions of the whole image.
    """
    input_kind = "labels"

    def __init__(self, grid, classes=1000, order="xy"):
        super().__init__()
        if order not in ("xy", "released"):
            raise ValueError(f'label order={order!r}: use "xy" (correct) or "released"')
        self.grid, self.dim, self.order = tuple(grid), classes, order

    def forward(self, labels):
        """labels: (B, 3, 5, H, W) float32: the top-5 logits, their classes, and in the first four
        numbers of the last plane the crop (top, left, h, w) in fractions.

        Returns (B, h*w, classes), which sum to 1 over the classes.
        """
        with torch.autocast("cpu" if labels.is_meta else labels.device.type, enabled=False):
            H, W = labels.shape[3:]
            top, left, h, w = labels[:, 2].flatten(1)[:, :4].unbind(1)        # (B,) each
            if self.order == "released":
                top, left, h, w = left, top, w, h
            logits = labels.new_zeros(len(labels), self.dim, H, W)
            logits.scatter_(1, labels[:, 1].long(), labels[:, 0])
            rows = box_weights(top * H, h * H, H, self.grid[0])               # (B, bins, H)
            columns = box_weights(left * W, w * W, W, self.grid[1])           # (B, bins, W)
            logits = rows[:, None] @ logits @ columns[:, None].transpose(2, 3)
            return logits.flatten(2).transpose(1, 2).softmax(-1)              # (B, h*w, classes)

    @staticmethod
    def loss(prediction, target, mask):
        """Cross-entropy with soft labels (Sec. 2.2)."""
        return masked_mean(-(target * prediction.log_softmax(-1)).sum(-1), mask)


TARGETS = {
    "hog": HOGTarget,
    "pixel": PixelTarget,
    "dvae": TokenTarget,
    "dino": functools.partial(FeatureTarget, teachers.load_vit),
    "mocov3": functools.partial(FeatureTarget, teachers.load_vit),
    "deit": functools.partial(FeatureTarget, teachers.load_vit),
    "mocov2": functools.partial(FeatureTarget, teachers.load_resnet50),
    "resnet50": functools.partial(FeatureTarget, teachers.load_resnet50),
    "mvit_b": functools.partial(FeatureTarget, teachers.load_mvit_b, "clip"),
    "label": LabelTarget,
}
