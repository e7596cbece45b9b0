"""Plumbing shared by the training scripts: processes, batches, schedule, parameter groups, checkpoints, command line.

Nothing here knows of masks, targets or labels; forward, backward, clipping and stepping stay in the scripts.
"""
import argparse
import dataclasses
import functools
import json
import math
import os
import random
import resource
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

MAX_SKIPPED = 20      # steps with a non-finite gradient in a row; more than any loss scale needs to settle
MAX_UNREADABLE = 0.1  # share of the files


# ---------------------------------------------------------------------------------------------------------- processes

def init_distributed():
    """Join the process group that `torchrun` describes, if any. Returns (rank, world size, device)."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"local rank {local} has no GPU, there are {torch.cuda.device_count()}: "
                             "lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", 0)), world, device


def seed_all(*key):
    """Seed Python, NumPy and torch from any numbers, say (seed, step, rank): a restart then draws what it would have."""
    state = np.random.SeedSequence([k & 0xFFFFFFFF for k in key]).generate_state(1, np.uint64)[0]
    random.seed(int(state))
    np.random.seed(int(state) % 2 ** 32)
    torch.manual_seed(int(state) % 2 ** 63)


def reduce_mean(value, device):
    """Mean over ranks of a number or a scalar tensor, as a float. All ranks must call it."""
    value = torch.as_tensor(value, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value.item()


def gather_list(items):
    """Concatenation over ranks of a list of plain objects, the same on all. All ranks must call it."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class StopSignal:
    """SIGTERM and SIGINT set a flag; `agreed()` is the name of the signal if any rank got one, else "".

    release() gives both back their usual effect, where there is nothing to save.
    """

    def __init__(self):
        self.number = 0
        self.usual = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def release(self):
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.number == number == signal.SIGINT:                            # a second Ctrl-C: do not wait
            raise KeyboardInterrupt
        self.number = number

    def agreed(self):
        """All ranks must call it: they leave at the same step or not at all."""
        number = torch.tensor(self.number)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)                        # a CPU tensor: gloo, no wait for the GPU
        return signal.Signals(number.item()).name if number else ""


# ------------------------------------------------------------------------------------------------------- optimization

