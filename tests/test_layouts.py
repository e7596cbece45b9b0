"""layouts.py against small folders in each layout. Most files are empty: only names count."""
import json
import os
from fractions import Fraction

import numpy as np
import pytest
from test_video import write_video

import checkpoints
import data
import layouts


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names_of(samples, root):
    return [os.path.relpath(path, root) for path in samples.paths]


def test_layout_folders(tmp_path):
    touch(tmp_path, "train/b/2.MP4", "train/b/10.mov", "train/a/x y.webm", "train/b/notes.txt",
          "train/loose.mp4", "val/c/1.mkv", "train/a/._hidden.mp4")
    train, val = layouts.find_samples(tmp_path), layouts.find_samples(tmp_path, "val")
    assert names_of(train, tmp_path) == ["train/a/x y.webm", "train/b/10.mov", "train/b/2.MP4"]
    assert (train.kind, train.labels, train.classes) == ("video", [0, 1, 1], ["a", "b", "c"])
    assert sorted(os.path.basename(path) for path in train.ignored) == [
        "._hidden.mp4", "loose.mp4", "notes.txt"]
    assert val.labels == [2] and val.classes == train.classes


def test_layout_csv_with_odd_paths(tmp_path):
    away = tmp_path / "away" / "abs.mp4"
    touch(tmp_path, "set/a b.mp4", "set/bob's clip.mp4", 'set/say "hi" now.mp4', "set/c.mp4",
          "set/old.avi copy.mp4", "away/abs.mp4")
    (tmp_path / "set/train.csv").write_text(
        '"a b.mp4" 3\na b.mp4 4\nbob\'s clip.mp4 3\n"say ""hi"" now.mp4" 5\n'
        'say "hi" now.mp4 6\n\nc.mp4\nc.mp4 77 8\n'
        f'old.avi copy.mp4 2\n./../set/c.mp4 9\n{away} 1\nnot there.mp4 3\r\n', newline="")
    samples = layouts.find_samples(tmp_path / "set")
    assert names_of(samples, tmp_path / "set") == [
        "a b.mp4", "a b.mp4", "bob's clip.mp4", 'say "hi" now.mp4', 'say "hi" now.mp4', "c.mp4",
        "c.mp4", "old.avi copy.mp4", "c.mp4", "../away/abs.mp4"]
    assert samples.labels == [3, 4, 3, 5, 6, -1, 8, 2, 9, 1]
    assert samples.missing == [str(tmp_path / "set/not there.mp4")]
    with pytest.raises(ValueError, match="no val split"):
        layouts.find_samples(tmp_path / "set", "val")
    (tmp_path / "set/val.csv").write_text("c.mp4 1\nc.mp4,dog\n")
    with pytest.raises(ValueError, match="line 2"):
        layouts.find_samples(tmp_path / "set", "val")


def test_layout_official_kinetics_csv(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "kinetics_400_train.csv").write_text(
        header + '"riding, a bike",-a_b,5,15,train\nabseiling,xyz,0,10,train\n'
        "zumba,gone,1,11,train\n")
    (tmp_path / "validate.csv").write_text(header + "zumba,v1,100,110,validate\n")
    touch(tmp_path, "train/riding a bike/-a_b_000005_000015.mp4", "xyz.mkv",
          "val/v1_000100_000110.mp4")
    train, val = layouts.find_samples(tmp_path), layouts.find_samples(tmp_path, "val")
    assert names_of(train, tmp_path) == ["train/riding a bike/-a_b_000005_000015.mp4", "xyz.mkv"]
    assert train.classes == ["abseiling", "riding, a bike", "zumba"] == val.classes
    assert (train.labels, val.labels, train.missing) == ([1, 0], [2], ["gone_000001_000011"])


