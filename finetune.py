"""Fine-tuning (Sec. 4.1, 4.2, 5.1): a classifier from a pre-trained encoder.

    python finetune.py         # from the default pre-training and from scratch, three seeds each
    torchrun --nproc_per_node=8 finetune.py --data k400/ --model mvitv2_s \\
        --init out/pretrain/last.pt
    torchrun --nproc_per_node=8 finetune.py --data imagenet/ --model vit_b \\
        --init out/pretrain/last.pt

--init starts from the weights of any checkpoint that convert.py knows. A run that was stopped or
killed goes on from OUT/last.pt with --resume. Writes OUT/last.pt, OUT/log.jsonl, OUT/recipe.json,
OUT/loss.png, and the test as OUT/last_<clips>x<crops>.json and .png. evaluate.py tests, predicts,
and writes features.
"""
import dataclasses
import functools
import os
import random
import sys
from dataclasses import dataclass, replace

import engine
from engine import option

import numpy as np
import torch
from tqdm import tqdm

import augment
import checkpoints
import convert
import data
import evaluate
import features
import layouts
import models
import visualize
from tools import synthetic

# ----------------------------------------------------------------------------------------- recipes
# Learning rates belong to `lr_batch` distinct samples per update (the release's config of one 8-GPU
# node) and are scaled by batch_size / lr_batch. With repeats=2 each decoded clip counts twice in a
# batch. Epochs are passes over the files, so that 100 of them with repeats=2 are the paper's 200
# epochs of Sec. 4.3. The global batches are ours.

@dataclass(frozen=True)
class Recipe:
    model: str = option("mvitv2_s", "encoder", tuple(models.MODELS), group="model and input")
    init: str = option("", "checkpoint whose weights to start from; none: from scratch")
    num_classes: int = option(0, "classes; 0: as many as the data set has")
    image_size: tuple = option((224, 224), "height and width in pixels")
    num_frames: int = option(16, "frames per clip", alias="--frames")                # Table 3: 16x4
    sampling_rate: int = option(4, "stride between frames, at 30 fps")
    segments: bool = option(False, "one frame from each of num_frames parts, instead of a clip")
    patch_size: int = option(16, "pixels per token of ViT")
    expand: str = option("mlp", "where MViT widens", ("mlp", "attn"))
    pool: str = option("mean", "what the head sees: mean of patch tokens, or class token",
                       ("mean", "cls"))                                              # release
    drop_path: float = option(0.1, "stochastic depth rate at the last block")        # release
    dropout: float = option(0.0, "before the head")
    head_init_scale: float = option(0.001, "factor on a new head's initial weights")  # release
    mean: tuple = option((0.45, 0.45, 0.45), "RGB mean of the input in [0, 1]")      # release
    std: tuple = option((0.225, 0.225, 0.225), "RGB standard deviation")
    crop_scale: tuple = option((0.08, 1.0), "area range of the random crop",
                               group="augmentation (release)")
    flip: float = option(0.5, "probability of a horizontal flip")
    rand_augment: str = option("rand-m7-mstd0.5-inc1", "RandAugment in timm's notation; '': none")
    color_jitter: float = option(0.0, "strength of color jitter, used without RandAugment")
    erase: float = option(0.25, "probability of random erasing")
    repeats: int = option(2, "augmentations of each decoded sample in a batch")
    mixup: float = option(0.8, "Beta parameter; 0: off")
    cutmix: float = option(1.0, "Beta parameter; 0: off")
    smoothing: float = option(0.1, "label smoothing")
    optimizer: str = option("adamw", "adamw, or sgd with Nesterov momentum", ("adamw", "sgd"),
                            group="optimization")
    epochs: int = option(100, "passes over the data")
    batch_size: int = option(256, "samples per update, before repeats; if not given, less for a "
                              "small data set")
    lr: float = option(6e-4, "peak learning rate at lr_batch samples per update")
    lr_batch: int = option(16, "batch that the three learning rates belong to")
    warmup_epochs: float = option(20.0, "epochs of linear warm-up")
    warmup_lr: float = option(1e-6, "learning rate at the start")
    min_lr: float = option(1e-6, "learning rate at the end")
    layer_decay: float = option(0.75, "factor on the learning rate from a block to the one below")
    weight_decay: float = option(0.05, "on tensors of two or more dimensions")
    beta2: float = option(0.999, "AdamW")
    clip_grad: float = option(5.0, "largest total gradient norm; 0: no clipping")
    limit_per_class: int = option(0, "train on that many files a class, drawn by --seed; 0: all")
    seed: int = option(0, "of everything random")
    clips: int = option(10, "clips per video, from its start to its end",
                        group="testing")  # Table 3
    crops: int = option(1, "crops per clip: 1 (center), or 3 along the longer side", (1, 3))
    crop_ratio: float = option(0.875, "one crop: its side over the picture's shorter")   # release
    val_epochs: int = option(5, "epochs between validations by one central view; 0: never")
    data: str = option("", "folder with the data; without one, clips are made in data/synthetic",
                       group="the run")
    out: str = option("out/finetune", "folder for checkpoint, log and results")
    resume: bool = option(False, "go on from OUT/last.pt if there is one, without --init")
    baseline: bool = option(False, "then the same from scratch, in OUT/scratch, to compare")
    seeds: int = option(1, "with --baseline: compare that many seeds, the others in OUT/seed<N>")
    device_batch: int = option(8, "most views per GPU and forward pass; on a CPU 2 * repeats, "
                               "but for nano and tiny models")
    amp: str = option("auto", "precision; auto: bf16 on a GPU (fp16 before Ampere), fp32 on a CPU",
                      ("auto", "fp32", "bf16", "fp16"))
    compile: str = option("auto", "torch.compile; auto: on a GPU", ("auto", "on", "off"))
    checkpointing: bool = option(False, "recompute activations: less memory, a third more time")
    workers: int = option(-1, "loader processes per GPU; -1: one per CPU core, 1 without a GPU")
    save_minutes: float = option(15.0, "minutes between checkpoints; one per epoch as well")
    log_every: int = option(10, "steps between lines of the log, after the first ten")


