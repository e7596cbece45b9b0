"""Fine-tuning and testing (Sec. 4.1, 5.1): a classifier from a pre-trained encoder, tested over several views of a file.

    torchrun finetune.py                                                       # the default pre-training, on its clips
    torchrun --nproc_per_node=8 finetune.py --data k400/ --model mvitv2_s --init out/pretrain/last.pt
    torchrun --nproc_per_node=8 finetune.py --data k400/ --eval out/finetune/last.pt --clips 10 --crops 1
    python finetune.py --eval out/finetune/last.pt --predict clip.mp4 other.mp4
    python finetune.py --eval CKPT --data k400/ --features features.npz        # or --probe: a linear classifier on them
    python finetune.py --model mvitv2_l --image-size 312 --frames 40 --flops

--init starts from the weights of any checkpoint that convert.py knows; --resume goes on with a run that was stopped or
killed, from OUT/last.pt. Writes OUT/last.pt, OUT/log.jsonl, and the test as last_<clips>x<crops>.json and .png beside it.
"""
import dataclasses
import functools
import os
import random
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

import augment
import data
import evaluate
import layouts
import mvit
from tools import synthetic
from convert import foreign_recipe, load_weights, recognize
from models import MODELS, build_classifier
from engine import (MAX_SKIPPED, Logger, StopSignal, check_positive, gather_list, init_distributed, loader_workers, lr_at,
                    mixed_precision, option, param_groups, parse_recipe, peak_memory, plan_batch, read_checkpoint,
                    reduce_mean, refuse_other_run, report_unreadable, run_main, save_checkpoint, seed_all)
from tools.flops import count_flops


# ------------------------------------------------------------------------------------------------------------ recipes
# Learning rates belong to `lr_batch` distinct samples per update (the release's config of one 8-GPU node) and are scaled by
# batch_size / lr_batch. With repeats=2 each decoded clip counts twice in a batch; epochs are passes over the files.

@dataclass(frozen=True)
class Recipe:
    # model and input
    model: str = option("mvitv2_s", "encoder preset", tuple(MODELS))
    init: str = option("", "checkpoint whose weights to start from: ours, or any that convert.py knows; none: from scratch")
    num_classes: int = option(0, "classes; 0: as many as the data set has")
    image_size: tuple = option((224, 224), "height and width in pixels")
    num_frames: int = option(16, "frames per clip", alias="--frames")                 # Sec. 4.1: 16x4
    sampling_rate: int = option(4, "stride between frames, at 30 fps")
    segments: bool = option(False, "one frame from each of num_frames parts of the video, instead of a clip")
    patch_size: int = option(16, "pixels per token of ViT")
    expand: str = option("mlp", "where MViT widens", ("mlp", "attn"))
    pool: str = option("mean", "what the head sees: mean of the patch tokens, or class token", ("mean", "cls"))  # release
    drop_path: float = option(0.1, "stochastic depth rate at the last block")
    dropout: float = option(0.0, "before the head")
    head_init_scale: float = option(0.001, "factor on a new head's initial weights")  # release
    mean: tuple = option((0.45, 0.45, 0.45), "RGB mean of the input in [0, 1]")       # release, Kinetics
    std: tuple = option((0.225, 0.225, 0.225), "RGB standard deviation")
    # augmentation (release)
    crop_scale: tuple = option((0.08, 1.0), "area range of the random crop")
    flip: float = option(0.5, "probability of a horizontal flip")
    rand_augment: str = option("rand-m7-mstd0.5-inc1", "RandAugment in timm's notation; '' for none")
    color_jitter: float = option(0.0, "strength of colour jitter, used without RandAugment")
    erase: float = option(0.25, "probability of random erasing")
    repeats: int = option(2, "augmentations of each decoded sample in a batch")
    mixup: float = option(0.8, "Beta parameter; 0: off")
    cutmix: float = option(1.0, "Beta parameter; 0: off")
    smoothing: float = option(0.1, "label smoothing")
    # optimization
    optimizer: str = option("adamw", "adamw, or sgd with Nesterov momentum 0.9", ("adamw", "sgd"))
    epochs: int = option(100, "passes over the data")
    batch_size: int = option(256, "samples per update, before repeats; if not given, at most 1/16 of the data")
    lr: float = option(6e-4, "peak learning rate at lr_batch samples per update")
    lr_batch: int = option(16, "batch that the three learning rates belong to")
    warmup_epochs: float = option(20.0, "epochs of linear warm-up")
    warmup_lr: float = option(1e-6, "learning rate at the start")
    min_lr: float = option(1e-6, "learning rate at the end")
    layer_decay: float = option(0.75, "factor on the learning rate from each block to the one below")
    weight_decay: float = option(0.05, "on tensors of two or more dimensions")
    beta2: float = option(0.999, "AdamW")
    clip_grad: float = option(5.0, "largest total gradient norm; 0: no clipping")
    limit_per_class: int = option(0, "train on that many files a class; 0: all")
    seed: int = option(0, "of everything random")
    # testing
    clips: int = option(10, "clips per video, from its start to its end")             # Sec. 4.1: 1x10
    crops: int = option(1, "crops per clip: 1 (centre), or 3 along the longer side", (1, 3))
    crop_ratio: float = option(0.875, "one crop: its side over the picture's shorter side")   # release: 224 of 256
    val_epochs: int = option(5, "epochs between validations by one central view; 0: never")
    # the run
    data: str = option("", "folder with the data; none: clips are made in data/synthetic")
    out: str = option("out/finetune", "folder for checkpoint, log and results")
    resume: bool = option(False, "go on from OUT/last.pt if there is one; --init is then not read again")
    baseline: bool = option(False, "afterwards the same from scratch, in OUT/scratch, and the comparison")
    device_batch: int = option(8, "most samples per GPU and forward pass; the rest is accumulated")
    amp: str = option("auto", "auto: bf16 on GPU (fp16 before Ampere), fp32 on CPU", ("auto", "fp32", "bf16", "fp16"))
    compile: str = option("auto", "torch.compile; auto: on GPU", ("auto", "on", "off"))
    checkpointing: bool = option(False, "recompute activations: less memory, a third more time")
    workers: int = option(-1, "loader processes per GPU; -1: by the number of CPU cores, 1 without GPU")
    save_minutes: float = option(15.0, "minutes between checkpoints; there is one per epoch as well")
    log_every: int = option(10, "steps between lines of the log, after the first ten")
    # instead of training
    eval: str = option("", "checkpoint to test, or to use in the following")
    predict: tuple = option((), "print the top five classes of these files")
    features: str = option("", "write pooled features of the validation part to this npz")
    probe: bool = option(False, "train a linear classifier on frozen features")
    flops: bool = option(False, "print parameters and FLOPs (multiply-adds) of the model, or of all recipes")


