"""What the base writes once for all methods and no method's own test would notice."""

from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from contract import build
from shrinking import ROOT

from glpretrain.core.schedule import Schedule
from glpretrain.methods import DINO


@pytest.mark.parametrize(("share", "frozen"), [(1.0, True), (0.0, False)])
def test_prototypes_stay_for_the_share_of_the_run_that_freezes_them(share: float, frozen: bool, tmp_path: Path) -> None:
    training = build(ROOT / "dino.yaml", tmp_path, "--model.init_args.optimization.freeze_prototypes", str(share))
    projection, prototypes = training.model.student.heads["cls"]
    before = prototypes.directions.detach().clone(), projection.mlp[0].weight.detach().clone()
    training.fit()
    assert torch.equal(prototypes.directions, before[0]) is frozen
    assert not torch.equal(projection.mlp[0].weight, before[1])


def test_what_a_run_saves_and_exports_is_from_before_its_losses_were_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = build(ROOT / "dino.yaml", tmp_path)
    losses = training.model.losses

    def broken(batch, progress: float) -> dict[str, torch.Tensor]:
        terms = losses(batch, progress)
        return {name: value * float("nan") for name, value in terms.items()} if progress >= 0.5 else terms

    monkeypatch.setattr(training.model, "losses", broken)
    run = training.fit()
    assert run.results["refused_steps"] == 2 and training.model.step.reason == "step 4: the loss is not finite (cls = nan)"
    (saved,) = tmp_path.rglob("*.ckpt")
    for state in (torch.load(saved, weights_only=True)["state_dict"], run.backbone.state_dict()):
        assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_rate_decay_and_momentum_follow_their_schedules(tmp_path: Path) -> None:
    training = build(ROOT / "dino.yaml", tmp_path)
    model = training.model
    lr, weight_decay = Schedule(0.4, 0.0, shape="linear"), Schedule(0.0, 0.8, shape="linear")
    model.optimization = replace(model.optimization, lr=lr, weight_decay=weight_decay)
    model.momentum = Schedule(0.0, 1.0, shape="linear")
    seen: list[tuple[float, set[float]]] = []
    equal: list[bool] = []

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            groups = trainer.optimizers[0].param_groups
            seen.append((groups[0]["lr"], {group["weight_decay"] for group in groups}))
            student, teacher = (branch.heads["cls"][1].directions for branch in (module.student, module.teacher.branch))
            equal.append(torch.equal(student, teacher))

    training.trainer.callbacks.append(Note())
    training.fit()
    assert [lr for lr, _ in seen] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [max(decays) for _, decays in seen] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert all(min(decays) == 0.0 for _, decays in seen)  # biases and norms
    assert equal == [True, False, False, False]  # a momentum of 0 copies the student, in the first step only


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("dino", ["--data.mask", "glpretrain.masking.RandomMask", "--data.mask.init_args.ratio", "0.5"], "DINO does not use data.mask"),
        ("mae", ["--data.mask", "null"], "MAE needs data.mask"),
        ("mmc", ["--data.mask", "null"], "MMC needs data.mask"),
    ],
)
def test_data_and_method_must_fit(recipe: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    training = build(ROOT / f"{recipe}.yaml", tmp_path, *arguments)
    with pytest.raises(ValueError, match=message):
        training.fit()


def test_the_trainers_own_clipping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set model\.init_args\.optimization\.clip"):
        build(ROOT / "dino.yaml", tmp_path, "--trainer.gradient_clip_val", "1.0")


def test_weights_must_name_the_terms(tmp_path: Path) -> None:
    encoder = build(ROOT / "dino.yaml", tmp_path).model.encoder
    with pytest.raises(ValueError, match=r"weights: \['clss'\] given; DINO needs one weight for each of \['cls'\]"):
        DINO(encoder, weights={"clss": 1.0}, num_prototypes=7)
