"""Faces with region maps as sources: a folder, and the few faces that scikit-image's wheel brings with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from skimage.data import lfw_subset
from torch import Tensor
from torchvision.transforms import functional

from glpretrain.data.sources.base import Item, Source, checked_index
from glpretrain.data.sources.face_regions import Box, find_map, read_map, table_of, template_map
from glpretrain.data.sources.images import ImageFolder, existing_folder
from glpretrain.masking import FACE_REGIONS


class Faces(Source):
    """A folder of faces: `images/` beside `regions/`, with equal paths but for the ending. `glpretrain faces` writes such folders.

    Inside `images/` class folders, videos and `train/` beside `val/` mean what they mean to `ImageFolder`.

    Args:
        root: the folder that holds the two.
        channels: of every image.
        split: part of a divided folder, as in `ImageFolder`.
        regions: name of the folder of maps (.png or .npy).
        table: labels of the maps, a name in `regions.TABLES` or label to region id.

    Raises:
        ValueError: a folder is missing, there is no image, or an image has no map.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        channels: int = 3,
        split: Literal["all", "train", "val"] | None = None,
        regions: str = "regions",
        table: str | dict[int, int] = "lapa",
    ) -> None:
        self.root = existing_folder(root, "Faces")
        self._table: Mapping[int, int] = table_of(table)
        images, maps = existing_folder(self.root / "images", "Faces"), existing_folder(self.root / regions, "Faces")
        self._images = ImageFolder(images, channels=channels, split=split)
        self._maps = [find_map(maps, path.relative_to(images)) for path in self._images.paths]

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def classes(self) -> Sequence[str]:
        return self._images.classes

    @property
    def groups(self) -> Sequence[str]:
        return self._images.groups

    @property
    def has_regions(self) -> bool:
        return True

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a folder of images with region maps, as `glpretrain faces` writes it."""
        return all((path / name).is_dir() for name in ("images", "regions"))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Item:
        item = self._images[index]
        return item._replace(regions=read_map(self._maps[index], table=self._table, size=tuple(item.image.shape[1:])))

    def train_test_split(self) -> tuple[Source, Source] | None:
        return self._images.train_test_split()


_NUM_FACES = 100  # the first half of the file are faces, the second are not
_NUM_TRAIN = 80
# Where the cascade's box would be in these crops: eyes at 0.34 of the height and mouth at 0.72, eyes at 0.26 and 0.61 of the width.
_TOP, _LEFT, _HEIGHT, _WIDTH = 0.013, -0.003, 0.884, 0.875


class LFWSubset(Source):
    """The 200 grey crops of 25 x 25 pixels that scikit-image ships (Labeled Faces in the Wild), and the template's region map on each.

    Half of them are faces, the other half other parts of the pictures. To train on: 80 faces, over and over up to `length`. To score:
    face or not, on 160 crops to fit and 40 that nothing was trained on.

    Args:
        length: items; more than 80 come again, with another dataset index and so in another view.
        size: side that crops are enlarged to, as RGB.
        split: `faces` to train on; `train` and `test` have both classes.

    Raises:
        ValueError: `length` or `size` is too small, or there is no such split.
    """

    def __init__(self, length: int | None = None, *, size: int = 48, split: Literal["faces", "train", "test"] = "faces") -> None:
        held_out = range(_NUM_TRAIN, _NUM_FACES)
        crops = {
            "faces": [*range(_NUM_TRAIN)],
            "train": [*range(_NUM_TRAIN), *range(_NUM_FACES, _NUM_FACES + _NUM_TRAIN)],
            "test": [*held_out, *range(_NUM_FACES + _NUM_TRAIN, 2 * _NUM_FACES)],
        }
        if split not in crops:
            raise ValueError(f"LFWSubset: split is {split!r}; expected {', '.join(crops)}")
        if size < 16 or (length is not None and length < 1):
            raise ValueError(f"LFWSubset: size {size} and length {length}; expected at least 16 pixels and 1 item")
        self.size, self.split = size, split
        self._crops = crops[split]
        self._length = len(self._crops) if length is None else length
        self._pixels = _crops()

    @property
    def name(self) -> str:
        return "lfw_subset"

    @property
    def classes(self) -> Sequence[str]:
        return ("face", "other")

    @property
    def has_regions(self) -> bool:
        return True

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        crop = self._crops[checked_index(index, len(self)) % len(self._crops)]
        image = _enlarged(self._pixels[crop], size=self.size)
        return Item(image=image, label=int(crop >= _NUM_FACES), instances=None, regions=_template(image))

    def train_test_split(self) -> tuple[Source, Source]:
        return LFWSubset(size=self.size, split="train"), LFWSubset(size=self.size, split="test")


class FaceSwaps(Source):
    """Forgeries made of the faces of `LFWSubset`: real ones, and ones whose inner face is another's, as bright as what it covers.

    What a detector of forgeries can be tried on with nothing to download. Small and few: a number of it says little about deepfakes.

    Args:
        size: side that crops are enlarged to, as RGB.
        split: `train` are 80 faces, `test` 20 others, each once real and once as the ground of a forgery.
        frames: of each face, every one moved a little; together they are a video (`groups`).

    Raises:
        ValueError: `size` or `frames` is too small, or there is no such split.
    """

    def __init__(self, *, size: int = 48, split: Literal["train", "test"] = "train", frames: int = 1) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"FaceSwaps: split is {split!r}; expected 'train' or 'test'")
        if size < 16 or frames < 1:
            raise ValueError(f"FaceSwaps: size {size} and frames {frames}; expected at least 16 pixels and 1 frame")
        self.size, self.split, self.frames = size, split, frames
        self._faces = range(_NUM_TRAIN) if split == "train" else range(_NUM_TRAIN, _NUM_FACES)
        self._pixels = _crops()

    @property
    def name(self) -> str:
        return "face_swaps"

    @property
    def classes(self) -> Sequence[str]:
        return ("real", "fake")

    @property
    def groups(self) -> Sequence[str]:
        return [f"{index // self.frames}" for index in range(len(self))] if self.frames > 1 else ()

    def __len__(self) -> int:
        return 2 * len(self._faces) * self.frames

    def __getitem__(self, index: int) -> Item:
        number, frame = divmod(checked_index(index, len(self)), self.frames)
        place, label = divmod(number, 2)
        face = self._pixels[self._faces[place]].float()
        if label:
            donor = self._pixels[self._faces[(place + 7) % len(self._faces)]].float()
            regions = _template(face.expand(3, -1, -1))
            inner = (regions >= FACE_REGIONS.index("right_brow")) & (regions <= FACE_REGIONS.index("lower_lip"))
            rows, columns = (inner.any(dim=axis).nonzero() for axis in (1, 0))
            inside = torch.zeros_like(inner)
            inside[int(rows.min()) : int(rows.max()) + 1, int(columns.min()) : int(columns.max()) + 1] = True
            face = torch.where(inside, donor - donor[inside].mean() + face[inside].mean(), face)
        moved = face.roll((frame % 3, frame // 3 % 3), dims=(0, 1)).clamp(0, 255).round().to(torch.uint8)
        return Item(image=_enlarged(moved, size=self.size), label=label, instances=None, regions=None)


def _crops() -> Tensor:
    """UInt8[200 25 25]."""
    return (torch.from_numpy(lfw_subset()) * 255.0).round().to(torch.uint8)


def _enlarged(crop: Tensor, *, size: int) -> Tensor:
    """UInt8[h w] to UInt8[3 size size]."""
    bicubic = functional.InterpolationMode.BICUBIC
    return functional.resize(crop.unsqueeze(0), [size, size], interpolation=bicubic, antialias=True).expand(3, -1, -1).contiguous()


def _template(image: Tensor) -> Tensor:
    """Int[S S], the regions of a crop UInt8[3 S S]."""
    size = image.shape[1]
    box = Box(*(round(part * size) for part in (_TOP, _LEFT, _HEIGHT, _WIDTH)))
    return template_map(crop=Box(0, 0, size, size), face=box)
