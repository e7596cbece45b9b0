"""The scripts: run them, here or as processes, kill them at a step, read what they left."""
import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import engine

import torch
from conftest import ROOT

from checkpoints import read_checkpoint

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
# 12 clips of 2 classes, batch 4: 3 steps per epoch, 9 steps. Batches, masks and lr come from the
# recipe alone.
SMALL = ["--image-size", 32, "--frames", 4, "--sampling-rate", 2, "--batch-size", 4, "--epochs", 3,
         "--warmup-epochs", 1, "--log-every", 1, "--workers", 0, "--drop-path", 0.2]
PRETRAIN = [*SMALL, "--output-stride", 8]
# every augmentation on
FINETUNE = [*SMALL, "--dropout", 0.1, "--rand-augment", "rand-m7-mstd0.5-inc1", "--erase", 0.5,
            "--repeats", 2, "--layer-decay", 0.75, "--mixup", 0.8, "--cutmix", 1, "--smoothing",
            0.1, "--val-epochs", 2, "--clips", 2]
SCRATCH = ["--init", "", "--no-baseline"]


def command(script, *flags, processes=1):
    launch = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={processes}"]
    return [*launch, str(ROOT / script), *map(str, flags)]


def run(script, *flags, processes=1):
    """A run to its end: a result with returncode, stdout and stderr. One process is this one, which
    spares the imports, with one thread as the others have."""
    if processes > 1:
        return subprocess.run(command(script, *flags, processes=processes), capture_output=True,
                              text=True, env=ENV, timeout=300)
    out, err, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGTERM, signal.SIGINT, engine.LAUNCHER_DIED)}
    torch.set_num_threads(1)
    with (mock.patch.object(sys, "argv", [script, *map(str, flags)]),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            engine.run_main(importlib.import_module(script.removesuffix(".py")).main)
        except SystemExit as exit:
            code = exit.code
        finally:
            torch.set_num_threads(threads)
            for number, handler in handlers.items():          # a failed run leaves its own
                signal.signal(number, handler)
            while engine._locks:                              # they would end with the process
                engine._locks.pop().close()
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def run_well(script, *flags, **kw):
    """Output of a run that must end well."""
    done = run(script, *flags, **kw)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def refusal(monkeypatch, capsys, script, *flags):
    """The error with which a script refuses its flags, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    try:
        engine.run_main(importlib.import_module(script).main)
    except SystemExit as exit:
        assert exit.code == 2
        return "error: " + capsys.readouterr().err.partition("error: ")[2]
    raise AssertionError(f"{script} {flags} was not refused")


def log_of(out):
    """The whole lines of a run's log. One that is being written may lack its end."""
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def kill_at(step, out, script, *flags, sent=signal.SIGKILL, children=True, **kw):
    """Start a run, and kill it once the log in `out` shows `step`, with SIGKILL its children, too.

    Under torchrun the first process is the launcher, and its children have groups of their own.
    Returns (exit status, output).
    """
    process = subprocess.Popen(command(script, *flags, **kw), stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT, env=ENV, start_new_session=True)
    try:
        for _ in range(2400):
            logged = os.path.exists(os.path.join(out, "log.jsonl"))
            if logged and any(line["step"] >= step for line in log_of(out)):
                break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")      # Linux
        found = listed.read_text().split() if listed.exists() else ()
        (os.killpg if sent == signal.SIGKILL else os.kill)(process.pid, sent)
        for child in map(int, found if sent == signal.SIGKILL and children else ()):
            with contextlib.suppress(ProcessLookupError):     # it was in the group
                os.kill(child, sent)
        output = process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def assert_same_weights(a, b):
    """The checkpoints of two runs: same step, weights and optimizer, to the bit."""
    a, b = (read_checkpoint(os.path.join(out, "last.pt")) for out in (a, b))
    assert a["step"] == b["step"]
    assert a["model"].keys() == b["model"].keys()
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    for key, state in a["optimizer"]["state"].items():
        other = b["optimizer"]["state"][key]
        assert all(torch.equal(value, other[name]) for name, value in state.items())


def assert_same_run(one, other):
    """Weights and logs, to the bit, but for what is measured."""
    assert_same_weights(one, other)
    measured = {"time", "samples_per_second", "data_wait"}
    logs = [[{k: v for k, v in line.items() if k not in measured} for line in log_of(folder)]
            for folder in (one, other)]
    assert logs[0] == logs[1]
