"""Videos with a mask per object: folders in the layout of DAVIS or one folder per sequence, and `Scenes` whose objects move.

A video is decoded when asked for. Left out on purpose: resizing, and what is done with the masks (`glpretrain.evaluate`).
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.data.sources.base import UnreadableItemError, checked_index
from glpretrain.data.sources.images import decode, decode_mask, existing_folder, find_images
from glpretrain.data.sources.scenes import MAX_OBJECTS, NUM_DRAWS, Pose, object_count, render
from glpretrain.data.sources.synthetic import item_key

IGNORED, UNKNOWN = -1, -2  # in masks: a pixel that is neither ground nor object, and every pixel of a frame without a mask
_OFFICIAL_LIST = Path("ImageSets", "2017", "val.txt")
_RESOLUTION = "480p"


class Video(NamedTuple):
    """One decoded sequence at its own size."""

    name: str
    frames: Tensor  # UInt8[T C H W]
    masks: Tensor  # Int[T H W]  0 ground, 1.. objects, the same in every frame, or IGNORED, UNKNOWN


class VideoSource(ABC):
    """A map from index to video. A subclass gives `_decoded`."""

    def __init__(self) -> None:
        self._digests: dict[int, str] = {}

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _decoded(self, index: int) -> Video:
        """The video of an index in range."""

    def __getitem__(self, index: int) -> Video:
        """Decode one video.

        Raises:
            UnreadableItemError: a file cannot be decoded, or frames and masks differ in size.
            IndexError: `index` is outside range(len(self)).
        """
        video = self._decoded(checked_index(index, len(self)))
        if index not in self._digests:
            digest = hashlib.sha256(f"{video.name} {tuple(video.frames.shape)}".encode())
            for tensor in (video.frames, video.masks):
                digest.update(np.ascontiguousarray(tensor.numpy()))
            self._digests[index] = digest.hexdigest()
        return video

    def fingerprint(self) -> str:
        """SHA-256 of all videos: names, pixels and masks, in order."""
        for index in range(len(self)):
            if index not in self._digests:
                self[index]
        return hashlib.sha256("".join(self._digests[index] for index in range(len(self))).encode()).hexdigest()


class _Files(NamedTuple):
    name: str
    frames: list[Path]
    masks: list[Path | None]  # as many


class VideoFolder(VideoSource):
    """Sequences of image files: `JPEGImages/<sequence>/` beside `Annotations/<sequence>/` (DAVIS, with or without its level
    `480p/`), or `<sequence>/frames/` beside `<sequence>/masks/`.

    A mask is a palette or grey PNG with the ids of the objects, 0 being the ground, and has its frame's name but for the ending.
    The first frame must have one; frames without are not scored.

    Args:
        root: the folder.
        sequences: names of those that are used, in this order, or a text file below `root` with a name per line. None for the
            official list, `ImageSets/2017/val.txt`, where the folder has it, and all sequences otherwise.
        max_frames: only so many first frames of each; None for all.
        channels: of every frame.
        ignore: mask value that is neither ground nor object.

    Raises:
        ValueError: neither layout is there, a sequence is missing or has no frame, a first frame has no mask, or a mask no frame.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        sequences: Sequence[str] | str | None = None,
        max_frames: int | None = None,
        channels: int = 3,
        ignore: int | None = None,
    ) -> None:
        super().__init__()
        self.root = existing_folder(root, "VideoFolder")
        if max_frames is not None and max_frames < 1:
            raise ValueError(f"VideoFolder: max_frames is {max_frames}; accepted: a positive number, or None for all")
        self.channels, self.ignore = channels, ignore
        folders = self._folders()
        names = self._listed(sequences, sorted(folders))
        if unknown := [name for name in names if name not in folders]:
            raise ValueError(f"VideoFolder: {self.root} has no sequences {unknown}; it has {sorted(folders)}")
        self._files = [_matched(name, *folders[name], max_frames=max_frames) for name in names]

    def _folders(self) -> dict[str, tuple[Path, Path]]:
        """Name to the folders of frames and masks."""
        frames, masks = self.root / "JPEGImages", self.root / "Annotations"
        if frames.is_dir() and masks.is_dir():
            if (frames / _RESOLUTION).is_dir():
                frames, masks = frames / _RESOLUTION, masks / _RESOLUTION
            found = {folder.name: (folder, masks / folder.name) for folder in _subfolders(frames)}
        else:
            own = {folder.name: (folder / "frames", folder / "masks") for folder in _subfolders(self.root)}
            found = {name: pair for name, pair in own.items() if pair[0].is_dir() and pair[1].is_dir()}
        if not found:
            accepted = "JPEGImages/<sequence>/ beside Annotations/<sequence>/, or <sequence>/frames/ beside <sequence>/masks/"
            raise ValueError(f"VideoFolder: {self.root} holds no sequence; accepted: {accepted}")
        return found

    def _listed(self, sequences: Sequence[str] | str | None, present: list[str]) -> list[str]:
        if sequences is None:
            if not (self.root / _OFFICIAL_LIST).is_file():
                return present
            sequences = str(_OFFICIAL_LIST)
        if isinstance(sequences, str):
            path = self.root / sequences
            if not path.is_file():
                raise ValueError(
                    f"VideoFolder: sequences {sequences!r} is no file in {self.root}; accepted: a list of names, or a text file"
                )
            sequences = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not sequences:
            raise ValueError(f"VideoFolder: sequences names none; {self.root} has {present}")
        return list(sequences)

    @property
    def name(self) -> str:
        return self.root.resolve().name

    def __len__(self) -> int:
        return len(self._files)

    def _decoded(self, index: int) -> Video:
        name, frame_files, mask_files = self._files[index]
        frames = [decode(path, channels=self.channels) for path in frame_files]
        for path, frame in zip(frame_files, frames, strict=True):
            if frame.shape != frames[0].shape:
                raise UnreadableItemError(f"{path}: shape {tuple(frame.shape)}, the first frame has {tuple(frames[0].shape)}")
        size = frames[0].shape[1:]
        masks = [torch.full(size, UNKNOWN, dtype=torch.int32) if path is None else self._mask(path, size) for path in mask_files]
        return Video(name, torch.stack(frames), torch.stack(masks))

    def _mask(self, path: Path, size: Sequence[int]) -> Tensor:
        values = decode_mask(path, size=size).int()
        return values if self.ignore is None else values.masked_fill(values == self.ignore, IGNORED)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _matched(name: str, frames: Path, masks: Path, *, max_frames: int | None) -> _Files:
    frame_files = find_images(frames)
    mask_of = {path.stem: path for path in find_images(masks)} if masks.is_dir() else {}
    if not frame_files:
        raise ValueError(f"VideoFolder: no frame in {frames}")
    if extra := sorted(mask_of.keys() - {path.stem for path in frame_files}):
        raise ValueError(f"VideoFolder: {len(extra)} masks of {name!r} have no frame, the first of them {mask_of[extra[0]]}")
    if frame_files[0].stem not in mask_of:
        raise ValueError(f"VideoFolder: the first frame of {name!r}, {frame_files[0]}, has no mask in {masks}; accepted: a PNG of its name")
    frame_files = frame_files[:max_frames]
    return _Files(name, frame_files, [mask_of.get(path.stem) for path in frame_files])


