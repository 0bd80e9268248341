"""Classification of images and of clouds: a head on pooled tokens (`class_heads`), and a whole backbone that learns with it.

The defaults are those of MAE's fine-tuning: patches are averaged before the final norm of the backbone, and a new norm stands behind the
pooling; the head starts near zero. mixup, cutmix and the augmentation are timm's.
Reference code: facebookresearch/mae at efb2a80 (main_finetune.py, engine_finetune.py, models_vit.py, util/lr_decay.py, util/lr_sched.py,
util/datasets.py). Clouds, with the head `mlp`: Pang-Yatian/Point-MAE at 7445a68 (models/Point_MAE.py, tools/runner_finetune.py).
Known differences: an odd batch is refused with mixup or cutmix, as timm does, but before the first step; paths are dropped by keys; weights
move in float32 or bfloat16, not float16; a class token that a backbone for clouds lacks is added only where the backbone learns.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose

from glpretrain.core.batch import Batch
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate import ForgeryDetection, LinearProbe
from glpretrain.evaluate.base import Evaluator, Score
from glpretrain.evaluate.metrics.detection import detection_scores
from glpretrain.evaluate.metrics.intervals import accuracy, mean_of_scores, rate_score
from glpretrain.evaluate.metrics.roc import Detections, eer_threshold
from glpretrain.finetune.base import FineTune, logits_of
from glpretrain.finetune.class_heads import Kind, Pool, with_class_head
from glpretrain.finetune.data import TaskViews
from glpretrain.finetune.head_start import HeadStart, begin_with_probe, check_head_start, probe_layer
from glpretrain.finetune.transforms import Interpolation, Transform, drawn_from, picture

_TOP = 5


class LabelledViews(TaskViews):
    """A random resized crop, flip and colours of each training image, by timm; the centre of each test image.

    Args:
        size: height and width of the images; None is the size that the backbone was trained on.
        scale: smallest and largest share of the image's area that a crop shows.
        hflip: probability of a horizontal flip.
        color_jitter: strength of changes of brightness, contrast and saturation; not used with `auto_augment`.
        auto_augment: timm's name of a policy, such as `rand-m9-mstd0.5-inc1` for RandAugment; None for none.
        erasing: probability that a rectangle is replaced by noise.
        crop_pct: share of the resized short side that an evaluation keeps; 0.875 resizes to 256 for 224.
        interpolation: how pixels are interpolated.

    Raises:
        ValueError: a value out of range, or a policy that timm does not have.
    """

    modality: ClassVar[str] = "image"

    def __init__(
        self,
        size: int | None = None,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        hflip: float = 0.5,
        color_jitter: float | None = None,
        auto_augment: str | None = None,
        erasing: float = 0.0,
        crop_pct: float = 0.875,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        super().__init__(size)
        if not 0.0 < crop_pct <= 1.0:
            raise ValueError(f"views: crop_pct={crop_pct} given; accepted: above 0 and at most 1")
        self.crop_pct = crop_pct
        self.interpolation: Interpolation = interpolation
        if not 0.0 < scale[0] <= scale[1] <= 1.0:
            raise ValueError(f"views: scale={list(scale)} given; accepted: two shares above 0 and at most 1, the smaller first")
        for name, value in (("hflip", hflip), ("erasing", erasing)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"views: {name}={value} given; accepted: a probability")
        if color_jitter is not None and auto_augment is not None:
            raise ValueError(
                f"views: color_jitter={color_jitter} would be ignored beside auto_augment={auto_augment!r}; leave one of them out"
            )
        self.scale, self.hflip, self.color_jitter = scale, hflip, color_jitter
        self.auto_augment, self.erasing = auto_augment, erasing
        try:
            self._augmentation(1, mean=(0.5,), std=(0.5,))
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(f"views: auto_augment={auto_augment!r} given; timm accepts names such as rand-m9-mstd0.5-inc1") from error

    def _augmentation(self, size: int, *, mean: Sequence[float], std: Sequence[float]) -> Compose:
        made = create_transform(
            size,
            is_training=True,
            scale=self.scale,
            hflip=self.hflip,
            color_jitter=self.color_jitter,  # pyright: ignore[reportArgumentType]  None is timm's word for none
            auto_augment=self.auto_augment,
            interpolation=self.interpolation,
            re_prob=self.erasing,
            re_mode="pixel",
            mean=tuple(mean),
            std=tuple(std),
        )
        assert isinstance(made, Compose)
        return made

    def classes_of(self, source: Source) -> list[str]:
        """The classes of the source.

        Raises:
            ValueError: there are fewer than two.
        """
        return classes_of(source)

    def transform(self, card: EncoderCard) -> Transform:
        """The short side is resized, and the centre is cut."""
        side = self.default_size()
        return Transform((side, side), self.crop_pct, card.mean, card.std, self.interpolation, card.value_range)

    def augmented(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """A random view, Float[C H W], and the class, Int[]."""
        augmentation = self._augmentation(self.default_size(), mean=card.mean, std=card.std)
        view = augmentation(picture(item.values))
        assert isinstance(view, Tensor)
        return view, torch.tensor(item.label)

    def plain(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """The resized and cut image, Float[C H W], and the class, Int[]."""
        return self.transform(card)(item.values), torch.tensor(item.label)


def classes_of(source: Source) -> list[str]:
    """The classes of a source.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(source.classes) < 2:
        found = f"one class, {source.classes[0]!r}" if source.classes else "no classes"
        raise ValueError(f"data: {source.name} has {found}; accepted: a folder for each of two classes or more")
    return list(source.classes)


