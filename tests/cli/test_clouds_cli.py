"""`glpretrain finetune`, `predict` and `export` of clouds: from folders of clouds to a table, episodes, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from glpretrain.cli import main
from glpretrain.data import Solids
from glpretrain.encoders import PointTransformer
from glpretrain.finetune import CloudTransform, FineTuned, Parts
from glpretrain.runs import Run
from glpretrain.weights import export

SMALL = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--data.batch_size", "4", "--data.num_workers", "0", "--no_probe"]


def backbone() -> PointTransformer:
    sizes = {"num_points": 48, "points_per_token": 6, "group_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "tokens_dim": 8}
    return PointTransformer("point_mae", **sizes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, shapes/ in two classes, and a model that was fine-tuned on them."""
    folder = tmp_path_factory.mktemp("clouds")
    export(backbone(), folder / "backbone")
    solids = Solids(60, num_points=64)
    for part in ("train", "test"):
        for index in range(60):
            item = solids[index]
            path = folder / "shapes" / part / ("flat" if item.label in (0, 3) else "other") / f"{index}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, item.values.numpy())
    options = ["--config", "finetune/clouds", "--data", str(folder / "shapes"), "--epochs", "1", "--runs", str(folder / "runs")]
    assert main(["finetune", str(folder / "backbone"), *options, *SMALL]) == 0
    return folder


@pytest.fixture
def model(place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(place)
    return "runs/finetune/clouds/latest/model"


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("glpretrain: error: ")
    return line


def test_predict_names_the_classes_of_new_clouds(model: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Run(place / "runs" / "finetune" / "clouds" / "latest").results
    assert results["scores"]["accuracy"]["n"] == 60 and results["classes"] == ["flat", "other"]
    assert main(["predict", model, "shapes/test", "--pictures", "sheets"]) == 0
    rows = list(csv.DictReader((place / "predictions.csv").open()))
    assert len(rows) == 60 and {row["class"] for row in rows} <= {"flat", "other"}
    one = FineTuned.load(model).predict([np.load(rows[0]["file"])]).max().item()
    assert float(rows[0]["probability"]) == pytest.approx(one, abs=1e-6)
    assert {path.name for path in (place / "sheets").iterdir()} == {"most_certain.png", "least_certain.png"}
    assert "predict: nowhere does not exist; accepted: clouds and folders of clouds" in refusal(["predict", model, "nowhere"], capsys)
    assert "accepted for a model of clouds: torch" in refusal(["export", model, "out", "--format", "onnx"], capsys)


def test_a_run_on_an_episode_learns_its_classes(model: str, place: Path) -> None:
    solids = {"class_path": "glpretrain.data.Solids", "init_args": {"length": 90, "num_points": 64}}
    episode = {"class_path": "glpretrain.data.Episode", "init_args": {"source": solids, "way": 2, "shot": 2, "num_queries": 3}}
    options = ["--config", "finetune/clouds", "--epochs", "1", "--runs", "few", "--data.source", json.dumps(episode)]
    assert main(["finetune", "backbone", *options, *SMALL]) == 0
    results = Run(place / "few" / "finetune" / "clouds" / "latest").results
    assert results["data"]["train"]["items"] == 4 and results["scores"]["accuracy"]["n"] == 6 and len(results["classes"]) == 2


def test_files_do_not_say_their_category(model: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = Parts(backbone(), Solids.mask_classes, num_categories=15, layers=[0, 1], hidden_dim=16)
    FineTuned.of(parts, transform=CloudTransform(48, has_category=True), scores={}).save(place / "parts")
    assert "parts needs the category of each cloud, which files do not say" in refusal(["predict", "parts", "shapes"], capsys)


def test_a_backbone_for_another_kind_of_items_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(["finetune", "backbone"], capsys)
    assert "is a backbone for points; accepted: backbones for images, or --config finetune/clouds" in said
