"""`Tissue`: tiles of one stained section of the colon, the immunohistochemistry photograph that scikit-image carries in its wheel.

Each tile is a pure function of (seed, split, index): a square crop at the native resolution. `train` and `test` crop disjoint parts of
the photograph. Glands are stained brown and all nuclei are stained blue. The masks show where the photograph is brown, smoothed over
about one nucleus. The share of brown pixels in a tile is its class: `stroma`, `border` or `gland`. Nobody annotated these classes; they
are a substitute for tissue types.

Left out: more than one section, so that a score here says nothing about other stains. See `glpretrain tiles` for slides.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import skimage.data
import torch
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu

from glpretrain.core import keys
from glpretrain.data.sources.base import Item, Source, Split, SyntheticSource, columns_of

_SMOOTHING = 4.0  # pixels; a nucleus is about 10 pixels wide, so the blue nuclei inside a gland count as gland
_LEAST_GLAND, _MOST_STROMA = 0.75, 0.15  # share of brown pixels in a tile
_LEAST_OBJECT = 0.02  # share of a tile; smaller specks of brown are background
CLASSES = ("stroma", "border", "gland")


class _Photo(NamedTuple):
    """The part of the photograph that one split may show."""

    image: torch.Tensor  # UInt8[3 H W]
    brown: np.ndarray  # Bool[H W]


@cache
def _photo(split: Split) -> _Photo:
    photo = skimage.data.immunohistochemistry()
    brown = ndimage.gaussian_filter(rgb2hed(photo)[..., 2], _SMOOTHING)
    brown = brown > threshold_otsu(brown)
    columns = columns_of(split, photo.shape[1])
    return _Photo(image=torch.from_numpy(photo[:, columns]).permute(2, 0, 1).contiguous(), brown=brown[:, columns])


class Tissue(SyntheticSource):
    """Tiles of stained tissue, with masks of the glands.

    Args:
        length: number of tiles.
        size: side of a tile, in pixels of the photograph.
        split: `train` and `test` share no pixel.
        seed: seed of all tiles.

    Raises:
        ValueError: `length` or `size` is out of range, or `split` is unknown.
    """

    name = "tissue"
    classes = CLASSES
    mask_classes = ("stroma", "gland")

    def __init__(self, length: int, *, size: int = 64, split: Split = "train", seed: int = 0) -> None:
        super().__init__(length, split=split, seed=seed)
        if not 16 <= size <= 160:
            raise ValueError(f"Tissue: size is {size}; expected 16 to 160 pixels, because both parts of the photograph must hold a tile")
        self.size = size

    def with_split(self, split: Split, *, length: int) -> Source:
        return Tissue(length, size=self.size, split=split, seed=self.seed)

    def __getitem__(self, index: int) -> Item:
        key, photo = self.key(index), _photo(self.split)
        draws = zip(keys.uniform(key, 2).tolist(), photo.brown.shape, strict=True)
        top, left = (int(draw * (side - self.size + 1)) for draw, side in draws)
        place = np.s_[top : top + self.size, left : left + self.size]
        brown = photo.brown[place]
        pieces = np.zeros(brown.shape, dtype=np.int32)
        ndimage.label(brown, output=pieces)
        large = [piece for piece in range(1, int(pieces.max()) + 1) if (pieces == piece).mean() >= _LEAST_OBJECT]
        instances = np.zeros(brown.shape, dtype=np.int64)
        for number, piece in enumerate(large, start=1):
            instances[pieces == piece] = number
        share = brown.mean()
        label = 0 if share < _MOST_STROMA else 2 if share > _LEAST_GLAND else 1
        return Item(
            values=photo.image[:, place[0], place[1]].clone(),
            label=label,
            instances=torch.from_numpy(instances),
            regions=None,
            semantic=torch.from_numpy(brown.astype(np.int64)),
        )
