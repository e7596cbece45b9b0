"""MaskFeat: regress a feature of what is hidden from what is visible (Sec. 2.1, Figure 2). Needs only torch.

    x (B, 3, 16, 224, 224) --stem--> (B, 8*56*56, D) --mask token where hidden--> blocks --> (B, 8*14*14, D')
      --LayerNorm, Linear--> prediction (B, 1568, 108) --l2 on the masked tokens-- goal (B, 1568, 108) <--HOG-- x

(In training, after the last attention, only the 628 tokens go on that a mask can hide at most; see `most_masked`.)

The wrapper composes: any encoder with `embed(x)`, `encode(tokens, grid, kept)`, `stem_dim`, `embed_dim`, `patch_stride`
(mvit.py, vit.py), any target with `needs`, `dim`, `forward`, `loss` (targets.py). No decoder, no tokens dropped before
the last attention.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def resize_mask(mask, grid):
    """bool (B, *coarse) -> bool (B, N) on `grid`, by nearest neighbour, tokens in row-major order."""
    if mask.ndim != len(grid) + 1 or any(m > g for m, g in zip(mask.shape[1:], grid)):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit token grid {tuple(grid)}: give (B, *grid) or coarser")
    return F.interpolate(mask[:, None].float(), size=grid, mode="nearest").flatten(1).bool()


class MaskFeat(nn.Module):
    """Masked feature prediction.

    encoder: trunk without head (num_classes=0). target: what to predict; `target.dim` numbers per output token.
    most_masked: no sample has more masked tokens on the output grid (masking.py: `most_masked`; checked on a CPU only,
        as a GPU would have to be waited for). If given, as many tokens of each sample, the masked ones among them, are
        computed to the end in training, the others up to the last attention: the loss is the same.
    """

    def __init__(self, encoder, target, most_masked=None):
        super().__init__()
        self.encoder = encoder
        self.target = target
        self.most_masked = most_masked
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.stem_dim))
        # The paper has a linear layer; the release puts a LayerNorm, the trunk's missing final one, before it.
        self.norm = nn.LayerNorm(encoder.embed_dim, eps=1e-6)
        self.head = nn.Linear(encoder.embed_dim, target.dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def compute_target(self, x, extra=None):
        """The target of every output token, (B, N, ...), from the intact input; or from `extra`, something else of the
        sample, if that is what the target needs.

        A clip gives one frame per token step: with stem kernel 3, stride 2, padding 1, token t sees frames 2t-1, 2t,
        2t+1, so frame 2t is the temporal centre of its cube (Sec. 2.2).
        """
        if self.target.input_kind == "frames":
            x = x[:, :, ::self.encoder.patch_stride[0]].transpose(1, 2) if x.ndim == 5 else x[:, None]
        elif self.target.input_kind != "clip":
            x = extra
        return self.target(x)                                                 # frames: (B, t, 3, H, W)

    def wanted(self, masked):
        """Numbers (B, most_masked) of the masked tokens and, where they are fewer, of others; None: all are wanted.
        Always as many, whatever the mask: static shapes, hence one compiled graph."""
        if not self.training or self.most_masked is None:
            return None
        if masked.device.type == "cpu" and not torch.compiler.is_compiling() and masked.sum(1).max() > self.most_masked:
            raise ValueError(f"{masked.sum(1).max()} tokens of a sample are masked, and most_masked={self.most_masked}: "
                             "give as many, or None to compute all tokens")
        return masked.int().argsort(dim=1, descending=True, stable=True)[:, :self.most_masked]

    def forward(self, x, mask, extra=None):
        """x: (B, 3, T, H, W) or (B, 3, H, W), normalised. mask: bool (B, *grid), True = masked, at the output grid or
        coarser. extra: see `goal`.
        Returns the loss over masked tokens (scalar) and the prediction for all tokens (B, N, target.dim), or for
        most_masked tokens, the masked ones first, in training."""
        tokens, grid = self.encoder.embed(x)                                  # (B, N_stem, D)
        hidden = resize_mask(mask, grid)                                      # (B, N_stem)
        tokens = torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)
        masked = resize_mask(mask, [-(-n // s) for n, s in zip(x.shape[2:], self.encoder.patch_stride)])   # (B, N)
        kept = self.wanted(masked)                                            # (B, K), or None for all
        tokens, grid = self.encoder.encode(tokens, grid, kept)                # (B, 1 + N, D') or (B, 1 + K, D')
        prediction = self.head(self.norm(tokens[:, 1:])).float()              # (B, N or K, target.dim)
        with torch.no_grad():
            goal = self.compute_target(x, extra)                                        # (B, N, target.dim), or (B, N) classes
        if goal.shape[:2] != (len(x), math.prod(grid)):
            raise ValueError(f"target of shape {tuple(goal.shape)} for {len(x)} grids of {tuple(grid)} tokens: input "
                             f"{tuple(x.shape[2:])} must be a multiple of {self.encoder.patch_stride}")
        if kept is not None:
            samples = torch.arange(len(x), device=x.device)[:, None]
            goal, masked = goal[samples, kept], masked[samples, kept]
        return self.target.loss(prediction, goal, masked), prediction
