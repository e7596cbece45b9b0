"""Parameters and FLOPs of a model in the paper's convention, from shapes alone (Tables 3 to 5).

    python -m tools.flops --model mvitv2_l --image-size 312 --frames 40 --expand attn

The release counts with fvcore: a multiply-add of a convolution, linear layer, matrix product or
einsum is one FLOP, and an element of a LayerNorm is five. Softmax, GELU and pooling are free.
"""
import argparse
import copy
import math

import torch
from torch.overrides import TorchFunctionMode

import models


class Counter(TorchFunctionMode):
    """Adds up multiply-adds (`macs`) and elements of LayerNorms (`normed`) while it is active."""
    macs = normed = width = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.__name__
        if name in ("linear", "conv2d", "conv3d"):
            self.macs += out.numel() * args[1][0].numel()     # zeros of the padding count, too
            if name == "linear":
                self.width = out.shape[-1] // 3               # heads * C, if this is a joint qkv
        elif name in ("matmul", "__matmul__"):
            self.macs += out.numel() * args[0].shape[-1]
        elif name == "einsum":
            letters = args[0].split("->")[0].split(",")
            sizes = {k: n for axes, x in zip(letters, args[1:]) for k, n in zip(axes, x.shape)}
            self.macs += math.prod(sizes.values())
        elif name == "scaled_dot_product_attention":          # mvit.py widens q, k and v after qkv
            self.macs += 2 * args[0].shape[0] * args[0].shape[-2] * args[1].shape[-2] * self.width
        elif name == "layer_norm":
            self.normed += out.numel()
        return out


@torch.no_grad()
def count_flops(model, x_shape):
    """One forward pass of a classifier, a trunk, or a MaskFeat (without its target) on the meta device.

    x_shape: (B, 3, T, H, W) or (B, 3, H, W). The paper's figures are of one view, B = 1.
    Returns {"flops": all, "macs": without LayerNorms, "parameters": count}, integers.
    """
    tensors = [*model.parameters(), *model.buffers()]         # `shell` is a copy without data
    shell = copy.deepcopy(model, {id(x): torch.empty_like(x, device="meta") for x in tensors})
    x, trunk = torch.empty(x_shape, device="meta"), getattr(shell.eval(), "encoder", None)
    with Counter() as counter:
        tokens = trunk.encode(*trunk.embed(x))[0] if trunk else shell(x)
        if trunk:
            shell.head(shell.norm(tokens[:, 1:]))
    own = [p for name, p in model.named_parameters() if not name.startswith("target.")]
    return {"flops": counter.macs + 5 * counter.normed, "macs": counter.macs,
            "parameters": sum(p.numel() for p in own)}


@torch.no_grad()
def target_flops(model, x, target_input=None):
    """FLOPs of the target that a MaskFeat computes for the samples x. A teacher runs."""
    with Counter() as counter:
        model.compute_target(x, target_input)
    return counter.macs + 5 * counter.normed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=models.MODELS, default=list(models.MODELS))
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--expand", choices=("mlp", "attn"), default="mlp", help="see mvit.py")
    parser.add_argument("--num-classes", type=int, default=400)
    args = parser.parse_args()
    size = args.image_size, args.image_size
    for name in args.model:
        recipe = dict(model=name, num_classes=args.num_classes, image_size=size, pool="mean",
                      num_frames=args.frames, patch_size=16, expand=args.expand, drop_path=0.0,
                      checkpointing=False)
        with torch.device("meta"):
            model = models.build_classifier(recipe)
        clip = [args.frames] if models.takes_clips(name) else []
        cost = count_flops(model, (1, 3, *clip, *size))
        print(f"{name}: {cost['parameters']:,} parameters, {cost['flops'] / 1e9:.2f} GFLOPs, "
              f"{cost['macs'] / 1e9:.2f} without LayerNorm")


if __name__ == "__main__":
    main()
