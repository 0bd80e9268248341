"""Attention maps: the softmax that the block really used."""

import pytest
import torch
import torch.nn.functional as F

from glpretrain.encoders import FeatureMap, ViT
from glpretrain.encoders.attention import attention_keys, attention_maps, cls_attention, cls_attention_of_blocks
from glpretrain.encoders.layers import features_of_layers


def image(*shape):
    """Float[*shape] from a formula."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float32) * 0.37).reshape(shape)


def small(name, **changes):
    encoder = ViT(name, **{"img_size": (24, 40), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, **changes}).eval()
    with torch.no_grad():
        for index, parameter in enumerate(encoder.parameters()):
            parameter.add_(0.2 * torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape) * 0.7 + index))
    return encoder


def values_of(attention, tokens):
    """Float[B heads T d]: v, computed from timm's parameters by hand."""
    if attention.qkv is None:
        values = attention.v_proj(tokens)
    else:
        fused = F.linear(tokens, attention.qkv.weight, attention.qkv.bias)
        values = fused[..., 2 * fused.shape[-1] // 3 :]
        if "v_bias" in dict(attention.named_parameters()) and attention.v_bias is not None:
            values = values + attention.v_bias
    return values.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


FAMILIES = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_medium_patch16_gap_240",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_dinov3",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("block", [0, -1])
def test_the_map_applied_to_the_values_gives_the_output_of_the_attention(name, block):
    encoder = small(name)
    items = image(2, 3, 24, 40)
    attention = encoder.model.blocks[block].attn
    seen = {}
    hook = attention.register_forward_hook(lambda module, args, output: seen.update(tokens=args[0], output=output))
    maps = attention_maps(encoder, items, block=block)
    hook.remove()
    tokens = encoder.num_prefix_tokens + 15
    assert maps.shape == (2, 3, tokens, tokens)
    mixed = (maps @ values_of(attention, seen["tokens"])).transpose(1, 2).flatten(2)
    if name.startswith("eva02"):
        mixed = attention.norm(mixed)
    # Sums of some 17 products in float32, in another order than the fused kernel's.
    torch.testing.assert_close(attention.proj(mixed), seen["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_sum_to_one(name):
    maps = attention_maps(small(name), image(2, 3, 24, 40), block=1)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(maps.shape[:-1]), rtol=0, atol=1e-6)
    assert maps.min() >= 0


def test_the_unfused_kernel_gives_the_same_map():
    encoder = small("vit_tiny_patch16_224")
    items = image(2, 3, 24, 40)
    fused = attention_maps(encoder, items)
    encoder.model.blocks[-1].attn.fused_attn = False
    torch.testing.assert_close(attention_maps(encoder, items), fused, rtol=0, atol=1e-6)


def test_looking_changes_nothing():
    encoder = small("vit_tiny_patch16_224")
    items = image(2, 3, 24, 40)
    before = encoder(items).patches
    attention_maps(encoder, items)
    assert torch.equal(encoder(items).patches, before)
    assert not encoder.model.blocks[-1]._forward_hooks and not encoder.model.blocks[-1]._forward_pre_hooks


def test_attention_of_the_class_token_leaves_registers_out():
    encoder = small("vit_small_patch14_reg4_dinov2")
    assert encoder.num_prefix_tokens == 5
    items = image(2, 3, 24, 40)
    maps, to_patches = attention_maps(encoder, items), cls_attention(encoder, items)
    assert to_patches.shape == (2, 3, 3, 5)
    assert torch.equal(to_patches[:, :, 1, 2], maps[:, :, 0, 5 + 7])


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "beit_base_patch16_224"])
def test_several_blocks_in_one_pass_give_the_maps_of_each(name):
    encoder, items = small(name), image(2, 3, 24, 40)
    together = cls_attention_of_blocks(encoder, items, blocks=[2, 0, -2])
    each = torch.stack([cls_attention(encoder, items, block=block) for block in (2, 0, 1)])
    assert torch.equal(together, each)
    assert together.shape == (3, 2, 3, 3, 5)


def test_what_has_no_map_is_refused_by_name():
    items = image(1, 3, 24, 40)
    with pytest.raises(ValueError, match="resnet18 given; accepted: a ViT"):
        attention_maps(FeatureMap("resnet18", img_size=64), items)
    with pytest.raises(ValueError, match="vit_medium_patch16_gap_240 has no class token"):
        cls_attention(small("vit_medium_patch16_gap_240"), items)
    with pytest.raises(ValueError, match="block=3; accepted: -3 to 2"):
        attention_maps(small("vit_tiny_patch16_224"), items, block=3)
    with pytest.raises(ValueError, match="training mode"):
        attention_maps(small("vit_tiny_patch16_224").train(), items)
    with pytest.raises(ValueError, match=r"ParallelThingsBlock of vit_small_patch16_18x2_224 has 2 attention maps"):
        attention_maps(small("vit_small_patch16_18x2_224"), items)


def test_keys_are_the_middle_third_of_what_the_block_projects():
    encoder = small("vit_tiny_patch16_224")
    items = image(2, 3, 24, 40)
    attention = encoder.model.blocks[1].attn
    seen = {}
    hook = attention.qkv.register_forward_hook(lambda module, args, output: seen.update(qkv=output))
    keys = attention_keys(encoder, items, block=1)
    hook.remove()
    assert torch.equal(keys, seen["qkv"][:, 1:, 48:96])
    assert keys.shape == (2, 15, 48)


def test_keys_leave_registers_out_and_need_the_fused_kernel():
    encoder = small("vit_small_patch14_reg4_dinov2")
    items = image(2, 3, 24, 40)
    assert attention_keys(encoder, items).shape == (2, 15, 48)
    encoder.model.blocks[-1].attn.fused_attn = False
    with pytest.raises(ValueError, match="vit_small_patch14_reg4_dinov2 does not run the fused kernel"):
        attention_keys(encoder, items)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize(("tokens", "third"), [("query", 0), ("key", 1), ("value", 2)])
def test_tokens_of_an_attention_are_thirds_of_what_timm_projects(name, tokens, third):
    encoder, items = small(name), image(2, 3, 24, 40)
    seen = []
    hooks = [block.attn.qkv.register_forward_hook(lambda module, args, output: seen.append(output)) for block in encoder.model.blocks]
    with torch.no_grad():
        found = features_of_layers(encoder, items, layers=[-1, 0, 1, 2], tokens=tokens)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3  # one pass for all blocks
    for output, number in zip(found, (2, 0, 1, 2), strict=True):
        expected = seen[number].chunk(3, dim=-1)[third]
        assert torch.equal(output.patches, expected[:, encoder.num_prefix_tokens :])
        assert torch.equal(output.cls, expected[:, 0])


def test_tokens_of_an_attention_need_one():
    network = FeatureMap("resnet18", img_size=32)
    with pytest.raises(ValueError, match="tokens: key of FeatureMap; accepted: output; only a transformer has others"):
        features_of_layers(network.eval(), image(2, 3, 32, 32), layers=[-1], tokens="key")
    with pytest.raises(ValueError, match="layer: 3; accepted: -3 to 2"):
        features_of_layers(small("vit_tiny_patch16_224"), image(2, 3, 24, 40), layers=[3], tokens="key")
