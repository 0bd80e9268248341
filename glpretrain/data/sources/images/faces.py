"""Faces as sources: a folder of faces with region maps, and the few faces that scikit-image carries in its wheel."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from skimage.data import lfw_subset
from torch import Tensor
from torchvision.transforms import functional

from glpretrain.data.sources.base import Item, Source, Split, check_choice, checked_index
from glpretrain.data.sources.images.decoding import existing_folder
from glpretrain.data.sources.images.face_regions import Box, find_maps, read_map, table_of, template_map
from glpretrain.data.sources.images.folders import ImageFolder
from glpretrain.data.sources.paths import Paths
from glpretrain.masking import FACE_REGIONS


class Faces(Source):
    """A folder of faces: `images/` beside `regions/`. An image and its region map have the same relative path, except for the ending.

    `glpretrain faces` writes such folders. Class folders, videos and `train/` beside `val/` inside `images/` are read as `ImageFolder`
    reads them.

    Args:
        root: path of the folder that holds both folders.
        channels: number of channels of every image.
        split: as in `ImageFolder`.
        regions: name of the folder of region maps (.png or .npy).
        table: meaning of the labels in the maps: a name in `face_regions.TABLES`, or label to region id.

    Raises:
        ValueError: a folder is missing, there is no image, or an image has no region map.
    """

    has_regions = True
    accepts = "a folder of faces with region maps (images/ beside regions/)"

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
        self._table = table_of(table)
        images, maps = existing_folder(self.root / "images", "Faces"), existing_folder(self.root / regions, "Faces")
        self._images = ImageFolder(images, channels=channels, split=split)
        self.paths = self._images.paths
        assert isinstance(self.paths, Paths)
        self._maps = find_maps(maps, self.paths)
        self.name, self.classes = self.root.resolve().name, self._images.classes

    @property
    def groups(self) -> Sequence[str]:
        return self._images.groups

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a folder of images with region maps, as `glpretrain faces` writes it."""
        return all((path / name).is_dir() for name in ("images", "regions"))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Item:
        item = self._images[index]
        _, height, width = item.values.shape
        return item._replace(regions=read_map(self._maps[index], table=self._table, size=(height, width)))

    def _listing(self) -> tuple[object, ...]:
        return self._images.fingerprint(), self._maps.digest()

    def train_test_split(self) -> tuple[Source, Source] | None:
        return self._images.train_test_split()

    def whole(self) -> Source:
        """All images, without their region maps."""
        return self._images.whole()


_NUM_FACES = 100  # the first half of the crops are faces, the second half are not
_NUM_TRAIN = 80
# The box that the cascade detector would give for these crops: eyes at 0.34 of the height, mouth at 0.72, eyes at 0.26 and 0.61 of the
# width.
_TOP, _LEFT, _HEIGHT, _WIDTH = 0.013, -0.003, 0.884, 0.875


class LFWSubset(Source):
    """The 200 grey crops of 25 x 25 pixels that scikit-image carries (Labeled Faces in the Wild), each with the template's region map.

    Half of the crops are faces and half are other parts of the photographs. For pretraining there are 80 faces, repeated up to `length`.
    For evaluation the classes are face and other, with 160 crops to train on and 40 held-out crops.

    Args:
        length: number of items; beyond 80 the faces are repeated, with another dataset index and hence in other views.
        size: side in pixels to which the crops are enlarged, as RGB.
        split: `faces` for pretraining; `train` and `test` have both classes.

    Raises:
        ValueError: `length` or `size` is too small, or `split` is unknown.
    """

    name = "lfw_subset"
    classes = ("face", "other")
    has_regions = True

    def __init__(self, length: int | None = None, *, size: int = 48, split: Literal["faces", "train", "test"] = "faces") -> None:
        held_out = range(_NUM_TRAIN, _NUM_FACES)
        crops = {
            "faces": [*range(_NUM_TRAIN)],
            "train": [*range(_NUM_TRAIN), *range(_NUM_FACES, _NUM_FACES + _NUM_TRAIN)],
            "test": [*held_out, *range(_NUM_FACES + _NUM_TRAIN, 2 * _NUM_FACES)],
        }
        check_choice(split, tuple(crops), what="LFWSubset: split")
        if size < 16 or (length is not None and length < 1):
            raise ValueError(f"LFWSubset: size is {size} and length is {length}; expected at least 16 pixels and 1 item")
        self.size, self.split = size, split
        self._crops = crops[split]
        self._length = len(self._crops) if length is None else length
        self._pixels = _crops()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        crop = self._crops[checked_index(index, len(self)) % len(self._crops)]
        image = _enlarged(self._pixels[crop], size=self.size)
        return Item(values=image, label=int(crop >= _NUM_FACES), instances=None, regions=_template(image))

    def _listing(self) -> tuple[object, ...]:
        return self.size, self.split

    def train_test_split(self) -> tuple[Source, Source]:
        return LFWSubset(size=self.size, split="train"), LFWSubset(size=self.size, split="test")


class FaceSwaps(Source):
    """Real and forged faces from `LFWSubset`. In a forgery the inner face is that of another person, with the brightness of the original.

    They serve to try out a forgery detector without a download. They are small and few, so a score says little about deepfakes.

    Args:
        size: side in pixels to which the crops are enlarged, as RGB.
        split: `train` has 80 faces and `test` has 20 others. Each face occurs once as it is and once with another inner face.
        frames: number of frames per face, each shifted a little; the frames of a face are one video (`groups`).

    Raises:
        ValueError: `size` or `frames` is too small, or `split` is unknown.
    """

    name = "face_swaps"
    classes = ("real", "fake")

    def __init__(self, *, size: int = 48, split: Split = "train", frames: int = 1) -> None:
        check_choice(split, ("train", "test"), what="FaceSwaps: split")
        if size < 16 or frames < 1:
            raise ValueError(f"FaceSwaps: size is {size} and frames is {frames}; expected at least 16 pixels and 1 frame")
        self.size, self.split, self.frames = size, split, frames
        self._faces = range(_NUM_TRAIN) if split == "train" else range(_NUM_TRAIN, _NUM_FACES)
        self._pixels = _crops()

    @property
    def groups(self) -> Sequence[str]:
        return [f"{index // self.frames}" for index in range(len(self))] if self.frames > 1 else ()

    def _listing(self) -> tuple[object, ...]:
        return self.size, self.split, self.frames

    def train_test_split(self) -> tuple[Source, Source]:
        train, test = (FaceSwaps(size=self.size, split=split, frames=self.frames) for split in ("train", "test"))
        return train, test

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
        return Item(values=_enlarged(moved, size=self.size), label=label, instances=None, regions=None)


def _crops() -> Tensor:
    """UInt8[200 25 25]."""
    return (torch.from_numpy(lfw_subset()) * 255.0).round().to(torch.uint8)


def _enlarged(crop: Tensor, *, size: int) -> Tensor:
    """UInt8[h w] to UInt8[3 size size]."""
    bicubic = functional.InterpolationMode.BICUBIC
    return functional.resize(crop.unsqueeze(0), [size, size], interpolation=bicubic, antialias=True).expand(3, -1, -1).contiguous()


def _template(image: Tensor) -> Tensor:
    """Int[S S]: the template's region map of a crop UInt8[3 S S]."""
    size = image.shape[1]
    box = Box(*(round(part * size) for part in (_TOP, _LEFT, _HEIGHT, _WIDTH)))
    return template_map(crop=Box(0, 0, size, size), face=box)
