"""How long an evaluator will take, and how much memory, before it begins: some items are tried, and the rest is scaled.

Fits by iteration are left out: how soon they end is known only afterwards.
"""

import sys
import time
from typing import NamedTuple

import torch

from glpretrain.core.distributed import world_size
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.base import Evaluator
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import Encoding, device_of, evaluating, normalised
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.reading import WORTH_WORKERS, default_workers, read

_LONG = 60.0  # seconds from which on an estimate is said
_TRIED = 32  # items that are read and encoded to see how long it takes


class Estimate(NamedTuple):
    """What an evaluator will cost."""

    seconds: float
    num_items: int
    num_bytes: int

    def line(self, name: str) -> str:
        """`knn: about 12 min for 100,000 items, 4.0 GB`."""
        amount = f"{self.seconds / 3600:.1f} h" if self.seconds >= 5400 else f"{max(1, round(self.seconds / 60))} min"
        return f"{name}: about {amount} for {self.num_items:,} items, {self.num_bytes / 1e9:.1f} GB"


def announce(name: str, evaluator: Evaluator, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> None:
    """Say how long an evaluator will take, in one line, where that is more than a minute. Arguments as of `estimated`."""
    found = estimated(evaluator, encoder, sources, cache)
    if found is not None and found.seconds >= _LONG:
        print(found.line(name), file=sys.stderr, flush=True)


def estimated(evaluator: Evaluator, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Estimate | None:
    """What an evaluator will cost; None where it has few items, for which trying would cost more than it tells.

    Args:
        evaluator: the evaluator.
        encoder: encoder that it scores.
        sources: what it is scored on.
        cache: features that need not be computed.
    """
    found = {role: items for role in evaluator.roles if role in sources and isinstance(items := sources.measured(role), DecodedItems)}
    counts = {role: len(items) for role, items in found.items()}
    if sum(counts.values()) < WORTH_WORKERS:
        return None
    try:
        each_once = {id(items.known): items for items in found.values()}
        seconds = sum(_encoding_seconds(evaluator, encoder, items, cache) for items in each_once.values())
        seconds += evaluator.comparing_seconds(encoder.embed_dim, counts, device_of(encoder))
    except (ValueError, RuntimeError):  # which the evaluator will say itself
        return None
    return Estimate(seconds, sum(counts.values()), evaluator.num_bytes(encoder.embed_dim, counts))


def _encoding_seconds(evaluator: Evaluator, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> float:
    """Of the items whose features are not in the cache."""
    features = evaluator.features
    shape = tuple(features.shape(encoder))
    encoding = Encoding(shape, features.cropping, features.batch_size, {features.layer: "none"}, features.bf16)
    if cache is not None and cache.files is not None:
        cache.files.recall(items.source, items.known)
    options = {"resize": encoding.resize, "batch_size": encoding.batch_size}
    known = (items.known_batch(number, shape, **options) for number in range(items.num_batches(encoding.batch_size)))
    missing = sum(batch is None or cache is None or not encoding.is_in(cache, batch.digests) for batch in known)
    if missing == 0:
        return 0.0
    start = time.perf_counter()
    decoded = read(items.source, items.indices[:_TRIED], shape, features.cropping)
    reading = (time.perf_counter() - start) / _TRIED
    if decoded.values is None:
        return 0.0
    tried: list[float] = []
    for _ in range(2):  # the first time is longer
        start = time.perf_counter()
        with evaluating(encoder), torch.autocast(device_of(encoder).type, torch.bfloat16, enabled=features.bf16):
            encoder(normalised(decoded.values, encoder)).cls.float().cpu()
        tried.append((time.perf_counter() - start) / len(decoded.values))
    workers = default_workers() if items.num_workers is None else items.num_workers
    per_item = reading + min(tried) if workers == 0 else max(reading / workers, min(tried))
    return min(missing * features.batch_size, len(items)) * per_item / world_size()
