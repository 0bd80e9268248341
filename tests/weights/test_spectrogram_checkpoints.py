"""Published encoders of spectrograms against the official models: ASiT of both years, AST, and AST in Hugging Face transformers."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from golden import load, noise, official_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from glpretrain.core.fbank import RATE, log_mel, num_samples
from glpretrain.core.patches import inputs_of_patches
from glpretrain.encoders import ViT
from glpretrain.weights import export, load_backbone, load_backbone_with_report
from glpretrain.weights.exports import export_as

TOLERANCE = 1e-5  # float32 features of order 1, rounded to nine digits, after two blocks
MEAN, STD = -4.2677393, 2 * 4.5689974


def bank(size: list[int]) -> Tensor:
    """Float[1 1 T F], as the numbers were made with."""
    frames, bins = size
    return 1.7 * noise(1, frames, bins, name=f"filterbank {frames} {bins}").unsqueeze(1)


def write_asit(year: int, path: Path, *, weights: dict[str, Tensor] | None = None) -> Path:
    """A checkpoint as the code of that year saves it; the student has half of the teacher's weights."""
    golden = load(f"import_asit_{year}")
    weights = weights or official_weights(golden["shapes"])
    heads = official_weights(golden["heads"])
    teacher = {f"backbone.{name}": tensor for name, tensor in weights.items()} | heads
    content = {
        "student": {f"module.{name}": 0.5 * tensor for name, tensor in teacher.items()},
        "teacher": teacher,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(model="vit_base", lr=5e-4),
    }
    losses = {"loss_cls": {"center": torch.zeros(1, 7)}, "loss_data": {"center": torch.zeros(1, 5)}}
    content |= losses if year == 2023 else {"CLS_PATCH_loss": {"center": torch.zeros(1, 7), "center2": torch.zeros(1, 1, 7)}}
    torch.save(content, path)
    return path


