"""CONCH's image tower against its own code, as a backbone and as an expert of which only `cls` is asked."""

from pathlib import Path

import pytest
import torch
from golden import load, official_weights
from published import image

from glpretrain.encoders import PooledViT, ViT
from glpretrain.weights import export, load_backbone, load_backbone_with_report, load_expert

OFFICIAL = load("import_conch")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    texts = {"text.cls_emb": torch.ones(3), "logit_scale": torch.tensor(0.5)}
    torch.save({**official_weights(OFFICIAL["shapes"]), **texts}, tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize("key", ["native", "other"])
def test_pooled_features_are_the_official_ones_at_two_sizes(key: str, path: Path) -> None:
    encoder, report = load_backbone_with_report(path, num_heads=3)
    assert report.full_match and encoder.card.mean == (0.48145466, 0.4578275, 0.40821073)
    assert "logit_scale" in report.left_out and any("attn_pool_caption" in name for name in report.left_out)
    with torch.no_grad():
        output = encoder(image(OFFICIAL[key]))
    torch.testing.assert_close(output.cls[0], torch.tensor(OFFICIAL[f"at_{key}"]["cls"]), rtol=0.0, atol=1e-5)
    assert output.patches.shape[1:] == ((25 if key == "native" else 21), 32)


def test_a_patch_is_what_the_pool_gives_when_it_sees_nothing_else(path: Path) -> None:
    encoder = load_backbone(path, num_heads=3)
    assert isinstance(encoder, PooledViT)
    tokens = image((40, 40)).reshape(1, 100, 48)[:, :7]
    together = encoder.ln_contrast(encoder.attn_pool_contrast(tokens)[1])
    alone = torch.stack([encoder.ln_contrast(encoder.attn_pool_contrast(tokens[:, i : i + 1])[0]) for i in range(7)], dim=1)
    torch.testing.assert_close(together, alone)


def test_it_is_an_expert_and_survives_its_export(path: Path, tmp_path: Path) -> None:
    expert = load_expert(str(path), num_heads=3)
    encoder = load_backbone(export(expert.encoder, tmp_path / "exported"))
    assert torch.equal(encoder(image((40, 40))).cls, expert(image((40, 40)), card=expert.encoder.card).cls)


def test_every_parameter_learns_and_the_state_knows_no_mask_token() -> None:
    encoder = PooledViT("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3, pool_dim=16, pool_heads=2)
    encoder.add_mask_token()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 3] = True
    outputs = encoder([image((32, 32)).expand(2, -1, -1, -1)], mask=[mask])
    (outputs[0].cls.square().sum() + outputs[0].patches.sum()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert {encoder.layer_of(name) for name, _ in encoder.named_parameters()} == {0, 1, 2}
    state = {name: 2.0 * tensor for name, tensor in encoder.backbone_state().items()}
    assert not [name for name in state if "mask" in name]
    encoder.load_backbone_state(state)
    assert torch.equal(encoder.backbone_state()["trunk.norm.weight"], state["trunk.norm.weight"])


def test_what_does_not_fit_is_named(path: Path) -> None:
    with pytest.raises(ValueError, match=r"format='timm' given; .* \(CONCH\) accepts name, num_heads"):
        load_backbone(path, format="timm", num_heads=3)
    with pytest.raises(ValueError, match="accepted: a ViT with a class token and no registers"):
        PooledViT("vit_small_patch14_reg4_dinov2", img_size=28, depth=1)
    with pytest.raises(ValueError, match="pool_dim=10 does not divide into pool_heads=8"):
        PooledViT("vit_tiny_patch16_224", img_size=32, depth=1, pool_dim=10)
    assert not isinstance(load_backbone(path, num_heads=3), ViT)
