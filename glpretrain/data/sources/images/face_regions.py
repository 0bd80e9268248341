"""Region maps of faces: published label maps read as ids of `masking.FACE_REGIONS`, and a template that needs no file.

Left out: labels that come as one file per part (CelebAMask-HQ); the script of that data set merges them into one map per image.
"""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glpretrain.core.listing import State
from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.data.sources.images.arrays import load_array
from glpretrain.data.sources.images.decoding import LEAST_SAVED, damage_named, opened_image
from glpretrain.data.sources.paths import Paths, Texts
from glpretrain.data.sources.saved_listings import Listing, Walked, listing_of
from glpretrain.masking import FACE_REGIONS

MAP_ENDINGS = (".png", ".npy")
_CELEBAMASK = ("skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip", "l_lip", "hair")
_CELEBAMASK_REST = ("hat", "ear_r", "neck_l", "neck", "cloth")
_BISENET = ("skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r", "nose", "mouth", "u_lip", "l_lip")
_BISENET_REST = ("neck", "neck_l", "cloth", "hair", "hat")
# In LaPa, ears, neck, hats and clothes are background, and a face is labelled as if it wore no glasses.
_MEANING = {
    "skin": "skin",
    "eye_g": "skin",
    "l_brow": "left_brow",
    "r_brow": "right_brow",
    "l_eye": "left_eye",
    "r_eye": "right_eye",
    "nose": "nose",
    "u_lip": "upper_lip",
    "mouth": "inner_mouth",
    "l_lip": "lower_lip",
    "hair": "hair",
}


def _table(*names: str) -> dict[int, int]:
    regions = ["background", *(_MEANING.get(name, "background") for name in names)]
    return {label: FACE_REGIONS.index(region) for label, region in enumerate(regions)}


# Label in a file to region id. The 18 labels of CelebAMask-HQ are used in two orders: that of its own script and that of a well-known
# parser.
TABLES: dict[str, dict[int, int]] = {
    "lapa": {number: number for number in range(len(FACE_REGIONS))},
    "celebamask": _table(*_CELEBAMASK, *_CELEBAMASK_REST),
    "bisenet": _table(*_BISENET, *_BISENET_REST),
    # The labels of FASSEG: background, skin, hair with brows, eyes, nose, mouth.
    "fasseg": {
        label: FACE_REGIONS.index(name) for label, name in enumerate(("background", "skin", "hair", "right_eye", "nose", "upper_lip"))
    },
}


def table_of(table: str | Mapping[int, int]) -> dict[int, int]:
    """The table of labels with this name, or the caller's own table, checked.

    Raises:
        ValueError: there is no table of this name, or the table contains ids that are no region.
    """
    if isinstance(table, str):
        if table not in TABLES:
            raise ValueError(f"table: {table!r} given; accepted: {', '.join(TABLES)}, or a mapping of labels to region ids")
        return TABLES[table]
    if wrong := [value for value in table.values() if not -1 <= value < len(FACE_REGIONS)]:
        raise ValueError(f"table: id {wrong[0]} given; accepted: ids of {', '.join(FACE_REGIONS)} (0 to {len(FACE_REGIONS) - 1}), or -1")
    return dict(table)


def find_map(folder: Path, name: Path) -> Path:
    """The region map in `folder` of the image `name`: it has the same relative path, except for the ending.

    Raises:
        ValueError: there is no such file.
    """
    paths = [folder / name.with_suffix(ending) for ending in MAP_ENDINGS]
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(f"faces: {name} has no region map; expected {' or '.join(map(str, paths))}")


def find_maps(folder: Path, images: Paths) -> Paths:
    """The region map in `folder` of each image, as `find_map` finds it; but a folder is listed once, and not asked for every image.

    Raises:
        ValueError: an image has none.
    """
    rules = f"maps {' '.join(MAP_ENDINGS)} {images.digest()}"
    return listing_of(folder, walk=partial(_maps_of, images=images), rules=rules, least=LEAST_SAVED).paths