K400 = Recipe()                                      # release: k400_MVITv2_S_16x4_MaskFeat_FT
K400_L = replace(                                    # release: k400_MVITv2_L_16x4_MaskFeat_FT
    K400, model="mvitv2_l", epochs=75, warmup_epochs=5, warmup_lr=1e-8, min_lr=1e-5, layer_decay=0.875, drop_path=0.2,
    repeats=1, device_batch=4)
# Table 3's larger inputs: 30 epochs from the fine-tuned 16x4 model, recomputing activations (Sec. 4.1). The release has no
# training config for them: other values as at 16x4.
LARGE = replace(K400_L, image_size=(312, 312), epochs=30, device_batch=2, checkpointing=True, sampling_rate=3, crops=3)
IN1K = Recipe(                                       # release: in1k_VIT_B_MaskFeat_FT
    model="vit_b", drop_path=0.1, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), repeats=1, clips=1,
    rand_augment="rand-m9-mstd0.5-inc1", batch_size=2048, lr=2e-3, lr_batch=512, warmup_lr=1e-8, layer_decay=0.65,
    clip_grad=0.0, device_batch=64)
# release: SSv2/MVITv2_L_40x3, but for expand and the start. There a square of 312 is cut from a picture whose shorter side
# is 356 to 446: 0.37 to 0.58 of one of 4:3. Here the crop's aspect varies as well.
SSV2 = replace(
    K400_L, num_classes=174, image_size=(312, 312), num_frames=40, sampling_rate=3, segments=True, flip=0.0, mixup=0.0,
    cutmix=0.0, crop_scale=(0.37, 0.58), rand_augment="rand-m7-n4-mstd0.5-inc1", optimizer="sgd", epochs=40,
    batch_size=128, lr=1.25e-3, lr_batch=8, warmup_epochs=3, warmup_lr=1e-6, min_lr=1e-6, layer_decay=1.0,
    weight_decay=1e-4, clip_grad=2.0, drop_path=0.75,
    dropout=0.5, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), clips=1, crops=3, checkpointing=True,
    device_batch=1)
