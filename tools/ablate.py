"""The rows of Tables 1, 2, 6 and 8: the paper's top-1, the full-size commands, and small runs.

    python -m tools.ablate --list                               # rows and full-size commands
    python -m tools.ablate --data tinyimagenet/ --rows scratch pixel hog --seeds 0 1 2
    python -m tools.ablate --data imagenet/ --rows hog hog-l1 --full
    python -m tools.ablate                                      # only docs/results.md and the chart

A row is one pre-training without labels, then one fine-tuning per seed. Small runs use vit_tiny for
images, mvit_tiny for videos, and --labels files of each class. Each fine-tuning adds a line to
results/ablation.jsonl and is not run again. The same command continues stopped runs.
"""
import argparse
import glob
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys

import engine

from PIL import Image, ImageDraw, ImageFont

import layouts

RESULTS, PAGE, CHART = "results/ablation.jsonl", "docs/results.md", "docs/ablation.png"
BEGIN, END = "<!-- ablation -->", "<!-- /ablation -->"
# A table: its caption, the kind of data, and rows in the paper's order. A row: its name, what the
# table calls it, the paper's top-1, and flags of pretrain.py (None: no pre-training).
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
        ("frame", "frame", 81.0, "--mask frame"),
        ("tube", "tube", 81.9, "--mask tube"),
        ("video-hog", "cube", 82.2, "")]),
    "8": ("HOG, ViT-B on ImageNet-1K", "image", [
        ("hog-none", "no normalization", 82.2, "--norm none"),
        ("hog-l1", "l1", 82.8, "--norm l1"),
        ("hog", "l2", 83.6, ""),
        ("hog-gray", "gray", 83.2, "--color gray"),
        ("hog", "rgb", 83.6, ""),
        ("hog-opponent", "opponent colors", 83.5, "--color opponent"),
        ("hog-6-bins", "6 bins", 83.4, "--bins 6"),
        ("hog", "9 bins", 83.6, ""),
        ("hog-12-bins", "12 bins", 83.5, "--bins 12"),
        ("hog-cell-4", "cells of 4x4", 83.2, "--cell 4"),
        ("hog", "cells of 8x8", 83.6, ""),
        ("hog-cell-16", "cells of 16x16", 83.2, "--cell 16")]),
}
ROWS = {name: (kind, flags) for _, kind, rows in TABLES.values() for name, _, _, flags in rows}
# Flags and epochs of pre-training, flags and epochs of fine-tuning, further flags of fine-tuning a
# pre-trained model, further flags and epochs of training from scratch.
SMALL = {
    "image": ("--model vit_tiny --batch-size 128 --lr-batch 128 --warmup-epochs 2", 20,
              "--model vit_tiny --val-epochs 0 --mixup 0 --cutmix 0 --erase 0 --lr-batch 64 "
              "--rand-augment ''", 30, "--layer-decay 0.75", "--layer-decay 1", 30),
    "video": ("--model mvit_tiny --batch-size 8 --lr-batch 8 --warmup-epochs 2", 24,
              "--model mvit_tiny --no-baseline --val-epochs 0", 30, "--layer-decay 1",
              "--layer-decay 1", 30)}
# Sec. 4.3 fine-tunes for 200 epochs. The recipe has 100 passes with two augmentations of each clip,
# which the release counts as 200 epochs. Sec. 5.2 pre-trains for 300 epochs.
FULL = {
    "image": ("--recipe in1k_vit_b", 300, "", 100,
              "--recipe in1k_vit_b", "--recipe in1k_vit_b_scratch", 300),
    "video": ("--recipe k400_mvitv2_s", 300, "", 100,
              "--recipe k400_mvitv2_s", "--recipe k400_mvitv2_s_scratch", 200)}
# Only results that agree in all of these are compared. From scratch, the last two are None.
BUDGET = "data", "labels", "flags", "epochs", "pretrain_data", "pretrain_epochs"


