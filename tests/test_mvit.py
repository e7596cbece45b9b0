"""MViTv2: attention, pooling and widening against plain forms, sizes, gradients."""
import pytest
import torch
import torch.nn.functional as F
from conftest import slow
from plain import plain_attention, plain_pool

import mvit
from mvit import MODELS, MViT, attention, relative_table


def slow_relative(table, queries, keys):
    """Index rule of the release, one pair at a time."""
    rows = []
    for i in range(queries):
        for j in range(keys):
            q_ratio, k_ratio = max(keys / queries, 1), max(queries / keys, 1)
            rows.append(table[int(i * q_ratio - j * k_ratio + (keys - 1) * k_ratio)])
    return torch.stack(rows).view(queries, keys, -1)


@pytest.mark.parametrize("queries, keys", [(7, 7), (14, 7), (7, 14), (56, 7), (5, 2), (3, 1)])
def test_relative_table(queries, keys):
    table = torch.randn(2 * max(queries, keys) - 1, 4)
    ours, slow = relative_table(table, queries, keys), slow_relative(table, queries, keys)
    assert torch.equal(ours, slow)
    short = torch.randn(9, 4)                                   # resized to the length needed
    long = F.interpolate(short.T[None], size=len(table), mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(relative_table(short, queries, keys),
                               slow_relative(long, queries, keys))


@pytest.mark.parametrize("q_thw, k_thw, heads", [
    ((4, 6, 6), (4, 3, 3), 2), ((2, 4, 6), (2, 4, 6), 1), ((4, 3, 5), (4, 6, 10), 3),
    ((1, 7, 7), (1, 1, 1), 1)])
def test_attention_equals_plain_form(q_thw, k_thw, heads):
    torch.manual_seed(0)
    count = lambda thw: 1 + thw[0] * thw[1] * thw[2]
    double = {"dtype": torch.float64}
    inputs = [torch.randn(2, count(thw), heads, 12, **double) for thw in (q_thw, k_thw, k_thw)]
    tables = [torch.randn(2 * max(n, m) - 1, 12, **double) for n, m in zip(q_thw, k_thw)]
    results = []
    for form in (attention, plain_attention):
        leaves = [x.clone().requires_grad_() for x in inputs + tables]
        out = form(*leaves[:3], q_thw, k_thw, *leaves[3:])
        out.sin().sum().backward()
        results.append([out.detach()] + [x.grad for x in leaves])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)     # tables are float32
    assert results[0][0].std() > 0.1


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_pooling_equals_plain_form(stride):
    torch.manual_seed(0)
    layer = mvit.MultiScaleAttention(24, 24, 3, (3, 7, 11), 1, stride)
    x = torch.randn(2, 1 + 2 * 4 * 6, 24)
    ours, thw = layer.pool(x, layer.pool_k, layer.norm_k, (2, 4, 6))
    plain, plain_thw = plain_pool(layer, x, layer.pool_k, layer.norm_k, (2, 4, 6))
    assert thw == plain_thw == (2, -(-4 // stride), -(-6 // stride))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_attention_builds_no_logits():
    """No tensor as large as queries x keys, forwards or backwards."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    thw, C = (8, 14, 14), 8
    q, k, v = (torch.randn(1, 1569, 1, C, requires_grad=True) for _ in range(3))
    tables = [torch.randn(2 * n - 1, C, requires_grad=True) for n in thw]
    with Watch():
        attention(q, k, v, thw, thw, *tables).sum().backward()
    assert 1569 * C < largest < 1569 * 1569 / 10


def tiny(**kw):
    return MViT(16, 1, (1, 1, 2, 1), **{"num_classes": 5, "num_frames": 4, "image_size": 64, **kw})


@pytest.mark.parametrize("options, shape", [
    ({}, (4, 64, 64)), slow({}, (8, 80, 112)), ({"expand": "attn"}, (4, 64, 64)),
    ({"image_size": (64, 96)}, (4, 64, 96)), ({"output_stride": 16}, (4, 64, 64)),
    ({"output_stride": 8}, (6, 56, 72))])
def test_sizes_and_gradients(options, shape):
    """Other sizes than the built one run, and every parameter is trained."""
    torch.manual_seed(0)
    model = tiny(**options)
    x = torch.randn(2, 3, *shape)
    tokens, grid = model.encode(*model.embed(x))
    stride = options.get("output_stride", 32)
    assert grid == (shape[0] // 2, -(-shape[1] // stride), -(-shape[2] // stride))
    assert tokens.shape == (2, 1 + grid[0] * grid[1] * grid[2], model.embed_dim)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    unused = [n for n, p in model.named_parameters() if not p.grad.any()]
    # A single key along an axis has the same distance term for all, which softmax ignores.
    assert all(".rel_pos_" in n or ".pool_" in n for n in unused), unused


@pytest.mark.slow
def test_312_resizes_tables_on_the_fly(monkeypatch):
    """At 312 the grid is 78, 39, 20, 10, but tables are made for 19 and 9 (release). The result
    equals the plain forms, and each row is trained but those of distances that do not occur."""
    torch.manual_seed(0)
    model = MViT(16, 1, (1, 1, 1, 2), num_classes=5, num_frames=4, image_size=312).double()
    assert [len(block.attn.rel_pos_h) for block in model.blocks] == [155, 77, 37, 37, 17]
    x = torch.randn(1, 3, 4, 312, 312, dtype=torch.float64)
    outputs, grids = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: grids.append(out[1]))
    for forms in ((mvit.attention, mvit.MultiScaleAttention.pool), (plain_attention, plain_pool)):
        monkeypatch.setattr(mvit, "attention", forms[0])
        monkeypatch.setattr(mvit.MultiScaleAttention, "pool", forms[1])
        model.zero_grad()
        logits = model(x)
        logits.square().sum().backward()
        outputs.append([logits.detach(), *(p.grad for p in model.parameters())])
    for ours, plain in zip(*outputs):
        torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-9)
    assert outputs[0][0].shape == (1, 5) and outputs[0][0].isfinite().all()
    assert grids == 2 * [(2, side, side) for side in (78, 39, 20, 10, 10)]

    # The largest distance of block 0 is 77 + 9 * 78 / 10 = 147.
    never = {f"blocks.{i}.attn.rel_pos_{axis}": rows for axis in "hw"
             for i, rows in ((0, list(range(148, 155))), (1, [76]))}
    for (name, _), grad in zip(model.named_parameters(), outputs[0][1:], strict=True):
        rows = grad if ".rel_pos_" in name else grad.flatten()[None]
        assert rows.eq(0).all(dim=1).nonzero().flatten().tolist() == never.get(name, []), name


@pytest.mark.parametrize("expand", ["mlp", "attn"])
def test_widening(expand):
    """Width doubles in the block before a transition, with the shortcut from norm2(x), or at the
    transition, with the shortcut from norm1(x), then max-pooled (release)."""
    torch.manual_seed(0)
    block = tiny(expand=expand).double().blocks[0 if expand == "mlp" else 1]
    widths = [16, 16, 32] if expand == "mlp" else [16, 32, 32]
    assert [block.dim, block.dim_att, block.dim_out] == widths
    thw = (2, 16, 16)
    x = torch.randn(2, 1 + 2 * 16 * 16, 16, dtype=torch.float64)
    ours, pooled = block(x, thw)

    attended, _ = block.attn(block.norm1(x), thw)
    if expand == "mlp":
        y = x + attended
        want = block.proj(block.norm2(y)) + block.mlp(block.norm2(y))
        assert pooled == (2, 16, 16)
    else:
        skip = block.proj(block.norm1(x))
        patches = skip[:, 1:].transpose(1, 2).unflatten(2, thw)
        patches = F.max_pool3d(patches, (1, 3, 3), (1, 2, 2), (0, 1, 1)).flatten(2)
        y = torch.cat([skip[:, :1], patches.transpose(1, 2)], dim=1) + attended
        want = y + block.mlp(block.norm2(y))
        assert pooled == (2, 8, 8)
    torch.testing.assert_close(ours, want)


def test_single_clip_equals_batch():
    model = tiny().eval()
    x = torch.randn(3, 3, 4, 64, 64)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    plain, saving = tiny(), tiny(checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 64, 64)
    for model in (plain, saving):
        model.train()(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_drop_path():
    """Whole samples are dropped, only in training, and the mean stays."""
    torch.manual_seed(0)
    drop = mvit.DropPath(0.3)
    x = torch.ones(4000, 2, 3)
    y = drop.train()(x)
    assert sorted(y[:, 0, 0].unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert (y == y[:, :1, :1]).all()
    assert y.mean().item() == pytest.approx(1, abs=0.05)        # standard error 0.01
    assert torch.equal(drop.eval()(x), x)
    rates = [round(block.drop_path.p, 3) for block in tiny(drop_path=0.2).blocks]
    assert rates == [0, 0.05, 0.1, 0.15, 0.2]


def test_autocast_stays_close():
    torch.manual_seed(0)
    model = tiny().eval()
    x = torch.randn(2, 3, 4, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x).float()
    torch.testing.assert_close(half, model(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("options, words", [
    ({"expand": "both"}, "expand='both'"), ({"output_stride": 12}, "output_stride=12"),
    ({"num_frames": 5}, "num_frames=5"), ({"image_size": 16}, "16x16")])
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        tiny(**options)


def test_presets():
    with torch.device("meta"):
        MODELS["mvit_tiny"]()
        for model, count in ((MODELS["mvitv2_b"](), 53_130_640),
                             (MODELS["mvitv2_l"](image_size=312, num_frames=40), 217_747_696)):
            assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.slow
def test_position_gradients_repeat(two_threads):
    """Many pairs share a row of the table, whose gradient is summed in the same order each time."""
    torch.manual_seed(0)
    table, weights = torch.randn(111, 96, requires_grad=True), torch.randn(56, 28, 96)
    gradients = [torch.autograd.grad((relative_table(table, 56, 28) * weights).sum(), table)[0]
                 for _ in range(50)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
