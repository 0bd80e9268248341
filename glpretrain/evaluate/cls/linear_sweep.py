"""Linear probe by gradient steps: heads on several kinds of features and learning rates, trained side by side in one pass.

Protocol: Oquab et al., "DINOv2: learning robust visual features without supervision", 2023, and dinov2/eval/linear.py of
github.com/facebookresearch/dinov2 at b8931f7: `cls` of the last 1 or 4 blocks, with or without the mean patch of the last one; SGD
with momentum 0.9 and no weight decay; rates scaled by items per step / 256 and lowered to zero along a cosine. Known differences:
the best head is chosen on a held-out part of the training items and then trained anew on all of them, where DINOv2 chooses on the
very items that it reports; heads of one kind start from the same weights; no augmentation, so features are computed once; its
rates times ten, since a thousand steps are a twelfth of its 12,500. Probes of patches (segmentation) are left out on purpose.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from glpretrain.core import keys
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator, Result, require_positive, require_share
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.features import LabelledFeatures, labelled_rows
from glpretrain.evaluate.figures import curves_figure
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.intervals import accuracy
from glpretrain.evaluate.probes import answerable, require_two_classes, stratified_split

_ORDER_SEED, _WEIGHT_SEED = 70, 71
_SGD_MOMENTUM = 0.9
_INITIAL_STD = 0.01
_RATE_UNIT = 256  # items per step at which a learning rate is the one used
DEFAULT_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Heads(NamedTuple):
    """Linear classifiers of one kind of features, one per learning rate: side by side, so that a step is two matrix products."""

    weight: Tensor  # Float[D R classes]
    bias: Tensor  # Float[R classes]

    def logits(self, features: Tensor) -> Tensor:
        """Float[B D] to Float[B R classes]."""
        return torch.einsum("bd,drk->brk", features, self.weight) + self.bias

    @property
    def is_finite(self) -> Tensor:
        """Bool[R]: no number of the head has grown without bound."""
        return self.weight.isfinite().all(dim=2).all(dim=0) & self.bias.isfinite().all(dim=1)


class Kind(NamedTuple):
    """What a head sees: `cls` of the last blocks, and perhaps the mean patch of the last one."""

    num_blocks: int
    mean_patch: bool


@dataclass(frozen=True, kw_only=True)
class LinearSweep(Evaluator):
    """Accuracy of the best of many linear heads: `accuracy`; chosen: its `learning_rate`, `num_blocks` and `mean_patch` (0 or 1).

    Heads are trained on `train`, `test` is classified.

    Args:
        learning_rates: candidates, for 256 items per step, as DINOv2 gives them; the one used is scaled.
        num_blocks: how many of the last blocks' `cls` a head sees; one kind of head for each, with and without the mean patch.
        num_steps: number of steps of every head.
        items_per_step: number of items in a step; fewer where `train` is smaller.
        held_out_ratio: share of `train` that chooses.
    """

    headlines = ("accuracy",)
    scored = "test"
    needs = ("train", "test")
    truth = "classes"
    unused = ("layer",)

    learning_rates: Sequence[float] = DEFAULT_RATES
    num_blocks: Sequence[int] = (1, 4)
    num_steps: int = 1000
    items_per_step: int = 128
    held_out_ratio: float = 0.2

    def validate(self) -> None:
        require_positive("learning_rates", self.learning_rates)
        require_positive("num_blocks", self.num_blocks)
        require_positive("num_steps", self.num_steps)
        require_positive("items_per_step", self.items_per_step)
        require_share("held_out_ratio", self.held_out_ratio)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        train = self._kinds(encoder, sources["train"], cache)
        require_two_classes(next(iter(train.values())).labels, sources["train"])
        num_classes = len(sources["train"].source.classes)
        rates = self._held_out_rates(train, num_classes=num_classes)  # [kinds R]
        # argmax takes the first of equals, in the order in which kinds and rates were given.
        kind, rate = divmod(int(rates.argmax()), len(self.learning_rates))
        chosen, learning_rate = list(train)[kind], self.learning_rates[rate]
        heads = self._trained(train[chosen], (learning_rate,), num_classes=num_classes)
        if not heads.is_finite.all():
            raise ValueError(f"learning_rates: {list(self.learning_rates)}; the weights grew without bound; accepted: smaller ones")
        test, unlike = answerable(train[chosen], self._kinds(encoder, sources["test"], cache)[chosen], sources)
        predicted = heads.logits(test.cls)[:, 0].argmax(dim=-1)
        return Result(
            {"accuracy": accuracy(predicted, test.labels, test.groups)},
            left_out=unlike,
            chosen={"learning_rate": learning_rate, "num_blocks": chosen.num_blocks, "mean_patch": float(chosen.mean_patch)},
        )

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`learning_rates`: held-out accuracy by learning rate, a line per kind of features."""
        train = self._kinds(encoder, sources["train"], cache)
        rates = self._held_out_rates(train, num_classes=len(sources["train"].source.classes))
        return {"learning_rates": _rates_figure(list(train), self.learning_rates, rates)}

    def _held_out_rates(self, train: dict[Kind, LabelledFeatures], *, num_classes: int) -> Tensor:
        """Float[kinds R]: share of held-out items that each head, trained on the others, gets right."""
        items = next(iter(train.values()))
        held_out, fitted = stratified_split(items.labels, items.groups, ratio=self.held_out_ratio)
        if len(held_out) == 0:
            raise ValueError(f"train: {len(items.labels)} labelled items are too few to hold {self.held_out_ratio} of them out")
        rates = []
        for features in train.values():
            heads = self._trained(features.at(fitted), self.learning_rates, num_classes=num_classes)
            queries = features.at(held_out)
            predicted = heads.logits(queries.cls).argmax(dim=-1)  # [M R]
            rates.append((predicted == queries.labels[:, None]).float().mean(dim=0) * heads.is_finite)
        return torch.stack(rates)

    def _trained(self, train: LabelledFeatures, learning_rates: Sequence[float], *, num_classes: int) -> Heads:
        per_step = min(self.items_per_step, len(train.labels))
        scaled = torch.tensor([rate * per_step / _RATE_UNIT for rate in learning_rates])
        heads = initial_heads(train.cls.shape[1], num_heads=len(scaled), num_classes=num_classes)
        order = training_order(len(train.labels), num_steps=self.num_steps, items_per_step=per_step)
        return train_heads(heads, train, learning_rates=scaled, order=order)

    def _kinds(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> dict[Kind, LabelledFeatures]:
        """Every kind of features of the items that have a label."""
        deepest = max(self.num_blocks)
        if deepest > encoder.num_layers:
            raise ValueError(f"num_blocks: {list(self.num_blocks)}; accepted: numbers from 1 to {encoder.num_layers}, the encoder's depth")
        layers = {layer: layer == -1 for layer in range(-deepest, 0)}  # `cls` of the last blocks, deepest last as in DINOv2
        batches = self.features.encode_layers(encoder, items, resize="crop", layers=layers, cache=cache)

        def joined(outputs: Mapping[int, EncoderOutput]) -> Tensor:
            return torch.cat([*(outputs[layer].cls for layer in layers), outputs[-1].patches.mean(dim=1)], dim=1)

        found = labelled_rows(batches, joined, items=items)
        *blocks, mean_patch = found.cls.unflatten(1, (deepest + 1, -1)).unbind(dim=1)
        kinds = [Kind(num, pooled) for num in self.num_blocks for pooled in (False, True)]
        return {kind: found.with_cls(linear_input(blocks, mean_patch, kind=kind)) for kind in kinds}


def linear_input(blocks: Sequence[Tensor], mean_patch: Tensor, *, kind: Kind) -> Tensor:
    """What a head of this kind sees.

    Args:
        blocks: `cls` of the last blocks in their order, Float[B D] each.
        mean_patch: Float[B D], mean of the patches of the last block.
        kind: which of these a head sees.

    Returns:
        Float[B num_blocks*D], or D more.
    """
    return torch.cat([*blocks[-kind.num_blocks :], *([mean_patch] if kind.mean_patch else [])], dim=1)


def initial_heads(in_dim: int, *, num_heads: int, num_classes: int) -> Heads:
    """Equal heads, weights of standard deviation 0.01 and no bias."""
    weight = _INITIAL_STD * keys.normal(torch.tensor(_WEIGHT_SEED), in_dim, num_classes)
    return Heads(weight[:, None].repeat(1, num_heads, 1), torch.zeros(num_heads, num_classes))


def training_order(count: int, *, num_steps: int, items_per_step: int) -> Tensor:
    """Int[num_steps items_per_step]: which items a step sees; one fixed pseudo-random order of all items after another."""
    num_epochs = math.ceil(num_steps * items_per_step / count)
    epochs = [keys.permutation(keys.fold_in(torch.tensor(_ORDER_SEED), epoch), count) for epoch in range(num_epochs)]
    return torch.cat(epochs)[: num_steps * items_per_step].unflatten(0, (num_steps, items_per_step))


def train_heads(heads: Heads, train: LabelledFeatures, *, learning_rates: Tensor, order: Tensor) -> Heads:
    """SGD with momentum 0.9 on the mean cross-entropy, every head by itself, the rates lowered to zero along a cosine.

    Args:
        heads: heads to start from.
        train: the training items.
        learning_rates: Float[R], learning rate of each head in the first step.
        order: Int[T M], the items of each step.

    Returns:
        The trained heads.
    """
    weight, bias = heads.weight.clone(), heads.bias.clone()
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    for step, items in enumerate(order):
        rates = learning_rates * (1 + math.cos(math.pi * step / len(order))) / 2  # [R]
        features = train.cls[items]  # [M D]
        # The gradient by hand: softmax minus the truth. autograd would keep what nobody needs.
        error = Heads(weight, bias).logits(features).softmax(dim=-1)  # [M R classes]
        error[torch.arange(len(items)), :, train.labels[items]] -= 1
        error /= len(items)
        weight_velocity.mul_(_SGD_MOMENTUM).add_(torch.einsum("bd,brk->drk", features, error))
        bias_velocity.mul_(_SGD_MOMENTUM).add_(error.sum(dim=0))
        weight -= rates[:, None] * weight_velocity
        bias -= rates[:, None] * bias_velocity
    return Heads(weight, bias)


def _rates_figure(kinds: list[Kind], learning_rates: Sequence[float], held_out: Tensor) -> Figure:
    best = int(held_out.max(dim=0).values.argmax())
    title = f"best {100 * held_out.max():.1f} % at {learning_rates[best]:g}"
    figure, axis = curves_figure(title, x="learning rate for 256 items per step", y="held-out accuracy in percent")
    order = sorted(range(len(learning_rates)), key=lambda position: learning_rates[position])
    for kind, rates, colour in zip(kinds, held_out, _colours(len(kinds)), strict=True):
        name = f"cls of the last {kind.num_blocks}" if kind.num_blocks > 1 else "cls"
        label = f"{name} + mean patch" if kind.mean_patch else name
        style = "--" if kind.mean_patch else "-"
        shown = [100 * rates[position].item() for position in order]
        axis.plot([learning_rates[position] for position in order], shown, style, color=colour, marker="o", markersize=3, label=label)
    axis.axvline(learning_rates[best], color="0.75", linewidth=0.8, zorder=0)
    axis.set_xscale("log")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _colours(count: int) -> list[str]:
    """One per pair of kinds: those with and without the mean patch differ in their dashes."""
    cycle = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
    return [cycle[position // 2 % len(cycle)] for position in range(count)]
