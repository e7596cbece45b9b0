"""Histograms of oriented gradients (HOG), the prediction target of MaskFeat.

A two-channel convolution gives the gradient of every pixel; pixels vote, by their gradient's size, for one of nine
orientations in the histogram of their 8x8 cell and colour; each histogram is brought to unit length.

Paper: Sec. 2.2, ablated in Table 8. Release: the HOG operator of the SlowFast code, equalled to 1e-6.
Differences: the release scatters every pixel into a row of bins of its own. Here the pixels of a cell are summed as a
bag of votes: no per-pixel bins in memory, no atomics (repeatable on CUDA), seven times as fast on a CPU; float32 under
any autocast. Gray, opponent, central, l1 and none are in the paper only.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

PIECE = 3 * 224 ** 2  # pixels at a time on a CPU: what stays in its cache takes half the time


class HOG(nn.Module):
    """Orientation histogram of each cell and colour channel.

    bins: orientations over [0, pi), hard assignment, each pixel weighted by the size of its gradient.
    cell: side of a cell in pixels.
    norm: "l2" or "l1" over the bins of one cell of one colour, or "none".
    color: "rgb" or "opponent" (3 histograms per cell), "gray" (1, luma). Channels are mixed as they come in.
    gradient: "sobel" (release: difference smoothed across by 1-2-1) or "central" (paper's text: plain difference).

    Has no parameters and nothing to save. Raises ValueError for an unknown option.
    Paper: Sec. 2.2, Table 8.
    """

    def __init__(self, bins=9, cell=8, norm="l2", color="rgb", gradient="sobel"):
        super().__init__()
        for name, value, paper in (("bins", bins, 9), ("cell", cell, 8)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive whole number: the paper's is {paper}")
        for name, value, known in (("norm", norm, ("none", "l1", "l2")), ("color", color, ("gray", "rgb", "opponent")),
                                   ("gradient", gradient, ("central", "sobel"))):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(known)}")
        self.bins, self.cell, self.norm, self.color, self.gradient = bins, cell, norm, color, gradient
        # Two channels, d/dx and d/dy; not saved, so that a checkpoint holds weights only.
        difference = torch.tensor([[0.0, 0, 0], [1, 0, -1], [0, 0, 0]])
        smoothing = torch.tensor([[0.0, 1, 0], [0, 2, 0], [0, 1, 0]])
        self.register_buffer("difference", torch.stack([difference, difference.T])[:, None], persistent=False)
        self.register_buffer("smoothing", torch.stack([smoothing, smoothing.T])[:, None], persistent=False)
        # A vote's row in the histogram, one-hot; twice over (and one), for the two ways along an orientation.
        self.register_buffer("one_hot", torch.eye(bins).repeat(3, 1)[:2 * bins + 1], persistent=False)

    @torch.no_grad()
    def forward(self, images):
        """images: (B, 3, H, W) of any floating type, usually the normalised network input.

        Returns float32 (B, C, bins, H/cell, W/cell), C = 1 for gray, else 3.
        Raises ValueError if the shape or the type does not fit.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)} are not (B, 3, H, W): fold frames into the batch")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}: convert with .float(), then normalise")
        B, _, H, W = images.shape
        for name, side in (("H", H), ("W", W)):
            if side % self.cell:
                below = side // self.cell * self.cell
                sides = f"{below} or {below + self.cell}" if below else f"{self.cell}"
                raise ValueError(f"{name}={side} is not divisible by cell {self.cell}: use {sides}")
            if side < 2:
                raise ValueError(f"{name}={side} is too small to reflect the border: use 2 or more")
        piece = max(PIECE // (H * W), 1)
        if B > piece and not images.is_cuda and not torch.compiler.is_compiling():
            return torch.cat([self.forward(x) for x in images.split(piece)])
        with torch.autocast(images.device.type, enabled=False):
            gradient = self._gradient(images.float())                   # (B, C, 2, H, W)
        cells = gradient.unflatten(4, (-1, self.cell)).unflatten(3, (-1, self.cell)).permute(2, 0, 1, 3, 5, 4, 6)
        gx, gy = cells.flatten(5)                                       # (B, C, H / cell, W / cell, cell * cell) each
        del gradient, cells                                             # keeps the peak low
        size = gx.square().addcmul_(gy, gy).sqrt_()
        # The angle from the vertical, from -pi to pi, counted in bins: from 0 to twice the bins, as opposite gradients
        # vote alike. A border belongs to the bin after it: adding makes up for atan2's last digit (at 45 degrees, a
        # border if bins is a multiple of 4, the release's floor alone may go either way). NaN is no index.
        vote = torch.atan2(gx, gy).mul_(self.bins / math.pi).add_(self.bins).int().clamp_(0, 2 * self.bins)
        # Each cell is a bag of votes; a vote's row is its bin one-hot, times the pixel's size.
        histogram = F.embedding_bag(vote.flatten(0, 3), self.one_hot.float(), per_sample_weights=size.flatten(0, 3),
                                    mode="sum")                         # (B * C * H / cell * W / cell, bins)
        if self.norm != "none":
            length = torch.linalg.vector_norm(histogram, int(self.norm[1]), dim=1, keepdim=True)
            histogram /= length.clamp_(min=1e-12)
        return histogram.view(*gx.shape[:4], self.bins).permute(0, 1, 4, 2, 3).contiguous()

    def _gradient(self, images):
        """(B, 3, H, W) float32 -> (B, C, 2, H, W): left minus right, top minus bottom."""
        C, x = 3, F.pad(images, (1, 1, 1, 1), mode="reflect")
        if not x.is_cuda:  # three times as fast on a CPU; on CUDA it would bring in cuDNN and so TF32
            x = x.contiguous(memory_format=torch.channels_last)
        # Two channels a colour: (B, C * 2, H, W), with a margin of 1 if smoothing follows. Of the margin, smoothing across
        # takes only what comes from the reflected border, not from the zeros beyond it.
        smooth = self.gradient == "sobel"
        g = F.conv2d(x, self.difference.float().repeat(C, 1, 1, 1), padding=int(smooth), groups=C)
        if smooth:
            # Difference, then 1-2-1 across it: together the release's Sobel filter, but with exact zeros on flat
            # ground, where the one 3x3 sum leaves rounding noise that the normalisation would blow up to length 1.
            g = F.conv2d(g, self.smoothing.float().repeat(C, 1, 1, 1), groups=2 * C)
        return self._colors(g.unflatten(1, (C, 2)))                     # mixing colours and filtering commute

    def _colors(self, x):
        """(B, 3, ...) -> (B, C, ...). Sums, not a matmul that TF32 would round."""
        if self.color == "rgb":
            return x
        R, G, B = x.unbind(1)
        if self.color == "gray":
            return (0.299 * R + 0.587 * G + 0.114 * B)[:, None]         # luma, Rec. 601
        # opponent space of van de Sande et al.
        opponent = (R - G) / math.sqrt(2), (R + G - 2 * B) / math.sqrt(6), (R + G + B) / math.sqrt(3)
        return torch.stack(opponent, dim=1)


def patch_hog(histograms, patch):
    """Cut histograms into one vector per token.

    histograms: (B, C, bins, Hc, Wc); patch: side of a token in cells (2 for 16 pixels in cells of 8).
    Returns (B, h * w, C * bins * patch * patch), tokens row by row; within a token the order is
    (colour, bin, cell-y, cell-x), cell-x fastest, as in the release. Raises ValueError if the sides do not divide.
    """
    B, C, K, Hc, Wc = histograms.shape
    if patch < 1 or Hc % patch or Wc % patch:
        raise ValueError(f"{Hc}x{Wc} cells cannot be cut into patches of {patch}x{patch}: change the image size "
                         f"or the cell so that {patch} divides both")
    x = histograms.reshape(B, C, K, Hc // patch, patch, Wc // patch, patch)
    return x.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)      # (B, h * w, C * K * patch * patch)


def unpatch_hog(vectors, grid, patch, bins=9):
    """Inverse of patch_hog: (B, h * w, C * bins * patch * patch) -> (B, C, bins, h * patch, w * patch).

    grid: (h, w) in tokens. Raises ValueError if the vectors do not fit grid, patch and bins.
    """
    (B, N, D), (h, w) = vectors.shape, grid
    if N != h * w or D % (bins * patch * patch):
        raise ValueError(f"{N} vectors of {D} do not fit a {h}x{w} grid of {patch}x{patch} cells with {bins} bins: "
                         f"{h * w} vectors and a multiple of {bins * patch * patch} are needed")
    x = vectors.reshape(B, h, w, -1, bins, patch, patch).permute(0, 3, 4, 1, 5, 2, 6)
    return x.flatten(5, 6).flatten(3, 4)                                # (B, C, bins, h * patch, w * patch)


def draw_hog(histograms, glyph=16, scale=None):
    """Picture of one image's histograms: in each cell one line per bin, along the edge that voted for it.

    histograms: (C, bins, Hc, Wc) tensor or array; colours are summed, negative values count as 0.
    glyph: side of a cell in the picture, in pixels, at least 4.
    scale: weight (after summing colours) drawn white; by default the largest in the picture.
    Returns a PIL image, mode "L", of Wc * glyph by Hc * glyph pixels. Lines of one cell add up.
    """
    from PIL import Image, ImageDraw

    if len(histograms.shape) != 4 or glyph < 4:
        raise ValueError(f"histograms of shape {tuple(histograms.shape)} with glyph={glyph}: expected "
                         "(C, bins, Hc, Wc), one image without its batch axis, and a glyph of at least 4 pixels")
    weights = torch.as_tensor(histograms).detach().cpu().float().clamp(min=0).sum(0)  # (bins, Hc, Wc)
    bins, Hc, Wc = weights.shape
    lines, middle, reach = [], 2 * glyph - 0.5, 1.8 * glyph             # drawn at 4x, then reduced
    for k in range(bins):
        angle = (k + 0.5) * math.pi / bins
        # the gradient points along (x, y) = (sin, cos) of atan2(gx, gy), y downwards: the edge is across it
        dx, dy = reach * math.cos(angle), -reach * math.sin(angle)
        line = Image.new("L", (4 * glyph, 4 * glyph))
        ImageDraw.Draw(line).line((middle - dx, middle - dy, middle + dx, middle + dy), 255, width=max(4, glyph // 3))
        line = torch.frombuffer(bytearray(line.reduce(4).tobytes()), dtype=torch.uint8).view(glyph, glyph)
        lines.append(line / line.max())
    white = float(weights.max()) if scale is None else scale
    picture = torch.einsum("khw,kij->hiwj", weights / max(white, 1e-12), torch.stack(lines))
    picture = (255 * picture.reshape(Hc * glyph, Wc * glyph)).round().clamp(max=255)
    return Image.fromarray(picture.byte().numpy())
