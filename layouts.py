"""Finding the files of a data set: class folders, csv lists, Kinetics, Something-Something v2.

Release: SlowFast's Kinetics and ImageNet loaders read the same. Its SSv2 loader needs extracted
frames, where the official json files and videos do here. Uses only the standard library.
"""

import contextlib
import csv
import difflib
import hashlib
import io
import json
import os
import random
import re
import unicodedata
from dataclasses import dataclass, field, replace

VIDEO = ("mp4", "webm", "mkv", "avi", "mov", "m4v", "mpg", "mpeg", "ts", "flv")
IMAGE = ("jpg", "jpeg", "png", "bmp", "webp")
SSV2 = "(something-something-v2-)?"  # the official json files may start with it
VAL = "val(id(ate|ation)?)?"
HELD_OUT = rf"(\w+[-_])?({VAL}|test(ing)?|eval(uation)?|dev|(held|hold)[-_]?out)" \
           r"([-_ ]?(set|split|data|videos?|images?|clips|frames|\d+(?!\d)p?))*"  # folders
LIST = rf"([\w-]+[-_])?(train(ing)?|{VAL}|test)(list)?\d*([-_][\w-]*)?\.(csv|txt|tsv|json)"

LAYOUTS = """accepted layouts:
  DIR/train/<class>/* and DIR/val/<class>/*   videos or images (ImageNet: train/n01440764/*.JPEG)
  DIR/train.csv and DIR/val.csv   a line is: path label (or: path, or: path ignored label)
  the same files as Kinetics has them, with the header label,youtube_id,time_start,time_end,split
  Something-Something v2: labels.json, train.json and validation.json, <id>.webm below DIR
  (lists may lie in DIR/annotations or DIR/labels, and a folder train be called training, train_256)
  a folder of unlabeled files, searched recursively (pre-training only)"""


class MissingSplit(ValueError):
    """A data set that has no such split."""


@dataclass(frozen=True)
class Samples:
    """The files of one split. All videos or all images."""
    kind: str                                    # "video" or "image"
    paths: list
    labels: list                                 # int per path, -1 = unlabeled
    classes: list                                # names by label, empty if there are none
    ignored: list = field(default_factory=list)  # files that are no media, or in no class
    missing: list = field(default_factory=list)  # files that a list names but that are not there
    root: str = ""

    def __len__(self):
        return len(self.paths)


def fingerprint(samples):
    """16 hex digits of the relative names and labels. A resumed run compares them."""
    digest = hashlib.sha256()
    for path, label in zip(samples.paths, samples.labels):
        line = f"{os.path.relpath(path, samples.root or '.')}\0{label}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def media_kind(path):
    """"video", "image" or None, by the ending in any letter case. Hidden files are no media."""
    name = os.path.basename(path).lower()
    ending = name.rpartition(".")[2]
    if name.startswith("."):
        return None
    return "video" if ending in VIDEO else "image" if ending in IMAGE else None


