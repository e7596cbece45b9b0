"""ViT: blocks against the equations, positions, gradients."""
import pytest
import torch

from vit import MODELS, ViT


def tiny(**kw):
    return ViT(32, 2, 2, **{"num_classes": 5, "image_size": 32, "patch_size": 8, **kw})


def plain_block(block, x):
    """A transformer block as the equations stand."""
    y = block.norm1(x)
    heads = []
    for h in range(block.attn.num_heads):
        C = x.shape[-1] // block.attn.num_heads
        q, k, v = (y @ w[h * C:(h + 1) * C].T + b[h * C:(h + 1) * C]
                   for w, b in zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)))
        heads.append((q @ k.transpose(1, 2) / C ** 0.5).softmax(-1) @ v)
    x = x + block.attn.proj(torch.cat(heads, -1))
    y = block.mlp.fc1(block.norm2(x))
    return x + block.mlp.fc2(0.5 * y * (1 + torch.erf(y / 2 ** 0.5)))


def test_block_equals_plain_form():
    torch.manual_seed(0)
    block, x = tiny().blocks[0], torch.randn(2, 17, 32)
    torch.testing.assert_close(block(x), plain_block(block, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 32), (64, 40), (8, 24)])
def test_sizes_and_gradients(shape):
    model = tiny()
    x = torch.randn(2, 3, *shape)
    tokens, grid = model.encode(*model.embed(x))
    assert grid == (shape[0] // 8, shape[1] // 8) and tokens.shape == (2, 1 + grid[0] * grid[1], 32)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_resized_positions_keep_the_picture():
    """Positions that vary linearly over the grid still do after resizing, away from the border."""
    model = tiny(image_size=64)
    ramp = torch.arange(8.0).repeat(8, 1)                                     # grows along x
    model.pos_embed.data[:, 1:] = ramp.flatten()[None, :, None]
    wide = model.positions((16, 16))[0, 1:, 0].view(16, 16)
    want = ((torch.arange(16) + 0.5) / 2 - 0.5).expand(16, -1)
    torch.testing.assert_close(wide[:, 4:-4], want[:, 4:-4], atol=0.05, rtol=0)
    assert (wide.diff(dim=1) > 0).all()
    assert torch.equal(model.positions((16, 16))[:, :1], model.pos_embed[:, :1])
    assert model.positions((8, 8)) is model.pos_embed


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    plain, saving = tiny(), tiny(checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for model in (plain, saving):
        model.train()(x).square().sum().backward()
    for p, q in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_errors():
    with pytest.raises(ValueError, match="32x36.*W=36, use 32 or 40"):
        tiny(image_size=(32, 36))
    with pytest.raises(ValueError, match="H=36, use 32 or 40"):
        tiny()(torch.randn(1, 3, 36, 32))


def test_no_head():
    model = MODELS["vit_tiny"](num_classes=0)
    assert not any(n.startswith(("head", "norm.")) for n, _ in model.named_parameters())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 128)
