"""Two views of an item must point the same way."""

import torch.nn.functional as F
from torch import Tensor

from glpretrain.objectives.base import Objective


class NegativeCosine(Objective):
    """-1/2 mean over items of cos(query_i, key_i), for one of SimSiam's two directions (FSFM util/loss_contrastive.py, SimSiamLoss).

    Smallest, at -1/2, where every query points as its key.
    """

    def forward(self, *, queries: Tensor, keys: Tensor) -> Tensor:
        """Compare row by row; gradients flow wherever they are asked for.

        Args:
            queries: Float[B D].
            keys: Float[B D], in the same order.

        Returns:
            Float[].
        """
        assert queries.shape == keys.shape and queries.dim() == 2, f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        # In float32: the mean of many cosines near 1 moves by less than half precision holds.
        return -0.5 * F.cosine_similarity(queries.float(), keys.float(), dim=1).mean()