RECIPES = {
    "default": Recipe(  # ours: two trainings and their tests in under five minutes on two CPU cores
        model="mvit_tiny", init="out/pretrain/last.pt", baseline=True, image_size=(64, 64), num_frames=8, drop_path=0.0,
        crop_scale=(0.5, 1.0), flip=0.0, rand_augment="", erase=0.0, repeats=1, mixup=0.0, cutmix=0.0, smoothing=0.0,
        epochs=18, batch_size=8, lr=2e-3, lr_batch=8, warmup_epochs=2, warmup_lr=1e-5, min_lr=1e-5, clip_grad=1.0,
        layer_decay=1.0,  # three blocks: with 0.75 the first layers hardly leave what HOG made of them, and see no motion
        clips=3, crop_ratio=1.0, val_epochs=6),
    "k400_mvitv2_s": K400,
    "k400_mvitv2_b": replace(K400, model="mvitv2_b"),                          # ours, by analogy
    "k400_mvitv2_l": K400_L,
    "k600_mvitv2_l": K400_L,                         # ours: the same recipe on each Kinetics
    "k700_mvitv2_l": K400_L,
    "k400_mvitv2_l_312_32x3": replace(LARGE, num_frames=32, clips=5),          # Table 3: 3x5 views
    "k400_mvitv2_l_312_40x3": replace(LARGE, num_frames=40, clips=4),          # Table 3: 3x4 views
    "k400_mvitv2_l_352_40x3": replace(LARGE, num_frames=40, clips=4, image_size=(352, 352)),
    "ssv2_mvitv2_s": replace(                        # release: SSv2/MVITv2_S_16x4, but for expand and the start
        SSV2, model="mvitv2_s", image_size=(224, 224), num_frames=16, sampling_rate=4, mixup=0.8, cutmix=1.0, epochs=100,
        batch_size=256, lr=2.5e-3, lr_batch=16, warmup_lr=1e-4, clip_grad=0.0, drop_path=0.4, mean=K400.mean, std=K400.std,
        checkpointing=False, device_batch=8),
    "ssv2_mvitv2_l_312_40x3": SSV2,                  # Table 5: 1 clip x 3 crops
    "in1k_vit_b": IN1K,
    "in1k_vit_l": replace(IN1K, model="vit_l", epochs=50, batch_size=2048, lr=1e-3, lr_batch=256, warmup_epochs=5,
                          layer_decay=0.75, device_batch=32),                  # release: in1k_VIT_L_MaskFeat_FT
    # Table 1's baseline (81.1): the supervised recipe of MViTv2, release: Kinetics/MVITv2_S_16x4 (there with expand="attn",
    # pool="cls").
    "k400_mvitv2_s_scratch": replace(
        K400, epochs=200, lr=1e-4, warmup_epochs=30, layer_decay=1.0, clip_grad=1.0, drop_path=0.2, dropout=0.5,
        rand_augment="rand-m7-n4-mstd0.5-inc1", head_init_scale=1.0),
    # Table 2's baseline (81.8): DeiT's recipe, without its threefold repetition.
    "in1k_vit_b_scratch": replace(
        IN1K, epochs=300, batch_size=1024, lr=5e-4, lr_batch=512, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5,
        layer_decay=1.0, head_init_scale=1.0),
    "vit_tiny": replace(                             # ours: 64x64 images on a CPU
        IN1K, model="vit_tiny", image_size=(64, 64), patch_size=8, epochs=50, batch_size=128, lr=1e-3, lr_batch=128,
        warmup_epochs=5, layer_decay=0.75, clip_grad=1.0, crop_scale=(0.35, 1.0), drop_path=0.0, crop_ratio=1.0,
        val_epochs=10),
}
# What may change when a run is resumed: where and how it runs, and how it is tested.
RUN_FIELDS = {"data", "out", "init", "resume", "baseline", "device_batch", "amp", "compile", "checkpointing", "workers",
              "save_minutes", "log_every", "clips", "crops", "crop_ratio", "val_epochs", "eval", "predict", "features",
              "probe", "flops"}
# What a checkpoint says of itself when it is tested.
MODEL_FIELDS = ("model", "num_classes", "image_size", "num_frames", "sampling_rate", "segments", "patch_size", "expand",
                "pool", "mean", "std", "clips", "crops", "crop_ratio", "data")


