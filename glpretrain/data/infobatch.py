"""InfoBatch: epochs that leave out, at random, some of the items whose loss is low, and give those that stay more weight.

Every item of low loss stays with the probability 1 - r and then counts 1 / (1 - r) times, so the sum of the weighted gradients of an epoch
has the mean that it has over all items. The last epochs hold all items with the weight 1.

Paper: Qin et al., "InfoBatch: lossless training speed up by unbiased dynamic data pruning", ICLR 2024, equations 3 to 5.
Reference code: NUS-HPC-AI-Lab/InfoBatch at 8bbb012 (infobatch/infobatch.py); quantiles: henryqin1997/InfoBatch-ImageNet at 502f90b
(imagenet/infobatch_quantile.py).
Known differences: docs/infobatch.md. Left out: where the losses come from (`glpretrain.training.item_losses`).
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.data.orders import Epoch, Order, Shuffled, epoch_key
from glpretrain.data.sources.base import Source

_PRUNED, _ROUNDED = 0x1BF0, 0x1BF1  # what the key of an epoch is folded with: which items stay, and whether their number is rounded up
_RATIO = 0.5
_LARGEST = 0.9  # the official code takes larger ratios for this one


class InfoBatch(Order):
    """Items of low loss are left out at random, and weigh more where they stay.

    What is compared is the last loss of each item, without its weight. An item without one, because it was never seen, always stays, so the
    first epoch holds all items. The items of an epoch and their weights are buffers, so that a run which is resumed within an epoch goes on
    with the same ones, whatever the losses are by then.

    The official code keeps floor((1 - r) n) of n items. Here the fraction that this cuts off is the probability of one item more: otherwise
    a single item of low loss would never be seen, and others would count too little.

    Args:
        ratio: share r of the items below the mean loss that an epoch leaves out; None is 0.5 where there are no `quantiles`.
        delta: share of the run after which epochs hold all items: an epoch that begins at this share or later does. Of 100 epochs and 0.875
            these are the epochs from the 89th on (the paper's t >= delta C).
        quantiles: in place of the mean and of `ratio`, pairs of a share of the items, in ascending order, and the ratio of the items below
            this quantile of the losses, and above the one before, that is left out. The official code has [[0.2, 0.75], [0.85, 0.5]].
        order: order of the items that stay, which must hold all of them; all in random order when left out.

    Raises:
        ValueError: a share is out of range or of order, or `ratio` would be ignored.
    """

    weights: Tensor  # Float[N]  weights of the items in the epoch that was made last, 0 for those that it leaves out
    number: Tensor  # Int[]  number of this epoch; -1 before there is one
    held: Tensor  # Int[]  number of items of all epochs up to this one

    def __init__(
        self,
        ratio: float | None = None,
        *,
        delta: float = 0.875,
        quantiles: Sequence[tuple[float, float]] = (),
        order: Order | None = None,
    ) -> None:
        super().__init__()
        if ratio is not None and quantiles:
            raise ValueError(f"InfoBatch: ratio={ratio} would be ignored: each of quantiles has its own; leave one of them out")
        self.quantiles = tuple((share, one) for share, one in quantiles)
        self.ratio = _RATIO if ratio is None else ratio
        if wrong := [one for one in self._ratios() if not 0.0 < one <= _LARGEST]:
            raise ValueError(f"InfoBatch: ratio={wrong[0]} given; accepted: shares above 0, up to {_LARGEST}")
        shares = [0.0, *(share for share, _ in self.quantiles), 1.0]
        if any(later <= earlier for earlier, later in itertools.pairwise(shares)):
            raise ValueError(f"InfoBatch: quantiles={list(self.quantiles)} given; accepted: ascending shares between 0 and 1, with ratios")
        if not 0.0 < delta <= 1.0:
            raise ValueError(f"InfoBatch: delta={delta} given; accepted: shares of the run above 0, up to 1")
        self.delta = delta
        self.order = Shuffled() if order is None else order
        self._losses: Callable[[], Tensor] | None = None
        self.register_buffer("weights", torch.empty(0))
        self.register_buffer("number", torch.tensor(-1))
        self.register_buffer("held", torch.tensor(0))

    def follow(self, losses: Callable[[], Tensor]) -> None:
        """Set the function that gives the last loss of every item, Float[N], with NaN where there is none, before an epoch is made."""
        self._losses = losses

    def begin(self, source: Source) -> None:
        """Forget a run before.

        Raises:
            ValueError: the order of the items that stay is none for this source.
        """
        self.order.begin(source)
        if self.order.fewest(len(source)) != len(source):
            raise ValueError(f"InfoBatch: order {type(self.order).__name__} does not hold every item once; give Shuffled or ByShard")
        self.weights = torch.ones(len(source))
        self.number.fill_(-1)
        self.held.zero_()

    def epoch(self, number: int, *, length: int, seed: int, progress: float) -> Epoch:
        """The items that stay. Those of an epoch that was begun before a resume are the same again.

        Raises:
            ValueError: nothing gives the losses.
        """
        if self._losses is None:
            raise ValueError("InfoBatch: nothing gives losses of items; train a method of glpretrain.methods, or leave data.order out")
        if number != int(self.number):
            self.weights.fill_(1.0)
            if progress < self.delta:
                self._prune(self._losses().cpu().double(), key=keys.fold_in(epoch_key(number, length=length, seed=seed), _PRUNED))
            self.number.fill_(number)
            self.held += self._num_kept()
        indices = self.order.epoch(number, length=length, seed=seed, progress=progress).indices
        indices = indices[self.weights[indices] > 0.0]
        return Epoch(indices, self.weights[indices])

    def fewest(self, length: int) -> int:
        """What is left if nearly all losses are below the mean, as with one very large loss."""
        largest = max(self._ratios())
        return math.floor((1.0 - largest) * length)

    def said(self) -> str:
        """Share of the items in the epoch, and in all epochs so far."""
        kept, total, number = self._num_kept(), len(self.weights), int(self.number)
        of_all = int(self.held) / (total * (number + 1))
        return f"epoch {number + 1}: {kept} of {total} items ({kept / total:.1%}); {of_all:.1%} in all epochs so far (InfoBatch)"

    def _ratios(self) -> list[float]:
        return [ratio for _, ratio in self.quantiles] or [self.ratio]

    def _num_kept(self) -> int:
        return int((self.weights > 0.0).sum())

    def _prune(self, losses: Tensor, *, key: Tensor) -> None:
        """Set the weights of items of low loss, Float[N] in float64, that are left out or stay."""
        seen = losses[~losses.isnan()]
        if not len(seen):
            return
        if self.quantiles:
            thresholds = [_quantile(seen, share) for share, _ in self.quantiles]
        else:
            thresholds = [float(seen.mean())]
        lowest = -math.inf
        for threshold, ratio, own in zip(thresholds, self._ratios(), keys.numbered(key, count=len(thresholds)), strict=True):
            low = ((losses >= lowest) & (losses < threshold)).nonzero().squeeze(1)  # no comparison with NaN is true
            wanted = (1.0 - ratio) * len(low)
            count = math.floor(wanted) + int(float(keys.uniform(keys.fold_in(own, _ROUNDED), 1)) < wanted % 1.0)
            self.weights[low] = 0.0
            self.weights[low[keys.permutation(own, len(low))[:count]]] = 1.0 / (1.0 - ratio)
            lowest = threshold


def _quantile(values: Tensor, share: float) -> float:
    """The quantile of numpy's `percentile`, between the two nearest values; torch's takes at most 16 million of them."""
    place = share * (len(values) - 1)
    low, high = (float(values.kthvalue(rank + 1).values) for rank in (math.floor(place), math.ceil(place)))
    return low + (high - low) * (place % 1.0)
