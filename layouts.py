"""Finding the files of a data set: class folders (ImageNet), csv lists, Kinetics-400/600/700, Something-Something v2.

Release: SlowFast's Kinetics and ImageNet loaders read the same; its SSv2 loader wants frames extracted beforehand and
lists of them, where the official json files and videos do here. Needs nothing but Python.
"""

import csv
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace

VIDEO = ("mp4", "webm", "mkv", "avi", "mov")
IMAGE = ("jpg", "jpeg", "png", "bmp", "webp")
SSV2 = "(something-something-v2-)?"  # what the names of the official json files may start with

LAYOUTS = """accepted layouts:
  DIR/train/<class>/* and DIR/val/<class>/*   videos or images (ImageNet: train/n01440764/*.JPEG)
  DIR/train.csv and DIR/val.csv               a line is: path label (or: path, or: path ignored label)
  the same files in the official Kinetics form, with the header label,youtube_id,time_start,time_end,split
  Something-Something v2: labels.json, train.json and validation.json, videos <id>.webm anywhere below DIR
  a folder of unlabelled files, searched recursively (training only)"""


@dataclass(frozen=True)
class Samples:
    """The files of one split. All videos or all images."""
    kind: str                                    # "video" or "image"
    paths: list
    labels: list                                 # int per path, -1 = unlabelled
    classes: list                                # names by label; empty if the data set names none
    ignored: list = field(default_factory=list)  # files that are there but are no media, or in no class
    missing: list = field(default_factory=list)  # files named in a list but not there
    root: str = ""

    def __len__(self):
        return len(self.paths)


