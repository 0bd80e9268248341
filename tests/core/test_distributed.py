"""Synced batch norm: torch's own in one process, and two processes equal one on the joined batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from glpretrain.core.distributed import SyncedBatchNorm


def wave(*shape: int, step: float = 0.37) -> torch.Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def step(norm: SyncedBatchNorm, rows: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients, and the buffers after the step."""
    rows = rows.clone().requires_grad_()
    output = norm(rows)
    (output * weight).sum().backward()
    return {"output": output.detach(), "gradient": rows.grad, **{name: value.clone() for name, value in norm.named_buffers()}}


def norms() -> list[SyncedBatchNorm]:
    return [SyncedBatchNorm(5), SyncedBatchNorm(5, track_running_stats=False), SyncedBatchNorm(5, affine=False, track_running_stats=False)]


def _run(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    halves = [values.chunk(2)[rank] for values in (wave(6, 3, 5), wave(6, 3, 5, step=0.71))]
    torch.save([step(norm, *halves) for norm in norms()], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(_run, args=(tmp_path,), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for norm, first, second in zip(norms(), *halves, strict=True):
        for name, expected in step(norm, wave(6, 3, 5), wave(6, 3, 5, step=0.71)).items():
            parts = [first[name], second[name]]
            found = torch.cat(parts) if name in ("output", "gradient") else parts[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # the order of float32 sums differs
            assert torch.equal(*parts) or name in ("output", "gradient")


def test_running_statistics_make_it_torchs_batch_norm() -> None:
    ours, theirs = SyncedBatchNorm(5), torch.nn.BatchNorm1d(5)
    rows = wave(11, 3, 5)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        assert torch.equal(ours(rows), theirs(rows.flatten(0, 1)).reshape(rows.shape))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_without_running_statistics_every_batch_normalises_itself_in_float32(training: bool) -> None:
    norm = SyncedBatchNorm(5, track_running_stats=False).train(training)
    assert list(norm.state_dict()) == ["weight", "bias"]
    output = norm(3.0 + wave(11, 5).bfloat16())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.mean(dim=0), torch.zeros(5), rtol=0, atol=1e-5)
