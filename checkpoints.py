"""Files of weights: saved whole or not at all, and read without trust."""
import argparse
import dataclasses
import json
import math
import os
import re

import numpy as np
import torch

NUMBER = np.float64(0).__reduce__()[0]  # makes a NumPy number, under two names by its version
SAFE_TYPES = [argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
              (NUMBER, "numpy.core.multiarray.scalar"), (NUMBER, "numpy._core.multiarray.scalar")]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000  # bytes, as in the original


def save_checkpoint(path, checkpoint):
    """torch.save a dict beside `path`, then rename it: a reader finds the old file or the new."""
    beside = path + ".tmp"                    # what a kill leaves, the next save replaces
    try:
        with open(beside, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):            # the disk is full, say
            os.unlink(beside)


def read_checkpoint(path):
    """The dict in a checkpoint file, on the CPU.

    Only tensors, plain values, NumPy's numbers (an accuracy beside the weights) and
    argparse.Namespace (MAE and DINO keep their options in one) are unpickled: no code of the file
    runs. Raises OSError if it cannot be read, or ValueError for a file that is damaged or holds
    anything else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    is_safetensors = str(path).endswith(".safetensors")
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            checkpoint = (read_safetensors(path) if is_safetensors else
                          torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:                # zip, pickle, EOF: all mean the same
        reason = looks_like(path, str(error))
        if is_safetensors:
            reason = f"{str(error)[:200]}: get it again, or choose another file"
        raise ValueError(f"{path} is damaged or not a checkpoint of tensors and plain values: "
                         f"{reason}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is no checkpoint, it holds a {type(checkpoint).__name__}: "
                         "choose another file")
    parts = [checkpoint, *(part for part in checkpoint.values() if isinstance(part, dict))]
    for x in (x for part in parts for x in part.values() if torch.is_tensor(x)):
        if x.layout != torch.strided or x.device.type != "cpu":
            raise ValueError(f"{path} is damaged: a tensor of shape {tuple(x.shape)} lacks its "
                             "numbers, get the file again")
    return checkpoint


def looks_like(path, error):
    """What a file that torch.load refuses seems to be, by its first bytes, and the remedy."""
    with open(path, "rb") as f:
        start = f.read(512)
    if start.startswith(b"version https://git-lfs"):
        return "it is the pointer to a file of Git LFS: run git lfs pull"
    if start.lstrip()[:1] == b"<":
        return "it is a web page: download the file itself"
    if found := re.search(r"Unsupported (?:global|class)\S* (?:GLOBAL )?(\S+)", error):
        return (f"it holds Python's {found[1][:80]}: save its state dict alone, by torch.save "
                "where it was made")
    kind = ("empty" if not start else "a zip file without the whole of a checkpoint"
            if start.startswith(b"PK") else "a file of another kind" if b"\0" in start
            or start.startswith(b"\x80") else "a text")
    return f"it is {kind}: get it again, or choose another file"


def is_like(value, example):
    """Whether a value has the type of the example, and a tuple its length. Numbers must be finite
    and below 2**63, texts short."""
    if isinstance(example, tuple):
        return (isinstance(value, tuple) and len(value) == len(example)
                and all(map(is_like, value, example)))
    if isinstance(example, dict):
        return isinstance(value, dict)
    if type(value) is not type(example) and (type(value), type(example)) != (int, float):
        return False
    return len(value) < 4096 if isinstance(value, str) else abs(value) < 2 ** 63


def check_stored(path, stored, examples):
    """Raise ValueError unless what a file says of itself has the types of the examples.

    stored, examples: dicts. Names that only one of them has do not count. A value is not printed
    before it is known to be short: nested lists can be without end.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: its recipe is no dict but of type "
                         f"{type(stored).__name__}, choose another checkpoint")
    for name in examples.keys() & stored.keys():
        value = stored[name]
        if not is_like(value, examples[name]):
            is_short = isinstance(value, (int, float))
            found = value if is_short else f"of type {type(value).__name__}"
            raise ValueError(f"{path} is damaged: its {name} is {found}, not like "
                             f"{examples[name]!r}, choose another checkpoint")


def check_weights(path, state, model):
    """Raise ValueError unless a file's state dict has the names and shapes of the model's."""
    own = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {name: tuple(getattr(x, "shape", ())) for name, x in state.items()}
    if wrong := sorted(name for name in own if own[name] != found.get(name)) or [
            name for name in found if name not in own]:
        name = wrong[0]
        raise ValueError(f"{path} has other weights than its recipe says: choose another "
                         f"checkpoint. Tensors that do not fit: {len(wrong)}, such as "
                         f"{str(name)[:80]}, {found.get(name, 'missing')} for "
                         f"{own.get(name, 'none')}")


