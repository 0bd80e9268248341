"""The DataModule: batches for a method, with views and masks that are made on the training device from what workers prepared.

Workers take of an item what its views need (`items`). All that is random is a function of (seed, epoch, dataset index), so a resumed run
or another number of processes sees the same. Left out: reading files (`sources`) and the operations on a view (`views`).
"""

import math
import secrets
import warnings
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from glpretrain.core import keys as rng
from glpretrain.core.batch import Batch, ViewGroup, first_visible
from glpretrain.core.node import Node
from glpretrain.data.items import Asked, Items, RawBatch, RawItems, SizedItems, batches_of
from glpretrain.data.masks import MASK, draw_masks
from glpretrain.data.orders import EpochBatches, Order, Position, Shuffled
from glpretrain.data.own import embedded_source, require_same_channels, train_test_parts
from glpretrain.data.requirements import Consumer, Made, Tokens, check_same_items, check_uses
from glpretrain.data.sources.base import Source
from glpretrain.data.unreadable import Unreadable
from glpretrain.data.views import ViewMaker, Views
from glpretrain.masking import Corruption, Mask, RegionMask

_CORRUPTION = 0xC022  # purpose that an item's key is folded with here; `views` uses small numbers
_AUTO_CACHE_BYTES = 1_500_000_000


