"""From a face to its region map: one small interface, and what stands behind it.

Left out: parsers whose weights have to be fetched from somewhere without a package that does so. Of the packages with landmarks, those
that are kept up to date bring no weights with them, so there is none here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from glpretrain.data.base import UnreadableItemError
from glpretrain.data.faces.regions import find_map, read_map, resized_map, table_of
from glpretrain.data.images import existing_folder
from glpretrain.masking import FACE_REGIONS


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: Tensor) -> Tensor:
        """The part [... height width] of [... H W]."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


class FaceParser(ABC):
    """Says of every pixel of a face to which region it belongs."""

    @abstractmethod
    def parse(self, image: Tensor, *, name: Path, crop: Box, face: Box) -> Tensor:
        """Region ids of a part of an image.

        Args:
            image: UInt8[3 H W], the whole image.
            name: its path, relative to the folder of images.
            crop: the part that is asked for.
            face: where the face was found.

        Returns:
            Int[crop.height crop.width], index into `FACE_REGIONS`.

        Raises:
            ValueError: there is no map for this image.
        """


class MapParser(FaceParser):
    """Maps that are there already: one per image, with the same relative path.

    Args:
        folder: of the maps.
        table: their labels, a name in `regions.TABLES` or label to region id.

    Raises:
        ValueError: the folder or the table does not exist.
    """

    def __init__(self, folder: str | Path, *, table: str | Mapping[int, int] = "lapa") -> None:
        self.folder = existing_folder(folder, "maps")
        self.table = table_of(table)

    def parse(self, image: Tensor, *, name: Path, crop: Box, face: Box) -> Tensor:
        """As `FaceParser`."""
        regions = read_map(find_map(self.folder, name), table=self.table, size=tuple(image.shape[1:]))
        return crop.of(regions)


class Ellipse(NamedTuple):
    """In units of the face box: centre and half axes."""

    region: str
    x: float
    y: float
    width: float
    height: float


# The box of the cascade detector, or of an aligned face: from the middle of the forehead to the chin. Later ones lie over earlier ones.
_TEMPLATE = (
    Ellipse("hair", 0.5, 0.22, 0.62, 0.5),
    Ellipse("skin", 0.5, 0.5, 0.45, 0.62),
    Ellipse("right_brow", 0.29, 0.25, 0.15, 0.05),
    Ellipse("left_brow", 0.71, 0.25, 0.15, 0.05),
    Ellipse("right_eye", 0.3, 0.37, 0.11, 0.06),
    Ellipse("left_eye", 0.7, 0.37, 0.11, 0.06),
    Ellipse("nose", 0.5, 0.52, 0.12, 0.15),
    Ellipse("upper_lip", 0.5, 0.77, 0.2, 0.07),
    Ellipse("lower_lip", 0.5, 0.84, 0.17, 0.06),
    Ellipse("inner_mouth", 0.5, 0.8, 0.15, 0.025),
)


class TemplateParser(FaceParser):
    """The same ellipses in every face box: for upright, frontal faces. Needs nothing, and knows no expression, glasses or hair style."""

    def parse(self, image: Tensor, *, name: Path, crop: Box, face: Box) -> Tensor:
        """As `FaceParser`."""
        y = (torch.arange(crop.height) + 0.5 + crop.top - face.top) / face.height
        x = (torch.arange(crop.width) + 0.5 + crop.left - face.left) / face.width
        regions = torch.full((crop.height, crop.width), FACE_REGIONS.index("background"))
        for part in _TEMPLATE:
            inside = ((y - part.y) / part.height).square().unsqueeze(1) + ((x - part.x) / part.width).square() <= 1.0
            regions[inside] = FACE_REGIONS.index(part.region)
        return regions


class FacerParser(FaceParser):
    """The official choice: the package FACER (`pip install pyfacer`), which fetches its own weights: farl/lapa/448 behind
    retinaface/mobilenet.

    Args:
        threshold: of the detector's score.
        device: that it runs on.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, *, threshold: float = 0.3, device: str = "cpu") -> None:
        if find_spec("facer") is None:
            raise ValueError(
                "parser: facer given, but the package is not installed (pip install pyfacer); accepted without it: template, maps"
            )
        import facer

        self.device = device
        self._detector = facer.face_detector("retinaface/mobilenet", device=device, threshold=threshold)
        self._parser = facer.face_parser("farl/lapa/448", device=device)

    def parse(self, image: Tensor, *, name: Path, crop: Box, face: Box) -> Tensor:
        """As `FaceParser`; it looks at the crop only, and takes the face with the best score."""
        part = crop.of(image).unsqueeze(0).to(self.device)
        with torch.inference_mode():
            found = self._detector(part)
            if len(found["rects"]) == 0:
                raise UnreadableItemError(f"{name}: the parser finds no face in it")
            best = int(found["scores"].argmax())
            chosen = {key: value[best : best + 1] for key, value in found.items() if isinstance(value, Tensor)}
            labels = self._parser(part, chosen)["seg"]["logits"].argmax(dim=1)[0]
        return resized_map(labels.cpu(), size=(crop.height, crop.width))