def check_resume(path, checkpoint, recipe, fingerprint, run_fields):
    """A run goes on only with the same recipe (but for `run_fields`) and the same data.

    A field that the file lacks is newer than the file and had its default then.
    """
    needed = {"model": {}, "optimizer": {}, "scaler": {}, "step": 0, "skipped": 0, "recipe": {},
              "data": ""}
    if missing := [key for key in needed if key not in checkpoint]:
        raise ValueError(f"{path} is no training checkpoint, it lacks {', '.join(missing)}: choose "
                         "another --out")
    new = dataclasses.asdict(recipe)
    check_stored(path, checkpoint, needed)
    defaults = dataclasses.asdict(type(recipe)())
    check_stored(path, checkpoint["recipe"], defaults)
    old = {**defaults, **checkpoint["recipe"]}
    differs = [f"{key}={value} (was {old[key]})" for key, value in new.items()
               if key not in run_fields and value != old[key]]
    if differs:
        raise ValueError(f"--resume: {path} was made by another recipe, different here: "
                         f"{', '.join(differs)}. Leave these flags out, or choose another --out")
    if checkpoint["data"] != fingerprint:
        raise ValueError(f"--resume: the files in {recipe.data} are not those that {path} was "
                         "trained on: restore the old files, or choose another --out")


def load_optimizer(path, checkpoint, optimizer, scaler):
    """Load the optimizer's state and the loss scale of a run. Raises ValueError if they do not fit.
    """
    groups = optimizer.state_dict()["param_groups"]           # the recipe's own
    try:
        optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"],
                                   "param_groups": groups})
        if checkpoint["scaler"]:                              # empty but for fp16
            scaler.load_state_dict(checkpoint["scaler"])
        fits = len(optimizer.state) in (0, sum(len(group["params"]) for group in groups)) and all(
            x.shape in (p.shape, ()) for p, state in optimizer.state.items()
            for x in state.values())
    except (AttributeError, KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"--resume: the optimizer in {path} does not fit the model: train again "
                         "with another --out")


def find_checkpoint(recipe):
    """The content of OUT/last.pt if the run is to be resumed and there is one, else None.

    Raises ValueError if a new run would write over an old one.
    """
    checkpoint_path = os.path.join(recipe.out, "last.pt")
    for path in (checkpoint_path, os.path.join(recipe.out, "log.jsonl")):
        if os.path.exists(path) and not recipe.resume:
            raise ValueError(f"{path} exists: go on with --resume, or choose another --out. "
                             "Nothing is written over it")
    return read_checkpoint(checkpoint_path) if os.path.exists(checkpoint_path) else None


# ------------------------------------------------------------------------------------- safetensors
# 8 bytes, the length of the header (little-endian); the header, JSON {name: {"dtype", "shape",
# "data_offsets": [begin, end]}}; the numbers of all tensors without gaps (little-endian).
# Source: README.md of github.com/huggingface/safetensors.

def as_bytes(tensor):
    """The memory of a tensor as a NumPy array, of a copy if the tensor is not contiguous."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def read_safetensors(path):
    """{name: tensor} of a file. Whatever it raises, the file is damaged or unsupported."""
    with open(path, "rb") as f:
        length, size = int.from_bytes(f.read(8), "little"), os.path.getsize(path)
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header, tensors, end = json.loads(f.read(length)), {}, 0
        header.pop("__metadata__", None)
        for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
            entry = header[name]
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            if dtype not in DTYPES:
                raise ValueError(f"{name} has the unsupported dtype {dtype}")
            begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
            if offsets != [begin, end] or not begin <= end <= size - 8 - length:
                raise ValueError(f"{name}, {dtype} of shape {shape}, cannot be at {offsets} of "
                                 f"{size - 8 - length} bytes")
            tensors[name] = torch.empty(shape, dtype=DTYPES[dtype])
            f.readinto(as_bytes(tensors[name]))
        if f.read(1):
            raise ValueError(f"more than the {end} bytes of its tensors")
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor}, tensors of any layout on any device."""
    codes, end = {dtype: code for code, dtype in DTYPES.items()}, 0
    header = {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            f.write(as_bytes(tensor.detach().cpu()))
