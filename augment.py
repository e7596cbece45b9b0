"""Random augmentation for fine-tuning: RandAugment, color jitter, erasing, mixup and cutmix.

The paper fine-tunes with them (Sec. 4, 5); the settings are the release's: `rand-m7-mstd0.5-inc1`
for clips (m9 for images), erasing in "pixel" mode, mixup 0.8, cutmix 1.0, label smoothing 0.1.
Difference from the release: random numbers come from a generator that is passed in.
`rand_augment` and `color_jitter` take PIL images and run in the loader's workers. `erase` and `mix`
take the normalized batch and run on its device.
"""
import math
import re

import torch
from PIL import Image, ImageEnhance, ImageOps

GRAY = (128, 128, 128)  # release: what lies outside a clip (of images, the mean color)


def _look_up(image, function):
    """Each value of each color replaced by function(value)."""
    return image.point([function(value) for value in range(256)] * 3)


def _affine(image, matrix, fill):
    """Output pixel (x, y) shows the input at (ax + by + c, dx + ey + f), matrix = (a, ..., f)."""
    return image.transform(image.size, Image.AFFINE, matrix, Image.BICUBIC, fillcolor=fill)


def _enhance(name):
    """The entry of one of PIL's enhancers. 1 leaves the image as it is."""
    enhancer = getattr(ImageEnhance, name)
    return lambda level: 1 + 0.9 * level, True, lambda image, a, fill: enhancer(image).enhance(a)


# timm's "increasing" list. name: (argument a at level = magnitude / 10 or None, has a random sign?,
# effect of a on an image, with the color `fill` outside)
OPERATIONS = {
    "AutoContrast": (None, False, lambda image, a, fill: ImageOps.autocontrast(image)),
    "Equalize": (None, False, lambda image, a, fill: ImageOps.equalize(image)),
    "Invert": (None, False, lambda image, a, fill: ImageOps.invert(image)),
    "Rotate": (lambda level: 30 * level, True,  # degrees
               lambda image, a, fill: image.rotate(a, Image.BICUBIC, fillcolor=fill)),
    "Posterize": (lambda level: 4 - int(4 * level), False,  # bits that stay
                  lambda image, a, fill: _look_up(image, lambda v: v >> (8 - a) << (8 - a))),
    "Solarize": (lambda level: 256 - int(256 * level), False,  # inverted from here on
                 lambda image, a, fill: _look_up(image, lambda v: v if v < a else 255 - v)),
    "SolarizeAdd": (lambda level: int(110 * level), False,  # added below 128
                    lambda image, a, fill: _look_up(image, lambda v: v + a if v < 128 else v)),
    "Color": _enhance("Color"),  # 0: gray
    "Contrast": _enhance("Contrast"),  # 0: the mean gray
    "Brightness": _enhance("Brightness"),  # 0: black
    "Sharpness": _enhance("Sharpness"),  # 0: smoothed
    "ShearX": (lambda level: 0.3 * level, True,  # pixels per pixel
               lambda image, a, fill: _affine(image, (1, a, 0, 0, 1, 0), fill)),
    "ShearY": (lambda level: 0.3 * level, True,
               lambda image, a, fill: _affine(image, (1, 0, 0, a, 1, 0), fill)),
    "TranslateX": (lambda level: 0.45 * level, True,  # share of the side
                   lambda image, a, fill: _affine(image, (1, 0, a * image.width, 0, 1, 0), fill)),
    "TranslateY": (lambda level: 0.45 * level, True,
                   lambda image, a, fill: _affine(image, (1, 0, 0, 0, 1, a * image.height), fill)),
}


def rand_augment(images, rng, magnitude=7, std=0.5, num_ops=2, prob=0.5, fill=GRAY):
    """RandAugment, the same for all images (Cubuk et al., 2020).

    images: list of PIL RGB images, the frames of a clip or one image. rng: random.Random.
    magnitude, std: of the normal distribution of magnitudes, which are cut to [0, 10].
    num_ops: operations drawn, with replacement. prob: of each to happen. fill: color outside.
    Returns a list of PIL images. Release: before the crop of a clip, after the crop of an image.
    """
    return apply_operations(images, draw_operations(rng, magnitude, std, num_ops, prob), fill)


def draw_operations(rng, magnitude=7, std=0.5, num_ops=2, prob=0.5):
    """What rand_augment does: a list of at most num_ops pairs (name, argument), see OPERATIONS."""
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


def apply_operations(images, operations, fill=GRAY):
    """Pairs (name, argument), one after the other, on each of a list of PIL RGB images."""
    for image in images:
        if image.mode != "RGB":
            raise ValueError(f'cannot augment mode {image.mode}: convert("RGB") the image first')
    for name, argument in operations:
        effect = OPERATIONS[name][2]
        images = [effect(image, argument, fill) for image in images]
    return images


