"""Image files that do not exist, any number of them: what listing, order, workers and resumption cost can be measured without a disk."""

import io
from pathlib import Path

import skimage.data
from PIL import Image

from glpretrain.core.arrays import save_arrays
from glpretrain.data.sources.base import Item, Source, checked_index
from glpretrain.data.sources.images.decoding import MOST_SIDE, decode_pil
from glpretrain.data.sources.paths import Paths

_PER_FOLDER = 500


class SimulatedFiles(Source):
    """A listing of images as of a large folder, in whose place one photograph of 512 pixels is decoded.

    Args:
        count: number of images.
        folder: folder in which the listing is saved, if it is not there, and from which it is mapped.

    Raises:
        ValueError: `count` is below 1.
    """

    name = "simulated files"

    def __init__(self, count: int, *, folder: str) -> None:
        if count < 1:
            raise ValueError(f"SimulatedFiles: count is {count}; expected at least 1")
        root, file = Path(folder), Path(folder, f"{count}.idx")
        if not file.is_file():
            firsts = range(0, count, _PER_FOLDER)
            ends = (min(first + _PER_FOLDER, count) for first in firsts)
            runs = (
                (f"n{first:010d}", [f"n{first:010d}_{number}.JPEG" for number in range(first, end)])
                for first, end in zip(firsts, ends, strict=True)
            )
            save_arrays(file, Paths(root, runs).arrays(), facts={})
        self.paths, _, _ = Paths.mapped(root, file)
        photograph = io.BytesIO()
        Image.fromarray(skimage.data.astronaut()).save(photograph, "JPEG", quality=90)
        self._photograph = photograph.getvalue()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        return self.reduced(index, side=MOST_SIDE)

    def reduced(self, index: int, *, side: int) -> Item:
        checked_index(index, len(self))
        return Item(decode_pil(io.BytesIO(self._photograph), channels=3, side=side), -1, None, None)
