"""torch.compile with its own backend, Inductor, which writes C++ here and Triton on a GPU.

It takes minutes to compile, so run these with `pytest -m long`. test_compile.py counts graphs with
backends that need no compiler. These compare numbers with eager runs.
"""
import json
import os
import signal
import subprocess

import engine

import pytest
import runs
import test_ava
import test_compile
import torch
from runs import log_of
from test_compile import pretraining_loss, train
from torch._dynamo.utils import counters

import mvit
import vit
from checkpoints import read_checkpoint
from maskfeat import MaskFeat
from targets import HOGTarget

pytestmark = [pytest.mark.slow, pytest.mark.long]
movies = test_ava.movies                                      # a fixture
# Inductor draws other random numbers than eager.
SURE = ["--drop-path", 0, "--dropout", 0]


@pytest.fixture(scope="module", autouse=True)
def inductor(tmp_path_factory):
    """One cache for all tests, and for the processes that they start: the one that the environment
    names, else a new one. Skip without a compiler."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(tmp_path_factory.mktemp("inductor"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
        patch.setitem(runs.ENV, "TORCHINDUCTOR_CACHE_DIR", folder)
        try:
            engine.should_compile("on", torch.device("cpu"))
        except ValueError as error:
            pytest.skip(str(error))
        yield


@pytest.fixture(autouse=True)
def fresh():
    """One thread, as for runs.run: generated code depends on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------- steps

# The models, with one block a stage where they are large, and shapes of the input and of the mask.
MODELS = {
    "mvit_tiny": lambda: mvit.mvit_tiny(num_classes=0, num_frames=4, image_size=32),
    "vit_tiny": lambda: vit.vit_tiny(num_classes=0, image_size=32),
    "mvitv2_s": lambda: mvit.MViT(96, 1, (1, 1, 1, 1), num_classes=0, num_frames=4, image_size=64,
                                  output_stride=16),
    "vit_b": lambda: vit.ViT(768, 1, 12, num_classes=0, image_size=64)}
SHAPES = {"mvit_tiny": ((3, 4, 32, 32), (2, 4, 4)), "vit_tiny": ((3, 32, 32), (4, 4)),
          "mvitv2_s": ((3, 4, 64, 64), (2, 4, 4)), "vit_b": ((3, 64, 64), (4, 4))}


def loss_after_a_test(net, shapes, batch):
    """A step's loss, after what a script does between two epochs: tests of other sizes in eval
    mode, by model.forward, which is not compiled."""
    net.eval()
    with torch.no_grad():
        for size in (batch, 1):
            pretraining_loss(net.forward, shapes, size)
    net.train()
    return pretraining_loss(net, shapes, batch)


def gradients(net, call, shapes, amp):
    """{name: gradient} of one batch."""
    net.zero_grad(set_to_none=True)
    torch.manual_seed(9)
    with engine.mixed_precision(amp, torch.device("cpu"))[1]():
        loss = pretraining_loss(call, shapes, 2)
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters()}


def errors(found, exact):
    """The error of all gradients together, and the largest of a parameter: lengths relative to the
    exact gradient. One that is nearly zero, such as that of the keys' biases, counts as if it were
    a thousandth of the whole."""
    length = lambda tensors: sum(x.double().square().sum().item() for x in tensors) ** 0.5
    whole = length(exact.values())
    return length(found[k] - exact[k] for k in exact) / whole, max(
        length([found[k] - exact[k]]) / max(length([exact[k]]), 1e-3 * whole) for k in exact)


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_those_of_eager(name, amp, monkeypatch):
    monkeypatch.setitem(test_compile.SHAPES, name, SHAPES[name])
    torch.manual_seed(0)
    encoder, shapes = MODELS[name](), SHAPES[name]
    net = MaskFeat(encoder, HOGTarget(encoder.patch_stride[-1]))
    start = {key: value.clone() for key, value in net.state_dict().items()}
    eager, *counts = train(net, loss_after_a_test, name, amp, backend=None)
    assert counts == [0, 0, 0] and len(set(eager)) == 4
    net.load_state_dict(start)
    compiled, *counts = train(net, loss_after_a_test, name, amp, backend="inductor")
    assert counts == [0, 1, 0]
    # AdamW's first updates are nearly signs of gradients. Rounding to bf16 turns those near zero,
    # so that only the loss before them compares.
    steps, rel = {"fp32": (4, 1e-5), "bf16": (1, 3e-3)}[amp]
    assert compiled[:steps] == pytest.approx(eager[:steps], rel=rel)
    net.load_state_dict(start)
    exact, plain, ours = (gradients(net, call, shapes, precision) for call, precision in (
        (net.forward, "fp32"), (net.forward, amp), (net, amp)))
    if amp == "fp32":                                         # another order of sums
        assert max(errors(ours, plain)) < 1e-5
    else:       # both round, at different places; a wrong gradient is off by its own length
        error, worst = errors(ours, exact)
        assert error < 1.5 * errors(plain, exact)[0] and worst < 0.25


