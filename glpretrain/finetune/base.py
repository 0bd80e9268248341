"""What is written once for every fine-tuned task: a backbone with a head, trained as methods are, and scored after each epoch.

`FineTune` is a `Method` whose student is the backbone with the head, so learning rates that fall from layer to layer, clipping, refused
steps, accumulated batches and checkpoints are those of pretraining. It adds a moving average of the weights (timm's) that is evaluated
and saved, a frozen backbone, and the scores on the test part. Left out: what a head computes, its loss and its scores (one file per task).
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.distributed import gathered, rank
from glpretrain.core.types import EncoderOutput
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder, build
from glpretrain.encoders.points import PointTransformer
from glpretrain.evaluate.base import Evaluator, Score
from glpretrain.finetune.data import step_key
from glpretrain.methods.base import Method
from glpretrain.training.branch import Branch, batch_norms

_CLASS_TOKEN = ("cls_token", "cls_position")  # in the weights of a `PointTransformer`
HEAD = "task"  # name of the head in the branch


@runtime_checkable
class Data(Protocol):
    """What a task has to know of its data."""

    seed: int
    development: Source | None
    separator: str | None

    def is_test(self, index: Tensor) -> Tensor:
        """Which of the items that are evaluated are of the test part, and not of the development part."""
        ...

    def groups_of(self, index: Tensor) -> Tensor | None:
        """Which test items belong together."""
        ...


class Head(nn.Module):
    """What a task puts on the backbone; it is saved with it.

    A subclass sets `settings`, the keyword arguments of its constructor as JSON values, and implements `forward`; one that needs more than
    the tokens of the last block replaces `logits`.
    """

    settings: dict[str, object]

    def logits(self, branch: Branch, items: Tensor, *, keys: Tensor | None) -> Tensor:
        """Logits, Float[B K *S], of items, Float[B *item], whose paths are dropped by `keys`, Int[B], in training mode."""
        return self(branch.encode(items, keys=keys), grid=branch.encoder.grid(items.shape[1:]))

    @abstractmethod
    def forward(self, output: EncoderOutput, *, grid: tuple[int, ...]) -> Tensor:
        """Logits, Float[B K *S], of the features of items; `grid` is the number of tokens along each axis."""


def logits_of(branch: Branch, items: Tensor, *, keys: Tensor | None = None) -> Tensor:
    """Logits, Float[B K *S], of items Float[B *item], images being normalised; paths are dropped by `keys`, Int[B], in training mode."""
    head = branch.heads[HEAD]
    assert isinstance(head, Head)
    return head.logits(branch, items, keys=keys)


def for_tuning(encoder: Encoder, *, drop_path: float, final_norm: bool = True, class_token: bool = False) -> Encoder:
    """The encoder with another rate of stochastic depth, which grows from block to block, and with positions that learn.

    Args:
        encoder: the backbone, which stays as it is.
        drop_path: rate of stochastic depth in the last block.
        final_norm: whether it keeps the norm behind its last block; without it, only a ViT of timm's plain kind is accepted.
        class_token: whether a `PointTransformer` that has no class token gets one, with fresh weights.

    Raises:
        ValueError: the encoder drops no paths, or cannot be without its norm.
    """
    arguments, state = dict(encoder.card.arguments), encoder.backbone_state()
    if "drop_path_rate" in arguments:
        arguments["drop_path_rate"] = drop_path
    elif drop_path > 0.0:
        raise ValueError(f"drop_path={drop_path} given; {encoder.card.encoder} drops no paths: set it to 0")
    arguments.pop("drop_path_uniform", None)
    arguments.pop("positions", None)  # fixed ones too: MAE's fine-tuning lets them learn
    if not final_norm:
        arguments["final_norm"] = False
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    added: tuple[str, ...] = ()
    if class_token and isinstance(encoder, PointTransformer) and not encoder.num_prefix_tokens:
        arguments["class_token"], added = True, _CLASS_TOKEN
    tuned = build(replace(encoder.card, arguments=arguments))
    fresh = {name: tensor for name, tensor in tuned.backbone_state().items() if name in added}
    tuned.load_backbone_state({name: tensor.clone() for name, tensor in (state | fresh).items()})
    return tuned


class FineTune(Method):
    """A backbone and a head that learn a task from labels.

    A subclass prepares the backbone (`for_tuning`), builds the head, and implements `losses`, `outcomes` and `scores`.

    Args:
        encoder: the backbone.
        head: what the task puts on it.
        classes: names of the classes.
        ema: largest decay of the moving average of the weights, which is evaluated and saved in place of the weights. It rises to this
            value during the first steps, as in timm. None keeps no average.
        freeze: train the head only, on a backbone that stays as it is.
        **kwargs: arguments of `Method`.

    Raises:
        ValueError: there are fewer than two classes, or `ema` is out of range.
    """

    uses: ClassVar = {"global": Uses(num_views=1)}
    task: ClassVar[str]  # name of the task, on the card of a saved model
    headline: str  # name of the score that is shown
    probe: Evaluator  # what the frozen backbone is scored with: it needs a training and a test part, and has this score
    takes_label_sets: ClassVar[bool] = False  # whether targets are Float[B K], any number of labels for an item

    def __init__(
        self,
        encoder: Encoder,
        head: Head,
        *,
        classes: Sequence[str],
        ema: float | None = None,
        freeze: bool = False,
        **kwargs,  # noqa: ANN003
    ) -> None:
        if len(classes) < 2:
            raise ValueError(f"{type(self).__name__}: classes {list(classes)} given; accepted: two or more")
        if ema is not None and not 0.0 < ema < 1.0:
            raise ValueError(f"{type(self).__name__}: ema={ema} given; accepted: between 0 and 1, or null for none")
        super().__init__(Branch(encoder, {HEAD: head}), **kwargs)
        self.classes = list(classes)
        self.freeze_backbone = freeze
        self.from_scratch = False  # set where the backbone has fresh weights
        if freeze:
            encoder.requires_grad_(False)
            self.student.set_trunk_learns(False)
        self.ema: ModelEmaV3 | None = None
        if ema is not None:
            self.ema = ModelEmaV3(self.student, decay=ema, use_warmup=True)
            self.ema.requires_grad_(False)
        self.draw_key = torch.zeros((), dtype=torch.int64)  # of the batch at hand
        self.found: dict[str, Score] = {}  # scores of the last evaluation
        self.found_at = -1  # number of optimizer steps before it
        self.choosing: tuple[Tensor, Tensor | None] | None = None  # outcomes and groups of the development part, for thresholds
        self._outcomes: list[tuple[Tensor, Tensor]] = []  # dataset indices, and what the scores need

    @abstractmethod
    def outcomes(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What the scores need of each item, [B *S], from its logits Float[B K *S] and its targets Int[B *S]."""

    @abstractmethod
    def scores(self, outcomes: Tensor, groups: Tensor | None) -> dict[str, Score]:
        """The scores by name, `headline` among them.

        Args:
            outcomes: `outcomes` of all items of the test part.
            groups: Int[B], which items belong together; None where all are independent.
        """

    @property
    def micro_batch_terms(self) -> tuple[str, ...]:
        """The loss, where the head or the encoder has batch norm."""
        return self.terms if batch_norms(self.student) else ()

    def probe_for(self, separator: str | None) -> Evaluator:
        """The probe for data whose class names hold several labels with a separator, or one where it is None."""
        return self.probe

    @property
    def chooses(self) -> bool:
        """Whether scores have thresholds, which a development part of the data can choose."""
        return False

    def setup(self, stage: str) -> None:
        """Refuse a development part that would be ignored, and targets of another kind.

        Raises:
            ValueError: there is such a part, or items have several labels where one is learned, or one where several are.
        """
        super().setup(stage)
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  its stub
        if isinstance(data, Data) and data.development is not None and not self.chooses:
            given = f"data.development: {data.development.name} given; {type(self).__name__}"
            raise ValueError(f"{given} has no threshold to choose: give positive, or leave it out")
        if isinstance(data, Data) and (data.separator is not None) != self.takes_label_sets:
            accepted = "what stands between two labels of an item, such as ';'" if self.takes_label_sets else "null, or Multilabel"
            raise ValueError(f"data.separator={data.separator!r} given with {type(self).__name__}; accepted: {accepted}")

    @property
    def said(self) -> dict[str, Score]:
        """Those of the scores of the last evaluation that are printed after it."""
        return self.found

    @property
    def evaluated(self) -> Branch:
        """What is evaluated and saved: the moving average where there is one."""
        branch = self.student if self.ema is None else self.ema.module
        assert isinstance(branch, Branch)
        return branch

    @property
    def head(self) -> Head:
        """The head that is evaluated and saved."""
        head = self.evaluated.heads[HEAD]
        assert isinstance(head, Head)
        return head

    @property
    def starts_from_weights(self) -> bool:
        """Whether the backbone is a trained one."""
        return not self.from_scratch

    def backbone(self) -> Encoder:
        """The encoder that is evaluated and saved."""
        return self.evaluated.encoder

    def logits(self, batch: Batch, items: Tensor | None = None) -> Tensor:
        """Logits of the student, of the items of a batch or of others in their place, such as mixed ones."""
        group = batch.views["global"]
        assert group.keys is not None
        return logits_of(self.student, group.items.squeeze(0) if items is None else items, keys=group.keys.squeeze(0))

    def evaluated_logits(self, items: Tensor) -> Tensor:
        """Logits, Float[B K *S], of test items, Float[B *item]."""
        return logits_of(self.evaluated, items)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set rates, what is drawn for this batch, and that a frozen backbone is in evaluation mode."""
        super().on_train_batch_start(batch, batch_idx)
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  its stub
        seed = data.seed if isinstance(data, Data) else 0
        self.draw_key = step_key(seed=seed, epoch=self.current_epoch, batch=batch_idx, rank=rank())
        if self.freeze_backbone:
            self.student.set_trunk_learns(False)

    def follow(self, progress: float) -> None:
        """Move the average of the weights."""
        if self.ema is not None:
            self.ema.update(self.student, step=self.global_step + 1)  # Lightning counts this step a moment later

    def on_validation_epoch_start(self) -> None:
        """Forget the evaluation before."""
        self._outcomes = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep what the scores need of a batch."""
        if batch.targets is not None:  # otherwise none of its items could be read
            logits = self.evaluated_logits(batch.views["global"].items.squeeze(0))
            self._outcomes.append((batch.index.cpu(), self.outcomes(logits.float(), batch.targets).cpu()))

    def on_validation_epoch_end(self) -> None:
        """Score what all processes have evaluated, and log the scores.

        Raises:
            ValueError: no item could be read.
        """
        parts = gathered(self._outcomes)
        if not parts:
            raise ValueError("data: no item of the test part could be read")
        index, outcomes = (torch.cat(rows) for rows in zip(*parts, strict=True))
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  its stub
        groups, self.choosing = None, None
        if isinstance(data, Data):
            groups, tests = data.groups_of(index), data.is_test(index)
            of_part = [(outcomes[part], None if groups is None else groups[part]) for part in (tests, ~tests)]
            (outcomes, groups), self.choosing = of_part[0], of_part[1] if (~tests).any() else None
        self.found = self.scores(outcomes, groups)
        self.found_at = self.global_step
        self.log_dict({f"eval/{self.task}/{name}": score.value for name, score in self.found.items()}, rank_zero_only=True)
