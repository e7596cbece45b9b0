"""Our models against figures of the release, through checkpoints in its layout."""
import json

from engine import lr_at, param_groups

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, golden_input, golden_mask
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoints import read_checkpoint
from convert import foreign_recipe, load_weights, recognize
from models import MODELS, build_maskfeat


def released_maskfeat(path):
    model = build_maskfeat(foreign_recipe(recognize(read_checkpoint(path))[1]))
    load_weights(model, path, verbose=False)
    return model


def watch_blocks(encoder):
    """Outputs of every block, (B, 1 + N, D), filled by the next forward pass."""
    outputs = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda m, args, out: outputs.append(
            (out[0] if isinstance(out, tuple) else out).detach()))
    return outputs


def compare_blocks(outputs, z):
    assert [list(x.shape) for x in outputs] == z["block_shape"].tolist()
    stats = [[x.double().mean(), x.double().std(correction=0), x.abs().max()] for x in outputs]
    np.testing.assert_allclose(np.array(stats, dtype=float), z["block_stats"], rtol=1e-5, atol=1e-6)
    for token, field in enumerate(("block_first8_token0", "block_first8_token1")):
        first8 = torch.stack([x[0, token, :8] for x in outputs])
        np.testing.assert_allclose(first8, z[field], atol=2e-5)


def official(name):
    """Our parameter name under its official one, as far as the golden files name it."""
    if name.startswith("encoder.") or name == "mask_token":
        return name.removeprefix("encoder.")
    layer, kind = name.split(".")
    return {"norm": "pred_head.transforms.0.0.", "head": "pred_head.projections.0."}[layer] + kind


def compare_gradients(parameters, z):
    """parameters: {official name: parameter}."""
    norms = {name: p.grad.double().norm().item() for name, p in parameters.items()}
    for name, want, first in zip(z["grad_names"], z["grad_norms"], z["grad_first4"]):
        assert norms[name] == pytest.approx(want, rel=1e-4), name
        got = parameters[name].grad.flatten()[:4]
        np.testing.assert_allclose(got, first, rtol=1e-3, atol=1e-4 * want)
    total = sum(n ** 2 for n in norms.values()) ** 0.5
    assert total == pytest.approx(float(z["grad_total_norm"]), rel=1e-4)


def first_step(path, z, x, mask):
    """Loss and gradients against the figures in z. Returns the loss and the model."""
    assert mask.sum() == z["mask_sum"] and mask.any() and not mask.all()
    model = released_maskfeat(path)
    assert sum(p.numel() for p in model.parameters()) == z["param_count"]
    outputs = watch_blocks(model.encoder)
    loss, prediction = model(x, mask)
    compare_blocks(outputs, z)
    assert loss.item() == pytest.approx(float(z["loss"]), rel=1e-5)
    masked = mask.flatten(1)
    np.testing.assert_array_equal(prediction[masked].shape, z["pred_shape"])
    flat = prediction[masked].detach().flatten()
    np.testing.assert_allclose(flat[:64], z["pred_first64"], atol=1e-5)
    np.testing.assert_allclose(flat[-64:], z["pred_last64"], atol=1e-5)
    target = model.compute_target(x)[masked].flatten()
    np.testing.assert_allclose(target[:108], z["target_first108"], atol=1e-6)
    loss.backward()
    compare_gradients({official(n): p for n, p in model.named_parameters()}, z)
    assert all(p.grad is not None for p in model.parameters())
    return loss.item(), model


@pytest.mark.slow
def test_pretraining_of_mvit(golden, released):
    z, x = golden("mvitv2_s_pt.npz"), golden_input((2, 3, 16, 224, 224))
    _, model = first_step(released("mvitv2_s_pt"), z, x, golden_mask((2, 8, 14, 14)))
    coarse = golden_mask((2, 8, 7, 7))                          # as the release's loader
    with torch.no_grad():
        loss, prediction = model(x, coarse)
    assert loss.item() == pytest.approx(float(z["loss_coarse_mask"]), rel=1e-5)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(1)
    np.testing.assert_allclose(prediction[fine].flatten()[:64], z["coarse_pred_first64"], atol=1e-5)


