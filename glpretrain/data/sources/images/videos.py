"""Videos with a mask per object: folders in the layout of DAVIS or one folder per sequence, and `Scenes` whose objects move.

A video is decoded on request. Left out: resizing, and the use of the masks (`glpretrain.evaluate`).
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.core.listing import say_once, subfolders
from glpretrain.data.sources.base import Split, UnreadableItemError, check_choice, checked_index, item_key
from glpretrain.data.sources.images.decoding import (
    IMAGE_RULES,
    LEAST_SAVED,
    decode,
    decode_mask,
    existing_folder,
    images_below,
    void_of,
)
from glpretrain.data.sources.images.pairs import mask_places, require_one_each, with_labels
from glpretrain.data.sources.images.scenes import MAX_OBJECTS, NUM_DRAWS, Pose, height_and_width, object_count, render
from glpretrain.data.sources.paths import Paths, Texts
from glpretrain.data.sources.saved_listings import Listing, Walked, listing_of

IGNORED, UNKNOWN = -1, -2  # values of masks: a pixel that is neither background nor object; every pixel of a frame without a mask
_OFFICIAL_LIST = Path("ImageSets", "2017", "val.txt")
_RESOLUTION = "480p"
_MASKS = "masks."  # what the names of the arrays of masks begin with


class Video(NamedTuple):
    """One decoded sequence in its own size."""

    name: str
    frames: Tensor  # UInt8[T C H W]
    masks: Tensor  # Int[T H W]  0 background, 1.. objects (an object has the same id in every frame), or IGNORED, UNKNOWN


class VideoSource(ABC):
    """A map from index to video. A subclass sets `name` and implements `_decoded`."""

    name: str  # short name for tables

    def __init__(self) -> None:
        self._digests: dict[int, str] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _decoded(self, index: int) -> Video:
        """The video at an index that is in range."""

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
                digest.update(np.ascontiguousarray(tensor.numpy()).data)
            self._digests[index] = digest.hexdigest()
        return video

    def fingerprint(self) -> str:
        """SHA-256 over the names, pixels and masks of all videos that can be read, in order."""
        for index in range(len(self)):
            if index not in self._digests:
                with suppress(UnreadableItemError):
                    self[index]
        return hashlib.sha256("".join(self._digests[index] for index in sorted(self._digests)).encode()).hexdigest()


class VideoFolder(VideoSource):
    """Sequences of image files: `JPEGImages/<sequence>/` beside `Annotations/<sequence>/` (DAVIS, with or without the folder `480p/` in
    between), or `<sequence>/frames/` beside `<sequence>/masks/`.

    A mask is a palette or grey PNG. It holds the ids of the objects, with 0 for the background, and it has the name of its frame, except
    for the ending. The first frame must have a mask; other frames without a mask are not scored.

    Args:
        root: path of the folder.
        sequences: names of the sequences to use, in this order, or the path of a text file below `root` with one name per line. None
            means the official list, `ImageSets/2017/val.txt`, where the folder has it, and all sequences otherwise.
        max_frames: number of frames at the start of each sequence that are used; None for all frames.
        channels: number of channels of every frame.
        ignore: mask value that is neither background nor object.

    Raises:
        ValueError: the folder has neither layout, a sequence is missing or has no frame, a first frame has no mask, or a mask has no
            frame.
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
        self.name = self.root.resolve().name
        if max_frames is not None and max_frames < 1:
            raise ValueError(f"VideoFolder: max_frames is {max_frames}; expected at least 1, or None for all frames")
        self.channels, self.ignore = channels, ignore
        folders = self._folders()
        names = self._listed(sequences, sorted(folders))
        if unknown := [name for name in names if name not in folders]:
            raise ValueError(f"VideoFolder: sequences has {unknown}, but {self.root} holds only {sorted(folders)}")
        below = {name: [folder.relative_to(self.root).as_posix() for folder in folders[name]] for name in names}
        pairs = {name: (frames, masks) for name, (frames, masks) in below.items()}
        rules = f"videos {max_frames} {' '.join(map(repr, pairs.items()))} {IMAGE_RULES}"
        found = listing_of(self.root, walk=partial(_videos_below, pairs=pairs, max_frames=max_frames), rules=rules, least=LEAST_SAVED)
        self._names, self._ends = Texts.of(names), found.arrays["ends"]
        self._frames, self._mask_of = found.paths, found.arrays["mask_of"]
        self._masks = Paths.part_of(self.root, found.arrays, _MASKS, file=found.paths.file)
        if found.note:
            say_once(f"{self.root}: {found.note}")

    def _folders(self) -> dict[str, tuple[Path, Path]]:
        """The folders of frames and masks of each sequence, by its name."""
        frames, masks = self.root / "JPEGImages", self.root / "Annotations"
        if frames.is_dir() and masks.is_dir():
            if (frames / _RESOLUTION).is_dir():
                frames, masks = frames / _RESOLUTION, masks / _RESOLUTION
            found = {folder.name: (folder, masks / folder.name) for folder in subfolders(frames)}
        else:
            own = {folder.name: (folder / "frames", folder / "masks") for folder in subfolders(self.root)}
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
                raise ValueError(f"VideoFolder: sequences is {sequences!r}, but {path} is not a file; accepted: names, or a text file")
            sequences = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not sequences:
            raise ValueError(f"VideoFolder: sequences is empty; {self.root} holds {present}")
        return list(sequences)

    def __len__(self) -> int:
        return len(self._names)

    def _decoded(self, index: int) -> Video:
        name, shown = self._names[index], slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        frame_files = self._frames[shown]
        mask_files = [None if place < 0 else self._masks[place] for place in self._mask_of[shown].tolist()]
        frames = [decode(path, channels=self.channels) for path in frame_files]
        for path, frame in zip(frame_files, frames, strict=True):
            if frame.shape != frames[0].shape:
                raise UnreadableItemError(f"{path}: shape {tuple(frame.shape)}, but the first frame has {tuple(frames[0].shape)}")
        size = frames[0].shape[1:]
        unknown = torch.full(size, UNKNOWN, dtype=torch.int32)
        masks = torch.stack([unknown if path is None else decode_mask(path, size=size).int() for path in mask_files])  # [T H W]
        if self.ignore is None and void_of(masks, first=1) is not None:
            say_once(f"VideoFolder: {self.root}: 255 is an object beside others (such as in {name}); ignore=255 if it marks no object")
        return Video(name, torch.stack(frames), masks if self.ignore is None else masks.masked_fill(masks == self.ignore, IGNORED))


