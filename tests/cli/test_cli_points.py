"""Clouds from the command line: the user's own, in a folder or a file, trained on and scored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from shrinking import ROOT, shrunk

from glpretrain.cli.pretraining import pretrain
from glpretrain.cli.scoring import score
from glpretrain.data import PointArrays, Solids, source_for
from glpretrain.data.own import source_spec
from glpretrain.encoders import PointTransformer
from glpretrain.evaluate import KNN, ShapeHistogram, Sources

MESHES = Path(__file__).parents[3] / "shared" / "data" / "points_meshsampled"


def encoder() -> PointTransformer:
    torch.manual_seed(0)
    return PointTransformer(
        "pos_bert_base", num_points=64, points_per_token=8, group_size=8, embed_dim=24, depth=1, num_heads=3, source="a test"
    ).eval()


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """Two dozen solids in a file with two parts, with labels and parts."""
    fields: dict[str, np.ndarray] = {"class_names": np.array(Solids(1).classes), "part_names": np.array(Solids(1).mask_classes)}
    for part, count in (("train", 24), ("test", 12)):
        items = [Solids(count, num_points=64, split=part)[index] for index in range(count)]
        fields[f"{part}_points"] = torch.stack([item.values for item in items]).numpy()
        fields[f"{part}_labels"] = np.array([item.label for item in items])
        fields[f"{part}_parts"] = torch.stack([item.semantic for item in items]).numpy()
    np.savez(tmp_path / "stack.npz", **fields)
    return tmp_path / "stack.npz"


def test_a_run_on_a_file_of_clouds_scores_its_own_test_part(stack: Path, tmp_path: Path) -> None:
    recipe = shrunk(ROOT / "point_mae.yaml", tmp_path)
    run = pretrain(
        str(recipe),
        data=str(stack),
        masks=str(stack),
        overrides=["--runs", str(tmp_path / "runs"), "--trainer.enable_progress_bar", "false"],
    )
    assert run.results["data"] == "stack" and run.results["measured_on"] == {"knn": "stack", "svm": "stack", "prompt": "stack"}
    assert {"svm", "knn", "prompt_miou"} <= run.results["after"].keys()
    assert run.results["after"]["svm_n"] == 11  # the training part lacks the class of one item
    assert [name for name in run.results["left_out"] if name.startswith("svm_class ")]


def test_the_configuration_for_points_takes_a_file(stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = yaml.safe_load((ROOT / "eval" / "points.yaml").read_text())
    evaluators = {name: values["evaluators"][name] for name in ("knn", "svm_pos_bert", "d2", "prompt")}
    evaluators["knn"]["init_args"] = {"k": [1]}
    config = tmp_path / "points.yaml"
    config.write_text(yaml.safe_dump({"sources": values["sources"], "evaluators": evaluators}))
    lines = score(encoder(), config=config, data=stack, masks=stack, pictures=tmp_path / "drawn")
    assert {line["evaluator"] for line in lines} == set(evaluators) and {line["measured_on"] for line in lines} == {"stack"}
    assert (tmp_path / "drawn" / "prompt_prompts.png").stat().st_size > 5_000


def test_a_folder_is_told_from_a_file_and_points_from_images(stack: Path, tmp_path: Path) -> None:
    assert source_for(tmp_path, "points") == "glpretrain.data.PointFolder"
    assert source_for(stack, "points") == "glpretrain.data.PointArrays"
    spec = source_spec(tmp_path, source_for(tmp_path, "image"), channels=1)
    assert spec == ("glpretrain.data.ImageFolder", {"root": str(tmp_path), "channels": 1})
    assert source_spec(stack, "glpretrain.data.PointArrays", channels=1).init_args == {"path": str(stack)}
    assert spec.arguments("data.source") == ["--data.source", json.dumps(spec._asdict())]


@pytest.mark.skipif(not MESHES.is_dir(), reason="no ../shared/data/points_meshsampled here")
@pytest.mark.parametrize(
    ("name", "train", "test", "classes"), [("shrec16", 480, 120, 30), ("modelnet9", 144, 36, 9), ("mcgill10", 202, 52, 10)]
)
def test_real_shapes_are_read_and_known_by_their_distances(name: str, train: int, test: int, classes: int) -> None:
    parts = PointArrays(MESHES / f"{name}.npz").train_test_split()
    assert [len(part) for part in parts] == [train, test] and len(parts[0].classes) == classes
    if name == "modelnet9":
        sources = Sources({"train": parts[0], "test": parts[1]})
        found = ShapeHistogram(max_points=128).run(encoder(), sources).scores["accuracy"]
        assert found.low is not None and found.low > 100 / classes
        assert KNN(k=(3,)).run(encoder(), sources).scores["accuracy"].n == test
