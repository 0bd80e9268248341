"""Which mask belongs to which image: they have the same path below their folders, except for the ending.

Only one folder at a time is held as Python objects, since there may be millions of images. Left out: what masks mean (`folders`, `videos`).
"""

from pathlib import PurePath

import numpy as np

from glpretrain.data.sources.images.decoding import ENDINGS
from glpretrain.data.sources.paths import Paths

_ENDINGS = frozenset(ENDINGS)
_WITHOUT_LABELS = (".jpg", ".jpeg")  # what is stored with loss


def mask_places(images: Paths, masks: Paths, *, owner: str) -> np.ndarray:
    """Int[N]: the place of each image's mask in `masks`, -1 without one.

    Raises:
        ValueError: two masks differ in the ending only.
    """
    found = np.full(len(images), -1, dtype=np.int64)
    of_folder = dict(masks.places_by_folder())
    for folder, places in images.places_by_folder():
        by_stem = _by_stem(masks, of_folder.get(folder, np.empty(0, dtype=np.int64)), owner=owner)
        found[places] = [by_stem.get(stem_of(images.names[place]), -1) for place in places.tolist()]
    return found


def require_one_each(files: Paths, *, owner: str) -> None:
    """Refuse files that differ in the ending only.

    Raises:
        ValueError: names two of them.
    """
    for _, places in files.places_by_folder():
        _by_stem(files, places, owner=owner)


def with_labels(masks: Paths) -> Paths:
    """The masks without JPEG files, which do not keep labels."""
    kept = np.fromiter((PurePath(name).suffix.lower() not in _WITHOUT_LABELS for name in masks.names), dtype=bool, count=len(masks))
    return masks if kept.all() else masks.at(kept)


def stem_of(name: str) -> str:
    """The name of a file without the ending of an image."""
    stem, dot, ending = name.rpartition(".")
    return stem if stem and f"{dot}{ending}".lower() in _ENDINGS else name


def _by_stem(files: Paths, places: np.ndarray, *, owner: str) -> dict[str, int]:
    """Places of the files of a folder by their names without endings."""
    found: dict[str, int] = {}
    for place in places.tolist():
        if (other := found.setdefault(stem_of(files.names[place]), place)) != place:
            raise ValueError(f"{owner}: {files[other]} and {files[place]} differ in the ending only; keep one of them")
    return found
