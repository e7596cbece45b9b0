"""Faulty and hostile input, kind by kind: each is one line that names the file, soon and before
anything is built."""
import argparse
import json
import time

import engine

import numpy as np
import pytest
import runs
import torch
from PIL import Image

import ava
import convert
import layouts
import models
import pretrain
import vit

# --------------------------------------------------------------------------- checkpoints that lie


class Options(argparse.Namespace):
    """A class that no file may make."""


def laughs():
    """Nested lists of 2**60 texts, in a file of a few hundred bytes."""
    value = "ha"
    for _ in range(60):
        value = [value, value]
    return value


@pytest.fixture(scope="module", autouse=True)
def small():
    """A ViT of fewer numbers, since each test writes one and each script reads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "vit_tiny", lambda **kw: vit.ViT(16, 2, 2, **kw))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        path = folder / ("train" if i < 4 else "val") / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 9 * i, np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def trained(images):
    """(flags, content of last.pt) of a pre-training before its first step."""
    flags = ["--data", images, "--model", "vit_tiny", "--image-size", 32, "--batch-size", 4,
             "--epochs", 1, "--workers", 0]
    recipe = engine.parse_recipe(pretrain.RECIPES, "", map(str, flags))[1]
    model = models.build_maskfeat(vars(recipe))
    data = layouts.fingerprint(layouts.find_samples(images))
    return flags, {"model": model.state_dict(), "scaler": {}, "step": 0, "skipped": 0, "data": data,
                   "optimizer": engine.make_optimizer(model, recipe).state_dict(),
                   "recipe": vars(recipe)}


LIES = {  # what is changed in the recipe, the checkpoint or the weights, and a word of the error
    "huge": ({"image_size": (10 ** 6, 10 ** 6)}, {}, {}, "image_size"),
    "tokens": ({"image_size": (4096, 4096), "patch_size": 1}, {}, {}, "tokens"),
    "bins": ({"bins": 10 ** 18}, {}, {}, "bins"),
    "cell": ({"cell": 0}, {}, {}, "cell=0"),
    "length": ({"std": (1.0,)}, {}, {}, "std"),
    "nan": ({"mean": (0.5, 0.5, float("nan"))}, {}, {}, "mean"),
    "text": ({}, {"recipe": "vit_tiny"}, {}, "type str"),
    "options": ({}, {"recipe": argparse.Namespace(model="vit_tiny")}, {}, "type Namespace"),
    "class": ({}, {"args": Options(a=1)}, {}, "Options"),
    "no weights": ({}, {"model": [1]}, {}, "model"),
    "laughs": ({"norm": laughs()}, {}, {}, "norm"),
    "names": ({}, {"classes": laughs()}, {}, "class names"),
    "table": ({}, {}, {"encoder.pos_embed": torch.zeros(1, 26, 16)}, "encoder.pos_embed"),
    "rows": ({}, {}, {"encoder.pos_embed": torch.zeros(1).expand(1, 10 ** 9, 16)}, "pos_embed"),
}
READERS = {
    "pretrain": lambda path, flags: [*flags, "--out", path.parent, "--resume"],
    "finetune": lambda path, flags: [*flags, "--init", path, "--out", path.parent / "new"],
    "evaluate": lambda path, flags: [path, "--features", path.parent / "a.npz"],
    "visualize": lambda path, flags: ["--checkpoint", path, "--input", path],
    "convert": lambda path, flags: [path, path.parent / "b.pt"],
    "ava": lambda path, flags: ["--eval", path],
}


@pytest.mark.parametrize("lie", LIES)
def test_checkpoints_that_lie(lie, trained, tmp_path, monkeypatch, capsys):
    recipe, more, weights, word = LIES[lie]
    flags, honest = trained
    path = tmp_path / "last.pt"
    torch.save({**honest, "model": {**honest["model"], **weights}, "optimizer": {},
                "recipe": {**honest["recipe"], **recipe}, **more}, path)
    for script, arguments in READERS.items():
        if lie in ("table", "rows") and script in ("convert", "ava"):
            continue                                          # these build nothing of it
        error = runs.refusal(monkeypatch, capsys, script, *arguments(path, flags))
        assert word in error and "last.pt" in error and len(error) < 500, (script, error)
    (tmp_path / "last.pt").unlink()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("change, words", [
    ({"step": "3"}, "step"), ({"scaler": None}, "scaler"), ({"skipped": laughs()}, "skipped"),
    ({"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, "optimizer"),
    ({"data": "0" * 16}, "restore the old"), ({}, "Leave these flags out")])
def test_runs_that_cannot_go_on(change, words, trained, tmp_path, monkeypatch, capsys):
    torch.save({**trained[1], **change}, tmp_path / "last.pt")
    flags = [*trained[0], "--out", tmp_path, "--resume"] + ["--lr", 1] * (not change)
    error = runs.refusal(monkeypatch, capsys, "pretrain", *flags)
    assert words in error and "last.pt" in error


@pytest.mark.parametrize("content, words", [
    (b"", "empty"), (b"<!DOCTYPE html><html>", "web page"), (b"PK\3\4 cut", "zip"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
    (b"lr: 0.1\n", "a text"), (b"\x89PNG\r\n\x1a\n\0\0", "another kind")])
def test_files_that_are_no_checkpoint(content, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.pt").write_bytes(content)
    error = runs.refusal(monkeypatch, capsys, "convert", tmp_path / "a.pt", tmp_path / "b.pt")
    assert words in error and "a.pt" in error and "torch.load" not in error and len(error) < 300


# -------------------------------------------------------------------------------- text and tables

@pytest.mark.parametrize("text", [
    'name: "' * 13_000, 'name: "" ' * 11_000, 'name: "a" label_id: ' * 5_000, "item {" * 16_000,
    "a.mp4 " * 16_000 + "x", '"' * 99_999, "MEAN: " * 16_000 + "[ " * 50_000,
    "MEAN:" + " 1." * 30_000, "SAMPLING_RATE: " + "9" * 400, "[" * 100_000])
def test_long_text_is_read_in_linear_time(text, tmp_path):
    """100 kB of anything: quadratic steps would take 30 seconds."""
    path, start = tmp_path / "train.csv", time.perf_counter()
    path.write_text(text)
    for read in (ava.read_label_map, layouts._read_json,
                 lambda path: layouts._read_path_table(tmp_path, {"train": str(path)}, "train")):
        with pytest.raises(ValueError, match="train.csv"):
            read(path)
    state = {"cls_token": torch.zeros(1, 1, 128), "pos_embed": torch.zeros(1, 17, 128),
             "patch_embed.proj.weight": torch.zeros(128, 3, 8, 8),
             **{f"blocks.{i}.attn.qkv.weight": torch.zeros(384, 128) for i in range(6)}}
    recipe = convert.foreign_recipe({"model": state, "cfg": text})
    assert recipe["std"] == convert.IMAGENET[1] and recipe["sampling_rate"] < 10 ** 9
    assert "cfg" not in convert.foreign_recipe({"model": state, "cfg": laughs()})
    assert time.perf_counter() - start < 3


BOX = "movie,0902,0.1,0.2,0.3,0.4,1,"


@pytest.mark.parametrize("name, text, words", [
    ("ava_action_list_v2.2_for_activitynet_2019.pbtxt", 'item {\n name: "a"\n id: 1\n}\n'
     'item {\n name: "b"\n id: 1\n}\n', "line 7: 'id: 1'"),
    ("ava_action_list_v2.2_for_activitynet_2019.pbtxt", 'name: "a" id: 81', "from 1 to 80"),
    ("ava_action_list_v2.2_for_activitynet_2019.pbtxt", "name: a id: 1", "0 of 1"),
    ("ava_val_excluded_timestamps_v2.2.csv", "video,second\nmovie,0902\n", "line 1"),
    ("ava_val_excluded_timestamps_v2.2.csv", "movie,0902\nmovie\n", "line 2"),
    ("ava_val_v2.2.csv", f"{BOX}0\n{BOX.replace('0.3', 'wide')}0\n", "line 2"),
    ("ava_val_v2.2.csv", f"{BOX}0\n{BOX.replace('0.3', 'nan')}0\n", "line 2"),
    ("ava_val_v2.2.csv", f"{BOX}0\ncaf\xe9,0902\n", "line 2 is not UTF-8"),
    ("ava_val_predicted_boxes.csv", f"{BOX}0.9\ncaf\xe9\n", "line 2 is not UTF-8"),
    ("frame_lists/train.csv", "", "no frames"),
    ("frame_lists/train.csv", "header\nmovie 0 0 a.jpg\nmovie 0\n", "line 3"),
    ("frame_lists/val.csv", "header\ncaf\xe9 0 0 a.jpg", "line 2 is not UTF-8")])
def test_ava_tables(name, text, words, tmp_path, monkeypatch, capsys):
    """Refused before the training, with file and line."""
    (tmp_path / "frame_lists").mkdir()
    header = "original_vido_id video_id frame_id path labels\nmovie 0 0 a.jpg\n"
    for path, content in {"frame_lists/train.csv": header, "frame_lists/val.csv": header,
                          "ava_train_v2.2.csv": f"{BOX}0\n", "ava_val_v2.2.csv": f"{BOX}0\n",
                          "ava_val_predicted_boxes.csv": f"{BOX}0.9\n",
                          "ava_action_list_v2.2_for_activitynet_2019.pbtxt": 'name: "a" id: 1',
                          name: text}.items():
        (tmp_path / path).write_text(content, encoding="latin-1")
    flags = ["--data", tmp_path, "--out", tmp_path / "out", "--init", "", "--workers", 0]
    error = runs.refusal(monkeypatch, capsys, "ava", *flags)
    assert words in error and name in error and not (tmp_path / "out").exists()


def test_a_movie_that_begins_late(tmp_path):
    with pytest.raises(ava.UnreadableFile, match="second 902: .*begins after.*--movie-start 950"):
        ava.read_clip("a.mp4", ava.KeyFrame("a", 902, None, None), 4, 2, 950.0, 32, str(tmp_path))


# ----------------------------------------------------------------------------------- command line

@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "99999999999"])
@pytest.mark.parametrize("script, flags", [
    ("pretrain", "lr epochs batch-size image-size num-frames bins cell label-classes std"),
    ("finetune", "lr epochs repeats clips seeds crop-ratio device-batch patch-size"),
    ("ava", "lr lr-batch sampling-rate log-every num-frames"),
    ("evaluate", "clips device-batch num-frames image-size"),
    ("tools.flops", "image-size frames"), ("tools.bench", "rounds batch"),
    ("tools.peers", "rounds"), ("data", "workers")])
def test_numbers_out_of_range(script, flags, value, monkeypatch, capsys):
    needed = {"evaluate": ["nothing.pt"], "data": ["--check", "nowhere"]}.get(script, [])
    for flag in flags.split():
        if flag == "image-size" and script == "evaluate" and value != "nan":
            continue                                          # known after the checkpoint is read
        if flag == "lr" and value.startswith("9"):
            continue
        error = runs.refusal(monkeypatch, capsys, script, *needed, f"--{flag}", value)
        assert value.lstrip("-") in error and (flag in error or flag.replace("-", "_") in error)


def test_the_launcher_repeats_the_line(tmp_path, monkeypatch, capsys):
    """`torchrun` prints what the error file says at the end of its report."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    error = runs.refusal(monkeypatch, capsys, "pretrain", "--data", "/nowhere")
    stored = json.loads((tmp_path / "error.json").read_text())["message"]
    assert stored["message"] == " ".join(error.split())
    assert abs(int(stored["extraInfo"]["timestamp"]) - time.time()) < 60


def test_a_folder_of_something_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").touch()
    assert "something else" in runs.refusal(monkeypatch, capsys, "tools.synthetic", tmp_path)
