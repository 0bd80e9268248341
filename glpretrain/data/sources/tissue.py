"""`Tissue`: tiles of one stained section of the colon, the immunohistochemistry photograph that scikit-image carries in its wheel.

Each tile is a pure function of (seed, split, index): a square cut at its native size. `train` and `test` cut theirs from disjoint parts
of the photograph. Glands are stained brown, all nuclei blue; what is brown, smoothed over about a nucleus, makes the masks, and
its share of a tile makes the class: `stroma`, `border` or `gland`. Nobody annotated this: it stands in for tissue types.

Left out: more than one section, so what is learned here says nothing about other stains. See `glpretrain tiles` for slides.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import skimage.data
import torch
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu

from glpretrain.core import keys
from glpretrain.data.sources.base import Item, Source, checked_index
from glpretrain.data.sources.synthetic import SyntheticSource

_TRAIN_SHARE, _GAP = 0.62, 0.03  # of the photograph's width, as for scenes
_SMOOTHING = 4.0  # pixels; a nucleus is about 10 wide, so blue nuclei inside a gland belong to it
_LEAST_GLAND, _MOST_STROMA = 0.75, 0.15  # share of brown in a tile
_LEAST_OBJECT = 0.02  # share of a tile; smaller specks of brown are ground
CLASSES = ("stroma", "border", "gland")


class _Part(NamedTuple):
    """What a split may cut."""

    image: torch.Tensor  # UInt8[3 H W]
    brown: np.ndarray  # Bool[H W]


@cache
def _part(split: str) -> _Part:
    photo = skimage.data.immunohistochemistry()
    brown = ndimage.gaussian_filter(rgb2hed(photo)[..., 2], _SMOOTHING)
    brown = brown > threshold_otsu(brown)
    width = photo.shape[1]
    columns = slice(0, int(width * _TRAIN_SHARE)) if split == "train" else slice(int(width * (_TRAIN_SHARE + _GAP)), width)
    return _Part(image=torch.from_numpy(photo[:, columns]).permute(2, 0, 1).contiguous(), brown=brown[:, columns])


class Tissue(SyntheticSource):
    """Tiles of stained tissue with their glands.

    Args:
        length: number of tiles.
        size: of a tile, in pixels of the photograph.
        split: `train` and `test` share no pixel.
        seed: of all tiles.

    Raises:
        ValueError: `length` or `size` is out of range.
    """

    def __init__(self, length: int, *, size: int = 64, split: Literal["train", "test"] = "train", seed: int = 0) -> None:
        super().__init__(length, split=split, seed=seed)
        if not 16 <= size <= 160:
            raise ValueError(f"Tissue: size is {size}; expected 16 to 160 pixels, which every part of the photograph holds")
        self.size = size

    @property
    def name(self) -> str:
        return "tissue"

    @property
    def classes(self) -> Sequence[str]:
        return CLASSES

    @property
    def mask_classes(self) -> Sequence[str]:
        return ("stroma", "gland")

    def part(self, length: int, *, split: Literal["train", "test"]) -> Source:
        return Tissue(length, size=self.size, split=split, seed=self.seed)

    def __getitem__(self, index: int) -> Item:
        checked_index(index, self.length)
        part = _part(self.split)
        key = self.key(index)
        top, left = (int(draw * (side - self.size + 1)) for draw, side in zip(keys.uniform(key, 2).tolist(), part.brown.shape, strict=True))
        place = np.s_[top : top + self.size, left : left + self.size]
        brown = part.brown[place]
        pieces, count = ndimage.label(brown)
        large = [piece for piece in range(1, count + 1) if (pieces == piece).mean() >= _LEAST_OBJECT]
        instances = np.zeros(brown.shape, dtype=np.int64)
        for number, piece in enumerate(large, start=1):
            instances[pieces == piece] = number
        share = brown.mean()
        label = 0 if share < _MOST_STROMA else 2 if share > _LEAST_GLAND else 1
        return Item(
            image=part.image[:, place[0], place[1]].clone(),
            label=label,
            instances=torch.from_numpy(instances),
            regions=None,
            semantic=torch.from_numpy(brown.astype(np.int64)),
        )