def _videos_below(root: Path, *, pairs: Mapping[str, tuple[str, str]], max_frames: int | None) -> Walked:
    """The frames of the sequences, one behind another, their masks, and where each sequence ends.

    Args:
        root: folder of all of them.
        pairs: folders of frames and masks of each sequence, relative to `root`, by its name.
        max_frames: as for `VideoFolder`.

    Raises:
        ValueError: see `VideoFolder`.
    """
    frames, masks, mask_of, walks = list[Paths](), list[Paths](), list[np.ndarray](), dict[str, Walked]()
    num_masks = 0
    for name, (of_frames, of_masks) in pairs.items():
        here = {folder: images_below(root / folder) for folder in (of_frames, of_masks) if (root / folder).is_dir()}
        candidates = with_labels(here[of_masks].listing.paths) if of_masks in here else Paths(root / of_masks, ())
        shown, places = _matched(name, here[of_frames].listing.paths.naturally(), candidates, max_frames=max_frames)
        has_mask = places >= 0
        frames.append(shown.below(root, of_frames))
        masks.append(candidates.at(places[has_mask]).below(root, of_masks))
        mask_of.append(np.where(has_mask, num_masks + np.cumsum(has_mask) - 1, -1).astype(np.int32))
        num_masks += int(has_mask.sum())
        walks |= here
    arrays = {"mask_of": np.concatenate(mask_of), "ends": np.cumsum([len(one) for one in frames], dtype=np.int64)}
    note = "; ".join(f"{folder}: {walk.listing.note}" for folder, walk in walks.items() if walk.listing.note)
    states = [state for folder, walk in walks.items() for state in walk.states_below(folder)]
    real = {folder for walk in walks.values() for folder in walk.real}
    listing = Listing(Paths.joined(frames), note, arrays | Paths.joined(masks).arrays(_MASKS))
    return Walked(listing, states, real, all(walk.is_certain for walk in walks.values()))