def write_huggingface(folder: Path, *, prefix: str = "", newer: bool = False) -> Path:
    """A folder as transformers writes it: with a head around it, or under the names of its newer classes."""
    golden = load("import_hf_ast")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(golden["config"]))
    weights = official_weights(golden["shapes"])
    if newer:
        within = {"attention.query": "q_proj", "attention.key": "k_proj", "attention.value": "v_proj", "output.dense": "o_proj"}
        pairs = [("encoder.layer.", "layers."), *((f"attention.{old}", f"attention.{new}") for old, new in within.items())]
        pairs += [("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2")]
        for old, new in pairs:
            weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    weights = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    if prefix:
        weights |= {"classifier.dense.weight": torch.zeros(3, 192), "classifier.layernorm.bias": torch.zeros(192)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def difference(encoder: ViT, size: list[int], expected: dict, *, frequency_first: bool) -> float:
    """Largest absolute difference to the numbers that were kept of one filterbank."""
    with torch.no_grad():
        output = encoder(bank(size))
    patches = output.patches[0]  # [T F D]
    if frequency_first:
        patches = patches.unflatten(0, encoder.grid((1, *size))).transpose(0, 1).flatten(0, 1)
    found = [output.cls[0], patches[expected["rows"], ::4], patches.mean(dim=0)[::4]]
    wanted = [expected[name] for name in ("cls", "patches", "patch_mean")]
    if "distillation" in expected:
        assert output.registers is not None and output.registers.shape[1] == 1
        found, wanted = [*found, output.registers[0, 0]], [*wanted, expected["distillation"]]
    return max(float((one - torch.tensor(other)).abs().max()) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("year", [2023, 2024])
def test_asit_of_both_years_gives_the_official_features(year: int, tmp_path: Path) -> None:
    golden = load(f"import_asit_{year}")
    encoder, report = load_backbone_with_report(write_asit(year, tmp_path / "checkpoint.pth"))
    assert isinstance(encoder, ViT) and report.full_match and report.title.startswith("ASiT (teacher)")
    head = "head_cls.cls_layer.weight_g" if year == 2023 else "head.last_layer.weight_g"
    assert {head, "head_recons.convTrans.weight"} <= set(report.left_out)
    assert difference(encoder, golden["native"], golden["at_native"], frequency_first=False) <= TOLERANCE
    card = encoder.card
    assert (card.modality, card.item_shape, card.patch_size) == ("audio", (1, 48, 128), (16, 16))
    assert card.mean[0] == pytest.approx(MEAN) and card.std[0] == pytest.approx(STD)
    assert card.source == "ASiT (teacher), checkpoint.pth" and "48 frames of 128 bins, as published for 24 patches" in str(report)
    student = load_backbone(tmp_path / "checkpoint.pth", which="student")
    assert torch.equal(student.backbone_state()["norm.weight"], 0.5 * encoder.backbone_state()["norm.weight"])


def test_asits_positions_for_another_length_are_those_of_its_code(tmp_path: Path) -> None:
    golden = load("import_asit_2024")
    path = write_asit(2024, tmp_path / "checkpoint.pth")
    encoder = load_backbone(path)
    assert isinstance(encoder, ViT) and encoder.position_resize == "bicubic"
    assert difference(encoder, golden["other"], golden["at_other"], frequency_first=False) <= TOLERANCE
    resized, report = load_backbone_with_report(path, img_size=golden["other"])
    assert isinstance(resized, ViT) and report.reshaped == ("pos_embed (1, 25, 192) to (1, 41, 192)",)
    assert difference(resized, golden["other"], golden["at_other"], frequency_first=False) <= TOLERANCE


def test_asit_is_known_by_its_head_or_by_name(tmp_path: Path) -> None:
    content = torch.load(write_asit(2024, tmp_path / "whole.pth"), weights_only=False)
    torch.save({"teacher": content["teacher"]}, tmp_path / "teacher.pth")
    weights = official_weights(load("import_asit_2024")["shapes"])
    torch.save(weights, tmp_path / "plain.pth")
    encoders = [load_backbone(tmp_path / "teacher.pth"), load_backbone(tmp_path / "plain.pth", format="asit")]
    assert [encoder.card.modality for encoder in encoders] == ["audio", "audio"]
    weights["pos_embed"] = weights["pos_embed"][:, :-1]
    torch.save(weights, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="24 positions in pos_embed"):
        load_backbone(tmp_path / "wrong.pth", format="asit")


def test_ast_gives_the_official_features_with_time_first(tmp_path: Path) -> None:
    golden = load("import_ast")
    torch.save(official_weights(golden["shapes"]), tmp_path / "audioset.pth")
    encoder, report = load_backbone_with_report(tmp_path / "audioset.pth")
    assert isinstance(encoder, ViT) and report.full_match and report.title.startswith("AST ")
    assert {"mlp_head.0.weight", "v.head_dist.weight"} <= {*report.left_out, *(f"v.{name}" for name in report.left_out)}
    assert encoder.grid((1, 1024, 128)) == (101, 12)
    assert difference(encoder, golden["native"], golden["at_native"], frequency_first=True) <= TOLERANCE
    assert "1024 frames of 128 bins and a patch every 10, as published for 1212 patches" in str(report)
    card = encoder.card
    assert (card.modality, card.item_shape, card.patch_size) == ("audio", (1, 1024, 128), (16, 16))
    assert card.arguments["patch_stride"] == [10, 10] and card.mean[0] == pytest.approx(MEAN)


def test_an_export_of_ast_gives_the_same_features(tmp_path: Path) -> None:
    torch.save(official_weights(load("import_ast")["shapes"]), tmp_path / "audioset.pth")
    encoder = load_backbone(tmp_path / "audioset.pth")
    folder = export(encoder, tmp_path / "out")
    assert not (folder / "config.json").exists()  # no model of timm has patches that overlap
    again = load_backbone(folder)
    assert again.card == encoder.card
    with torch.no_grad():
        assert torch.equal(again(bank([400, 128])).patches, encoder(bank([400, 128])).patches)
    shorter, report = load_backbone_with_report(tmp_path / "audioset.pth", img_size=[400, 128])
    assert shorter.grid((1, 400, 128)) == (39, 12) and report.reshaped == ("pos_embed (1, 1214, 192) to (1, 470, 192)",)
    with pytest.raises(ValueError, match="at least a patch"):
        encoder.grid((1, 400, 8))


@pytest.mark.parametrize("kind", ["plain", "with a head", "newer names"])
def test_hugging_faces_ast_gives_the_official_features(kind: str, tmp_path: Path) -> None:
    golden = load("import_hf_ast")
    prefix = "audio_spectrogram_transformer." if kind == "with a head" else ""
    encoder, report = load_backbone_with_report(write_huggingface(tmp_path / "ast", prefix=prefix, newer=kind == "newer names"))
    assert isinstance(encoder, ViT) and report.full_match
    assert bool(report.left_out) == (kind == "with a head")
    assert encoder.grid((1, 64, 40)) == (10, 7) and encoder.card.modality == "audio"
    assert encoder.card.arguments["patch_stride"] == [6, 5]
    assert difference(encoder, golden["native"], golden["at_native"], frequency_first=True) <= TOLERANCE


def test_a_wrong_configuration_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "ast")
    config = json.loads((folder / "config.json").read_text())
    for name, value, message in (("max_length", "long", "max_length='long' found"), ("time_stride", 7, "positions in pos_embed")):
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=message):
            load_backbone(folder)


