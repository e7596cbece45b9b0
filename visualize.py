"""What a pre-trained model predicts, as in Figures 1 and 6, and the loss curve.

    python visualize.py --checkpoint out/pretrain/last.pt --input A.mp4 B.mp4 --output figure.png
    python visualize.py --log out/a/log.jsonl out/b/log.jsonl --output curves.png

Where the input is visible, the prediction shows the target, dimmed and blue. A clip also gives an
animation (.gif). A class (dVAE, pseudo-labels) has a color, features show principal components.
"""
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from engine import read_log, run_main

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import layouts
import masking
from checkpoints import check_weights, read_checkpoint
from hog import draw_hog, unpatch_hog
from models import build_maskfeat, check_checkpoint, token_grid

ROWS = ("masked input", "prediction", "target", "original")
NEEDED = {"model", "image_size", "num_frames", "sampling_rate", "output_stride", "patch_size",
          "expand", "drop_path", "checkpointing", "mean", "std", "mask", "mask_ratio", "target",
          "bins", "cell", "norm", "color", "gradient", "pixel_norm"}  # of a recipe
GAP, MARGIN, TITLE = 4, 96, 20  # pixels between pictures, left of them and above them


def to_images(pixels, recipe):
    """(t, 3, H, W) normalized -> uint8 (t, H, W, 3)."""
    mean, std = (torch.tensor(recipe[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels * std + mean).mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def panels(recipe, frames, mask, prediction, target):
    """Pictures of one sample, uint8 (t, 4, zoom*H, zoom*W, 3), in the order of ROWS.

    frames: (t, 3, H, W), normalized. mask: bool (t, h, w).
    prediction, target: float (t, h*w, dim), but the target of dvae is (t, h*w).
    """
    kind, grid, (H, W) = recipe["target"], mask.shape[1:], frames.shape[2:]
    patch, zoom = H // grid[0], max(2, round(200 / H))              # zoom: screen pixels per pixel
    enlarge = lambda array, zoom: array.repeat(zoom, axis=1).repeat(zoom, axis=2)
    pair = prediction, target
    if kind == "hog":
        cells = [unpatch_hog(v, grid, patch // recipe["cell"], recipe["bins"]) for v in pair]
        whites = cells[1].sum(1).amax((1, 2, 3)).tolist()           # the same in both pictures
        pair = [np.stack([draw_hog(frame, zoom * recipe["cell"], white).convert("RGB")
                          for frame, white in zip(v, whites)]) for v in cells]
    elif kind == "pixel":
        if recipe["pixel_norm"] == "patch":  # give back the mean and spread of each patch
            own = F.unfold(frames, patch, stride=patch).mT          # (t, h*w, 3*patch*patch)
            var, mean = torch.var_mean(own, 2, keepdim=True)
            pair = [v * (var + 1e-6).sqrt() + mean for v in pair]
        images = [F.fold(v.mT, (H, W), patch, stride=patch) for v in pair]
        pair = [enlarge(to_images(image, recipe), zoom) for image in images]
    else:
        if kind in ("dvae", "label"):
            classes = target.long() if kind == "dvae" else target.argmax(-1)
            colors = np.random.default_rng(0).integers(40, 256, (prediction.shape[-1], 3), np.uint8)
            pair = colors[prediction.argmax(-1)], colors[classes]   # (t, h*w, 3)
        else:
            center = target.mean((0, 1))                            # of all frames
            axes = torch.linalg.svd((target - center).flatten(0, 1), full_matrices=False)[2][:3].T
            parts = [(v - center) @ axes for v in (F.normalize(prediction, dim=-1), target)]
            spread = parts[1].std((0, 1)).clamp(min=1e-12)
            pair = [(255 * (v / spread / 4 + 0.5).clamp(0, 1)).byte().numpy() for v in parts]
        pair = [enlarge(color.reshape(-1, *grid, 3), zoom * patch) for color in pair]
    masked = enlarge(mask.numpy(), zoom * patch)[..., None]
    original = enlarge(to_images(frames, recipe), zoom)
    dimmed = (pair[1] * np.array([0.25, 0.35, 0.6])).astype(np.uint8)
    return np.stack([np.where(masked, np.uint8(110), original),
                     np.where(masked, pair[0], dimmed), pair[1], original], axis=1)


def save(picture, path, **options):
    """Save a picture that is there whole at any time."""
    stem, ending = os.path.splitext(path)
    beside = f"{stem}.tmp{ending}"
    picture.save(beside, **options)
    os.replace(beside, path)


def sheet(columns, names):
    """Columns of pictures (n, 4, H, W, 3), at most eight side by side, with a name above each."""
    H, W = columns.shape[2:4]
    height = len(ROWS) * (H + GAP) + TITLE
    size = MARGIN + min(len(columns), 8) * (W + GAP), -(-len(columns) // 8) * height
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for i, (column, name) in enumerate(zip(columns, names)):
        top, left = i // 8 * height, MARGIN + i % 8 * (W + GAP)
        fits = next(n for n in range(len(name), -1, -1) if font.getlength(name[:n]) <= W)
        pen.text((left, top + 2), name[:fits], "black", font)
        for panel, row, y in zip(column, ROWS, range(top + TITLE, top + height, H + GAP)):
            picture.paste(Image.fromarray(panel), (left, y))
            if i % 8 == 0:
                pen.text((4, y + H // 2 - 8), row, "black", font)
    return picture


@torch.no_grad()
def draw(model, recipe, paths, output, device="cpu", frames=4, seed=0):
    """Write the picture of the files in `paths`, and of clips a GIF. Returns the paths written.

    recipe: dict, as in a checkpoint. frames: of each clip in the picture. seed: of the masks.
    """
    stride = model.encoder.patch_stride
    T = recipe["num_frames"] if len(stride) == 3 else None
    grid = token_grid(recipe, model.encoder)
    dataset = data.PretrainDataset(
        layouts.Samples("video" if T else "image", list(paths), [-1] * len(paths), []),
        recipe["image_size"], T, recipe["sampling_rate"],
        **data.target_inputs(model.target, paths, grid[-2:], stride[0], recipe.get("teacher", "")))
    movie, names = [], []
    for i, path in enumerate(paths):
        try:
            item = dataset.center(i)
        except data.UnreadableFile as error:
            print(f"left out: {error}")
            continue
        mask = torch.from_numpy(masking.draw_mask(
            recipe["mask"], grid, recipe["mask_ratio"], data.sample_rng(seed, 0, i),
            recipe.get("frame_runs", True)))
        item = {key: value[None].to(device) for key, value in item.items()}  # a batch of one
        x = data.normalize(item["x"], recipe["mean"], recipe["std"])
        target_input = item.get(model.target.input_kind)
        # A model that was compiled in place for training would be compiled again for these shapes.
        _, prediction = model.forward(x, mask[None].to(device), target_input)
        target = model.compute_target(x, target_input)
        x = x[0, :, ::stride[0]].transpose(0, 1) if T else x        # (t, 3, H, W)
        pair = [v[0].unflatten(0, (len(x), -1)).float().cpu() for v in (prediction, target)]
        movie.append(panels(recipe, x.cpu(), mask.view(-1, *grid[-2:]), *pair))
        names.append("/".join(path.split(os.sep)[-2:]))            # the folder is often the class
    if not movie:
        raise ValueError(f"no picture, since none of these can be read: {', '.join(paths)[:200]}")
    movie = np.stack(movie, axis=1)                                 # (t, files, 4, H, W, 3)
    shown = np.linspace(0, len(movie) - 1, min(frames, len(movie))).round().astype(int)
    columns = movie[shown].swapaxes(0, 1).reshape(-1, *movie.shape[2:])
    titles = [f"frame {t * stride[0]}" if t else name for name in names for t in shown]
    save(sheet(columns, titles), output)
    if T is None:
        return [output]
    gif = os.path.splitext(output)[0] + ".gif"
    stills = [sheet(columns, names) for columns in movie]
    save(stills[0], gif, save_all=True, append_images=stills[1:], duration=250, loop=0)
    return [output, gif]


def draw_loss(logs, output):
    """Write the loss curves of one or several log.jsonl against epochs. Returns the paths written.

    Of each run: the training loss, and the loss on held-out samples (dark). Of a single run also
    what rules without a network reach there, as level lines (heldout.py).
    """
    runs, levels = [], {}
    for path in logs:
        entries, _ = read_log(path)
        runs.append([np.array([(entry["epoch"], entry[key]) for entry in entries
                               if entry.get(key) is not None]).reshape(-1, 2).T
                     for key in ("loss", "val_loss")])
        if len(logs) == 1:
            levels = next((d["levels"] for d in entries if "levels" in d), {})
        if runs[-1][0].shape[1] < 2:
            raise ValueError(f"{path}: a curve needs two losses, found: {runs[-1][0].shape[1]}")
    # The first tenth of the epochs starts far above the rest, so what is above its end is cut off.
    settled = [loss[epoch >= epoch[-1] / 10] for (epoch, loss), _ in runs]
    settled += [val_loss for _, (_, val_loss) in runs]
    values = np.concatenate([*settled, list(levels.values())])
    low, top, end = values.min() * 0.98, values.max() * 1.02, max(run[0][0][-1] for run in runs)
    picture = Image.new("RGB", (780, 360 + 16 * len(runs)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    height = lambda y: 20 + 300 * (top - np.minimum(y, top)) / max(top - low, 1e-12)
    for i in range(5):  # the axes go from (60, 320) to (700, 20)
        pen.line((60, 320 - 75 * i, 700, 320 - 75 * i), "lightgray")
        pen.text((6, 312 - 75 * i), f"{low + (top - low) * i / 4:.4f}", "black", font)
        pen.text((52 + 160 * i, 326), f"{end * i / 4:.3g}", "black", font)
    pen.text((360, 342), "epoch", "black", font)
    names, below = sorted(levels, key=levels.get), 400
    for rule in names:  # the lowest first; a name that would touch the one below goes above it
        y = height(levels[rule])
        pen.line((60, y, 700, y), "gray")
        below = min(y, below - 13)
        pen.text((706, below), rule, "dimgray", font, anchor="lm")
    for i, (path, curves) in enumerate(zip(logs, runs)):
        colors = [("steelblue", "navy"), ("orange", "saddlebrown"), ("mediumseagreen", "darkgreen"),
                  ("orchid", "purple")][i % 4]
        for (epochs, losses), color in zip(curves, colors):
            pen.line(list(zip(60 + 640 * epochs / end, height(losses))), color, width=2)
        if len(logs) > 1:
            pen.text((60, 356 + 16 * i), str(path), colors[1], font)
    save(picture, output)
    return [output]


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="of a pre-training")
    parser.add_argument("--input", nargs="+", default=[], help="clips or images")
    parser.add_argument("--log", nargs="+", help="draw the loss of these log.jsonl instead")
    parser.add_argument("--output", default="prediction.png", help="[prediction.png]")
    parser.add_argument("--frames", type=int, default=4, help="of each clip in the picture [4]")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--teacher", help="file of the teacher or folder of the label maps")
    args = parser.parse_args()
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    if args.log:
        return print("wrote", *draw_loss(args.log, args.output))
    if not args.checkpoint or not args.input:
        raise ValueError("give --checkpoint and --input, or --log")
    checkpoint = read_checkpoint(args.checkpoint)
    check_checkpoint(args.checkpoint, checkpoint)
    if lacking := NEEDED - checkpoint.get("recipe", {}).keys():
        raise ValueError(f"{args.checkpoint} is no pre-training of ours, its recipe lacks "
                         f"{min(lacking)}: name one, such as out/pretrain/last.pt. Of others, "
                         "convert.py makes one")
    if args.frames < 1:
        raise ValueError(f"--frames {args.frames}: use 1 or more")
    if missing := [path for path in args.input if not os.path.isfile(path)]:
        raise FileNotFoundError(f"no file {missing[0]}")
    recipe = checkpoint["recipe"] | ({"teacher": args.teacher} if args.teacher else {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_maskfeat(recipe).to(device).eval()
    check_weights(args.checkpoint, checkpoint.get("model"), model)
    model.load_state_dict(checkpoint["model"])
    written = draw(model, recipe, args.input, args.output, device, args.frames, args.seed)
    print("wrote " + " and ".join(written))


if __name__ == "__main__":
    run_main(main)
