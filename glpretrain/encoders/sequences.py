"""Steps over sequences of tokens that several encoders share: lists of views, chunks, hidden tokens, and the parts of the result."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glpretrain.core.types import EncoderOutput


class Views(NamedTuple):
    """What is encoded together: items of one size."""

    items: Tensor  # Float[B *item]
    mask: Tensor | None  # Bool[B N]
    keys: Tensor | None  # Int[B]
    cls_only: bool
    are_local: bool = False  # of another size than the first ones of a list


def encode_list(
    encode: Callable[[Sequence[Views]], Sequence[EncoderOutput]],
    items: Sequence[Tensor],
    *,
    mask: Tensor | Sequence[Tensor | None] | None,
    keys: Sequence[Tensor] | None = None,
    cls_only: bool | Sequence[bool] = False,
) -> list[EncoderOutput]:
    """Encode tensors of several sizes, Float[B *item] each; those of one size are encoded together.

    Args:
        encode: gives an output for each of its views.
        items: the tensors; the outputs have the same order.
        mask: None, or a list as long as `items`; anything else is refused with a ValueError.
        keys: None, or Int[B] for each of `items`.
        cls_only: one for all, or one for each of `items`.
    """
    if isinstance(mask, Tensor) or (mask is not None and len(mask) != len(items)):
        given = "one tensor" if isinstance(mask, Tensor) else f"{len(mask)} masks"
        raise ValueError(
            f"encoder: {given} for a list of {len(items)} tensors of items; give a list as long, with None where nothing is hidden"
        )
    masks = [None] * len(items) if mask is None else list(mask)
    needs_cls = [cls_only] * len(items) if isinstance(cls_only, bool) else list(cls_only)
    assert len(needs_cls) == len(items), f"{len(needs_cls)} of cls_only for {len(items)} tensors of items"
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, views in enumerate(items):
        # Masked and unmasked views stay apart, so that a view without a mask never asks for a mask token.
        groups.setdefault((*views.shape[1:], masks[position] is not None, needs_cls[position]), []).append(position)
    joined = [
        Views(
            items=torch.cat([items[position] for position in positions]),
            mask=torch.cat(hidden) if (hidden := [one for position in positions if (one := masks[position]) is not None]) else None,
            keys=None if keys is None else torch.cat([keys[position] for position in positions]),
            cls_only=needs_cls[positions[0]],
            are_local=items[positions[0]].shape[1:] != items[0].shape[1:],
        )
        for positions in groups.values()
    ]
    outputs: dict[int, EncoderOutput] = {}
    for positions, output in zip(groups.values(), encode(joined), strict=True):
        sizes = [len(items[position]) for position in positions]
        parts = [[None] * len(sizes) if tensor is None else tensor.split(sizes) for tensor in output]
        outputs.update({position: EncoderOutput(*one) for position, *one in zip(positions, *parts, strict=True)})
    return [outputs[position] for position in range(len(items))]


def encode_in_chunks(
    encode: Callable[..., EncoderOutput],
    begun: Sequence[Tensor],
    *,
    mask: Tensor | None,
    keep: Tensor | None,
    keys: Tensor | None,
    cls_only: bool,
    chunk_size: int,
) -> EncoderOutput:
    """`encode(*begun, mask=mask, keep=keep, keys=keys, cls_only=cls_only)`, `chunk_size` rows at a time; all tensors have B rows.

    With gradient, nothing inside `encode` is kept; it is computed again when the gradients of a chunk are needed.
    """
    chunks = zip(*(tensor.split(chunk_size) for tensor in begun), strict=True)
    parts = [[None] * math.ceil(len(begun[0]) / chunk_size) if part is None else part.split(chunk_size) for part in (mask, keep, keys)]
    outputs: list[EncoderOutput] = []
    for chunk, hidden, kept, own in zip(chunks, *parts, strict=True):
        of_chunk = partial(encode, mask=hidden, keep=kept, keys=own, cls_only=cls_only)
        if torch.is_grad_enabled():
            outputs.append(checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(of_chunk(*chunk))
    registers = [output.registers for output in outputs if output.registers is not None]
    return EncoderOutput(
        cls=torch.cat([output.cls for output in outputs]),
        patches=torch.cat([output.patches for output in outputs]),
        registers=torch.cat(registers) if registers else None,
    )


def hide_tokens(tokens: Tensor, *, mask: Tensor, mask_token: Tensor | None) -> Tensor:
    """Replace hidden tokens by the mask token; a ValueError refuses a missing mask token, and a mask of another shape or dtype.

    Args:
        tokens: Float[B *grid D], or Float[B N D].
        mask: Bool[B N], True where a token is hidden.
        mask_token: Float[D], or one token for every place, of the shape of `tokens`; None when the encoder has none yet.
    """
    if mask_token is None:
        raise ValueError("encoder: a mask was given but there is no mask token; call add_mask_token() first")
    accepted = (len(tokens), math.prod(tokens.shape[1:-1]))
    if mask.dtype != torch.bool or mask.shape != accepted:
        raise ValueError(f"encoder: mask is {mask.dtype} of shape {tuple(mask.shape)}; accepted: bool of shape {accepted}")
    return torch.where(mask.reshape(tokens.shape[:-1]).unsqueeze(-1), mask_token.to(tokens.dtype), tokens)


def split_tokens(tokens: Tensor, *, num_prefix_tokens: int, has_class_token: bool) -> EncoderOutput:
    """Split the tokens behind the final norm, Float[B T D]: the class token if there is one, then registers and distillation tokens, then
    patches. Without a class token, `cls` is the mean of the patches. `num_prefix_tokens` counts the tokens before the patches.
    """
    patches = tokens[:, num_prefix_tokens:]
    return EncoderOutput(
        cls=tokens[:, 0] if has_class_token else patches.mean(dim=1),
        patches=patches,
        registers=tokens[:, int(has_class_token) : num_prefix_tokens] if num_prefix_tokens > has_class_token else None,
    )


def joined_tokens(output: EncoderOutput, *, has_class_token: bool) -> Tensor:
    """Float[B T D]: the tokens that `split_tokens` has split, in their order."""
    parts = [output.cls.unsqueeze(1)] if has_class_token else []
    return torch.cat([*parts, *([] if output.registers is None else [output.registers]), output.patches], dim=1)
