"""Folders of DICOM files as a source: single pictures, series of slices, and files of several frames.

Headers are read when a folder is listed, and the listing is kept while its files stay as they are; it holds names of files and numbers, and
no text of a header. Pixels are decoded one item at a time (`dicom_files`). Left out: masks (DICOM SEG), reports, and slides, which
`glpretrain tiles` cuts.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from glpretrain.core.listing import State, Walk, count_kinds, has_plain_ending, is_leftover, natural_key, say_once
from glpretrain.data.sources.base import Item, Source, Stored, UnreadableItemError, check_choice, checked_index
from glpretrain.data.sources.images.decoding import ENDINGS, existing_folder, pixels_of
from glpretrain.data.sources.images.dicom_files import (
    DICOM_ENDINGS,
    NEEDED,
    Grey,
    Header,
    Scale,
    begins_as_dicom,
    is_installed,
    read_header,
    read_picture,
)
from glpretrain.data.sources.images.folders import class_names, tops_of
from glpretrain.data.sources.images.layouts import by_lower_name, split_folders
from glpretrain.data.sources.paths import Paths
from glpretrain.data.sources.saved_listings import Listing, Walked, listing_of

_LEAST = 500  # files, whose headers are read in a second
_LOOKED_AT = 1000  # files and folders by which the kind of a folder is told
_ROUNDED = 3  # digits of a position in mm
_ENDINGS = frozenset(ENDINGS)


class DicomFolder(Source):
    """All pictures of the DICOM files below a folder. A frame of a file of several frames is an item.

    Series come in the order of their first files, and the slices of a series in that of their positions along the normal, whatever their
    files are called; without positions in that of their instance numbers, then of their names. Where a series has several pictures of one
    position, as over time, the first ones of all positions come first, then the second ones.

    The first-level subfolders are the classes, if there are at least two of them and every file is inside one, unless each of them holds
    one patient. Items of one patient are one group; where there is one patient (or one number for all of them), those of one study, or else
    of one series.

    Grey pictures become bytes by a window: the one that is given here, or the one of the file, or its table, or, where it has neither, from
    the least to the greatest value that the picture holds (pictures of up to 8 bits stay as they are). MONOCHROME1 is inverted, and what
    the file marks as padding is black.

    Args:
        root: path of the folder.
        channels: number of channels of every item, 1 or 3.
        stack: 1, or 3 for the slice before, the slice and the slice behind it as the three channels; at the ends of a series the slice
            itself takes the place of the missing one. All three have the window of the one in the middle.
        window: [centre, width] in the units of the files, such as [40, 400] for soft tissue in Hounsfield units.
        value_range: [low, high], the values that become black and white; another way to give a window.
        labels: `folders` or `none`; when left out, as above.

    Raises:
        ImportError: the package pydicom is not installed.
        ValueError: the folder is missing or has no picture, or a setting is none of those above.
    """

    accepts = "a folder of DICOM files"

    def __init__(
        self,
        root: str | Path,
        *,
        channels: int = 3,
        stack: int = 1,
        window: Sequence[float] | None = None,
        value_range: Sequence[float] | None = None,
        labels: Literal["folders", "none"] | None = None,
    ) -> None:
        if not is_installed():
            raise ImportError(f"DicomFolder: {NEEDED}")
        self.root = existing_folder(root, "DicomFolder")
        self.name = self.root.resolve().name
        check_choice(channels, (1, 3), what="DicomFolder: channels")
        check_choice(stack, (1, 3), what="DicomFolder: stack")
        if stack == 3 != channels:
            raise ValueError("DicomFolder: stack is 3 and channels is 1; three slices are three channels")
        self.channels, self.stack = channels, stack
        self._window = _scale_of(window, value_range)
        self.value_range = () if self._window is None else ((self._window.low, self._window.high),) * channels
        if (parts := split_folders(by_lower_name(self.root))) is not None:
            given = " and ".join(str(part) for part in parts)
            raise ValueError(f"DicomFolder: {self.root} has parts; give each of them as a source of its own: {given}")
        found = listing_of(self.root, walk=_scans_below, rules=f"dicom {' '.join(DICOM_ENDINGS)}", least=_LEAST)
        if found.note:
            say_once(f"{self.root}: {found.note}")
        self._files = found.paths
        self._file_of, self._frame_of, self._volume_of = (found.arrays[name] for name in ("file_of", "frame_of", "volume_of"))
        self._group_of = found.arrays["group_of"]
        if not len(self._file_of):
            raise ValueError(
                f"DicomFolder: no picture in {self.root}; accepted: files that end in {' '.join(DICOM_ENDINGS)}, or DICOM files"
            )
        if stack == 3 and not (grey := found.arrays["is_grey"]).all():
            first = self._files[int(np.flatnonzero(~grey)[0])]
            raise ValueError(f"DicomFolder: stack is 3, but {first} has colours; give stack=1")
        self.paths = self._files if len(self._files) == len(self._file_of) else ()
        self.classes = self._class_names(labels)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._label_of_folder = np.array([numbers.get(top, -1) for top in tops_of(self._files)], dtype=np.int32)

    def _class_names(self, labels: str | None) -> list[str]:
        if labels is not None:
            check_choice(labels, ("folders", "none"), what="DicomFolder: labels")
        names = [] if labels == "none" else class_names([self._files], self.root, owner="DicomFolder")
        if not names and labels == "folders":
            raise ValueError(f"DicomFolder: labels is 'folders', but {self.root} has no two folders that hold all files")
        if not names or labels == "folders":
            return names
        tops = np.array(tops_of(self._files))[self._files.folder_of[self._file_of]]
        patients = Counter(top for top, _ in set(zip(tops.tolist(), self._group_of.tolist(), strict=True)))
        if max(patients.values()) > 1:
            return names
        said = f"each of the {len(names)} folders in {self.root} holds one patient (or study), so they are no classes"
        say_once(f"DicomFolder: {said}; labels='folders' makes them classes")
        return []

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether more of the files in a folder are DICOM files than images, by the first thousand that are found."""
        if not path.is_dir():
            return False
        scans = images = 0
        for file in _some_files(path):
            is_scan, is_image = _is_scan(file), file.suffix.lower() in _ENDINGS
            scans, images = scans + is_scan, images + is_image
        return scans > images

    @property
    def groups(self) -> Sequence[str]:
        """A number for each patient, or else for each study or series; empty where there is only one."""
        return [str(number) for number in self._group_of.tolist()] if len(np.unique(self._group_of)) > 1 else ()

    def named(self, index: int) -> str:
        name = "/".join(part for part in self._files.parts(int(self._file_of[index])) if part)
        return name if self.paths else f"{name}[{int(self._frame_of[index])}]"

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, index: int) -> Item:
        checked_index(index, len(self))
        path = self._files[int(self._file_of[index])]
        picture = self._picture(index)
        if isinstance(picture, Grey):
            around = [self._neighbour(index, step) for step in (-1, 1)] if self.stack == 3 else []
            before, behind = (picture if there is None else there for there in around) if around else (picture, picture)
            together = [before, picture, behind]
            if len({one.values.shape for one in together}) > 1:
                raise UnreadableItemError(f"{path}: the slices before and behind it have another size")
            scale = self._window or picture.scale or _whole_range(together)
            slices = [one.bytes_of(scale) for one in (together if self.stack == 3 else together[1:2])]
            values = torch.from_numpy(np.stack(slices))
            values = values.expand(self.channels, -1, -1).permute(1, 2, 0).contiguous().permute(2, 0, 1)  # [C H W], channels last
        elif self.stack == 3:
            raise UnreadableItemError(f"{path}: has colours, but its header said that it is grey; slices of colours cannot be stacked")
        else:
            values = pixels_of(Image.fromarray(picture), channels=self.channels)
        return Item(values=values, label=self._label(index), instances=None, regions=None)

    def _picture(self, index: int) -> Grey | np.ndarray:
        return read_picture(self._files[int(self._file_of[index])], frame=int(self._frame_of[index]), window=self._window)

    def _neighbour(self, index: int, step: int) -> Grey | None:
        """The slice before or behind one; None where its series has none.

        Raises:
            UnreadableItemError: it cannot be decoded.
        """
        other = index + step
        if not 0 <= other < len(self) or self._volume_of[other] != self._volume_of[index]:
            return None
        found = self._picture(other)
        return found if isinstance(found, Grey) else None

    def _label(self, index: int) -> int:
        return int(self._label_of_folder[self._files.folder_of[self._file_of[index]]])

    def stored(self, index: int) -> Stored | None:
        if self.stack > 1:  # three files
            return None
        way = f"dicom {self.channels} {self._window} {int(self._frame_of[index])}"
        return Stored(self._files[int(self._file_of[index])], way, self._label(index))

    def _listing(self) -> tuple[object, ...]:
        labels = self._label_of_folder[self._files.folder_of[self._file_of]]
        return self._files.digest(), self._file_of, self._frame_of, self._volume_of, labels, self.channels, self.stack, self._window


