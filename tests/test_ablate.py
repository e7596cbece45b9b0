"""ablate.py: rows that pretrain.py and finetune.py accept, runs that go on where they stopped, table and chart."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import ablate
import finetune
import pretrain
import runs
from engine import parse_recipe
from layouts import Samples

SHORT = ["--pretrain-epochs", 1, "--finetune-epochs", 1, "--labels", 4, "--seeds", 0]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """128 training images, the batch of the small pre-training, and 4 to validate, of two classes."""
    folder, rng = tmp_path_factory.mktemp("ablate") / "images", np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 2)):
        for name in ("dark", "light"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (64, 64, 3), np.uint8) + np.uint8(127 * (name == "light"))
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def run(cwd, *flags):
    return subprocess.run(runs.command("ablate.py", *flags), cwd=cwd, env=runs.ENV, capture_output=True, text=True,
                          timeout=300)


@pytest.fixture
def main(monkeypatch, capsys):
    """ablate.main in this process, for what trains nothing. main(cwd, *flags) -> what it prints."""
    def call(cwd, *flags):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, flags)])
        monkeypatch.setattr(ablate, "StopSignal", lambda: None)
        ablate.main()
        return capsys.readouterr().out

    return call


def lines_of(cwd):
    return ablate.read_lines(cwd / "results/ablation.jsonl")


def line(row, seed, top1, epochs=30, pretrain_epochs=20, labels=50, teacher=None):
    scratch = ablate.ROWS[row][1] is None
    return {"table": [], "row": row, "teacher": teacher, "seed": seed, "data": "tiny-01234567", "labels": labels,
            "pretrain_data": None if scratch else "tiny-01234567",
            "pretrain_epochs": None if scratch else pretrain_epochs, "epochs": epochs, "flags": "--model vit_tiny",
            "amp": "auto", "top1": top1, "top5": 1.0, "files": 100}


# ---------------------------------------------------------------------------------------------------------------- rows

def options(command):
    return shlex.split(command)[3:]                                           # without torchrun, processes, script


def test_full_scale_commands_are_what_the_scripts_accept():
    """Each parses, passes the scripts' own checks, and says what the table says of its row."""
    for name, (kind, flags) in ablate.ROWS.items():
        *before, fine = ablate.full_scale(name)
        assert len(before) == (flags is not None)
        _, recipe, given = parse_recipe(finetune.RECIPES, "", options(fine))
        finetune.check(recipe, given)
        assert recipe.model == ("vit_b" if kind == "image" else "mvitv2_s")
        assert bool(recipe.init) == bool(before)
        for command in before:
            _, recipe, _ = parse_recipe(pretrain.RECIPES, "", options(command))
            pretrain.check(recipe, Samples(kind, ["x"], [0], []))
            assert recipe.epochs == 300 and f"--init {recipe.out}/last.pt" in fine
            assert recipe.target == (name.removeprefix("video-") if recipe.teacher or "pixel" in name else "hog")
            default = pretrain.RECIPES[ablate.FULL[kind][1]]
            changed = [key for key in ("target", "mask", "norm", "color", "bins", "cell")
                       if getattr(recipe, key) != getattr(default, key)]
            assert len(changed) == (name not in ("hog", "video-hog")), (name, changed)


def test_rows_of_a_name_are_one_run():
    """The default stands in several tables and in all parts of Table 8: with the same flags everywhere."""
    for _, kind, rows in ablate.TABLES.values():
        for name, _, paper, flags in rows:
            assert ablate.ROWS[name] == (kind, flags)
            assert paper == {"hog": 83.6, "video-hog": 82.2}.get(name, paper)
    assert len([row for row in ablate.TABLES["8"][2] if row[0] == "hog"]) == 4


def test_list_and_dry_run_nothing(main, images, tmp_path):
    listed = main(tmp_path, "--list")
    for name in ablate.ROWS:
        assert f"\n{name} (paper: " in "\n" + listed and ablate.full_scale(name)[-1] in listed
    assert "none: a cell of 16 pixels" in listed
    printed = main(tmp_path, "--data", images, "--rows", "dino", "--labels", 0, 50, "--seeds", 3, 4, "--dry")
    commands = [shlex.split(text)[1:] for text in printed.splitlines() if "--data" in text]
    assert [os.path.basename(c[0]) for c in commands] == ["pretrain.py"] * 2 + ["finetune.py"] * 4
    out = commands[0][commands[0].index("--out") + 1]                         # the teacher is what hog leaves
    assert commands[1][commands[1].index("--teacher") + 1] == os.path.join(out, "last.pt") and "/hog/" in out
    assert [(c[c.index("--limit-per-class") + 1], c[c.index("--seed") + 1]) for c in commands[2:]] == [
        ("0", "3"), ("0", "4"), ("50", "3"), ("50", "4")]
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("finished")
    done = run(cwd, "--data", images, "--rows", "scratch", "hog-none", *SHORT)
    assert done.returncode == 0, done.stderr
    return cwd, done


