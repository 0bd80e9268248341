"""The soak test and the table of faults in small, so that both scripts keep up with the package."""

from pathlib import Path

import health_table
import pytest
import torch
from shrinking import ROOT
from soak import MOMENTS, compare, soak


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mugs", "point_mae"])  # queues, a memory and a centre; neither teacher nor states
def test_a_run_that_is_killed_at_every_moment_of_a_step_has_the_weights_of_one_that_is_not(name: str, tmp_path: Path) -> None:
    soaked = soak(ROOT / f"{name}.yaml", work=tmp_path, steps=90, every=10, checkpoints=5)
    assert soaked.kills == len(MOMENTS) and soaked.again > 0
    assert soaked.tensors > 100 and soaked.differ == []
    whole, resumed = ([one for one in several if one["step"] == 50] for several in (soaked.undisturbed, soaked.killed))
    assert resumed and max(one["files"] for one in resumed) <= whole[0]["files"]
    assert max(one["disk"] for one in resumed) < 1.5 * whole[0]["disk"]  # no half-written checkpoint stays


def test_a_soak_notices_one_number(tmp_path: Path) -> None:
    weights = torch.arange(5.0)
    for name, value in (("whole", weights), ("equal", weights.clone()), ("other", weights + torch.eye(5)[3] * 1e-6)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "backbone").mkdir()
        (tmp_path / name / "backbone" / "model.safetensors").write_bytes(b"weights")
        state = {"state_dict": {"weight": weights}, "optimizer_states": [{"state": {0: {"exp_avg": value}}}], "global_step": 3, "epoch": 0}
        torch.save(state, tmp_path / name / "checkpoints" / "last.ckpt")
    assert compare(tmp_path / "whole", tmp_path / "equal") == (4, [])
    assert compare(tmp_path / "whole", tmp_path / "other") == (4, ["optimizer_states[0].state.0.exp_avg"])


PAIRS = [
    *(("mae", "none"), ("mae", "rate x 1000"), ("dcglr", "student's temperature 0.001"), ("dinov2", "one prototype wins")),
    *(("fsfm", "momentum 0"), ("mmc", "temperature of a contrast 0.001"), ("hybrid", "encoder without gradient")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "fault"), PAIRS)
def test_a_fault_of_a_quick_start_is_named_within_a_hundred_steps(recipe: str, fault: str, tmp_path: Path) -> None:
    verdicts = health_table.outcome(ROOT / f"{recipe}.yaml", fault, work=tmp_path)
    assert verdicts is not None and health_table.is_named(fault, verdicts), verdicts