def check(recipe, given):
    """Flags that contradict each other, before anything is built. given: names of the flags given."""
    tasks = [name for name in ("predict", "features", "probe") if getattr(recipe, name)]
    if tasks and not (recipe.eval or recipe.init):
        raise ValueError(f"--{tasks[0]} needs a checkpoint: --eval CKPT")
    if "predict" in tasks and len(tasks) > 1:
        raise ValueError(f"--predict does not go with --{tasks[1]}: run them one after the other")
    if "color_jitter" in given and recipe.color_jitter and recipe.rand_augment:
        raise ValueError("--color-jitter is for training without RandAugment: add --rand-augment ''")
    check_positive(recipe, "epochs", "batch_size", "lr", "lr_batch", "device_batch", "log_every", "sampling_rate",
                   "patch_size", "repeats", "clips", "layer_decay", "crop_ratio")
    for name in ("num_classes", "clip_grad", "mixup", "cutmix", "val_epochs", "limit_per_class", "warmup_epochs"):
        if getattr(recipe, name) < 0:
            raise ValueError(f"{name}={getattr(recipe, name)} is negative")
    for name in ("drop_path", "dropout", "smoothing", "flip", "erase"):
        if not 0 <= getattr(recipe, name) <= 1 or getattr(recipe, name) == 1 and name not in ("flip", "erase"):
            raise ValueError(f"{name}={getattr(recipe, name)} is not a share from 0 to 1")
    if recipe.crop_ratio > 1:
        raise ValueError(f"crop_ratio={recipe.crop_ratio} is more than 1: the crop would be larger than the picture")
    if not 0 < recipe.crop_scale[0] <= recipe.crop_scale[1] <= 1:
        raise ValueError(f"crop_scale={recipe.crop_scale} is not an increasing range within (0, 1]")
    if recipe.rand_augment:
        augment.parse_rand_augment(recipe.rand_augment)


def find(recipe, split, classes=()):
    """The samples of one split, all labelled and suited to the model, and the names of the classes, or their numbers.

    classes: names to agree with, if known already.
    """
    samples = layouts.find_samples(recipe.data, split, limit_per_class=recipe.limit_per_class if split == "train" else 0)
    video = recipe.model in mvit.MODELS
    if video != (samples.kind == "video"):
        raise ValueError(f"model={recipe.model} takes {'clips' if video else 'images'}, but {recipe.data} holds "
                         f"{samples.kind}s: use --model {'vit_b or vit_tiny' if video else 'mvitv2_s or mvit_tiny'}")
    if min(samples.labels) < 0:
        raise ValueError(f"{recipe.data}: {sum(label < 0 for label in samples.labels)} of the {len(samples)} files in its "
                         f"{split} part have no label: put them into a folder per class, or give a csv with labels")
    named = list(samples.classes)
    if classes and named and named != list(classes) and len(named) == len(classes) and not classes[0].isdigit():
        raise ValueError(f"the classes of {recipe.data}, {', '.join(named[:3])} ..., are not those of the checkpoint, "
                         f"{', '.join(classes[:3])} ...")
    names = list(classes) or named or [str(i) for i in range(recipe.num_classes or max(samples.labels) + 1)]
    if len(named or names) != len(names):
        raise ValueError(f"{recipe.data} has {len(named)} classes, not {len(names)} as the checkpoint; it lacks "
                         f"{', '.join(sorted(set(names) - set(named))[:3]) or 'none'}, and adds "
                         f"{', '.join(sorted(set(named) - set(names))[:3]) or 'none'}")
    if len(names) != (recipe.num_classes or len(names)):
        raise ValueError(f"{recipe.data} has {len(names)} classes, not {recipe.num_classes}: choose other data"
                         + (", or leave out --num-classes" if not recipe.eval else ""))
    if len(names) < 2:
        raise ValueError(f"{recipe.data} has one class only, {names[0]}: there is nothing to tell apart")
    if max(samples.labels) >= len(names):
        raise ValueError(f"label {max(samples.labels)} in the {split} part of {recipe.data} is not one of {len(names)} classes")
    return samples, names


def load_for_test(recipe, given, say):
    """(recipe, model, names of the classes or []) of the checkpoint recipe.eval; flags that were given go before it."""
    checkpoint = read_checkpoint(recipe.eval)
    form, state = recognize(checkpoint)
    stored = foreign_recipe(checkpoint)                                       # ours tell theirs
    if "recipe" in given:                                                     # a row that was named says how to test
        given = {*given, "sampling_rate", "segments", "clips", "crops", "crop_ratio"}
    recipe = replace(recipe, **{key: stored.get(key, getattr(Recipe(), key)) for key in MODEL_FIELDS if key not in given})
    build = {**dataclasses.asdict(recipe), "drop_path": 0.0, "dropout": 0.0}
    if not recipe.num_classes:                                                # features as they were pre-trained
        build["output_stride"] = stored.get("output_stride", 0)
    model = build_classifier(build)
    report = load_weights(model, recipe.eval, verbose=False)
    if recipe.num_classes and any(name.startswith("head") for name in report["fresh"]):
        raise ValueError(f"{recipe.eval} has {stored.get('num_classes', 0)} classes, not {recipe.num_classes}")
    say(f"{recipe.eval} ({form}): {recipe.model}, {recipe.num_classes} classes, "
        + (f"{recipe.num_frames} frames at stride {recipe.sampling_rate}, " if recipe.model in mvit.MODELS else "")
        + f"{recipe.image_size[0]}x{recipe.image_size[1]} pixels"
        + "".join(f", {len(report[what])} tensors {what}" for what in ("resized", "left out") if report[what]))
    return recipe, model, list(checkpoint.get("classes", []))


