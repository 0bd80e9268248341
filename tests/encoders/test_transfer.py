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


def spectrograms(**changes) -> ViT:
    sizes = {"img_size": (48, 32), "in_chans": 1, "mean": [-4.0], "std": [9.0], "modality": "audio", "position_resize": "bicubic"}
    return vit(**{**sizes, **changes})


def test_a_backbone_of_images_goes_on_for_spectrograms() -> None:
    """Kernels summed over the colours and positions resized by bicubic interpolation, as main_ASiT.py of 2024 does it."""
    source, target = vit(), spectrograms()
    transfer = copy_backbone(source, target=target)
    assert transfer.summed == 3 and transfer.resized == {"pos_embed": ((4, 4), (6, 4))}
    assert "patch_embed.proj.weight summed over 3 channels, pos_embed resized from 4x4 to 6x4" in str(transfer)
    before, after = source.backbone_state(), target.backbone_state()
    assert torch.equal(after["patch_embed.proj.weight"], before["patch_embed.proj.weight"].sum(dim=1, keepdim=True))
    grid = before["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(6, 4), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(after["pos_embed"], torch.cat([before["pos_embed"][:, :1], resized], dim=1))
    others = before.keys() - {"patch_embed.proj.weight", "pos_embed"}
    assert len(others) == transfer.num_tensors - 2 and all(torch.equal(after[name], before[name]) for name in others)
    # A picture whose colours are equal is one channel to both.
    copy_backbone(source, target=(square := spectrograms(img_size=32)))
    grey = image(2, 1, 32, 32)
    torch.testing.assert_close(square.eval()(grey).patches, source.eval()(grey.expand(-1, 3, -1, -1)).patches, rtol=0.0, atol=1e-5)


def test_what_cannot_go_on_for_another_kind_of_item_is_refused() -> None:
    with pytest.raises(ValueError, match="the backbone has patch_size 16x16 where the recipe says 8x8"):
        copy_backbone(vit(patch_size=16), target=spectrograms())
    with pytest.raises(ValueError, match=r"set the recipe's encoder to ViT with num_heads=2$"):
        copy_backbone(vit(num_heads=2), target=spectrograms())
    two = {"in_chans": 2, "mean": [0.0, 0.0], "std": [1.0, 1.0]}
    with pytest.raises(ValueError, match="kind image where the recipe says audio; accepted: two ViTs, the recipe's with one channel or"):
        copy_backbone(vit(), target=spectrograms(**two))
    with pytest.raises(ValueError, match="items of kind points where the recipe says audio; accepted: two ViTs"):
        copy_backbone(clouds(), target=spectrograms())
    with pytest.raises(ValueError, match=r"the backbone has patch_stride None where the recipe says \[4, 8\]"):
        copy_backbone(spectrograms(), target=spectrograms(patch_stride=[4, 8]))
