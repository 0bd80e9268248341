"""Two and four processes that divide all parameters (FSDP2) compute what one process does: losses, gradients, weights, teacher, states."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract import build, fixed_batch, share
from processes import free_port
from shrinking import ONE_PER_METHOD, ROOT, name_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from glpretrain.bench.alone import Alone
from glpretrain.core.batch import Batch
from glpretrain.core.shards import local, whole
from glpretrain.methods.base import Method
from glpretrain.training.memory import states_of
from glpretrain.training.sharding import class_name, is_sharded, set_gradients_travel, shard, whole_encoder

ITEMS, STEPS = 8, 3
QUICK = [ROOT / f"{name}.yaml" for name in ("dino",)]
FOUR = [ROOT / f"{name}.yaml" for name in ("dino", "ibot", "mae", "mmc", "gpfm")]
CLIPS = ("parameter", "module", "joint")  # one each for the recipes in turn
Found = dict[str, dict[str, Tensor]]


def _clip(recipe: Path) -> tuple[str, str]:
    number = ONE_PER_METHOD.index(recipe)
    return "--model.init_args.optimization.clip", f"{{mode: {CLIPS[number % len(CLIPS)]}, max_norm: 0.3}}"


def _made(recipe: Path, folder: Path) -> tuple[Method, list[Batch]]:
    training = build(recipe, folder, *_clip(recipe))
    return training.model, [fixed_batch(training, count=ITEMS, epoch=epoch) for epoch in range(STEPS)]


def _steps(model: Method, batches: list[Batch]) -> Found:
    """What a few optimizer steps do. With a large epsilon an update follows the gradient; AdamW's own turns the rounding of a gradient
    that is zero into a step of full length."""
    alone = Alone(model.train(), num_items=ITEMS)
    for group in alone.optimizer.param_groups:
        group["eps"] = 1e-2
    accumulated = _accumulated(model, batches[:2])
    alone.compute(batches[0])
    gradients = {name: whole(one.grad).clone() for name, one in model.named_parameters() if one.grad is not None}
    norms = None
    for batch in batches:
        alone.step(batch)
        norms = norms or dict(model.step.norms)
    assert norms is not None
    return {
        "accumulated gradients": accumulated,
        "gradients": gradients,
        "norms": norms,
        "weights": {name: whole(one).clone() for name, one in model.named_parameters()},
        "buffers": {name: one.clone() for name, one in model.named_buffers()},
        "backbone": {name: one.clone() for name, one in whole_encoder(model.backbone()).state_dict().items()},
    }


def _accumulated(model: Method, batches: list[Batch]) -> dict[str, Tensor]:
    """Gradients of several batches together, which travel with the last one."""
    for batch in batches:
        if is_sharded(model):
            set_gradients_travel(model, batch is batches[-1])
        terms = model.averaged(model(batch, 0.5), batch)
        torch.stack([model.weights[name] * value for name, value in terms.items()]).sum().backward()
    found = {name: whole(one.grad).clone() for name, one in model.named_parameters() if one.grad is not None}
    for state in states_of(model):
        state.discard()
    model.zero_grad(set_to_none=True)
    return found


def _run(rank: int, recipes: list[Path], folder: Path, port: int, count: int) -> None:
    torch.set_num_threads(1)
    (folder / str(rank)).mkdir()
    # Built first: a trainer that finds a process group would take it for its own.
    made = {name_of(recipe): _made(recipe, folder / str(rank)) for recipe in recipes}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    found: dict[str, Found] = {}
    for name, (model, batches) in made.items():
        if rank:  # the weights are those of the first process
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        kind, total = type(model).__name__, sum(one.numel() for one in model.parameters())
        shard(model, init_device_mesh("cpu", (count,)))
        own = sum(local(one).numel() for one in model.parameters())
        assert is_sharded(model) and class_name(model) == kind
        # A tensor with fewer rows than there are processes is whole in one of them.
        assert own < 1.2 * total / count + sum(one.numel() for one in model.parameters() if len(one) < 2 * count)
        found[name] = _steps(model, [share(batch, rank, count) for batch in batches])
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_several(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Found]]:
    """Recipes in so many processes; starting them takes longer than the steps."""

    @cache
    def found(count: int, *recipes: Path) -> dict[str, Found]:
        folder = tmp_path_factory.mktemp(f"{count}")
        mp.spawn(_run, args=(recipes, folder, free_port(), count), nprocs=count)
        return torch.load(folder / "found.pt")

    return found


@pytest.mark.parametrize(
    ("recipe", "count", "together"),
    [
        *(pytest.param(recipe, 2, tuple(QUICK), id=f"{name_of(recipe)}-2") for recipe in QUICK),
        *(
            pytest.param(recipe, 2, tuple(ONE_PER_METHOD), id=f"{name_of(recipe)}-2", marks=pytest.mark.slow)
            for recipe in ONE_PER_METHOD
            if recipe not in QUICK
        ),
        *(pytest.param(recipe, 4, tuple(FOUR), id=f"{name_of(recipe)}-4", marks=pytest.mark.slow) for recipe in FOUR),
    ],
)
def test_sharded_processes_equal_one(
    recipe: Path, count: int, together: tuple[Path, ...], of_several: Callable[..., dict[str, Found]], tmp_path: Path
) -> None:
    one = _steps(*_made(recipe, tmp_path))
    several = of_several(count, *together)[name_of(recipe)]
    assert one.keys() == several.keys() and one["gradients"]
    for part, values in one.items():
        assert values.keys() == several[part].keys()
        # float32 sums in another order: 1e-5 of the value, or of the part's largest one where a gradient is all but zero
        scale = max((float(value.nan_to_num(0.0, 0.0, 0.0).abs().max()) for value in values.values() if value.numel()), default=0.0)
        for name, value in values.items():
            torch.testing.assert_close(
                several[part][name],
                value,
                rtol=1e-5,
                atol=1e-5 * scale,
                equal_nan=True,  # what a state has not seen yet
                msg=lambda text, name=name, part=part: f"{part} {name}: {text}",
            )
