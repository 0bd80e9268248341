"""Published checkpoints against the official models: the same features at the native size and at another."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from golden import noise
from published import NAMES, image, multicrop, reference, timm_features, weights_of, write
from safetensors.torch import save_file
from timm.models import save_for_hf

from glpretrain.encoders import build_from
from glpretrain.weights import export, load_backbone, load_backbone_with_report

# float32 features of order 1, rounded to nine digits, after two blocks.
TOLERANCE = 1e-5
TITLES = {
    "dino": "DINO (teacher)",
    "ibot": "iBOT (teacher)",
    "mugs": "Mugs (teacher)",
    "mae": "MAE",
    "fsfm": "FSFM",
    "dinov2": "DINOv2",
    "dinov2_registers": "DINOv2",
    "dinov2_gated": "DINOv2 (teacher)",
    "dinov3": "DINOv3",
    "dinov3_gated": "DINOv3",
    "dinov3_keys": "DINOv3",
    "mocov3": "MoCo v3 (teacher)",
    "msn": "MSN (teacher)",
}
TIMM = {
    "timm_vit": ("vit_small_patch16_224", {"embed_dim": 192, "num_heads": 3}),
    "timm_dinov2_registers": ("vit_small_patch14_reg4_dinov2", {"embed_dim": 192, "num_heads": 3, "num_classes": 5}),
    "timm_dinov3": ("vit_small_patch16_dinov3_qkvb", {"num_classes": 5}),
    "timm_dinov3_keys": ("vit_small_patch16_dinov3_qkvb", {"attn_type": "rope"}),
    "timm_without_class_token": ("vit_base_patch16_gap_224", {"embed_dim": 192, "num_heads": 3}),
}


def difference(output, expected):
    """Largest absolute difference to the numbers kept of one image."""
    differences = [output.cls[0] - torch.tensor(expected["cls"])]
    differences += [
        output.patches[0, row, ::4] - torch.tensor(kept) for row, kept in zip(expected["rows"], expected["patches"], strict=True)
    ]
    differences.append(output.patches[0].mean(dim=0)[::4] - torch.tensor(expected["patch_mean"]))
    return max(float(one.abs().max()) for one in differences)


def with_timm_resize(encoder):
    """The same encoder, with positions resized as timm would."""
    other = build_from("ViT", {**encoder.card.arguments, "position_resize": "timm"}).eval()
    other.load_backbone_state(encoder.backbone_state())
    return other


def measure(name, folder):
    """Differences of one format, and the encoder and report."""
    with torch.no_grad():
        if name in TIMM:
            encoder, report, at_native, at_other = _against_timm(name, folder)
            return SimpleNamespace(encoder=encoder, report=report, native=at_native, other=at_other, plain=at_other)
        golden = reference(name)
        encoder, report = load_backbone_with_report(write(name, folder))
        native = difference(encoder(image(golden["native"])), golden["at_native"])
        other = difference(encoder(image(golden["other"])), golden["at_other"])
        plain = difference(with_timm_resize(encoder)(image(golden["other"])), golden["at_other"])
        return SimpleNamespace(encoder=encoder, report=report, native=native, other=other, plain=plain)


def _against_timm(name, folder):
    """A folder as timm writes it, or a file of a state dict; timm itself is the judge."""
    architecture, changes = TIMM[name]
    model_args = {"img_size": 40, "patch_size": 8, "depth": 2, "dynamic_img_size": True, **changes}
    model = timm.create_model(architecture, **model_args).eval()
    model.load_state_dict({key: 0.3 * noise(*tensor.shape, name=key) for key, tensor in model.state_dict().items()})
    if "class_token" in name or name == "timm_vit":
        folder.mkdir()
        save_file(model.state_dict(), folder / "state.safetensors")
        encoder, report = load_backbone_with_report(folder / "state.safetensors")
    else:
        taken = {key: value for key, value in model_args.items() if key != "num_classes"}
        save_for_hf(model, folder, model_args=taken, safe_serialization=True)
        encoder, report = load_backbone_with_report(folder)
    differences = []
    for size in ((40, 40), (56, 24)):
        expected, output = timm_features(model, image(size)), encoder(image(size))
        differences.append(float((expected[:, model.num_prefix_tokens :] - output.patches).abs().max()))
    return encoder, report, *differences


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return {name: measure(name, folder / name) for name in (*NAMES, *TIMM)}


@pytest.mark.parametrize("name", [*NAMES, *TIMM])
def test_features_equal_the_official_models_at_both_sizes(name, measured):
    found = measured[name]
    assert found.report.full_match and not found.report.reshaped
    assert found.native <= TOLERANCE
    assert found.other <= TOLERANCE


def test_the_table_of_formats(measured):
    print(f"\n{'format':<26} {'native size':>12} {'other size':>12} {'timm resize':>12}  at the other size")
    for name, found in measured.items():
        print(f"{name:<26} {found.native:12.1e} {found.other:12.1e} {found.plain:12.1e}")
    # What the card's position_resize is for: timm's own step would be wrong by far more than rounding.
    assert measured["dino"].plain > 100 * TOLERANCE and measured["mae"].plain > 100 * TOLERANCE


@pytest.mark.parametrize("name", TITLES)
def test_the_report_names_format_and_what_was_left_out(name, measured):
    report = measured[name].report
    assert report.title.startswith(f"{TITLES[name]} ")
    assert not (report.missing or report.unused or report.shape_mismatch)
    expected = {
        "mae": "decoder_embed.weight",
        "fsfm": "rep_decoder_embed.weight",
        "mugs": "relation_blocks.0.norm1.weight",
        "ibot": "masked_embed",
        "msn": "fc.fc1.weight",
    }
    if name in expected:
        assert expected[name] in report.left_out
    if name.startswith("dinov"):
        assert "mask_token" in report.left_out
    if name == "mocov3":
        assert {"base_encoder.norm.weight", "predictor.0.weight", "head.0.weight"} <= set(report.left_out)


def test_the_card_says_where_the_weights_come_from_and_how_items_are_normalised(measured):
    for name, found in measured.items():
        card = found.encoder.card
        faces = (0.5482, 0.4234, 0.3655), (0.2789, 0.2439, 0.2349)
        mean, std = faces if name == "fsfm" else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert card.mean == pytest.approx(mean, abs=1e-4) and card.std == pytest.approx(std, abs=1e-4), name
        assert name in card.source or "state.safetensors" in card.source
        assert card.patch_size == (8, 8)
    assert measured["dino"].encoder.card.source == "DINO (teacher), dino.pth"
    assert measured["dino"].encoder.card.item_shape == (3, 40, 40)
    heads = {name: measured[name].encoder.card.arguments["num_heads"] for name in ("dino", "dinov3", "mocov3")}
    assert heads == {"dino": 3, "dinov3": 3, "mocov3": 12}  # the last two are not what the width alone would say


@pytest.mark.parametrize("name", ["dino", "dinov2", "dinov3", "mae", "hf_vit"])
def test_an_export_of_a_published_backbone_gives_the_same_features(name, measured, tmp_path):
    encoder = measured[name].encoder
    again = load_backbone(export(encoder, tmp_path / "out"))
    assert again.card == encoder.card
    for size in (reference(name)["native"], reference(name)["other"]):
        with torch.no_grad():
            assert torch.equal(again(image(size)).patches, encoder(image(size)).patches)


def test_either_side_of_a_checkpoint(tmp_path):
    path = write("dino", tmp_path)
    teacher, student = load_backbone(path), load_backbone(path, which="student")
    assert torch.equal(student.backbone_state()["norm.weight"], 0.5 * teacher.backbone_state()["norm.weight"])
    assert student.card.source == "DINO (student), dino.pth"
    golden, path = reference("mocov3"), write("mocov3", tmp_path)
    with torch.no_grad():
        output = load_backbone(path, which="student")(image(golden["native"]))
    assert float((output.cls[0] - torch.tensor(golden["student_cls_at_native"])).abs().max()) <= TOLERANCE
    torch.save({"teacher": multicrop(weights_of("dino"), loss="dino_loss")["teacher"]}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=r"which='student' given; .*teacher\.pth holds \['teacher'\]"):
        load_backbone(tmp_path / "teacher.pth", which="student")


def test_a_plain_state_dict_is_dinos_as_a_pickle_and_timms_as_safetensors(tmp_path):
    weights = weights_of("dino")
    torch.save(weights, tmp_path / "plain.pth")
    save_file(weights, tmp_path / "plain.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "extracted.pth")
    torch.save({"model": weights}, tmp_path / "model.pth")
    torch.save({"model": {**weights, "head.weight": torch.zeros(5, 192)}}, tmp_path / "deit.pth")
    torch.save({**weights, "head.weight": torch.zeros(5, 192)}, tmp_path / "classifier.pth")
    expected = {"plain.pth": "dino", "plain.safetensors": "timm", "extracted.pth": "dino", "model.pth": "bicubic"}
    expected |= {"deit.pth": "bicubic", "classifier.pth": "timm"}
    assert {name: load_backbone(tmp_path / name).card.arguments["position_resize"] for name in expected} == expected
    assert load_backbone(tmp_path / "deit.pth").card.source == "DeiT, deit.pth"
    assert load_backbone(tmp_path / "plain.pth", format="msn").card.arguments["position_resize"] == "bicubic"


def test_shards_are_read_together(tmp_path):
    folder = write("hf_dinov2", tmp_path / "whole")
    whole = load_backbone(folder)
    weights = weights_of("hf_dinov2")
    names = sorted(weights)
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert torch.equal(load_backbone(folder)(image((40, 40))).patches, whole(image((40, 40))).patches)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_backbone(folder)
    index.write_text(json.dumps({"weight_map": {names[0]: "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"index\.json has no weight_map from tensors to files beside it"):
        load_backbone(folder)


def test_a_folder_of_pickled_weights_is_read_too(tmp_path):
    folder = write("hf_vit", tmp_path / "folder")
    expected = load_backbone(folder)(image((40, 40))).cls
    (folder / "model.safetensors").unlink()
    torch.save(weights_of("hf_vit"), folder / "pytorch_model.bin")
    assert torch.equal(load_backbone(folder)(image((40, 40))).cls, expected)


def test_a_published_checkpoint_is_exported(tmp_path):
    path = write("mae", tmp_path)
    again = load_backbone(export(load_backbone(path), tmp_path / "out", licence="CC-BY-NC-4.0"))
    assert (again.card.source, again.card.licence) == ("MAE, mae.pth", "CC-BY-NC-4.0")
    assert torch.equal(again(image((40, 40))).cls, load_backbone(path)(image((40, 40))).cls)


def test_the_target_of_fsfm_is_recognised_and_its_narrow_model_has_twelve_heads(tmp_path):
    """The official code writes the target to a file of its own: no pixel decoder, no predictor."""
    weights = {name: value for name, value in weights_of("fsfm").items() if not name.startswith(("decoder_", "predictor."))}
    torch.save({"model": weights, "epoch": 1}, tmp_path / "checkpoint-te.pth")
    _, report = load_backbone_with_report(tmp_path / "checkpoint-te.pth")
    assert report.title.startswith("FSFM ") and report.full_match
    wide = {name: torch.zeros([384 if side == 192 else 1152 if side == 576 else 1536 if side == 768 else side for side in value.shape])
            for name, value in weights.items()}  # fmt: skip
    torch.save({"model": wide}, tmp_path / "small.pth")
    assert load_backbone(tmp_path / "small.pth").card.arguments["num_heads"] == 12
