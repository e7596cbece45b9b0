"""Random augmentation for fine-tuning: RandAugment, colour jitter, random erasing, mixup and cutmix.

Paper: fine-tuning in Sec. 4 and 5; the settings here are the release's.
Release: timm's augmentations and SlowFast's versions of them for clips; `rand-m7-mstd0.5-inc1` for clips (m9 for
images), erasing with probability 0.25 in "pixel" mode, mixup 0.8, cutmix 1.0, label smoothing 0.1.
Differences: the same distributions, but random numbers come from a generator passed in, so not the same draws.
What works on pixels takes PIL images and runs in a loader's worker; `erase` and `mix` take the normalised batch and
run where it is.

    python augment.py FILE OUT.png [--seed N]     contact sheet of what happens to a video or an image
"""
import argparse
import math
import os
import random
import re

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

GREY = (128, 128, 128)  # release: what moves in from outside a clip; for images it is the data set's mean colour

# ---------------------------------------------------------------- RandAugment


def _look_up(image, function):
    """Each value of each colour replaced by function(value)."""
    return image.point([function(value) for value in range(256)] * 3)


def _affine(image, matrix, fill):
    """Output pixel (x, y) shows the input at (ax + by + c, dx + ey + f), matrix = (a, b, c, d, e, f)."""
    return image.transform(image.size, Image.AFFINE, matrix, Image.BICUBIC, fillcolor=fill)


# timm's "increasing" list: everything but the first three gets stronger with the magnitude.
# name: (argument a at level = magnitude / 10, has a random sign?, what a does to an image; fill: colour from outside)
OPERATIONS = {
    "AutoContrast": (None, False, lambda image, a, fill: ImageOps.autocontrast(image)),
    "Equalize": (None, False, lambda image, a, fill: ImageOps.equalize(image)),
    "Invert": (None, False, lambda image, a, fill: ImageOps.invert(image)),
    "Rotate": (lambda level: 30 * level, True,                                         # degrees
               lambda image, a, fill: image.rotate(a, Image.BICUBIC, fillcolor=fill)),
    "Posterize": (lambda level: 4 - int(4 * level), False,                             # bits kept; 0 at 10: black
                  lambda image, a, fill: _look_up(image, lambda value: value >> (8 - a) << (8 - a))),
    "Solarize": (lambda level: 256 - int(256 * level), False,                          # inverted from here on
                 lambda image, a, fill: _look_up(image, lambda value: value if value < a else 255 - value)),
    "SolarizeAdd": (lambda level: int(110 * level), False,                             # added below 128
                    lambda image, a, fill: _look_up(image, lambda value: value + a if value < 128 else value)),
    "Color": (lambda level: 1 + 0.9 * level, True,                                     # 0 grey, 1 as it is
              lambda image, a, fill: ImageEnhance.Color(image).enhance(a)),
    "Contrast": (lambda level: 1 + 0.9 * level, True,                                  # 0 the mean grey
                 lambda image, a, fill: ImageEnhance.Contrast(image).enhance(a)),
    "Brightness": (lambda level: 1 + 0.9 * level, True,                                # 0 black
                   lambda image, a, fill: ImageEnhance.Brightness(image).enhance(a)),
    "Sharpness": (lambda level: 1 + 0.9 * level, True,                                 # 0 smoothed
                  lambda image, a, fill: ImageEnhance.Sharpness(image).enhance(a)),
    "ShearX": (lambda level: 0.3 * level, True,                                        # pixels per pixel
               lambda image, a, fill: _affine(image, (1, a, 0, 0, 1, 0), fill)),
    "ShearY": (lambda level: 0.3 * level, True,
               lambda image, a, fill: _affine(image, (1, 0, 0, a, 1, 0), fill)),
    "TranslateX": (lambda level: 0.45 * level, True,                                   # share of the width
                   lambda image, a, fill: _affine(image, (1, 0, a * image.width, 0, 1, 0), fill)),
    "TranslateY": (lambda level: 0.45 * level, True,                                   # share of the height
                   lambda image, a, fill: _affine(image, (1, 0, 0, 0, 1, a * image.height), fill)),
}


def rand_augment(images, rng, magnitude=7, std=0.5, num_ops=2, prob=0.5, fill=GREY):
    """RandAugment, the same for all images; the defaults are the release's `rand-m7-mstd0.5-inc1`.

    images: list of PIL RGB images, a clip's frames or one image. rng: random.Random.
    magnitude, std: of each operation, normally distributed, cut to [0, 10].
    num_ops: operations drawn, with replacement; prob: of each to happen.
    fill: colour of what lies outside the image; the release's is (124, 116, 104) for ImageNet.
    Returns a list of PIL images. Paper of the method: Cubuk et al., 2020. Release: before the crop for clips, after
    crop and flip for images.
    """
    return apply_operations(images, draw_operations(rng, magnitude, std, num_ops, prob), fill)


