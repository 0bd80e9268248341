"""Tar shards in WebDataset's layout as sources.

A shard is a plain tar file. The name of a sample ends at the first dot of the file name, and what follows it is the key of the member.
Beside its image, a sample may hold `.cls` (the name or number of the class) or `.json` (with a `label`). The headers are read when the
source is constructed, and never again while the shards stay as they are (`saved_listings`); items are read at their offset, in any order.
Left out: compressed shards, and URLs.
"""

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glpretrain.core.listing import State, Walk, expanded, is_leftover, say_once
from glpretrain.data.sources.base import Item, Source, UnreadableItemError, check_choice, checked_index, label_items, reason_of
from glpretrain.data.sources.images.decoding import ENDINGS, MOST_SIDE, damage_named, decode_pil
from glpretrain.data.sources.images.tar_files import Member, read_contents, read_range
from glpretrain.data.sources.paths import Paths, Texts
from glpretrain.data.sources.saved_listings import Listing, Walked, listing_of

_IMAGE_KINDS = tuple(ending for ending in ENDINGS if ending != ".npy")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_LARGEST_LABEL = 2**24  # bytes
_NUMBER_FIRST = re.compile(r"(\d[^.]*(?:\.\d[^.]*)*)\.(.+)")
_SHOWN = 3  # names in a line
_LEAST = 10_000  # samples, whose headers are read in a second


class _Sample(NamedTuple):
    name: str  # with its shard
    members: dict[str, Member]  # by key in lower case
    fault: str  # of its shard


class _Shards(NamedTuple):
    files: list[Path]
    states: list[tuple[str, State]]  # of the shards and of the folders that were searched
    real: set[Path]  # folders that they lie in, without links
    is_listed: bool  # whether all folders could be listed


