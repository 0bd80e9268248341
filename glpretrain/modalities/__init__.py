"""The kinds of items that the package knows. A new kind is a class in a file of its own here and one entry in the list below."""

from glpretrain.modalities.audio import Audio
from glpretrain.modalities.base import Fit, Modality, Size
from glpretrain.modalities.image import Image
from glpretrain.modalities.points import Points

__all__ = ["Audio", "Fit", "Image", "Modality", "Points", "Size", "get", "names", "register"]

_KNOWN: dict[str, Modality] = {}


def register(modality: Modality) -> None:
    """Make a kind of item known by its name.

    Raises:
        ValueError: the name is taken.
    """
    if modality.name in _KNOWN:
        raise ValueError(f"modality: {modality.name!r} is registered already; choose another name")
    _KNOWN[modality.name] = modality


def get(name: str) -> Modality:
    """The object of a kind of item.

    Raises:
        ValueError: there is no such kind.
    """
    if name not in _KNOWN:
        raise ValueError(f"modality: {name!r} given; known: {', '.join(_KNOWN)}")
    return _KNOWN[name]


def names() -> tuple[str, ...]:
    """Names of all known kinds."""
    return tuple(_KNOWN)


for _modality in (Image(), Points(), Audio()):
    register(_modality)
