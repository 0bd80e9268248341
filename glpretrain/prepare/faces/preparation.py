"""From a folder of images to a folder of faces: detect, crop with a margin, resize, and write the region map, in parallel.

Faces of an earlier run are kept, and an image that cannot be used does not stop the run. Left out: alignment (FSFM's preparation has
none either), and extracting the frames of videos.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional

from glpretrain.core.files import locked, part_file, remove_parts, write_json
from glpretrain.core.node import usable_cores
from glpretrain.data.loading import Loader
from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.data.sources.images.decoding import decode, existing_folder, find_images
from glpretrain.data.sources.images.face_regions import resized_map
from glpretrain.prepare.faces.detection import FaceDetector
from glpretrain.prepare.faces.parsers import Box, FaceParser

_SETTINGS, _SKIPPED = "faces.json", "skipped.txt"


class Outcome(NamedTuple):
    """The result for one image."""

    name: Path  # relative to the folder
    reason: str  # why there is no face; empty where there is one
    was_there: bool  # whether an earlier run wrote the face


def crop_box(face: Box, *, margin: float, size: tuple[int, int]) -> Box:
    """A square with the centre of the face and `margin` times its longer side, clipped to the image (as in FaceForensics++).

    Args:
        face: box of the face.
        margin: side of the square, as a multiple of the longer side of the face.
        size: height and width of the image.
    """
    side = int(max(face.height, face.width) * margin)
    top = max(face.top + face.height // 2 - side // 2, 0)
    left = max(face.left + face.width // 2 - side // 2, 0)
    side = min(side, size[1] - left, size[0] - top)
    return Box(top, left, side, side)


class _Images(Dataset[Outcome]):
    """Reading an item writes the face of an image."""

    def __init__(self, folder: Path, out: Path, *, parser: FaceParser, detector: FaceDetector | None, size: int, margin: float) -> None:
        self.folder, self.out = folder, out
        self.parser, self.detector, self.size, self.margin = parser, detector, size, margin
        # Faces of an earlier run are no pictures to find faces in, where `out` lies in the folder.
        self.names = [path.relative_to(folder) for path in find_images(folder) if not path.parent.resolve().is_relative_to(out.resolve())]
        if not self.names:
            raise ValueError(f"faces: no image in {folder}")
        self.targets = [(out / "images" / name.with_suffix(".png"), out / "regions" / name.with_suffix(".png")) for name in self.names]
        first: dict[Path, Path] = {}
        for name, (image, _) in zip(self.names, self.targets, strict=True):
            if (other := first.setdefault(image, name)) != name:
                raise ValueError(f"faces: {other} and {name} would both become {image}; rename one of them")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Outcome:
        name, (image_path, map_path) = self.names[index], self.targets[index]
        if image_path.is_file() and map_path.is_file():
            return Outcome(name, reason="", was_there=True)
        try:
            image, regions = self._face(name)
        except ValueError as error:  # an unreadable file or a missing map; the message names it
            return Outcome(name, reason=str(error), was_there=False)
        _write(regions.to(torch.uint8), map_path)
        _write(image, image_path)  # last, so that no image is ever without its map
        return Outcome(name, reason="", was_there=False)

    def _face(self, name: Path) -> tuple[Tensor, Tensor]:
        """UInt8[3 h w] and Int[h w]."""
        image = decode(self.folder / name, channels=3)
        whole = Box(0, 0, *image.shape[1:])
        face = whole if self.detector is None else self.detector.detect(image)
        if face is None:
            raise UnreadableItemError(f"{self.folder / name}: no face found")
        crop = whole if self.detector is None else crop_box(face, margin=self.margin, size=(whole.height, whole.width))
        regions = self.parser.parse(image, name=name, crop=crop, face=face)
        scale = self.size / min(crop.height, crop.width)
        size = [round(crop.height * scale), round(crop.width * scale)]
        resized = functional.resize(crop.of(image), size, interpolation=functional.InterpolationMode.BICUBIC, antialias=True)
        return resized, resized_map(regions, size=(size[0], size[1]))


def _write(image: Tensor, path: Path) -> None:
    """Write a PNG that is either complete or absent. It is lossless, because the traces of a forgery are small."""
    with part_file(path) as part:
        Image.fromarray((image if image.dim() == 2 else image.permute(1, 2, 0)).numpy()).save(part, format="PNG")


class Preparation:
    """The preparation of a folder of images as a folder of faces.

    Args:
        folder: folder of the images, flat or nested.
        out: folder that will hold images/ and regions/ with the same relative paths; it may be the folder of an interrupted run with the
            same settings.
        parser: parser that gives the region maps.
        detector: detector that finds the faces; None means that every image as a whole is a face.
        size: side of a face in pixels; the shorter side where a whole image is not square.
        margin: side of the crop, as a multiple of the longer side of the face.
        workers: number of processes; None means one per core, at most 8; with 0, this process does the work.

    Raises:
        ValueError: there is no image, two images would get the same name, a number is out of range, `out` is where the pictures are, or it
            was written with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        out: str | Path,
        *,
        parser: FaceParser,
        detector: FaceDetector | None,
        size: int = 224,
        margin: float = 1.3,
        workers: int | None = None,
    ) -> None:
        if size < 16:
            raise ValueError(f"size: {size} given; accepted: at least 16 pixels")
        if margin < 1.0:
            raise ValueError(f"margin: {margin} given; accepted: at least 1, the face itself")
        if workers is not None and workers < 0:
            raise ValueError(f"workers: {workers} given; accepted: at least 0")
        self.out = Path(out)
        folder = existing_folder(folder, "faces")
        written = [(self.out / name).resolve() for name in ("images", "regions")]
        if self.out.resolve() == folder.resolve() or any(folder.resolve().is_relative_to(path) for path in written):
            raise ValueError(f"out: {self.out} would be written over the pictures in {folder}; give another folder")
        self._images = _Images(folder, self.out, parser=parser, detector=detector, size=size, margin=margin)
        self._workers = min(usable_cores(), 8) if workers is None else workers
        detector_name = "whole image" if detector is None else type(detector).__name__
        self._settings: dict[str, object] = {"parser": type(parser).__name__, "detector": detector_name, "size": size, "margin": margin}
        self._compare_settings()

    def _compare_settings(self) -> None:
        path, settings = self.out / _SETTINGS, self._settings
        if path.is_file() and (before := json.loads(path.read_text())) != settings:
            raise ValueError(f"out: {self.out} was written with {before}, not with {settings}; give the same settings, or a new folder")

    def __len__(self) -> int:
        return len(self._images)

    def run(self) -> Iterator[Outcome]:
        """Prepare all images and yield the result for each of them, in the order of their names. skipped.txt gets the reasons.

        Raises:
            ValueError: another process is writing to `out`, or has written it with other settings since this object was made.
        """
        with locked(self.out, argument="out"):
            self._compare_settings()
            write_json(self.out / _SETTINGS, self._settings)
            for part in ("images", "regions"):
                remove_parts(self.out / part)
            outcomes = Loader(
                self._images,
                range(len(self)),
                num_workers=min(self._workers, len(self)),
                named=lambda index: f"faces: {self._images.names[index]}",
                setting="--workers",
            )
            with (self.out / _SKIPPED).open("w", encoding="utf-8", errors="surrogateescape") as skipped:
                for outcome in outcomes:
                    if outcome.reason:
                        print(outcome.reason, file=skipped, flush=True)
                    yield outcome
