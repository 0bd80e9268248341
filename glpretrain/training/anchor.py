"""Gram anchoring of any method: when it works, what the student is compared with, and the snapshot of the backbone that stands still.

Late in a long run the patches of a large model lose their locality while its class token still gets better. DINOv3 therefore keeps the
similarities between the patches of an image near those of an earlier backbone (Simeoni et al., "DINOv3", 2025; facebookresearch/dinov3 at
6876159, train/ssl_meta_arch.py). Left out: the distance itself (`objectives.gram`).
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from glpretrain.core.batch import Batch, ViewGroup, first_visible
from glpretrain.core.clouds import take
from glpretrain.core.patches import resize_tokens
from glpretrain.core.schedule import Schedule
from glpretrain.core.shards import local
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.training.branch import Branch, Noted
from glpretrain.training.memory import State
from glpretrain.training.teacher import FrozenTeacher

Negatives = Literal["keep", "remove", "remove_in_targets", "remove_common"]
_SNAPSHOT_AT = 0.2


@dataclass(frozen=True)
class Gram:
    """Settings of Gram anchoring: the student's patches keep the similarities to one another that an anchor's patches have.

    Shares are of the run, in [0, 1). The defaults of the distance are those of every published run. Those of the shares are ours: DINOv3
    took a snapshot after 0.08 to 0.17 of 1.2 million steps and compared with it from 0.83 on.

    Args:
        source: the anchor: `snapshot`, the backbone that the run would export as it was at `snapshot_at`; `ema`, the moving teacher as it
            is, which costs no forward pass; or a frozen backbone, see `glpretrain.weights.load_expert`.
        snapshot_at: share of the run after which the snapshot is taken; None is 0.2 where `source` is `snapshot`.
        refresh_at: shares after which the snapshot is taken anew, in ascending order, from `start` on.
        start: share of the run after which the loss has the term `gram`. Before, it costs nothing.
        ramp: share of the run in which its weight rises from 0 by half a cosine.
        weight: weight of the term after the ramp, over progress.
        views: what the anchor sees: the `global` views as the teacher sees them, without masks; or `clean` crops of the same places without
            changed colours, which may be larger (`data.views.clean_size`). Larger ones are encoded in more detail, and their patches are
            resized to the student's.
        level: whether the patches of one `image` are compared, or all of a `batch` in a process: (patches of the batch)^2 numbers.
        tokens: patches that are compared: `all` that the student has, or those that are `masked` or `unmasked`, at `level` batch.
        negatives: what becomes of negative similarities, see `GramDistance`.
        normalise: whether cosines are compared, see `GramDistance`.
        antialias: whether resizing averages over all patches of larger views.

    Raises:
        ValueError: a share is out of order or of range, or a setting would be ignored.
    """

    source: Literal["snapshot", "ema"] | FrozenTeacher = "snapshot"
    snapshot_at: float | None = None
    refresh_at: tuple[float, ...] = ()
    start: float = 0.8
    ramp: float = 0.01
    weight: Schedule = Schedule(2.0, shape="constant")  # noqa: RUF009  frozen
    views: Literal["global", "clean"] = "global"
    level: Literal["image", "batch"] = "image"
    tokens: Literal["all", "masked", "unmasked"] = "all"
    negatives: Negatives = "keep"
    normalise: bool = True
    antialias: bool = False

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("views", self.views, ("global", "clean")),
            ("level", self.level, ("image", "batch")),
            ("tokens", self.tokens, ("all", "masked", "unmasked")),
        ):
            if value not in accepted:
                raise ValueError(f"gram: {name}={value!r} given; accepted: {', '.join(accepted)}")
        if not isinstance(self.source, FrozenTeacher) and self.source not in ("snapshot", "ema"):
            raise ValueError(
                f"gram: source={self.source!r} given; accepted: snapshot, ema, or glpretrain.weights.load_expert with its path"
            )
        self.weight.require("gram.weight")
        self._require_shares()
        if self.tokens != "all" and self.level == "image":
            raise ValueError(f"gram: tokens={self.tokens} given; images differ in their number: set level to batch, or tokens to all")
        if self.source == "ema" and self.views == "clean":
            raise ValueError("gram: views=clean would be ignored: the moving teacher sees the global views; leave it out")
        if self.antialias and self.views == "global" and not isinstance(self.source, FrozenTeacher):
            raise ValueError("gram: antialias would be ignored: the anchor sees views of the student's size; set views to clean")

    def require_method(self, name: str, *, tokens: tuple[str, ...], has_teacher: bool) -> None:
        """Refuse a method that hands over no such patches (`tokens`) or has no such anchor, with a ValueError."""
        if not tokens:
            raise ValueError(f"gram: {name} does not support Gram anchoring; leave gram out")
        if self.tokens not in tokens:
            raise ValueError(f"gram: tokens={self.tokens} given; {name} accepts {', '.join(tokens)}")
        if self.source == "ema" and not has_teacher:
            raise ValueError(f"gram: source=ema given, but {name} has no moving teacher; accepted: snapshot, or a backbone file")

    def _require_shares(self) -> None:
        is_snapshot = self.source == "snapshot"
        given = {"start": self.start, **({} if self.snapshot_at is None else {"snapshot_at": self.snapshot_at})}
        given |= {f"refresh_at[{number}]": share for number, share in enumerate(self.refresh_at)}
        if wrong := {name: share for name, share in given.items() if not 0.0 <= share < 1.0}:
            raise ValueError(f"gram: {wrong} given; accepted: shares of the run in [0, 1)")
        if not 0.0 <= self.ramp <= 1.0 - self.start:
            raise ValueError(f"gram: ramp={self.ramp} given; accepted: from 0 to what is left after start={self.start}")
        if not is_snapshot and (self.snapshot_at is not None or self.refresh_at):
            raise ValueError("gram: snapshot_at and refresh_at would be ignored: only source=snapshot takes snapshots; leave them out")
        if is_snapshot and self.start < self.taken_at[0]:
            raise ValueError(f"gram: start={self.start} given; accepted: shares from snapshot_at={self.taken_at[0]} on")
        if any(later <= earlier for earlier, later in pairwise(self.taken_at)) or any(share < self.start for share in self.refresh_at):
            raise ValueError(
                f"gram: refresh_at={tuple(self.refresh_at)} given; accepted: ascending shares after snapshot_at={self.taken_at[0]} and from"
                f" start={self.start} on"
            )

    @property
    def taken_at(self) -> tuple[float, ...]:
        """Shares of the run after which the backbone is copied."""
        if self.source != "snapshot":
            return ()
        return (_SNAPSHOT_AT if self.snapshot_at is None else self.snapshot_at, *self.refresh_at)

    def weight_at(self, progress: float) -> float | None:
        """Weight of the term at `progress`; None before it is there."""
        if progress < self.start:
            return None
        done = 1.0 if progress >= self.start + self.ramp else (progress - self.start) / self.ramp
        return self.weight(progress) * 0.5 * (1.0 - math.cos(math.pi * done))


class Snapshot(State):
    """A backbone as it was when certain shares of the run were done: without gradients, and in evaluation mode.

    It is copied before the first step at or after a share, that is with what the steps before have made of it. The copy and the number of
    shares that are through are in checkpoints, so a run that is resumed, or made longer, neither loses a copy nor makes it again. A copy is
    made by every process of its own backbone, which is the same in all of them.

    Args:
        backbone: encoder that will be copied.
        shares: shares of the run, in ascending order.
    """

    moves_every_step: ClassVar[bool] = False
    num_taken: Tensor  # Int[], shares that are through

    def __init__(self, backbone: Encoder, *, shares: tuple[float, ...]) -> None:
        super().__init__()
        self.shares = shares
        self.encoder = copy.deepcopy(backbone).requires_grad_(False)
        self.register_buffer("num_taken", torch.zeros((), dtype=torch.int64))
        self._taken: int | None = None  # the same on the host, which must not ask the device at every step
        self.register_load_state_dict_post_hook(lambda module, keys: module.forget())
        self.train()

    @property
    def taken(self) -> int:
        """Number of shares that are through; without any, the weights mean nothing."""
        if self._taken is None:
            self._taken = int(self.num_taken)
        return self._taken

    def forget(self) -> None:
        """Ask the buffer again: a checkpoint was loaded."""
        self._taken = None

    def train(self, mode: bool = True) -> "Snapshot":
        """Keep the encoder in evaluation mode, whatever the mode of the module around it."""
        self.training = mode
        self.encoder.eval()
        return self

    @torch.no_grad()
    def begin(self, progress: float, *, backbone: Encoder) -> None:
        """Copy the backbone if a share is through that was not before the step that begins at `progress`."""
        due = sum(progress >= share for share in self.shares)
        if due <= self.taken:
            return
        for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
            # Of sharded ones the part of this process: both sides are divided alike.
            own, given = ({name: local(value) for name, value in kind(side)} for side in (self.encoder, backbone))
            assert own.keys() == given.keys(), f"snapshot and backbone differ in {sorted(own.keys() ^ given.keys())}"
            for name, value in own.items():
                value.copy_(given[name])
        self.num_taken.fill_(due)
        self._taken = due

    def advance(self, progress: float = 0.0) -> None:
        """Nothing: it moves at the beginning of a step."""

    def discard(self) -> None:
        """Nothing: a step that is refused has not moved what was copied."""

    @torch.no_grad()
    def forward(self, views: Tensor, *, chunk_size: int | None = None) -> EncoderOutput:
        """What the copied encoder makes of views Float[B *item]."""
        assert self.taken > 0, "a snapshot is taken before it is asked"
        return self.encoder(views, chunk_size=chunk_size)


class Encoded(NamedTuple):
    """What was noted of the global views while a method computed its losses."""

    student: Noted
    teacher: Noted | None  # only where the moving teacher is the anchor


class Anchor(nn.Module):
    """Compares the patches of the student's global views with those of its anchor.

    It listens to how a method encodes these views (`Branch.noting`), so no method has to know about it.

    Args:
        settings: when and what is compared.
        objective: distance of sets of tokens, `GramDistance`.
        backbone: encoder of which snapshots are taken.

    Raises:
        ValueError: a frozen backbone takes items of another kind, or makes other tokens where these cannot be resized.
    """

    def __init__(self, settings: Gram, *, objective: nn.Module, backbone: Encoder) -> None:
        super().__init__()
        self.settings, self.objective = settings, objective
        self.snapshot = Snapshot(backbone, shares=settings.taken_at) if settings.source == "snapshot" else None
        self.expert = settings.source if isinstance(settings.source, FrozenTeacher) else None
        if self.expert is not None:
            _require_same_items(self.expert, backbone)

    def begin(self, progress: float, *, backbone: Encoder) -> None:
        """Take a snapshot where it is due; called before every step, outside of the forward pass that gathers sharded weights."""
        if self.snapshot is not None:
            self.snapshot.begin(progress, backbone=backbone)

    @contextmanager
    def noting(self, batch: Batch, *, student: Branch, teacher: Branch | None) -> Iterator[Encoded]:
        """Note what both branches make of the global views of a batch."""
        shape = batch.views["global"].items.flatten(0, 1).shape
        with student.noting(shape) as own:
            if self.settings.source != "ema":
                yield Encoded(own, None)
                return
            assert teacher is not None, "without a moving teacher, the method refuses it as an anchor"
            with teacher.noting(shape) as other:
                yield Encoded(own, other)

    def forward(self, batch: Batch, encoded: Encoded, *, student: Branch) -> Tensor:
        """Float[B], the mean over global views; or Float[] where all tokens of a batch are one set.

        Args:
            batch: what was encoded.
            encoded: what was noted meanwhile.
            student: the branch that learns.
        """
        group, own = batch.views["global"], encoded.student
        num_global, num_items = group.items.shape[:2]
        tokens, targets = own.patches, self._targets(batch, encoded, student=student)  # [(G B) M D], [(G B) N E]
        if own.keep is not None:
            targets = take(targets, own.keep)
        if self.settings.level == "image":
            return self.objective(tokens=tokens, targets=targets).unflatten(0, (num_global, num_items)).mean(dim=0)
        rows, target_rows = tokens.flatten(0, 1), targets.flatten(0, 1)
        if self.settings.tokens != "all":
            places = self._places(group)
            rows, target_rows = rows[places], target_rows[places]
        return self.objective(tokens=rows.unsqueeze(0), targets=target_rows.unsqueeze(0)).squeeze(0)

    @torch.no_grad()
    def _targets(self, batch: Batch, encoded: Encoded, *, student: Branch) -> Tensor:
        """Float[(G B) N E]: the anchor's patches, on the grid of the global views."""
        if encoded.teacher is not None:
            return encoded.teacher.patches
        encoder, views = student.encoder, batch.views[self.settings.views].items.flatten(0, 1)
        if self.expert is not None:
            patches, grid = self.expert(views, card=encoder.card).patches, self.expert.grid
        else:
            assert self.snapshot is not None
            patches, grid = self.snapshot(views, chunk_size=student.chunk_size).patches, encoder.grid(views.shape[1:])
        new_grid = encoder.grid(batch.views["global"].items.shape[2:])
        if grid == new_grid:
            return patches
        (height, width), (new_height, new_width) = grid, new_grid
        # Before the tokens get length one, as in the official code: a long one counts more in an average.
        antialias = self.settings.antialias
        return resize_tokens(patches.float(), grid=(height, width), new_grid=(new_height, new_width), antialias=antialias)

    def _places(self, group: ViewGroup) -> Tensor:
        """Int[M]: places of the masked or unmasked tokens among all; the host does not wait for their number."""
        hidden = group.hidden_places()
        if self.settings.tokens == "masked":
            return hidden
        assert group.mask is not None
        return first_visible(group.mask.flatten().unsqueeze(0), count=group.mask.numel() - len(hidden)).squeeze(0)


def _require_same_items(expert: FrozenTeacher, backbone: Encoder) -> None:
    card, own = expert.encoder.card, backbone.card
    if card.modality != own.modality:
        raise ValueError(f"gram: source takes items of kind {card.modality}, the student {own.modality}; give a backbone of the same kind")
    grid = backbone.grid(own.item_shape)
    if len(grid) == 2 and card.item_shape[0] != own.item_shape[0]:
        raise ValueError(f"gram: source has {card.item_shape[0]} channels, the student's items {own.item_shape[0]}; make them equal")
    if len(grid) != 2 and expert.grid != grid:
        raise ValueError(f"gram: source makes {expert.grid} tokens, the student {grid}, and only maps can be resized; make them equal")
