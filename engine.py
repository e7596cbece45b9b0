"""Plumbing shared by the training scripts: processes, schedule, parameter groups, checkpoints, logs, command line.

Nothing here knows of masks, targets or labels; forward, backward, clipping and stepping stay in the scripts.
"""
import argparse
import dataclasses
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
    """SIGTERM and SIGINT set a flag; `agreed()` is the name of the signal if any rank got one, else ""."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

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


def param_groups(model, weight_decay):
    """Two AdamW groups: decayed, and not (1-D tensors and biases).

    Class token, mask token and position tables are decayed, as in the release's MaskFeat configs.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = {name for name, p in named if p.ndim < 2 or name.endswith(".bias")}
    return [{"params": [p for name, p in named if name not in plain], "weight_decay": weight_decay},
            {"params": [p for name, p in named if name in plain], "weight_decay": 0.0}]


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
    """The dict in a checkpoint file, on the CPU. Only tensors and plain values are unpickled: no code of the file runs.

    Raises FileNotFoundError, or ValueError for a file that is damaged or holds anything else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                                # zip, pickle, EOF, OS: all mean the same
        reason = str(error).strip().splitlines()
        reason = next((line for line in reason if "WeightsUnpickler" in line or "nsupported" in line), reason[0]) \
            if reason else type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint of tensors and plain values: {reason[:200]}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict: not a checkpoint")
    return checkpoint


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

def parse_recipe(recipes, description, argv=None):
    """A recipe from the command line: a row of `recipes`, with any field overridden by --field.

    recipes: {name: frozen dataclass}. --recipe picks the row, else --model the first row of that model, else the first
    row. Tuples take all their values or one for all, booleans also --no-field. Returns (name, recipe, names of the fields given).
    """
    first = next(iter(recipes.values()))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--recipe", choices=list(recipes), help="row to start from; default: the first of --model")
    for field in dataclasses.fields(first):
        default, flag = getattr(first, field.name), "--" + field.name.replace("_", "-")
        about = {"default": argparse.SUPPRESS, "help": field.metadata.get("help", "")}
        if field.metadata.get("choices"):
            about["choices"] = field.metadata["choices"]
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **about)
        elif isinstance(default, tuple):
            parser.add_argument(flag, type=type(default[0]), nargs="+", **about)
        else:
            parser.add_argument(flag, type=type(default), **about)
    given = vars(parser.parse_args(argv))
    name = given.pop("recipe") or next(
        (n for n, r in recipes.items() if r.model == given.get("model", first.model)), next(iter(recipes)))
    for key, values in given.items():
        if isinstance(values, list):                                          # one value stands for all
            length = len(getattr(first, key))
            if len(values) not in (1, length):
                parser.error(f"--{key.replace('_', '-')} takes 1 or {length} values, not {len(values)}")
            given[key] = tuple(values) * (length // len(values))
    return name, dataclasses.replace(recipes[name], **given), set(given)


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
