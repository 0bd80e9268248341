"""Paths of millions of files in arrays.

Worker processes share arrays, but each of them would copy a list as it reads it, since Python writes the number of references into every
object. How files are found is left out (`core.listing`), and so is how a listing is kept on disk (`saved_listings`).
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np

from glpretrain.core.arrays import map_arrays
from glpretrain.core.listing import natural_key

_TOGETHER = 4096  # texts that are encoded at once
_SEARCHED = 1 << 24  # bytes that are searched at once


class Texts:
    """Strings as one array of bytes.

    Args:
        data: UInt8[S], all strings in UTF-8, one behind another.
        ends: Int[N], where each of them ends.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.bytes, self.ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """The strings that are given."""
        packed, rest = Packed(), iter(texts)
        while together := list(islice(rest, _TOGETHER)):
            packed.extend(together)
        return packed.texts()

    @classmethod
    def joined(cls, parts: Sequence["Texts"]) -> "Texts":
        """The strings of several, one behind another."""
        starts = np.cumsum([0, *(len(part.bytes) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(np.concatenate([part.bytes for part in parts]), np.concatenate(ends))

    @classmethod
    def part_of(cls, arrays: Mapping[str, np.ndarray], name: str) -> "Texts":
        """The strings that `arrays` has made."""
        return cls(arrays[f"{name}.bytes"], arrays[f"{name}.ends"])

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays by names that begin with this one."""
        return {f"{name}.bytes": self.bytes, f"{name}.ends": self.ends}

    def at(self, places: np.ndarray) -> "Texts":
        """Those strings that Bool[N] says, or those at the places Int[M], in this order."""
        lengths = np.diff(self.ends, prepend=0)
        if places.dtype == np.bool_:
            return Texts(self.bytes[np.repeat(places, lengths)], np.cumsum(lengths[places]))
        starts, ends = self.ends[places] - lengths[places], np.cumsum(lengths[places], dtype=np.int64)
        data = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
        for first in range(0, len(places), _TOGETHER):  # or the places of all bytes would take eight times the memory of the bytes
            here = slice(first, first + _TOGETHER)
            own = lengths[places[here]]
            shifts = np.repeat(starts[here] - (ends[here] - own), own)
            begin, end = int(ends[first] - own[0]), int(ends[here][-1])
            data[begin:end] = self.bytes[np.arange(begin, end) + shifts]
        return Texts(data, ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        place = range(len(self))[index]
        return self.bytes[self.ends[place - 1] if place else 0 : self.ends[place]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), _TOGETHER):
            ends = self.ends[first : first + _TOGETHER].tolist()
            data = self.bytes[start : ends[-1]].tobytes()
            for begin, end in zip([start, *ends], ends, strict=False):
                yield data[begin - start : end - start].decode("utf-8", "surrogatepass")
            start = ends[-1]


class Packed:
    """Collects strings for `Texts`, without an object for each of them."""

    def __init__(self) -> None:
        self._data, self._lengths = bytearray(), array("I")

    def extend(self, texts: Sequence[str]) -> None:
        """Add strings."""
        joined = "".join(texts)
        if joined.isascii():
            self._data += joined.encode("ascii")
            self._lengths.extend(map(len, texts))
        else:
            encoded = [text.encode("utf-8", "surrogatepass") for text in texts]  # names of files may be any bytes
            self._data += b"".join(encoded)
            self._lengths.extend(map(len, encoded))

    def texts(self) -> Texts:
        """All strings so far; nothing can be added afterwards."""
        lengths = np.frombuffer(self._lengths, dtype=np.uint32)
        return Texts(np.frombuffer(self._data, dtype=np.uint8), np.cumsum(lengths, dtype=np.int64))


class Paths(Sequence[Path]):
    """Paths of files, each as the number of its folder and its name.

    Args:
        root: folder that the paths begin with.
        runs: folders relative to `root`, each with names of files in it.
    """

    def __init__(self, root: Path, runs: Iterable[tuple[str, Sequence[str]]]) -> None:
        self.root = root
        numbers: dict[str, int] = {}
        names = Packed()
        folders, lengths = array("i"), array("q")
        for folder, inside in runs:
            folders.append(numbers.setdefault(folder, len(numbers)))
            lengths.append(len(inside))
            names.extend(inside)
        self._folders, self._names = Texts.of(numbers), names.texts()
        self._folder_of = np.repeat(np.array(folders, dtype=np.int32), np.array(lengths, dtype=np.int64))
        self._file: tuple[Path, str] | None = None  # what names and numbers of folders are mapped from, and what they are called there

    @classmethod
    def of(cls, root: Path, names: Iterable[str | Path]) -> "Paths":
        """Paths that are given one by one, relative to `root` or absolute."""
        numbers: dict[str, int] = {}
        files, folder_of, rest = Packed(), array("i"), iter(names)
        while together := [_split(str(name)) for name in islice(rest, _TOGETHER)]:
            folder_of.extend([numbers.setdefault(folder, len(numbers)) for folder, _ in together])
            files.extend([file for _, file in together])
        of_file = np.frombuffer(folder_of, dtype=np.int32)
        return cls.of_arrays(root, folders=Texts.of(numbers), names=files.texts(), folder_of=of_file)

    @classmethod
    def of_arrays(cls, root: Path, *, folders: Texts, names: Texts, folder_of: np.ndarray, file: tuple[Path, str] | None = None) -> "Paths":
        """Paths whose arrays are there already.

        Args:
            root: folder that the paths begin with.
            folders: each folder once, relative to `root`, in the order in which they come first.
            names: name of each file.
            folder_of: Int[N], number of the folder of each file.
            file: file that `names` and `folder_of` are mapped from, if they are, and what the names of its arrays begin with.
        """
        paths = cls(root, ())
        paths._folders, paths._names, paths._folder_of, paths._file = folders, names, folder_of, file
        return paths

    @classmethod
    def mapped(cls, root: Path, file: Path) -> "tuple[Paths, dict[str, np.ndarray], dict[str, str]]":
        """Paths of a file of arrays, and all that is in it. Raises what `map_arrays` raises."""
        arrays, facts = map_arrays(file)
        try:
            return cls.part_of(root, arrays, file=file), arrays, facts
        except KeyError as error:
            raise ValueError(f"{file}: it has no array {error}") from error

    @classmethod
    def part_of(cls, root: Path, arrays: Mapping[str, np.ndarray], name: str = "", *, file: Path | None = None) -> "Paths":
        """The paths that `arrays` has made, from the file, if they are mapped."""
        folders, names = Texts.part_of(arrays, f"{name}folders"), Texts.part_of(arrays, f"{name}names")
        place = None if file is None else (file, name)
        return cls.of_arrays(root, folders=folders, names=names, folder_of=arrays[f"{name}folder_of"], file=place)

    def arrays(self, name: str = "") -> dict[str, np.ndarray]:
        """The arrays by names that begin with this one."""
        texts = self._folders.arrays(f"{name}folders") | self._names.arrays(f"{name}names")
        return {**texts, f"{name}folder_of": self._folder_of}

    def __reduce__(self) -> tuple[Callable[..., "Paths"], tuple[object, ...]]:
        """Another process gets the name of the file that the arrays are mapped from, in place of a copy of them."""
        if self._file is not None:
            return _mapped_again, (self.root, self._folders, *self._file)
        return _made_again, (self.root, self._folders, self._names, self._folder_of)

    @property
    def file(self) -> Path | None:
        """The file that they are mapped from; None where they are not."""
        return None if self._file is None else self._file[0]

    @property
    def folders(self) -> Texts:
        """Each folder once, relative to `root`, in the order in which they come first."""
        return self._folders

    @property
    def folder_of(self) -> np.ndarray:
        """Int[N]: number of the folder of each file."""
        return self._folder_of

    @property
    def names(self) -> Texts:
        """Name of each file."""
        return self._names

    def with_root(self, root: Path) -> "Paths":
        """The same paths relative to another folder."""
        return Paths.of_arrays(root, folders=self._folders, names=self._names, folder_of=self._folder_of, file=self._file)

    def below(self, root: Path, folder: str) -> "Paths":
        """The same paths relative to a folder above, `folder` being their own relative to it."""
        folders = Texts.of(os.path.join(folder, inner) if inner else folder for inner in self._folders)
        return Paths.of_arrays(root, folders=folders, names=self._names, folder_of=self._folder_of, file=self._file)

    def directly_in(self, folder: str) -> np.ndarray:
        """Int[M]: places of the files that lie in this folder and in none below it."""
        number = next((number for number, name in enumerate(self._folders) if name == folder), -1)
        return np.flatnonzero(self._folder_of == number)

    def without(self, folder: str) -> "Paths":
        """The paths without those directly in this folder."""
        kept = np.ones(len(self), dtype=bool)
        kept[self.directly_in(folder)] = False
        return self.at(kept)

    def at(self, places: np.ndarray) -> "Paths":
        """Those paths that Bool[N] says, or those at the places Int[M], in this order."""
        used, first, folder_of = np.unique(self._folder_of[places], return_index=True, return_inverse=True)
        order = np.argsort(first)  # a folder has the number in which it comes first
        numbers = np.empty(len(used), dtype=np.int32)
        numbers[order] = np.arange(len(used), dtype=np.int32)
        folders = Texts.of(self._folders[number] for number in used[order].tolist())
        return Paths.of_arrays(self.root, folders=folders, names=self._names.at(places), folder_of=numbers[folder_of])

    def naturally(self) -> "Paths":
        """The paths, which are in the order of a walk, in that of the numbers in their names: 2 comes before 10."""
        folders = [f"{folder}/" if folder else "" for folder in self._folders]
        keys = [natural_key(folders[number] + name) for number, name in zip(self._folder_of.tolist(), self._names, strict=True)]
        return self.at(np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64))

    def places_by_folder(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each folder, and Int[M], the places of the files that lie in it."""
        order = np.argsort(self._folder_of, kind="stable")
        start = 0
        for folder, count in zip(self._folders, np.bincount(self._folder_of, minlength=len(self._folders)).tolist(), strict=True):
            yield folder, order[start : start + count]
            start += count

    @classmethod
    def joined(cls, parts: Sequence["Paths"]) -> "Paths":
        """The paths of several with one root, whose folders differ."""
        if len(parts) == 1:
            return parts[0]
        firsts = np.cumsum([0, *(len(part.folders) for part in parts)], dtype=np.int32)
        folder_of = np.concatenate([part.folder_of + first for part, first in zip(parts, firsts, strict=False)])
        folders, names = Texts.joined([part.folders for part in parts]), Texts.joined([part.names for part in parts])
        return cls.of_arrays(parts[0].root, folders=folders, names=names, folder_of=folder_of)

    def __len__(self) -> int:
        return len(self._folder_of)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        return Path(self.root, *self.parts(index))

    def parts(self, index: int) -> tuple[str, str]:
        """Folder relative to `root`, and name."""
        place = range(len(self))[index]
        return self._folders[self._folder_of[place]], self._names[place]

    def name_holds(self, text: str) -> bool:
        """Whether a name may hold a text; it is only where this is so that names have to be looked at."""
        data, searched = self._names.bytes, text.encode()
        starts = range(0, len(data), _SEARCHED)
        return any(searched in data[start : start + _SEARCHED + len(searched)].tobytes() for start in starts)

    def digest(self) -> str:
        """SHA-256 of all paths relative to `root`, in order."""
        digest = hashlib.sha256()
        for part in (self._folder_of, self._folders.ends, self._folders.bytes, self._names.ends, self._names.bytes):
            digest.update(part.data)
        return digest.hexdigest()


def _split(path: str) -> tuple[str, str]:
    """What `os.path.split` gives, in a fifth of the time where nothing is odd about the path."""
    folder, _, file = path.rpartition("/")
    return (folder, file) if folder and folder[-1] != "/" else os.path.split(path)


def _made_again(root: Path, folders: Texts, names: Texts, folder_of: np.ndarray) -> Paths:
    return Paths.of_arrays(root, folders=folders, names=names, folder_of=folder_of)


def _mapped_again(root: Path, folders: Texts, file: Path, name: str) -> Paths:
    arrays, _ = map_arrays(file)
    paths = Paths.part_of(root, arrays, name)
    return Paths.of_arrays(root, folders=folders, names=paths.names, folder_of=paths.folder_of, file=(file, name))
