"""What data gives to a method: groups of views; and how a method declares what it uses of them.

A group holds views of one size that play one role, and is named by that role: `global`, `local`, `student`, `coarse_128`. A method declares
which groups and which parts of them it uses (`Uses`); missing data and unused data are errors before the first step.

Left out on purpose: a free-form field for extras. A method that needs other views asks for another group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# The parts of a group that cost time or change what a method sees. A frame costs nothing, so every maker of views adds it.
PARTS = ("mask", "region_mask", "corrupted", "corruption", "strong")


class ViewGroup(NamedTuple):
    """Views of one size, for one role."""

    items: Tensor  # Float[V B *item]  normalised
    frame: Tensor | None = None  # Float[V B A A+1]  the affine map from a place in the view to the place in the item, see `core.frames`
    mask: Tensor | None = None  # Bool[V B N]  True: hidden from the student
    region_mask: Tensor | None = None  # Bool[V B N]  True: hidden, and in the region that is hidden completely
    corrupted: Tensor | None = None  # Float[V B *item]  the views with groups of inputs replaced (GMML)
    corruption: Tensor | None = None  # Bool[V B *inputs]  True: this pixel or point was replaced
    strong: Tensor | None = None  # Bool[B]  True: all views of this item are strongly augmented
    hidden: Tensor | None = None  # Int[M]  places of the hidden tokens in the flattened mask, see `hidden_places`
    visible: Tensor | None = None  # Int[V B M]  tokens that are not hidden, where all views keep as many, see `visible_tokens`
    keys: Tensor | None = None  # Int[V B]  what the encoder draws from, such as dropped paths, see `core.keys`

    def parts(self) -> set[str]:
        """Names of the optional parts that are there."""
        return {name for name in PARTS if getattr(self, name) is not None}

    def of_items(self, rows: Tensor) -> "ViewGroup":
        """The views of some of the items, Int[M]; their hidden tokens are counted anew."""
        parts = {name: value for name, value in self._asdict().items() if value is not None and name != "hidden"}
        return ViewGroup(**{name: value.index_select(0 if name == "strong" else 1, rows) for name, value in parts.items()})

    def hidden_places(self) -> Tensor:
        """Int[M]: places of the hidden tokens in the flattened mask, in ascending order.

        Whoever makes a mask on the host notes them there: the host would wait for a device that has to count them.
        """
        assert self.mask is not None
        return self.mask.flatten().nonzero().squeeze(1) if self.hidden is None else self.hidden

    def visible_tokens(self) -> Tensor:
        """Int[(V B) M]: indices of the tokens of each view that are not hidden, in ascending order.

        Raises:
            ValueError: views keep different numbers of tokens.
        """
        assert self.mask is not None
        return visible_indices(self.mask.flatten(0, 1)) if self.visible is None else self.visible.flatten(0, 1)


def visible_indices(mask: Tensor) -> Tensor:
    """Int[B M]: indices of the tokens that are not hidden in Bool[B N], in ascending order.

    Raises:
        ValueError: the rows have different numbers of visible tokens.
    """
    counts = (~mask).sum(dim=1)
    low, high = counts.aminmax()
    if low != high:
        raise ValueError(f"mask: items keep {int(low)} to {int(high)} tokens; dropping needs the same number in all; use RandomMask")
    return first_visible(mask, count=int(low))


def first_visible(mask: Tensor, *, count: int) -> Tensor:
    """Int[B count]: indices of the first tokens that are not hidden in Bool[B N], in ascending order; no number is read."""
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


class Batch(NamedTuple):
    """All that a method sees of the data."""

    index: Tensor  # Int[B]  dataset index  # pyright: ignore[reportIncompatibleMethodOverride]  hides tuple.index
    views: dict[str, ViewGroup]
    weight: Tensor  # Float[B]  weight of every item in the loss, 1 unless the order sets others
    targets: Tensor | None = None  # Int[B *S]  what a fine-tuned model is to predict, such as the class of each item; None in pretraining


class Uses(NamedTuple):
    """What a method uses of one group of views."""

    required: bool = True
    num_views: int | None = None  # None: any number
    needs: tuple[str, ...] = ()  # parts that must be there
    takes: tuple[str, ...] = ()  # parts that may be there
    one_size: bool = False  # whether all views of a run must have one size, because something is kept for every place
    paired_with: tuple[str, ...] = ()  # groups, this one too, that hold at least two views together: one is compared with another
