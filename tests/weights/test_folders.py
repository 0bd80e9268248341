"""Folders of trained encoders: bit-identical back, open in timm, and clear about everything that is wrong with one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from published import timm_features
from safetensors.torch import load_file, save_file

from glpretrain.encoders import FeatureMap, ViT
from glpretrain.weights import export, export_as, load_backbone


def image(*shape):
    """Float[*shape] from a formula."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float32) * 0.37).reshape(shape)


def small(name="vit_tiny_patch16_224", **changes):
    encoder = ViT(name, **{"img_size": (24, 40), "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, **changes}).eval()
    with torch.no_grad():
        for index, parameter in enumerate(encoder.parameters()):
            parameter.add_(0.2 * torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape) * 0.7 + index))
    return encoder


ENCODERS = {
    "vit": lambda: small(),
    "five channels": lambda: small(in_chans=5),
    "registers": lambda: small("vit_small_patch14_reg4_dinov2"),
    "no class token": lambda: small("vit_medium_patch16_gap_240"),
    "pooling by attention": lambda: small("vit_base_patch16_siglip_224"),
    "rotary": lambda: small("vit_small_patch16_dinov3"),
    "mixed rotary": lambda: small("vit_small_patch16_rope_mixed_224"),
    "eva": lambda: small("eva02_tiny_patch14_224"),
    "relative": lambda: small("beit_base_patch16_224"),
    "relative without class token": lambda: small("vit_relpos_small_patch16_224"),
    "distilled": lambda: small("deit_tiny_distilled_patch16_224"),
    "convolutions": lambda: FeatureMap("resnet18", img_size=(32, 64), in_chans=5).eval(),
    "windows": lambda: FeatureMap("swin_tiny_patch4_window7_224", img_size=64).eval(),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_export_then_load_gives_bit_identical_features(kind, tmp_path):
    encoder = ENCODERS[kind]()
    again = load_backbone(export(encoder, tmp_path / "out"))
    items = image(2, *encoder.card.item_shape)
    assert not again.training
    assert again.card == encoder.card
    with torch.no_grad():
        output, expected = again(items), encoder(items)
    assert torch.equal(output.cls, expected.cls)
    assert torch.equal(output.patches, expected.patches)


@pytest.mark.parametrize("kind", ENCODERS)
def test_timm_opens_the_folder_and_gives_the_same_features(kind, tmp_path):
    encoder = ENCODERS[kind]()
    model = timm.create_model(f"local-dir:{export(encoder, tmp_path / 'out')}", pretrained=True).eval()
    items = image(2, *encoder.card.item_shape)
    with torch.no_grad():
        assert torch.equal(timm_features(model, items), timm_features(encoder.model, items))
    config = vars(model)["pretrained_cfg"]
    assert tuple(config["input_size"]) == encoder.card.item_shape
    assert tuple(config["mean"]) == encoder.card.mean
    assert tuple(config["std"]) == encoder.card.std
    assert model.num_classes == 0


def test_the_mask_token_stays_behind(tmp_path):
    encoder = small()
    encoder.add_mask_token()
    folder = export(encoder, tmp_path / "out")
    assert load_file(folder / "model.safetensors").keys() == encoder.model.state_dict().keys()


def test_licence_and_source_travel_with_the_weights(tmp_path):
    card = load_backbone(export(small(), tmp_path / "out", licence="CC-BY-4.0", source="dino, 500 steps")).card
    assert (card.licence, card.source) == ("CC-BY-4.0", "dino, 500 steps")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]["license"] == "CC-BY-4.0"


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and nothing is overwritten"):
        export(small(), tmp_path)
    with pytest.raises(ValueError, match=r"notes\.txt is a file"):
        export(small(), tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_exported(value, tmp_path):
    encoder = small()
    with torch.no_grad():
        encoder.get_parameter("model.blocks.1.norm1.bias")[3] = value
    for write in (export, export_as):
        with pytest.raises(ValueError, match=r"^export: NaN or infinite weights in \['blocks\.1\.norm1\.bias'\]"):
            write(encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    weights = export(small(), tmp_path / "out") / "model.safetensors"
    state = load_file(weights)
    del state["cls_token"]
    save_file(state | {"surplus": torch.zeros(1), "norm.weight": torch.zeros(7)}, weights)
    with pytest.raises(ValueError, match=r"missing \['cls_token'\].*unknown \['surplus'\].*norm.weight has shape \(7,\), accepted \(48,\)"):
        load_backbone(tmp_path / "out")


def test_missing_weights_are_named(tmp_path):
    folder = export(small(), tmp_path / "out")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_backbone(folder)


def test_without_its_card_the_folder_is_still_a_timm_folder(tmp_path):
    encoder = small()
    folder = export(encoder, tmp_path / "out")
    (folder / "card.json").unlink()
    again = load_backbone(folder)
    items = image(2, *encoder.card.item_shape)
    assert torch.equal(again(items).patches, encoder(items).patches)
    assert again.card.item_shape == encoder.card.item_shape


def test_a_truncated_file_is_refused(tmp_path):
    weights = export(small(), tmp_path / "out") / "model.safetensors"
    for length in (0, 5, 5000):
        weights.write_bytes(weights.read_bytes()[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
            load_backbone(tmp_path / "out")


class _Trap:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_never_opened(tmp_path):
    folder = export(small(), tmp_path / "out")
    torch.save({"weights": _Trap(tmp_path / "sprung")}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="pickles are never opened"):
        load_backbone(folder)
    torch.save({"encoder_card": _Trap(tmp_path / "sprung"), "state_dict": {}}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_backbone(tmp_path / "bad.ckpt")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "new").exists()


def test_a_card_that_is_broken_or_unknown_is_refused(tmp_path):
    folder = export(small(), tmp_path / "out")
    card = json.loads((folder / "card.json").read_text())
    for text, message in [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        (json.dumps(card | {"colour": 1}), r"card\.json.*unknown fields \['colour'\]"),
        (json.dumps(card | {"encoder": "Vit"}), r"unknown encoder 'Vit'; registered: .*'ViT'"),
        (json.dumps(card | {"arguments": card["arguments"] | {"depht": 1}}), r"ViT.*depht"),
    ]:
        (folder / "card.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_backbone(folder)


def test_what_is_no_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(tmp_path / "nowhere")
    (tmp_path / "run.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"run\.ckpt cannot be read as a checkpoint: it is cut short or of another format"):
        load_backbone(tmp_path / "run.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no card\.json, and no config\.json with architecture .*; found: \[\]"):
        load_backbone(tmp_path / "empty")


def checkpoint(path, **sides):
    """A file as a training run writes it: the encoder of each side under its prefix, and a head beside it."""
    state = {f"{prefix}.{name}": tensor for prefix, side in sides.values() for name, tensor in side.state_dict().items()}
    state["student.heads.cls.weight"] = torch.zeros(3)
    encoder = next(iter(sides.values()))[1]
    torch.save({"encoder_card": encoder.card.to_json(), "state_dict": state, "method": "DINO", "global_step": 3}, path)
    return path


def test_the_teacher_is_exported_where_there_is_one_and_the_student_elsewhere(tmp_path):
    student, teacher = small(), small()
    for encoder in (student, teacher):
        encoder.add_mask_token()
    items = image(2, 3, 24, 40)
    both = checkpoint(tmp_path / "both.ckpt", student=("student.encoder", student), teacher=("teacher.branch.encoder", teacher))
    alone = checkpoint(tmp_path / "alone.ckpt", student=("student.encoder", student))
    for name, path, expected in (("a", both, teacher), ("b", alone, student)):
        again = load_backbone(export(load_backbone(path), tmp_path / name))
        assert torch.equal(again(items).patches, expected(items).patches)
    assert not torch.equal(student(items).patches, teacher(items).patches)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"of no known format; it holds \['state_dict'\]"):
        load_backbone(tmp_path / "other.ckpt")
    content = {"encoder_card": small().card.to_json(), "method": "DINO", "global_step": 3}
    torch.save({**content, "state_dict": {"head.weight": torch.zeros(1)}}, tmp_path / "head.ckpt")
    with pytest.raises(ValueError, match="has no encoder"):
        load_backbone(tmp_path / "head.ckpt")
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(tmp_path / "none.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "head.ckpt").read_bytes()[:700])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_backbone(tmp_path / "cut.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_backbone(tmp_path / "text.ckpt")
    assert not (tmp_path / "out").exists()


def test_loading_never_imports_lightning(tmp_path):
    folder = export(small(), tmp_path / "out")
    code = (
        "import sys, glpretrain.weights as weights\n"
        f"encoder = weights.load_backbone({str(folder)!r})\n"
        "assert type(encoder).__name__ == 'ViT'\n"
        "heavy = [name for name in sys.modules if name.split('.')[0] in ('pytorch_lightning', 'lightning', 'kornia')]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
