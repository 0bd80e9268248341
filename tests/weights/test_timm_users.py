"""What timm's users do with a published model, done with an exported folder; and folders that others publish in timm's layout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import noise
from published import timm_features
from safetensors.torch import load_file
from timm.layers.mlp import SwiGLUPacked
from torch import Tensor, nn

from glpretrain.encoders import Encoder, FeatureMap, ViT
from glpretrain.encoders.timm_model import create_model
from glpretrain.weights import export, load_backbone, load_backbone_with_report


def vit(name: str = "vit_tiny_patch16_224", *, in_chans: int = 3) -> ViT:
    return ViT(name, img_size=32, patch_size=8, in_chans=in_chans, embed_dim=48, depth=3, num_heads=3)


ENCODERS: dict[str, Callable[[], Encoder]] = {
    "ViT": vit,
    "ViT with registers": lambda: vit("vit_small_patch14_reg4_dinov2"),
    "ViT without class token": lambda: vit("vit_medium_patch16_gap_240"),
    "ViT with a pool of its own": lambda: vit("vit_base_patch16_siglip_224"),
    "rotary ViT": lambda: vit("vit_small_patch16_dinov3"),
    "EVA": lambda: vit("eva02_tiny_patch14_224"),
    "BEiT": lambda: vit("beit_base_patch16_224"),
    "relative positions": lambda: vit("vit_relpos_small_patch16_224"),
    "distilled": lambda: vit("deit_tiny_distilled_patch16_224"),
    "ResNet": lambda: FeatureMap("resnet18", img_size=64),
    "ConvNeXt": lambda: FeatureMap("convnext_atto", img_size=64),
    "RegNet": lambda: FeatureMap("regnety_002", img_size=64),
    "Swin": lambda: FeatureMap("swin_tiny_patch4_window7_224", img_size=64),
}


# Of ConvNeXt, RegNet and Swin timm has no small ones; the others differ little from those that are tested with every change.
SLOW = ("ConvNeXt", "RegNet", "Swin", "EVA", "BEiT", "relative positions", "distilled", "ViT with a pool of its own")


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in ENCODERS])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, str]:
    encoder = ENCODERS[request.param]().eval()
    encoder.load_backbone_state(
        {
            name: tensor + 0.02 * noise(*tensor.shape, name=name) if tensor.is_floating_point() else tensor
            for name, tensor in encoder.backbone_state().items()
        }
    )
    return encoder, f"local-dir:{export(encoder, tmp_path_factory.mktemp('export') / 'out')}"


def opened(folder: str, **options: object) -> nn.Module:
    return create_model(folder, pretrained=True, **options).eval()


def pixels(encoder: Encoder, *, channels: int = 3, size: int | None = None) -> Tensor:
    side = encoder.card.item_shape[1] if size is None else size
    return noise(2, channels, side, side, name="pixels")


def features(model: nn.Module, items: Tensor) -> Tensor:
    with torch.no_grad():
        return timm_features(model, items)


def body(encoder: Encoder) -> nn.Module:
    assert isinstance(encoder, ViT | FeatureMap)
    return encoder.model


def test_another_number_of_classes_keeps_the_features_and_the_classifier_sees_one_vector(exported: tuple[Encoder, str]) -> None:
    encoder, folder = exported
    model, items = opened(folder, num_classes=5), pixels(encoder)
    assert torch.equal(features(model, items), features(body(encoder), items))
    assert model(items).shape == (2, 5)
    plain = opened(folder)
    assert plain.num_classes == 0 and plain(items).shape == (2, encoder.embed_dim)
    if not isinstance(encoder, ViT) or encoder.num_prefix_tokens == 1:  # with registers, the mean is over patches in timm too
        with torch.no_grad():
            torch.testing.assert_close(plain(items), encoder(items).cls, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
def test_another_number_of_channels_adapts_the_first_layer(channels: int, exported: tuple[Encoder, str]) -> None:
    encoder, folder = exported
    model = opened(folder, in_chans=channels)
    grey = pixels(encoder, channels=1)
    if channels == 1:  # timm sums the filters, so one grey channel is three equal ones
        expected = features(body(encoder), grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(features(model, grey), expected, rtol=0.0, atol=1e-4)
    assert features(model, grey.expand(-1, channels, -1, -1)).isfinite().all()
    own, given = body(encoder).state_dict(), model.state_dict()
    changed = [name for name, tensor in own.items() if tensor.shape != given[name].shape]
    assert len(changed) == 1  # everything else is what was trained
    assert all(torch.equal(tensor, given[name]) for name, tensor in own.items() if name not in changed)


def test_another_image_size_gives_the_features_of_the_encoder_at_that_size(exported: tuple[Encoder, str]) -> None:
    encoder, folder = exported
    if isinstance(encoder, FeatureMap) and "swin" not in str(encoder.card.arguments["name"]):
        pytest.skip("timm's convolutional models have no img_size")
    size = 2 * encoder.card.item_shape[1]
    model, items = opened(folder, img_size=size), pixels(encoder, size=size)
    if str(encoder.card.arguments["name"]).startswith(("beit", "vit_relpos", "swin")):  # their tables belong to one size
        assert features(model, items).isfinite().all()
    else:
        torch.testing.assert_close(features(model, items), features(body(encoder), items), rtol=0.0, atol=1e-5)


def test_features_only_gives_the_maps_of_the_encoder(exported: tuple[Encoder, str]) -> None:
    encoder, folder = exported
    if "relpos" in str(encoder.card.arguments["name"]):
        pytest.skip("timm's own models with relative positions have no features_only")
    model, items = opened(folder, features_only=True), pixels(encoder)
    with torch.no_grad():
        maps, output = model(items), encoder(items)
    last = maps[-1] if maps[-1].shape[1] == encoder.embed_dim else maps[-1].permute(0, 3, 1, 2)
    assert last.shape == (2, encoder.embed_dim, *encoder.grid(items.shape[1:]))
    if isinstance(encoder, FeatureMap) and "convnext" in str(encoder.card.arguments["name"]):
        torch.testing.assert_close(last.flatten(2).transpose(1, 2), output.patches, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("pool", ["", "avg", "token"])
def test_the_pooling_can_be_chosen(pool: str, exported: tuple[Encoder, str]) -> None:
    encoder, folder = exported
    has_token = isinstance(encoder, ViT) and encoder.model.cls_token is not None
    if (pool == "token" and not has_token) or "distilled" in str(encoder.card.arguments["name"]):
        pytest.skip("timm refuses this pooling for its own model too")
    if pool == "avg" and str(encoder.card.arguments["name"]).startswith("beit"):
        pytest.skip("timm's BEiT moves the norm behind the mean, where these weights have none")
    model, items = opened(folder, global_pool=pool), pixels(encoder)
    with torch.no_grad():
        output = model(items)
        tokens = encoder(items)
    assert torch.equal(features(model, items), features(body(encoder), items))
    if pool == "":
        assert output.dim() > 2
    else:
        # The norm of a convolutional model stands behind its pool.
        expected = tokens.cls if pool == "token" or isinstance(encoder, FeatureMap) else tokens.patches.mean(dim=1)
        torch.testing.assert_close(output, expected, rtol=0.0, atol=1e-5)


def test_an_export_of_other_channels_is_opened_as_it_is(tmp_path: Path) -> None:
    for channels in (1, 5):
        encoder = vit(in_chans=channels).eval()
        model = opened(f"local-dir:{export(encoder, tmp_path / str(channels))}", num_classes=2)
        items = pixels(encoder, channels=channels)
        assert torch.equal(features(model, items), features(encoder.model, items))


SIZES = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
GATED = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.33334, "init_values": 1e-5}
HUBS: dict[str, tuple[str, dict, dict]] = {
    "UNI": ("vit_large_patch16_224", {"init_values": 1e-5, "dynamic_img_size": True}, {}),
    "GigaPath": ("vit_giant_patch14_dinov2", {"init_values": 1e-5, "mlp_ratio": 5.33334, "patch_size": 16, "global_pool": "token"}, {}),
    "H-optimus-0": ("vit_giant_patch14_reg4_dinov2", {"init_values": 1e-5, "patch_size": 8, "dynamic_img_size": False}, {}),
    "Virchow": (
        "vit_huge_patch14_224",
        {"init_values": 1e-5, "mlp_ratio": 5.3375, "patch_size": 8, "dynamic_img_size": True},
        {**GATED, "mlp_ratio": 5.3375},
    ),
    "Virchow2": (
        "vit_huge_patch14_224", {"init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375, "patch_size": 8, "global_pool": ""},
        {**GATED, "mlp_ratio": 5.3375},
    ),
    "UNI2": (
        "vit_giant_patch14_224",
        {"init_values": 1e-5, "reg_tokens": 8, "no_embed_class": True, "patch_size": 8, "mlp_ratio": 5.33334, "dynamic_img_size": True,
         "mlp_layer": "timm.layers.SwiGLUPacked", "act_layer": "torch.nn.SiLU"},
        GATED,
    ),
    "registers in a plain ViT": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True, "patch_size": 8}, {}),
    "registers of DINOv3": ("vit_small_patch16_dinov3", {"num_reg_tokens": 2, "patch_size": 8, "global_pool": "token"}, {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"init_values": 1e-5, "patch_size": 8}, {}),
    "BEiT": ("beit_base_patch16_224", {"init_values": 1e-5, "patch_size": 8, "global_pool": "token"}, {}),
}  # fmt: skip


def hub(folder: Path, name: str) -> nn.Module:
    """Write a folder as a hub has it, and return timm's model with what its authors' code adds."""
    architecture, said, added = HUBS[name]
    model = create_model(architecture, **{**SIZES, **said, **added}).eval()
    model.load_state_dict({key: 0.3 * noise(*t.shape, name=key) if t.is_floating_point() else t for key, t in model.state_dict().items()})
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config = {"architecture": architecture, "num_classes": 0, "num_features": 48, "model_args": {**SIZES, **said}}
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": 0, "first_conv": "patch_embed.proj"}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pretrained}))
    return model


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in ("Virchow", "Virchow2") else ()) for name in HUBS])
def test_a_folder_as_it_is_published_has_the_features_of_timms_model(name: str, tmp_path: Path) -> None:
    model = hub(tmp_path / "hub", name)
    encoder, report = load_backbone_with_report(tmp_path / "hub")
    assert isinstance(encoder, ViT) and report.full_match and encoder.card.std == (0.25,) * 3
    again = load_backbone(export(encoder, tmp_path / "again"))
    expected = features(model, noise(2, 3, 32, 32, name="pixels"))
    for read in (encoder, again):
        with torch.no_grad():
            output = read(noise(2, 3, 32, 32, name="pixels"))
        assert torch.equal(output.patches, expected[:, encoder.num_prefix_tokens :])
        assert torch.equal(output.cls, expected[:, 0])
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == model.state_dict().keys()


def test_layers_that_contradict_the_weights_are_refused(tmp_path: Path) -> None:
    hub(tmp_path / "hub", "UNI2")
    path = tmp_path / "hub" / "config.json"
    config = json.loads(path.read_text())
    for layer, value, accepted in (("act_layer", "torch.nn.GELU", "SiLU, silu"), ("mlp_layer", "timm.layers.GluMlp", "SwiGLUPacked")):
        path.write_text(json.dumps({**config, "model_args": {**config["model_args"], layer: value}}))
        with pytest.raises(ValueError, match=f"{layer}='{value.rpartition('.')[2]}' given; accepted for these weights: {accepted}"):
            load_backbone(tmp_path / "hub")