def fingerprint(samples):
    """Hex digest (16 letters) of relative names and labels: tells a resumed run that its data changed."""
    digest = hashlib.sha256()
    for path, label in zip(samples.paths, samples.labels):
        digest.update(f"{os.path.relpath(path, samples.root or '.')}\0{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def media_kind(path):
    """"video", "image" or None, by the ending in any letter case; hidden files (._a.mp4) are no media."""
    name = os.path.basename(path).lower()
    ending = name.rpartition(".")[2]
    if name.startswith("."):
        return None
    return "video" if ending in VIDEO else "image" if ending in IMAGE else None


def find_samples(root, split="train", limit_per_class=0):
    """Lists the media files of one split, in a fixed order (that of the list, or sorted).

    root: folder in one of LAYOUTS; SSv2's json goes before a csv, a csv before folders. split: "train" or "val".
    limit_per_class: keeps at most so many files of each class, evenly spread over its list; 0 keeps all.
    Returns Samples. Labels index `classes`, which are the same for both splits.
    Raises FileNotFoundError if there is no such folder, ValueError if it yields no sample or mixes videos and images.
    """
    root = os.fspath(root)
    if split not in ("train", "val"):
        raise ValueError(f'split is "train" or "val", not {split!r}')
    if limit_per_class < 0:
        raise ValueError(f"limit_per_class={limit_per_class}: use the number of files to keep, or 0 for all")
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no data folder {root}; {LAYOUTS}")
    tables = {name: _find_table(root, name) for name in ("train", "val")}
    folders = {name: os.path.join(root, name) for name in ("train", "val")}
    ignored, missing = [], []
    if any(tables.values()):
        if not tables[split]:
            raise ValueError(f"{root} has no {split} split: the only list is {tables['train'] or tables['val']}; "
                             f"{LAYOUTS}")
        with open(tables[split], encoding="utf-8-sig", errors="surrogateescape") as file:
            official = file.readline().replace(" ", "").startswith("label,youtube_id,time_start")
        reader = _read_something_table if tables[split].lower().endswith(".json") else \
            _read_kinetics_table if official else _read_path_table
        paths, labels, classes, missing = reader(root, tables, split)
    elif any(os.path.isdir(folder) for folder in folders.values()):
        if not os.path.isdir(folders[split]):
            raise ValueError(f"{root} has no {split} split: no folder {folders[split]}; {LAYOUTS}")
        classes = sorted({entry.name for folder in folders.values() if os.path.isdir(folder)
                          for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")})
        paths, ignored = walk(folders[split])
        first = [os.path.relpath(path, folders[split]).split(os.sep) for path in paths]
        if classes:  # what lies beside the class folders has no label
            ignored += [path for path, parts in zip(paths, first) if len(parts) == 1]
            paths = [path for path, parts in zip(paths, first) if len(parts) > 1]
            number = {name: label for label, name in enumerate(classes)}
            labels = [number[parts[0]] for parts in first if len(parts) > 1]
        else:
            labels = [-1] * len(paths)
    else:
        if split == "val":
            raise ValueError(f"{root} has no val split: neither a folder val nor val.csv; {LAYOUTS}")
        paths, ignored = walk(root)
        labels, classes = [-1] * len(paths), []
    if not paths:
        raise ValueError(f"no sample in the {split} split of {root} ({len(ignored)} files are no media or in no class, "
                         f"first: {ignored[:1]}; {len(missing)} listed files are missing, first: {missing[:1]}); media "
                         f"are {VIDEO + IMAGE}; {LAYOUTS}")
    videos = sum(media_kind(path) == "video" for path in paths)
    if 0 < videos < len(paths):
        raise ValueError(f"the {split} split of {root} mixes {videos} videos and {len(paths) - videos} images; "
                         "put them into separate data folders")
    samples = Samples("video" if videos else "image", paths, labels, classes, ignored, missing, root)
    return _limit(samples, limit_per_class) if limit_per_class else samples


def find_labeled(root, split, classes=(), num_classes=0, limit_per_class=0):
    """(samples, names of the classes) of one split whose files all have labels.

    classes, num_classes: what the names and their number must be, if known already. Classes without
    names are called by their numbers. Raises ValueError if the data do not agree.
    """
    samples = find_samples(root, split, limit_per_class)
    if unlabeled := sum(label < 0 for label in samples.labels):
        raise ValueError(f"{root}: {unlabeled} of the {len(samples)} files in its {split} part have "
                         "no label: put them into a folder per class, or give a csv with labels")
    named = list(samples.classes)
    if classes and named and named != list(classes) and len(named) == len(classes) \
            and not classes[0].isdigit():
        raise ValueError(f"the classes of {root}, {', '.join(named[:3])} ..., are not those of the "
                         f"checkpoint, {', '.join(classes[:3])} ...")
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
    if max(samples.labels) >= len(names):
        raise ValueError(f"label {max(samples.labels)} in the {split} part of {root} is not one of "
                         f"{len(names)} classes")
    return samples, names


def _limit(samples, limit):
    """At most `limit` files of each class: every k-th, k real, of the class's files in order. No random numbers."""
    sizes, seen, kept = Counter(samples.labels), Counter(), []
    for i, label in enumerate(samples.labels):
        size, n, rank = sizes[label], min(limit, sizes[label]), seen[label]
        if rank * n // size < (rank + 1) * n // size:  # this step completes the next of n equal parts
            kept.append(i)
        seen[label] += 1
    return replace(samples, paths=[samples.paths[i] for i in kept], labels=[samples.labels[i] for i in kept])


def walk(folder):
    """Media files and other files below a folder, both sorted; hidden folders are left out."""
    media, other = [], []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(parent, name)
            (media if media_kind(path) else other).append(path)
    return sorted(media), sorted(other)


def _by_name(root):
    """{name without ending: path} of all videos below root; of two files with one name the first in order counts."""
    return {os.path.splitext(os.path.basename(path))[0]: path for path in reversed(walk(root)[0])
            if media_kind(path) == "video"}


# ---------------------------------------------------------------- lists: csv and json


def _find_table(root, split):
    """The list of a split in root (train.csv, kinetics_400_validate.csv) or None; json only beside labels."""
    word = {"train": "train", "val": "(val|validate|validation)"}[split]
    json_table = _match(root, rf"{SSV2}labels\.json") and _match(root, rf"{SSV2}{word}\.json")
    return json_table or _match(root, rf"(kinetics[-_\d]*)?{word}\.csv")


def _match(root, form):
    """The file in root whose lower-case name has the form, the shortest name if there are several; or None."""
    names = [name for name in os.listdir(root) if re.fullmatch(form, name.lower())]
    return os.path.join(root, min(names, key=lambda name: (len(name), name))) if names else None


def _read_path_table(root, tables, split):
    """Release layout: no header, columns separated by a space; relative paths start at the csv's folder."""
    # An unquoted path may hold spaces and quotes: it reaches as far as the last media ending in the line.
    line_form = re.compile(rf'(?:"(?P<quoted>(?:[^"]|"")+)"|(?P<plain>.+\.(?:{"|".join(VIDEO + IMAGE)})))'
                           r"(?:(?:\s+\S+)?\s+(?P<label>-?\d+))?", re.IGNORECASE)
    names = {}  # folder -> the names in it: one listing per folder, not one look-up per line
    paths, labels, missing = [], [], []
    with open(tables[split], encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            match = line_form.fullmatch(line.strip())
            if not match:
                raise ValueError(f"{tables[split]}, line {number}: {line.strip()!r} is not 'path label'; "
                                 "separate by a space, end the path in a media ending or put it in double quotes")
            name = match["plain"] or match["quoted"].replace('""', '"')
            path = os.path.normpath(os.path.join(os.path.dirname(tables[split]), name))
            parent, name = os.path.split(path)
            if parent not in names:
                names[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
            if name not in names[parent]:
                missing.append(path)
                continue
            if media_kind(path) is None:
                raise ValueError(f"{tables[split]}, line {number}: {path} is no media file; take the line out")
            paths.append(path)
            labels.append(int(match["label"] or -1))  # -1: unlabelled; release: label 0
    return paths, labels, [], missing


def _read_kinetics_table(root, tables, split):
    """Official Kinetics csv; a video is called <youtube_id>_<start>_<end> (six digits each) or <youtube_id>."""
    rows, classes = [], set()
    for name, table in tables.items():
        if table:  # both splits are read, so that a class gets the same label in each
            with open(table, encoding="utf-8-sig", newline="") as file:
                found = list(csv.DictReader(file, skipinitialspace=True))
            classes |= {row["label"] for row in found}
            rows = found if name == split else rows
    classes = sorted(classes)
    number = {name: label for label, name in enumerate(classes)}
    files, paths, labels, missing = _by_name(root), [], [], []
    for row in rows:
        start, end = float(row["time_start"] or 0), float(row.get("time_end") or 0)
        name = f"{row['youtube_id']}_{start:06.0f}_{end:06.0f}"
        path = files.get(name) or files.get(row["youtube_id"])
        if path:
            paths.append(path)
            labels.append(number[row["label"]])
        else:
            missing.append(name)
    return paths, labels, classes, missing


def _read_something_table(root, tables, split):
    """SSv2's official json: {template without brackets: "label"} and a list of {"id", "template" with them, ...}."""
    with open(_match(root, rf"{SSV2}labels\.json"), encoding="utf-8") as file:
        number = {name: int(label) for name, label in json.load(file).items()}
    classes = sorted(number, key=number.get)
    if [number[name] for name in classes] != list(range(len(classes))):
        raise ValueError(f"the labels json of {root} does not number its {len(classes)} templates from 0 without a gap")
    with open(tables[split], encoding="utf-8") as file:
        rows = json.load(file)
    files, paths, labels, missing = _by_name(root), [], [], []
    for row in rows:
        template = row["template"].replace("[", "").replace("]", "")
        if template not in number:
            raise ValueError(f"{tables[split]}, id {row['id']}: the template {template!r} is not in the labels json; "
                             "take both files from the same release")
        if str(row["id"]) in files:
            paths.append(files[str(row["id"])])
            labels.append(number[template])
        else:
            missing.append(f"{row['id']}.webm")
    return paths, labels, classes, missing
