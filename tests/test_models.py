"""Classifiers by recipe: pooling, sizes, and what is refused."""
import pytest
import torch

from models import build_classifier
from mvit import MViT
from vit import ViT

RECIPE = dict(num_classes=7, image_size=(64, 64), num_frames=4, patch_size=8, expand="mlp",
              drop_path=0.0, checkpointing=False, pool="mean")


def classifier(name, **changes):
    return build_classifier({**RECIPE, "model": name, **changes})


@pytest.mark.parametrize("name, shape", [
    ("mvit_tiny", (2, 3, 4, 64, 64)), ("vit_tiny", (2, 3, 64, 64))])
def test_pool(name, shape):
    torch.manual_seed(0)
    model, by_mean = classifier(name, pool="cls").eval(), classifier(name).eval()
    by_mean.load_state_dict(model.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():
        tokens, _ = model.encode(*model.embed(x))
        torch.testing.assert_close(model(x), model.head(model.norm(tokens[:, 0])))
        torch.testing.assert_close(by_mean(x), model.head(model.norm(tokens[:, 1:].mean(1))))
        assert (by_mean(x) - model(x)).abs().max() > 1e-3
        del model.norm, model.head  # as with num_classes=0
        torch.testing.assert_close(model(x), tokens[:, 0])
    with pytest.raises(ValueError, match="pool='max'"):
        classifier(name, pool="max")


def test_build_classifier():
    assert classifier("vit_tiny").dropout == 0
    assert classifier("vit_tiny", dropout=0.5).dropout == 0.5
    assert classifier("mvit_tiny").patch_stride == (2, 8, 8)
    with torch.device("meta"):
        model = classifier("mvitv2_s", num_frames=40, image_size=(312, 312), expand="attn")
    assert model.patch_stride == (2, 32, 32)
    assert model.blocks[0].attn.rel_pos_h.shape[0] == 2 * 78 - 1
    with pytest.raises(ValueError, match="W=60, use 56 or 64"):
        classifier("vit_tiny", image_size=(64, 60))
    with pytest.raises(ValueError, match="model='resnet'.*mvitv2_s"):
        classifier("resnet")


@pytest.mark.slow
@pytest.mark.parametrize("model, shape", [
    (ViT(16, 1, 2, 7, 32), (3, 32, 32)), (MViT(16, 1, (1, 1), 7, 4, 32, 8), (3, 4, 32, 32))])
def test_export_with_a_free_batch_size(model, shape):
    """torch.export of a graph for two samples computes the same for one and for three."""
    sizes = ({0: torch.export.Dim("batch", max=64)},)
    program = torch.export.export(model.eval(), (torch.randn(2, *shape),), dynamic_shapes=sizes,
                                  strict=False)
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(program.module()(x), model(x))