def test_run(finished, images):
    cwd, _ = finished
    scratch, none = lines_of(cwd)
    assert (scratch["row"], none["row"]) == ("scratch", "hog-none")
    assert scratch["table"] == ["2"] and none["table"] == ["8"]
    assert scratch["pretrain_epochs"] is None and none["pretrain_epochs"] == 1 and none["epochs"] == 1
    assert all(found["data"].startswith("images-") and found["labels"] == 4 and found["files"] == 4
               and found["seconds"] > 0 for found in (scratch, none))
    assert 0 < none["pretrain_seconds"] < 100
    checkpoint = runs.read_checkpoint(cwd / "out/ablate/hog-none/pretrain-1-auto/last.pt")
    assert checkpoint["recipe"]["norm"] == "none" and checkpoint["recipe"]["batch_size"] == 128
    for found, init in ((scratch, ""), (none, "pretrain-1-auto/last.pt")):
        folder = next((cwd / "out/ablate" / found["row"]).glob("finetune-*"))
        recipe = runs.read_checkpoint(folder / "last.pt")["recipe"]
        assert recipe["init"].endswith(init) and bool(recipe["init"]) == bool(init)
        assert recipe["limit_per_class"] == 4 and recipe["mixup"] == 0 and recipe["rand_augment"] == ""
        assert found["top1"] == json.load(open(folder / "last_1x1.json"))["top1"]


def test_finished_runs_are_skipped_and_other_budgets_are_not(main, finished, images):
    cwd, _ = finished
    before = lines_of(cwd)
    stamps = {path: path.stat().st_mtime_ns for path in cwd.rglob("*") if path.is_file()}
    assert main(cwd, "--data", images, "--rows", "hog-none", "scratch", *SHORT).count(": 0 fine-tunings to run") == 2
    assert lines_of(cwd) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in cwd.rglob("*") if path.is_file()}
    printed = main(cwd, "--data", images, "--rows", "scratch", *SHORT, "--finetune-epochs", 2, "--dry")
    assert "scratch: 1 fine-tunings to run" in printed and "finetune-2-" in printed
    printed = main(cwd, "--data", images, "--rows", "scratch", "hog-none", *SHORT, "--pretrain-epochs", 2, "--dry")
    assert "scratch: 0 fine-tunings" in printed and "hog-none: 1 fine-tunings" in printed


