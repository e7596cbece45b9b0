"""What a GPU needs of a training step, shown without one: no tensor on another device than the
model, and no wait for the device in a step that is not logged."""
import dataclasses

import engine

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import models
import pretrain
from augment import soft_cross_entropy
from tools import bench

# On a GPU each of these waits until it has computed all that was asked of it before.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique2",
         "_unique2", "item"}


class Waits(TorchDispatchMode):
    """Collects the operations that would wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
        if name in WAITS or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def small(model, **changes):
    return dataclasses.replace(
        pretrain.KINETICS if models.takes_clips(model) else pretrain.IMAGENET, model=model,
        image_size=(64, 64), num_frames=4, **changes)


@pytest.mark.parametrize("model, changes", [
    ("mvitv2_s", {}), ("mvitv2_s", {"target": "pixel", "drop_path": 0.1}), ("vit_b", {}),
    ("vit_b", {"norm": "none", "color": "gray", "checkpointing": True})])
def test_every_tensor_of_a_step_is_on_the_device_of_the_model(model, changes):
    """On the meta device, a tensor of the CPU in a forward or backward pass is an error."""
    recipe = small(model, **changes)
    with torch.device("meta"):
        net = models.build_maskfeat(dataclasses.asdict(recipe)).train()
    T = [recipe.num_frames] if models.takes_clips(model) else []
    x = torch.empty(2, 3, *T, *recipe.image_size, device="meta")
    grid = [side // stride for side, stride in zip(x.shape[2:], net.encoder.patch_stride)]
    loss, prediction = net(x, torch.empty(2, *grid, device="meta", dtype=torch.bool))
    loss.backward()
    assert prediction.is_meta and all(p.grad.is_meta for p in net.parameters())


def test_every_tensor_of_a_finetuning_step_is_on_the_device_of_the_model():
    with torch.device("meta"):
        net = models.MODELS["mvitv2_s"](num_frames=4, image_size=64, dropout=0.5, drop_path=0.1)
    logits = net.train()(torch.empty(2, 3, 4, 64, 64, device="meta"))
    soft_cross_entropy(logits, torch.empty(2, 400, device="meta")).backward()
    assert all(p.grad.is_meta for p in net.parameters())


@pytest.mark.parametrize("model, changes", [("mvit_nano", {}), ("mvit_nano", {"target": "pixel"}),
                                            ("vit_tiny", {"drop_path": 0.1})])
def test_forward_and_backward_do_not_wait(model, changes, monkeypatch):
    # On a CPU, and there alone, one_hot looks whether its input is in range.
    monkeypatch.setattr(F, "one_hot", lambda x, n: (x[:, None] == torch.arange(n)).long())
    step = bench.make_step(small(model, output_stride=8, patch_size=8, **changes), 2, amp="bf16")
    with Waits() as waits:
        step()
    assert waits.found == []


def steps_of(tmp_path, optimizer, count):
    """What `count` steps of a linear model wait for, as lists of operations."""
    fields = dict(out=str(tmp_path / "out"), epochs=1, lr=0.1, lr_batch=1, batch_size=1, beta2=0.9,
                  warmup_epochs=0, warmup_lr=0.0, min_lr=0.0, weight_decay=0.0, clip_grad=1.0,
                  log_every=10, save_minutes=9.0, seed=0, optimizer=optimizer)
    recipe = dataclasses.make_dataclass("Recipe", fields)(**fields)
    model, scaler = torch.nn.Linear(2, 1), engine.mixed_precision("fp32", torch.device("cpu"))[2]
    run = engine.Run(recipe, model, engine.make_optimizer(model, recipe), scaler,
                     device=torch.device("cpu"), steps_per_epoch=99, fingerprint="", num_files=99,
                     unit="clip")
    found = []
    for step in range(count):
        weights = model.weight.clone()
        with Waits() as waits:
            run.start_step()
            loss = model(torch.ones(1, 2)).square().sum() * (float("nan") if step == 12 else 1)
            loss.backward()
            run.end_step(loss.detach(), 0.1)
        found.append(waits.found)
        assert torch.equal(weights, model.weight) == (step == 12)
    run.stop.release()
    run.bar.close()
    assert run.skipped == 1 and run.loss_steps == count % 10 - 1
    return found


def test_only_logged_steps_wait(tmp_path):
    """The first ten steps and each tenth are logged. Step 13 is skipped, without a wait."""
    found = steps_of(tmp_path, "adamw", 16)
    assert all(found[:10]) and not any(found[10:])


def test_waits_are_found(tmp_path):
    """SGD cannot skip by itself: the loop looks at each gradient."""
    assert all(steps_of(tmp_path, "sgd", 16))