def _matched(name: str, frames: Paths, masks: Paths, *, max_frames: int | None) -> tuple[Paths, np.ndarray]:
    """The frames of a sequence that are used, and Int[T], the place of the mask of each of them, -1 without one."""
    require_one_each(frames, owner="VideoFolder")
    places = mask_places(frames, masks, owner="VideoFolder")
    if not frames:
        raise ValueError(f"VideoFolder: no frame in {frames.root}")
    if len(extra := np.setdiff1d(np.arange(len(masks)), places)):
        raise ValueError(f"VideoFolder: {len(extra)} masks of {name!r} have no frame, the first of them {masks[int(extra[0])]}")
    if places[0] < 0:
        raise ValueError(f"VideoFolder: the first frame of {name!r}, {frames[0]}, needs a PNG of the same name in {masks.root}")
    return frames.at(np.arange(len(frames))[:max_frames]), places[:max_frames]


# How the objects of a scene move: by at most a sixteenth of the side of a frame per frame, which is about one patch.
_PHASE_STEPS = 0.01, 0.025  # per frame, as shares of a full swing from border to border and back
_TURN_STEP = 0.05  # largest rotation per frame in radians, in either direction
_PULSE_STEP, _PULSE = 0.02, 0.15  # share of a period per frame; how much larger and smaller an object becomes
_MAIN_SIZE, _OTHER_SIZE = 0.6, 1.3  # relative to `Scenes`: the largest object has room to move, and the others are larger than a patch
_MOTION = 1  # purpose of the key
_MOTION_DRAWS = 4


class SceneVideos(VideoSource):
    """`Scenes` whose objects swing over a fixed background, rotate, and change their size periodically. Nothing is downloaded.

    A frame is a pure function of (seed, split, index, number of the frame). The largest object passes in front of the others.

    Args:
        length: number of videos.
        frames: number of frames of each video.
        size: size of a frame in pixels, one number for a square or (height, width).
        split: as in `Scenes`.
        seed: seed of all videos.

    Raises:
        ValueError: `length`, `frames` or `size` is too small, or `split` is unknown.
    """

    name = "scene_videos"

    def __init__(self, length: int, *, frames: int = 16, size: int | tuple[int, int] = 64, split: Split = "test", seed: int = 0) -> None:
        super().__init__()
        if length < 1 or frames < 1:
            raise ValueError(f"SceneVideos: length is {length}, frames is {frames}; expected at least 1")
        check_choice(split, ("train", "test"), what="SceneVideos: split")
        self.length, self.frames, self.seed = length, frames, seed
        self.split: Split = split
        self.size = height_and_width(size, owner="SceneVideos")

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
    """The random numbers of an object with its place at a time. A cosine makes it slow down before it turns back at the border."""
    slow, fast = _PHASE_STEPS
    place = [
        0.5 - 0.5 * math.cos(2 * math.pi * (start + (slow + (fast - slow) * pace) * time))
        for start, pace in zip(draw[2:4], motion[:2], strict=True)
    ]
    return [*draw[:2], *place, *draw[4:]]


def _pose(motion: list[float], time: int, *, size: float) -> Pose:
    pulse = math.sin(2 * math.pi * (motion[2] + _PULSE_STEP * time))
    return Pose(scale=size * (1 + _PULSE * pulse), turn=_TURN_STEP * (2 * motion[3] - 1) * time)
