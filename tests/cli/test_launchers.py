"""The launchers of recipes/cluster: what they start, what they say where a variable is missing, and when a job goes back into the queue."""

import os
import subprocess
from pathlib import Path

import pytest
from shrinking import ROOT

SLURM = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": "17"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with commands that write down how they were called; `srun` runs what it is given, `python` ends with $STATUS."""
    commands = {
        "srun": 'while [ "${1#--}" != "$1" ]; do [ "$1" = --cpus-per-task ] && shift; shift; done; exec "$@"',
        "scontrol": "exit 0",
        "venv/bin/python": "exit ${STATUS:-0}",
    }
    for name, does in commands.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/usr/bin/env bash\necho "{path.name} $*" >> "{tmp_path}/calls"\n{does}\n')
        path.chmod(0o755)
    return tmp_path


def launched(script: str, place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = f"{place}:{own['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "cluster" / script), *arguments],
        env=own | {"PATH": path, "VENV": str(place / "venv"), **environment},
        capture_output=True,
        text=True,
        cwd=place,
    )


def calls(place: Path) -> list[str]:
    path = place / "calls"
    return path.read_text().splitlines() if path.is_file() else []


def test_a_job_of_slurm_starts_one_process_per_gpu_and_leaves_the_strategy_to_the_recipe(place: Path) -> None:
    done = launched("slurm.sh", place, "paper/x", "--data.batch_size", "4", SLURM_SUBMIT_DIR=str(place), **SLURM)
    assert done.returncode == 0, done.stderr
    srun, python = calls(place)
    assert srun.startswith("srun --kill-on-bad-exit --cpus-per-task 8 ")
    words = "-m glpretrain.cli pretrain paper/x --trainer.num_nodes 2 --trainer.devices 8 --data.batch_size 4"
    assert python == f"python {words}"


@pytest.mark.parametrize(("status", "requeues"), [("75", True), ("1", False), ("2", False)])
def test_only_a_job_that_a_signal_ended_goes_back_into_the_queue(status: str, requeues: bool, place: Path) -> None:
    done = launched("slurm.sh", place, "x", SLURM_SUBMIT_DIR=str(place), STATUS=status, **SLURM)
    assert ("scontrol requeue 17" in calls(place)) is requeues
    assert done.returncode == (0 if requeues else int(status))


@pytest.mark.parametrize("missing", ["SLURM_SUBMIT_DIR", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK"])
def test_a_variable_of_slurm_that_is_missing_is_one_line(missing: str, place: Path) -> None:
    given = {name: value for name, value in {**SLURM, "SLURM_SUBMIT_DIR": str(place)}.items() if name != missing}
    done = launched("slurm.sh", place, "x", **given)
    assert done.returncode != 0 and not calls(place)
    (line,) = done.stderr.splitlines()
    assert f"{missing}: is not set: " in line and "sbatch" in line


def test_torchrun_meets_at_one_place_and_starts_again(place: Path) -> None:
    environment = {"NODES": "2", "GPUS": "8", "RENDEZVOUS": "first:29500", "RESTARTS": "3"}
    assert launched("torchrun.sh", place, "paper/x", "--trainer.max_steps", "5", **environment).returncode == 0
    (line,) = calls(place)
    assert "--nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint first:29500 " in line
    assert line.endswith("pretrain paper/x --trainer.num_nodes 2 --trainer.devices 8 --trainer.max_steps 5")
    assert launched("torchrun.sh", place, "mmc").returncode == 0
    assert "--nnodes 1 --nproc-per-node 1 --max-restarts 0 --standalone" in calls(place)[-1]


def test_torchrun_without_a_meeting_place_or_an_environment_is_one_line(place: Path) -> None:
    done = launched("torchrun.sh", place, "x", NODES="2")
    assert done.returncode != 0 and "RENDEZVOUS: is not set: give host:port of the first machine" in done.stderr
    for script, environment in (("torchrun.sh", {}), ("slurm.sh", {**SLURM, "SLURM_SUBMIT_DIR": str(place)})):
        done = launched(script, place, "x", **{**environment, "VENV": "nowhere"})
        assert done.returncode == 2 and "nowhere/bin/python is not there: give VENV=path of an environment" in done.stderr
    assert not calls(place)


@pytest.mark.parametrize("script", ["slurm.sh", "torchrun.sh"])
def test_a_launcher_without_a_recipe_says_how_it_is_used(script: str, place: Path) -> None:
    done = launched(script, place)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")