def parse_rand_augment(text):
    """timm's notation, "rand-m9-n4-mstd0.5-inc1" -> {"magnitude": 9.0, "std": 0.5, "num_ops": 4}.

    Defaults are timm's. Raises ValueError for an unknown part, and without inc1 ("increasing").
    """
    kind, *parts = text.split("-")
    found = {"m": "10", "n": "2", "mstd": "0"}
    for part in parts:
        match = re.fullmatch(r"(mstd|m)(\d+\.?\d*)|(n)(\d+)|(inc)(1)", part)
        if not match:
            raise ValueError(f"unknown part {part!r} of {text!r}: use m, n or mstd, and inc1")
        key, value = filter(None, match.groups())
        found[key] = value
    if kind != "rand" or "inc" not in found or float(found["m"]) > 10:
        raise ValueError(f"{text!r} is not rand-...-inc1 with m up to 10: try rand-m7-mstd0.5-inc1")
    return {"magnitude": float(found["m"]), "std": float(found["mstd"]), "num_ops": int(found["n"])}


def color_jitter(images, rng, strength=0.4):
    """Brightness, contrast and saturation in random order, the same for a list of PIL RGB images.

    Each by a factor in [1 - strength, 1 + strength]. Release: for images, without RandAugment.
    """
    if strength < 0:
        raise ValueError(f"color jitter of strength {strength}: use 0 (off) or more, 0.4 is usual")
    names = rng.sample(("Brightness", "Contrast", "Color"), 3)
    factors = [(name, rng.uniform(max(1 - strength, 0), 1 + strength)) for name in names]
    return apply_operations(images, factors)


def erasing_box(height, width, rng, prob=0.25, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3)):
    """The box to erase, (top, left, h, w) in pixels, one for all frames; (0, 0, 0, 0) for none.

    prob: of a box. area: its share of the image, uniform. aspect: h / w, uniform in the logarithm.
    Zhong et al., 2020. Release: ten attempts at a box that fits, a hundred for clips; here ten.
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
    """Fills the box of each sample with normal noise per pixel, color and frame. Changes x.

    x: (B, 3, T, H, W) or (B, 3, H, W) float, normalized, as the noise has mean 0 and deviation 1.
    boxes: (B, 4) ints of erasing_box. seeds: B ints. Both on the CPU, so that nothing waits.
    Returns x. Raises ValueError if x is not float or the lengths differ. Release: "pixel" mode.
    """
    if not x.is_floating_point() or not len(x) == len(boxes) == len(seeds):
        raise ValueError(f"cannot erase {x.dtype} x of {len(x)} samples with {len(boxes)} boxes "
                         f"and {len(seeds)} seeds: normalize x, give one of each per sample")
    for sample, (top, left, h, w), seed in zip(x, boxes.tolist(), seeds.tolist()):
        if h:
            generator = torch.Generator(x.device).manual_seed(seed)
            hole = sample[..., top:top + h, left:left + w]  # (3, T, h, w) or (3, h, w)
            hole.copy_(torch.randn(hole.shape, generator=generator, device=x.device))
    return x


def mix(x, labels, num_classes, rng, mixup=0.8, cutmix=1.0, prob=1.0, switch=0.5, smoothing=0.1):
    """Mixes each sample with its partner in the flipped batch, sample i with B - 1 - i.

    x: (B, 3, T, H, W) or (B, 3, H, W) float, which stays. labels: (B,) int64. rng: random.Random.
    mixup, cutmix: parameter a of lambda ~ Beta(a, a), drawn once for the batch; 0 turns one off.
    switch: probability of cutmix if both are on. prob: of mixing at all.
    smoothing: share of a label that is spread evenly over all classes.
    Returns (x, targets (B, num_classes) float32). Raises ValueError for a wrong x or setting.
    Zhang et al., 2018; Yun et al., 2019. Release: batch mode.
    """
    if not x.is_floating_point() or min(mixup, cutmix) < 0 or not 0 <= smoothing < 1:
        raise ValueError(f"cannot mix {x.dtype} with mixup={mixup}, cutmix={cutmix}, smoothing="
                         f"{smoothing}: normalize x; the release has 0.8, 1 and 0.1, and 0 is off")
    lam = 1.0  # the sample's own share
    if (mixup or cutmix) and rng.random() < prob:
        cut = cutmix > 0 and (mixup == 0 or rng.random() < switch)
        alpha = cutmix if cut else mixup
        lam = rng.betavariate(alpha, alpha)
        if cut:
            H, W = x.shape[-2:]
            top, bottom, left, right = _cutmix_box(H, W, lam, rng)
            lam = 1 - (bottom - top) * (right - left) / (H * W)  # the border may cut the box
            x = x.clone()
            x[..., top:bottom, left:right] = x[..., top:bottom, left:right].flip(0)
        else:
            x = torch.lerp(x.flip(0), x, lam)
    targets = torch.full((len(x), num_classes), smoothing / num_classes, device=x.device)
    targets.scatter_(1, labels[:, None].to(x.device), 1 - smoothing + smoothing / num_classes)
    return x, targets * lam + targets.flip(0) * (1 - lam)


def _cutmix_box(height, width, lam, rng):
    """(top, bottom, left, right): sqrt(1 - lam) of each side, around a point, within the image."""
    side = math.sqrt(1 - lam)
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = rng.randrange(height), rng.randrange(width)
    return max(y - half_h, 0), min(y + half_h, height), max(x - half_w, 0), min(x + half_w, width)


def soft_cross_entropy(logits, targets):
    """Mean over the batch of -sum(targets * log_softmax(logits)) in float32; both (B, classes)."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()
