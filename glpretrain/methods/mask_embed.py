"""MaskEmbed (locality alignment): a trained ViT learns on, until the embedding of each patch says what this patch shows.

Idea: a trained encoder knows what parts of an image show, because it can be given the image with everything else masked. Its frozen copy
is the teacher and sees masked images. The student sees the whole image; the embeddings of the patches that the mask hides are set to
zero, and a light decoder predicts the teacher's features from the others. This works only if an embedding describes its own patch.
Paper: Covert, Sun, Zou, Hashimoto, "Locality alignment improves vision-language models", ICLR 2025 (arXiv 2410.11087).
Reference code: iancovert/locality-alignment at 092ed8e (scripts/train.py, locality_alignment/model_utils.py, student_utils.py,
teacher_utils.py, train_utils.py).
Known differences: several views of an item count as several items; the targets are scaled by their variance over the first views of
training items, the official ones by that over a validation set, and with the losses over some of the tokens the official ones are not
scaled (`scale_items: null`); the teacher computes in float32 unless `teacher_precision` says otherwise; the decoder's MLPs are plain ones
where the encoder's are gated; an image must divide into patches. What is official only when it is asked for: a fresh final norm of the
student (`fresh_norm: true`), a trunk that learns at the full rate from the first step on (`optimization: {trunk: {ramp: 0.0},
layer_decay: 1.0}`), and one view without changed colours. Left out: the losses `cosine` and `l1`, the targets of the class token alone
(`prefix_only`), and a head of two layers behind the student.
"""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.distributed import rank, world_size
from glpretrain.core.patches import without_patches
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.layers import without_last_blocks
from glpretrain.encoders.plain_blocks import block_shape
from glpretrain.encoders.sequences import joined_tokens
from glpretrain.encoders.transfer import Transfer
from glpretrain.methods.base import Method
from glpretrain.objectives.reconstruction import CountedTokens, MaskedFeatures
from glpretrain.training.branch import Branch
from glpretrain.training.decoders import MaskedViewDecoder
from glpretrain.training.target_scale import TargetScale
from glpretrain.training.teacher import FrozenTeacher, Precision


@runtime_checkable
class Readable(Protocol):
    """What measuring the targets needs of the data."""

    source: Sized
    batch_size: int

    def raw_batch(self, indices: Sequence[int], *, encoder: Encoder, epoch: int) -> object:
        """Items, by dataset index, as a worker gives them in an epoch."""
        ...

    def make_batch(self, raw: object, *, encoder: Encoder) -> Batch:
        """The batch of these items, on their device."""
        ...


