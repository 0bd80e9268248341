"""Segmentation: the class of every pixel, by a linear layer or a small transformer on patches, and a whole backbone that learns with it.

Training sees random crops, evaluation whole pictures: the short side is resized to the size of the crops, windows of this size are averaged
(`windows`), and logits are upsampled to the size of the mask before a class is chosen, so that scores count the pixels of the truth.
Reference code: rstrudel/segmenter at 20d1bfa (segm/data/config/ade20k.py, segm/engine.py, segm/model/utils.py).
Known differences: a crop that mostly shows one class is not drawn again (cat_max_ratio); colours change in brightness, contrast and
saturation only; and the loss is a mean over all pixels, the ignored ones being 0 (mmsegmentation's mean, which BEiT and DINOv2 train with),
so that a pixel has the same weight in every crop.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from glpretrain.core.batch import Batch
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.own import SourceSpec, masked_spec
from glpretrain.data.sources.base import Source, UnreadableItemError
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate import LinearSegmentation
from glpretrain.evaluate.base import Evaluator, Score
from glpretrain.evaluate.metrics.confusion import areas, confusion, segmentation_scores
from glpretrain.finetune.base import FineTune, for_tuning, logits_of
from glpretrain.finetune.data import TaskViews
from glpretrain.finetune.segmentation_heads import Kind, segmentation_head
from glpretrain.finetune.transforms import Interpolation, Transform
from glpretrain.finetune.windows import classes_at, upsampled, whole_logits

IGNORED = -1  # class of a pixel that counts nowhere
_SAID = ("miou", "pixel_accuracy")


class SegmentationViews(TaskViews):
    """A random crop of each training image at a random scale, flipped and with other colours, its mask with it; the whole test image.

    Args:
        size: height and width of a crop and of the windows of an evaluation; None is the size that the backbone was trained on.
        scale: smallest and largest short side that an image is resized to, in sizes of a crop. What a crop shows beyond the image has the
            mean colour, and is ignored.
        hflip: probability of a horizontal flip.
        color_jitter: strength of changes of brightness, contrast and saturation; None for none.
        interpolation: how pixels are interpolated; those of masks are the nearest ones.

    Raises:
        ValueError: a value out of range.
    """

    modality: ClassVar[str] = "image"
    evaluated_at_once: ClassVar[int] = 1  # whole images have sizes of their own

    def __init__(
        self,
        size: int | None = None,
        *,
        scale: tuple[float, float] = (0.5, 2.0),
        hflip: float = 0.5,
        color_jitter: float | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        super().__init__(size)
        self.interpolation: Interpolation = interpolation
        if not 0.0 < scale[0] <= scale[1]:
            raise ValueError(f"views: scale={list(scale)} given; accepted: two numbers above 0, the smaller first")
        if not 0.0 <= hflip <= 1.0:
            raise ValueError(f"views: hflip={hflip} given; accepted: a probability")
        if color_jitter is not None and not 0.0 < color_jitter <= 1.0:
            raise ValueError(f"views: color_jitter={color_jitter} given; accepted: above 0 and at most 1, or null for none")
        self.scale, self.hflip, self.color_jitter = scale, hflip, color_jitter

    @classmethod
    def own_source(cls, path: str | Path) -> SourceSpec:
        """Images with masks."""
        return masked_spec(path, cls.modality)

    def classes_of(self, source: Source) -> list[str]:
        """Names of the values of its masks.

        Raises:
            ValueError: there are fewer than two.
        """
        if len(source.mask_classes) < 2:
            found = "masks whose values have no names" if source.has_masks else "no masks"
            raise ValueError(
                f"data: {source.name} has {found}; accepted: images/ beside masks/ with a classes.csv (index,name) of two classes or more,"
                " or give --data.source.init_args.mask_classes"
            )
        return list(source.mask_classes)

    def read(self, source: Source, index: int) -> Item:
        """An image with its classes in place of a region map, which is what memory keeps beside an image.

        Raises:
            UnreadableItemError: the item cannot be decoded, or has no classes.
        """
        item = source[index]
        if item.semantic is None:
            raise UnreadableItemError(f"{source.name}: item {index} has no mask of classes")
        return item._replace(instances=None, semantic=None, regions=item.semantic.to(torch.int16))

    def augmented(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """A random crop, Float[C H W], and the class of every pixel, Int[H W]."""
        assert item.regions is not None, "read puts them there"
        image, mask = self._joint(card)(tv_tensors.Image(item.values), tv_tensors.Mask(item.regions))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()

    def plain(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """The whole image, resized, Float[C h w], and the class of every pixel at its own size, Int[H W]."""
        assert item.regions is not None, "read puts them there"
        return self.transform(card)(item.values), item.regions.long()

    def transform(self, card: EncoderCard) -> Transform:
        """The short side is resized to the size."""
        side = self.default_size()
        return Transform((side, side), None, card.mean, card.std, self.interpolation, card.value_range)

    def _joint(self, card: EncoderCard) -> v2.Compose:
        """What is done to an image and its mask."""
        side = self.default_size()
        sides = [max(1, round(side * share)) for share in self.scale]
        fill = {tv_tensors.Image: [round(255 * value) for value in card.mean], tv_tensors.Mask: IGNORED}
        steps = [
            v2.RandomShortestSize(list(range(sides[0], sides[1] + 1)), interpolation=InterpolationMode(self.interpolation)),
            v2.RandomCrop(side, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(self.hflip),
        ]
        if self.color_jitter is not None:
            steps.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        steps.append(v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True))
        return v2.Compose([*steps, v2.Normalize(list(card.mean), list(card.std))])


class Segmentation(FineTune):
    """A network that says which class every pixel shows, and starts from a backbone.

    Its logits, of training crops and in exported programs, are those of patches: Float[B K h w]. They are upsampled bilinearly
    (align_corners=False) before a class is chosen.

    Args:
        encoder: the backbone.
        classes: names of the classes.
        head: `linear` (batch norm and one linear layer, as in DINOv2's linear evaluation) or `transformer` (Segmenter's decoder).
        drop_path: rate of stochastic depth in the last block; it grows evenly from 0 in the first one.
        **kwargs: arguments of `FineTune`.

    Raises:
        ValueError: a value out of range, or an encoder that the settings do not fit.
    """

    terms = ("pixels",)
    task: ClassVar[str] = "segmentation"
    headline: str = "miou"
    probe: Evaluator = LinearSegmentation()

    def __init__(
        self,
        encoder: Encoder,
        classes: Sequence[str],
        *,
        head: Kind = "transformer",
        drop_path: float = 0.0,
        **kwargs,  # noqa: ANN003
    ) -> None:
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"Segmentation: drop_path={drop_path} given; accepted: 0 or more, and less than 1")
        encoder = for_tuning(encoder, drop_path=drop_path)
        super().__init__(encoder, segmentation_head(encoder.embed_dim, len(classes), kind=head), classes=classes, **kwargs)

    @property
    def said(self) -> dict[str, Score]:
        """Without those of single classes."""
        return {name: score for name, score in self.found.items() if name in _SAID}

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`pixels`: cross-entropy of the pixels of a crop, those that are ignored being 0, and the mean over all of them."""
        assert batch.targets is not None
        targets = batch.targets
        logits = upsampled(self.logits(batch).float(), (targets.shape[1], targets.shape[2]))  # [B K H W]
        return {"pixels": F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").mean(dim=(1, 2))}

    def evaluated_logits(self, items: Tensor) -> Tensor:
        """Float[1 K h w] of one whole image, Float[1 C h w]."""
        return whole_logits(items[0], partial(logits_of, self.evaluated)).unsqueeze(0)

    def outcomes(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Float64[1 3 K]: `areas` of one image, of the classes at the size of its mask."""
        K, (height, width) = logits.shape[1], targets.shape[1:]
        predicted = classes_at(logits[0], (height, width)).unsqueeze(0)
        return areas(confusion(targets.cpu(), predicted.cpu(), num_classes=K, num_predicted=K))

    def scores(self, outcomes: Tensor, groups: Tensor | None) -> dict[str, Score]:
        """`miou`, the mean over the classes that the test part shows, `pixel_accuracy` and `iou_<class>`.

        Intervals are those of images that are drawn with replacement, or of groups of images where some belong together; the number of a
        score counts what is drawn.
        """
        if groups is not None:
            places = groups.unique(return_inverse=True)[1]
            outcomes = outcomes.new_zeros(int(places.max()) + 1, *outcomes.shape[1:]).index_add_(0, places, outcomes)
        found = segmentation_scores(outcomes, classes=self.classes)
        return {"pixel_accuracy" if name == "accuracy" else name: score for name, score in found.items()}
