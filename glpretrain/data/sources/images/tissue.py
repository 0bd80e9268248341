"""`Tissue`: tiles of one stained section of the colon, the immunohistochemistry photograph that scikit-image carries in its wheel; and
`TissueSlides`, the same tiles in bags that stand for slides.

Each tile is a pure function of (seed, split, index): a square crop at the native resolution. `train` and `test` crop disjoint parts of
the photograph. Glands are stained brown and all nuclei are stained blue. The masks show where the photograph is brown, smoothed over
about one nucleus. The share of brown pixels in a tile is its class: `stroma`, `border` or `gland`. Nobody annotated these classes; they
are a substitute for tissue types.

Left out: more than one section, so that a score here says nothing about other stains. See `glpretrain tiles` for slides.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import skimage.data
import torch
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu

from glpretrain.core import keys
from glpretrain.data.sources.base import Item, Source, Split, SyntheticSource, checked_index, columns_of

_SMOOTHING = 4.0  # pixels; a nucleus is about 10 pixels wide, so the blue nuclei inside a gland count as gland
_LEAST_GLAND, _MOST_STROMA = 0.75, 0.15  # share of brown pixels in a tile
_TRIES = 32  # tiles that are looked at for one that a slide of its class may show
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


def _corner(draws: torch.Tensor, photo: _Photo, size: int) -> tuple[int, int]:
    """Upper left corner of a tile, of Float[2] in [0, 1)."""
    top, left = (int(draw * (side - size + 1)) for draw, side in zip(draws.tolist(), photo.brown.shape, strict=True))
    return top, left


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
        photo = _photo(self.split)
        top, left = _corner(keys.uniform(self.key(index), 2), photo, self.size)
        return self.tile(top, left)

    def tile(self, top: int, left: int) -> Item:
        """The tile whose upper left corner lies there, in pixels of this split's part of the photograph."""
        photo = _photo(self.split)
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


class TissueSlides(Tissue):
    """Tiles in bags that stand for slides: every second slide shows gland in a few of its tiles, the others in none.

    The class is the slide's, and all of its tiles carry it: `without` or `with`. Tile i belongs to slide i // `tiles`.

    Args:
        length: number of tiles; the last slide may be smaller.
        tiles: number of tiles of a slide.
        glands: number of tiles that show gland, in a slide that has any.
        size: side of a tile, in pixels of the photograph.
        split: `train` and `test` share no pixel.
        seed: seed of all tiles.

    Raises:
        ValueError: as for `Tissue`, or `glands` is not from 1 to `tiles`.
    """

    name = "slides of tissue"
    classes = ("without", "with")

    def __init__(self, length: int, *, tiles: int = 16, glands: int = 4, size: int = 64, split: Split = "train", seed: int = 0) -> None:
        super().__init__(length, size=size, split=split, seed=seed)
        if not 1 <= glands <= tiles:
            raise ValueError(f"TissueSlides: glands is {glands}; expected 1 to tiles, which is {tiles}")
        self.tiles, self.glands = tiles, glands

    def with_split(self, split: Split, *, length: int) -> Source:
        return TissueSlides(length, tiles=self.tiles, glands=self.glands, size=self.size, split=split, seed=self.seed)

    @property
    def groups(self) -> Sequence[str]:
        return [f"slide {index // self.tiles}" for index in range(self.length)]

    def label_of(self, index: int) -> int:
        return checked_index(index, self.length) // self.tiles % 2

    def __getitem__(self, index: int) -> Item:
        key, photo = self.key(index), _photo(self.split)
        label = self.label_of(index)
        shows_gland = label == 1 and index % self.tiles < self.glands
        corners = [_corner(draws, photo, self.size) for draws in keys.uniform(key, 2 * _TRIES).view(_TRIES, 2)]
        shares = [float(photo.brown[top : top + self.size, left : left + self.size].mean()) for top, left in corners]
        # The first that fits, and where none does the one with the most or the least gland.
        fits = [share > _LEAST_GLAND if shows_gland else share < _MOST_STROMA for share in shares]
        best = fits.index(True) if any(fits) else int(np.argmax(shares) if shows_gland else np.argmin(shares))
        return self.tile(*corners[best])._replace(label=label)