def commands(name, seed, args, data_id="", pretrain_id=""):
    """([(folder, command)], result line without a result) of one row and seed."""
    kind, target = ROWS[name]
    before, pretrain_epochs, after, epochs, tuned, scratch, scratch_epochs = (
        FULL if args.full else SMALL)[kind]
    pretrain_epochs = args.pretrain_epochs or pretrain_epochs
    labels, out = 0 if args.full else args.labels, f"out/ablate{'-full' * args.full}/{name}"
    runs, teacher, start = [], None, f"--init {out}/pretrain-{pretrain_epochs}/last.pt {tuned}"
    if target is None:
        start, epochs = f"--init '' {scratch}", scratch_epochs
        pretrain_id = pretrain_epochs = None
    else:
        target, _, teacher = target.partition(" --teacher ")
        teacher = teacher and (args.teacher or teacher) or None
        runs.append((f"{out}/pretrain-{pretrain_epochs}",
                     f"pretrain.py --data {shlex.quote(args.pretrain_data or args.data)} {before} "
                     f"{target} {f'--teacher {shlex.quote(teacher)}' if teacher else ''} "
                     f"--epochs {pretrain_epochs}"))
    epochs = args.finetune_epochs or epochs
    runs.append((f"{out}/finetune-{pretrain_epochs}+{epochs}-{labels or 'all'}-seed{seed}",
                 f"finetune.py --data {shlex.quote(args.data)} {after} {start} --epochs {epochs} "
                 f"--limit-per-class {labels} --seed {seed}"))
    launch = "torchrun --nproc_per_node=8 " if args.full else f"{shlex.quote(sys.executable)} "
    line = {"row": name, "seed": seed, "teacher": teacher, "data": data_id, "labels": labels,
            "pretrain_data": pretrain_id, "pretrain_epochs": pretrain_epochs,
            "epochs": None if args.full else epochs, "flags": f"{before}; {after}"}
    return [(folder, f"{launch}{' '.join(text.split())} --out {folder} --resume")
            for folder, text in runs], line


def run(command):
    """Run a script to its end. A signal to this process reaches it, so that it saves its step."""
    print(command, flush=True)
    process = subprocess.Popen(shlex.split(command), start_new_session=True)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        raise ValueError(f"the command above ended with exit status {code}; see its error")


def key(line):
    """What tells one fine-tuning from all others."""
    return tuple(line[field] for field in ("row", "seed", "teacher", *BUDGET))


def run_rows(args):
    """Run what is missing of the chosen rows, and add a line per fine-tuning to the results."""
    ids = []
    for folder in (args.pretrain_data or args.data, args.data):
        samples = layouts.find_samples(folder, "train")
        name = os.path.basename(os.path.abspath(folder))
        ids.insert(0, f"{name}-{layouts.fingerprint(samples)[:8]}")
    known = [name for name in ROWS if ROWS[name][0] == samples.kind]
    if set(args.rows) - set(known):
        raise ValueError(f"{args.data} holds {samples.kind}s; --rows {' '.join(args.rows)}: "
                         f"use {', '.join(known)}")
    done, ran = {key(line) for line in read_lines()}, set()
    for name in args.rows:
        for seed in args.seeds:
            runs, line = commands(name, seed, args, *ids)
            if key(line) in done:
                print(f"{name}, seed {seed}: done before")
                continue
            for folder, command in runs:
                if folder not in ran:
                    run(command)
                    ran.add(folder)
            with open(glob.glob(f"{folder}/last_*.json")[0], encoding="utf-8") as file:
                result = json.load(file)
            line |= {field: result[field] for field in ("top1", "top5", "files")}
            os.makedirs(os.path.dirname(RESULTS), exist_ok=True)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


# ------------------------------------------------------------------------------------------ results

def read_lines():
    if not os.path.exists(RESULTS):
        return []
    with open(RESULTS, encoding="utf-8") as file:
        return [json.loads(text) for text in file]


def compare(lines):
    """[(caption, [(row, label, paper, [ours in %])])] where at least two rows were run."""
    groups = []
    budgets = {tuple(line[field] for field in BUDGET): line for line in lines}
    for number, (title, _, rows) in TABLES.items():
        for budget, line in budgets.items():
            runs = {}                                          # {(row, teacher): {seed: top-1}}
            for other in lines:
                if all(other[field] in (None, value) for field, value in zip(BUDGET, budget)):
                    seeds = runs.setdefault((other["row"], other["teacher"]), {})
                    seeds[other["seed"]] = 100 * other["top1"]
            entries = []
            for row, label, paper, _ in rows:
                found = [pair for pair in runs if pair[0] == row] or [(row, None)]
                entries += [(row, f"{label} ({teacher})" if teacher else label, paper,
                             [*runs.get((row, teacher), {}).values()]) for _, teacher in found]
            if len({row for row, *_, values in entries if values}) > 1:
                caption = (
                    f"Table {number}: {title}. Ours: {line['flags'].split()[1].strip(';')}, "
                    f"{line['pretrain_epochs']} epochs of pre-training on {line['pretrain_data']}, "
                    f"{line['epochs'] or 'full'} epochs of fine-tuning on "
                    f"{line['labels'] or 'all'} labels a class of {line['data']}")
                groups.append((caption, entries))
    return groups


