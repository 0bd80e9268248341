"""Disks that are full or cannot be written: file systems in memory, which a process mounts for itself alone."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from shrinking import ROOT, shrunk

from glpretrain.callbacks.checkpoints import newest_whole

EVERY_STEP = json.dumps([{"class_path": "glpretrain.callbacks.Checkpoints", "init_args": {"every_n_steps": 1}}])
QUIET = (
    "--trainer.enable_progress_bar",
    "false",
    "--evaluate",
    "false",
    "--report",
    "false",
    "--trainer.accelerator",
    "cpu",
    "--trainer.max_steps",
    "4",
)
KEPT = "kept"  # where the folder of runs is copied to before the file system disappears with its process


def mounted(folder: Path, mount: str, command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder after a mount that it alone sees."""
    script = f'{mount} || exit 99; "$@"; status=$?; cp -r disk/runs {KEPT} 2>/dev/null; exit $status'
    ended = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, "bash", *command],
        cwd=folder,
        env={**os.environ, "WANDB_MODE": "disabled", **environment},
        capture_output=True,
        text=True,
    )
    if ended.returncode == 99 or "unshare" in ended.stderr:
        pytest.skip("this user may not mount a file system")
    return ended


def pretrain(folder: Path, *options: str) -> list[str]:
    (folder / "disk").mkdir()
    recipe = shrunk(ROOT / "dino.yaml", folder)
    return [sys.executable, "-m", "glpretrain.cli", "pretrain", str(recipe), *QUIET, *options]


def errors(ended: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in ended.stderr, ended.stderr
    return [line for line in ended.stderr.splitlines() if line.startswith("glpretrain: error: ")]


@pytest.mark.slow
def test_a_folder_of_runs_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    ended = mounted(tmp_path, "mount -t tmpfs -o size=64k,ro none disk", pretrain(tmp_path, "--runs", "disk/runs"))
    assert ended.returncode == 2 and len(errors(ended)) == 1 and "Read-only file system: 'disk/runs'" in errors(ended)[0]


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_start_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    mount = "mount -t tmpfs -o size=16k none disk && head -c 100000 /dev/zero > disk/full || true"
    ended = mounted(tmp_path, mount, pretrain(tmp_path, "--runs", "disk/runs"))
    assert ended.returncode == 2 and len(errors(ended)) == 1, ended.stderr
    assert "No space left on device: " in errors(ended)[0] and "disk/runs" in errors(ended)[0]


@pytest.mark.slow
def test_a_disk_that_fills_keeps_the_checkpoints_that_are_there_and_the_run_ends_well(tmp_path: Path) -> None:
    """There is room for two checkpoints of 260 kB, and a third is never written."""
    options = ("--runs", "disk/runs", "--trainer.logger", "false", "--trainer.callbacks", EVERY_STEP)
    ended = mounted(tmp_path, "mount -t tmpfs -o size=700k none disk", pretrain(tmp_path, *options))
    assert ended.returncode == 0 and not errors(ended), ended.stderr
    assert ended.stderr.count("not written") == 2 and "No space left on device" in ended.stderr
    (folder,) = (path for path in (tmp_path / KEPT / "dino").iterdir() if path.name != "latest")
    whole, damaged = newest_whole(folder / "checkpoints")
    assert whole is not None and whole.step == 2 and not damaged
    assert not list(folder.rglob("*.part")) and (folder / "backbone" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_full_folder_for_temporary_files_costs_no_checkpoint(tmp_path: Path) -> None:
    mount = "mount -t tmpfs -o size=16k none disk && head -c 100000 /dev/zero > disk/full || true"
    command = pretrain(tmp_path, "--runs", "runs", "--data.num_workers", "1", "--trainer.callbacks", EVERY_STEP)
    ended = mounted(tmp_path, mount, command, TMPDIR=str(tmp_path / "disk"))
    assert ended.returncode == 0 and not errors(ended) and "not written" not in ended.stderr, ended.stderr
    (folder,) = (path for path in (tmp_path / "runs" / "dino").iterdir() if path.name != "latest")
    assert (whole := newest_whole(folder / "checkpoints")[0]) is not None and whole.step == 4
