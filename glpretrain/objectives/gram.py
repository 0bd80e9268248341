"""Gram anchoring: the similarities between the patches of an image stay those of a target, while the patches themselves may move (DINOv3).

Left out: which tokens are compared, and where the targets come from (`training.anchor`).
"""

from typing import get_args

import torch.nn.functional as F
from torch import Tensor

from glpretrain.objectives.base import Objective
from glpretrain.training.anchor import Negatives

NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)


class GramDistance(Objective):
    """Mean squared difference of two Gram matrices (Simeoni et al., "DINOv3", 2025; dinov3/loss/gram_loss.py at 6876159).

    mean over pairs of tokens (n, m), n = m included, of (<x_n, x_m> - <t_n, t_m>)^2, x of the student and t the target, each of length one.
    The paper's equation 2 is the sum and not the mean. Zero when all pairs are equally similar, so a rotation of all tokens costs nothing.

    Tokens of another width than the targets can be compared. A token of zeros has no direction: as in the official code it is as similar
    to every other one as a right angle is, and its gradient is divided by 1e-12.

    Args:
        normalise: give every token length one first, so that cosines are compared.
        negatives: what becomes of negative similarities. `keep` (the published settings): nothing. `remove`: they are 0 on both sides
            (the official `remove_neg`). `remove_in_targets`: they are 0 in the targets alone, which is what the official
            `remove_only_teacher_neg` computes. `remove_common`: they are 0 in the targets, and in the student where the target was
            negative too, which is what that option's code seems to mean: it looks at the targets after it has changed them.

    Raises:
        ValueError: `negatives` is another word.
    """

    def __init__(self, *, normalise: bool = True, negatives: Negatives = "keep") -> None:
        super().__init__()
        if negatives not in NEGATIVES:
            raise ValueError(f"gram: negatives={negatives!r} given; accepted: {', '.join(NEGATIVES)}")
        self.normalise, self.negatives = normalise, negatives

    def similarities(self, tokens: Tensor) -> Tensor:
        """Float[I N N]: similarities of the tokens Float[I N D] of each of I sets."""
        if self.normalise:
            tokens = F.normalize(tokens, dim=-1)
        return tokens @ tokens.transpose(-1, -2)

    def forward(self, *, tokens: Tensor, targets: Tensor) -> Tensor:
        """Float[I]: distance of each of I sets, Float[I N D] of the student and Float[I N E] as targets, which get no gradient.

        A set holds the tokens of one view, or all tokens of a batch, which are then compared across items.
        """
        assert tokens.shape[:2] == targets.shape[:2], f"{tuple(tokens.shape)} and {tuple(targets.shape)}"
        own, target = self.similarities(tokens), self.similarities(targets.detach())
        if self.negatives == "remove":
            own = own.masked_fill(own < 0.0, 0.0)  # a similarity of exactly 0 keeps its gradient, as in the official code
        elif self.negatives == "remove_common":
            own = own.masked_fill((own < 0.0) & (target < 0.0), 0.0)
        if self.negatives != "keep":
            target = target.clamp_min(0.0)
        return (own - target).square().mean(dim=(1, 2))
