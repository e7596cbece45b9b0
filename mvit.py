"""MViTv2 for clips: multiscale attention with pooled queries, keys and values (Sec. 4; Li et al., CVPR 2022).

A clip (B, 3, T, H, W) becomes T/2 x H/4 x W/4 tokens; each of three transitions halves the side and doubles the
width. Attribute names are the official release's (SlowFast `MViT`), so its checkpoints load by name. Needs only torch.

Shapes of `mvitv2_s` on 16x224x224 (class token not counted):

    stem     8x56x56, 96 wide        blocks 1-2   8x28x28, 192
    block 0  8x56x56, 96 -> 192      blocks 3-13  8x14x14, 384
                                     blocks 14-15 8x14x14 (output_stride=16) or 8x7x7 (output_stride=32), 768

Differences from the release, none of which changes a result: relative positions enter through wider queries and keys,
so that no (queries x keys) tensor is built; heads are pooled side by side as channels, without transposition, and frame
by frame; of large tensors, some are computed again in the backward pass instead of kept; a CPU projects only the keys
and values that pooling sees, and takes few clips at a time. At the end stands MViT-B of the first version, which
MaskFeat can take as a teacher.
"""
import itertools
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Measured on a CPU; the first two hold on a GPU, too, where torch.compile does not decide.
SMALL = 600_000    # numbers in a tensor; with fewer, recomputation takes longer than it is worth
NARROW = 256       # width of layers; with less, products, too, take little time for the memory of their many tokens
PIECE = 2_400_000  # numbers that a block takes in at a time, a clip of mvitv2_s: larger tensors fall out of the caches,
#                    and the C library maps memory anew for each of them (8 clips at once take 15 % longer)


def recomputed(function, *inputs):
    """function(*inputs), of which only the inputs are kept; what lies in between is computed anew in the backward pass.

    For what takes little computation and much memory: in mvitv2_s 2 % more FLOPs, 44 % less to keep. A product at the
    end is not done twice, as recomputation stops once its input is there. torch.compile chooses by itself.
    """
    if inputs[0].numel() < SMALL or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def take(x, kept):
    """Of each sample of x (B, N, D), the tokens numbered in kept (B, K); all if None."""
    return x if kept is None else x.take_along_dim(kept[..., None], dim=1)


