"""What a pre-trained model predicts, as in Figures 1 and 6: masked input, prediction, target, original.

    python visualize.py --checkpoint out/pretrain/last.pt --input CLIP.mp4 OTHER.mp4 --output prediction.png

For clips the picture shows several frames of each, and an animation of all of them is written beside it (.gif).
In the row of predictions, hidden patches show what the model predicts, visible ones the target, dimmed and blue.

HOG and pixels are shown as they are; dVAE tokens by a colour each, and predictions of them green where the token is
right, else red, brighter the more probable it was; features by their three principal components as colours, and
predictions by their cosine similarity to the target; pseudo-labels by number and colour of the top class.
"""
import argparse
import json
import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import layouts
import masking
import mvit
from models import build_maskfeat
from engine import read_checkpoint, run_main
from hog import draw_hog, unpatch_hog

ROWS = ("masked input", "prediction", "target", "original")
GAP, MARGIN = 4, 96                   # pixels between pictures, and for the names of the rows


def to_image(pixels, recipe):
    """(3, H, W) normalised -> uint8 (H, W, 3)."""
    mean, std = (torch.tensor(recipe[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels.cpu() * std + mean).mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def enlarge(array, zoom):
    """(H, W, ...) with every element repeated along both sides."""
    return array.repeat(zoom, axis=0).repeat(zoom, axis=1)


def draw_vectors(vectors, frame, grid, recipe, patch, scale, zoom):
    """Feature vectors (h*w, dim) of one frame as uint8 (zoom*H, zoom*W, 3): HOG glyphs or pixels."""
    if recipe["target"] == "hog":
        histograms = unpatch_hog(vectors[None], grid, patch // recipe["cell"], recipe["bins"])[0]
        picture = draw_hog(histograms, glyph=zoom * recipe["cell"], scale=scale)
        return np.asarray(picture)[..., None].repeat(3, axis=2)
    pixels = vectors.float().view(*grid, 3, patch, patch)
    if recipe["pixel_norm"] == "patch":                                       # give back each patch's mean and spread
        own = frame.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).permute(1, 3, 0, 2, 4).flatten(2)
        pixels = pixels * (own.var(-1) + 1e-6).sqrt()[..., None, None, None] + own.mean(-1)[..., None, None, None]
    return enlarge(to_image(pixels.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2), recipe), zoom)


def token_colors(target, prediction, goal):
    """Colours of predicted and of wanted tokens, uint8 (t, N, 3) each, for targets that are not pictures themselves.

    prediction, goal: (t, N, dim), or (t, N, 1) for the goal of dvae, of one sample.
    """
    if target in ("dvae", "label"):
        palette = np.random.default_rng(0).integers(40, 256, (prediction.shape[-1], 3), np.uint8)
        if target == "label":
            return palette[prediction.argmax(-1)], palette[goal.argmax(-1)]
        probability = prediction.softmax(-1).gather(-1, goal.long())          # of the right token, (t, N, 1)
        goal = goal[..., 0].long()
        right = (prediction.argmax(-1) == goal)[..., None].numpy()
        shade = np.where(right, (60, 210, 90), (210, 60, 50)) * (0.4 + 0.6 * probability.sqrt().numpy())
        return shade.astype(np.uint8), palette[goal]
    alike = torch.cosine_similarity(prediction, goal, dim=-1).clamp(min=0)[..., None].expand(*goal.shape[:2], 3)
    centred = goal.flatten(0, 1) - goal.flatten(0, 1).mean(0)                 # (t*N, D): one basis for all frames
    parts = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:3].T
    parts = (parts / parts.std(0).clamp(min=1e-12) / 4 + 0.5).clamp(0, 1).unflatten(0, goal.shape[:2])
    return (255 * alike).byte().numpy(), (255 * parts).byte().numpy()