# -------------------------------------------------------------------------------------------- runs

# How far the losses of a short run may be apart. AdamW gives small gradients, which differ in their
# last bits, steps as long as those of others.
COURSE = 1e-4


def compiled(script, *flags, code=0):
    """Output of a run with --compile on, of one graph that is compiled once: neither tests nor
    pictures nor the end of an epoch bring another."""
    torch._dynamo.reset()
    counters.clear()
    done = runs.run(script, *flags, "--compile", "on")
    assert done.returncode == code, done.stderr
    # The second graph is the trial of engine.should_compile.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    return done.stdout + done.stderr


def assert_same_course(a, b):
    """Two logs have the same lines, and nearly the same losses."""
    a, b = log_of(a), log_of(b)
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for key in ("loss", "val_loss", "lr"):
        found, wanted = ([line[key] for line in log if key in line] for log in (a, b))
        assert found == pytest.approx(wanted, rel=COURSE)


def test_pretraining(clips, tmp_path, monkeypatch):
    """Stopped and resumed, a compiled run is the uninterrupted one, to the bit."""
    flags = ["--data", clips, *runs.PRETRAIN, "--drop-path", 0]
    eager, whole, out = (tmp_path / name for name in ("eager", "whole", "out"))
    runs.run_well("pretrain.py", *flags, "--out", eager)
    compiled("pretrain.py", *flags, "--out", whole)
    assert len([line for line in log_of(whole) if "val_loss" in line]) == 3
    assert {"loss.png", "prediction.png", "prediction.gif"} <= {p.name for p in whole.iterdir()}
    assert_same_course(whole, eager)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "set_lr", stop_at(5))
        compiled("pretrain.py", *flags, "--out", out, code=128 + signal.SIGTERM)
    assert read_checkpoint(out / "last.pt")["step"] == 5
    assert "at step 5" in compiled("pretrain.py", *flags, "--out", out, "--resume")
    runs.assert_same_weights(whole, out)


def stop_at(step):
    """engine.set_lr, which also sends SIGTERM at the start of a step."""
    def set_lr(optimizer, recipe, epoch, plain=engine.set_lr):
        if round(epoch * 3) == step:                          # 3 steps per epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(optimizer, recipe, epoch)
    return set_lr


def test_finetuning_and_evaluation(clips, pretrained, tmp_path):
    """A test of the file that a compiled run leaves is that of the run itself."""
    flags = ["--data", clips, *runs.FINETUNE, *SURE, "--no-baseline", "--init",
             pretrained[0] / "last.pt"]
    eager, out = tmp_path / "eager", tmp_path / "out"
    runs.run_well("finetune.py", *flags, "--out", eager)
    compiled("finetune.py", *flags, "--out", out)
    assert [line["step"] for line in log_of(out) if "val_top1" in line] == [6]
    assert_same_course(out, eager)
    result = json.loads((out / "last_2x1.json").read_text())
    runs.run_well("evaluate.py", out / "last.pt", "--data", clips, "--workers", 0)
    again = json.loads((out / "last_2x1.json").read_text())
    for key in ("top1", "view_top1", "confusion", "files"):
        assert again[key] == result[key]
    assert again["about"] != result["about"]


def test_detection(movies, tmp_path):
    """The feature map alone is compiled, and each clip has another number of boxes."""
    flags = ["--data", movies, *test_ava.FLAGS, *SURE, "--epochs", 2, "--val-epochs", 1]
    eager, out = tmp_path / "eager", tmp_path / "out"
    runs.run_well("ava.py", *flags, "--out", eager)
    compiled("ava.py", *flags, "--out", out)
    lines = [line for line in log_of(out) if "loss" in line]
    assert len({line["boxes"] for line in lines}) > 1
    assert [line["step"] for line in log_of(out) if "val_mAP" in line]
    assert_same_course(out, eager)


def test_two_processes(clips, tmp_path):
    flags = ["--data", clips, *runs.PRETRAIN, "--drop-path", 0]
    for choice in ("off", "on"):
        command = runs.command("pretrain.py", *flags, "--out", tmp_path / choice, "--compile",
                               choice, processes=2)
        done = subprocess.run(command, capture_output=True, text=True, env=runs.ENV, timeout=1800)
        assert done.returncode == 0, done.stderr
    assert len(log_of(tmp_path / "on")) == 13                 # 9 steps, 3 tests, the levels
    assert_same_course(tmp_path / "on", tmp_path / "off")
