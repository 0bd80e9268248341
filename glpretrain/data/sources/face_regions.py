"""Region maps of faces in the ids of `masking.FACE_REGIONS`, from the label maps that others publish.

Left out: labels that come as one file per part (CelebAMask-HQ): its own script merges them into one map per image.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.data.sources.images import DAMAGE
from glpretrain.masking import FACE_REGIONS

MAP_ENDINGS = (".png", ".npy")
_CELEBAMASK = ("skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip", "l_lip", "hair")
_CELEBAMASK_REST = ("hat", "ear_r", "neck_l", "neck", "cloth")
_BISENET = ("skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r", "nose", "mouth", "u_lip", "l_lip")
_BISENET_REST = ("neck", "neck_l", "cloth", "hair", "hat")
# LaPa counts ears, neck, hats and clothes as background, and looks through glasses.
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


# Label in a file to id. Two orders of CelebAMask-HQ's 18 labels are in use: that of its own script and that of a well-known parser.
TABLES: dict[str, dict[int, int]] = {
    "lapa": {number: number for number in range(len(FACE_REGIONS))},
    "celebamask": _table(*_CELEBAMASK, *_CELEBAMASK_REST),
    "bisenet": _table(*_BISENET, *_BISENET_REST),
    # Background, skin, hair with brows, eyes, nose, mouth.
    "fasseg": {
        label: FACE_REGIONS.index(name) for label, name in enumerate(("background", "skin", "hair", "right_eye", "nose", "upper_lip"))
    },
}


def table_of(table: str | Mapping[int, int]) -> dict[int, int]:
    """A named table, or one of the caller's own.

    Raises:
        ValueError: there is no such table, or it leads to ids that are no region.
    """
    if isinstance(table, str):
        if table not in TABLES:
            raise ValueError(f"table: {table!r} given; accepted: {', '.join(TABLES)}, or a mapping of labels to region ids")
        return TABLES[table]
    if wrong := [value for value in table.values() if not -1 <= value < len(FACE_REGIONS)]:
        raise ValueError(f"table: it leads to {wrong[0]}; accepted: ids of {', '.join(FACE_REGIONS)} (0 to {len(FACE_REGIONS) - 1}), or -1")
    return dict(table)


def find_map(folder: Path, name: Path) -> Path:
    """The file in `folder` that belongs to the image `name`: the same relative path but for the ending.

    Raises:
        ValueError: there is none.
    """
    paths = [folder / name.with_suffix(ending) for ending in MAP_ENDINGS]
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(f"faces: {name} has no region map; expected {' or '.join(map(str, paths))}")


def read_map(path: Path, *, table: Mapping[int, int], size: tuple[int, int]) -> Tensor:
    """One label map as region ids, Int[H W].

    Args:
        path: a palette or grey image, or an `.npy` array (H, W) or (1, H, W).
        table: label to region id.
        size: height and width of its image; a map of another size is stretched to it.

    Raises:
        UnreadableItemError: the file is damaged, is no map, or holds a label that the table does not know.
    """
    try:
        if path.suffix == ".npy":
            labels = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as opened:
                labels = np.array(opened)
    except DAMAGE as error:
        raise UnreadableItemError(f"{path}: {error}") from error
    labels = labels[0] if labels.ndim == 3 and len(labels) == 1 else labels
    if labels.ndim != 2 or labels.dtype.kind not in "ui":
        raise UnreadableItemError(f"{path}: shape {labels.shape} of {labels.dtype}; expected one integer label per pixel")
    if unknown := sorted(set(np.unique(labels).tolist()) - set(table)):
        raise UnreadableItemError(f"{path}: label {unknown[0]}; accepted by its table: {', '.join(map(str, table))}")
    ids = np.zeros(max(table) + 1, dtype=np.int64)
    ids[list(table)] = list(table.values())
    regions = torch.from_numpy(ids[labels])
    return regions if regions.shape == size else resized_map(regions, size=size)


def resized_map(regions: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Int[H W] to Int[*size], each pixel with the id under its centre."""
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
    """In units of the face box: centre and half axes."""

    region: str
    x: float
    y: float
    width: float
    height: float


# The box of the cascade detector, or of an aligned face: from the middle of the forehead to the chin. Later ones lie over earlier ones.
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
    """The same ellipses in every face box: a map for upright, frontal faces, which knows no expression, glasses or hair style.

    Args:
        crop: part of the image that the map is made for.
        face: where the face lies in the same image.

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