def draw_operations(rng, magnitude=7, std=0.5, num_ops=2, prob=0.5):
    """What rand_augment does: a list of (name, argument), see OPERATIONS; at most num_ops, often fewer."""
    drawn = []
    for name in rng.choices(list(OPERATIONS), k=num_ops):
        if rng.random() >= prob:
            continue
        argument, signed, _ = OPERATIONS[name]
        level = min(max(rng.gauss(magnitude, std), 0), 10) / 10
        if signed and rng.random() < 0.5:
            level = -level
        drawn.append((name, argument(level) if argument else None))
    return drawn


def apply_operations(images, operations, fill=GREY):
    """A list of (name, argument) one after the other, on each of a list of PIL RGB images."""
    for image in images:
        if image.mode != "RGB":
            raise ValueError(f'an image of mode {image.mode} cannot be augmented: convert("RGB") it first')
    for name, argument in operations:
        effect = OPERATIONS[name][2]
        images = [effect(image, argument, fill) for image in images]
    return images


def parse_rand_augment(text):
    """timm's notation, "rand-m9-n4-mstd0.5-inc1" -> {"magnitude": 9.0, "std": 0.5, "num_ops": 4}.

    What is left out is as in timm: m10, n2, mstd0. Raises ValueError for parts that are unknown here, and without
    inc1: only the "increasing" operations are here.
    """
    kind, *parts = text.split("-")
    found = {"m": "10", "n": "2", "mstd": "0"}
    for part in parts:
        match = re.fullmatch(r"(mstd|m)(\d+\.?\d*)|(n)(\d+)|(inc)(1)", part)
        if not match:
            raise ValueError(f"unknown part {part!r} of {text!r}: use m, n, mstd with a number, and inc1")
        key, value = filter(None, match.groups())
        found[key] = value
    if kind != "rand" or "inc" not in found or float(found["m"]) > 10:
        raise ValueError(f"{text!r} is not rand-...-inc1 with a magnitude up to 10, such as rand-m7-mstd0.5-inc1")
    return {"magnitude": float(found["m"]), "std": float(found["mstd"]), "num_ops": int(found["n"])}


def color_jitter(images, rng, strength=0.4):
    """Brightness, contrast and saturation in random order, each times a factor in [1 - strength, 1 + strength].

    images: list of PIL RGB images, all changed alike. Release: only for images, and not together with RandAugment.
    """
    if strength < 0:
        raise ValueError(f"color jitter of strength {strength}: use 0 (off) or more, 0.4 is usual")
    names = rng.sample(("Brightness", "Contrast", "Color"), 3)
    return apply_operations(images, [(name, rng.uniform(max(1 - strength, 0), 1 + strength)) for name in names])


# ---------------------------------------------------------------- random erasing


def erasing_box(height, width, rng, prob=0.25, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3)):
    """Draws the box to erase, (top, left, h, w) in pixels; h = w = 0: none. One for all frames of a clip.

    prob: of a box. area: its share of the image, uniform. aspect: h / w, uniform in the logarithm.
    Paper of the method: Zhong et al., 2020. Release: up to ten attempts (a hundred for clips) at a box that fits.
    """
    if rng.random() >= prob:
        return 0, 0, 0, 0
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < h < height and 0 < w < width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return 0, 0, 0, 0


def erase(x, boxes, seeds):
    """Fills each sample's box with normal noise of its own for every pixel, colour and frame, in place.

    x: (B, 3, T, H, W) or (B, 3, H, W) float, normalised: the noise has mean 0 and deviation 1.
    boxes: (B, 4) ints from erasing_box; seeds: B ints. Both on the CPU, so that no device is waited for.
    A sample's noise depends on its box, seed and kind of device only. Returns x.
    Raises ValueError if x is not float or the lengths differ. Release: "pixel" mode.
    """
    if not x.is_floating_point() or not len(x) == len(boxes) == len(seeds):
        raise ValueError(f"cannot erase in {x.dtype} x of {len(x)} samples with {len(boxes)} boxes and {len(seeds)} "
                         "seeds: normalise first, and give one of each per sample")
    for sample, (top, left, h, w), seed in zip(x, boxes.tolist(), seeds.tolist()):
        if h:
            generator = torch.Generator(x.device).manual_seed(seed)
            hole = sample[..., top:top + h, left:left + w]                    # (3, T, h, w) or (3, h, w)
            hole.copy_(torch.randn(hole.shape, generator=generator, device=x.device))
    return x


# ---------------------------------------------------------------- mixup and cutmix