class MaskEmbed(Method):
    """Locality alignment of a trained ViT by prediction of its own features of masked images.

    The run must start from a backbone (`init_from`). Views have the encoder's `img_size`: the decoder has a position for each patch.

    Args:
        encoder: the trunk, a ViT for images.
        decoder_dim: width of the decoder; None is that of the encoder.
        decoder_depth: number of blocks of the decoder.
        decoder_heads: attention heads per block of the decoder; None is the encoder's number.
        skip_blocks: number of blocks at the end that the teacher leaves out; its final norm follows the block before them.
        antithetical: give every mask together with its complement.
        null: give every image with nothing hidden too, which asks for the teacher's features of the whole image.
        counted: tokens whose errors are added up, see `MaskedFeatures`.
        scale_items: number of items of the training data on which the scale of the targets is measured before the first step, so that
            their variance is 1; None leaves them as they are.
        fresh_norm: start the student's final norm anew, as the official code does.
        teacher_precision: precision of the teacher's weights and of its computation.
        **kwargs: arguments of `Method`.

    Raises:
        ValueError: the encoder is no ViT for images, or a number is out of range.
    """

    terms = ("features",)
    uses: ClassVar = {"global": Uses(needs=("mask",), one_size=True)}
    needs_backbone: ClassVar = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        decoder_dim: int | None = None,
        decoder_depth: int = 2,
        decoder_heads: int | None = None,
        skip_blocks: int = 1,
        antithetical: bool = True,
        null: bool = True,
        counted: CountedTokens = "all",
        scale_items: int | None = 256,
        fresh_norm: bool = False,
        teacher_precision: Precision = "float32",
        **kwargs,  # noqa: ANN003
    ) -> None:
        if scale_items is not None and scale_items < 1:
            raise ValueError(f"MaskEmbed: scale_items={scale_items} given; accepted: a number of items from 1 on, or null")
        teacher = without_last_blocks(encoder, count=skip_blocks)  # before anything is compiled
        if encoder.card.modality != "image":
            raise ValueError(f"MaskEmbed: hides pixels, the encoder is for {encoder.card.modality}; give one of images")
        rows, columns = encoder.grid(encoder.card.item_shape)
        shape, width = block_shape(encoder), decoder_dim or encoder.embed_dim
        if decoder_heads is not None:
            shape = shape._replace(num_heads=decoder_heads)
        head = nn.Linear(encoder.embed_dim, width)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        decoder = MaskedViewDecoder(
            width,
            out_dim=encoder.embed_dim,
            num_patches=rows * columns,
            num_prefix_tokens=teacher.num_prefix_tokens,
            shape=shape,
            depth=decoder_depth,
        )
        super().__init__(Branch(encoder, {"embed": head, "decoder": decoder}), **kwargs)
        self.antithetical, self.null = antithetical, null
        self.scale_items, self.fresh_norm = scale_items, fresh_norm
        self.teacher_precision: Precision = teacher_precision
        self.original = FrozenTeacher(teacher, precision=teacher_precision)
        self.scale = TargetScale()
        self.objective = MaskedFeatures(counted=counted)

    def init_from(self, backbone: Encoder, *, heads: Mapping[str, Tensor] | None = None) -> Transfer:
        """As `Method`; the teacher gets the same weights, without those of the blocks that it leaves out."""
        transfer = super().init_from(backbone, heads=heads)
        teacher, state = self.original.encoder, self.encoder.backbone_state()
        teacher.load_backbone_state({name: state[name] for name in teacher.backbone_state()})
        self.original = FrozenTeacher(teacher, precision=self.teacher_precision)  # whose fingerprint is that of these weights
        if self.fresh_norm:
            for part in self.encoder.get_submodule("model.norm").modules():
                if isinstance(part, nn.LayerNorm):
                    part.reset_parameters()
        return transfer

    def on_train_start(self) -> None:
        """As `Method`; also measure the scale of the targets, unless a checkpoint brought it."""
        super().on_train_start()
        if self.scale_items is not None and not self.scale.is_measured:
            self.scale.measure(self._measured_targets(self.scale_items))

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`features`: squared error of the predicted features of masked images."""
        group = batch.views["global"]
        views, visible = group.items.flatten(0, 1), self.visible(batch)  # [(G B) C H W], [(G B) M N]
        targets = self.scale(self.targets(views, visible=visible))  # [(G B) M T D]
        output = self.student.encode(views, keys=group.keys)
        heads = self.student.heads
        predictions = heads["decoder"](heads["embed"](output.patches), visible=visible)
        error = self.objective(predictions=predictions, targets=targets, visible=visible)  # [(G B)]
        return {"features": error.unflatten(0, (len(group.items), -1)).mean(dim=0)}

    def visible(self, batch: Batch) -> Tensor:
        """Bool[(G B) M N]: the visible patches of each view under its mask, its complement, and nothing hidden, in this order."""
        group = batch.views["global"]
        assert group.mask is not None
        hidden = group.mask.flatten(0, 1)  # [(G B) N]
        masks = [~hidden, *([hidden] if self.antithetical else []), *([torch.ones_like(hidden)] if self.null else [])]
        return torch.stack(masks, dim=1)

    def targets(self, views: Tensor, *, visible: Tensor) -> Tensor:
        """Float[B M T D]: the teacher's features of all tokens under each of M masks, before they are scaled.

        Args:
            views: Float[B C H W].
            visible: Bool[B M N].

        Raises:
            ValueError: the views have another size than the encoder's images.
        """
        card, teacher = self.encoder.card, self.original.encoder
        if views.shape[1:] != card.item_shape:
            (_, *given), (_, *wanted) = views.shape[1:], card.item_shape
            raise ValueError(f"MaskEmbed: views of {given} pixels given; accepted: {wanted}, the img_size of the encoder; make them equal")
        rows, columns = card.patch_size
        masked = without_patches(views, visible=visible, patch_size=(rows, columns)).flatten(0, 1)  # [(B M) C H W]
        has_class_token = teacher.get_submodule("model").cls_token is not None
        return joined_tokens(self.original(masked, card=card), has_class_token=has_class_token).unflatten(0, visible.shape[:2])

    def _measured_targets(self, count: int) -> Iterator[Tensor]:
        """Targets of about `count` items of the first epoch, spaced evenly over the data; every process gives its share of them.

        Raises:
            ValueError: the run has no DataModule.
        """
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  its stub
        if not isinstance(data, Readable):
            raise ValueError(f"MaskEmbed: scale_items={count} given, but the run has no DataModule to read items from; set it to null")
        each = -(-min(count, len(data.source)) // world_size())  # as many in every process, because a sharded teacher is asked by all
        numbers = range(rank() * each, (rank() + 1) * each)
        indices = [number * len(data.source) // (each * world_size()) for number in numbers]
        for start in range(0, each, data.batch_size):
            raw = data.raw_batch(indices[start : start + data.batch_size], encoder=self.encoder, epoch=0)
            batch = data.make_batch(self.transfer_batch_to_device(raw, self.device, 0), encoder=self.encoder)
            yield self.targets(batch.views["global"].items.flatten(0, 1), visible=self.visible(batch))