def _scale_of(window: Sequence[float] | None, value_range: Sequence[float] | None) -> Scale | None:
    """The window that a user gave."""
    if window is not None and value_range is not None:
        raise ValueError("DicomFolder: window and value_range are given; accepted: one of them")
    for name, given in (("window", window), ("value_range", value_range)):
        if given is None:
            continue
        first, second = given if len(given) == 2 else (float("nan"), float("nan"))
        scale = Scale.of_window(first, second) if name == "window" else Scale(first, second)
        if not -np.inf < scale.low < scale.high < np.inf:
            expected = "[centre, width] with a width above 0" if name == "window" else "[low, high] with low below high"
            raise ValueError(f"DicomFolder: {name} is {list(given)}; expected {expected}")
        return scale
    return None


def _whole_range(slices: Sequence[Grey]) -> Scale:
    known = np.concatenate([one.values[one.known] for one in slices])
    return Scale(float(known.min()), float(known.max()))


def _is_scan(path: Path) -> bool:
    """Whether a file is meant to be a DICOM file, by its ending, or where it has none that says anything, by its beginning."""
    if path.suffix.lower() in DICOM_ENDINGS or path.name.upper() == "DICOMDIR":
        return True
    try:
        return not has_plain_ending(path) and begins_as_dicom(path)
    except OSError:
        return False


