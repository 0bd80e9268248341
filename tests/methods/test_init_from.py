"""Runs that go on from a backbone: where they start, what is frozen for how long, and what is refused."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from contract import Losses, build, check_resume
from shrinking import ONE_PER_METHOD, QUIET, ROOT, name_of, shrunk

import glpretrain
import glpretrain.encoders
from glpretrain.cli import main
from glpretrain.encoders import Encoder, ViT, fingerprint
from glpretrain.encoders.timm_model import pair
from glpretrain.methods.base import Method
from glpretrain.weights import export

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def moved(encoder: Encoder) -> Encoder:
    """With features that random weights do not have."""
    with torch.no_grad():
        for index, parameter in enumerate(encoder.parameters()):
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel()).reshape(parameter.shape) * 0.7 + index))
    return encoder


def small(**changes) -> ViT:
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "mean": MEAN, "std": STD, "licence": "ours"}
    return moved(ViT("vit_tiny_patch16_224", **(sizes | changes)))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small(), tmp_path_factory.mktemp("published") / "backbone", source="elsewhere")


def backbone_for(recipe: Path, folder: Path) -> Path:
    """An encoder as the shrunk recipe's own, with other statistics where the recipe names none."""
    (folder / "made").mkdir()
    entry = yaml.safe_load(shrunk(recipe, folder / "made").read_text())["model"]["init_args"]["encoder"]
    kind = vars(glpretrain.encoders)[entry["class_path"].rpartition(".")[2]]
    statistics = {"mean": MEAN, "std": STD} if kind is ViT else {}
    return export(moved(kind(**(statistics | entry["init_args"]))), folder / "published", source="elsewhere")


def settings(**values: float) -> list[str]:
    return ["--model.init_args.optimization.trunk", json.dumps(values)]


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


class Watch(pl.Callback):
    """After every step: is the trunk what it was at the start, are the heads, and what does the optimizer do?"""

    def __init__(self) -> None:
        self.frozen: list[bool] = []
        self.trunk_stayed: list[bool] = []
        self.heads_stayed: list[bool] = []
        self.with_gradient: list[set[bool]] = []
        self.rates: list[dict[bool, set[float]]] = []
        self.training: list[bool] = []

    def on_train_start(self, trainer, module: Method) -> None:
        self.trunk, self.heads = state_of(module.student.encoder), state_of(module.student.heads)

    def on_before_optimizer_step(self, trainer, module: Method, optimizer) -> None:
        self.with_gradient.append({p.grad is not None for p in module.student.encoder.parameters()})
        self.training.append(module.student.encoder.training)

    def on_train_batch_end(self, trainer, module: Method, outputs, batch, batch_idx) -> None:
        self.frozen.append(not module.student.trunk_learns)
        self.trunk_stayed.append(equal(self.trunk, state_of(module.student.encoder)))
        self.heads_stayed.append(equal(self.heads, state_of(module.student.heads)))
        groups = trainer.optimizers[0].param_groups
        self.rates.append({trunk: {group["lr"] for group in groups if group["is_trunk"] is trunk} for trunk in (True, False)})


@pytest.mark.parametrize("recipe", ONE_PER_METHOD, ids=name_of)
def test_every_recipe_starts_there_and_freezes_its_trunk_first(recipe: Path, tmp_path: Path) -> None:
    backbone = backbone_for(recipe, tmp_path)
    options = ["--trainer.max_steps", "3", *settings(frozen=0.5, ramp=0.0), "--model.init_args.optimization.lr.warmup", "0.0"]
    training = build(recipe, tmp_path, "--init_from", str(backbone), *options)
    model, loaded = training.model, glpretrain.load_backbone(backbone)
    assert equal(model.student.encoder.backbone_state(), loaded.backbone_state())
    assert equal(model.backbone().backbone_state(), loaded.backbone_state())
    assert model.encoder.card.mean == loaded.card.mean and model.encoder.card.std == loaded.card.std
    watch = Watch()
    training.trainer.callbacks.append(watch)
    run = training.fit()
    assert watch.frozen == [True, True, False]
    assert watch.trunk_stayed == [True, True, False]
    assert watch.training == [False, False, True]
    assert watch.heads_stayed == [False] * 3
    assert run.results["init_from"]["trunk_released_at"] == pytest.approx(2 / 3)
    assert run.results["init_from"]["sha256"] == fingerprint(glpretrain.load_backbone(backbone))


