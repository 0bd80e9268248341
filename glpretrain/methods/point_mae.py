"""Point-MAE: encode four in ten groups of points, predict the points of the others.

Idea: a cloud is cut into overlapping groups around centres; the encoder sees some of them, and a small decoder gets the centres of
the hidden ones and predicts their points, in any order (Chamfer distance).
Paper: Pang et al., "Masked autoencoders for point cloud self-supervised learning", ECCV 2022.
Reference code: Pang-Yatian/Point-MAE at 7445a68 (models/Point_MAE.py, cfgs/pretrain.yaml).
Known differences: several views of an item count as several items; pointnet2's sampler is replaced, see `encoders.points`; decay
follows the rule of this package.
"""

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from glpretrain.core import keys as rng
from glpretrain.core.batch import Batch, Uses
from glpretrain.core.clouds import take
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.drop_path import drawn_paths
from glpretrain.encoders.points import PointTransformer, PositionedBlocks, position_layers, start_weights
from glpretrain.methods.base import Method
from glpretrain.objectives.base import Objective
from glpretrain.objectives.chamfer import ChamferL2
from glpretrain.training.branch import Branch

_DECODER = 0xDEC0  # purpose that a view's key is folded with, so that decoder and encoder drop different paths


class GroupDecoder(nn.Module):
    """Predicts the points of hidden groups from the visible tokens and a mask token per hidden group, each with its centre's position.

    Args:
        dim: width D of the encoder and of the decoder.
        depth: number of blocks.
        num_heads: attention heads per block.
        group_size: number of points of a group.
        drop_path_rate: rate of stochastic depth in the last block.
    """

    def __init__(self, dim: int, *, depth: int, num_heads: int, group_size: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.position = position_layers(dim)
        self.blocks = PositionedBlocks(dim, depth=depth, num_heads=num_heads, drop_path_rate=drop_path_rate)
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, 3 * group_size)
        self.apply(start_weights)
        for block in self.blocks:
            for layer in block.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, patches: Tensor, *, visible: Tensor, hidden: Tensor, keys: Tensor | None = None) -> Tensor:
        """Predict groups relative to their centres.

        Args:
            patches: Float[B M D], visible tokens.
            visible: Float[B M 3], their centres.
            hidden: Float[B H 3], the other centres.
            keys: Int[B], what dropped paths are drawn from; without them, torch's generator.

        Returns:
            Float[B H group_size 3].
        """
        num_items, num_hidden, _ = hidden.shape
        tokens = torch.cat([patches, self.mask_token.to(patches.dtype).expand(num_items, num_hidden, -1)], dim=1)  # [B M+H D]
        positions = self.position(torch.cat([visible, hidden], dim=1))
        with nullcontext() if keys is None else drawn_paths(self.blocks, keys):
            tokens = self.blocks(tokens, positions)
        return self.predict(self.norm(tokens[:, -num_hidden:])).unflatten(2, (-1, 3))


class PointMAE(Method):
    """A masked autoencoder of groups of points.

    Args:
        encoder: the trunk; a `PointTransformer`.
        decoder_depth: number of blocks of the decoder.
        decoder_heads: attention heads per block of the decoder.
        decoder_drop_path_rate: rate of stochastic depth in the decoder's last block.
        objective: compares predicted and true groups; None is `ChamferL2`.
        **kwargs: arguments of `Method`.
    """

    terms = ("points",)
    uses: ClassVar = {"global": Uses(needs=("mask",))}

    def __init__(
        self,
        encoder: Encoder,
        *,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        decoder_drop_path_rate: float = 0.0,
        objective: Objective | None = None,
        **kwargs,  # noqa: ANN003
    ) -> None:
        if not isinstance(encoder, PointTransformer):
            raise ValueError(f"PointMAE: encoder {encoder.card.encoder} given; accepted: PointTransformer")
        decoder = GroupDecoder(
            encoder.embed_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            group_size=encoder.group_size,
            drop_path_rate=decoder_drop_path_rate,
        )
        super().__init__(Branch(encoder, {"decoder": decoder}), **kwargs)
        self.objective = ChamferL2() if objective is None else objective

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`points`: distance of the hidden groups."""
        group = batch.views["global"]
        assert group.mask is not None and isinstance(self.encoder, PointTransformer)
        num_global = len(group.items)
        views, keep = group.items.flatten(0, 1), group.visible_tokens()  # [(G B) P 3], [(G B) M]
        groups = self.encoder.group(views)
        patches = self.student.encode(views, keep=keep, keys=group.keys).patches
        num_items, hidden = len(views), group.hidden_places()  # [(G B H)]
        predictions = self.student.heads["decoder"](
            patches,
            visible=take(groups.centres, keep),
            hidden=groups.centres.flatten(0, 1)[hidden].unflatten(0, (num_items, -1)),
            keys=None if group.keys is None else rng.fold_in(group.keys, _DECODER).flatten(),
        )
        distance = self.objective(predictions=predictions.flatten(0, 1), targets=groups.neighbours.flatten(0, 1)[hidden])  # [(G B H)]
        return {"points": distance.unflatten(0, (num_global, len(views) // num_global, -1)).mean(dim=(0, 2))}
