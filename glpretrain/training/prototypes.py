"""Prototypes, and their products with projections, which are computed only where they are needed: there are rows x K of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

CrossEntropyForm = Literal["chunked", "fused"]  # see `Optimization.cross_entropy`
LastLayer = Literal["weight_norm", "linear"]  # see `Prototypes`
LAST_LAYERS: tuple[LastLayer, ...] = ("weight_norm", "linear")
_LEAST_LENGTH = 1e-12  # as in F.normalize


def lengths_of(directions: Tensor) -> Tensor:
    """Float[K]: lengths of directions, Float[K D]."""
    return torch.linalg.vector_norm(directions, dim=1).clamp_min(_LEAST_LENGTH)


@dataclass(frozen=True)
class PrototypeLogits:
    """Logits Float[*S K] in the form of what they are computed from; `dense` computes them.

    It can be cut and reshaped along the axes S as a tensor can, and so costs nothing where an objective needs few of its rows, or only
    their sum.

    Args:
        rows: projections, Float[*S D] in float32.
        directions: directions of the prototypes, Float[K D], of any length.
        gain: factor on the cosine with each direction, Float[K 1].
        precision: precision of the products of a backward pass that computes the logits anew: that of other layers, as autocast has it.
        cross_entropy: how `cross_entropy.prototype_cross_entropy` computes the loss of a student with these logits.
    """

    rows: Tensor
    directions: Tensor
    gain: Tensor
    precision: torch.dtype = torch.float32
    cross_entropy: CrossEntropyForm = "chunked"

    @property
    def device(self) -> torch.device:
        """The device of all parts."""
        return self.rows.device

    @property
    def shape(self) -> torch.Size:
        """*S and K."""
        return torch.Size((*self.rows.shape[:-1], len(self.directions)))

    def dense(self) -> Tensor:
        """Float[*S K] in float32: a cosine in bf16 is off by up to 0.004, a tenth of the teacher's temperature."""
        with torch.autocast(device_type=self.rows.device.type, enabled=False):
            return _ScaledProducts.apply(self.rows, self.directions, self.gain)

    def total(self, *, num_axes: int) -> Tensor:
        """Float[*S' K]: sum of the logits over the first `num_axes` axes, the product of the sum of projections."""
        return replace(self, rows=self.rows.sum(dim=tuple(range(num_axes)))).dense() if num_axes else self.dense()

    def detach(self) -> "PrototypeLogits":
        """The same without gradient."""
        return replace(self, rows=self.rows.detach(), directions=self.directions.detach(), gain=self.gain.detach())

    def __getitem__(self, chosen: Tensor) -> "PrototypeLogits":
        return replace(self, rows=self.rows[chosen])

    def unflatten(self, dim: int, sizes: Sequence[int]) -> "PrototypeLogits":
        """As `Tensor.unflatten`, along an axis of S."""
        return replace(self, rows=self.rows.unflatten(dim, sizes))

    def flatten(self, start: int, end: int) -> "PrototypeLogits":
        """As `Tensor.flatten`, along axes of S."""
        return replace(self, rows=self.rows.flatten(start, end))

    def unsqueeze(self, dim: int) -> "PrototypeLogits":
        """As `Tensor.unsqueeze`, before an axis of S."""
        return replace(self, rows=self.rows.unsqueeze(dim))

    def split(self, sizes: Sequence[int]) -> "list[PrototypeLogits]":
        """As `Tensor.split`, along the first axis."""
        return [replace(self, rows=rows) for rows in self.rows.split(list(sizes))]


def dense(logits: Tensor | PrototypeLogits) -> Tensor:
    """Logits Float[*S K] as a tensor."""
    return logits.dense() if isinstance(logits, PrototypeLogits) else logits