class TarShards(Source):
    """Images in tar shards.

    The image of a sample is the member whose key is an image ending: `jpg` before `jpeg` before `png`. A sample with a longer key, such as
    `rgb.jpg`, is read if it has no other image. Samples without an image or with a damaged label are left out. A damaged shard is read as
    far as it is whole. One line in the log counts what was left out.

    Args:
        root: one `.tar` file, or a folder of them.
        channels: number of channels of every item, 1 or 3.
        image_key: key of the images, such as `jpg` or `rgb.png`; of several, separated by `;`, the first that a sample has. When left out,
            as above.

    Raises:
        ValueError: there is no shard or no image in them, it is ambiguous which member is the image, or only some images have a class.
    """

    accepts = "a .tar file or a folder of them"

    def __init__(self, root: str | Path, *, channels: int = 3, image_key: str | None = None) -> None:
        self.root = expanded(root)
        self.name, self.channels = self.root.resolve().stem, channels
        check_choice(channels, (1, 3), what="TarShards: channels")
        rules = f"shards {' '.join(_IMAGE_KINDS)} {image_key} {self.root}"  # which is in the note
        found = listing_of(self.root, walk=partial(_read_headers, image_key=image_key), rules=rules, least=_LEAST)
        self._names, self._places, self._labels = found.paths, found.arrays["places"], found.arrays["labels"]
        self.classes = list(Texts.part_of(found.arrays, "classes"))
        if found.note:
            say_once(f"TarShards: {self.root}: {found.note}")

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is a tar file, or a folder with some at its top."""
        if path.is_file():
            return _is_shard(path) or tarfile.is_tarfile(path)
        return path.is_dir() and any(map(_is_shard, path.iterdir()))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Item:
        return self.reduced(index, side=MOST_SIDE)

    def reduced(self, index: int, *, side: int) -> Item:
        shard, name = self._names.parts(checked_index(index, len(self)))
        member = Member(self.root / shard, name, *self._places[index].tolist())
        with damage_named(member):
            content = read_range(member.shard, offset=member.offset, size=member.size)
            image = decode_pil(io.BytesIO(content), channels=self.channels, side=side)
        return Item(values=image, label=int(self._labels[index]), instances=None, regions=None)

    def _listing(self) -> tuple[object, ...]:
        return self._names.digest(), self._places, self._labels


def _read_headers(root: Path, *, image_key: str | None) -> Walked:
    """The images of all shards with their places and labels, by their headers.

    Raises:
        ValueError: see `TarShards`.
    """
    notes: list[str] = []
    shards, states, real, is_listed = _shards_at(root, notes)
    samples, is_whole = _samples(shards, notes)
    keys = _chosen_keys(samples, notes) if image_key is None else _given_keys(samples, image_key)
    with_image = [(sample, sample.members[key]) for sample, key in zip(samples, keys, strict=True) if key is not None]
    if without := [sample.name for sample, key in zip(samples, keys, strict=True) if key is None]:
        notes.append(f"{len(without)} of {len(samples)} samples hold no image, the first of them {without[0]}")
    if not with_image:
        wanted = f"image_key={image_key!r} in" if image_key else f"accepted endings: {' '.join(_IMAGE_KINDS)};"
        found = ", ".join(key for key, _ in Counter(key for sample in samples for key in sample.members).most_common(9))
        reasons = "; ".join([f"{wanted} the keys that were found: {found or 'none'}", *notes])
        raise ValueError(f"TarShards: no image in the {len(shards)} shards of {root}; {reasons}")
    labelled = _labelled(with_image, notes)
    if not labelled:
        raise ValueError(f"TarShards: {root}: no label can be read: {'; '.join(notes)}")
    shard_of = {shard: os.path.relpath(shard, root) for shard in shards}
    paths = Paths(root, ((shard_of[image.shard], (image.name,)) for image, _ in labelled))
    classes, labels = label_items([label for _, label in labelled], owner=f"TarShards: {root}", key=_numbers_first)
    places = np.array([(image.offset, image.size) for image, _ in labelled], dtype=np.int64)
    arrays = {"places": places, "labels": labels} | Texts.of(classes).arrays("classes")
    is_certain = is_listed and is_whole and len(labelled) == len(with_image)  # what cannot be read today may be read tomorrow
    return Walked(Listing(paths, "; ".join(notes), arrays), states, real, is_certain)


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() == ".tar" and not is_leftover(path.name) and path.is_file()


def _shards_at(root: Path, notes: list[str]) -> _Shards:
    """The shard, or those of a folder in order; compressed ones are added to `notes`.

    Raises:
        ValueError: there is none.
    """
    if root.is_file():
        return _Shards([root], [("", State.of(root))], {Path(os.path.realpath(root)).parent}, True)
    walk = Walk(root)
    files = sorted(Path(root, folder, name) for folder, names in walk for name in names) if root.is_dir() else []
    if compressed := [str(path) for path in files if path.name.lower().endswith(_COMPRESSED)]:
        notes.append(f"{len(compressed)} compressed shards are not read; unpack them to .tar: {_first_of(compressed)}")
    shards = [path for path in files if _is_shard(path)]
    if not shards:
        raise ValueError("; ".join([f"TarShards: {root} is neither a .tar file nor a folder of .tar files", *notes]))
    for shard in shards:
        walk.remember(shard, State.of(shard))
    real = {*walk.real, *(Path(os.path.realpath(shard)).parent for shard in shards)}
    return _Shards(shards, walk.states, real, walk.is_certain)


def _numbers_first(name: str) -> tuple[bool, int, str]:
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name


def _samples(shards: Sequence[Path], notes: list[str]) -> tuple[list[_Sample], bool]:
    """The samples of all shards in their order, and whether all shards are whole; what is wrong with them is added to `notes`.

    Raises:
        ValueError: no shard can be read.
    """
    samples: list[_Sample] = []
    faults: list[str] = []
    unreadable, num_replaced = 0, 0
    for shard in shards:
        try:
            contents = read_contents(shard)
        except (OSError, ValueError) as error:
            if (unreadable := unreadable + 1) == len(shards):
                raise ValueError(f"TarShards: {error}") from error
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
        for name, members in of_shard.items():
            parts = _split_at_numbers(members)
            samples += [_Sample(f"{shard}:{name}{number}", part, contents.fault) for number, part in parts.items()]
    if faults:
        notes.append(f"{len(faults)} of {len(shards)} shards are damaged and are read as far as they are whole: {_first_of(faults)}")
    if num_replaced:
        notes.append(f"{num_replaced} members are not read, because a later member of their shard has the same name")
    return samples, not faults


def _split_at_numbers(members: dict[str, Member]) -> dict[str, dict[str, Member]]:
    """The samples that the members of one name are. They are several where the name would hold several images and each key begins with a
    number, as in `scan_2024.05.01.jpg`: no key does, so the number belongs to the name."""
    keys = [_NUMBER_FIRST.fullmatch(key) for key in members]
    if sum(_is_image(key) for key in members) < 2 or None in keys:
        return {"": members}
    parts: dict[str, dict[str, Member]] = {}
    for found, member in zip(keys, members.values(), strict=True):
        assert found is not None
        parts.setdefault(f".{found[1]}", {})[found[2]] = member
    return parts


def _is_image(key: str) -> bool:
    return f".{key}".endswith(_IMAGE_KINDS)


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _given_keys(samples: Sequence[_Sample], image_key: str) -> list[str | None]:
    wanted = [key.strip().lower() for key in image_key.split(";")]
    return [next((key for key in wanted if key in sample.members), None) for sample in samples]


def _chosen_keys(samples: Sequence[_Sample], notes: list[str]) -> list[str | None]:
    """Key of the image of each sample, None without one; what other images there are is added to `notes`.

    Raises:
        ValueError: it is ambiguous.
    """
    preferred = [ending.removeprefix(".") for ending in _IMAGE_KINDS]
    chosen: list[str | None] = []
    beside: Counter[str] = Counter()
    for sample in samples:
        images = [key for key in sample.members if _is_image(key)]
        best = next((key for key in preferred if key in images), None)
        if best is None and len(images) > 1:
            raise ValueError(
                f"TarShards: sample {sample.name} holds {len(images)} images: {_first_of(images)}. The name of a sample ends at the first "
                f"dot of the file name; rename the members if these are several samples, or give image_key, such as {images[0]!r}"
            )
        chosen.append(best or (images[0] if images else None))
        beside.update(key for key in images if key != chosen[-1])
    if beside:
        # What lies beside an image in one sample, such as a mask, is no image where it lies alone.
        alone = sum(key in beside for key in chosen)
        both = sorted({key for key in chosen if key in beside and key in preferred})
        if both:
            raise ValueError(
                f"TarShards: {both[0]} is beside another image in {beside[both[0]]} samples and the only image in {alone}; "
                f"give image_key, such as '{_IMAGE_KINDS[0][1:]}' or '{_IMAGE_KINDS[0][1:]};{both[0]}'"
            )
        chosen = [None if key in beside else key for key in chosen]
        notes.append(f"{sum(beside.values())} images beside the one of their sample are not read: {_first_of(sorted(beside))}")
    return chosen


def _labelled(samples: Sequence[tuple[_Sample, Member]], notes: list[str]) -> list[tuple[Member, str | None]]:
    """Image and label of each sample whose label can be read; the others are counted in `notes`."""
    labelled: list[tuple[Member, str | None]] = []
    reasons: list[str] = []
    cut: list[int] = []  # positions of the samples without a label whose shard is damaged
    for sample, image in samples:
        try:
            label = _label(sample.members)
        except UnreadableItemError as error:
            reasons.append(str(error))
            continue
        if label is None and sample.fault:
            cut.append(len(labelled))
        labelled.append((image, label))
    if reasons:
        notes.append(f"{len(reasons)} samples are left out, because their label cannot be read, the first: {reasons[0]}")
    if cut and any(label is not None for _, label in labelled):
        notes.append(f"{len(cut)} samples of damaged shards are left out, because their label is missing")
        missing = set(cut)
        labelled = [entry for position, entry in enumerate(labelled) if position not in missing]
    return labelled


def _label(members: dict[str, Member]) -> str | None:
    """The label of a sample, None without one.

    Raises:
        UnreadableItemError: it cannot be read.
    """
    for key in ("cls", "json"):
        if (member := members.get(key)) is None:
            continue
        try:
            if member.size > _LARGEST_LABEL:
                raise ValueError(f"{member.size} bytes; accepted: at most {_LARGEST_LABEL}")
            label = _parsed(read_range(member.shard, offset=member.offset, size=member.size), as_json=key == "json")
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
