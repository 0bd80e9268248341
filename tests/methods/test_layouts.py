"""How a batch is cut changes nothing, except what a method names: micro-batches, chunks and processes; drop path included."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from contract import build, fixed_batch, share
from layouts import CHUNKS, DROPPING, ITEMS, Seen, fitted, in_processes
from shrinking import ROOT, name_of
from torch import Tensor

from glpretrain.core.batch import Batch
from glpretrain.encoders import FeatureMap
from glpretrain.methods.base import Method
from glpretrain.training.branch import Branch
from glpretrain.training.optim import Optimization

QUICK = sorted(ROOT.glob("*.yaml"))
# Terms of every kind: a queue, assignments that are balanced over the batch, counts of hidden patches, and batch norm in the encoder.
_FAST = ("mugs", "dinov2", "fsfm", "point_mae")
SAME = 2e-5  # float32 sums in another order


every_recipe = pytest.mark.parametrize("recipe", QUICK, ids=name_of)


def _marked(recipe: Path) -> object:
    return pytest.param(recipe, id=name_of(recipe), marks=() if recipe.stem in _FAST else pytest.mark.slow)


def gradients_of_terms(model: Method, batches: list[Batch]) -> dict[str, Tensor]:
    """Gradient of each term, the mean over the batches, as one vector; it must not be zero."""
    found = {}
    for term in model.terms:
        model.zero_grad(set_to_none=True)
        for batch in batches:
            (model.losses(batch, 0.5)[term].mean() / len(batches)).backward()
        parts = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        found[term] = torch.cat(parts)
        assert found[term].norm() > 0.0, term
    return found


def running_statistics(model: Method) -> dict[str, Tensor]:
    """Of all batch norms of student and teacher."""
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value.clone() for name, value in model.named_buffers() if name.endswith(kinds)}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """Terms whose gradients are not the same."""
    return {term for term in one if (one[term] - other[term]).norm() > SAME * one[term].norm()}


@pytest.mark.parametrize("recipe", [_marked(recipe) for recipe in QUICK])
def test_a_method_names_the_terms_that_see_a_micro_batch_only_and_draws_from_keys(recipe: Path, tmp_path: Path) -> None:
    model_and_data = build(recipe, tmp_path, *DROPPING)
    model, batch = model_and_data.model.train(), fixed_batch(model_and_data, count=16)
    state = torch.get_rng_state()
    fresh = running_statistics(model)
    whole, statistics = gradients_of_terms(model, [batch]), running_statistics(model)
    assert torch.equal(state, torch.get_rng_state()), "a step drew from torch's generator"
    micro_batches = gradients_of_terms(model, [share(batch, number, 4) for number in range(4)])
    assert differing(whole, micro_batches) == set(model.micro_batch_terms)
    for branch in (model.student, *([] if model.teacher is None else [model.teacher.branch])):
        branch.set_chunk_size(5)  # does not divide the number of views
    model.load_state_dict(fresh, strict=False)
    assert not differing(whole, gradients_of_terms(model, [batch]))
    assert all(torch.equal(value, statistics[name]) for name, value in running_statistics(model).items())
    assert torch.equal(state, torch.get_rng_state()), "a chunk drew from torch's generator"


def test_the_line_at_the_start_names_the_terms(tmp_path: Path) -> None:
    training = build(ROOT / "gpfm.yaml", tmp_path, "--trainer.accumulate_grad_batches", "2")
    line = training.model.changed_by_accumulation(2)
    assert line.startswith("accumulate_grad_batches: 2: koleo see one micro-batch at a time") and line.count("\n") == 1
    assert f"\n{line}" in training._summary()
    assert training.model.changed_by_accumulation(1) == ""
    training.model.in_batch = ()
    assert training.model.changed_by_accumulation(2) == ""


def test_chunks_are_refused_where_batch_norm_is_everywhere() -> None:
    resnet = Branch(FeatureMap("resnet18"), {})
    with pytest.raises(ValueError, match=r"chunk_size=4 given, but FeatureMap resnet18 has batch norm \(model\.bn1, model\.layer1"):
        resnet.set_chunk_size(4)


def test_a_chunk_has_at_least_one_view() -> None:
    with pytest.raises(ValueError, match="chunk_size is at least 1 view, or null for all, not 0"):
        Optimization(chunk_size=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Seen]:
    """Runs of one process on whole batches, each of them made once."""
    return cache(lambda recipe: fitted(recipe, tmp_path_factory.mktemp(recipe.stem)))


@pytest.mark.slow
@every_recipe
def test_a_run_in_chunks_is_the_run_on_whole_batches(recipe: Path, whole: Callable[[Path], Seen], tmp_path: Path) -> None:
    require_same(whole(recipe), fitted(recipe, tmp_path, *CHUNKS))


@pytest.mark.slow
@every_recipe
def test_a_run_that_accumulates_is_the_run_on_whole_batches_unless_terms_are_named(
    recipe: Path, whole: Callable[[Path], Seen], tmp_path: Path
) -> None:
    accumulated = fitted(recipe, tmp_path, "--trainer.accumulate_grad_batches", "4", batch_size=ITEMS // 4)
    if accumulated.micro_batch_terms and recipe.stem != "asit":  # whose micro-batches happen to replace as many cells here
        assert whole(recipe).difference(accumulated)["gradient"] > SAME
    else:
        require_same(whole(recipe), accumulated)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_run_in_several_processes_is_the_run_in_one(count: int, whole: Callable[[Path], Seen], tmp_path: Path) -> None:
    for name, runs in in_processes(QUICK, tmp_path, count=count).items():
        require_same(whole(ROOT / f"{name}.yaml"), runs[0])
        for run in runs[1:]:
            assert not any(runs[0].difference(run).values()), f"{name}: processes differ"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "regnetx_002"])  # plain batch norms of torch, and timm's with an activation
def test_batch_norms_of_feature_maps_see_all_processes(name: str, tmp_path: Path) -> None:
    encoder = ("--model.init_args.encoder", f"{{class_path: glpretrain.encoders.FeatureMap, init_args: {{name: {name}}}}}")
    views = {"global": "{size: 32, scale: [0.4, 1.0]}, {size: 32, scale: [0.4, 1.0]}", "local": "{size: 32, scale: [0.1, 0.4]}"}
    sizes = ["--data.source.init_args.size", "32"]
    sizes += [word for kind, some in views.items() for word in (f"--data.views.init_args.{kind}_views", f"[{some}]")]
    one = fitted(ROOT / "dino.yaml", tmp_path, *encoder, *sizes)
    for other in in_processes([ROOT / "dino.yaml"], tmp_path, *encoder, *sizes, count=2)["dino"]:
        assert all(difference < 1e-3 for difference in one.difference(other).values()), one.difference(other)


def require_same(one: Seen, other: Seen) -> None:
    """Equal but for sums in another order.

    Biases in front of a batch norm have a gradient of zero, and AdamW makes steps even of its rounding: 3e-4 of all steps in mmc_points.
    There a second thread in one process changes the gradient by 1.3e-5.
    """
    for part, difference in one.difference(other).items():
        assert difference < (1e-3 if part in ("weights", "teacher") else SAME), f"{part}: {difference}"
