"""What the loader does with files that are wrong, incomplete or hostile, and with other channels and sizes."""

import json
import os
import re
import zipfile

import pytest
import timm
import torch
from golden import noise
from published import image, multicrop, reference, timm_features, weights_of, write
from safetensors.torch import save_file
from timm.models import save_for_hf

from glpretrain.cli import main
from glpretrain.encoders import FeatureMap, ViT
from glpretrain.weights import export, load_backbone, load_backbone_with_report
from glpretrain.weights.report import Which


def saved(content, path):
    torch.save(content, path)
    return path


def refusal(x, **options):
    """The message with which something is refused, one line long."""
    with pytest.raises(ValueError, match=r"^load_backbone: ") as caught:
        load_backbone(x, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class _Trap:
    """Unpickling this runs a command that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["alone", "among weights", "as arguments"])
def test_code_in_a_pickle_is_refused_and_not_run(place, tmp_path):
    trap, sprung = _Trap(tmp_path / "sprung"), tmp_path / "sprung"
    content = {
        "alone": trap,
        "among weights": {**weights_of("dino"), "norm.weight": trap},
        "as arguments": {**multicrop(weights_of("dino"), loss="dino_loss"), "args": trap},
    }[place]
    message = refusal(saved(content, tmp_path / "bad.pth"))
    assert f"it asks for {os.system.__module__}.system, which is code" in message and "nothing was run" in message
    assert not sprung.exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)  # the trap is armed: whoever does run code springs it
    assert sprung.exists()


def test_objects_that_training_leaves_behind_are_never_built(tmp_path, monkeypatch):
    path = saved(multicrop(weights_of("dino"), loss="dino_loss"), tmp_path / "full.pth")
    monkeypatch.setattr("argparse.Namespace.__init__", lambda *args, **values: pytest.fail("a Namespace was built"))
    monkeypatch.setattr("argparse.Namespace.__setattr__", lambda *args: pytest.fail("a Namespace was filled"))
    assert load_backbone(path).embed_dim == weights_of("dino")["cls_token"].shape[-1]


@pytest.mark.parametrize("name", ["dino", "dinov3", "mae", "hf_dinov2"])
def test_a_renamed_key_is_named(name, tmp_path):
    weights = weights_of(name)
    old = "encoder.layer.1.norm2.weight" if name.startswith("hf") else "blocks.1.norm2.weight"
    weights[old.replace("norm2", "norm_2")] = weights.pop(old)
    message = refusal(write(name, tmp_path, weights=weights))
    assert "missing ['blocks.1.norm2.weight']" in message and old.replace("norm2", "norm_2") in message


def test_a_renamed_part_of_what_timm_keeps_in_one_is_named(tmp_path):
    weights = weights_of("hf_vit")
    weights["encoder.layer.1.attention.attention.q.weight"] = weights.pop("encoder.layer.1.attention.attention.query.weight")
    message = refusal(write("hf_vit", tmp_path, weights=weights))
    assert "missing ['blocks.1.attn.qkv.weight']" in message and "encoder.layer.1.attention.attention.q.weight" in message


def test_a_wrong_width_is_named(tmp_path):
    weights = weights_of("mae")
    weights["blocks.1.attn.proj.weight"] = torch.zeros(192, 184)
    assert "blocks.1.attn.proj.weight has shape (192, 184), accepted (192, 192)" in refusal(write("mae", tmp_path, weights=weights))
    weights["patch_embed.proj.weight"] = torch.zeros(200, 3, 8, 8)
    assert "is 200 wide, none of the published [192, 384," in refusal(write("mae", tmp_path, weights=weights))
    message = refusal(write("mae", tmp_path, weights=weights), num_heads=4)
    assert "blocks.0.attn.proj.bias has shape (192,), accepted (200,)" in message and " more" in message


@pytest.mark.parametrize("name", ["dino", "hf_dinov2"])
def test_a_file_cut_short_is_refused(name, tmp_path):
    path = write(name, tmp_path)
    file = path / "model.safetensors" if path.is_dir() else path
    whole = file.read_bytes()
    for length in (0, 7, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "cut short" in refusal(path) or "not a complete safetensors file" in refusal(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_bytes_are_refused_in_one_line(tmp_path):
    small = {name: tensor for name, tensor in weights_of("dino").items() if tensor.numel() < 1000}
    path = saved(multicrop(small, loss="dino_loss"), tmp_path / "damaged.pth")
    whole = path.read_bytes()
    for position in range(0, 6000, 61):  # the structure and the names come first
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x15]) + whole[position + 1 :])
        assert "\n" not in refusal(path)  # for the damage or for the lack of large tensors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(2)}, r"of no known format; it holds \['weight'\]"),
        ({"epoch": 3, "arch": "resnet50"}, r"of no known format; it holds \['arch', 'epoch'\]"),
        ([torch.zeros(2)], "holds a list; accepted: a dictionary of tensors"),
        ({"state_dict": {"module.conv1.weight": torch.zeros(2, 3, 7, 7)}}, r"of no known format; it holds \['conv1.weight'\]"),
        ({"vit.embeddings.cls_token": torch.zeros(1, 1, 2)}, r"of no known format; .*; give the folder with its config\.json"),
    ],
)
def test_an_unknown_format_is_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_backbone(saved(content, tmp_path / "file.pth"))


def test_settings_are_checked_and_never_ignored(tmp_path):
    path = write("dino", tmp_path)
    assert "which='both' given; accepted: teacher, student" in refusal(path, which="both")
    assert "unknown arguments image_size given; accepted: which, in_chans, img_size," in refusal(path, image_size=32)
    assert "which='student' given" in refusal(write("mae", tmp_path), which="student")
    assert "format='DINO' given; accepted: dino, ibot," in refusal(path, format="DINO")
    assert "refuses to build vit_base_patch16_224" in refusal(path, num_heads=5)
    assert "mean has 2 values; accepted: 3" in refusal(path, mean=(0.5, 0.5))
    assert "nearest accepted: [56, 64]" in refusal(path, img_size=57)
    assert "in_chans=0 given for ViT; accepted: at least 1" in refusal(path, in_chans=0)
    folder = export(load_backbone(path), tmp_path / "out")
    assert "format='dino', num_heads=3 given" in refusal(folder, format="dino", num_heads=3)
    assert load_backbone(path, mean=(0.1, 0.2, 0.3)).card.mean == (0.1, 0.2, 0.3)


def test_what_a_configuration_cannot_mean_here_is_refused(tmp_path):
    folder = write("hf_vit", tmp_path / "hf")
    config = reference("hf_vit")["config"]
    for change, message in (
        ({"model_type": "swin"}, "model_type='swin' given; accepted: vit, vit_mae"),
        ({"hidden_act": "relu"}, "hidden_act='relu' given; accepted: gelu"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert message in refusal(folder)
    for values, message in (
        ({"architecture": "vgg11"}, "name='vgg11' given; accepted: models of timm's vision_transformer"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"qk_norm": True}}, "model_args ['qk_norm'] given"),
    ):
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError) as caught:
            load_backbone(folder)
        assert message in str(caught.value)


def test_an_architecture_that_timm_has_not_is_refused(tmp_path):
    registers = weights_of("dinov2_registers")
    registers["register_tokens"] = torch.zeros(1, 3, 192)
    assert "no timm model is known with class token True, 3 registers" in refusal(saved(registers, tmp_path / "registers.pth"))
    built = weights_of("dinov3")
    built["blocks.1.attn.qkv.bias_mask"] = torch.full((576,), torch.nan)  # as the official layer has it until it is initialised
    assert "blocks.1.attn.qkv.bias, or its mask, is not finite" in refusal(saved(built, tmp_path / "built.pth"))
    oblong = weights_of("dino")
    oblong["pos_embed"] = torch.zeros(1, 1 + 5 * 4, 192)
    assert "21 positions in pos_embed; accepted: a square grid" in refusal(saved(oblong, tmp_path / "oblong.pth"))


def test_without_strictness_what_does_not_fit_stays_fresh_and_is_listed(tmp_path):
    weights = weights_of("dino")
    weights["extra"] = torch.zeros(1)
    weights["norm.weight"] = torch.zeros(7)
    del weights["norm.bias"]
    encoder, report = load_backbone_with_report(saved(weights, tmp_path / "file.pth"), strict=False)
    assert (report.missing, report.unused) == (("norm.bias",), ("extra",))
    assert report.shape_mismatch == ("norm.weight has shape (7,), accepted (192,)",) and not report.full_match
    assert torch.equal(encoder.backbone_state()["norm.weight"], torch.ones(192))
    assert torch.equal(encoder.backbone_state()["cls_token"], weights["cls_token"])


def test_a_width_that_nobody_published_needs_its_heads(tmp_path):
    encoder = ViT("vit_tiny_patch16_224", img_size=24, patch_size=8, embed_dim=48, depth=2, num_heads=4).eval()
    path = saved(encoder.backbone_state(), tmp_path / "narrow.pth")
    assert "is 48 wide, none of the published" in refusal(path)
    again = load_backbone(path, num_heads=4)
    assert torch.equal(again(image((24, 24))).patches, encoder(image((24, 24))).patches)


def test_queries_keys_and_values_without_bias_get_zeros(tmp_path):
    weights = {name: tensor for name, tensor in weights_of("dino").items() if not name.endswith("qkv.bias")}
    encoder, report = load_backbone_with_report(saved(weights, tmp_path / "file.pth"))
    assert not encoder.backbone_state()["blocks.1.attn.qkv.bias"].any()
    assert any("zeros for the biases" in text for text in report.assumed)


def test_an_architecture_can_be_given_by_name(tmp_path):
    model = timm.create_model("deit3_small_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3).eval()
    path = tmp_path / "deit3.safetensors"
    save_file(model.state_dict(), path)
    encoder = load_backbone(path, name="deit3_small_patch16_224")
    assert torch.equal(encoder(image((32, 32))).cls, timm_features(model, image((32, 32)))[:, 0])


def test_a_timm_folder_of_a_convolutional_model(tmp_path):
    model = timm.create_model("resnet18", num_classes=4).eval()
    save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    encoder, report = load_backbone_with_report(tmp_path / "folder")
    assert isinstance(encoder, FeatureMap) and report.left_out == ("fc.bias", "fc.weight")
    expected = timm_features(model, image((64, 64))).flatten(2).transpose(1, 2)
    assert torch.equal(encoder(image((64, 64))).patches, expected)
    assert "in_chans=1 given for FeatureMap" in refusal(tmp_path / "folder", in_chans=1)


def test_what_was_loaded_is_logged_and_nothing_is_printed(tmp_path, capsys, caplog):
    with caplog.at_level("INFO", logger="glpretrain.weights.load"):
        load_backbone(write("mae", tmp_path), in_chans=1)
    assert not any(capsys.readouterr())
    out = caplog.messages[0]
    assert out.startswith("MAE ") and "vit_base_patch16_224, 192 wide, 2 deep" in out
    assert "28 matched, 2 reshaped, 0 missing, 0 shape_mismatch, 0 unused, 20 left out; 3 heads, as published at width 192" in out
    assert "patch_embed.proj.weight (192, 3, 8, 8) to (192, 1, 8, 8)" in caplog.text and "decoder_pred.bias" in caplog.text


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("name", ["dino", "dinov3", "hf_dinov2"])
def test_a_grey_image_keeps_its_features_with_other_channels(name, channels, tmp_path):
    path = write(name, tmp_path)
    grey = 0.5 + 0.5 * noise(1, 1, 40, 40, name="grey")  # pixels in [0, 1]
    outputs = []
    for encoder in (load_backbone(path), load_backbone(path, in_chans=channels)):
        mean, std = (torch.tensor(values)[:, None, None] for values in (encoder.card.mean, encoder.card.std))
        with torch.no_grad():
            outputs.append(encoder((grey - mean) / std))
    assert encoder.card.item_shape[0] == channels and len(encoder.card.mean) == channels
    assert float((outputs[0].cls - outputs[1].cls).abs().max()) < 1e-5
    assert float((outputs[0].patches - outputs[1].patches).abs().max()) < 1e-5


def test_other_channels_of_an_exported_backbone_and_back(tmp_path):
    encoder = load_backbone(write("mae", tmp_path))
    folder = export(load_backbone(export(encoder, tmp_path / "three"), in_chans=4), tmp_path / "four")
    again = load_backbone(folder, in_chans=3, mean=encoder.card.mean, std=encoder.card.std)
    grey = (0.3 - torch.tensor(encoder.card.mean)[:, None, None]) / torch.tensor(encoder.card.std)[:, None, None]
    items = grey.expand(1, 3, 40, 40)
    with torch.no_grad():
        assert float((again(items).cls - encoder(items).cls).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["dino", "mae", "dinov2_registers", "hf_dinov2"])
def test_another_size_resizes_the_positions_as_the_official_code_does(name, tmp_path):
    golden = reference(name)
    encoder, report = load_backbone_with_report(write(name, tmp_path), img_size=golden["other"])
    assert encoder.card.item_shape == (3, *golden["other"]) and len(report.reshaped) == 1
    assert report.reshaped[0].startswith("pos_embed ")
    with torch.no_grad():
        output = encoder(image(golden["other"]))
    assert float((output.cls[0] - torch.tensor(golden["at_other"]["cls"])).abs().max()) < 1e-5


def test_another_size_of_an_exported_backbone(tmp_path):
    encoder = load_backbone(write("dino", tmp_path))
    again = load_backbone(export(encoder, tmp_path / "out"), img_size=(56, 24))
    with torch.no_grad():
        assert torch.allclose(again(image((56, 24))).patches, encoder(image((56, 24))).patches, atol=1e-6)


def test_rotary_positions_need_no_resizing_and_keep_the_files_rounded_periods(tmp_path):
    encoder, report = load_backbone_with_report(write("dinov3", tmp_path), img_size=64)
    assert not report.reshaped and encoder.card.item_shape == (3, 64, 64)
    assert encoder.card.arguments["rope_periods"] == weights_of("dinov3")["rope_embed.periods"].tolist()
    plain = ViT(**{**encoder.card.arguments, "rope_periods": None}).eval()
    plain.load_backbone_state(encoder.backbone_state())
    with torch.no_grad():
        assert float((plain(image((64, 64))).cls - encoder(image((64, 64))).cls).abs().max()) > 1e-4


def test_satellite_statistics_go_by_the_files_name(tmp_path):
    path = saved(weights_of("dinov3"), tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    assert load_backbone(path).card.mean == (0.430, 0.411, 0.296)


def test_either_side_of_a_checkpoint_of_a_training_run(tmp_path):
    sides = {}
    for prefix in ("student.encoder.", "teacher.branch.encoder."):
        encoder = ViT("vit_tiny_patch16_224", img_size=24, patch_size=8, embed_dim=48, depth=2, num_heads=3).eval()
        encoder.add_mask_token()
        sides[prefix] = encoder
    state = {f"{prefix}{name}": tensor for prefix, side in sides.items() for name, tensor in side.state_dict().items()}
    content = {"encoder_card": encoder.card.to_json(), "state_dict": state, "method": "DINO", "global_step": 3}
    path = saved(content, tmp_path / "last.ckpt")
    prefixes: dict[Which, str] = {"student": "student.encoder.", "teacher": "teacher.branch.encoder."}
    for which, prefix in prefixes.items():
        loaded, report = load_backbone_with_report(path, which=which)
        assert torch.equal(loaded(image((24, 24))).patches, sides[prefix](image((24, 24))).patches)
        assert report.title.startswith(f"checkpoint ({which}) ") and "mask_token" in report.left_out
        assert loaded.card.source == "DINO, 3 steps"
    only = {name: tensor for name, tensor in state.items() if name.startswith("teacher")}
    saved(content | {"state_dict": only}, path)
    assert r"no tensor starts with student.encoder." in refusal(path, which="student")


def test_the_command_exports_a_published_checkpoint(tmp_path, capsys):
    path = write("dino", tmp_path)
    assert main(["export", str(path), str(tmp_path / "out"), "--which", "student"]) == 0
    assert load_backbone(tmp_path / "out").card.source == "DINO (student), dino.pth"
    assert main(["export", str(tmp_path / "none.pth"), str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_from_before_torch_1_6_is_read_and_runs_no_code(tmp_path):
    weights = weights_of("dino")
    torch.save(weights, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    state = load_backbone(tmp_path / "legacy.pth").backbone_state()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in state.items())
    torch.save({**weights, "args": _Trap(tmp_path / "sprung")}, tmp_path / "bad.pth", _use_new_zipfile_serialization=False)
    assert "which is code" in refusal(tmp_path / "bad.pth") and not (tmp_path / "sprung").exists()
    whole = (tmp_path / "legacy.pth").read_bytes()
    for length in (20, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        assert "cannot be read as a checkpoint" in refusal(tmp_path / "cut.pth")


def test_a_checkpoint_that_would_unpack_into_more_than_the_file_holds_is_refused(tmp_path):
    path = saved({"weight": torch.zeros(100_000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "it is compressed, which torch.save never does" in refusal(tmp_path / "bomb.pth")
    whole = bytearray(path.read_bytes())
    for at in [found.start() for found in re.finditer(b"PK\x01\x02", whole)]:  # sizes in the table of contents
        if int.from_bytes(whole[at + 24 : at + 28], "little") == 400_000:
            whole[at + 20 : at + 28] = (2 * 10**9).to_bytes(4, "little") * 2
    (tmp_path / "sizes.pth").write_bytes(whole)
    assert "it announces 2000" in refusal(tmp_path / "sizes.pth")


def test_a_tensor_with_more_numbers_than_its_storage_takes_no_memory(tmp_path):
    weights = weights_of("dino")
    weights["blocks.0.mlp.fc1.weight"] = torch.zeros(1).expand(4_000_000_000, 192)
    assert "blocks.0.mlp.fc1.weight" in refusal(saved(weights, tmp_path / "expanded.pth"))


def test_quantised_weights_are_not_taken_for_weights(tmp_path):
    weights = weights_of("dino")
    weights["blocks.1.mlp.fc1.weight"] = weights["blocks.1.mlp.fc1.weight"].to(torch.int8)
    message = refusal(saved(weights, tmp_path / "int8.pth"))
    assert "blocks.1.mlp.fc1.weight has numbers of torch.int8, accepted torch.float32" in message
