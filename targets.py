"""What MaskFeat predicts (Sec. 2.2, Table 1): one class per target, all with the same signature.

    target.dim                              numbers per output token
    target(frames)                          (B, t, 3, H, W) normalised, intact frames -> goal (B, t*h*w, dim)
    target.loss(prediction, goal, mask)     (B, N, dim) twice, bool (B, N) -> scalar, mean over masked tokens
"""
import torch.nn as nn

from hog import HOG, patch_hog


def masked_mse(prediction, goal, mask):
    """Mean squared error over the masked tokens of the batch and all their numbers (Sec. 2.1: l2; release: mean)."""
    error = (prediction - goal).square().mean(dim=-1)                         # (B, N)
    return (error * mask).sum() / mask.sum().clamp(min=1)


class HOGTarget(nn.Module):
    """Histograms of oriented gradients of each patch (Sec. 2.2, Table 8): 3 colours x 9 bins x 2x2 cells = 108.

    patch_size: pixels per output token, a multiple of `cell`. Other arguments: see `hog.HOG`.
    """

    def __init__(self, patch_size=16, bins=9, cell=8, norm="l2", color="rgb", gradient="sobel"):
        super().__init__()
        if patch_size % cell:
            raise ValueError(f"patch of {patch_size} pixels is not a multiple of HOG cell {cell}: use a cell that "
                             f"divides {patch_size}")
        self.hog = HOG(bins, cell, norm, color, gradient)
        self.cells = patch_size // cell                                       # cells along a side of a patch
        self.dim = (1 if color == "gray" else 3) * bins * self.cells ** 2

    def forward(self, frames):
        histograms = self.hog(frames.flatten(0, 1))                           # (B*t, C, bins, H/cell, W/cell)
        return patch_hog(histograms, self.cells).reshape(frames.shape[0], -1, self.dim)

    loss = staticmethod(masked_mse)


class PixelTarget(nn.Module):
    """RGB of each patch, 3*16*16 = 768 numbers in order (colour, y, x) (Sec. 2.2, Table 1).

    norm: "dataset", the input as normalised by the data set's mean and std (paper); "patch", each patch and all its
        colours further brought to zero mean and unit variance (release's option; unbiased, eps 1e-6).
    """

    def __init__(self, patch_size=16, norm="dataset"):
        super().__init__()
        if norm not in ("dataset", "patch"):
            raise ValueError(f'pixel norm={norm!r}: use "dataset" (paper) or "patch" (release)')
        self.patch_size, self.norm = patch_size, norm
        self.dim = 3 * patch_size ** 2

    def forward(self, frames):
        p = self.patch_size
        x = frames.float().unflatten(4, (-1, p)).unflatten(3, (-1, p))        # (B, t, 3, h, p, w, p)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)           # (B, t*h*w, 3*p*p)
        if self.norm == "patch":
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
        return x

    loss = staticmethod(masked_mse)


TARGETS = {"hog": HOGTarget, "pixel": PixelTarget}
