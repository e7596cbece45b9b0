"""MaskFeat pre-training (Sec. 2.1, 4, 5): hide cubes of clips or blocks of images, and regress HOG
of what is hidden.

    python pretrain.py                                       # made-up clips, recipe `tiny`: any CPU
    torchrun pretrain.py --data k400/ --model mvitv2_s                                     # one GPU
    torchrun --nproc_per_node=8 pretrain.py --data k400/ --model mvitv2_s                 # one node
    torchrun --nnodes=16 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        pretrain.py --data k400/ --model mvitv2_s                                          # sixteen
    torchrun --nproc_per_node=8 pretrain.py --data imagenet/ --model vit_b                 # Table 7
    torchrun --nproc_per_node=8 pretrain.py --data imagenet/ --model vit_b --epochs 300 \\
        --target dino --teacher dino_vitb16.pth                                          # Table 2
    python pretrain.py --data k400/ --model mvitv2_s --dry-run                  # what it would cost

Writes OUT/last.pt (weights, optimizer, step, recipe), OUT/recipe.json, OUT/log.jsonl, and from time
to time OUT/loss.png and OUT/prediction.png (for clips .gif as well). A run that was stopped or
killed goes on from OUT/last.pt with --resume. --init goes on from the weights of any checkpoint.
"""
import dataclasses
import functools
import os
import time
from dataclasses import dataclass, replace

import engine
from engine import option

import torch
from tqdm import tqdm

import checkpoints
import convert
import data
import heldout
import layouts
import masking
import models
import visualize
from targets import TARGETS
from tools import synthetic
from tools.flops import Counter, count_flops

# ----------------------------------------------------------------------------------------- recipes
# Learning rates belong to a global batch of `lr_batch` samples, as in the release's configs of one
# 8-GPU node. They are scaled by batch_size / lr_batch: 1e-4 at 32 clips is 1.6e-3 at 512, and 2e-4
# at 256 images is 1.6e-3 at 2048. The global batches are ours, chosen so that both end at 1.6e-3.