K400 = Recipe()                                               # release: k400_MVITv2_S_16x4_FT
K400_L = replace(                                             # release: k400_MVITv2_L_16x4_FT
    K400, model="mvitv2_l", epochs=75, warmup_epochs=5, warmup_lr=1e-8, min_lr=1e-5,
    layer_decay=0.875, drop_path=0.2, repeats=1, device_batch=4)
# Table 3's larger inputs: 30 epochs from the fine-tuned 16x4 model (Sec. 4.1). The release has no
# training config for them, so the other values are those of 16x4. expand stays "mlp", since the
# weights fit no other form. Table 3's GFLOPs are those of "attn": 2063 at 32x3 ("mlp": 2125).
LARGE = replace(K400_L, image_size=(312, 312), epochs=30, device_batch=2, checkpointing=True,
                sampling_rate=3, crops=3)
IN1K = Recipe(                                                # release: in1k_VIT_B_MaskFeat_FT
    model="vit_b", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), repeats=1, clips=1,
    rand_augment="rand-m9-mstd0.5-inc1", batch_size=2048, lr=2e-3, lr_batch=512, warmup_lr=1e-8,
    layer_decay=0.65, clip_grad=0.0, device_batch=64)
# release: SSv2's MViTv2-L 40x3. Taken from MaskFeat instead: expand, pool, head_init_scale, the
# starting weights, and so mean and std. The release cuts a square of 312 from a picture whose
# shorter side is 356 to 446, which is 0.37 to 0.58 of a 4:3 picture. Here the aspect varies, too.
SSV2 = replace(
    K400_L, num_classes=174, image_size=(312, 312), num_frames=40, sampling_rate=3, segments=True,
    flip=0.0, mixup=0.0, cutmix=0.0, crop_scale=(0.37, 0.58), drop_path=0.75, dropout=0.5,
    rand_augment="rand-m7-n4-mstd0.5-inc1", optimizer="sgd", epochs=40, batch_size=128, lr=1.25e-3,
    lr_batch=8, warmup_epochs=3, warmup_lr=1e-6, min_lr=1e-6, layer_decay=1.0, weight_decay=1e-4,
    clip_grad=2.0, clips=1, crops=3, checkpointing=True, device_batch=1)