@pytest.mark.slow
def test_pretraining_of_vit(golden, released):
    """One step, then five AdamW updates: losses, gradient norms and final weights."""
    x, mask = golden_input((2, 3, 224, 224)), golden_mask((2, 14, 14))
    loss, model = first_step(released("vit_b_pt"), golden("vit_b_pt.npz"), x, mask)
    z, losses, norms, groups = golden("traj_vit_b_pt.npz"), [loss], [], param_groups(model, 0.05)
    assert [len(g["params"]) for g in groups] == z["group_sizes"].tolist()
    assert [g["weight_decay"] for g in groups] == z["group_wd"].tolist()
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(5):
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02).item())
        optimizer.step()
        optimizer.zero_grad()
        loss, _ = model(x, mask)
        loss.backward()
        losses.append(loss.item())
    norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02).item())
    np.testing.assert_allclose(losses, z["losses"], rtol=1e-5)
    np.testing.assert_allclose(norms, z["grad_norms_preclip"], rtol=1e-4)
    parameters = {official(n): p.detach() for n, p in model.named_parameters()}
    for name, norm, first in zip(z["final_names"], z["final_norms"], z["final_first4"]):
        assert parameters[name].double().norm().item() == pytest.approx(norm, rel=1e-5)
        np.testing.assert_allclose(parameters[name].flatten()[:4], first, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name, shape, classes", [("vit_b_ft", (2, 3, 224, 224), 1000),
                                                  ("mvitv2_s_ft", (2, 3, 16, 224, 224), 400)])
def test_finetuned(name, shape, classes, golden, released):
    z = golden(f"{name}.npz")
    model = MODELS[name[:-3]](num_classes=classes).eval()
    report = load_weights(model, released(name), verbose=False)
    assert not report["fresh"] and not report["resized"] and not report["left out"]
    assert sum(p.numel() for p in model.parameters()) == z["param_count"]
    outputs = watch_blocks(model)
    # The fused kernel's approximate exp on a CPU moves one gradient by 1.1e-4.
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(golden_input(shape))
    compare_blocks(outputs, z)
    np.testing.assert_allclose(logits.detach(), z["logits"], atol=1e-5)
    one_hot = F.one_hot(torch.tensor([3, 4]), classes) * 0.9 + 0.1 / classes
    loss = -((0.7 * one_hot + 0.3 * one_hot.flip(0)) * logits.log_softmax(-1)).sum(-1).mean()
    assert loss.item() == pytest.approx(float(z["loss"]), rel=1e-5)
    loss.backward()
    parameters = dict(model.named_parameters())
    if name == "vit_b_ft":
        parameters = {n.replace("head.", "head.projection."): p for n, p in parameters.items()}
    compare_gradients(parameters, z)


@pytest.mark.parametrize("name, count", [("mvitv2_s", 36_253_356), ("mvitv2_l", 217_247_580),
                                         ("vit_b", 85_882_476), ("vit_l", 303_413_356)])
def test_parameter_counts_pretraining(name, count):
    recipe = dict(model=name, target="hog", image_size=(224, 224), num_frames=16, output_stride=16,
                  patch_size=16, expand="mlp", drop_path=0.0, checkpointing=False, bins=9, cell=8,
                  norm="l2", color="rgb", gradient="sobel")
    with torch.device("meta"):
        model = build_maskfeat(recipe)
    assert sum(p.numel() for p in model.parameters()) == count


def test_lr_schedules():
    """All eight MaskFeat configs of the release, at fractional epochs; rows: warm-up start, end."""
    ends = {"k400_MVITv2_L_16x4_FT": (1e-8, 1e-5), "in1k_VIT_B_MaskFeat_FT": (1e-8, 1e-6),
            "in1k_VIT_L_MaskFeat_FT": (1e-8, 1e-6)}
    for name, row in json.loads((GOLDEN / "lr_schedule.json").read_text()).items():
        start, end = ends.get(name, (1e-6, 1e-6))
        for epoch, want in row["lr"].items():
            got = lr_at(float(epoch), row["base_lr"], row["max_epoch"], row["warmup"], start, end)
            assert got == pytest.approx(want, rel=1e-9), (name, epoch)
