"""Contact sheet of what the augmentations of fine-tuning do to a video or an image.

    python -m tools.augmentations FILE OUT.png [--seed N]
"""
import argparse
import os
import random

from engine import run_main  # isort: skip (before torch)
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import layouts
import video
from augment import apply_operations, draw_operations, erase, erasing_box, mix

SIZE, STEP, MARGIN = 128, 132, 190  # pixels: side of a picture, to the next one, for the texts


def contact_sheet(clip, seed):
    """PIL image of a clip (T, 3, height, width) uint8, six times augmented and twice mixed."""
    T, _, height, width = clip.shape
    normalize = lambda frames: (frames.transpose(0, 1) / 255 - 0.45) / 0.225  # (3, T, H, W)
    x = normalize(data.crop_resize(clip, data.center_box(height, width, 1), (SIZE, SIZE)))
    rows = [("original", x)]
    for row in range(6):
        rng = random.Random(f"{seed} {row}")
        operations = draw_operations(rng)
        images = [Image.fromarray(frame) for frame in clip.permute(0, 2, 3, 1).numpy()]
        frames = np.stack(apply_operations(images, operations))  # (T, height, width, 3)
        box = data.random_resized_crop_box(height, width, rng, scale=(0.08, 1))  # release
        frames = data.crop_resize(torch.from_numpy(frames).permute(0, 3, 1, 2), box, (SIZE, SIZE))
        flip, hole = rng.random() < 0.5, erasing_box(SIZE, SIZE, rng)
        frames = normalize(frames.flip(-1) if flip else frames)[None]
        lines = [name if a is None else f"{name} {a:.3g}" for name, a in operations]
        lines = (lines or ["no operation"]) + [f"crop to {box[2] * box[3] / height / width:.0%}"]
        lines += ["flip"] * flip + [f"erase {hole[2]} x {hole[3]}"] * (hole[2] > 0)
        frames = erase(frames, torch.tensor([hole]), torch.tensor([seed + row]))[0]
        rows.append(("\n".join(lines), frames))
    for name, off in (("mixup", {"cutmix": 0}), ("cutmix", {"mixup": 0})):
        rng, pair = random.Random(f"{name} {seed}"), torch.stack([x, x.flip(-2)])  # upside down
        mixed, targets = mix(pair, torch.tensor([0, 1]), 2, rng, smoothing=0, **off)
        rows.append((f"{name}\n{targets[0, 0]:.2f} of the original", mixed[0]))
    sheet = Image.new("RGB", (MARGIN + T * STEP, len(rows) * STEP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for r, (text, frames) in enumerate(rows):
        pen.text((6, r * STEP + 6), text, "black", font)
        frames = ((frames * 0.225 + 0.45) * 255).round().clamp(0, 255).byte()  # (3, T, H, W)
        for t, frame in enumerate(frames.permute(1, 2, 3, 0).numpy()):
            sheet.paste(Image.fromarray(frame), (MARGIN + t * STEP, r * STEP))
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="a video or an image")
    parser.add_argument("output", help="picture to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not os.path.isfile(args.file):
        raise FileNotFoundError(f"no file {args.file}")
    if layouts.media_kind(args.file) == "image":
        clip = torch.from_numpy(np.array(video.read_image(args.file))).permute(2, 0, 1)[None]
    else:
        clip = video.read_clip(args.file, num_frames=8, sampling_rate=8)  # (8, 3, height, width)
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    contact_sheet(clip, args.seed).save(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_main(main)
