"""The contract of a method, on one recipe of every method."""

from pathlib import Path

import pytest
from contract import (
    build,
    check_accumulation,
    check_export,
    check_gradients,
    check_items,
    check_overfits,
    check_resume,
    check_terms,
    fixed_batch,
)
from layouts import DROPPING
from shrinking import ONE_PER_METHOD, name_of

import glpretrain.methods

every_recipe = pytest.mark.parametrize("recipe", ONE_PER_METHOD, ids=name_of)
# Whole runs that stop and go on take seconds each; these keep states of every kind: queues, centres, batch norms, experts, clouds, none.
RESUMED = ("dino", "gpfm", "mae", "mmc", "mugs", "point_mae")
every_resumed_recipe = pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, id=name_of(path), marks=() if name_of(path) in RESUMED else pytest.mark.slow) for path in ONE_PER_METHOD],
)


def test_every_method_has_a_recipe() -> None:
    assert len(ONE_PER_METHOD) == len(glpretrain.methods.__all__)


@every_recipe
def test_terms_gradients_and_overfitting(recipe: Path, tmp_path: Path) -> None:
    training = build(recipe, tmp_path)
    batch = fixed_batch(training)
    check_terms(training.model, batch)
    check_gradients(training.model, batch)
    check_overfits(training.model, batch)


@every_recipe
def test_the_terms_of_an_item_are_its_own(recipe: Path, tmp_path: Path) -> None:
    training = build(recipe, tmp_path)
    check_items(training.model, fixed_batch(training))


@every_recipe
def test_export_gives_the_features_of_the_trained_backbone(recipe: Path, tmp_path: Path) -> None:
    check_export(build(recipe, tmp_path), tmp_path)


@every_resumed_recipe
def test_resume_goes_on_with_the_same_losses(recipe: Path, tmp_path: Path) -> None:
    check_resume(recipe, tmp_path, *DROPPING)  # the paths, too, are those of the whole run


@every_recipe
def test_two_micro_batches_are_one_step(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_accumulation(recipe, tmp_path, monkeypatch)
