"""FLOPs against the release's figures and a count by hand."""
import sys

import pytest
import torch
from conftest import slow

import mvit
import vit
from maskfeat import MaskFeat
from targets import HOGTarget
from tools import flops
from tools.flops import count_flops


def small(**kw):
    """Used at 80 pixels a side: grids of 20, 10, 5, and tables to resize."""
    options = {"num_classes": 5, "num_frames": 4, "image_size": 64, "output_stride": 16, **kw}
    return mvit.MViT(16, 2, (1, 1, 1), **options)


@pytest.mark.parametrize("name, T, side, expand, parameters, gflops, gmacs", [
    slow("mvitv2_s", 16, 224, "mlp", 36_475_120, "71.41", "71.16"),
    ("vit_b", None, 224, None, 86_567_656, "17.58", "17.56"),
    slow("vit_l", None, 224, None, 304_326_632, "61.60", "61.55"),
    slow("mvitv2_l", 16, 224, "mlp", 217_578_064, "377.79", "376.82"),
    slow("mvitv2_l", 32, 312, "mlp", 217_720_048, "2125.2", None),
    slow("mvitv2_l", 40, 352, "mlp", 217_795_792, "3886.9", None),
    slow("mvitv2_l", 32, 312, "attn", 213_362_464, "2063.4", None),
    slow("mvitv2_l", 40, 312, "attn", 213_390_112, "2828.1", None),
    slow("mvitv2_l", 40, 352, "attn", 213_438_208, "3790.3", None),
    slow("mvitv2_l", 16, 224, "attn", 213_220_480, "362.1", None),
    slow("mvitv2_s", 16, 224, "attn", 34_537_744, "64.5", None)])
def test_figures_of_the_release(name, T, side, expand, parameters, gflops, gmacs,
                                  monkeypatch, capsys):
    """Measured on the official classes, with fvcore or in its convention: equal in every digit."""
    flags = ["--model", name, "--image-size", side]
    flags += ["--frames", T, "--expand", expand] if T else ["--num-classes", 1000]
    monkeypatch.setattr(sys, "argv", ["flops", *map(str, flags)])
    flops.main()
    line, digits = capsys.readouterr().out, len(gflops.split(".")[1])
    assert line.startswith(f"{name}: {parameters:,} parameters, ")
    assert f"{float(line.split()[3]):.{digits}f}" == gflops
    assert gmacs is None or line.endswith(f" GFLOPs, {gmacs} without LayerNorm\n")


def test_layer_by_layer():
    """A ViT of one block, by hand."""
    model = vit.ViT(8, 1, 2, num_classes=3, image_size=32, patch_size=16)
    N = 1 + 4
    macs = 4 * 8 * 3 * 16 * 16 + N * 8 * 24 + 2 * N * N * 8 + N * 8 * 8 + 2 * N * 8 * 32 + 8 * 3
    count = count_flops(model, (1, 3, 32, 32))
    assert count == {"flops": macs + 5 * (2 * N * 8 + 8), "macs": macs,
                     "parameters": sum(p.numel() for p in model.parameters())}


def test_same_anywhere_and_nothing_changed():
    with torch.device("meta"):
        want = count_flops(small(), (1, 3, 4, 80, 80))
    model = small(checkpointing=True, drop_path=0.1)
    model.blocks.eval()                                         # as when only the head is trained
    state = {name: x.clone() for name, x in model.state_dict().items()}
    parameters = list(model.parameters())
    assert count_flops(model, (1, 3, 4, 80, 80)) == want
    with torch.autocast("cpu", torch.bfloat16):
        twice = count_flops(model, (2, 3, 4, 80, 80))
    assert twice == {"flops": 2 * want["flops"], "macs": 2 * want["macs"],
                     "parameters": want["parameters"]}
    assert model.training and not any(block.training for block in model.blocks)
    assert all(p is q and p.requires_grad for p, q in zip(parameters, model.parameters()))
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_pretraining_model():
    """The trunk, and LayerNorm and Linear for each of 2*5*5 tokens. HOG is not counted."""
    trunk = small(num_classes=0)
    alone = count_flops(trunk, (1, 3, 4, 80, 80))
    count = count_flops(MaskFeat(trunk, HOGTarget(patch_size=16)), (1, 3, 4, 80, 80))
    assert count["macs"] == alone["macs"] + 50 * 64 * 108
    assert count["flops"] - count["macs"] == alone["flops"] - alone["macs"] + 5 * 50 * 64
    assert count["parameters"] == alone["parameters"] + 16 + 2 * 64 + 64 * 108 + 108
