"""Fresh transformer blocks of timm over tokens that are embedded already: decoders, and heads that look at all patches of an image.

Left out: whole encoders (`vit`), and decoders whose blocks are torch's own (`training.decoders`).
"""

from typing import NamedTuple

from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import nn

from glpretrain.encoders.base import Encoder
from glpretrain.encoders.vit import ViT

_HEAD_DIM = 64  # of every ViT from S to g; used where an encoder has no attention to take the number of heads from


class BlockShape(NamedTuple):
    """What a block has beside its width."""

    num_heads: int
    qkv_bias: bool = True
    qk_norm: bool = False
    activation: type[nn.Module] = nn.GELU


def block_shape(encoder: Encoder) -> BlockShape:
    """The shape of an encoder's blocks. Where these are no plain ones of timm's, bias, norm and activation are the usual ones; where there
    are none, heads are 64 wide, or there is one.
    """
    if not isinstance(encoder, ViT):
        count, rest = divmod(encoder.embed_dim, _HEAD_DIM)
        return BlockShape(count if rest == 0 else 1)
    block = encoder.model.blocks[0]
    if isinstance(block, Block) and isinstance(block.attn, Attention):
        attention = block.attn
        return BlockShape(
            attention.num_heads,
            qkv_bias=attention.qkv.bias is not None,
            qk_norm=not isinstance(attention.q_norm, nn.Identity),
            activation=type(block.mlp.act) if isinstance(block.mlp, Mlp) else nn.GELU,
        )
    num_heads = vars(block.attn)["num_heads"]
    assert isinstance(num_heads, int)
    return BlockShape(num_heads)


def plain_blocks(dim: int, *, shape: BlockShape, depth: int, layer_scale: float) -> nn.Sequential:
    """Blocks of timm with torch's fresh weights, norms of epsilon 1e-5 before attention and MLP, and hidden layers of 4 * dim.

    Args:
        dim: width of the tokens.
        shape: heads, biases and activation.
        depth: number of blocks.
        layer_scale: start of the layer scale of both branches.

    Raises:
        ValueError: the width does not divide into the heads.
    """
    if dim % shape.num_heads != 0:
        raise ValueError(f"blocks: a width of {dim} given with {shape.num_heads} heads; give a number of heads that divides it")
    return nn.Sequential(
        *(
            Block(
                dim,
                num_heads=shape.num_heads,
                qkv_bias=shape.qkv_bias,
                qk_norm=shape.qk_norm,
                init_values=layer_scale,
                act_layer=shape.activation,
                norm_layer=nn.LayerNorm,
            )
            for _ in range(depth)
        )
    )
