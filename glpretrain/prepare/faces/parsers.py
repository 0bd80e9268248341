"""From a face to its region map: one small interface, and what stands behind it.

Left out: parsers whose weights have to be fetched from somewhere without a package that does so. Of the packages with landmarks, those
that are kept up to date bring no weights with them, so there is none here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.data.sources.images.decoding import existing_folder
from glpretrain.data.sources.images.face_regions import Box, find_map, read_map, resized_map, table_of, template_map


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


class TemplateParser(FaceParser):
    """The same ellipses in every face box: for upright, frontal faces. Needs nothing, and knows no expression, glasses or hair style."""

    def parse(self, image: Tensor, *, name: Path, crop: Box, face: Box) -> Tensor:
        """As `FaceParser`."""
        return template_map(crop=crop, face=face)


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