# How the objects of a scene move: per frame by at most a sixteenth of the frame's side, about a patch.
_PHASE_STEPS = 0.01, 0.025  # of a full swing from border to border and back, per frame
_TURN_STEP = 0.05  # radians per frame at most, either way
_BREATH_STEP, _BREATH = 0.02, 0.15  # of the period, per frame; how much larger and smaller an object gets
_MAIN_SIZE, _OTHER_SIZE = 0.6, 1.3  # relative to `Scenes`, so that there is room to move and the others are more than a patch
_MOTION = 1  # purpose of the key
_MOTION_DRAWS = 4


class SceneVideos(VideoSource):
    """`Scenes` whose objects swing across a ground that stays, turn and breathe. Nothing to download.

    A frame is a pure function of (seed, split, index, number of the frame). The main object passes in front of the others.

    Args:
        length: number of videos.
        frames: of each.
        size: of a frame, a side or (height, width).
        split: as in `Scenes`.
        seed: of all videos.

    Raises:
        ValueError: `length`, `frames` or `size` is too small.
    """

    def __init__(
        self,
        length: int,
        *,
        frames: int = 16,
        size: int | tuple[int, int] = 64,
        split: Literal["train", "test"] = "test",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.length, self.frames, self.split, self.seed = length, frames, split, seed
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if length < 1 or frames < 1:
            raise ValueError(f"SceneVideos: length is {length}, frames is {frames}; accepted: at least 1")
        if split not in ("train", "test"):
            raise ValueError(f"SceneVideos: split is {split!r}; accepted: 'train' or 'test'")
        if min(self.size) < 16:
            raise ValueError(f"SceneVideos: size is {size}; accepted: at least 16 pixels a side")

    @property
    def name(self) -> str:
        return "scene_videos"

    def __len__(self) -> int:
        return self.length

    def _decoded(self, index: int) -> Video:
        key = item_key(self.seed, self.split, index)
        scene, *objects = keys.uniform(key, 1 + MAX_OBJECTS, NUM_DRAWS).tolist()
        motions = keys.uniform(keys.fold_in(key, _MOTION), MAX_OBJECTS, _MOTION_DRAWS).tolist()
        count = object_count(scene)
        frames, masks = [], []
        for time in range(self.frames):
            moved = [_moved(draw, motion, time) for draw, motion in zip(objects, motions, strict=True)]
            poses = [_pose(motion, time, size=_MAIN_SIZE if number == count - 1 else _OTHER_SIZE) for number, motion in enumerate(motions)]
            pixels, ids, _ = render([scene, *moved], self.size, self.split, poses=poses)
            frames.append(torch.from_numpy(pixels).permute(2, 0, 1))  # [C H W]
            masks.append(torch.from_numpy(ids).int())
        return Video(f"{index:03d}", torch.stack(frames).contiguous(), torch.stack(masks))


def _moved(draw: list[float], motion: list[float], time: int) -> list[float]:
    """An object's draws with its place at a time; a cosine slows down before it turns back at the border."""
    slow, fast = _PHASE_STEPS
    place = [
        0.5 - 0.5 * math.cos(2 * math.pi * (start + (slow + (fast - slow) * pace) * time))
        for start, pace in zip(draw[2:4], motion[:2], strict=True)
    ]
    return [*draw[:2], *place, *draw[4:]]


def _pose(motion: list[float], time: int, *, size: float) -> Pose:
    breath = math.sin(2 * math.pi * (motion[2] + _BREATH_STEP * time))
    return Pose(scale=size * (1 + _BREATH * breath), turn=_TURN_STEP * (2 * motion[3] - 1) * time)
