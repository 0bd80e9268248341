"""Runs in which positions move: one that was cut goes on with the same losses, and two processes are two micro-batches of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from contract import check_resume
from shrinking import QUIET, ROOT, shrunk

MOVED = '{"shift": 0.1, "rescale": 2.0}'


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_with_the_same_positions_and_losses(tmp_path: Path) -> None:
    check_resume(ROOT / "dinov3.yaml", tmp_path, "--model.init_args.encoder.init_args.rope_augmentation", MOVED)


@pytest.mark.slow
def test_two_processes_draw_positions_as_two_micro_batches_of_one(tmp_path: Path) -> None:
    """Each of them has draws of its own, from the key of its first item; DINO's losses of items do not see other items."""
    recipe = yaml.safe_load(shrunk(ROOT / "dino.yaml", tmp_path).read_text())
    encoder = recipe["model"]["init_args"]["encoder"]["init_args"]
    encoder |= {"name": "vit_small_patch16_dinov3", "init_values": 1.0, "rope_augmentation": {"shift": 0.1, "rescale": 2.0}}
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump(recipe))
    weights = []
    for name, processes, accumulated, moved in (("two", 2, 1, True), ("one", 1, 2, True), ("still", 1, 2, False)):
        command = [sys.executable, "-m", "glpretrain.cli", "fit", "--config", str(tmp_path / "moved.yaml"), *QUIET]
        command += ["--trainer.strategy", "ddp", "--trainer.accelerator", "cpu", "--trainer.devices", str(processes)]
        command += ["--trainer.accumulate_grad_batches", str(accumulated), "--data.batch_size", "2", "--runs", str(tmp_path / name)]
        command += [] if moved else ["--model.init_args.encoder.init_args.rope_augmentation", "null"]
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"WANDB_MODE": "disabled"})
        checkpoint = tmp_path / name / "moved" / "latest" / "checkpoints" / "last.ckpt"
        weights.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    two, one, still = weights
    learned = [key for key in two if key.startswith("student.") and two[key].is_floating_point()]
    for key in learned:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert max(float((one[key] - still[key]).abs().max()) for key in learned) > 1e-4, "the draws change the run"
