"""Whether a run is healthy: a few numbers every so often, and a verdict in words where they say that nothing is being learned.

A loss does not tell: it falls while features collapse, and stays where it is while they become good. Left out: the health of features on
a source (`evaluate.Health`), and steps that are not finite (`callbacks.replay`).
"""

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from glpretrain.callbacks.verdicts import Verdict, features_health, judge, similarity_drift, usage
from glpretrain.core.batch import Batch
from glpretrain.core.distributed import all_reduce_mean, all_reduce_sum, world_size
from glpretrain.core.schedule import Schedule
from glpretrain.core.shards import local
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.objectives.contrastive import InfoNCE, PatchInfoNCE, QueueInfoNCE
from glpretrain.objectives.distillation import Distillation
from glpretrain.training.anchor import Anchor
from glpretrain.training.branch import Branch
from glpretrain.training.memory import State
from glpretrain.training.prototypes import PrototypeLogits
from glpretrain.training.step import Step
from glpretrain.training.teacher import EMATeacher

_log = logging.getLogger(__name__)
_SAMPLE = 4096  # numbers of each tensor that stand for it
_LOOKED_AT = 64  # items whose patches stand for those of a batch
_COMPARED = 16  # items whose patches are compared pair by pair


@runtime_checkable
class Watched(Protocol):
    """What this callback has to know of a method."""

    step: Step
    student: Branch
    teacher: EMATeacher | None
    momentum: Schedule | None
    anchor: Anchor | None

    def progress(self) -> float:
        """Share of the run that is done."""
        ...

    def backbone(self) -> Encoder:
        """The encoder that a run exports."""
        ...


