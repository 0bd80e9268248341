"""The one LightningModule. A method says which terms it computes; weighting, schedules, EMA and logging are written here once.

Left out: evaluation and export (callbacks), augmentation (data), rates and clipping (`training.optim`), and any loop (Lightning's).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.distributed import all_reduce_sum, world_size
from glpretrain.core.schedule import Schedule
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.transfer import Transfer, copy_backbone
from glpretrain.training.branch import Branch
from glpretrain.training.checks import FiniteTerms, identity, require_end, require_same_run
from glpretrain.training.memory import broadcast_states, keep_from_ddp, states_of
from glpretrain.training.optim import Optimization, TrunkRelease
from glpretrain.training.teacher import EMATeacher
from glpretrain.training.warm_start import Trunk


class Method(pl.LightningModule, ABC):
    """A student, perhaps its momentum teacher, and named loss terms.

    A subclass builds its heads, hands the student here, and implements `losses`. `terms` names what `losses` returns; `uses` names the
    groups of views that it looks at, so that data made for nothing is an error and not a slow run.

    Args:
        student: the branch that learns.
        weights: weight of every term; the names must be exactly the method's terms.
        momentum: momentum of the teacher's moving average; None trains without a teacher.
        optimization: rates, decay, clipping, and what does not learn yet.

    Raises:
        ValueError: the names in `weights` are not the method's terms.
    """

    terms: tuple[str, ...]  # of the class, or of the instance, set before this constructor, where they depend on arguments
    uses: ClassVar[Mapping[str, Uses]]

    def __init__(
        self,
        student: Branch,
        *,
        weights: dict[str, float] | None = None,
        momentum: Schedule | None = None,
        optimization: Optimization = Optimization(),  # noqa: B008  frozen
    ) -> None:
        super().__init__()
        weights = dict.fromkeys(self.terms, 1.0) if weights is None else weights
        if set(weights) != set(self.terms):
            raise ValueError(f"weights: {type(self).__name__} has the terms {sorted(self.terms)}, not {sorted(weights)}")
        self.weights = weights
        self.momentum = momentum
        self.optimization = optimization
        self.student = student
        self.teacher = EMATeacher(student) if momentum is not None else None
        self.trunk: Trunk | None = None  # of a run that starts from trained weights
        self._finite = FiniteTerms()

    @abstractmethod
    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The named, unweighted terms: Float[B], one number per item, or Float[] where items cannot be told apart.

        Args:
            batch: what the data module made.
            progress: share of the run that is done, in [0, 1).
        """

    @property
    def encoder(self) -> Encoder:
        """The student's."""
        return self.student.encoder

    @property
    def teacher_branch(self) -> Branch:
        """The moving copy of the student; methods without momentum have none."""
        assert self.teacher is not None, f"{type(self).__name__} trains without a teacher"
        return self.teacher.branch

    def backbone(self) -> Encoder:
        """What is evaluated and exported: the teacher's encoder where there is one, else the student's."""
        return self.student.encoder if self.teacher is None else self.teacher.branch.encoder

    def init_from(self, backbone: Encoder) -> Transfer:
        """Start from a trained backbone: student and teacher get its weights.

        Args:
            backbone: encoder of the same architecture; its position grid may be of another size.

        Returns:
            What was copied and what was resized.

        Raises:
            ValueError: the backbone is of another architecture or was normalised otherwise.
        """
        assert self.trunk is None, "a run starts from one backbone"
        transfer = copy_backbone(backbone, target=self.student.encoder)
        if self.teacher is not None:
            self.teacher.branch.encoder.load_backbone_state(self.student.encoder.backbone_state())
        has_heads = next(self.student.heads.parameters(), None) is not None  # else there is nothing to wait for
        self.trunk = Trunk((self.optimization.trunk or TrunkRelease()) if has_heads else TrunkRelease(frozen=0.0))
        return transfer

    def progress(self) -> float:
        """Share of the run that is done: optimizer steps of all steps, or epochs of all epochs where the run is as long as its epochs."""
        if self.trainer.max_steps > 0:
            return self.global_step / self.trainer.max_steps
        per_epoch = self.trainer.num_training_batches
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # pyright: ignore[reportAttributeAccessIssue]  its stub
        return (self.current_epoch * per_epoch + done) / ((self.trainer.max_epochs or 1) * per_epoch)

    def setup(self, stage: str) -> None:
        """Look at settings that would be ignored, and keep states away from DistributedDataParallel."""
        if self.optimization.trunk is not None and self.trunk is None:
            raise ValueError("optimization.trunk would be ignored: the run starts from random weights; leave it out, or give init_from")
        keep_from_ddp(self)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weighted sum of the terms, each averaged over the weighted items, all of them logged."""
        self._finite.check(step=self.global_step)
        computed = self.losses(batch, self.progress())
        assert computed.keys() == self.weights.keys(), f"{type(self).__name__} declares {sorted(self.terms)}, computed {sorted(computed)}"
        terms = {name: value if value.ndim == 0 else (batch.weight * value).mean() for name, value in computed.items()}
        total = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        if self.trunk is not None:
            self.trunk.update(total)
            total = total + self.student.zero_gradient()
        seen = {name: value.detach() for name, value in terms.items()}
        self._finite.keep(seen)
        # One small collective: what is logged is the loss of the joined batch, however many processes share it.
        logged = all_reduce_sum(torch.stack([*seen.values(), total])) / world_size()
        *values, loss = logged
        self.log_dict({f"train/{name}": value for name, value in zip(terms, values, strict=True)})
        self.log("train/loss", loss, prog_bar=True)
        return total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the schedules set rate and decay before every step."""
        trunk = {id(parameter) for parameter in self.encoder.parameters()}
        others = [(name, parameter) for name, parameter in self.named_parameters() if id(parameter) not in trunk]
        return self.optimization.optimizer(self.encoder, others, from_weights=self.trunk is not None)

    def on_train_start(self) -> None:
        """All processes must start with equal states; from here on these stay equal, since each is written from what all gathered."""
        broadcast_states(self)
        require_end(steps=self.trainer.max_steps, epochs=self.trainer.max_epochs)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set this step's rate and decay, and whether the trunk learns."""
        progress, rate = self.progress(), 1.0
        if self.trunk is not None:
            rate = self.trunk.rate(progress, step=1.0 / self.trainer.estimated_stepping_batches)
            self.student.set_trunk_learns(rate > 0.0)
        values = self.optimization.set_step(self.trainer.optimizers[0], progress, trunk_rate=rate)
        if self.trunk is not None:
            values["trunk_rate"] = rate
        if self.momentum is not None:
            values["momentum"] = self.momentum(progress)
        self.log_dict({f"schedule/{name}": value for name, value in values.items()})

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:  # noqa: ANN001
        """Called once the gradients are unscaled and complete."""
        if gradient_clip_val is not None:
            raise ValueError(f"trainer.gradient_clip_val={gradient_clip_val} is ignored; set model.init_args.optimization.clip")
        if not self.student.trunk_learns:  # a gradient of zero is not none: the optimizer would still decay the weights
            self.encoder.zero_grad(set_to_none=True)
        self.optimization.finish_gradients(self, self.progress())

    def optimizer_step(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003  Lightning's signature, passed on untouched
        """Teacher, centres and queues move right after the optimizer: once per step, however many micro-batches it took.

        Not in on_train_batch_end: Lightning writes checkpoints before it, and they would hold the teacher of the step before.
        """
        super().optimizer_step(*args, **kwargs)
        progress = self.progress()
        if self.teacher is not None and self.momentum is not None:
            self.teacher.update(self.student, momentum=self.momentum(progress))
        for state in states_of(self):
            state.advance(progress)

    def on_train_end(self) -> None:
        """The last step's terms have not been looked at."""
        self._finite.check(step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """What export and resume need to know. A checkpoint never holds weights that a non-finite loss has touched."""
        self._finite.check(step=self.global_step)
        checkpoint |= {"encoder_card": self.encoder.card.to_json(), **identity(self)}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Refuse what this run cannot continue."""
        require_same_run(self, checkpoint)
