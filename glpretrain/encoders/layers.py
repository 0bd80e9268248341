"""Features of an earlier block of a ViT: its tokens under the final norm, as DINO's `get_intermediate_layers` gives them."""

from torch import Tensor

from glpretrain.encoders.base import Encoder
from glpretrain.encoders.vit import ViT
from glpretrain.types import EncoderOutput


def features_at(encoder: Encoder, items: Tensor, *, layer: int = -1) -> EncoderOutput:
    """`encoder(items)` as if `layer` were the last block.

    Args:
        encoder: any for the last layer, a ViT for another one.
        items: Float[B *item].
        layer: which block; negative numbers count from the last.

    Raises:
        ValueError: there is no such block, or the encoder has no blocks.
    """
    depth = encoder.num_layers
    if not -depth <= layer < depth:
        raise ValueError(f"layer: {layer}; accepted: {-depth} to {depth - 1}")
    if layer % depth == depth - 1:
        return encoder(items)
    if not isinstance(encoder, ViT):
        raise ValueError(f"layer: {layer} of {encoder.card.encoder}; accepted: -1; only a ViT has equal shapes at every layer")
    kept: list[Tensor] = []
    handle = encoder.model.blocks[layer].register_forward_hook(lambda module, args, tokens: kept.append(tokens))
    try:
        encoder(items)
    finally:
        handle.remove()
    tokens = encoder.model.norm(kept[0])
    patches = tokens[:, encoder.num_prefix_tokens :]
    return EncoderOutput(cls=patches.mean(dim=1) if encoder.model.cls_token is None else tokens[:, 0], patches=patches)