def test_without_warm_up_it_is_a_plain_run_from_these_weights(backbone: Path, tmp_path: Path) -> None:
    losses = {}
    statistics = ["--model.init_args.encoder.init_args.mean", str(list(MEAN)), "--model.init_args.encoder.init_args.std", str(list(STD))]
    off = ["--model.init_args.optimization.layer_decay", "1.0", *settings(frozen=0.0, ramp=0.0)]
    for name, options in {"plain": statistics, "init_from": ["--init_from", str(backbone), *off]}.items():
        (folder := tmp_path / name).mkdir()
        training = build(ROOT / "ibot.yaml", folder, *options)
        if name == "plain":
            for branch in (training.model.student, training.model.teacher.branch):
                branch.encoder.load_backbone_state(glpretrain.load_backbone(backbone).backbone_state())
        seen = Losses()
        training.trainer.callbacks.append(seen)
        training.fit()
        losses[name] = seen.values
    assert losses["init_from"] == losses["plain"]


def test_the_teachers_trunk_stays_with_the_students(backbone: Path, tmp_path: Path) -> None:
    training = build(ROOT / "dino.yaml", tmp_path, "--init_from", str(backbone), *settings(frozen=0.9))
    before, heads = state_of(training.model.teacher.branch.encoder), state_of(training.model.teacher.branch.heads)
    training.fit()
    assert equal(before, state_of(training.model.teacher.branch.encoder))
    assert not equal(heads, state_of(training.model.teacher.branch.heads))


def test_views_are_normalised_as_the_backbone_was(backbone: Path, tmp_path: Path) -> None:
    """The run's own recipe says so too, so that it can be trained again from its folder."""
    training = build(ROOT / "dino.yaml", tmp_path, "--init_from", str(backbone))
    data, encoder = training.datamodule, training.model.encoder
    raw = data.raw_batch([0], encoder=encoder, epoch=0)
    for name, part in raw.parts.items():
        if name.startswith("crops"):
            part.zero_()
    views = data.make_batch(raw, encoder=encoder).views["global"].items
    floor = -torch.tensor(MEAN) / torch.tensor(STD)
    torch.testing.assert_close(views.amin(dim=(0, 1, 3, 4)), floor)
    written = yaml.safe_load((training.folder / "config.yaml").read_text())
    arguments = written["model"]["init_args"]["encoder"]["init_args"]
    assert (arguments["mean"], arguments["std"], arguments["licence"]) == (list(MEAN), list(STD), "ours")


def test_rates_ramp_up_and_fall_from_layer_to_layer(backbone: Path, tmp_path: Path) -> None:
    export(small(depth=2), tmp_path / "two")
    options = [
        "--model.init_args.encoder.init_args.depth",
        "2",
        "--model.init_args.optimization.lr",
        '{"base": 0.001, "end": 0.001, "warmup": 0.0}',
    ]
    sizes = ["--trainer.max_steps", "8", *settings(frozen=0.25, ramp=0.5)]
    training = build(ROOT / "dino.yaml", tmp_path, "--init_from", str(tmp_path / "two"), *options, *sizes)
    watch = Watch()
    training.trainer.callbacks.append(watch)
    training.fit()
    layers = [0.75**depth for depth in (0, 1, 2, 3)]  # final norm, two blocks, embedding
    for rates, ramp in zip(watch.rates, (0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0), strict=True):
        assert rates[False] == {0.001}
        assert sorted(rates[True], reverse=True) == pytest.approx([0.001 * ramp * layer for layer in layers] if ramp else [0.0])


