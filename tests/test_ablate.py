"""tools/ablate.py: rows that the scripts accept, runs that are continued, tables."""
import json
import shlex
import shutil
import sys

import engine

import pytest
import runs
from conftest import ROOT
from PIL import Image

import checkpoints
import finetune
import pretrain
from tools import ablate

PAGE = "before\n<!-- ablation -->\nold\n<!-- /ablation -->\nafter\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The scripts, a page and no results."""
    for name in ("pretrain.py", "finetune.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, text in ((ablate.PAGE, PAGE), (ablate.RESULTS, "")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["ablate", *flags])
    ablate.main()


@pytest.mark.parametrize("name", ablate.ROWS)
def test_full_size_commands_are_what_the_scripts_accept(name):
    kind, flags = ablate.ROWS[name]
    *before, fine = ablate.commands(name, 0, "data", full=True)
    assert len(before) == (flags is not None)
    _, recipe, overrides = engine.parse_recipe(finetune.RECIPES, "", shlex.split(fine)[3:])
    finetune.check(recipe, overrides)
    assert recipe.model == ("vit_b" if kind == "image" else "mvitv2_s")
    assert bool(recipe.init) == bool(before) and recipe.limit_per_class == 0
    if before:
        assert recipe.epochs * recipe.repeats == {"image": 100, "video": 200}[kind]
    for command in before:
        _, recipe, _ = engine.parse_recipe(pretrain.RECIPES, "", shlex.split(command)[3:])
        pretrain.check(recipe)
        assert recipe.epochs == 300 and f"--init {recipe.out}/last.pt" in fine
        default = pretrain.RECIPES[ablate.FULL[kind][0].split()[1]]
        changed = [key for key in ("target", "mask", "norm", "color", "bins", "cell")
                   if getattr(recipe, key) != getattr(default, key)]
        assert len(changed) == (name not in ("hog", "video-hog")), changed


@pytest.mark.slow
def test_rows_run_once(folder, monkeypatch):
    """A row that is done is not run again. A stopped one adds no line."""
    for split, count in (("train", 64), ("val", 2)):
        for name in ("dark", "light"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                path = folder / "images" / split / name / f"{i}.png"
                Image.effect_noise((64, 64), 60).convert("RGB").save(path)
    short = [flags.replace("--epochs 20", "--epochs 1").replace("--epochs 30", "--epochs 1")
             for flags in ablate.SMALL["image"]]
    monkeypatch.setitem(ablate.SMALL, "image", short)
    flags = ["--data", "images", "--rows", "scratch", "hog-none"]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="stopped"):
        patch.setattr(ablate.os, "system", lambda command: 2)
        run(patch, *flags)
    assert (folder / ablate.RESULTS).read_text() == ""

    def system(command):
        python, script, *arguments = shlex.split(command)
        assert python == sys.executable
        return runs.run(script, *arguments).returncode
    monkeypatch.setattr(ablate.os, "system", system)
    run(monkeypatch, *flags)
    lines = [json.loads(text) for text in (folder / ablate.RESULTS).read_text().splitlines()]
    assert [one["row"] for one in lines] == ["scratch", "hog-none"] and lines[0]["files"] == 4
    checkpoint = checkpoints.read_checkpoint("out/ablate/hog-none/pretrain/last.pt")
    assert checkpoint["recipe"]["norm"] == "none" and checkpoint["recipe"]["epochs"] == 1
    shutil.rmtree(folder / "images")
    run(monkeypatch, *flags)                                  # nothing is left to do


def test_tables(folder, monkeypatch):
    """Other data and other flags are never mixed. One row is no comparison."""
    for row, top1, data, flags in (("scratch", 0.26, "tiny", ""), ("scratch", 0.28, "tiny", ""),
                                   ("hog", 0.3, "tiny", ""), ("hog", 0.99, "tiny", "other"),
                                   ("hog", 0.98, "other", "")):
        line = {"row": row, "top1": top1, "data": data, "flags": flags}
        with open(ablate.RESULTS, "a") as file:
            file.write(json.dumps(line) + "\n")
    run(monkeypatch)
    page = (folder / ablate.PAGE).read_text()
    run(monkeypatch)
    assert (folder / ablate.PAGE).read_text() == page and "old" not in page
    assert page.startswith("before\n<!-- ablation") and page.endswith("/ablation -->\nafter\n")
    for text in ("| scratch | 81.8 | 27.0 | 26.00, 28.00 |", "| HOG | 83.6 | 30.0 | 30.00 |",
                 "\nNot run: pixel (82.5), dVAE token (82.8), "):
        assert text in page
    assert page.count("Ours") == 1 and "99" not in page and "Table 8" not in page
    committed = [json.loads(text) for text in (ROOT / ablate.RESULTS).read_text().splitlines()]
    assert ablate.markdown(committed) in (ROOT / ablate.PAGE).read_text()
