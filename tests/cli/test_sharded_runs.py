"""Runs with `trainer.strategy: fsdp2`: what they train, save and export is what DistributedDataParallel's runs do, and they go on."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import free_port
from pytorch_lightning.utilities import rank_zero_only
from shrinking import ROOT, shrunk
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from glpretrain.callbacks.checkpoints import newest_whole, with_parts
from glpretrain.cli.training import Training
from glpretrain.core.shards import FILES, whole
from glpretrain.evaluate import KNN
from glpretrain.weights import load_backbone, load_heads

STEPS, CUT = 6, 3
QUIET = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]


class Observer(pl.Callback):
    """Counts the collectives that carry gradients, notes losses, and saves or stops where it is told to."""

    def __init__(self, *, save_to: Path | None = None) -> None:
        self.save_to = save_to
        self.reductions: Counter[int] = Counter()  # by the optimizer step that they belong to
        self.losses: list[float] = []
        self.start: dict[str, Tensor] = {}  # weights when the first step starts, whole
        self._step = 0

    def on_train_start(self, trainer, pl_module) -> None:
        self.start = {name: whole(value).cpu().clone() for name, value in pl_module.state_dict().items()}
        self._step = trainer.global_step
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.register_comm_hook(None, self._average)
        else:
            scatter = dist.reduce_scatter_single

            def counted(*args, **kwargs):
                self.reductions[self._step] += 1
                return scatter(*args, **kwargs)

            dist.reduce_scatter_single = counted

    def _average(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.reductions[self._step] += 1
        tensor = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(tensor, async_op=True).get_future().then(lambda future: future.value()[0])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))
        self._step = trainer.global_step
        if self.save_to is not None and trainer.global_step == CUT and not pl_module.step.is_open:
            trainer.save_checkpoint(self.save_to)


def _train(folder: Path, name: str, *options: str, save_to: Path | None = None) -> dict[str, object]:
    """One run; the first process returns what a test compares."""
    count = int(os.environ["COUNT"])
    os.environ["WORLD_SIZE"] = str(count)  # Lightning forgets it at the end of a run
    sizes = ["--trainer.max_steps", str(STEPS), "--data.batch_size", str(4 // count), "--data.source.init_args.length", "48"]
    words = [*QUIET, "--evaluate", "false", "--report", "false", *sizes, "--trainer.devices", str(count), "--runs", str(folder / name)]
    run = Training(["--config", str(folder / "dino.yaml"), *words, *options])
    observer, scatter = Observer(save_to=save_to), dist.reduce_scatter_single
    run.trainer.callbacks.append(observer)
    try:
        run.fit()
    finally:
        dist.reduce_scatter_single = scatter
    state = {key: whole(value).cpu().clone() for key, value in run.model.state_dict().items()}
    return {"state": state, "losses": observer.losses, "reductions": dict(observer.reductions), "start": observer.start}


def _of_two(folder: Path) -> dict[str, dict[str, object]]:
    """All runs of two processes."""
    fsdp2, ddp, cut = ("--trainer.strategy", "fsdp2"), ("--trainer.strategy", "ddp"), folder / "cut.ckpt"
    twice = ["--trainer.accumulate_grad_batches", "2"]
    return {
        "fsdp2": _train(folder, "fsdp2", *fsdp2, save_to=cut),
        "ddp": _train(folder, "ddp", *ddp, save_to=folder / "ddp.ckpt"),
        "resumed": _train(folder, "resumed", *fsdp2, "--ckpt_path", str(cut)),
        "from ddp": _train(folder, "from_ddp", *fsdp2, "--ckpt_path", str(folder / "ddp.ckpt")),
        "fsdp2 twice": _train(folder, "fsdp2_twice", *fsdp2, *twice),
        "ddp twice": _train(folder, "ddp_twice", *ddp, *twice),
        "blocked": _written_where_one_cannot(folder),
        "scored": _scored(folder, "scored", *fsdp2),
        "scored ddp": _scored(folder, "scored_ddp", *ddp),
    }


def _scored(folder: Path, name: str, *options: str) -> dict[str, object]:
    """A run with scores before and after."""
    os.environ["WORLD_SIZE"] = "2"
    sizes = ["--trainer.max_steps", "2", "--data.batch_size", "2", "--data.source.init_args.length", "48", "--trainer.devices", "2"]
    words = [*QUIET, *sizes, "--runs", str(folder / name)]
    run = Training(["--config", str(folder / "dino.yaml"), *words, *options])
    evaluators = run.evaluators
    assert evaluators is not None
    evaluators.evaluators, evaluators._takes_defaults = {"knn": KNN(k=(1,))}, False
    run.fit()
    return {"before": evaluators.before, "after": evaluators.after}


def _written_where_one_cannot(folder: Path) -> dict[str, object]:
    """The second process is given a folder that cannot be made."""
    place = folder / "dino.yaml" / "parts" if dist.get_rank() else folder / "blocked"
    head, is_written = with_parts({"global_step": 1, "value": torch.ones(2)}, place, step=1)
    return {"is_written": is_written, "number": len(head[FILES])}


def _of_four(folder: Path) -> dict[str, dict[str, object]]:
    return {"of four": _train(folder, "four", "--trainer.strategy", "fsdp2", "--ckpt_path", str(folder / "cut.ckpt"))}


def _process(rank: int, function: Callable[[Path], dict], folder: Path, port: int, count: int) -> None:
    torch.set_num_threads(1)
    rank_zero_only.rank = rank
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "COUNT": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = function(folder)
    if rank == 0:
        torch.save(found, folder / f"{function.__name__}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two and of four processes; each start of processes takes longer than a run."""
    made = tmp_path_factory.mktemp("sharded")
    shrunk(ROOT / "dino.yaml", made)
    for function, count in ((_of_two, 2), (_of_four, 4)):
        mp.spawn(_process, args=(function, made, free_port(), count), nprocs=count)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict]:
    return torch.load(folder / "_of_two.pt") | torch.load(folder / "_of_four.pt")