def _some_files(root: Path) -> Iterator[Path]:
    """Up to a thousand regular files below a folder, in any order."""
    waiting, files, folders = [root], 0, 0
    while waiting and files < _LOOKED_AT and folders < _LOOKED_AT:
        folders += 1
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if is_leftover(entry.name):
                        continue
                    if entry.is_file():
                        files += 1
                        yield Path(entry.path)
                        if files == _LOOKED_AT:
                            return
                    elif entry.is_dir():
                        waiting.append(Path(entry.path))
        except OSError:
            continue


def _scans_below(root: Path) -> Walked:
    """The files with pictures in the order of their series, and of each item its file, its frame, its volume and its group."""
    walk, others = Walk(root), list[tuple[Path, str]]()
    headers: dict[str, Header] = {}
    for folder, names in walk:
        for name in names:
            path = Path(root, folder, name)
            state = State.of(path)
            if not _is_scan(path):
                if not has_plain_ending(path):
                    walk.remember(path, state)
                others.append((path, path.suffix.lower() if has_plain_ending(path) else "without a known ending"))
                continue
            walk.remember(path, state)
            found = read_header(path)
            if isinstance(found, Header):
                headers[os.path.join(folder, name) if folder else name] = found
            else:
                others.append((path, found))
    volumes = list(_volumes(headers))
    files = [name for volume in volumes for name in volume]
    counts = np.array([headers[name].num_frames for name in files], dtype=np.int64)
    volume_of = np.repeat(np.arange(len(volumes)), [len(volume) for volume in volumes])
    numbers = np.array(_groups([headers[name] for name in files]), dtype=np.int32)
    arrays = {
        "file_of": np.repeat(np.arange(len(files), dtype=np.int32), counts),
        "frame_of": (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.int32),
        "volume_of": np.repeat(volume_of.astype(np.int32), counts),
        "group_of": np.repeat(numbers, counts),
        "is_grey": np.array([headers[name].is_grey for name in files], dtype=bool),
    }
    note = ""
    if others or walk.passed_over:
        left_out = count_kinds(kind for _, kind in (*others, *walk.passed_over))
        examples = {kind: path.relative_to(root) for path, kind in reversed((*others, *walk.passed_over))}  # the first of each
        note = f"{int(counts.sum())} pictures; left out: {left_out} (such as {', '.join(map(str, reversed(examples.values())))})"
    return Walked(Listing(Paths.of(root, files), note, arrays), walk.states, walk.real, walk.is_certain)


def _volumes(headers: dict[str, Header]) -> Iterator[list[str]]:
    """The files of each series, in order; a file of several frames is a volume of its own."""
    series: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, header in headers.items():
        alone = name if header.num_frames > 1 else ""
        series[(name.partition("/")[0] if "/" in name else "", *header.series, alone)].append(name)
    for names in series.values():
        positions = [headers[name].position for name in names]
        if None in positions:
            yield sorted(names, key=lambda name: (headers[name].number, natural_key(name)))
            continue
        places = {name: round(position, _ROUNDED) for name, position in zip(names, positions, strict=True) if position is not None}
        repeats: dict[str, int] = {}
        seen = Counter[float]()
        for name in sorted(names, key=lambda name: (headers[name].number, natural_key(name))):
            repeats[name] = seen[places[name]]
            seen[places[name]] += 1
        for repeat in range(max(seen.values())):
            yield sorted((name for name in names if repeats[name] == repeat), key=places.__getitem__)


def _groups(headers: Sequence[Header]) -> list[int]:
    """A number for each patient, each study where there are no two patients, or each series where there are no two studies."""
    patients, studies = [header.patient for header in headers], [header.study for header in headers]
    keys: Sequence[object] = [header.series[0] for header in headers]
    for candidates in (studies, patients):
        if len(set(candidates)) > 1:
            keys = [(candidate, "" if candidate else other) for candidate, other in zip(candidates, keys, strict=True)]
    numbers: dict[object, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]
