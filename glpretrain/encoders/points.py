"""Transformers over groups of points: Point-MAE, Point-BERT and POS-BERT, in plain PyTorch.

A cloud becomes N overlapping groups around centres that are far from one another; each group becomes a token, and timm's blocks run over
the tokens. Their number grows with the cloud, so one encoder accepts views of different numbers of points.

Known differences: pointnet2's compiled sampler never chooses points within 0.0316 of the origin (it skips squared lengths up to 1e-3),
ours chooses any. Left out: normals and colours, and Point-BERT's discrete tokens.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from glpretrain.core.clouds import take
from glpretrain.core.frames import places
from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.encoders.base import Encoder, register
from glpretrain.encoders.drop_path import use_keyed_paths
from glpretrain.encoders.limits import check_numbers
from glpretrain.encoders.point_tokens import Groups, MiniPointNet, RelativeFeatures, group_points
from glpretrain.encoders.sequences import hide_tokens, split_tokens

Positions = Literal["blocks", "none"]
_POSITION_DIM = 128


class _Size(NamedTuple):
    """A published architecture."""

    tokens: type[MiniPointNet] | type[RelativeFeatures]
    tokens_dim: int  # width of the first layer that makes tokens
    token_dim: int | None  # width of a token before it is projected to D; None stands for D, without a projection
    points_per_token: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    norm_eps: float
    class_token: bool
    positions: Positions


_SIZES = {
    "point_mae": _Size(MiniPointNet, 128, None, 16, 384, 12, 6, 4.0, False, 1e-5, False, "blocks"),
    "point_bert": _Size(MiniPointNet, 128, 256, 16, 384, 12, 6, 4.0, False, 1e-5, True, "blocks"),
    "pos_bert_base": _Size(RelativeFeatures, 64, None, 32, 192, 4, 4, 2.0, True, 1e-6, True, "none"),
    "pos_bert_large": _Size(RelativeFeatures, 64, None, 32, 512, 8, 8, 2.0, True, 1e-6, True, "none"),
}


class PositionedBlocks(nn.ModuleList):
    """timm's blocks, each of which first adds the positions to its tokens (Point-BERT, Point-MAE: `block(x + pos)`).

    Args:
        dim: width D of the tokens.
        depth: number of blocks.
        num_heads: number of attention heads of a block.
        mlp_ratio: width of a block's hidden layer, divided by D.
        qkv_bias: whether queries, keys and values have a bias.
        drop_path_rate: rate of stochastic depth in the last block; it grows evenly from 0 in the first one.
        norm_eps: epsilon of the layer norms.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        norm = partial(nn.LayerNorm, eps=norm_eps)
        rates = torch.linspace(0.0, drop_path_rate, depth, device="cpu").tolist()  # also where the rest is built on meta

        def block(rate: float) -> Block:
            # timm declares a class as the type of `norm_layer` and passes partials itself.
            return Block(dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm, drop_path=rate)  # pyright: ignore[reportArgumentType]

        super().__init__(block(rate) for rate in rates)
        use_keyed_paths(self)

    def forward(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Float[B T D] and Float[B T D], or None where nothing is added, to Float[B T D]."""
        for block in self:
            tokens = block(tokens if positions is None else tokens + positions)
        return tokens


def position_layers(dim: int) -> nn.Sequential:
    """Layers from a centre, Float[* 3], to the position that is added to its token, Float[* D]."""
    return nn.Sequential(nn.Linear(3, _POSITION_DIM), nn.GELU(), nn.Linear(_POSITION_DIM, dim))


class _Model(nn.Module):
    """The part of the encoder whose weights an export holds, under our own names; those inside the blocks are timm's."""

    def __init__(self, size: _Size, *, drop_path_rate: float) -> None:
        super().__init__()
        dim = size.embed_dim
        token_dim = dim if size.token_dim is None else size.token_dim
        self.tokens = size.tokens(token_dim, hidden_dim=size.tokens_dim)
        self.project = nn.Identity() if size.token_dim is None else nn.Linear(token_dim, dim)
        self.position = position_layers(dim) if size.positions == "blocks" else None
        self.cls_token = self.cls_position = None
        if size.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            if self.position is not None:
                self.cls_position = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = PositionedBlocks(
            dim,
            depth=size.depth,
            num_heads=size.num_heads,
            mlp_ratio=size.mlp_ratio,
            qkv_bias=size.qkv_bias,
            drop_path_rate=drop_path_rate,
            norm_eps=size.norm_eps,
        )
        self.norm = nn.LayerNorm(dim, eps=size.norm_eps)
        for name, part in self.named_children():
            if name != "tokens" or size.tokens is MiniPointNet:  # POS-BERT keeps torch's own initialisation of its tokens' layers
                part.apply(start_weights)
        for token in (self.cls_token, self.cls_position):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)


