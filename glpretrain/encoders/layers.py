"""Beyond the output of the last block: features of earlier blocks, what their attentions are computed from, the mean token before the
final norm, one block more (Mugs), and some blocks less (locality alignment).

Features of an earlier block are its tokens under the final norm, as DINO's `get_intermediate_layers` gives them.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.attention import AttentionTokens, attention_tokens
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.drop_path import KeyedDropPath
from glpretrain.encoders.points import PointTransformer, start_weights
from glpretrain.encoders.sequences import split_tokens
from glpretrain.encoders.vit import ViT

Tokens = Literal["output"] | AttentionTokens


def features_of_layers(
    encoder: Encoder, items: Tensor, *, layers: Sequence[int], tokens: Tokens = "output", keys: Tensor | None = None
) -> list[EncoderOutput]:
    """`encoder(items)` as if each of `layers` were the last block, in one pass.

    Args:
        encoder: any encoder for the output of the last layer, a transformer for anything else.
        items: Float[B *item].
        layers: numbers of blocks; negative numbers count from the last.
        tokens: what is taken of a block: its output under the final norm, or the queries, keys or values of its attention, see
            `attention_tokens`.
        keys: Int[B], see `Encoder.forward`; for outputs only.

    Returns:
        One output per layer, in the order of `layers`.

    Raises:
        ValueError: there is no such block, or the encoder has no blocks or no such attention.
    """
    if tokens != "output":
        if not isinstance(encoder, ViT | PointTransformer):
            raise ValueError(f"tokens: {tokens} of {encoder.card.encoder}; accepted: output; only a transformer has others")
        found = dict.fromkeys(layer_number(encoder, layer) for layer in layers)
        by_number = dict(zip(found, attention_tokens(encoder, items, blocks=list(found), kind=tokens), strict=True))
        return [by_number[layer_number(encoder, layer)] for layer in layers]
    return _outputs_of_layers(encoder, items, layers=layers, keys=keys)


def _outputs_of_layers(encoder: Encoder, items: Tensor, *, layers: Sequence[int], keys: Tensor | None) -> list[EncoderOutput]:
    numbers, last_number = [layer_number(encoder, layer) for layer in layers], encoder.num_layers - 1
    earlier = sorted(set(numbers) - {last_number})
    if not earlier:
        return [encoder(items, keys=keys)] * len(numbers)
    assert isinstance(encoder, ViT | PointTransformer)
    tokens: dict[int, Tensor] = {}

    def keep(number: int, block: nn.Module) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            tokens[number] = output

        return block.register_forward_hook(hook)

    hooks = [keep(number, encoder.model.blocks[number]) for number in earlier]
    try:
        last = encoder(items, keys=keys)
    finally:
        for hook in hooks:
            hook.remove()
    return [last if number == last_number else _under_norm(encoder, tokens[number]) for number in numbers]


def layer_number(encoder: Encoder, layer: int) -> int:
    """`layer` counted from 0.

    Raises:
        ValueError: there is no such block, or the encoder has no blocks.
    """
    depth = encoder.num_layers
    if not -depth <= layer < depth:
        raise ValueError(f"layer: {layer}; accepted: {-depth} to {depth - 1}")
    if layer % depth != depth - 1 and not isinstance(encoder, ViT | PointTransformer):
        raise ValueError(f"layer: {layer} of {encoder.card.encoder}; accepted: -1; only a transformer has equal shapes at every layer")
    return layer % depth


def _under_norm(encoder: ViT | PointTransformer, tokens: Tensor) -> EncoderOutput:
    has_class_token = encoder.model.cls_token is not None
    return split_tokens(encoder.model.norm(tokens), num_prefix_tokens=encoder.num_prefix_tokens, has_class_token=has_class_token)


def without_last_blocks(encoder: Encoder, *, count: int) -> ViT:
    """A copy of a ViT that ends `count` blocks earlier: its final norm follows the last block that is left.

    Raises:
        ValueError: the encoder is no ViT, or would be left without a block.
    """
    if not isinstance(encoder, ViT):
        raise ValueError(f"encoder: {encoder.card.encoder} given; only a ViT can end at an earlier block; give one")
    if not 0 <= count < encoder.num_layers:
        raise ValueError(f"skip_blocks={count} of {encoder.num_layers} blocks given; accepted: 0 to {encoder.num_layers - 1}")
    shortened = copy.deepcopy(encoder)
    del shortened.model.blocks[encoder.num_layers - count :]
    shortened._card = replace(encoder.card, arguments={**encoder.card.arguments, "depth": shortened.num_layers})
    return shortened


def can_be_without_norm(encoder: Encoder) -> bool:
    """Whether the architecture exists without the norm behind its last block: that of timm's plain ViTs does."""
    return isinstance(encoder, ViT) and type(encoder.model) is VisionTransformer


@contextmanager
def pooled_tokens(encoder: ViT) -> Iterator[list[Tensor]]:
    """Record the mean of all tokens, class token included, before the final norm: Mugs searches neighbours with it.

    Yields:
        A list that gets one Float[B D] per size of view, in the order in which the encoder meets the sizes. Joined, they are the rows of
        a list of views in which the views of one size stand together.
    """
    pooled: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        pooled.append(args[0].mean(dim=1))

    handle = encoder.model.norm.register_forward_pre_hook(hook)
    try:
        yield pooled
    finally:
        handle.remove()


class RelationBlock(nn.Module):
    """One more block like those of the encoder, with fresh weights, over a feature and its neighbours (Mugs src/vision_transformer.py).

    It has no positions and drops no path. Its result goes through the final norm of the encoder, which it shares. It is used during
    pretraining and dropped with the heads.

    Args:
        encoder: a ViT whose blocks need tokens only.

    Raises:
        ValueError: the encoder is of another kind.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        if not isinstance(encoder, ViT) or type(encoder.model) is not VisionTransformer:
            name = encoder.card.arguments.get("name", encoder.card.encoder)
            raise ValueError(f"relation block: encoder={name} given; accepted: a ViT of timm's vision_transformer module")
        self.block = copy.deepcopy(encoder.model.blocks[0])
        for module in self.block.modules():
            start_weights(module)
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, KeyedDropPath):  # with `drop_path_uniform`; otherwise the first block has none
                module.drop_prob = 0.0

    def forward(self, pooled: Tensor, neighbours: Tensor, *, encoder: ViT) -> Tensor:
        """Float[B D]: the feature `pooled`, Float[B D] of `pooled_tokens`, after it has attended to its neighbours, Float[B k D].

        The final norm is that of `encoder`.
        """
        sequence = torch.cat([pooled.unsqueeze(1), neighbours.to(pooled.dtype)], dim=1)  # [B 1+k D]
        return encoder.model.norm(self.block(sequence)[:, 0])
