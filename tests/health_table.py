"""What the health of a run finds and costs: a developer's tool that injects faults into the quick starts and prints the verdicts.

    python tests/health_table.py --work FOLDER                                every recipe, every fault that it has the term for
    python tests/health_table.py --work FOLDER --only mmc dino --faults none "rate x 1000"
    python tests/health_table.py --work FOLDER --cost --only mmc dino point_mae

Each pair of a recipe and a fault is one run of 100 steps in a forked process: the recipe's own widths, heads, views and schedules over its
own number of steps, with a depth of 2 and batches of 4 of its first 128 items, and `TrainingHealth` as every run has it. A verdict comes
after step 100 at the earliest, since two reports have to agree. A row is a fault, a column a recipe; a cell says "yes" where the expected
verdict with the setting to change is among those that were given, then the others; "-" stands for a recipe without the term.

With `--cost`, each recipe runs 120 steps with its own settings, every second one with a report, and the two medians of the CPU time of a
step are compared. In a run every 50th step has a report and two steps gather for it, so the cost is at most two differences in 50 steps.

Left out: whether a recipe learns (docs/measurements.md), and faults that stop a run by themselves.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.utilities.types import STEP_OUTPUT
from shrinking import ROOT, without_files
from soak import forked
from torch import Tensor, nn

from glpretrain.callbacks import TrainingHealth
from glpretrain.cli.training import Training
from glpretrain.core.batch import Batch
from glpretrain.core.schedule import Schedule
from glpretrain.methods.base import Method
from glpretrain.objectives.contrastive import InfoNCE, PatchInfoNCE, QueueInfoNCE
from glpretrain.objectives.distillation import Centre, Distillation
from glpretrain.training.prototypes import PrototypeLogits, Prototypes, dense

RECIPES = sorted(ROOT.glob("*.yaml"))
STEPS = 100
_UNTIMED, _TIMED = 10, 130  # steps before the first that is timed, and before the end
Kind = TypeVar("Kind", bound=nn.Module)


def constant(value: float) -> Schedule:
    return Schedule(value, shape="constant")


class Fault(NamedTuple):
    """Something that is wrong with a run."""

    verdict: str  # what its name begins with
    knob: str  # part of the text
    concerns: Callable[[Method], bool]  # whether a method has the term
    inject: Callable[[Method], pl.Callback | None]


class AfterStep(pl.Callback):
    """Does something to the method after every step."""

    def __init__(self, act: Callable[[Method], None]) -> None:
        self.act = act

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Method)
        self.act(pl_module)


class AfterBackward(pl.Callback):
    """Does something to the gradients of every step."""

    def __init__(self, act: Callable[[Method], None]) -> None:
        self.act = act

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        self.act(pl_module)


class SameItems(pl.Callback):
    """Makes all views of all items grey."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        for group in batch.views.values():
            for items in (group.items, group.corrupted):
                if items is not None:
                    items.copy_(items[:1, :1].expand_as(items))


class EverySecond(pl.Callback):
    """Asks for a report in every second step, and times all of them.

    Args:
        health: callback of the run.
    """

    def __init__(self, health: TrainingHealth) -> None:
        self.health = health
        self.seconds: list[list[float]] = [[], []]  # without a report, with one
        self._begun = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """End the step before."""
        now, step = time.process_time(), trainer.global_step
        if step > _UNTIMED:
            self.seconds[(step - 1) % 2].append(now - self._begun)
        self._begun = now
        self.health.every_n_steps = 1 if step % 2 else 10**9


class Stop(pl.Callback):
    """Ends a run early, with the schedules of the whole.

    Args:
        steps: number of steps.
    """

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        trainer.should_stop |= trainer.global_step >= self.steps


def _set_rate(method: Method, factor: float) -> None:
    lr = method.optimization.lr
    ends = {"base": factor * lr.base, "end": None if lr.end is None else factor * lr.end}
    method.optimization = dataclasses.replace(method.optimization, lr=dataclasses.replace(lr, **ends))


def _set_momentum(method: Method, value: float) -> None:
    method.momentum = constant(value)


def _set_teacher_temp(method: Method, value: float) -> None:
    for name in [name for name in vars(method) if name.endswith("teacher_temp")]:
        vars(method)[name] = constant(value)


def _copy_student(method: Method) -> None:
    assert method.teacher is not None
    method.teacher.branch.load_state_dict(method.student.state_dict())


def _freeze_centres(method: Method) -> None:
    for centre in _parts(method, Centre):
        centre.value.zero_()


def _favour_one(method: Method) -> pl.Callback:
    """The teacher's logits of one prototype are always the highest, and no centre or Sinkhorn-Knopp corrects it."""
    num_prototypes = len(_parts(method, Prototypes)[0].directions)
    for objective in _parts(method, Distillation):
        if objective.centre_state is None:
            objective.sinkhorn_iterations, objective.centre_state = None, Centre(num_prototypes, momentum=0.9)
        objective.register_forward_pre_hook(_with_a_favourite, with_kwargs=True)
    return AfterStep(_freeze_centres)