@dataclass(frozen=True)
class Recipe:
    model: str = option("mvitv2_s", "encoder", tuple(models.MODELS), group="model and input")
    init: str = option("", "checkpoint whose weights to start from; none: from scratch")
    image_size: tuple = option((224, 224), "height and width in pixels")              # Sec. 4, 5
    num_frames: int = option(16, "frames per clip", alias="--frames")                # Table 3: 16x4
    sampling_rate: int = option(4, "stride between frames, at 30 fps")
    output_stride: int = option(16, "pixels per predicted token of MViT")             # release
    patch_size: int = option(16, "pixels per token of ViT")
    expand: str = option("mlp", "where MViT widens", ("mlp", "attn"))
    drop_path: float = option(0.0, "stochastic depth rate at the last block")         # release
    mean: tuple = option((0.45, 0.45, 0.45), "RGB mean of the input in [0, 1]")       # release
    std: tuple = option((0.225, 0.225, 0.225), "RGB standard deviation")
    crop_scale: tuple = option((0.5, 1.0), "area range of the random crop")           # release
    flip: float = option(0.5, "probability of a horizontal flip")
    mask: str = option("cube", "masking", tuple(masking.MASKS), group="masking")  # Table 6
    mask_ratio: float = option(0.4, "share of tokens to mask")                        # Sec. 4, 5
    frame_runs: bool = option(True, "frame mask: runs of frames (paper), or single ones (release)")
    target: str = option("hog", "what to predict", tuple(TARGETS), group="target")  # Tables 1, 2
    bins: int = option(9, "HOG orientation bins")                                     # Table 8
    cell: int = option(8, "HOG cell side in pixels")
    norm: str = option("l2", "HOG normalization", ("none", "l1", "l2"))
    hog_scale: float = option(1.0, "factor on HOG, for norm=none, whose numbers are large")   # ours
    color: str = option("rgb", "HOG color space", ("gray", "rgb", "opponent"))
    gradient: str = option("sobel", "HOG filter: release, or paper", ("sobel", "central"))
    pixel_norm: str = option("dataset", "pixel target: paper, or release", ("dataset", "patch"))
    teacher: str = option("", "file of the teacher's weights, or for label the folder of the maps")
    align: str = option("bilinear", "teacher's map to token grid, see targets.py",
                        ("bilinear", "nearest", "dilated"))
    label_classes: int = option(1000, "classes of the label maps")
    label_order: str = option("xy", "box order of label maps: see targets.py", ("xy", "released"))
    epochs: int = option(300, "passes over the data", group="optimization")
    batch_size: int = option(512, "samples per update; if not given, less for a small data set")
    lr: float = option(1e-4, "peak learning rate at lr_batch samples per update")
    lr_batch: int = option(32, "batch that the three learning rates belong to")
    warmup_epochs: float = option(10.0, "epochs of linear warm-up")
    warmup_lr: float = option(1e-6, "learning rate at the start")
    min_lr: float = option(1e-6, "learning rate at the end")
    weight_decay: float = option(0.05, "AdamW, on tensors of two or more dimensions")
    beta2: float = option(0.999, "AdamW")                                             # release
    clip_grad: float = option(0.02, "largest total gradient norm")                    # release
    seed: int = option(0, "of everything random")
    val_samples: int = option(256, "held-out samples for a loss each epoch, at most a quarter as "
                              "many as there are for training; 0: none")
    data: str = option("", "folder with the data; without one, clips are made in data/synthetic",
                       group="the run")
    out: str = option("out/pretrain", "folder for checkpoint, log and pictures")
    resume: bool = option(False, "go on from OUT/last.pt if there is one")
    device_batch: int = option(8, "most samples per GPU and forward pass; on a CPU 1, but "
                               "for nano and tiny models")
    amp: str = option("auto", "precision; auto: bf16 on a GPU (fp16 before Ampere), fp32 on a CPU",
                      ("auto", "fp32", "bf16", "fp16"))
    compile: str = option("auto", "torch.compile; auto: on a GPU", ("auto", "on", "off"))
    checkpointing: bool = option(False, "recompute activations: less memory, a third more time")
    workers: int = option(-1, "loader processes per GPU; -1: one per CPU core, 1 without a GPU")
    save_minutes: float = option(15.0, "minutes between checkpoints; one per epoch as well")
    log_every: int = option(10, "steps between lines of the log, after the first ten")
    dry_run: bool = option(False, "time a pass, print what the run would cost, write nothing")