def lr_at(epoch, base_lr, epochs, warmup_epochs, warmup_lr=1e-6, min_lr=1e-6):
    """Learning rate at a fractional epoch: linear warm-up, then half a cosine to min_lr over the rest (release)."""
    if epoch < warmup_epochs:
        return warmup_lr + (base_lr - warmup_lr) * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return min_lr + (base_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def layer_id(name, depth):
    """0 for the stem (tokens, positions, patch embedding), i + 1 for block i, depth + 1 for norm and head (release)."""
    if name.startswith(("cls_token", "mask_token", "pos_embed", "patch_embed")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def param_groups(model, weight_decay, layer_decay=1.0):
    """AdamW groups by (layer, decayed or not), each with an "lr_scale"; one layer only without layer_decay.

    Not decayed: 1-D tensors and biases. Class token, mask token and position tables are, as in the release's MaskFeat
    configs. lr_scale: layer_decay ** (depth + 1 - layer_id), so 1 for the head.
    """
    depth = len(model.blocks) if layer_decay != 1 else 0
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        plain = p.ndim < 2 or name.endswith(".bias")
        layer = layer_id(name, depth) if layer_decay != 1 else 1
        group = groups.setdefault((layer, plain), {"params": [], "weight_decay": 0.0 if plain else weight_decay,
                                                   "lr_scale": layer_decay ** (depth + 1 - layer)})
        group["params"].append(p)
    return [groups[key] for key in sorted(groups)]                            # decayed before not, layer by layer


def mixed_precision(amp, device):
    """(name, autocast, gradient scaler) for amp = auto, fp32, bf16 or fp16; call `autocast()` for a context."""
    if amp == "auto":
        on_gpu = device.type == "cuda"
        fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if fast else "fp16" if on_gpu else "fp32"
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return amp, functools.partial(torch.autocast, device.type, dtype=dtype, enabled=amp != "fp32"), \
        torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def plan_batch(batch_size, samples, device_batch, world, given):
    """(global batch size, micro-batches per rank and step). A batch that was not given is at most 1/16 of the samples.

    A rank's share is cut into the fewest equal parts of at most device_batch. Raises ValueError if it does not divide.
    """
    if not given and batch_size > samples // 16:
        batch_size = max(2 ** int(math.log2(max(samples // 16, 1))) // world, 1) * world
    if batch_size % world:
        raise ValueError(f"batch_size={batch_size} does not divide over {world} processes: use a multiple")
    if batch_size > samples:
        raise ValueError(f"batch_size={batch_size} is more than the {samples} samples: use {samples} or less")
    share = batch_size // world
    return batch_size, next(n for n in range(1, share + 1) if share % n == 0 and share // n <= max(device_batch, 1))


def loader_workers(workers, device):
    """Loader processes per rank: as given, or -1 by the number of cores; a CPU is busy enough with the model."""
    if workers >= 0:
        return workers
    if device.type == "cpu":
        return 1
    return min(16, max(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1))


def report_unreadable(new, known, total, say):
    """Name each unreadable file once; too many of them end the run. new: (path, reason) pairs; known: dict, added to."""
    for path, reason in new:
        if path not in known:
            known[path] = reason
            say(f"unreadable, replaced by another: {path}: {reason}")
    if len(known) > MAX_UNREADABLE * total:
        raise ValueError(f"{len(known)} of {total} files cannot be read, more than {MAX_UNREADABLE:.0%}: "
                         f"{', '.join(sorted(known))}")


# -------------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, checkpoint):
    """torch.save a dict beside `path`, then rename over it: a reader finds the old file or the new, never half."""
    beside = path + ".tmp"                                                    # what a kill leaves, the next save replaces
    try:
        with open(beside, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):                                            # disk full, say
            os.unlink(beside)


def read_checkpoint(path):
    """The dict in a checkpoint file, on the CPU. Only tensors, plain values and argparse.Namespace (MAE and DINO keep their
    options in one) are unpickled: no code of the file runs.

    Raises FileNotFoundError, or ValueError for a file that is damaged or holds anything else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                                # zip, pickle, EOF, OS: all mean the same
        reason = str(error).strip().splitlines()
        reason = next((line for line in reason if "WeightsUnpickler" in line or "nsupported" in line), reason[0]) \
            if reason else type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint of tensors and plain values: {reason[:200]}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict: not a checkpoint")
    return checkpoint


def refuse_other_run(path, checkpoint, recipe, fingerprint, run_fields):
    """A run goes on only as what it was: same recipe (a dataclass) but for `run_fields`, same data set."""
    needed = "model", "optimizer", "scaler", "step", "skipped", "recipe", "data"
    missing = [key for key in needed if key not in checkpoint]
    if missing:
        raise ValueError(f"{path} is no training checkpoint, it lacks {', '.join(missing)}: choose another --out")
    old, new = checkpoint["recipe"], dataclasses.asdict(recipe)
    differs = [f"{key}={new[key]} (was {old.get(key)})" for key in new
               if key not in run_fields and new[key] != old.get(key)]
    if differs:
        raise ValueError(f"--resume: {path} was made by another recipe; different here: {', '.join(differs)}")
    if checkpoint["data"] != fingerprint:
        raise ValueError(f"--resume: the files in {recipe.data} are not those {path} was trained on")


# --------------------------------------------------------------------------------------------------------------- logs

class Logger:
    """Lines of JSON in `path`, on rank 0. Starting from a step drops what a killed run logged beyond it."""

    def __init__(self, path, step=0, rank=0):
        self.path = path if rank == 0 else None
        if self.path and os.path.exists(path):
            with open(path) as f:
                lines = [line for line in f if line.endswith("\n")]           # a kill can leave half a line
            kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
            with open(path + ".tmp", "w") as f:
                f.writelines(kept)
            os.replace(path + ".tmp", path)

    def __call__(self, **values):
        if self.path:
            with open(self.path, "a") as f:
                f.write(json.dumps({"time": round(time.time(), 3), **values}, allow_nan=False) + "\n")


def peak_memory(device):
    """Most memory used so far, in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if os.path.exists("/proc/self/status"):                                   # Linux; ru_maxrss would count the parent's
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 30       # macOS: bytes


# ------------------------------------------------------------------------------------------------------- command line

def option(default, help="", choices=None, alias=None):
    """A field of a recipe. alias: a second name of its flag. A tuple of n values takes n or one, an empty one any number."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "alias": alias})


def check_positive(recipe, *names):
    for name in names:
        if not getattr(recipe, name) > 0:
            raise ValueError(f"{name}={getattr(recipe, name)} is not positive")


def parse_recipe(recipes, description, argv=None):
    """A recipe from the command line: a row of `recipes`, with any field overridden by --field.

    recipes: {name: frozen dataclass}. --recipe picks the row, else --model the first row of that model, else the first
    row. Tuples take all their values or one for all, booleans also --no-field. Returns (name, recipe, names of what was given).
    """
    first = next(iter(recipes.values()))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--recipe", choices=list(recipes), help="row to start from; default: the first of --model")
    for field in dataclasses.fields(first):
        default, flags = getattr(first, field.name), ["--" + field.name.replace("_", "-")]
        about = {"default": argparse.SUPPRESS, "help": field.metadata.get("help", ""), "dest": field.name}
        if field.metadata.get("alias"):
            flags.append(field.metadata["alias"])
        if field.metadata.get("choices"):
            about["choices"] = field.metadata["choices"]
        if isinstance(default, bool):
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **about)
        elif isinstance(default, tuple):
            parser.add_argument(*flags, type=type(default[0]) if default else str, nargs="+", **about)
        else:
            parser.add_argument(*flags, type=type(default), **about)
    given = vars(parser.parse_args(argv))
    named = given.pop("recipe")
    name = named or next((n for n, r in recipes.items() if r.model == given.get("model", first.model)), None)
    if name is None:
        parser.error(f"no recipe is for --model {given['model']}: name one with --recipe, from {', '.join(recipes)}")
    for key, values in given.items():
        if isinstance(values, list):                                          # one value stands for all
            length = len(getattr(first, key)) or len(values)
            if len(values) not in (1, length):
                parser.error(f"--{key.replace('_', '-')} takes 1 or {length} values, not {len(values)}")
            given[key] = tuple(values) * (length // len(values))
    return name, dataclasses.replace(recipes[name], **given), set(given) | ({"recipe"} if named else set())


def run_main(main):
    """Run a script's main(); what the user can mend (ValueError, OSError) is one line on stderr and exit status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        where = "error" if rank == "0" else f"error (rank {rank})"
        message = str(error).strip()
        if "Original Traceback" in message:                                   # from a loader process: its last line
            message = message.splitlines()[-1]
        print(f"{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    if dist.is_initialized():
        dist.barrier()                                                        # a rank that left early can make gloo abort
        dist.destroy_process_group()
