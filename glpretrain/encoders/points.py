"""Transformers over groups of points: Point-MAE, Point-BERT and POS-BERT, in plain PyTorch.

A cloud becomes N overlapping groups around centres that are far from one another, each group a token, and timm's blocks run over the
tokens. How many there are grows with the cloud, so views of different numbers of points go through one encoder.

Known differences: pointnet2's compiled sampler never takes points within 0.0316 of the origin (it skips squared lengths up to 1e-3),
ours takes any. Left out: normals and colours, and Point-BERT's discrete tokens.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.encoders.base import Encoder, encode_list, load_strictly, register
from glpretrain.encoders.point_tokens import Groups, MiniPointNet, RelativeFeatures, group_points

Positions = Literal["blocks", "none"]
_POSITION_DIM = 128


class _Size(NamedTuple):
    """A published architecture."""

    tokens: type[MiniPointNet] | type[RelativeFeatures]
    tokens_dim: int  # first width of the tokens' layers
    token_dim: int | None  # width of a token before it is projected to D; None: D, without a projection
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
        dim: D.
        depth: number of blocks.
        num_heads: of each.
        mlp_ratio: width of the hidden layer by D.
        qkv_bias: biases of queries, keys and values.
        drop_path_rate: stochastic depth of the last block, growing evenly from 0.
        norm_eps: of the layer norms.
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
        options = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "norm_layer": norm}
        rates = torch.linspace(0.0, drop_path_rate, depth).tolist()
        super().__init__(Block(dim, num_heads, drop_path=rate, **options) for rate in rates)

    def forward(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """Float[B T D] and Float[B T D], or None where nothing is added, to Float[B T D]."""
        for block in self:
            tokens = block(tokens if positions is None else tokens + positions)
        return tokens


def position_layers(dim: int) -> nn.Sequential:
    """From a centre, Float[* 3], to what is added to its token, Float[* D]."""
    return nn.Sequential(nn.Linear(3, _POSITION_DIM), nn.GELU(), nn.Linear(_POSITION_DIM, dim))


class _Model(nn.Module):
    """What an export holds."""

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
            if name != "tokens" or size.tokens is MiniPointNet:  # POS-BERT leaves its tokens' layers as torch starts them
                part.apply(start_weights)
        for token in (self.cls_token, self.cls_position):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)


@register
class PointTransformer(Encoder):
    """A transformer over groups of points, with fresh weights.

    Args:
        name: of a published architecture: point_mae, point_bert, pos_bert_base or pos_bert_large. The others replace its numbers.
        num_points: of the items that it is trained on; others are taken too.
        points_per_token: one token for so many points of an item, rounded up; None is the published 16 (Point-*) or 32 (POS-BERT).
        group_size: points M that a token sees.
        embed_dim: D; None is the published one, as below.
        depth: number of blocks.
        num_heads: of a block.
        mlp_ratio: width of a block's hidden layer by D.
        tokens_dim: first width of the layers that make tokens; the others are multiples of it.
        class_token: have one; the fine-tuned Point-MAE has, the pretrained one has not, and `cls` is then the mean of the patches.
        positions: "blocks" adds those of the centres before every block, "none" never (POS-BERT), except to hidden tokens.
        drop_path_rate: stochastic depth.
        licence: of the weights.
        source: of the weights.

    Raises:
        ValueError: `name` is unknown or a number out of range.
    """

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
        shape = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "tokens_dim": tokens_dim}
        chosen = {**shape, "points_per_token": points_per_token, "class_token": class_token, "positions": positions}
        size = _SIZES[name]._replace(**{key: value for key, value in chosen.items() if value is not None})
        least = {"num_points": num_points, "group_size": group_size, **{key: getattr(size, key) for key in (*shape, "points_per_token")}}
        for key, value in least.items():
            if value <= 0 or (key != "mlp_ratio" and value < 1):
                raise ValueError(f"PointTransformer: {key}={value} given; accepted: {'above 0' if key == 'mlp_ratio' else 'at least 1'}")
        if size.embed_dim % size.num_heads:
            raise ValueError(f"PointTransformer: embed_dim={size.embed_dim} does not divide by num_heads={size.num_heads}")
        if size.positions not in ("blocks", "none"):
            raise ValueError(f"PointTransformer: positions={positions!r} given; accepted: blocks, none")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"PointTransformer: drop_path_rate={drop_path_rate} given; accepted: [0, 1)")
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

    @property
    def num_prefix_tokens(self) -> int:
        """Class tokens that stand before the groups."""
        return int(self.model.cls_token is not None)

    def grid(self, item_shape: Sequence[int]) -> tuple[int]:
        """Tokens for an item of P points: P / `points_per_token`, rounded up.

        Raises:
            ValueError: the shape is not (P, 3), or a group has more points than the item.
        """
        if len(item_shape) != 2 or item_shape[1] != 3:
            raise ValueError(f"PointTransformer: item shape {tuple(item_shape)} given; accepted: (points, 3)")
        if item_shape[0] < self.group_size:
            raise ValueError(f"PointTransformer: {item_shape[0]} points given; accepted: at least {self.group_size}, those of a group")
        return (math.ceil(item_shape[0] / self.points_per_token),)

    def group(self, points: Tensor) -> Groups:
        """The groups behind the tokens of Float[B P 3]: a function of the points, without weights."""
        (num_groups,) = self.grid(points.shape[1:])
        return group_points(points, num_groups=num_groups, group_size=self.group_size)

    def forward(
        self,
        items: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        keep: Tensor | None = None,
    ) -> EncoderOutput | list[EncoderOutput]:
        """See `Encoder.forward`; items are Float[B P 3]. In training, batch norm sees all views of one size together.

        Hidden and dropped tokens still take part in the batch norms of the others, as in the reference code.
        """
        if mask is not None and keep is not None:
            raise ValueError("PointTransformer: mask and keep were both given; hide tokens or drop them, not both")
        if not isinstance(items, Tensor):
            if keep is not None:
                raise ValueError("PointTransformer: keep needs one tensor of items, a list was given")
            return encode_list(self._encode, items, mask=mask)
        return self._encode(items, mask=mask, keep=keep)

    def _encode(self, items: Tensor, *, mask: Tensor | None, keep: Tensor | None = None) -> EncoderOutput:
        model = self.model
        groups = self.group(items)
        tokens = model.project(model.tokens(items, groups))  # [B N D]
        if mask is not None:
            tokens = self._hide(tokens, mask=mask, centres=groups.centres)
        positions = None if model.position is None else model.position(groups.centres)  # [B N D]
        if keep is not None:
            if keep.dim() != 2 or keep.shape[0] != items.shape[0]:
                raise ValueError(f"PointTransformer: keep has shape {tuple(keep.shape)}; accepted: ({items.shape[0]}, tokens to keep)")
            index = keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])  # [B M D]
            tokens = tokens.gather(1, index)
            positions = None if positions is None else positions.gather(1, index)
        if model.cls_token is not None:
            tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)  # [B 1+N D]
            if positions is not None:
                positions = torch.cat([model.cls_position.expand(len(tokens), -1, -1), positions], dim=1)
        tokens = model.norm(model.blocks(tokens, positions))
        patches = tokens[:, self.num_prefix_tokens :]
        return EncoderOutput(cls=patches.mean(dim=1) if model.cls_token is None else tokens[:, 0], patches=patches)

    def _hide(self, tokens: Tensor, *, mask: Tensor, centres: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("PointTransformer: a mask was given but there is no mask token; call add_mask_token() first")
        if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
            accepted = f"bool of shape {tuple(tokens.shape[:2])}"
            raise ValueError(f"PointTransformer: mask is {mask.dtype} of shape {tuple(mask.shape)}; accepted: {accepted}")
        hidden = self.mask_token if self.mask_position is None else self.mask_token + self.mask_position(centres)
        return torch.where(mask.unsqueeze(-1), hidden.to(tokens.dtype), tokens)

    def token_inputs(self, items: Tensor, *, corruption: Tensor) -> tuple[Tensor, Tensor]:
        """See `Encoder.contents`: a token's inputs are the points of its group, relative to the centre."""
        groups = self.group(items)
        replaced = corruption.gather(1, groups.neighbour_index.flatten(1)).unflatten(1, groups.neighbour_index.shape[1:])  # [B N M]
        return groups.neighbours.permute(0, 3, 1, 2), replaced

    def add_mask_token(self) -> None:
        """Add the learned token that stands for hidden groups, zero at the start; without positions in the trunk it gets its own."""
        if self.mask_token is None:
            self.mask_token = nn.Parameter(next(self.model.parameters()).new_zeros(self.embed_dim))
            if self.model.position is None:
                self.mask_position = position_layers(self.embed_dim).to(self.mask_token.device)
                self.mask_position.apply(start_weights)

    def require_keep(self) -> None:
        """Every such encoder drops tokens."""

    def layer_of(self, name: str) -> int:
        """0 for what makes tokens and positions, i + 1 for block i, `num_layers` + 1 for the final norm and what hides tokens."""
        if found := re.match(r"model\.blocks\.(\d+)\.", name):
            return int(found[1]) + 1
        return self.num_layers + 1 if name.startswith(("model.norm.", "mask_")) else 0

    def backbone_state(self) -> dict[str, Tensor]:
        """Own names; those of the blocks are timm's."""
        return self.model.state_dict()

    def load_backbone_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `backbone_state`, strict."""
        load_strictly(self.model, state)


def start_weights(module: nn.Module) -> None:
    """Fresh weights as in both reference codes: truncated normal of 0.02, no biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
