"""Tables 1, 2, 6, 8: for every row the paper's figure, the full-scale commands, and a small run that anyone can make.

    python ablate.py --list                                                         # rows, figures, commands
    python ablate.py --data tinyimagenet/ --rows scratch pixel hog --seeds 0 1 2    # the same command again goes on
    python ablate.py --data tinyimagenet/ --rows hog-none --labels 50 0 --dry       # only prints what it would run
    python ablate.py --data clips/ --pretrain-data more_clips/ --rows video-scratch video-hog frame tube
    python ablate.py --table                                                        # README.md and docs/ablation.png

A small run is one pre-training without labels (seed 0), then one fine-tuning per seed on few labels, by vit_tiny for
images and mvit_tiny for videos, with the same flags for all rows: pretrain.py and finetune.py, which work in out/ablate
and go on where they were stopped. Each fine-tuning ends as one line of JSON in --results and is not run again. A row
whose teacher is out of reach takes another by --teacher, or a stand-in made here, and the table says so. Two may run
at once if their rows and those of their stand-ins differ.
"""
import argparse
import glob
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

import layouts
from engine import StopSignal, check_positive, read_checkpoint, run_main

# ---------------------------------------------------------------------------------------------------------------- rows
# A table: what it compares, kind of data, rows in the paper's order. A row: its name, that in the table, the paper's
# top-1 (None: we could not look it up), flags of pretrain.py (None: no pre-training).
TABLES = {
    "1": ("targets, MViTv2-S on Kinetics-400", "video", [
        ("video-scratch", "scratch", 81.1, None),
        ("video-pixel", "pixel", 80.7, "--target pixel"),
        ("video-hog", "HOG", 82.2, ""),
        ("video-dvae", "dVAE token", 81.7, "--target dvae --teacher encoder.pkl"),
        ("video-dino", "DINO ViT-B", 82.5, "--target dino --teacher dino_vitb16.pth"),
        ("video-mvit_b", "supervised MViT-B", 81.9, "--target mvit_b --teacher mvit_b_16x4.pyth")]),
    "2": ("targets, ViT-B on ImageNet-1K", "image", [
        ("scratch", "scratch", 81.8, None),
        ("pixel", "pixel", 82.5, "--target pixel"),
        ("hog", "HOG", 83.6, ""),
        ("dvae", "dVAE token", 82.8, "--target dvae --teacher encoder.pkl"),
        ("mocov2", "MoCo v2 ResNet-50", 83.6, "--target mocov2 --teacher moco_v2_800ep.pth.tar"),
        ("mocov3", "MoCo v3 ViT-B", 83.9, "--target mocov3 --teacher moco_v3_vitb16.pth.tar"),
        ("dino", "DINO ViT-B", 84.0, "--target dino --teacher dino_vitb16.pth"),
        ("resnet50", "supervised ResNet-50", 82.6, "--target resnet50 --teacher resnet50.pth"),
        ("deit", "supervised DeiT-B", 81.9, "--target deit --teacher deit_base_patch16_224.pth"),
        ("label", "pseudo-label", 78.8, "--target label --teacher label_maps/")]),
    "6": ("masking, MViTv2-S on Kinetics-400", "video", [
        ("frame", "frame", None, "--mask frame"),
        ("tube", "tube", None, "--mask tube"),
        ("video-hog", "cube", 82.2, "")]),
    "8": ("HOG, ViT-B on ImageNet-1K", "image", [
        ("hog-none", "no normalization", None, "--norm none"),
        ("hog-l1", "l1", None, "--norm l1"),
        ("hog", "l2", 83.6, ""),
        ("hog-gray", "gray", None, "--color gray"),
        ("hog", "rgb", 83.6, ""),
        ("hog-opponent", "opponent colours", None, "--color opponent"),
        ("hog-6-bins", "6 bins", None, "--bins 6"),
        ("hog", "9 bins", 83.6, ""),
        ("hog-12-bins", "12 bins", None, "--bins 12"),
        ("hog-cell-4", "cells of 4x4", None, "--cell 4"),
        ("hog", "cells of 8x8", 83.6, ""),
        ("hog-cell-16", "cells of 16x16", None, "--cell 16")]),
}
ROWS = {name: (kind, flags) for _, kind, rows in TABLES.values() for name, _, _, flags in rows}
# Full scale: data and recipe; *_scratch is the baseline's.
FULL = {"image": ("imagenet/", "in1k_vit_b"), "video": ("k400/", "k400_mvitv2_s")}
# Small scale: flags and epochs of pre-training, of fine-tuning, and its layer decay (mvit_tiny has but three blocks).
SMALL = {
    "image": ("--model vit_tiny --batch-size 128 --lr-batch 128 --warmup-epochs 2", 20,
              "--model vit_tiny --val-epochs 0 --mixup 0 --cutmix 0 --erase 0 --lr-batch 64 --rand-augment ''", 30,
              0.75),
    "video": ("--model mvit_tiny --batch-size 8 --lr-batch 8 --warmup-epochs 2", 24,
              "--model mvit_tiny --no-baseline --val-epochs 0", 30, 1),
}
# Whose weights serve as the teacher's at small scale: of the pre-trained "hog", or of "scratch" trained on all labels.
STAND_INS = {"dino": ("hog", "vit_tiny pre-trained here on HOG"),
             "deit": ("scratch", "vit_tiny trained here on all labels")}