class Prototypes(nn.Module):
    """Cosine similarity to K learned directions, times a gain: DINOHead's last layer, with its weight norm or without.

    Args:
        in_dim: width of the projection.
        num_prototypes: number of directions K.
        train_gain: learn one gain per prototype. DINO's `norm_last_layer` is the opposite; only ViT-S profits from training it.
        last_layer: `weight_norm`; or `linear`, where the gain of a direction is its own length, so that the logits are a plain product
            without bias. Its weights come from a truncated normal of 0.02 (DINOv3's layers/dino_head.py at 6876159).

    Raises:
        ValueError: there is not a single prototype, `last_layer` is another word, or a setting would be ignored.
    """

    cross_entropy: CrossEntropyForm = "chunked"  # set by `training.branch.Branch`
    gain: nn.Parameter | None

    def __init__(self, in_dim: int, *, num_prototypes: int, train_gain: bool = False, last_layer: LastLayer = "weight_norm") -> None:
        super().__init__()
        if num_prototypes < 1:
            raise ValueError(f"num_prototypes: {num_prototypes} given; a head needs at least 1")
        if last_layer not in LAST_LAYERS:
            raise ValueError(f"last_layer: {last_layer!r} given; accepted: {', '.join(LAST_LAYERS)}")
        self.directions = nn.Parameter(torch.empty(num_prototypes, in_dim))
        if last_layer == "linear":
            if not train_gain:
                raise ValueError("train_gain: False would be ignored with last_layer linear, whose lengths learn; leave one of them out")
            nn.init.trunc_normal_(self.directions, std=0.02)
            self.register_parameter("gain", None)
            return
        # Rows of length 0.577 whatever the width, as in the official layer (torch's default for a linear layer). AdamW's step
        # does not grow with a row, so longer rows would turn more slowly.
        nn.init.uniform_(self.directions, -(in_dim**-0.5), in_dim**-0.5)
        self.gain = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=train_gain)

    def forward(self, projections: Tensor) -> PrototypeLogits:
        """Float[... in_dim] to the logits Float[... K], which `PrototypeLogits.dense` computes."""
        device = projections.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        gain = torch.linalg.vector_norm(self.directions, dim=1, keepdim=True) if self.gain is None else self.gain
        return PrototypeLogits(projections.float(), self.directions, gain, precision, self.cross_entropy)


class Context(FunctionCtx):
    """What torch hands to both passes of a function, declared for type checkers."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _ScaledProducts(torch.autograd.Function):
    """Products with directions of any length, each divided by that length and multiplied by its gain.

    The official layer normalises all K directions in every call of student and teacher, and keeps the result for the backward pass. Here
    the products are scaled in place, and the gradient along a direction, which does not change a product, is subtracted in place.
    """

    @staticmethod
    def forward(ctx: Context, rows: Tensor, directions: Tensor, gain: Tensor) -> Tensor:
        """Float[*S D], Float[K D] and Float[K 1] to Float[*S K]."""
        lengths = lengths_of(directions)
        products = F.linear(rows, directions).mul_(gain.squeeze(1) / lengths)
        ctx.save_for_backward(rows, directions, gain, lengths)
        return products

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, directions, gain, lengths = ctx.saved_tensors
        learns_rows, learns_directions, learns_gain = ctx.needs_input_grad
        # A learned gain is multiplied in behind the products that its own gradient needs.
        scale = lengths.reciprocal() if learns_gain else gain.squeeze(1) / lengths
        of_products = (grad * scale).flatten(0, -2)  # [rows K]
        of_directions = of_gain = None
        if learns_directions or learns_gain:
            of_directions = of_products.t() @ rows.flatten(0, -2)  # [K D]
            along = remove_along(of_directions, directions=directions, lengths=lengths)
            if learns_gain:
                of_gain = along.unsqueeze(1)
                of_directions.mul_(gain)
                of_products.mul_(gain.squeeze(1))
        of_rows = (of_products @ directions).view_as(rows) if learns_rows else None
        return of_rows, of_directions if learns_directions else None, of_gain


def remove_along(gradients: Tensor, *, directions: Tensor, lengths: Tensor) -> Tensor:
    """Subtract from gradients, Float[K D] in place, their parts along the directions, which a length does not feel.

    Args:
        gradients: Float[K D], of the products with the directions as they are.
        directions: Float[K D].
        lengths: Float[K], what `lengths_of` gives.

    Returns:
        Float[K]: product of each gradient with its direction.
    """
    along = torch.linalg.vecdot(gradients, directions)
    gradients.addcmul_(directions, (along / lengths.square()).unsqueeze(1), value=-1.0)
    return along