def test_layer_decay_of_the_recipe_wins(backbone: Path, tmp_path: Path) -> None:
    training = build(ROOT / "dino.yaml", tmp_path, "--init_from", str(backbone), "--model.init_args.optimization.layer_decay", "0.5")
    groups = training.model.configure_optimizers().param_groups
    assert {group["lr_scale"] for group in groups if group["is_trunk"]} == {1.0, 0.5, 0.25}


@pytest.mark.parametrize(("recipe", "cut"), [("mae", 1), *(pytest.param("ibot", cut, marks=pytest.mark.slow) for cut in (1, 2, 3))])
def test_resume_during_the_warm_up_at_its_end_and_after_is_exact(recipe: str, cut: int, backbone: Path, tmp_path: Path) -> None:
    options = ["--init_from", str(backbone), *settings(frozen=0.5, ramp=0.5)]
    check_resume(ROOT / f"{recipe}.yaml", tmp_path, *options, cut=cut)


def long_run(folder: Path, *arguments: str) -> list[str]:
    """DINO with so wide a tolerance that its loss has settled after the two windows that are the least: at step 5 of 20."""
    sizes = ["--trainer.max_steps", "20", "--data.source.init_args.length", "48", "--trainer.log_every_n_steps", "1"]
    return ["--config", str(shrunk(ROOT / "dino.yaml", folder)), *settings(tolerance=9.0, window=0.1, frozen=0.95), *sizes, *arguments]


def test_the_trunk_is_released_when_the_loss_has_settled(backbone: Path, tmp_path: Path) -> None:
    assert (
        main(
            [
                "fit",
                *long_run(
                    tmp_path, "--init_from", str(backbone), "--evaluate", "false", "--report", "false", "--runs", str(tmp_path / "runs")
                ),
            ]
        )
        == 0
    )
    folder = tmp_path / "runs" / "dino" / "latest"
    assert json.loads((folder / "results.json").read_text())["init_from"]["trunk_released_at"] == 0.25
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [float(row["schedule/trunk_rate"]) > 0.0 for row in rows] == [False] * 5 + [True] * 15


@pytest.mark.slow
def test_two_processes_release_the_trunk_where_one_does_and_have_its_losses(backbone: Path, tmp_path: Path) -> None:
    found = {}
    for processes, batch_size in ((1, 4), (2, 2)):
        own = ["--trainer.devices", str(processes), "--data.batch_size", str(batch_size), "--runs", str(tmp_path / str(processes))]
        options = ["--init_from", str(backbone), "--trainer.strategy", "ddp", "--evaluate", "false", "--report", "false", *own]
        command = [sys.executable, "-m", "glpretrain.cli", "fit", *long_run(tmp_path, *options)]
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"WANDB_MODE": "disabled"})
        folder = tmp_path / str(processes) / "dino" / "latest"
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        found[processes] = {name: [float(row[name]) for row in rows] for name in ("train/loss", "schedule/trunk_rate")}
        found[processes]["released"] = json.loads((folder / "results.json").read_text())["init_from"]["trunk_released_at"]
    assert found[1]["released"] == found[2]["released"] == 0.25
    for name in ("train/loss", "schedule/trunk_rate"):  # float32 sums in another order
        assert found[2][name] == pytest.approx(found[1][name], rel=1e-4)


