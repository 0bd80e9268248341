"""`glpretrain finetune`, `predict` and `export` of a segmentation: from a folder of images and masks to masks of new files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glpretrain.cli import main
from glpretrain.data import MaskedFolder
from glpretrain.encoders import ViT
from glpretrain.finetune import FineTuned
from glpretrain.finetune.exports import Format
from glpretrain.runs import Run
from glpretrain.weights import export

RECIPES = Path(__file__).parents[2] / "recipes"
COLOURS = {"grass": (30, 200, 40), "water": (20, 40, 220)}
SMALL = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--data.batch_size", "4", "--data.num_workers", "0"]


def halves(size: tuple[int, int], *, column: int) -> np.ndarray:
    """Classes of an image that shows grass on the left and water on the right of a column."""
    return np.broadcast_to(np.arange(size[0]) >= column, (size[1], size[0])).astype(np.uint8)


def picture(path: Path, classes: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(list(COLOURS.values()), dtype=np.uint8)[classes]).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, masked/ and new/."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(1)
    export(ViT("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=3), folder / "backbone")
    for part in ("train", "val"):
        for number in range(8):
            classes = halves((26, 20), column=8 + number)
            picture(folder / "masked" / part / "images" / f"{number}.png", classes)
            (folder / "masked" / part / "masks").mkdir(exist_ok=True)
            Image.fromarray(classes).save(folder / "masked" / part / "masks" / f"{number}.png")
    (folder / "masked" / "classes.csv").write_text("index,name\n0,grass\n1,water\n255,unlabelled\n")
    picture(folder / "new" / "a" / "wide.png", halves((50, 20), column=25))
    picture(folder / "new" / "tall.png", halves((20, 31), column=5))
    (folder / "new" / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    """A model that was fine-tuned by the command."""
    settings = ["--model.init_args.optimization.lr.base", "0.003", "--data.views.init_args.color_jitter", "null", "--resume", "never"]
    options = ["--config", "finetune/segmentation", "--data", str(place / "masked"), "--epochs", "6", "--runs", str(place / "runs")]
    assert main(["finetune", str(place / "backbone"), *options, *settings, *SMALL]) == 0
    return Run(place / "runs" / "finetune" / "segmentation" / "latest")


def test_a_folder_of_images_and_masks_becomes_a_model(run: Run) -> None:
    scores = run.results["scores"]
    assert scores["miou"]["value"] > 80.0 and scores["miou"]["n"] == 8
    probe = run.results["linear_probe"]
    assert isinstance(probe, dict) and probe["n"] == 8 and probe["value"] > 60.0, "LinearSegmentation on the frozen backbone"
    assert scores.keys() == {"miou", "pixel_accuracy", "iou_grass", "iou_water"}
    assert run.results["data"]["test"]["items"] == 8 and run.results["classes"] == ["grass", "water"]


def test_new_files_get_masks_overlays_and_shares(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "shares.csv"
    assert main(["predict", str(run.folder / "model"), str(place / "new"), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if "broken.jpg" in line] and "2 masks in" in said.out
    folder = place / "shares_pictures"
    model = FineTuned.load(run.folder / "model")
    with out.open() as file:
        rows = {Path(row["file"]).name: row for row in csv.DictReader(file)}
    assert rows.keys() == {"wide.png", "tall.png"}
    for name in ("a/wide.png", "tall.png"):
        with Image.open(place / "new" / name) as image, Image.open(folder / "masks" / name) as mask:
            assert torch.equal(torch.from_numpy(np.array(mask)).long(), model.segment(image))
            assert mask.mode == "P" and mask.size == image.size
            water = float((np.array(mask) == 1).mean())
        with Image.open((folder / "overlays" / name).with_suffix(".jpg")) as overlay:
            assert overlay.size == mask.size
        row = rows[Path(name).name]
        assert float(row["water"]) == pytest.approx(water, abs=1e-6) and float(row["grass"]) == pytest.approx(1 - water, abs=1e-6)
    assert 0.4 < float(rows["wide.png"]["water"]) < 0.6
    assert (folder / "classes.csv").read_text().splitlines()[:2] == ["index,name,colour", "0,grass,#1f77b4"]


def test_predicted_masks_can_be_read_as_masks_with_names(run: Run, place: Path, tmp_path: Path) -> None:
    picture(tmp_path / "set" / "images" / "x.png", halves((24, 20), column=10))
    out = ["--out", str(tmp_path / "x.csv"), "--pictures", str(tmp_path / "said")]
    assert main(["predict", str(run.folder / "model"), str(tmp_path / "set" / "images"), *out]) == 0
    (tmp_path / "said" / "masks").rename(tmp_path / "set" / "masks")
    (tmp_path / "said" / "classes.csv").rename(tmp_path / "set" / "classes.csv")
    source = MaskedFolder(tmp_path / "set")
    assert list(source.mask_classes) == ["grass", "water"] and source[0].semantic is not None


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("glpretrain: error: ")
    return line


def test_mistakes_cost_one_line(run: Run, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(run.folder / "model")
    for name in ("a.png", "a.bmp"):
        picture(tmp_path / "twice" / name, halves((20, 20), column=5))
    said = refusal(["predict", model, str(tmp_path / "twice"), "--out", str(tmp_path / "x.csv")], capsys)
    assert "would have the same mask, a.png" in said and not (tmp_path / "x.csv").exists()
    assert "takes none" in refusal(["predict", model, str(place / "new"), "--top", "2"], capsys)
    assert "lies in" in refusal(["predict", model, str(place / "new"), "--pictures", str(place / "new" / "out")], capsys)
    tune = ["finetune", str(place / "backbone"), "--runs", str(tmp_path / "runs"), *SMALL]
    said = refusal([*tune, "--config", "finetune/segmentation", "--data", str(place / "new")], capsys)
    assert "images/ beside masks/" in said
    own = tmp_path / "own.yaml"
    own.write_text((RECIPES / "mae.yaml").read_text().replace("glpretrain.methods.MAE", "glpretrain.finetune.Segmentation"))
    assert "has MultiCrop; accepted: views of a task" in refusal([*tune, "--config", str(own), "--data", str(place / "masked")], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_exported_models_give_the_logits_of_patches(format: Format, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    found = FineTuned.load(run.folder / "model").export(tmp_path / "out", format=format)
    assert found.difference is not None and found.difference < 1e-4
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["transform"]["crop_pct"] is None and card["transform"]["size"] == [16, 16] and card["classes"] == ["grass", "water"]
    if format == "torch":
        program = torch.export.load(found.file).module()
        assert program(torch.zeros(3, 3, 16, 16)).shape == (3, 2, 4, 4)
