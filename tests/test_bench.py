"""tools/bench.py: statistics, turns, memory, and plain forms that compute the same step."""
import json

import pytest
import torch

from tools import bench

MEBI = 2 ** 20


def test_ratio_is_the_median_of_rounds_and_its_spread_half_the_quartiles():
    line = bench.make_line("step", "ms", [1, 2, 3, 4, 50], [10] * 5)
    assert (line["ours"], line["plain"]) == (3e3, 1e4)
    assert (line["ratio"], line["spread"]) == pytest.approx((0.3, 0.1))
    assert bench.make_line("", "s", [2, 400], [1, 200])["ratio"] == 2  # a slow round
    assert bench.format_line(line).split() == "step 3000 ms 1e+04 0.300 ± 0.100".split()
    assert bench.format_line(bench.make_line("mask", "ms", [1e-4])).split() == "mask 0.1 ms".split()
    one = bench.make_line("peak", "GiB", [3.0], [2.0])
    assert bench.format_line(one).split() == "peak 3 GiB 2 1.500".split()
    assert json.loads(json.dumps(line)) == line


def test_sides_take_turns(monkeypatch):
    """A clock of our own: `slow` takes 0.2 s and `fast` 1 ms. A turn lasts at least TURN."""
    now, calls = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def side(name, seconds):
        def run():
            now[0] += seconds
            calls.append(name)
        return run
    times = bench.take_turns({"slow": side("s", 0.2), "fast": side("f", 1e-3)}, 3)
    assert times == {"slow": pytest.approx([0.2] * 3), "fast": pytest.approx([1e-3] * 3)}
    turns = "".join(calls).removeprefix("sff").split("s")[1:]
    assert len(turns) == 3 and all(100 <= len(turn) <= 102 for turn in turns)


def allocate(mebibytes):
    return bench.peak_of(lambda: torch.ones(mebibytes, MEBI // 4), bench.CPU)


@pytest.mark.slow
def test_memory_is_of_a_process_of_its_own():
    grown = torch.ones(400, MEBI // 4)                        # this process has had its peak
    assert 0.24 < bench.in_own_process(allocate, 256) < 0.3   # GiB
    del grown


@pytest.mark.parametrize(
    "model", [pytest.param("mvitv2_s", marks=pytest.mark.slow), "vit_tiny"])
def test_plain_form_is_another_way_to_the_same_step(model):
    losses = []
    for form in (lambda step: step, bench.plainly):
        torch.manual_seed(0)
        _, step = bench.make_step(model, 1, bench.CPU, size=32, frames=2)
        losses.append([form(step)().item() for _ in range(2)])
    ours, plain = losses
    assert ours == pytest.approx(plain, rel=1e-5) and ours[0] != ours[1]


def test_plain_forms_are_in_place_only_while_they_run():
    forms = lambda: [getattr(owner, name) for owner, name in bench.FORMS]
    ours = forms()
    assert bench.plainly(forms)() == list(bench.FORMS.values()) and forms() == ours


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["video", "image"])
def test_samples_of_the_loader(kind, tmp_path):
    path = tmp_path / ("clip.mp4" if kind == "video" else "image.png")
    if kind == "video":
        bench.write_clip(path, 96, 64, seconds=3)
    else:
        bench.Image.fromarray(bench.texture(64, 64)).save(path)
    ours, plain = bench.in_own_process(bench.sample_times, kind, path, 2)
    assert len(ours) == 2 and len(plain) == (2 if kind == "video" else 0)
