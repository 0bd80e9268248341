"""The DataModule: batches for a method, views and masks made on the device that trains.

Workers hand over items of one size (`glpretrain.data.loading`); everything random is a function of (seed, epoch, dataset index), so a
resumed run or another number of processes sees the same. Left out: reading files (sources) and what is done to a view (`views`).
"""

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from glpretrain.core import keys as rng
from glpretrain.core.types import Batch, EncoderCard
from glpretrain.data.loading import EpochOrder, RawBatch, RawItems, batches_of, usable_cores
from glpretrain.data.sources.base import Source, Subset
from glpretrain.data.views import ViewMaker
from glpretrain.masking import Corruption, Mask, RegionMask

_log = logging.getLogger(__name__)

_MASK, _CORRUPTION = 0x3A5C, 0xC022  # what an item's key is folded with here; `views` uses small numbers
_AUTO_CACHE_BYTES = 1_500_000_000
_LEAST_SEEN = 500  # the share of unreadable items is taken of at least so many, or the first would stop a run
_TRAIN_SHARE = 0.8


class Tokens(Protocol):
    """What data has to know of an encoder: every `Encoder` is one."""

    @property
    def card(self) -> EncoderCard:
        """Mean, std and number of channels."""

    def grid(self, item_shape: Sequence[int]) -> tuple[int, ...]:
        """Tokens along each axis."""


