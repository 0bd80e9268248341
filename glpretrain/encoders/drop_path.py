"""Stochastic depth whose dropped paths are drawn from the items' keys, as crops and masks are.

timm draws from torch's generator, so that the paths of an item depend on its place in the batch, on the number of processes and on all
draws before it. Rates, and the factor on the paths that are kept, are timm's. `KeptBlock` does not even compute what would be dropped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from glpretrain.core import keys as rng


class KeyedDropPath(DropPath):
    """timm's `DropPath`, told by `drawn_paths` which items keep this path. Without that, it draws from torch's generator as timm does."""

    kept: Tensor | None = None  # Bool[B]
    rows: Tensor | None = None  # Int[M], numbers of the kept items, where `computes_kept` asks for them
    computes_kept = False

    def forward(self, x: Tensor) -> Tensor:
        """Float[B *S], the residual of every item, to Float[B *S]: zero, or divided by the probability that the path is kept."""
        if self.kept is None:
            return super().forward(x)
        scale = self.kept.to(x.dtype) / (1.0 - self.drop_prob)
        return x * scale.view(-1, *[1] * (x.dim() - 1))


class KeptBlock(Block):
    """timm's block, whose branches are computed for the items that keep their path only, as in DINOv2 (dinov2/layers/block.py).

    There, a batch keeps an exact share of its items, and the factor on them is the inverse of that share; here, as in every block, each
    item is drawn by itself, and the factor is the inverse of the probability. The result is that of timm's block but for rounding.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Float[B T D] to Float[B T D]; the arguments are those of timm's block."""
        x = self._add(x, self.drop_path1, lambda kept: self.ls1(self.attn(self.norm1(kept), attn_mask=attn_mask, is_causal=is_causal)))
        return self._add(x, self.drop_path2, lambda kept: self.ls2(self.mlp(self.norm2(kept))))

    @staticmethod
    def _add(tokens: Tensor, path: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if not isinstance(path, KeyedDropPath) or path.rows is None:
            return tokens + path(branch(tokens))
        residual = branch(tokens[path.rows]).to(tokens.dtype)  # [M T D]
        return tokens.index_add(0, path.rows, residual / (1.0 - path.drop_prob))


def drop_uniformly(blocks: nn.Module, *, rate: float) -> None:
    """Give every residual branch of every block this rate: timm gives the first block none, and so no module that could drop."""
    for module in list(blocks.modules()):
        for name, _ in list(module.named_children()):
            if name.startswith("drop_path"):
                path = KeyedDropPath(rate)
                path.computes_kept = isinstance(module, KeptBlock)
                module.add_module(name, path)


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
def drawn_paths(module: nn.Module, keys: Tensor) -> Iterator[None]:
    """Inside this context, every path of `module` drops the items that the keys say, Int[B]; item by item, each path by itself."""
    paths = dropping_paths(module)
    if paths:
        draws = rng.uniform(keys, len(paths))  # [B paths]: one draw for all paths, because it is many small operations
        for number, path in enumerate(paths):
            path.kept = draws[:, number] >= path.drop_prob
        _number_kept([path for path in paths if path.computes_kept])
    try:
        yield
    finally:
        for path in paths:
            path.kept = path.rows = None


def _number_kept(paths: list[KeyedDropPath]) -> None:
    """Note the numbers of the kept items; the host waits once for how many each path keeps."""
    kept = [path.kept for path in paths if path.kept is not None]
    if kept:
        table = torch.stack(kept)  # [paths B]
        order = table.logical_not().byte().argsort(dim=1, stable=True)  # the kept ones first
        for path, numbers, count in zip(paths, order, table.sum(dim=1).tolist(), strict=True):
            path.rows = numbers[:count]
