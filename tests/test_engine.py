"""engine.py: schedule, groups, checkpoints, signals, command line, and the machine around it."""
import ast
import dataclasses
import io
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import engine
from engine import parse_recipe, usable_cores

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT

import data
import pretrain
import visualize
from checkpoints import read_checkpoint, save_checkpoint


@pytest.fixture(autouse=True)
def locks():
    """They end with a process. A test of many runs in one process closes them."""
    yield
    while engine._locks:
        engine._locks.pop().close()


def test_lr_shape():
    """It rises, meets the cosine at the end of warm-up, and falls to the end value."""
    lrs = [engine.lr_at(e / 10, 1e-3, 30, 5, 1e-6, 1e-5) for e in range(301)]
    assert lrs[0] == 1e-6 and max(lrs) == lrs[50] == 1e-3 and lrs[300] == pytest.approx(1e-5)
    assert sorted(lrs[:51]) == lrs[:51] and sorted(lrs[50:], reverse=True) == lrs[50:]
    assert engine.lr_at(17.5, 1e-3, 30, 5, 0, 0) == pytest.approx(5e-4)
    assert engine.lr_at(0, 1e-3, 1, 0, 0, 0) == 1e-3


def test_param_groups():
    """Biases and 1-D weights are not decayed. Tables, tokens and matrices are."""
    from mvit import mvit_tiny
    model = mvit_tiny(num_classes=3)
    decayed, plain = engine.param_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    ids = {id(p) for p in decayed["params"]}
    assert ids | {id(p) for p in plain["params"]} == {id(p) for p in model.parameters()}
    assert len(ids) + len(plain["params"]) == len(list(model.parameters()))
    assert id(model.cls_token) in ids and id(model.blocks[0].attn.rel_pos_h) in ids
    assert id(model.blocks[0].norm1.weight) not in ids and id(model.head.projection.bias) not in ids
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert not any(group["params"] for group in engine.param_groups(frozen, 0.1))


def test_seed_all_repeats():
    def draws(*key):
        engine.seed_all(*key)
        return torch.rand(3).tolist()
    assert draws(0, 5, 1) == draws(0, 5, 1) != draws(0, 6, 1) != draws(0, 6, 0)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = str(tmp_path / "last.pt")
    save_checkpoint(path, {"step": 1, "shape": (1, 2)})
    assert read_checkpoint(path) == {"step": 1, "shape": (1, 2)}

    def full_disk(obj, f):
        f.write(b"half")
        raise OSError("no space left")
    monkeypatch.setattr(engine.torch, "save", full_disk)
    with pytest.raises(OSError):
        save_checkpoint(path, {"step": 2})
    assert read_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["last.pt"]


def test_log_of_a_killed_run_is_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (10, 20, 30)) + '{"step": 40, "lo')
    engine.drop_later_lines(str(path), 20)
    assert path.read_text() == '{"step": 10}\n{"step": 20}\n'
    engine.drop_later_lines(str(tmp_path / "none"), 0)
    assert os.listdir(tmp_path) == ["log.jsonl"]
    path.write_bytes(b'{"step": 10}\n\n{"ste\xff\x00\n[3]\n{"step": 20}\n')
    said = []
    engine.drop_later_lines(str(path), 20, said.append)
    assert path.read_text() == '{"step": 10}\n{"step": 20}\n' and "left out: 3" in said[0]


