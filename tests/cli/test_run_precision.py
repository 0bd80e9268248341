"""The precision of a run that sets none: bf16 on a GPU that computes in it, float32 elsewhere."""

import pytest
import torch
import yaml
from jsonargparse import Namespace
from shrinking import ROOT

from glpretrain.cli.trainer import precision_of

RECIPES = sorted(ROOT.rglob("*.yaml"))


@pytest.mark.parametrize(
    ("accelerator", "has_gpu", "has_bf16", "precision"),
    [
        ("auto", True, True, "bf16-mixed"),
        ("gpu", True, True, "bf16-mixed"),
        ("auto", True, False, "32-true"),
        ("auto", False, False, "32-true"),
        ("cpu", True, True, "32-true"),
    ],
)
def test_a_gpu_computes_in_bf16_where_it_can(
    accelerator: str, has_gpu: bool, has_bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 and not including_emulation)
    assert precision_of(Namespace(precision=None, accelerator=accelerator)) == precision
    assert precision_of(Namespace(precision="16-mixed", accelerator=accelerator)) == "16-mixed"


@pytest.mark.parametrize("path", [path for path in RECIPES if "eval" not in path.parts], ids=lambda path: path.stem)
def test_every_recipe_runs_in_bf16_on_a_gpu_unless_its_authors_trained_in_float32(path) -> None:
    trainer = yaml.safe_load(path.read_text()).get("trainer", {})
    authors = ("dino_vits16_in1k", "mugs_", "point_mae_", "dcglr_", "asit_", "modelnet40_point_mae")
    in_float32 = path.parent.name in ("paper", "finetune") and path.stem.startswith(authors)
    accepted = ("32-true", "bf16-mixed") if in_float32 else (None, "bf16-mixed")
    assert trainer.get("precision") in accepted, path
