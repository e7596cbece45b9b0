"""Histograms of oriented gradients (HOG), the target that MaskFeat predicts (Sec. 2.2, Table 8).

A two-channel convolution gives the gradient of every pixel. Each pixel votes for the orientation of
its gradient, weighted by the magnitude, in the histogram of its cell and color. Each histogram is
normalized to unit length. The numbers equal those of the release (SlowFast) to 1e-6. The exception
is rounding noise, which counts as zero here: see `HOG.forward`.

    hog = HOG(bins=9, cell=8)
    histograms = hog(images)                  # (B, 3, 224, 224) -> (B, 3, 9, 28, 28)
    target = patch_hog(histograms, 2)         # (B, 14*14, 108), 2x2 cells of each patch
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

OPTIONS = {"norm": ("none", "l1", "l2"), "color": ("gray", "rgb", "opponent"),
           "gradient": ("central", "sobel")}


class HOG(nn.Module):
    """Orientation histogram of each cell and color channel. No parameters.

    bins: orientations over [0, pi), hard assignment. cell: side of a cell in pixels.
    norm: "l2" or "l1" over the bins of one cell of one color, or "none".
    color: "rgb" or "opponent" (3 histograms per cell), "gray" (1, luma).
    gradient: "sobel" (release: difference, smoothed across by 1-2-1) or "central" (paper's text).
    Raises ValueError for an unknown option.
    """

    def __init__(self, bins=9, cell=8, norm="l2", color="rgb", gradient="sobel"):
        super().__init__()
        for name, value, paper in (("bins", bins, 9), ("cell", cell, 8)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: use a positive integer, {paper} in the paper")
        for name, value in (("norm", norm), ("color", color), ("gradient", gradient)):
            if value not in OPTIONS[name]:
                raise ValueError(f"{name}={value!r}: use one of {', '.join(OPTIONS[name])}")
        self.bins, self.cell, self.norm, self.color = bins, cell, norm, color
        across = [1.0, 2, 1] if gradient == "sobel" else [0.0, 1, 0]
        kernel = torch.outer(torch.tensor(across), torch.tensor([1.0, 0, -1]))
        kernels = torch.stack([kernel, kernel.T])                       # left - right, top - bottom
        self.register_buffer("kernels", kernels[:, None].repeat(3, 1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images):
        """Normalized images (B, 3, H, W) -> float32 (B, C, bins, H/cell, W/cell).

        C is 1 for gray, else 3. Raises ValueError if the shape does not fit.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)} are not (B, 3, H, W)")
        for name, side in zip("HW", images.shape[2:]):
            if side % self.cell:
                low = side // self.cell * self.cell
                choices = f"{low} or {low + self.cell}" if low else self.cell
                raise ValueError(f"{name}={side} is not divisible by cell {self.cell}: "
                                 f"use {choices}")
        x = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").contiguous()
        # Autocast would round x. As a depthwise convolution of contiguous float32, it runs in
        # PyTorch's own CUDA kernel, which does not use TF32. (The meta device has no autocast.)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            g = F.conv2d(x, self.kernels.float(), groups=3)             # (B, 3 * 2, H, W)
        gx, gy = self._mix_colors(g.unflatten(1, (3, 2))).unbind(2)     # (B, C, H, W) each
        # Rounding noise counts as zero (ours). Along an edge its sign would choose between two
        # bins, and in a flat cell it would be normalized to length 1. A step of an 8-bit image is
        # 1 / 255 / 0.225 = 1.7e-2, or a ninth of it in gray.
        gx, gy = (torch.where(g.abs() < 1e-5, 0.0, g) for g in (gx, gy))
        magnitude = torch.hypot(gx, gy)
        # The angle is measured from the vertical (release). Opposite gradients vote alike.
        bin = (torch.atan2(gx, gy) / math.pi * self.bins).floor() % self.bins
        votes = [self._sum_cells(magnitude * (bin == k)) for k in range(self.bins)]
        histogram = torch.stack(votes, dim=2)                           # (B, C, bins, h, w)
        if self.norm == "none":
            return histogram
        return F.normalize(histogram, p=int(self.norm[1]), dim=2)       # of a flat cell: zero

    def _mix_colors(self, x):
        """(B, 3, ...) -> (B, C, ...). Filtering first gives the same, as both are linear."""
        R, G, B = x.unbind(1)
        if self.color == "gray":
            return (0.299 * R + 0.587 * G + 0.114 * B)[:, None]         # luma, Rec. 601
        if self.color == "opponent":                                    # van de Sande et al.
            opponent = (R - G) / 2 ** 0.5, (R + G - 2 * B) / 6 ** 0.5, (R + G + B) / 3 ** 0.5
            return torch.stack(opponent, dim=1)
        return x

    def _sum_cells(self, x):
        """(B, C, H, W) -> (B, C, H/cell, W/cell). Rows first, which is faster without compiling."""
        rows = x.unflatten(2, (-1, self.cell)).sum(3)                   # (B, C, H/cell, W)
        return rows.unflatten(3, (-1, self.cell)).sum(4)