def test_a_model_of_transformers_itself_is_opened(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96, "patch_size": 8}
    config = transformers.ASTConfig(**sizes, frequency_stride=4, time_stride=8, max_length=48, num_mel_bins=32)
    model = transformers.ASTModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * noise(*parameter.shape, name=name))
    model.save_pretrained(tmp_path / "ast")
    encoder = load_backbone(tmp_path / "ast")
    with torch.no_grad():
        expected, output = model(bank([48, 32])[:, 0]).last_hidden_state, encoder(bank([48, 32]))
    rows = output.patches.unflatten(1, encoder.grid((1, 48, 32))).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(torch.cat([output.cls[:, None], output.registers, rows], dim=1), expected, rtol=0.0, atol=TOLERANCE)


def test_ast_goes_back_to_hugging_faces_folder_as_it_was(tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "ast")
    written = export_as(load_backbone(source), tmp_path / "out", format="huggingface")
    assert written.difference <= TOLERANCE and "a ASTModel" in written.note
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config, given = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    names = ("max_length", "num_mel_bins", "time_stride", "frequency_stride", "patch_size", "hidden_size", "num_attention_heads")
    assert {name: config[name] for name in names} == {name: given[name] for name in names}
    again = load_backbone(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(bank([64, 40])).patches, load_backbone(source)(bank([64, 40])).patches)


def test_transformers_opens_an_export_of_ast_with_its_filterbanks(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    encoder = load_backbone(write_huggingface(tmp_path / "ast"))
    export_as(encoder, tmp_path / "out", format="huggingface")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected, output = model(bank([64, 40])[:, 0]).last_hidden_state, encoder(bank([64, 40]))
    rows = output.patches.unflatten(1, encoder.grid((1, 64, 40))).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(torch.cat([output.cls[:, None], output.registers, rows], dim=1), expected, rtol=0.0, atol=TOLERANCE)
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    extractor = transformers.ASTFeatureExtractor(**settings)
    wave = noise(num_samples(64), name="wave") * 0.1
    made = extractor(wave.numpy(), sampling_rate=RATE, return_tensors="pt").input_values[0]
    ours = (log_mel(wave, num_bins=40) - encoder.card.mean[0]) / encoder.card.std[0]
    torch.testing.assert_close(made, ours, rtol=0.0, atol=2e-3)


def test_sounds_without_a_distillation_token_become_a_vit_model_without_a_preprocessor(tmp_path: Path) -> None:
    sizes = {"img_size": [32, 16], "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "in_chans": 1}
    encoder = ViT("vit_tiny_patch16_224", **sizes, mean=[-4.0], std=[9.0], modality="audio")
    written = export_as(encoder, tmp_path / "out", format="huggingface")
    assert "takes normalised filterbanks" in written.note and not (tmp_path / "out" / "preprocessor_config.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["ViTModel"] and config["image_size"] == [32, 16] and config["num_channels"] == 1
    images = ViT("deit_tiny_distilled_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="ViTModel has no place for dist_token"):
        export_as(images, tmp_path / "images", format="huggingface")


def test_patches_that_overlap_are_refused_where_they_cannot_be() -> None:
    sizes = {"img_size": [32, 32], "embed_dim": 24, "depth": 1, "num_heads": 3, "in_chans": 1, "modality": "audio"}
    for patch, stride, name, message in (
        (None, [4, 4], "vit_tiny_patch16_224", "patch_size=None"),
        (8, [9, 4], "vit_tiny_patch16_224", "steps of at most a patch"),
        (64, [4, 4], "vit_tiny_patch16_224", "patches of at most the image"),
        (8, [4, 4], "eva02_tiny_patch14_224", "accepts none"),
    ):
        with pytest.raises(ValueError, match=message):
            ViT(name, patch_size=patch, patch_stride=stride, **sizes)


def test_patches_overlap_and_each_input_belongs_to_one_of_them() -> None:
    sizes = {"img_size": [26, 16], "embed_dim": 24, "depth": 1, "num_heads": 3, "in_chans": 1}
    encoder = ViT("vit_tiny_patch16_224", patch_size=8, patch_stride=[6, 8], **sizes)
    assert encoder.grid((1, 26, 16)) == (4, 2) and encoder(bank([26, 16])).patches.shape == (1, 8, 24)
    state = encoder.backbone_state()
    weight, bias = (state[f"patch_embed.proj.{name}"] for name in ("weight", "bias"))
    expected = torch.nn.functional.conv2d(bank([26, 16]), weight, bias, stride=(6, 8))
    torch.testing.assert_close(encoder.model.patch_embed(bank([26, 16])).permute(0, 3, 1, 2), expected)
    owned = torch.stack([inputs_of_patches(token[None], size=(26, 16), grid=(4, 2))[0] for token in torch.eye(8).bool()])  # [N T F]
    assert bool((owned.sum(dim=0) == 1).all()) and owned.sum(dim=(1, 2)).tolist() == [56, 56, 48, 48, 56, 56, 48, 48]
