"""A source and encoders whose features are known, so that a score can be known too."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.core.types import EncoderCard, EncoderOutput
from glpretrain.data.sources.base import Item, Source, UnreadableItemError
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate import Score


class TableSource(Source):
    """Items from a list."""

    def __init__(
        self,
        items: Sequence[Item],
        *,
        classes: Sequence[str] = (),
        mask_classes: Sequence[str] = (),
        unreadable: Sequence[int] = (),
    ) -> None:
        self.items, self._classes, self._mask_classes, self.unreadable = list(items), list(classes), list(mask_classes), set(unreadable)
        self.num_reads = 0

    @property
    def name(self) -> str:
        return "table"

    @property
    def classes(self) -> Sequence[str]:
        return self._classes

    @property
    def mask_classes(self) -> Sequence[str]:
        return self._mask_classes

    @property
    def has_masks(self) -> bool:
        return self.items[0].instances is not None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        self.num_reads += 1
        if index in self.unreadable:
            raise UnreadableItemError(f"item {index}: truncated")
        return self.items[index]


def labelled(labels: Sequence[int], *, num_classes: int, size: int = 4) -> TableSource:
    """Items whose every pixel is the label in the first channel and the position in the list in the other two."""
    items = []
    for position, label in enumerate(labels):
        image = torch.empty(3, size, size, dtype=torch.uint8)
        image[0], image[1], image[2] = label, position // 256, position % 256
        items.append(Item(values=image, label=label, instances=None, regions=None))
    return TableSource(items, classes=[f"c{n}" for n in range(num_classes)])


def masked(instances: Sequence[Tensor]) -> TableSource:
    """Images whose first channel holds the instance ids and whose other two hold the position in the list."""
    items = []
    for position, mask in enumerate(instances):
        image = torch.zeros(3, *mask.shape, dtype=torch.uint8)
        image[0], image[1], image[2] = mask.clamp_min(0), position // 256, position % 256
        items.append(Item(values=image, label=-1, instances=mask, regions=None))
    return TableSource(items)


def with_classes(masks: Sequence[Tensor], *, num_classes: int) -> TableSource:
    """As `masked`, the ids being classes, which the masks hold as well; class 0 is the ground."""
    items = [item._replace(semantic=mask) for item, mask in zip(masked(masks).items, masks, strict=True)]
    return TableSource(items, mask_classes=[f"m{n}" for n in range(num_classes)])


class StubEncoder(Encoder):
    """Features from a function of the pixels, given back as the integers that the source wrote.

    Args:
        features: Float[B C H W] of integers 0 to 255 to an `EncoderOutput`.
        size: height and width.
        patch: side of a patch.
    """

    def __init__(self, features: Callable[[Tensor], EncoderOutput], *, size: int = 4, patch: int = 2) -> None:
        super().__init__()
        self.features, self.size, self.patch = features, size, patch
        self.probe = torch.nn.Linear(1, 1)
        self.frozen = torch.nn.Linear(1, 1).eval()
        self.modes: list[bool] = []

    @property
    def card(self) -> EncoderCard:
        return EncoderCard(
            encoder="StubEncoder", arguments={}, modality="image", item_shape=(3, self.size, self.size),
            patch_size=(self.patch, self.patch), embed_dim=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
        )  # fmt: skip

    @property
    def embed_dim(self) -> int:
        return 8

    @property
    def num_layers(self) -> int:
        return 1

    def grid(self, item_shape: Sequence[int]) -> tuple[int, ...]:
        if item_shape[1] % self.patch or item_shape[2] % self.patch:
            raise ValueError(f"item_shape: {tuple(item_shape)}; accepted: multiples of {self.patch}")
        return item_shape[1] // self.patch, item_shape[2] // self.patch

    def _encode(self, items, *, mask=None, keep=None):
        self.modes += [self.training, self.probe.training]
        mean = torch.tensor(self.card.mean)[:, None, None]
        std = torch.tensor(self.card.std)[:, None, None]
        return self.features(((items * std + mean) * 255).round())

    def add_mask_token(self) -> None:
        raise ValueError("StubEncoder cannot hide tokens")

    def require_keep(self) -> None:
        raise ValueError("StubEncoder cannot drop tokens")

    def layer_of(self, name: str) -> int:
        return 0

    def backbone_state(self) -> dict[str, Tensor]:
        return {}

    def load_backbone_state(self, state: dict[str, Tensor]) -> None:
        assert not state


def half_width(score: Score) -> float:
    """Half of the width of a score's interval, which holds its value; infinity where there is none."""
    if score.low is None or score.high is None:
        assert score.low is None and score.high is None
        return math.inf
    assert score.low <= score.value <= score.high
    return (score.high - score.low) / 2


def label_of(items: Tensor) -> Tensor:
    """Int[B]: the label that `labelled` wrote."""
    return items[:, 0, 0, 0].long()


def position_of(items: Tensor) -> Tensor:
    """Int[B]: the position that `labelled` and `masked` wrote."""
    return (items[:, 1, 0, 0] * 256 + items[:, 2, 0, 0]).long()


def noise(position: Tensor, *shape: int, seed: int) -> Tensor:
    """Float[B *shape]: standard normal, a function of the position alone."""
    return keys.normal(keys.item_keys(seed=seed, epoch=0, index=position), *shape)


# What the tests of scores of `cls` share.

NUM_CLASSES = 5


def labels(count: int) -> list[int]:
    """Labels with no pattern that an order could follow."""
    return [index * index % 7 % NUM_CLASSES for index in range(count)]


def output(cls: Tensor) -> EncoderOutput:
    """`cls` and four patches like it."""
    return EncoderOutput(cls, cls[:, None].expand(-1, 4, -1))


def noisy_truth(items: Tensor, *, scale: float) -> EncoderOutput:
    """One-hot of the label with noise."""
    return output(functional.one_hot(label_of(items), 8).float() + scale * noise(position_of(items), 8, seed=2))


def truth(items: Tensor) -> EncoderOutput:
    """One-hot of the label with a little noise."""
    return noisy_truth(items, scale=0.01)


def noisy(items: Tensor) -> EncoderOutput:
    """Neither noise nor the truth."""
    return noisy_truth(items, scale=0.6)


def chance(items: Tensor) -> EncoderOutput:
    """Noise."""
    return output(noise(position_of(items), 8, seed=3))