def test_accumulated_micro_batches_are_one_step_of_the_warm_up(backbone: Path, tmp_path: Path) -> None:
    """Two micro-batches of two give what one batch of four gives, in the warm-up and after it."""
    losses = {}
    for name, options in {"whole": ["--data.batch_size", "4"], "parts": ["--data.batch_size", "2"]}.items():
        count = "1" if name == "whole" else "2"
        (folder := tmp_path / name).mkdir()
        sizes = ["--trainer.accumulate_grad_batches", count, *settings(frozen=0.5, ramp=0.0), *options]
        training = build(ROOT / "dino.yaml", folder, "--init_from", str(backbone), *sizes)
        seen, watch = Losses(), Watch()
        training.trainer.callbacks += [seen, watch]
        training.fit()
        losses[name] = seen.values
        assert training.model.trunk.released == 0.5
        assert watch.with_gradient == [{False}, {False}, {True}, {True}]
    means = [(a + b) / 2 for a, b in zip(losses["parts"][::2], losses["parts"][1::2], strict=True)]
    # Lightning reports the loss divided by how many are accumulated
    assert [2 * value for value in means] == pytest.approx(losses["whole"], rel=1e-4)


def test_the_position_grid_is_resized_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(small(img_size=32), tmp_path / "backbone")
    run = build(ROOT / "dino.yaml", tmp_path, "--init_from", str(tmp_path / "backbone")).fit()
    assert "pos_embed resized from 4x4 to 6x6" in capsys.readouterr().out
    assert run.results["init_from"]["resized"] == {"pos_embed": {"from": [4, 4], "to": [6, 6]}}
    assert run.backbone.card.item_shape == (3, 48, 48)
    assert f"from {tmp_path / 'backbone'} (sha256" in run.backbone.card.source


def test_a_run_on_sounds_starts_from_a_backbone_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = shrunk(ROOT / "asit.yaml", tmp_path)
    entry = yaml.safe_load(recipe.read_text())["model"]["init_args"]["encoder"]["init_args"]
    sizes = {name: entry[name] for name in ("name", "patch_size", "embed_dim", "depth", "num_heads") if name in entry}
    source = moved(ViT(**sizes, img_size=8 * sizes["patch_size"], mean=MEAN, std=STD))
    export(source, tmp_path / "backbone")
    made = build(ROOT / "asit.yaml", tmp_path, "--init_from", str(tmp_path / "backbone"), *settings(frozen=0.9))
    run = made.fit()
    printed = capsys.readouterr().out
    assert "patch_embed.proj.weight summed over 3 channels" in printed and "pos_embed resized from 8x8 to" in printed
    assert run.results["init_from"]["summed_channels"] == 3
    card = run.backbone.card
    assert card.modality == "audio" and len(card.mean) == 1 and card.mean[0] == pytest.approx(entry["mean"][0])


def of_backbone(folder: Path, **more: object) -> list[str]:
    return ["--init_from", json.dumps({"path": str(folder), "encoder": True, **more})]


def test_a_run_takes_the_encoder_of_the_backbone_and_its_views_grow(tmp_path: Path) -> None:
    """Whole views of 48 and local ones of 24 pixels become 96 and 48, in patches of 16."""
    export(small(img_size=96, patch_size=16, embed_dim=32, depth=2, num_heads=2), tmp_path / "backbone")
    drops = ["--model.init_args.encoder.init_args.drop_path_rate", "0.1"]
    training = build(ROOT / "dino.yaml", tmp_path, *of_backbone(tmp_path / "backbone"), *drops)
    loaded = glpretrain.load_backbone(tmp_path / "backbone")
    assert equal(training.model.student.encoder.backbone_state(), loaded.backbone_state())
    arguments = training.model.encoder.card.arguments
    assert (arguments["embed_dim"], arguments["depth"], arguments["drop_path_rate"]) == (32, 2, 0.1)
    run = training.fit()
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    views = written["data"]["views"]["init_args"]
    assert [view["size"] for view in views["global_views"]] == [96] * len(views["global_views"])
    assert [view["size"] for view in views["local_views"]] == [48] * len(views["local_views"])
    assert written["model"]["init_args"]["encoder"]["init_args"]["patch_size"] in (16, [16, 16])
    assert run.backbone.card.item_shape == (3, 96, 96) and len(run.backbone.card.patch_size) == 2