@runtime_checkable
class Batched(Protocol):
    """What mixing has to know of the data."""

    batch_size: int


class Classification(FineTune):
    """A classifier that starts from a backbone.

    Args:
        encoder: the backbone.
        classes: names of the classes.
        pool: what the head sees: the `mean` of the patches, `cls`, both side by side (`cls_mean`), or `cls` beside the maximum of the
            patches (`cls_max`), for which a backbone for clouds without a class token gets one, unless it is frozen.
        head: `linear`, one layer; `mlp`, the three layers with batch norm of Point-MAE's classifier; or `normalized`, FSFM's head for
            spoofed faces.
        dropout: share of the hidden values of the `mlp` or of the `normalized` head that are dropped in training.
        drop_path: rate of stochastic depth in the last block; it grows evenly from 0 in the first one.
        label_smoothing: share of the target that is spread over all classes.
        mixup: alpha of mixup; 0 mixes no images.
        cutmix: alpha of cutmix; 0 cuts no images. With both, each batch gets one of them.
        mix_prob: share of the batches that are mixed.
        freeze: see `FineTune`.
        head_start: `fresh` weights for the head, or `probe`: those of a logistic regression on what it sees of the training items, at most
            20,000 of them, so that training begins at the score of a linear probe; only for `linear`.
        positive: the class that is to be found, such as `fake`, all others being real: adds `auc`, `eer`, and with a development part
            `hter`, of items and, where items are frames (`Source.groups`), of videos. None for none.
        **kwargs: arguments of `FineTune`.

    Raises:
        ValueError: a value out of range, or an encoder that the settings do not fit.
    """

    terms = ("classes",)
    task: ClassVar[str] = "classification"
    headline: str = "accuracy"
    probe: Evaluator = LinearProbe()

    def __init__(
        self,
        encoder: Encoder,
        classes: Sequence[str],
        *,
        pool: Pool = "mean",
        head: Kind = "linear",
        dropout: float = 0.5,
        drop_path: float = 0.0,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        freeze: bool = False,
        head_start: HeadStart = "fresh",
        positive: str | None = None,
        **kwargs,  # noqa: ANN003
    ) -> None:
        for name, value in (("drop_path", drop_path), ("label_smoothing", label_smoothing)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"Classification: {name}={value} given; accepted: 0 or more, and less than 1")
        if not 0.0 <= mix_prob <= 1.0:
            raise ValueError(f"Classification: mix_prob={mix_prob} given; accepted: a probability")
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if value < 0.0:
                raise ValueError(f"Classification: {name}={value} given; accepted: numbers from 0 on")
            if value > 0.0 and encoder.card.modality != "image":
                raise ValueError(f"Classification: {name}={value} given; only images are mixed: set it to 0 for {encoder.card.modality}")
        encoder, task_head = with_class_head(
            encoder, len(classes), pool=pool, head=head, dropout=dropout, drop_path=drop_path, freeze=freeze
        )
        super().__init__(encoder, task_head, classes=classes, freeze=freeze, **kwargs)
        check_head_start(head_start, owner="Classification", head=head)
        self.label_smoothing, self.positive, self.head_start = label_smoothing, positive, head_start
        if positive is not None:
            if positive not in classes:
                raise ValueError(f"Classification: positive={positive!r} given; accepted: {', '.join(classes)}")
            self.headline, self.probe = "auc", ForgeryDetection(positive=positive)
        self.mixing: Mixup | None = None
        if mixup > 0.0 or cutmix > 0.0:
            self.mixing = Mixup(mixup, cutmix, prob=mix_prob, label_smoothing=label_smoothing, num_classes=len(classes))

    def setup(self, stage: str) -> None:
        """Refuse a batch that cannot be mixed."""
        super().setup(stage)
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  its stub
        if self.mixing is not None and isinstance(data, Batched) and data.batch_size % 2:
            raise ValueError(f"data.batch_size={data.batch_size} given; mixup and cutmix mix pairs: accepted are even numbers")

    def on_fit_start(self) -> None:
        """Begin with the probe where that is asked for; a run that goes on has its head already."""
        super().on_fit_start()
        if self.head_start == "probe":
            begin_with_probe(self, fitted=partial(probe_layer, num_classes=len(self.classes), device=self.device))

    @property
    def chooses(self) -> bool:
        """The threshold of `hter`."""
        return self.positive is not None

    def evaluated_logits(self, items: Tensor) -> Tensor:
        """Float[B K] of test items, Float[B *item]; or Float[B K 1+V] where V views of an item vote beside it, Float[B 1+V *item]."""
        if items.dim() == 1 + len(self.encoder.card.item_shape):
            return super().evaluated_logits(items)
        return torch.stack([logits_of(self.evaluated, views) for views in items.unbind(dim=1)], dim=2)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`classes`: cross-entropy, of mixed items and targets where there is mixing."""
        assert batch.targets is not None
        items, targets = batch.views["global"].items.squeeze(0), batch.targets
        if targets.dim() == 2:  # mixed by the views
            return {"classes": self._mixed_loss(self.logits(batch).float(), targets)}
        if self.mixing is None:
            loss = F.cross_entropy(self.logits(batch).float(), targets, reduction="none", label_smoothing=self.label_smoothing)
            return {"classes": loss}
        with drawn_from(self.draw_key):
            mixed, soft = self.mixing(items.clone(), targets)  # timm mixes in place
        return {"classes": F.cross_entropy(self.logits(batch, mixed).float(), soft, reduction="none")}

    def _mixed_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Float[B]: (1 - s) cross-entropy of the first class + s that of the second, of Float[B 3], both classes and the share s."""
        first, second = (
            F.cross_entropy(logits, targets[:, place].long(), reduction="none", label_smoothing=self.label_smoothing) for place in (0, 1)
        )
        return torch.lerp(first, second, targets[:, 2])

    def outcomes(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Int[B 3]: the class, the predicted one, and whether the class is among the five most probable ones; where views vote Int[B 4],
        with the class that the mean of their logits predicts. With `positive` Float64, its probability being the last column."""
        all_views = logits.flatten(2) if logits.dim() > 2 else logits.unsqueeze(2)  # [B K 1+V]
        plain, views = all_views[..., 0], all_views[..., 1:]  # [B K], [B K V]
        top = plain.topk(min(_TOP, len(self.classes)), dim=1).indices
        found = [targets, plain.argmax(dim=1), (top == targets.unsqueeze(1)).any(dim=1).long()]
        if views.shape[2]:
            found.append(views.mean(dim=2).argmax(dim=1))
        if self.positive is not None:
            found.append(plain.double().softmax(dim=1)[:, self.classes.index(self.positive)])
        return torch.stack([column.double() for column in found] if self.positive is not None else found, dim=1)

    def scores(self, outcomes: Tensor, groups: Tensor | None) -> dict[str, Score]:
        """`accuracy`; `top5` with more than five classes; `balanced_accuracy`, the mean over the classes that the items have;
        `voted_accuracy` where views vote; and with `positive` the scores of a detector."""
        detected = {} if self.positive is None else self._detected(outcomes, groups)
        whole = outcomes if self.positive is None else outcomes[:, :-1].long()
        truth, predicted, in_top, *voted = whole.unbind(dim=1)
        found = {"accuracy": accuracy(predicted, truth, groups)}
        if len(self.classes) > _TOP:
            found["top5"] = rate_score(in_top.float(), groups)
        of_class = [truth == number for number in truth.unique().tolist()]
        recalls = [accuracy(predicted[own], truth[own], None if groups is None else groups[own]) for own in of_class]
        found["balanced_accuracy"] = mean_of_scores(recalls, count=len(truth))
        if voted:
            found["voted_accuracy"] = accuracy(voted[0], truth, groups)
        return detected | found

    def _detected(self, outcomes: Tensor, groups: Tensor | None) -> dict[str, Score]:
        """Scores of a detector; none where the items are of one kind only. A video's score is the mean of its frames' probabilities."""
        found = self._detections(outcomes, groups)
        if found.positive.unique().numel() < 2:
            return {}
        thresholds: dict[str, float] = {}
        choosing = None if self.choosing is None else self._detections(*self.choosing)
        if choosing is not None and choosing.positive.unique().numel() == 2:
            thresholds = {"threshold": eer_threshold(choosing)}
            if found.has_groups:
                thresholds["video_threshold"] = eer_threshold(choosing.averaged())
        return detection_scores(found, thresholds)

    def _detections(self, outcomes: Tensor, groups: Tensor | None) -> Detections:
        assert self.positive is not None
        numbers = torch.arange(len(outcomes)) if groups is None else groups.unique(return_inverse=True)[1]
        return Detections(outcomes[:, -1], outcomes[:, 0].long() == self.classes.index(self.positive), numbers)
