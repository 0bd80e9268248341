"""Attention maps of any block of a transformer (the exact softmax, whatever kernel computed the attention), and the keys behind them.

The block runs as it is. Its call of `scaled_dot_product_attention` is watched (or of `softmax`, where timm does not use the fused kernel),
so queries and keys carry the norms, rotations and biases of the model at hand. Left out: drawing the maps.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from glpretrain.encoders.base import Encoder
from glpretrain.encoders.points import PointTransformer
from glpretrain.encoders.vit import ViT

# From the weights of an attention, Float[B heads T T], and its keys, Float[B heads T d] (None where they are not seen), to what is kept.
_Keep = Callable[[Tensor, Tensor | None], Tensor]


def attention_maps(encoder: Encoder, items: Tensor, *, block: int = -1) -> Tensor:
    """How much every token of one block attends to every other, over prefix tokens (class token, registers) and patches.

    Args:
        encoder: a ViT or point transformer in evaluation mode (call `eval()` first).
        items: Float[B *item].
        block: number of the block; negative numbers count from the last.

    Returns:
        Float[B heads T T], T = prefix tokens + N, in float32 and without gradient; rows sum to one.

    Raises:
        ValueError: the encoder is of another kind or in training mode, there is no such block, or it does not have exactly one attention.
    """
    return _record(encoder, items, blocks=[block], keep=lambda maps, keys: maps)[0]


def attention_keys(encoder: Encoder, items: Tensor, *, block: int = -1) -> Tensor:
    """The keys of every patch in one block, the heads side by side; class token and registers are left out.

    Args:
        encoder: see `attention_maps`; its attention must run in the fused kernel, which is timm's default.
        items: Float[B C H W].
        block: see `attention_maps`.

    Returns:
        Float[B N D], D = heads x width of a head, in float32 and without gradient.

    Raises:
        ValueError: the attention is not fused, or see `attention_maps`.
    """

    def of_patches(maps: Tensor, keys: Tensor | None) -> Tensor:
        if keys is None:
            name = encoder.card.arguments["name"]
            raise ValueError(f"attention keys: {name} does not run the fused kernel, which is needed; set TIMM_FUSED_ATTN=1")
        return keys[:, :, encoder.num_prefix_tokens :].transpose(1, 2).flatten(2)  # [B N D]

    return _record(encoder, items, blocks=[block], keep=of_patches)[0]


class AttentionInputs(NamedTuple):
    """Queries, keys and values of one attention, of the patches only."""

    queries: Tensor  # Float[B heads N d]
    keys: Tensor  # Float[B heads N d]
    values: Tensor  # Float[B heads N d]


@contextmanager
def attention_inputs(encoder: Encoder, *, block: int) -> Iterator[list[AttentionInputs]]:
    """Record queries, keys and values of one block, with their gradient, in every forward pass of the encoder inside this context.

    Args:
        encoder: a ViT whose attention runs in the fused kernel; it may be in training mode.
        block: see `attention_maps`.

    Yields:
        A list that grows by one entry with each pass.

    Raises:
        ValueError: the encoder is no ViT, or there is no such block.
    """
    if not isinstance(encoder, ViT):
        raise ValueError(f"attention inputs: {encoder.card.arguments.get('name', encoder.card.encoder)} given; accepted: a ViT")
    if not -encoder.num_layers <= block < encoder.num_layers:
        raise ValueError(f"attention inputs: block={block}; accepted: {-encoder.num_layers} to {encoder.num_layers - 1}")
    watch = _WatchInputs(num_prefix_tokens=encoder.num_prefix_tokens)
    watched = encoder.model.blocks[block]
    hooks = [watched.register_forward_pre_hook(watch.start), watched.register_forward_hook(watch.stop)]
    try:
        with watch:
            yield watch.kept
    finally:
        for hook in hooks:
            hook.remove()


class _WatchInputs(TorchFunctionMode):
    """Keeps the arguments of every fused attention between `start` and `stop`."""

    def __init__(self, *, num_prefix_tokens: int) -> None:
        super().__init__()
        self.kept: list[AttentionInputs] = []
        self._num_prefix_tokens = num_prefix_tokens
        self._inside = False

    def start(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook."""
        self._inside = True

    def stop(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook."""
        self._inside = False

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping | None = None) -> object:
        if self._inside and func is F.scaled_dot_product_attention:
            self.kept.append(AttentionInputs(*(tensor[:, :, self._num_prefix_tokens :] for tensor in args[:3])))
        return func(*args, **(kwargs or {}))


def cls_attention(encoder: Encoder, items: Tensor, *, block: int = -1) -> Tensor:
    """How much the class token attends to every patch; registers are left out.

    Args:
        encoder: see `attention_maps`; it needs a class token.
        items: Float[B C H W].
        block: see `attention_maps`.

    Returns:
        Float[B heads *grid] over the tokens.

    Raises:
        ValueError: there is no class token, or see `attention_maps`.
    """
    return cls_attention_of_blocks(encoder, items, blocks=[block])[0]


def cls_attention_of_blocks(encoder: Encoder, items: Tensor, *, blocks: Sequence[int]) -> Tensor:
    """`cls_attention` of several blocks, in one pass over the items.

    Args:
        encoder: see `cls_attention`.
        items: Float[B C H W].
        blocks: numbers of the blocks, see `attention_maps`; each block at most once.

    Returns:
        Float[L B heads *grid] over the tokens, L blocks in the order of `blocks`.

    Raises:
        ValueError: see `cls_attention`.
    """
    grid = encoder.grid(items.shape[1:])

    def to_patches(maps: Tensor, keys: Tensor | None) -> Tensor:
        return maps[:, :, 0, -math.prod(grid) :].unflatten(-1, grid)  # [B heads *grid]

    if isinstance(encoder, ViT | PointTransformer) and encoder.model.cls_token is None:
        raise ValueError(f"attention maps: {encoder.card.arguments['name']} has no class token; use attention_maps")
    return torch.stack(_record(encoder, items, blocks=blocks, keep=to_patches))


def _record(encoder: Encoder, items: Tensor, *, blocks: Sequence[int], keep: _Keep) -> list[Tensor]:
    """What `keep` returns for the attention of each block; the whole map, T x T, exists for one block at a time."""
    if not isinstance(encoder, ViT | PointTransformer):
        given = encoder.card.arguments.get("name", encoder.card.encoder)
        raise ValueError(f"attention maps: {given} given; accepted: a ViT or a PointTransformer")
    if encoder.training:
        raise ValueError("attention maps: the encoder is in training mode, where dropout changes the map; call eval() first")
    depth = encoder.num_layers
    for block in blocks:
        if not -depth <= block < depth:
            raise ValueError(f"attention maps: block={block}; accepted: {-depth} to {depth - 1}")
    watched = [encoder.model.blocks[block] for block in blocks]
    watch = _WatchAttention(keep)
    hooks = [block.register_forward_pre_hook(watch.start) for block in watched]
    hooks += [block.register_forward_hook(watch.stop) for block in watched]
    try:
        with torch.no_grad(), watch:
            encoder(items)
    finally:
        for hook in hooks:
            hook.remove()
    for block in watched:
        if len(watch.kept[block]) != 1:
            kind, name = type(block).__name__, encoder.card.arguments["name"]
            raise ValueError(f"attention maps: a {kind} of {name} has {len(watch.kept[block])} attention maps; accepted: blocks with one")
    return [watch.kept[block][0] for block in watched]


class _WatchAttention(TorchFunctionMode):
    """Keeps what `keep` returns for every attention that a block computes between `start` and `stop`."""

    def __init__(self, keep: _Keep) -> None:
        super().__init__()
        self.kept: dict[torch.nn.Module, list[Tensor]] = {}
        self._keep = keep
        self._block: torch.nn.Module | None = None

    def start(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook."""
        self.kept[module] = []
        self._block = module

    def stop(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook."""
        self._block = None

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        if self._block is not None and func is F.scaled_dot_product_attention:
            self.kept[self._block].append(self._keep(_softmax_of(*args, **(kwargs or {})), _key_of(*args, **(kwargs or {}))))
        elif self._block is not None and func is Tensor.softmax:
            self.kept[self._block].append(self._keep(result.float(), None))
        return result


def _key_of(query: Tensor, key: Tensor, *args: object, **kwargs: object) -> Tensor:
    """The keys, which are the second argument of `scaled_dot_product_attention`: Float[B heads T d] in float32."""
    return key.float()


def _softmax_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights inside `scaled_dot_product_attention` of the same arguments, Float[B heads T T] in float32."""
    assert not is_causal
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = query.float() @ key.float().transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(dim=-1)
