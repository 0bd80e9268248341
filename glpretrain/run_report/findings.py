"""What features say of a folder's items: the nearest neighbours of each, items that resemble no other, and items that are there twice.

How these are shown is left out (`page`).
"""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

NEIGHBOURS = 8
_CHUNK = 512  # rows that are compared with all others at a time
_LONELY = 5  # neighbours whose mean distance says how lonely an item is
_FAR = 4.0  # standard deviations, by the median of absolute deviations, beyond which an item stands apart
_MOST_LISTED = 24
_GREY = 32  # side of the pictures whose grey values are compared
_COPY, _FLAT = 0.95, 4.0  # correlation of grey values from which on two pictures are the same; grey levels below which one is a blank


class Neighbours(NamedTuple):
    """The nearest other items of each item."""

    index: Tensor  # Int[B k]  the nearest first
    cosine: Tensor  # Float[B k]


class Apart(NamedTuple):
    """An item that resembles no other."""

    item: int
    deviations: float  # standard deviations from the median distance to neighbours
    cosine: float  # with the nearest item


class Pair(NamedTuple):
    """Two items that show the same."""

    first: int
    second: int
    correlation: float  # of their grey values


def nearest(features: Tensor, *, k: int = NEIGHBOURS) -> Neighbours:
    """The k other items with the largest cosines; fewer where there are not as many.

    Args:
        features: Float[B D].
        k: number of neighbours.
    """
    unit, count = functional.normalize(features.float(), dim=-1), len(features)
    k = min(k, count - 1)
    index = torch.empty(count, k, dtype=torch.long)
    cosine = torch.empty(count, k)
    for start in range(0, count, _CHUNK):
        own = torch.arange(start, min(start + _CHUNK, count))
        table = unit[own] @ unit.T  # [chunk B]
        table[torch.arange(len(own)), own] = -torch.inf
        cosine[own], index[own] = table.topk(k, dim=1)
    return Neighbours(index, cosine)


def agreement(found: Neighbours, labels: Sequence[int]) -> float | None:
    """Percent of the neighbours that have the class of their item; None where no item has a class."""
    own = torch.tensor(labels)
    known = own >= 0
    if not known.any() or found.index.shape[1] == 0:
        return None
    return 100 * (own[found.index] == own[:, None])[known].float().mean().item()


def apart(found: Neighbours) -> list[Apart]:
    """Items whose neighbours are much farther away than those of most items, the farthest first; 24 at most."""
    if found.index.shape[1] == 0:
        return []
    distance = 1 - found.cosine[:, :_LONELY].double().mean(dim=1)
    middle = distance.median()
    spread = 1.4826 * (distance - middle).abs().median().clamp(min=1e-9)  # a standard deviation, where distances are normal
    deviations = (distance - middle) / spread
    order = deviations.argsort(descending=True)[:_MOST_LISTED].tolist()
    return [Apart(item, deviations[item].item(), found.cosine[item, 0].item()) for item in order if deviations[item] > _FAR]


def copies(found: Neighbours, pictures: Sequence[Image.Image]) -> list[Pair]:
    """Pictures that show the same at other sizes, cuts or qualities: one is among the neighbours of the other, and their grey values
    correlate; the most similar first.

    Blank pictures, which correlate with anything, are left out.

    Args:
        found: neighbours of the pictures.
        pictures: the pictures, small ones.
    """
    small = [picture.convert("L").resize((_GREY, _GREY), Image.Resampling.BOX) for picture in pictures]
    greys = torch.from_numpy(np.stack([np.asarray(one, dtype=np.float32) for one in small])).flatten(1)  # [B 1024]
    drawn = greys.std(dim=1) > _FLAT
    unit = functional.normalize(greys - greys.mean(dim=1, keepdim=True), dim=1)
    pairs: dict[tuple[int, int], float] = {}
    for item, others in enumerate(found.index.tolist()):
        for other in others:
            correlation = float(unit[item] @ unit[other])
            if drawn[item] and drawn[other] and correlation >= _COPY:
                pairs[min(item, other), max(item, other)] = correlation
    return sorted((Pair(*pair, correlation) for pair, correlation in pairs.items()), key=lambda pair: (-pair.correlation, pair[:2]))


def as_csv(names: Sequence[str], lonely: Sequence[Apart], twice: Sequence[Pair]) -> str:
    """What to look at, a line each: why, the file, the other file of a pair, and a number."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["why", "file", "other", "number", "meaning"])
    for one in twice:
        writer.writerow(["near duplicate", names[one.first], names[one.second], f"{one.correlation:.4f}", "correlation of grey values"])
    for one in lonely:
        writer.writerow(["stands apart", names[one.item], "", f"{one.deviations:.1f}", "standard deviations from the median distance"])
    return file.getvalue()