NO_SMALL = {"hog-cell-16": "a cell of 16 pixels is larger than vit_tiny's patches of 8"}
# Results that agree in all these can be compared; from scratch, the last two are None and fit any.
BUDGET = "data", "labels", "epochs", "flags", "amp", "pretrain_data", "pretrain_epochs"


# -------------------------------------------------------------------------------------------------------- what to run

@dataclass(frozen=True)
class Plan:
    """What the small runs of one call share. The ids are the folders' names with fingerprints of their files."""
    data: str
    data_id: str
    pretrain_data: str
    pretrain_id: str
    pretrain_epochs: int
    epochs: int
    amp: str
    teacher: str


def key(line):
    """What tells one fine-tuning from all others."""
    return tuple(line[field] for field in ("row", "seed", "teacher", *BUDGET))


def script(name, *flags):
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    return [sys.executable, os.path.relpath(path), *map(str, flags)]


def full_scale(name):
    """Commands of a row as in the paper, on eight GPUs; the ablations pre-train for 300 epochs."""
    (data, recipe), flags, run = FULL[ROWS[name][0]], ROWS[name][1], "torchrun --nproc_per_node=8"
    fine = f"{run} finetune.py --data {data} --recipe {recipe}"
    return [f"{fine}_scratch --out out/{name}"] if flags is None else [
        f"{run} pretrain.py --data {data} --recipe {recipe} --epochs 300 --out out/{name} {flags}".rstrip(),
        f"{fine} --init out/{name}/last.pt --out out/{name}-finetuned"]


def stand_in(name, plan):
    """The run whose weights stand in for those of a row's teacher."""
    return pretraining("hog", plan) if STAND_INS[name][0] == "hog" else fine_tuning("scratch", 0, 0, plan)


def pretraining(name, plan):
    """(folder, command, None) of a row's small pre-training."""
    kind, flags = ROWS[name]
    flags, _, teacher = flags.partition(" --teacher ")
    if teacher:
        teacher = "--teacher", plan.teacher or os.path.join(stand_in(name, plan)[0], "last.pt")
    out = os.path.join("out", "ablate", name, f"pretrain-{plan.pretrain_epochs}-{plan.amp}")
    return out, script("pretrain.py", "--data", plan.pretrain_data, "--out", out, "--resume", *SMALL[kind][0].split(),
                       *flags.split(), *teacher, "--epochs", plan.pretrain_epochs, "--amp", plan.amp), None