def normalizer(recipe, device):
    """uint8 (n, 3, [T,] H, W) on the device -> float, less the mean, over the deviation."""
    video = recipe.model in mvit.MODELS
    mean, std = (torch.tensor(v, device=device).view(3, *[1] * (2 + video)) for v in (recipe.mean, recipe.std))
    return lambda x: x.float().div(255).sub(mean).div(std)


def forward_of(model, recipe, device):
    """uint8 views (n, 3, [T,] H, W) on the device -> what the model says of them."""
    normalize, (_, autocast, _) = normalizer(recipe, device), mixed_precision(recipe.amp, device)

    def forward(x):
        with autocast():
            return model(normalize(x))
    return forward


def views_of(samples, recipe, clips=1, crops=1):
    return data.ViewDataset(samples, recipe.image_size, recipe.num_frames if samples.kind == "video" else None,
                            recipe.sampling_rate, clips if samples.kind == "video" else 1, crops, recipe.crop_ratio,
                            recipe.segments)


def flops_of(recipe, classes):
    """count_flops of the recipe's classifier, on the meta device: no weights are made."""
    with torch.device("meta"):
        model = build_classifier({**dataclasses.asdict(recipe), "num_classes": classes, "checkpointing": False})
    T = (recipe.num_frames,) if recipe.model in mvit.MODELS else ()
    return count_flops(model, (1, 3, *T, *recipe.image_size))


def validate(model, recipe, dataset, classes, device, rank, world):
    """Test a model, in eval mode, on a data.ViewDataset; see evaluate.test."""
    return evaluate.test(forward_of(model.eval(), recipe, device), dataset, classes, device, recipe.device_batch,
                         loader_workers(recipe.workers, device), rank, world)


def run_test(model, recipe, samples, classes, stem, device, rank, world, say):
    """Test over recipe.clips x recipe.crops views, print, write STEM_<clips>x<crops>.json and .png. Returns results."""
    dataset = views_of(samples, recipe, recipe.clips, recipe.crops)
    cost = flops_of(recipe, len(classes))
    say(f"testing {len(samples)} {samples.kind}s, {dataset.views} views each: {cost['flops'] / 1e9:.4g} GFLOPs x "
        f"{dataset.clips} clips x {dataset.crops} crops, {cost['parameters'] / 1e6:.4g} M parameters")
    results = validate(model, recipe, dataset, classes, device, rank, world)
    for line in evaluate.describe(results, samples.kind):
        say(line)
    if rank == 0:
        say("wrote " + ", ".join(evaluate.write_results(results, f"{stem}_{dataset.clips}x{dataset.crops}", classes)))
    return results


