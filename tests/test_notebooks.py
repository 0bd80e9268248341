"""Every notebook runs from top to bottom, shrunk by its own parameters; what is in git has no outputs and defines nothing."""

import ast
import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SCORED = {"labelled": (40, "train"), "labelled_test": (20, "test"), "masked": (16, "test")}


def few(source: str) -> list[str]:
    """A run of seconds: little to train on, little to be scored on."""
    arguments = ["--data.source.init_args.length", "64", "--trainer.log_every_n_steps", "1"]
    for role, (length, split) in SCORED.items():
        given = {"class_path": f"glpretrain.data.{source}", "init_args": {"length": length, "size": 64, "split": split}}
        arguments += [f"--data.{role}", json.dumps(given)]
    return arguments


FEW = few("Scenes")
# One assignment per parameter: what a notebook's cell tagged `parameters` is followed by.
SMALL: dict[str, dict[str, int | list[str]]] = {
    "01_views_and_masks": {"num_items": 4},
    "02_pretrain_in_five_minutes": {"max_steps": 4, "overrides": FEW},
    "03_attention_maps": {"max_steps": 3, "overrides": FEW},
    "04_prompt_segmentation": {"max_steps": 3, "num_images": 24, "overrides": FEW},
    "05_compare_backbones": {"max_steps": 3, "overrides": FEW},
    "06_your_own_data": {"max_steps": 3, "num_photos": 60},
    "07_slides": {"num_slides": 6, "width": 640, "height": 512, "max_steps": 2, "epochs": 3},
    "08_fine_tune": {"max_steps": 2, "epochs": 1, "num_photos": 40, "num_labelled": 80},
    "09_more_channels": {"max_steps": 2, "num_images": 16, "overrides": few("Bands")},
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = ("01",)  # number of the one that runs with every change; the others take 15 to 20 seconds each


def name_of(path: Path) -> str:
    return path.stem


def code_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_is_known() -> None:
    assert [name_of(path) for path in NOTEBOOKS] == sorted(SMALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_in_git_has_no_outputs_and_defines_nothing(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in code_of(notebook):
        assert not cell.outputs and cell.execution_count is None
        tree = ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("%")))
        defined = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda))]
        assert not defined, f"{path.name} defines something at line {defined[0].lineno}; it belongs into the package"


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=() if path.stem[:2] in QUICK else pytest.mark.slow) for path in NOTEBOOKS], ids=name_of
)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    notebook = nbformat.read(path, as_version=4)
    cells = code_of(notebook)
    (parameters,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    known = {target.id for node in ast.parse(parameters.source).body for target in node.targets}
    assert known == set(SMALL[name_of(path)])
    parameters.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in SMALL[name_of(path)].items())
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = {kind for cell in cells for output in cell.outputs for kind in output.get("data", {})}
    assert "image/png" in kinds, "a notebook shows pictures"
