"""Plumbing that the training scripts share: processes, schedule, a run's bookkeeping, flags.

Nothing here knows of masks, targets, labels or boxes. The forward pass, the loss and the backward
pass stay in the scripts.
"""
import argparse
import contextlib
import dataclasses
import errno
import functools
import inspect
import json
import math
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path

# Idle OpenMP threads sleep instead of spinning at the end of each operation. On a machine with
# other work, spinning threads take the core from the thread that they wait for: a run beside two
# busy processes took 28 times as long. The policy counts only if it is set before torch is loaded,
# so scripts import this file first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
PARENT = os.getppid()  # before torch is loaded, which takes seconds: see follow_launcher

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoints import (
    check_resume,
    check_stored,
    check_weights,
    load_optimizer,
    read_checkpoint,
    save_checkpoint,
)

MAX_SKIPPED_SHARE = 0.1
MAX_SKIPPED = 20      # steps with a non-finite gradient in a row: more than a loss scale needs
MAX_UNREADABLE = 0.1  # share of the files
DRAW_SHARE = 0.02     # of the time, for pictures during a run
LAUNCHER_DIED = getattr(signal, "SIGUSR1", signal.SIGTERM)  # may come once for each of its threads


# --------------------------------------------------------------------------------------- processes

def follow_launcher():
    """If `torchrun` is killed, its processes get a signal, save and leave (Linux). They would train
    on otherwise, and stand in the way of the run that goes on."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, LAUNCHER_DIED)             # 1: PR_SET_PDEATHSIG
        if os.getppid() != PARENT:                            # it was killed before that
            sys.exit(128 + LAUNCHER_DIED)


def init_distributed():
    """Join the process group of `torchrun`, if any. Returns (rank, world size, device)."""
    follow_launcher()
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device(
        "mps" if torch.backends.mps.is_available() else "cpu")                # macOS, untried
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"local rank {local} has no GPU, GPUs found: "
                             f"{torch.cuda.device_count()}: lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.set_num_threads(min(torch.get_num_threads(), cores_per_process()))
    return int(os.environ.get("RANK", 0)), world, device


def usable_cores(cgroup="/sys/fs/cgroup"):
    """CPU cores for this process, by its affinity and its container's quota (cgroup v2 or v1)."""
    on_linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError):
            quota, period = " ".join(Path(cgroup, name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def cores_per_process():
    return max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def loader_workers(workers, device):
    """Loader processes per rank: as given, or for -1 by the cores. A CPU is busy with the model."""
    if workers >= 0:
        return workers
    return 1 if device.type == "cpu" else min(cores_per_process(), 16)


def seed_all(*key):
    """Seed Python, NumPy and torch by numbers such as (seed, step, rank), so that a restart draws
    the same."""
    state = np.random.SeedSequence([k & 0xFFFFFFFF for k in key]).generate_state(1, np.uint64)[0]
    random.seed(int(state))
    np.random.seed(int(state) % 2 ** 32)
    torch.manual_seed(int(state) % 2 ** 63)


def reduce_mean(value, device):
    """Mean over ranks of a number or a scalar tensor, as a float. All ranks must call it."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    value = torch.as_tensor(value, dtype=dtype, device=device)
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value.item()


def gather_list(items):
    """Concatenation over ranks of a list of plain objects. All ranks must call it."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def from_rank0(function, *arguments):
    """What function(*arguments) returns or raises on rank 0, on all ranks. All must call it."""
    result = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = [function(*arguments)]
        except (ValueError, OSError) as error:
            result = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def wrap_ddp(model):
    """The model under DistributedDataParallel if there are several processes."""
    if not dist.is_initialized():
        return model
    # Buffers are constants here, a whole teacher may be among them. (Newer torch has a new name.)
    names = "forward_sync_buffers", "broadcast_buffers"
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = next(name for name in names if name in known)
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{sync_buffers: False})


def sync(model, last):
    """Context of a micro-batch: gradients are averaged over ranks with the last one of a step."""
    skip = isinstance(model, DistributedDataParallel) and not last
    return model.no_sync() if skip else contextlib.nullcontext()


# ------------------------------------------------------------------------------------ optimization

def lr_at(epoch, base_lr, epochs, warmup_epochs, warmup_lr=1e-6, min_lr=1e-6):
    """Learning rate at a fractional epoch: linear warm-up, then half a cosine (release)."""
    if epoch < warmup_epochs:
        return warmup_lr + (base_lr - warmup_lr) * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return min_lr + (base_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_lr(optimizer, recipe, epoch):
    """Set and return the learning rate at a fractional epoch, scaled by batch_size / lr_batch."""
    lr = recipe.batch_size / recipe.lr_batch * lr_at(
        epoch, recipe.lr, recipe.epochs, recipe.warmup_epochs, recipe.warmup_lr, recipe.min_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def layer_id(name, depth):
    """0 for the stem, i + 1 for block i, depth + 1 for norm and head (release)."""
    if name.startswith(("cls_token", "mask_token", "pos_embed", "patch_embed")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def param_groups(model, weight_decay, layer_decay=1.0):
    """Optimizer groups by (layer, decayed or not), each with an "lr_scale". One layer without
    layer_decay.

    1-D tensors and biases are not decayed. Class token, mask token and position tables are
    (release, MaskFeat configs). lr_scale is layer_decay ** (depth + 1 - layer_id), 1 at the head.
    """
    depth = len(model.blocks) if layer_decay != 1 else 0
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        plain = p.ndim < 2 or name.endswith(".bias")
        layer = layer_id(name, depth) if layer_decay != 1 else 1
        group = groups.setdefault((layer, plain), {
            "params": [], "weight_decay": 0.0 if plain else weight_decay,
            "lr_scale": layer_decay ** (depth + 1 - layer)})
        group["params"].append(p)
    return [groups[key] for key in sorted(groups)]            # decayed before not, layer by layer


def make_optimizer(model, recipe):
    """AdamW, or SGD with Nesterov momentum 0.9 where a recipe asks for it."""
    groups = param_groups(model, recipe.weight_decay, getattr(recipe, "layer_decay", 1.0))
    if getattr(recipe, "optimizer", "adamw") == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, recipe.beta2), fused=True)


def mixed_precision(amp, device):
    """(name, autocast, gradient scaler) for amp = auto, fp32, bf16 or fp16. Call `autocast()`."""
    if amp == "auto":
        on_gpu = device.type == "cuda"
        fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if fast else "fp16" if on_gpu else "fp32"
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=amp != "fp32")
    return amp, autocast, torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def should_compile(choice, device, print0=print):
    """Whether to torch.compile, for choice = on, off or auto: on a GPU, if there is a compiler.
    Raises ValueError for "on" without one."""
    if choice == "off" or choice == "auto" and device.type != "cuda":
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        return True
    except Exception as error:  # no C compiler, no Triton, an unwritable cache, a new Python
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        remedy = "install a C compiler such as gcc"
        if "[Errno" in str(error):
            remedy = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
        text = f"torch.compile does not work here ({reason[:200]}): {remedy}"
        if choice == "on":
            raise ValueError(f"--compile on: {text}, or use --compile off") from None
        print0(f"{text}; training goes on without it")
        return False


def plan_batch(recipe, samples, world, is_given, print0):
    """(recipe with its final batch_size, samples per forward pass, passes per rank and step).

    A batch that was not given is at most 1/16 of the samples, but 8 if there are as many. A rank's
    share is cut into the fewest equal parts of at most device_batch. Raises ValueError if the batch
    does not divide.
    """
    size = recipe.batch_size
    if not is_given and size > samples // 16:
        size = max(2 ** int(math.log2(max(samples // 16, 1))), min(size, samples, 8))
        size = max(size // world, 1) * world
    if size != recipe.batch_size:
        print0(f"batch_size {recipe.batch_size} -> {size}: the data set has only {samples} samples")
    if size % world:
        raise ValueError(f"batch_size={size} is no multiple of the {world} processes: use one")
    if size > samples:
        raise ValueError(f"batch_size={size} is more than the {samples} samples: use fewer")
    share, most = size // world, max(recipe.device_batch // getattr(recipe, "repeats", 1), 1)
    parts = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)
    return dataclasses.replace(recipe, batch_size=size), share // parts, parts


def print_setup(recipes, name, recipe, model, optimizer, world, device_batch, amp, print0):
    """What is about to be trained, and how, with what differs from the row `name` of recipes."""
    row = vars(recipes.get(name, recipe))
    changed = [f"{key}={value}" for key, value in vars(recipe).items() if value != row[key]]
    line = f"recipe {name}" + f" with {' '.join(changed) or 'nothing changed'}" * (name in recipes)
    if not getattr(recipe, "dry_run", False):
        line += f"; all values are in {recipe.out}/recipe.json"
    print0(textwrap.fill(line, 100, break_long_words=False, break_on_hyphens=False))
    size, weights = recipe.batch_size, list(model.parameters())
    stem = optimizer.param_groups[0]["lr_scale"]
    on_cpu = weights[0].device.type == "cpu"
    threads = f" with {torch.get_num_threads()} threads (OMP_NUM_THREADS)" if on_cpu else ""
    print0(f"batch {size} = processes {world} x samples {device_batch} x accumulated "
           f"{size // world // device_batch}; peak lr {recipe.lr:g} x "
           f"{size}/{recipe.lr_batch} = {recipe.lr * size / recipe.lr_batch:g}"
           + (f" at the head, x {stem:.2g} at the stem" if stem != 1 else "")
           + f"; {amp} on {weights[0].device}{threads}; "
           f"{sum(p.numel() for p in weights) / 1e6:.1f} M parameters")
    if recipe.warmup_epochs >= recipe.epochs:
        print0(f"note: warmup_epochs={recipe.warmup_epochs:g} is not less than epochs="
               f"{recipe.epochs}: the learning rate only rises")


# -------------------------------------------------------------------------------------- one folder

_locks = []  # open files, whose locks end with the process, however it ends


def lock_folder(out):
    """Keep other runs out of the folder until this process ends.

    Raises ValueError if another one is in it. Without effect where files cannot be locked.
    """
    os.makedirs(out, exist_ok=True)
    try:
        import fcntl  # not on Windows
    except ImportError:
        return
    file = open(os.path.join(out, ".lock"), "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader processes do not inherit it
    except OSError as error:
        with file:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ValueError(f"{out} is in use by {file.read().strip() or 'another run'}: wait "
                                 "for its end, or choose another --out") from None
        return  # a file system without locks
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
    _locks.append(file)


# ------------------------------------------------------------------------------------------- a run

class Stopped(Exception):
    """Raised by a signal handler to end the waiting for data."""


class StopSignal:
    """SIGTERM, SIGINT and the launcher's death set a flag and end the waiting for data. A second
    SIGTERM or SIGINT exits at once.

    `agreed()` is the name of the signal if any rank got one, else "".
    """

    def __init__(self):
        self.number, self.waiting = 0, False
        self.usual = {number: signal.signal(number, self.receive)
                      for number in {signal.SIGTERM, signal.SIGINT, LAUNCHER_DIED}}

    def release(self):
        """Give the signals back their usual effect, where there is nothing to save."""
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.number and number == LAUNCHER_DIED:
            return
        if self.number:
            sys.exit(128 + number)
        self.number = number
        if self.waiting:
            raise Stopped

    def agreed(self):
        """All ranks must call it: they leave at the same step or not at all."""
        number = torch.tensor(self.number)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)        # a CPU tensor: no wait for the GPU
        return signal.Signals(number.item()).name if number else ""


class Run:
    """The bookkeeping of one training run: step, log, checkpoint, signals, waits for data.

    The loop and its steps stay in the script:

        run = Run(...)                                        # goes on from a checkpoint if given
        while run.step < run.total_steps:
            lr = run.start_step()
            for micro in range(accumulate):
                batch = run.next_batch(batches)               # leaves on a signal
                ...                                           # forward, backward
            run.end_step(loss, lr)                            # clip, step or skip, log
        run.finish()

    recipe: with out, seed, clip_grad, log_every, save_minutes and what `set_lr` reads.
    checkpoint: what `find_checkpoint` found. extra: more to save. fingerprint: of the data.
    num_files: in the data set, for the limit of unreadable ones. unit: "video", "image", "clip".
    """

    def __init__(self, recipe, model, optimizer, scaler, *, steps_per_epoch, fingerprint, num_files,
                 unit, device, checkpoint=None, run_fields=(), extra=None):
        self.recipe, self.model, self.optimizer, self.scaler = recipe, model, optimizer, scaler
        self.steps_per_epoch, self.total_steps = steps_per_epoch, recipe.epochs * steps_per_epoch
        self.fingerprint, self.num_files, self.unit = fingerprint, num_files, unit
        self.device, self.extra = device, extra or {}
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.print0 = tqdm.write if self.rank == 0 else lambda line: None
        self.checkpoint_path = os.path.join(recipe.out, "last.pt")
        self.log_path = os.path.join(recipe.out, "log.jsonl")
        self.step = skipped = 0
        if checkpoint:
            if ("classes" in checkpoint) != ("classes" in self.extra):
                raise ValueError(f"--resume: {self.checkpoint_path} was written by another script: "
                                 "choose another --out")
            check_resume(self.checkpoint_path, checkpoint, recipe, fingerprint, run_fields)
            check_weights(self.checkpoint_path, checkpoint["model"], model)
            model.load_state_dict(checkpoint["model"])
            load_optimizer(self.checkpoint_path, checkpoint, optimizer, scaler)
            self.step, skipped = checkpoint["step"], checkpoint["skipped"]
            self.print0(f"resumed {self.checkpoint_path} at step {self.step}")
        elif recipe.resume:
            self.print0(f"--resume: no {self.checkpoint_path} yet, so the run starts at step 0")
        if len(set(gather_list([self.step]))) > 1:
            raise ValueError(f"not all nodes see the same {self.checkpoint_path}: put --out on a "
                             "file system that they share")
        from_rank0(lock_folder, recipe.out)
        if self.rank == 0:
            self.about = provenance(recipe, fingerprint, num_files)
            drop_later_lines(self.log_path, self.step, self.print0)
            add_to_list(os.path.join(recipe.out, "recipe.json"), self.about)
        self.first_loss, self.has_risen = None, False
        self.saved_step, self.save_is_due = self.step, False
        self.unreadable, self.new_unreadable = {}, {}         # path: reason
        # These stay on the GPU until they are read for the log or before saving.
        self.skipped, self.skipped_in_row, self.loss_sum, self.loss_steps = torch.tensor(
            [skipped, 0.0, 0.0, 0.0], device=device)
        self.save_time, self.draw_time = time.monotonic(), 0.0
        self.restart_clock()
        self.stop = StopSignal()
        self.bar = tqdm(total=self.total_steps, initial=self.step, unit="step", smoothing=0.1,
                        disable=self.rank > 0 or None, dynamic_ncols=True)   # None: on a terminal

    @property
    def epoch(self):
        """Passes over the data so far, with the fraction of the current one."""
        return self.step / self.steps_per_epoch

    def restart_clock(self):
        """Start to count the time for samples per second anew."""
        self.clock_step, self.clock, self.waited = self.step, time.perf_counter(), 0.0

    def start_step(self):
        """Save if due, which waits for what the script logs after a step. Seed by the step, so that
        a resumed run draws the same. Set and return the lr."""
        if self.save_is_due:
            self.save_if_safe()
        seed_all(self.recipe.seed, self.step, self.rank)
        return set_lr(self.optimizer, self.recipe, self.epoch)

    def next_batch(self, batches):
        """The next micro-batch. Leaves on a signal."""
        start, batch = time.perf_counter(), None
        try:
            self.stop.waiting = True                          # from here a signal raises Stopped
            try:
                if not self.stop.number:
                    batch = next(batches)
            finally:
                self.stop.waiting = False
        except Stopped:
            pass
        self.waited += time.perf_counter() - start
        self.exit_on_signal()
        self.new_unreadable.update(batch["unreadable"])
        return batch

    def exit_on_signal(self):
        """On a signal all ranks save, discard the unfinished step and exit. All must call it."""
        if name := self.stop.agreed():
            self.bar.close()
            self.save_if_safe()
            saved = (f"{self.checkpoint_path} holds step {self.saved_step}, go on with --resume"
                     if self.saved_step else "no step was saved, start again")
            self.print0(f"stopped by {name} after step {self.step} of {self.total_steps}: {saved}")
            sys.exit(128 + signal.Signals[name])

    def end_step(self, loss, lr, **values):
        """Clip, step or skip, and log where due. Only the log waits for the GPU.

        loss: scalar tensor, this rank's mean over its part of the batch. values: more to log.
        """
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.recipe.clip_grad or math.inf)
        skip = 1 - torch.isfinite(grad_norm).float()          # of the mean over ranks: all agree
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = skip                   # then its kernel changes nothing
            self.scaler.step(self.optimizer)
        elif not skip:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skipped, self.skipped_in_row = self.skipped + skip, (self.skipped_in_row + 1) * skip
        self.loss_sum = self.loss_sum + torch.where(skip > 0, 0.0, loss)
        self.loss_steps = self.loss_steps + 1 - skip
        epoch_ends = self.step % self.steps_per_epoch == 0
        logs = self.step <= 10 or self.step % self.recipe.log_every == 0 or epoch_ends
        if (logs or self.step % MAX_SKIPPED == 0) and self.skipped_in_row >= MAX_SKIPPED:
            raise ValueError(f"the {self.skipped_in_row:.0f} steps up to {self.step} gave a "
                             "non-finite loss or gradient: lower --lr, or use --amp fp32. "
                             f"{self.checkpoint_path} is as it was before them")
        if logs:
            self.write_log(lr, None if skip else grad_norm.item(), values)
        self.bar.update()
        late = time.monotonic() - self.save_time > 60 * self.recipe.save_minutes
        self.save_is_due = self.save_is_due or late or epoch_ends             # in start_step

    def write_log(self, lr, grad_norm, values):
        """Average over ranks and over the steps since the last line. Print, and write log.jsonl."""
        seconds = time.perf_counter() - self.clock
        samples = self.recipe.batch_size * getattr(self.recipe, "repeats", 1)
        speed = (self.step - self.clock_step) * samples / seconds
        wait = reduce_mean(self.waited / seconds, self.device)
        loss = None
        if self.loss_steps:
            loss = reduce_mean(self.loss_sum / self.loss_steps, self.device)
            self.first_loss = self.first_loss or loss
            if loss > 100 * self.first_loss and not self.has_risen:
                self.has_risen = True
                self.print0(f"note: the loss {loss:.3g} is over 100 times its start "
                            f"{self.first_loss:.3g}: the training diverges, lower --lr")
        for path, reason in gather_list(list(self.new_unreadable.items())):
            if path not in self.unreadable:
                self.unreadable[path] = reason
                self.print0(f"unreadable, replaced by another: {path}: {reason}")
        if len(self.unreadable) > MAX_UNREADABLE * self.num_files:
            raise ValueError(
                f"{len(self.unreadable)} of {self.num_files} files cannot be read, more than "
                f"{MAX_UNREADABLE:.0%}: {', '.join(sorted(self.unreadable))}")
        state = f"steps skipped: {self.skipped:.0f}" if loss is None else (
            f"loss {loss:.4f}, lr {lr:.1e}, {speed:.1f} {self.unit}s/s, waits {wait:.0%}")
        self.bar.set_postfix_str(state, refresh=False)
        if not sys.stderr.isatty():                           # into a file: a line, not a bar
            self.print0(f"step {self.step} of {self.total_steps}: {state}")
        self.log(step=self.step, epoch=self.epoch, loss=loss, lr=lr, samples_per_second=speed,
                 data_wait=wait, **values, grad_norm=grad_norm, skipped=int(self.skipped),
                 unreadable=len(self.unreadable))
        self.loss_sum, self.loss_steps = torch.zeros(2, device=self.device)
        self.new_unreadable = {}
        self.restart_clock()

    def log(self, **values):
        """Add a line to log.jsonl. JSON has no NaN and infinity: they become null."""
        if self.rank == 0:
            values = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                      for key, value in values.items()}
            with open(self.log_path, "a") as f:
                line = {"time": round(time.time(), 3), **values}
                f.write(json.dumps(line, allow_nan=False) + "\n")

    def safe_to_save(self):
        """Weights about to blow up are not saved. With fp16, one or two skipped steps are only the
        loss scale that settles."""
        return self.skipped_in_row < (3 if self.scaler.is_enabled() else 1)

    def save_if_safe(self):
        """Write OUT/last.pt, unless it holds this step or the weights are not safe to save."""
        if self.saved_step == self.step or not self.safe_to_save():
            return
        if self.rank == 0:
            save_checkpoint(self.checkpoint_path, {
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "step": self.step, "skipped": int(self.skipped),
                "recipe": dataclasses.asdict(self.recipe), "data": self.fingerprint,
                "about": self.about, **self.extra})
        self.saved_step, self.save_time, self.save_is_due = self.step, time.monotonic(), False

    def draw_sometimes(self, draw, at_end=False):
        """Call draw() on rank 0 after a step, within DRAW_SHARE of the time, or at the end."""
        start = time.monotonic()
        due = self.step > 1 and (at_end or start >= self.draw_time)           # a curve has two ends
        if self.rank == 0 and due:
            try:
                draw()
            except (ValueError, OSError) as error:            # a picture must not end a run
                self.print0(f"no picture: {error}")
            self.draw_time = time.monotonic() + (time.monotonic() - start) / DRAW_SHARE
            self.restart_clock()

    def finish(self):
        """Save the last step, give the signals back, and say how it went."""
        self.bar.close()
        self.save_if_safe()
        self.stop.release()
        skipped = int(self.skipped)
        self.print0(f"{self.step} steps, {skipped} skipped for non-finite gradients; unreadable "
                    f"files replaced: {len(self.unreadable)}; peak memory "
                    f"{peak_memory(self.device):.2f} GiB")
        if skipped > max(MAX_SKIPPED_SHARE * self.total_steps, 5):
            raise ValueError(f"{skipped} of {self.total_steps} steps were skipped for a "
                             f"non-finite loss or gradient: do not use {self.checkpoint_path}, "
                             "train again with a lower --lr or with --amp fp32")


def provenance(recipe, fingerprint, num_files):
    """What a run was made with: a dict of plain values."""
    code, commit = Path(__file__).resolve().parent, ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):            # no git
        commit = subprocess.run(["git", "-C", code, "describe", "--always", "--dirty"], text=True,
                                capture_output=True, timeout=10).stdout.strip()
    versions = {}
    for name in ("torch", "numpy", "pillow", "av"):
        with contextlib.suppress(metadata.PackageNotFoundError):              # Pillow-SIMD, say
            versions[name] = metadata.version(name)
    return {"date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "command": shlex.join(sys.argv),
            "recipe": dict(vars(recipe)), "data": fingerprint, "files": num_files,
            "commit": commit, "python": platform.python_version(), **versions}


def add_to_list(path, entry):
    """Append to a list in a JSON file, which is there whole at any time."""
    entries = []
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads(Path(path).read_text())
    Path(path + ".tmp").write_text(json.dumps([*entries, entry], indent=1))
    os.replace(path + ".tmp", path)


def read_log(log_path):
    """The whole lines of a log.jsonl, dicts, and how many others there are: damaged, or half."""
    entries, damaged = [], 0
    with open(log_path, errors="replace") as f:
        for line in f:
            try:
                entry = json.loads(line) if line.endswith("\n") else None
            except (ValueError, RecursionError):
                entry = None
            if isinstance(entry, dict):
                entries.append(entry)
            else:
                damaged += 1
    return entries, damaged


def drop_later_lines(log_path, step, print0=print):
    """Drop from a log what a killed run wrote after the step that it goes on from, or all at 0."""
    if os.path.exists(log_path):
        entries, damaged = read_log(log_path)
        if damaged:
            print0(f"{log_path}: damaged lines left out: {damaged}")
        with open(log_path + ".tmp", "w") as f:
            f.writelines(json.dumps(entry) + "\n" for entry in entries
                         if step and entry.get("step", 0) <= step)
        os.replace(log_path + ".tmp", log_path)


def peak_memory(device):
    """Most memory used so far, in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if os.path.exists("/proc/self/status"):   # Linux, where ru_maxrss would count the parent's peak
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2 ** 20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 30   # macOS: bytes


# ------------------------------------------------------------------------------------ command line

def option(default, help="", choices=None, alias=None, group=None):
    """A field of a recipe. alias: a second name of its flag. group: the headline in --help of this
    field and those after it. A tuple of n values takes n or one, an empty one any number."""
    metadata = {"help": help, "choices": choices, "alias": alias, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


def check_numbers(recipe, positive=(), not_negative=(), shares=()):
    """Raise ValueError for a field out of its range. shares: from 0 to 1. All must be finite, and
    whole ones but seeds at most a million. recipe: a dataclass or a Namespace. None is not given.
    """
    ranges = ((positive, lambda v: v > 0, "positive"), (not_negative, lambda v: v >= 0,
              "zero or more"), (shares, lambda v: 0 <= v <= 1, "a share from 0 to 1"),
              (("workers",), lambda v: -1 <= v <= 1024, "from -1 to 1024"),
              (("seed",), lambda v: 0 <= v <= 2 ** 63, "from 0 to 2**63"))
    for name, value in vars(recipe).items():
        for v in value if isinstance(value, (tuple, list)) else (value,):
            reason = next((words for names, fits, words in ranges
                           if name in names and v is not None and not fits(v)), "")
            if isinstance(v, float) and not math.isfinite(v):
                reason = "finite"
            elif isinstance(v, int) and name != "seed" and abs(v) > 10 ** 6:
                reason = "at most a million"
            if reason:
                raise ValueError(f"{name}={value} is not {reason}: change "
                                 f"--{name.replace('_', '-')}")


def parse_recipe(recipes, description, argv=None, check=lambda path, checkpoint: None):
    """A recipe from the command line: a row of `recipes`, with any field overridden by --field.

    recipes: {name: frozen dataclass}. --recipe picks the row, else --model the first row of that
    model, else it is the first row. Tuples take all their values or one for all, booleans also
    --no-field. With --resume the recipe is that of OUT/last.pt, if there is one that passes check.
    Returns (name, recipe, names of the fields that are not to be chosen any more).
    """
    first = next(iter(recipes.values()))
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("--recipe", choices=list(recipes),
                        help="row to start from, by default the first of --model; the values in "
                        f"brackets are those of {next(iter(recipes))}")
    group = parser
    for field in dataclasses.fields(first):
        default, meta = getattr(first, field.name), field.metadata
        if meta.get("group"):
            group = parser.add_argument_group(meta["group"])
        flags = ["--" + field.name.replace("_", "-"), *filter(None, [meta.get("alias")])]
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        about = {"default": argparse.SUPPRESS, "dest": field.name,
                 "help": f"{meta.get('help', '')} [{shown}]".replace("%", "%%")}
        if meta.get("choices"):
            about["choices"] = meta["choices"]
        if isinstance(default, bool):
            about["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            about |= {"type": type(default[0]) if default else str, "nargs": "+"}
        else:
            about["type"] = type(default)
        group.add_argument(*flags, **about)
    overrides = vars(parser.parse_args(argv))
    named = overrides.pop("recipe")
    model = overrides.get("model", first.model)
    name = named or next((n for n, row in recipes.items() if row.model == model), None)
    if name is None:
        parser.error(f"no recipe is for --model {model}: name one with --recipe, from "
                     f"{', '.join(recipes)}")
    for key, values in overrides.items():
        if isinstance(values, list):          # one value stands for all
            length = len(getattr(first, key)) or len(values)
            if len(values) not in (1, length):
                parser.error(f"--{key.replace('_', '-')} takes 1 or {length} values, not "
                             f"{len(values)}")
            overrides[key] = tuple(values) * (length // len(values))
    changed, row = set(overrides) | ({"recipe"} if named else set()), recipes[name]
    path = os.path.join(overrides.get("out", getattr(row, "out", "")), "last.pt")
    if overrides.get("resume") and not named and os.path.isfile(path):
        checkpoint = read_checkpoint(path)
        stored = checkpoint.get("recipe", {})
        check_stored(path, stored, dataclasses.asdict(type(row)()))
        check(path, checkpoint)
        known = {field.name for field in dataclasses.fields(row)} & set(stored)
        name, row = f"of {path}", dataclasses.replace(row, **{key: stored[key] for key in known})
        changed |= {"batch_size", "device_batch"}             # these are the final ones
    return name, dataclasses.replace(row, **overrides), changed


def tell_launcher(line):
    """Let the line stand at the end of the report that `torchrun` prints of a failed process."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": about}))


def run_main(main):
    """Run a script's main(). What the user can mend (ValueError, OSError) is its message on stderr
    and exit status 2."""
    for stream in (sys.stdout, sys.stderr):   # no path is too foreign to be printed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        where = "error" if rank == "0" else f"error (rank {rank})"
        message = str(error).strip()
        if "Original Traceback" in message:   # from a loader process: its last line, less the class
            message = message.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        print(f"{where}: {message}", file=sys.stderr, flush=True)
        tell_launcher(f"{where}: {' '.join(message.split())}")
        sys.exit(2)
    except KeyboardInterrupt:                 # outside the loop, which stops by itself
        print("stopped by SIGINT", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    if dist.is_initialized():
        dist.barrier()                        # a rank that leaves early can make gloo abort
        dist.destroy_process_group()