def number(picture, labels, grid):
    """Write each token's number into its place in a uint8 picture (H, W, 3)."""
    picture = Image.fromarray(picture)
    pen, h, w = ImageDraw.Draw(picture), picture.height // grid[0], picture.width // grid[1]
    font = ImageFont.load_default(max(min(h, w) // 2.2, 6))
    for i, label in enumerate(labels.tolist()):
        pen.text((i % grid[1] * w + w / 2, i // grid[1] * h + h / 2), str(label), "black", font, "mm")
    return np.asarray(picture)


@torch.no_grad()
def panels(model, recipe, x, mask, extra=None):
    """The four pictures of every frame the model predicts of one sample.

    x: (3, T, H, W) or (3, H, W) normalised; mask: bool, (t, h, w) or (h, w); extra: what the target needs instead of x.
    Returns a list over token times of lists of uint8 (zoom*H, zoom*W, 3) in the order of ROWS.
    """
    zoom = max(2, round(200 / x.shape[-2]))                                   # screen pixels per input pixel
    _, prediction = model(x[None], mask[None], extra)
    goal = model.compute_target(x[None], extra)
    patch, stride = model.encoder.patch_stride[-1], model.encoder.patch_stride[0]
    frames = x[:, ::stride].transpose(0, 1) if x.ndim == 4 else x[None]       # (t, 3, H, W)
    mask = mask.view(len(frames), *mask.shape[-2:]).cpu()
    grid = mask.shape[1:]
    prediction, goal = (v[0].float().cpu().view(len(frames), grid[0] * grid[1], -1) for v in (prediction, goal))
    result, drawn = [], recipe["target"] in ("hog", "pixel")
    colors = None if drawn else token_colors(recipe["target"], prediction, goal)
    for t, (frame, hidden, predicted, wanted) in enumerate(zip(frames.cpu(), mask, prediction, goal)):
        original = enlarge(to_image(frame, recipe), zoom)
        big = enlarge(hidden.numpy(), zoom * patch)[..., None]
        scale = None
        if recipe["target"] == "hog":                                         # one brightness for both rows
            scale = float(unpatch_hog(wanted[None], grid, patch // recipe["cell"], recipe["bins"]).sum(1).max())
        if drawn:
            guess, target = (draw_vectors(v, frame, grid, recipe, patch, scale, zoom) for v in (predicted, wanted))
        else:
            guess, target = (enlarge(color[t].reshape(*grid, 3), zoom * patch) for color in colors)
        if recipe["target"] == "label":
            guess, target = number(guess, predicted.argmax(-1), grid), number(target, wanted.argmax(-1), grid)
        dimmed = (target * np.array([0.25, 0.35, 0.6])).astype(np.uint8)
        result.append([np.where(big, np.uint8(110), original), np.where(big, guess, dimmed), target, original])
    return result


def sheet(columns, names):
    """Columns of ROWS pictures, side by side in blocks of at most eight, with the rows named at the left."""
    blocks = [columns[i:i + 8] for i in range(0, len(columns), 8)]
    H, W = columns[0][0].shape[:2]
    height = len(blocks) * (len(ROWS) * (H + GAP) + 20)
    picture = Image.new("RGB", (MARGIN + len(blocks[0]) * (W + GAP), height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for b, block in enumerate(blocks):
        top = b * (len(ROWS) * (H + GAP) + 20)
        for r, row in enumerate(ROWS):
            pen.text((4, top + 20 + r * (H + GAP) + H // 2 - 8), row, "black", font)
        for c, column in enumerate(block):
            left = MARGIN + c * (W + GAP)
            pen.text((left, top + 2), names[b * 8 + c][:W // 8], "black", font)
            for r, panel in enumerate(column):
                picture.paste(Image.fromarray(panel), (left, top + 20 + r * (H + GAP)))
    return picture


def draw(model, recipe, paths, output, device="cpu", frames=4, seed=0):
    """Write `output`, and beside it a GIF if the model takes clips, for the files in `paths`. Returns what was written.

    recipe: dict as in a checkpoint. frames: how many frames of each clip the picture shows. Middle clip, centre crop,
    masks drawn from `seed`.
    """
    video = recipe["model"] in mvit.MODELS
    stride = model.encoder.patch_stride
    size = (recipe["num_frames"], *recipe["image_size"]) if video else recipe["image_size"]
    grid = tuple(n // s for n, s in zip(size, stride))
    samples = layouts.Samples("video" if video else "image", list(paths), [-1] * len(paths), [])
    dataset = data.PretrainDataset(samples, recipe["image_size"], recipe["num_frames"] if video else None,
                                recipe["sampling_rate"],
                                **data.target_inputs(model.target, paths, grid[-2:], stride[0], recipe.get("teacher", "")))
    mean, std = (torch.tensor(recipe[key]).view(3, *[1] * len(grid)) for key in ("mean", "std"))
    columns, names, movie, titles = [], [], [], []
    for i, path in enumerate(paths):
        try:
            item = dataset.center(i)
            x = (item["x"].float() / 255 - mean) / std
        except data.UnreadableFile as error:
            print(f"left out: {error}")
            continue
        mask = masking.draw_mask(recipe["mask"], grid, recipe["mask_ratio"], data.sample_rng(seed, 0, i),
                                 recipe.get("frame_runs", True))
        extra = item[model.target.input_kind][None].to(device) if model.target.input_kind in item else None
        steps = panels(model, recipe, x.to(device), torch.from_numpy(mask).to(device), extra)
        movie.append(steps)
        titles.append(os.path.basename(path))
        shown = range(len(steps)) if len(steps) <= frames else \
            [round(j * (len(steps) - 1) / max(frames - 1, 1)) for j in range(frames)]
        for j in shown:
            columns.append(steps[j])
            names.append(titles[-1] if j == shown[0] else f"frame {j * stride[0]}" if video else "")
    if not columns:
        raise ValueError(f"none of {len(paths)} files can be read: no picture")
    sheet(columns, names).save(output)
    if not video:
        return [output]
    gif = os.path.splitext(output)[0] + ".gif"
    still = [sheet([steps[min(t, len(steps) - 1)] for steps in movie], titles)
             for t in range(max(map(len, movie)))]
    still[0].save(gif, save_all=True, append_images=still[1:], duration=250, loop=0)
    return [output, gif]


def draw_loss(log, output):
    """Write the loss curve of a log.jsonl as a picture, against epochs. Returns what was written."""
    with open(log) as f:
        lines = [json.loads(line) for line in f if line.endswith("\n")]
    points = [(d["epoch"], d["loss"]) for d in lines if d.get("loss") is not None]
    if len(points) < 2:
        raise ValueError(f"{log} has {len(points)} losses: a curve needs two")
    W, H, left, bottom = 720, 360, 60, 40
    # the first tenth starts far above the rest: cut off what is above its end
    top, low = max(loss for _, loss in points[len(points) // 10:]) * 1.02, min(loss for _, loss in points) * 0.98
    place = lambda epoch, loss: (left + (W - left - 20) * epoch / points[-1][0],
                                 20 + (H - bottom - 20) * (top - min(loss, top)) / max(top - low, 1e-12))
    picture = Image.new("RGB", (W, H), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for i in range(5):
        loss, epoch = low + (top - low) * i / 4, points[-1][0] * i / 4
        pen.line((place(0, loss), place(points[-1][0], loss)), "lightgray")
        pen.text((6, place(0, loss)[1] - 8), f"{loss:.4f}", "black", font)
        pen.text((place(epoch, low)[0] - 8, H - bottom + 6), f"{epoch:.1f}", "black", font)
    pen.text((W // 2, H - 18), "epoch", "black", font)
    pen.line([place(*point) for point in points], "steelblue", width=2)
    picture.save(output)
    return [output]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--input", required=True, nargs="+", help="clips or images")
    parser.add_argument("--output", default="prediction.png")
    parser.add_argument("--frames", type=int, default=4, help="frames of each clip in the picture")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--teacher", help="where the target's teacher or label maps are now, if not where they were")
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.checkpoint)
    if not isinstance(checkpoint.get("recipe"), dict) or "mask_token" not in checkpoint.get("model", {}):
        raise ValueError(f"{args.checkpoint} is no pre-training checkpoint of ours; for a released one run convert.py "
                         "first")
    if args.frames < 1 or os.path.splitext(args.output)[1].lower() in ("", ".gif"):
        raise ValueError(f"--frames {args.frames} --output {args.output}: at least one frame, and a name like figure.png, "
                         "since the animation is written beside it as .gif")
    for path in args.input:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no file {path}")
    recipe = checkpoint["recipe"]
    recipe["teacher"] = args.teacher or recipe.get("teacher", "")
    model = build_maskfeat(recipe)
    model.load_state_dict(checkpoint["model"])
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    written = draw(model.to(device).eval(), recipe, args.input, args.output, device, args.frames, args.seed)
    print("wrote " + " and ".join(written))


if __name__ == "__main__":
    run_main(main)
