"""Attention maps of any block of a transformer (the exact softmax, whatever kernel computed the attention), and the queries, keys and
values behind them.

The block runs as it is. Its call of `scaled_dot_product_attention` is watched (or of `softmax`, where timm does not use the fused kernel),
so queries and keys carry the norms, rotations and biases of the model at hand. Left out: drawing the maps.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.points import PointTransformer
from glpretrain.encoders.sequences import split_tokens
from glpretrain.encoders.vit import ViT

AttentionTokens = Literal["query", "key", "value"]


class AttentionInputs(NamedTuple):
    """What a fused attention was computed from."""

    queries: Tensor  # Float[B heads T d]
    keys: Tensor  # Float[B heads T d]
    values: Tensor  # Float[B heads T d]


_Kept = TypeVar("_Kept")
# What is kept of one attention, or None for nothing: a function of its inputs (None where the kernel is not fused) and of a function that
# computes its weights, Float[B heads T T] in float32.
_Keep = Callable[[AttentionInputs | None, Callable[[], Tensor]], _Kept | None]


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
    return _record(encoder, items, blocks=[block], keep=lambda inputs, weights: weights())[0]


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

    return attention_tokens(encoder, items, blocks=[block], kind="key")[0].patches


def attention_tokens(encoder: Encoder, items: Tensor, *, blocks: Sequence[int], kind: AttentionTokens) -> list[EncoderOutput]:
    """The queries, keys or values of every token in some blocks, the heads side by side, as if they were the encoder's output.

    Args:
        encoder: see `attention_keys`.
        items: Float[B *item].
        blocks: numbers of the blocks, see `attention_maps`; each block at most once.
        kind: which of the three; keys and queries after their norms and rotations, where the encoder has any.

    Returns:
        One output per block, in float32 and without gradient; D = heads x width of a head.

    Raises:
        ValueError: the attention is not fused, or see `attention_maps`.
    """
    place = ("query", "key", "value").index(kind)

    def wanted(inputs: AttentionInputs | None, weights: Callable[[], Tensor]) -> Tensor:
        if inputs is None:
            name = encoder.card.arguments["name"]
            raise ValueError(f"attention {kind}: {name} does not run the fused kernel, which is needed; set TIMM_FUSED_ATTN=1")
        return inputs[place].float().transpose(1, 2).flatten(2)  # [B T D]

    transformer = _transformer(encoder)
    prefix, has_class_token = transformer.num_prefix_tokens, transformer.model.cls_token is not None
    found = _record(encoder, items, blocks=blocks, keep=wanted)
    return [split_tokens(tokens, num_prefix_tokens=prefix, has_class_token=has_class_token) for tokens in found]


@contextmanager
def attention_inputs(encoder: Encoder, *, block: int) -> Iterator[list[AttentionInputs]]:
    """Record queries, keys and values of one block in every forward pass inside this context: of the patches only, with their gradient.

    Args:
        encoder: a transformer whose attention runs in the fused kernel; it may be in training mode.
        block: see `attention_maps`.

    Yields:
        A list that grows by one entry with each pass.

    Raises:
        ValueError: the encoder is of another kind, or there is no such block.
    """

    def of_patches(inputs: AttentionInputs | None, weights: Callable[[], Tensor]) -> AttentionInputs | None:
        return None if inputs is None else AttentionInputs(*(tensor[:, :, prefix:] for tensor in inputs))

    prefix, (watched,) = _transformer(encoder).num_prefix_tokens, _blocks(encoder, [block])
    with _watching([watched], keep=of_patches) as kept:
        yield kept[watched]


def cls_attention(encoder: Encoder, items: Tensor, *, block: int = -1) -> Tensor:
    """Float[B heads *grid]: how much the class token attends to every patch in one block; see `cls_attention_of_blocks`."""
    return cls_attention_of_blocks(encoder, items, blocks=[block])[0]


def cls_attention_of_blocks(encoder: Encoder, items: Tensor, *, blocks: Sequence[int]) -> Tensor:
    """Float[L B heads *grid]: how much the class token attends to every patch (registers are left out) in L blocks, in one pass.

    Args:
        encoder: see `attention_maps`; it needs a class token.
        items: Float[B *item].
        blocks: numbers of the blocks, see `attention_maps`; each block at most once.

    Raises:
        ValueError: there is no class token, or see `attention_maps`.
    """
    grid = encoder.grid(items.shape[1:])

    def to_patches(inputs: AttentionInputs | None, weights: Callable[[], Tensor]) -> Tensor:
        return weights()[:, :, 0, -math.prod(grid) :].unflatten(-1, grid)  # [B heads *grid]

    if _transformer(encoder).model.cls_token is None:
        raise ValueError(f"attention maps: {encoder.card.arguments['name']} has no class token; use attention_maps")
    return torch.stack(_record(encoder, items, blocks=blocks, keep=to_patches))


def _transformer(encoder: Encoder) -> ViT | PointTransformer:
    if not isinstance(encoder, ViT | PointTransformer):
        given = encoder.card.arguments.get("name", encoder.card.encoder)
        raise ValueError(f"attention maps: {given} given; accepted: a ViT or a PointTransformer")
    return encoder


def _blocks(encoder: Encoder, numbers: Sequence[int]) -> list[nn.Module]:
    transformer, depth = _transformer(encoder), encoder.num_layers
    for number in numbers:
        if not -depth <= number < depth:
            raise ValueError(f"attention maps: block={number}; accepted: {-depth} to {depth - 1}")
    return [transformer.model.blocks[number] for number in numbers]


def _record(encoder: Encoder, items: Tensor, *, blocks: Sequence[int], keep: _Keep[Tensor]) -> list[Tensor]:
    """What `keep` returns for the attention of each block; the whole map, T x T, exists for one block at a time."""
    watched = _blocks(encoder, blocks)
    if encoder.training:
        raise ValueError("attention maps: the encoder is in training mode, where dropout changes the map; call eval() first")
    with torch.no_grad(), _watching(watched, keep=keep) as kept:
        encoder(items)
    for block in watched:
        if len(kept[block]) != 1:
            kind, name = type(block).__name__, encoder.card.arguments["name"]
            raise ValueError(f"attention maps: a {kind} of {name} has {len(kept[block])} attention maps; accepted: blocks with one")
    return [kept[block][0] for block in watched]


@contextmanager
def _watching(blocks: Sequence[nn.Module], *, keep: _Keep[_Kept]) -> Iterator[dict[nn.Module, list[_Kept]]]:
    """Inside this context, collect for each of the blocks what `keep` returns for every attention that it computes."""
    watch = _Watch(blocks, keep)
    hooks = [block.register_forward_pre_hook(watch.start) for block in blocks]
    hooks += [block.register_forward_hook(watch.stop) for block in blocks]
    try:
        with watch:
            yield watch.kept
    finally:
        for hook in hooks:
            hook.remove()


class _Watch(TorchFunctionMode, Generic[_Kept]):
    """Collects what `keep` returns for every call of the fused attention or of softmax between `start` and `stop` of a block."""

    def __init__(self, blocks: Sequence[nn.Module], keep: _Keep[_Kept]) -> None:
        super().__init__()
        self.kept: dict[nn.Module, list[_Kept]] = {block: [] for block in blocks}
        self._keep = keep
        self._block: nn.Module | None = None

    def start(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook."""
        self._block = module

    def stop(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook."""
        self._block = None

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        found = None
        if self._block is not None and func is F.scaled_dot_product_attention:
            found = self._keep(AttentionInputs(*args[:3]), lambda: _softmax_of(*args, **(kwargs or {})))
        elif self._block is not None and func is Tensor.softmax:
            found = self._keep(None, lambda: result.float())
        if self._block is not None and found is not None:
            self.kept[self._block].append(found)
        return result


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
