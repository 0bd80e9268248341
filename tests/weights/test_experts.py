"""Experts by where their weights are: any backbone, or a clear line."""

from functools import partial
from pathlib import Path

import pytest
import torch
from published import image, reference, write

from glpretrain.encoders import FeatureMap, ViT, fingerprint
from glpretrain.weights import export, load_backbone, load_expert


def small() -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3)


def test_an_exported_backbone_is_an_expert(tmp_path: Path) -> None:
    encoder = small().eval()
    expert = load_expert(str(export(encoder, tmp_path / "backbone")))
    assert expert.fingerprint == fingerprint(encoder) and expert.size == (32, 32)
    items = torch.sin(torch.arange(2 * 3 * 32 * 32.0)).reshape(2, 3, 32, 32)
    assert torch.equal(expert(items, card=encoder.card).cls, encoder(items).cls)


def test_a_feature_map_is_an_expert(tmp_path: Path) -> None:
    expert = load_expert(str(export(FeatureMap("resnet18", img_size=64), tmp_path / "backbone")), size=96)
    seen = expert(torch.zeros(2, 3, 48, 48), card=expert.encoder.card)
    assert expert.grid == (3, 3) and seen.patches.shape == (2, 9, 512) and seen.cls.shape == (2, 512)


@pytest.mark.parametrize("name", ["hf_vit", "dinov2"])
def test_published_weights_are_an_expert_with_the_official_features(name: str, tmp_path: Path) -> None:
    case = reference(name)
    native = tuple(case["native"])
    expert = load_expert(str(write(name, tmp_path / "weights")), size=native)
    seen = expert(image(native), card=expert.encoder.card)
    torch.testing.assert_close(seen.cls[0], torch.tensor(case["at_native"]["cls"]), rtol=0.0, atol=1e-5)


def test_a_timm_model_is_left_untrained_only_when_asked(tmp_path: Path) -> None:
    expert = load_expert("vit_tiny_patch16_224", random_weights=True, size=32, precision="bfloat16")
    assert expert.embed_dim == 192 and expert.grid == (2, 2) and expert.encoder.card.source == "random weights"
    with pytest.raises(ValueError, match=r"load_expert: vit_tiny_patch16_224 does not exist"):
        load_expert("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"load_expert: which, num_heads given; an expert of random weights has no file"):
        load_expert("vit_tiny_patch16_224", random_weights=True, which="student", num_heads=3)


def test_absent_weights_are_one_line_that_says_where_they_come_from() -> None:
    with pytest.raises(ValueError, match=r"^load_expert: weights/uni does not exist; .*licence \(UNI, Phikon, CONCH\)") as caught:
        load_expert("weights/uni")
    assert "\n" not in str(caught.value)


def test_loading_an_expert_draws_nothing_from_the_students_generator(tmp_path: Path) -> None:
    folder = str(export(small(), tmp_path / "backbone"))
    load_backbone(folder)  # whatever is drawn once only
    for load in (partial(load_expert, folder), partial(load_expert, "vit_tiny_patch16_224", random_weights=True)):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        load()
        assert torch.equal(torch.rand(3), expected)