@pytest.mark.slow
def test_a_sharded_run_is_scored_as_one_whose_processes_hold_everything(found: dict[str, dict]) -> None:
    assert found["scored"]["before"] and found["scored"]["before"] == found["scored ddp"]["before"]
    assert found["scored"]["after"].keys() == found["scored ddp"]["after"].keys()


def require_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Shards add the gradients of the views of one size up over the processes, before those of all sizes are added, so that the last bits
    differ; AdamW's steps amplify the rounding of gradients that are all but zero."""
    assert one.keys() == other.keys()
    assert max(float((value.double() - other[name].double()).abs().max()) for name, value in one.items()) < 1e-4


def require_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.slow
def test_a_sharded_run_of_two_processes_is_the_replicated_one(found: dict[str, dict]) -> None:
    assert found["fsdp2"]["losses"] == pytest.approx(found["ddp"]["losses"], rel=1e-5) and len(found["fsdp2"]["losses"]) == STEPS
    require_close(found["fsdp2"]["state"], found["ddp"]["state"])


@pytest.mark.slow
def test_a_sharded_checkpoint_resumes_to_the_last_bit(found: dict[str, dict]) -> None:
    assert found["resumed"]["losses"] == found["fsdp2"]["losses"][CUT:]
    require_equal(found["resumed"]["state"], found["fsdp2"]["state"])


@pytest.mark.slow
def test_a_replicated_checkpoint_goes_on_in_shards(found: dict[str, dict]) -> None:
    require_close(found["from ddp"]["state"], found["ddp"]["state"])


