"""What a GPU needs of a training step, shown without one: no tensor on another device than the
model, no wait for the device in a step that is not logged, and each operation's precision."""
import dataclasses
import re
import traceback
from pathlib import Path

import engine

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, slow
from test_engine import linear_run
from test_teachers import constants, save
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import augment
import ava
import models
import pretrain
import vit
from targets import TARGETS
from tools import bench

# On a GPU each of these waits until it has computed all that was asked of it before.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique2",
         "_unique2", "item", "allreduce_", "allgather_"}       # the last two: for other processes


class Waits(TorchDispatchMode):
    """Collects what would wait for the GPU: (function of the project, operation)."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
        if name in WAITS or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.append(([f.name for f in traceback.extract_stack()[:-1]
                                if Path(f.filename).parent in (ROOT, ROOT / "tests")][-1], name))
        return func(*args, **(kwargs or {}))


def small(model, **changes):
    return dataclasses.replace(
        pretrain.KINETICS if models.takes_clips(model) else pretrain.IMAGENET, model=model,
        image_size=(64, 64), num_frames=4, **changes)


@pytest.mark.parametrize("model, changes", [
    slow("mvitv2_s", {}), slow("mvitv2_s", {"target": "pixel", "drop_path": 0.1}), ("vit_b", {}),
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


@pytest.mark.slow
def test_every_tensor_of_a_finetuning_step_is_on_the_device_of_the_model():
    with torch.device("meta"):
        net = models.MODELS["mvitv2_s"](num_frames=4, image_size=64, dropout=0.5, drop_path=0.1)
    logits = net.train()(torch.empty(2, 3, 4, 64, 64, device="meta"))
    augment.soft_cross_entropy(logits, torch.empty(2, 400, device="meta")).backward()
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


def steps_of(tmp_path, optimizer, count, micro_batches=0):
    """What `count` steps of a linear model wait for, a list for each."""
    model, run = linear_run(tmp_path / "out", 99, epochs=1, log_every=10, optimizer=optimizer)
    ddp, found = engine.wrap_ddp(model), []
    for step in range(count):
        weights = model.weight.clone()
        with Waits() as waits:
            run.start_step()
            for _ in range(micro_batches):
                run.next_batch(iter([{"unreadable": {}}]))
            loss = ddp(torch.ones(1, 2)).square().sum() * (float("nan") if step == 12 else 1)
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


REMAINING = {  # what a logged step of several processes waits for; every step has the first three
    ("agreed", "allreduce_"): "signals, once in a micro-batch: a CPU tensor, by gloo",
    ("agreed", "_local_scalar_dense"): "the same CPU tensor is read",
    ("steps_of", "allreduce_"): "DDP's gradients: on a GPU its stream waits, and no process",
    ("end_step", "_local_scalar_dense"): "steps skipped in a row, whether this was one, the norm",
    ("reduce_mean", "allreduce_"): "the loss and the time without data",
    ("reduce_mean", "_local_scalar_dense"): "both are printed",
    ("write_log", "_local_scalar_dense"): "whether there is a loss, and the steps skipped",
    ("gather_list", "allgather_"): "unreadable files",
    ("gather_list", "_local_scalar_dense"): "the length of their list"}


def test_waits_that_remain_among_several_processes(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = steps_of(tmp_path, "adamw", 16, micro_batches=2)
    finally:
        dist.destroy_process_group()
    signals, (gradients, *logged) = list(REMAINING)[:2], list(REMAINING)[2:]
    assert all(waits == [*signals, *signals, gradients] for waits in found[10:])
    assert all(set(waits[5:]) == set(logged) for waits in found[:10])


def small_step(name, folder):
    """(network, inputs) of a detector, or of a pre-training step with the target `name`."""
    video, path = name in ("hog", "pixel", "mvit_b"), ""
    if name == "boxes":
        net = models.MODELS["mvit_nano"](num_classes=80, num_frames=4, image_size=64, drop_path=0.1)
        return ava.Detector(net).train(), torch.zeros(2, 3, 4, 64, 64), torch.zeros(2, 5)
    if name not in ("hog", "pixel", "label"):                 # ViTs have one loader: a small file
        path = save(folder / "teacher.pt", vit.vit_tiny(num_classes=1).state_dict()
                    if name in ("dino", "mocov3", "deit") else constants(name))
    net = models.build_maskfeat(vars(small("mvit_nano" if video else "vit_tiny", target=name,
                                           teacher=path, output_stride=8, patch_size=8,
                                           drop_path=0.1)))
    extra = {"dvae": torch.zeros(2, 1, 3, 64, 64).byte(), "label": torch.zeros(2, 3, 5, 7, 7)}
    return (net.train(), torch.zeros(2, 3, *[4] * video, 64, 64),
            torch.zeros(2, *[2] * video, 8, 8).bool(), extra.get(name, torch.zeros(0)))


@pytest.mark.parametrize("name", [
    slow(name) if name in ("dvae", "mvit_b") else name for name in [*TARGETS, "boxes"]])
def test_a_step_is_on_the_device_of_the_model_and_does_not_wait(name, tmp_path):
    """On the meta device, a tensor of the CPU in a forward or backward pass is an error."""
    net, *inputs = small_step(name, tmp_path)
    with Waits() as waits:
        output = net.to("meta")(*(x.to("meta") for x in inputs))
        loss, prediction = (output.sum(), output) if name == "boxes" else output
        loss.backward()
    assert prediction.is_meta and all(p.grad.is_meta for p in net.parameters())
    assert waits.found == []


class Dtypes(TorchDispatchMode):
    """Collects the dtypes that enter products, and those that enter all else but casts."""

    def __init__(self):
        super().__init__()
        self.products, self.others = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        product = re.search("convolution|mm$|scaled_dot_product", name)
        leaves = tree_leaves(args[:3] if product else args)
        dtypes = {x.dtype for x in leaves if isinstance(x, torch.Tensor)}
        assert torch.float64 not in dtypes and (len(dtypes) == 1 or not product), name
        if name not in ("_to_copy", "device"):
            (self.products if product else self.others).update(dtypes)
        return func(*args, **(kwargs or {}))


def pretend(device, monkeypatch, net, *inputs):
    """(fake mode, inputs), after all tensors are said to be on the device.

    For a GPU this needs a torch that is built with CUDA and goes without its driver (2.14, not
    2.6). Even there autograd asks for streams, and attention would fall back to float32.
    """
    if device == "cuda":
        if not (torch.backends.cuda.is_built() and hasattr(torch._C, "_ensureCUDADeviceGuardSet")):
            pytest.skip("needs a newer torch that is built with CUDA")
        monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True)
        monkeypatch.setattr(F, "scaled_dot_product_attention",
                            lambda q, k, v, scale=1.0: (q @ k.mT * scale).softmax(-1) @ v)
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    fake = lambda x: FakeTensor(mode, x.detach().to("meta"), torch.device(device, 0))
    monkeypatch.setattr("torch.__future__._overwrite_module_params_on_conversion", True)
    net.requires_grad_(device == "cpu")._apply(fake)
    return mode, *map(fake, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["hog", "pixel", "dvae", "dino", "resnet50", "mvit_b", "label",
                                  "boxes"])
def test_precision(name, dtype, device, tmp_path, monkeypatch):
    """Networks compute in low precision. Losses, RoIAlign and three of the targets do not."""
    net, *inputs = small_step(name, tmp_path)
    mode, x, mask, *extra = pretend(device, monkeypatch, net, *inputs)
    with mode, torch.set_grad_enabled(device == "cpu"), torch.autocast(device, dtype=dtype):
        low, exact = Dtypes(), Dtypes()
        if name == "boxes":
            with low:
                logits, features = net.model(x), net.feature_map(x)
            with exact:
                loss = augment.soft_cross_entropy(logits, net.classify(features, mask))
        else:
            loss_of = net.target.loss
            with exact if name in ("hog", "dvae", "label") else low, torch.no_grad():
                target = net.compute_target(x, *extra)
            net.compute_target, net.target.loss = lambda *args: target, lambda *args: args
            with low:
                arguments, _ = net(x, mask, *extra)
            with exact:
                loss = loss_of(*arguments)
    products = {torch.float32} if name in ("hog", "dvae", "label", "boxes") else set()
    assert low.products == {dtype} and exact.products == products
    assert not exact.others & {torch.bfloat16, torch.float16} and loss.dtype == torch.float32
    assert loss.device.type == device
    if device == "cpu":
        with mode, Dtypes() as backward:
            loss.backward()
        assert backward.products == {dtype} | (products if name == "boxes" else set())
        assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
