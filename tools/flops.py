"""Parameters and FLOPs of a model in the paper's convention, from shapes alone (Tables 3 to 5).

    python -m tools.flops --model mvitv2_l --image-size 312 --frames 40 --expand attn

The release counts with fvcore: a multiply-add of a convolution, linear layer, einsum or attention
is one FLOP, an element of a LayerNorm is five, and all else is free.
"""
import argparse
import copy
import math

import engine

import torch
from torch.overrides import TorchFunctionMode

import models


class Counter(TorchFunctionMode):
    """Adds up multiply-adds (`macs`) and elements of LayerNorms (`normed`) while it is active."""
    macs = normed = width = 0                                 # width: C of each head in mvit.py

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.__name__
        if name in ("linear", "conv2d", "conv3d"):
            self.macs += out.numel() * args[1][0].numel()     # zeros of the padding count, too
        elif name == "einsum":
            axes = args[0].split("->")[0].replace(",", "")
            sizes = dict(zip(axes, [n for x in args[1:] for n in x.shape]))
            self.macs, self.width = self.macs + math.prod(sizes.values()), sizes["c"]
        elif name == "scaled_dot_product_attention":
            q, k = args[:2]                                   # mvit.py widens them after einsum
            self.macs += 2 * q[..., 0].numel() * k.shape[-2] * (self.width or q.shape[-1])
        elif name == "layer_norm":
            self.normed += out.numel()
        return out


@torch.no_grad()
def count_flops(model, x_shape):
    """Parameters and FLOPs of one forward pass, which runs in a copy without data.

    model: a classifier or trunk, or a MaskFeat, of which the target is left out.
    x_shape: (B, 3, T, H, W) or (B, 3, H, W). The paper's figures are of one view, B = 1.
    Returns {"flops": all, "macs": without LayerNorms, "parameters": count}, integers.
    """
    tensors = [*model.parameters(), *model.buffers()]
    shell = copy.deepcopy(model, {id(x): torch.empty_like(x, device="meta") for x in tensors})
    x, trunk = torch.empty(x_shape, device="meta"), getattr(shell.eval(), "encoder", None)
    with Counter() as counter:
        if trunk:                                             # masking costs nothing
            shell.head(shell.norm(trunk.encode(*trunk.embed(x))[0][:, 1:]))
        else:
            shell(x)
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("target."))
    return dict(flops=counter.macs + 5 * counter.normed, macs=counter.macs, parameters=own)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=models.MODELS, default=list(models.MODELS))
    for flag, default in (("--image-size", 224), ("--frames", 16), ("--num-classes", 400)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--expand", choices=("mlp", "attn"), default="mlp", help="see mvit.py")
    args = parser.parse_args()
    for name in args.model:
        size = (args.image_size, args.image_size)
        recipe = dict(vars(args), model=name, image_size=size, num_frames=args.frames,
                      patch_size=16, drop_path=0.0, checkpointing=False, pool="mean")
        with torch.device("meta"):
            model = models.build_classifier(recipe)
        sides = (args.frames, *size) if models.takes_clips(name) else size
        cost = count_flops(model, (1, 3, *sides))
        print(f"{name}: {cost['parameters']:,} parameters, {cost['flops'] / 1e9:.2f} GFLOPs, "
              f"{cost['macs'] / 1e9:.2f} without LayerNorm")


if __name__ == "__main__":
    engine.run_main(main)
