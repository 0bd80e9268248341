"""Point-MAE: encode four in ten groups of points, predict the points of the others.

Idea: a cloud is cut into overlapping groups around centres; the encoder sees some of them, and a small decoder gets the centres of
the hidden ones and predicts their points, in any order (Chamfer distance).
Paper: Pang et al., "Masked autoencoders for point cloud self-supervised learning", ECCV 2022.
Reference code: Pang-Yatian/Point-MAE at 7445a68 (models/Point_MAE.py, cfgs/pretrain.yaml).
Known differences: several views of an item count as several items; pointnet2's sampler is replaced, see `encoders.points`; decay
follows the rule of this package.
"""

from typing import ClassVar

from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.core.batch import Batch, Uses
from glpretrain.core.clouds import take
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.points import PointTransformer
from glpretrain.methods.base import Method
from glpretrain.objectives.base import Objective
from glpretrain.objectives.chamfer import ChamferL2
from glpretrain.training.branch import Branch
from glpretrain.training.decoders import DECODER_PATHS, GroupDecoder


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
            keys=None if group.keys is None else rng.fold_in(group.keys, DECODER_PATHS).flatten(),
        )
        distance = self.objective(predictions=predictions.flatten(0, 1), targets=groups.neighbours.flatten(0, 1)[hidden])  # [(G B H)]
        return {"points": distance.unflatten(0, (num_global, len(views) // num_global, -1)).mean(dim=(0, 2))}
