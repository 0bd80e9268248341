"""Weights of one encoder in another: equal features, a position grid that may grow, and a reason for everything refused."""

import pytest
import torch

from glpretrain.encoders import FeatureMap, PointTransformer, ViT
from glpretrain.encoders.transfer import copy_backbone


def image(*shape: int) -> torch.Tensor:
    return torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def vit(name: str = "vit_tiny_patch16_224", **changes) -> ViT:
    return ViT(name, **{"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, **changes})


SAME_SIZE = {
    "plain": lambda: vit(),
    "another model's name": lambda: vit("vit_small_patch16_224", drop_path_rate=0.1),
    "registers": lambda: vit("vit_small_patch14_reg4_dinov2"),
    "rotary": lambda: vit("vit_small_patch16_dinov3"),
    "relative": lambda: vit("beit_base_patch16_224"),
    "convolutions": lambda: FeatureMap("resnet18", img_size=32),
}


@pytest.mark.parametrize("kind", SAME_SIZE)
def test_features_are_those_of_the_source(kind: str) -> None:
    source = vit() if kind == "another model's name" else SAME_SIZE[kind]()
    target = SAME_SIZE[kind]()
    transfer = copy_backbone(source, target=target)
    items = image(2, 3, 32, 32)
    expected, found = source.eval()(items), target.eval()(items)
    assert transfer.num_tensors == len(source.backbone_state()) and not transfer.resized
    assert torch.equal(found.cls, expected.cls) and torch.equal(found.patches, expected.patches)


def test_the_position_grid_follows_the_image_size() -> None:
    source, target = vit(), vit(img_size=(48, 64))
    transfer = copy_backbone(source, target=target)
    assert transfer.resized == {"pos_embed": ((4, 4), (6, 8))}
    assert str(transfer).endswith("pos_embed resized from 4x4 to 6x8")
    # What timm does on the fly for a larger image is what was done here once and for all.
    items = image(1, 3, 48, 64)
    torch.testing.assert_close(target.eval()(items).patches, source.eval()(items).patches, rtol=0, atol=1e-5)


def clouds(**changes) -> PointTransformer:
    return PointTransformer("pos_bert_base", **{"num_points": 128, "embed_dim": 24, "depth": 2, "num_heads": 3, "tokens_dim": 8, **changes})


def test_clouds_of_another_number_of_points_are_the_runs_own_choice() -> None:
    source, target = clouds(), clouds(num_points=64)
    copy_backbone(source, target=target)
    items = image(2, 64, 3)
    assert torch.equal(target.eval()(items).cls, source.eval()(items).cls)
    with pytest.raises(ValueError, match=r"set the recipe's encoder to PointTransformer with group_size=16$"):
        copy_backbone(clouds(group_size=16), target=clouds(num_points=64))


def test_a_mask_token_and_the_modes_stay() -> None:
    source, target = vit(), vit()
    target.add_mask_token()
    with torch.no_grad():
        target.mask_token.fill_(3.0)
    copy_backbone(source, target=target)
    assert (target.mask_token == 3.0).all()
    assert source.training and target.training


REFUSED = {
    "width": (vit, lambda: vit(embed_dim=48), r"embed_dim 24 where the recipe says 48; set the recipe's encoder to ViT with embed_dim=24$"),
    "depth": (vit, lambda: vit(depth=3), "depth 2 where the recipe says 3"),
    "patch": (vit, lambda: vit(patch_size=16), "patch_size 8x8 where the recipe says 16x16"),
    "channels": (lambda: vit(in_chans=5), vit, "in_chans 5 where the recipe says 3"),
    "heads": (vit, lambda: vit(num_heads=2), r"computes something else with them .*num_heads=3$"),
    "registers": (lambda: vit("vit_small_patch14_reg4_dinov2"), vit, r"unknown \[.*'reg_token'.*name=vit_small_patch14_reg4_dinov2"),
    "activation": (
        vit,
        lambda: vit("vit_base_patch16_clip_quickgelu_224", img_size=32),
        "set the recipe's encoder to ViT with name=vit_tiny",
    ),
    "mean": (lambda: vit(mean=[0.5, 0.4, 0.3]), vit, r"mean \[0.5, 0.4, 0.3\] where"),
    "kind": (lambda: FeatureMap("resnet18", img_size=32), vit, "encoder FeatureMap where the recipe says ViT"),
    "fixed size": (lambda: vit("beit_base_patch16_224"), lambda: vit("beit_base_patch16_224", img_size=48), r"img_size=\[32, 32\]$"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_named_and_nothing_is_copied(what: str) -> None:
    make_source, make_target, message = REFUSED[what]
    target = make_target()
    before = {name: value.clone() for name, value in target.backbone_state().items()}
    with pytest.raises(ValueError, match=message) as caught:
        copy_backbone(make_source(), target=target)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in target.backbone_state().items())
