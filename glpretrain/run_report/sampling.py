"""An evenly spaced sample of a run's items: each read once, with a small picture, and its features in every backbone.

What is computed from the features is left out (`projection`, `findings`).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glpretrain import modalities
from glpretrain.data.sources.base import Source, UnreadableItemError
from glpretrain.encoders import Encoder
from glpretrain.evaluate.encoding import device_of
from glpretrain.evaluate.features import Features
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.reading import give_back
from glpretrain.evaluate.rows import require_finite
from glpretrain.use.embedding import encoded
from glpretrain.use.files import written_name

MOST_ITEMS = 2000
_FEW, _LARGE, _SMALL = 400, 160, 96  # up to so many items have pictures of the larger side, in pixels
_BATCH = 64
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """The items of a report, those that cannot be read left out."""

    index: tuple[int, ...]  # dataset indices
    names: tuple[str, ...]
    labels: tuple[int, ...]  # -1 where there is none
    pictures: tuple[Image.Image, ...]  # small, in the proportions of the item
    features: Mapping[str, Tensor]  # cls by the name of the backbone, Float[B D]
    num_asked: int  # number of items that were to be read
    num_items: int  # number of all items of the source
    unreadable: Mapping[str, str]  # why an item could not be read, by its name

    def __len__(self) -> int:
        return len(self.index)


def evenly_spaced(count: int, at_most: int) -> list[int]:
    """Positions from 0 to `count`, all of them or `at_most`."""
    number = min(count, at_most)
    return [(2 * place + 1) * count // (2 * number) for place in range(number)]


def sampled(encoders: Mapping[str, Encoder], source: Source, *, max_items: int = MOST_ITEMS) -> Sample:
    """Read a sample of a source, and encode it as evaluations do.

    A JPEG of many pixels is decoded at a fraction of its size, so features differ a little from those of `glpretrain embed`.

    Args:
        encoders: backbones by name, all for items of one size; in any mode and on any device.
        source: source of the items.
        max_items: number of items at most.

    Raises:
        ValueError: no item can be read, an item does not fit, or features are not finite.
    """
    first = next(iter(encoders.values()))
    shape, modality = Features().shape(first), modalities.get(first.card.modality)
    chosen = evenly_spaced(len(source), max_items)
    side = _LARGE if len(chosen) <= _FEW else _SMALL
    enough = max(side, *shape)
    index: list[int] = []
    labels: list[int] = []
    pictures: list[Image.Image] = []
    unreadable: dict[str, str] = {}
    rows: dict[str, list[Tensor]] = {name: [] for name in encoders}
    batches = [chosen[start : start + _BATCH] for start in range(0, len(chosen), _BATCH)]
    for batch in tracked(batches, total=len(batches), description="report", items=len):
        values: list[Tensor] = []
        for number in batch:
            try:
                item = source.reduced(number, side=enough)
            except UnreadableItemError as error:
                unreadable[source.named(number)] = str(error)
                _LOG.warning("left out of the report: %s", error)
                continue
            values.append(modality.resize(item, shape, fit="crop").values)
            drawn = (modality.thumbnail(item, card=first.card, side=side) * 255).round().byte()
            pictures.append(Image.fromarray(np.ascontiguousarray(drawn.numpy())))
            index.append(number)
            labels.append(item.label)
        if values:
            for name, encoder in encoders.items():
                found = encoded(encoder, torch.stack(values), what="cls", bf16=device_of(encoder).type == "cuda")
                require_finite(found, torch.tensor(index[-len(values) :]), what=f"report: the features {name} training")
                rows[name].append(found)
        give_back()
    if not index:
        raise ValueError(f"report: none of {len(chosen)} items of {source.name} can be read ({next(iter(unreadable.values()))})")
    names = tuple(written_name(source.named(number)) for number in index)
    features = {name: torch.cat(found) for name, found in rows.items()}
    return Sample(tuple(index), names, tuple(labels), tuple(pictures), features, len(chosen), len(source), unreadable)
