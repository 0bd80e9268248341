"""The plan of memory is what torch's allocator counts in a real step, and it needs neither the memory nor the files of the recipe."""

import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from processes import free_port
from shrinking import ROOT, built, shrunk
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_leaves

from glpretrain.bench.alone import Alone
from glpretrain.bench.machine import taken_bytes
from glpretrain.cli import main
from glpretrain.cli.planned import planned
from glpretrain.cli.training import Training
from glpretrain.core.batch import Batch
from glpretrain.core.shards import local
from glpretrain.encoders import ViT
from glpretrain.training.sharding import shard
from glpretrain.training.teacher import FrozenTeacher
from glpretrain.weights import export

QUIET = ("--trainer.logger", "false", "--evaluate", "false", "--trainer.accelerator", "cpu")
CHECKPOINTING = ("--model.init_args.optimization.activation_checkpointing", "true")
TOLERANCE = 0.02  # kernels take a little more for themselves; most plans agree to a thousandth


def batch_of(run: Training) -> Batch:
    data, encoder = run.datamodule, run.model.encoder
    items = range(min(data.batch_size, len(data.source)))
    assert len(items) == data.batch_size
    return data.make_batch(data.raw_batch(items, encoder=encoder, epoch=0), encoder=encoder)


def measured_bytes(run: Training, batch: Batch | None = None) -> int:
    """The most that torch's allocator on a CPU holds while the losses and gradients of a second step are computed."""
    method, batch = run.model.train(), batch_of(run) if batch is None else batch
    dtype = torch.bfloat16 if str(run.trainer.precision) == "bf16-mixed" else None
    alone = Alone(method, num_items=run.datamodule.batch_size, dtype=dtype)
    alone.step(batch)
    held = tree_leaves([batch, list(alone.optimizer.state.values()), list(method.parameters()), list(method.buffers())])
    own = [local(tensor) for tensor in held if isinstance(tensor, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in own}
    del held, own
    return sum(storages.values()) + taken_bytes(lambda: (alone.compute(batch), method.zero_grad(set_to_none=True)), torch.device("cpu"))


def planned_bytes(path: Path, *overrides: str) -> int:
    return planned(["--config", str(path), *overrides], gpus=None, gpu_memory=None).total


def test_a_plan_is_what_a_step_takes(tmp_path: Path) -> None:
    path = shrunk(ROOT / "mae.yaml", tmp_path)
    assert planned_bytes(path) == pytest.approx(measured_bytes(built(path, tmp_path)), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, ()) for name in ("dino", "dinov2", "fsfm", "ibot", "local_contrast", "mae", "mmc", "mmc_points", "mugs", "point_mae")),
        ("dino", ("--model.init_args.optimization.chunk_size", "32")),
        *((name, CHECKPOINTING) for name in ("dino", "mmc_points")),
    ],
)
def test_a_plan_of_a_quick_start_is_what_its_step_takes(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    path = ROOT / f"{name}.yaml"
    run = Training(["--config", str(path), *QUIET, "--runs", str(tmp_path), *overrides])
    plan, measured = planned_bytes(path, *overrides, "--trainer.accelerator", "cpu"), measured_bytes(run)
    print(f"{name} {' '.join(overrides)}: planned {plan / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert plan == pytest.approx(measured, rel=TOLERANCE)


def test_a_plan_of_activation_checkpointing_is_what_a_step_takes(tmp_path: Path) -> None:
    path = shrunk(ROOT / "mae.yaml", tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["model"]["init_args"]["encoder"]["init_args"]["depth"] = 4
    path.write_text(yaml.safe_dump(recipe))
    plan = planned(["--config", str(path), *CHECKPOINTING, "--trainer.accelerator", "cpu"], gpus=None, gpu_memory=None)
    own, other = plan.plans["checkpointing"], plan.plans["whole batch"]
    assert own.rows["activations of the encoder"] < 0.5 * other.rows["activations of the encoder"] and own.total < other.total
    assert next(iter(plan.plans)) == "checkpointing"
    run = Training(["--config", str(path), *QUIET, "--runs", str(tmp_path), *CHECKPOINTING])
    assert run.model.encoder.activation_checkpointing
    assert own.total == pytest.approx(measured_bytes(run), rel=TOLERANCE)
    assert other.total == pytest.approx(measured_bytes(built(path, tmp_path)), rel=TOLERANCE)


def _measure_shards(rank: int, path: Path, words: tuple[str, ...], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    run = Training(["--config", str(path), *QUIET, "--runs", str(folder / f"runs{rank}"), *words])
    batch = batch_of(run)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    shard(run.model, init_device_mesh("cpu", (2,)))
    measured = measured_bytes(run, batch)
    if rank == 0:
        (folder / "measured").write_text(str(measured))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), CHECKPOINTING], ids=["whole batch", "checkpointing"])
@pytest.mark.parametrize("name", ["dino", "ibot", "mae", "mmc"])
def test_a_plan_of_shards_is_what_one_of_two_processes_takes(name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    # So large that weights count, and few items: a plan of activations alone would not show whether they are divided.
    sizes = ("--data.batch_size", "4", "--model.init_args.encoder.init_args.embed_dim", "384", "--trainer.accelerator", "cpu")
    path, words = ROOT / f"{name}.yaml", (*words, *sizes)
    mp.spawn(_measure_shards, args=(path, words, tmp_path, free_port()), nprocs=2)
    measured = int((tmp_path / "measured").read_text())
    plan, whole = (
        planned(["--config", str(path), *words, "--trainer.strategy", strategy], gpus=2, gpu_memory=None) for strategy in ("fsdp2", "ddp")
    )
    found = {"planned": plan.total, "measured": measured, "replicated": whole.total}
    print(f"{name} {' '.join(words)}: {', '.join(f'{kind} {number / 1e6:.1f} MB' for kind, number in found.items())}")
    # gloo keeps copies until they are sent, so a busy machine holds more of them: 0 to 17 % above the plan, seen so far.
    assert 0.8 * measured <= plan.total <= 1.02 * measured
    for row in ("parameters of the student", "optimizer"):
        shares = [next(iter(one.plans.values())).rows[row] for one in (plan, whole)]
        assert shares[0] == pytest.approx(0.5 * shares[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpfm", "hybrid"])
def test_a_plan_holds_experts(name: str, tmp_path: Path) -> None:
    path = shrunk(ROOT / f"{name}.yaml", tmp_path)
    run = built(path, tmp_path)
    plan = planned(["--config", str(path)], gpus=None, gpu_memory=None)
    assert plan.total == pytest.approx(measured_bytes(run), rel=TOLERANCE)
    experts = [module for module in run.model.modules() if isinstance(module, FrozenTeacher)]
    assert plan.plans["whole batch"].rows["experts"] == sum(one.nbytes for expert in experts for one in expert.parameters()) > 0


@pytest.mark.slow
def test_experts_are_planned_from_their_files_and_by_their_names(tmp_path: Path) -> None:
    encoder = ViT("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    export(encoder.eval(), tmp_path / "backbone", source="a test")
    path = shrunk(ROOT / "gpfm.yaml", tmp_path)
    recipe = yaml.safe_load(path.read_text())
    experts = recipe["model"]["init_args"]["experts"]
    given = [{"path": str(tmp_path / "backbone"), "precision": "float16"}, {"path": "vit_tiny_patch16_224", "random_weights": True}]
    for name, arguments in zip(experts, given, strict=True):
        experts[name] = {"class_path": "glpretrain.weights.load_expert", "init_args": {**arguments, "size": 48}}
    path.write_text(yaml.safe_dump(recipe))
    plan = planned(["--config", str(path)], gpus=None, gpu_memory=None)
    tiny = ViT("vit_tiny_patch16_224")
    counts = [sum(one.numel() for one in module.parameters()) for module in (encoder, tiny)]
    assert plan.plans["whole batch"].rows["experts"] == 2 * counts[0] + 4 * counts[1] and not plan.notes


@pytest.mark.slow
def test_a_large_recipe_is_planned_without_its_memory_and_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    written = tmp_path / "plan.json"
    assert main(["bench", "paper/gpfm_vitl14_wsi", "--plan", "--gpus", "8", "--gpu_memory", "80", "--json", str(written)]) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # kB; its weights alone are 4 GB
    found = json.loads(written.read_text())
    assert 70e9 < found["total"] < 80e9 and 96 < found["fitting"] < 112
    assert found["num_processes"] == 8 and 0.9 < found["buckets"] / found["plans"]["whole batch"]["parameters of the student"] <= 1.0
    said = capsys.readouterr().out
    assert "expert uni: weights/uni is not here" in said and "fits into 80 GB" in said


@pytest.mark.slow
def test_a_giant_fits_where_it_is_sharded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "plan.json"
    assert main(["bench", "paper/dinov2_vitg14_in1k", "--plan", "--gpus", "8", "--json", str(written)]) == 0
    found = json.loads(written.read_text())
    own, checkpointing = found["plans"]["whole batch"], found["plans"]["checkpointing"]
    assert own["total"] == found["total"] < 80e9 and found["num_processes"] == 8 and found["buckets"] == 0
    assert checkpointing["total"] < 0.5 * own["total"]
    weights = 1.24e9 * 4 / 8  # a backbone of 1.13 billion parameters, and its heads
    assert own["parameters of the student"] == pytest.approx(weights, rel=0.02) and own["optimizer"] == pytest.approx(2 * weights, rel=0.02)
    assert own["parameters that are gathered"] > 0 and "parameters that are gathered" in capsys.readouterr().out.replace("\n", " ")