TINY = Recipe(                                                # ours: small clips on a CPU
    model="mvit_nano", init="out/pretrain/last.pt", baseline=True, image_size=(48, 48),
    num_frames=4, sampling_rate=8, drop_path=0.0, crop_scale=(0.5, 1.0), flip=0.0, rand_augment="",
    erase=0.0, repeats=1, mixup=0.0, cutmix=0.0, smoothing=0.0, epochs=18, batch_size=8, lr=2e-3,
    lr_batch=8, warmup_epochs=2.0, warmup_lr=1e-5, min_lr=1e-5, clip_grad=1.0, layer_decay=1.0,
    clips=3, crop_ratio=1.0, val_epochs=6, compile="off")
# Without --data: few labels, so that pre-training matters, and enough epochs for both runs.
FEW_LABELS = {"limit_per_class": 2, "epochs": 80, "warmup_epochs": 8.0, "val_epochs": 0, "clips": 1,
              "seeds": 3}
RECIPES = {
    "tiny": TINY,
    "mvit_tiny": replace(                                     # ours: 64x64 clips on a CPU
        TINY, model="mvit_tiny", image_size=(64, 64), num_frames=8, sampling_rate=4),
    "k400_mvitv2_s": K400,                                                    # Tables 1, 3, 6
    "k400_mvitv2_b": replace(K400, model="mvitv2_b"),                         # ours, by analogy
    "k400_mvitv2_l": K400_L,                                                  # Table 3
    "k600_mvitv2_l": K400_L,                         # ours: the same recipe on each Kinetics
    "k700_mvitv2_l": K400_L,
    "k400_mvitv2_l_312_32x3": replace(LARGE, num_frames=32, clips=5),         # Table 3: 3x5 views
    "k400_mvitv2_l_312_40x3": replace(LARGE, num_frames=40, clips=4),         # Table 3: 3x4 views
    "k400_mvitv2_l_352_40x3": replace(                                        # Table 3: 3x4 views
        LARGE, num_frames=40, clips=4, image_size=(352, 352)),
    # release: SSv2's MViTv2-S 16x4, with the same exceptions
    "ssv2_mvitv2_s": replace(
        SSV2, model="mvitv2_s", image_size=(224, 224), num_frames=16, sampling_rate=4, mixup=0.8,
        cutmix=1.0, epochs=100, batch_size=256, lr=2.5e-3, lr_batch=16, warmup_lr=1e-4,
        clip_grad=0.0, drop_path=0.4, checkpointing=False, device_batch=8),
    "ssv2_mvitv2_l_312_40x3": SSV2,                  # Table 5: 1 clip x 3 crops
    "in1k_vit_b": IN1K,                                                       # Tables 2, 7, 8
    "in1k_vit_l": replace(                           # Table 7; release: in1k_VIT_L_MaskFeat_FT
        IN1K, model="vit_l", epochs=50, lr=1e-3, lr_batch=256, warmup_epochs=5, layer_decay=0.75,
        device_batch=32),
    # Table 1's baseline (81.1): MViTv2-S's supervised recipe (there expand="attn", pool="cls").
    "k400_mvitv2_s_scratch": replace(
        K400, epochs=200, lr=1e-4, warmup_epochs=30, layer_decay=1.0, clip_grad=1.0, drop_path=0.2,
        dropout=0.5, rand_augment="rand-m7-n4-mstd0.5-inc1", head_init_scale=1.0),
    # Table 2's baseline (81.8): DeiT's recipe, without its threefold repetition, its pooling by the
    # class token and its averaged weights.
    "in1k_vit_b_scratch": replace(
        IN1K, epochs=300, batch_size=1024, lr=5e-4, lr_batch=512, warmup_epochs=5, warmup_lr=1e-6,
        min_lr=1e-5, layer_decay=1.0, head_init_scale=1.0),
    "vit_tiny": replace(                             # ours: 64x64 images on a CPU
        IN1K, model="vit_tiny", image_size=(64, 64), patch_size=8, epochs=50, batch_size=128,
        lr=1e-3, lr_batch=128, warmup_epochs=5, layer_decay=0.75, clip_grad=1.0,
        crop_scale=(0.35, 1.0), drop_path=0.0, crop_ratio=1.0, val_epochs=10),
}
# A resumed run may change where and how it runs, and how it is tested.
RUN_FIELDS = {"data", "out", "init", "resume", "baseline", "seeds", "device_batch", "amp",
              "compile", "checkpointing", "workers", "save_minutes", "log_every", "clips", "crops",
              "crop_ratio", "val_epochs"}


