"""tools/gpu_check.py on a CPU, in small."""
import pytest
import runs
import torch

from tools import bench


def test_table():
    rows = [{"a": 1.23456, "b": "x", "c": ""}, {"a": 2, "d": 0.5}]
    assert bench.table(rows).splitlines() == [
        "| a | b | d |", "| --- | --- | --- |", "| 1.23 | x |  |", "| 2 |  | 0.5 |"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would begin")
def test_without_a_gpu(monkeypatch, capsys):
    assert "use --small" in runs.refusal(monkeypatch, capsys, "tools.gpu_check")


@pytest.mark.slow
def test_command(tmp_path):
    """A part that is done is not run again, one that fails stops no other, and a table is left."""
    (tmp_path / "mvitv2_s.json").write_text('[{"step": "done before"}]')
    (tmp_path / "hog.json").mkdir()                           # its file cannot be written
    done = runs.run("tools.gpu_check", "--small", "--out", tmp_path, "--parts", "mvitv2_s", "hog",
                    "fp16", "loader", "runs")
    assert done.returncode == 2 and "hog ended with an error" in done.stderr, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert "done before" in table and "| mvit_nano | eager | fp16 | 2 |" in table
    assert "| pretrain.py --amp fp32 |" in table and "| 6 of 6 |" in table
    assert float(table.split("| 16x4 clips of 340x256 | 1 | ")[1].split()[0]) > 0
