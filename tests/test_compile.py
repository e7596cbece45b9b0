"""The compiled steps of pretrain.py and finetune.py: one graph, and no later compilation.

Backends "eager" and "aot_eager" (which traces the backward pass, too) guard and count as the
default one does, and need no C++ compiler.
"""
import math

from engine import mixed_precision, param_groups

import pytest
import torch
from conftest import slow
from torch._dynamo.utils import counters

from augment import soft_cross_entropy
from maskfeat import MaskFeat
from mvit import MViT
from targets import HOGTarget
from vit import ViT

# Encoders of two blocks, and shapes of the input and of the mask's grid.
MODELS = {"mvit": lambda **kw: MViT(16, 2, (1, 1), num_frames=4, image_size=32, output_stride=8,
                                    kv_stride=4, **kw),
          "vit": lambda **kw: ViT(32, 2, 2, image_size=32, patch_size=8, **kw)}
SHAPES = {"mvit": ((3, 4, 32, 32), (2, 4, 4)), "vit": ((3, 32, 32), (4, 4))}


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch._dynamo.reset()


def maskfeat(name, **options):
    return MaskFeat(MODELS[name](num_classes=0, **options), HOGTarget(8))


def pretraining_loss(net, shapes, batch):
    shape, grid = shapes
    number = torch.randint(1, math.prod(grid) // 2, (batch, 1))           # of masked tokens
    mask = torch.rand(batch, math.prod(grid)).argsort(1).argsort(1) < number
    return net(torch.randn(batch, *shape), mask.view(batch, *grid))[0]


def finetuning_loss(net, shapes, batch):
    logits = net(torch.randn(batch, *shapes[0]))
    return soft_cross_entropy(logits, torch.rand(batch, 5).softmax(-1))


def train(net, loss_of, name, amp="fp32", batches=(2, 2, 2, 2), backend="eager"):
    """Steps as in the scripts, each with its own data and learning rate.

    Returns losses, graph breaks, graphs of the first step, graphs compiled later.
    """
    torch._dynamo.reset()
    counters.clear()
    if backend:
        net.compile(backend=backend)                            # in place, as the scripts do
    _, autocast, _ = mixed_precision(amp, torch.device("cpu"))
    optimizer = torch.optim.AdamW(param_groups(net, 0.05), lr=0.0, fused=True)
    net.train()
    losses, graphs = [], []
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        with autocast():
            loss = loss_of(net, SHAPES[name], batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.02)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        graphs.append(counters["stats"]["unique_graphs"])
    breaks = sum(counters["graph_break"].values())
    return losses, breaks, graphs[0], graphs[-1] - graphs[0]


@pytest.mark.parametrize("name, options, amp", [
    slow("mvit", {"drop_path": 0.3}, "bf16"), slow("mvit", {"checkpointing": True}, "fp32"),
    ("vit", {"drop_path": 0.3}, "bf16")])
def test_pretraining_step_is_one_graph_compiled_once(name, options, amp):
    _, *counts = train(maskfeat(name, **options), pretraining_loss, name, amp)
    assert counts == [0, 1, 0]


@pytest.mark.parametrize("name", [slow("mvit"), "vit"])
def test_finetuning_step_is_one_graph_compiled_once(name):
    net = MODELS[name](num_classes=5, drop_path=0.2, dropout=0.5)
    _, *counts = train(net, finetuning_loss, name)
    assert counts == [0, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_compiled_steps_do_the_same(name):
    torch.manual_seed(0)
    net = maskfeat(name)
    start = {key: value.clone() for key, value in net.state_dict().items()}
    plain, *counts = train(net, pretraining_loss, name, backend=None)
    assert counts == [0, 0, 0] and len(set(plain)) == 4
    net.load_state_dict(start)
    compiled, *counts = train(net, pretraining_loss, name, backend="aot_eager")
    assert counts == [0, 1, 0]
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")                          # torch warns of a break
@pytest.mark.parametrize("fault", [lambda x: print(end=""), lambda x: bool(x.sum().item())])
def test_breaks_are_counted(fault):
    net = maskfeat("vit")
    net.encoder.blocks[1].register_forward_pre_hook(lambda module, args: fault(args[0]) and None)
    _, breaks, first, _ = train(net, pretraining_loss, "vit")
    assert breaks > 0 and first > 1


@pytest.mark.slow
def test_recompilations_are_counted():
    net = maskfeat("vit")
    _, *counts = train(net, pretraining_loss, "vit", batches=(2, 2, 3, 3))
    assert counts == [0, 1, 1]                                  # once more for another batch size
