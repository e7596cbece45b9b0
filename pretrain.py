"""MaskFeat pre-training (Sec. 2.1, 4, 5): mask cubes of clips or blocks of images, regress HOG of what is hidden.

    torchrun pretrain.py                                                   # made-up clips, a small model: any CPU
    torchrun pretrain.py --data k400/ --model mvitv2_s                     # one GPU
    torchrun --nproc_per_node=8 pretrain.py --data k400/ --model mvitv2_s  # one node
    torchrun --nnodes=16 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py \\
        --data k400/ --model mvitv2_s
    torchrun --nproc_per_node=8 pretrain.py --data imagenet/ --model vit_b
    torchrun --nproc_per_node=8 pretrain.py --data imagenet/ --model vit_b --target dino --teacher dino_vitb16.pth
    python pretrain.py --data k400/ --model mvitv2_s --target dvae --teacher encoder.pkl --dry-run   # what it costs

Writes OUT/last.pt (weights, optimizer, step, recipe), OUT/log.jsonl, OUT/loss.png and OUT/prediction.png. Stopped or
killed, it goes on from OUT/last.pt with --resume.
"""
import dataclasses
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

import data
import layouts
import masking
import mvit
from tools import synthetic
import visualize
from models import MODELS, build_maskfeat
from engine import (MAX_SKIPPED, Logger, StopSignal, check_positive, gather_list, init_distributed, loader_workers, lr_at,
                    mixed_precision, option, param_groups, parse_recipe, peak_memory, plan_batch, read_checkpoint,
                    reduce_mean, refuse_other_run, report_unreadable, run_main, save_checkpoint, seed_all)
from tools.flops import Counter, count_flops
from targets import TARGETS

# ------------------------------------------------------------------------------------------------------------ recipes
# Learning rates belong to a global batch of `lr_batch` samples, as in the release's configs (one 8-GPU node), and are
# scaled by batch_size / lr_batch: 1e-4 at 32 clips is 1.6e-3 at 512, 2e-4 at 256 images is 1.6e-3 at 2048.

@dataclass(frozen=True)
class Recipe:
    # model and input
    model: str = option("mvitv2_s", "encoder preset", tuple(MODELS))
    image_size: tuple = option((224, 224), "height and width in pixels")
    num_frames: int = option(16, "frames per clip", alias="--frames")                 # Sec. 4.1: 16x4
    sampling_rate: int = option(4, "stride between frames, at 30 fps")
    output_stride: int = option(16, "pixels per predicted token of MViT")             # release: 16 in pre-training
    patch_size: int = option(16, "pixels per token of ViT")
    expand: str = option("mlp", "where MViT widens", ("mlp", "attn"))
    drop_path: float = option(0.0, "stochastic depth rate at the last block")         # release: 0 in pre-training
    mean: tuple = option((0.45, 0.45, 0.45), "RGB mean of the input in [0, 1]")       # release, Kinetics
    std: tuple = option((0.225, 0.225, 0.225), "RGB standard deviation")
    crop_scale: tuple = option((0.5, 1.0), "area range of the random crop")           # Sec. 4.1, 5.1
    flip: float = option(0.5, "probability of a horizontal flip")
    # masking
    mask: str = option("cube", "masking", tuple(masking.MASKS))                       # Table 6: cube is best
    mask_ratio: float = option(0.4, "share of tokens to mask")                        # Table 7
    frame_runs: bool = option(True, "frame masking: runs of frames (paper), or single ones (release)")
    # target
    target: str = option("hog", "what to predict", tuple(TARGETS))                    # Tables 1, 2
    bins: int = option(9, "HOG orientation bins")                                     # Table 8
    cell: int = option(8, "HOG cell side in pixels")
    norm: str = option("l2", "HOG normalization", ("none", "l1", "l2"))
    color: str = option("rgb", "HOG colour space", ("gray", "rgb", "opponent"))
    gradient: str = option("sobel", "HOG filter: release, or the paper's difference", ("sobel", "central"))
    pixel_norm: str = option("dataset", "pixel target: paper, or release's default", ("dataset", "patch"))
    teacher: str = option("", "file of the teacher's weights; for label, folder of the maps, if not beside the images")
    align: str = option("bilinear", "teacher's map to token grid: see targets.py", ("bilinear", "nearest", "dilated"))
    label_classes: int = option(1000, "classes of the label maps")
    label_order: str = option("xy", "box order of label maps: correct, or as released", ("xy", "released"))
    # optimization
    epochs: int = option(300, "passes over the data")
    batch_size: int = option(512, "samples per update over all GPUs; if not given, at most 1/16 of the data")
    lr: float = option(1e-4, "peak learning rate at lr_batch samples per update")
    lr_batch: int = option(32, "batch that the three learning rates belong to")
    warmup_epochs: float = option(10.0, "epochs of linear warm-up")
    warmup_lr: float = option(1e-6, "learning rate at the start")
    min_lr: float = option(1e-6, "learning rate at the end")
    weight_decay: float = option(0.05, "AdamW, on tensors of two or more dimensions")
    beta2: float = option(0.999, "AdamW")                                             # release
    clip_grad: float = option(0.02, "largest total gradient norm")                    # release
    seed: int = option(0, "of everything random")
    # the run
    data: str = option("", "folder with the data; none: clips are made in data/synthetic")
    out: str = option("out/pretrain", "folder for checkpoint, log and picture")
    resume: bool = option(False, "go on from OUT/last.pt if there is one")
    device_batch: int = option(8, "most samples per GPU and forward pass; the rest is accumulated")
    amp: str = option("auto", "auto: bf16 on GPU (fp16 before Ampere), fp32 on CPU", ("auto", "fp32", "bf16", "fp16"))
    compile: str = option("auto", "torch.compile; auto: on GPU", ("auto", "on", "off"))
    checkpointing: bool = option(False, "recompute activations: less memory, a third more time")
    workers: int = option(-1, "loader processes per GPU; -1: by the number of CPU cores, 1 without GPU")
    save_minutes: float = option(15.0, "minutes between checkpoints; there is one per epoch as well")
    log_every: int = option(10, "steps between lines of the log, after the first ten")
    dry_run: bool = option(False, "two steps, then what the run would cost; nothing is written")