class DataModule(LightningDataModule):
    """Turns a source into `Batch`es for training, and names the sources that evaluators use.

    Args:
        source: what is trained on.
        views: how its items are cropped and changed.
        batch_size: items per process.
        image_size: side that workers stretch images to, or points of a cloud that they hand over; the views' own when left out.
        mask: hides tokens of the global views from the student; a region mask needs a source with region maps.
        corruption: replaces groups of pixels (or points) of the global views.
        num_workers: worker processes; when left out none with the cache, otherwise one fewer than there are cores, at most 8.
        cache: keep the decoded items in memory; `auto` does so below 1.5 GB.
        seed: of order, views and masks.
        max_unreadable: share of items that may be unreadable before the run stops; of at least 500 items, so that one bad file
            in a small folder does not stop it.
        labelled: source with classes for k-NN and linear probe.
        labelled_test: its held-out part.
        masked: source with instance masks for prompt segmentation.

    Raises:
        ValueError: a size, share or count out of range, views of another kind of item, a labelled source without classes, a masked one
            without masks, or a region mask without region maps.
    """

    def __init__(
        self,
        source: Source,
        views: ViewMaker,
        *,
        batch_size: int,
        image_size: int | None = None,
        mask: Mask | RegionMask | None = None,
        corruption: Corruption | None = None,
        num_workers: int | None = None,
        cache: bool | Literal["auto"] = "auto",
        seed: int = 0,
        max_unreadable: float = 0.01,
        labelled: Source | None = None,
        labelled_test: Source | None = None,
        masked: Source | None = None,
    ) -> None:
        super().__init__()
        if source.modality != views.modality:
            kind = type(views).__name__
            raise ValueError(f"DataModule: source {source.name!r} has items of kind {source.modality}; {kind} accepts {views.modality}")
        self.image_size = views.default_size() if image_size is None else image_size
        views.require_size(self.image_size)
        if batch_size < 1:
            raise ValueError(f"DataModule: batch_size is {batch_size}; expected at least 1")
        if not 0.0 <= max_unreadable <= 1.0:
            raise ValueError(f"DataModule: max_unreadable is a share in [0, 1], not {max_unreadable}")
        if labelled is None and labelled_test is not None:
            raise ValueError("DataModule: labelled_test is given without labelled; give both or only labelled")
        for argument, given in (("labelled", labelled), ("labelled_test", labelled_test)):
            if given is not None and not given.classes:
                raise ValueError(f"DataModule: {argument} is {given.name!r}, which has no classes")
        if masked is not None and not masked.has_masks:
            raise ValueError(f"DataModule: masked is {masked.name!r}, which has no masks")
        if isinstance(mask, RegionMask) and not source.has_regions:
            raise ValueError(
                f"DataModule: mask {type(mask).__name__} needs region maps, which {source.name!r} has not; give a source of faces"
            )
        self.source = source
        self.views = views
        self.batch_size = batch_size
        self.mask = mask
        self.corruption = corruption
        self.num_workers = num_workers
        self.cache = cache
        self.seed = seed
        self.max_unreadable = max_unreadable
        self.labelled = labelled
        self.labelled_test = labelled_test
        self.masked = masked
        self._items = RawItems(source, fit=partial(views.fitted, size=self.image_size))
        self._in_memory = False
        self._resumed = (0, 0)
        self._items_seen = 0
        self._unreadable: set[int] = set()
        self._run_folder = Path()

    @property
    def optional_fields(self) -> set[str]:
        """The fields of `Batch` that this one makes although not every method needs them."""
        made = {
            "local_views": self.views.num_local_views > 0,
            "student_views": self.views.num_student_views > 0,
            "coarse_views": self.views.num_coarse_views > 0,
            "mask": self.mask is not None,
            "region_mask": isinstance(self.mask, RegionMask) and self.mask.has_region_mask,
            "corrupted_views": self.corruption is not None,
        }
        return {name for name, there in made.items() if there}

    def setup(self, stage: str) -> None:
        """Fail now where a view does not divide into patches, or the source does not fill a batch."""
        encoder: Tokens = self.trainer.lightning_module.encoder
        if encoder.card.modality != self.views.modality:
            kind, accepted = type(self.views).__name__, encoder.card.modality
            raise ValueError(f"DataModule: views of {kind} are {self.views.modality}; encoder {encoder.card.encoder!r} accepts {accepted}")
        for shape in self.views.shapes(len(encoder.card.mean)):
            encoder.grid(shape)
        self._order()
        # Only the first process knows the run's folder when it starts; the others would list what they skip where they stand.
        self._run_folder = Path(self.trainer.strategy.broadcast(self.trainer.default_root_dir))

    def _order(self) -> EpochOrder:
        return EpochOrder(
            len(self.source),
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            seed=self.seed,
        )

    def train_dataloader(self) -> DataLoader:
        """Batches as workers hand them over; `on_after_batch_transfer` makes a `Batch` of each."""
        if not self._in_memory and (self.cache is True or (self.cache == "auto" and self._items.bytes_in_memory() < _AUTO_CACHE_BYTES)):
            unreadable = self._items.keep_in_memory(num_workers=usable_cores(), show=self.trainer.is_global_zero)
            self._in_memory = True
            self._items_seen += len(self.source)
            if self.trainer.is_global_zero:  # every process decoded all of them
                self._report(unreadable)
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = 0 if self._in_memory else min(max(usable_cores() - 1, 1), 8)
        order = self._order()
        epoch, batches_done = self._resumed
        order.resume(epoch=epoch, batches_done=batches_done)
        return batches_of(self._items, order, num_workers=num_workers)

    def raw_batch(self, indices: Sequence[int]) -> RawBatch:
        """Items as a worker would hand them over, for pictures, notebooks and tests."""
        return self._items[list(indices)]

    def on_before_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> RawBatch:
        """Account for what the worker could not read."""
        self._items_seen += 0 if self._in_memory else len(batch.index)
        self._report(batch.unreadable)
        return batch

    def on_after_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> Batch:
        """Make views, masks and corruption on the device."""
        return self.make_batch(batch, encoder=self.trainer.lightning_module.encoder, epoch=self.trainer.current_epoch)

    @torch.no_grad()
    def make_batch(self, raw: RawBatch, *, encoder: Tokens, epoch: int) -> Batch:
        """One `Batch` on the device of `raw`; needs no trainer.

        Args:
            raw: from a worker or `raw_batch`.
            encoder: its card names mean and std, and its grid is what is masked.
            epoch: how often the data was passed over before.
        """
        card = encoder.card
        keys = rng.item_keys(seed=self.seed, epoch=epoch, index=raw.index)  # [B]
        views = self.views.make(raw, keys=keys, card=card)
        G, B, *shape = views.global_views.shape
        grid = encoder.grid(shape)
        mask = region_mask = corrupted = corruption = None
        if self.mask is not None:
            # One call for all views: what block-wise masks cost is the number of their attempts, not of their items.
            mask_keys = _per_view(keys, _MASK, count=G).flatten()  # [(G B)]
            if isinstance(self.mask, RegionMask):
                mask, region_mask = self.mask(mask_keys, grid, regions=views.regions.flatten(0, 1))
                region_mask = None if region_mask is None else region_mask.unflatten(0, (G, B))  # [G B N]
            else:
                mask = self.mask(mask_keys, grid)
            mask = mask.unflatten(0, (G, B))  # [G B N]
        if self.corruption is not None:
            # View by view: a corruption takes pixels from neighbours in the batch, which must be the same view.
            view_keys = _per_view(keys, _CORRUPTION, count=G)
            pairs = [self.corruption(view, key, grid=grid) for view, key in zip(views.global_views, view_keys, strict=True)]
            corrupted, corruption = (torch.stack(parts) for parts in zip(*pairs, strict=True))  # [G B *item], [G B *inputs]
        return Batch(
            global_views=views.global_views,
            local_views=views.local_views,
            mask=mask,
            region_mask=region_mask,
            corrupted_views=corrupted,
            corruption=corruption,
            student_views=views.student_views,
            weak=views.weak,
            regions=None if views.regions is None else _region_of_tokens(views.regions, grid=grid),
            boxes=views.boxes,
            index=raw.index,
            coarse_views=views.coarse_views,
        )

    def state_dict(self) -> dict[str, int]:
        """Where in the data the run is."""
        # Batches whose step is done; Lightning's other counters may be one ahead in a checkpoint made during a step.
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        # Lightning's number knows of limit_train_batches, but is infinite before the loader is made.
        epoch, batches_done = divmod(done, max(1, min(len(self._order()), self.trainer.num_training_batches)))
        return {"epoch": epoch, "batches_done": batches_done, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the last batch of a checkpoint.

        Raises:
            ValueError: seed, number of items or global batch differ, so the order cannot be continued.
        """
        for name, value in self._identity().items():
            if state_dict[name] != value:
                raise ValueError(f"resume: the checkpoint's run had {name} = {state_dict[name]}, this one has {value}; make them equal")
        self._resumed = (state_dict["epoch"], state_dict["batches_done"])
        # Lightning looks for the position in the loader, where it cannot be: workers fetch ahead of the steps.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")

    def _identity(self) -> dict[str, int]:
        return {"seed": self.seed, "num_items": len(self.source), "global_batch_size": self.batch_size * self.trainer.world_size}

    def _report(self, unreadable: Sequence[tuple[int, str]]) -> None:
        """Log, list and count items that could not be read, each once.

        Raises:
            ValueError: there are too many of them.
        """
        fresh = [(index, reason) for index, reason in unreadable if index not in self._unreadable]
        if not fresh:
            return
        path = self._run_folder / "unreadable.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for index, reason in fresh:
                self._unreadable.add(index)
                _log.warning("skipped, cannot be read: %s", reason)
                file.write(f"{reason}\n")
        if len(self._unreadable) > self.max_unreadable * max(self._items_seen, _LEAST_SEEN):
            raise ValueError(
                f"{self.source.name}: {len(self._unreadable)} of {self._items_seen} items cannot be read, more than max_unreadable ="
                f" {self.max_unreadable}; they are listed in {path}, the last: {fresh[-1][1]}"
            )

    def labelled_sources(self) -> tuple[Source, Source]:
        """(train, test) for k-NN and linear probe.

        The given ones; else the division that the source itself has; else a fixed fifth of a source with classes is the test part;
        else an embedded source (scenes, or solids for points).

        Raises:
            ValueError: scenes would be the only choice, but the items have not three channels.
        """
        if self.labelled is not None and self.labelled_test is not None:
            return self.labelled, self.labelled_test
        source = self.source if self.labelled is None else self.labelled
        if not source.classes and source.train_test_split() is None:
            return self._embedded_source("labelled").train_test_split()
        return self.divided(source)

    @staticmethod
    def divided(source: Source) -> tuple[Source, Source]:
        """(train, test) parts of a source with classes: its own division, else a fixed fifth of it is the test part."""
        if (division := source.train_test_split()) is not None:
            return division
        index = torch.arange(len(source))
        train = rng.uniform(rng.item_keys(seed=0, epoch=0, index=index)) < _TRAIN_SHARE  # not of the run's seed: runs stay comparable
        return Subset(source, indices=index[train].tolist()), Subset(source, indices=index[~train].tolist())

    def masked_source(self) -> Source:
        """For prompt segmentation: the given one; else the source, or its test part, where it has masks; else embedded.

        Raises:
            ValueError: scenes would be the only choice, but the items have not three channels.
        """
        if self.masked is not None:
            return self.masked
        source = self.source if self.source.has_masks else self._embedded_source("masked")
        division = source.train_test_split()
        return source if division is None else division[1]

    def _embedded_source(self, argument: str) -> Source:
        embedded = self.views.embedded_source(self.image_size)
        channels, accepted = (item.shape[self.views.channel_axis] for item in (self.raw_batch([0]).images[0], embedded[0].image))
        if channels != accepted:
            raise ValueError(f"DataModule: {self.source.name} has {channels} channels and {embedded.name} have {accepted}; give {argument}")
        return embedded


def _per_view(keys: Tensor, purpose: int, *, count: int) -> Tensor:
    """Int[G B]."""
    return torch.stack([rng.fold_in(rng.fold_in(keys, purpose), number) for number in range(count)])


def _region_of_tokens(regions: Tensor, *, grid: tuple[int, ...]) -> Tensor:
    """Int[G B N]: the region at each token's centre."""
    H, W = regions.shape[2:]
    rows = ((torch.arange(grid[0], device=regions.device) + 0.5) * (H / grid[0])).long()
    columns = ((torch.arange(grid[1], device=regions.device) + 0.5) * (W / grid[1])).long()
    return regions[:, :, rows][..., columns].flatten(2)
