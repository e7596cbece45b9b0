"""MViTv2 for video: multiscale attention with pooled queries, keys and values (Sec. 4).

A clip (B, 3, T, H, W) becomes T/2 x H/4 x W/4 tokens (Li et al., MViTv2, CVPR 2022). Each of three
transitions doubles the width and halves h and w. In pre-training the last one keeps h and w
(release). Attribute names are those of the official release (SlowFast `MViT`), so its checkpoints
load by name. Needs only torch.

Shapes of `mvitv2_s` on 16x224x224 (class token not counted):

    stem     8x56x56, 96 wide        blocks 1-2   8x28x28, 192, after block 2 384
    block 0  8x56x56, 96 -> 192      blocks 3-13  8x14x14, 384, after block 13 768
                                     blocks 14-15 8x14x14 (output_stride=16) or
                                                  8x7x7 (output_stride=32), 768

Two forms differ from the release, and neither changes a result. Relative positions enter through
wider queries and keys, so that no (queries x keys) bias is built. Heads are pooled side by side as
channels, without transposing, by 2-D convolutions. The tests compare them with `plain_attention`
and `plain_pool` of tests/plain.py.
"""
from collections import OrderedDict

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


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim, dim_out):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim_out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def relative_table(table, queries, keys):
    """Rows of a relative-position table for every (query, key) pair along one axis.

    table: (L, C), one vector per distance. queries, keys: number of positions along the axis.
    Returns (queries, keys, C). A table of another length than 2 * max(queries, keys) - 1 is resized
    linearly (release).
    """
    length = 2 * max(queries, keys) - 1
    if len(table) != length:
        table = F.interpolate(table.T[None].float(), size=length, mode="linear")[0].T
    # The side with fewer positions is stretched to the other. Row 0 is for the lowest query - key.
    q_ratio, k_ratio = max(keys / queries, 1.0), max(queries / keys, 1.0)
    q = torch.arange(queries, device=table.device) * q_ratio
    k = torch.arange(keys, device=table.device) * k_ratio
    row = (q[:, None] - k[None, :] + (keys - 1) * k_ratio).long()
    # The same as table[row], but the gradient is summed in a fixed order, so runs repeat.
    return F.embedding(row, table)


def attention(q, k, v, q_thw, k_thw, rel_pos_t, rel_pos_h, rel_pos_w):
    """softmax(q k^T / sqrt(C) + bias) v with bias q . (Rt[dt] + Rh[dh] + Rw[dw]) of patch tokens.

    q: (B, 1 + Nq, heads, C). k, v: (B, 1 + Nk, heads, C). The first is the class token: no bias.
    q_thw, k_thw: token grids, Nq = prod(q_thw). rel_pos_*: (L, C). Returns (B, 1 + Nq, heads, C).

    The bias of query i and key j = (t, h, w) is bias_t[i, t] + bias_h[i, h] + bias_w[i, w]. This is
    the inner product of the query's three short vectors with one-hot codes of t, h and w. So the
    vectors are appended to q and the codes to k, and one fused attention call does the rest.
    """
    B, _, heads, C = q.shape
    K = sum(k_thw)
    pad = -(C + K) % 8                                          # fused kernels want multiples of 8

    tables = (rel_pos_t, rel_pos_h, rel_pos_w)
    rt, rh, rw = (relative_table(r, n, m).to(q.dtype) for r, n, m in zip(tables, q_thw, k_thw))
    patches = q[:, 1:].unflatten(1, q_thw)                                # (B, t, h, w, heads, C)
    bias = torch.cat([torch.einsum("bthwnc,tkc->bthwnk", patches, rt),
                      torch.einsum("bthwnc,hkc->bthwnk", patches, rh),
                      torch.einsum("bthwnc,wkc->bthwnk", patches, rw)], dim=-1)
    bias = F.pad(bias.flatten(1, 3), (0, pad, 0, 0, 1, 0))            # (B, 1 + Nq, heads, K + pad)

    place = torch.cartesian_prod(*(torch.arange(n, device=q.device) for n in k_thw))    # (Nk, 3)
    codes = torch.cat([F.one_hot(place[:, i], n) for i, n in enumerate(k_thw)], dim=1)  # (Nk, K)
    codes = F.pad(codes.to(q.dtype), (0, pad, 1, 0))[None, :, None].expand(B, -1, heads, -1)

    q = torch.cat([q * C ** -0.5, bias], dim=-1).transpose(1, 2)      # (B, heads, 1 + Nq, C + ...)
    k = torch.cat([k, codes], dim=-1).transpose(1, 2)
    v = F.pad(v, (0, K + pad)).transpose(1, 2)                            # all of one width
    x = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return x[..., :C].transpose(1, 2)


