"""The base of all methods and the only LightningModule: weights of the terms, schedules, the teacher's moving average and logging.

Left out: evaluation and export (`callbacks`), augmentation (`data`), learning rates and clipping (`training.optim`), loops (Lightning).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from torch import Tensor

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.distributed import all_reduce_sum, world_size
from glpretrain.core.schedule import Schedule
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.blocks import compile_blocks
from glpretrain.encoders.local_norm import needs_local_views
from glpretrain.encoders.transfer import Transfer, copy_backbone
from glpretrain.objectives.gram import GramDistance
from glpretrain.training.anchor import Anchor, Gram
from glpretrain.training.branch import Branch, batch_norms, norms_in_chunks, note_value_range
from glpretrain.training.checks import begin_step_again, identity, require_device, require_end, require_same_run, require_weights
from glpretrain.training.item_losses import ItemLosses, losses_for
from glpretrain.training.memory import broadcast_states, keep_from_ddp
from glpretrain.training.optim import Optimization, gradient_norms
from glpretrain.training.prototypes import Prototypes
from glpretrain.training.sharding import is_sharded, shard, whole_encoder
from glpretrain.training.step import Step
from glpretrain.training.teacher import EMATeacher
from glpretrain.training.warm_start import Trunk


@runtime_checkable
class Batched(Protocol):
    """What a rule for the learning rate needs to know of the data."""

    batch_size: int  # items of a process in a micro-batch


class Method(pl.LightningModule, ABC):
    """A student, optionally its momentum teacher, and named loss terms.

    A subclass builds its heads, hands the student here, and implements `losses`. `terms` names what `losses` returns; `uses` says
    which groups of views it uses, so that unused data is an error and not a slow run.

    Args:
        student: the branch that learns.
        weights: weight of every term; the names must be exactly the method's terms.
        momentum: momentum of the teacher's moving average; None trains without a teacher.
        optimization: learning rates, weight decay, clipping, and which parameters do not learn yet.
        gram: Gram anchoring, which adds the term `gram` from a share of the run on, with a weight of its own; None is without.

    Raises:
        ValueError: `weights` has other names than the terms, a number is out of range, or the method does not encode what `gram` compares.
    """

    terms: tuple[str, ...]  # set by the class, or before this constructor where they depend on arguments
    uses: ClassVar[Mapping[str, Uses]]
    in_batch: tuple[str, ...] = ()  # terms in which the loss of an item depends on the others in its batch; set as `terms` is
    joint: tuple[str, ...] = ()  # those of `in_batch` that are one number, Float[], so that items have no loss of their own in them
    needs_backbone: ClassVar[bool] = False  # whether a run from random weights means nothing, and is refused
    views_together: ClassVar[bool] = False  # whether global views and local ones are encoded in one list, which `local_norm` needs
    gram_tokens: ClassVar[tuple[str, ...]] = ()  # patches of its global views that the student encodes and `gram` may compare

    def __init__(
        self,
        student: Branch,
        *,
        weights: dict[str, float] | None = None,
        momentum: Schedule | None = None,
        optimization: Optimization = Optimization(),  # noqa: B008  frozen
        gram: Gram | None = None,
    ) -> None:
        super().__init__()
        weights = dict.fromkeys(self.terms, 1.0) if weights is None else weights
        if set(weights) != set(self.terms):
            raise ValueError(f"weights: {sorted(weights)} given; {type(self).__name__} needs one weight for each of {sorted(self.terms)}")
        if wrong := {name: weight for name, weight in weights.items() if not 0.0 <= weight < math.inf}:
            raise ValueError(f"weights: {wrong} given; accepted: numbers from 0 on")
        if momentum is not None:
            momentum.require("momentum", most=1.0)
        self.weights, self.momentum = weights, momentum
        self.optimization = optimization
        self.student = student
        if needs_local_views(student.encoder, name=type(self).__name__, together=self.views_together):  # of this object alone
            self.uses = {**self.uses, "local": self.uses["local"]._replace(required=True)}  # pyright: ignore[reportAttributeAccessIssue]
        student.set_chunk_size(optimization.chunk_size)  # before the teacher copies it
        student.set_activation_checkpointing(optimization.activation_checkpointing)
        student.set_cross_entropy(optimization.cross_entropy)
        student.set_packed_attention(optimization.packed_attention)
        self.teacher = EMATeacher(student) if momentum is not None else None
        self.anchor = None if gram is None else self._anchored(gram)
        if optimization.compile:
            for branch in (student, *([] if self.teacher is None else [self.teacher.branch])):
                compile_blocks(branch.encoder)
        self.trunk: Trunk | None = None  # set in a run that starts from trained weights
        self.item_losses: ItemLosses | None = None  # set in a run whose order of items looks at their losses
        self.step = Step(max_refused=optimization.max_refused)

    def _anchored(self, gram: Gram) -> Anchor:
        gram.require_method(type(self).__name__, tokens=self.gram_tokens, has_teacher=self.teacher is not None)
        if gram.views == "clean":
            self.uses = {**self.uses, "clean": Uses()}  # pyright: ignore[reportAttributeAccessIssue]  of this object alone
        if gram.level == "batch":
            self.in_batch, self.joint = (*self.in_batch, "gram"), (*self.joint, "gram")
        return Anchor(gram, objective=GramDistance(normalise=gram.normalise, negatives=gram.negatives), backbone=self.backbone())

    def weights_at(self, progress: float) -> dict[str, float]:
        """Weight of every term that the loss has at `progress`."""
        gram = None if self.anchor is None else self.anchor.settings.weight_at(progress)
        return self.weights if gram is None else {**self.weights, "gram": gram}

    @abstractmethod
    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The terms by name, without weights: Float[B], one number per item, or Float[] where a loss has no value per item.

        Args:
            batch: what the data module made.
            progress: share of the run that is done, in [0, 1).
        """

    @property
    def encoder(self) -> Encoder:
        """The student's encoder."""
        return self.student.encoder

    @property
    def starts_from_weights(self) -> bool:
        """Whether the trunk starts from trained weights, for the default of `Optimization.layer_decay`."""
        return self.trunk is not None

    @property
    def item_terms(self) -> tuple[str, ...]:
        """Terms in which every item has a loss of its own, which is weighted with the weight of the item."""
        return tuple(name for name in self.weights_at(1.0) if name not in self.joint)

    @property
    def micro_batch_terms(self) -> tuple[str, ...]:
        """Terms whose gradient is another one when a batch is accumulated from micro-batches."""
        return self.terms if batch_norms(self.encoder) else self.in_batch

    def changed_by_accumulation(self, count: int) -> str:
        """The line that says what sees a micro-batch only, of `count` that make a step; empty where nothing does."""
        if count == 1 or not self.micro_batch_terms:
            return ""
        return (
            f"accumulate_grad_batches: {count}: {', '.join(self.micro_batch_terms)} see one micro-batch at a time, so their gradients are"
            f" not those of the whole batch; for these, set it to 1, multiply data.batch_size by {count}"
            + ("" if norms_in_chunks(self.encoder) else ", and give optimization.chunk_size")
            + "\n"
        )

    @property
    def teacher_branch(self) -> Branch:
        """The moving copy of the student; methods without momentum have none."""
        assert self.teacher is not None, f"{type(self).__name__} trains without a teacher"
        return self.teacher.branch

    def backbone(self) -> Encoder:
        """What is evaluated and exported: the teacher's encoder where there is one, else the student's."""
        return self.student.encoder if self.teacher is None else self.teacher.branch.encoder

    def whole_backbone(self) -> Encoder:
        """`backbone()` with whole weights, which is a copy in a sharded run; see `training.sharding.whole_encoder`."""
        return whole_encoder(self.backbone())

    def init_from(self, backbone: Encoder, *, heads: Mapping[str, Tensor] | None = None) -> Transfer:
        """Start from a trained backbone: student and teacher get its weights.

        Args:
            backbone: encoder of the same architecture; its position grid may be of another size.
            heads: trained heads (`weights.load_heads`) for both; the trunk then waits only if `optimization.trunk` says so.

        Returns:
            What was copied and what was resized.

        Raises:
            ValueError: the backbone has another architecture or normalisation, or the heads have other tensors.
        """
        assert self.trunk is None, "a run starts from one backbone"
        transfer = copy_backbone(backbone, target=self.student.encoder)
        if heads is not None:
            self.student.load_heads(heads)
        if self.teacher is not None:
            self.teacher.branch.load_state_dict(self.student.state_dict())
        self.trunk = Trunk.in_front_of(self.student.heads, self.optimization.trunk, fresh=heads is None)
        return transfer

    def progress(self) -> float:
        """Share of the run that is done: of its optimizer steps where `max_steps` is set, else of its epochs, however long each is."""
        if self.trainer.max_steps > 0:
            return self.global_step / self.trainer.max_steps
        per_epoch = self.trainer.num_training_batches
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # pyright: ignore[reportAttributeAccessIssue]  its stub
        return (self.current_epoch * per_epoch + done) / ((self.trainer.max_epochs or 1) * per_epoch)

    def setup(self, stage: str) -> None:
        """Look at settings that would be ignored or are out of range, and keep states away from DistributedDataParallel."""
        for name, value in vars(self).items():
            if isinstance(value, Schedule) and name.endswith("temp"):
                value.require(name, positive=True)
        require_weights(self.optimization, trained=self.trunk is not None, needed_by=type(self).__name__ if self.needs_backbone else None)
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  its stub
        if self.optimization.lr.per is not None:
            if not isinstance(data, Batched):
                raise ValueError(f"optimization: lr has per={self.optimization.lr.per}, but the run has no DataModule; leave per out")
            count = data.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
            self.optimization = self.optimization.for_batch(count)
        if stage == "fit":  # a validation after it looks at no losses, and forgets none
            weights = {name: weight for name, weight in self.weights_at(1.0).items() if name not in self.joint}
            self.item_losses = losses_for(data, method=type(self).__name__, weights=weights)
        self.optimization.require_modules(self)
        require_device(self.optimization, self.trainer.strategy.root_device)
        keep_from_ddp(self)
        note_value_range(data, self.encoder, self.backbone())

    def configure_model(self) -> None:
        """Divide all parameters among the processes, where the strategy says so (Lightning's ModelParallelStrategy sets a mesh)."""
        if self._device_mesh is not None and not is_sharded(self):
            shard(self, self._device_mesh["data_parallel"])

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`losses` and what is added to those of any method, inside the hooks with which sharded parameters are gathered."""
        if self.anchor is None or self.anchor.settings.weight_at(progress) is None:
            return self.losses(batch, progress)
        with self.anchor.noting(batch, student=self.student, teacher=None if self.teacher is None else self.teacher.branch) as encoded:
            terms = self.losses(batch, progress)
        return {**terms, "gram": self.anchor(batch, encoded, student=self.student)}

    def begin_step(self, progress: float) -> None:
        """What comes before the first micro-batch of a step: the others change nothing."""
        self.step.begin(self)
        if self.anchor is not None:
            self.anchor.begin(progress, backbone=self.backbone())

    def total(self, terms: dict[str, Tensor], progress: float) -> Tensor:
        """Float[]: weighted sum of terms, Float[] each."""
        weights = self.weights_at(progress)
        assert terms.keys() == weights.keys(), f"{type(self).__name__} declares {sorted(weights)}, computed {sorted(terms)}"
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weighted sum of the terms, each averaged over the weighted items, all of them logged."""
        progress = self.progress()
        self.begin_step(progress)
        of_items = self(batch, progress)
        if self.item_losses is not None:
            self.item_losses.update(batch.index, terms=of_items, weights=self.weights_at(progress))
        terms = self.averaged(of_items, batch)
        total = self.total(terms, progress)
        if self.trunk is not None:
            self.trunk.update(total)
            total = total + self.student.zero_gradient()
        # One small collective: what is logged is the loss of the joined batch, whatever the number of processes.
        logged = all_reduce_sum(torch.stack([*terms.values(), total, *self.step.wishes(total)]).detach()) / world_size()
        *values, loss, save, stop = logged
        averaged = dict(zip(terms, values, strict=True))
        self.step.keep(averaged, (save, stop))
        self.log_dict({f"train/{name}": value for name, value in averaged.items()})
        self.log("train/loss", loss, prog_bar=True)
        return total

    @staticmethod
    def averaged(terms: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Terms as one number each, Float[]: the mean over the weighted items."""
        return {name: value if value.ndim == 0 else (batch.weight * value).mean() for name, value in terms.items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the schedules set rate and decay before every step."""
        trunk = {id(parameter) for parameter in self.encoder.parameters()}
        others = [(name, parameter) for name, parameter in self.named_parameters() if id(parameter) not in trunk]
        prototypes = [parameter for module in self.modules() if isinstance(module, Prototypes) for parameter in module.parameters()]
        return self.optimization.optimizer(self.encoder, others, prototypes=prototypes, from_weights=self.starts_from_weights)

    def on_train_start(self) -> None:
        """Make the states of all processes equal; they stay equal, because each process writes what was gathered from all."""
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
        if self.item_losses is not None:  # share of all items that this epoch trains on
            values["kept_ratio"] = self.trainer.num_training_batches * len(batch.index) * world_size() / len(self.item_losses.last)
        if self.anchor is not None:
            values["gram_weight"] = self.anchor.settings.weight_at(progress) or 0.0
        # Tensors of the host: Lightning would copy a float to the device, and wait for it.
        self.log_dict({f"schedule/{name}": torch.tensor(value) for name, value in values.items()})

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:  # noqa: ANN001
        """Clip once the gradients are unscaled and complete, or drop all of them if one of them or a loss is not finite."""
        if gradient_clip_val is not None:
            raise ValueError(f"trainer.gradient_clip_val={gradient_clip_val} is ignored; set model.init_args.optimization.clip")
        if not self.student.trunk_learns:  # with a gradient of zero the optimizer would still decay the weights
            self.encoder.zero_grad(set_to_none=True)
        self.optimization.drop_frozen(self, self.progress())
        norms = gradient_norms(self)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        counts = scaler is None or scaler.get_scale() <= 1.0  # with float16, a smaller loss scale may help
        if self.step.accept(norms, number=self.global_step + 1, counts=counts):
            self.optimization.clip_gradients(self, norms, self.progress())
        else:
            self.zero_grad(set_to_none=True)  # the optimizer passes over parameters without a gradient
        self.step.is_moving = True

    def optimizer_step(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003  Lightning's signature, passed on untouched
        """Move teacher, centres and queues right after the optimizer: once per step, whatever the number of micro-batches.

        Not in on_train_batch_end: Lightning writes checkpoints before it, and they would hold the teacher of the step before.
        """
        super().optimizer_step(*args, **kwargs)
        self.zero_grad(set_to_none=True)  # Lightning would hold them during the next forward pass
        progress = self.progress()
        if not self.step.reason:
            self.follow(progress)
        self.step.end(self, progress=progress)
        self.step.is_moving = False

    def follow(self, progress: float) -> None:
        """Move what follows the student as a moving average: the teacher. Not called after a step that was refused."""
        if self.teacher is not None and self.momentum is not None:
            self.teacher.update(self.student, momentum=self.momentum(progress))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add what export and resume need; a step that is not complete begins again after a resume.

        Raises:
            ValueError: the step was interrupted after the optimizer had moved and before the teacher and all states had.
        """
        if self.step.is_moving:
            raise ValueError(f"checkpoint: step {self.global_step} was interrupted half way; the checkpoint before it is kept")
        if self.step.is_open:
            checkpoint["state_dict"] |= self.step.buffers_before
            begin_step_again(checkpoint, num_accumulated=self.trainer.accumulate_grad_batches)
        checkpoint |= {"encoder_card": self.encoder.card.to_json(), **identity(self)}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Refuse a checkpoint that this run cannot continue."""
        require_same_run(self, checkpoint)
