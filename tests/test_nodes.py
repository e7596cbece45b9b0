"""Several machines, killed machines and killed launchers: each launcher here acts as a machine.

Two launchers on the loopback interface meet as `torchrun --nnodes=2` lets two machines meet. Run
these with `pytest -m long`. They need Linux, whose /proc says which processes belong to a run.
"""
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
from conftest import ROOT

from checkpoints import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.long,
              pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
STEPS = 30
TRAIN = [*runs.PRETRAIN, "--epochs", STEPS // 3]              # 3 steps per epoch
# A busy machine starts a process within minutes, not seconds. Nothing waits as long as this unless
# it fails.
PATIENCE = 900
CONF = f"join_timeout={PATIENCE},read_timeout={PATIENCE},keep_alive_max_attempt=60"
# The second variable is the remedy of the README for restarts: see there.
ENV = {**runs.ENV, "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def free_port():
    """A free port below those that the system gives to outgoing connections."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


class Machines:
    """Launchers of pretrain.py that write to one folder, and their output."""

    def __init__(self, clips, out, nodes=2, processes=1, restarts=0, flags=()):
        port, self.out, self.launchers, self.outputs = free_port(), out, [], []
        script = [ROOT / "pretrain.py", "--data", clips, "--out", out, *TRAIN, *flags]
        for node in range(nodes):
            launch = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}",
                      f"--nproc_per_node={processes}", f"--max-restarts={restarts}",
                      "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
                      "--local_addr=127.0.0.1", f"--rdzv_conf={CONF},is_host={int(node == 0)}"]
            self.outputs.append(out.parent / f"{out.name}_{port}_{node}.txt")
            with open(self.outputs[-1], "w") as f:
                self.launchers.append(subprocess.Popen(
                    [*map(str, launch + script)], stdout=f, stderr=subprocess.STDOUT, env=ENV))

    def __enter__(self):
        return self

    def __exit__(self, *about):
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):     # it has just ended
                os.kill(process, signal.SIGKILL)
        for launcher in self.launchers:
            launcher.wait()

    def processes(self, **environment):
        """Ids of the launchers, their processes and the loaders of these: all that have the folder
        on their command line. environment: only those with these variables."""
        wanted, found = {f"{key}={value}".encode() for key, value in environment.items()}, []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):                # it has just ended
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if os.fsencode(self.out) in words and wanted <= {
                        *(folder / "environ").read_bytes().split(b"\0")}:
                    found.append(int(folder.name))
        return found

    def text(self, node=None):
        outputs = self.outputs if node is None else [self.outputs[node]]
        return "".join(output.read_text(errors="replace") for output in outputs)

    def wait(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, self.text()[-8000:]
            time.sleep(0.02)

    def wait_for_step(self, step):
        """Until the log has it. All launchers must live."""
        def reached():
            assert all(launcher.poll() is None for launcher in self.launchers), self.text()[-8000:]
            return (self.out / "log.jsonl").exists() and any(
                line["step"] >= step for line in runs.log_of(self.out))
        self.wait(reached)

    def codes(self):
        """Exit statuses of the launchers, once all processes have ended."""
        self.wait(lambda: all(launcher.poll() is not None for launcher in self.launchers))
        self.wait(lambda: not self.processes())
        return [launcher.returncode for launcher in self.launchers]

    def finish(self):
        """The whole output of a run that must end well."""
        assert self.codes() == [0] * len(self.launchers), self.text()[-8000:]
        return self.text()


def saved_step(out):
    return read_checkpoint(out / "last.pt")["step"]


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    """An uninterrupted run on two machines."""
    out = tmp_path_factory.mktemp("nodes") / "whole"
    with Machines(clips, out) as machines:
        machines.finish()
    return out, machines


def test_two_machines_write_one_log_and_one_checkpoint(clips, whole, tmp_path):
    """They do to the bit what two processes on one machine do."""
    out, machines = whole
    assert machines.text().count(f"wrote {out}/last.pt") == 1
    assert sorted(f"wrote {out}" in machines.text(node) for node in (0, 1)) == [False, True]
    assert [line["step"] for line in runs.log_of(out) if "loss" in line] == [*range(1, STEPS + 1)]
    assert {path.name for path in out.iterdir()} == {
        ".lock", "last.pt", "log.jsonl", "recipe.json", "loss.png", "prediction.png",
        "prediction.gif"}
    assert saved_step(out) == STEPS
    runs.run_well("pretrain.py", "--data", clips, "--out", tmp_path / "one", *TRAIN, processes=2)
    runs.assert_same_run(tmp_path / "one", out)


@pytest.mark.parametrize("dead", [0, 1], ids=["host", "guest"])
def test_a_machine_dies_and_both_are_started_again(dead, clips, whole, tmp_path):
    """The other one ends by itself, also where the dead one was the meeting point."""
    out, flags = tmp_path / "out", ["--resume", "--save-minutes", 0.0001]
    with Machines(clips, out, flags=flags) as machines:
        machines.wait_for_step(8)
        launcher = machines.launchers[dead]
        rank = f"/proc/{launcher.pid}/task/{launcher.pid}/children"
        for process in [launcher.pid, *map(int, Path(rank).read_text().split())]:
            os.kill(process, signal.SIGKILL)
        codes = machines.codes()
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] > 0, machines.text()[-8000:]
    assert 7 <= saved_step(out) < STEPS                       # a step is saved before the next one
    with Machines(clips, out, flags=flags) as machines:
        assert f"resumed {out}/last.pt at step" in machines.finish()
    runs.assert_same_run(whole[0], out)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_restarted_rank_0_goes_on(nodes, clips, whole, tmp_path):
    """The launcher starts all processes again, on two machines both launchers do."""
    out = tmp_path / "out"
    with Machines(clips, out, nodes=nodes, processes=2 // nodes, restarts=2,
                  flags=["--resume", "--save-minutes", 0.0001]) as machines:
        machines.wait_for_step(8)
        first, = machines.processes(RANK=0)
        os.kill(first, signal.SIGKILL)
        output = machines.finish()
    assert output.count(f"resumed {out}/last.pt at step") == 1, output[-8000:]
    runs.assert_same_run(whole[0], out)


@pytest.mark.parametrize("dead", [0, 1], ids=["host", "guest"])
def test_a_launcher_dies_and_no_process_is_left(dead, clips, whole, tmp_path):
    """Its process saves and leaves with its loader. So does that of the other machine, on SIGTERM
    if its launcher misses the meeting point first."""
    out, flags = tmp_path / "out", ["--resume", "--workers", 1]
    with Machines(clips, out, flags=flags) as machines:
        machines.wait_for_step(8)
        machines.launchers[dead].kill()
        codes = machines.codes()
    output, step = machines.text(), runs.log_of(out)[-1]["step"]
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] > 0
    assert re.search(f"stopped by SIG(USR1|TERM) after step {step} of {STEPS}", output), output
    assert saved_step(out) == step >= 8
    with Machines(clips, out, flags=flags) as machines:
        assert f"resumed {out}/last.pt at step {step}" in machines.finish()
    runs.assert_same_weights(whole[0], out)


def test_a_launcher_dies_before_training(clips, tmp_path):
    """Its processes leave, although they had not asked for a signal yet. They would train on."""
    out = tmp_path / "out"
    with Machines(clips, out, nodes=1, processes=2) as machines:
        def loading():
            """Both have begun to load torch, which takes seconds."""
            maps = [Path(f"/proc/{process}/maps").read_text()
                    for process in machines.processes(LOCAL_WORLD_SIZE=2)]
            return len(maps) == 2 and all("libtorch" in text for text in maps)
        machines.wait(loading)
        machines.launchers[0].kill()
        assert machines.codes() == [-signal.SIGKILL]
    assert not out.exists(), machines.text()
