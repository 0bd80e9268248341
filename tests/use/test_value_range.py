"""The range of values of a run's files travels with the backbone: features, pages, scores and predictions read files as training did."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import glpretrain
from glpretrain.cli import main
from glpretrain.core.types import EncoderCard
from glpretrain.data import ImageFolder, ImageList, MaskedFolder
from glpretrain.data.sources.images.lists import ImageFiles
from glpretrain.encoders import ViT
from glpretrain.finetune import Transform
from glpretrain.report.maps import look
from glpretrain.use import own_source
from glpretrain.weights import export, load_backbone

RANGE = [0, 1000]


def vit(channels: int = 1, **settings: object) -> ViT:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "in_chans": channels}
    return ViT("vit_tiny_patch16_224", **sizes, **settings).eval()


def sixteen_bits(folder: Path, *, count: int = 12) -> Path:
    """Grey pictures of 16 bits whose values reach 1000 of 65535; the classes differ in brightness."""
    draws = np.random.default_rng(0)
    for number in range(count):
        (place := folder / ("dark" if number % 2 else "light")).mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 400 if number % 2 else 1000, size=(16, 16)).astype(np.uint16)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sixteen_bits(tmp_path_factory.mktemp("range") / "scans")


@pytest.fixture(scope="module")
def run(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on such pictures, of which it says the range."""
    tmp_path = tmp_path_factory.mktemp("runs")
    recipe = Path(glpretrain.__file__).parent / "recipes" / "mae.yaml"
    encoder = {"img_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 3, "in_chans": 1, "mean": [0.5], "std": [0.25]}
    source = {"class_path": "glpretrain.data.ImageFolder", "init_args": {"root": str(scans), "channels": 1}}
    source["init_args"]["value_range"] = RANGE
    overrides = [
        *(f"--model.init_args.encoder.init_args.{name}={json.dumps(value)}" for name, value in encoder.items()),
        *("--data.source", json.dumps(source), "--data.batch_size", "4", "--trainer.logger", "false", "--evaluate", "false"),
        *("--data.views.init_args.global_views", json.dumps([{"size": 16, "scale": [0.5, 1.0], "count": 1}]), "--report", "false"),
    ]
    return glpretrain.fit(str(recipe), max_steps=1, runs=tmp_path / "runs", overrides=overrides).folder


def test_a_run_puts_the_range_of_its_files_on_the_card(run: Path) -> None:
    assert load_backbone(run / "backbone").card.value_range == ((0.0, 1000.0),)
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    assert load_backbone(checkpoint).card.value_range == ((0.0, 1000.0),)
    again = load_backbone(export(load_backbone(run / "backbone"), run / "again"), in_chans=3)
    assert again.card.value_range == ((0.0, 1000.0),) * 3


def test_features_of_files_are_those_of_the_range(run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = load_backbone(run / "backbone")
    held = ImageFolder(scans, channels=1, value_range=RANGE)
    expected = torch.stack([backbone(backbone.transform(item.values)).cls[0] for item in (held[index] for index in range(len(held)))])
    assert torch.allclose(backbone.embed(scans).features, expected, atol=1e-6)
    assert torch.allclose(backbone.embed([held.paths[0]]).features[0], expected[0], atol=1e-6)
    main(["embed", str(run / "backbone"), str(scans), "--out", str(tmp_path / "own.npy")])
    assert np.allclose(np.load(tmp_path / "own.npy"), expected.detach().numpy(), atol=1e-5)
    main(["embed", str(run / "backbone"), str(scans), "--out", str(tmp_path / "none.npy"), "--value_range", "none"])
    dark = [ImageFolder(scans, channels=1)[index].values for index in range(len(held))]
    assert max(int(values.max()) for values in dark) <= 3  # the upper eight bits of 16
    features = torch.stack([backbone(backbone.transform(values)).cls[0] for values in dark]).detach().numpy()
    assert np.allclose(np.load(tmp_path / "none.npy"), features, atol=1e-5) and not np.allclose(features, expected.detach(), atol=1e-2)
    main(["neighbours", str(tmp_path / "own.npy"), str(held.paths[3]), "--k", "1"])
    first = capsys.readouterr().out.splitlines()[-1]
    assert first.startswith("1.0000") and first.endswith(held.named(3))
    assert main(["embed", str(run / "backbone"), str(scans), "--out", str(tmp_path / "own.npy"), "--value_range", "0,2000"]) == 2


def test_features_in_another_range_are_another_file(run: Path, scans: Path, tmp_path: Path) -> None:
    assert not main(["embed", str(run / "backbone"), str(scans), "--out", str(tmp_path / "wide.npy"), "--value_range", "0,2000"])
    assert json.loads((tmp_path / "wide.npy.json").read_text())["settings"]["value_range"] == [[0.0, 2000.0]]


@pytest.mark.parametrize("given", ["5", "9,3", "a,b", "0,inf"])
def test_a_range_that_is_none_is_named(given: str, run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", str(run / "backbone"), str(scans), "--out", str(tmp_path / "f.npy"), "--value_range", given]) == 2
    assert f"--value_range {given} given; accepted: LOW,HIGH" in capsys.readouterr().err


def test_pictures_and_arrays_that_a_program_holds_are_read_alike(tmp_path: Path) -> None:
    encoder = vit()
    encoder.set_value_range([(0.0, 1000.0)])
    path = sorted(sixteen_bits(tmp_path / "scans").rglob("*.png"))[0]
    pixels = np.array(Image.open(path))
    expected = encoder.transform((pixels.astype(np.float32) / 1000 * 255).round().clip(0, 255).astype(np.uint8))
    for held in (path, Image.open(path), pixels):
        assert torch.allclose(encoder.transform(held), expected, atol=2 / 255 / min(encoder.card.std))
    assert torch.equal(look(encoder, path).pixels, own_source(tmp_path / "scans", encoder.card)[0].values)


def test_sources_of_every_kind_say_their_range(tmp_path: Path) -> None:
    folder = sixteen_bits(tmp_path / "scans")
    files = sorted(folder.rglob("*.png"))
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in files))
    for number, path in enumerate(files):
        for kind in ("images", "masks"):
            (tmp_path / "masked" / kind).mkdir(parents=True, exist_ok=True)
        Image.open(path).save(tmp_path / "masked" / "images" / f"{number}.png")
        Image.fromarray(np.eye(16, dtype=np.uint8)).save(tmp_path / "masked" / "masks" / f"{number}.png")
    for source in (
        ImageFolder(folder, channels=1, value_range=RANGE),
        ImageList(tmp_path / "list.txt", channels=1, value_range=RANGE),
        ImageFiles(files, channels=1, value_range=RANGE),
        MaskedFolder(tmp_path / "masked", channels=1, value_range=RANGE),
    ):
        assert source.value_range == ((0.0, 1000.0),)
    assert ImageFolder(folder, channels=1).value_range == ImageFolder(folder, channels=1, value_range=[]).value_range == ()


def test_a_model_for_new_files_reads_them_as_it_learned(tmp_path: Path) -> None:
    path = sorted(sixteen_bits(tmp_path / "scans").rglob("*.png"))[0]
    transform = Transform((16, 16), 1.0, (0.5,), (0.25,), value_range=((0.0, 1000.0),))
    again = Transform.from_json(json.loads(json.dumps(transform.to_json())))
    assert again == transform and "value_range" not in Transform((16, 16), 1.0, (0.5,), (0.25,)).to_json()
    expected = ImageFiles([path], channels=1, value_range=RANGE)[0].values
    assert torch.equal(again.read(path), transform(expected)) and torch.equal(again(Image.open(path)), transform(expected))
    plain = Transform((16, 16), 1.0, (0.5,), (0.25,))
    assert torch.equal(plain(Image.open(path)), plain.read(path))  # a picture of 16 bits is not clipped at 255


def test_a_card_refuses_what_is_no_range() -> None:
    card = vit().card.to_json()
    assert EncoderCard.from_json(card | {"value_range": [[0, 5]]}).value_range == ((0.0, 5.0),)
    for wrong in ([[5, 0]], [[0]], [["a", "b"]], [3]):
        with pytest.raises(ValueError, match=r"value_range=.* given; accepted: pairs of numbers"):
            EncoderCard.from_json(card | {"value_range": wrong})
