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
from glpretrain.evaluate.encoding import device_of
from glpretrain.evaluate.figures import curves_figure
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.intervals import accuracy
from glpretrain.evaluate.probes import answerable, in_parts, require_two_classes, stratified_split
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.reading import Patches
from glpretrain.evaluate.rows import LabelledFeatures, labelled_rows

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

    def classes(self, features: Tensor) -> Tensor:
        """Float[B D] to Int[B R] on the CPU: the class that each head gives."""

        def predict(part: Tensor) -> Tensor:
            return self.logits(part.to(self.bias.device)).argmax(dim=-1).cpu()

        return in_parts(predict, features, num_scores=self.bias.numel())

    def to(self, device: torch.device) -> "Heads":
        """The same heads on a device."""
        return Heads(self.weight.to(device), self.bias.to(device))

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
    unused = ("layer", "tokens")

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

    def num_bytes(self, dim: int, counts: Mapping[str, int]) -> int:
        """See `Evaluator`."""
        return (max(self.num_blocks) + 1) * super().num_bytes(dim, counts)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        train, device = self._rows(encoder, sources["train"], cache), device_of(encoder)
        require_two_classes(train.labels, sources["train"])
        num_classes = len(sources["train"].source.classes)
        rates = self._held_out_rates(train, num_classes=num_classes, device=device)  # [kinds R]
        # argmax takes the first of equals, in the order in which kinds and rates were given.
        kind, rate = divmod(int(rates.argmax()), len(self.learning_rates))
        chosen, learning_rate = self._kinds[kind], self.learning_rates[rate]
        every = torch.arange(len(train.labels))
        heads = self._trained(self._seen(train, chosen), every, (learning_rate,), num_classes=num_classes, device=device)
        if not heads.is_finite.all():
            raise ValueError(f"learning_rates: {list(self.learning_rates)}; the weights grew without bound; accepted: smaller ones")
        test, unlike = answerable(train, self._rows(encoder, sources["test"], cache), sources)
        predicted = heads.classes(self._seen(test, chosen).cls)[:, 0]
        return Result(
            {"accuracy": accuracy(predicted, test.labels, test.groups)},
            left_out=unlike,
            chosen={"learning_rate": learning_rate, "num_blocks": chosen.num_blocks, "mean_patch": float(chosen.mean_patch)},
        )

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`learning_rates`: held-out accuracy by learning rate, a line per kind of features."""
        train = self._rows(encoder, sources["train"], cache)
        rates = self._held_out_rates(train, num_classes=len(sources["train"].source.classes), device=device_of(encoder))
        return {"learning_rates": _rates_figure(self._kinds, self.learning_rates, rates)}

    @property
    def _kinds(self) -> list[Kind]:
        """What heads see, in the order in which the first of equals is chosen."""
        return [Kind(num, mean_patch) for num in self.num_blocks for mean_patch in (False, True)]

    def _seen(self, rows: LabelledFeatures, kind: Kind) -> LabelledFeatures:
        """What a head of this kind sees of `_rows`."""
        return rows.with_cls(linear_input(rows.cls, num_blocks=max(self.num_blocks), kind=kind))

    def _held_out_rates(self, train: LabelledFeatures, *, num_classes: int, device: torch.device) -> Tensor:
        """Float[kinds R]: share of held-out items that each head, trained on the others, gets right."""
        held_out, fitted = stratified_split(train.labels, train.groups, ratio=self.held_out_ratio)
        if len(held_out) == 0:
            raise ValueError(f"train: {len(train.labels)} labelled items are too few to hold {self.held_out_ratio} of them out")
        rates = []
        for kind in self._kinds:
            features = self._seen(train, kind)
            heads = self._trained(features, fitted, self.learning_rates, num_classes=num_classes, device=device)
            predicted = heads.classes(features.cls[held_out])  # [M R]
            rates.append((predicted == train.labels[held_out, None]).float().mean(dim=0) * heads.is_finite.cpu())
        return torch.stack(rates)

    def _trained(
        self, train: LabelledFeatures, fitted: Tensor, learning_rates: Sequence[float], *, num_classes: int, device: torch.device
    ) -> Heads:
        """Heads for the items at the positions `fitted`, Int[M], one per learning rate."""
        per_step = min(self.items_per_step, len(fitted))
        scaled = torch.tensor([rate * per_step / _RATE_UNIT for rate in learning_rates])
        heads = initial_heads(train.cls.shape[1], num_heads=len(scaled), num_classes=num_classes).to(device)
        order = training_order(len(fitted), num_steps=self.num_steps, items_per_step=per_step)
        return train_heads(heads, train, learning_rates=scaled, order=fitted[order])

    def _rows(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> LabelledFeatures:
        """A row per item that has a label: `cls` of the last blocks, deepest last as in DINOv2, and the mean patch of the last one."""
        deepest = max(self.num_blocks)
        if deepest > encoder.num_layers:
            raise ValueError(f"num_blocks: {list(self.num_blocks)}; accepted: numbers from 1 to {encoder.num_layers}, the encoder's depth")
        layers: dict[int, Patches] = {layer: "pooled" if layer == -1 else "none" for layer in range(-deepest, 0)}
        batches = self.features.encode_layers(encoder, items, resize=self.features.cropping, layers=layers, cache=cache)

        def joined(outputs: Mapping[int, EncoderOutput]) -> Tensor:
            return torch.cat([*(outputs[layer].cls for layer in layers), outputs[-1].patches[:, 0]], dim=1)

        return labelled_rows(batches, joined, items=items)


def linear_input(rows: Tensor, *, num_blocks: int, kind: Kind) -> Tensor:
    """What a head of this kind sees, a view: the features of a large set are there once for all kinds.

    Args:
        rows: Float[B (num_blocks+1)*D], `cls` of the last blocks in their order, and the mean of the patches of the last block.
        num_blocks: number of blocks in the rows.
        kind: which of these a head sees.

    Returns:
        Float[B kind.num_blocks*D], or D more.
    """
    dim = rows.shape[1] // (num_blocks + 1)
    return rows[:, (num_blocks - kind.num_blocks) * dim : (num_blocks + kind.mean_patch) * dim]


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
        heads: heads to start from, on the device where they are trained.
        train: the training items, on the CPU, so that a device need not hold all of them.
        learning_rates: Float[R], learning rate of each head in the first step.
        order: Int[T M], the items of each step.

    Returns:
        The trained heads, on the same device.
    """
    weight, bias, device = heads.weight.clone(), heads.bias.clone(), heads.bias.device
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    for step, items in enumerate(tracked(order, total=len(order), description="training heads")):
        rates = learning_rates.to(device) * (1 + math.cos(math.pi * step / len(order))) / 2  # [R]
        features, labels = train.cls[items].to(device), train.labels[items].to(device)  # [M D], [M]
        # The gradient by hand: softmax minus the truth. autograd would keep what nobody needs.
        error = Heads(weight, bias).logits(features).softmax(dim=-1)  # [M R classes]
        error[torch.arange(len(items), device=device), :, labels] -= 1
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
