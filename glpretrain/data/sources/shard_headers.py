"""What the headers of tar shards say: which samples there are, where their contents (images, sounds) are, and their labels.

Nothing is kept for a sample but a few numbers and the name of its content, since there are millions of them. Left out: how a header is read
(`tar_files`), how the contents are read (`shard_items`).
"""

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from glpretrain.core.listing import State, Walk, is_leftover
from glpretrain.data.sources.base import UnreadableItemError, label_items, reason_of
from glpretrain.data.sources.kinds import FileKind
from glpretrain.data.sources.paths import Packed, Paths, Texts
from glpretrain.data.sources.saved_listings import Listing, Walked
from glpretrain.data.sources.shard_indices import indexed_contents
from glpretrain.data.sources.tar_files import Member, read_contents
from glpretrain.data.sources.unpacked import Unpacked, is_compressed

_COMPRESSED = (".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_LARGEST_LABEL = 2**24  # bytes
_NUMBER_FIRST = re.compile(r"(\d[^.]*(?:\.\d[^.]*)*)\.(.+)")
_SHOWN = 3  # names in a line
_NO_LABEL, _UNREADABLE = -1, -2


class _Shards(NamedTuple):
    files: list[Path]
    states: list[tuple[str, State]]  # of the shards and of the folders that were searched
    real: set[Path]  # folders that they lie in, without links
    is_listed: bool  # whether all folders could be listed


class _Samples:
    """The samples of all shards in their order. Those with the same keys are of one kind.

    Args:
        kind: which members are contents.
        key: key of the contents, as the source is given it.
    """

    def __init__(self, kind: FileKind, key: str | None) -> None:
        self.kind = kind
        self._wanted = None if key is None else [one.strip().lower() for one in key.split(";")]
        self.kinds: dict[tuple[str, ...], int] = {}
        self.first: list[str] = []  # of each kind: the name of its first sample, with the shard
        self.contents: list[list[str]] = []  # of each kind: the keys that may be that of the content
        self.unreadable: dict[int, tuple[int, str]] = {}  # by kind: its first sample whose label cannot be read, and why
        self.labels: dict[str, int] = {}
        # Of each sample: its kind, the number of its shard, its label, and whether its shard is damaged.
        self.kind_of, self.shard_of, self.label_of, self.is_cut = array("i"), array("i"), array("i"), array("b")
        self.places, self.names = array("q"), Packed()  # of each member that may be a content: offset and size, and name

    def add(self, name: str, members: dict[str, Member], *, shard: int, content: BinaryIO, is_cut: bool) -> None:
        """Add a sample.

        Args:
            name: name of the sample, with its shard.
            members: its members by key in lower case.
            shard: number of its shard.
            content: tar file that the members are in.
            is_cut: whether its shard is damaged.
        """
        kind = self.kinds.setdefault(tuple(members), len(self.first))
        if kind == len(self.first):
            self.first.append(name)
            self.contents.append(self._candidates(members))
        try:
            label = _label(members, content)
            self.label_of.append(_NO_LABEL if label is None else self.labels.setdefault(label, len(self.labels)))
        except UnreadableItemError as error:
            self.unreadable.setdefault(kind, (len(self.kind_of), str(error)))
            self.label_of.append(_UNREADABLE)
        for key in self.contents[kind]:
            self.places.extend((members[key].offset, members[key].size))
            self.names.extend((members[key].name,))
        self.kind_of.append(kind)
        self.shard_of.append(shard)
        self.is_cut.append(is_cut)

    def _candidates(self, keys: Collection[str]) -> list[str]:
        if self._wanted is None:
            return [key for key in keys if _is_content(key, self.kind)]
        return [key for key in self._wanted if key in keys][:1]

    def counts(self) -> list[int]:
        """Number of samples of each kind."""
        return np.bincount(np.array(self.kind_of, dtype=np.int64), minlength=len(self.first)).tolist()

    def chosen_keys(self, notes: list[str]) -> list[str | None]:
        """Key of the content of each kind, None without one; what other contents there are is added to `notes`.

        Raises:
            ValueError: it is ambiguous.
        """
        if self._wanted is not None:
            return [found[0] if found else None for found in self.contents]
        owner, item = self.kind.owner, self.kind.item
        preferred = [ending.removeprefix(".") for ending in self.kind.endings]
        chosen: list[str | None] = []
        counts, beside = self.counts(), Counter[str]()
        for found, name, count in zip(self.contents, self.first, counts, strict=True):
            best = next((key for key in preferred if key in found), None)
            if best is None and len(found) > 1:
                raise ValueError(
                    f"{owner}: sample {name} holds {len(found)} {item}s: {_first_of(found)}. The name of a sample ends at the first "
                    f"dot of the file name; rename the members if these are several samples, or give {item}_key, such as {found[0]!r}"
                )
            chosen.append(best or (found[0] if found else None))
            beside.update({key: count for key in found if key != chosen[-1]})
        if beside:
            # What lies beside a content in one sample, such as a mask beside an image, is none where it lies alone.
            alone = sum(count for key, count in zip(chosen, counts, strict=True) if key in beside)
            both = sorted({key for key in chosen if key in beside and key in preferred})
            if both:
                raise ValueError(
                    f"{owner}: {both[0]} is beside another {item} in {beside[both[0]]} samples and the only {item} in {alone}; "
                    f"give {item}_key, such as '{preferred[0]}' or '{preferred[0]};{both[0]}'"
                )
            chosen = [None if key in beside else key for key in chosen]
            notes.append(f"{sum(beside.values())} {item}s beside the one of their sample are not read: {_first_of(sorted(beside))}")
        return chosen


def read_headers(root: Path, *, kind: FileKind, key: str | None, unpacked: Unpacked) -> Walked:
    """The contents of all shards with their places and labels.

    Args:
        root: a shard, or a folder of shards.
        kind: which members are contents.
        key: key of the contents, such as `jpg`; of several, separated by `;`, the first that a sample has; None stands for all that are of
            this kind.
        unpacked: where compressed shards are unpacked.

    Raises:
        ValueError: see `shard_items.ShardItems`.
    """
    notes: list[str] = []
    shards = _shards_at(root, notes, owner=kind.owner)
    samples, is_whole = _samples_of(shards.files, _Samples(kind, key), unpacked, notes)
    keys, counts = samples.chosen_keys(notes), samples.counts()
    if num_without := sum(count for key, count in zip(keys, counts, strict=True) if key is None):
        first = samples.first[keys.index(None)]
        notes.append(f"{num_without} of {sum(counts)} samples hold no {kind.item}, the first of them {first}")
    if num_without == sum(counts):
        wanted = f"{kind.item}_key={key!r} in" if key else f"accepted endings: {' '.join(kind.endings)};"
        number_of = Counter[str]()
        for of_kind, count in zip(samples.kinds, counts, strict=True):
            number_of.update(dict.fromkeys(of_kind, count))
        found = ", ".join(key for key, _ in number_of.most_common(9))
        reasons = "; ".join([f"{wanted} the keys that were found: {found or 'none'}", *notes])
        raise ValueError(f"{kind.owner}: no {kind.item} in the {len(shards.files)} shards of {root}; {reasons}")
    listing, is_readable = _listed(samples, keys, [os.path.relpath(shard, root) for shard in shards.files], root, notes, owner=kind.owner)
    # What cannot be read today may be read tomorrow.
    return Walked(listing, shards.states, shards.real, shards.is_listed and is_whole and is_readable)


def _listed(
    samples: _Samples, keys: Sequence[str | None], shards: Sequence[str], root: Path, notes: list[str], *, owner: str
) -> tuple[Listing, bool]:
    """The samples that have a content and whose label can be read, and whether these are all that have one.

    Raises:
        ValueError: there is none, or only some of them have a class.
    """
    kind_of, label_of = np.array(samples.kind_of), np.array(samples.label_of)
    slots = np.array([-1 if key is None else found.index(key) for key, found in zip(keys, samples.contents, strict=True)])[kind_of]
    sizes = np.array([len(found) for found in samples.contents])[kind_of]
    at = np.cumsum(sizes) - sizes + slots  # places of the contents among the members
    with_content = slots >= 0
    kept = with_content & (label_of != _UNREADABLE)
    if num_unreadable := int(with_content.sum() - kept.sum()):
        _, reason = min(found for kind, found in samples.unreadable.items() if keys[kind] is not None)
        notes.append(f"{num_unreadable} samples are left out, because their label cannot be read, the first: {reason}")
    cut = kept & (label_of == _NO_LABEL) & np.array(samples.is_cut, dtype=bool)
    if cut.any() and (label_of[kept] >= 0).any():
        notes.append(f"{int(cut.sum())} samples of damaged shards are left out, because their label is missing")
        kept &= ~cut
    if not kept.any():
        raise ValueError(f"{owner}: {root}: no label can be read: {'; '.join(notes)}")
    used, folder_of = np.unique(np.array(samples.shard_of)[kept], return_inverse=True)
    chosen = np.zeros(len(samples.places) // 2, dtype=bool)
    chosen[at[kept]] = True
    paths = Paths.of_arrays(
        root,
        folders=Texts.of(shards[int(number)] for number in used),
        names=samples.names.texts().at(chosen),
        folder_of=folder_of.astype(np.int32),
    )
    classes, labels = label_items(list(samples.labels), label_of[kept], owner=f"{owner}: {root}", key=_numbers_first)
    arrays = {"places": np.array(samples.places, dtype=np.int64).reshape(-1, 2)[chosen], "labels": labels}
    return Listing(paths, "; ".join(notes), arrays | Texts.of(classes).arrays("classes")), bool((kept == with_content).all())


def is_shard(path: Path) -> bool:
    return (path.suffix.lower() == ".tar" or is_compressed(path)) and not is_leftover(path.name) and path.is_file()


def _shards_at(root: Path, notes: list[str], *, owner: str) -> _Shards:
    """The shard, or those of a folder in order; those that are compressed in a way that is not read are added to `notes`.

    Raises:
        ValueError: there is none.
    """
    if root.is_file():
        return _Shards([root], [("", State.of(root))], {Path(os.path.realpath(root)).parent}, True)
    walk = Walk(root)
    files = sorted(Path(root, folder, name) for folder, names in walk for name in names) if root.is_dir() else []
    if compressed := [str(path) for path in files if path.name.lower().endswith(_COMPRESSED)]:
        notes.append(f"{len(compressed)} compressed shards are not read; unpack them to .tar, or use .tar.gz: {_first_of(compressed)}")
    shards = [path for path in files if is_shard(path)]
    if not shards:
        raise ValueError("; ".join([f"{owner}: {root} is neither a .tar or .tar.gz file nor a folder of them", *notes]))
    for shard in shards:
        walk.remember(shard, State.of(shard))
    real = {*walk.real, *(Path(os.path.realpath(shard)).parent for shard in shards)}
    return _Shards(shards, walk.states, real, walk.is_certain)


def _numbers_first(name: str) -> tuple[bool, int, str]:
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name


def _samples_of(shards: Sequence[Path], samples: _Samples, unpacked: Unpacked, notes: list[str]) -> tuple[_Samples, bool]:
    """The samples of all shards, added to `samples`, and whether all shards are whole; what is wrong with them is added to `notes`.

    Raises:
        ValueError: no shard can be read.
    """
    faults: list[str] = []
    unreadable, num_replaced = 0, 0
    for number, shard in enumerate(shards):
        try:
            plain = unpacked.plain(shard)
            contents = (indexed_contents(shard) if plain == shard else None) or read_contents(shard, plain=plain)
        except (OSError, ValueError) as error:
            if (unreadable := unreadable + 1) == len(shards):
                raise ValueError(f"{samples.kind.owner}: {error}") from error
            faults.append(str(error))
            continue
        if contents.fault:
            faults.append(f"{shard} {contents.fault}")
        of_shard: dict[str, dict[str, Member]] = {}
        for name, member in contents.members.items():
            folder, slash, file = name.rpartition("/")
            stem, _, key = file.partition(".")  # WebDataset's rule
            members = of_shard.setdefault(folder + slash + stem, {})
            if member is not None:
                num_replaced += key.lower() in members
                members[key.lower()] = member
        num_replaced += contents.num_replaced
        with plain.open("rb") as content:
            for name, members in of_shard.items():
                for ending, part in _split_at_numbers(members, samples.kind).items():
                    samples.add(f"{shard}:{name}{ending}", part, shard=number, content=content, is_cut=bool(contents.fault))
    if faults:
        notes.append(f"{len(faults)} of {len(shards)} shards are damaged and are read as far as they are whole: {_first_of(faults)}")
    if num_replaced:
        notes.append(f"{num_replaced} members are not read, because a later member of their shard has the same name")
    return samples, not faults


def _split_at_numbers(members: dict[str, Member], kind: FileKind) -> dict[str, dict[str, Member]]:
    """The samples that the members of one name are. They are several where the name would hold several contents and each key begins with a
    number, as in `scan_2024.05.01.jpg`: no key does, so the number belongs to the name."""
    keys = [_NUMBER_FIRST.fullmatch(key) for key in members]
    if sum(_is_content(key, kind) for key in members) < 2 or None in keys:
        return {"": members}
    parts: dict[str, dict[str, Member]] = {}
    for found, member in zip(keys, members.values(), strict=True):
        assert found is not None
        parts.setdefault(f".{found[1]}", {})[found[2]] = member
    return parts


def _is_content(key: str, kind: FileKind) -> bool:
    return f".{key}".endswith(kind.endings)


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _label(members: dict[str, Member], content: BinaryIO) -> str | None:
    """The label of a sample whose members are in a tar file, None without one.

    Raises:
        UnreadableItemError: it cannot be read.
    """
    for key in ("cls", "json"):
        if (member := members.get(key)) is None:
            continue
        try:
            if member.size > _LARGEST_LABEL:
                raise ValueError(f"{member.size} bytes; accepted: at most {_LARGEST_LABEL}")
            content.seek(member.offset)
            label = _parsed(content.read(member.size), as_json=key == "json")
        except Exception as error:  # json raises RecursionError besides ValueError
            raise UnreadableItemError(f"{member}: {reason_of(error)}") from error
        if label is not None:
            return label
    return None


def _parsed(content: bytes, *, as_json: bool) -> str | None:
    values = content.decode("utf-8-sig")
    if as_json:
        values = json.loads(values)
        values = values.get("label") if isinstance(values, dict) else None
    if values is None:
        return None
    if not isinstance(values, str | int | float) or not (label := str(values).strip()).isprintable() or not label:
        raise ValueError(f"the label is {str(values)[:40]!r}; expected a number or a name")
    return label