class TrainingHealth(pl.Callback):
    """Logs numbers of a run's health every `every_n_steps` steps, and says what is wrong when two reports in a row show it.

    Of every distillation, over the teacher's assignments of the last steps, from all processes: `health/<term>/perplexity`, exp of the
    entropy of the mean assignment, from 1 (one prototype takes all) to the number of prototypes K; `used`, percent of the prototypes that
    were the first choice of a row; `sharpness`, ln K minus the mean entropy of a row, 0 where the targets are uniform; `excess`, the loss
    minus ln K, which is above 0 where the student is worse than guessing. Of every contrast: `excess`, likewise with its number of
    candidates. Of the backbone, in the last step: `rank_cls` and `rank_patches`, exp of the entropy of the normalised singular values of
    the centred features; `spread_cls` and `spread_patches`, share of their energy that is not their mean; `patch_decay`, by how much a
    patch is more like the next one than like any patch of its item; `cls_cosine`, mean cosine of `cls` and a patch of its item, which rises
    where patches lose their locality; and, once a snapshot was taken (`Gram`), `gram_drift`, mean change since then of the cosine of two
    different patches of an item. Of the step: `update`, norm of the change of the weights over the
    norm of the weights; `growth`, their norm over that at the start of the fit; `gradient`, norm of all gradients; `encoder_update` and
    `encoder_gradient`, the same of the student's encoder; `distance`, norm of the difference of teacher and student over the norm of the
    student; `pull`, 1 minus the teacher's momentum. Updates, `growth` and `distance` are estimates from a part of each tensor.

    Args:
        every_n_steps: number of steps between two reports.
        num_steps: number of steps that assignments are gathered over, the last ones before a report: they are computed a second time.
    """

    def __init__(self, *, every_n_steps: int = 50, num_steps: int = 2) -> None:
        if not 1 <= num_steps <= every_n_steps:
            raise ValueError(f"TrainingHealth: num_steps {num_steps}; accepted: from 1 to every_n_steps, which is {every_n_steps}")
        self.every_n_steps, self.num_steps = every_n_steps, num_steps
        self.numbers: dict[str, float] = {}  # of the last report
        self.verdicts: list[Verdict] = []  # of the run so far, one of each name
        self._sums: dict[str, Tensor] = {}  # Float[2 K]  assignments, first choices
        self._scalars: dict[str, Tensor] = {}  # Float[4]  sum of entropies, rows, sum of losses, their number
        self._contrasts: dict[str, Tensor] = {}  # Float[2]  sum of losses above guessing, their number
        self._features: dict[str, Tensor] = {}
        self._looks = False  # at patches that the method has not asked for
        self._start = torch.empty(0)  # norm of a part of the weights when the fit started
        self._before: tuple[Tensor, Tensor] | None = None  # part of the weights before the step of a report: all, and the encoder's
        self._last: dict[str, Tensor] = {}  # part of the teacher and of every state at the last report
        self._suspected: set[str] = set()  # what the last report showed
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._reported_step = 0

    def state_dict(self) -> dict[str, object]:
        """The verdicts so far."""
        return {"verdicts": [tuple(verdict) for verdict in self.verdicts]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over what the interrupted run had."""
        self.verdicts = [Verdict(*verdict) for verdict in state_dict["verdicts"]]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to what the method's objectives are given, and to what its backbone gives."""
        assert isinstance(pl_module, Watched)
        for name, module in pl_module.named_modules():
            if isinstance(module, Distillation):
                hook = partial(self._gather, trainer, name.removesuffix("_objective"))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
            elif isinstance(module, InfoNCE | PatchInfoNCE | QueueInfoNCE):
                hook = partial(self._compare, trainer, name.removesuffix("_objective"))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self._handles.append(pl_module.backbone().register_forward_hook(partial(self._see, trainer, pl_module.anchor)))
        self._last = _moving(pl_module)
        self._start = _sample(_learning(pl_module)).norm()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Note the weights before the step of a report."""
        if self._until_report(trainer) == 0:
            assert isinstance(pl_module, Watched)
            self._before = _sample(_learning(pl_module)), _sample(pl_module.student.encoder)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Report, once per optimizer step that asks for it."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._reported_step or self._before is None:
            return
        self._reported_step = step
        assert isinstance(pl_module, Watched)
        numbers = {**self._of_assignments(), **self._together({**self._features, **self._of_weights(pl_module)})}
        moving = _moving(pl_module)
        stuck = {name for name, value in moving.items() if name in self._last and torch.equal(value, self._last[name])}
        self._last, self._sums, self._scalars, self._contrasts, self._features, self._before = moving, {}, {}, {}, {}, None
        self.numbers = numbers
        for name, value in numbers.items():
            pl_module.log(f"health/{name}", value, batch_size=len(batch.index))
        if pl_module.step.reason:  # nothing moved, and that has been said
            return
        found = judge(numbers, stuck)
        for name in sorted(self._suspected & found.keys()):
            self._say(trainer, Verdict(step, name, found[name]))
        self._suspected = set(found)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _say(self, trainer: pl.Trainer, verdict: Verdict) -> None:
        if any(verdict.name == said.name for said in self.verdicts):
            return
        self.verdicts.append(verdict)
        if trainer.is_global_zero:
            _log.warning("health, step %d: %s", verdict.step, verdict.text)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.experiment.summary["health/verdicts"] = [said.text for said in self.verdicts]

    def _until_report(self, trainer: pl.Trainer) -> int:
        """Number of steps between the one at hand and that of the next report. global_step counts the steps that are done."""
        return -(trainer.global_step + 1) % self.every_n_steps

    def _gathers(self, trainer: pl.Trainer) -> bool:
        return self._until_report(trainer) < self.num_steps

    def _gather(
        self,
        trainer: pl.Trainer,
        name: str,
        objective: Distillation,
        args: tuple[Tensor, ...],
        kwargs: dict[str, object],
        output: Tensor,
    ) -> None:
        if not self._gathers(trainer):
            return
        logits, temp = kwargs["teacher_logits"], kwargs["teacher_temp"]
        assert isinstance(logits, Tensor | PrototypeLogits) and isinstance(temp, float)
        with torch.no_grad():
            rows = objective.targets(logits, teacher_temp=temp).flatten(0, -2)  # [rows K]
            first = rows.new_zeros(rows.shape[1]).index_add_(0, rows.argmax(dim=-1), rows.new_ones(len(rows)))
            sums = torch.stack([rows.sum(dim=0), first])
            counts = rows.new_tensor([len(rows), output.numel()])
            scalars = torch.stack([torch.special.entr(rows).sum(), counts[0], output.detach().float().sum(), counts[1]])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._scalars[name] = self._scalars[name] + scalars if name in self._scalars else scalars

    def _compare(
        self,
        trainer: pl.Trainer,
        name: str,
        objective: InfoNCE | PatchInfoNCE | QueueInfoNCE,
        args: tuple[Tensor, ...],
        kwargs: dict[str, object],
        output: Tensor,
    ) -> None:
        if not self._gathers(trainer):
            return
        keys = kwargs["keys"]
        assert isinstance(keys, Tensor)
        excess = _above_guessing(objective, keys, output.detach().float())
        found = torch.stack([excess.sum(), excess.new_tensor(float(excess.numel()))])
        self._contrasts[name] = self._contrasts[name] + found if name in self._contrasts else found

    @torch.no_grad()
    def _see(
        self,
        trainer: pl.Trainer,
        anchor: Anchor | None,
        encoder: Encoder,
        args: tuple[Tensor] | tuple[list[Tensor]],
        output: EncoderOutput | list[EncoderOutput],
    ) -> None:
        if self._until_report(trainer) or self._features or self._looks:
            return
        first, items = output[0] if isinstance(output, list) else output, args[0] if isinstance(args[0], Tensor) else args[0][0]
        patches = first.patches
        if not patches.numel() and not encoder.training:  # a method that reads class tokens alone has none: see some again
            self._looks = True
            patches = encoder(items[:_LOOKED_AT]).patches
            self._looks = False
        self._features = features_health(first.cls.detach().float().cpu(), patches.detach().float().cpu())
        snapshot = None if anchor is None else anchor.snapshot
        snapshot = None if anchor is None else anchor.snapshot
        if snapshot is not None and snapshot.taken > 0 and patches.shape[1] > 1:
            before = snapshot(items[:_COMPARED]).patches
            if before.shape[1] == patches.shape[1]:  # a student without a teacher may have dropped tokens
                self._features["gram_drift"] = similarity_drift(patches[:_COMPARED].float(), before.float()).cpu()

    def _of_assignments(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, sums in self._sums.items():
            log_k = math.log(sums.shape[1])
            for score, value in usage(all_reduce_sum(sums)).items():
                found[f"{name}/{score}"] = float(value)
            entropy, rows, loss, losses = all_reduce_sum(self._scalars[name]).tolist()
            if rows > 0:
                found[f"{name}/sharpness"] = log_k - entropy / rows
                found[f"{name}/excess"] = loss / losses - log_k
        for name, sums in self._contrasts.items():
            excess, number = all_reduce_sum(sums).tolist()
            found[f"{name}/excess"] = excess / number
        return found

    def _of_weights(self, method: Watched) -> dict[str, Tensor]:
        assert self._before is not None and isinstance(method, nn.Module)
        before, encoder_before = self._before
        now, norms = _sample(_learning(method)), method.step.norms
        found = {
            "update": (now - before).norm() / now.norm(),
            "growth": now.norm() / self._start,
            "gradient": _joint_norm(list(norms.values())),
        }
        if method.student.trunk_learns:
            encoder = _sample(method.student.encoder)
            found["encoder_update"] = (encoder - encoder_before).norm() / encoder.norm()
            found["encoder_gradient"] = _joint_norm([norm for name, norm in norms.items() if name.startswith("student.encoder.")])
        if method.teacher is not None:
            student, teacher = _sample(method.student), _sample(method.teacher.branch)
            found["distance"] = (teacher - student).norm() / student.norm()
        if method.momentum is not None:
            found["pull"] = torch.tensor(1.0 - method.momentum(method.progress()))
        return found

    def _together(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over the processes, read in one go."""
        device = next(iter(self._last.values())).device if self._last else torch.device("cpu")
        values = torch.stack([value.to(device) for value in found.values()])
        return dict(zip(found, all_reduce_mean(values).tolist(), strict=True))


def _above_guessing(objective: InfoNCE | PatchInfoNCE | QueueInfoNCE, keys: Tensor, loss: Tensor) -> Tensor:
    """The loss as a cross-entropy, minus that of choosing one of the candidates at random; of the shape of the loss.

    Args:
        objective: what gave the loss.
        keys: Float[B D] of `InfoNCE`, Float[B N D] of `PatchInfoNCE`, Float[G B D] of `QueueInfoNCE`.
        loss: Float[B].
    """
    if isinstance(objective, QueueInfoNCE):
        return loss - math.log(1 + len(objective.queue.rows))
    count = keys.shape[0] * world_size() if isinstance(objective, InfoNCE) else keys.shape[1]
    return loss / (2.0 * objective.temp) - math.log(count)


def _joint_norm(norms: list[Tensor]) -> Tensor:
    """Float[]: norm of several tensors, from their norms; 0 without any."""
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _learning(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _sample(tensors: nn.Module | list[Tensor]) -> Tensor:
    """Float[n]: the first numbers of each tensor, or of the part of it that this process holds, a copy."""
    values = list(tensors.parameters()) if isinstance(tensors, nn.Module) else tensors
    return torch.cat([local(value).detach().reshape(-1)[:_SAMPLE].float() for value in values])


def _moving(method: Watched) -> dict[str, Tensor]:
    """Part of what must move between two reports: the teacher, and the buffers of states."""
    assert isinstance(method, nn.Module)
    found = {} if method.teacher is None else {"teacher": _sample(method.teacher.branch)}
    for name, state in method.named_modules():
        if isinstance(state, State) and state.moves_every_step:
            found[name] = _sample([buffer.float() for buffer in state.buffers()])
    return found
