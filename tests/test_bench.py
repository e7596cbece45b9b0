"""bench.py: statistics, turns, lines, the memory of a process, and that a step in plain form is the same step."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import bench

MEBI = 2 ** 20


def test_ratio_is_the_median_of_rounds_and_its_spread_half_the_quartiles():
    assert bench.ratio_of([1, 2, 3, 4, 50], [10] * 5) == pytest.approx((0.3, 0.1))
    assert bench.ratio_of([2, 400], [1, 200]) == (2, 0)                       # a slow round slows both sides
    assert bench.ratio_of([3.0], [2.0]) == (1.5, None)
    with pytest.raises(ValueError):
        bench.ratio_of([1, 2], [1])


def test_sides_take_turns(monkeypatch):
    """A clock of our own: `slow` takes 0.2 s, `fast` 1 ms, and each turn at least TURN."""
    now, calls = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def side(name, seconds):
        def run():
            now[0] += seconds
            calls.append(name)
        return run
    times = bench.take_turns({"slow": side("slow", 0.2), "fast": side("fast", 1e-3)}, 3, bench.CPU)
    assert times == {"slow": pytest.approx([0.2] * 3), "fast": pytest.approx([1e-3] * 3)}
    order = "".join(name[0] for name in calls)
    assert order.startswith("sff") and order[3] == "s"                        # warm-up; a second one for its length
    turns = [len(turn) for turn in order[4:].split("s")]
    assert len(turns) == 3 and all(100 <= turn <= 102 for turn in turns)


def test_lines_and_chart(tmp_path):
    lines = [bench.make_line("step", "ms", [0.1, 0.2, 0.3], [0.2, 0.4, 0.8], items=4),
             bench.make_line("memory", "GiB", [3.0], [2.0]),
             bench.make_line("masks", "ms", [1e-4, 1e-4], items=1),
             bench.make_line("waiting", "s", [1, 2], [10, 20], "wall time")]
    assert json.loads(json.dumps(lines)) == lines
    step, memory, masks, waiting = lines
    assert (step["ours"], step["other"], step["per_second"]) == pytest.approx((200, 400, 20))
    assert step["ratio"] == 0.5 and step["spread"] == pytest.approx(0.03125) and step["against"] == "plain form"
    assert memory["spread"] is memory["per_second"] is masks["ratio"] is masks["other"] is masks["against"] is None
    assert masks["per_second"] == pytest.approx(1e4) and waiting["ratio"] == pytest.approx(0.1)
    assert bench.format_line(step).split() == "step 200 400 ms 0.500 ± 0.031 20 plain form".split()
    assert bench.format_line(memory).split() == "memory 3 2 GiB 1.500 plain form".split()
    assert bench.format_line(masks).split() == "masks 0.1 ms 10000".split()

    bench.draw_chart(lines, "here", tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        bars = (np.asarray(picture) == (0x58, 0x6e, 0xa0)).all(-1)
    lengths = bars.sum(1)[bars.any(1)]
    assert sorted(set(lengths)) == [121, 361]                                 # 0.5 and 1.5; no others


def allocate(mebibytes):
    before = bench.peak_memory(bench.CPU)
    torch.ones(mebibytes, MEBI // 4)
    return bench.peak_memory(bench.CPU) - before


def test_memory_is_of_a_process_of_its_own():
    hog = torch.ones(400, MEBI // 4)                                          # this process has had its peak
    assert 0.24 < bench.in_own_process(allocate, 256) < 0.3                   # GiB
    del hog


@pytest.mark.parametrize("model, size", [("mvitv2_s", {"size": 32, "frames": 2}), ("vit_tiny", {"size": 32})])
def test_plain_form_is_another_way_to_the_same_step(model, size):
    losses = []
    for form in (lambda step: step, bench.plainly):
        torch.manual_seed(0)
        _, _, step = bench.make_step(model, 1, "fp32", bench.CPU, **size)
        losses.append([form(step)().item() for _ in range(2)])
    ours, plain = losses
    assert ours == pytest.approx(plain, rel=1e-5)
    assert ours[0] != ours[1]                                                 # the weights were updated


def test_plain_forms_are_in_place_only_while_they_run():
    def forms():
        return [getattr(owner, name) for owner, name in bench.FORMS]

    def fail():
        raise KeyError
    ours, plain = forms(), list(bench.FORMS.values())
    assert bench.plainly(forms)() == plain and forms() == ours
    with pytest.raises(KeyError):
        bench.plainly(fail)()
    assert forms() == ours and not set(ours) & set(plain)


def test_lines_of_a_step():
    lines = {}

    def add(name, *values, **more):
        lines[name.split(": ")[1]] = bench.make_line(name, *values, **more)
    bench.bench_step("vit_tiny", 2, "bf16", bench.CPU, 3, False, add, memory=False, size=32)
    assert {name: line["against"] for name, line in lines.items()} == {
        "step": "plain form", "model FLOPs": "matrix product", "HOG": "whole step", "masks": "whole step"}
    net, x, _ = bench.make_step("vit_tiny", 2, "bf16", bench.CPU, size=32)
    seconds, macs = lines["step"]["ours"] / 1e3, bench.count_flops(net, tuple(x.shape))["macs"]     # of both samples
    assert lines["model FLOPs"]["ours"] == pytest.approx(6 * macs / seconds / 1e12)
    assert lines["step"]["per_second"] == pytest.approx(2 / seconds)
    assert lines["HOG"]["other"] == lines["masks"]["other"] == lines["step"]["ours"]


def test_generated_clip(tmp_path):
    bench.write_clip(tmp_path / "clip.mp4", 160, 96, 100_000, seconds=5)
    with bench.av.open(str(tmp_path / "clip.mp4")) as container:
        frames = list(container.decode(video=0))
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 60, 120] and len(frames) == 150
    first, *_, last = pictures = [frame.to_ndarray(format="gray").astype(int) for frame in frames]
    assert first.shape == (96, 160) and all(picture.std() > 20 for picture in pictures)    # textured ...
    assert all(abs(a - b).mean() > 0.5 for a, b in zip(pictures, pictures[1:]))            # ... and moving
    assert 0.5 < (tmp_path / "clip.mp4").stat().st_size * 8 / 5 / 100_000 < 1.5            # at the bit rate asked for


def test_lines_of_the_loader(tmp_path):
    lines, files = [], {"small": tmp_path / "small.mp4"}
    bench.write_clip(files["small"], 96, 64, 50_000, seconds=3)
    bench.bench_loader(tmp_path, files, 2, lambda *values, **more: lines.append(bench.make_line(*values, **more)))
    sample, *stages, image = lines
    assert [line["name"] for line in stages] == [
        f"small, {stage}" for stage in ("open and seek", "decode", "convert", "crop", "mask")]
    assert sample["against"] == "plain form" and all(line["against"] == "sample" for line in stages)
    assert sum(line["ratio"] for line in stages) == pytest.approx(1)          # nothing left out or counted twice
    assert image["per_second"] == pytest.approx(1e3 / image["ours"])
