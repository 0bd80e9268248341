"""Linear segmentation: one linear layer on frozen patches says which class every pixel shows.

The head is that of DINOv2 (Oquab et al., 2023, section 7.4): a linear layer on batch-normalised patches, its logits upsampled
bilinearly to the mask. Two choices make it cheap and exact:

- it is fitted on patches, each with the shares of the classes among its pixels as soft target: the sum of the cross-entropies of all
  pixels, those to be ignored left out, with logits that are constant within a patch; only the prediction is bilinear;
- batch normalisation is the mean and deviation of the training patches, which frozen features make constants.

The problem is then multinomial logistic regression. All candidates (learning rate x L2 strength) descend side by side on the same
patches with Adam, the one with the best mIoU on held-out training images is fitted again on all of them. Of many images it sees as many
patches each, and as many of the held-out images choose as have this number of patches: memory does not grow with the images.
Augmentation, features of several layers, and heads that are not linear are left out on purpose.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from glpretrain.core import keys
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive, require_share
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import device_of
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.confusion import areas, confusion, mean_iou
from glpretrain.evaluate.patches.segmentation import (
    Predictor,
    TokenSample,
    best_class,
    class_shares,
    image_patches,
    predicted_figure,
    predicted_scores,
    taken,
)
from glpretrain.evaluate.probes import held_out_split, standardiser
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.rows import Rows

_BATCH_SEED, _SAMPLE_SEED = 71, 72
_MIN_FREQUENCY = 1e-6  # of a class that no training pixel shows

Layer = Callable[[Tensor], Tensor]  # Float[B N D] to the logits of tokens, Float[B N C]


class Taught(NamedTuple):
    """A batch of training items."""

    index: Tensor  # Int[B]  dataset index
    tokens: Tensor  # Float[B N D]
    shares: Tensor  # Float[B N C]  the share of each token's pixels or points that shows each class
    truth: tuple[Tensor, ...]  # [B *S] each  what a rate needs to know of the items


class Heads(NamedTuple):
    """Linear layers side by side."""

    weight: Tensor  # Float[K D C]
    bias: Tensor  # Float[K C]

    def layer(self, number: int) -> Layer:
        """One of them."""
        return lambda tokens: tokens @ self.weight[number] + self.bias[number]


@dataclass(frozen=True, kw_only=True)
class LinearLayer(Evaluator):
    """What segmentation by one linear layer on tokens shares, of images and of clouds; not used by itself.

    The layer is fitted on `masked_train`.

    Args:
        learning_rates: candidates for Adam's learning rate, which falls to zero along a cosine.
        l2: candidates for the penalty; l2 / 2 times the sum of squared weights is added to the mean cross-entropy.
        num_steps: number of Adam's steps.
        patches_per_step: number of tokens that are drawn for a step.
        held_out_ratio: share of the items of `masked_train` that chooses.
        max_patches: number of tokens that the layer is fitted on at most, as many of every item, drawn pseudo-randomly and always the same;
            and number of tokens, of whole items, that choose at most.
    """

    scored = "masked"
    needs = ("masked_train", "masked")
    truth = "mask_classes"
    unused = ("crop",)
    split_seed: ClassVar[int]

    learning_rates: Sequence[float] = (0.03, 0.3)
    l2: Sequence[float] = (1e-5, 1e-3)
    num_steps: int = 1000
    patches_per_step: int = 1024
    held_out_ratio: float = 0.2
    max_patches: int = 250_000

    def validate(self) -> None:
        require_positive("max_patches", self.max_patches)
        require_positive("learning_rates", self.learning_rates)
        if not self.l2 or min(self.l2) < 0:
            raise ValueError(f"l2: {list(self.l2)}; accepted: numbers from 0")
        require_positive("num_steps", self.num_steps)
        require_positive("patches_per_step", self.patches_per_step)
        require_share("held_out_ratio", self.held_out_ratio)

    def fitted(
        self,
        batches: Callable[[DecodedItems], Iterable[Taught]],
        items: DecodedItems,
        *,
        num_tokens: int,
        device: torch.device,
        rate: Callable[[Layer, Tensor, tuple[Tensor, ...]], float],
    ) -> tuple[Layer, dict[str, float]]:
        """The layer with the best learning rate and penalty on held-out items, fitted on all, and what was chosen.

        Args:
            batches: function that encodes training items.
            items: the training items.
            num_tokens: number of tokens of an item.
            device: where it is fitted.
            rate: mIoU of a layer on held-out items, of their standardised tokens and their truth; NaN where none has a class.

        Raises:
            ValueError: there are too few items to choose, or none has a class.
        """
        candidates = list(itertools.product(self.learning_rates, self.l2))
        sample = TokenSample(items, num_tokens=num_tokens, at_most=self.max_patches, seed=_SAMPLE_SEED)
        held_out = others = torch.empty(0, dtype=torch.int64)
        if len(candidates) > 1:
            held_out, others = held_out_split(len(sample.items), ratio=self.held_out_ratio, seed=self.split_seed)
            if len(held_out) == 0 or len(others) == 0:
                raise ValueError(
                    f"masked_train: {len(items)} items are too few to choose among learning_rates {list(self.learning_rates)} and "
                    f"l2 {list(self.l2)}; give one of each"
                )
        numbers = torch.as_tensor(sample.items.indices)
        asked = numbers[held_out[: max(1, self.max_patches // num_tokens)]]
        seen, choosing = Rows(len(sample.items)), Rows(len(asked))
        for batch in batches(sample.items):
            places, here = sample.places(batch.index), torch.isin(batch.index, asked)
            seen.add(batch.index, taken(batch.tokens, places), taken(batch.shares, places))
            if here.any():
                choosing.add(batch.tokens[here], *(part[here] for part in batch.truth))
        index, tokens, shares = seen.tensors(3)
        standardised = standardiser(tokens)
        tokens = standardised(tokens)
        chosen = candidates[0]
        if len(candidates) > 1:
            row_of = torch.full((len(numbers),), -1).index_put_((torch.searchsorted(numbers, index),), torch.arange(len(index)))
            fitting = row_of[others]
            fitting = fitting[fitting >= 0]  # one that cannot be read has none
            heads = self._heads(tokens[fitting].to(device), shares[fitting].to(device), candidates)
            held, *truth = choosing.tensors(1)
            queries = standardised(held) if len(held) else held
            rates = [rate(heads.layer(number), queries, tuple(truth)) if len(held) else math.nan for number in range(len(candidates))]
            if math.isnan(rates[0]):
                raise ValueError(f"masked_train: none of the {len(held)} held-out items shows a class; give more items")
            chosen = candidates[rates.index(max(rates))]
        layer = self._heads(tokens.to(device), shares.to(device), [chosen]).layer(0)
        return lambda features: layer(standardised(features)), dict(zip(("learning_rate", "l2"), chosen, strict=True))

    def num_bytes(self, dim: int, counts: Mapping[str, int]) -> int:
        """See `Evaluator`; of tokens as they are and standardised, and of those that choose."""
        return 3 * 4 * dim * self.max_patches

    def _heads(self, tokens: Tensor, shares: Tensor, candidates: Sequence[tuple[float, float]]) -> Heads:
        """Of Float[B N D] and Float[B N C], on their device: one layer for each learning rate and penalty."""
        learning_rates, l2 = zip(*candidates, strict=True)
        options = {"num_steps": self.num_steps, "patches_per_step": self.patches_per_step}
        return fit_heads(tokens.flatten(0, 1), shares.flatten(0, 1), learning_rates=learning_rates, l2=l2, **options)


@dataclass(frozen=True, kw_only=True)
class LinearSegmentation(LinearLayer):
    """Segmentation of `masked` by a linear layer on patches: `miou` over the classes that occur, `accuracy` of pixels, `iou_<class>`.

    Of sounds, a pixel is a cell of time and frequency.

    Chosen: `learning_rate` and `l2`. Settings are those of `LinearLayer`.
    """

    headlines = ("miou", "accuracy")
    num_axes = 2  # images, and sounds as cells of time and frequency
    split_seed = 70

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        predict, chosen = self._predictor(encoder, sources["masked_train"], cache)
        return Result(predicted_scores(encoder, sources["masked"], predict, features=self.features, cache=cache), chosen)

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`classes`: a few scored images, their masks and the prediction."""
        predict, _ = self._predictor(encoder, sources["masked_train"], cache)
        return {"classes": predicted_figure(encoder, sources["masked"], predict, features=self.features, cache=cache)}

    def _predictor(self, encoder: Encoder, train: DecodedItems, cache: FeatureCache | None) -> tuple[Predictor, dict[str, float]]:
        """The prediction, and the learning rate and L2 strength behind it."""
        grid, num_classes = self.features.image_grid(encoder), len(train.source.mask_classes)

        def batches(items: DecodedItems) -> Iterator[Taught]:
            for batch, found in image_patches(encoder, items, features=self.features, cache=cache):
                masks = batch.class_masks()
                shares = class_shares(masks, grid=grid, num_classes=num_classes)
                yield Taught(batch.index, found, shares, (masks.to(torch.int32),))

        def rate(layer: Layer, queries: Tensor, truth: tuple[Tensor, ...]) -> float:
            counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
            size = self.features.batch_size
            for patches, masks in zip(queries.split(size), truth[0].split(size), strict=True):
                predicted = best_class(layer(patches), grid=grid, size=masks.shape[1:])
                counts += confusion(masks.long(), predicted, num_classes=num_classes, num_predicted=num_classes).sum(dim=0)
            return mean_iou(areas(counts)).item()

        layer, chosen = self.fitted(batches, train, num_tokens=grid[0] * grid[1], device=device_of(encoder), rate=rate)
        return lambda patches, size: best_class(layer(patches), grid=grid, size=size), chosen


