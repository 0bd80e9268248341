"""Parsers, which give the region map of a face: label maps of the user, a template, and the package FACER.

Left out: parsers whose weights no package downloads. The maintained packages with landmarks come without weights, so none is used here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.data.sources.images.decoding import existing_folder
from glpretrain.data.sources.images.face_regions import Box, find_map, read_map, resized_map, table_of, template_map


class FaceParser(ABC):
    """Assigns every pixel of a face to a region."""

    @abstractmethod
    def parse(self, image: Tensor, *, name: Path, crop: Box, face: Box) -> Tensor:
        """Region ids of a part of an image.

        Args:
            image: UInt8[3 H W], the whole image.
            name: path of the image, relative to the folder of images.
            crop: the part of the image that is parsed.
            face: box of the face in the whole image.

        Returns:
            Int[crop.height crop.width], index into `FACE_REGIONS`.

        Raises:
            ValueError: there is no region map for this image.
        """


class MapParser(FaceParser):
    """Reads existing label maps, one per image, with the same relative path.

    Args:
        folder: folder of the maps.
        table: meaning of their labels: a name in `face_regions.TABLES`, or label to region id.

    Raises:
        ValueError: the folder or the table does not exist.
    """

    def __init__(self, folder: str | Path, *, table: str | Mapping[int, int] = "lapa") -> None:
        self.folder = existing_folder(folder, "maps")
        self.table = table_of(table)

    def parse(self, image: Tensor, *, name: Path, crop: Box, face: Box) -> Tensor:
        """As `FaceParser`."""
        _, height, width = image.shape
        return crop.of(read_map(find_map(self.folder, name), table=self.table, size=(height, width)))


class TemplateParser(FaceParser):
    """The same ellipses in every face box, for upright frontal faces; see `template_map`. It needs no files."""

    def parse(self, image: Tensor, *, name: Path, crop: Box, face: Box) -> Tensor:
        """As `FaceParser`."""
        return template_map(crop=crop, face=face)


class FacerParser(FaceParser):
    """The parser of FSFM: the package FACER (`pip install pyfacer`), which downloads its own weights (retinaface/mobilenet for detection,
    farl/lapa/448 for parsing).

    Args:
        threshold: least score of a detected face.
        device: device on which the networks run.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, *, threshold: float = 0.3, device: str = "cpu") -> None:
        if find_spec("facer") is None:
            raise ValueError(
                "parser: facer given, but the package is not installed (pip install pyfacer); accepted without it: template, maps"
            )
        import facer  # pyright: ignore[reportMissingImports]  # not a dependency of ours

        self.device, self.threshold = device, threshold
        self._detector = facer.face_detector("retinaface/mobilenet", device=device, threshold=threshold)
        self._parser = facer.face_parser("farl/lapa/448", device=device)

    def __reduce__(self) -> tuple[Callable[..., "FacerParser"], tuple[float, str]]:
        return _facer, (self.threshold, self.device)  # the networks are large, and a process loads them once

    def parse(self, image: Tensor, *, name: Path, crop: Box, face: Box) -> Tensor:
        """As `FaceParser`. The networks see only the crop, and the face with the best score is parsed."""
        part = crop.of(image).unsqueeze(0).to(self.device)
        with torch.inference_mode():
            found = self._detector(part)
            if len(found["rects"]) == 0:
                raise UnreadableItemError(f"{name}: the parser finds no face in the crop")
            best = int(found["scores"].argmax())
            chosen = {key: value[best : best + 1] for key, value in found.items() if isinstance(value, Tensor)}
            labels = self._parser(part, chosen)["seg"]["logits"].argmax(dim=1)[0]
        return resized_map(labels.cpu(), size=(crop.height, crop.width))


@cache
def _facer(threshold: float, device: str) -> FacerParser:
    """The parser of this process."""
    return FacerParser(threshold=threshold, device=device)