KINETICS = Recipe()
IMAGENET = Recipe(
    mask="block", lr=2e-4, lr_batch=256, batch_size=2048, warmup_epochs=30, device_batch=64,
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
RECIPES = {
    "default": Recipe(  # ours: about four minutes on two CPU cores
        model="mvit_tiny", image_size=(64, 64), num_frames=8, output_stride=8, epochs=26, batch_size=4, lr=4e-4,
        lr_batch=4, warmup_epochs=1, warmup_lr=1e-5, min_lr=1e-5, clip_grad=1.0),
    "k400_mvitv2_s": KINETICS,                                                        # Sec. 4.1; release: S, 300 epochs
    "k400_mvitv2_b": replace(KINETICS, model="mvitv2_b"),                             # ours, by analogy
    "k400_mvitv2_l": replace(KINETICS, model="mvitv2_l", epochs=800, device_batch=4),  # Table 3: 800 epochs
    "in1k_vit_b": replace(IMAGENET, model="vit_b", epochs=1600),                      # Table 7: 1600 epochs
    "in1k_vit_l": replace(IMAGENET, model="vit_l", epochs=1600, device_batch=32),
    "vit_tiny": replace(IMAGENET, model="vit_tiny", image_size=(64, 64), patch_size=8, epochs=50, batch_size=256,
                        lr=5e-4, warmup_epochs=5, clip_grad=1.0),                     # ours: 64x64 images on a CPU
}
# What may change when a run is resumed: where and how it runs. (device_batch and amp do change rounding, and how much a
# sample with few masked tokens counts in the mean.)
RUN_FIELDS = {"data", "out", "resume", "device_batch", "amp", "compile", "checkpointing", "workers", "save_minutes",
              "log_every", "dry_run"}


def check(recipe, samples):
    """Flags that contradict each other or the data, before anything is built."""
    video = recipe.model in mvit.MODELS
    if video != (samples.kind == "video"):
        raise ValueError(f"model={recipe.model} takes {'clips' if video else 'images'}, but {recipe.data} holds "
                         f"{samples.kind}s: use --model {'vit_b or vit_tiny' if video else 'mvitv2_s or mvit_tiny'}")
    if video == (recipe.mask == "block"):
        raise ValueError(f"mask={recipe.mask} does not suit {recipe.model}: use --mask "
                         f"{'cube, tube or frame' if video else 'block'}")
    if recipe.target == ("label" if video else "mvit_b"):
        raise ValueError(f"target={recipe.target} is for {'images' if video else 'clips'}, {recipe.data} holds "
                         f"{samples.kind}s: use another --target")
    if recipe.teacher and recipe.target in ("hog", "pixel"):
        raise ValueError(f"--teacher {recipe.teacher}: target={recipe.target} has no teacher, choose another --target")
    check_positive(recipe, "epochs", "batch_size", "lr", "lr_batch", "device_batch", "log_every", "clip_grad",
                   "sampling_rate", "output_stride", "patch_size", "cell", "bins", "label_classes")
    if not 0 < recipe.mask_ratio < 1:
        raise ValueError(f"mask_ratio={recipe.mask_ratio} is not between 0 and 1")
    if not 0 < recipe.crop_scale[0] <= recipe.crop_scale[1] <= 1:
        raise ValueError(f"crop_scale={recipe.crop_scale} is not an increasing range within (0, 1]")


def target_flops(model, x, extra):
    """FLOPs of the target of the samples in x, counted as those of the student (flops.py)."""
    counter = Counter()
    hooks = [module.register_forward_pre_hook(lambda m, args: setattr(counter, "width", m.qkv.out_features // 3))
             for module in model.target.modules() if hasattr(module, "qkv")]
    with torch.no_grad(), counter:
        model.compute_target(x, extra)
    for hook in hooks:
        hook.remove()
    return counter.macs + 5 * counter.normed


def main():
    name, recipe, given = parse_recipe(RECIPES, __doc__)
    rank, world, device = init_distributed()
    stop = StopSignal()
    say = tqdm.write if rank == 0 else lambda line: None

    # ------------------------------------------------------------------------------------------------------------ data
    if not recipe.data:
        recipe = replace(recipe, data="data/synthetic")
        if rank == 0 and not os.path.isdir(recipe.data):
            say(f"no --data: making clips in {recipe.data}, once")
        synthetic.make_dataset(recipe.data)                                   # safe if all ranks do it at once
    samples = layouts.find_samples(recipe.data, "train")
    check(recipe, samples)
    size, accumulate = plan_batch(recipe.batch_size, len(samples), recipe.device_batch, world, "batch_size" in given)
    if size != recipe.batch_size:
        say(f"batch_size {recipe.batch_size} -> {size}: the data set has only {len(samples)} samples")
        recipe = replace(recipe, batch_size=size)
    device_batch = size // world // accumulate
    steps_per_epoch = len(samples) // recipe.batch_size
    total_steps = recipe.epochs * steps_per_epoch

    # ----------------------------------------------------------------------------------------- model, optimizer, resume
    seed_all(recipe.seed)
    model = build_maskfeat(dataclasses.asdict(recipe)).to(device)
    grid = tuple(n // s for n, s in zip((recipe.num_frames, *recipe.image_size)[-len(model.encoder.patch_stride):],
                                        model.encoder.patch_stride))
    model.most_masked = masking.most_masked(recipe.mask, grid, recipe.mask_ratio)
    on_gpu = device.type == "cuda"
    amp, autocast, scaler = mixed_precision(recipe.amp, device)
    optimizer = torch.optim.AdamW(param_groups(model, recipe.weight_decay), lr=0.0, betas=(0.9, recipe.beta2),
                                  fused=True)
    last, lines = os.path.join(recipe.out, "last.pt"), os.path.join(recipe.out, "log.jsonl")
    fingerprint, step, skipped = layouts.fingerprint(samples), 0, 0
    for path in (last, lines):
        if os.path.exists(path) and not recipe.resume and not recipe.dry_run:
            raise ValueError(f"{path} exists: go on with --resume, or choose another --out; nothing is written over it")
    if recipe.resume and os.path.exists(last) and not recipe.dry_run:
        checkpoint = read_checkpoint(last)
        if "recipe" in checkpoint:                                            # a field that the file lacks is newer
            checkpoint["recipe"] = {**dataclasses.asdict(Recipe()), **checkpoint["recipe"]}
        refuse_other_run(last, checkpoint, recipe, fingerprint, RUN_FIELDS)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:                                              # empty but for fp16
            scaler.load_state_dict(checkpoint["scaler"])
        step, skipped = checkpoint["step"], checkpoint["skipped"]
        say(f"resumed {last} at step {step}")
    if len(set(gather_list([step]))) > 1:
        raise ValueError(f"not all nodes see the same {last}: put --out on a file system that they share")
    dataset = data.TrainDataset(
        samples, recipe.image_size, recipe.num_frames if len(grid) == 3 else None, recipe.sampling_rate,
        lambda rng: masking.draw_mask(recipe.mask, grid, recipe.mask_ratio, rng, recipe.frame_runs), recipe.seed,
        recipe.crop_scale, flip=recipe.flip,
        **data.extras(model.target, samples.paths, grid[-2:], model.encoder.patch_stride[0], recipe.teacher))
    if not recipe.dry_run:
        os.makedirs(recipe.out, exist_ok=True)
    log = Logger(lines, step, rank) if not recipe.dry_run else lambda **values: None
    if recipe.compile == "on" or recipe.compile == "auto" and on_gpu:
        model.compile()                                                       # in place: names keep no prefix
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False) \
        if world > 1 else model                                               # buffers are constants, a whole teacher
    batches = data.EpochBatches(len(samples), recipe.batch_size, recipe.epochs, recipe.seed, rank, world,
                                device_batch, step)
    loader = data.make_loader(dataset, batches, loader_workers(recipe.workers, device), pin_memory=on_gpu)

    scale = recipe.batch_size / recipe.lr_batch
    say(f"recipe {name}: " + ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(recipe).items()))
    say(f"{len(samples)} {samples.kind}s, {len(samples.ignored)} other files ignored, {len(samples.missing)} "
        f"listed but missing; {steps_per_epoch} steps per epoch, {recipe.epochs} effective epochs, {total_steps} steps")
    say(f"batch {recipe.batch_size} = {world} processes x {device_batch} samples x {accumulate} accumulated; "
        f"peak lr {recipe.lr:g} x {recipe.batch_size}/{recipe.lr_batch} = {recipe.lr * scale:g}; {amp} on {device}; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{model.target.dim} numbers to predict per token of grid {'x'.join(map(str, grid))}")
    if hasattr(model.target, "teacher"):
        say(f"teacher of {model.target.teacher.size / 1e6:.1f} M parameters from {model.target.teacher.about}")

    def sound():
        """Weights about to blow up are not saved; one or two steps skipped by fp16 are its loss scale settling."""
        return skipped_in_row < (3 if scaler.is_enabled() else 1)

    def save():
        nonlocal saved_step
        saved_step = step
        if rank == 0 and not recipe.dry_run:
            save_checkpoint(last, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "step": step, "skipped": skipped, "recipe": dataclasses.asdict(recipe), "data": fingerprint})

    # ------------------------------------------------------------------------------------------------------------ loop
    mean, std = (torch.tensor(v, device=device).view(3, *[1] * len(grid)) for v in (recipe.mean, recipe.std))
    model.train()
    loss_sum, steps_summed, skipped_in_row = torch.zeros((), device=device), 0, 0
    logged, saved_step, unreadable, newly_unreadable = step, step, {}, {}
    end_step = min(step + 2, total_steps) if recipe.dry_run else total_steps      # the first step is slower than others
    bar = tqdm(total=end_step, initial=step, unit="step", disable=rank > 0, dynamic_ncols=True, smoothing=0.1)
    iterator, waited, mark, saved, stopped, due = iter(loader), 0.0, time.perf_counter(), time.monotonic(), "", False
    while step < end_step and not stopped:
        seed_all(recipe.seed, step, rank)                                     # drop path draws by step: exact resume
        lr = scale * lr_at(step / steps_per_epoch, recipe.lr, recipe.epochs, recipe.warmup_epochs, recipe.warmup_lr,
                           recipe.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step_loss = torch.zeros((), device=device)
        for micro in range(accumulate):
            stopped = stop.agreed()
            if stopped:                                                       # half a step is dropped, it can be long
                break
            start = time.perf_counter()
            batch = next(iterator)
            waited += time.perf_counter() - start
            newly_unreadable.update(batch["unreadable"])
            x = batch["x"].to(device, non_blocking=True).float().div(255).sub(mean).div(std)
            mask = batch["mask"].to(device, non_blocking=True)
            extra = batch[model.target.input_kind].to(device, non_blocking=True) if model.target.input_kind in batch else None
            with ddp.no_sync() if world > 1 and micro < accumulate - 1 else nullcontext():
                with autocast():
                    loss, _ = ddp(x, mask, extra)
                scaler.scale(loss / accumulate).backward()
            step_loss += loss.detach() / accumulate
        if stopped:
            break
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        finite = torch.isfinite(grad_norm).item()                             # of the mean over ranks: all decide alike
        if finite:
            scaler.step(optimizer)
            skipped_in_row, loss_sum, steps_summed = 0, loss_sum + step_loss, steps_summed + 1
        else:
            skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if skipped_in_row == MAX_SKIPPED:
            raise ValueError(f"the {skipped_in_row} steps up to {step} gave a non-finite loss or gradient: lower --lr, or "
                             f"use --amp fp32; {last} is as it was before them")

        # ------------------------------------------------------------------------------------------- log, stop, save
        if step % recipe.log_every == 0 or step % steps_per_epoch == 0 or step <= 10 or recipe.dry_run:
            seconds = time.perf_counter() - mark
            speed, wait = (step - logged) * recipe.batch_size / seconds, reduce_mean(waited / seconds, device)
            loss_mean = reduce_mean(loss_sum / steps_summed, device) if steps_summed else None
            report_unreadable(gather_list(list(newly_unreadable.items())), unreadable, len(samples), say)
            bar.set_postfix_str(f"loss {loss_mean:.4f}, lr {lr:.1e}, {speed:.1f} {samples.kind}s/s, waits {wait:.0%}"
                                if steps_summed else f"{skipped} steps skipped", refresh=False)
            log(step=step, epoch=step / steps_per_epoch, loss=loss_mean, lr=lr, samples_per_second=speed, data_wait=wait,
                grad_norm=grad_norm.item() if finite else None, skipped=skipped, unreadable=len(unreadable))
            loss_sum, steps_summed, waited, newly_unreadable = torch.zeros_like(loss_sum), 0, 0.0, {}
            logged, mark = step, time.perf_counter()
        bar.update()
        due = due or step % steps_per_epoch == 0 or time.monotonic() - saved > 60 * recipe.save_minutes
        if due and sound():
            save()
            saved, due = time.monotonic(), False
    bar.close()
    if stopped:
        if sound():
            save()
        say(f"stopped by {stopped} after step {step} of {total_steps}; {last} holds step {saved_step}, go on with --resume")
        sys.exit(128 + signal.Signals[stopped])

    if saved_step < step and sound():
        save()

    # ------------------------------------------------------------------------------------------------------------- end
    if recipe.dry_run:
        cost = count_flops(model, (1, *x.shape[1:]))
        with autocast():
            of_target = target_flops(model, x[:1], None if extra is None else extra[:1])
        teacher = getattr(model.target, "teacher", None)
        say(f"dry run, nothing written: student {cost['parameters'] / 1e6:.1f} M parameters, {cost['flops'] / 1e9:.3g} "
            f"GFLOPs forward per {samples.kind}; target {recipe.target} {teacher.size / 1e6 if teacher else 0:.1f} M "
            f"parameters, {of_target / 1e9:.3g} GFLOPs; peak memory {peak_memory(device):.2f} GiB; {seconds:.3g} s per "
            f"step, so {total_steps * seconds / 3600:.3g} hours for {total_steps} steps")
        return
    say(f"{step} steps, {skipped} skipped for non-finite gradients, {len(unreadable)} unreadable files replaced; "
        f"peak memory {peak_memory(device):.2f} GiB")
    if rank == 0:
        try:
            shown = layouts.find_samples(recipe.data, "val")
            data.extras(model.target, shown.paths, grid[-2:], folder=recipe.teacher)       # have they label maps?
        except (ValueError, OSError):
            say(f"{recipe.data} has no validation part" + (" with label maps" if recipe.target == "label" else "") +
                ": the picture shows training samples")
            shown = samples
        paths = [path for path in shown.paths if path not in unreadable]
        written = [last, lines]
        try:
            written += visualize.draw(model.eval(), dataclasses.asdict(recipe), paths[::max(len(paths) // 4, 1)][:4],
                                      os.path.join(recipe.out, "prediction.png"), device)
            written += visualize.draw_loss(lines, os.path.join(recipe.out, "loss.png"))
        except (ValueError, OSError) as error:                                # the training is done all the same
            say(f"no picture: {error}")
        say(f"wrote {', '.join(written)}")


if __name__ == "__main__":
    run_main(main)