def _maps_of(folder: Path, *, images: Paths) -> Walked:
    states: dict[str, State] = {}

    def listed(inside: str) -> set[str]:
        states.setdefault(inside, State.of(folder / inside))
        return _files_in(folder / inside)

    def names() -> Iterator[str]:
        last, there = "", listed("")
        for number, name in zip(images.folder_of.tolist(), images.names, strict=True):
            if (inside := folders[number]) != last:
                last, there = inside, listed(inside)
            stem = name[: -len(suffix)] if (suffix := Path(name).suffix) else name
            found = next((stem + ending for ending in MAP_ENDINGS if stem + ending in there), None)
            yield found or find_map(folder, Path(inside, name)).name

    folders = list(images.folders)
    paths = Paths.of_arrays(folder, folders=images.folders, names=Texts.of(names()), folder_of=images.folder_of)
    real = {Path(os.path.realpath(folder / inside)) for inside in states}
    return Walked(Listing(paths, "", {}), list(states.items()), real, all(state.inode for state in states.values()))


def _files_in(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def read_map(path: Path, *, table: Mapping[int, int], size: tuple[int, int]) -> Tensor:
    """One label map as region ids, Int[H W].

    Args:
        path: a palette or grey image, or an `.npy` array of shape (H, W) or (1, H, W).
        table: label to region id.
        size: height and width of the image; a map of another size is resized to it.

    Raises:
        UnreadableItemError: the file is damaged, is no label map, or holds a label that is not in the table.
    """
    with damage_named(path):
        if path.suffix == ".npy":
            labels = np.array(load_array(path))
        else:
            with opened_image(path) as opened:
                labels = np.array(opened)
    labels = labels[0] if labels.ndim == 3 and len(labels) == 1 else labels
    if labels.ndim != 2 or labels.dtype.kind not in "ui":
        raise UnreadableItemError(f"{path}: shape {labels.shape} of {labels.dtype}; expected one integer label per pixel")
    if unknown := sorted(set(np.unique(labels).tolist()) - set(table)):
        raise UnreadableItemError(f"{path}: label {unknown[0]}; the table accepts: {', '.join(map(str, table))}")
    ids = np.zeros(max(table) + 1, dtype=np.int64)
    ids[list(table)] = list(table.values())
    regions = torch.from_numpy(ids[labels])
    return regions if regions.shape == size else resized_map(regions, size=size)


def resized_map(regions: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Int[H W] resized to Int[*size]; each pixel takes the id at its centre."""
    image = torch.nn.functional.interpolate(regions[None, None].float(), size=size, mode="nearest-exact")
    return image[0, 0].long()


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: Tensor) -> Tensor:
        """The part [... height width] of [... H W]."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


class _Ellipse(NamedTuple):
    """One region of the template, in units of the face box."""

    region: str
    x: float  # centre
    y: float
    width: float  # half axes
    height: float


# For the box of the cascade detector or of an aligned face: from the middle of the forehead to the chin. Later ellipses cover earlier ones.
_TEMPLATE = (
    _Ellipse("hair", 0.5, 0.22, 0.62, 0.5),
    _Ellipse("skin", 0.5, 0.5, 0.45, 0.62),
    _Ellipse("right_brow", 0.29, 0.25, 0.15, 0.05),
    _Ellipse("left_brow", 0.71, 0.25, 0.15, 0.05),
    _Ellipse("right_eye", 0.3, 0.37, 0.11, 0.06),
    _Ellipse("left_eye", 0.7, 0.37, 0.11, 0.06),
    _Ellipse("nose", 0.5, 0.52, 0.12, 0.15),
    _Ellipse("upper_lip", 0.5, 0.77, 0.2, 0.07),
    _Ellipse("lower_lip", 0.5, 0.84, 0.17, 0.06),
    _Ellipse("inner_mouth", 0.5, 0.8, 0.15, 0.025),
)


def template_map(*, crop: Box, face: Box) -> Tensor:
    """A region map of the same ellipses in every face box, for upright frontal faces. It ignores expression, glasses and hair style.

    Args:
        crop: part of the image that the map is for.
        face: box of the face in the same image.

    Returns:
        Int[crop.height crop.width], index into `FACE_REGIONS`.
    """
    y = (torch.arange(crop.height) + 0.5 + crop.top - face.top) / face.height
    x = (torch.arange(crop.width) + 0.5 + crop.left - face.left) / face.width
    regions = torch.full((crop.height, crop.width), FACE_REGIONS.index("background"))
    for part in _TEMPLATE:
        inside = ((y - part.y) / part.height).square().unsqueeze(1) + ((x - part.x) / part.width).square() <= 1.0
        regions[inside] = FACE_REGIONS.index(part.region)
    return regions
