"""What the parts of loading hand to one another: the options of a call, the weights that were read, and the report of every tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from glpretrain.core.types import EncoderCard
from glpretrain.weights.files import State

Which = Literal["teacher", "student"]
Arguments = dict[str, str | int | float | bool | list[int] | list[float] | None]


class LoadOptions(TypedDict, total=False):
    """The keyword arguments of `load_backbone`, whose docstring explains them. Left out means None, "teacher" or True."""

    which: Which
    in_chans: int | None
    img_size: int | Sequence[int] | None
    strict: bool
    format: str | None
    name: str | None
    num_heads: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None


@dataclass(frozen=True)
class LoadedWeights:
    """The weights of a backbone as they were read, under the names of the wrapped library.

    Args:
        title: name of the format as people write it.
        encoder: name of the encoder in the registry.
        arguments: arguments of the encoder's builder, for the channels and the size that the tensors were made for.
        state: tensors under the names of the wrapped library.
        pretraining: regular expression for the start of names that only pretraining or classification needs.
        left_out: names that were left out before renaming.
        assumed: what the file did not say and had to be assumed, in words.
        hints: the options among format, name and num_heads that the reader of this format takes into account.
        card: card that came with the tensors, whose arguments are those above.
        value_range: see `EncoderCard`, for the channels that the tensors were made for.
    """

    title: str
    encoder: str
    arguments: Arguments
    state: State
    pretraining: str = r"(?!)"
    left_out: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    card: EncoderCard | None = None
    value_range: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of one loaded backbone.

    Args:
        title: the format and the file.
        architecture: the encoder in words.
        matched: names of tensors that the encoder took over unchanged.
        reshaped: names of tensors that were changed for other channels or another grid, with both shapes.
        missing: names of tensors that the encoder needs and the file lacks.
        shape_mismatch: names of tensors that the file holds in another shape, with both shapes.
        unused: names of tensors of the file for which the encoder has no place.
        left_out: names of tensors of the file that only pretraining or classification needs.
        assumed: what the file did not say and had to be assumed, in words.
    """

    title: str
    architecture: str
    matched: tuple[str, ...]
    reshaped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    shape_mismatch: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def full_match(self) -> bool:
        """Whether every tensor of the encoder came from the file, and every tensor of the file has a place or is left out."""
        return not (self.missing or self.shape_mismatch or self.unused)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in self._kinds().items())
        return f"{self.title} as {self.architecture}: {counts}" + "".join(f"; {text}" for text in self.assumed)

    def lines(self) -> list[str]:
        """One line for every kind of tensor that occurs, with the names."""
        return [f"{kind}: {', '.join(names)}" for kind, names in self._kinds().items() if names]

    def _kinds(self) -> dict[str, tuple[str, ...]]:
        return {
            "matched": self.matched,
            "reshaped": self.reshaped,
            "missing": self.missing,
            "shape_mismatch": self.shape_mismatch,
            "unused": self.unused,
            "left out": self.left_out,
        }
