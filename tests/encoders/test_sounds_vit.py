"""A ViT that sees filterbanks: one channel, a grid that is no square, positions that are resized between lengths."""

import pytest
import torch
from golden import noise

from glpretrain.encoders import ViT
from glpretrain.encoders.base import build
from glpretrain.evaluate.features import Features

SIZES = {"img_size": [592, 128], "in_chans": 1, "embed_dim": 24, "depth": 1, "num_heads": 3, "mean": [-4.2677393], "std": [9.1379948]}


def vit(**changes: object) -> ViT:
    torch.manual_seed(0)
    return ViT("vit_tiny_patch16_224", **{**SIZES, "modality": "audio", "position_resize": "bicubic", **changes}).eval()


def test_a_long_and_a_short_view_are_encoded_on_their_own_grids() -> None:
    encoder = vit()
    assert encoder.grid((1, 592, 128)) == (37, 8) and encoder.grid((1, 192, 128)) == (12, 8)
    long, short = encoder([noise(2, 1, 592, 128, name="long"), noise(2, 1, 192, 128, name="short")])
    assert long.patches.shape == (2, 296, 24) and short.patches.shape == (2, 96, 24)


def test_positions_of_a_short_view_are_those_of_the_whole_grid_resized() -> None:
    """As `interpolate_pos_encoding` of ASiT's code: bicubic over time and frequency, without antialiasing, `cls` kept."""
    encoder, short = vit(), noise(1, 1, 192, 128, name="short")
    whole = encoder.model.pos_embed.detach()
    maps = whole[:, 1:].transpose(1, 2).unflatten(2, (37, 8))
    resized = torch.nn.functional.interpolate(maps, size=(12, 8), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    other = vit(img_size=[192, 128])
    state = {**encoder.backbone_state(), "pos_embed": torch.cat([whole[:, :1], resized], dim=1)}
    other.load_backbone_state(state)
    torch.testing.assert_close(encoder(short).cls, other(short).cls)
    assert not torch.allclose(vit(position_resize="timm")(short).cls, encoder(short).cls)


def test_the_kind_of_item_is_on_the_card_and_builds_the_same_encoder() -> None:
    encoder = vit()
    assert (encoder.card.modality, encoder.card.item_shape, encoder.card.patch_size) == ("audio", (1, 592, 128), (16, 16))
    again = build(encoder.card)
    assert again.card == encoder.card
    again.load_backbone_state(encoder.backbone_state())
    item = noise(1, 1, 192, 128, name="item")
    assert torch.equal(again.eval()(item).patches, encoder(item).patches)
    assert "modality" not in vit(modality="image").card.arguments  # cards of images stay as they were


def test_evaluations_take_sounds_of_other_lengths() -> None:
    assert Features(size=192).shape(vit()) == (1, 192, 128) and Features().image_grid(vit()) == (37, 8)
    with pytest.raises(ValueError, match="height 100 does not divide"):
        Features(size=100).shape(vit())