def test_numpy_numbers_beside_the_weights(tmp_path):
    numbers = {"best": np.float64(81.25), "epoch": np.int64(3), "half": np.float16(0.5)}
    torch.save({"model": {"w": torch.ones(2)}, **numbers}, tmp_path / "a.pt")
    found = read_checkpoint(str(tmp_path / "a.pt"))
    assert {key: float(found[key]) for key in numbers} == {"best": 81.25, "epoch": 3, "half": 0.5}
    torch.save({"model": np.array([print], object)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="not a checkpoint of tensors"):
        read_checkpoint(str(tmp_path / "b.pt"))


def hold(folder, ready):
    engine.lock_folder(folder)
    ready.set()
    time.sleep(60)


def test_one_run_in_a_folder(tmp_path):
    """The second is refused, and the lock ends with its process, even a killed one."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    holder = fork.Process(target=hold, args=(str(tmp_path), ready))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(ValueError, match=f"in use by process {holder.pid} on "):
        engine.lock_folder(str(tmp_path))
    holder.kill()
    holder.join()
    engine.lock_folder(str(tmp_path))


# ------------------------------------------------------------------------------------- the machine

def test_cores_follow_affinity_and_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert usable_cores(tmp_path) == 64
    (tmp_path / "cpu.max").write_text("max 100000\n")        # version 2
    assert usable_cores(tmp_path) == 64
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert usable_cores(tmp_path) == 4                        # rounded up
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()                                # version 1
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("200000\n", 2), ("-1\n", 64)):
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
        assert usable_cores(tmp_path) == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert engine.loader_workers(-1, torch.device("cuda")) <= 8
    assert engine.loader_workers(-1, torch.device("cpu")) == 1


def test_engine_is_imported_before_torch():
    """It sets how OpenMP threads wait, which counts only before torch is loaded."""
    scripts = [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]
    entries = [path for path in scripts if "__main__" in path.read_text()]
    assert {"pretrain.py", "finetune.py", "evaluate.py"} <= {path.name for path in entries}
    for path in entries:
        imported = [alias.name if isinstance(node, ast.Import) else node.module
                    for node in ast.parse(path.read_text()).body
                    if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
        if "torch" in imported or path.parent == ROOT:
            assert imported.index("engine") < [*imported, "torch"].index("torch"), path


@pytest.mark.parametrize("value", [None, "active"])
def test_waiting_policy_is_the_users_if_given(value):
    """It is there when torch is imported, at which this program ends."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": value} if value else {}
    code = ("import os, sys\nsys.modules['torch'] = None\ntry:\n    import engine\n"
            "except ImportError:\n    print(os.environ['OMP_WAIT_POLICY'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.stdout.strip() == (value or "passive"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("setting, remedy", [
    ({"CXX": "/no/compiler"}, "C compiler"),
    ({"TORCHINDUCTOR_CACHE_DIR": "/proc/none"}, "TORCHINDUCTOR_CACHE_DIR")])
def test_no_compiler_is_one_line(tmp_path, setting, remedy):
    """A remark if it is left to the program, as on a GPU without Triton, else an error.

    A process for each, since torch 2.11 gives another reason when it is asked again.
    """
    for choice, device, code in (("auto", "Fake('cpu')", 0), ("on", "torch.device('cpu')", 2)):
        script = ("import engine, torch\nclass Fake(str):\n    type = 'cuda'\nengine.run_main("
                  f"lambda: print(engine.should_compile('{choice}', {device})))")
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **setting})
        assert done.returncode == code, done.stderr
        if choice == "auto":
            assert remedy in done.stdout and done.stdout.endswith("False\n")
        else:
            last = done.stderr.strip().splitlines()[-1]
            assert last.startswith("error: --compile on") and remedy in last


