import dataclasses
import json
import os
import signal

import pytest
import torch
import torch.nn as nn

import engine
from engine import Logger, StopSignal, lr_at, param_groups, parse_recipe, read_checkpoint, save_checkpoint, seed_all


def test_lr_shape():
    """Rises, meets the cosine at the end of warm-up, falls to the end value; scaling all three scales it."""
    lrs = [lr_at(e / 10, 1e-3, 30, 5, 1e-6, 1e-5) for e in range(301)]
    assert lrs[0] == 1e-6 and max(lrs) == lrs[50] == 1e-3 and lrs[300] == pytest.approx(1e-5)
    assert all(a < b for a, b in zip(lrs[:50], lrs[1:51])) and all(a > b for a, b in zip(lrs[50:300], lrs[51:]))
    assert lr_at(17.5, 1e-3, 30, 5, 0, 0) == pytest.approx(5e-4)
    assert lr_at(0, 1e-3, 1, 0, 0, 0) == 1e-3


def test_param_groups():
    """Biases and 1-D weights are not decayed; tables, tokens and matrices are; each parameter is in one group."""
    from mvit import mvit_tiny
    model = mvit_tiny(num_classes=3)
    decayed, plain = param_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} | {id(p) for p in plain["params"]} == {id(p) for p in model.parameters()}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    ids = {id(p) for p in decayed["params"]}
    assert id(model.cls_token) in ids and id(model.blocks[0].attn.rel_pos_h) in ids
    assert id(model.blocks[0].norm1.weight) not in ids and id(model.head.projection.bias) not in ids
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert not any(g["params"] for g in param_groups(frozen, 0.1))


def test_seed_all_repeats():
    def draws(*key):
        seed_all(*key)
        return torch.rand(3).tolist()
    assert draws(0, 5, 1) == draws(0, 5, 1) != draws(0, 6, 1) != draws(0, 6, 0)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = str(tmp_path / "last.pt")
    save_checkpoint(path, {"step": 1, "shape": (1, 2)})
    assert read_checkpoint(path) == {"step": 1, "shape": (1, 2)}

    def full_disk(obj, f):
        f.write(b"half")
        raise OSError("no space left")
    monkeypatch.setattr(engine.torch, "save", full_disk)
    with pytest.raises(OSError):
        save_checkpoint(path, {"step": 2})
    assert read_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["last.pt"]


def test_logger_drops_what_will_be_logged_again(tmp_path):
    path = str(tmp_path / "log.jsonl")
    log = Logger(path)
    for step in (10, 20, 30):
        log(step=step, loss=1.0 / step)
    with open(path, "a") as f:
        f.write('{"step": 40, "lo')                                           # killed while writing
    Logger(path, step=20)(step=30, loss=0.5)
    lines = [json.loads(line) for line in open(path)]
    assert [(d["step"], d["loss"]) for d in lines] == [(10, 0.1), (20, 0.05), (30, 0.5)]
    Logger(path, rank=1)(step=99)
    assert len(open(path).readlines()) == 3


def test_stop_signal():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        stop = StopSignal()
        assert stop.agreed() == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() == "SIGTERM"
    finally:
        signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGINT, before[1])


@dataclasses.dataclass(frozen=True)
class Recipe:
    model: str = dataclasses.field(default="small", metadata={"choices": ("small", "large")})
    lr: float = 1e-3
    size: tuple = (8, 8)
    flag: bool = False


RECIPES = {"first": Recipe(), "second": Recipe(model="large", lr=1e-4)}


def test_parse_recipe():
    assert parse_recipe(RECIPES, "", []) == ("first", Recipe(), set())
    name, recipe, given = parse_recipe(RECIPES, "", ["--model", "large", "--size", "4", "--flag"])
    assert (name, recipe, given) == ("second", Recipe("large", 1e-4, (4, 4), True), {"model", "size", "flag"})
    name, recipe, given = parse_recipe(RECIPES, "", ["--recipe", "second", "--lr", "2", "--size", "4", "6", "--no-flag"])
    assert (name, recipe) == ("second", Recipe("large", 2.0, (4, 6), False))
    assert given == {"recipe", "lr", "size", "flag"}
    with pytest.raises(SystemExit):                                           # no row is for that model
        parse_recipe({"first": Recipe()}, "", ["--model", "large"])


@pytest.mark.parametrize("argv", [["--nonsense"], ["--model", "huge"], ["--lr", "fast"], ["--size", "1", "2", "3"],
                                  ["--recipe", "third"], ["--lar", "3"]])
def test_wrong_flags_fail(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_recipe(RECIPES, "", argv)
    assert exit.value.code == 2 and argv[0].lstrip("-") in capsys.readouterr().err
