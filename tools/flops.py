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
    macs = normed = width = 0                                 # width: C of a head of MViT

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.__name__
        if name in ("linear", "conv2d", "conv3d"):
            self.macs += out.numel() * args[1][0].numel()     # zeros of the padding count, too
        elif name == "einsum":
            axes = args[0].split("->")[0].replace(",", "")
            sizes = dict(zip(axes, [n for x in args[1:] for n in x.shape]))
            self.macs, self.width = self.macs + math.prod(sizes.values()), sizes["c"]
        elif name == "scaled_dot_product_attention":
            q, k = args[:2]                                   # mvit.py makes them wider after einsum
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
    trunk = getattr(shell.eval(), "encoder", None)
    with torch.device("meta"), Counter() as counter:
        if trunk:                                             # masking costs nothing
            tokens, _ = trunk.encode(*trunk.embed(torch.empty(x_shape)))
            shell.head(shell.norm(tokens[:, 1:]))
        else:
            shell(torch.empty(x_shape))
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("target."))
    return {"flops": counter.macs + 5 * counter.normed, "macs": counter.macs, "parameters": own}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=models.MODELS, default=list(models.MODELS))
    for flag, default in (("--image-size", 224), ("--frames", 16), ("--num-classes", 400)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--expand", choices=("mlp", "attn"), default="mlp", help="see mvit.py")
    args = parser.parse_args()
    size = (args.image_size, args.image_size)
    for name in args.model:
        with torch.device("meta"):
            model = models.build_classifier(dict(
                vars(args), model=name, image_size=size, num_frames=args.frames, patch_size=16,
                drop_path=0.0, checkpointing=False, pool="mean"))
        clip = [args.frames] if models.takes_clips(name) else []
        cost = count_flops(model, (1, 3, *clip, *size))
        print(f"{name}: {cost['parameters']:,} parameters, {cost['flops'] / 1e9:.2f} GFLOPs, "
              f"{cost['macs'] / 1e9:.2f} without LayerNorm")


if __name__ == "__main__":
    engine.run_main(main)