def test_layout_flat_and_fingerprint(tmp_path):
    touch(tmp_path, "one/deep/b.png", "one/a.jpg", "one/readme.md")
    samples = layouts.find_samples(tmp_path / "one")
    assert names_of(samples, tmp_path / "one") == ["a.jpg", "deep/b.png"]
    assert (samples.kind, samples.labels, samples.classes) == ("image", [-1, -1], [])
    os.rename(tmp_path / "one", tmp_path / "two")
    moved = layouts.find_samples(tmp_path / "two")
    assert layouts.fingerprint(moved) == layouts.fingerprint(samples)
    touch(tmp_path, "two/c.png")
    more = layouts.find_samples(tmp_path / "two")
    assert layouts.fingerprint(more) != layouts.fingerprint(samples)


def test_find_samples_errors_say_what_and_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        layouts.find_samples(tmp_path / "absent")
    touch(tmp_path, "flat/a.mp4", "empty/readme.txt", "mixed/a.mp4", "mixed/b.png",
          "mixed/c.png", "half/train/x/a.mp4")
    with pytest.raises(ValueError, match="(?s)no val split.*accepted layouts"):
        layouts.find_samples(tmp_path / "flat", "val")
    with pytest.raises(ValueError, match="no val split"):
        layouts.find_samples(tmp_path / "half", "val")
    with pytest.raises(ValueError, match="(?s)no sample.*empty.*accepted layouts"):
        layouts.find_samples(tmp_path / "empty")
    with pytest.raises(ValueError, match="1 videos and 2 images"):
        layouts.find_samples(tmp_path / "mixed")


def test_layout_kinetics_600_and_700(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "kinetics_600_train.csv").write_text(
        header + "testifying,---QUuC4vJs,84,94,train\nair drumming,b,0,10,train\n")
    (tmp_path / "kinetics700_2020_validate.csv").write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n\"air drumming\",c,104,114,validate,0\n")
    touch(tmp_path, "k600/train/---QUuC4vJs_000084_000094.mp4", "b_000000_000010.jpg",
          "any/b_000000_000010.mp4", "val/air drumming/c_000104_000114.mp4")
    train, val = layouts.find_samples(tmp_path), layouts.find_samples(tmp_path, "val")
    assert names_of(train, tmp_path) == [
        "k600/train/---QUuC4vJs_000084_000094.mp4", "any/b_000000_000010.mp4"]
    assert (train.labels, val.labels, val.classes) == ([1, 0], [0], ["air drumming", "testifying"])


# --------------------------------------------- Something-Something v2, ImageNet, limit per class


TEMPLATES = ["Holding [something]", "Moving [something] so that it falls",
             "Putting [something like it]"]


def write_something(root, prefix, **splits):
    """The labels json and one for each split, whose entries are (id, number of the template)."""
    names = {template.replace("[", "").replace("]", ""): str(k)
             for k, template in enumerate(TEMPLATES)}
    # In the file the order is another one than that of the numbers.
    (root / f"{prefix}labels.json").write_text(json.dumps(dict(reversed(names.items()))))
    for split, entries in splits.items():
        (root / f"{prefix}{split}.json").write_text(json.dumps([
            {"id": name, "label": "holding a cup", "template": TEMPLATES[k],
             "placeholders": ["a cup"]}
            for name, k in entries]))
    return list(names)


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_layout_something_something(tmp_path, prefix):
    train = [("78687", 2), ("42", 0), ("7", 1), ("100", 0)]
    classes = write_something(tmp_path, prefix, train=train, validation=[("5", 1)])
    # Release: a list of frames.
    (tmp_path / "train.csv").write_text("original_vido_id video_id frame_id path labels\n")
    touch(tmp_path, *(f"20bn-something-something-v2/{k}.webm" for k in (78687, 7, 5, 6)),
          "more/42.mp4")
    train, val = layouts.find_samples(tmp_path), layouts.find_samples(tmp_path, "val")
    assert [os.path.basename(path) for path in train.paths] == ["78687.webm", "42.mp4", "7.webm"]
    assert (train.labels, train.missing, train.kind) == ([2, 0, 1], ["100.webm"], "video")
    assert (names_of(val, tmp_path), val.labels) == (["20bn-something-something-v2/5.webm"], [1])
    assert train.classes == val.classes == classes


