"""Items, the output of an encoder, the card that travels with its weights, and the letters that name axes everywhere in the package.

Axis legend (views come first, so a tensor of views is `V B ...`):

    B items            V views            G global views      L local views
    N tokens (patches, point groups)      M selected tokens
    A coordinates of a place in an item   D embedding         K prototypes, or the width of a projection
    C H W image        P points           T F spectrogram     S samples of a sound

Left out: what data gives to a method (`glpretrain.core.batch`).
"""

import reprlib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import ClassVar, NamedTuple

from torch import Tensor

from glpretrain import __version__


class Item(NamedTuple):
    """One decoded item at its own size. A cloud has Int[P], one number per point, where an image has Int[H W]; a sound has Int[T F]."""

    values: Tensor  # UInt8[C H W] of an image, Float[P 3] of a cloud of points, Float[1 S] of a sound
    label: int  # index into the class names of the source, -1 where there is none
    instances: Tensor | None  # Int[H W]  0 background, 1.. objects of this item, -1 to be ignored; None without masks
    regions: Tensor | None  # Int[H W]  region id per pixel (face parts), -1 where there is none; None without regions
    semantic: Tensor | None = None  # Int[H W]  index into the source's names of mask classes, -1 to be ignored


class EncoderOutput(NamedTuple):
    """One forward pass of an encoder."""

    cls: Tensor  # Float[B D]    after the final norm; the mean of the patches where an encoder has no class token
    patches: Tensor  # Float[B N D]  after the final norm; M kept tokens instead of N when `keep` was given
    registers: Tensor | None = None  # Float[B R D]  after the final norm: the other tokens (registers, distillation); None without any

    def of_cls(self) -> "EncoderOutput":
        """Without patches: Float[B 0 D]."""
        return self._replace(patches=self.patches[:, :0])


class Embedded(NamedTuple):
    """Features of items, a row for each that could be read."""

    features: Tensor  # Float[B D], or Float[B N D] of patches
    names: list[str]  # of each row
    unreadable: dict[str, str]  # why the others have no row, by name


# What the fields of a card are in JSON, which makes lists of tuples.
_JSON_TYPES = {
    **dict.fromkeys(("encoder", "modality", "licence", "source"), (str,)),
    **dict.fromkeys(("item_shape", "patch_size", "mean", "std", "value_range"), (list, tuple)),
    "arguments": (dict,),
    "embed_dim": (int,),
}

_LARGEST_COUNT, _LARGEST_STATISTIC = 10_000_000, 1e9


def _check_numbers(name: str, values: Sequence[object]) -> None:
    """Refuse, with a ValueError, statistics that are not finite and counts that no item can have."""
    if name in ("mean", "std"):
        lowest, accepted = (-_LARGEST_STATISTIC, "finite numbers") if name == "mean" else (0.0, "finite numbers above 0")
        fits = all(isinstance(value, int | float) and lowest < value <= _LARGEST_STATISTIC for value in values)
    else:
        accepted = f"whole numbers, at least 1 and at most {_LARGEST_COUNT}"
        fits = len(values) > 0 and all(type(value) is int and 1 <= value <= _LARGEST_COUNT for value in values)
    if not fits:
        raise ValueError(f"encoder card: {name}={reprlib.repr(values)} given; accepted: {accepted}")


def _pairs(values: Sequence[object]) -> tuple[tuple[float, float], ...]:
    """Ranges of values, or a ValueError."""
    found: list[tuple[float, float]] = []
    for pair in values:
        match pair:
            case [int() | float() as low, int() | float() as high] if -_LARGEST_STATISTIC <= low < high <= _LARGEST_STATISTIC:
                found.append((float(low), float(high)))
            case _:
                raise ValueError(f"encoder card: value_range={reprlib.repr(values)} given; accepted: pairs of numbers, the lower one first")
    return tuple(found)


@dataclass(frozen=True)
class EncoderCard:
    """What is stored with the weights, so that nobody has to guess.

    A written card also says its format and the version of the package that wrote it. A new field comes with a default, so that cards of
    older formats can still be read, and raises `format` by one. A card without a format is of format 1.

    Args:
        encoder: name in the encoder registry.
        arguments: arguments with which the registered builder makes the same architecture again (plain JSON values).
        modality: name of the kind of item, see `glpretrain.modalities`.
        item_shape: shape of the items that the encoder was trained on: channels, height and width of an image, (points, 3) of a cloud,
            (1, frames, bins) of a sound.
        patch_size: inputs of a token along each axis: height and width in pixels, frames and bins, or the points of a group.
        embed_dim: width D of `cls` and `patches`.
        mean: mean per channel, of images scaled to [0, 1]; coordinates of points are taken as they are.
        std: standard deviation per channel, of the same values.
        licence: licence of the weights; empty if unknown.
        source: where the weights come from (method, recipe, steps).
        value_range: low and high value of each channel that became 0 and 255 where files of images were read; empty where files had 8 bits,
            or the upper 8 of 16 were taken.
    """

    format: ClassVar[int] = 3

    encoder: str
    arguments: dict[str, str | int | float | bool | list[int] | list[float] | None]
    modality: str
    item_shape: tuple[int, ...]
    patch_size: tuple[int, ...]
    embed_dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str = ""
    source: str = ""
    value_range: tuple[tuple[float, float], ...] = ()

    def to_json(self) -> dict:
        """Plain values, ready for `json.dump`."""
        return {"format": self.format, "written_by": f"glpretrain {__version__}", **asdict(self)}

    @classmethod
    def from_json(cls, values: object) -> "EncoderCard":
        """Inverse of `to_json`. Fields that a card of an older format lacks get their defaults.

        Raises:
            ValueError: the card is of a newer format, or a field is missing, unknown or of another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"encoder card: a {type(values).__name__} given; accepted: a JSON object")
        card: dict = {"format": 1, "written_by": "a newer version", **values}
        format, writer = card.pop("format"), card.pop("written_by")
        if type(format) is not int or format < 1:
            raise ValueError(f"encoder card: format={format!r} given; accepted: 1 to {cls.format}")
        if format > cls.format:
            raise ValueError(
                f"encoder card: format={format} given, written by {writer!r}; glpretrain {__version__} reads formats 1 to {cls.format}; "
                "install the version that wrote the card or a newer one"
            )
        required = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(cls)}
        if unknown := sorted(map(str, card.keys() - required.keys())):
            raise ValueError(f"encoder card: unknown fields {unknown}; accepted: {sorted(required)}")
        if missing := sorted(name for name in required.keys() - card.keys() if required[name]):
            raise ValueError(f"encoder card: missing fields {missing}")
        for name, value in card.items():
            if not isinstance(value, _JSON_TYPES[name]):
                raise ValueError(f"encoder card: {name}={reprlib.repr(value)} given; accepted: {_JSON_TYPES[name][0].__name__}")
            if name == "value_range":
                card[name] = _pairs(value)
            elif isinstance(value, list | tuple):
                _check_numbers(name, value)
                card[name] = tuple(value)
        _check_numbers("embed_dim", [card["embed_dim"]])
        return cls(**card)