class DataModule(LightningDataModule):
    """Turns a source into `Batch`es for training, and names the sources that evaluators use.

    Args:
        source: source that the run trains on.
        views: maker of the views of an item.
        batch_size: items per process.
        mask: mask that hides tokens of the global views from the student; a region mask needs a source with region maps.
        corruption: replacement of groups of pixels (or points) of the global views.
        order: which items an epoch holds; when left out, all in random order. `orders.ByShard` reads tar shards one after another,
            `infobatch.InfoBatch` leaves out items of low loss.
        num_workers: worker processes of each process; when left out none with the cache on a CPU, otherwise its share of the cores less
            one, at most 8. Killed workers start again, three times in 1,000 batches; one that gives nothing for 15 minutes ends the run.
        cache: keep the decoded items in memory, images at their own size, once for all processes of a machine; `auto` does so below 1.5 GB.
        seed: seed of order, views and masks.
        max_unreadable: share of the items seen, or of 500 where they are fewer, that may be unreadable before the run stops.
        labelled: source with classes for k-NN and linear probe.
        labelled_test: held-out part of `labelled`.
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
        mask: Mask | RegionMask | None = None,
        corruption: Corruption | None = None,
        order: Order | None = None,
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
            raise ValueError(
                f"DataModule: source {source.name!r} has items of kind {source.modality}, but {type(views).__name__} makes views of kind"
                f" {views.modality}; give views for {source.modality}"
            )
        if batch_size < 1:
            raise ValueError(f"DataModule: batch_size is {batch_size}; expected at least 1")
        if labelled is None and labelled_test is not None:
            raise ValueError("DataModule: labelled_test is given without labelled; give both or only labelled")
        for argument, given in (("labelled", labelled), ("labelled_test", labelled_test)):
            if given is not None and not given.classes:
                raise ValueError(f"DataModule: {argument} is {given.name!r}, which has no classes")
        if masked is not None and not masked.has_masks:
            raise ValueError(f"DataModule: masked is {masked.name!r}, which has no masks")
        if isinstance(mask, RegionMask) and not source.has_regions:
            raise ValueError(
                f"DataModule: {type(mask).__name__} needs region maps, but source {source.name!r} has none; give a source of faces"
            )
        self.source = source
        self.views = views
        self.batch_size = batch_size
        self.mask = mask
        self.corruption = corruption
        self.order = Shuffled() if order is None else order
        self.num_workers = num_workers
        self.cache = cache
        self.seed = seed
        self.labelled = labelled
        self.labelled_test = labelled_test
        self.masked = masked
        self._encoder: Tokens | None = None
        self._items = Items(source, read=views.read)
        self._in_memory = False
        self._node = Node.alone()
        self._batches: EpochBatches | None = None
        self._resumed = Position(0, 0)
        self._epoch_start, self._epoch_length = 0, 0  # batches before this epoch, and in it
        self.unreadable = Unreadable(source.name, most=max_unreadable)

    def made(self, num_channels: int = 3) -> dict[str, Made]:
        """The groups of views that a batch holds, with their parts."""
        parts = {name: set[str]() for name in self.views.groups(num_channels)}
        if self.mask is not None:
            parts["global"].add("mask")
            if isinstance(self.mask, RegionMask) and self.mask.has_region_mask:
                parts["global"].add("region_mask")
        if self.corruption is not None:
            parts["global"] |= {"corrupted", "corruption"}
        if "student" in parts:
            parts["student"].add("strong")
        groups = [maker.groups(num_channels) for maker in self.views.of_each_size()]
        num_sizes = {name: len({one[name][1] for one in groups}) for name in parts}
        return {name: Made(count, frozenset(parts[name]), num_sizes[name]) for name, (count, _) in groups[0].items()}

    def setup(self, stage: str) -> None:
        """Fail now if data and method do not fit, a view does not divide into patches, or the source does not fill a batch."""
        assert self.trainer is not None
        method = self.trainer.lightning_module
        if not isinstance(method, Consumer):
            raise ValueError(
                f"DataModule: {type(method).__name__} lacks `encoder` or `uses`; give a method of glpretrain.methods, or one with both"
            )
        self._encoder = encoder = method.encoder
        if encoder.card.modality != self.views.modality:
            raise ValueError(
                f"DataModule: {type(self.views).__name__} makes views of kind {self.views.modality}, but encoder"
                f" {encoder.card.encoder!r} needs {encoder.card.modality}; give views for {encoder.card.modality}"
            )
        num_channels = len(encoder.card.mean)
        check_uses(type(method).__name__, method.uses, self.made(num_channels))
        check_same_items(self.source, self.trainer.strategy)
        for _, shape in (group for maker in self.views.of_each_size() for group in maker.groups(num_channels).values()):
            encoder.grid(shape)
        self.order.begin(self.source)
        self._batches = EpochBatches(
            self.order,
            length=len(self.source),
            batch_size=self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            seed=self.seed,
            num_accumulated=self.trainer.accumulate_grad_batches,
            on_epoch=self._begin_epoch,
            progress=self._progress_at,
        )
        # Only the first process knows the run's folder at the start; the others would write their lists elsewhere.
        folder, name = self.trainer.strategy.broadcast((self.trainer.default_root_dir, secrets.token_hex(8)))
        self.unreadable.folder, self._node = Path(folder), Node.of_run(name)

    def train_dataloader(self) -> DataLoader:
        """Batches as workers give them; `on_after_batch_transfer` makes a `Batch` of each."""
        assert self.trainer is not None and self._batches is not None and self._encoder is not None
        self._batches.resume(self._resumed)
        if not self._in_memory and self.cache is not False:
            num_workers = self._node.cores if self.num_workers is None else self.num_workers
            options = {"num_workers": num_workers, "show": self.trainer.is_global_zero, "node": self._node}
            unreadable = self._items.keep_in_memory(most_bytes=_AUTO_CACHE_BYTES if self.cache == "auto" else math.inf, **options)
            self._in_memory = unreadable is not None
            self.unreadable.num_seen += len(self.source) if self._in_memory else 0
            if unreadable and self.trainer.is_global_zero:  # every machine decoded all of them
                self.unreadable.report(unreadable)
        num_workers = self.num_workers
        if num_workers is None:  # a GPU should not wait for this process to cut views
            alone = self._in_memory and self.trainer.strategy.root_device.type == "cpu"
            num_workers = 0 if alone else min(max(self._node.cores - 1, 1), 8)
        return batches_of(self._prepared(self._encoder), self._batches, num_workers=num_workers)

    def _prepared(self, encoder: Tokens) -> SizedItems:
        mask = None if isinstance(self.mask, RegionMask) else self.mask
        of_sizes = []
        for maker in self.views.of_each_size():
            count, shape = maker.groups(len(encoder.card.mean))["global"]
            prepare, draw = partial(maker.prepare, card=encoder.card), partial(draw_masks, mask=mask, grid=encoder.grid(shape), count=count)
            of_sizes.append(RawItems(self._items, prepare=prepare, draw=draw, seed=self.seed, change=maker.draw))
        return SizedItems(of_sizes, drawn=self.views.drawn_size, seed=self.seed)

    def _progress_at(self, epoch: int) -> float:
        """Share of the run that is done when an epoch begins, as `Method.progress` counts it; of epochs it is the exact quotient."""
        assert self.trainer is not None
        if self.trainer.max_steps > 0:
            return self.trainer.global_step / self.trainer.max_steps
        return epoch / (self.trainer.max_epochs or 1)

    def _begin_epoch(self, batches: EpochBatches) -> None:
        """Tell Lightning the length of this epoch; by itself it keeps that of the first one."""
        assert self.trainer is not None
        loop, limit = self.trainer.fit_loop, self.trainer.limit_train_batches
        limited = min(len(batches), limit) if isinstance(limit, int) else int(len(batches) * (limit or 1.0))
        self._epoch_length = batches.whole_steps(limited)
        if loop._combined_loader is not None:  # it would stop at the length of the run's first epoch
            loop._combined_loader.limits = [self._epoch_length]
        loop.max_batches = self._epoch_length
        if batches.position == self._resumed and self._resumed.batches_done == 0:
            # A checkpoint from the end of an epoch, which Lightning recognises by that epoch's length; see `on_before_batch_transfer`.
            loop.max_batches = loop.epoch_loop.batch_progress.current.ready or self._epoch_length
        self._epoch_start = self._batches_processed() - batches.position.batches_done

    def _batches_processed(self) -> int:
        """Batches whose step is done; Lightning's other counters may be one ahead in a checkpoint made during a step."""
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # pyright: ignore[reportAttributeAccessIssue]  its stub

    def raw_batch(self, indices: Sequence[int], *, encoder: Tokens, epoch: int, step: int | None = None) -> RawBatch:
        """Items, by dataset index, as a worker gives them in an epoch; without a step of it, in the own sizes of the views."""
        return self._prepared(encoder)[Asked(epoch, list(indices), step)]

    def on_before_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> RawBatch:
        """Count and report the items that the worker could not read."""
        assert self.trainer is not None
        self.trainer.fit_loop.max_batches = self._epoch_length
        self.unreadable.num_seen += 0 if self._in_memory else len(batch.index)
        self.unreadable.report(batch.unreadable)
        return batch

    def on_after_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> Batch:
        """Make views, masks and corruption on the device."""
        assert self.trainer is not None and self._encoder is not None and self._batches is not None
        weight = self._batches.weights_of(batch.index)
        return self.make_batch(batch, encoder=self._encoder)._replace(weight=weight)

    @torch.no_grad()
    def make_batch(self, raw: RawBatch, *, encoder: Tokens) -> Batch:
        """One `Batch` on the device of `raw`; needs no trainer.

        Args:
            raw: a batch from a worker or from `raw_batch`.
            encoder: encoder whose card names mean and standard deviation, and whose tokens are masked.
        """
        keys = rng.item_keys(seed=self.seed, epoch=raw.epoch, index=raw.index)  # [B]
        views = self.views.of_each_size()[raw.size].make(raw.parts, changes=raw.changes, keys=keys, card=encoder.card)
        hides = self.mask is not None or self.corruption is not None  # otherwise items may have shapes that the encoder does not take
        own = views.groups | ({"global": self._hide(views, raw.drawn, keys=keys, encoder=encoder)} if hides else {})
        groups = {name: one._replace(keys=rng.per_view(keys, zlib.crc32(name.encode()), count=len(one.items))) for name, one in own.items()}
        return Batch(index=raw.index, views=groups, weight=torch.ones(len(raw.index), device=raw.index.device))

    def _hide(self, views: Views, drawn: dict[str, Tensor], *, keys: Tensor, encoder: Tokens) -> ViewGroup:
        """The global views with masks and corruption."""
        group = views.groups["global"]._replace(**drawn)
        G, B, *shape = group.items.shape
        grid = encoder.grid(shape)
        if isinstance(self.mask, RegionMask):
            assert views.regions is not None
            mask_keys = rng.per_view(keys, MASK, count=G).flatten()  # [(G B)]
            mask, region_mask = self.mask(mask_keys, grid, regions=views.regions.flatten(0, 1))
            visible = first_visible(mask, count=self.mask.num_visible(grid)).unflatten(0, (G, B))
            region_mask = None if region_mask is None else region_mask.unflatten(0, (G, B))  # [G B N]
            group = group._replace(mask=mask.unflatten(0, (G, B)), region_mask=region_mask, visible=visible)
        if self.corruption is not None:
            # View by view: a corruption takes pixels from a neighbour in the batch, which must be the same view of another item.
            view_keys = rng.per_view(keys, _CORRUPTION, count=G)
            pairs = [self.corruption(view, key, grid=grid) for view, key in zip(group.items, view_keys, strict=True)]
            corrupted, corruption = (torch.stack(parts) for parts in zip(*pairs, strict=True))  # [G B *item], [G B *inputs]
            group = group._replace(corrupted=corrupted, corruption=corruption)
        return group

    def state_dict(self) -> dict[str, object]:
        """The position of the run in its data."""
        assert self.trainer is not None and self._batches is not None
        epoch, done = self._batches.position.epoch, self._batches_processed() - self._epoch_start
        done -= done % self._batches.num_accumulated  # a step that was stopped begins again: no checkpoint holds gradients
        if done >= self.trainer.fit_loop.max_batches:
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "batches_done": done, "order": self.order.state_dict(), **self._identity()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue after the last batch of a checkpoint.

        Raises:
            ValueError: seed, number of items, global batch or order differ, so the order cannot be continued.
        """
        for name, value in self._identity().items():
            if state_dict[name] != value:
                raise ValueError(f"resume: the checkpoint's run had {name} = {state_dict[name]}, this one has {value}; make them equal")
        self._resumed = Position(state_dict["epoch"], state_dict["batches_done"])
        self.order.restore(state_dict["order"])
        # Lightning expects the position in the loader, which cannot know it: workers fetch ahead of the steps.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")

    def _identity(self) -> dict[str, int]:
        assert self.trainer is not None
        return {"seed": self.seed, "num_items": len(self.source), "global_batch_size": self.batch_size * self.trainer.world_size}

    def labelled_sources(self) -> tuple[Source, Source]:
        """(train, test) sources for k-NN and linear probe.

        These are the given sources; otherwise the source's own split; otherwise a source with classes, a fixed fifth of it as test part;
        otherwise an embedded source.

        Raises:
            ValueError: only an embedded source is left, but its items have another number of channels.
        """
        if self.labelled is not None and self.labelled_test is not None:
            return self.labelled, self.labelled_test
        source = self.source if self.labelled is None else self.labelled
        if not source.classes and not any(part.classes for part in source.train_test_split() or ()):
            source = self._embedded_source("labelled")
        return train_test_parts(source)

    def masked_source(self) -> Source:
        """Source for prompt segmentation: the given one; otherwise the source, or its test part, if it has masks; or an embedded one.

        Raises:
            ValueError: only an embedded source is left, but its items have another number of channels.
        """
        if self.masked is not None:
            return self.masked
        source = self.source if self.source.has_masks else self._embedded_source("masked")
        split = source.train_test_split()
        return source if split is None else split[1]

    def _embedded_source(self, argument: str) -> Source:
        embedded = embedded_source(self.views.modality, size=self.views.default_size())
        require_same_channels(self._items.item(0, [])[0], embedded, name=self.source.name, argument=argument)
        return embedded