def mix(x, labels, num_classes, rng, mixup=0.8, cutmix=1.0, prob=1.0, switch=0.5, smoothing=0.1):
    """Mixes each sample with its partner in the flipped batch: sample i with B - 1 - i.

    x: (B, 3, T, H, W) or (B, 3, H, W) float; left as it is. labels: (B,) int64. rng: random.Random.
    mixup, cutmix: parameter a of lambda ~ Beta(a, a), drawn once for the batch; 0 turns one off. With both on, cutmix
    is chosen with probability `switch`. prob: of mixing at all.
    smoothing: the share of a label that is spread evenly over all classes.
    Returns (x, targets (B, num_classes) float32). Raises ValueError if x is not float or a setting is out of range.
    Papers of the methods: Zhang et al., 2018; Yun et al., 2019. Release: batch mode.
    """
    if not x.is_floating_point() or min(mixup, cutmix) < 0 or not 0 <= smoothing < 1:
        raise ValueError(f"cannot mix {x.dtype} with mixup={mixup}, cutmix={cutmix}, smoothing={smoothing}: normalise "
                         "first; the release has 0.8, 1 and 0.1, and 0 turns one off")
    lam = 1.0                                                                 # the sample's own share
    if (mixup or cutmix) and rng.random() < prob:
        cut = cutmix > 0 and (mixup == 0 or rng.random() < switch)
        alpha = cutmix if cut else mixup
        lam = rng.betavariate(alpha, alpha)
        if cut:
            top, bottom, left, right = _cutmix_box(*x.shape[-2:], lam, rng)
            lam = 1 - (bottom - top) * (right - left) / (x.shape[-2] * x.shape[-1])  # what the border left of it
            x = x.clone()
            x[..., top:bottom, left:right] = x[..., top:bottom, left:right].flip(0)
        else:
            x = torch.lerp(x.flip(0), x, lam)
    targets = torch.full((len(x), num_classes), smoothing / num_classes, device=x.device)
    targets.scatter_(1, labels[:, None].to(x.device), 1 - smoothing + smoothing / num_classes)
    return x, targets * lam + targets.flip(0) * (1 - lam)


def _cutmix_box(height, width, lam, rng):
    """(top, bottom, left, right): sides sqrt(1 - lam) of the image's, centre anywhere in it, cut off at the border."""
    side = math.sqrt(1 - lam)
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = rng.randrange(height), rng.randrange(width)
    return max(y - half_h, 0), min(y + half_h, height), max(x - half_w, 0), min(x + half_w, width)


def soft_cross_entropy(logits, targets):
    """Mean over the batch of -sum(targets * log_softmax(logits)), in float32. logits, targets: (B, num_classes)."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()


# ---------------------------------------------------------------- python augment.py FILE OUT.png


def contact_sheet(rows, margin=190, gap=4):
    """rows: list of (text, uint8 (T, 3, H, W)). Returns a PIL image: texts on the left, frames side by side."""
    T, _, H, W = rows[0][1].shape
    sheet = Image.new("RGB", (margin + T * (W + gap), len(rows) * (H + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for r, (text, frames) in enumerate(rows):
        pen.text((6, r * (H + gap) + 6), text, "black", font)
        for t, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame.permute(1, 2, 0).numpy()), (margin + t * (W + gap), r * (H + gap)))
    return sheet


def main():
    from data import center_box, crop_resize, random_resized_crop_box, read_clip, read_image
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a video or an image")
    parser.add_argument("output", help="picture to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not os.path.isfile(args.file):
        raise FileNotFoundError(f"no file {args.file}")
    if args.file.lower().endswith((".jpg", ".jpeg", ".png", ".bmp", ".webp")):
        clip = torch.from_numpy(np.array(read_image(args.file))).permute(2, 0, 1)[None]  # (1, 3, height, width)
    else:
        clip = read_clip(args.file, num_frames=8, sampling_rate=8)            # (8, 3, height, width)
    size, (height, width) = (128, 128), clip.shape[-2:]
    normalise = lambda frames: (frames.transpose(0, 1) / 255 - 0.45) / 0.225  # (3, T, H, W); release, Kinetics
    to_bytes = lambda x: ((x.transpose(0, 1) * 0.225 + 0.45) * 255).round().clamp(0, 255).byte()

    whole = center_box(height, width, 1)
    rows = [("original", crop_resize(clip, whole, size))]
    for row in range(6):
        rng = random.Random(f"{args.seed} {row}")
        operations = draw_operations(rng)
        images = apply_operations([Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip], operations)
        frames = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)       # (T, 3, height, width)
        box = random_resized_crop_box(height, width, rng, scale=(0.08, 1))    # release: 0.08 to 1
        frames = crop_resize(frames, box, size)                               # (T, 3, H, W)
        flip, hole = rng.random() < 0.5, erasing_box(*size, rng)
        frames = frames.flip(-1) if flip else frames
        x = erase(normalize(frames)[None], torch.tensor([hole]), torch.tensor([args.seed + row]))[0]
        text = [name if argument is None else f"{name} {argument:.3g}" for name, argument in operations]
        text = (text or ["no operation"]) + [f"crop to {box[2] * box[3] / height / width:.0%}"]
        text += ["flip"] * flip + [f"erase {hole[2]} x {hole[3]}"] * (hole[2] > 0)
        rows.append(("\n".join(text), to_bytes(x)))
    x = normalize(rows[0][1])
    pair = torch.stack([x, x.flip(-2)])                                       # upside down, to tell them apart
    for name, off in (("mixup", {"cutmix": 0}), ("cutmix", {"mixup": 0})):
        x, targets = mix(pair, torch.tensor([0, 1]), 2, random.Random(f"{name} {args.seed}"), smoothing=0, **off)
        rows.append((f"{name}\n{targets[0, 0]:.2f} of the original", to_bytes(x[0])))
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    contact_sheet(rows).save(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    from engine import run_main
    run_main(main)