def _with_a_favourite(objective: nn.Module, args: object, kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
    logits = kwargs["teacher_logits"]
    assert isinstance(logits, Tensor | PrototypeLogits)
    logits = dense(logits)
    favourite = torch.zeros_like(logits)
    favourite[..., 0] = 2.0
    return args, {**kwargs, "teacher_logits": logits + favourite}


def _set_student_temp(method: Method) -> None:
    for objective in _parts(method, Distillation):
        objective.student_temp = 1e-3


def _set_contrast_temp(method: Method) -> None:
    for objective in [*_parts(method, InfoNCE), *_parts(method, PatchInfoNCE), *_parts(method, QueueInfoNCE)]:
        objective.temp = 1e-3


def _cut_encoder(method: Method) -> None:
    for parameter in method.student.encoder.parameters():
        parameter.requires_grad_(False)


def _spoil_gradient(method: Method) -> None:
    parameter = next(one for one in method.parameters() if one.grad is not None)
    if method.global_step >= STEPS - 2:
        parameter.grad[..., 0] = torch.nan  # pyright: ignore[reportOptionalSubscript]  it has one


def _parts(method: Method, kind: type[Kind]) -> list[Kind]:
    return [part for part in method.modules() if isinstance(part, kind)]


def _has_teacher(method: Method) -> bool:
    return method.teacher is not None


def _always(method: Method) -> bool:
    return True


def _only(act: Callable[[Method], None]) -> Callable[[Method], pl.Callback | None]:
    """An injection before training that needs no callback."""

    def inject(method: Method) -> None:
        act(method)

    return inject


def _distils(method: Method) -> bool:
    return bool(_parts(method, Distillation))


def _centres(method: Method) -> bool:
    return bool(_parts(method, Centre))


def _contrasts(method: Method) -> bool:
    return bool([*_parts(method, InfoNCE), *_parts(method, PatchInfoNCE), *_parts(method, QueueInfoNCE)])


FAULTS = {
    "none": Fault("", "", _always, lambda method: None),
    "rate x 1000": Fault("wild", "lower optimization.lr", _always, _only(lambda method: _set_rate(method, 1000.0))),
    "rate 0": Fault("still", "raise optimization.lr", _always, _only(lambda method: _set_rate(method, 0.0))),
    "weights of all terms 0": Fault(
        "no gradient", "raise the weights", _always, _only(lambda method: method.weights.update(dict.fromkeys(method.weights, 0.0)))
    ),
    "encoder without gradient": Fault("still encoder", "require gradients", _always, _only(_cut_encoder)),
    "gradient not finite": Fault("refused", "gradients are not finite", _always, lambda method: AfterBackward(_spoil_gradient)),
    "all items the same": Fault("collapse cls", "", _always, lambda method: SameItems()),
    "momentum 0": Fault("twin", "raise momentum", _has_teacher, _only(lambda method: _set_momentum(method, 0.0))),
    "momentum 1": Fault("stuck teacher", "lower momentum", _has_teacher, _only(lambda method: _set_momentum(method, 1.0))),
    "teacher = student": Fault("twin", "raise momentum", _has_teacher, lambda method: AfterStep(_copy_student)),
    "frozen centre": Fault("stuck", "lower its momentum", _centres, lambda method: AfterStep(_freeze_centres)),
    "one prototype wins": Fault("one prototype", "centre_momentum", _distils, _favour_one),
    "teacher's temperature 1": Fault("uniform", "lower teacher_temp", _distils, _only(lambda method: _set_teacher_temp(method, 1.0))),
    "student's temperature 0.001": Fault("excess", "raise student_temp", _distils, _only(_set_student_temp)),
    "temperature of a contrast 0.001": Fault("excess", "raise its temperature", _contrasts, _only(_set_contrast_temp)),
}


def outcome(path: Path, fault: str, *, work: Path) -> dict[str, str] | None:
    """Verdicts of a run with a fault: texts by name; None where the method lacks the term.

    Args:
        path: recipe.
        fault: name of one of `FAULTS`.
        work: folder that everything is written to.
    """
    answer = work / "answer.json"
    answer.unlink(missing_ok=True)
    status = forked(lambda: _run(path, fault, work=work, answer=answer), folder=work, output=work / "output.txt")
    assert status == 0, f"{path.stem}, {fault}: ended with {status}\n{(work / 'output.txt').read_text()}"
    return json.loads(answer.read_text())


def cost(path: Path, *, work: Path) -> dict[str, float]:
    """Milliseconds of a step of a recipe with its own settings, without and with a report, by CPU time."""
    answer = work / "answer.json"
    answer.unlink(missing_ok=True)
    status = forked(lambda: _time(path, work=work, answer=answer), folder=work, output=work / "output.txt")
    assert status == 0, f"{path.stem}: ended with {status}\n{(work / 'output.txt').read_text()}"
    return json.loads(answer.read_text())


def _time(path: Path, *, work: Path, answer: Path) -> int:
    training = _training(path, work=work)
    training.health.num_steps = 1
    timer = EverySecond(training.health)
    training.trainer.callbacks[:0] = [timer, Stop(_TIMED)]  # pyright: ignore[reportAttributeAccessIssue]
    training.trainer.fit(training.model, datamodule=training.datamodule)
    without, with_report = (1000 * statistics.median(seconds) for seconds in timer.seconds)
    answer.write_text(json.dumps({"without": without, "with": with_report}))
    return 0


def _training(path: Path, *, work: Path) -> Training:
    options = [
        "--trainer.enable_progress_bar",
        "false",
        "--evaluate",
        "false",
        "--report",
        "false",
        "--trainer.accelerator",
        "cpu",
        "--trainer.logger",
        "false",
    ]
    return Training(["--config", str(path), *options, "--trainer.enable_checkpointing", "false", "--runs", str(work / "runs")])


def _run(path: Path, fault: str, *, work: Path, answer: Path) -> int:
    recipe = yaml.safe_load(path.read_text())
    recipe["model"] = without_files(recipe["model"])
    recipe["model"]["init_args"]["encoder"]["init_args"]["depth"] = 2
    if "num_relation_heads" in recipe["model"]["init_args"]:
        recipe["model"]["init_args"]["num_relation_heads"] = 4  # divides the widths of student and stand-in experts
    recipe["data"]["batch_size"] = 4
    recipe["data"]["source"]["init_args"]["length"] = 128
    written = work / path.name
    written.write_text(yaml.safe_dump(recipe))
    training = _training(written, work=work)
    injected = FAULTS[fault]
    if not injected.concerns(training.model):
        answer.write_text("null")
        return 0
    callback = injected.inject(training.model)
    training.trainer.callbacks[:0] = [Stop()] if callback is None else [callback, Stop()]  # pyright: ignore[reportAttributeAccessIssue]
    found: dict[str, str] = {}
    try:
        training.trainer.fit(training.model, datamodule=training.datamodule)
    except ValueError as error:  # too many steps in a row had a gradient that is not finite
        found["stopped"] = str(error)
    print({name: float(f"{value:.3g}") for name, value in training.health.numbers.items()})
    found |= {verdict.name: verdict.text for verdict in training.health.verdicts}
    if training.model.step.num_refused:
        found["refused"] = training.model.step.reason
    answer.write_text(json.dumps(found))
    return 0


def is_named(fault: str, verdicts: dict[str, str]) -> bool:
    """Whether the verdicts name the fault and its knob; for a run without fault, whether there is none."""
    if fault == "none":
        return not verdicts
    if fault == "rate x 1000" and "try a lower lr" in verdicts.get("stopped", ""):
        return True
    return any(name.startswith(FAULTS[fault].verdict) and FAULTS[fault].knob in text for name, text in verdicts.items())


def cell(fault: str, verdicts: dict[str, str] | None) -> str:
    """Of the table."""
    if verdicts is None:
        return "-"
    others = sorted({name for name in verdicts if fault == "none" or not name.startswith(FAULTS[fault].verdict)})
    return "; ".join(["yes" if is_named(fault, verdicts) else "NO", *others])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python tests/health_table.py")
    parser.add_argument("--work", type=Path, required=True, help="folder that everything is written to")
    parser.add_argument("--only", nargs="+", default=[path.stem for path in RECIPES], help="names of recipes")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), help="names of faults")
    parser.add_argument("--cost", action="store_true", help="time steps in place of injecting faults")
    given = parser.parse_args(arguments)
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if given.cost:
        print("| recipe | ms a step | ms with a report | cost of a report every 50 steps, at most |\n|---|---|---|---|")
        for name in given.only:
            found = cost(ROOT / f"{name}.yaml", work=work)
            share = 2 * (found["with"] - found["without"]) / (50 * found["without"])
            print(f"| {name} | {found['without']:.1f} | {found['with']:.1f} | {100 * share:.2f} % |", flush=True)
        return 0
    rows: dict[str, list[str]] = {fault: [] for fault in given.faults}
    for fault in given.faults:
        for name in given.only:
            rows[fault].append(cell(fault, outcome(ROOT / f"{name}.yaml", fault, work=work)))
            print(f"{name}, {fault}: {rows[fault][-1]}", file=sys.stderr, flush=True)
            if rows[fault][-1].startswith("NO"):  # the numbers of the last report
                print((work / "output.txt").read_text(), file=sys.stderr, flush=True)
    print(f"| fault | {' | '.join(given.only)} |\n|{'---|' * (1 + len(given.only))}")
    for fault, cells in rows.items():
        print(f"| {fault} | {' | '.join(cells)} |")
    return int(any(one.startswith("NO") for cells in rows.values() for one in cells))


if __name__ == "__main__":
    sys.exit(main())
