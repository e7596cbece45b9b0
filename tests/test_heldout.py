"""heldout.py: the rules against plain loops, and losses that do not depend on the processes."""
import contextlib
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import engine

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import data
import heldout
import layouts
from masking import block_mask, cube_mask, draw_mask
from models import build_maskfeat

RECIPE = dict(image_size=(32, 32), num_frames=4, output_stride=8, patch_size=8, expand="mlp",
              drop_path=0.3, checkpointing=False, target="hog", bins=9, cell=8, norm="l2",
              color="rgb", gradient="sobel")


def plain_rules(target, mask, grid):
    """{rule: mean loss over masked tokens}, token by token. target: (B, N, D). mask: (B, N)."""
    places = [(t, y, x) for t in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]
    mean, count = target.flatten(0, 1).mean(0), 0
    sums = dict.fromkeys(("mean", "own mean", "copy"), 0)
    for tokens, hidden in zip(target, mask):
        seen = [i for i in range(len(places)) if not hidden[i]]
        own = torch.stack([tokens[i] for i in seen]).mean(0)
        for i in np.flatnonzero(hidden.numpy()):
            def far(j, i=i):
                t, y, x = (abs(a - b) for a, b in zip(places[i], places[j]))
                return math.hypot(y, x), t
            copy = tokens[min(seen, key=far)]
            for rule, guess in (("mean", mean), ("own mean", own), ("copy", copy)):
                sums[rule] += float((guess - tokens[i]).square().mean())
            count += 1
    return {rule: value / count for rule, value in sums.items()}


def held_out(model, grid, mask, samples, rank=0, world=1):
    """A HeldOut of random inputs, three at a time."""
    recipe = {"mean": (0.5,) * 3, "std": (0.2,) * 3}

    class Random(torch.utils.data.Dataset):
        def __len__(self):
            return samples

        def __getitem__(self, key):
            _, index = key
            rng = np.random.default_rng(index)
            shape = (3, 4, 32, 32) if len(grid) == 3 else (3, 32, 32)
            x = (rng.random(shape) * np.linspace(20, 255, 32)).astype(np.uint8)
            return {"x": torch.from_numpy(x), "unreadable": [],
                    "mask": torch.from_numpy(mask(data.sample_rng(0, 0, index)))}

    def to_device(batch):
        return data.normalize(batch["x"], **recipe), batch["mask"], None
    return heldout.HeldOut(model, Random(), grid, to_device, contextlib.nullcontext, 3, 0, rank,
                           world)


@pytest.mark.parametrize("name, kind, grid", [
    ("mvit_nano", "cube", (2, 4, 4)), ("mvit_nano", "tube", (2, 4, 4)),
    ("mvit_nano", "frame", (2, 4, 4)), ("vit_tiny", "block", (4, 4))])
def test_rules_equal_plain_loops(name, kind, grid):
    model = build_maskfeat({**RECIPE, "model": name})
    out = held_out(model, grid, lambda rng: draw_mask(kind, grid, 0.4, rng), samples=5)
    x, mask = (torch.cat([out.to_device(batch)[i] for batch in out.batches]) for i in (0, 1))
    want = plain_rules(model.compute_target(x), mask.flatten(1), (1, *grid)[-3:])
    assert out.levels() == pytest.approx(want, rel=1e-4)
    assert len({round(level, 6) for level in want.values()}) == 3


def test_losses_are_the_same_bits_under_two_ranks(monkeypatch):
    """And they leave the training as it was: its random numbers, its mode."""
    torch.manual_seed(0)
    model, grid = build_maskfeat({**RECIPE, "model": "mvit_nano"}).train(), (2, 4, 4)
    mask = lambda rng: cube_mask(grid, 0.4, rng)
    one = held_out(model, grid, mask, samples=8)
    state = torch.get_rng_state()
    want = one.loss(), one.levels()
    assert torch.equal(state, torch.get_rng_state()) and model.training
    x, hidden, _ = zip(*(one.to_device(batch) for batch in one.batches))
    with torch.no_grad():
        plain, _ = model.eval()(torch.cat(x), torch.cat(hidden))
    assert want[0] == pytest.approx(plain.item(), rel=1e-5)
    barrier, parts = threading.Barrier(2, timeout=60), {}

    def gather(items):                                        # as gloo would, between two threads
        parts[threading.current_thread()] = items
        barrier.wait()
        both = sum(parts.values(), [])
        barrier.wait()
        return both
    monkeypatch.setattr(engine, "gather_list", gather)
    ranks = [held_out(model, grid, mask, 8, rank, world=2) for rank in (0, 1)]
    assert [len(rank.batches) for rank in ranks] == [2, 1]
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda rank: (rank.loss(), rank.levels()), ranks):
            assert found == want


def test_files_that_cannot_be_read_are_told(tmp_path):
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i, 99, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    samples = layouts.find_samples(tmp_path)
    dataset = data.PretrainDataset(samples, (32, 32), mask=lambda rng: block_mask((4, 4), 0.4, rng))
    out = heldout.HeldOut(None, dataset, (4, 4), None, None, 3, 0)
    assert [path for path, _ in out.unreadable] == [samples.paths[2]]
    assert [len(batch["x"]) for batch in out.batches] == [3, 1]


def test_classes_have_their_frequencies():
    """The best constant prediction of classes costs their entropy."""
    class Target(nn.Module):
        input_kind, dim = "view", 4

        def forward(self, x):
            return torch.tensor([[0, 0, 1, 3]] * 2)

        @staticmethod
        def loss(prediction, target, mask):
            return nn.functional.cross_entropy(prediction[mask], target[mask])

    class Model(nn.Module):
        target = Target()

        def compute_target(self, x, target_input):
            return self.target(x)
    batches = [{"mask": torch.ones(2, 2, 2, dtype=torch.bool)}] * 3
    out = object.__new__(heldout.HeldOut)
    out.model, out.batches, out.numbers, out.grid = Model(), batches, range(3), (1, 2, 2)
    out.to_device, out.autocast = lambda batch: (batch["mask"], batch["mask"], None), \
        contextlib.nullcontext
    assert out.levels() == {"mean": pytest.approx(1.5 * math.log(2))}
