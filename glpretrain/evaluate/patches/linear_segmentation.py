"""Linear segmentation: one linear layer on frozen patches says which class every pixel shows.

The head is that of DINOv2 (Oquab et al., 2023, section 7.4): a linear layer on batch-normalised patches, its logits upsampled
bilinearly to the mask. Two choices make it cheap and exact:

- it is fitted on patches, each with the shares of the classes among its pixels as soft target: the sum of the cross-entropies of all
  pixels, those to be ignored left out, with logits that are constant within a patch; only the prediction is bilinear;
- batch normalisation is the mean and deviation of the training patches, which frozen features make constants.

The problem is then multinomial logistic regression. All candidates (learning rate x L2 strength) descend side by side on the same
patches with Adam, the one with the best mIoU on held-out training images is fitted again on all of them.
Left out on purpose: augmentation, features of several layers, and heads that are not linear.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from glpretrain.core import keys
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.features import evaluation_shape
from glpretrain.evaluate.metrics.confusion import areas, confusion, mean_iou
from glpretrain.evaluate.patches.segmentation import (
    FeatureOptions,
    Predictor,
    best_class,
    class_patches,
    class_pixels_pair,
    class_shares,
    predicted_figure,
    predicted_scores,
)
from glpretrain.evaluate.pixels import Pixels

_SPLIT_SEED, _BATCH_SEED = 70, 71
_MIN_STD = 1e-6  # a collapsed feature is not blown up beyond this
_MIN_FREQUENCY = 1e-6  # of a class that no training pixel shows


class Heads(NamedTuple):
    """Linear layers side by side."""

    weight: Tensor  # Float[K D C]
    bias: Tensor  # Float[K C]


class _Training(NamedTuple):
    patches: Tensor  # Float[B N D]  standardised
    shares: Tensor  # Float[B N C]
    semantic: Tensor  # Int[B H W]


class LinearSegmentation(Evaluator):
    """Segmentation by a linear layer on patches: `miou` over the classes that occur, `accuracy` of pixels, `iou_<class>`.

    Chosen: `learning_rate` and `l2`.

    Args:
        masked_train: images with masks of classes that it is fitted on; all their patches are held in memory.
        masked: images that are scored.
        learning_rates: candidates, of Adam; they fall to zero along a cosine.
        l2: candidates; l2 / 2 times the sum of squared weights is added to the mean cross-entropy.
        num_steps: of Adam.
        patches_per_step: patches drawn for each.
        held_out_ratio: share of the images of `masked_train` that chooses.
        image_size: side of the square, or height and width; None for the card's item shape.
        layer: block whose features are taken; negative numbers count from the last.
        batch_size: images at a time.
        bf16: encode under bfloat16 autocast.

    Raises:
        ValueError: masks hold no classes or different ones, or a number is out of range.
    """

    headlines = ("miou", "accuracy")

    def __init__(
        self,
        masked_train: Source | Pixels,
        masked: Source | Pixels,
        *,
        learning_rates: Sequence[float] = (0.03, 0.3),
        l2: Sequence[float] = (1e-5, 1e-3),
        num_steps: int = 1000,
        patches_per_step: int = 1024,
        held_out_ratio: float = 0.2,
        image_size: int | Sequence[int] | None = None,
        layer: int = -1,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        self.masked_train, self.masked = class_pixels_pair(masked_train, masked)
        if not learning_rates or min(learning_rates) <= 0:
            raise ValueError(f"learning_rates: {list(learning_rates)}; accepted: positive numbers")
        if not l2 or min(l2) < 0:
            raise ValueError(f"l2: {list(l2)}; accepted: numbers from 0")
        if num_steps < 1 or patches_per_step < 1:
            raise ValueError(f"num_steps: {num_steps}, patches_per_step: {patches_per_step}; accepted: positive numbers")
        if not 0 < held_out_ratio < 1:
            raise ValueError(f"held_out_ratio: {held_out_ratio}; accepted: between 0 and 1")
        self.learning_rates, self.l2 = tuple(learning_rates), tuple(l2)
        self.num_steps, self.patches_per_step, self.held_out_ratio = num_steps, patches_per_step, held_out_ratio
        self.image_size, self.layer, self.batch_size, self.bf16 = image_size, layer, batch_size, bf16

    @property
    def scored(self) -> Pixels:
        return self.masked

    def run(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> Result:
        options = self._options(cache)
        predict, (learning_rate, l2) = self._fitted(encoder, options)
        return Result(predicted_scores(encoder, self.masked, predict, options=options), {"learning_rate": learning_rate, "l2": l2})

    def pictures(self, encoder: Encoder, *, cache: FeatureCache | None = None) -> dict[str, Figure]:
        """`classes`: a few scored images, their masks and the prediction."""
        options = self._options(cache)
        return {"classes": predicted_figure(encoder, self.masked, self._fitted(encoder, options)[0], options=options)}

    def _options(self, cache: FeatureCache | None) -> FeatureOptions:
        return FeatureOptions(self.image_size, self.layer, self.batch_size, self.bf16, cache)

    def _fitted(self, encoder: Encoder, options: FeatureOptions) -> tuple[Predictor, tuple[float, float]]:
        """The prediction, and the learning rate and L2 strength behind it."""
        grid = encoder.grid(evaluation_shape(encoder, self.image_size))
        patches: list[Tensor] = []
        shares: list[Tensor] = []
        semantic: list[Tensor] = []
        for batch, found in class_patches(encoder, self.masked_train, options=options):
            patches.append(found)
            shares.append(class_shares(batch.semantic, grid=grid, num_classes=len(self.masked.source.mask_classes)))
            semantic.append(batch.semantic)
        features = torch.cat(patches)
        mean, std = features.mean(dim=(0, 1)), features.std(dim=(0, 1)).clamp_min(_MIN_STD)
        training = _Training((features - mean) / std, torch.cat(shares), torch.cat(semantic))
        device = next(encoder.parameters(), torch.empty(0)).device
        candidates = list(itertools.product(self.learning_rates, self.l2))
        chosen = candidates[self._choose(training, candidates, grid, device)] if len(candidates) > 1 else candidates[0]
        heads = self._heads(training.patches.to(device), training.shares.to(device), [chosen])

        def predict(patches: Tensor, size: tuple[int, int]) -> Tensor:
            return best_class((patches - mean) / std @ heads.weight[0] + heads.bias[0], grid=grid, size=size)

        return predict, chosen

    def _heads(self, patches: Tensor, shares: Tensor, candidates: Sequence[tuple[float, float]]) -> Heads:
        """Of Float[B N D] and Float[B N C], on their device: one layer for each learning rate and L2 strength."""
        learning_rates, l2 = zip(*candidates, strict=True)
        return fit_heads(
            patches.flatten(0, 1),
            shares.flatten(0, 1),
            learning_rates=learning_rates,
            l2=l2,
            num_steps=self.num_steps,
            patches_per_step=self.patches_per_step,
        )

    def _choose(self, training: _Training, candidates: Sequence[tuple[float, float]], grid: tuple[int, int], device: torch.device) -> int:
        """The candidate with the best mIoU on held-out images, the first of them on a tie."""
        order = keys.permutation(torch.tensor(_SPLIT_SEED), len(training.patches))
        num_held_out = round(self.held_out_ratio * len(order))
        if num_held_out in (0, len(order)):
            raise ValueError(
                f"masked_train: {len(order)} images are too few to choose among learning_rates {list(self.learning_rates)} and "
                f"l2 {list(self.l2)}; give one of each"
            )
        held_out = _Training(*(part[order[:num_held_out]] for part in training))
        fitted = order[num_held_out:]
        heads = self._heads(training.patches[fitted].to(device), training.shares[fitted].to(device), candidates)
        num_classes = training.shares.shape[-1]
        rates: list[float] = []
        for weight, bias in zip(*heads, strict=True):
            counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
            for patches, truth in zip(held_out.patches.split(self.batch_size), held_out.semantic.split(self.batch_size), strict=True):
                predicted = best_class(patches @ weight + bias, grid=grid, size=truth.shape[1:])
                counts += confusion(truth, predicted, num_classes=num_classes, num_predicted=num_classes).sum(dim=0)
            rates.append(mean_iou(areas(counts)).item())
        if math.isnan(rates[0]):
            raise ValueError(f"masked_train: none of the {num_held_out} held-out images has a pixel with a class; give more images")
        return rates.index(max(rates))


def fit_heads(
    patches: Tensor, shares: Tensor, *, learning_rates: Sequence[float], l2: Sequence[float], num_steps: int, patches_per_step: int
) -> Heads:
    """K linear layers, fitted side by side on the same draws of patches, from no weights and biases that predict the class frequencies.

    Each minimises -sum(shares * log_softmax(patches @ weight + bias)) / sum(shares) + l2 / 2 * sum(weight ** 2).

    Args:
        patches: Float[M D].
        shares: Float[M C], rows that sum to at most 1.
        learning_rates: K.
        l2: K.
        num_steps: of Adam.
        patches_per_step: drawn with replacement.

    Returns:
        The layers, on the CPU.

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
    for step in range(num_steps):
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
