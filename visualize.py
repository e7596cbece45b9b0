"""What a pre-trained model predicts, as in Figures 1 and 6.

    python visualize.py --checkpoint out/pretrain/last.pt --input A.mp4 B.mp4 --output figure.png

The prediction shows the target, dimmed and blue, where the input is visible. For clips an
animation is written beside the picture (.gif). dVAE tokens have a color each. Their predictions are
green where right, else red, bright where the right token is probable. Features show principal
components, their predictions cosine similarity; pseudo-labels number and color of the top class.
"""
import argparse
import json
import os

from engine import read_checkpoint, run_main  # isort: skip (before torch)
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import layouts
import masking
import mvit
from hog import draw_hog, unpatch_hog
from models import build_maskfeat

ROWS = ("masked input", "prediction", "target", "original")
GAP, MARGIN, TITLE = 4, 96, 20  # pixels between pictures, left of them and above them


def to_image(pixels, recipe):
    """(3, H, W) normalized -> uint8 (H, W, 3)."""
    mean, std = (torch.tensor(recipe[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = (pixels.cpu() * std + mean).mul(255).round().clamp(0, 255)
    return pixels.byte().permute(1, 2, 0).numpy()


def enlarge(array, zoom):
    """(H, W, ...) with every element repeated along both sides."""
    return array.repeat(zoom, axis=0).repeat(zoom, axis=1)


def draw_vectors(vectors, frame, grid, recipe, patch, scale, zoom):
    """HOG or pixels (h*w, dim) of one frame as uint8 (zoom*H, zoom*W, 3)."""
    if recipe["target"] == "hog":
        cells = unpatch_hog(vectors[None], grid, patch // recipe["cell"], recipe["bins"])[0]
        picture = np.asarray(draw_hog(cells, glyph=zoom * recipe["cell"], scale=scale))
        return picture[..., None].repeat(3, axis=2)
    pixels = vectors.float().view(*grid, 3, patch, patch)
    if recipe["pixel_norm"] == "patch":  # give back the mean and spread of each patch
        own = frame.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).permute(1, 3, 0, 2, 4)
        own = own.flatten(2)[..., None, None]  # (h, w, 3*patch*patch, 1, 1)
        pixels = pixels * (own.var(2, keepdim=True) + 1e-6).sqrt() + own.mean(2, keepdim=True)
    pixels = pixels.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # (3, H, W)
    return enlarge(to_image(pixels, recipe), zoom)


def token_colors(kind, prediction, target):
    """Colors of predicted and target tokens, (t, N, dim) or for the target of dvae (t, N, 1)."""
    if kind in ("dvae", "label"):
        classes = prediction.shape[-1]
        palette = np.random.default_rng(0).integers(40, 256, (classes, 3), np.uint8)
        if kind == "label":
            return palette[prediction.argmax(-1)], palette[target.argmax(-1)]
        probability = prediction.softmax(-1).gather(-1, target.long())  # of the right token
        right = prediction.argmax(-1, keepdim=True) == target.long()  # (t, N, 1)
        color = np.where(right.numpy(), (60, 210, 90), (210, 60, 50))
        color = color * (0.4 + 0.6 * probability.sqrt().numpy())
        return color.astype(np.uint8), palette[target[..., 0].long()]
    similarity = torch.cosine_similarity(prediction, target, dim=-1).clamp(min=0)
    similarity = similarity[..., None].expand(*target.shape[:2], 3)
    centered = target.flatten(0, 1) - target.flatten(0, 1).mean(0)  # (t*N, D), of all frames
    parts = centered @ torch.linalg.svd(centered, full_matrices=False)[2][:3].T
    parts = (parts / parts.std(0).clamp(min=1e-12) / 4 + 0.5).clamp(0, 1)
    return (255 * similarity).byte().numpy(), (255 * parts.view_as(similarity)).byte().numpy()


def write_numbers(picture, labels, grid):
    """Write the number of each token into its place in a uint8 picture (H, W, 3)."""
    picture = Image.fromarray(picture)
    h, w = picture.height // grid[0], picture.width // grid[1]
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(max(min(h, w) // 2.2, 6))
    for i, label in enumerate(labels.tolist()):
        y, x = divmod(i, grid[1])
        pen.text((x * w + w / 2, y * h + h / 2), str(label), "black", font, "mm")
    return np.asarray(picture)


@torch.no_grad()
def panels(model, recipe, x, mask, target_input=None):
    """The four pictures of each frame that the model predicts of one sample.

    x: (3, T, H, W) or (3, H, W), normalized. mask: bool, (t, h, w) or (h, w).
    target_input: what the target is computed from instead of x.
    Returns a list over token times of lists of uint8 (zoom*H, zoom*W, 3) in the order of ROWS.
    """
    kind, zoom = recipe["target"], max(2, round(200 / x.shape[-2]))  # screen pixels per pixel
    _, prediction = model(x[None], mask[None], target_input)
    target = model.compute_target(x[None], target_input)
    stride, patch = model.encoder.patch_stride[0], model.encoder.patch_stride[-1]
    frames = x[:, ::stride].transpose(0, 1) if x.ndim == 4 else x[None]  # (t, 3, H, W)
    mask, grid = mask.view(len(frames), *mask.shape[-2:]).cpu(), mask.shape[-2:]
    prediction, target = (v[0].float().cpu().view(len(frames), grid[0] * grid[1], -1)
                          for v in (prediction, target))
    if kind not in ("hog", "pixel"):
        colors = token_colors(kind, prediction, target)
    result = []
    for t, frame in enumerate(frames.cpu()):
        pair = prediction[t], target[t]
        if kind in ("hog", "pixel"):
            scale = None
            if kind == "hog":  # one brightness for both rows
                cells = unpatch_hog(target[t][None], grid, patch // recipe["cell"], recipe["bins"])
                scale = float(cells.sum(1).max())
            pair = [draw_vectors(v, frame, grid, recipe, patch, scale, zoom) for v in pair]
        else:
            pictures = [enlarge(color[t].reshape(*grid, 3), zoom * patch) for color in colors]
            pair = [write_numbers(picture, v.argmax(-1), grid) if kind == "label" else picture
                    for picture, v in zip(pictures, pair)]
        original = enlarge(to_image(frame, recipe), zoom)
        masked = enlarge(mask[t].numpy(), zoom * patch)[..., None]
        dimmed = (pair[1] * np.array([0.25, 0.35, 0.6])).astype(np.uint8)
        result.append([np.where(masked, np.uint8(110), original),
                       np.where(masked, pair[0], dimmed), pair[1], original])
    return result


def sheet(columns, names):
    """Columns of ROWS pictures, at most eight side by side, with a name above each."""
    H, W = columns[0][0].shape[:2]
    height = len(ROWS) * (H + GAP) + TITLE
    size = MARGIN + min(len(columns), 8) * (W + GAP), -(-len(columns) // 8) * height
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for i, (column, name) in enumerate(zip(columns, names)):
        top, left = i // 8 * height, MARGIN + i % 8 * (W + GAP)
        pen.text((left, top + 2), name[:W // 8], "black", font)
        for r, panel in enumerate(column):
            y = top + TITLE + r * (H + GAP)
            if i % 8 == 0:
                pen.text((4, y + H // 2 - 8), ROWS[r], "black", font)
            picture.paste(Image.fromarray(panel), (left, y))
    return picture


def draw(model, recipe, paths, output, device="cpu", frames=4, seed=0):
    """Write the picture of the files in `paths`, and beside it a GIF if the model takes clips.

    recipe: dict, as in a checkpoint. frames: of each clip in the picture. seed: of the masks.
    Takes the middle clip and the center crop. Returns the paths written.
    """
    video, stride = recipe["model"] in mvit.MODELS, model.encoder.patch_stride
    size = (recipe["num_frames"], *recipe["image_size"])[-len(stride):]
    grid = tuple(n // s for n, s in zip(size, stride))
    samples = layouts.Samples("video" if video else "image", list(paths), [-1] * len(paths), [])
    dataset = data.PretrainDataset(
        samples, recipe["image_size"], recipe["num_frames"] if video else None,
        recipe["sampling_rate"],
        **data.target_inputs(model.target, paths, grid[-2:], stride[0], recipe.get("teacher", "")))
    mean, std = (torch.tensor(recipe[key]).view(3, *[1] * len(grid)) for key in ("mean", "std"))
    columns, names, movie, titles = [], [], [], []
    for i, path in enumerate(paths):
        try:
            item = dataset.center(i)
        except data.UnreadableFile as error:
            print(f"left out: {error}")
            continue
        x = (item["x"].float() / 255 - mean) / std
        mask = masking.draw_mask(recipe["mask"], grid, recipe["mask_ratio"],
                                 data.sample_rng(seed, 0, i), recipe.get("frame_runs", True))
        target_input = item.get(model.target.input_kind)
        if target_input is not None:
            target_input = target_input[None].to(device)
        times = panels(model, recipe, x.to(device), torch.from_numpy(mask).to(device), target_input)
        movie.append(times)
        titles.append(os.path.basename(path))
        shown = range(len(times))
        if len(times) > frames:
            shown = [round(j * (len(times) - 1) / max(frames - 1, 1)) for j in range(frames)]
        columns += [times[t] for t in shown]
        names += [titles[-1]] + [f"frame {t * stride[0]}" for t in shown[1:]]
    if not columns:
        raise ValueError(f"none of {len(paths)} files can be read: no picture")
    sheet(columns, names).save(output)
    if not video:
        return [output]
    gif = os.path.splitext(output)[0] + ".gif"
    stills = [sheet(list(columns), titles) for columns in zip(*movie)]
    stills[0].save(gif, save_all=True, append_images=stills[1:], duration=250, loop=0)
    return [output, gif]


def draw_loss(log, output):
    """Write the loss curve of a log.jsonl against epochs. Returns the paths written."""
    with open(log) as file:
        entries = [json.loads(line) for line in file if line.endswith("\n")]
    points = [(d["epoch"], d["loss"]) for d in entries if d.get("loss") is not None]
    if len(points) < 2:
        raise ValueError(f"{log} has {len(points)} losses: a curve needs two")
    W, H, left, bottom = 720, 360, 60, 40
    # The first tenth starts far above the rest, so what is above its end is cut off.
    top = max(loss for _, loss in points[len(points) // 10:]) * 1.02
    low, last = min(loss for _, loss in points) * 0.98, points[-1][0]

    def place(epoch, loss):
        height = (top - min(loss, top)) / max(top - low, 1e-12)
        return left + (W - left - 20) * epoch / last, 20 + (H - bottom - 20) * height

    picture = Image.new("RGB", (W, H), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for i in range(5):
        loss, epoch = low + (top - low) * i / 4, last * i / 4
        pen.line((place(0, loss), place(last, loss)), "lightgray")
        pen.text((6, place(0, loss)[1] - 8), f"{loss:.4f}", "black", font)
        pen.text((place(epoch, low)[0] - 8, H - bottom + 6), f"{epoch:.1f}", "black", font)
    pen.text((W // 2, H - 18), "epoch", "black", font)
    pen.line([place(*point) for point in points], "steelblue", width=2)
    picture.save(output)
    return [output]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--input", required=True, nargs="+", help="clips or images")
    parser.add_argument("--output", default="prediction.png")
    parser.add_argument("--frames", type=int, default=4, help="frames of each clip in the picture")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--teacher", help="file of the teacher or folder of the label maps")
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.checkpoint)
    recipe = checkpoint.get("recipe")
    if not isinstance(recipe, dict) or "mask_token" not in checkpoint.get("model", {}):
        raise ValueError(f"{args.checkpoint} is no pre-training checkpoint of ours: "
                         "run convert.py on a released one")
    if args.frames < 1 or os.path.splitext(args.output)[1].lower() in ("", ".gif"):
        raise ValueError(f"--frames {args.frames} --output {args.output}: "
                         "use one frame or more and a name like figure.png")
    for path in args.input:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no file {path}")
    recipe["teacher"] = args.teacher or recipe.get("teacher", "")
    model = build_maskfeat(recipe)
    model.load_state_dict(checkpoint["model"])
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    written = draw(model, recipe, args.input, args.output, device, args.frames, args.seed)
    print("wrote " + " and ".join(written))


if __name__ == "__main__":
    run_main(main)
