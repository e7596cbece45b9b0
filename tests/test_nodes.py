"""Two nodes on one machine: a launcher for each, as `torchrun --nnodes=2` starts them."""
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import runs
from conftest import ROOT

# The remedy of the README for restarts: see there.
ENV = {**runs.ENV, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start_node(port, output, *flags):
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=2",
              "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    with open(output, "a") as f:
        return subprocess.Popen([sys.executable, *launch, str(ROOT / "pretrain.py"), *flags],
                                stdout=f, stderr=subprocess.STDOUT, env=ENV)


def wait_for_step(step, out, nodes):
    for _ in range(2400):
        assert all(node.poll() is None for node in nodes)
        if os.path.exists(out / "log.jsonl") and any(
                line["step"] >= step for line in runs.log_of(out)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
def test_a_node_is_killed_and_comes_back(clips, tmp_path):
    """One log and one checkpoint, and the same weights as on one node, to the bit."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = list(map(str, ["--data", clips, *runs.PRETRAIN, "--epochs", 8]))
    whole, out = tmp_path / "whole", tmp_path / "out"
    runs.run_well("pretrain.py", *common, "--out", whole, processes=2)

    flags = [*common, "--out", str(out), "--resume"]
    outputs = [tmp_path / "first", tmp_path / "second"]
    nodes = [start_node(port, output, *flags) for output in outputs]
    try:
        wait_for_step(5, out, nodes)
        nodes[1].send_signal(signal.SIGKILL)                  # its process stops by itself
        nodes[1].wait()
        nodes[1] = start_node(port, outputs[1], *flags)
        codes = [node.wait(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    text = "".join(output.read_text() for output in outputs)
    assert codes == [0, 0] and "resumed" in text, text[-4000:]
    assert [line["step"] for line in runs.log_of(out)] == list(range(1, 25))
    runs.assert_same_weights(whole, out)