def test_something_something_errors(tmp_path):
    write_something(tmp_path, "", train=[("1", 0)])
    touch(tmp_path, "1.webm")
    with pytest.raises(ValueError, match="no val split"):
        layouts.find_samples(tmp_path, "val")
    rows = [{"id": "1", "template": "Juggling [something]"}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="id 1: the template 'Juggling something'"):
        layouts.find_samples(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({"Juggling something": "1"}))
    with pytest.raises(ValueError, match="from 0 without a gap"):
        layouts.find_samples(tmp_path)


def test_something_something_videos_are_read(tmp_path):
    write_something(tmp_path, "", train=[("11", 1)])
    write_video(tmp_path / "20bn-something-something-v2/11.webm", range(36), Fraction(1, 12),
                "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"})
    samples = layouts.find_samples(tmp_path)
    item = data.FinetuneDataset(samples, (24, 24), num_frames=8, segments=True)[0, 0]
    assert item["x"].shape == (1, 3, 8, 24, 24)
    assert item["label"] == 1 and not item["unreadable"]


def test_layout_imagenet(tmp_path):
    touch(tmp_path, "train/n01440764/n01440764_10026.JPEG", "train/n01443537/n01443537_2.JPEG",
          "val/n01443537/v_1.JPEG", "val/n01443537/synset.xml")
    train, val = layouts.find_samples(tmp_path), layouts.find_samples(tmp_path, "val")
    assert (train.kind, train.labels, val.labels) == ("image", [0, 1], [1])
    assert train.classes == val.classes == ["n01440764", "n01443537"]
    touch(tmp_path, "flat/train/n01440764/a.JPEG", "flat/val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ValueError, match="ILSVRC2012_val_00000001.*sort.*flat/val/n01440764/"):
        layouts.find_samples(tmp_path / "flat", "val")


def test_limit_per_class_is_drawn_by_the_seed_and_keeps_the_order(tmp_path):
    touch(tmp_path, *[f"train/a/{k:02}.png" for k in range(12)])
    touch(tmp_path, *[f"train/b/{k:02}.png" for k in range(3)])
    drawn = set()
    for seed in range(60):
        samples = layouts.find_samples(tmp_path, limit_per_class=4, seed=seed)
        assert samples.labels == [0] * 4 + [1] * 3 and samples.paths == sorted(samples.paths)
        drawn.update(samples.paths)
    assert len(drawn) == 12 + 3                          # each file has its turn
    assert samples == layouts.find_samples(tmp_path, limit_per_class=4, seed=59)
    everything = layouts.find_samples(tmp_path, limit_per_class=100)
    assert everything.paths == layouts.find_samples(tmp_path).paths
    (tmp_path / "train.csv").write_text("".join(f"train/a/{k:02}.png {k % 2}\n" for k in range(12)))
    assert sorted(layouts.find_samples(tmp_path, limit_per_class=1).labels) == [0, 1]
    with pytest.raises(ValueError, match="limit_per_class=-1"):
        layouts.find_samples(tmp_path, limit_per_class=-1)


# ------------------------------------------------------------------------ labels that could mislead

def test_a_class_of_one_split_is_refused(tmp_path):
    touch(tmp_path, "train/air drumming/1.png", "train/b/1.png", "val/air_drumming/2.png",
          "val/b/2.png")
    train, val = (layouts.find_labeled(tmp_path, split)[0] for split in ("train", "val"))
    with pytest.raises(ValueError, match="1 classes .*'air_drumming'.*nearest.*'air drumming'"):
        layouts.check_splits(train, val)
    (tmp_path / "val/air_drumming").rename(tmp_path / "val/air drumming")
    layouts.check_splits(*(layouts.find_labeled(tmp_path, split)[0] for split in ("train", "val")))


def test_one_class_under_two_spellings(tmp_path):
    """NFC and NFD, and spaces at the ends. Folders without media are named and left out."""
    touch(tmp_path, "train/caf\u00e9/1.png", "train/b/1.png", "val/cafe\u0301/2.png",
          "val/b /2.png", "train/__MACOSX/b/1.png", "train/new folder/readme.txt")
    (tmp_path / "train/empty").mkdir()
    train, val = (layouts.find_labeled(tmp_path, split)[0] for split in ("train", "val"))
    assert train.classes == val.classes == ["b", "caf\u00e9"]
    assert sorted(train.labels) == sorted(val.labels) == [0, 1]
    assert {os.path.basename(path) for path in train.ignored} == {
        "empty", "new folder", "readme.txt"}


def test_numbers_are_classes_by_their_value(tmp_path):
    """The same files by a list and by folders have the same labels, in any order of training."""
    touch(tmp_path, *[f"val/{k}/a.png" for k in range(12)])
    folders, names = layouts.find_labeled(tmp_path, "val")
    assert names == [str(k) for k in range(12)]
    assert [os.path.basename(os.path.dirname(path)) for path in folders.paths] == [
        names[label] for label in folders.labels]
    as_text = sorted(names)                              # 0, 1, 10, 11, 2: as it used to be
    again, _ = layouts.find_labeled(tmp_path, "val", classes=as_text)
    assert [as_text[label] for label in again.labels] == [names[i] for i in folders.labels]
    lines = "".join(f"val/{k}/a.png {k}\n" for k in range(12))
    (tmp_path / "val.csv").write_text(lines)
    for classes in (names, as_text):
        listed, _ = layouts.find_labeled(tmp_path, "val", classes=classes)
        assert [classes[label] for label in listed.labels] == [str(k) for k in range(12)]


def test_gaps_in_the_labels_of_a_list(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "train.csv").write_text("a.png 0\nb.png 20000\n")
    with pytest.raises(ValueError, match="to 20000 .*19999 gaps, first 1:.*--num-classes"):
        layouts.find_labeled(tmp_path, "train")
    assert len(layouts.find_labeled(tmp_path, "train", num_classes=30000)[1]) == 30000


@pytest.mark.parametrize("train, val", [("Train", "Val"), ("training", "validation"),
                                        ("train_256", "val_256")])
def test_other_names_of_the_splits(train, val, tmp_path):
    touch(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{val}/a/2.png", "test/a/3.png")
    assert [len(layouts.find_samples(tmp_path, split)) for split in ("train", "val")] == [2, 1]
    (tmp_path / "training_512").mkdir()
    with pytest.raises(ValueError, match="2 folders for train.*training_512"):
        layouts.find_samples(tmp_path)


@pytest.mark.parametrize("files, words", [
    ("training_set/a/1.png validate_videos/a/2.png", "validate_videos.* test"),
    ("clips/1.png holdout/2.png", "holdout"),
    ("videos/train/1.png videos/k400_val/2.png", "k400_val.*did you mean .*/videos?"),
    ("1.png train.txt", "train.txt is not read.*train.csv"),
    ("1.png annotations/k600_train_path.txt", "k600_train_path.txt is not read"),
    ("1.webm labels/train.json labels/validation.json", "train.json is not read.*labels.json")])
def test_files_for_a_test_are_not_trained_on(files, words, tmp_path):
    """In folders of names that are not known, or by a list that is not read."""
    touch(tmp_path, *files.split())
    with pytest.raises(ValueError, match=words):
        layouts.find_samples(tmp_path)


def test_a_name_of_many_digits_is_told_apart_at_once(tmp_path):
    """A form that splits digits in every way would never end."""
    touch(tmp_path, f"test{'1' * 100}x/a.png")
    assert len(layouts.find_samples(tmp_path)) == 1


def test_a_folder_of_class_folders_names_the_data_set_above(tmp_path):
    touch(tmp_path, "k400/train/training dog/1.mp4", "k400/train/crash tests/2.mp4",
          "k400/validate/training dog/3.mp4")
    assert layouts.find_samples(tmp_path / "k400/train").labels == [-1, -1]
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=r"did you mean \S+/k400\?"):
            layouts.find_labeled(tmp_path / "k400/train", split)
    assert len(layouts.find_samples(tmp_path / "k400", "val")) == 1


def test_paths_of_lists(tmp_path, monkeypatch):
    """From inside the folder, and through a link to it."""
    touch(tmp_path, "real/videos/x.png", "real/lists/none.txt", "other/y.png")
    (tmp_path / "data").symlink_to(tmp_path / "real/lists")
    (tmp_path / "real/lists/train.csv").write_text("../videos/x.png 0\n")
    assert len(layouts.find_samples(tmp_path / "data")) == 1
    monkeypatch.chdir(tmp_path / "other")
    (tmp_path / "other/train.csv").write_text("y.png 0\n")
    assert layouts.find_samples(".").paths == ["./y.png"]


def test_a_loop_of_links_is_walked_once(tmp_path):
    touch(tmp_path, "train/a/1.png", "train/a/2.png", "train/b/3.png")
    (tmp_path / "train/a/up").symlink_to(tmp_path / "train")
    assert len(layouts.find_samples(tmp_path)) == 3


def test_names_that_are_not_utf_8_are_kept(tmp_path):
    """By a list, a checkpoint and an npz."""
    name = os.fsdecode(b"caf\xe9")
    try:
        touch(tmp_path, f"{name}/{name}.png", "b/1.png")
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    (tmp_path / "train.csv").write_bytes(b"caf\xe9/caf\xe9.png 0\nb/1.png 1\n")
    assert layouts.find_samples(tmp_path).paths[0] == str(tmp_path / name / f"{name}.png")
    checkpoints.save_checkpoint(str(tmp_path / "last.pt"), {"classes": [name]})
    assert checkpoints.read_checkpoint(str(tmp_path / "last.pt"))["classes"] == [name]
    np.savez(tmp_path / "x.npz", classes=np.array([name]))
    assert np.load(tmp_path / "x.npz")["classes"].tolist() == [name]


def test_lists_of_other_encodings_and_broken_ones(tmp_path):
    touch(tmp_path, "\u00e4.png", "b.png")
    (tmp_path / "train.csv").write_text("\u00e4.png 0\r\nb.png 1\r\n", encoding="utf-16")
    assert layouts.find_samples(tmp_path).labels == [0, 1]
    touch(tmp_path, "k/annotations/none", "k/abc.mp4", "s/labels/none", "s/1.webm")
    header, row = "label,youtube_id,time_start,time_end,split", "x,abc,{},9,train"
    for text in (header, ",".join(f'"{word}"' for word in header.split(","))):
        (tmp_path / "k/annotations/train.csv").write_text(f"{text}\n{row.format(1)}\n")
        assert layouts.find_samples(tmp_path / "k").classes == ["x"]
    (tmp_path / "k/annotations/train.csv").write_text(f"{header}\n{row.format('0:01')}\n")
    with pytest.raises(ValueError, match="train.csv, line 2: .*'0:01'"):
        layouts.find_samples(tmp_path / "k")
    (tmp_path / "s/labels/labels.json").write_text('{"x": "0"}', encoding="utf-8-sig")
    (tmp_path / "s/labels/train.json").write_text('[{"id": "1", "template": "[x]"}]')
    assert layouts.find_samples(tmp_path / "s").labels == [0]
    for text, words in (('[{"id": "1"}]', "train.json, entry 0: .*template"), ("[", "no JSON")):
        (tmp_path / "s/labels/train.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            layouts.find_samples(tmp_path / "s")
