"""Two processes on half a batch each compute what one process computes on the whole: terms, gradients and moved state."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract import build, fixed_batch, share, terms_of
from shrinking import ONE_PER_METHOD, ROOT, name_of

from glpretrain.core.batch import Batch
from glpretrain.methods.base import Method
from glpretrain.training.memory import states_of

ITEMS = 8
GRAM = ("--model.init_args.gram", '{"snapshot_at": 0.3, "start": 0.4, "ramp": 0.05}')
CASES: dict[str, tuple[Path, tuple[str, ...]]] = {name_of(recipe): (recipe, ()) for recipe in ONE_PER_METHOD}
CASES |= {f"{name} with gram": (ROOT / f"{name}.yaml", GRAM) for name in ("dino", "ibot")}
Result = dict[str, dict[str, torch.Tensor]]


def _step(model: Method, batch: Batch, average) -> Result:
    terms = {name: value.mean() for name, value in terms_of(model, batch).items()}
    model.total(terms, 0.5).backward()
    gradients = {name: average(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    for state in states_of(model):
        state.advance()
    own = {id(buffer) for state in states_of(model) for buffer in state.buffers()}
    state = {name: value for name, value in model.named_buffers() if id(value) in own and not name.endswith("pending")}
    return {"terms": {name: average(value.detach()) for name, value in terms.items()}, "gradients": gradients, "state": state}


def _run(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    # Built first: a trainer that finds a process group would take it for its own.
    built = {name: build(recipe, folder / str(rank), *arguments) for name, (recipe, arguments) in CASES.items()}
    prepared = {name: (training.model, share(fixed_batch(training, count=ITEMS), rank, 2)) for name, training in built.items()}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def average(value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total / 2

    results = {name: _step(model, batch, average) for name, (model, batch) in prepared.items()}
    if rank == 0:
        torch.save(results, folder / "two.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """One recipe of every method in one pair of processes: starting them takes longer than the step."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "0").mkdir(), (folder / "1").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run, args=(folder, port), nprocs=2)
    return torch.load(folder / "two.pt")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, of_two: dict[str, Result], tmp_path: Path) -> None:
    recipe, arguments = CASES[name]
    training = build(recipe, tmp_path, *arguments)
    one = _step(training.model, fixed_batch(training, count=ITEMS), lambda value: value)
    two = of_two[name]
    for part in ("terms", "gradients", "state"):
        assert one[part].keys() == two[part].keys()
        # A state that has not moved yet may hold what is no number, such as the progress at which a trunk was released.
        finite = (value[value.isfinite()] for value in one[part].values())
        scale = max((value.abs().max().item() for value in finite if len(value)), default=0.0)
        for key, value in one[part].items():
            # float32 sums in another order: 1e-5 of the value, or of the part's largest value where a gradient is all but zero
            options = {"rtol": 1e-5, "atol": 1e-5 * scale, "equal_nan": part == "state"}
            torch.testing.assert_close(two[part][key], value, **options, msg=lambda text, key=key: f"{key}: {text}")