def find_samples(root, split="train", limit_per_class=0, seed=0):
    """Lists the media files of one split in a fixed order: that of the list, or sorted.

    root: folder in one of LAYOUTS. SSv2's json goes before a csv, a csv before folders.
    split: "train" or "val". limit_per_class: keep that many files of each class, drawn by the seed,
    0 keeps all.
    Returns Samples. Labels index `classes`, which are the same for both splits.
    Raises FileNotFoundError without such a folder, ValueError if it has no sample, mixes kinds, or
    if files without a split seem to be partly for a test.
    """
    root = os.fspath(root)
    if split not in ("train", "val"):
        raise ValueError(f'split is "train" or "val", not {split!r}')
    if limit_per_class < 0:
        raise ValueError(f"limit_per_class={limit_per_class}: use a number of files, or 0 for all")
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no data folder {root}\n{LAYOUTS}")
    tables = {name: _find_table(root, name) for name in ("train", "val")}
    folders = {name: _find_folder(root, name) for name in ("train", "val")}
    has_tables, has_folders = any(tables.values()), any(folders.values())
    ignored, missing = [], []
    if has_tables and tables[split]:
        paths, labels, classes, missing = _table_reader(tables[split])(root, tables, split)
    elif has_folders and not has_tables and folders[split]:
        paths, labels, classes, ignored = _read_folders(folders, split)
    elif has_tables or has_folders or split == "val":
        raise MissingSplit(
            f"{root} has no {split} split: neither a folder {split} nor a list of it, such as "
            f"{split}.csv{_hint(root)}\n{LAYOUTS}")
    else:
        paths, ignored = walk(root)
        _refuse_held_out(root, paths)
        labels, classes = [-1] * len(paths), []
    if not paths:
        faults = [f"{len(names)} {what}, first: {names[0]}; " for names, what in (
            (ignored, "files are no media or in no class"), (missing, "listed files are missing"))
            if names]
        raise ValueError(f"no sample in the {split} split of {root}; {''.join(faults)}media are "
                         f"{', '.join(VIDEO + IMAGE)}\n{LAYOUTS}")
    videos = sum(media_kind(path) == "video" for path in paths)
    if 0 < videos < len(paths):
        raise ValueError(f"the {split} split of {root} mixes {videos} videos and "
                         f"{len(paths) - videos} images; put them into separate data folders")
    kind = "video" if videos else "image"
    samples = Samples(kind, paths, labels, classes, ignored, missing, root)
    return draw_per_class(samples, limit_per_class, seed) if limit_per_class else samples


def _find_folder(root, split):
    """The folder of a split: "train", or the only one with a name such as Training or train_256."""
    exact, word = os.path.join(root, split), {"train": "train(ing)?", "val": VAL}
    if os.path.isdir(exact):
        return exact
    names = [entry.name for entry in os.scandir(root) if entry.is_dir()
             and re.fullmatch(word[split] + r"([-_]?\d+)?", entry.name.lower())]
    if len(names) > 1:
        raise ValueError(f"{root} has {len(names)} folders for {split}, {', '.join(sorted(names))}:"
                         f" call one of them {split}")
    return os.path.join(root, names[0]) if names else None


def _refuse_held_out(root, paths):
    """Raise ValueError if files without a split seem to be partly for a test."""
    if _match(root, LIST):
        raise ValueError(f"{root} has no split that is read{_hint(root)}, or move it away to train "
                         "on all files")
    for folder in sorted({os.path.dirname(path) for path in paths}):
        parts = os.path.relpath(folder, root).split(os.sep)
        for depth, part in enumerate(parts):
            if re.fullmatch(HELD_OUT, part.lower()):
                place = os.path.join(root, *parts[:depth])
                raise ValueError(
                    f"{os.path.join(place, part)} seems to hold files for a test, and {root} has no"
                    " folder train: " + (f"did you mean {place}?" if _find_folder(place, "train")
                    else f"choose one folder below {root}, or call them train and val"))


def _hint(root):
    """The end of an error: a list in root that is not read, or a data set that root is part of."""
    parent, splits = os.path.dirname(os.path.abspath(root)), ("train", "val")
    path = _match(root, LIST)
    if path and not any(_find_table(root, split) for split in splits):
        return f"; {path} is not read: " + (
            "put the labels.json of Something-Something beside it" if path.endswith(".json")
            else "make it a train.csv or val.csv with lines of 'path label'")
    with contextlib.suppress(OSError, ValueError):
        if any(find(parent, split) for find in (_find_table, _find_folder) for split in splits):
            return f"; did you mean {parent}?"
    return ""


def class_name(text):
    """A class by a name that different lists and file systems agree upon."""
    return unicodedata.normalize("NFC", text).strip()


def sort_classes(names):
    """In the order of their labels: by value if all are whole numbers, else as text."""
    names = set(names)
    return sorted(names, key=int if all(re.fullmatch("[0-9]+", name) for name in names) else None)


def _has_media(folder):
    return any(media_kind(name) for _, _, names in os.walk(folder, followlinks=True)
               for name in names)