def patch_hog(histograms, patch):
    """Cut histograms (B, C, bins, Hc, Wc) into one vector per token, (B, h*w, C*bins*patch*patch).

    patch: side of a token in cells, 2 for 16 pixels. Within a token the order is (color, bin,
    cell-y, cell-x), as in the release. Raises ValueError if `patch` does not divide the sides.
    """
    B, C, K, Hc, Wc = histograms.shape
    if patch < 1 or Hc % patch or Wc % patch:
        raise ValueError(f"{Hc}x{Wc} cells cannot be cut into patches of {patch}x{patch}: change "
                         f"the image size or the cell so that {patch} divides both")
    x = histograms.reshape(B, C, K, Hc // patch, patch, Wc // patch, patch)
    return x.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)


def unpatch_hog(vectors, grid, patch, bins=9):
    """Inverse of patch_hog: (B, h*w, C*bins*patch*patch) -> (B, C, bins, h*patch, w*patch).

    grid: (h, w) in tokens. Raises ValueError if the vectors do not fit grid, patch and bins.
    """
    h, w = grid
    if vectors.shape[1] != h * w or vectors.shape[2] % (bins * patch * patch):
        raise ValueError(f"vectors {tuple(vectors.shape)} do not fit a {h}x{w} grid: give {h * w} "
                         f"vectors of a multiple of {bins * patch * patch} numbers")
    x = vectors.reshape(len(vectors), h, w, -1, bins, patch, patch).permute(0, 3, 4, 1, 5, 2, 6)
    return x.flatten(5, 6).flatten(3, 4)


def draw_hog(histograms, glyph=16, scale=None):
    """Picture of one image's histograms: in each cell, one line per bin along the edge.

    histograms: (C, bins, Hc, Wc) tensor or array. Colors are summed, negative values count as 0.
    glyph: side of a drawn cell in pixels, at least 4. scale: the weight drawn white, after summing
    colors; None means the largest. Returns a PIL image, mode "L", Wc * glyph by Hc * glyph pixels.
    """
    from PIL import Image, ImageDraw

    if len(histograms.shape) != 4 or glyph < 4:
        raise ValueError(f"histograms of shape {tuple(histograms.shape)}, glyph={glyph}: give one "
                         "image without batch axis, (C, bins, Hc, Wc), and a glyph of at least 4")
    weights = torch.as_tensor(histograms).detach().cpu().float().clamp(min=0).sum(0)
    bins, Hc, Wc = weights.shape
    lines, middle, reach = [], 2 * glyph - 0.5, 1.8 * glyph             # drawn at 4x, then reduced
    for k in range(bins):
        # The gradient points along (sin, cos) of atan2(gx, gy), y down. The edge is across it.
        angle = (k + 0.5) * math.pi / bins
        dx, dy = reach * math.cos(angle), -reach * math.sin(angle)
        line = Image.new("L", (4 * glyph, 4 * glyph))
        ends = (middle - dx, middle - dy, middle + dx, middle + dy)
        ImageDraw.Draw(line).line(ends, 255, width=max(4, glyph // 3))
        line = torch.frombuffer(bytearray(line.reduce(4).tobytes()), dtype=torch.uint8)
        lines.append(line.view(glyph, glyph) / line.max())
    white = float(weights.max()) if scale is None else scale
    picture = torch.einsum("khw,kij->hiwj", weights / max(white, 1e-12), torch.stack(lines))
    picture = (255 * picture.reshape(Hc * glyph, Wc * glyph)).round().clamp(max=255)
    return Image.fromarray(picture.byte().numpy())