def train(name, recipe, given, rank, world, device, stop, say):
    """One run from start to end. Returns (model, recipe with what was resolved, validation samples, class names)."""
    # ------------------------------------------------------------------------------------------------------------ data
    samples, classes = find(recipe, "train")
    val_samples, _ = find(recipe, "val", classes)                             # an empty one fails now, not after training
    size, accumulate = plan_batch(recipe.batch_size, len(samples), max(recipe.device_batch // recipe.repeats, 1), world,
                                  "batch_size" in given)
    if size != recipe.batch_size:
        say(f"batch_size {recipe.batch_size} -> {size}: the data set has only {len(samples)} samples")
    recipe = replace(recipe, batch_size=size, num_classes=len(classes))
    device_batch = size // world // accumulate
    if device_batch == 1 and (recipe.mixup or recipe.cutmix):
        raise ValueError(f"mixup and cutmix pair the samples of a forward pass, and a batch of {size} over {world} processes "
                         f"with device_batch={recipe.device_batch}, repeats={recipe.repeats} leaves one in each: raise --device-batch "
                         "or --batch-size, or use --mixup 0 --cutmix 0")
    steps_per_epoch = len(samples) // size
    total_steps = recipe.epochs * steps_per_epoch

    # ----------------------------------------------------------------------------------------- model, optimizer, resume
    last, lines = os.path.join(recipe.out, "last.pt"), os.path.join(recipe.out, "log.jsonl")
    for path in (last, lines):
        if os.path.exists(path) and not recipe.resume:
            raise ValueError(f"{path} exists: go on with --resume, or choose another --out; nothing is written over it")
    resumed = recipe.resume and os.path.exists(last)
    seed_all(recipe.seed)
    model = build_classifier(dataclasses.asdict(recipe))
    fresh = ["head"]
    if recipe.init and not resumed:
        if not os.path.isfile(recipe.init):
            raise FileNotFoundError(f"--init: no checkpoint at {recipe.init}: run pretrain.py before, or start from "
                                    "scratch with --init ''")
        fresh = load_weights(model, recipe.init, verbose=rank == 0)["fresh"]
    if any(tensor.startswith("head") for tensor in fresh):
        with torch.no_grad():
            for p in model.head.parameters():
                p.mul_(recipe.head_init_scale)
    model.to(device)
    amp, autocast, scaler = mixed_precision(recipe.amp, device)
    groups = param_groups(model, recipe.weight_decay, recipe.layer_decay)
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, recipe.beta2), fused=True)
    fingerprint, step, skipped = layouts.fingerprint(samples), 0, 0
    if resumed:
        checkpoint = read_checkpoint(last)
        refuse_other_run(last, checkpoint, recipe, fingerprint, RUN_FIELDS)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:                                              # empty but for fp16
            scaler.load_state_dict(checkpoint["scaler"])
        step, skipped = checkpoint["step"], checkpoint["skipped"]
        say(f"resumed {last} at step {step}" + (f"; --init {recipe.init} is not read again" if recipe.init else ""))
    if len(set(gather_list([step]))) > 1:
        raise ValueError(f"not all nodes see the same {last}: put --out on a file system that they share")
    os.makedirs(recipe.out, exist_ok=True)
    log = Logger(lines, step, rank)
    if recipe.compile == "on" or recipe.compile == "auto" and device.type == "cuda":
        model.compile()                                                       # in place: names keep no prefix
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model

    change = None
    if recipe.rand_augment:
        grey = (128,) * 3 if samples.kind == "video" else tuple(round(255 * m) for m in recipe.mean)   # release
        change = functools.partial(augment.rand_augment, **augment.parse_rand_augment(recipe.rand_augment), fill=grey)
    elif recipe.color_jitter:
        change = functools.partial(augment.color_jitter, strength=recipe.color_jitter)
    dataset = data.FinetuneDataset(
        samples, recipe.image_size, recipe.num_frames if samples.kind == "video" else None, recipe.sampling_rate,
        seed=recipe.seed, scale=recipe.crop_scale, flip=recipe.flip, augment=change, repeats=recipe.repeats,
        erase=functools.partial(augment.erasing_box, prob=recipe.erase) if recipe.erase else None, segments=recipe.segments,
        short_side=round(max(recipe.image_size) / 0.875))                     # release: 256 for 224
    batches = data.EpochBatches(len(samples), size, recipe.epochs, recipe.seed, rank, world, device_batch, step)
    loader = data.make_loader(dataset, batches, loader_workers(recipe.workers, device), pin_memory=device.type == "cuda",
                              collate=data.collate_repeats)

    scale = size / recipe.lr_batch
    say(f"recipe {name}: " + ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(recipe).items()))
    say(f"{len(samples)} {samples.kind}s of {len(classes)} classes to train, {len(val_samples)} to validate; "
        f"{len(samples.ignored) + len(val_samples.ignored)} other files ignored, "
        f"{len(samples.missing) + len(val_samples.missing)} listed but missing; {steps_per_epoch} steps per epoch, "
        f"{recipe.epochs} epochs x {recipe.repeats} augmentations, {total_steps} steps")
    say(f"batch {size} = {world} processes x {device_batch} samples x {accumulate} accumulated; "
        f"peak lr {recipe.lr:g} x {size}/{recipe.lr_batch} = {recipe.lr * scale:g} at the head, x "
        f"{groups[0]['lr_scale']:.2g} at the stem; {amp} on {device}; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, from {recipe.init or 'scratch'}")

    if recipe.warmup_epochs >= recipe.epochs:
        say(f"note: the warm-up of {recipe.warmup_epochs:g} epochs is not over before the end, the learning rate only rises")

    def sound():
        """Weights about to blow up are not saved; one or two steps skipped by fp16 are its loss scale settling."""
        return skipped_in_row < (3 if scaler.is_enabled() else 1)

    def save():
        nonlocal saved_step
        saved_step = step
        if rank == 0:
            save_checkpoint(last, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "step": step, "skipped": skipped, "recipe": dataclasses.asdict(recipe), "data": fingerprint,
                "classes": classes})

    # ------------------------------------------------------------------------------------------------------------ loop
    normalize = normalizer(recipe, device)
    model.train()
    loss_sum, steps_summed, skipped_in_row = torch.zeros((), device=device), 0, 0
    logged, saved_step, unreadable, newly_unreadable = step, step, {}, {}
    bar = tqdm(total=total_steps, initial=step, unit="step", disable=rank > 0, dynamic_ncols=True, smoothing=0.1)
    iterator, waited, mark, saved, stopped, due = iter(loader), 0.0, time.perf_counter(), time.monotonic(), "", False
    while step < total_steps and not stopped:
        seed_all(recipe.seed, step, rank)                                     # drop path draws by step: exact resume
        lr = scale * lr_at(step / steps_per_epoch, recipe.lr, recipe.epochs, recipe.warmup_epochs, recipe.warmup_lr,
                           recipe.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        step_loss = torch.zeros((), device=device)
        for micro in range(accumulate):
            stopped = stop.agreed()
            if stopped:                                                       # half a step is dropped, it can be long
                break
            start = time.perf_counter()
            batch = next(iterator)
            waited += time.perf_counter() - start
            newly_unreadable.update(batch["unreadable"])
            x = normalize(batch["x"].to(device, non_blocking=True))
            if "boxes" in batch:
                augment.erase(x, batch["boxes"], batch["seeds"])
            x, targets = augment.mix(x, batch["label"].to(device, non_blocking=True), len(classes),
                                     random.Random(f"{recipe.seed} {step} {rank} {micro} mix"), recipe.mixup, recipe.cutmix,
                                     smoothing=recipe.smoothing)
            with ddp.no_sync() if world > 1 and micro < accumulate - 1 else nullcontext():
                with autocast():
                    loss = augment.soft_cross_entropy(ddp(x), targets)
                scaler.scale(loss / accumulate).backward()
            step_loss += loss.detach() / accumulate
        if stopped:
            break
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or float("inf"))
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

        # --------------------------------------------------------------------------------- log, validate, stop, save
        if step % recipe.log_every == 0 or step % steps_per_epoch == 0 or step <= 10:
            seconds = time.perf_counter() - mark
            speed, wait = (step - logged) * size * recipe.repeats / seconds, reduce_mean(waited / seconds, device)
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
        if recipe.val_epochs and step < total_steps and step % (recipe.val_epochs * steps_per_epoch) == 0:
            results = validate(model, recipe, views_of(val_samples, recipe), classes, device, rank, world)
            model.train()
            say(f"epoch {step // steps_per_epoch}: validation top-1 {100 * results['top1']:.2f}, top-5 "
                f"{100 * results['top5']:.2f} (one central view, {len(results['unreadable'])} unreadable)")
            log(step=step, val_top1=results["top1"], val_top5=results["top5"])
            mark = time.perf_counter()
    bar.close()
    if stopped:
        if sound():
            save()
        say(f"stopped by {stopped} after step {step} of {total_steps}; {last} holds step {saved_step}, go on with --resume")
        sys.exit(128 + signal.Signals[stopped])
    if saved_step < step and sound():
        save()
    say(f"{step} steps, {skipped} skipped for non-finite gradients, {len(unreadable)} unreadable files replaced; "
        f"peak memory {peak_memory(device):.2f} GiB; wrote {last}, {lines}")
    return model, recipe, val_samples, classes


