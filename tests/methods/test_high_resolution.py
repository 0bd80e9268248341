"""A run whose views have other sizes in every step: loss and gradients in each size, resumption, and a run that follows another one."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from contract import build, check_gradients, check_items, check_resume, check_terms, terms_of
from shrinking import QUIET, ROOT, shrunk
from torch import Tensor

from glpretrain.cli import main
from glpretrain.cli.training import Training
from glpretrain.core.batch import Batch
from glpretrain.data.items import step_key
from glpretrain.data.module import DataModule
from glpretrain.encoders import ViT
from glpretrain.methods import IBOT, MaskEmbed
from glpretrain.weights import load_backbone

HIRES, GRAM = (ROOT / "paper" / f"dinov3_vitl16_{name}.yaml" for name in ("hires", "gram"))
SIDES = ((48, 24, 96), (56, 16, 80), (56, 24, 80), (56, 32, 80), (56, 40, 80))  # of the shrunk recipe: global, local and clean


def in_size(training: Training, number: int) -> Batch:
    """A batch of the first step of the first epoch that drew sizes of this number."""
    data, encoder = training.datamodule, training.model.encoder
    step = next(step for step in range(1000) if data.views.drawn_size(step_key(seed=data.seed, epoch=0, step=step)) == number)
    return data.make_batch(data.raw_batch(range(4), encoder=encoder, epoch=0, step=step), encoder=encoder)


def in_size_alone(training: Training, number: int) -> Batch:
    """The same batch of data that know no other sizes."""
    data, encoder = training.datamodule, training.model.encoder
    own = DataModule(data.source, data.views.of_each_size()[number], batch_size=4, mask=data.mask, seed=data.seed)
    return own.make_batch(own.raw_batch(range(4), encoder=encoder, epoch=0), encoder=encoder)


def gradients(training: Training, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms, and the gradients of their sum."""
    terms = terms_of(training.model, batch)
    sum(value.mean() for value in terms.values()).backward()
    found = {name: p.grad.clone() for name, p in training.model.named_parameters() if p.grad is not None}
    training.model.zero_grad(set_to_none=True)
    return terms, found