def check(recipe, overrides):
    """Raise ValueError for flags that contradict each other. overrides: names of those given."""
    if "color_jitter" in overrides and recipe.color_jitter and recipe.rand_augment:
        raise ValueError("--color-jitter does not go with RandAugment: add --rand-augment ''")
    engine.check_numbers(
        recipe, shares=("smoothing", "flip", "erase", "beta2"),
        positive=("epochs", "batch_size", "lr", "lr_batch", "device_batch", "log_every",
                  "layer_decay", "seeds"),
        not_negative=("clip_grad", "mixup", "cutmix", "val_epochs", "limit_per_class",
                      "warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "color_jitter",
                      "save_minutes"))
    models.check_sizes(vars(recipe))
    if not (recipe.data or models.takes_clips(recipe.model)):
        raise ValueError(f"model={recipe.model} takes images, and without --data clips are made: "
                         "name a folder of images with --data")
    if recipe.smoothing == 1:
        raise ValueError("smoothing=1.0 leaves nothing: use less than 1")
    if not 0 < recipe.crop_scale[0] <= recipe.crop_scale[1] <= 1:
        raise ValueError(f"crop_scale={recipe.crop_scale} is not an increasing range within (0, 1]:"
                         " use two shares of the area, such as 0.08 1")
    if recipe.rand_augment:
        augment.parse_rand_augment(recipe.rand_augment)


def make_model(recipe, resumed, rank):
    """The classifier, with the weights of --init unless the run is resumed. A new head starts small
    (release)."""
    model, fresh = models.build_classifier(dataclasses.asdict(recipe)), ["head"]
    if recipe.init and not resumed:
        if not os.path.isfile(recipe.init):
            raise FileNotFoundError(f"--init: no checkpoint at {recipe.init}: run pretrain.py "
                                    "before, or start from scratch with --init ''")
        fresh = convert.load_weights(model, recipe.init, verbose=rank == 0)["fresh"]
    if any(name.startswith("head") for name in fresh):
        with torch.no_grad():
            for p in model.head.parameters():
                p.mul_(recipe.head_init_scale)
    return model


def make_dataset(recipe, samples):
    """Augmented crops of labeled samples. RandAugment fills with gray in clips, and with the mean
    in images (release)."""
    change = None
    if recipe.rand_augment:
        gray = tuple(round(255 * m) for m in recipe.mean) if samples.kind == "image" else (128,) * 3
        change = functools.partial(augment.rand_augment, fill=gray,
                                   **augment.parse_rand_augment(recipe.rand_augment))
    elif recipe.color_jitter:
        change = functools.partial(augment.color_jitter, strength=recipe.color_jitter)
    erase = functools.partial(augment.erasing_box, prob=recipe.erase) if recipe.erase else None
    return data.FinetuneDataset(
        samples, recipe.image_size, recipe.num_frames if samples.kind == "video" else None,
        recipe.sampling_rate, seed=recipe.seed, scale=recipe.crop_scale, flip=recipe.flip,
        augment=change, erase=erase, repeats=recipe.repeats, segments=recipe.segments)


