"""From a folder of images to a folder of faces: detect, crop with a margin, resize, and write the region map, in parallel.

Faces of an earlier run are kept, and an image that cannot be used does not stop the run. Left out: alignment (FSFM's preparation has
none either), and extracting the frames of videos.
"""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from glpretrain.core.files import locked, part_file, remove_parts, write_json
from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.data.sources.images.decoding import decode, existing_folder, find_images
from glpretrain.data.sources.images.face_regions import resized_map
from glpretrain.prepare.faces.detection import FaceDetector
from glpretrain.prepare.faces.parsers import Box, FaceParser
from glpretrain.prepare.workers import executor

_SETTINGS, _SKIPPED = "faces.json", "skipped.txt"
_TOGETHER = 8  # images of a task on a cluster, which takes half a second


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


class _Job(NamedTuple):
    """What is done to every image of a folder."""

    folder: Path
    out: Path
    parser: FaceParser
    detector: FaceDetector | None
    size: int
    margin: float

    def targets(self, name: Path) -> tuple[Path, Path]:
        """The face of an image, and its map."""
        return self.out / "images" / name.with_suffix(".png"), self.out / "regions" / name.with_suffix(".png")

    def write_face(self, name: Path) -> Outcome:
        """Write the face of an image, unless it is there."""
        image_path, map_path = self.targets(name)
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


class _Task(NamedTuple):
    job: _Job
    first: int  # number of the first of these images
    names: list[Path]

    def run(self) -> list[Outcome]:
        """Write the faces of a few images."""
        return [self.job.write_face(name) for name in self.names]


def _images_of(folder: Path, *, out: Path) -> list[Path]:
    """Paths of the images in a folder, relative to it."""
    # Faces of an earlier run are no pictures to find faces in, where `out` lies in the folder.
    names = [path.relative_to(folder) for path in find_images(folder) if not path.parent.resolve().is_relative_to(out.resolve())]
    if not names:
        raise ValueError(f"faces: no image in {folder}")
    return names


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
        workers: number of processes; None means one per core, at most 8; with 0 or 1, this process does the work.
        cluster: what runs the tasks instead, on machines that share the folders; see `glpretrain.prepare.workers.Cluster`.

    Raises:
        ImportError: `cluster` needs Dask, which is not installed.
        ValueError: there is no image, two images would get the same name, a number is out of range, `out` is where the pictures are, or it
            was written with other settings; or see `Cluster`.
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
        cluster: str | None = None,
    ) -> None:
        if size < 16:
            raise ValueError(f"size: {size} given; accepted: at least 16 pixels")
        if margin < 1.0:
            raise ValueError(f"margin: {margin} given; accepted: at least 1, the face itself")
        if workers is not None and workers < 0:
            raise ValueError(f"workers: {workers} given; accepted: at least 0")
        self.out = Path(out)
        folder = existing_folder(folder, "faces")
        if cluster is not None:  # whose workers have folders of their own to start from
            folder, self.out = folder.absolute(), self.out.absolute()
        written = [(self.out / name).resolve() for name in ("images", "regions")]
        if self.out.resolve() == folder.resolve() or any(folder.resolve().is_relative_to(path) for path in written):
            raise ValueError(f"out: {self.out} would be written over the pictures in {folder}; give another folder")
        self._job = _Job(folder, self.out, parser, detector, size, margin)
        self._names = _images_of(folder, out=self.out)
        first: dict[Path, Path] = {}
        for name in self._names:
            image, _ = self._job.targets(name)
            if (other := first.setdefault(image, name)) != name:
                raise ValueError(f"faces: {other} and {name} would both become {image}; rename one of them")
        self._workers, self._cluster = workers if cluster is not None or workers is None else max(1, workers), cluster
        detector_name = "whole image" if detector is None else type(detector).__name__
        self._settings: dict[str, object] = {"parser": type(parser).__name__, "detector": detector_name, "size": size, "margin": margin}
        self._compare_settings()

    def _compare_settings(self) -> None:
        path, settings = self.out / _SETTINGS, self._settings
        if path.is_file() and (before := json.loads(path.read_text())) != settings:
            raise ValueError(f"out: {self.out} was written with {before}, not with {settings}; give the same settings, or a new folder")

    def __len__(self) -> int:
        return len(self._names)

    def run(self) -> Iterator[Outcome]:
        """Prepare all images and yield the result for each of them, in the order of their names. skipped.txt gets the reasons.

        Raises:
            ValueError: another process is writing to `out`, or has written it with other settings since this object was made.
        """
        with locked(self.out, argument="out"):
            self._compare_settings()
            write_json(self.out / _SETTINGS, self._settings)
            self._remove_parts()
            with (self.out / _SKIPPED).open("w", encoding="utf-8", errors="surrogateescape") as skipped:
                for outcome in self._outcomes():
                    if outcome.reason:
                        print(outcome.reason, file=skipped, flush=True)
                    yield outcome
            self._remove_parts()

    def _remove_parts(self) -> None:
        """Remove what processes that died have left, in an earlier run or in this one."""
        for folder in ("images", "regions"):
            remove_parts(self.out / folder)

    def _outcomes(self) -> Iterator[Outcome]:
        """Outcomes in the order of the names; those that come too early are kept."""
        size = 1 if self._cluster is None else _TOGETHER
        ahead = deque(_Task(self._job, first, self._names[first : first + size]) for first in range(0, len(self), size))
        found: dict[int, Outcome] = {}
        given = 0
        with executor(self._workers, cluster=self._cluster, preload=[__name__]) as workers:
            while ahead and workers.has_room:
                workers.submit(ahead.popleft())
            for task, result in workers.outcomes():
                assert isinstance(task, _Task)
                for retried in self._take(task, result, found):
                    workers.submit(retried)
                while ahead and workers.has_room:
                    workers.submit(ahead.popleft())
                while given in found:
                    yield found.pop(given)
                    given += 1

    def _take(self, task: _Task, result: object, found: dict[int, Outcome]) -> list[_Task]:
        """Note what came of a task. Where it failed as a whole, its images are tried one by one, so that one of them alone is skipped."""
        if isinstance(result, OSError):  # damage is a ValueError: this concerns the disk, and all tasks would fail
            raise result
        if not isinstance(result, Exception):
            assert isinstance(result, list)
            found.update(enumerate(result, task.first))
        elif len(task.names) == 1:
            found[task.first] = Outcome(task.names[0], reason=f"{self._job.folder / task.names[0]}: {result}", was_there=False)
        else:
            return [_Task(self._job, number, [name]) for number, name in enumerate(task.names, task.first)]
        return []
