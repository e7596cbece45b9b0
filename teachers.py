"""Frozen networks whose outputs MaskFeat can predict (Sec. 2.2, Tables 1, 2), and their files.

    teacher = load_vit("dino_vitbase16_pretrain.pth")
    teacher(images)     # (B, 3, H, W), normalized by teacher.mean and .std -> (B, 768, h, w)

Modules carry the names of the public files (DALL-E, torchvision, SlowFast, and timm for ViTs), so
that these load by name. Files are read by `read_checkpoint`, which makes nothing of them but
tensors and plain values.
"""
import math
import re
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

import mvit
import vit
from checkpoints import read_checkpoint

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINETICS = (0.45,) * 3, (0.225,) * 3


# ------------------------------------------------------------------------------------ dVAE encoder

class Conv(nn.Module):
    """Convolution of stride 1 that keeps the size, with DALL-E's names for weight and bias."""

    def __init__(self, dim, dim_out, kernel):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dim_out, dim, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(dim_out))

    def forward(self, x):
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class EncoderBlock(nn.Module):
    """Identity plus four times ReLU and convolution, scaled by 1/64 = 1/blocks^2."""

    def __init__(self, dim, dim_out):
        super().__init__()
        hidden, layers = dim_out // 4, OrderedDict()
        sizes = (dim, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, dim_out, 1)
        for i, size in enumerate(sizes, 1):
            layers |= {f"relu_{i}": nn.ReLU(), f"conv_{i}": Conv(*size)}
        self.id_path = Conv(dim, dim_out, 1) if dim != dim_out else nn.Identity()
        self.res_path = nn.Sequential(layers)

    def forward(self, x):
        return self.id_path(x) + self.res_path(x) / 64


class Encoder(nn.Module):
    """DALL-E's dVAE encoder, 54 M parameters (Sec. 2.2, Table 2): a token for 8x8 pixels."""

    def __init__(self):
        super().__init__()
        layers, dims = OrderedDict(input=Conv(3, 256, 7)), (256, 256, 512, 1024, 2048)
        for k in range(1, 5):
            group = {"block_1": EncoderBlock(dims[k - 1], dims[k]),
                     "block_2": EncoderBlock(dims[k], dims[k])}
            pool = {"pool": nn.MaxPool2d(2)} if k < 4 else {}
            layers[f"group_{k}"] = nn.Sequential(OrderedDict(group | pool))
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(2048, 8192, 1)))
        self.blocks = nn.Sequential(layers)

    def forward(self, images):
        """RGB in [0, 1], (B, 3, 8h, 8w) -> logits (B, 8192, h, w)."""
        return self.blocks(0.8 * images + 0.1)


# --------------------------------------------------------------------------------------- ResNet-50

class Bottleneck(nn.Module):
    def __init__(self, dim_in, dim, stride, dilation):
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.conv3 = nn.Conv2d(dim, 4 * dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * dim)
        self.downsample = nn.Identity()
        if dim_in != 4 * dim:
            self.downsample = nn.Sequential(nn.Conv2d(dim_in, 4 * dim, 1, stride, bias=False),
                                            nn.BatchNorm2d(4 * dim))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """ResNet-50 up to its last map, 23.5 M parameters (torchvision, MoCo).

    dilated: the last stage keeps 1/16 of the side, with kernels dilated by 2. Its even rows and
    columns are the map of 1/32.
    """

    def __init__(self, dilated=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        for k, (depth, dim) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
            full = dilated and k == 4
            first = Bottleneck(64 if k == 1 else 2 * dim, dim, 1 if k == 1 or full else 2, 1)
            others = (Bottleneck(4 * dim, dim, 1, 2 if full else 1) for _ in range(depth - 1))
            self.add_module(f"layer{k}", nn.Sequential(first, *others))

    def forward(self, x):
        """(B, 3, H, W) -> (B, 2048, H/32, W/32), or H/16, W/16 if dilated."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)            # (B, 64, H/4, W/4)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


# --------------------------------------------------------------------------------------------- ViT

class PatchTokens(nn.Module):
    """A ViT's patch tokens as a map (Sec. 2.2), after the final norm as in DINO's features."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, x):
        """(B, 3, H, W) -> (B, D, h, w)."""
        tokens, grid = self.trunk.encode(*self.trunk.embed(x))                # (B, 1 + N, D)
        return self.trunk.norm(tokens[:, 1:]).transpose(1, 2).unflatten(2, grid)


def sincos_positions(grid, dim):
    """MoCo v3's fixed position table (1, 1 + h*w, dim): sin, cos of row, column. Class token: 0."""
    frequency = 10000.0 ** -(torch.arange(dim // 4).double() * 4 / dim)
    places = torch.cartesian_prod(*(torch.arange(n).double() for n in grid)).T    # (2, N)
    angles = places[..., None] * frequency                              # (2, N, dim / 4)
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim), table.float()])[None]


# ------------------------------------------------------------------------ MViT of the first version