@pytest.mark.parametrize(("size", "whole", "local"), [(64, (64, 64), (32, 32)), ([64, 32], (64, 32), (32, 16))])
def test_it_may_have_another_size(size: object, whole: tuple[int, int], local: tuple[int, int], tmp_path: Path) -> None:
    export(small(img_size=96, patch_size=16, embed_dim=32, num_heads=2), tmp_path / "backbone")
    training = build(ROOT / "dino.yaml", tmp_path, *of_backbone(tmp_path / "backbone", size=size))
    assert training.model.encoder.card.item_shape == (3, *whole)
    views = training.datamodule.views
    assert {pair(view.size) for view in views.global_views} == {whole}
    assert {pair(view.size) for view in views.local_views} == {local}
    training.fit()


def test_an_encoder_of_another_kind_or_a_size_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(small(), tmp_path / "backbone")
    runs = ["--runs", str(tmp_path / "runs"), *QUIET]
    command = ["pretrain", str(shrunk(ROOT / "asit.yaml", tmp_path)), *runs, *of_backbone(tmp_path / "backbone")]
    assert "is of kind image; leave it out" in refusal(command, capsys)
    alone = ["--init_from", json.dumps({"path": str(tmp_path / "backbone"), "size": 64})]
    assert "size=64 would be ignored without encoder: true" in refusal(
        ["pretrain", str(shrunk(ROOT / "dino.yaml", tmp_path)), *runs, *alone], capsys
    )
    export(small(depth=2), tmp_path / "deeper")
    other = ["pretrain", str(shrunk(ROOT / "mae.yaml", tmp_path)), *runs, "--init_from", str(tmp_path / "deeper")]
    assert f"or take this encoder with init_from: {{path: {tmp_path / 'deeper'}, encoder: true}}" in refusal(other, capsys)
    assert not (tmp_path / "runs").exists()


def trained(recipe: str, folder: Path, *options: str) -> Path:
    """The checkpoint of four steps."""
    folder.mkdir()
    run = build(ROOT / f"{recipe}.yaml", folder, *options).fit()
    return run.folder / "checkpoints" / "last.ckpt"