def fit_heads(
    patches: Tensor, shares: Tensor, *, learning_rates: Sequence[float], l2: Sequence[float], num_steps: int, patches_per_step: int
) -> Heads:
    """K linear layers on the CPU, fitted side by side on the same draws of patches, from no weights and biases of class frequencies.

    Each minimises -sum(shares * log_softmax(patches @ weight + bias)) / sum(shares) + l2 / 2 * sum(weight ** 2).

    Args:
        patches: Float[M D], features.
        shares: Float[M C], soft targets, rows that sum to at most 1.
        learning_rates: learning rate of each of K layers.
        l2: penalty of each of K layers.
        num_steps: number of Adam's steps.
        patches_per_step: number of patches in a step, drawn with replacement.

    Raises:
        ValueError: no patch has a class.
    """
    usable = shares.sum(dim=1) > 0
    patches, shares = patches[usable], shares[usable]
    if len(patches) == 0:
        raise ValueError("masked_train: no pixel has a class; at least one is needed")
    count, device = len(learning_rates), patches.device
    weight = torch.zeros(count, patches.shape[1], shares.shape[1], device=device)
    # From zero, a layer that has descended too little would look balanced, and its mIoU good, for not knowing that classes are rare.
    frequency = shares.sum(dim=0) / shares.sum()
    bias = frequency.clamp_min(_MIN_FREQUENCY).log().repeat(count, 1)  # [K C]
    penalty, rate = (torch.tensor(values, device=device)[:, None, None] for values in (l2, learning_rates))  # [K 1 1]
    moments = [torch.zeros_like(tensor) for tensor in (weight, weight, bias, bias)]
    for step in tracked(range(num_steps), total=num_steps, description="fitting linear layers"):
        drawn = keys.integers(
            keys.item_keys(seed=_BATCH_SEED, epoch=0, index=torch.tensor(step, device=device)), 0, len(patches), patches_per_step
        )
        inputs, targets = patches[drawn], shares[drawn]  # [M D], [M C]
        # Gradients by hand: they are two products, and an evaluation may run where autograd is off.
        probability = (torch.einsum("md,kdc->kmc", inputs, weight) + bias[:, None]).softmax(dim=-1)
        error = (probability * targets.sum(dim=1, keepdim=True) - targets) / targets.sum()  # [K M C]
        now = rate * (1 + math.cos(math.pi * step / num_steps)) / 2
        weight_gradient = torch.einsum("md,kmc->kdc", inputs, error) + penalty * weight
        weight -= now * _adam(moments[0], moments[1], weight_gradient, step=step)
        bias -= now[:, 0] * _adam(moments[2], moments[3], error.sum(dim=1), step=step)
    return Heads(weight.cpu(), bias.cpu())


def _adam(first: Tensor, second: Tensor, gradient: Tensor, *, step: int) -> Tensor:
    """Adam's direction (Kingma and Ba, 2015, algorithm 1); moves the two moments."""
    first.lerp_(gradient, 1 - 0.9)
    second.lerp_(gradient**2, 1 - 0.999)
    return first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
