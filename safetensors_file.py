"""Files in the safetensors format: tensors by name, and nothing that could be run.

Layout: 8 bytes, the length of the header (little-endian); the header, JSON {name: {"dtype",
"shape", "data_offsets": [begin, end]}}; the numbers of all tensors without gaps (little-endian).
Source: README.md of github.com/huggingface/safetensors. Needs torch and numpy only.
"""
import json
import math
import os

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000  # bytes, as in the original


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