def fine_tuning(name, labels, seed, plan):
    """(folder, command, result line but for the result) of a fine-tuning. labels: files of a class, 0 for all."""
    (kind, before), teacher, epochs, start = ROWS[name], None, plan.epochs, ("--init", "", "--layer-decay", 1)
    if before is not None:
        epochs = f"{plan.pretrain_epochs}+{epochs}"
        start = "--init", os.path.join(pretraining(name, plan)[0], "last.pt"), "--layer-decay", SMALL[kind][4]
        if "--teacher" in before:
            teacher = os.path.basename(os.path.normpath(plan.teacher)) if plan.teacher else STAND_INS[name][1]
    out = os.path.join("out", "ablate", name, f"finetune-{epochs}-{plan.amp}-{labels or 'all'}-seed{seed}")
    line = {"table": [number for number, table in TABLES.items() if name in [row[0] for row in table[2]]],
            "row": name, "teacher": teacher, "seed": seed, "data": plan.data_id, "labels": labels,
            "pretrain_data": None if before is None else plan.pretrain_id,
            "pretrain_epochs": None if before is None else plan.pretrain_epochs, "epochs": plan.epochs,
            "flags": f"{SMALL[kind][0]}; {SMALL[kind][2]}", "amp": plan.amp}
    return out, script("finetune.py", "--data", plan.data, "--out", out, "--resume", *shlex.split(SMALL[kind][2]),
                       *start, "--limit-per-class", labels, "--epochs", plan.epochs, "--amp", plan.amp,
                       "--seed", seed), line


def steps(name, labels, seeds, plan, done):
    """[(folder, command, result line or None)] that a row still needs. What comes before its fine-tuning is listed even
    if finished: it returns soon, after a check that it is what is wanted."""
    runs = [fine_tuning(name, n, seed, plan) for n in labels for seed in seeds]
    runs = [run for run in runs if key(run[2]) not in done]
    if runs and ROWS[name][1] is not None:
        runs.insert(0, pretraining(name, plan))
        if name in STAND_INS and not plan.teacher:
            runs.insert(0, stand_in(name, plan))
    return runs


def check(names, teacher, data, kind):
    """Rows that do not exist, or cannot be run on these data."""
    for name in names:
        if name not in ROWS or ROWS[name][0] != kind:
            raise ValueError(f"there is no row {name} for {kind}s, as {data} holds: choose from "
                             f"{', '.join(row for row in ROWS if ROWS[row][0] == kind)}")
        if name in NO_SMALL:
            raise ValueError(f"row {name} has no small run: {NO_SMALL[name]}")
    taught = [name for name in names if "--teacher" in (ROWS[name][1] or "")]
    if not teacher and set(taught) - set(STAND_INS):
        raise ValueError(f"row {min(set(taught) - set(STAND_INS))} needs --teacher FILE: no stand-in is made for it")
    if teacher and not (taught and os.path.exists(teacher)):
        raise ValueError(f"--teacher {teacher}: " + ("no such file" if taught else "none of these rows has a teacher"))


def launch(command, stop):
    """Run a script to its end. A signal to us goes on to it, so that it saves where it is."""
    process = subprocess.Popen(command)
    while process.poll() is None:
        if stop.number:
            process.terminate()
        time.sleep(0.2)
    if stop.number:
        print("stopped; the same command goes on", flush=True)
        sys.exit(128 + stop.number)
    if process.returncode:
        raise ValueError(f"{shlex.join(command)} failed with exit status {process.returncode}, for the reason above; "
                         "once that is mended, the same command goes on")


# ------------------------------------------------------------------------------------------------------------- results

def read_lines(path):
    lines = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    raise ValueError(f"{path}, line {number} is no JSON: {text[:60]!r}; take it out") from None
    return lines


def seconds_of(out):
    """Training time of a run by its log, without what lay between stop and resume."""
    recipe, seconds, step = read_checkpoint(os.path.join(out, "last.pt"))["recipe"], 0, 0
    for line in read_lines(os.path.join(out, "log.jsonl")):
        samples = (line["step"] - step) * recipe["batch_size"] * recipe.get("repeats", 1)
        seconds, step = seconds + samples / line.get("samples_per_second", float("inf")), line["step"]
    return round(seconds, 1)


def fits(line, budget):
    return all(line[field] in (None, budget[field]) for field in BUDGET)


