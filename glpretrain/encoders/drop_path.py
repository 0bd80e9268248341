"""Stochastic depth whose dropped paths are drawn from the items' keys, as crops and masks are.

timm draws from torch's generator, so that the paths of an item depend on its place in the batch, on the number of processes and on all
draws before it. Rates, and the factor on the paths that are kept, are timm's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from timm.layers.drop import DropPath
from torch import Tensor, nn

from glpretrain.core import keys as rng


class KeyedDropPath(DropPath):
    """timm's `DropPath`, told by `drawn_paths` which items keep this path. Without that, it draws from torch's generator as timm does."""

    kept: Tensor | None = None  # Bool[B]

    def forward(self, x: Tensor) -> Tensor:
        """Float[B *S], the residual of every item, to Float[B *S]: zero, or divided by the probability that the path is kept."""
        if self.kept is None:
            return super().forward(x)
        scale = self.kept.to(x.dtype) / (1.0 - self.drop_prob)
        return x * scale.view(-1, *[1] * (x.dim() - 1))


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
    try:
        yield
    finally:
        for path in paths:
            path.kept = None
