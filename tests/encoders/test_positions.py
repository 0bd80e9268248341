"""Positions for another grid: what every way of resizing keeps, and where they differ."""

import pytest
import torch
from golden import noise

from glpretrain.encoders import ViT
from glpretrain.encoders.timm_model import POSITION_RESIZES, resize_positions


@pytest.mark.parametrize("how", POSITION_RESIZES)
def test_the_same_grid_is_left_as_it_is(how):
    positions = noise(1, 15, 7, name="positions")
    assert resize_positions(positions, grid=(3, 5), new_grid=(3, 5), how=how) is positions


@pytest.mark.parametrize("how", POSITION_RESIZES)
def test_equal_positions_stay_equal_on_every_grid(how):
    positions = noise(1, 1, 7, name="positions").expand(1, 15, 7)
    for new_grid in ((2, 7), (5, 3), (14, 1)):
        resized = resize_positions(positions, grid=(3, 5), new_grid=new_grid, how=how)
        assert resized.shape == (1, new_grid[0] * new_grid[1], 7)
        torch.testing.assert_close(resized, positions[:, :1].expand_as(resized), rtol=0, atol=1e-6)


def test_antialiasing_matters_when_the_grid_shrinks_only():
    positions = noise(1, 36, 7, name="positions")
    for new_grid, equal in (((9, 12), True), ((3, 4), False)):
        timm, bicubic = (resize_positions(positions, grid=(6, 6), new_grid=new_grid, how=how) for how in ("timm", "bicubic"))
        # Without shrinking both are one kernel, but for its constant (-0.5 and -0.75): equal on a plane, not on noise.
        assert timm.shape == bicubic.shape
        assert (float((timm - bicubic).abs().mean()) < 0.1) == equal


def test_a_mirrored_grid_gives_mirrored_positions_unless_it_is_dinos_which_is_shifted():
    positions = noise(1, 36, 7, name="positions")
    mirrored = positions.unflatten(1, (6, 6)).flip(2).flatten(1, 2)
    for how in POSITION_RESIZES:
        plain = resize_positions(positions, grid=(6, 6), new_grid=(9, 9), how=how).unflatten(1, (9, 9)).flip(2).flatten(1, 2)
        turned = resize_positions(mirrored, grid=(6, 6), new_grid=(9, 9), how=how)
        assert torch.allclose(plain, turned, atol=1e-5) == (how != "dino")


def small(name="vit_tiny_patch16_224", **changes):
    return ViT(name, **{"img_size": 24, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, **changes}).eval()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_gap_224"])
@pytest.mark.parametrize("how", ["bicubic", "dino"])
def test_only_views_of_another_size_see_the_difference(name, how):
    timm, other = small(name), small(name, position_resize=how)
    state = {key: 0.5 * noise(*tensor.shape, name=key) for key, tensor in timm.backbone_state().items()}
    for encoder in (timm, other):
        encoder.load_backbone_state(state)
    native, larger = noise(1, 3, 24, 24, name="native"), noise(1, 3, 40, 16, name="larger")
    with torch.no_grad():
        assert torch.equal(timm(native).patches, other(native).patches)
        assert not torch.allclose(timm(larger).patches, other(larger).patches, atol=1e-3)
        keep = torch.arange(10).unsqueeze(0)
        torch.testing.assert_close(other(larger, keep=keep).patches, other(larger).patches, rtol=0, atol=1e-5)


def test_positions_are_placed_as_timm_places_them():
    encoder = small("vit_small_patch14_reg4_dinov2", position_resize="bicubic")
    state = {key: 0.5 * noise(*tensor.shape, name=key) for key, tensor in encoder.backbone_state().items()}
    # Equal positions are the same on every grid, so that timm's own step is the judge.
    state["pos_embed"] = state["pos_embed"][:, :1].expand_as(state["pos_embed"]).contiguous()
    encoder.load_backbone_state(state)
    items = noise(1, 3, 40, 16, name="items")
    with torch.no_grad():
        expected = encoder.model.forward_features(items)[:, encoder.num_prefix_tokens :]
        torch.testing.assert_close(encoder(items).patches, expected, rtol=0, atol=1e-5)


def test_norms_take_their_eps_and_rotary_positions_their_periods():
    assert {module.eps for module in small(norm_eps=1e-12).modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-12}
    encoder = small("vit_small_patch16_dinov3", rope_periods=[1.0, 2.0, 3.0, 4.0], embed_dim=48)
    assert encoder.model.rope.periods.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert encoder.card.arguments["rope_periods"] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit_tiny_patch16_224", {"position_resize": "nearest"}, "position_resize='nearest' given; accepted: timm, bicubic, dino"),
        ("vit_small_patch16_dinov3", {"position_resize": "dino"}, "vit_small_patch16_dinov3 accepts timm only"),
        ("deit_tiny_distilled_patch16_224", {"position_resize": "dino"}, "deit_tiny_distilled_patch16_224 accepts timm only"),
        ("vit_tiny_patch16_224", {"norm_eps": 0.0}, "norm_eps=0.0 given; accepted: above 0"),
        ("vit_tiny_patch16_224", {"mlp_ratio": -1.0}, "mlp_ratio=-1.0 given; accepted: above 0"),
        ("vit_tiny_patch16_224", {"rope_periods": [1.0]}, "has no rotary positions of DINOv3"),
        ("vit_small_patch16_dinov3", {"rope_periods": [1.0]}, "rope_periods has 1 values; accepted by vit_small_patch16_dinov3: 4"),
    ],
)
def test_what_does_not_fit_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        small(name, **changes)


@pytest.mark.parametrize("how", POSITION_RESIZES)
def test_positions_that_belong_to_no_place_stay(how):
    positions = noise(1, 17, 7, name="positions")
    resized = resize_positions(positions, grid=(3, 5), new_grid=(4, 7), how=how)
    assert torch.equal(resized[:, :2], positions[:, :2])
    assert torch.equal(resized[:, 2:], resize_positions(positions[:, 2:], grid=(3, 5), new_grid=(4, 7), how=how))