def test_any_name_can_be_printed(monkeypatch):
    def main():
        print("caf\u00e9 \udce9")
        raise ValueError("no \u00e9\n  DIR")
    out, err = (io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as exit:
        engine.run_main(main)
    out.flush()
    assert exit.value.code == 2 and out.buffer.getvalue() == b"caf\\xe9 \\udce9\n"
    assert err.buffer.getvalue().splitlines() == [b"error: no \\xe9", b"  DIR"]


def test_an_interrupt_outside_the_loop_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        engine.run_main(mock.Mock(side_effect=KeyboardInterrupt))
    assert exit.value.code == 130 and capsys.readouterr().err == "stopped by SIGINT\n"


# ------------------------------------------------------------------------------------------- a run

FIELDS = dict(epochs=9, batch_size=1, lr=0.1, lr_batch=1, warmup_epochs=0.0, warmup_lr=0.0,
              min_lr=0.0, weight_decay=0.0, beta2=0.9, clip_grad=1.0, log_every=1, save_minutes=9.0,
              seed=0, resume=False)


def linear_run(out, steps_per_epoch, **changes):
    """(model, engine.Run) of a linear layer with two inputs."""
    fields = {**FIELDS, "out": str(out), **changes}
    recipe, cpu = dataclasses.make_dataclass("Recipe", fields)(**fields), torch.device("cpu")
    model, scaler = nn.Linear(2, 1), engine.mixed_precision("fp32", cpu)[2]
    return model, engine.Run(recipe, model, engine.make_optimizer(model, recipe), scaler,
                             device=cpu, steps_per_epoch=steps_per_epoch, fingerprint="",
                             num_files=8, unit="image")


class Slow(torch.utils.data.Dataset):
    """From the fourth sample on it hangs, and leaves a file that says so."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 8

    def __getitem__(self, key):
        if key[1] >= 3:
            self.path.touch()
            time.sleep(300)
        return {"x": torch.ones(2), "label": 0, "index": key[1], "unreadable": []}


def train_on_slow_data(folder, workers):
    def main():
        model, run = linear_run(folder / "out", 8)
        keys = [[(0, i)] for i in range(8)]
        loader = iter(data.make_loader(Slow(folder / "waits"), keys, workers))
        while run.step < run.total_steps:
            lr = run.start_step()
            run.next_batch(loader)
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            run.end_step(torch.ones(()), lr)
    engine.run_main(main)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_a_program_that_waits_for_data(tmp_path, workers):
    """SIGTERM while no batch comes: the last step is saved, and the program ends.

    A process of its own, since a fork does not do at its exit what a program does.
    """
    code = (f"import engine, sys; sys.path[:0] = {str(ROOT)!r}, {str(ROOT / 'tests')!r}\n"
            "import pathlib, test_engine\n"
            f"test_engine.train_on_slow_data(pathlib.Path({str(tmp_path)!r}), {workers})")
    log = tmp_path / "out/log.jsonl"
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=output,
                                   stderr=output)
    try:
        for _ in range(600):
            if (tmp_path / "waits").exists() and log.exists() and log.read_text().count("\n") == 3:
                break
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
        process.terminate()
        assert process.wait(120) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert "stopped by SIGTERM" in (tmp_path / "output").read_text()
    assert read_checkpoint(tmp_path / "out/last.pt")["step"] == 3


def test_a_signal_ends_the_waiting_for_data(tmp_path, capsys):
    """SIGTERM while no batch comes: the last step is saved, if there is one, and the program
    ends."""
    def hang():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        yield
    for steps, words in ((0, "no step was saved, start again"), (1, "holds step 1, go on")):
        model, run = linear_run(tmp_path / str(steps), 8)
        try:
            for _ in range(steps):
                lr = run.start_step()
                model(torch.ones(1, 2)).sum().backward()
                run.end_step(torch.ones(()), lr)
            with pytest.raises(SystemExit) as exit:
                run.next_batch(hang())
        finally:
            run.stop.release()
        assert exit.value.code == 128 + signal.SIGTERM
        assert f"after step {steps} of 72: " in (text := capsys.readouterr().out) and words in text
        assert (tmp_path / str(steps) / "last.pt").exists() == bool(steps)
    assert read_checkpoint(tmp_path / "1/last.pt")["step"] == 1


def test_a_second_signal_does_not_wait():
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = engine.StopSignal()
    try:
        assert stop.agreed() == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == "SIGTERM"
        with pytest.raises(SystemExit) as exit:
            os.kill(os.getpid(), signal.SIGINT)
        assert exit.value.code == 128 + signal.SIGINT
    finally:
        stop.release()
    assert usual == {number: signal.getsignal(number) for number in usual}


# ------------------------------------------------------------------------------------ command line

@dataclasses.dataclass(frozen=True)
class Recipe:
    model: str = engine.option("small", choices=("small", "large"))
    lr: float = 1e-3
    size: tuple = (8, 8)
    flag: bool = False


RECIPES = {"first": Recipe(), "second": Recipe(model="large", lr=1e-4)}


def test_parse_recipe():
    assert parse_recipe(RECIPES, "", []) == ("first", Recipe(), set())
    name, recipe, overrides = parse_recipe(RECIPES, "", "--model large --size 4 --flag".split())
    assert (name, recipe) == ("second", Recipe("large", 1e-4, (4, 4), True))
    assert overrides == {"model", "size", "flag"}
    name, recipe, overrides = parse_recipe(
        RECIPES, "", "--recipe second --lr 2 --size 4 6 --no-flag".split())
    assert (name, recipe) == ("second", Recipe("large", 2.0, (4, 6), False))
    assert overrides == {"recipe", "lr", "size", "flag"}
    with pytest.raises(SystemExit):                           # no row is for that model
        parse_recipe({"first": Recipe()}, "", ["--model", "large"])


def test_a_resumed_run_keeps_its_flags_and_batches(tmp_path):
    """The batches in the file are those of the run, not wishes that a script still adapts."""
    row = dataclasses.replace(pretrain.RECIPES["tiny"], lr=0.5, device_batch=4)
    save_checkpoint(str(tmp_path / "last.pt"), {"recipe": dataclasses.asdict(row)})
    _, recipe, overrides = parse_recipe(pretrain.RECIPES, "", ["--resume", "--out", str(tmp_path)])
    assert (recipe.lr, recipe.device_batch, recipe.resume) == (0.5, 4, True)
    assert overrides == {"resume", "out", "batch_size", "device_batch"}


@pytest.mark.parametrize("argv", ["--nonsense", "--model huge", "--lr fast", "--size 1 2 3",
                                  "--recipe third", "--lar 3"])
def test_wrong_flags_fail(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_recipe(RECIPES, "", argv.split())
    assert exit.value.code == 2
    assert argv.split()[0].lstrip("-") in capsys.readouterr().err


@pytest.mark.parametrize("size, samples, world, planned", [
    (256, 24, 1, 8), (256, 60, 2, 8), (256, 5, 1, 5), (256, 1000, 1, 32), (4, 24, 1, 4),
    (256, 100, 3, 6), (32, 10_000, 1, 32)])
def test_automatic_batch(size, samples, world, planned):
    """At most 1/16 of the samples, but eight if there are as many, and alike on each process."""
    @dataclasses.dataclass
    class Recipe:
        batch_size: int = size
        device_batch: int = 8
    lines = []
    recipe, device_batch, parts = engine.plan_batch(Recipe(), samples, world, False, lines.append)
    assert recipe.batch_size == planned == world * device_batch * parts
    assert bool(lines) == (planned != size)


def test_pictures_are_drawn_within_an_epoch_and_at_the_end(tmp_path):
    """The first time after two steps, and then within a small share of the time."""
    model, run = linear_run(tmp_path / "out", 99)
    drawn = []
    draw = lambda: (time.sleep(0.1), drawn.append(run.step))
    for _ in range(4):
        lr = run.start_step()
        model(torch.ones(1, 2)).sum().backward()
        run.end_step(torch.ones(()), lr)
        run.draw_sometimes(draw)
    run.draw_sometimes(draw, at_end=True)
    run.finish()
    assert drawn == [2, 4]


def test_a_run_that_hardly_trained_ends_with_an_error(tmp_path, capsys):
    """Every second step is skipped, which never makes twenty in a row."""
    model, run = linear_run(tmp_path / "out", 1, epochs=14)
    while run.step < run.total_steps:
        lr = run.start_step()
        scale = math.nan if run.step % 2 else 1.0 if run.step < 4 else 1e6
        loss = model(torch.ones(1, 2)).square().sum() * 0 + scale
        (loss + model.weight.sum() * scale).backward()
        run.end_step(loss.detach(), lr)
        run.draw_sometimes(lambda: visualize.draw_loss([run.log_path], str(tmp_path / "loss.png")))
    with pytest.raises(ValueError, match="7 of 14 steps were skipped"):
        run.finish()
    output = capsys.readouterr().out
    assert output.count("the training diverges") == 1
    assert "no picture" in output                             # after one step: no curve, no end