def test_a_step_in_each_size_has_finite_terms_and_the_gradients_of_a_run_of_that_size(tmp_path: Path) -> None:
    training = build(HIRES, tmp_path, "--model.init_args.encoder.init_args.init_values", "1.0")  # with 1e-5 cls sees no patch
    seen = []
    for number, sides in enumerate(SIDES):
        batch = in_size(training, number)
        assert tuple(batch.views[name].items.shape[-1] for name in ("global", "local", "clean")) == sides
        assert batch.views["global"].mask.shape[-1] == (sides[0] // 8) ** 2
        check_terms(training.model, batch)
        check_gradients(training.model, batch)
        check_items(training.model, batch)
        terms, found = gradients(training, batch)
        same_terms, same = gradients(training, in_size_alone(training, number))
        assert set(terms) == {"cls", "patch", "koleo", "gram"} and found.keys() == same.keys()
        assert all(torch.equal(value, same_terms[name]) for name, value in terms.items())
        assert all(torch.equal(value, same[name]) for name, value in found.items())
        seen.append(tuple(value.mean().item() for value in terms.values()))
    assert len(set(seen)) == len(SIDES), "every size gives terms of its own"


def with_encoder(folder: Path, **arguments: object) -> Training:
    """The shrunk recipe with another encoder."""
    recipe = yaml.safe_load(shrunk(HIRES, folder).read_text())
    small = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    recipe["model"]["init_args"]["encoder"]["init_args"] = small | arguments
    (folder / "other.yaml").write_text(yaml.safe_dump(recipe))
    return Training(["--config", str(folder / "other.yaml"), "--runs", str(folder / "runs"), *QUIET])


def test_learned_positions_are_resized_to_every_size(tmp_path: Path) -> None:
    training = with_encoder(tmp_path, name="vit_tiny_patch16_224")
    for number in range(len(SIDES)):
        check_gradients(training.model, in_size(training, number))


def test_an_encoder_of_one_size_refuses_several_before_the_first_step(tmp_path: Path) -> None:
    training = with_encoder(tmp_path, name="beit_base_patch16_224")
    with pytest.raises(ValueError, match=r"beit_base_patch16_224: size \(24, 24\) given; its relative positions accept \(48, 48\)"):
        training.fit()


def test_methods_that_keep_something_for_every_place_take_one_size() -> None:
    def method(patch_centre: Literal["shared", "position"]) -> IBOT:
        encoder = ViT("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=24, depth=1, num_heads=3)
        return IBOT(encoder, num_prototypes=16, hidden_dim=16, bottleneck_dim=8, patch_centre=patch_centre)

    assert MaskEmbed.uses["global"].one_size and not IBOT.uses["global"].one_size
    assert [method(centre).uses["global"].one_size for centre in ("shared", "position")] == [False, True]


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_with_the_same_sizes_and_losses(tmp_path: Path) -> None:
    check_resume(HIRES, tmp_path)


def ran(recipe: Path, folder: Path, *arguments: str) -> Path:
    """The folder of a run of the shrunk recipe from the command line."""
    small = ["--runs", str(folder / "runs"), "--evaluate", "false", "--report", "false", "--trainer.log_every_n_steps", "1", *arguments]
    assert main(["fit", "--config", str(shrunk(recipe, folder)), *small]) == 0
    return (folder / "runs" / recipe.stem / "latest").resolve()


@pytest.mark.slow
def test_a_run_goes_on_with_another_ones_backbone_which_is_its_anchor_and_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each, on embedded scenes."""
    monkeypatch.chdir(tmp_path)
    first = ran(GRAM, tmp_path)
    start = {"path": str(first / "checkpoints" / "last.ckpt"), "heads": True}
    second = ran(HIRES, tmp_path, "--init_from", json.dumps(start))
    assert json.loads((second / "results.json").read_text())["init_from"]["heads_tensors"] > 0
    losses = [float(row["train/loss"]) for row in csv.DictReader((second / "metrics.csv").open())]
    assert len(losses) == 2 and all(loss > 0.0 for loss in losses)
    state = torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    start, prefix = load_backbone(first / "backbone").backbone_state(), "anchor.snapshot.encoder.model."
    anchor = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    assert anchor.keys() == start.keys() and all(torch.equal(value, start[name]) for name, value in anchor.items())


def test_groups_that_the_items_of_a_step_do_not_fill_are_refused_before_the_first(tmp_path: Path) -> None:
    training = build(HIRES, tmp_path, "--model.init_args.koleo_among", "3")
    with pytest.raises(ValueError, match="koleo_among=3 given; accepted: joint, process, or a divisor of the 4 items of a step"):
        training.fit()
    assert training.model.global_step == 0 and not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.slow
def test_two_processes_have_the_sizes_and_losses_of_one(tmp_path: Path) -> None:
    """With what depends on a process alone left out: exact shares of a batch, positions that move."""
    mask = '{"class_path": "glpretrain.masking.DINOv2Mask", "init_args": {"prob": 0.5, "ratio": [0.1, 0.5]}}'
    common = ["--model.init_args.koleo_among", "4", "--data.mask", mask, "--trainer.max_steps", "3"]
    common += [
        "--model.init_args.encoder.init_args.rope_augmentation",
        "null",
        "--trainer.strategy",
        "ddp",
        "--trainer.log_every_n_steps",
        "1",
    ]
    losses = []
    for processes, batch_size in ((1, 4), (2, 2)):
        own = ["--trainer.devices", str(processes), "--data.batch_size", str(batch_size), "--runs", str(tmp_path / str(processes))]
        command = [sys.executable, "-m", "glpretrain.cli", "fit", "--config", str(shrunk(HIRES, tmp_path)), *common, *own]
        command += ["--evaluate", "false", "--report", "false"]
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"WANDB_MODE": "disabled"}, cwd=tmp_path)
        table = tmp_path / str(processes) / HIRES.stem / "latest" / "metrics.csv"
        losses.append([float(row["train/loss"]) for row in csv.DictReader(table.open())])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)  # float32 sums in another order
