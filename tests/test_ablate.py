"""tools/ablate.py: rows that the scripts accept, runs that continue, table and chart."""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time

from engine import parse_recipe

import numpy as np
import pytest
import runs
from conftest import ROOT
from PIL import Image

import finetune
import pretrain
from layouts import Samples
from tools import ablate

SHORT = ["--pretrain-epochs", "1", "--finetune-epochs", "1", "--labels", "4"]
PAGE = "before\n<!-- ablation -->\nold\n<!-- /ablation -->\nafter\n"


@pytest.fixture
def folder(tmp_path):
    """The scripts, a page, and 128 training and 4 validation images of two classes."""
    rng = np.random.default_rng(0)
    for script in ("pretrain.py", "finetune.py"):
        (tmp_path / script).symlink_to(ROOT / script)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text(PAGE)
    for split, count in (("train", 64), ("val", 2)):
        for name in ("dark", "light"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                low = 127 * (name == "light")
                pixels = rng.integers(low, low + 128, (64, 64, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path


def start(folder, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "tools.ablate", "--data", "images", *flags], cwd=folder, text=True,
        env={**runs.ENV, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lines_of(folder):
    return [json.loads(line) for line in open(folder / "results/ablation.jsonl")]


def line(row, seed, top1, epochs=30, pretrain_epochs=20, labels=50, teacher=None):
    scratch = ablate.ROWS[row][1] is None
    return {"row": row, "teacher": teacher, "seed": seed, "data": "tiny-01", "labels": labels,
            "pretrain_data": None if scratch else "tiny-01", "epochs": epochs, "top1": top1,
            "pretrain_epochs": None if scratch else pretrain_epochs, "flags": "--model vit_tiny"}


LINES = [line("scratch", 0, 0.26), line("scratch", 1, 0.27), line("scratch", 2, 0.28),
         line("hog", 0, 0.30), line("hog", 1, 0.32), line("pixel", 0, 0.29),
         line("dino", 0, 0.31, teacher="our.pt"), line("dino", 0, 0.33, teacher="x.pth"),
         line("hog", 0, 0.99, pretrain_epochs=1), line("hog", 0, 0.98, labels=0),
         line("scratch", 0, 0.97, epochs=1)]


@pytest.mark.parametrize("name", ablate.ROWS)
def test_full_size_commands_are_what_the_scripts_accept(name):
    kind, flags = ablate.ROWS[name]
    args = argparse.Namespace(full=True, data="data", labels=50, teacher=None, pretrain_data=None,
                              pretrain_epochs=None, finetune_epochs=None)
    *before, (_, fine) = ablate.commands(name, 0, args)[0]
    assert len(before) == (flags is not None)
    _, recipe, given = parse_recipe(finetune.RECIPES, "", shlex.split(fine)[3:])
    finetune.check(recipe, given)
    assert recipe.model == ("vit_b" if kind == "image" else "mvitv2_s")
    assert bool(recipe.init) == bool(before) and recipe.limit_per_class == 0
    if before:
        assert recipe.epochs * recipe.repeats == {"image": 100, "video": 200}[kind]
    for out, command in before:
        _, recipe, _ = parse_recipe(pretrain.RECIPES, "", shlex.split(command)[3:])
        pretrain.check(recipe, Samples(kind, ["x"], [0], []))
        assert recipe.epochs == 300 and f"--init {out}/last.pt" in fine
        default = pretrain.RECIPES[ablate.FULL[kind][0].split()[1]]
        changed = [key for key in ("target", "mask", "norm", "color", "bins", "cell")
                   if getattr(recipe, key) != getattr(default, key)]
        assert len(changed) == (name not in ("hog", "video-hog")), changed


@pytest.mark.slow
def test_run_stopped_and_continued(folder):
    """SIGTERM reaches the training, which saves its step. The same command ends it, once."""
    flags = ["--rows", "scratch", "hog-none", *SHORT, "--labels", "60", "--finetune-epochs", "2"]
    process = start(folder, *flags)
    log = folder / "out/ablate/scratch/finetune-None+2-60-seed0/log.jsonl"
    for _ in range(2400):
        if log.exists() and log.read_text().count("\n") > 3:
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert not (folder / "results").exists()
    stopped_at = runs.read_checkpoint(log.parent / "last.pt")["step"]
    process = start(folder, *flags)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0 and f"at step {stopped_at}" in output, output
    assert stopped_at < runs.read_checkpoint(log.parent / "last.pt")["step"]
    scratch, none = lines_of(folder)
    assert (scratch["row"], none["row"]) == ("scratch", "hog-none")
    assert scratch["pretrain_epochs"] is None and none["pretrain_epochs"] == 1
    checkpoint = runs.read_checkpoint(folder / "out/ablate/hog-none/pretrain-1/last.pt")
    assert checkpoint["recipe"]["norm"] == "none" and none["data"].startswith("images-")
    assert "done before" in start(folder, *flags).communicate(timeout=60)[0]
    assert len(lines_of(folder)) == 2


def test_refusals(folder):
    output = start(folder, "--rows", "hogg").communicate(timeout=60)[0]
    assert "hogg" in output and "hog-none" in output and "tube" not in output


def test_table_never_mixes_budgets_or_teachers():
    (first, entries), (short, few) = ablate.compare(LINES)
    assert "Table 2" in first and "20 epochs" in first and "1 epochs of pre-training" in short
    ours = {label: values for _, label, _, values in entries}
    assert ours["scratch"] == pytest.approx([26, 27, 28]) and ours["HOG"] == pytest.approx([30, 32])
    assert ours["DINO ViT-B (our.pt)"] == pytest.approx([31]) and ours["dVAE token"] == []
    few = {label: values for _, label, _, values in few if values}
    assert few == {"scratch": pytest.approx([26, 27, 28]), "HOG": pytest.approx([99])}
    assert ablate.compare(LINES[:3]) == []                  # one row is no comparison
    assert len(ablate.compare([json.loads(text) for text in open(ROOT / ablate.RESULTS)])) == 2


def test_page_and_chart(folder, monkeypatch):
    monkeypatch.chdir(folder)
    os.mkdir("results")
    (folder / ablate.RESULTS).write_text("".join(json.dumps(entry) + "\n" for entry in LINES[:7]))
    ablate.rebuild()
    page = (folder / ablate.PAGE).read_text()
    ablate.rebuild()
    assert (folder / ablate.PAGE).read_text() == page and "old" not in page
    assert page.startswith("before\n<!-- ablation") and page.endswith("/ablation -->\nafter\n")
    for text in ("| scratch | 81.8 | 27.0 | 1.0 | 3 |", "| pixel | 82.5 | 29.0 |  | 1 |",
                 "| dVAE token | 82.8 | not run |  |  |", "(ablation.png)"):
        assert text in page
    pixels = np.asarray(Image.open(ablate.CHART).convert("RGB"))
    dark = (pixels == (0x58, 0x6e, 0xa0)).all(-1).sum(1).max()
    assert dark == pytest.approx(520 * 31 / 32, abs=2)      # HOG: mean 31, the largest seed 32
    (folder / ablate.PAGE).write_text("no markers")
    with pytest.raises(ValueError, match="ablation -->"):
        ablate.rebuild()