KINETICS = Recipe()                        # release: k400_MVITv2_S_16x4_MaskFeat_PT
IMAGENET = Recipe(                              # release: in1k_VIT_B_MaskFeat_PT
    mask="block", lr=2e-4, lr_batch=256, batch_size=2048, warmup_epochs=30, device_batch=64,
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
TINY = Recipe(                                           # ours: 4 to 5 minutes on two CPU cores
    model="mvit_nano", image_size=(48, 48), num_frames=4, sampling_rate=8, output_stride=8,
    epochs=32, batch_size=8, lr=2e-3, lr_batch=8, warmup_epochs=1.0, warmup_lr=1e-5, min_lr=1e-5,
    clip_grad=1.0, compile="off")                             # would take longer than it saves
RECIPES = {
    "tiny": TINY,
    "mvit_tiny": replace(                                     # ours: 64x64 clips on a CPU
        TINY, model="mvit_tiny", image_size=(64, 64), num_frames=8, sampling_rate=4, epochs=26,
        batch_size=4, lr=4e-4, lr_batch=4),
    "k400_mvitv2_s": KINETICS,                                             # Tables 1, 3, 6; release
    "k400_mvitv2_b": replace(KINETICS, model="mvitv2_b"),                     # ours, by analogy
    "k400_mvitv2_l": replace(KINETICS, model="mvitv2_l", epochs=800, device_batch=4),  # Table 3
    "in1k_vit_b": replace(IMAGENET, model="vit_b", epochs=1600),              # Table 7
    "in1k_vit_l": replace(IMAGENET, model="vit_l", epochs=1600, device_batch=32),  # Table 7
    "clips_mvitv2_s": replace(                                # ours, not run: 1,000 to 20,000 clips
        KINETICS, image_size=(112, 112), epochs=200, batch_size=64, lr=2e-4, device_batch=32),
    "vit_tiny": replace(                                      # ours: 64x64 images on a CPU
        IMAGENET, model="vit_tiny", image_size=(64, 64), patch_size=8, epochs=50, batch_size=256,
        lr=5e-4, warmup_epochs=5, clip_grad=1.0),
}
# A resumed run may change where and how it runs. (amp and device_batch change rounding. The loss is
# a mean over the masked tokens of each forward pass, so device_batch also changes how much a sample
# with few masked tokens counts.)
RUN_FIELDS = {"data", "out", "init", "resume", "device_batch", "amp", "compile", "checkpointing",
              "workers", "save_minutes", "log_every", "dry_run"}


def check(recipe):
    """Raise ValueError for flags out of range or in contradiction, FileNotFoundError for --init."""
    video = models.takes_clips(recipe.model)
    if not (video or recipe.data):
        raise ValueError(f"model={recipe.model} takes images, and without --data clips are made: "
                         "name a folder of images with --data")
    if video == (recipe.mask == "block"):
        raise ValueError(f"mask={recipe.mask} does not suit {recipe.model}: use its --recipe, or "
                         f"--mask {'cube, tube or frame' if video else 'block'}")
    if recipe.target == ("label" if video else "mvit_b"):
        raise ValueError(f"target={recipe.target} is not for {'videos' if video else 'images'}: "
                         "use another --target")
    if recipe.teacher and recipe.target in ("hog", "pixel"):
        raise ValueError(f"--teacher {recipe.teacher}: target={recipe.target} has no teacher, "
                         "choose another --target")
    if recipe.init and not recipe.resume and not os.path.isfile(recipe.init):
        raise FileNotFoundError(f"--init: no checkpoint at {recipe.init}: name another file, or "
                                "start from scratch with --init ''")
    engine.check_numbers(
        recipe, positive=("epochs", "batch_size", "lr", "lr_batch", "device_batch", "log_every",
                          "clip_grad", "output_stride"),
        not_negative=("warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "save_minutes",
                      "val_samples"),
        shares=("flip", "beta2"))
    models.check_sizes(vars(recipe))
    if not 0 < recipe.mask_ratio < 1:
        raise ValueError(f"mask_ratio={recipe.mask_ratio} is not between 0 and 1: the paper's "
                         "is 0.4")
    if not 0 < recipe.crop_scale[0] <= recipe.crop_scale[1] <= 1:
        raise ValueError(f"crop_scale={recipe.crop_scale} is not an increasing range within (0, 1]:"
                         " use two shares of the area, such as 0.5 1")


def main():
    name, recipe, overrides = engine.parse_recipe(RECIPES, __doc__, check=models.check_checkpoint)
    check(recipe)
    rank, world, device = engine.init_distributed()
    print0 = tqdm.write if rank == 0 else lambda line: None
    small = recipe.model.endswith(("_nano", "_tiny"))
    if device.type == "cpu" and not small and "device_batch" not in overrides:
        recipe = replace(recipe, device_batch=1)              # faster on a CPU, and less memory

    # --------------------------------------------------------------------------------- data, resume
    checkpoint = None if recipe.dry_run else checkpoints.find_checkpoint(recipe)
    if not recipe.data:
        recipe = replace(recipe, data=synthetic.make_dataset("data/synthetic", print0=print0))
    samples = engine.from_rank0(layouts.find_samples, recipe.data, "train")
    models.check_kind(recipe.model, samples)
    for note in engine.from_rank0(data.notes_on_files, samples, recipe):
        print0(note)
    recipe, device_batch, accumulate = engine.plan_batch(
        recipe, len(samples), world, "batch_size" in overrides, print0)
    steps_per_epoch = len(samples) // recipe.batch_size

    # ----------------------------------------------------------------------------- model, optimizer
    engine.seed_all(recipe.seed)
    model = models.build_maskfeat(dataclasses.asdict(recipe))
    if recipe.init and checkpoint is None:                    # head and mask token may be fresh
        convert.load_weights(model, recipe.init, verbose=rank == 0)
    model.to(device)
    grid = models.token_grid(vars(recipe), model.encoder)
    dataset = make_dataset(recipe, samples, model, grid)
    amp, autocast, scaler = engine.mixed_precision(recipe.amp, device)
    optimizer = engine.make_optimizer(model, recipe)
    engine.print_setup(RECIPES, name, recipe, model, optimizer, world, device_batch, amp,
                       print0)
    print0(f"{len(samples)} {samples.kind}s, other files ignored: {len(samples.ignored)}, listed "
           f"but missing: {len(samples.missing)}; {steps_per_epoch} steps per epoch, "
           f"{recipe.epochs} epochs, {recipe.epochs * steps_per_epoch} steps; "
           f"{model.target.dim} numbers to predict per token of grid {'x'.join(map(str, grid))}")
    if hasattr(model.target, "teacher"):
        teacher = model.target.teacher
        print0(f"teacher of {teacher.size / 1e6:.1f} M parameters from {teacher.about}")
    if recipe.dry_run:
        return dry_run(recipe, model, optimizer, dataset, device_batch, accumulate,
                       steps_per_epoch, print0)

    run = engine.Run(
        recipe, model, optimizer, scaler, steps_per_epoch=steps_per_epoch, device=device,
        fingerprint=layouts.fingerprint(samples), num_files=len(samples), unit=samples.kind,
        checkpoint=checkpoint, run_fields=RUN_FIELDS)
    if engine.should_compile(recipe.compile, device, print0):
        model.compile()                                       # in place: names keep no prefix
    ddp = engine.wrap_ddp(model)
    batches = data.EpochBatches(len(samples), recipe.batch_size, recipe.epochs, recipe.seed, rank,
                                world, device_batch, run.step)
    loader = iter(data.make_loader(dataset, batches, engine.loader_workers(recipe.workers, device),
                                   pin_memory=device.type == "cuda"))

    shown, source, reason = engine.from_rank0(find_shown, recipe, samples)
    if reason:
        print0("loss and pictures show training samples, as no validation part can be used: "
               + reason)
    held_out, val_loss = None, None
    if recipe.val_samples:
        few = layouts.spread(shown, min(recipe.val_samples, len(shown), -(-len(samples) // 4)))
        held_out = heldout.HeldOut(                           # a tenth of an epoch's time, or less
            model, make_dataset(recipe, few, model, grid), grid,
            functools.partial(to_device, recipe=recipe, model=model, device=device), autocast,
            recipe.device_batch, engine.loader_workers(recipe.workers, device), rank, world)
        levels = held_out.levels()
        for path, reason in engine.gather_list(held_out.unreadable):
            print0(f"unreadable, replaced by another: {path}: {reason}")
        without = ", ".join(f"{rule} {level:.4f}" for rule, level in levels.items())
        print0(f"loss without a network on {len(few)} {source} {few.kind}s: {without}")

    # ---------------------------------------------------------------------------------------- loop
    model.train()
    while run.step < run.total_steps:
        lr = run.start_step()
        step_loss = torch.zeros((), device=device)
        for micro in range(accumulate):
            x, mask, target_input = to_device(run.next_batch(loader), recipe, model, device)
            with engine.sync(ddp, last=micro == accumulate - 1), autocast():
                loss, _ = ddp(x, mask, target_input)
            scaler.scale(loss / accumulate).backward()
            step_loss += loss.detach() / accumulate
        run.end_step(step_loss, lr)                           # clip, step or skip, log
        if held_out and run.step == 1:                        # a run that fails before has no log
            run.log(step=0, levels=levels)
        if held_out and run.step % steps_per_epoch == 0:
            val_loss = held_out.loss()
            run.log(step=run.step, epoch=run.epoch, val_loss=val_loss)
            run.restart_clock()
        run.draw_sometimes(lambda: draw_pictures(run, shown, model))
    run.finish()
    if held_out:
        val_loss = held_out.loss() if val_loss is None else val_loss
        print0(f"loss on {source} {samples.kind}s: {val_loss:.4f}, without a network: {without}")
    if rank == 0:
        written = draw_pictures(run, shown, model)
        print0(f"wrote {', '.join([run.checkpoint_path, run.log_path, *written])}")


def make_dataset(recipe, samples, model, grid):
    """Masked crops of the samples, and what the target needs. grid: of the predicted tokens."""
    draw_mask = functools.partial(masking.draw_mask, recipe.mask, grid, recipe.mask_ratio,
                                  frame_runs=recipe.frame_runs)
    return data.PretrainDataset(
        samples, recipe.image_size, recipe.num_frames if samples.kind == "video" else None,
        recipe.sampling_rate, draw_mask, recipe.seed, recipe.crop_scale, flip=recipe.flip,
        **data.target_inputs(model.target, samples.paths, grid[-2:], model.encoder.patch_stride[0],
                             recipe.teacher))


def to_device(batch, recipe, model, device):
    """A loader's batch -> x (B, 3, [T,] H, W) normalized, mask (B, *grid), and what the target
    needs beside x, or None."""
    x = batch["x"].to(device, non_blocking=True)
    target_input = batch.get(model.target.input_kind)
    if target_input is not None:
        target_input = target_input.to(device, non_blocking=True)
    return (data.normalize(x, recipe.mean, recipe.std),
            batch["mask"].to(device, non_blocking=True), target_input)


def find_shown(recipe, samples):
    """(samples to look at, "validation", ""): of the validation part. If it is missing or lacks
    what the target needs: (training samples, "training", the reason)."""
    try:
        shown = layouts.find_samples(recipe.data, "val")
        models.check_kind(recipe.model, shown)
        if recipe.target == "label":
            data.find_maps(shown.paths, recipe.teacher)       # raises if one is missing
        return shown, "validation", ""
    except (ValueError, OSError) as error:
        return samples, "training", str(error).splitlines()[0]


def draw_pictures(run, shown, model):
    """Write OUT/prediction.png and OUT/loss.png. Returns the paths written."""
    recipe, written = run.recipe, []
    paths = [path for path in shown.paths if path not in run.unreadable]
    try:
        written += visualize.draw(
            model.eval(), dataclasses.asdict(recipe), paths[::max(len(paths) // 4, 1)][:4],
            os.path.join(recipe.out, "prediction.png"), run.device)
        written += visualize.draw_loss([run.log_path], os.path.join(recipe.out, "loss.png"))
    except (ValueError, OSError) as error:                    # the training is done all the same
        run.print0(f"no picture: {error}")
    model.train()
    return written


def dry_run(recipe, model, optimizer, dataset, device_batch, accumulate, steps_per_epoch, print0):
    """Two steps of this process on one micro-batch, then parameters, FLOPs, memory and hours.
    Nothing is written."""
    device = next(model.parameters()).device
    _, autocast, scaler = engine.mixed_precision(recipe.amp, device)
    batch = data.collate([dataset[0, i % len(dataset)] for i in range(device_batch)])
    x, mask, target_input = to_device(batch, recipe, model, device)
    for _ in range(2):                                        # the first step is slower than others
        start = time.perf_counter()
        with autocast():
            loss, _ = model(x, mask, target_input)
        scaler.scale(loss).backward()
        loss.item()                                           # waits for the GPU
        passed = time.perf_counter()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = accumulate * (passed - start) + time.perf_counter() - passed
    cost, steps = count_flops(model, (1, *x.shape[1:])), recipe.epochs * steps_per_epoch
    teacher = getattr(model.target, "teacher", None)
    with torch.no_grad(), Counter() as counter:
        model.compute_target(x[:1], None if target_input is None else target_input[:1])
    flops = counter.macs + 5 * counter.normed
    print0(f"dry run, nothing written: student {cost['parameters'] / 1e6:.1f} M parameters, "
           f"{cost['flops'] / 1e9:.3g} GFLOPs forward per {dataset.samples.kind}; target "
           f"{recipe.target} {teacher.size / 1e6 if teacher else 0:.1f} M parameters, "
           f"{flops / 1e9:.3g} GFLOPs; peak memory {engine.peak_memory(device):.2f} GiB; "
           f"{seconds:.3g} s per step, not compiled and without loading, so "
           f"{steps * seconds / 3600:.3g} hours for {steps} steps")


if __name__ == "__main__":
    engine.run_main(main)
