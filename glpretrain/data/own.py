"""Chooses sources: the one that reads a user's folder or file, held-out parts, and the embedded one that replaces missing data."""

import inspect
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from glpretrain import modalities
from glpretrain.core import keys
from glpretrain.core.imports import imported
from glpretrain.core.listing import expanded
from glpretrain.core.types import Item
from glpretrain.data.sources.base import Source, Subset
from glpretrain.data.sources.images.decoding import ENDINGS

_TRAIN_SHARE = 0.8
_EMBEDDED_ITEMS = 2400


class SourceSpec(NamedTuple):
    """A source as a configuration describes it."""

    class_path: str
    init_args: dict[str, object]

    def arguments(self, name: str) -> list[str]:
        """The source as arguments of the command line, under this name; written in full, so that it replaces the recipe's."""
        return [f"--{name}", json.dumps(self._asdict())]


def source_for(path: str | Path, modality: str) -> str:
    """Import path of the source that reads the user's items.

    Args:
        path: a folder, or a file.
        modality: name of the kind of items; the first of its sources that reads the path is taken.

    Raises:
        ValueError: none of them reads the path.
    """
    accepted = []
    for class_path in modalities.get(modality).own_sources:
        source = imported(class_path)
        assert isinstance(source, type) and issubclass(source, Source)
        if source.reads(expanded(path)):
            return class_path
        accepted.append(source.accepts or class_path)
    raise ValueError(f"{path} is {_kind_of(expanded(path))}; accepted: {'; '.join(accepted)}")


def _kind_of(path: Path) -> str:
    if zipfile.is_zipfile(path):
        return "a zip archive, which has to be unpacked first"
    return "a single image" if path.suffix.lower() in ENDINGS else "of a kind that is not read"


def source_spec(
    path: str | Path,
    class_path: str,
    *,
    channels: int | None = None,
    split: str | None = None,
    value_range: Sequence[tuple[float, float]] = (),
) -> SourceSpec:
    """The source of a path.

    Args:
        path: a folder, or a file.
        class_path: import path of the source.
        channels: number of channels of every item, for sources with this argument.
        split: the part that is read of a divided folder, for sources with this argument.
        value_range: low and high value of each channel that become 0 and 255, for sources with this argument; see `EncoderCard`.

    Raises:
        ValueError: the path is not in UTF-8, which a configuration cannot hold.
    """
    name = str(path)
    if not name.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in name):
        raise ValueError(f"{name!a}: the name of the folder is not in UTF-8; rename it, or give a link to it that has another name")
    if "/" not in name:
        name = f"./{name}"  # or a configuration would read names such as 1e3 and null as a number and as nothing
    first, *others = inspect.signature(imported(class_path)).parameters
    pairs = [list(pair) for pair in value_range]
    same = pairs[0] if len(set(value_range)) == 1 else pairs
    given = {"channels": channels, "split": split, "value_range": same or None}
    arguments: dict[str, object] = {key: value for key, value in given.items() if value is not None and key in others}
    return SourceSpec(class_path, {first: name, **arguments})


def masked_spec(
    path: str | Path, modality: str, *, channels: int | None = None, value_range: Sequence[tuple[float, float]] = ()
) -> SourceSpec:
    """The source of a user's items with masks; arguments as in `source_spec`."""
    return source_spec(path, modalities.get(modality).masked_source, channels=channels, value_range=value_range)


def train_test_parts(source: Source) -> tuple[Source, Source]:
    """(train, test) parts of a source with classes: its own split, or else a fixed fifth of it is the test part.

    Items of one group, such as frames of one video, are in one part.
    """
    if (split := source.train_test_split()) is not None:
        return split
    index = torch.arange(len(source))
    first: dict[str, int] = {}
    groups = source.groups  # made anew whenever it is asked for
    leaders = torch.tensor([first.setdefault(name, number) for number, name in enumerate(groups)]) if groups else index
    train = keys.uniform(keys.item_keys(seed=0, epoch=0, index=leaders)) < _TRAIN_SHARE  # a fixed seed, so that runs stay comparable
    return Subset(source, indices=index[train].numpy()), Subset(source, indices=index[~train].numpy())


def embedded_source(modality: str, *, size: int) -> Source:
    """The synthetic source with classes and masks on which runs with unlabelled data are scored.

    Args:
        modality: name of the kind of item.
        size: size of its items.
    """
    kind = modalities.get(modality)
    source = imported(kind.embedded_source)(_EMBEDDED_ITEMS, **{kind.embedded_size: size})
    assert isinstance(source, Source), f"{kind.embedded_source} is no source"
    return source


def require_same_channels(item: Item, embedded: Source, *, name: str, argument: str) -> None:
    """Refuse an embedded source whose items have another number of channels.

    Args:
        item: an item of the source that the run trains on.
        embedded: the embedded source.
        name: name of the former source.
        argument: argument of `DataModule` that replaces the embedded source.

    Raises:
        ValueError: the numbers differ.
    """
    axis = modalities.get(embedded.modality).channel_axis
    channels, accepted = (one.values.shape[axis] for one in (item, embedded[0]))
    if channels != accepted:
        raise ValueError(f"DataModule: {name} has {channels} channels and {embedded.name} has {accepted}; give {argument}")
