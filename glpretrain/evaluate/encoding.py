"""From items to the features of an encoder: normalise as the card of the encoder says, encode, or take them from the cache.

With a team (`team`) every process encodes its share. Reading is left out (`items`), and so is what is done with the features.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from glpretrain import modalities
from glpretrain.core.distributed import rank, world_size
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.layers import Tokens, features_of_layers, layer_number
from glpretrain.evaluate.cache import FeatureCache, with_patches
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.reading import ItemBatch, Patches
from glpretrain.evaluate.team import Answer, Request, Team, give, requests


class Encoding(NamedTuple):
    """What features depend on beside the encoder and the items."""

    shape: tuple[int, ...]  # that items are brought to
    resize: str  # how they are, a `Resize` of items
    batch_size: int
    layers: Mapping[int, Patches]  # blocks whose features are taken, each with how much of its patches is needed
    bf16: bool
    tokens: Tokens = "output"  # what is taken of a block

    def names(self, encoder: Encoder, digests: Sequence[str]) -> dict[int, str]:
        """Name of a batch in the cache, by layer."""
        names: dict[int, str] = {}
        for layer in self.layers:
            settings = f"{self.shape} {self.resize} {layer_number(encoder, layer)} {'bf16' if self.bf16 else 'float32'}"
            settings += "" if self.tokens == "output" else f" {self.tokens} "
            names[layer] = hashlib.sha256("".join((settings, *digests)).encode()).hexdigest()
        return names

    def is_in(self, cache: FeatureCache, digests: Sequence[str]) -> bool:
        """Whether a batch was encoded before."""
        return all(cache.has(name, patches=self.layers[layer]) for layer, name in self.names(cache.encoder, digests).items())


class Encodable(Protocol):
    """What is encoded: the items of an `ItemBatch`, or frames of a video."""

    @property
    def digests(self) -> Sequence[str]:
        """Digest of each item, before it was resized."""
        ...

    @property
    def items(self) -> Tensor:
        """UInt8[B C H W], or Float[B P 3]; asked for only where features have to be computed."""
        ...


def encoded_batches(
    encoder: Encoder, items: DecodedItems, encoding: Encoding, *, cache: FeatureCache | None, is_looked_at: bool
) -> Iterator[tuple[ItemBatch, dict[int, EncoderOutput]]]:
    """Batches with their features by layer. Arguments as of `Features.encode`.

    Raises:
        ValueError: an item cannot be brought to the shape, or none can be read.
    """
    files, readable = None if cache is None else cache.files, False
    if files is not None:
        files.recall(items.source, items.known)
    try:
        for pair in _encoded(encoder, items, encoding, cache=cache, is_looked_at=is_looked_at):
            readable = True
            yield pair
    finally:  # an evaluation that is interrupted goes on where it was
        if files is not None:
            files.learn(items.source, items.known, since=items.since)
    if not readable:
        raise items.nothing_to_read()


def _encoded(
    encoder: Encoder, items: DecodedItems, encoding: Encoding, *, cache: FeatureCache | None, is_looked_at: bool
) -> Iterator[tuple[ItemBatch, dict[int, EncoderOutput]]]:
    """Every batch with an item that can be read."""
    numbers = range(items.num_batches(encoding.batch_size))

    def is_needed(batch: ItemBatch) -> bool:
        return is_looked_at or cache is None or not encoding.is_in(cache, batch.digests)

    if cache is not None and cache.team is not None and (role := cache.team.role_of(items)) is not None:
        yield from _shared(encoder, items, encoding, cache, cache.team, role=role, is_looked_at=is_looked_at)
        return
    for _, batch in items.numbered(encoding.shape, **_sizes(encoding), numbers=numbers, is_needed=is_needed):
        yield batch, encode_batch(encoder, batch, encoding, cache=cache)


def _shared(
    encoder: Encoder, items: DecodedItems, encoding: Encoding, cache: FeatureCache, team: Team, *, role: str, is_looked_at: bool
) -> Iterator[tuple[ItemBatch, dict[int, EncoderOutput]]]:
    """The same from several processes."""
    numbers = range(items.num_batches(encoding.batch_size))
    known = (items.known_batch(number, encoding.shape, **_sizes(encoding)) for number in numbers)
    missing = [number for number, batch in zip(numbers, known, strict=True) if batch is None or not encoding.is_in(cache, batch.digests)]
    indices = None if isinstance(items.indices, range) else list(items.indices)
    asked = team.ask(
        Request(
            role,
            indices,
            len(items),
            list(encoding.shape),
            str(encoding.resize),
            encoding.batch_size,
            {str(layer): patches for layer, patches in encoding.layers.items()},
            encoding.bf16,
            encoding.tokens,
            missing,
        )
    )
    own = [number for number in numbers if is_looked_at or not asked.is_others(number)]

    def is_needed(batch: ItemBatch) -> bool:
        return is_looked_at or not encoding.is_in(cache, batch.digests)

    batches = _Aligned(items.numbered(encoding.shape, **_sizes(encoding), numbers=own, is_needed=is_needed))
    try:
        for number in numbers:
            batch = batches.at(number)
            if not asked.is_others(number):
                if batch is not None:
                    yield batch, encode_batch(encoder, batch, encoding, cache=cache)
                continue
            answer = asked.answer(number)
            items.note(answer.seen)
            if batch is None and (found := items.known_batch(number, encoding.shape, **_sizes(encoding))) is not None:
                batch = items.renamed(found)
            if batch is not None:
                for layer, name in encoding.names(encoder, batch.digests).items():
                    cache.keep(name, answer.outputs[layer], patches=encoding.layers[layer])
                yield batch, answer.outputs
    finally:
        asked.end()


@contextmanager
def shared_encoding(name: str, encoder: Encoder, sources: Sources) -> Iterator[Team | None]:
    """An evaluation that all processes of a run come to. The others encode for the first one, and leave when it does.

    Args:
        name: name of the evaluation, which no other one of the run has.
        encoder: encoder that is evaluated, the same in all processes.
        sources: what it is evaluated on, the same in all processes.

    Yields:
        The team, for `FeatureCache`, in the first of several processes, and None in all others, when it has ended.
    """
    if world_size() == 1 or rank() > 0:
        for answers, request in requests(name) if rank() > 0 else ():
            give(answers, request, lambda numbers, request=request: _answers(encoder, sources, request, numbers))
        yield None
        return
    team = Team(name, sources)
    try:
        yield team
    finally:
        team.dismiss()


def _answers(encoder: Encoder, sources: Sources, request: Request, numbers: Sequence[int]) -> Iterator[tuple[int, Answer]]:
    items = sources[request.role]
    items = items if request.indices is None else items.some(request.indices)
    if len(items) != request.count:
        raise ValueError(f"{request.role}: {len(items)} items in process {rank()}, {request.count} in the first; give all the same data")
    layers: dict[int, Patches] = {int(layer): patches for layer, patches in request.layers.items()}
    encoding = Encoding(tuple(request.shape), request.resize, request.batch_size, layers, request.bf16, request.tokens)
    batches = _Aligned(items.numbered(encoding.shape, **_sizes(encoding), numbers=numbers))
    for number in numbers:
        batch = batches.at(number)
        outputs = {} if batch is None else encode_batch(encoder, batch, encoding)
        indices = items.indices_of(number, batch_size=encoding.batch_size)
        yield number, Answer(items.known.seen(indices, reasons=items.reasons), outputs)


class _Aligned:
    """Batches that come with ascending numbers, some of which are missing, asked for by their numbers."""

    def __init__(self, batches: Iterator[tuple[int, ItemBatch]]) -> None:
        self._batches = batches
        self._next: tuple[int, ItemBatch] | None = None

    def at(self, number: int) -> ItemBatch | None:
        """The batch of this number; no smaller one is asked for later."""
        while self._next is None or self._next[0] < number:
            if (found := next(self._batches, None)) is None:
                return None
            self._next = found
        return self._next[1] if self._next[0] == number else None


def _sizes(encoding: Encoding) -> dict:
    return {"resize": encoding.resize, "batch_size": encoding.batch_size}


def encode_batch(encoder: Encoder, batch: Encodable, encoding: Encoding, *, cache: FeatureCache | None = None) -> dict[int, EncoderOutput]:
    """Features of items of one size, by layer, in float32 on the CPU."""
    assert cache is None or cache.encoder is encoder
    names = encoding.names(encoder, batch.digests)
    outputs: dict[int, EncoderOutput] = {}
    if cache is not None:
        found = {layer: cache.find(name, patches=encoding.layers[layer]) for layer, name in names.items()}
        outputs = {layer: output for layer, output in found.items() if output is not None}
    missing = [layer for layer in encoding.layers if layer not in outputs]
    if missing:
        with evaluating(encoder), torch.autocast(device_of(encoder).type, torch.bfloat16, enabled=encoding.bf16):
            computed = features_of_layers(encoder, normalised(batch.items, encoder), layers=missing, tokens=encoding.tokens)
        for layer, output in zip(missing, computed, strict=True):
            patches = encoding.layers[layer]
            needed = with_patches(EncoderOutput(output.cls.float(), output.patches.float()), patches)  # before it leaves the device
            outputs[layer] = EncoderOutput(needed.cls.cpu(), needed.patches.cpu())
            if cache is not None:
                cache.keep(names[layer], outputs[layer], patches=patches)
    return outputs


def device_of(encoder: Encoder) -> torch.device:
    """The device of the weights; the CPU where there are none."""
    return next(encoder.parameters(), torch.empty(0)).device


def normalised(items: Tensor, encoder: Encoder) -> Tensor:
    """Items as sources give them, on any device, to what the encoder takes, Float[B *item] on its own device."""
    return modalities.get(encoder.card.modality).normalise(items.to(device_of(encoder)), encoder.card)


@contextmanager
def evaluating(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode and no gradient inside; every module gets its own mode back."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        # Not inference_mode: a module that keeps a tensor (a resized position table) would hand it to the next training step.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
