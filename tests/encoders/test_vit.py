"""The timm ViT adapter: equal to timm where nothing is hidden or dropped, and exact about what is."""

import json

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from timm.models import is_model_in_modules

from glpretrain.core.types import EncoderCard
from glpretrain.encoders import ViT, build, fingerprint
from glpretrain.encoders.layers import RelationBlock, features_of_layers
from glpretrain.encoders.vit import VIT_MODULES

REGISTERED = [name for name in timm.list_models() if is_model_in_modules(name, VIT_MODULES)]
# Their heads differ from block to block, so timm builds them at their own depth only: billions of parameters for most.
OWN_DEPTH_ONLY = [name for name in REGISTERED if "sapiens2" in name]
SHALLOW = [name for name in REGISTERED if name not in OWN_DEPTH_ONLY]


def image(*shape):
    """Float[*shape] from a formula."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32) * 0.37).reshape(shape)


def wake(encoder):
    """Give every parameter a value that matters: timm starts some layer scales at 1e-5 and some tables at zero."""
    with torch.no_grad():
        for index, parameter in enumerate(encoder.parameters()):
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.3 * torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape) * 0.7 + index))
    return encoder


def small(name="vit_tiny_patch16_224", **changes):
    arguments = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, **changes}
    return wake(ViT(name, **arguments)).eval()


def size_for(name):
    """Smallest square of at least two tokens a side for the patches that occur."""
    return next(size for size in (56, 64) if size % (14 if "patch14" in name else 16) == 0)


def one_block(name):
    # The mci stem hands its own width to the blocks, so that one stays as wide as it is.
    width = {} if "_mci_" in name else {"embed_dim": 48, "num_heads": 2}
    return wake(ViT(name, depth=1, img_size=size_for(name), **width)).eval()


def assert_equals_timm(encoder):
    items = image(2, *encoder.card.item_shape)
    with torch.no_grad():
        expected = encoder.model.forward_features(items)
        output = encoder(items)
    parts = [output.patches] if output.registers is None else [output.registers, output.patches]
    if encoder.model.cls_token is not None:
        parts = [output.cls.unsqueeze(1), *parts]
    else:
        assert torch.equal(output.cls, output.patches.mean(dim=1))
    assert torch.equal(torch.cat(parts, dim=1), expected)
    rows, columns = encoder.grid(encoder.card.item_shape)
    assert output.patches.shape == (2, rows * columns, encoder.embed_dim)
    assert 1 <= encoder.layer_of("model.blocks.0.norm1.weight") <= encoder.num_layers


def test_the_registry_of_timm_is_not_empty():
    assert len(REGISTERED) > 200
    assert {module for module in VIT_MODULES if any(is_model_in_modules(name, (module,)) for name in REGISTERED)} == set(VIT_MODULES)


@pytest.mark.parametrize("name", SHALLOW)
def test_every_registered_vit_equals_timm_bit_for_bit(name):
    assert_equals_timm(one_block(name))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_tiny_patch16_224", 0),
        ("vit_small_patch14_reg4_dinov2", 4),
        ("deit_tiny_distilled_patch16_224", 1),
        ("vit_little_patch16_reg4_gap_256", 4),  # registers and no class token
        ("beit_base_patch16_224", 0),
    ],
)
def test_registers_are_the_tokens_between_class_token_and_patches(name, count):
    encoder = small(name)
    items = image(3, 3, 24, 40)
    output = encoder(items)
    assert (output.registers is None) if count == 0 else (output.registers.shape == (3, count, 24))
    _, listed = encoder([image(2, 3, 24, 40).flip(0), items])
    earlier, last = features_of_layers(encoder, items, layers=[0, -1])
    for other in (listed, earlier, last):
        assert (other.registers is None) == (count == 0)
    if count:
        # Matrix products of another height may round differently.
        torch.testing.assert_close(listed.registers, output.registers, rtol=0, atol=1e-5)
        assert torch.equal(last.registers, output.registers)
        assert not torch.equal(earlier.registers, output.registers)


@pytest.mark.slow
def test_a_model_with_heads_per_block_equals_timm_at_its_own_depth():
    assert_equals_timm(wake(ViT("vit_base_patch16_sapiens2", img_size=32)).eval())


def test_a_depth_that_timm_refuses_is_a_value_error():
    with pytest.raises(ValueError, match=r"vit_base_patch16_sapiens2.*'depth': 1"):
        ViT("vit_base_patch16_sapiens2", depth=1, img_size=32)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 50}, r"timm refuses to build vit_tiny_patch16_224 with .*'embed_dim': 50"),
        (
            "eva02_tiny_patch14_224",
            {"embed_dim": 51},
            "embed_dim=51 does not fit the 3 heads of eva02_tiny_patch14_224; accepted: multiples of 12",
        ),
        ("beit_base_patch16_224", {"embed_dim": 50}, "accepted: multiples of 3"),
        ("vit_tiny_patch16_224", {"patch_size": 0}, "patch_size=0 given; accepted: at least 1"),
        ("vit_tiny_patch16_224", {"depth": 0}, "depth=0 given; accepted: at least 1"),
        ("vit_tiny_patch16_224", {"drop_path_rate": 1.5}, r"drop_path_rate=1.5 given; accepted: \[0, 1\)"),
        ("vit_tiny_patch16_224", {"img_size": (1, 2, 3)}, r"img_size=\(1, 2, 3\) given"),
        ("vit_tiny_patch16_224", {"mean": (0.5,)}, "mean has 1 values; accepted: 3"),
    ],
)
def test_sizes_that_do_not_fit_fail_at_construction(name, changes, message):
    with pytest.raises(ValueError, match=message):
        small(name, **changes)


DROPPING = [
    ("vit_tiny_patch16_224", 2),
    ("vit_small_patch16_18x2_224", 4),  # two attentions and two perceptrons in a block
    ("vit_small_patch16_dinov3", 2),
    ("eva02_tiny_patch14_224", 2),
    ("beit_base_patch16_224", 2),
    ("vit_relpos_small_patch16_224", 2),
]


def drop_rates(encoder):
    """Rates of stochastic depth, block by block."""
    return [[part.drop_prob for part in block.modules() if isinstance(part, DropPath)] for block in encoder.model.blocks]


@pytest.mark.parametrize(("name", "branches"), DROPPING)
def test_a_uniform_drop_path_rate_is_that_of_every_block(name, branches):
    uniform = small(name, embed_dim=48, depth=3, drop_path_rate=0.3, drop_path_uniform=True)
    assert drop_rates(uniform) == [[0.3] * branches] * 3
    growing = small(name, embed_dim=48, depth=3, drop_path_rate=0.3)
    assert [sorted(set(rates)) for rates in drop_rates(growing)] == [[], pytest.approx([0.15]), pytest.approx([0.3])]
    assert uniform.state_dict().keys() == growing.state_dict().keys()


def test_a_uniform_drop_path_rate_drops_in_the_first_block_too():
    uniform, growing = (wake(small(depth=1, drop_path_rate=0.9, drop_path_uniform=flag)).train() for flag in (True, False))
    items = image(40, 3, 24, 40)
    assert torch.equal(growing(items).cls, growing.eval()(items).cls)
    torch.manual_seed(0)
    assert not torch.equal(uniform(items).cls, uniform.eval()(items).cls)
    relation = RelationBlock(uniform).train()
    pooled, neighbours = image(40, 24), image(40, 3, 24)
    assert torch.equal(relation(pooled, neighbours, encoder=uniform), relation.eval()(pooled, neighbours, encoder=uniform))


def test_a_uniform_drop_path_rate_travels_in_the_card():
    encoder = small(drop_path_rate=0.3, drop_path_uniform=True)
    again = build(EncoderCard.from_json(json.loads(json.dumps(encoder.card.to_json()))))
    assert drop_rates(again) == drop_rates(encoder) == [[0.3, 0.3]] * 2
    again.load_backbone_state(encoder.backbone_state())
    assert fingerprint(again) == fingerprint(encoder)
    assert "drop_path_uniform" not in small(drop_path_rate=0.3).card.arguments  # cards written before the setting existed stay equal
    with pytest.raises(ValueError, match=r"drop_path_uniform=True given with drop_path_rate=0.0; set a rate above 0"):
        small(drop_path_uniform=True)


def test_an_all_false_mask_changes_nothing():
    encoder = small()
    encoder.add_mask_token()
    items = image(2, 3, 24, 40)
    assert torch.equal(encoder(items, mask=torch.zeros(2, 15, dtype=torch.bool)).patches, encoder(items).patches)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224", "vit_small_patch16_rope_224"]
)
def test_what_lies_under_the_mask_cannot_be_seen(name):
    encoder = small(name, embed_dim=48)
    encoder.add_mask_token()
    items = image(1, 3, 24, 40)
    other = items.clone()
    other[:, :, 8:16, 16:24] = -3.0  # the token of row 1, column 2
    mask = torch.zeros(1, 15, dtype=torch.bool)
    mask[0, 7] = True
    assert not torch.equal(encoder(items).patches, encoder(other).patches)
    assert torch.equal(encoder(items, mask=mask).patches, encoder(other, mask=mask).patches)


def test_hidden_tokens_know_their_place():
    encoder = small()
    encoder.add_mask_token()
    everything = encoder(image(1, 3, 24, 40), mask=torch.ones(1, 15, dtype=torch.bool)).patches
    # The position comes after the mask token, so hidden tokens differ from place to place (and no rounding is this large).
    assert (everything[0, 0] - everything[0, 7]).abs().max() > 1e-3


def test_the_mask_token_gets_a_gradient_from_hidden_places_only():
    encoder = small()
    encoder.add_mask_token()
    mask = torch.zeros(1, 15, dtype=torch.bool)
    items = image(1, 3, 24, 40)
    encoder(items, mask=mask).cls.sum().backward()
    assert not encoder.mask_token.grad.any()
    mask[0, 3] = True
    encoder(items, mask=mask).cls[0, 0].backward()
    assert encoder.mask_token.grad.any()


ROTARY_AND_NOT = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_medium_patch16_gap_240",
    "deit_tiny_distilled_patch16_224",
]


@pytest.mark.parametrize("name", ROTARY_AND_NOT)
def test_keeping_all_tokens_in_another_order_only_reorders_them(name):
    encoder = small(name, embed_dim=48)
    items = image(2, 3, 24, 40)
    order = torch.stack([torch.arange(15).flip(0), (torch.arange(15) * 7 + 3) % 15])
    full, reordered = encoder(items), encoder(items, keep=order)
    expected = full.patches.gather(1, order.unsqueeze(-1).expand_as(full.patches))
    # Sums over tokens run in another order: a few float32 roundings.
    torch.testing.assert_close(reordered.patches, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(reordered.cls, full.cls, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ROTARY_AND_NOT)
def test_what_was_dropped_cannot_be_seen(name):
    encoder = small(name, embed_dim=48)
    items = image(1, 3, 24, 40)
    other = items.clone()
    other[:, :, 8:16, 16:24] = -3.0
    keep = torch.tensor([[12, 0, 5]])
    output = encoder(items, keep=keep)
    assert output.patches.shape == (1, 3, 48)
    assert torch.equal(output.patches, encoder(other, keep=keep).patches)
    # What stays keeps its place in the grid: the same pixels at other places give other features.
    assert not torch.allclose(output.patches, encoder(items.flip(-1), keep=keep).patches, atol=1e-3)


def test_relative_positions_cannot_drop_tokens():
    encoder = small("beit_base_patch16_224")
    with pytest.raises(ValueError, match=r"beit_base_patch16_224 cannot drop tokens"):
        encoder.require_keep()
    with pytest.raises(ValueError, match=r"cannot drop tokens"):
        encoder(image(1, 3, 24, 40), keep=torch.zeros(1, 3, dtype=torch.int64))


def test_mask_and_keep_together_are_refused():
    with pytest.raises(ValueError, match="not both"):
        small()(image(1, 3, 24, 40), mask=torch.zeros(1, 15, dtype=torch.bool), keep=torch.zeros(1, 3, dtype=torch.int64))


def test_keep_of_another_shape_and_a_list_of_masks_for_one_tensor_are_refused():
    with pytest.raises(ValueError, match=r"keep has shape \(2, 3\); accepted: \(1, tokens to keep\)"):
        small()(image(1, 3, 24, 40), keep=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="keep needs one tensor of items"):
        small()([image(1, 3, 24, 40)], keep=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="a list of masks was given with one tensor of items"):
        small()(image(1, 3, 24, 40), mask=[torch.zeros(1, 15, dtype=torch.bool)])


def test_a_mask_without_a_mask_token_is_refused():
    with pytest.raises(ValueError, match="add_mask_token"):
        small()(image(1, 3, 24, 40), mask=torch.zeros(1, 15, dtype=torch.bool))


@pytest.mark.parametrize("mask", [torch.zeros(1, 14, dtype=torch.bool), torch.zeros(1, 15)])
def test_a_mask_of_another_kind_is_refused(mask):
    encoder = small()
    encoder.add_mask_token()
    with pytest.raises(ValueError, match=r"accepted: bool of shape \(1, 15\)"):
        encoder(image(1, 3, 24, 40), mask=mask)


def test_views_of_several_sizes_go_in_as_a_list_and_come_back_in_order():
    encoder = small()
    encoder.add_mask_token()
    views = [image(2, 3, 24, 40), image(3, 3, 16, 8), 0.5 * image(1, 3, 24, 40), image(2, 3, 24, 40).flip(0)]
    mask = torch.arange(30).reshape(2, 15) % 3 == 0
    outputs = encoder(views, mask=[mask, None, None, None])
    for view, hidden, output in zip(views, [mask, None, None, None], outputs, strict=True):
        alone = encoder(view, mask=hidden)
        # Matrix products of another height may round differently.
        torch.testing.assert_close(output.patches, alone.patches, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.cls, alone.cls, rtol=0, atol=1e-5)


def test_a_list_with_masks_of_another_length_is_refused():
    with pytest.raises(ValueError, match="1 masks for a list of 2"):
        small()([image(1, 3, 24, 40)] * 2, mask=[None])


def test_a_size_that_does_not_divide_names_size_patch_and_neighbours():
    with pytest.raises(ValueError, match=r"width 44 does not divide by the patch of 8 pixels; nearest accepted: \[40, 48\]"):
        small()(image(1, 3, 24, 44))
    with pytest.raises(ValueError, match=r"height 5 .*nearest accepted: \[8\]"):
        small(img_size=(5, 8))


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 24, 40\) given; accepted: \(3, height, width\)"):
        small()(image(1, 2, 24, 40))


def test_a_name_that_is_no_vit_is_refused():
    for name in ("resnet18", "vit_tyni_patch16_224"):
        with pytest.raises(ValueError, match=f"name='{name}'"):
            ViT(name)


def test_the_card_survives_json_and_builds_the_same_architecture():
    encoder = small(in_chans=5, mean=(0.1, 0.2, 0.3, 0.4, 0.5), licence="CC0", source="formula")
    card = EncoderCard.from_json(json.loads(json.dumps(encoder.card.to_json())))
    again = build(card)
    assert card == encoder.card == again.card
    assert card.patch_size == (8, 8) and card.std == (0.5,) * 5
    again.load_backbone_state(encoder.backbone_state())
    items = image(1, 5, 24, 40)
    assert torch.equal(again.eval()(items).patches, encoder(items).patches)


def test_layers_count_from_the_embedding_to_the_norm():
    encoder = small()
    encoder.add_mask_token()
    layers = {encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert layers == {0, 1, 2, 3}
    assert encoder.layer_of("model.norm.weight") == 3
    assert encoder.layer_of("model.blocks.1.norm2.weight") == 2
    assert encoder.layer_of("model.pos_embed") == 0
    assert encoder.layer_of("mask_token") == 3  # fresh when everything else is loaded: no decay from layer to layer slows it


def test_no_parameter_is_left_without_a_gradient():
    for name in ("vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_medium_patch16_gap_240", "vit_small_patch16_dinov3"):
        encoder = small(name, embed_dim=48)
        output = encoder(image(2, 3, 24, 40))
        (output.cls[:, 0].sum() + output.patches[:, :, 1].sum()).backward()
        assert not [key for key, parameter in encoder.named_parameters() if parameter.grad is None]


def test_the_backbone_state_has_no_mask_token_and_loads_strictly():
    encoder = small()
    encoder.add_mask_token()
    state = encoder.backbone_state()
    assert "mask_token" not in state and state.keys() == encoder.model.state_dict().keys()
    broken = {name: tensor for name, tensor in state.items() if name != "cls_token"}
    broken |= {"surplus": torch.zeros(1), "pos_embed": torch.zeros(1, 2, 24)}
    with pytest.raises(ValueError, match=r"missing \['cls_token'\].*unknown \['surplus'\].*pos_embed has shape \(1, 2, 24\)"):
        encoder.load_backbone_state(broken)


def test_autocast_keeps_features_close_and_finite():
    encoder = small()
    encoder.add_mask_token()
    items, mask = image(2, 3, 24, 40), torch.arange(30).reshape(2, 15) % 2 == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = encoder(items, mask=mask)
    # bfloat16 has 8 bits: a few per cent after two blocks of features of size one.
    torch.testing.assert_close(output.patches.float(), encoder(items, mask=mask).patches, rtol=0, atol=0.2)


def test_relative_positions_take_one_size_only():
    with pytest.raises(ValueError, match=r"size \(16, 40\) given; its relative positions accept \(24, 40\) only"):
        small("beit_base_patch16_224")([image(1, 3, 24, 40), image(1, 3, 16, 40)])