def grouped(lines):
    """[(table, budget, [(row, label, paper's top-1, [ours in %])])], where at least two rows were run."""
    groups, budgets = [], [*{tuple(line[field] for field in BUDGET): line for line in lines}.values()]
    for number, (_, _, rows) in TABLES.items():
        for budget in budgets:
            entries, alike = [], [line for line in lines if fits(line, budget)]
            for name, label, paper, _ in rows:
                runs = {}                                                     # {teacher: {seed: top-1}}
                for line in alike:
                    if line["row"] == name:
                        runs.setdefault(line["teacher"], {})[line["seed"]] = 100 * line["top1"]
                entries += [(name, f"{label} (teacher: {teacher})" if teacher else label, paper, [*values.values()])
                            for teacher, values in (runs or {None: {}}).items()]
            if len({name for name, _, _, values in entries if values}) > 1:
                groups.append((number, budget, entries))
    return groups


def captions(number, budget):
    labels = f"{budget['labels']} labels a class" if budget["labels"] else "all labels"
    return (f"Table {number}: {TABLES[number][0]}",
            f"ours: {budget['flags'].split()[1]}, {budget['pretrain_epochs']} epochs of pre-training on "
            f"{budget['pretrain_data']}, {budget['epochs']} of fine-tuning on {labels} of {budget['data']}")


def markdown(groups):
    text = ""
    for number, budget, entries in groups:
        text += "; ".join(captions(number, budget)) + "\n\n| | paper | ours | spread | n |\n|---|---|---|---|---|\n"
        for name, label, paper, values in entries:
            mean = f"{statistics.mean(values):.1f}" if values else "no small run" if name in NO_SMALL else "not run"
            spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else ""
            text += f"| {label} | {paper or ''} | {mean} | {spread} | {len(values) or ''} |\n"
        text += "\n"
    return text + ("Top-1 in percent. Spread: standard deviation over n seeds of fine-tuning, from one pre-training. "
                   "Where the paper's figure is missing, we could not look it up.\n")


def draw(groups, path):
    """Our means as bars, seeds as dots, in the order of the paper's tables; its default, HOG as it is, is dark."""
    font, left, width, step = ImageFont.load_default(13), 360, 520, 26
    rows = sum(2 + sum(bool(entry[3]) for entry in entries) for _, _, entries in groups)
    sheet = Image.new("RGB", (left + width + 80, step * rows + 10), "white")
    pen, y = ImageDraw.Draw(sheet), 10
    for number, budget, entries in groups:
        pen.text((10, y), "\n".join(captions(number, budget)) + "; top-1, %", "black", font)
        y, scale = y + 16, width / max(max(values, default=0) or 1e-9 for _, _, _, values in entries)
        for name, label, _, values in entries:
            if values:
                y, mean = y + step, statistics.mean(values)
                pen.text((left - 8 - font.getlength(label), y), label, "black", font)
                pen.rectangle((left, y, left + scale * mean, y + 16), "#586ea0" if name.endswith("hog") else "#b0c0de")
                for x in (left + scale * value for value in values):
                    pen.ellipse((x - 3, y + 5, x + 3, y + 11), "#c83c28")
                pen.text((left + scale * max(values) + 8, y), f"{mean:.1f}", "black", font)
        y += 2 * step - 16
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    sheet.save(path)


def rebuild(results, readme="README.md", chart="docs/ablation.png", begin="<!-- ablation -->",
            end="<!-- /ablation -->"):
    """Table and chart anew, the table between the two markers of the README."""
    groups = grouped(read_lines(results))
    if not groups:
        raise ValueError(f"{results} has no two rows of one table and one budget: run some with --rows")
    with open(readme, encoding="utf-8", newline="") as file:
        text = file.read()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{readme} needs the lines {begin} and, below, {end}, once each: the table goes between them")
    draw(groups, chart)
    table = f"![Means as bars, seeds as dots]({chart})\n\n{markdown(groups)}"
    with open(readme + ".tmp", "w", encoding="utf-8", newline="") as file:
        file.write(f"{text[:text.index(begin)]}{begin}\n\n{table}\n{text[text.index(end):]}")
    os.replace(readme + ".tmp", readme)
    print(f"wrote {readme} and {chart}: {len(groups)} tables")