def train(name, recipe, overrides, rank, world, device):
    """One run, from start to end. Returns (results of its test, samples tested)."""
    print0 = tqdm.write if rank == 0 else lambda line: None
    # ---------------------------------------------------------------------------------------- data
    samples, classes = engine.from_rank0(
        layouts.find_labeled, recipe.data, "train", (), recipe.num_classes, recipe.limit_per_class,
        recipe.seed)
    val_samples, _ = engine.from_rank0(layouts.find_labeled, recipe.data, "val", classes)
    layouts.check_splits(samples, val_samples)
    models.check_kind(recipe.model, samples)
    recipe, device_batch, accumulate = engine.plan_batch(
        replace(recipe, num_classes=len(classes)), len(samples), world,
        "batch_size" in overrides, print0)
    if device_batch == 1 and (recipe.mixup or recipe.cutmix):
        raise ValueError(
            "mixup and cutmix pair the samples of a forward pass, and device_batch="
            f"{recipe.device_batch} at batch_size={recipe.batch_size} leaves one in each of "
            f"{world} processes: raise --device-batch or --batch-size, or use --mixup 0 --cutmix 0")
    steps_per_epoch = len(samples) // recipe.batch_size

    # --------------------------------------------------------------------- model, optimizer, resume
    checkpoint = checkpoints.find_checkpoint(recipe)
    engine.seed_all(recipe.seed)
    model = make_model(recipe, checkpoint is not None, rank).to(device)
    amp, autocast, scaler = engine.mixed_precision(recipe.amp, device)
    optimizer = engine.make_optimizer(model, recipe)
    engine.print_setup(RECIPES, name, recipe, model, optimizer, world, device_batch, amp,
                       print0)
    print0(f"{len(samples)} {samples.kind}s of {len(classes)} classes to train, {len(val_samples)} "
           f"to validate; other files ignored: {len(samples.ignored) + len(val_samples.ignored)}, "
           f"listed but missing: {len(samples.missing) + len(val_samples.missing)}; "
           f"{steps_per_epoch} steps per epoch, epochs {recipe.epochs} x augmentations "
           f"{recipe.repeats}, {recipe.epochs * steps_per_epoch} steps, from "
           + ("the resumed run, not --init" if checkpoint else recipe.init or "scratch"))

    run = engine.Run(
        recipe, model, optimizer, scaler, steps_per_epoch=steps_per_epoch, device=device,
        fingerprint=layouts.fingerprint(samples), num_files=len(samples), unit=samples.kind,
        checkpoint=checkpoint, run_fields=RUN_FIELDS, extra={"classes": classes})
    if engine.should_compile(recipe.compile, device, print0):
        model.compile()                                       # in place: names keep no prefix
    ddp = engine.wrap_ddp(model)
    batches = data.EpochBatches(len(samples), recipe.batch_size, recipe.epochs, recipe.seed, rank,
                                world, device_batch, run.step)
    loader = iter(data.make_loader(
        make_dataset(recipe, samples), batches, engine.loader_workers(recipe.workers, device),
        pin_memory=device.type == "cuda", collate=data.collate_repeats))

    loss_path = os.path.join(recipe.out, "loss.png")
    draw = lambda: visualize.draw_loss([run.log_path], loss_path)

    # ---------------------------------------------------------------------------------------- loop
    model.train()
    while run.step < run.total_steps:
        lr = run.start_step()
        step_loss = torch.zeros((), device=device)
        for micro in range(accumulate):
            batch = run.next_batch(loader)
            x = data.normalize(batch["x"].to(device, non_blocking=True), recipe.mean, recipe.std)
            if "boxes" in batch:
                augment.erase(x, batch["boxes"], batch["seeds"])
            x, targets = augment.mix(
                x, batch["label"].to(device, non_blocking=True), len(classes),
                random.Random(f"{recipe.seed} {run.step} {rank} {micro} mix"),
                recipe.mixup, recipe.cutmix, smoothing=recipe.smoothing)
            with engine.sync(ddp, last=micro == accumulate - 1), autocast():
                loss = augment.soft_cross_entropy(ddp(x), targets)
            scaler.scale(loss / accumulate).backward()
            step_loss += loss.detach() / accumulate
        run.end_step(step_loss, lr)                           # clip, step or skip, log
        every = recipe.val_epochs * steps_per_epoch
        if every and run.step % every == 0 and run.step < run.total_steps:
            central = features.view_dataset(val_samples, recipe)
            results = evaluate.test(model, recipe, central, classes, device, rank, world)
            model.train()
            print0(f"epoch {run.epoch:.0f}: validation, "
                   + evaluate.describe(results, samples.kind)[0]
                   + f", unreadable: {len(results['unreadable'])}")
            run.log(step=run.step, val_top1=results["top1"], val_top5=results["top5"])
            run.restart_clock()
        run.draw_sometimes(draw)
    run.draw_sometimes(draw, at_end=True)
    run.finish()
    print0(f"wrote {run.checkpoint_path}, {run.log_path}, {loss_path}")
    stem = run.checkpoint_path.removesuffix(".pt")
    return evaluate.run_test(model, recipe, val_samples, classes, stem, device, rank, world,
                             print0), val_samples


