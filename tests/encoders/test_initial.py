"""Fresh weights by the rules of the official codes, fixed positions, and DINOv2's gated layers."""

import pytest
import timm
import torch
from golden import assert_moments, load, wave

from glpretrain.encoders import ViT, build
from glpretrain.encoders.initial import sincos_position

TINY = "vit_tiny_patch16_224"
SMALL = "vit_small_patch14_dinov2"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 1, "num_heads": 3}
_NAMES = (("register_tokens", "reg_token"), ("mlp.w12.", "mlp.fc1."), ("mlp.w3.", "mlp.fc2."))


@pytest.mark.parametrize(
    ("initial", "golden", "kind", "changes"),
    [
        ("dino", "dino", "dino", {}),
        ("dino", "ibot", "ibot", {}),
        ("dino", "mugs", "mugs", {}),
        ("dinov2", "dinov2", "mlp", {"name": SMALL, "reg_tokens": 2}),
        ("dinov2", "dinov2", "swiglufused", {"name": SMALL, "reg_tokens": 2, "ffn": "swiglu"}),
        ("mae", "mae", "mae", {"positions": "sincos"}),
        ("mae", "fsfm", "fsfm", {"positions": "sincos"}),
    ],
)
def test_every_fresh_parameter_has_the_moments_of_the_official_one(initial: str, golden: str, kind: str, changes: dict) -> None:
    torch.manual_seed(0)
    encoder = ViT(**{"name": TINY, **SIZES, "initial": initial, **changes})
    found = {name.removeprefix("model."): parameter for name, parameter in encoder.named_parameters()}
    expected = load(f"initial_{golden}")["moments"][kind]
    for official, name in _NAMES:
        expected = {key.replace(official, name): moments for key, moments in expected.items()}
    assert found.keys() <= expected.keys()
    assert all(name in found for name in expected if name.startswith("blocks."))
    for name, parameter in found.items():
        assert_moments(parameter, expected[name], name=name)


def test_a_model_of_dinov3_starts_as_the_official_one_and_timms_own_rule_does_not() -> None:
    sizes = SIZES | {"depth": 2, "reg_tokens": 2, "init_values": 1e-5}
    torch.manual_seed(0)
    own, timms = (ViT("vit_small_patch16_dinov3_qkvb", **sizes, initial=initial).model for initial in ("dinov3", "timm"))
    expected = load("initial_dinov3")["moments"]["mlp"]
    bias = {f"attn.{part}_bias": "attn.qkv.bias" for part in "qv"}
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", **bias}
    seen = set()
    for name, parameter in own.named_parameters():
        place = name
        for ours, official in names.items():
            place = place.replace(ours, official)
        seen.add(place)
        assert_moments(parameter, expected[place], name=name)
    assert seen == expected.keys() - {"mask_token"}
    with pytest.raises(AssertionError):
        assert_moments(timms.blocks[1].mlp.fc2.weight, expected["blocks.1.mlp.fc2.weight"], name="fc2")


@pytest.mark.parametrize("count", [0, 3])
def test_a_model_of_dinov3_has_as_many_registers_as_asked_and_is_built_again(count: int) -> None:
    encoder = ViT("vit_small_patch16_dinov3", **SIZES, reg_tokens=count)
    assert encoder.num_prefix_tokens == 1 + count and encoder.card.arguments["reg_tokens"] == count
    again = build(encoder.card)
    again.load_backbone_state(encoder.backbone_state())
    items = wave(1, 3, 32, 32)
    assert torch.equal(again.eval()(items).patches, encoder.eval()(items).patches)


def test_timms_own_rule_differs_where_another_rule_says_so() -> None:
    """Otherwise the moments could not tell the rules apart."""
    torch.manual_seed(0)
    timms = ViT(TINY, **SIZES)
    for initial, name in (
        ("dino", "cls_token"),
        ("mae", "cls_token"),
        ("mae", "patch_embed.proj.weight"),
        ("mae", "blocks.0.mlp.fc1.weight"),
    ):
        with pytest.raises(AssertionError):
            assert_moments(timms.model.get_parameter(name), load(f"initial_{initial}")["moments"][initial][name], name=name)
    gated = ViT(SMALL, **SIZES, ffn="swiglu").model.blocks[0].mlp.fc1
    assert float(gated.bias[-1].detach()) == 1.0  # timm's open gate


