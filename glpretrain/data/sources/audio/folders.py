"""The user's own sounds: a folder of files."""

from collections.abc import Iterator
from pathlib import Path, PurePath

from glpretrain.core.listing import LEFTOVERS, Run, Walk, count_kinds, expanded, say_once
from glpretrain.data.sources.audio.decoding import ENDINGS, AudioSource, audio_item, check_seconds, decode, require_readable, way_of
from glpretrain.data.sources.base import Item, Source, Stored, checked_index
from glpretrain.data.sources.divisions import SplitOrAll, divided
from glpretrain.data.sources.paths import Paths
from glpretrain.data.sources.saved_listings import Listing, Walked, listing_of

_KNOWN = frozenset(ENDINGS)
_RULES = f"sounds {' '.join((*ENDINGS, *sorted(LEFTOVERS)))}"  # what a listing of sounds depends on
_LEAST = 100_000  # files, which are found in a second


class AudioFolder(AudioSource):
    """Sounds in a folder, with or without classes, with or without `train/` and `test/` (or `val/`, `validation/`).

    A file is `<file>`, `<class>/<file>`, `train/<class>/<file>`, or `<class>/train/<file>`. It may have any rate, length and number of
    channels; an item is the mean of the channels at 16 kHz. One line in the log counts the files that are left out. A file that is damaged,
    empty or silent is an unreadable item: a run counts these and names each of them.

    Args:
        root: path of the folder.
        split: which split is read. When left out, `train` where `test` exists too, and everything otherwise.
        seconds: how much of a file is read, from its beginning; when left out, all of it. An hour of sound takes 230 MB.

    Raises:
        ValueError: there is no such folder, no sound in it, no such split, `seconds` is not above 0, or files need a package that is not
            installed.
    """

    accepts = f"a folder of sounds ({' '.join(ENDINGS)})"

    def __init__(self, root: str | Path, *, split: SplitOrAll | None = None, seconds: float | None = None) -> None:
        self.root = expanded(root)
        self.name = self.root.resolve().name
        if not self.root.is_dir():
            raise ValueError(f"AudioFolder: {self.root} is not a folder")
        check_seconds(seconds, owner="AudioFolder")
        self.seconds = seconds
        paths, left_out, _ = listing_of(self.root, walk=_sounds_below, rules=_RULES, least=_LEAST)
        if not paths:
            found = f"; it holds {left_out}" if left_out else ""
            raise ValueError(f"AudioFolder: no sound in {self.root}; accepted endings: {' '.join(ENDINGS)}{found}")
        if left_out:
            say_once(f"AudioFolder: {self.root}: {len(paths)} sounds; left out: {left_out}")
        require_readable(paths, owner=f"AudioFolder: {self.root}")
        self._division = divided(paths, split, owner=f"AudioFolder: {self.root}")
        self.paths, self.classes = self._division.paths, self._division.classes

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether it is no file."""
        return not path.is_file()

    def whole(self) -> "AudioFolder":
        return AudioFolder(self.root, split="all", seconds=self.seconds) if self._division.splits else self

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        samples = decode(self.paths[checked_index(index, len(self))], seconds=self.seconds)
        return audio_item(samples, label=self._division.label_of(index))

    def stored(self, index: int) -> Stored:
        return Stored(self.paths[index], way_of(self.seconds), self._division.label_of(index))

    def _listing(self) -> tuple[object, ...]:
        return *super()._listing(), self._division.labels

    def train_test_split(self) -> tuple[Source, Source] | None:
        if not self._division.is_labelled_pair:
            return None
        train, test = (AudioFolder(self.root, split=split, seconds=self.seconds) for split in ("train", "test"))
        return train, test


def _sounds_below(root: Path) -> Walked:
    """The files of sounds in order; the note describes what is left out."""
    walk, others = Walk(root), list[str]()
    paths = Paths(root, _sounds_of(walk, others))
    kinds = [*others, *(kind for _, kind in walk.passed_over)]
    return Walked(Listing(paths, count_kinds(kinds) if kinds else "", {}), walk.states, walk.real, walk.is_certain)


def _sounds_of(walk: Walk, others: list[str]) -> Iterator[Run]:
    """The sounds of a walk; endings of other files are added to `others`."""
    for folder, names in walk:
        endings = [PurePath(name).suffix.lower() for name in names]
        kept = [name for name, ending in zip(names, endings, strict=True) if ending in _KNOWN]
        others += [ending or "without an ending" for ending in endings if ending not in _KNOWN]
        if kept:
            yield Run(folder, kept)
