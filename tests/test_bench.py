"""tools/bench.py: statistics, turns, and plain forms that compute the same step."""
import json
import sys
import time

import pytest
import torch
from conftest import slow

import pretrain
from tools import bench


def test_ratio_is_the_median_of_rounds_and_its_spread_half_the_quartiles():
    line = bench.summarize("step", "ms", [1, 2, 3, 4, 50], [10] * 5)
    assert (line["ours"], line["plain"]) == (3, 10)
    assert (line["ratio"], line["spread"]) == pytest.approx((0.3, 0.1))
    assert bench.summarize("", "s", [2, 400], [1, 200])["ratio"] == 2    # a slow round
    assert "ratio" not in bench.summarize("mask", "ms", [0.1])
    assert json.loads(json.dumps(line)) == line


def test_sides_take_turns():
    calls = []
    slow = lambda: (calls.append("s"), time.sleep(0.25))
    fast = lambda: (calls.append("f"), time.sleep(0.02))
    (slow_ms, *_), (fast_ms, *_) = bench.take_turns([slow, fast], 2)
    assert 250 <= slow_ms < 1000 and 20 <= fast_ms < slow_ms
    turns = "".join(calls).split("s")[2:]                     # after the warm-up
    assert len(turns) == 2 and turns[0] == turns[1] and len(turns[0]) > 1


@pytest.mark.parametrize("model", [slow("mvitv2_s"), "vit_tiny"])
def test_plain_form_is_another_way_to_the_same_step(model):
    recipe, losses = pretrain.Recipe(model=model, image_size=(64, 64), num_frames=2), []
    for form in (torch.nn.Identity(), bench.plainly):
        torch.manual_seed(0)
        step = form(bench.make_step(recipe, 1))
        losses.append([step().item() for _ in range(2)])
    ours, plain = losses
    assert ours == pytest.approx(plain, rel=1e-5) and ours[0] != ours[1]


def test_plain_forms_are_in_place_only_while_they_run():
    forms = lambda: [getattr(*place) for place in bench.PLAIN]
    ours = forms()
    assert bench.plainly(forms)() == list(bench.PLAIN.values()) and forms() == ours


@pytest.mark.slow
def test_command(monkeypatch, tmp_path, capsys):
    """Everything but the attention, for a tiny model and small pictures."""
    draw_noise = bench.draw_noise
    monkeypatch.setattr(bench, "draw_noise", lambda width, height, frames: draw_noise(
        width // 20 * 4, height // 20 * 4, frames))
    monkeypatch.setitem(bench.BATCH, "vit_tiny", (1, 1))
    monkeypatch.setattr(bench, "bench_parts", lambda rounds: [("mask", "ms", [0.1])])
    flags = ["--models", "vit_tiny", "--rounds", "1", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    bench.main()
    lines = json.loads((tmp_path / "a.json").read_text())["lines"]
    assert len(lines) == 6 == len(capsys.readouterr().out.splitlines()) - 2
    assert all(line["ours"] > 0 and line.get("plain", 1) > 0 for line in lines)
