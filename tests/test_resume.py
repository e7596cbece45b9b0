"""Runs that are killed or stopped go on as if nothing had happened."""
import signal

import numpy as np
import pytest
import runs

from checkpoints import read_checkpoint

pytestmark = pytest.mark.slow
WHOLE = {"pretrain": "pretrained", "finetune": "finetuned"}                  # fixtures


def plan(script, clips, pretrained):
    if script == "pretrain":
        return ["--data", clips, *runs.PRETRAIN]
    return ["--data", clips, *runs.FINETUNE, "--no-baseline", "--init", pretrained[0] / "last.pt"]


@pytest.mark.parametrize("script", WHOLE)
def test_stopped_killed_and_resumed_is_bit_equal(script, clips, pretrained, request, tmp_path):
    """SIGTERM saves the step. After this and a SIGKILL the weights are those of a whole run."""
    flags, out = [*plan(script, clips, pretrained), "--out", tmp_path / "out"], tmp_path / "out"
    code, output = runs.kill_at(4, out, f"{script}.py", *flags, "--workers", 2,
                                sent=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "stopped by SIGTERM" in output and "--resume" in output
    step = read_checkpoint(out / "last.pt")["step"]
    assert step == runs.log_of(out)[-1]["step"] >= 4
    runs.kill_at(7, out, f"{script}.py", *flags, "--resume", "--workers", 2,
                 "--save-minutes", 0.0001)
    output = runs.run_well(f"{script}.py", "--out", out, "--resume")   # recipe, data from last.pt
    assert "resumed" in output
    runs.assert_same_run(request.getfixturevalue(WHOLE[script])[0], out)


@pytest.mark.parametrize("script, alone", [("pretrain", False), ("finetune", True)])
def test_two_processes_killed_and_resumed_are_bit_equal(script, alone, clips, pretrained, tmp_path):
    """Both and torchrun are killed, or torchrun alone: then its processes save and leave."""
    flags, out = plan(script, clips, pretrained), tmp_path / "killed"
    runs.run_well(f"{script}.py", *flags, "--out", tmp_path / "whole", processes=2)
    resume = [*flags, "--out", out, "--resume", "--save-minutes", 0.0001]
    _, output = runs.kill_at(5, out, f"{script}.py", *resume, processes=2, children=not alone)
    assert ("stopped by SIGUSR1" in output) == alone, output
    assert "resumed" in runs.run_well(f"{script}.py", *resume, processes=2)
    runs.assert_same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("script, flags", [
    ("pretrain", ["--mask", "frame", "--drop-path", 0, "--epochs", 1]),
    ("finetune", ["--drop-path", 0, "--dropout", 0, "--mixup", 0, "--cutmix", 0, "--epochs", 1,
                  "--val-epochs", 0])])
def test_accumulation_and_ranks_see_the_same_samples(script, flags, clips, pretrained, tmp_path):
    """One process, accumulation and two processes average the same global batch.

    Each sample has a mask of the same size, so means over micro-batches are means over the batch.
    """
    losses, levels = [], []
    for name, more, processes in (("one", [], 1), ("two", [], 2),
                                  ("accumulated", ["--device-batch", 2], 1)):
        output = runs.run_well(f"{script}.py", *plan(script, clips, pretrained), *flags, *more,
                               "--out", tmp_path / name, processes=processes)
        log = runs.log_of(tmp_path / name)
        levels.append([line["levels"] for line in log if "levels" in line])
        losses.append([line[key] for key in ("loss", "val_loss") for line in log if key in line])
        assert name != "accumulated" or "accumulated 1;" not in output
    assert levels[1] == levels[0]                             # no network is in these
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-5)


@pytest.mark.parametrize("script, flag, was", [("pretrain", ["--mask-ratio", 0.6], "(was 0.4)"),
                                               ("finetune", ["--layer-decay", 0.5], "(was 0.75)")])
def test_nothing_is_written_over(script, flag, was, clips, pretrained, request, monkeypatch,
                                 capsys):
    out = request.getfixturevalue(WHOLE[script])[0]
    flags = [*plan(script, clips, pretrained), "--out", out]
    before = [(out / name).read_bytes() for name in ("last.pt", "log.jsonl")]
    assert "--resume" in runs.refusal(monkeypatch, capsys, script, *flags)
    error = runs.refusal(monkeypatch, capsys, script, *flags, "--resume", *flag)
    assert was in error and flag[0].strip("-").replace("-", "_") in error
    assert before == [(out / name).read_bytes() for name in ("last.pt", "log.jsonl")]
    assert "9 steps" in runs.run_well(f"{script}.py", *flags, "--resume")     # nothing to add
