"""Attention maps of any block of a ViT: the exact softmax, whatever kernel computed the attention.

The block runs as it is; its call of `scaled_dot_product_attention` (or of `softmax`, where timm does without the fused kernel)
is watched, so queries and keys carry the norms, rotations and biases of the model at hand. Left out: drawing them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from glpretrain.encoders.base import Encoder
from glpretrain.encoders.vit import ViT


def attention_maps(encoder: Encoder, items: Tensor, *, block: int = -1) -> Tensor:
    """How much every token attends to every other in one block, over prefix tokens (class, registers) and patches.

    Args:
        encoder: a ViT; dropout must be off (call `eval()` first).
        items: Float[B C H W].
        block: which one; negative numbers count from the last.

    Returns:
        Float[B heads T T], T = prefix tokens + N, in float32 and without gradient; rows sum to one.

    Raises:
        ValueError: the encoder is no ViT or is in training mode, or the block does not exist or has not exactly one attention.
    """
    if not isinstance(encoder, ViT):
        raise ValueError(f"attention maps: {encoder.card.arguments.get('name', encoder.card.encoder)} given; accepted: a ViT")
    if encoder.training:
        raise ValueError("attention maps: the encoder is in training mode, dropout would blur the map; call eval() first")
    depth = encoder.num_layers
    if not -depth <= block < depth:
        raise ValueError(f"attention maps: block={block}; accepted: {-depth} to {depth - 1}")
    watched = encoder.model.blocks[block]
    watch = _WatchAttention()
    before = watched.register_forward_pre_hook(watch.start)
    after = watched.register_forward_hook(watch.stop)
    try:
        with torch.no_grad(), watch:
            encoder(items)
    finally:
        before.remove()
        after.remove()
    if len(watch.maps) != 1:
        name = encoder.card.arguments["name"]
        raise ValueError(
            f"attention maps: a {type(watched).__name__} of {name} has {len(watch.maps)} attention maps; accepted: blocks with one"
        )
    return watch.maps[0]


def cls_attention(encoder: Encoder, items: Tensor, *, block: int = -1) -> Tensor:
    """How much the class token attends to every patch; registers are left out.

    Args:
        encoder: see `attention_maps`; one with a class token.
        items: Float[B C H W].
        block: see `attention_maps`.

    Returns:
        Float[B heads h w] over the token grid.

    Raises:
        ValueError: there is no class token, or see `attention_maps`.
    """
    maps = attention_maps(encoder, items, block=block)
    if encoder.model.cls_token is None:
        raise ValueError(f"attention maps: {encoder.card.arguments['name']} has no class token; use attention_maps")
    rows, columns = encoder.grid(items.shape[1:])
    return maps[:, :, 0, encoder.num_prefix_tokens :].unflatten(-1, (rows, columns))


class _WatchAttention(TorchFunctionMode):
    """Records the attention computed between `start` and `stop`."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []
        self._watching = False

    def start(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook."""
        self._watching = True

    def stop(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook."""
        self._watching = False

    def __torch_function__(self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        if self._watching and func is F.scaled_dot_product_attention:
            self.maps.append(_softmax_of(*args, **(kwargs or {})))
        elif self._watching and func is Tensor.softmax:
            self.maps.append(result.float())
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
