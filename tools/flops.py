"""Parameters and FLOPs of a model in the paper's convention, from shapes alone (Tables 3 to 5).

    with torch.device("meta"):
        model = mvit.MODELS["mvitv2_l"](image_size=312, num_frames=40, expand="attn")
    count_flops(model, (1, 3, 40, 312, 312))["flops"]                                 # 2.828e12

The release counts with fvcore: a multiply-add of a convolution, linear layer, matrix product or
einsum is one FLOP, an element of a LayerNorm is five, and all else is free. Functions are counted
as Python calls them, before a device chooses its kernels.
"""
import copy
import math

import torch
from torch.overrides import TorchFunctionMode


class Counter(TorchFunctionMode):
    """Adds up multiply-adds (`macs`) and elements of LayerNorms (`normed`) while it is active."""

    def __init__(self):
        super().__init__()
        self.macs = self.normed = 0
        self.width = None                                       # heads * C of the running attention

    def see_width(self, module, args):
        """A forward pre-hook for modules with a joint `qkv`."""
        self.width = module.qkv.out_features // 3

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))                     # calls made in here are not seen
        name = func.__name__
        if name == "linear":
            self.macs += out.numel() * args[1].shape[1]
        elif name in ("conv2d", "conv3d"):
            self.macs += out.numel() * args[1][0].numel()       # zeros of the padding count, too
        elif name in ("matmul", "__matmul__"):
            self.macs += out.numel() * args[0].shape[-1]
        elif name == "einsum":
            sizes = {}
            for letters, x in zip(args[0].split("->")[0].split(","), args[1:]):
                sizes.update(zip(letters, x.shape))
            self.macs += math.prod(sizes.values())
        elif name == "scaled_dot_product_attention":
            # q k^T and attn v at the heads' own width: mvit.py appends relative positions to q, k
            # and v. What the release pays for these is in the einsums that make them.
            q, k = args[:2]
            self.macs += 2 * q.shape[0] * q.shape[-2] * k.shape[-2] * self.width
        elif name == "layer_norm":
            self.normed += out.numel()
        return out


def count_flops(model, x_shape):
    """Parameters and FLOPs of one forward pass.

    model: a classifier or trunk (mvit.py, vit.py), or a MaskFeat, of which the target is left out.
    x_shape: (B, 3, T, H, W) or (B, 3, H, W). B = 1 gives the paper's figures, of one view.
    Returns {"flops": all, "macs": without LayerNorms, "parameters": count}, integers. Raises
    ValueError if x_shape has another number of axes. The model stays as it is: a copy without data
    runs on the meta device.
    """
    with torch.no_grad():
        tensors = [*model.parameters(), *model.buffers()]
        empty = {id(x): torch.empty_like(x, device="meta") for x in tensors}
        shell = copy.deepcopy(model, empty).eval()              # with the empty tensors in place
    trunk = getattr(shell, "encoder", shell)
    stem = trunk.patch_embed.proj.weight                        # (D, 3, 3, 7, 7) or (D, 3, 16, 16)
    if len(x_shape) != stem.ndim:
        axes = "T, H, W" if stem.ndim == 5 else "H, W"
        raise ValueError(f"x_shape={tuple(x_shape)}: give (1, 3, {axes})")

    counter = Counter()
    for module in shell.modules():
        if hasattr(module, "qkv"):
            module.register_forward_pre_hook(counter.see_width)
    x = torch.empty(x_shape, dtype=stem.dtype, device="meta")
    with torch.no_grad(), counter:
        if trunk is shell:
            shell(x)
        else:
            tokens, _ = trunk.encode(*trunk.embed(x))           # masking costs nothing
            shell.head(shell.norm(tokens[:, 1:]))
    parameters = sum(p.numel() for name, p in model.named_parameters()
                     if not name.startswith("target."))
    return {"flops": counter.macs + 5 * counter.normed, "macs": counter.macs,
            "parameters": parameters}


def target_flops(model, x, target_input=None):
    """FLOPs of a MaskFeat's target of the samples in x. A teacher is run to count them."""
    counter = Counter()
    hooks = [module.register_forward_pre_hook(counter.see_width)
             for module in model.target.modules() if hasattr(module, "qkv")]
    with torch.no_grad(), counter:
        model.compute_target(x, target_input)
    for hook in hooks:
        hook.remove()
    return counter.macs + 5 * counter.normed
