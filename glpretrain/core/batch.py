"""What data gives to a method: groups of views; and how a method declares what it uses of them.

A group holds views of one size that play one role, and is named by that role: `global`, `local`, `student`, `coarse_128`. A method declares
which groups and which parts of them it uses (`Uses`); missing data and unused data are errors before the first step.

Left out on purpose: a free-form field for extras. A method that needs other views asks for another group.
"""

from typing import NamedTuple

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
    keys: Tensor | None = None  # Int[V B]  what the encoder draws from, such as dropped paths, see `core.keys`

    def parts(self) -> set[str]:
        """Names of the optional parts that are there."""
        return {name for name in PARTS if getattr(self, name) is not None}


class Batch(NamedTuple):
    """All that a method sees of the data."""

    index: Tensor  # Int[B]  dataset index  # pyright: ignore[reportIncompatibleMethodOverride]  hides tuple.index
    views: dict[str, ViewGroup]
    weight: Tensor  # Float[B]  weight of every item in the loss, 1 unless the order sets others


class Uses(NamedTuple):
    """What a method uses of one group of views."""

    required: bool = True
    num_views: int | None = None  # None: any number
    needs: tuple[str, ...] = ()  # parts that must be there
    takes: tuple[str, ...] = ()  # parts that may be there
    paired_with: tuple[str, ...] = ()  # groups, this one too, that hold at least two views together: one is compared with another