class PooledAttention(nn.Module):
    """Attention of MViT v1: no relative positions, no residual pooling, queries pooled only where
    the grid changes.

    Takes its layers from `v2`, an attention of MViTv2. pool_q: the file has weights for it.
    """
    pool = mvit.MultiScaleAttention.pool

    def __init__(self, v2, pool_q):
        super().__init__()
        self.num_heads, self.head_dim = v2.num_heads, v2.head_dim
        self.qkv, self.proj = v2.qkv, v2.proj
        for x in "qkv" if pool_q else "kv":
            self.add_module(f"pool_{x}", getattr(v2, f"pool_{x}"))
            self.add_module(f"norm_{x}", getattr(v2, f"norm_{x}"))

    def forward(self, x, thw):
        """(B, 1 + t*h*w, dim) -> (B, 1 + t'*h'*w', dim) and the grid of the queries."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, _ = self.pool(k, self.pool_k, self.norm_k, thw)              # (B, 1 + Nk, heads, C)
        v, _ = self.pool(v, self.pool_v, self.norm_v, thw)
        if hasattr(self, "pool_q"):
            q, thw = self.pool(q, self.pool_q, self.norm_q, thw)        # (B, 1 + Nq, heads, C)
        else:
            q = q.unflatten(2, (self.num_heads, self.head_dim))
        x = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        return self.proj(x.transpose(1, 2).flatten(2)), thw


class MViTB(nn.Module):
    """MViT-B 16x4 without head, 36 M parameters, supervised on Kinetics-400 (Sec. 3, Table 1).

    Widths, blocks and skips are those of MViTv2-S. output_stride: 32, or 16 to leave out the last
    pooling of queries.
    """

    def __init__(self, output_stride=32):
        super().__init__()
        v2 = mvit.mvitv2_s(num_classes=0, output_stride=output_stride)
        self.cls_token, self.patch_embed, self.blocks = v2.cls_token, v2.patch_embed, v2.blocks
        for i, block in enumerate(self.blocks):
            block.attn = PooledAttention(block.attn, pool_q=i in (1, 3, 14))
        self.pos_embed_spatial = nn.Parameter(torch.zeros(1, 56 * 56, 96))
        self.pos_embed_temporal = nn.Parameter(torch.zeros(1, 8, 96))
        self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, 96))
        self.norm = nn.LayerNorm(768, eps=1e-6)

    def positions(self, thw):
        """(1, 1 + t*h*w, 96). Another grid than 8x56x56 is interpolated (release)."""
        t, h, w = thw
        space = self.pos_embed_spatial.transpose(1, 2).unflatten(2, (56, 56))
        time = self.pos_embed_temporal.transpose(1, 2)
        if (h, w) != (56, 56):
            space = F.interpolate(space, size=(h, w), mode="bicubic")
        if t != 8:
            time = F.interpolate(time, size=t, mode="linear")
        table = time[..., None] + space.flatten(2)[:, :, None]          # (1, 96, t, h*w)
        return torch.cat([self.pos_embed_class, table.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x):
        """(B, 3, T, H, W) -> (B, 768, T/2, H/32, W/32), after the final norm."""
        x = self.patch_embed(x)                                         # (B, 96, t, h, w)
        thw = tuple(x.shape[2:])
        cls = self.cls_token.expand(len(x), -1, -1).to(x.dtype)
        x = torch.cat([cls, x.flatten(2).transpose(1, 2)], dim=1) + self.positions(thw)
        for block in self.blocks:
            x, thw = block(x, thw)
        return self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, thw)


# ------------------------------------------------------------------------------------------- files

# Where a file keeps its state dict. None: at the top level.
CONTAINERS = ("model_state", "model", "teacher", "state_dict", None)
# What precedes the names, after DDP's "module.": nothing, DINO's, MoCo v3's, MoCo v2's, ours.
PREFIXES = ("", "backbone.", "base_encoder.", "encoder_q.", "encoder.")
# The classes in DALL-E's encoder.pkl.
PICKLED = ("dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.utils.Conv2d",
           "torch.nn.modules.container.Sequential", "torch.nn.modules.activation.ReLU",
           "torch.nn.modules.pooling.MaxPool2d", "torch.nn.modules.linear.Identity")


class Inert(dict):
    """Stands for these classes when a file is read: it stores their attributes and runs nothing."""


def tensors_of(module, prefix=""):
    """{name: tensor} of a module pickled as Inert."""
    own = getattr(module, "_parameters", {})
    state = {prefix + name: x for name, x in own.items() if x is not None}
    for name, child in getattr(module, "_modules", {}).items():
        state |= tensors_of(child, f"{prefix}{name}.")
    return state


def dalle_name(name):
    """DALL-E's name of a tensor that transformers (FLAVA's codebook) may have renamed."""
    name = name.replace(".group.", ".").replace(".path.", ".")
    return re.sub(r"\.(w|b)(eight|ias)$", r".\1", name)


def read_state(path, sign):
    """(state dict in our names, its place) of a teacher's file. sign: a tensor it must have."""
    if not path:
        raise ValueError("this target needs a teacher: name its file of weights with --teacher")
    with torch.serialization.safe_globals([(Inert, name) for name in PICKLED]):
        checkpoint = read_checkpoint(path)
    checkpoint = tensors_of(checkpoint) if isinstance(checkpoint, Inert) else checkpoint
    for key in CONTAINERS:
        state = checkpoint if key is None else checkpoint.get(key)
        state = state if isinstance(state, dict) else {}
        state = {str(name).removeprefix("module."): x for name, x in state.items()
                 if isinstance(x, torch.Tensor)}
        if sign == "blocks.input.w":
            state = {dalle_name(name): x for name, x in state.items()}
        for prefix in PREFIXES:
            if prefix + sign in state and state[prefix + sign].ndim > 1:
                own = {name.removeprefix(prefix): x for name, x in state.items()
                       if name.startswith(prefix)}
                if prefix == "encoder.":                                # ours: norm beside encoder
                    own |= {name: x for name, x in state.items() if name.startswith("norm.")}
                return own, f"{path}, {'/'.join(filter(None, (key, prefix))) or 'top level'}"
    raise ValueError(f"{path} is not this kind of teacher: no tensor {sign} at the top level or in "
                     f"{', '.join(CONTAINERS[:-1])}, with or without {', '.join(PREFIXES[1:])} "
                     "before its name")


