"""Feature-map encoders: timm's numbers, cells as patches, and a refusal by name where tokens would have to be hidden."""

import pytest
import torch

from glpretrain.encoders import FeatureMap

ACCEPTED = ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "regnetx_002", "resnetv2_50"]


def image(*shape):
    """Float[*shape] from a formula."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float32) * 0.37).reshape(shape)


def make(name, **changes):
    return FeatureMap(name, **{"img_size": 64, **changes}).eval()


@pytest.mark.parametrize("name", ACCEPTED)
def test_cls_is_what_timm_pools_and_patches_are_the_cells_of_the_last_stage(name):
    encoder = make(name)
    items = image(2, 3, 64, 96)
    with torch.no_grad():
        output, pooled, cells = encoder(items), encoder.model(items), encoder.model.forward_features(items)
    assert encoder.grid((3, 64, 96)) == (2, 3)
    assert output.patches.shape == (2, 6, encoder.embed_dim)
    assert output.registers is None
    assert torch.equal(output.cls, pooled)
    first_of_second_row = cells[:, 1, 0] if "swin" in name else cells[:, :, 1, 0]
    assert torch.equal(output.patches[:, 3], first_of_second_row)


def test_several_sizes_go_in_as_a_list():
    encoder = make("resnet18")
    views = [image(2, 3, 64, 64), image(1, 3, 32, 96), 0.5 * image(3, 3, 64, 64)]
    for view, output in zip(views, encoder(views), strict=True):
        # Convolutions of another batch size may round differently.
        torch.testing.assert_close(output.patches, encoder(view).patches, rtol=1e-4, atol=1e-5)


def test_hiding_and_dropping_tokens_is_refused_by_name():
    encoder = make("resnet18")
    items = image(1, 3, 64, 64)
    with pytest.raises(ValueError, match="resnet18 cannot hide tokens; choose a ViT"):
        encoder.add_mask_token()
    with pytest.raises(ValueError, match="resnet18 cannot hide tokens"):
        encoder(items, mask=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="resnet18 cannot drop tokens; choose a ViT"):
        encoder.require_keep()
    with pytest.raises(ValueError, match="resnet18 cannot drop tokens"):
        encoder(items, keep=torch.zeros(1, 2, dtype=torch.int64))


def test_a_model_of_another_kind_is_refused():
    for name in ("vit_tiny_patch16_224", "resnet19"):
        with pytest.raises(ValueError, match=f"name='{name}'"):
            FeatureMap(name)


def test_a_size_that_does_not_divide_names_its_neighbours():
    with pytest.raises(ValueError, match=r"width 50 does not divide by the patch of 32 pixels; nearest accepted: \[32, 64\]"):
        make("resnet18")(image(1, 3, 64, 50))


@pytest.mark.parametrize("name", ACCEPTED)
def test_layers_run_from_the_stem_to_the_last_stage(name):
    encoder = make(name)
    layers = {encoder.layer_of(key) for key, _ in encoder.named_parameters()}
    assert encoder.num_layers == 4
    assert {0, 1, 2, 3, 4} <= layers <= {0, 1, 2, 3, 4, 5}
