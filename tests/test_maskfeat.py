"""MaskFeat: what is masked is not seen, only masked tokens count, every parameter is trained."""
import pytest
import torch

from maskfeat import MaskFeat, resize_mask
from mvit import MViT
from targets import TARGETS, HOGTarget, PixelTarget, masked_mse
from vit import ViT


def video_model(**target):
    torch.manual_seed(0)
    encoder = MViT(16, 1, (1, 1, 2, 1), num_classes=0, num_frames=4, image_size=64,
                   output_stride=16)
    model = MaskFeat(encoder, HOGTarget(16, **target))
    return model, torch.randn(2, 3, 4, 64, 64), random_mask(2, 2, 4, 4)


def image_model(target=HOGTarget):
    torch.manual_seed(0)
    model = MaskFeat(ViT(32, 2, 2, num_classes=0, image_size=64), target(16))
    return model, torch.randn(2, 3, 64, 64), random_mask(2, 4, 4)


def random_mask(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    assert mask.any() and not mask.all()
    return mask


def pixels(mask, patch=16):
    """Token mask (B, h, w) as a pixel mask (B, 1, H, W)."""
    return mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]


@pytest.mark.parametrize("make", [video_model, image_model])
def test_every_parameter_gets_a_gradient(make):
    model, x, mask = make()
    loss, prediction = model(x, mask)
    assert prediction.shape == (2, mask[0].numel(), 108) and loss.shape == ()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for p in (model.mask_token, model.head.weight, model.encoder.cls_token):
        assert p.grad.any()


def test_hidden_pixels_do_not_reach_the_prediction():
    """With ViT, nothing of a masked patch is seen; what is visible is."""
    model, x, mask = image_model()
    other = torch.where(pixels(mask), torch.randn_like(x), x)
    assert not torch.equal(other, x)
    assert torch.equal(model(x, mask)[1], model(other, mask)[1])
    seen = torch.where(pixels(~mask), torch.randn_like(x), x)
    assert not torch.allclose(model(x, mask)[1], model(seen, mask)[1])


@pytest.mark.parametrize("make", [video_model, image_model])
def test_loss_counts_masked_tokens_only(make):
    """Prediction and target of a visible token do not move the loss. Those of a masked one do."""
    model, x, mask = make()
    flat = mask.flatten(1)
    _, prediction = model(x, mask)
    target = model.compute_target(x)
    loss = model.target.loss(prediction, target, flat)
    noise = torch.randn_like(target)
    torch.testing.assert_close(loss, (prediction - target)[flat].square().mean())
    for where, same in ((~flat, True), (flat, False)):
        moved = where[..., None] * noise
        assert torch.equal(model.target.loss(prediction + moved, target, flat), loss) == same
        assert torch.equal(model.target.loss(prediction, target + moved, flat), loss) == same


@pytest.mark.parametrize("cells", [3, 2])
def test_odd_number_of_frames(cells):
    """5 frames are 3 tokens in time, as the stem pads. The mask has that grid or a coarser one."""
    model, _, _ = video_model()
    x, mask = torch.randn(2, 3, 5, 64, 64), random_mask(2, cells, 4, 4)
    flat = resize_mask(mask, (3, 4, 4))
    loss, prediction = model(x, mask)
    want = (prediction - model.compute_target(x))[flat].square().mean()
    torch.testing.assert_close(loss, want)


def test_target_sees_the_middle_frame_of_each_cube():
    model, x, _ = video_model()
    target = model.compute_target(x)                            # (2, 2*4*4, 108)
    frames = model.target(x[:, :, [0, 2]].transpose(1, 2))
    assert torch.equal(target, frames)
    other = x.clone()
    other[:, :, [1, 3]] = 0
    assert torch.equal(model.compute_target(other), target)


def test_coarse_mask_is_the_enlarged_one():
    model, x, _ = video_model()
    coarse = random_mask(2, 2, 2, 2)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for ours, want in zip(model(x, coarse), model(x, fine)):
        assert torch.equal(ours, want)
    assert torch.equal(resize_mask(coarse, (2, 4, 4)), fine.flatten(1))


def test_mask_token_replaces_stem_tokens():
    model, x, mask = video_model()
    seen = {}
    encode = model.encoder.encode

    def watched(tokens, grid):
        seen["tokens"] = tokens
        return encode(tokens, grid)
    model.encoder.encode = watched
    model(x, mask)
    hidden = mask.repeat_interleave(4, 2).repeat_interleave(4, 3).flatten(1)      # 16x16 tokens
    assert (seen["tokens"][hidden] == model.mask_token[0]).all()
    stem, _ = model.encoder.embed(x)
    assert torch.equal(seen["tokens"][~hidden], stem[~hidden])


def test_autocast():
    model, x, mask = video_model()
    with torch.autocast("cpu", torch.bfloat16):
        loss, prediction = model(x, mask)
    assert loss.dtype == prediction.dtype == torch.float32
    assert loss.item() == pytest.approx(model(x, mask)[0].item(), rel=0.02)


def test_errors():
    model, x, mask = video_model()
    for bad in (mask[:, 0], torch.ones(2, 2, 64, 64), torch.ones(2, 2, 3, 4)):
        with pytest.raises(ValueError, match="token grid"):   # not 3-D, too fine, 16 / 3 rows
            model(x, bad.bool())
    with pytest.raises(ValueError, match="8x9"):
        model(torch.randn(1, 3, 4, 64, 72), random_mask(1, 2, 4, 2))


# ----------------------------------------------------------------------------------------- targets

@pytest.mark.parametrize("options, dim", [
    ({}, 108), ({"bins": 6}, 72), ({"bins": 12}, 144), ({"cell": 16}, 27), ({"cell": 4}, 432),
    ({"color": "gray"}, 36), ({"color": "opponent"}, 108)])
def test_hog_dimension(options, dim):
    """Table 8's variants: 3 colors x 9 bins x 2x2 cells = 108 by default."""
    target = TARGETS["hog"](16, **options)
    assert target.dim == dim
    assert target(torch.randn(2, 3, 3, 32, 48)).shape == (2, 3 * 2 * 3, dim)


def test_pixel_target():
    frames = torch.randn(2, 3, 3, 32, 48)
    target = PixelTarget(16)(frames)
    token = 1 * 6 + 1 * 3 + 2                                   # frame 1, row 1, column 2
    assert torch.equal(target[1, token], frames[1, 1, :, 16:32, 32:48].flatten())
    scaled = PixelTarget(16, norm="patch")(frames)
    torch.testing.assert_close(scaled.mean(-1), torch.zeros(2, 18), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled.var(-1), torch.ones(2, 18), atol=1e-4, rtol=0)
    assert torch.corrcoef(torch.stack([scaled[0, 0], target[0, 0]]))[0, 1] > 0.9999


def test_masked_mse_without_a_mask_is_zero():
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert masked_mse(torch.ones(1, 4, 2), torch.zeros(1, 4, 2), nothing) == 0


def test_target_errors():
    with pytest.raises(ValueError, match="HOG cell 6"):
        TARGETS["hog"](16, cell=6)
    with pytest.raises(ValueError, match="'image'"):
        TARGETS["pixel"](16, norm="image")