def test_fixed_positions_are_maes_and_never_learn() -> None:
    encoder = ViT(TINY, img_size=(24, 32), patch_size=8, embed_dim=24, depth=1, num_heads=3, positions="sincos")
    positions = encoder.model.pos_embed
    assert not positions.requires_grad and not positions[0, 0].any()
    assert torch.equal(positions[0, 1:], sincos_position((3, 4), 24))
    again = build(encoder.card)
    assert again.card == encoder.card and torch.equal(again.model.pos_embed, positions) and not again.model.pos_embed.requires_grad
    assert "positions" not in ViT(TINY, **SIZES).card.arguments


@pytest.mark.parametrize(("dim", "hidden"), [(1024, 2736), (768, 2048), (384, 1024), (200, 536)])
def test_the_width_of_a_gated_layer_is_dinov2s(dim: int, hidden: int) -> None:
    """2736 is that of configs/train/vitl14.yaml; the others are (int(4 D * 2 / 3) + 7) // 8 * 8 by hand."""
    with torch.device("meta"):
        name = {1024: "large", 768: "base"}.get(dim, "small")
        encoder = ViT(
            f"vit_{name}_patch14_dinov2", img_size=28, depth=1, ffn="swiglu", **({"embed_dim": dim, "num_heads": 2} if dim == 200 else {})
        )
    mlp = encoder.model.blocks[0].mlp
    assert encoder.embed_dim == dim and mlp.fc1.weight.shape == (2 * hidden, dim) and mlp.fc2.weight.shape == (dim, hidden)


def test_a_gated_model_is_built_again_from_its_card_and_by_timm() -> None:
    encoder = ViT("vit_small_patch14_reg4_dinov2", img_size=28, embed_dim=24, depth=2, num_heads=3, ffn="swiglu", initial="dinov2")
    assert build(encoder.card).state_dict().keys() == encoder.state_dict().keys()
    config = encoder.library_config(encoder.card)
    theirs = timm.create_model(config["architecture"], **config["model_args"])
    theirs.load_state_dict(encoder.backbone_state())
    items = torch.sin(torch.arange(2 * 3 * 28 * 28).float()).view(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(theirs.eval().forward_features(items)[:, 0], encoder.eval()(items).cls)
    assert encoder.model.num_reg_tokens == 4 and encoder.model.no_embed_class


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": "swiglu"}, "ffn='swiglu' given with vit_tiny_patch16_224; accepted: vit_small_patch14_dinov2"),
        ({"ffn": "glu"}, "ffn='glu' given; accepted: None, swiglu"),
        ({"initial": "xavier"}, "initial='xavier' given; accepted: timm, dino, dinov2, dinov3, mae"),
        ({"positions": "none"}, "positions='none' given; accepted: learned, sincos"),
        ({"positions": "sincos", "embed_dim": 18, "num_heads": 3}, "a width of 18 given; it must be a multiple of 4"),
        ({"name": "vit_small_patch16_dinov3", "initial": "dino"}, "vit_small_patch16_dinov3 accepts timm, dinov3 only"),
        ({"initial": "dinov3"}, "initial='dinov3' given; vit_tiny_patch16_224 accepts timm, dino, dinov2, mae only"),
        ({"name": "eva02_tiny_patch14_224", "initial": "mae"}, "initial='mae' given; eva02_tiny_patch14_224 accepts timm only"),
        (
            {"name": "eva02_tiny_patch14_224", "positions": "sincos"},
            "positions='sincos' given; eva02_tiny_patch14_224 accepts learned",
        ),
    ],
)
def test_a_rule_or_layer_that_a_model_does_not_have_is_refused(changes: dict, message: str) -> None:
    arguments = {"name": TINY, "img_size": 28 if "eva02" in str(changes) else 32, "depth": 1, **changes}
    with pytest.raises(ValueError, match=message):
        ViT(**arguments)