@pytest.mark.slow
def test_four_processes_go_on_with_the_shards_of_two(found: dict[str, dict]) -> None:
    require_equal(found["of four"]["start"], found["resumed"]["start"])
    require_close(found["of four"]["state"], found["fsdp2"]["state"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_gradients_travel_with_the_last_micro_batch_of_a_step(strategy: str, found: dict[str, dict]) -> None:
    once, twice = found[strategy]["reductions"], found[f"{strategy} twice"]["reductions"]
    assert len(found[f"{strategy} twice"]["losses"]) == 2 * STEPS
    assert sorted(once) == sorted(twice) == list(range(STEPS))
    if strategy == "ddp":
        assert twice[1] == once[1] > 0  # it rebuilds its buckets after the first step
    else:  # FSDP2 reduces what a block has added up before it has the gradients of the last micro-batch
        assert 0 < once[1] <= twice[1] <= once[1] + 1 < 2 * once[1]


@pytest.mark.slow
def test_accumulated_gradients_of_shards_are_those_of_replicas(found: dict[str, dict]) -> None:
    require_close(found["fsdp2 twice"]["state"], found["ddp twice"]["state"])


@pytest.mark.slow
def test_shards_become_one_exported_backbone_on_a_cpu(folder: Path) -> None:
    (run,) = [path for path in (folder / "fsdp2" / "dino").iterdir() if not path.is_symlink()]
    exported, items = load_backbone(run / "backbone"), torch.linspace(-1.0, 1.0, 3 * 48 * 48).view(1, 3, 48, 48)
    consolidated = load_backbone(run / "checkpoints" / "last.ckpt")
    heads = load_heads(run / "checkpoints" / "last.ckpt")
    assert any(name.startswith("heads.") for name in heads) and all(tensor.isfinite().all() for tensor in heads.values())
    assert torch.equal(consolidated(items).patches, exported(items).patches)
    assert not torch.equal(load_backbone(run / "checkpoints" / "last.ckpt", which="student")(items).patches, exported(items).patches)


@pytest.mark.slow
def test_only_the_shards_of_checkpoints_that_are_there_are_kept(folder: Path) -> None:
    (run,) = [path for path in (folder / "fsdp2" / "dino").iterdir() if not path.is_symlink()]
    assert sorted(path.name[:11] for path in (run / "checkpoints").glob("*.shard")) == [f"step-{STEPS}-{rank}-of" for rank in (0, 1)]


@pytest.mark.slow
def test_a_damaged_or_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    (run,) = [path for path in (folder / "fsdp2" / "dino").iterdir() if not path.is_symlink()]
    for path in (run / "checkpoints").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    good, lines = newest_whole(tmp_path)
    assert good is not None and good.step == STEPS and not lines
    first, second = sorted(tmp_path.glob("*.shard"))
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(bytes(content))
    none, (line,) = newest_whole(tmp_path)
    assert none is None and f"its part {second.name} is missing, or its bytes are not those that were written" in line
    first.unlink()
    with pytest.raises(ValueError, match=rf"is written in 2 shards, of which {first.name} is not beside it; copy all of them"):
        load_backbone(tmp_path / "last.ckpt")


@pytest.mark.slow
def test_a_part_that_cannot_be_written_keeps_all_processes_from_writing_the_checkpoint(found: dict[str, dict]) -> None:
    assert found["blocked"] == {"is_written": False, "number": 1}


@pytest.mark.slow
def test_one_process_without_the_strategy_refuses_shards(folder: Path, tmp_path: Path) -> None:
    recipe = shrunk(ROOT / "dino.yaml", tmp_path)
    words = [*QUIET, "--evaluate", "false", "--report", "false", "--trainer.max_steps", str(STEPS), "--runs", str(tmp_path / "runs")]
    run = Training(["--config", str(recipe), *words, "--data.source.init_args.length", "48", "--ckpt_path", str(folder / "cut.ckpt")])
    with pytest.raises(ValueError, match=r"checkpoint: it is sharded; go on with trainer\.strategy=fsdp2"):
        run.fit()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.strategy", "fsdp"], "trainer.strategy=fsdp; accepted: fsdp2, which shards all parameters, ddp, auto"),
        (["--trainer.strategy", "fsdp2", "--trainer.precision", "16-mixed"], "precision=16-mixed with strategy fsdp2; accepted: bf16"),
    ],
)
def test_what_cannot_be_sharded_is_refused(options: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        Training(["--config", str(shrunk(ROOT / "dino.yaml", tmp_path)), *QUIET, "--runs", str(tmp_path / "runs"), *options])