@register
class PointTransformer(Encoder):
    """A transformer over groups of points, with fresh weights.

    Args:
        name: name of a published architecture: point_mae, point_bert, pos_bert_base or pos_bert_large. The other arguments replace its
            numbers; None keeps the published one.
        num_points: number of points of the items that it is trained on; other numbers are accepted too.
        points_per_token: number of points of an item for each token, rounded up; published: 16 (Point-MAE, Point-BERT) and 32 (POS-BERT).
        group_size: number of points M that a token sees.
        embed_dim: width D of the tokens.
        depth: number of blocks.
        num_heads: number of attention heads of a block.
        mlp_ratio: width of a block's hidden layer, divided by D.
        tokens_dim: width of the first layer that makes tokens; the widths of the others are multiples of it.
        class_token: whether there is a class token. The fine-tuned Point-MAE has one, the pretrained one does not: `cls` is then the mean
            of the patches.
        positions: "blocks" adds the positions of the centres before every block; "none" adds them to hidden tokens only (POS-BERT).
        drop_path_rate: rate of stochastic depth in the last block; it grows evenly from 0 in the first one.
        licence: licence of the weights.
        source: source of the weights.

    Raises:
        ValueError: `name` is unknown, or a number is out of its range.
    """

    begins_with: ClassVar = ("model.tokens",)
    mask_token: nn.Parameter | None

    def __init__(
        self,
        name: str,
        *,
        num_points: int = 1024,
        points_per_token: int | None = None,
        group_size: int = 32,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        tokens_dim: int | None = None,
        class_token: bool | None = None,
        positions: Positions | None = None,
        drop_path_rate: float = 0.0,
        licence: str = "",
        source: str = "",
    ) -> None:
        super().__init__()
        if name not in _SIZES:
            raise ValueError(f"PointTransformer: name={name!r} given; accepted: {', '.join(_SIZES)}")
        counts = {
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "tokens_dim": tokens_dim,
            "points_per_token": points_per_token,
        }
        chosen = {**counts, "mlp_ratio": mlp_ratio, "class_token": class_token, "positions": positions}
        counts = {**counts, "num_points": num_points, "group_size": group_size}
        check_numbers("PointTransformer", **counts, mlp_ratio=mlp_ratio, drop_path_rate=drop_path_rate)
        size = _SIZES[name]._replace(**{key: value for key, value in chosen.items() if value is not None})
        if size.embed_dim % size.num_heads:
            raise ValueError(f"PointTransformer: embed_dim={size.embed_dim} does not divide by num_heads={size.num_heads}")
        if size.positions not in ("blocks", "none"):
            raise ValueError(f"PointTransformer: positions={positions!r} given; accepted: blocks, none")
        self.model = _Model(size, drop_path_rate=drop_path_rate)
        self.points_per_token, self.group_size = size.points_per_token, group_size
        self.register_parameter("mask_token", None)
        self.mask_position: nn.Sequential | None = None
        self._card = EncoderCard(
            encoder="PointTransformer",
            arguments={
                "name": name,
                "num_points": num_points,
                "group_size": group_size,
                **chosen,
                "drop_path_rate": drop_path_rate,
                "licence": licence,
                "source": source,
            },
            modality="points",
            item_shape=(num_points, 3),
            patch_size=(group_size,),
            embed_dim=size.embed_dim,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            licence=licence,
            source=source,
        )
        self.grid((num_points, 3))

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)

    def blocks(self) -> Sequence[nn.Module]:
        """timm's blocks, without the layers that make tokens."""
        return list(self.model.blocks)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class tokens, which stand before the groups."""
        return int(self.model.cls_token is not None)

    def grid(self, item_shape: Sequence[int]) -> tuple[int]:
        """Number of tokens for an item of P points: P / `points_per_token`, rounded up.

        Raises:
            ValueError: the shape is not (P, 3), or a group would have more points than the item.
        """
        if len(item_shape) != 2 or item_shape[1] != 3:
            raise ValueError(f"PointTransformer: item shape {tuple(item_shape)} given; accepted: (points, 3)")
        if item_shape[0] < self.group_size:
            raise ValueError(f"PointTransformer: {item_shape[0]} points given; accepted: at least {self.group_size}, the points of a group")
        return (math.ceil(item_shape[0] / self.points_per_token),)

    def group(self, points: Tensor) -> Groups:
        """The groups of Float[B P 3], one for each token: a function of the points alone, without weights."""
        (num_groups,) = self.grid(points.shape[1:])
        return group_points(points, num_groups=num_groups, group_size=self.group_size)

    def _begin(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, Float[B N D], and the centres of their groups, Float[B N 3]. Hidden and dropped tokens still take part in the batch
        norms of the others, as in the reference code.
        """
        groups = self.group(items)
        return self.model.project(self.model.tokens(items, groups)), groups.centres

    def _encode(self, tokens: Tensor, centres: Tensor, *, mask: Tensor | None, keep: Tensor | None = None) -> EncoderOutput:
        model = self.model
        if mask is not None:
            mask_token: Tensor | None = self.mask_token
            if mask_token is not None and self.mask_position is not None:
                mask_token = mask_token + self.mask_position(centres)  # [B N D]
            tokens = hide_tokens(tokens, mask=mask, mask_token=mask_token)
        positions = None if model.position is None else model.position(centres)  # [B N D]
        if keep is not None:
            tokens = take(tokens, keep)  # [B M D]
            positions = None if positions is None else take(positions, keep)
        if model.cls_token is not None:
            tokens = torch.cat([model.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)  # [B 1+N D]
            if positions is not None and model.cls_position is not None:
                positions = torch.cat([model.cls_position.expand(tokens.shape[0], -1, -1), positions], dim=1)
        tokens = model.norm(model.blocks(tokens, positions))
        return split_tokens(tokens, num_prefix_tokens=self.num_prefix_tokens, has_class_token=model.cls_token is not None)

    def token_places(self, items: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """See `Encoder.token_places`: the place of a token is the centre of its group, and the spacing is the mean over centres of the
        distance to the nearest other one.
        """
        centres = places(frames, self.group(items).centres)  # [B N 3]
        distances = torch.cdist(centres, centres)
        alone = torch.eye(centres.shape[1], dtype=torch.bool, device=centres.device)
        return centres, distances.masked_fill(alone, math.inf).amin(dim=2).mean(dim=1, keepdim=True)

    def add_mask_token(self) -> None:
        """Add the learned token that stands for hidden groups, zero at the start; an encoder without positions gets some for it alone."""
        if self.mask_token is None:
            self.mask_token = nn.Parameter(next(self.model.parameters()).new_zeros(self.embed_dim))
            if self.model.position is None:
                self.mask_position = position_layers(self.embed_dim).to(self.mask_token.device)
                self.mask_position.apply(start_weights)

    def require_keep(self) -> None:
        """Every encoder of this kind drops tokens."""

    def layer_of(self, name: str) -> int:
        """0 for the layers that make tokens and positions, i + 1 for block i, `num_layers` + 1 for the final norm and the mask token."""
        if found := re.match(r"model\.blocks\.(\d+)\.", name):
            return int(found[1]) + 1
        return self.num_layers + 1 if name.startswith(("model.norm.", "mask_")) else 0


def start_weights(module: nn.Module) -> None:
    """Fresh weights as in both reference codes: truncated normal of 0.02, no biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
