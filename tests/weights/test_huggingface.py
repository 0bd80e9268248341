"""Folders that transformers opens: its names and shapes, its features, and a reason for every encoder that it has no class for.

Numbers that transformers made are in golden/hf_layouts.json; where it is installed, it is run as well.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exports_stubs import ENCODERS, GOLDEN_SIZES, HUGGINGFACE, difference, images, small
from golden import load
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders import Encoder, FeatureMap, ViT
from glpretrain.weights import export_as, load_backbone_with_report
from glpretrain.weights.exports.huggingface import Features, write_huggingface

# Queries, keys and values by one product or by three, rotations by two formulas: float32 sums in other orders.
TOLERANCE = 1e-5
with_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
ALIKE_AT_EVERY_SIZE = ("Dinov2WithRegistersModel", "DINOv3ViTModel")


def read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", HUGGINGFACE)
def test_names_and_shapes_are_those_of_the_class(kind: str, tmp_path: Path) -> None:
    reference = load("hf_layouts")["kinds"][kind]
    config, weights = read(export_as(HUGGINGFACE[kind](**GOLDEN_SIZES), tmp_path / "out", format="huggingface").folder)
    assert config["architectures"] == [reference["class"]]
    assert {name: list(tensor.shape) for name, tensor in weights.items()} == reference["shapes"]


@pytest.mark.parametrize("kind", HUGGINGFACE)
def test_the_class_has_the_features_of_the_encoder(kind: str, tmp_path: Path) -> None:
    encoder = HUGGINGFACE[kind](**GOLDEN_SIZES)
    exported = export_as(encoder, tmp_path / "out", format="huggingface")
    computed = Features(*read(exported.folder))
    for size, reference in load("hf_layouts")["kinds"][kind]["features"].items():
        items = images(1, 3, int(size), int(size))
        with torch.no_grad():
            outputs = [encoder(items)]
            if items.shape[1:] == encoder.card.item_shape:
                outputs.append(computed(items))
        for output in outputs:
            cls, patches = output.cls, output.patches
            pairs = {"cls": cls[0], "first_patch": patches[0, 0], "last_patch": patches[0, -1], "mean_patch": patches[0].mean(dim=0)}
            for name, tensor in pairs.items():
                worst = (tensor.double() - torch.tensor(reference[name], dtype=torch.float64)).abs().max().item()
                assert worst <= TOLERANCE, f"{name} at {size}: {worst:.1e}"
    assert exported.difference is not None and exported.difference <= TOLERANCE


@pytest.mark.parametrize("kind", HUGGINGFACE)
def test_an_export_is_read_back_with_the_features_of_the_encoder(kind: str, tmp_path: Path) -> None:
    encoder = HUGGINGFACE[kind]()
    again, report = load_backbone_with_report(export_as(encoder, tmp_path / "out", format="huggingface").folder)
    items = images(2, *encoder.card.item_shape)
    with torch.no_grad():
        assert difference(again(items), expected=encoder(items)) <= TOLERANCE
    assert report.full_match and not report.reshaped
    assert (again.card.mean, again.card.std) == (encoder.card.mean, encoder.card.std)


@with_transformers
@pytest.mark.parametrize("kind", HUGGINGFACE)
def test_transformers_gives_the_same_features(kind: str, tmp_path: Path) -> None:
    encoder = HUGGINGFACE[kind]()
    for size in (48, 64):
        model = opened(export_as(encoder, tmp_path / str(size), format="huggingface", img_size=size).folder)
        items = images(2, 3, size, size)
        with torch.no_grad():
            worst = difference(outputs_of(model, items), expected=encoder(items))
        print(f"huggingface, {kind}, exported at {size} px: {worst:.1e}")
        assert worst <= TOLERANCE


@with_transformers
@pytest.mark.parametrize("kind", HUGGINGFACE)
def test_transformers_differs_at_another_size_by_its_resampling_of_positions_only(kind: str, tmp_path: Path) -> None:
    encoder = HUGGINGFACE[kind]()
    exported = export_as(encoder, tmp_path / "out", format="huggingface")
    model = opened(exported.folder)
    items = images(2, 3, 64, 64)
    alike = type(model).__name__ in ALIKE_AT_EVERY_SIZE
    with torch.no_grad():
        expected = encoder(items) if alike else without_antialiasing(encoder, 64)(items)
        options = {"interpolate_pos_encoding": True} if type(model).__name__ == "ViTModel" else {}
        worst = difference(outputs_of(model, items, **options), expected=expected)
    print(f"huggingface, {kind}, exported at 48 px, run at 64 px: {worst:.1e}")
    assert worst <= TOLERANCE
    assert ("in its own way" in exported.note) is not alike


def opened(folder: Path) -> torch.nn.Module:
    transformers = importlib.import_module("transformers")
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def outputs_of(model: torch.nn.Module, items: torch.Tensor, **options: bool) -> EncoderOutput:
    output = model(items, **options)
    grid = items.shape[-1] // 8
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    return EncoderOutput(cls=output.last_hidden_state[:, 0], patches=output.last_hidden_state[:, -grid * grid :])


def without_antialiasing(encoder: ViT, size: int) -> ViT:
    """The encoder made for another size, its positions resampled as ViTModel and Dinov2Model do it."""
    positions = encoder.backbone_state()["pos_embed"]
    count = positions.shape[1] - 36
    maps = positions[:, count:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(size // 8, size // 8), mode="bicubic")
    resized = small(str(encoder.card.arguments["name"]), img_size=size, embed_dim=encoder.embed_dim)
    patches = maps.permute(0, 2, 3, 1).flatten(1, 2)
    resized.load_backbone_state({**encoder.backbone_state(), "pos_embed": torch.cat((positions[:, :count], patches), dim=1)})
    return resized


@with_transformers
def test_its_image_processor_normalises_as_the_card_says(tmp_path: Path) -> None:
    encoder = small("vit_tiny_patch16_224", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    folder = export_as(encoder, tmp_path / "out", format="huggingface").folder
    processor = importlib.import_module("transformers").AutoImageProcessor.from_pretrained(folder)
    pixels = (127.5 + 127.5 * images(48, 48, 3)).to(torch.uint8)
    given = torch.as_tensor(np.asarray(processor(Image.fromarray(pixels.numpy()), return_tensors="np")["pixel_values"]))
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (encoder.card.mean, encoder.card.std))
    expected = (pixels.permute(2, 0, 1).unsqueeze(0) / 255 - mean) / std
    torch.testing.assert_close(given, expected, rtol=0.0, atol=TOLERANCE)


def test_the_preprocessor_holds_size_mean_and_std(tmp_path: Path) -> None:
    encoder = small("vit_tiny_patch16_224", img_size=(24, 40), in_chans=5)
    folder = export_as(encoder, tmp_path / "out", format="huggingface").folder
    values = json.loads((folder / "preprocessor_config.json").read_text())
    assert values["size"] == {"height": 24, "width": 40}
    assert values["image_mean"] == list(encoder.card.mean) and values["image_std"] == list(encoder.card.std)
    config, weights = read(folder)
    assert config["image_size"] == [24, 40] and config["num_channels"] == 5
    assert weights["embeddings.patch_embeddings.projection.weight"].shape[1] == 5


REFUSED: dict[str, tuple[Callable[[], Encoder], str]] = {
    "feature map": (lambda: FeatureMap("resnet18", img_size=64), "cannot hold resnet18: it is not a plain ViT"),
    "no class token": (ENCODERS["no class token, five channels"], "it has no class token"),
    "relative positions": (ENCODERS["relative"], "its positions are neither learned nor DINOv3's"),
    "other rotations": (lambda: small("vit_small_patch16_rope_mixed_224"), "its positions are neither learned nor DINOv3's"),
    "learned and rotary": (lambda: small("eva02_tiny_patch14_224"), "ViTModel has no place for blocks.0.attn.q_bias"),
    "second token": (lambda: small("deit_tiny_distilled_patch16_224"), "ViTModel has no place for dist_token"),
    "norm before": (lambda: small("vit_base_patch16_clip_224"), "ViTModel has no place for norm_pre.weight, norm_pre.bias"),
    "not square": (
        lambda: small("vit_small_patch14_dinov2", img_size=(24, 40)),
        "Dinov2Model takes square positions only, these are for 24 x 40 pixels",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_class_holds_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as refusal:
        export_as(make(), tmp_path / "out", format="huggingface")
    assert "\n" not in str(refusal.value) and "accepted: ViTs with a class token" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def other_epsilon(encoder: ViT) -> None:
    norm = encoder.model.get_submodule("blocks.0.norm1")
    assert isinstance(norm, nn.LayerNorm)
    norm.eps = 1e-3


def other_activation(encoder: ViT) -> None:
    encoder.model.set_submodule("blocks.1.mlp.act", nn.Tanh())


def other_order(encoder: ViT) -> None:
    encoder.model.set_submodule("blocks.0.drop_path1", nn.Tanh())  # no weights, so nothing but the features shows it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_epsilon, r"ViTModel has one epsilon for all norms, it has \[1e-06, 0.001\]"),
        (other_activation, r"ViTModel has GELU where it has Tanh\(\)"),
        (other_order, "ViTModel computes something else from its weights"),
    ],
)
def test_other_mathematics_under_the_same_names_is_refused(change: Callable[[ViT], None], message: str, tmp_path: Path) -> None:
    encoder = small("vit_tiny_patch16_224")
    change(encoder)
    with pytest.raises(ValueError, match=message):
        write_huggingface(encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(48, 80), (16, 64), (32, 128)])  # the last two have as many patches as a square
def test_an_oblong_export_is_read_back_with_its_features_and_size(size: tuple[int, int], tmp_path: Path) -> None:
    encoder = small("vit_tiny_patch16_224", img_size=size)
    again, report = load_backbone_with_report(export_as(encoder, tmp_path / "out", format="huggingface").folder)
    items = images(2, *encoder.card.item_shape)
    with torch.no_grad():
        assert difference(again(items), expected=encoder(items)) <= TOLERANCE
    assert report.full_match and again.card.item_shape == (3, *size)


def test_positions_that_contradict_the_image_size_are_refused(tmp_path: Path) -> None:
    folder = export_as(small("vit_tiny_patch16_224"), tmp_path / "out", format="huggingface").folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_size": 64}))
    with pytest.raises(ValueError, match=r"37 positions in pos_embed; accepted: those of 64 x 64 pixels"):
        load_backbone_with_report(folder)
