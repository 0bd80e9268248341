"""The nearest neighbours of an item among features in a file, and a picture of them.

With an index beside the file its graph is followed, otherwise every row is compared, a part at a time.
"""

import json
import textwrap
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from glpretrain import modalities
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.states import fingerprint
from glpretrain.evaluate.encoding import normalised
from glpretrain.evaluate.features import Features
from glpretrain.use.embedding import embed, own_source
from glpretrain.use.files import beside, read_features, written_name
from glpretrain.use.index import has_faiss, search_index, unit_rows
from glpretrain.use.transform import Transform

_CELL, _TITLE, _TITLE_WIDTH, _TITLE_LINES, _COLUMNS = 2.1, 0.45, 26, 3, 6  # inches, characters, lines, pictures in a row


class Neighbour(NamedTuple):
    """An item that resembles the query."""

    name: str
    cosine: float


class Record(NamedTuple):
    """What `glpretrain embed` noted beside a file of features."""

    backbone: str
    folder: str
    settings: dict

    @classmethod
    def of(cls, features: Path) -> "Record":
        """The record of a file of features.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = beside(features, ".json")
        try:
            values = json.loads(path.read_text())
            return cls(str(values["backbone"]), str(values["folder"]), dict(values["settings"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"neighbours: {path}, which `glpretrain embed` writes beside {features}, is missing or damaged") from error

    @property
    def value_range(self) -> tuple[tuple[float, float], ...]:
        """How the files were read, as on a card."""
        return tuple((float(low), float(high)) for low, high in self.settings.get("value_range", ()))

    def check(self, encoder: Encoder, features: Path) -> None:
        """Refuse, with a ValueError, an encoder that did not make the features."""
        if fingerprint(encoder) != self.settings.get("weights"):
            raise ValueError(f"neighbours: {features} was made by a backbone with other weights, {self.backbone}; give it with --backbone")


def neighbours(encoder: Encoder, features: Path, query: str | Path, *, k: int = 5, exact: bool = False) -> list[Neighbour]:
    """The items of a file of features that resemble a query most.

    Args:
        encoder: the encoder that made the features.
        features: a file that `glpretrain embed` wrote, of `cls` or of the mean of patches.
        query: path of a picture.
        k: number of items.
        exact: whether all rows are compared even where there is an index.

    Returns:
        At most `k` items, the nearest first. A query that is among the items comes first itself.

    Raises:
        ValueError: the file or the query cannot be read, or the encoder is another one.
    """
    if k < 1:
        raise ValueError(f"k: {k}; accepted: a positive number")
    record = Record.of(features)
    record.check(encoder, features)
    what, bf16 = record.settings["what"], record.settings["bf16"]
    if what == "patches":
        raise ValueError(f"neighbours: {features} holds patches; accepted: features of cls or mean")
    found = embed(encoder, [query], what=what, size=_size(record), bf16=bf16, num_workers=0).features[0].numpy()
    index = beside(features, ".faiss")
    if index.is_file() and has_faiss() and not exact:
        cosines, rows = search_index(index, found, k=k)
        names = _names_at(features, rows.tolist())
        return [Neighbour(names[row], float(cosine)) for cosine, row in zip(cosines, rows.tolist(), strict=True)]
    return _searched(features, found, k=k)


def _size(record: Record) -> int | Sequence[int]:
    """The size of items, as `Modality.item_shape` takes it, that gives the shape of the record."""
    shape = record.settings["shape"]
    return shape[1:] if len(shape) == 3 else shape[0]


def _searched(features: Path, query: np.ndarray, *, k: int) -> list[Neighbour]:
    """By comparison with every row."""
    direction = torch.from_numpy(unit_rows(query[None])[0])
    best: list[Neighbour] = []
    for names, rows in read_features(features):
        if rows.shape[1] != len(query):
            raise ValueError(f"neighbours: {features} has rows of {rows.shape[1]} numbers, the backbone gives {len(query)}")
        cosines, places = (torch.from_numpy(unit_rows(rows)) @ direction).topk(min(k, len(rows)))
        best += [Neighbour(names[int(place)], cosine) for cosine, place in zip(cosines.tolist(), places.tolist(), strict=True)]
        best = sorted(best, key=lambda one: one.cosine, reverse=True)[:k]  # of equal ones the first stays first
    return best


def _names_at(features: Path, rows: Sequence[int]) -> dict[int, str]:
    wanted, found, start = set(rows), dict[int, str](), 0
    for names, _ in read_features(features):
        found |= {row: names[row - start] for row in wanted if start <= row < start + len(names)}
        start += len(names)
    if missing := wanted - found.keys():
        raise ValueError(f"neighbours: the index of {features} names row {min(missing)} of {start}; remove {beside(features, '.faiss')}")
    return found


def contact_sheet(encoder: Encoder, query: str | Path, found: Sequence[Neighbour], *, folder: str | Path) -> Figure:
    """The query and its neighbours as the encoder sees them, with names and cosines.

    Args:
        encoder: the encoder that found them.
        query: path of the query.
        found: its neighbours.
        folder: where the items are, as `own_source` takes it.

    Raises:
        ValueError: an item is not there any more, or cannot be read.
    """
    modality, source = modalities.get(encoder.card.modality), own_source(folder, encoder.card)
    places = _places(source, {one.name for one in found})
    shape, items = Features().shape(encoder), [Transform(encoder)(query)[0]]
    for one in found:
        if one.name not in places:
            raise ValueError(f"picture: {one.name} is not in {folder} any more; give the folder where it is with --folder")
        item = modality.resize(source[places[one.name]], shape, fit="crop")
        items.append(normalised(item.values[None], encoder)[0])
    titles = [f"query: {Path(query).name}", *(f"{one.cosine:.3f} {one.name}" for one in found)]
    return _grid(modality.pictures(torch.stack(items), card=encoder.card), titles)


def _places(source: Source, names: set[str]) -> dict[str, int]:
    """Dataset index of each of these names that there is."""
    every: Iterator[tuple[str, int]] = ((written_name(source.named(place)), place) for place in range(len(source)))
    return dict(islice((pair for pair in every if pair[0] in names), len(names)))


def _grid(pictures: Tensor, titles: Sequence[str]) -> Figure:
    columns = min(_COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(columns * _CELL, rows * (_CELL + _TITLE)), layout="constrained")
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if place < len(titles):
            axes.imshow(pictures[place].numpy(), interpolation="nearest")
            lines = textwrap.wrap(titles[place], _TITLE_WIDTH, break_on_hyphens=False)
            axes.set_title("\n".join(lines[:_TITLE_LINES]), fontsize=7)
    return figure
