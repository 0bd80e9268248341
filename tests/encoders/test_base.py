"""The registry, and lists of items."""

from dataclasses import replace

import pytest
import torch

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import ViT, build, register
from glpretrain.encoders.sequences import encode_list


def card():
    return ViT("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=3).card


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'ViT' is already registered"):
        register(ViT)


def test_a_card_of_an_unknown_encoder_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown encoder 'Vit'; registered: \['FeatureMap', .*'ViT'\]"):
        build(replace(card(), encoder="Vit"))


def test_a_card_with_an_unknown_argument_lists_the_accepted():
    with pytest.raises(ValueError, match=r"arguments of ViT: .*'depht'; accepted: \['name', 'img_size'"):
        build(replace(card(), arguments={**card().arguments, "depht": 1}))


def test_items_of_one_size_are_encoded_together_and_given_back_in_order():
    calls = []

    def encode(groups):
        calls.extend((tuple(group.items.shape), group.mask is not None, group.cls_only) for group in groups)
        return [EncoderOutput(cls=group.items.sum(dim=2), patches=group.items) for group in groups]

    sizes = ((2, 3), (1, 5), (3, 3), (2, 3), (1, 3))
    items = [torch.full((count, 1, size), float(number)) for number, (count, size) in enumerate(sizes)]
    mask = [None, None, None, torch.ones(2, 3, dtype=torch.bool), None]
    outputs = encode_list(encode, items, mask=mask, cls_only=[False, True, False, False, True])
    assert calls == [((5, 1, 3), False, False), ((1, 1, 5), False, True), ((2, 1, 3), True, False), ((1, 1, 3), False, True)]
    for given, output in zip(items, outputs, strict=True):
        assert torch.equal(output.patches, given)
        assert torch.equal(output.cls, given.sum(dim=2))


def test_one_mask_tensor_for_a_list_is_refused():
    with pytest.raises(ValueError, match="one tensor for a list of 2"):
        encode_list(lambda groups: [], [torch.zeros(1, 2)] * 2, mask=torch.zeros(2, 1))