class DropPath(nn.Module):
    """Drop a residual branch per sample with probability `p`, scaling the kept ones by 1/(1-p)."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p)


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim, dim_out):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim_out)

    def forward(self, x, norm=nn.Identity()):
        """MLP of norm(x), (B, N, dim) -> (B, N, dim_out). For the backward pass it keeps x and the hidden layer before
        GELU; where the layers are narrow and the tokens many, that is much memory for little computation: then only x."""
        if x.shape[-1] < NARROW:
            return recomputed(lambda x: self.fc2(F.gelu(self.fc1(norm(x)))), x)
        hidden = recomputed(lambda x: self.fc1(norm(x)), x)
        return recomputed(lambda hidden: self.fc2(F.gelu(hidden)), hidden)


def relative_table(table, queries, keys):
    """Rows of a relative-position table for every (query, key) pair along one axis.

    table: (L, C), the vector of each distance; queries, keys: number of positions along the axis.
    Returns (queries, keys, C). A table of another length than 2*max(queries, keys)-1 is resized linearly (release).
    """
    length = 2 * max(queries, keys) - 1
    if table.shape[0] != length:
        table = F.interpolate(table.T[None].float(), size=length, mode="linear")[0].T
    # Positions of the coarser side are spread over the finer side's; distances start at zero.
    q = torch.arange(queries, device=table.device) * max(keys / queries, 1.0)
    k = torch.arange(keys, device=table.device) * max(queries / keys, 1.0)
    distance = q[:, None] - k[None, :] + (keys - 1) * max(queries / keys, 1.0)
    return F.embedding(distance.long(), table)                # table[distance], with a gradient summed in a fixed order


def seen_by_windows(x, thw, stride):
    """Of tokens x (B, 1 + t*h*w, D), those that 3x3 windows see that lie `stride` apart; the others need no projection.

    Returns these tokens, the class token first, their grid and the stride on it. With stride 8 the windows see rows
    (and columns) 0-1, 7-9, 15-17, ...: put side by side, they are seen by windows of stride 3, padded alike.
    """
    if stride <= 3 or x.device.type != "cpu":                                 # elsewhere not measured
        return x, thw, stride
    rows, columns = (torch.tensor([i for i in range(n) if (i + 1) % stride < 3]) for n in thw[1:])
    patches = x[:, 1:].unflatten(1, thw).index_select(2, rows).index_select(3, columns)
    return torch.cat([x[:, :1], patches.flatten(1, 3)], dim=1), tuple(patches.shape[1:4]), 3


class MultiScaleAttention(nn.Module):
    """Pooled self-attention with decomposed relative positions and residual pooling (MViTv2, Sec. 4.1)."""

    def __init__(self, dim, dim_out, num_heads, table_sizes, q_stride, kv_stride):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim_out // num_heads
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)
        for name, stride in (("q", q_stride), ("k", kv_stride), ("v", kv_stride)):
            # Depthwise, shared by all heads; also where the stride is 1 (release: every block pools q, k and v).
            conv = nn.Conv3d(self.head_dim, self.head_dim, 3, (1, stride, stride), 1, groups=self.head_dim, bias=False)
            self.add_module(f"pool_{name}", conv)
            self.add_module(f"norm_{name}", nn.LayerNorm(self.head_dim, eps=1e-6))
        self.rel_pos_t, self.rel_pos_h, self.rel_pos_w = (
            nn.Parameter(torch.zeros(length, self.head_dim)) for length in table_sizes)

    def pool(self, x, conv, norm, thw, stride=None):
        """(B, 1 + t*h*w, heads*C) -> (B, 1 + t'*h'*w', heads, C) and (t', h', w'). The class token is only normed.
        stride: along height and width, the convolution's own if None.

        The 3x3x3 kernel is three 3x3 ones over the frames before, at and after: two to three times as fast on a CPU,
        forwards and backwards together, as one depthwise conv3d.
        """
        cls, x = x.split((1, x.shape[1] - 1), dim=1)
        frames = x.reshape(-1, *thw[1:], x.shape[-1]).permute(0, 3, 1, 2)          # (B*t, heads*C, h, w), channels last
        weights = conv.weight.movedim(2, 0).repeat(1, self.num_heads, 1, 1, 1)     # (3, heads*C, 1, 3, 3)
        before, at, after = (
            F.conv2d(frames, weight, None, stride or conv.stride[1:], 1, 1, x.shape[-1]).permute(0, 2, 3, 1)
            .unflatten(0, (-1, thw[0])) for weight in weights)                     # (B, t, h', w', heads*C)
        nothing = torch.zeros_like(at[:, :1])                                      # padding along time
        patches = at + torch.cat([nothing, before[:, :-1]], dim=1)
        patches += torch.cat([after[:, 1:], nothing], dim=1)
        tokens = torch.cat([cls, patches.flatten(1, 3)], dim=1)
        return norm(tokens.unflatten(2, (self.num_heads, self.head_dim))), tuple(patches.shape[1:4])

    def pooled_qkv(self, x, thw):
        """(B, 1 + t*h*w, dim) -> queries, keys and values (B, 1 + N, heads, C) and the grids of the first two."""
        # Three products, not one cut into three: each result lies in memory as the convolutions want it.
        (Wq, Wk, Wv), (bq, bk, bv) = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, q_thw = self.pool(F.linear(x, Wq, bq), self.pool_q, self.norm_q, thw)              # (B, 1 + Nq, heads, C)
        x, thw, stride = seen_by_windows(x, thw, self.pool_k.stride[1])
        k, k_thw = self.pool(F.linear(x, Wk, bk), self.pool_k, self.norm_k, thw, stride)      # (B, 1 + Nk, heads, C)
        v, _ = self.pool(F.linear(x, Wv, bv), self.pool_v, self.norm_v, thw, stride)
        return q, k, v, q_thw, k_thw

    def forward(self, x, thw, norm=nn.Identity(), kept=None):
        """Attention over norm(x), (B, 1 + t*h*w, dim). Returns (B, 1 + t'*h'*w', dim_out), of which only the tokens
        `kept` if given, and the grid (t', h', w')."""
        def pool(x):
            return self.pooled_qkv(norm(x), thw)

        def project(x, q):
            x = torch.cat([x[:, :1], x[:, 1:] + q[:, 1:]], dim=1)              # residual pooling, not the class token
            return self.proj(take(x.flatten(2), kept))

        q, k, v, q_thw, k_thw = recomputed(pool, x) if x.shape[-1] < NARROW else pool(x)
        x = attention(q, k, v, q_thw, k_thw, self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        return recomputed(project, x, q), q_thw


def attention(q, k, v, q_thw, k_thw, rel_pos_t, rel_pos_h, rel_pos_w):
    """softmax(q k^T / sqrt(C) + bias) v, with bias q . (Rt[dt] + Rh[dh] + Rw[dw]) between patch tokens.

    q: (B, 1 + Nq, heads, C); k, v: (B, 1 + Nk, heads, C); first token: class token, which gets no bias.
    q_thw, k_thw: token grids, Nq = prod(q_thw). rel_pos_*: (L, C). Returns (B, 1 + Nq, heads, C).

    The bias of query i and key j=(t, h, w) is bias_t[i, t] + bias_h[i, h] + bias_w[i, w]: the inner product of the
    query's three short vectors with one-hot codes of t, h and w. So the vectors are appended to q and the codes to k,
    and one fused attention call does the rest.
    """
    B, _, heads, C = q.shape
    K = sum(k_thw)
    pad = -(C + K) % 8                                                        # fused kernels want a multiple of 8

    def append_bias(q, *tables):
        grid = q[:, 1:].unflatten(1, q_thw)                                                   # (B, t, h, w, heads, C)
        rt, rh, rw = (relative_table(r, n, m).to(q.dtype) for r, n, m in zip(tables, q_thw, k_thw))       # (n, m, C)
        bias = torch.cat([torch.einsum("bthwnc,tkc->bthwnk", grid, rt),
                          torch.einsum("bthwnc,hkc->bthwnk", grid, rh),
                          torch.einsum("bthwnc,wkc->bthwnk", grid, rw)], dim=-1)              # (B, t, h, w, heads, K)
        return torch.cat([q * C ** -0.5, F.pad(bias.flatten(1, 3), (0, pad, 0, 0, 1, 0))], dim=-1)

    place = torch.cartesian_prod(*(torch.arange(n, device=q.device) for n in k_thw))          # (Nk, 3)
    codes = torch.cat([F.one_hot(place[:, i], n) for i, n in enumerate(k_thw)], dim=1).to(q.dtype)     # (Nk, K)
    codes = F.pad(codes, (0, pad, 1, 0))[None, :, None].expand(B, -1, heads, -1)
    q = recomputed(append_bias, q, rel_pos_t, rel_pos_h, rel_pos_w).transpose(1, 2)   # (B, heads, 1 + Nq, C + K + pad)
    k = torch.cat([k, codes], dim=-1).transpose(1, 2)
    v = F.pad(v, (0, K + pad)).transpose(1, 2)                                # ... and one width for q, k and v
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :C].transpose(1, 2)


class MultiScaleBlock(nn.Module):
    """Attention and MLP. `dim_att` is the width of attention, `dim_out` that of the MLP's output."""

    def __init__(self, dim, dim_att, dim_out, num_heads, table_sizes, q_stride, kv_stride, drop_path):
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
        """Max-pool the shortcut where queries are pooled; the class token passes by."""
        if self.q_stride == 1:
            return x
        B, _, D = x.shape
        s = self.q_stride
        patches = x[:, 1:].reshape(-1, *thw[1:], D).permute(0, 3, 1, 2)       # (B*t, D, h, w), channels last
        patches = F.max_pool2d(patches, s + 1, s, s // 2).permute(0, 2, 3, 1)
        return torch.cat([x[:, :1], patches.reshape(B, -1, D)], dim=1)

    def forward(self, x, thw, kept=None):
        """x: (B, 1 + t*h*w, dim). Returns (B, 1 + t'*h'*w', dim_out), or only the tokens `kept`, and (t', h', w')."""
        few = max(PIECE // (x.shape[1] * x.shape[2]), 1) if x.device.type == "cpu" else len(x)     # samples at a time
        if not torch.compiler.is_compiling() and len(x) > few:
            pieces = zip(x.split(few), itertools.repeat(None) if kept is None else kept.split(few))
            outputs, grids = zip(*(self.forward(part, thw, its_kept) for part, its_kept in pieces))
            return torch.cat(outputs), grids[0]
        y, norm = x, self.norm1
        if self.dim != self.dim_att:                                          # widening in attention: from norm1(x)
            y, norm = norm(x), nn.Identity()
            x = self.proj(y)
        y, pooled = self.attn(y, thw, norm, kept)
        x = take(self.pool_skip(x, thw), kept) + self.drop_path(y)
        y, norm = x, self.norm2
        if self.dim_att != self.dim_out:                                      # widening in the MLP: from norm2(x)
            y, norm = norm(x), nn.Identity()
            x = self.proj(y)
        return x + self.drop_path(self.mlp(y, norm)), pooled


class PatchEmbed(nn.Module):
    """Overlapping 3x7x7 patches at stride 2x4x4."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (3, 7, 7), (2, 4, 4), (1, 3, 3))

    def forward(self, x):
        return self.proj(x)                                                   # (B, dim, T/2, H/4, W/4)


class MViT(nn.Module):
    """MViTv2 over clips (Sec. 4). Built by the presets below.

    embed_dim, num_heads: of the first stage; both double at each transition. stages: blocks per stage.
    output_stride: 32 for classification; 16 for pre-training, where the last transition keeps its resolution and the
        output is 8x14x14 (release); 8 keeps it at the last two (for small inputs).
    expand: "mlp" widens in the MLP of the block before a transition (release's MaskFeat configs, the paper's 71 and
        377 GFLOPs); "attn" in the attention of the transition itself (the paper's FLOPs at 312 and 352).
    num_classes: 0 leaves out the final norm and head: the trunk that MaskFeat takes.
    image_size: int or (H, W), multiples of 32 or any the stem accepts; sets the lengths of the position tables only.
        Another size, or another number of frames, at run time works: tables are resized on the fly.
    checkpointing: recompute each block in the backward pass.
    kv_stride: pooling of keys and values in the first stage; halved wherever queries are pooled.
    pool: what the head sees: "mean" of the patch tokens (MaskFeat fine-tuning), "cls" token (supervised MViTv2).
    dropout: before the head.
    """

    def __init__(self, embed_dim, num_heads, stages, num_classes=400, num_frames=16, image_size=224, output_stride=32,
                 expand="mlp", drop_path=0.0, checkpointing=False, kv_stride=8, pool="mean",
                 dropout=0.0):
        super().__init__()
        H, W = (image_size, image_size) if isinstance(image_size, int) else image_size
        if expand not in ("mlp", "attn"):
            raise ValueError(f'expand={expand!r}: use "mlp" or "attn"')
        if pool not in ("mean", "cls"):
            raise ValueError(f'pool={pool!r}: use "mean" or "cls"')
        if output_stride not in [4 * 2 ** i for i in range(len(stages))]:
            raise ValueError(f"output_stride={output_stride}: use 32 (fine-tuning), 16 (pre-training) or 8, at most "
                             f"{4 * 2 ** (len(stages) - 1)} with {len(stages)} stages")
        if num_frames < 2 or num_frames % 2:
            raise ValueError(f"num_frames={num_frames} is not a positive multiple of the stem's stride 2")
        if min(H, W) < 32:
            raise ValueError(f"image_size={H}x{W} is below 32, the stride of the network")
        self.patch_stride = (2, output_stride, output_stride)                 # pixels per output token along T, H, W
        self.stem_dim, self.embed_dim = embed_dim, embed_dim * 2 ** (len(stages) - 1)
        self.checkpointing, self.pool, self.dropout = checkpointing, pool, dropout

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = PatchEmbed(embed_dim)
        depth = sum(stages)
        transitions = [sum(stages[:i]) for i in range(1, len(stages))]        # first block of stages 2, 3, 4
        pooled = [start for i, start in enumerate(transitions) if 8 * 2 ** i <= output_stride]   # halve the resolution
        t, h, w = num_frames // 2, H // 4, W // 4                             # floor, as in the release
        dim = embed_dim
        self.blocks = nn.ModuleList()
        for i in range(depth):
            stage = sum(i >= start for start in transitions)
            q_stride = 2 if i in pooled else 1
            kv_stride = max(kv_stride // q_stride, 1)
            dim_att, dim_out = dim, dim
            if expand == "attn":
                dim_att = dim_out = embed_dim * 2 ** stage
            elif i + 1 in transitions:
                dim_out = 2 * dim
            sizes = [2 * t - 1] + [2 * max(n // q_stride, n // kv_stride) - 1 for n in (h, w)]
            rate = drop_path * i / max(depth - 1, 1)                          # 0 at the first block, linear in depth
            self.blocks.append(MultiScaleBlock(dim, dim_att, dim_out, num_heads * 2 ** stage, sizes, q_stride,
                                               kv_stride, rate))
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
        """Release: trunc-normal 0.02 weights; biases of Linear and LayerNorm are 0.02, not 0."""
        if isinstance(m, (nn.Linear, nn.Conv3d)):
            nn.init.trunc_normal_(m.weight, std=0.02)
        if isinstance(m, (nn.Linear, nn.LayerNorm)):
            nn.init.constant_(m.bias, 0.02)

    def embed(self, x):
        """(B, 3, T, H, W) -> stem tokens (B, N, D) and their grid (t, h, w). MaskFeat masks here."""
        x = self.patch_embed(x)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])

    def encode(self, tokens, thw, kept=None):
        """Stem tokens (B, N, D) on grid `thw` -> (B, 1 + N', D') and the output grid; the class token comes first.

        kept: (B, K) numbers of the patch tokens that are wanted, to get (B, 1 + K, D'): once the last block's attention
        is done, where tokens meet for the last time, the others are dropped.
        """
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        for block in self.blocks:
            last = F.pad(kept + 1, (1, 0)) if kept is not None and block is self.blocks[-1] else None
            if self.checkpointing and self.training:
                x, thw = checkpoint(block, x, thw, last, use_reentrant=False)
            else:
                x, thw = block(x, thw, last)
        return x, thw

    def features(self, x):
        """(B, 3, T, H, W) -> pooled features (B, D'), normed unless num_classes=0."""
        x, _ = self.encode(*self.embed(x))
        x = x[:, 1:].mean(dim=1) if self.pool == "mean" else x[:, 0]          # release: pooled, then normed
        return self.norm(x) if hasattr(self, "head") else x

    def forward(self, x):
        """(B, 3, T, H, W) -> logits (B, num_classes), or features with num_classes=0."""
        x = self.features(x)
        return self.head(F.dropout(x, self.dropout, self.training)) if hasattr(self, "head") else x


def mvit_tiny(**kw):
    """Stages 1/2 of width 64/128, 2/4 heads, 0.5 M parameters, output stride 8: for small clips on a CPU, not in the paper.
    Wide and shallow, as on few clips the step from pixels to orientations takes width, and depth only delays it."""
    return MViT(64, 2, (1, 2), **{"output_stride": 8, "kv_stride": 4, **kw})


def mvitv2_s(**kw):
    """36 M parameters, 71 GFLOPs at 16x224x224 (Table 3)."""
    return MViT(96, 1, (1, 2, 11, 2), **kw)


def mvitv2_b(**kw):
    """53 M parameters at 16x224x224, 51 M with expand="attn" (MViTv2 paper: 51 M). Not used in the MaskFeat paper."""
    return MViT(96, 1, (2, 3, 16, 3), **kw)


def mvitv2_l(**kw):
    """218 M parameters, 377 GFLOPs at 16x224x224 (Table 3). Stages 2/6/36/4, from the release's transitions."""
    return MViT(144, 2, (2, 6, 36, 4), **kw)


MODELS = {"mvit_tiny": mvit_tiny, "mvitv2_s": mvitv2_s, "mvitv2_b": mvitv2_b, "mvitv2_l": mvitv2_l}


class PooledAttention(nn.Module):
    """Attention of MViT v1: only keys and values are pooled everywhere, no relative positions, no residual pooling.

    Takes its layers from an attention of MViTv2; `pool_q` where the file has weights for it.
    """
    pool = MultiScaleAttention.pool

    def __init__(self, v2, pool_q):
        super().__init__()
        self.num_heads, self.head_dim, self.qkv, self.proj = v2.num_heads, v2.head_dim, v2.qkv, v2.proj
        for x in "qkv" if pool_q else "kv":
            self.add_module(f"pool_{x}", getattr(v2, f"pool_{x}"))
            self.add_module(f"norm_{x}", getattr(v2, f"norm_{x}"))

    def forward(self, x, thw, norm=nn.Identity(), kept=None):
        """Attention over norm(x), (B, 1 + t*h*w, dim). Returns (B, 1 + t'*h'*w', dim), of which only the tokens `kept`
        if given, and the grid of the queries."""
        q, k, v = self.qkv(norm(x)).chunk(3, dim=-1)
        k, _ = self.pool(k, self.pool_k, self.norm_k, thw)                    # (B, 1 + Nk, heads, C)
        v, _ = self.pool(v, self.pool_v, self.norm_v, thw)
        if hasattr(self, "pool_q"):
            q, thw = self.pool(q, self.pool_q, self.norm_q, thw)              # (B, 1 + Nq, heads, C)
        else:
            q = q.unflatten(2, (self.num_heads, self.head_dim))
        x = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        return self.proj(take(x.transpose(1, 2).flatten(2), kept)), thw


class MViTB(nn.Module):
    """MViT-B 16x4 of Kinetics-400 without head, 36 M parameters (Sec. 4.2, Table 1: supervised video teacher).

    Widths, blocks and skips are MViTv2-S's. output_stride: 32, or 16 with the last pooling of queries left out.
    """

    def __init__(self, output_stride=32):
        super().__init__()
        trunk = mvitv2_s(num_classes=0, output_stride=output_stride)
        self.cls_token, self.patch_embed, self.blocks = trunk.cls_token, trunk.patch_embed, trunk.blocks
        for i, block in enumerate(self.blocks):
            block.attn = PooledAttention(block.attn, pool_q=i in (1, 3, 14))
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, 56 * 56, 96))
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, 8, 96))
        self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, 96))
        self.norm = nn.LayerNorm(768, eps=1e-6)

    def positions(self, thw):
        """(1, 1 + t*h*w, 96); another grid than 8x56x56 by interpolation, bicubic and linear (release)."""
        t, h, w = thw
        space, time = self.pos_embed_spatial.transpose(1, 2), self.pos_embed_temporal.transpose(1, 2)
        if (h, w) != (56, 56):
            space = F.interpolate(space.unflatten(2, (56, 56)), size=(h, w), mode="bicubic").flatten(2)
        if t != 8:
            time = F.interpolate(time, size=t, mode="linear")
        table = (time[..., None] + space[:, :, None]).flatten(2).transpose(1, 2)          # (1, t*h*w, 96)
        return torch.cat([self.pos_embed_class, table], dim=1)

    def forward(self, x):
        """(B, 3, T, H, W) -> (B, 768, T/2, H/32, W/32), after the final norm, without the class token."""
        x = self.patch_embed(x)                                               # (B, 96, t, h, w)
        thw = tuple(x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + self.positions(thw)
        for block in self.blocks:
            x, thw = block(x, thw)
        return self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, thw)
