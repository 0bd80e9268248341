"""The linear protocols of DINO and of MAE: one linear layer trained on `cls` of freshly cropped pictures, the encoder being frozen.

DINO: eval_linear.py of github.com/facebookresearch/dino at 7c446df: `cls` of the last blocks side by side, SGD with momentum 0.9 and no
weight decay, the learning rate falling to zero along a cosine from epoch to epoch. MAE: main_linprobe.py of
github.com/facebookresearch/mae at efb2a80: `cls` of the last block through a batch norm without weights, LARS, and a warmup. In both
a picture is cropped and flipped at random in every epoch, and scored by its centre, `features.crop: inner`.

Known differences: where several learning rates are given, the one that is used is chosen on held-out training items and not on those
that are scored, and the score is that of the last epoch, not of the best one. MAE's way of cropping, which makes a box that is too
large as large as the picture, is torchvision's here. One process does all of the work, and an interrupted evaluation starts again.
Training crops are torch's, which differ from Pillow's by a level of 255 here and there. Probes whose features are computed once are in
`linear` and `linear_sweep`.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import Dataset

from glpretrain.core import keys
from glpretrain.core.types import EncoderOutput
from glpretrain.data.loading import Loader
from glpretrain.data.sources.base import Source
from glpretrain.data.views.resample import crop, oriented, pixel_boxes, random_boxes
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.layers import features_of_layers
from glpretrain.evaluate.base import Evaluator, Result, require_positive, require_share
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.cls.linear_heads import LARS, Heads, initial_heads, train_heads
from glpretrain.evaluate.encoding import device_of, evaluating, normalised
from glpretrain.evaluate.items import DecodedItems, Sources
from glpretrain.evaluate.metrics.intervals import accuracy
from glpretrain.evaluate.probes import answerable, require_two_classes, stratified_split
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.reading import WORTH_WORKERS, Patches, default_workers
from glpretrain.evaluate.rows import LabelledFeatures, labelled_rows

_RATE_UNIT = 256  # items per step at which a learning rate is the one used
_CROP_SCALE, _CROP_RATIO, _FLIP = (0.08, 1.0), (3 / 4, 4 / 3), 0.5

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class LinearProtocol(Evaluator):
    """What the linear protocols share; not used by itself. Score: `accuracy`; chosen: `learning_rate`.

    A linear layer is trained on `train`, `test` is classified.

    Args:
        learning_rates: learning rates for 256 items per step; the one used is scaled. Of several, each training a layer of its own, the
            best one on held-out items is used again with all items, which takes twice as long.
        num_blocks: how many of the last blocks' `cls` the layer sees.
        epochs: number of passes over `train`.
        items_per_step: number of items in a step; fewer where `train` is smaller.
        held_out_ratio: share of `train` that chooses among several learning rates.
        seed: seed of crops and order.
    """

    headlines = ("accuracy",)
    scored = "test"
    needs = ("train", "test")
    truth = "classes"
    modality = "image"
    unused = ("layer", "tokens", "crop")
    whole_steps: ClassVar[bool]  # whether a last step of fewer items is left out
    interpolation: ClassVar[Interpolation]  # of training crops

    learning_rates: Sequence[float]
    num_blocks: int
    epochs: int
    items_per_step: int
    held_out_ratio: float = 0.1
    seed: int = 0

    @abstractmethod
    def norm(self, dim: int) -> nn.Module:
        """What features of a width go through."""

    @abstractmethod
    def optimizer(self, layer: nn.Linear, rate: float) -> Optimizer:
        """What moves a layer."""

    @abstractmethod
    def share(self, epoch: float) -> float:
        """The share of the learning rate at a time in epochs."""

    def validate(self) -> None:
        require_positive("learning_rates", self.learning_rates)
        require_positive("num_blocks", self.num_blocks)
        require_positive("epochs", self.epochs)
        require_positive("items_per_step", self.items_per_step)
        require_share("held_out_ratio", self.held_out_ratio)

    def num_bytes(self, dim: int, counts: Mapping[str, int]) -> int:
        """See `Evaluator`."""
        return self.num_blocks * super().num_bytes(dim, counts)

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        if self.num_blocks > encoder.num_layers:
            raise ValueError(f"num_blocks: {self.num_blocks}; accepted: numbers from 1 to {encoder.num_layers}, the encoder's depth")
        items = sources["train"]
        train = self._rows(encoder, items, cache)
        require_two_classes(train.labels, items)
        best = self.learning_rates[0] if len(self.learning_rates) == 1 else self._chosen(encoder, items, train)
        heads = self._trained(encoder, items, train, (best,))
        test, unlike = answerable(train, self._rows(encoder, sources["test"], cache), sources)
        predicted = heads.classes(test.cls)[:, 0]
        return Result({"accuracy": accuracy(predicted, test.labels, test.groups)}, {"learning_rate": best}, unlike)

    def _chosen(self, encoder: Encoder, items: DecodedItems, train: LabelledFeatures) -> float:
        """The learning rate whose layer, trained on the other items, gets the most held-out items right; the first of equals."""
        held_out, fitted = stratified_split(train.labels, train.groups, ratio=self.held_out_ratio)
        if len(held_out) == 0:
            raise ValueError(f"train: {len(train.labels)} labelled items are too few to hold {self.held_out_ratio} of them out")
        heads = self._trained(encoder, items, train.at(fitted), self.learning_rates)
        right = heads.classes(train.cls[held_out]) == train.labels[held_out, None]  # [M R]
        return self.learning_rates[int(right.float().mean(dim=0).argmax())]

    def _trained(self, encoder: Encoder, items: DecodedItems, train: LabelledFeatures, learning_rates: Sequence[float]) -> Heads:
        """Layers for these items, one per learning rate."""
        device, per_step = device_of(encoder), min(self.items_per_step, len(train.labels))
        steps = _Steps(train.index, train.labels, self.epochs, per_step=per_step, whole_steps=self.whole_steps, seed=self.seed)
        heads = initial_heads(self.norm(train.cls.shape[1]), learning_rates, dim=train.cls.shape[1], num_classes=len(items.source.classes))
        heads = Heads(heads.norm.to(device), [layer.to(device) for layer in heads.layers])
        rates = [rate * per_step / _RATE_UNIT for rate in learning_rates]
        optimizers = [self.optimizer(layer, rate) for layer, rate in zip(heads.layers, rates, strict=True)]
        batches = self._batches(encoder, items, steps)
        total = tracked(batches, total=len(steps), description=f"linear protocol on {items.name}")
        for loss in train_heads(heads, optimizers, total, share=lambda step: self.share(step / steps.per_epoch)):
            if not all(map(math.isfinite, loss)):
                raise ValueError(f"learning_rates: {list(learning_rates)}; a loss is not finite; accepted: smaller ones")
        return heads

    def _batches(self, encoder: Encoder, items: DecodedItems, steps: "_Steps") -> Iterator[tuple[Tensor, Tensor]]:
        """Features and labels of each step, on the device of the encoder."""
        _, height, width = self.features.shape(encoder)
        crops = _Crops(items.source, (height, width), self.interpolation, self.seed)
        workers = items.num_workers
        if workers is None:
            workers = default_workers() if len(steps) * steps.per_step >= WORTH_WORKERS else 0
        named = f"source {items.name!r}, pictures that a linear layer is trained on"
        loader = Loader(crops, steps, num_workers=workers, named=lambda asked: named, setting="num_workers")
        for pictures, labels in loader:
            parts = pictures.split(self.features.batch_size)
            yield torch.cat([self._features(encoder, part) for part in parts]), labels.to(device_of(encoder))

    def _features(self, encoder: Encoder, pictures: Tensor) -> Tensor:
        """Float[B num_blocks*D]: `cls` of the last blocks, the deepest last, of UInt8[B C H W]."""
        layers = range(-self.num_blocks, 0)
        with evaluating(encoder), torch.autocast(device_of(encoder).type, torch.bfloat16, enabled=self.features.bf16):
            outputs = features_of_layers(encoder, normalised(pictures, encoder), layers=layers)
        return torch.cat([output.cls.float() for output in outputs], dim=1)

    def _rows(self, encoder: Encoder, items: DecodedItems, cache: FeatureCache | None) -> LabelledFeatures:
        """A row of the same for every item that has a label, of the centre of its picture."""
        layers: dict[int, Patches] = dict.fromkeys(range(-self.num_blocks, 0), "none")
        batches = self.features.encode_layers(encoder, items, resize="inner_crop", layers=layers, cache=cache)

        def joined(outputs: Mapping[int, EncoderOutput]) -> Tensor:
            return torch.cat([outputs[layer].cls for layer in layers], dim=1)

        return labelled_rows(batches, joined, items=items)


@dataclass(frozen=True, kw_only=True)
class DINOLinear(LinearProtocol):
    """DINO's linear evaluation, with its values for a ViT-S; a ViT-B has `num_blocks: 1`, and the mean patch beside, which is left out.

    Settings are those of `LinearProtocol`.
    """

    whole_steps = False
    interpolation = "bilinear"

    learning_rates: Sequence[float] = (0.001,)
    num_blocks: int = 4
    epochs: int = 100
    items_per_step: int = 1024

    def norm(self, dim: int) -> nn.Module:
        """None."""
        return nn.Identity()

    def optimizer(self, layer: nn.Linear, rate: float) -> Optimizer:
        """SGD with momentum 0.9."""
        return SGD(layer.parameters(), lr=rate, momentum=0.9)

    def share(self, epoch: float) -> float:
        """A cosine that falls from epoch to epoch."""
        return (1 + math.cos(math.pi * math.floor(epoch) / self.epochs)) / 2


@dataclass(frozen=True, kw_only=True)
class MAELinear(LinearProtocol):
    """MAE's linear probing. Settings are those of `LinearProtocol`, and one more.

    Args:
        warmup_epochs: number of epochs in which the learning rate rises from zero.
    """

    whole_steps = True
    interpolation = "bicubic"

    learning_rates: Sequence[float] = (0.1,)
    num_blocks: int = 1
    epochs: int = 90
    items_per_step: int = 16384
    warmup_epochs: int = 10

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs: {self.warmup_epochs}; accepted: 0 to {self.epochs - 1}, fewer than epochs")

    def norm(self, dim: int) -> nn.Module:
        """Batch norm without weights."""
        return nn.BatchNorm1d(dim, affine=False, eps=1e-6)

    def optimizer(self, layer: nn.Linear, rate: float) -> Optimizer:
        """LARS with momentum 0.9."""
        return LARS(layer.parameters(), lr=rate)

    def share(self, epoch: float) -> float:
        """A rise from zero, and a cosine that falls from step to step."""
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        return (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs))) / 2


class _Step(NamedTuple):
    """What workers are asked for."""

    epoch: int
    index: Tensor  # Int[B]
    labels: Tensor  # Int[B]


class _Steps:
    """The items of each step: every epoch has all items in an order of its own."""

    def __init__(self, index: Tensor, labels: Tensor, epochs: int, *, per_step: int, whole_steps: bool, seed: int) -> None:
        self._index, self._labels, self._epochs, self._seed = index, labels, epochs, seed
        self.per_step = per_step
        self.per_epoch = len(index) // per_step if whole_steps else -(-len(index) // per_step)

    def __len__(self) -> int:
        return self._epochs * self.per_epoch

    def __iter__(self) -> Iterator[_Step]:
        for epoch in range(self._epochs):
            order = keys.permutation(keys.fold_in(torch.tensor(self._seed), epoch), len(self._index))
            for positions in order.split(self.per_step)[: self.per_epoch]:
                yield _Step(epoch, self._index[positions], self._labels[positions])


class _Crops(Dataset[tuple[Tensor, Tensor]]):
    """Random crops of the pictures of a step, UInt8[B C h w], and their labels, Int[B]."""

    def __init__(self, source: Source, size: tuple[int, int], interpolation: Interpolation, seed: int) -> None:
        self._source, self._size, self._seed = source, size, seed
        self._interpolation: Interpolation = interpolation

    def __getitem__(self, step: _Step) -> tuple[Tensor, Tensor]:
        pictures = [self._source[index].values for index in step.index.tolist()]
        sizes = torch.tensor([[picture.shape[2], picture.shape[1]] for picture in pictures])  # [B 2]
        drawn = keys.item_keys(seed=self._seed, epoch=step.epoch, index=step.index)
        boxes = random_boxes(drawn, aspect=sizes[:, 0] / sizes[:, 1], scale=_CROP_SCALE, ratio=_CROP_RATIO, flip=_FLIP)  # [B 5]
        pixels = pixel_boxes(boxes[:, :4], sizes=sizes).tolist()
        crops = [
            oriented(crop(picture, box=box, size=self._size, interpolation=self._interpolation), flip=flip, turns=0)
            for picture, box, flip in zip(pictures, pixels, boxes[:, 4].bool().tolist(), strict=True)
        ]
        return torch.stack(crops), step.labels
