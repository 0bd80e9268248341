"""`Bands`: synthetic pictures of fields from above, in ten bands like those of Sentinel-2 with 10 and 20 metres per pixel.

Each picture is a pure function of (seed, split, index), and nothing is downloaded. A field has a land cover, whose spectrum it reflects in
a strength of its own, mixed with a little bare soil; rows, noise, the sun and haze come on top. Some land covers hardly differ in the
visible bands, and clearly in the infrared ones. The spectra have the shapes that textbooks show; they were not measured.

Left out: clouds, relief, seasons, and everything else that a real scene has.
"""

import math

import numpy as np
import torch

from glpretrain.core import keys
from glpretrain.data.sources.base import Item, Source, Split, SyntheticSource
from glpretrain.data.sources.images.scenes import height_and_width

BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")  # blue, green, red, red edge (3), infrared (2), short-wave (2)
# Reflectance in percent, in the order of the bands.
_SPECTRA: dict[str, tuple[float, ...]] = {
    "water": (6, 5, 3, 2.5, 2, 2, 1.5, 1.5, 1, 0.5),
    "needle forest": (2, 3.5, 2.5, 6, 16, 19, 20, 21, 9, 4.5),
    "leaf forest": (2.2, 4.5, 2.6, 8, 27, 34, 36, 37, 16, 7),
    "meadow": (3.5, 7, 4.5, 12, 31, 37, 39, 40, 22, 12),
    "maize": (3.4, 6.8, 4.6, 11, 27, 34, 37, 38, 17, 8),
    "ripe grain": (6, 10, 13, 18, 23, 26, 28, 31, 38, 28),
    "bare soil": (8, 11, 15, 18, 20, 22, 24, 27, 36, 30),
    "roofs": (14, 16, 18, 19, 20, 21, 22, 23, 26, 24),
}
CLASSES = tuple(_SPECTRA)
_COVERS = np.array(list(_SPECTRA.values()), dtype=np.float32) / 100  # [K 10]
_TRACK = np.array((11, 13, 15, 17, 18, 19, 20, 21, 27, 24), dtype=np.float32) / 100  # gravel between the fields
_SOIL = CLASSES.index("bare soil")
_WHITE = 0.5  # reflectance that becomes 255
_FIELDS = (4, 5, 6, 7, 8)  # numbers of fields, equally likely
_TRACK_WIDTH = 0.025  # of the shorter side
_DRAWS = 10  # random numbers of a field, and as many of the picture
_NOISE = 1  # purpose of the key
_HAZE = np.linspace(1, 0, len(BANDS), dtype=np.float32) ** 3 * 0.05  # blue light is scattered most


class Bands(SyntheticSource):
    """Four to eight fields between tracks, in ten bands. The label is the land cover of the largest field.

    Args:
        length: number of pictures.
        size: size of a picture in pixels, one number for a square or (height, width).
        split: `train` and `test` have the same land covers and no field in common.
        seed: seed of all pictures.

    Raises:
        ValueError: `length` or `size` is too small, or `split` is unknown.
    """

    name = "bands"
    classes = CLASSES
    mask_classes = ("track", *CLASSES)

    def __init__(self, length: int, *, size: int | tuple[int, int] = 64, split: Split = "train", seed: int = 0) -> None:
        super().__init__(length, split=split, seed=seed)
        self.size = height_and_width(size, owner="Bands")

    def with_split(self, split: Split, *, length: int) -> Source:
        return Bands(length, size=self.size, split=split, seed=self.seed)

    def __getitem__(self, index: int) -> Item:
        height, width = self.size
        key = self.key(index)
        picture, *fields = keys.uniform(key, 1 + max(_FIELDS), _DRAWS).numpy()
        fields = np.stack(fields[: _FIELDS[int(picture[0] * len(_FIELDS))]])  # [F 10]
        unit = min(height, width)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        owner, on_track = _fields_of(y, x, fields[:, :2] * (height, width), turn=math.pi * float(picture[1]), track=_TRACK_WIDTH * unit)
        covers = (fields[:, 2] * len(CLASSES)).astype(np.int64)  # [F]
        soil = 0.25 * fields[:, 3:4]
        spectra = (1 - soil) * _COVERS[covers] + soil * _COVERS[_SOIL]
        spectra = spectra * (0.8 + 0.4 * fields[:, 4:5])  # [F 10]
        # Rows in a direction of the field, and slow changes across it.
        angle, pitch = math.pi * fields[owner, 5], (0.04 + 0.06 * fields[owner, 6]) * unit
        along = np.cos(angle) * x + np.sin(angle) * y
        rows = 0.06 * np.sin(2 * math.pi * along / pitch) * (fields[owner, 7] > 0.4)
        slow = 0.08 * np.sin(2 * math.pi * (along / unit + fields[owner, 8]))
        noise = 0.05 * (2 * keys.uniform(keys.fold_in(key, _NOISE), height, width).numpy() - 1)
        values = np.where(on_track[..., None], _TRACK, spectra[owner]) * (1 + rows + slow + noise)[..., None]  # [H W 10]
        values = (0.85 + 0.3 * picture[2]) * values + _HAZE * picture[3]
        pixels = np.rint(np.clip(values / _WHITE, 0, 1) * 255).astype(np.uint8)
        instances = np.where(on_track, 0, owner + 1)
        largest = np.bincount(instances.ravel(), minlength=len(fields) + 1)[1:].argmax()
        return Item(
            values=torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),  # [C H W]
            label=int(covers[largest]),
            instances=torch.from_numpy(instances),
            regions=None,
            semantic=torch.from_numpy(np.where(on_track, 0, covers[owner] + 1)),
        )


def _fields_of(y: np.ndarray, x: np.ndarray, centres: np.ndarray, *, turn: float, track: float) -> tuple[np.ndarray, np.ndarray]:
    """Int[H W], the field of each pixel, and Bool[H W], which pixels are tracks.

    A pixel belongs to the nearest centre. Distances are stretched along one direction, as fields are long.

    Args:
        y: Float[H W], rows.
        x: Float[H W], columns.
        centres: Float[F 2], row and column of each centre.
        turn: that direction, as an angle.
        track: width of a track in pixels.
    """
    dy, dx = y[..., None] - centres[:, 0], x[..., None] - centres[:, 1]  # [H W F]
    along, across = math.cos(turn) * dx + math.sin(turn) * dy, math.cos(turn) * dy - math.sin(turn) * dx
    squared = along**2 + 3 * across**2
    order = np.argsort(squared, axis=-1)[..., :2]
    first, second = (np.take_along_axis(squared, order[..., place : place + 1], axis=-1)[..., 0] for place in (0, 1))
    # The line between two centres is where their squared distances are equal; their difference grows with the distance from it.
    gaps = np.linalg.norm(centres[order[..., 0]] - centres[order[..., 1]], axis=-1)
    return order[..., 0], (second - first) / np.maximum(2 * gaps, 1e-6) < track / 2
