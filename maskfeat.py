"""MaskFeat: predict a feature of the masked regions from the visible ones (Sec. 2.1, Figure 2).

    x (B, 3, 16, 224, 224) --stem--> tokens (B, 8*56*56, D) --mask token where masked--> blocks -->
    (B, 8*14*14, D') --LayerNorm, Linear--> prediction (B, 1568, 108)
    x --HOG of the center frame of each cube--> target (B, 1568, 108); l2 loss on masked tokens

The encoder is any module with `embed(x)`, `encode(tokens, grid)`, `stem_dim`, `embed_dim` and
`patch_stride` (mvit.py, vit.py). The target is any module with `input_kind`, `dim`, `forward` and
`loss` (targets.py). There is no decoder, and the encoder drops no tokens.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def resize_mask(mask, grid):
    """bool (B, *coarse) -> bool (B, N) on `grid`, by nearest neighbor, or ValueError."""
    if mask.ndim != len(grid) + 1 or mask.shape[1] > grid[0] or any(
            g % m for m, g in zip(mask.shape[-2:], grid[-2:])):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit token grid {tuple(grid)}: "
                         "give (B, *grid), or a coarser one whose sides divide h and w")
    return F.interpolate(mask[:, None].float(), size=grid, mode="nearest").flatten(1).bool()


class MaskFeat(nn.Module):
    """Masked feature prediction (Sec. 2.1).

    encoder: trunk without head (num_classes=0). target: what to predict, `target.dim` numbers for
    each output token.
    """

    def __init__(self, encoder, target):
        super().__init__()
        self.encoder = encoder
        self.target = target
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.stem_dim))
        # The paper has a linear layer. The release puts the trunk's missing final norm before it.
        self.norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6)
        self.head = nn.Linear(encoder.embed_dim, target.dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def compute_target(self, x, target_input=None):
        """The target of every output token, (B, N, ...), from the intact input x, or from
        `target_input` if the target needs something else of the sample (see targets.py).

        For frames, the target is that of the temporal center of each cube (Sec. 2.1). With stem
        kernel 3, stride 2 and padding 1, token t sees frames 2t-1, 2t and 2t+1: the center is 2t.
        """
        if self.target.input_kind == "frames":
            if x.ndim == 4:                                 # an image is a video of one frame
                return self.target(x[:, None])
            frames = x[:, :, ::self.encoder.patch_stride[0]].transpose(1, 2)
            return self.target(frames)                      # of (B, t, 3, H, W)
        return self.target(x if self.target.input_kind == "clip" else target_input)

    @torch.no_grad()
    def _checked_target(self, x, target_input, grid):
        target = self.compute_target(x, target_input)
        if target.shape[:2] != (len(x), math.prod(grid)):
            raise ValueError(f"target of shape {tuple(target.shape)} for {len(x)} grids of "
                             f"{tuple(grid)} tokens: the sides of input {tuple(x.shape[2:])} must "
                             f"be multiples of {self.encoder.patch_stride}")
        return target

    def forward(self, x, mask, target_input=None):
        """x: (B, 3, T, H, W) or (B, 3, H, W), normalized. mask: bool (B, *grid), True = masked, at
        the output grid or coarser. target_input: see compute_target.

        Returns the loss over masked tokens (scalar) and the prediction for all (B, N, target.dim).
        With MViT, the overlapping kernels of the stem let the visible neighbors of a masked token
        see up to 3 pixels and one frame of it, as in the release. Raises ValueError if the mask or
        the target does not fit the grid.
        """
        tokens, grid = self.encoder.embed(x)                                  # (B, N_stem, D)
        masked = resize_mask(mask, grid)[..., None]                           # (B, N_stem, 1)
        tokens = torch.where(masked, self.mask_token.to(tokens.dtype), tokens)
        tokens, grid = self.encoder.encode(tokens, grid)                      # (B, 1 + N, D')
        prediction = self.head(self.norm(tokens[:, 1:])).float()              # (B, N, target.dim)
        target = self._checked_target(x, target_input, grid)                  # (B, N, ...)
        return self.target.loss(prediction, target, resize_mask(mask, grid)), prediction
