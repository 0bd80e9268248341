"""Items in, features out, batch by batch: read as evaluations read them, and encoded as they encode.

Left out: files of features (`files`), and scores (`glpretrain.evaluate`).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from glpretrain import modalities
from glpretrain.core.imports import imported
from glpretrain.core.types import Embedded, EncoderCard
from glpretrain.data.own import source_for, source_spec
from glpretrain.data.sources.base import Source
from glpretrain.data.sources.images.lists import ImageFiles
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.encoding import device_of, evaluating, normalised
from glpretrain.evaluate.features import Features
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.reading import checked_workers, give_back, read_all
from glpretrain.evaluate.rows import require_finite

What = Literal["cls", "mean", "patches"]
_LOG = logging.getLogger(__name__)
_GIVEN_BACK = 2048  # items after which memory that was freed is given back


class Rows(NamedTuple):
    """Features of the items of one batch."""

    features: Tensor  # Float[B D], or Float[B N D] of patches; on the CPU
    index: Tensor  # Int[B]  dataset index
    labels: Tensor  # Int[B]  -1 where there is none
    unreadable: Mapping[int, str]  # why the others have no row, by dataset index


def own_source(items: str | Path | Sequence[str | Path], card: EncoderCard) -> Source:
    """The source of all of a user's items, whatever their split.

    Args:
        items: a folder, a list, a tar shard or a folder of shards, as `glpretrain.data.source_for` takes it; or paths of images.
        card: card of the encoder that they are for.

    Raises:
        ValueError: nothing is there, or it is of another kind.
    """
    channels = card.item_shape[modalities.get(card.modality).channel_axis]
    if not isinstance(items, str | Path):
        source: Source = ImageFiles(items, channels=channels, value_range=card.value_range or None)
        if source.modality != card.modality:
            raise ValueError(f"embed: {len(items)} paths given for {card.modality}; accepted: a folder")
        return source
    spec = source_spec(items, source_for(items, card.modality), channels=channels, value_range=card.value_range)
    return imported(spec.class_path)(**spec.init_args).whole()


def num_batches(source: Source, features: Features) -> int:
    """Number of batches of a source."""
    return -(-len(source) // features.batch_size)


def embedded(
    encoder: Encoder, source: Source, *, what: What, features: Features, num_workers: int | None = None, first: int = 0
) -> Iterator[Rows]:
    """Features of every batch of a source, in order, with a progress bar; what is in memory does not depend on the number of items.

    Args:
        encoder: the encoder.
        source: source of the items.
        what: `cls`, the mean of the patches, or all patches.
        features: size, number of items in a batch and precision.
        num_workers: number of processes that read; None as in an evaluation.
        first: number of the batch to begin with.

    Raises:
        ValueError: an item does not fit the encoder, or features are not finite.
    """
    numbers, size = range(first, num_batches(source, features)), features.batch_size
    shape = features.shape(encoder)

    def indices_of(number: int) -> range:
        return range(number * size, min((number + 1) * size, len(source)))

    read = read_all(source, numbers, indices_of, shape, "crop", num_workers=checked_workers(num_workers))
    for turn, decoded in enumerate(
        tracked(read, total=len(numbers), description=f"embedding {source.name}", items=lambda one: len(one.index) + len(one.unreadable))
    ):
        if turn * size % _GIVEN_BACK < size:
            give_back()
        if decoded.refusal:
            raise ValueError(decoded.refusal)
        rows = torch.empty(0)
        if decoded.values is not None:
            rows = encoded(encoder, decoded.values, what=what, bf16=features.bf16)
            require_finite(rows, decoded.index, what=f"source {source.name!r}: the features")
        for reason in decoded.unreadable.values():
            _LOG.warning("left out: %s", reason)
        yield Rows(rows, decoded.index, decoded.labels, decoded.unreadable)


def encoded(encoder: Encoder, items: Tensor, *, what: What, bf16: bool) -> Tensor:
    """Features of items at the encoder's size: Float[B D], or Float[B N D] of patches, on the CPU.

    Args:
        encoder: the encoder, in any mode.
        items: items as sources give them, [B *item].
        what: `cls`, the mean of the patches, or all patches.
        bf16: whether to encode under bfloat16 autocast.
    """
    with evaluating(encoder), torch.autocast(device_of(encoder).type, torch.bfloat16, enabled=bf16):
        output = encoder(normalised(items, encoder), cls_only=what == "cls")
    if what == "cls":
        return output.cls.float().cpu()
    patches = output.patches.float()
    return (patches.mean(dim=1) if what == "mean" else patches).cpu()


def embed(
    encoder: Encoder,
    items: str | Path | Sequence[str | Path],
    *,
    what: What = "cls",
    size: int | Sequence[int] | None = None,
    batch_size: int = 64,
    bf16: bool = False,
    num_workers: int | None = None,
) -> Embedded:
    """Features of items in memory. `glpretrain embed` writes those of any number of items to a file.

    Args:
        encoder: the encoder, on any device.
        items: a folder, a list, or tar shards, as the command line takes them; or paths of images.
        what: `cls`, the mean of the patches, or all patches.
        size: size that items are brought to; None takes that of the encoder's card.
        batch_size: number of items that are encoded at a time.
        bf16: whether to encode under bfloat16 autocast.
        num_workers: number of processes that read; None for as many as cores where there are 2,048 items or more, and none else.

    Returns:
        Float[B D] (Float[B N D] of patches) on the CPU, with a row for every item that can be read, and the names of the rows.

    Raises:
        ValueError: nothing is there or none of it can be read, an item does not fit the encoder, or features are not finite.
    """
    check_what(what)
    source, features = own_source(items, encoder.card), Features(size=size, batch_size=batch_size, bf16=bf16)
    parts: list[Tensor] = []
    names: list[str] = []
    unreadable: dict[str, str] = {}
    for rows in embedded(encoder, source, what=what, features=features, num_workers=num_workers):
        if len(rows.index):
            parts.append(rows.features)
        names += map(source.named, rows.index.tolist())
        unreadable |= {source.named(index): reason for index, reason in rows.unreadable.items()}
    if not parts:
        raise nothing_to_read(source, next(iter(unreadable.values())))
    return Embedded(torch.cat(parts), names, unreadable)


def check_what(what: str) -> None:
    """Refuse, with a ValueError, what is none of the three."""
    if what not in get_args(What):
        raise ValueError(f"what: {what!r} given; accepted: {', '.join(get_args(What))}")


def nothing_to_read(source: Source, reason: str) -> ValueError:
    """What is wrong where no item can be read."""
    return ValueError(f"embed: source {source.name!r}: none of {len(source)} items can be read ({reason})")
