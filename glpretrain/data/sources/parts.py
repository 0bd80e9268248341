"""Which source is trained on and which is held out, where somebody names one source or none.

Left out: splits that a source defines itself (`Source.train_test_split`), and which source reads a folder (`source_for`).
"""

import torch

from glpretrain import modalities
from glpretrain.core import keys
from glpretrain.data.sources.base import Source, Subset

_TRAIN_SHARE = 0.8
_EMBEDDED_ITEMS = 2400


def train_test_parts(source: Source) -> tuple[Source, Source]:
    """(train, test) parts of a source with classes: its own split, or else a fixed fifth of it is the test part."""
    if (split := source.train_test_split()) is not None:
        return split
    index = torch.arange(len(source))
    train = keys.uniform(keys.item_keys(seed=0, epoch=0, index=index)) < _TRAIN_SHARE  # not of the run's seed: runs stay comparable
    return Subset(source, indices=index[train].tolist()), Subset(source, indices=index[~train].tolist())


def embedded_source(modality: str, *, size: int) -> Source:
    """The source of synthetic items, with classes and masks, that runs on unlabelled data are scored on.

    Args:
        modality: name of the kind of item.
        size: size of its items.
    """
    kind = modalities.get(modality)
    make = modalities.resolve(kind.embedded_source)
    assert callable(make)
    source = make(_EMBEDDED_ITEMS, **{kind.embedded_size: size})
    assert isinstance(source, Source), f"{kind.embedded_source} is no source"
    return source
