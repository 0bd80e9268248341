"""Every format gives back the features of the encoder, for any number of images, and says what it cannot do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exports_stubs import ENCODERS, difference, images, small
from processes import together
from safetensors.torch import load_file

import glpretrain.weights.exports.programs as programs
from glpretrain.cli import main
from glpretrain.core.types import EncoderOutput
from glpretrain.weights import FORMATS, export_as, load_backbone

# The same kernels in the same order: the difference is zero on one machine; others may sum otherwise.
TORCH_TOLERANCE = 1e-5
# onnxruntime has kernels of its own (products, softmax, GELU, norms). These encoders agree to 5e-6; others with sharper attention
# were 3e-5 apart, where onnxruntime was the one closer to float64.
ONNX_TOLERANCE = 1e-4


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "windows" else kind for kind in ENCODERS])
def test_a_torch_program_gives_the_same_features(kind: str, tmp_path: Path) -> None:
    encoder = ENCODERS[kind]()
    exported = export_as(encoder, tmp_path / "out", format="torch")
    program = torch.export.load(exported.file).module()
    for count in (1, 3, 4):
        items = images(count, *encoder.card.item_shape)
        with torch.no_grad():
            worst = difference(EncoderOutput(*program(items)), expected=encoder(items))
        print(f"torch, {kind}, {count} images: {worst:.1e}")
        assert worst <= TORCH_TOLERANCE
    assert exported.difference is not None and exported.difference <= TORCH_TOLERANCE


def test_a_torch_program_needs_neither_timm_nor_this_package(tmp_path: Path) -> None:
    encoder = small("vit_tiny_patch16_224")
    file = export_as(encoder, tmp_path / "out", format="torch", licence="CC-BY-4.0").file
    items = images(3, 3, 48, 48)
    torch.save(items, tmp_path / "items.pt")
    code = (
        "import sys\n"
        "for name in ('timm', 'glpretrain'):\n"
        "    sys.modules[name] = None\n"
        "import json, torch\n"
        "files = {'card.json': ''}\n"
        f"program = torch.export.load({str(file)!r}, extra_files=files).module()\n"
        "assert json.loads(files['card.json'])['licence'] == 'CC-BY-4.0'\n"
        f"torch.save(program(torch.load({str(tmp_path / 'items.pt')!r})), {str(tmp_path / 'outputs.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with torch.no_grad():
        assert difference(EncoderOutput(*torch.load(tmp_path / "outputs.pt")), expected=encoder(items)) <= TORCH_TOLERANCE


@pytest.mark.parametrize(
    "kind",
    ["registers and layer scale", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("vit", "relative", "rotary", "convolutions"))],
)
def test_onnxruntime_gives_the_same_features(kind: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'glpretrain[onnx]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'glpretrain[onnx]'")
    encoder = ENCODERS[kind]()
    exported = export_as(encoder, tmp_path / "out", format="onnx", licence="CC-BY-4.0")
    session = onnxruntime.InferenceSession(exported.file, providers=["CPUExecutionProvider"])
    (given,), outputs = session.get_inputs(), session.get_outputs()
    assert given.name == "images" and given.shape == ["batch", *encoder.card.item_shape]
    assert [output.name for output in outputs] == ["cls", "patches"]
    assert outputs[0].shape == ["batch", encoder.embed_dim]
    for count in (1, 3, 4):
        items = images(count, *encoder.card.item_shape)
        cls, patches = map(torch.from_numpy, session.run(None, {"images": items.numpy()}))
        with torch.no_grad():
            worst = difference(EncoderOutput(cls, patches), expected=encoder(items))
        print(f"onnx, {kind}, {count} images: {worst:.1e}")
        assert worst <= ONNX_TOLERANCE
    assert exported.difference is not None and exported.difference <= ONNX_TOLERANCE
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["mean"]) == list(encoder.card.mean)
    assert json.loads(metadata["std"]) == list(encoder.card.std)
    assert json.loads(metadata["card"])["licence"] == "CC-BY-4.0"


def test_a_program_for_any_size_gives_the_same_features_at_every_size(tmp_path: Path) -> None:
    encoder = small("vit_small_patch14_reg4_dinov2")
    program = torch.export.load(export_as(encoder, tmp_path / "out", format="torch", any_size=True).file).module()
    for height, width in ((48, 48), (32, 56), (96, 64), (16, 24)):
        items = images(3, 3, height, width)
        with torch.no_grad():
            worst = difference(EncoderOutput(*program(items)), expected=encoder(items))
        print(f"torch, any size, {height} x {width}: {worst:.1e}")
        assert worst <= TORCH_TOLERANCE


@pytest.mark.slow
def test_onnxruntime_gives_the_same_features_at_every_size(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'glpretrain[onnx]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'glpretrain[onnx]'")
    encoder = small("vit_small_patch14_reg4_dinov2")
    exported = export_as(encoder, tmp_path / "out", format="onnx", any_size=True)
    session = onnxruntime.InferenceSession(exported.file, providers=["CPUExecutionProvider"])
    for height, width in ((48, 48), (32, 56), (96, 64)):
        items = images(3, 3, height, width)
        with torch.no_grad():
            output = EncoderOutput(*map(torch.from_numpy, session.run(None, {"images": items.numpy()})))
            worst = difference(output, expected=encoder(items))
        print(f"onnx, any size, {height} x {width}: {worst:.1e}")
        assert worst <= ONNX_TOLERANCE
    assert exported.difference is not None and exported.difference <= ONNX_TOLERANCE


@pytest.mark.parametrize(
    ("kind", "format", "message"),
    [
        ("rotary", "torch", "vit_small_patch16_dinov3 can be traced at one size only"),
        ("relative", "torch", "beit_base_patch16_224 can be traced at one size only"),
        ("windows", "torch", "swin_tiny_patch4_window7_224 can be traced at one size only"),
        ("vit", "huggingface", "any_size given with format='huggingface'; accepted: torch, onnx"),
    ],
)
def test_any_size_is_refused_where_it_cannot_be(kind: str, format: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        export_as(ENCODERS[kind](), tmp_path / "out", format=format, any_size=True)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(programs, "find_spec", lambda name: None if name == package else name)


def test_onnx_without_its_packages_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxscript")
    with pytest.raises(ValueError, match=r"needs onnxscript: pip install 'glpretrain\[onnx\]'"):
        export_as(small("vit_tiny_patch16_224"), tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_onnx_without_a_runtime_says_that_nothing_was_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'glpretrain[onnx]'")
    without(monkeypatch, "onnxruntime")
    exported = export_as(small("vit_tiny_patch16_224", depth=1), tmp_path / "out", format="onnx")
    assert exported.difference is None
    assert "not compared" in str(exported) and "onnxruntime is not installed" in str(exported)


def test_folder_and_timm_are_one_and_the_same(tmp_path: Path) -> None:
    encoder = small("vit_tiny_patch16_224")
    folders = [export_as(encoder, tmp_path / name, format=name).folder for name in ("folder", "timm")]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == ["card.json", "config.json", "model.safetensors"]
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names[0])


@pytest.mark.parametrize("size", [64, (32, 72)])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224", "eva02_tiny_patch14_224"]
)
def test_an_export_at_another_size_has_the_features_of_the_encoder_there(name: str, size: int | tuple[int, int], tmp_path: Path) -> None:
    encoder = small(name)
    exported = export_as(encoder, tmp_path / "out", img_size=size)
    again = load_backbone(exported.folder)
    height, width = (size, size) if isinstance(size, int) else size
    assert again.card.item_shape == (3, height, width)
    items = images(2, 3, height, width)
    with torch.no_grad():
        assert difference(again(items), expected=encoder(items)) == 0.0


def test_a_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for name, size, message in [
        ("vit_tiny_patch16_224", 50, "height 50 does not divide by the patch of 8 pixels"),
        ("beit_base_patch16_224", 64, r"relative positions accept \(48, 48\) only"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_as(small(name), tmp_path / "out", format="torch", img_size=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "onnx"])
def test_the_card_lies_beside_every_format_and_the_encoder_stays_as_it_was(format: str, tmp_path: Path) -> None:
    encoder = small("vit_tiny_patch16_224")
    encoder.add_mask_token()
    encoder.train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    exported = export_as(encoder, tmp_path / "out", format=format, img_size=64, licence="CC-BY-4.0", source="dino, 500 steps")
    card = json.loads((exported.folder / "card.json").read_text())
    assert (card["licence"], card["source"]) == ("CC-BY-4.0", "dino, 500 steps")
    assert card["item_shape"] == [3, 64, 64] and card["mean"] == list(encoder.card.mean)
    assert encoder.training and encoder.card.licence == "" and encoder.card.item_shape == (3, 48, 48)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten(format: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for place, message in ((tmp_path, "is not empty and nothing is overwritten"), (tmp_path / "notes.txt", "is a file")):
        with pytest.raises(ValueError, match=message):
            export_as(small("vit_tiny_patch16_224", depth=1), place, format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_of_four_exports_into_one_folder_one_is_written_whole(tmp_path: Path) -> None:
    encoders = [small("vit_tiny_patch16_224", depth=depth) for depth in (1, 2, 3, 4)]
    formats = ("folder", "huggingface", "folder", "timm")
    outcomes = together(lambda number: export_as(encoders[number], tmp_path / "out", format=formats[number]).difference, count=4)
    (winner,) = (number for number, one in enumerate(outcomes) if not one.error)
    assert all("is writing to" in one.error or "is not empty and nothing" in one.error for one in outcomes if one.error)
    assert {path.name for path in tmp_path.rglob("*") if path.name.startswith(".")} == set()
    loaded = load_backbone(tmp_path / "out")
    items = images(2, 3, 48, 48)
    with torch.no_grad():
        assert difference(loaded(items), expected=encoders[winner](items)) <= TORCH_TOLERANCE
    assert (tmp_path / "out" / "preprocessor_config.json").exists() == (formats[winner] == "huggingface")


def test_an_export_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        export_as(ENCODERS["windows"](), tmp_path / "out", format="huggingface")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format='pickle' given; accepted: folder, timm, huggingface, torch, onnx"):
        export_as(small("vit_tiny_patch16_224", depth=1), tmp_path / "out", format="pickle")


def test_the_command_prints_path_size_and_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export_as(small("vit_tiny_patch16_224"), tmp_path / "in").folder
    out = tmp_path / "out"
    assert main(["export", str(folder), str(out), "--format", "huggingface", "--img_size", "32", "--licence", "MIT"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("exported to "))
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    assert line.startswith(f"exported to {out} (huggingface): {size:.2f} MB, maximum absolute difference to the encoder ")
    assert float(line.rsplit(" ", 1)[1]) <= TORCH_TOLERANCE
    card = json.loads((out / "card.json").read_text())
    assert card["item_shape"] == [3, 32, 32] and card["licence"] == "MIT"
    assert load_file(out / "model.safetensors")["embeddings.position_embeddings"].shape == (1, 17, 96)
    assert main(["export", str(folder), str(out), "--format", "torch"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_the_command_offers_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = capsys.readouterr().out
    assert "{" + ",".join(FORMATS) + "}" in text
    assert all(f"\n  {name} " in text for name in FORMATS)
