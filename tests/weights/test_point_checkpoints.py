"""Published files of point transformers, in the layouts in which their authors save them."""

from pathlib import Path

import pytest
import torch
from golden import assert_matches, load, noise, official_weights
from torch import Tensor

from glpretrain.encoders import PointTransformer
from glpretrain.weights import export, load_backbone, load_backbone_with_report
from glpretrain.weights.report import Which


def written(folder: Path, content: object) -> Path:
    path = folder / "checkpoint.pth"
    torch.save(content, path)
    return path


def weights(name: str, *, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in official_weights(load(name)["shapes"]).items()}


def test_a_pretraining_checkpoint_of_point_mae_gives_its_encoder(tmp_path: Path) -> None:
    path = written(tmp_path, {"base_model": weights("point_mae", prefix="module."), "epoch": 300})
    encoder, report = load_backbone_with_report(path, num_heads=3)
    assert report.full_match and encoder.card.arguments["name"] == "point_mae" and encoder.num_prefix_tokens == 0
    assert any(name.startswith("MAE_decoder.") for name in report.left_out) and "mask_token" in report.left_out
    # What the file does not say was small in the reference.
    small = PointTransformer(
        "point_mae", num_points=40, points_per_token=4, group_size=6, embed_dim=24, depth=2, num_heads=3, class_token=False
    ).eval()
    small.load_backbone_state(encoder.backbone_state())
    with torch.no_grad():
        assert_matches(small(noise(3, 40, 3, name="points")).patches, load("point_mae")["features"], atol=1e-5)


def test_a_classifier_of_point_mae_brings_its_class_token(tmp_path: Path) -> None:
    encoder, report = load_backbone_with_report(written(tmp_path, {"base_model": weights("point_mae_classifier")}), num_heads=3)
    assert report.full_match and encoder.num_prefix_tokens == 1
    assert all(name.startswith("cls_head_finetune.") for name in report.left_out)


def test_point_bert_brings_its_wider_projection(tmp_path: Path) -> None:
    state = weights("point_mae_classifier", prefix="transformer_q.")
    state = {name: tensor for name, tensor in state.items() if "cls_head_finetune" not in name}
    state["transformer_q.encoder.second_conv.3.weight"] = noise(16, 512, 1, name="w")
    state["transformer_q.encoder.second_conv.3.bias"] = noise(16, name="b")
    state |= {"transformer_q.reduce_dim.weight": noise(24, 16, name="r"), "transformer_q.reduce_dim.bias": noise(24, name="rb")}
    state |= {"transformer_q.lm_head.weight": noise(7, 24, name="l"), "dvae.codebook": noise(7, 3, name="c")}
    path = written(tmp_path, {"base_model": state})
    with pytest.raises(ValueError, match=r"tokens\.second\.3\.weight has shape"):  # 256 wide in every published file
        load_backbone_with_report(path, num_heads=3)
    encoder, report = load_backbone_with_report(path, num_heads=3, strict=False)
    assert report.title.startswith("Point-BERT (student)") and encoder.card.arguments["name"] == "point_bert"


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_both_sides_of_pos_bert(side: Which, tmp_path: Path) -> None:
    teacher = weights("pos_bert", prefix="backbone.")
    student = {f"module.{name}": 2.0 * tensor for name, tensor in teacher.items()}
    path = written(tmp_path, {"teacher": {**teacher, "head.mlp.0.weight": noise(3, 24, name="h")}, "student": student})
    encoder, report = load_backbone_with_report(path, which=side, num_heads=3)
    assert report.full_match and f"POS-BERT ({side})" in report.title
    expected = teacher["backbone.norm.weight"] * (2.0 if side == "student" else 1.0)
    assert torch.equal(encoder.backbone_state()["norm.weight"], expected)


def test_an_exported_folder_gives_the_same_features(tmp_path: Path) -> None:
    encoder = PointTransformer("point_bert", num_points=64, embed_dim=24, depth=1, num_heads=3, group_size=8).eval()
    export(encoder, tmp_path / "out", licence="MIT")
    loaded = load_backbone(tmp_path / "out")
    points = noise(2, 64, 3, name="points")
    assert torch.equal(loaded(points).cls, encoder(points).cls) and loaded.card.licence == "MIT"


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, {"base_model": weights("point_mae")})
    with pytest.raises(ValueError, match=r"24 wide, none of the published .* give num_heads"):
        load_backbone(path)
    with pytest.raises(ValueError, match="which='student' given"):
        load_backbone(path, which="student", num_heads=3)
    with pytest.raises(ValueError, match=r"name='vit_small_patch16_224' given; .* \(Point-MAE\) accepts num_heads"):
        load_backbone(path, name="vit_small_patch16_224", num_heads=3)
