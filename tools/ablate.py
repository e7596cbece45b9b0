"""The paper's ablations (Tables 1, 2, 6, 8) in full and as small runs.

    python -m tools.ablate --list                               # rows and full-size commands
    python -m tools.ablate --data tinyimagenet/ --rows scratch pixel hog --seeds 0 1 2
    python -m tools.ablate --data imagenet/ --rows hog hog-l1 --full

A row is one pre-training, then one fine-tuning per seed, which adds a line to the results. From
these, the tables of docs/results.md are rebuilt. The same command continues stopped runs.
"""
import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import engine

RESULTS, PAGE, MARKERS = "results/ablation.jsonl", "docs/results.md", "<!-- {}ablation -->"
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
        ("hog", "l2, rgb, 9 bins, cells of 8x8", 83.6, ""),
        ("hog-none", "no normalization", 82.2, "--norm none"),
        ("hog-none-scaled", "no normalization, at the scale of l2", "", "--norm none "
         "--hog-scale 0.0115"),
        ("hog-l1", "l1", 82.8, "--norm l1"),
        ("hog-gray", "gray", 83.2, "--color gray"),
        ("hog-opponent", "opponent colors", 83.5, "--color opponent"),
        ("hog-6-bins", "6 bins", 83.4, "--bins 6"),
        ("hog-12-bins", "12 bins", 83.5, "--bins 12"),
        ("hog-cell-4", "cells of 4x4", 83.2, "--cell 4"),
        ("hog-cell-16", "cells of 16x16", 83.2, "--cell 16")])}
ROWS = {name: (kind, flags) for _, kind, rows in TABLES.values() for name, _, _, flags in rows}
# Flags of pre-training, of fine-tuning, and more of fine-tuning after pre-training and without.
SMALL = {
    "image": ("--model vit_tiny --batch-size 128 --lr-batch 128 --warmup-epochs 2 --epochs 20",
              "--model vit_tiny --val-epochs 0 --mixup 0 --cutmix 0 --erase 0 --lr-batch 64 "
              "--rand-augment '' --epochs 30 --limit-per-class 50",
              "--layer-decay 0.75", "--layer-decay 1"),
    "video": ("--model mvit_tiny --batch-size 8 --lr-batch 8 --warmup-epochs 2 --epochs 24",
              "--model mvit_tiny --no-baseline --val-epochs 0 --epochs 30 --limit-per-class 50",
              "--layer-decay 1", "--layer-decay 1")}
# Sec. 5.2 pre-trains for 300 epochs. Sec. 4.3 fine-tunes for 200. The recipe has 100 passes with
# two augmentations of each clip, which the release counts as 200.
FULL = {kind: (f"--recipe {name} --epochs 300", "", f"--recipe {name}", f"--recipe {name}_scratch")
        for kind, name in (("image", "in1k_vit_b"), ("video", "k400_mvitv2_s"))}


def commands(name, seed, data, full):
    """The commands of one row and seed. The last one is a fine-tuning."""
    kind, flags = ROWS[name]
    before, after, tuned, scratch = (FULL if full else SMALL)[kind]
    launch = "torchrun --nproc_per_node=8" if full else shlex.quote(sys.executable)
    out, data = f"out/ablate{'-full' * full}/{name}", f"--data {shlex.quote(data)} --resume"
    start = f"--init '' {scratch}" if flags is None else f"--init {out}/pretrain/last.pt {tuned}"
    runs = [f"pretrain.py {data} {before} {flags} --out {out}/pretrain",
            f"finetune.py {data} {after} {start} --seed {seed} --out {out}/finetune-seed{seed}"]
    return [f"{launch} {run}" for run in runs[flags is None:]]


def markdown(lines):
    """The tables of which at least two rows were run with the same data and flags."""
    text = ""
    for data, flags in dict.fromkeys((line["data"], line["flags"]) for line in lines):
        top1 = {row: [100 * line["top1"] for line in lines
                      if (line["row"], line["data"], line["flags"]) == (row, data, flags)]
                for row in ROWS}
        for number, (title, _, rows) in TABLES.items():
            if sum(bool(top1[row]) for row, *_ in rows) > 1:
                text += f"\nTable {number}: {title}. Ours: {data}, `{flags}`.\n\n"
                text += "| | paper | ours | seeds |\n|---|---|---|---|\n"
                for row, label, paper, _ in rows:
                    if top1[row]:
                        seeds = ", ".join(f"{x:.2f}" for x in top1[row])
                        text += (f"| {label} | {paper} | {sum(top1[row]) / len(top1[row]):.1f} | "
                                 f"{seeds} |\n")
                missing = [f"{label} ({paper})" if paper else label
                           for row, label, paper, _ in rows if not top1[row]]
                text += f"\nNot run: {', '.join(missing)}.\n" if missing else ""
    return text + "\nTop-1 in percent: the mean, and each seed of fine-tuning.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="DATA", help="folder with train/<class>/, val/<class>/")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[], help="see --list")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of fine-tuning")
    parser.add_argument("--full", action="store_true", help="the paper's recipes, on eight GPUs")
    parser.add_argument("--list", action="store_true", help="print the full-size commands")
    args = parser.parse_args()
    for name in ROWS if args.list else ():
        print(f"{name}:", *commands(name, 0, args.data, True), sep="\n    ")
    lines = [json.loads(text) for text in Path(RESULTS).read_text().splitlines()]
    for name, seed in [(name, seed) for name in args.rows for seed in args.seeds]:
        flags = "; ".join((FULL if args.full else SMALL)[ROWS[name][0]][:2])
        line = {"row": name, "seed": seed, "data": Path(args.data).resolve().name, "flags": flags}
        if not any(line.items() <= other.items() for other in lines):
            for command in commands(name, seed, args.data, args.full):
                print(command, flush=True)
                if os.system(command):
                    raise ValueError("the command above failed or was stopped; see its output")
            result = json.loads(next(Path(command.split()[-1]).glob("last_*.json")).read_text())
            lines.append(line | {key: result[key] for key in ("top1", "top5", "files")}
                         | {key: result["about"][key] for key in ("date", "commit", "torch")})
            with open(RESULTS, "a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    begin, end = MARKERS.format(""), MARKERS.format("/")
    before, _, rest = Path(PAGE).read_text().partition(begin)
    Path(PAGE).write_text(f"{before}{begin}\n{markdown(lines)}\n{end}{rest.partition(end)[2]}")
    print(f"wrote {PAGE}, from the results in {RESULTS}: {len(lines)}")


if __name__ == "__main__":
    engine.run_main(main)