def _read_folders(folders, split):
    """(paths, labels, classes, ignored files) of <split>/<class>/*; -1 where there is no class."""
    entries = [entry for folder in folders.values() if folder for entry in os.scandir(folder)
               if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))]
    empty = {entry.path for entry in entries if not _has_media(entry.path)}
    classes = sort_classes(class_name(entry.name) for entry in entries if entry.path not in empty)
    media, ignored = walk(folders[split])
    ignored += sorted(path for path in empty if os.path.dirname(path) == folders[split])
    if not classes:
        return media, [-1] * len(media), classes, ignored
    number = {name: label for label, name in enumerate(classes)}
    paths, labels = [], []
    for path in media:
        first, *rest = os.path.relpath(path, folders[split]).split(os.sep)
        if rest and class_name(first) in number:
            paths.append(path)
            labels.append(number[class_name(first)])
        else:                                    # beside the class folders
            ignored.append(path)
    if media and not paths:                      # ImageNet's val, as it unpacks
        raise ValueError(f"the {len(media)} files in {folders[split]} are in no class folder, first"
                         f" {os.path.basename(media[0])}: sort them into folders of the "
                         f"{len(classes)} classes, such as {folders[split]}/{classes[0]}/")
    return paths, labels, classes, ignored


def find_labeled(root, split, classes=(), num_classes=0, limit_per_class=0, seed=0):
    """(samples, names of the classes) of one split whose files all have labels.

    classes, num_classes: what the names and their number must be, if known already. Classes without
    names are called by their numbers. Raises ValueError if the data do not agree.
    """
    samples = find_samples(root, split, limit_per_class, seed)
    if unlabeled := sum(label < 0 for label in samples.labels):
        raise ValueError(f"{root}: {unlabeled} of the {len(samples)} files in its {split} part "
                         "have no label: put them into a folder per class, or give a csv of labels"
                         + _hint(root))
    named = list(samples.classes)
    if not classes and not named and not num_classes:    # labels of a list
        gaps = sorted(set(range(max(samples.labels) + 1)) - set(samples.labels))
        if gaps:
            raise ValueError(f"the labels in the {split} part of {root} go to {max(samples.labels)}"
                             f" and leave {len(gaps)} gaps, first {gaps[0]}: number the classes "
                             "from 0 without gaps, or give --num-classes")
    names = list(classes) or named or [
        str(i) for i in range(num_classes or max(samples.labels) + 1)]
    if len(named or names) != len(names):
        lacks, adds = (", ".join(sorted(a - b)[:3]) or "none" for a, b in
                       ((set(names), set(named)), (set(named), set(names))))
        raise ValueError(f"{root} has {len(named)} classes, not {len(names)} as the checkpoint: it "
                         f"lacks {lacks}, and adds {adds}")
    if len(names) != (num_classes or len(names)):
        raise ValueError(f"{root} has {len(names)} classes, not {num_classes}: choose other data, "
                         "or another --num-classes")
    if len(names) < 2:
        raise ValueError(f"{root} has one class only, {names[0]}: there is nothing to tell apart")
    if classes and (named or all(name.isdigit() for name in classes)):
        samples = _renumber(samples, named, [class_name(name) for name in classes], split)
    if max(samples.labels) >= len(names):
        raise ValueError(f"label {max(samples.labels)} in the {split} part of {root} is not one of "
                         f"{len(names)} classes")
    return samples, names


def _renumber(samples, named, classes, split):
    """The samples with labels in the order of `classes`, whatever their order in the data.

    named: the classes of the data by label; without names a label is the name of its class.
    """
    used = sorted(set(samples.labels))
    own = {label: named[label] if named else str(label) for label in used}
    number = {name: label for label, name in enumerate(classes)}
    if strange := [name for name in own.values() if name not in number]:
        near = difflib.get_close_matches(strange[0], classes, 1, 0)
        raise ValueError(f"{len(strange)} classes in the {split} part of {samples.root} are not "
                         f"among the {len(classes)} that were trained, first {strange[0]!r} (the "
                         f"nearest name is {near[0]!r}): rename them or take them out")
    return replace(samples, labels=[number[own[label]] for label in samples.labels])