def main():
    name, recipe, given = parse_recipe(RECIPES, __doc__)
    check(recipe, given)
    rank, world, device = init_distributed()
    say = tqdm.write if rank == 0 else lambda line: None

    # ------------------------------------------------------------------------------------- what needs no data, or no labels
    if recipe.flops:
        asked = given & {"recipe", "model", "image_size", "num_frames", "patch_size", "expand", "num_classes"}
        for row_name, row in ({name: recipe} if asked else RECIPES).items():
            video = row.model in mvit.MODELS
            classes = row.num_classes or (400 if video else 1000)
            cost = flops_of(row, classes)
            say(f"{row_name}: {row.model}, {'x'.join(map(str, (row.num_frames,) * video + row.image_size))}, "
                + f"expand={row.expand}, " * video + f"{classes} classes: {cost['parameters']:,} parameters, "
                f"{cost['flops'] / 1e9:.2f} GFLOPs ({cost['macs'] / 1e9:.2f} without LayerNorm)")
        return
    recipe_eval = recipe.eval or (recipe.init if recipe.probe or recipe.features or recipe.predict else "")
    if recipe_eval:
        return examine(replace(recipe, eval=recipe_eval), given, rank, world, device, say)

    # ------------------------------------------------------------------------------------------------------ train and test
    if not recipe.data:
        recipe = replace(recipe, data="data/synthetic")
        if rank == 0 and not os.path.isdir(recipe.data):
            say(f"no --data: making clips in {recipe.data}, once")
        synthetic.make_dataset(recipe.data)                                   # safe if all ranks do it at once
    runs = {"fine-tuned": recipe}
    if recipe.baseline and recipe.init:
        runs["from scratch"] = replace(recipe, init="", out=os.path.join(recipe.out, "scratch"))
    results = {}
    for label, row in runs.items():
        if len(runs) > 1:
            say(f"\n{label}:")
        stop = StopSignal()
        model, row, samples, classes = train(name, row, given, rank, world, device, stop, say)
        stop.release()                                                        # a test has nothing to save
        results[label] = run_test(model, row, samples, classes, os.path.join(row.out, "last"), device, rank, world, say)
    if len(runs) > 1:
        view = "clip" if samples.kind == "video" else "crop"
        say(f"\n{'':14}{samples.kind}-level top-1   {view}-level top-1   (same budget, {len(samples)} {samples.kind}s)")
        for label, result in results.items():
            say(f"{label:14}{100 * result['top1']:17.2f}{100 * result['view_top1']:19.2f}")


