"""Scripts as processes: start, kill at a step, read what they left."""
import json
import os
import signal
import subprocess
import sys
import time

import torch

from conftest import ROOT
from engine import read_checkpoint

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(script, *flags, processes=1):
    launch = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launch, str(ROOT / script), *map(str, flags)]


def run(script, *flags, **kw):
    return subprocess.run(command(script, *flags, **kw), capture_output=True, text=True, env=ENV, timeout=300)


def log_of(out):
    """The whole lines of a run's log; one that is being written may lack its end."""
    return [json.loads(line) for line in open(os.path.join(out, "log.jsonl")) if line.endswith("\n")]


def kill_at(step, out, script, *flags, sent=signal.SIGKILL, **kw):
    """Start a run, and kill it and all its children once the log in `out` shows `step`. Returns (exit status, output)."""
    process = subprocess.Popen(command(script, *flags, **kw), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=ENV, start_new_session=True)
    try:
        for _ in range(2400):
            if os.path.exists(os.path.join(out, "log.jsonl")) and any(d["step"] >= step for d in log_of(out)):
                break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        (os.killpg if sent == signal.SIGKILL else os.kill)(process.pid, sent)
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
        assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in state.items())