def splits_of(root):
    """The splits that a folder has: those of its lists, else of its folders, else "train"."""
    tables = [split for split in ("train", "val") if _find_table(root, split)]
    return tables or [split for split in ("train", "val") if _find_folder(root, split)] or ["train"]


def check_splits(train, val):
    """Raise ValueError for a class with files to test, but none to train on."""
    lost = sorted(set(val.labels) - set(train.labels))
    if lost:
        own = [train.classes[i] if train.classes else str(i) for i in sorted(set(train.labels))]
        name = val.classes[lost[0]] if val.classes else str(lost[0])
        raise ValueError(f"{len(lost)} classes of {train.root} have files to test and none to train"
                         f" on, first {name!r} (the nearest name in the train part is "
                         f"{difflib.get_close_matches(name, own, 1, 0)[0]!r}): rename them or take "
                         "them out")


def draw_per_class(samples, limit, seed):
    """At most `limit` files of each class, drawn by the seed, in their order."""
    members = {}
    for i, label in enumerate(samples.labels):
        members.setdefault(label, []).append(i)
    chosen = sorted(i for label, own in members.items()
                    for i in random.Random(f"{seed} {label}").sample(own, min(limit, len(own))))
    return take(samples, chosen)


def spread(samples, count):
    """`count` of the samples, at even distances."""
    return take(samples, [i * len(samples) // count for i in range(count)])


def take(samples, numbers):
    return replace(samples, paths=[samples.paths[i] for i in numbers],
                   labels=[samples.labels[i] for i in numbers])


def walk(folder):
    """Media files and other files below a folder, both sorted; hidden folders are left out."""
    media, other, seen = [], [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:   # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in names:
            path = os.path.join(parent, name)
            (media if media_kind(path) else other).append(path)
    return sorted(media), sorted(other)


def _videos_by_name(root):
    """{name without ending: path} of all videos below root. Of equal names the first counts."""
    return {os.path.splitext(os.path.basename(path))[0]: path for path in reversed(walk(root)[0])
            if media_kind(path) == "video"}


# ------------------------------------------------------------------------------------------- lists


def _find_table(root, split):
    """The list of a split in root (train.csv, kinetics_400_validate.csv), or None."""
    word = {"train": "train", "val": "(val|validate|validation)"}[split]
    json_table = _match(root, rf"{SSV2}labels\.json") and _match(root, rf"{SSV2}{word}\.json")
    return json_table or _match(root, rf"(kinetics[-_\d]*)?{word}\.csv")


def _match(root, form):
    """The file in root, or else in its annotations/ or labels/, whose lower-case name has the
    form, of several the shortest, or None."""
    for folder in (root, os.path.join(root, "annotations"), os.path.join(root, "labels")):
        names = os.listdir(folder) if os.path.isdir(folder) else []
        names = [name for name in names if re.fullmatch(form, name.lower())]
        if names:
            return os.path.join(folder, min(names, key=lambda name: (len(name), name)))


def _read_text(path):
    """The text of a list in UTF-8, or in UTF-16 with its mark. Other bytes are kept as they are."""
    with open(path, "rb") as file:
        text = file.read()
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):      # PowerShell
        return text.decode("utf-16")
    return text.decode("utf-8-sig", "surrogateescape")


def _read_json(path):
    try:
        return json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}; get it again") from None


def _table_reader(table):
    """The function below that reads a list."""
    if table.lower().endswith(".json"):
        return _read_something_table
    header = _read_text(table).partition("\n")[0].replace(" ", "").replace('"', "")
    official = header.startswith("label,youtube_id,time_start")
    return _read_kinetics_table if official else _read_path_table


def _read_path_table(root, tables, split):
    """Release: no header, columns divided by a space, paths relative to the csv's folder."""
    # A path without quotes may hold spaces: it ends in the last media ending of the line.
    endings = "|".join(VIDEO + IMAGE)
    line_form = re.compile(rf'(?:"(?P<quoted>(?:[^"]|"")+)"|(?P<plain>.+\.(?:{endings})))'
                           r"(?:(?:\s+\S+)?\s+(?P<label>-?\d+))?", re.IGNORECASE)
    table, names = tables[split], {}             # names: one listing per folder
    paths, labels, missing = [], [], []
    for number, line in enumerate(_read_text(table).splitlines(), 1):
        if not line.strip():
            continue
        match = line_form.fullmatch(line.strip())
        if not match:
            raise ValueError(
                f"{table}, line {number}: {line.strip()!r} is not 'path label'; separate by a "
                "space, end the path in a media ending or put it in double quotes")
        name = match["plain"] or match["quoted"].replace('""', '"')
        path = os.path.join(os.path.dirname(table), name)
        parent, name = os.path.split(path)
        if parent not in names:
            names[parent] = set(os.listdir(parent or ".")) if os.path.isdir(parent or ".") else ()
        if name not in names[parent]:
            missing.append(path)
            continue
        if media_kind(path) is None:
            raise ValueError(f"{table}, line {number}: {path} is no media file; take it out")
        paths.append(path)
        labels.append(int(match["label"] or -1))         # release: 0 without a label
    return paths, labels, [], missing


def _read_kinetics_table(root, tables, split):
    """Official csv. A video is <youtube_id>_<start>_<end> (six digits each) or <youtube_id>."""
    rows = {}
    for name, table in tables.items():           # both, so that a class has one label in each
        if table:
            text = io.StringIO(_read_text(table))
            try:
                rows[name] = list(csv.DictReader(text, skipinitialspace=True))
            except csv.Error as error:
                raise ValueError(f"{table} is no csv: {error}; get it again") from None
    classes = sort_classes(class_name(row["label"] or "") for part in rows.values() for row in part)
    number = {name: label for label, name in enumerate(classes)}
    files, paths, labels, missing = _videos_by_name(root), [], [], []
    for line, row in enumerate(rows[split], 2):
        try:
            start, end = float(row["time_start"] or 0), float(row.get("time_end") or 0)
        except ValueError:
            times = f"{row['time_start']!r} and {row.get('time_end')!r}"
            raise ValueError(f"{tables[split]}, line {line}: the times {times} are not seconds; "
                             "write 83, not 1:23") from None
        name = f"{row['youtube_id']}_{start:06.0f}_{end:06.0f}"
        path = files.get(name) or files.get(row["youtube_id"])
        if path:
            paths.append(path)
            labels.append(number[class_name(row["label"] or "")])
        else:
            missing.append(name)
    return paths, labels, classes, missing


def _read_something_table(root, tables, split):
    """SSv2: {template without brackets: "label"}, and [{"id", "template" with them, ...}]."""
    number = {name: int(label)
              for name, label in _read_json(_match(root, rf"{SSV2}labels\.json")).items()}
    classes = sorted(number, key=number.get)
    if [number[name] for name in classes] != list(range(len(classes))):
        raise ValueError(f"the labels json of {root} does not number its {len(classes)} templates "
                         "from 0 without a gap")
    files, paths, labels, missing = _videos_by_name(root), [], [], []
    for position, row in enumerate(_read_json(tables[split])):
        if not {"id", "template"} <= set(row):
            raise ValueError(f"{tables[split]}, entry {position}: it lacks an id or a template; the"
                             " lists of the test part have no labels, take train and validation")
        name, template = str(row["id"]), row["template"].replace("[", "").replace("]", "")
        if template not in number:
            raise ValueError(f"{tables[split]}, id {name}: the template {template!r} is not in the "
                             "labels json; take both files from the same release")
        if name in files:
            paths.append(files[name])
            labels.append(number[template])
        else:
            missing.append(f"{name}.webm")
    return paths, labels, classes, missing