def examine(recipe, given, rank, world, device, say):
    """--eval and what goes with it: test a checkpoint, predict files, write features, train a linear probe."""
    names_given = recipe.data
    recipe, model, classes = load_for_test(recipe, given, say)
    model.to(device).eval()
    if recipe.features:
        os.makedirs(os.path.dirname(recipe.features) or ".", exist_ok=True)
    if recipe.predict:
        if not classes and names_given:
            classes = find(recipe, "val")[1]
        classes = classes or [f"class {i}" for i in range(recipe.num_classes)]
        if not recipe.num_classes:
            raise ValueError(f"{recipe.eval} has no classification head: fine-tune it first")
        forward, failed = forward_of(model, recipe, device), 0
        video = recipe.model in mvit.MODELS
        for path in recipe.predict:
            try:
                if layouts.media_kind(path) != ("video" if video else "image"):
                    raise data.UnreadableFile(path, f"{recipe.model} takes {'videos' if video else 'images'}")
                views = data.read_views(path, recipe.image_size, recipe.num_frames if video else None, recipe.sampling_rate,
                                        recipe.clips if video else 1, recipe.crops, recipe.crop_ratio, recipe.segments)
            except data.UnreadableFile as error:
                failed += 1
                say(str(error))
                continue
            say(path)
            for label, p in evaluate.top_classes(forward, views.to(device), recipe.device_batch, classes):
                say(f"  {100 * p:6.2f} %  {label}")
        if failed:
            raise ValueError(f"{failed} of {len(recipe.predict)} files cannot be read")
        return
    if not recipe.data:
        raise ValueError("--data DIR: which data?")
    if not (recipe.features or recipe.probe):
        if not recipe.num_classes:
            raise ValueError(f"{recipe.eval} has no classification head: fine-tune it first, or use --probe")
        samples, classes = find(recipe, "val", classes)
        stem = os.path.splitext(recipe.eval)[0]
        run_test(model, recipe, samples, classes, stem, device, rank, world, say)
        return
    if recipe.probe:
        classes = find(replace(recipe, num_classes=0), "train")[1]
        find(replace(recipe, num_classes=0), "val", classes)
    clips, crops = (getattr(recipe, name) if name in given else 1 for name in ("clips", "crops"))
    forward, features = forward_of(model.features, recipe, device), {}
    for split in ("train", "val") if recipe.probe else ("val",):
        samples = layouts.find_samples(recipe.data, split, recipe.limit_per_class if split == "train" else 0)
        records, unreadable = evaluate.over_views(
            forward, views_of(samples, recipe, clips, crops), device, recipe.device_batch,
            loader_workers(recipe.workers, device), rank, world, f"features of {split}")
        for path, reason in unreadable:
            say(f"unreadable, left out: {path}: {reason}")
        if not records:
            raise ValueError(f"none of the {len(samples)} files in the {split} part of {recipe.data} can be read")
        features[split] = [output.mean(axis=0) for _, _, output in records], [label for _, label, _ in records]
    if recipe.features and rank == 0:
        evaluate.write_features(recipe.features, records, samples)
        say(f"wrote {recipe.features}: {len(records)} x {len(records[0][2][0])} features of the validation part")
    if recipe.probe:
        scores = evaluate.linear_probe(features["train"], features["val"], len(classes), device, seed=recipe.seed)
        for lr, fit, top1 in scores:
            say(f"linear probe, lr {lr:g}: top-1 {100 * fit:.2f} on train, {100 * top1:.2f} on val")
        lr, _, top1 = max(scores, key=lambda score: score[2])
        say(f"best on val: {100 * top1:.2f} with lr {lr:g} (chosen on val itself; {clips} clips x {crops} crops, "
            "no augmentation)")


if __name__ == "__main__":
    run_main(main)
