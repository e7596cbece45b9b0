"""Checkpoints that the first published version wrote: they load, and their runs go on from them.

Both were stopped by SIGTERM after step 4 of 9, on the clips of conftest.py, with the tiny preset below.
"""
import shutil
import subprocess
import sys

import pytest
import torch

import models
import mvit
import runs
from conftest import GOLDEN, ROOT
from convert import load_weights
from engine import read_checkpoint

PRESET = ("import engine, mvit\n"
          "mvit.MODELS['mvit_tiny'] = lambda **kw: mvit.MViT(8, 1, (1, 1), **{'output_stride': 8, 'kv_stride': 4, **kw})\n")
SHARED = ["--image-size", 32, "--num-frames", 4, "--sampling-rate", 2, "--batch-size", 4, "--epochs", 3,
          "--warmup-epochs", 1, "--log-every", 1, "--workers", 0, "--drop-path", 0.2]
FLAGS = {"pretrain": ["--output-stride", 8],
         "finetune": ["--dropout", 0.1, "--rand-augment", "rand-m7-mstd0.5-inc1", "--erase", 0.5, "--repeats", 2,
                      "--layer-decay", 0.75, "--mixup", 0.8, "--cutmix", 1, "--smoothing", 0.1, "--val-epochs", 2,
                      "--clips", 2, "--no-baseline", "--init", "out/pretrain/last.pt"]}
