"""Linear layers that are trained side by side on features as they come, and LARS, the optimizer that MAE trains one with.

Which features and which schedule is left out (`linear_protocols`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from glpretrain.core import keys
from glpretrain.evaluate.probes import in_parts

_WEIGHT_SEED = 72
_INITIAL_STD = 0.01


class LARS(Optimizer):
    """Momentum SGD whose gradient is scaled, for each weight matrix, by 0.001 |weight| / |gradient|; biases are not scaled.

    It is that of MAE and MoCo v3 (util/lars.py) without weight decay.

    Args:
        parameters: the parameters.
        lr: learning rate.
        momentum: momentum of the update.
        trust: the factor 0.001.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.9, trust: float = 0.001) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - no closure
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                update: Tensor = parameter.grad
                if parameter.dim() > 1:
                    sizes = parameter.norm(), update.norm()
                    ratio = group["trust"] * sizes[0] / sizes[1]
                    update = update * torch.where((sizes[0] > 0) & (sizes[1] > 0), ratio, 1.0)
                velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
                velocity.mul_(group["momentum"]).add_(update)
                parameter.sub_(velocity, alpha=group["lr"])


class Heads(NamedTuple):
    """Linear layers that differ in their learning rate only, and what their features go through first."""

    norm: nn.Module
    layers: Sequence[nn.Linear]

    def classes(self, features: Tensor) -> Tensor:
        """Float[B D] to Int[B R] on the CPU: the class that each layer gives."""
        device = self.layers[0].weight.device

        def predict(part: Tensor) -> Tensor:
            normed = self.norm(part.to(device))
            return torch.stack([layer(normed).argmax(dim=1) for layer in self.layers], dim=1).cpu()

        self.norm.eval()
        with torch.no_grad():
            return in_parts(predict, features, num_scores=sum(layer.out_features for layer in self.layers))


def initial_heads(norm: nn.Module, learning_rates: Sequence[float], *, dim: int, num_classes: int) -> Heads:
    """Equal layers, weights of standard deviation 0.01 and no bias, one per learning rate."""
    weight = _INITIAL_STD * keys.normal(torch.tensor(_WEIGHT_SEED), num_classes, dim)
    layers = [nn.Linear(dim, num_classes) for _ in learning_rates]
    for layer in layers:
        layer.weight.data.copy_(weight)
        layer.bias.data.zero_()
    return Heads(norm, layers)


def train_heads(
    heads: Heads, optimizers: Sequence[Optimizer], batches: Iterable[tuple[Tensor, Tensor]], *, share: Callable[[int], float]
) -> Iterator[list[float]]:
    """Train each layer on the mean cross-entropy, in one pass.

    Args:
        heads: the layers, which are changed.
        optimizers: what moves each of them, with the largest learning rate.
        batches: features, Float[B D], and labels, Int[B], of each step.
        share: function of the number of a step to the share of the learning rate.

    Yields:
        The loss of each layer before each step.
    """
    largest = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    heads.norm.train()
    for step, (features, labels) in enumerate(batches):
        with torch.no_grad():
            normed = heads.norm(features)
        losses = [functional.cross_entropy(layer(normed), labels) for layer in heads.layers]
        for loss, optimizer, rate in zip(losses, optimizers, largest, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield torch.stack(losses).tolist()