class MultiScaleAttention(nn.Module):
    """Pooled attention with relative positions and residual pooling (MViTv2 paper, Sec. 4.1)."""

    def __init__(self, dim, dim_out, num_heads, table_sizes, q_stride, kv_stride):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim_out // num_heads
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)
        C = self.head_dim
        for name, stride in (("q", q_stride), ("k", kv_stride), ("v", kv_stride)):
            # Depthwise and shared by the heads, also where the stride is 1 (release).
            conv = nn.Conv3d(C, C, 3, (1, stride, stride), 1, groups=C, bias=False)
            self.add_module(f"pool_{name}", conv)
            self.add_module(f"norm_{name}", nn.LayerNorm(C, eps=1e-6))
        self.rel_pos_t, self.rel_pos_h, self.rel_pos_w = (
            nn.Parameter(torch.zeros(length, C)) for length in table_sizes)

    def pool(self, x, conv, norm, thw):
        """(B, 1 + t*h*w, heads*C) -> (B, 1 + t'*h'*w', heads, C) and (t', h', w').

        The class token is only normalized. A 3x3x3 convolution is the sum of three 3x3
        convolutions: the first slice of the kernel on frame t - 1, the middle one on frame t, and
        the last one on frame t + 1. (Against conv3d, a compiled step takes a sixth of the time
        on an H200, and 0.9 of it on a CPU.)
        """
        cls, x = x.split((1, x.shape[1] - 1), dim=1)
        D = x.shape[-1]
        frames = x.reshape(-1, *thw[1:], D).permute(0, 3, 1, 2)           # (B*t, D, h, w)
        weights = conv.weight.movedim(2, 0).repeat(1, self.num_heads, 1, 1, 1)  # (3, D, 1, 3, 3)
        before, at, after = (
            F.conv2d(frames, weight, None, conv.stride[1:], 1, 1, D).permute(0, 2, 3, 1)
            .unflatten(0, (-1, thw[0])) for weight in weights)            # (B, t, h', w', D) each
        nothing = torch.zeros_like(at[:, :1])                             # padding along time
        patches = at + torch.cat([nothing, before[:, :-1]], dim=1)
        patches = patches + torch.cat([after[:, 1:], nothing], dim=1)
        tokens = torch.cat([cls, patches.flatten(1, 3)], dim=1)
        tokens = norm(tokens.unflatten(2, (self.num_heads, self.head_dim)))
        return tokens, tuple(patches.shape[1:4])

    def forward(self, x, thw):
        """(B, 1 + t*h*w, dim) -> (B, 1 + t'*h'*w', dim_out) and the grid (t', h', w')."""
        # Three products, not one that is cut in three: the convolutions take each result without
        # a copy, which saves a CPU 6 % of a step.
        weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k, v = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases))
        q, q_thw = self.pool(q, self.pool_q, self.norm_q, thw)            # (B, 1 + Nq, heads, C)
        k, k_thw = self.pool(k, self.pool_k, self.norm_k, thw)            # (B, 1 + Nk, heads, C)
        v, _ = self.pool(v, self.pool_v, self.norm_v, thw)
        x = attention(q, k, v, q_thw, k_thw, self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        x = torch.cat([x[:, :1], x[:, 1:] + q[:, 1:]], dim=1)             # residual pooling
        return self.proj(x.flatten(2)), q_thw


class MultiScaleBlock(nn.Module):
    """Attention and MLP. dim_att: width of attention. dim_out: width of the output."""

    def __init__(self, dim, dim_att, dim_out, num_heads, table_sizes, q_stride, kv_stride,
                 drop_path):
        super().__init__()
        self.dim, self.dim_att, self.dim_out, self.q_stride = dim, dim_att, dim_out, q_stride
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MultiScaleAttention(dim, dim_att, num_heads, table_sizes, q_stride, kv_stride)
        self.norm2 = nn.LayerNorm(dim_att, eps=1e-6)
        self.mlp = Mlp(dim_att, 4 * dim_att, dim_out)
        self.drop_path = DropPath(drop_path)
        if dim != dim_out:
            self.proj = nn.Linear(dim, dim_out)

    def pool_skip(self, x, thw):
        """Max-pool the shortcut where queries are pooled. The class token passes by."""
        if self.q_stride == 1:
            return x
        (B, _, D), s = x.shape, self.q_stride
        patches = x[:, 1:].reshape(-1, *thw[1:], D).permute(0, 3, 1, 2)     # (B*t, D, h, w)
        patches = F.max_pool2d(patches, s + 1, s, s // 2).permute(0, 2, 3, 1)
        return torch.cat([x[:, :1], patches.reshape(B, -1, D)], dim=1)

    def output_grid(self, thw):
        """The grid after this block, which pools h and w by q_stride, rounded up."""
        t, h, w = thw
        return t, -(-h // self.q_stride), -(-w // self.q_stride)

    def forward(self, x, thw):
        """(B, 1 + t*h*w, dim) -> (B, 1 + t'*h'*w', dim_out) and the grid (t', h', w').

        The shortcut widens by `proj` of the normed input (release): in the attention with
        expand="attn", else in the MLP.
        """
        y = self.norm1(x)
        skip = self.proj(y) if self.dim != self.dim_att else x
        y, pooled = self.attn(y, thw)
        x = self.pool_skip(skip, thw) + self.drop_path(y)
        y = self.norm2(x)
        skip = self.proj(y) if self.dim_att != self.dim_out else x
        return skip + self.drop_path(self.mlp(y)), pooled


class PatchEmbed(nn.Module):
    """Overlapping 3x7x7 patches at stride 2x4x4."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (3, 7, 7), (2, 4, 4), (1, 3, 3))

    def forward(self, x):
        return self.proj(x)                                             # (B, dim, T/2, H/4, W/4)


class MViT(nn.Module):
    """MViTv2 for clips (Sec. 4). Built by the presets below.

    embed_dim, num_heads: of the first stage. Both double at each transition.
    stages: blocks per stage.
    num_classes: 0 leaves out the final norm and head, which gives the trunk for MaskFeat.
    num_frames, image_size (int or (H, W)): the lengths of the position tables follow from these.
        Other sizes work, too: tables are resized.
    output_stride: 32 for classification. With 16, for pre-training, the last transition keeps its
        resolution, and the output is 8x14x14 (release). With 8, the last two keep it.
    expand: "mlp" widens in the MLP of the block before a transition (the release's MaskFeat
        configs, the paper's 71 and 377 GFLOPs). "attn" widens in the attention of the transition
        itself (the paper's GFLOPs at 312 and 352, Table 3).
    drop_path: rate at the last block, growing linearly from 0.
    checkpointing: recompute each block in the backward pass.
    kv_stride: pooling of keys and values in the first stage, halved wherever queries are pooled.
    pool: what the head sees, "mean" of the patch tokens or "cls" token (release's configs of
        MaskFeat, of MViTv2).
    dropout: before the head.
    Raises ValueError for an unknown option or a size that does not fit.
    """

    def __init__(self, embed_dim, num_heads, stages, num_classes=400, num_frames=16,
                 image_size=224, output_stride=32, expand="mlp", drop_path=0.0,
                 checkpointing=False, kv_stride=8, pool="mean", dropout=0.0):
        super().__init__()
        H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
        if expand not in ("mlp", "attn"):
            raise ValueError(f'expand={expand!r}: use "mlp" or "attn"')
        if pool not in ("mean", "cls"):
            raise ValueError(f'pool={pool!r}: use "mean" or "cls"')
        strides = [4 * 2 ** i for i in range(len(stages))]
        if output_stride not in strides:
            raise ValueError(f"output_stride={output_stride} does not suit {len(stages)} stages: "
                             f"use one of {strides}")
        if num_frames < 2 or num_frames % 2:
            raise ValueError(f"num_frames={num_frames}: use a positive multiple of 2")
        if min(H, W) < 32:
            raise ValueError(f"image_size={H}x{W} is too small: use at least 32x32")
        self.patch_stride = (2, output_stride, output_stride)           # input per output token
        self.stem_dim, self.embed_dim = embed_dim, embed_dim * 2 ** (len(stages) - 1)
        self.checkpointing, self.pool, self.dropout = checkpointing, pool, dropout

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = PatchEmbed(embed_dim)
        depth = sum(stages)
        transitions = [sum(stages[:i]) for i in range(1, len(stages))]  # first block of each stage
        halving = [start for i, start in enumerate(transitions) if 8 * 2 ** i <= output_stride]
        t, h, w = num_frames // 2, H // 4, W // 4                       # floor (release)
        dim = embed_dim
        self.blocks = nn.ModuleList()
        for i in range(depth):
            stage = sum(i >= start for start in transitions)
            q_stride = 2 if i in halving else 1
            kv_stride = max(kv_stride // q_stride, 1)
            dim_att, dim_out = dim, dim
            if expand == "attn":
                dim_att = dim_out = embed_dim * 2 ** stage
            elif i + 1 in transitions:
                dim_out = 2 * dim
            sizes = [2 * t - 1] + [2 * max(n // q_stride, n // kv_stride) - 1 for n in (h, w)]
            rate = drop_path * i / max(depth - 1, 1)
            self.blocks.append(MultiScaleBlock(dim, dim_att, dim_out, num_heads * 2 ** stage, sizes,
                                               q_stride, kv_stride, rate))
            dim, h, w = dim_out, h // q_stride, w // q_stride
        if num_classes:
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.head = nn.Sequential(OrderedDict(projection=nn.Linear(dim, num_classes)))
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name == "cls_token" or ".rel_pos_" in name:
                nn.init.trunc_normal_(p, std=0.02)

    @staticmethod
    def _init(m):
        """Release: weights are trunc-normal, and biases of Linear and LayerNorm are 0.02, not 0."""
        if isinstance(m, (nn.Linear, nn.Conv3d)):
            nn.init.trunc_normal_(m.weight, std=0.02)
        if isinstance(m, (nn.Linear, nn.LayerNorm)):
            nn.init.constant_(m.bias, 0.02)

    def embed(self, x):
        """(B, 3, T, H, W) -> stem tokens (B, N, D) and their grid (t, h, w)."""
        x = self.patch_embed(x)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])

    def encode(self, tokens, thw):
        """Stem tokens (B, N, D) on a grid -> (B, 1 + N', D'), class token first, and its grid."""
        cls_token = self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        x = torch.cat([cls_token, tokens], dim=1)
        for block in self.blocks:
            if self.checkpointing and self.training:
                # Only tensors pass through: at the grid, torch 2.6 would break a compiled graph.
                run = lambda x, block=block, thw=thw: block(x, thw)[0]
                x, thw = checkpoint(run, x, use_reentrant=False), block.output_grid(thw)
            else:
                x, thw = block(x, thw)
        return x, thw

    def features(self, x):
        """(B, 3, T, H, W) -> pooled features (B, D'), after the final norm unless num_classes=0."""
        x, _ = self.encode(*self.embed(x))
        x = x[:, 1:].mean(dim=1) if self.pool == "mean" else x[:, 0]
        return self.norm(x) if hasattr(self, "head") else x

    def forward(self, x):
        """(B, 3, T, H, W) -> logits (B, num_classes), or features with num_classes=0."""
        x = self.features(x)
        if not hasattr(self, "head"):
            return x
        return self.head(F.dropout(x, self.dropout, self.training))


def mvit_nano(**kw):
    """0.2 M parameters, output stride 8, for the example on a CPU. Not in the paper."""
    return MViT(32, 1, (1, 2), **{"output_stride": 8, "kv_stride": 4, **kw})


def mvit_tiny(**kw):
    """0.5 M parameters, output stride 8, for small clips on a CPU. Not in the paper."""
    return MViT(64, 2, (1, 2), **{"output_stride": 8, "kv_stride": 4, **kw})


def mvitv2_s(**kw):
    """36 M parameters, 71 GFLOPs at 16x224x224 (Table 3)."""
    return MViT(96, 1, (1, 2, 11, 2), **kw)


def mvitv2_b(**kw):
    """53 M parameters, 51 M with expand="attn" (MViTv2 paper: 51 M). Not in the MaskFeat paper."""
    return MViT(96, 1, (2, 3, 16, 3), **kw)


def mvitv2_l(**kw):
    """218 M parameters, 377 GFLOPs at 16x224x224 (Table 3). Stages: release's transitions."""
    return MViT(144, 2, (2, 6, 36, 4), **kw)


MODELS = {"mvit_nano": mvit_nano, "mvit_tiny": mvit_tiny, "mvitv2_s": mvitv2_s,
          "mvitv2_b": mvitv2_b, "mvitv2_l": mvitv2_l}
