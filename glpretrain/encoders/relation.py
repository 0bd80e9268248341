"""A block over a feature and its neighbours: Mugs' relation block, used during pretraining and dropped with the heads."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from glpretrain.encoders.base import Encoder
from glpretrain.encoders.vit import ViT


@contextmanager
def pooled_tokens(encoder: ViT) -> Iterator[list[Tensor]]:
    """Notes the mean of all tokens, class token too, in front of the final norm: what Mugs seeks neighbours with.

    Yields:
        A list that gets one Float[B D] per size of view, in the order in which the encoder meets the sizes: joined, they are the rows
        of a list of views in which those of one size stand together.
    """
    pooled: list[Tensor] = []
    hook = encoder.model.norm.register_forward_pre_hook(lambda module, args: pooled.append(args[0].mean(dim=1)))
    try:
        yield pooled
    finally:
        hook.remove()


class RelationBlock(nn.Module):
    """One more block like the trunk's own, with fresh weights, over the sequence [feature, neighbours] (Mugs src/vision_transformer.py).

    It has no positions and drops no path. What comes out goes through the trunk's final norm, which it shares.

    Args:
        encoder: a ViT whose blocks need tokens only.

    Raises:
        ValueError: another encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        if not isinstance(encoder, ViT) or type(encoder.model) is not VisionTransformer:
            name = encoder.card.arguments.get("name", encoder.card.encoder)
            raise ValueError(f"relation block: encoder={name} given; accepted: a ViT of timm's vision_transformer module")
        self.block = copy.deepcopy(encoder.model.blocks[0])  # timm gives the first block no drop path, whatever the rate
        for module in self.block.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, pooled: Tensor, neighbours: Tensor, *, encoder: ViT) -> Tensor:
        """The feature after it has looked at its neighbours.

        Args:
            pooled: Float[B D], of `pooled_tokens`.
            neighbours: Float[B k D].
            encoder: whose final norm is used.

        Returns:
            Float[B D].
        """
        sequence = torch.cat([pooled.unsqueeze(1), neighbours.to(pooled.dtype)], dim=1)  # [B 1+k D]
        return encoder.model.norm(self.block(sequence)[:, 0])