# ---------------------------------------------------------------------------------------------------------------- main

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train/<class>/* and val/<class>/*, of images or of videos")
    parser.add_argument("--pretrain-data", help="folder to pre-train on, if not --data")
    parser.add_argument("--rows", nargs="+", default=[], help="rows to run, see --list")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of fine-tuning")
    parser.add_argument("--labels", nargs="+", type=int, default=[50], help="files a class to fine-tune on; 0: all")
    parser.add_argument("--teacher", default="", help="weights for the rows with a teacher, goes before a stand-in")
    parser.add_argument("--pretrain-epochs", type=int, help="default: 20 for images, 24 for videos")
    parser.add_argument("--finetune-epochs", type=int, help="default: 30")
    parser.add_argument("--amp", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--results", default="results/ablation.jsonl", help="file of results, one line each")
    parser.add_argument("--list", action="store_true", help="print all rows with their commands")
    parser.add_argument("--dry", action="store_true", help="print the commands that would be run")
    parser.add_argument("--table", action="store_true", help="results into README.md and docs/ablation.png")
    args = parser.parse_args()
    if args.table:
        return rebuild(args.results)
    if args.list:
        for name, (kind, flags) in ROWS.items():
            papers = [f"Table {n} {row[1]}: {row[2] or 'not looked up'}" for n, t in TABLES.items() for row in t[2]
                      if row[0] == name]
            plan = Plan("DIR", "", "DIR", "", *SMALL[kind][1:4:2], "auto", "" if name in STAND_INS else "FILE")
            small = [f"none: {NO_SMALL[name]}"] if name in NO_SMALL else [
                shlex.join(step[1]) for step in steps(name, [50], [0], plan, set())]
            print(f"{name} (paper: {'; '.join(papers)})", *full_scale(name), "small:", *small, sep="\n    ")
        return
    if not args.rows or not args.data:
        raise ValueError("name --data DIR and --rows, or --table or --list")

    # ------------------------------------------------------------------------------------------------------ small runs
    ids, sources = [], (args.data, args.pretrain_data or args.data)
    for source in sources:
        samples = layouts.find_samples(source, "train")
        ids.append(f"{os.path.basename(os.path.abspath(source))}-{layouts.fingerprint(samples)[:8]}")
        check(args.rows, args.teacher, source, samples.kind)
    if min(layouts.find_samples(args.data, "train").labels + layouts.find_samples(args.data, "val").labels) < 0:
        raise ValueError(f"{args.data} has files without label: fine-tuning needs a folder per class")
    epochs = [default if given is None else given for given, default in
              zip((args.pretrain_epochs, args.finetune_epochs), SMALL[samples.kind][1:4:2])]
    plan = Plan(sources[0], ids[0], sources[1], ids[1], *epochs, args.amp, args.teacher)
    check_positive(plan, "pretrain_epochs", "epochs")
    if min(args.labels) < 0:
        raise ValueError(f"--labels {min(args.labels)} is negative: files a class, or 0 for all")
    done, stop, ran = {key(line) for line in read_lines(args.results)}, StopSignal(), set()
    for name in dict.fromkeys(args.rows):
        planned = steps(name, dict.fromkeys(args.labels), dict.fromkeys(args.seeds), plan, done)
        print(f"{name}: {sum(line is not None for _, _, line in planned)} fine-tunings to run", flush=True)
        for out, command, line in planned:
            if out in ran:                                                    # a stand-in that was a row as well
                continue
            print(shlex.join(command), flush=True)
            ran.add(out)
            if args.dry:
                continue
            launch(command, stop)
            if line and key(line) not in done:
                with open(glob.glob(os.path.join(glob.escape(out), "last_*.json"))[0], encoding="utf-8") as file:
                    result = json.load(file)
                line |= {field: result[field] for field in ("top1", "top5", "files")} | {"seconds": seconds_of(out)}
                if line["pretrain_epochs"]:
                    line["pretrain_seconds"] = seconds_of(pretraining(line["row"], plan)[0])
                os.makedirs(os.path.dirname(args.results) or ".", exist_ok=True)
                with open(args.results, "a", encoding="utf-8") as file:       # one write of a whole line
                    file.write(json.dumps(line, allow_nan=False) + "\n")
                done.add(key(line))
                print(f"{line['row']}, seed {line['seed']}: top-1 {100 * line['top1']:.2f}", flush=True)


if __name__ == "__main__":
    run_main(main)
