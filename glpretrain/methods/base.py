"""The one LightningModule. A method says which terms it computes; weighting, schedules, EMA and logging are written here once.

Left out: evaluation and export (callbacks), augmentation (data), and any loop (Lightning's).
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from glpretrain.core.distributed import all_reduce_sum, world_size
from glpretrain.core.schedule import Schedule
from glpretrain.core.types import Batch
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.transfer import Transfer, copy_backbone
from glpretrain.objectives.base import Objective
from glpretrain.training.memory import broadcast_states, states_of
from glpretrain.training.optim import clip_per_parameter, head_groups, parameter_groups, trunk_groups
from glpretrain.training.teacher import EMATeacher, FrozenTeacher
from glpretrain.training.warm_start import LAYER_DECAY, Continuation, HeadWarmup

# Optional fields of a batch, the setting that makes each, and an example for a message.
_SETTINGS = {
    "local_views": ("data.views.local_views", "[{size: 96, scale: [0.05, 0.4], count: 8}]"),
    "student_views": ("data.views.student_views", "[{size: 224, scale: [0.25, 1.0], count: 2}]"),
    "coarse_views": ("data.views.coarse_views", "[{points: 256, count: 2}], for clouds of points"),
    "mask": ("data.mask", "glpretrain.masking.BlockMask"),
    "region_mask": ("data.mask", "glpretrain.masking.CRFRPMask"),
    "corrupted_views": ("data.corruption", "glpretrain.masking.GroupCorruption"),
}


class Branch(nn.Module):
    """One side of the pair: an encoder and the heads behind it."""

    def __init__(self, encoder: Encoder, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)


class Method(pl.LightningModule, ABC):
    """A student, perhaps its momentum teacher, and named loss terms.

    A subclass builds its heads, hands the student here, and implements `losses`. `terms` names what `losses` returns; `needs`
    and `takes` name what it uses of a batch, so that data made for nothing is an error and not a slow run.

    Args:
        student: the branch that learns.
        weights: weight of every term; the names must be exactly the method's terms.
        lr: learning rate; the one used, not a base to be scaled by the batch.
        weight_decay: of parameters with more than one axis, except biases.
        momentum: of the teacher; None trains without a teacher.
        betas: of AdamW.
        layer_decay: factor on the rate from one layer to the one below; None is 1, and 0.75 behind `continue_from`.
        patch_lr: one more factor on the rate of the patch embedding (0.2 in Mugs and DINOv2).
        clip: largest L2 norm of each single parameter's gradient, over progress where it is a schedule; None leaves gradients alone.
        freeze_prototypes: share of the run in which prototype directions do not move (DINO: the first epoch).
        continuation: when the trunk joins in; only behind `continue_from`, where None is the default one.

    Raises:
        ValueError: the names in `weights` are not the method's terms.
    """

    terms: tuple[str, ...]  # of the class, or of the instance, set before this constructor, where they depend on arguments
    needs: ClassVar[tuple[str, ...]] = ()  # fields of `Batch` that must be there
    takes: ClassVar[tuple[str, ...]] = ()  # fields of `Batch` that may be there
    num_global_views: ClassVar[int | None] = None  # None: any number

    def __init__(
        self,
        student: Branch,
        *,
        weights: dict[str, float] | None = None,
        lr: Schedule = Schedule(5e-4, 1e-6, warmup=0.1),  # noqa: B008  frozen
        weight_decay: Schedule = Schedule(0.04, 0.4),  # noqa: B008
        momentum: Schedule | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        layer_decay: float | None = None,
        patch_lr: float = 1.0,
        clip: float | Schedule | None = 3.0,
        freeze_prototypes: float = 0.0,
        continuation: Continuation | None = None,
    ) -> None:
        super().__init__()
        weights = dict.fromkeys(self.terms, 1.0) if weights is None else weights
        if set(weights) != set(self.terms):
            raise ValueError(f"weights: {type(self).__name__} has the terms {sorted(self.terms)}, not {sorted(weights)}")
        self.weights = weights
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.betas, self.layer_decay, self.patch_lr = betas, layer_decay, patch_lr
        self.clip, self.freeze_prototypes = clip, freeze_prototypes
        self.continuation = continuation
        self.student = student
        self.teacher = EMATeacher(student) if momentum is not None else None
        self.head_warmup: HeadWarmup | None = None  # of a run that continues from a backbone
        self._unchecked: dict[str, Tensor] = {}

    @abstractmethod
    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """The named, unweighted terms, each Float[].

        Args:
            batch: what the data module made.
            progress: optimizer steps done / all of them, in [0, 1).
        """

    def setup(self, stage: str) -> None:
        """Before anything is trained or evaluated: does the data make what the method uses, and nothing else?

        Raises:
            ValueError: names the setting.
        """
        if self.continuation is not None and self.head_warmup is None:
            raise ValueError("model.init_args.continuation would be ignored: the run starts from random weights; give init_from")
        # Queues and memories can be larger than the model: DistributedDataParallel would send them around before every step.
        states = {id(buffer) for state in states_of(self) for buffer in state.buffers()}
        ignored = [name for name, buffer in self.named_buffers() if id(buffer) in states]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, ignored)
        if self.trainer.datamodule is None:  # a loader of the user's own, who makes the batches too
            return
        name, made = type(self).__name__, self.trainer.datamodule.optional_fields
        used = {setting for field, (setting, _) in _SETTINGS.items() if field in self.needs + self.takes}
        for field, (setting, example) in _SETTINGS.items():
            if field in self.needs and field not in made:
                raise ValueError(f"{name} needs {setting}: set it, for example to {example}")
            if field in made and setting not in used:
                raise ValueError(f"{name} has no use for {setting}: leave it out")
        count = self.trainer.datamodule.views.num_global_views
        if self.num_global_views not in (None, count):
            raise ValueError(f"{name} needs {self.num_global_views} global views, not {count}: set count in data.views.global_views")

    @property
    def encoder(self) -> Encoder:
        """The student's."""
        return self.student.encoder

    def backbone(self) -> Encoder:
        """What is evaluated and exported: the teacher's encoder where there is one, else the student's."""
        return self.student.encoder if self.teacher is None else self.teacher.branch.encoder

    def continue_from(self, backbone: Encoder) -> Transfer:
        """Start from a trained backbone: student and teacher get its weights, and the heads warm up before the trunk moves.

        Args:
            backbone: of the same architecture; its position grid may be of another size.

        Returns:
            What was copied and what was resized.

        Raises:
            ValueError: the backbone is of another architecture or was normalised otherwise.
        """
        assert self.head_warmup is None, "a run continues from one backbone"
        transfer = copy_backbone(backbone, target=self.student.encoder)
        if self.teacher is not None:
            self.teacher.branch.encoder.load_backbone_state(self.student.encoder.backbone_state())
        objectives = [module for module in self.modules() if isinstance(module, Objective)]
        settings = Continuation() if self.continuation is None else self.continuation
        if next(self.student.heads.parameters(), None) is None:
            settings = replace(settings, longest=0.0)  # nothing to warm up, and nothing else that could learn
        self.head_warmup = HeadWarmup(settings, encoder=self.student.encoder, objectives=objectives)
        return transfer

    def progress(self) -> float:
        """Optimizer steps done / all of them."""
        return self.global_step / self.trainer.estimated_stepping_batches

    def _position(self) -> dict[str, float]:
        return {"step": self.global_step, "num_steps": self.trainer.estimated_stepping_batches}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weighted sum of the terms, all of them logged."""
        self._raise_if_not_finite()
        terms = self.losses(batch, self.progress())
        assert terms.keys() == self.weights.keys(), f"{type(self).__name__} declares {sorted(self.terms)}, computed {sorted(terms)}"
        total = torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
        if self.head_warmup is not None:
            total = self.head_warmup.after_losses(total, encoder=self.student.encoder)
        self._unchecked = {name: value.detach() for name, value in terms.items()}
        # One small collective: what is logged is the loss of the joined batch, however many processes share it.
        logged = all_reduce_sum(torch.stack([*self._unchecked.values(), total])) / world_size()
        *values, loss = logged
        self.log_dict({f"train/{name}": value for name, value in zip(terms, values, strict=True)})
        self.log("train/loss", loss, prog_bar=True)
        return total

    def _raise_if_not_finite(self) -> None:
        """Look at the terms of the step before: reading those of this one would make the host wait for the device."""
        if not self._unchecked:
            return
        values = torch.stack(list(self._unchecked.values()))
        if not bool(torch.isfinite(values).all()):
            shown = ", ".join(f"{name} = {value:.4g}" for name, value in zip(self._unchecked, values.tolist(), strict=True))
            raise ValueError(f"step {self.global_step}: the loss is not finite ({shown}); try a lower lr, or precision 32-true")
        self._unchecked = {}

    # Optimizer, schedules, clipping

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the schedules set rate and decay before every step."""
        own = {id(parameter) for parameter in self.encoder.parameters()}
        others = [(name, parameter) for name, parameter in self.named_parameters() if id(parameter) not in own]
        if self.head_warmup is None:
            decay = 1.0 if self.layer_decay is None else self.layer_decay
            groups = parameter_groups(self.encoder, others, layer_decay=decay, patch_lr=self.patch_lr)
        else:
            decay = LAYER_DECAY if self.layer_decay is None else self.layer_decay
            trunk = trunk_groups(self.encoder, layer_decay=decay, patch_lr=self.patch_lr)
            groups = [{**group, "trunk": True} for group in trunk] + [{**group, "trunk": False} for group in head_groups(others)]
        return torch.optim.AdamW(groups, lr=self.lr(0.0), betas=self.betas, weight_decay=0.0)

    def on_train_start(self) -> None:
        """Where the run ends must be known: every schedule needs it. And all processes must start with equal states.

        From here on these stay equal, since every process writes what was gathered from all of them.
        """
        broadcast_states(self)
        if self.trainer.estimated_stepping_batches == float("inf"):
            raise ValueError("trainer: give max_steps or max_epochs; the schedules need to know where the run ends")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set this step's rate and decay."""
        progress = self.progress()
        values = {"lr": self.lr(progress), "weight_decay": self.weight_decay(progress)}
        for group in self.optimizers().param_groups:
            group["lr"] = values["lr"] * group["lr_scale"]
            group["weight_decay"] = values["weight_decay"] * group["decays"]
        if self.head_warmup is not None:
            if reason := self.head_warmup.begin_step(self.encoder, groups=self.optimizers().param_groups, **self._position()):
                rank_zero_info(f"step {self.global_step}: the trunk learns from here on: {reason}")
            self.log_dict(self.head_warmup.metrics())
        if self.momentum is not None:
            values["momentum"] = self.momentum(progress)
        self.log_dict({f"schedule/{name}": value for name, value in values.items()})

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:  # noqa: ANN001
        """Per parameter, as DINO; called once the gradients are unscaled and complete."""
        if gradient_clip_val is not None:
            raise ValueError(f"trainer.gradient_clip_val={gradient_clip_val} would be ignored; set model.init_args.clip instead")
        if self.progress() < self.freeze_prototypes:
            for name, parameter in self.named_parameters():
                if name.rpartition(".")[2] in ("directions", "gain"):
                    parameter.grad = None
        if self.head_warmup is not None:
            self.head_warmup.drop_gradients(self.encoder)
        if self.clip is not None:
            # All that learn: predictors and decoders stand beside the student where the teacher has none.
            max_norm = self.clip(self.progress()) if isinstance(self.clip, Schedule) else self.clip
            clip_per_parameter(self.parameters(), max_norm=max_norm)

    def optimizer_step(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003  Lightning's signature, passed on untouched
        """Teacher, centres and queues move right after the optimizer: once per step, however many micro-batches it took.

        Not in on_train_batch_end: Lightning writes checkpoints before it, and they would hold the teacher of the step before.
        """
        super().optimizer_step(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.update(self.student, momentum=self.momentum(self.progress()))
        for state in states_of(self):
            state.advance()
        if self.head_warmup is not None:
            self.head_warmup.advance(**self._position())

    def on_train_end(self) -> None:
        """The last step's terms have not been looked at."""
        self._raise_if_not_finite()

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """What export and resume need to know. A checkpoint never holds weights that a non-finite loss has touched."""
        self._raise_if_not_finite()
        checkpoint["encoder_card"] = self.encoder.card.to_json()
        checkpoint["method"] = type(self).__name__
        checkpoint["experts"] = self._experts()

    def _experts(self) -> dict[str, str]:
        """Fingerprint of every frozen teacher: their weights are not in the checkpoint."""
        return {name: module.fingerprint for name, module in self.named_modules() if isinstance(module, FrozenTeacher)}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Refuse another method's checkpoint before its keys are compared one by one."""
        written = checkpoint.get("method")
        if written != type(self).__name__:
            raise ValueError(f"checkpoint: it was written by {written}, this run is {type(self).__name__}; only the same method resumes")
        self._refuse_other_experts(checkpoint.get("experts", {}))
        continued = any(name.startswith("head_warmup.") for name in checkpoint["state_dict"])
        if continued is (self.head_warmup is None):
            how = "with" if continued else "without"
            raise ValueError(f"checkpoint: it was written {how} init_from; only a run {how} it resumes")

    def _refuse_other_experts(self, written: dict[str, str]) -> None:
        own = self._experts()
        for name in sorted(written.keys() | own.keys()):
            before, now = (found.get(name, "none")[:12] for found in (written, own))
            if before != now:
                raise ValueError(f"checkpoint: its {name} has the weights {before}, this run's {now}; only the same experts resume")
