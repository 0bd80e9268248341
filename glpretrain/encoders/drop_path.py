"""Stochastic depth whose dropped paths are drawn from the items' keys, as crops and masks are.

timm draws from torch's generator, so that the paths of an item depend on its place in the batch, on the number of processes and on all
draws before it. Rates, and the factor on the paths that are kept, are timm's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from glpretrain.core import keys as rng

PackedSizes = tuple[tuple[int, int], ...]  # items and tokens per item of each group of items, see `blocks.Packing`


class KeyedDropPath(DropPath):
    """timm's `DropPath`, told by `drawn_paths` which items keep this path. Without that, it draws from torch's generator as timm does."""

    kept: Tensor | None = None  # Bool[B], or Bool[1 S] of the tokens of a packed sequence
    rows: Tensor | None = None  # Int[M], numbers of the kept items (or of their tokens in a packed sequence), where `computes_kept`
    sizes: PackedSizes | None = None  # sizes of the kept items, in a packed sequence
    computes_kept = False

    def forward(self, x: Tensor) -> Tensor:
        """Float[B *S], the residual of every item, to Float[B *S]: zero, or divided by the probability that the path is kept."""
        if self.kept is None:
            return super().forward(x)
        scale = self.kept.to(x.dtype) / (1.0 - self.drop_prob)
        return x * scale.view(*scale.shape, *[1] * (x.dim() - scale.dim()))


def drop_uniformly(blocks: nn.Module, *, rate: float) -> None:
    """Give every residual branch of every block this rate: timm gives the first block none, and so no module that could drop."""
    for module in list(blocks.modules()):
        for name, _ in list(module.named_children()):
            if name.startswith("drop_path"):
                module.add_module(name, KeyedDropPath(rate))


def compute_kept(blocks: nn.Module) -> None:
    """Let every path of these blocks be computed for the items that keep it only; the blocks must be `blocks.PlainBlock`s."""
    for path in blocks.modules():
        if isinstance(path, KeyedDropPath):
            path.computes_kept = True


def use_keyed_paths(model: nn.Module) -> None:
    """Replace every `DropPath` inside a model of timm."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is DropPath:
                module.add_module(name, KeyedDropPath(child.drop_prob, child.scale_by_keep))


def dropping_paths(module: nn.Module) -> list[KeyedDropPath]:
    """The paths inside a module that are dropped in training mode."""
    return [part for part in module.modules() if isinstance(part, KeyedDropPath) and part.drop_prob > 0.0 and part.training]


@contextmanager
def drawn_paths(module: nn.Module, keys: Tensor, *, sizes: PackedSizes | None = None) -> Iterator["Draws"]:
    """Inside this context, every path of `module` drops the items that the keys say; item by item, each path by itself.

    Args:
        module: module in training mode; in evaluation mode nothing is dropped.
        keys: Int[B].
        sizes: how the B items lie in one packed sequence; None where each is a row of the batch.

    Yields:
        The draws, which can be shown for the items of one group only.
    """
    draws = Draws(dropping_paths(module), keys, sizes)
    try:
        yield draws
    finally:
        for path in draws.paths:
            path.kept = path.rows = path.sizes = None


class Draws:
    """Which items keep which paths.

    Args:
        paths: the paths.
        keys: see `drawn_paths`.
        sizes: see `drawn_paths`.
    """

    def __init__(self, paths: Sequence[KeyedDropPath], keys: Tensor, sizes: PackedSizes | None) -> None:
        self.paths = paths
        self._groups: list[tuple[Tensor, Tensor | None]] = []  # Bool[paths B_g], and the kept items first, Int[computing paths B_g]
        self._counts: list[list[int]] = []  # how many items of each group keep each path that computes them
        if not paths:
            return
        drawn = rng.uniform(keys, len(paths)).t()  # [paths B]: one draw for all paths, because it is many small operations
        table = drawn >= drawn.new_tensor([path.drop_prob for path in paths]).unsqueeze(1)
        tables = table.split([len(keys)] if sizes is None else [items for items, _ in sizes], dim=1)
        computing = [number for number, path in enumerate(paths) if path.computes_kept]
        if computing:
            own = [kept if len(computing) == len(paths) else kept[computing] for kept in tables]
            order = [kept.logical_not().byte().argsort(dim=1, stable=True) for kept in own]
            self._groups = list(zip(tables, order, strict=True))
            # The host waits once for how many items each path keeps.
            counts = iter(torch.stack([kept.sum(dim=1) for kept in own], dim=1).tolist())
            self._counts = [next(counts) if path.computes_kept else [] for path in paths]
        else:
            self._groups = [(kept, None) for kept in tables]
            self._counts = [[] for _ in paths]
        if sizes is None:
            self.show_group(0)
        else:
            self._show_packed(sizes)

    def show_group(self, group: int, *, module: nn.Module | None = None) -> None:
        """Let the paths inside a module (all of them, without one) see the items of one group as the rows of a batch."""
        own = None if module is None else set(module.modules())
        if self.paths:
            kept, order = self._groups[group]
            rows = iter(() if order is None else order)
            for path, shown, counts in zip(self.paths, kept, self._counts, strict=True):
                numbers = next(rows) if path.computes_kept else None
                if own is None or path in own:
                    path.kept, path.sizes = shown, None
                    path.rows = None if numbers is None else numbers[: counts[group]]

    def _show_packed(self, sizes: PackedSizes) -> None:
        """Let every path see tokens of one sequence, each of which is kept as its item is."""
        tables = zip(self._groups, sizes, strict=True)
        shown = torch.cat([kept.unsqueeze(2).expand(-1, -1, length).flatten(1) for (kept, _), (_, length) in tables], dim=1)  # [paths S]
        for path, kept in zip(self.paths, shown.unsqueeze(1), strict=True):
            path.kept = kept
        computing = [(path, counts) for path, counts in zip(self.paths, self._counts, strict=True) if path.computes_kept]
        if not computing:
            return
        starts = accumulate((items * length for items, length in sizes), initial=0)
        tokens = [
            start + order.unsqueeze(2) * length + torch.arange(length, device=order.device)  # [computing paths B_g T_g]
            for start, (_, order), (_, length) in zip(starts, self._groups, sizes, strict=False)
            if order is not None
        ]
        for number, (path, counts) in enumerate(computing):
            path.rows = torch.cat([group[number, :count].flatten() for group, count in zip(tokens, counts, strict=True)])
            path.sizes = tuple((count, length) for count, (_, length) in zip(counts, sizes, strict=True))