def state_in(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("recipe", "options", "which", "prefix"),
    [
        ("dino", (), "teacher", "teacher.branch."),
        ("dino", (), "student", "student."),
        ("dinov2", ("--model.init_args.encoder.init_args.local_norm", "true"), "teacher", "teacher.branch."),
        ("mae", (), "teacher", "student."),  # it has no teacher
    ],
)
def test_a_run_goes_on_with_the_heads_of_a_checkpoint(
    recipe: str, options: tuple[str, ...], which: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained(recipe, tmp_path / "first", *options)
    given = json.dumps({"path": str(checkpoint), "which": which, "heads": True})
    training = build(ROOT / f"{recipe}.yaml", tmp_path, "--init_from", given, *options)
    expected = state_in(checkpoint, prefix)
    assert equal(training.model.student.state_dict(), expected)
    assert any(name.startswith("heads.") for name in expected)
    assert ("encoder.local_norm.weight" in expected) is bool(options)
    if training.model.teacher is not None:
        assert equal(training.model.teacher.branch.state_dict(), expected)
    watch = Watch()
    training.trainer.callbacks.append(watch)
    run = training.fit()
    count = sum(name.startswith("heads.") for name in expected)
    assert f"and {count} of heads" in capsys.readouterr().out and run.results["init_from"]["heads_tensors"] == count
    assert watch.frozen == [False] * 4 and run.results["init_from"]["trunk_released_at"] == 0.0
    assert training.model.trunk.settings.ramp == 0.0


def test_heads_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = trained("dino", tmp_path / "first")
    runs = ["--runs", str(tmp_path / "runs"), *QUIET]

    def said(recipe: str, path: Path, *options: str) -> str:
        command = ["pretrain", str(shrunk(ROOT / f"{recipe}.yaml", tmp_path)), *runs, *options]
        return refusal([*command, "--init_from", json.dumps({"path": str(path), "heads": True})], capsys)

    more = ("--model.init_args.num_prototypes", "32")
    assert "heads.cls.1.directions has shape (16, 8), accepted (32, 8)" in said("dino", checkpoint, *more)
    assert "tensors are missing, such as heads.decoder" in said("mae", checkpoint)
    assert "is a folder, which has no heads; accepted: a checkpoint" in said("dino", checkpoint.parents[1] / "backbone")
    weights = checkpoint.parents[1] / "backbone" / "model.safetensors"
    assert "was not written by a training run of glpretrain" in said("dino", weights)
    more = ("--model.init_args.num_patch_prototypes", "16")
    assert "tensors have no place, such as heads.patch" in said("dinov2", trained("dinov2", tmp_path / "second", *more))
    assert not (tmp_path / "runs").exists()


def test_a_recipe_may_say_it_and_python_too(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = shrunk(ROOT / "dino.yaml", tmp_path)
    values = yaml.safe_load(recipe.read_text()) | {"init_from": {"path": str(backbone), "which": "teacher"}}
    recipe.write_text(yaml.safe_dump(values))
    by_recipe = glpretrain.fit(str(recipe), runs=tmp_path / "a", overrides=QUIET)
    recipe.write_text(yaml.safe_dump({name: value for name, value in values.items() if name != "init_from"}))
    by_python = glpretrain.fit(str(recipe), init_from=backbone, runs=tmp_path / "b", overrides=QUIET)
    assert by_recipe.results["init_from"] == by_python.results["init_from"]
    assert equal(by_recipe.backbone.backbone_state(), by_python.backbone.backbone_state())


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("glpretrain: error: ")]
    return line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 48}, "the backbone has embed_dim 48 where the recipe says 24"),
        ({"depth": 2}, "the backbone has depth 2 where the recipe says 1"),
        ({"patch_size": 16}, "the backbone has patch_size 16x16 where the recipe says 8x8"),
        ({"num_heads": 2}, "set the recipe's encoder to ViT with num_heads=2"),
    ],
)
def test_another_architecture_is_one_line_and_no_run_folder(
    changes: dict[str, int], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(small(**changes), tmp_path / "backbone")
    runs = tmp_path / "runs"
    arguments = ["pretrain", str(shrunk(ROOT / "mae.yaml", tmp_path)), "--init_from", str(tmp_path / "backbone"), "--runs", str(runs)]
    line = refusal(arguments, capsys)
    assert message in line and str(tmp_path / "backbone") in line
    assert not runs.exists()


def test_what_is_missing_ignored_or_contradicted_is_refused(backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pretrain", str(shrunk(ROOT / "mae.yaml", tmp_path)), "--runs", str(tmp_path / "runs"), *QUIET]
    assert "init_from: load_backbone: nowhere does not exist" in refusal([*command, "--init_from", "nowhere"], capsys)
    assert "give init_from" in refusal([*command, *settings(ramp=0.1)], capsys)
    wrong = ["--init_from", str(backbone), "--model.init_args.encoder.init_args.mean", "[0.1, 0.2, 0.3]"]
    assert "mean [0.5, 0.4, 0.3] where the recipe says [0.1, 0.2, 0.3]" in refusal([*command, *wrong], capsys)
    assert "trunk: ramp is a share" in refusal([*command, "--init_from", str(backbone), *settings(ramp=2.0)], capsys)


def test_a_checkpoint_with_init_from_resumes_with_it_only(backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pretrain", str(shrunk(ROOT / "mae.yaml", tmp_path)), "--runs", str(tmp_path / "runs"), *QUIET]
    assert main([*command, "--init_from", str(backbone)]) == 0
    checkpoint = str((tmp_path / "runs" / "mae" / "latest").resolve() / "checkpoints" / "last.ckpt")
    assert "written with init_from" in refusal([*command, "--ckpt_path", checkpoint], capsys)