def fill(build, state, path, ignored):
    """The model that build() makes, filled from `state`. Names that start with `ignored` may be
    missing or left over, no others."""
    with torch.device("meta"):                                          # skips random weights
        model = build()
    own = {name: x for name, x in model.state_dict().items() if not name.startswith(ignored)}
    counts = {name: torch.tensor(0) for name in own if name.endswith("num_batches_tracked")}
    state = counts | state
    missing = [name for name in own if name not in state]
    odd = [f"{name} {tuple(x.shape)}" for name, x in state.items() if not name.startswith(ignored)
           and (name not in own or x.shape != own[name].shape)]
    for names, fault in ((missing, "are missing"), (odd, "do not fit")):
        if names:
            raise ValueError(f"{path} is not a complete {type(model).__name__}: {len(names)} "
                             f"tensors {fault}, such as {names[0]}")
    filled = {name: state[name].to(x.dtype) for name, x in own.items()}
    model.load_state_dict(filled, strict=False, assign=True)
    return model


def load_vit(path, align="bilinear"):
    """ViT of DINO (backbone or full file), MoCo v3, DeiT, timm or this project."""
    state, about = read_state(path, "patch_embed.proj.weight")
    width, *_, patch = state["patch_embed.proj.weight"].shape
    positions = state.get("pos_embed", torch.empty(0)).numel() // width
    side = math.isqrt(max(positions - 1, 0))
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    presets = {(128, 6): vit.vit_tiny, (768, 12): vit.vit_b, (1024, 24): vit.vit_l}
    if (width, depth) not in presets or side * side + 1 != positions:
        raise ValueError(f"{path} has {depth} blocks, {width} wide, pos_embed of {positions}: use "
                         "a ViT-B, ViT-L or vit_tiny with a class token and a square grid")

    def build():
        return presets[width, depth](num_classes=1, image_size=side * patch, patch_size=patch)
    trunk = fill(build, state, path, ("head.", "mask_token"))
    del trunk.head                                                      # came with the final norm
    fixed = torch.allclose(trunk.pos_embed, sincos_positions((side, side), width), atol=1e-3)
    about += ", positions " + ("as in MoCo v3" if fixed else "learned")
    return describe(PatchTokens(trunk), width, patch, IMAGENET, about)


def load_resnet50(path, align="bilinear"):
    """ResNet-50 of torchvision or MoCo v2."""
    state, about = read_state(path, "layer1.0.conv1.weight")
    teacher = fill(lambda: ResNet50(align == "dilated"), state, path, ("fc.",))
    return describe(teacher, 2048, 16 if align == "dilated" else 32, IMAGENET, about)


def load_mvit_b(path, align="bilinear"):
    """MViT-B 16x4 of SlowFast's model zoo."""
    state, about = read_state(path, "pos_embed_spatial")
    stride = 16 if align == "dilated" else 32
    teacher = fill(lambda: MViTB(stride), state, path, ("head.",))
    return describe(teacher, 768, stride, KINETICS, about)


def load_dvae(path):
    """DALL-E's encoder, from a state dict or the pickled module.

    A module in the format of torch before 1.6 is refused: save its state dict instead.
    """
    state, about = read_state(path, "blocks.input.w")
    teacher = fill(Encoder, state, path, ())
    return describe(teacher, 8192, 8, ((0.0,) * 3, (1.0,) * 3), about)


def describe(teacher, dim, patch, mean_std, about):
    """Note dim, pixels per token, normalization and origin, then freeze the teacher.

    Every tensor becomes a buffer that moves with the model, but that no checkpoint, optimizer or
    count of parameters sees.
    """
    teacher.dim, teacher.patch, teacher.about = dim, patch, about
    teacher.mean, teacher.std = mean_std
    teacher.size = sum(p.numel() for p in teacher.parameters())
    for module in teacher.modules():
        parameters = module.named_parameters(recurse=False)
        for name, x in [*parameters, *module.named_buffers(recurse=False)]:
            delattr(module, name)
            module.register_buffer(name, x.detach(), persistent=False)
    return teacher.eval()
