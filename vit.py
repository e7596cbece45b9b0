"""ViT for images: plain pre-norm transformer over 16x16 patches (Sec. 5).

Class token, learned absolute positions, no layer scale (Dosovitskiy et al., ICLR 2021). The head
sees the mean of the patch tokens, normalized after pooling (release), or the class token. Attribute
names are timm's. Release: SlowFast's MViT with PATCH_2D. Difference: positions for another grid are
resized bicubically. Needs only torch.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class DropPath(nn.Module):
    """Drop a residual branch per sample with probability `p`, scaling the kept ones by 1/(1-p)."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0 or not self.training:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        """(B, N, D) -> (B, N, D)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))               # (B, N, 3, heads, C)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, heads, N, C) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def check_divisible(size, patch):
    """Raise ValueError unless both sides of the image size (H, W) are multiples of `patch`."""
    for axis, side in zip("HW", size):
        if side < patch or side % patch:
            low = side - side % patch
            choices = f"{low} or {low + patch}" if low else patch
            raise ValueError(f"image size {size[0]}x{size[1]} is not divisible by patch {patch}: "
                             f"{axis}={side}, use {choices}")


class PatchEmbed(nn.Module):
    """Non-overlapping patches, `patch_size` pixels a side."""

    def __init__(self, dim, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x):
        check_divisible(x.shape[-2:], self.patch_size)
        return self.proj(x)                                                   # (B, dim, H/p, W/p)


class ViT(nn.Module):
    """Vision transformer (Sec. 5). Built by the presets below.

    image_size: int or (H, W) that `pos_embed` is made for. For other sizes it is resized.
    num_classes: 0 leaves out the final norm and head, which gives the trunk for MaskFeat.
    drop_path: rate at the last block, growing linearly from 0.
    checkpointing: recompute each block in the backward pass.
    pool: what the head sees, "mean" of the patch tokens (release) or "cls" token (timm, DeiT).
    dropout: before the head.
    Raises ValueError for an unknown option or a size that does not fit.
    """

    def __init__(self, embed_dim, depth, num_heads, num_classes=1000, image_size=224,
                 patch_size=16, drop_path=0.0, checkpointing=False, pool="mean", dropout=0.0):
        super().__init__()
        H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
        check_divisible((H, W), patch_size)
        if pool not in ("mean", "cls"):
            raise ValueError(f'pool={pool!r}: use "mean" or "cls"')
        self.grid = (H // patch_size, W // patch_size)
        self.patch_stride = (patch_size, patch_size)                    # pixels per token
        self.stem_dim = self.embed_dim = embed_dim
        self.checkpointing, self.pool, self.dropout = checkpointing, pool, dropout

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.patch_embed = PatchEmbed(embed_dim, patch_size)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        if num_classes:
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
            self.head = nn.Linear(embed_dim, num_classes)
        self.apply(self._init)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @staticmethod
    def _init(m):
        """Release: weights are trunc-normal, and biases of Linear and LayerNorm are 0.02, not 0."""
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(m.weight, std=0.02)
        if isinstance(m, (nn.Linear, nn.LayerNorm)):
            nn.init.constant_(m.bias, 0.02)

    def positions(self, grid):
        """Position table (1, 1 + h*w, D) for a token grid (h, w), resized bicubically."""
        if tuple(grid) == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2).float()
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, x):
        """(B, 3, H, W) -> patch tokens (B, N, D) without positions, and their grid (h, w)."""
        x = self.patch_embed(x)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])

    def encode(self, tokens, grid):
        """Patch tokens (B, N, D) -> (B, 1 + N, D), the class token first, and the same grid."""
        cls_token = self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        x = torch.cat([cls_token, tokens], dim=1)
        x = x + self.positions(grid)                              # also at masked tokens (Sec. 2.1)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x, grid

    def features(self, x):
        """(B, 3, H, W) -> pooled features (B, D), after the final norm unless num_classes=0."""
        x, _ = self.encode(*self.embed(x))
        x = x[:, 1:].mean(dim=1) if self.pool == "mean" else x[:, 0]
        return self.norm(x) if hasattr(self, "head") else x

    def forward(self, x):
        """(B, 3, H, W) -> logits (B, num_classes), or features with num_classes=0."""
        x = self.features(x)
        if not hasattr(self, "head"):
            return x
        return self.head(F.dropout(x, self.dropout, self.training))


def vit_tiny(**kw):
    """1.2 M parameters without head, made for 64x64 images. Not in the paper."""
    return ViT(128, 6, 4, **{"patch_size": 8, "image_size": 64, **kw})


def vit_b(**kw):
    """86.6 M parameters with 1000 classes (release). Sec. 5, results in Table 7."""
    return ViT(768, 12, 12, **kw)


def vit_l(**kw):
    """304.3 M parameters with 1000 classes (release). Sec. 5, results in Table 7."""
    return ViT(1024, 24, 16, **kw)


MODELS = {"vit_tiny": vit_tiny, "vit_b": vit_b, "vit_l": vit_l}
