"""The data of a fine-tuned task: augmented training items with their targets, and every item of the test part once, as it is.

Reading, order, workers and what becomes of unreadable files are those of pretraining (`DataModule`). What an item becomes is said by the
views of the task (`TaskViews`). Left out: which folder is which source (`glpretrain.data.own`).
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glpretrain.core import keys as rng
from glpretrain.core.batch import Batch, ViewGroup
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.items import RawBatch
from glpretrain.data.label_sets import LabelSets
from glpretrain.data.loading import Loader
from glpretrain.data.module import DataModule
from glpretrain.data.orders import Order
from glpretrain.data.own import SourceSpec, source_for, source_spec, train_test_parts
from glpretrain.data.relabelled import under_classes_of
from glpretrain.data.requirements import Tokens
from glpretrain.data.sources.base import Source, UnreadableItemError
from glpretrain.data.views import ViewMaker, Views
from glpretrain.data.views.changes import Changes
from glpretrain.encoders.base import Encoder
from glpretrain.finetune.item_transforms import AnyTransform
from glpretrain.finetune.transforms import drawn_from

_SAMPLE_SEED = 140


class TaskViews(ViewMaker):
    """One view of each item: augmented in training, and as it is in evaluation; and what the model is to predict of it.

    A subclass names its `modality` and implements `classes_of`, `augmented`, `plain` and `transform`.

    Args:
        size: height and width of images, number of points of clouds, or number of frames of sounds; None is the size that the backbone was
            trained on.

    Raises:
        ValueError: a value out of range.
    """

    evaluated_at_once: ClassVar[int] = 64  # test items in a batch, at least; 1 where they have sizes of their own

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(f"views: size={size} given; accepted: numbers from 1 on, or null for the size of the backbone")
        self.size = size

    @classmethod
    def own_source(cls, path: str | Path) -> SourceSpec:
        """The source of a user's folder or file.

        Raises:
            ValueError: no source reads it.
        """
        return source_spec(path, source_for(path, cls.modality))

    @classmethod
    def settings_of(cls, card: EncoderCard) -> dict[str, int]:
        """Settings that stand for those of the backbone's items where they are None; here the side of its images."""
        return {"size": card.item_shape[-1]}

    @classmethod
    def sized(cls, encoder: Encoder, settings: Mapping[str, int]) -> Encoder:
        """The encoder for items of the size in `settings`, whose names are those of `settings_of`; that of images was loaded for it.

        Raises:
            ValueError: it accepts no such items.
        """
        return encoder

    @abstractmethod
    def classes_of(self, source: Source) -> list[str]:
        """Names of the classes that are learned from a source.

        Raises:
            ValueError: the source lacks what the task needs, such as two classes.
        """

    @abstractmethod
    def augmented(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """A training item, Float[*item], and its target, Int[*S]. What is random comes from the generators, which are set before."""

    @abstractmethod
    def plain(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """An item as it is evaluated, Float[*item], and its target, Int[*S]."""

    @abstractmethod
    def transform(self, card: EncoderCard) -> AnyTransform:
        """What an evaluation does to an item, which is saved with the model."""

    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """One global view, of a picture; other kinds of items have their own shape."""
        side = self.default_size()
        return {"global": (1, (num_channels, side, side))}

    def default_size(self) -> int:
        """Height and width of images, number of points of clouds, or number of frames of sounds."""
        assert self.size is not None, "the size of the backbone is filled in before training"
        return self.size

    def prepare(self, items: Sequence[Item], *, keys: Tensor, card: EncoderCard) -> dict[str, Tensor]:
        """Augmented items, Float[B *item], and their targets, Int[B *S]."""
        made: list[tuple[Tensor, Tensor]] = []
        for item, key in zip(items, keys, strict=True):
            with drawn_from(key):
                made.append(self.augmented(item, card=card))
        return stacked(made)

    def make(self, parts: Mapping[str, Tensor], *, changes: Mapping[str, Changes], keys: Tensor, card: EncoderCard) -> Views:
        """The items as the only view of a group."""
        return Views({"global": ViewGroup(items=parts["items"].unsqueeze(0))})


def stacked(made: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Items and their targets as the parts of a batch."""
    items, targets = zip(*made, strict=True)
    return {"items": torch.stack(items), "targets": torch.stack(targets)}


class _Evaluated(Dataset[RawBatch]):
    """Items as they are evaluated. One that cannot be read is left out, so a batch may be empty.

    Args:
        source: source of the items.
        read: function that reads one item of it.
        plain: function that makes an item and its target of it, see `TaskViews.plain`.
        empty: a batch without items.
    """

    def __init__(
        self,
        source: Source,
        *,
        read: Callable[[Source, int], Item],
        plain: Callable[[Item], tuple[Tensor, Tensor]],
    ) -> None:
        self._source, self._read, self._plain = source, read, plain

    def __getitem__(self, indices: Sequence[int]) -> RawBatch:
        made: list[tuple[Tensor, Tensor]] = []
        index: list[int] = []
        unreadable: list[tuple[int, str]] = []
        for one in indices:
            try:
                made.append(self._plain(self._read(self._source, one)))
                index.append(one)
            except UnreadableItemError as error:
                unreadable.append((one, str(error)))
        parts = stacked(made) if made else {}
        return RawBatch(parts, {}, {}, torch.tensor(index, dtype=torch.int64), 0, unreadable)

    def named(self, indices: Sequence[int]) -> str:
        """What a batch reads, for messages."""
        return f"{self._source.name}: test items from number {indices[0]} on"


class _Both(Source):
    """The items of one source, and behind them those of another.

    Args:
        first: source whose items, name and classes come first.
        second: source of the items behind them.
    """

    def __init__(self, first: Source, second: Source) -> None:
        self.first, self.second, self.name, self.classes = first, second, first.name, first.classes

    @property
    def modality(self) -> str:
        return self.first.modality

    @property
    def groups(self) -> Sequence[str]:
        parts = (self.first, self.second)
        if not any(part.groups for part in parts):
            return ()
        return [f"{number} {name}" for number, part in enumerate(parts) for name in part.groups or map(str, range(len(part)))]

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> Item:
        own = index - len(self.first)
        return self.first[index] if own < 0 else self.second[own]


class LabelledData(DataModule):
    """Training and test items with what a model is to predict of them.

    The test part is `test`, or the source's own (`val/` or `test/` beside `train/`), or else a fixed fifth of it.

    Args:
        source: source of both parts.
        views: how an item becomes a view and a target.
        batch_size: items per process.
        order: which items an epoch holds; all in random order when left out.
        num_workers: worker processes of each process, see `DataModule`.
        cache: keep the decoded training items in memory; `auto` does so below 1.5 GB.
        seed: seed of order and augmentation.
        max_unreadable: share of items that may be unreadable, see `DataModule`.
        development: source of a further part, with the same classes, on which thresholds are chosen; None for none.
        separator: what stands between two labels in the name of a class, where items have any number of labels; None where each has one.
        test: source of the test part, with classes of the same names; None for a part of `source`.

    Raises:
        ValueError: a size, share or count out of range, or a source without classes.
    """

    def __init__(
        self,
        source: Source,
        views: TaskViews,
        *,
        batch_size: int,
        order: Order | None = None,
        num_workers: int | None = None,
        cache: bool | Literal["auto"] = "auto",
        seed: int = 0,
        max_unreadable: float = 0.01,
        development: Source | None = None,
        separator: str | None = None,
        test: Source | None = None,
    ) -> None:
        views.classes_of(source)
        train, self.test = train_test_parts(source) if test is None else (source, under_classes_of(source, test, separator=separator))
        self.classes = views.classes_of(self.test)  # those that only the test part has come last
        self.separator, self._label_sets = separator, None
        if separator is not None:
            self._label_sets = LabelSets(self.classes, separator=separator)
            self.classes = self._label_sets.names
        if not len(self.test):
            raise ValueError(f"data: {source.name} has {len(source)} items, too few for a test part; give val/ beside train/")
        if development is not None and list(development.classes) != list(self.test.classes):
            raise ValueError(f"data: {development.name} has the classes {list(development.classes)}; accepted: those of {self.test.name}")
        self.development = development
        self.evaluated = self.test if development is None else _Both(self.test, development)
        options = {"order": order, "num_workers": num_workers, "cache": cache, "seed": seed, "max_unreadable": max_unreadable}
        super().__init__(train, views, batch_size=batch_size, **options)
        self.task_views = views

    @property
    def transform(self) -> AnyTransform:
        """What an evaluation does to an item."""
        assert self._encoder is not None, "setup comes first"
        return self.task_views.transform(self._encoder.card)

    def groups_of(self, index: Tensor) -> Tensor | None:
        """Int[B], which evaluated items Int[B] belong together, such as frames of one video; None where all are independent."""
        groups = list(self.evaluated.groups)
        if not groups:
            return None
        numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
        return torch.tensor([numbers[groups[one]] for one in index.tolist()])

    def is_test(self, index: Tensor) -> Tensor:
        """Bool[B]: which of the evaluated items Int[B] are of the test part; the others are of the development part."""
        return index < len(self.test)

    def val_dataloader(self) -> DataLoader:
        """All items of the test part, and of the development part behind them, divided between the processes."""
        assert self.trainer is not None and self._encoder is not None
        own = list(range(self.trainer.global_rank, len(self.evaluated), self.trainer.world_size))
        at_once = self.task_views.evaluated_at_once
        size = 1 if at_once == 1 else max(self.batch_size, at_once)
        order = [own[start : start + size] for start in range(0, len(own), size)]
        plain = partial(self.task_views.plain, card=self._encoder.card)
        items = _Evaluated(self.evaluated, read=self.task_views.read, plain=plain)
        return Loader(items, order, num_workers=self._num_test_workers(), named=items.named, setting="--data.num_workers")

    def plain_batches(self, source: Source, *, at_most: int) -> Iterator[Batch]:
        """Items of a source as they are evaluated, by this process alone: all of them, or `at_most` that are drawn once and for all."""
        assert self._encoder is not None, "setup comes first"
        chosen = rng.permutation(torch.tensor(_SAMPLE_SEED), len(source))[:at_most].sort().values.tolist()
        size = max(self.batch_size, self.task_views.evaluated_at_once)
        order = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        items = _Evaluated(source, read=self.task_views.read, plain=partial(self.task_views.plain, card=self._encoder.card))
        for raw in Loader(items, order, num_workers=self._num_test_workers(), named=items.named, setting="--data.num_workers"):
            yield self.make_batch(raw, encoder=self._encoder)

    def _num_test_workers(self) -> int:
        assert self.trainer is not None
        if self.num_workers is not None:
            return self.num_workers
        return 0 if self.trainer.strategy.root_device.type == "cpu" else min(max(self._node.cores - 1, 1), 8)

    def on_before_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> RawBatch:
        """Count and report the items that the worker could not read."""
        assert self.trainer is not None
        if self.trainer.training:
            return super().on_before_batch_transfer(batch, dataloader_idx)
        self.unreadable.num_seen += len(batch.index)
        # Test items are told from training items by their sign.
        self.unreadable.report([(~index, reason) for index, reason in batch.unreadable])
        return batch

    def on_after_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> Batch:
        """A batch with targets."""
        assert self.trainer is not None and self._encoder is not None
        if self.trainer.training:
            return super().on_after_batch_transfer(batch, dataloader_idx)
        return self.make_batch(batch, encoder=self._encoder)

    def make_batch(self, raw: RawBatch, *, encoder: Tokens) -> Batch:
        """One `Batch` with targets, Float[B K] where items have any number of labels; without views where no item of it could be read."""
        if not raw.parts:
            return Batch(index=raw.index, views={}, weight=torch.ones(0))
        targets = raw.parts["targets"]
        if self._label_sets is not None:
            targets = mixed_targets(targets, self._label_sets)
        return super().make_batch(raw, encoder=encoder)._replace(targets=targets)


def mixed_targets(targets: Tensor, label_sets: LabelSets) -> Tensor:
    """Float[B K] of Int[B]; or of Float[B 3], which the views mixed: the classes of both items, and the share of the second one."""
    if targets.dim() == 1:
        return label_sets.targets(targets)
    first, second = (label_sets.targets(targets[:, place].long()) for place in (0, 1))
    return torch.lerp(first, second, targets[:, 2:])


def step_key(*, seed: int, epoch: int, batch: int, rank: int) -> Tensor:
    """Int[], on the CPU: what a process draws from for a batch of an epoch, such as how its images are mixed."""
    return rng.fold_in(rng.item_keys(seed=seed, epoch=epoch, index=torch.tensor(batch)), rank)
