"""Features of earlier blocks of a transformer: their tokens under the final norm, as DINO's `get_intermediate_layers` gives them."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.points import PointTransformer
from glpretrain.encoders.vit import ViT


def features_of_layers(encoder: Encoder, items: Tensor, *, layers: Sequence[int]) -> list[EncoderOutput]:
    """`encoder(items)` as if each of `layers` were the last block, in one pass.

    Args:
        encoder: any for the last layer, a transformer for another one.
        items: Float[B *item].
        layers: which blocks; negative numbers count from the last.

    Returns:
        One output per layer asked for, in that order.

    Raises:
        ValueError: there is no such block, or the encoder has no blocks.
    """
    numbers, last_number = [layer_number(encoder, layer) for layer in layers], encoder.num_layers - 1
    tokens: dict[int, Tensor] = {}

    def keep(number: int, block: nn.Module) -> RemovableHandle:
        return block.register_forward_hook(lambda module, args, output: tokens.update({number: output}))

    hooks = [keep(number, encoder.model.blocks[number]) for number in sorted(set(numbers) - {last_number})]
    try:
        last = encoder(items)
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
    tokens = encoder.model.norm(tokens)  # [B R+N D]
    patches = tokens[:, encoder.num_prefix_tokens :]
    return EncoderOutput(cls=patches.mean(dim=1) if encoder.model.cls_token is None else tokens[:, 0], patches=patches)