def markdown(groups):
    text = ""
    for caption, entries in groups:
        text += f"{caption}.\n\n| | paper | ours | spread | n |\n|---|---|---|---|---|\n"
        for _, label, paper, values in entries:
            mean = f"{statistics.mean(values):.1f}" if values else "not run"
            spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else ""
            text += f"| {label} | {paper} | {mean} | {spread} | {len(values) or ''} |\n"
        text += "\n"
    return text + ("Top-1 in percent. The spread is the standard deviation over n seeds of "
                   "fine-tuning from one pre-training.\n")


def draw(groups, path):
    """Our means as bars, seeds as dots. The paper's default, HOG, is dark."""
    font, left, width, step = ImageFont.load_default(13), 360, 520, 26
    count = sum(2 + sum(bool(values) for *_, values in entries) for _, entries in groups)
    sheet = Image.new("RGB", (left + width + 80, step * count + 10), "white")
    pen, y = ImageDraw.Draw(sheet), 10
    for caption, entries in groups:
        pen.text((10, y), caption.replace(". ", "\n") + "; top-1, %", "black", font)
        y += 16
        scale = width / max(max(values, default=0) for *_, values in entries)
        for row, label, _, values in [entry for entry in entries if entry[3]]:
            y, mean = y + step, statistics.mean(values)
            color = "#586ea0" if row in ("hog", "video-hog") else "#b0c0de"
            pen.text((left - 8 - font.getlength(label), y), label, "black", font)
            pen.rectangle((left, y, left + scale * mean, y + 16), color)
            for x in (left + scale * value for value in values):
                pen.ellipse((x - 3, y + 5, x + 3, y + 11), "#c83c28")
            pen.text((left + scale * max(values) + 8, y), f"{mean:.1f}", "black", font)
        y += 2 * step - 16
    sheet.save(path)


def rebuild():
    """The chart, and the tables between the two markers of the page."""
    groups = compare(read_lines())
    if not groups:
        print(f"{RESULTS} has no two rows of one table and one budget: nothing to compare yet")
        return
    with open(PAGE, encoding="utf-8") as file:
        before, begin, rest = file.read().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} needs the lines {BEGIN} and, below it, {END}")
    draw(groups, CHART)
    table = f"![Means as bars, seeds as dots]({os.path.basename(CHART)})\n\n{markdown(groups)}"
    with open(PAGE, "w", encoding="utf-8") as file:
        file.write(f"{before}{begin}\n\n{table}\n{end}{after}")
    print(f"wrote {PAGE} and {CHART}: {len(groups)} tables")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="folder with train/<class>/* and val/<class>/*")
    add("--pretrain-data", help="folder to pre-train on, if not --data")
    add("--rows", nargs="+", default=[], help="rows to run, see --list")
    add("--seeds", nargs="+", type=int, default=[0], help="seeds of fine-tuning")
    add("--labels", type=int, default=50, help="files of a class to fine-tune on; 0: all")
    add("--teacher", help="weights for the rows with a teacher: public, or a checkpoint of ours")
    add("--pretrain-epochs", type=int, help="default: 20 for images, 24 for videos")
    add("--finetune-epochs", type=int, help="default: 30")
    add("--full", action="store_true", help="the paper's models and recipes, on eight GPUs")
    add("--list", action="store_true", help="print all rows with their full-size commands")
    args = parser.parse_args()
    if args.list:
        args.full = True
        for name in ROWS:
            figures = [f"Table {number}, {label}: {paper}" for number, table in TABLES.items()
                       for row, label, paper, _ in table[2] if row == name]
            args.data = "imagenet/" if ROWS[name][0] == "image" else "k400/"
            print(f"{name} ({'; '.join(figures)})")
            print("".join(f"    {command}\n" for _, command in commands(name, 0, args)[0]))
        return
    if args.rows and not args.data:
        raise ValueError("--rows needs --data DIR")
    if args.rows:
        run_rows(args)
    rebuild()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    engine.run_main(main)
