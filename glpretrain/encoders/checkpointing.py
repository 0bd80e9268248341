"""Activation checkpointing: what a block computes is forgotten in the forward pass and computed again for its gradients.

Only the tokens between blocks are kept, so memory grows with depth by one tensor per block. The second pass is the first one to the last
bit: the same paths are dropped, the same kernel computes attention, and running statistics of batch norm do not move twice. Left out:
which modules of an encoder are blocks (`Encoder.blocks`), and chunks of a batch (`sequences.encode_in_chunks`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from glpretrain.encoders.drop_path import KeyedDropPath

_TIMMS_OWN = "grad_checkpointing"  # what `set_grad_checkpointing` of a model of timm sets
_DRAWN = ("kept", "rows", "sizes")  # set for one forward pass by `drop_path`
_SHOWN = ("fused_attn", "num_prefix_tokens")  # the same by `kernels` and `blocks`, of some parts of timm


class Checkpointed(Protocol):
    """What has to be known of an encoder."""

    activation_checkpointing: bool

    def modules(self) -> Iterator[nn.Module]:
        """All parts of the encoder."""
        ...

    def blocks(self) -> Sequence[nn.Module]:
        """The parts that are computed again, each of them as a whole."""
        ...


@contextmanager
def recomputing(encoder: Checkpointed) -> Iterator[None]:
    """Inside this context, calls of the blocks keep their inputs only, where gradients are computed and the encoder asks for it.

    A model of timm in it whose `set_grad_checkpointing` was called asks for it too; timm's own way would drop other paths the second time.
    """
    asking = [part for part in encoder.modules() if vars(part).get(_TIMMS_OWN)]
    wrapped = list(encoder.blocks()) if torch.is_grad_enabled() and (encoder.activation_checkpointing or asking) else []
    for part in asking:
        vars(part)[_TIMMS_OWN] = False
    for block in wrapped:
        vars(block)["forward"] = partial(recomputed, block, block.forward)
    try:
        yield
    finally:
        for block in wrapped:
            del vars(block)["forward"]
        for part in asking:
            vars(part)[_TIMMS_OWN] = True


def recomputed(block: nn.Module, function: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
    """`function(*args, **kwargs)`, of which only the arguments are kept for the gradients.

    Args:
        block: module whose parts `function` runs.
        function: forward pass of the block, or another function of tensors that runs its parts.
        args: what it is given, tensors or anything else.
        kwargs: the same by name.
    """
    keeps_state, passes = _asks_a_generator(block), partial(_passes, block)
    result = checkpoint(partial(function, **kwargs), *args, use_reentrant=False, preserve_rng_state=keeps_state, context_fn=passes)
    assert isinstance(result, Tensor)
    return result


def _asks_a_generator(block: nn.Module) -> bool:
    """Whether a pass draws from torch's generator, whose state is then kept: a copy that most blocks do not need."""
    for part in block.modules():
        if isinstance(part, KeyedDropPath):
            if part.training and part.drop_prob > 0.0 and part.kept is None:
                return True
        elif isinstance(part, nn.Dropout) and part.training and part.p > 0.0:
            return True
    return False


def _passes(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first pass and of the second one, which is made to compute what the first one does."""
    return nullcontext(), _as_now(block)


def _as_now(block: nn.Module) -> AbstractContextManager[None]:
    parts = list(block.modules())
    now = [(part, name, vars(part).get(name)) for part in parts if isinstance(part, KeyedDropPath) for name in _DRAWN]
    now += [(part, name, vars(part)[name]) for part in parts for name in _SHOWN if name in vars(part)]
    norms = [part for part in parts if isinstance(part, _BatchNorm) and part.training and part.track_running_stats]
    return _again(now, norms)


@contextmanager
def _again(settings: Sequence[tuple[nn.Module, str, object]], norms: list[_BatchNorm]) -> Iterator[None]:
    before = [(part, name, vars(part).get(name)) for part, name, _ in settings]
    momenta = [norm.momentum for norm in norms]
    counts = [None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in norms]
    _set(settings)
    for norm in norms:
        norm.momentum = 0.0  # the statistics have moved in the first pass
    try:
        yield
    finally:
        _set(before)
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


def _set(settings: Sequence[tuple[nn.Module, str, object]]) -> None:
    for part, name, value in settings:
        vars(part)[name] = value