def test_stopped_and_gone_on(images, tmp_path):
    """SIGTERM reaches the training, which saves its step; the same command ends it and notes it once."""
    flags = ["--data", images, "--rows", "scratch", *SHORT, "--labels", 60, "--finetune-epochs", 3]
    process = subprocess.Popen(runs.command("ablate.py", *flags), cwd=tmp_path, env=runs.ENV, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "out/ablate/scratch/finetune-3-auto-60-seed0/log.jsonl"
    for _ in range(1200):
        if log.exists() and log.read_text().count("\n") > 3:
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM after step" in output and not lines_of(tmp_path)
    stopped_at = runs.read_checkpoint(log.parent / "last.pt")["step"]
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert f"at step {stopped_at}" in done.stdout + done.stderr
    steps = 3 * (120 // 4)                                                    # batches of at most 1/16 of the data
    assert stopped_at < runs.read_checkpoint(log.parent / "last.pt")["step"] == steps
    assert [found["row"] for found in lines_of(tmp_path)] == ["scratch"]


def test_refusals(main, images, tmp_path):
    def refused(*flags):
        with pytest.raises((ValueError, OSError)) as error:
            main(tmp_path, *flags)
        return str(error.value)

    data = ["--data", images, "--rows"]
    assert "no row hogg for images" in refused(*data, "hogg") and "hog-none" in refused(*data, "hogg")
    assert "no row tube for images" in refused(*data, "tube")
    assert "row dvae needs --teacher" in refused(*data, "hog", "dvae")
    assert "cell of 16 pixels" in refused(*data, "hog-cell-16")
    assert "no such file" in refused(*data, "dino", "--teacher", "none.pth")
    assert "none of these rows has a teacher" in refused(*data, "hog", "--teacher", images)
    assert "no data folder" in refused("--data", tmp_path / "none", "--rows", "hog")
    assert "epochs=0 is not positive" in refused(*data, "hog", "--pretrain-epochs", 0)
    assert "--labels -1 is negative" in refused(*data, "hog", "--labels", -1)
    assert "--data" in refused("--rows", "hog")
    assert "run some" in refused("--table")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/ablation.jsonl").write_text(json.dumps(line("hog", 0, 0.3)) + '\n{"row": ')
    assert "line 2 is no JSON" in refused("--table")
    assert sorted(os.listdir(tmp_path)) == ["results"]


# --------------------------------------------------------------------------------------------------------------- table

LINES = [line("scratch", 0, 0.26), line("scratch", 1, 0.27), line("scratch", 2, 0.28), line("hog", 0, 0.30),
         line("hog", 1, 0.32), line("pixel", 0, 0.29),
         line("dino", 0, 0.31, teacher="vit_tiny pre-trained here on HOG"), line("dino", 0, 0.33, teacher="x.pth"),
         line("hog", 0, 0.99, pretrain_epochs=1), line("hog", 0, 0.98, labels=0), line("scratch", 0, 0.97, epochs=1)]


def test_table_never_mixes_budgets_or_teachers():
    (number, budget, entries), (other, short, few) = ablate.grouped(LINES)
    assert number == other == "2" and (budget["pretrain_epochs"], short["pretrain_epochs"]) == (20, 1)
    ours = {label: values for _, label, _, values in entries}
    assert ours["scratch"] == pytest.approx([26, 27, 28]) and ours["HOG"] == pytest.approx([30, 32])
    assert ours["DINO ViT-B (teacher: vit_tiny pre-trained here on HOG)"] == pytest.approx([31])
    assert ours["DINO ViT-B (teacher: x.pth)"] == pytest.approx([33]) and ours["dVAE token"] == []
    short = {label: values for _, label, _, values in few if values}
    assert short == {"scratch": pytest.approx([26, 27, 28]), "HOG": pytest.approx([99])}   # the same fine-tuning
    assert ablate.grouped(LINES[:3]) == []                                    # one row is no comparison


def test_rebuild(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LINES[:7]))
    for text in ("no markers\n", "<!-- /ablation -->\n<!-- ablation -->\n"):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(ValueError, match="README.md needs the lines"):
            ablate.rebuild("lines.jsonl")
        assert (tmp_path / "README.md").read_text() == text and not (tmp_path / "docs").exists()
    (tmp_path / "README.md").write_text("before\n<!-- ablation -->\nold\n<!-- /ablation -->\nafter\n")
    ablate.rebuild("lines.jsonl")
    once = (tmp_path / "README.md").read_text()
    ablate.rebuild("lines.jsonl")
    assert (tmp_path / "README.md").read_text() == once
    assert once.startswith("before\n<!-- ablation -->\n") and once.endswith("<!-- /ablation -->\nafter\n")
    assert "old" not in once
    rows = [text.split(" | ") for text in once.splitlines() if text.startswith("| ")][1:]
    assert [row[0][2:].split(" (")[0] for row in rows] == [row[1] for row in ablate.TABLES["2"][2]]    # same order
    assert "| scratch | 81.8 | 27.0 | 1.0 | 3 |" in once and "| HOG | 83.6 | 31.0 | 1.4 | 2 |" in once
    assert "| pixel | 82.5 | 29.0 |  | 1 |" in once and "| dVAE token | 82.8 | not run |  |  |" in once
    assert "50 labels a class" in once and "(docs/ablation.png)" in once


def test_chart_bars_are_as_long_as_the_means(tmp_path):
    groups = ablate.grouped(LINES[:7])
    ablate.draw(groups, str(tmp_path / "docs/chart.png"))
    with Image.open(tmp_path / "docs/chart.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    bars = []
    for y in range(len(pixels)):                                              # rows of pixels above the dots
        bar = (pixels[y] == (0xb0, 0xc0, 0xde)).all(-1) | (pixels[y] == (0x58, 0x6e, 0xa0)).all(-1)
        dark = (pixels[y] == (0x58, 0x6e, 0xa0)).all(-1).any()
        if bar.any() and not (y and bars and bars[-1][0] >= y - 16):
            bars.append((y, bar.sum(), dark))
    means = [27, 29, 31, 31]                                                  # scratch, pixel, HOG, DINO
    assert [dark for *_, dark in bars] == [False, False, True, False]
    np.testing.assert_allclose([width for _, width, _ in bars], [520 * mean / 32 for mean in means], atol=2)
    assert (pixels == (0xc8, 0x3c, 0x28)).all(-1).any(0).nonzero()[0].max() == pytest.approx(360 + 520, abs=4)