def main():
    if moved := {"--eval", "--predict", "--features", "--probe"} & set(sys.argv):
        raise ValueError(f"{min(moved)} belongs to a command of its own: python evaluate.py "
                         "CHECKPOINT --data DIR (or --predict FILES, --features OUT.npz, --probe)")
    if "--flops" in sys.argv:
        raise ValueError("--flops is a command of its own: python -m tools.flops --model mvitv2_l")
    name, recipe, overrides = engine.parse_recipe(RECIPES, __doc__, check=models.check_checkpoint)
    check(recipe, overrides)
    rank, world, device = engine.init_distributed()
    print0 = tqdm.write if rank == 0 else lambda line: None
    small = recipe.model.endswith(("_nano", "_tiny"))
    if device.type == "cpu" and not small and "device_batch" not in overrides:
        recipe = replace(recipe, device_batch=2 * recipe.repeats)             # mixup needs a pair
    if recipe.init and not recipe.resume and not os.path.isfile(recipe.init):
        raise FileNotFoundError(f"--init: no checkpoint at {recipe.init}: run pretrain.py before, "
                                "or start from scratch with --init ''")
    if not recipe.data:
        checkpoints.find_checkpoint(recipe)                   # refuses before clips are made
        few = {key: value for key, value in FEW_LABELS.items() if key not in overrides}
        recipe = replace(
            recipe, **few, data=synthetic.make_dataset("data/synthetic", print0=print0))
    samples = engine.from_rank0(layouts.find_samples, recipe.data, "train")
    for note in engine.from_rank0(data.notes_on_files, samples, recipe):
        print0(note)
    if recipe.baseline and recipe.init:
        return compare(name, recipe, overrides, rank, world, device, print0)
    train(name, recipe, overrides, rank, world, device)


def compare(name, recipe, overrides, rank, world, device, print0):
    """Fine-tune and train from scratch with each seed, and print both side by side."""
    top1 = {"fine-tuned": [], "from scratch": []}
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    for seed in seeds:
        out = recipe.out if seed == recipe.seed else os.path.join(recipe.out, f"seed{seed}")
        for label, row in (("fine-tuned", replace(recipe, seed=seed, out=out)),
                           ("from scratch", replace(recipe, seed=seed, init="",
                                                    out=os.path.join(out, "scratch")))):
            print0(f"\n{label}, seed {seed}:")
            result, samples = train(name, row, overrides, rank, world, device)
            top1[label].append(100 * result["top1"])
    labels = f"labels a class: {recipe.limit_per_class}" if recipe.limit_per_class else "all labels"
    classes, most = len(result["per_class"]), 50 / result["files"] ** 0.5
    print0(f"\ntop-1 in percent on {len(samples)} {samples.kind}s, {labels}, same budget; chance: "
           f"{100 / classes:.2f}, one standard error: at most {most:.2f}")
    print0(f"{'':14}" + "".join(f"{f'seed {seed}':>8}" for seed in seeds) + f"{'mean':>8}")
    for label, values in top1.items():
        print0(f"{label:14}" + "".join(f"{v:8.2f}" for v in [*values, np.mean(values)]))
    tuned, scratch = top1.values()
    apart = min(tuned) > max(scratch) and len(seeds) > 1
    print0(f"pre-training: {np.mean(tuned) - np.mean(scratch):+.1f} points"
           + "; each fine-tuned run is above each run from scratch" * apart)


if __name__ == "__main__":
    engine.run_main(main)
