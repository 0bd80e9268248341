"""Columns of files of Hugging Face datasets. Left out: how data sets are downloaded and kept, which is the package's."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from glpretrain.core.listing import expanded
from glpretrain.data.label_sets import joined
from glpretrain.data.sources.base import checked_index
from glpretrain.data.sources.kinds import FileKind


class File(NamedTuple):
    """A file of a column: its bytes, or else its path."""

    content: bytes | None
    path: str | None


class _Table(Protocol):
    """Rows of which a whole column can be had."""

    def __getitem__(self, name: str | None) -> Sequence[Sequence[int]]: ...


class Column:
    """A column of files of a Hugging Face dataset, which are not decoded by the package, so that a damaged one fails where it is read.

    Args:
        path: a folder that `save_to_disk` wrote, or anything that `datasets.load_dataset` accepts.
        kind: what the files are.
        feature: the package's name of such a column.
        split: name of the split.
        column: name of the column.
        label: name of the column of classes, one or a list of them in each row; None where the dataset has none.

    Raises:
        ImportError: the package `datasets` is not installed.
        ValueError: there is no such split or column.
    """

    def __init__(
        self, path: str, kind: FileKind, *, feature: Literal["Image", "Audio"], split: str, column: str, label: str | None
    ) -> None:
        owner = kind.owner
        try:
            import datasets  # pyright: ignore[reportMissingImports]  # an optional extra
        except ImportError as error:
            raise ImportError(f"{owner} needs the package datasets: pip install 'glpretrain[huggingface]'") from error
        folder = expanded(path)
        saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(path)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{owner}: {path} has no split {split!r}; it has {sorted(loaded)}")
            loaded = loaded[split]
        for name in (column, label):
            if name is not None and name not in loaded.column_names:
                raise ValueError(f"{owner}: {path} has no column {name!r}; it has {loaded.column_names}")
        encoded = {"Image": datasets.Image, "Audio": datasets.Audio}[feature]
        if not isinstance(found := loaded.features[column], encoded | datasets.Value):
            raise ValueError(f"{owner}: column {column!r} of {path} holds {found}; expected one {kind.item} per row")
        self._rows = loaded.cast_column(column, encoded(decode=False))
        self._item, self._column, self._label, self._path = kind.item, column, label, path
        self.name, self.classes = folder.name, list[str]()
        self._sets: list[int] | None = None  # class of each row, where rows have several labels
        if label is not None:
            classes = loaded.features[label]
            if isinstance(classes, datasets.ClassLabel):
                self.classes = classes.names
            elif isinstance(getattr(classes, "feature", None), datasets.ClassLabel):  # a list of labels in each row
                self._sets = self._set_of_rows(loaded, classes.feature.names)
            else:
                raise ValueError(f"{owner}: column {label!r} of {path} holds {classes}; expected a ClassLabel, or a list of them")

    def _set_of_rows(self, rows: _Table, names: Sequence[str]) -> list[int]:
        """The class of each row, which is the set of its labels; `classes` become these sets."""
        sets: dict[str, int] = {}
        found = [sets.setdefault(joined([names[one] for one in labels]), len(sets)) for labels in rows[self._label]]
        self.classes = list(sets)
        return found

    def __len__(self) -> int:
        return len(self._rows)

    def named(self, index: int) -> str:
        """Name of a row, for messages. Raises an IndexError outside range(len(self))."""
        return f"{self._path}[{checked_index(index, len(self))}]"

    def row(self, index: int) -> tuple[File, int]:
        """The file of a row, and its class, -1 without one.

        Raises:
            ValueError: there is no file in it.
        """
        row = self._rows[index]
        stored = row[self._column]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise ValueError(f"no {self._item} in column {self._column!r}")
        label = None if self._label is None else row[self._label] if self._sets is None else self._sets[index]
        return File(stored["bytes"], stored["path"]), -1 if label is None else label
