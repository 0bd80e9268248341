"""MMC: masked image modelling, momentum distillation of patches, contrast of `cls`.

Idea: the patches that resemble one patch of an object should cover that object, and `cls` should name it. The student sees a part of the
patches of two views. A decoder predicts the inputs of the others (M). Each patch that it sees is assigned to prototypes as the momentum
teacher, which sees everything, assigns the same place in the other view (M): so patches learn what does not change from view to view. `cls`
is contrasted between the views of all items (C), and each patch with the teacher's patches of the other view of its item (C): assignments
group patches, and this contrast tells those of one item apart.
Paper: "MMC", arXiv 2308.11448. Only its abstract was available to us: it names the three ingredients and their purpose.
EVERYTHING ELSE HERE IS OUR CHOICE, by experiments recorded in docs/measurements.md#mmc: hidden patches are dropped and decoded as in MAE,
which makes a step cheap; targets of patches are balanced by Sinkhorn-Knopp, without which all patches share one prototype; a small penalty
on the mean cosine of all patches (`cosine`) takes away the direction that they otherwise share. Local views are optional: their `cls` is
contrasted with the teacher's global views. The quick start has one as large as a global view, so that the student also learns from whole
pictures, which are what it is used on. Clouds of points have the same terms; their hidden groups are predicted as in Point-MAE.
Reference code: none for MMC.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from glpretrain.core import keys as rng
from glpretrain.core.batch import Batch, Uses, ViewGroup
from glpretrain.core.clouds import take
from glpretrain.core.frames import matches
from glpretrain.core.patches import patchify
from glpretrain.core.schedule import Schedule
from glpretrain.core.types import EncoderOutput
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.points import PointTransformer
from glpretrain.methods.base import Method
from glpretrain.objectives.chamfer import ChamferL2
from glpretrain.objectives.contrastive import InfoNCE, PatchInfoNCE
from glpretrain.objectives.distillation import TokenDistillation
from glpretrain.objectives.reconstruction import PatchPixels
from glpretrain.objectives.regularization import MeanCosine
from glpretrain.training.branch import Branch
from glpretrain.training.decoders import DECODER_PATHS, GroupDecoder, TokenDecoder
from glpretrain.training.heads import ContrastHead, Hallucinator, ProjectionHead
from glpretrain.training.prototypes import Prototypes

_WEIGHTS = {"inputs": 1.0, "patch": 0.5, "local": 1.0, "contrast": 1.0, "cosine": 0.1}
_DECODER_DIM = 512


class MMC(Method):
    """Masked image modelling, momentum distillation of patches, contrast of `cls`.

    Args:
        encoder: the trunk; it must be able to drop tokens.
        num_prototypes: number of prototypes, K, of the patches.
        hidden_dim: hidden width of the distillation head's MLP.
        bottleneck_dim: width of the distillation head's output, which is on the unit sphere.
        num_layers: number of layers of the distillation head's MLP.
        contrast_hidden_dim: hidden width of the MLPs of both contrast heads, that of `cls` and that of patches.
        contrast_dim: width of their outputs.
        contrast_temp: temperature of both contrasts.
        hallucinate: largest strength of hallucinated positives of the contrast (`Hallucinator`; the paper's is 0.1); 0 makes none.
        decoder_dim: width of the decoder; None is 512 for images, and the encoder's for clouds, where no other is possible.
        decoder_depth: number of blocks of the decoder.
        decoder_heads: attention heads per block of the decoder.
        normalise_pixels: give every target patch of an image mean 0 and variance 1.
        student_temp: temperature of the student's assignments.
        teacher_temp: temperature of the teacher's targets, over progress.
        sinkhorn_iterations: iterations of Sinkhorn-Knopp over the targets of the batch.
        max_distance: a patch has a target where the nearest one of the other view is so near, in patches of that view.
        momentum: momentum of the teacher's moving average, over progress.
        weights: weight of every term; None is 1 for `inputs`, `local` and `contrast`, 0.5 for `patch` and 0.1 for `cosine`.
        **kwargs: arguments of `Method`.

    Raises:
        ValueError: the encoder cannot drop tokens, or a `decoder_dim` is given that a cloud's decoder cannot have.
    """

    terms = ("inputs", "patch", "local", "contrast", "cosine")
    in_batch = ("patch", "contrast", "cosine")  # patch: Sinkhorn-Knopp balances the targets of a batch
    joint = ("cosine",)
    uses: ClassVar = {"global": Uses(num_views=2, needs=("mask",)), "local": Uses(required=False)}
    gram_tokens: ClassVar = ("all",)

    def __init__(
        self,
        encoder: Encoder,
        *,
        num_prototypes: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        contrast_hidden_dim: int = 4096,
        contrast_dim: int = 256,
        contrast_temp: float = 0.2,
        hallucinate: float = 0.0,
        decoder_dim: int | None = None,
        decoder_depth: int = 4,
        decoder_heads: int = 8,
        normalise_pixels: bool = True,
        student_temp: float = 0.1,
        teacher_temp: Schedule = Schedule(0.07, warmup=0.3, warmup_start=0.04, shape="constant"),  # noqa: B008
        sinkhorn_iterations: int = 3,
        max_distance: float = 0.75,
        momentum: Schedule = Schedule(0.996, 1.0),  # noqa: B008
        weights: dict[str, float] | None = None,
        **kwargs,  # noqa: ANN003
    ) -> None:
        encoder.require_keep()
        if max_distance <= 0.0:
            raise ValueError(f"MMC: max_distance={max_distance} given; accepted: values above 0")
        width = encoder.embed_dim
        heads = {
            "patch": nn.Sequential(
                ProjectionHead(width, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_layers=num_layers),
                Prototypes(bottleneck_dim, num_prototypes=num_prototypes),
            ),
            "local": ProjectionHead(width, hidden_dim=contrast_hidden_dim, bottleneck_dim=contrast_dim, num_layers=2),
            "contrast": ContrastHead(width, hidden_dim=contrast_hidden_dim, out_dim=contrast_dim),
        }
        super().__init__(Branch(encoder, heads), momentum=momentum, weights=_WEIGHTS if weights is None else weights, **kwargs)
        self.decoder = _decoder_of(encoder, dim=decoder_dim, depth=decoder_depth, num_heads=decoder_heads)
        self.teacher_temp, self.max_distance = teacher_temp, max_distance
        self.hallucinator = Hallucinator(contrast_dim, largest=hallucinate) if hallucinate != 0.0 else None
        self.pixel_objective, self.point_objective = PatchPixels(normalise=normalise_pixels), ChamferL2()
        self.patch_objective = TokenDistillation(
            num_prototypes=num_prototypes, student_temp=student_temp, sinkhorn_iterations=sinkhorn_iterations
        )
        self.local_objective, self.contrast_objective = PatchInfoNCE(temp=contrast_temp), InfoNCE(temp=contrast_temp)
        self.cosine_objective = MeanCosine()

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`inputs` of hidden patches, `patch` assignments and `local` contrast of the others, `contrast` of `cls`, and `cosine`.

        Both contrasts are with the teacher's other views. That of `cls` is the mean over pairs times two: without local views that is SiT's
        sum of two directions.
        """
        group, local = batch.views["global"], batch.views.get("local")
        num_global, num_items = group.items.shape[:2]
        clean, keep = group.items.flatten(0, 1), group.visible_tokens()  # [(G B) *item], [(G B) M]
        with torch.no_grad():
            seen = self.teacher_branch.encode(clean)
            teacher_logits = self.teacher_branch.heads["patch"](seen.patches)  # [(G B) N K]
            local_keys = self.teacher_branch.heads["local"](seen.patches)  # [(G B) N D]
            keys = self._project(self.teacher_branch, seen.cls, num_global)
        output = self.student.encode(clean, keep=keep, keys=group.keys)
        cls = [output.cls]
        if local is not None:
            cls.append(self.student.encode(local.items.flatten(0, 1), keys=local.keys, cls_only=True).cls)
        num_views = num_global + (0 if local is None else len(local.items))
        queries = self._project(self.student, torch.cat(cls), num_views)
        pairs = [(v, g) for v in range(num_views) for g in range(num_global) if v != g]  # student view, teacher view
        contrast = [self._contrast(queries[v], keys[g], index=batch.index, progress=progress) for v, g in pairs]
        other, nearest, valid = self._same_places(group, keep)
        local_loss = self.local_objective(
            queries=self.student.heads["local"](output.patches), keys=local_keys[other], nearest=nearest, valid=valid
        )  # [(G B)]
        return {
            "inputs": self._hidden_inputs(group, output, keep).unflatten(0, (num_global, num_items)).mean(dim=0),
            "patch": self.patch_objective(
                student_logits=self.student.heads["patch"](output.patches).flatten(0, 1),
                teacher_logits=teacher_logits.flatten(0, 1)[(other.unsqueeze(1) * seen.patches.shape[1] + nearest).flatten()],
                valid=valid.unflatten(0, (num_global, num_items)),
                teacher_temp=self.teacher_temp(progress),
            ),
            "local": local_loss.unflatten(0, (num_global, num_items)).mean(dim=0),
            "contrast": 2.0 * torch.stack(contrast).mean(dim=0),
            "cosine": self.cosine_objective(tokens=output.patches),
        }

    def _same_places(self, group: ViewGroup, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Int[(G B)]: row of the other view; Int[(G B) M]: which of its N tokens is nearest to a visible one; Bool[(G B) M]: is it near?"""
        assert group.frame is not None
        where, spacing = self.encoder.token_places(group.items.flatten(0, 1), group.frame.flatten(0, 1))  # [(G B) N A]
        other = torch.arange(len(where), device=where.device).roll(group.items.shape[1])  # the same item in the other of two views
        return other, *matches(take(where, keep), where[other], spacing=spacing[other], max_distance=self.max_distance)

    def _hidden_inputs(self, group: ViewGroup, output: EncoderOutput, keep: Tensor) -> Tensor:
        """Float[(G B)]: error of the predicted pixels, or points, of the hidden patches."""
        assert group.mask is not None
        views = group.items.flatten(0, 1)
        if isinstance(self.encoder, PointTransformer):
            groups, hidden = self.encoder.group(views), group.hidden_places()
            predictions = self.decoder(
                output.patches,
                visible=take(groups.centres, keep),
                hidden=groups.centres.flatten(0, 1)[hidden].unflatten(0, (len(views), -1)),
                keys=None if group.keys is None else rng.fold_in(group.keys, DECODER_PATHS).flatten(),
            )  # [(G B) H m 3]
            distance = self.point_objective(predictions=predictions.flatten(0, 1), targets=groups.neighbours.flatten(0, 1)[hidden])
            return distance.unflatten(0, (len(views), -1)).mean(dim=1)
        rows, columns = self.encoder.card.patch_size
        return self.pixel_objective(
            predictions=self.decoder(output.cls, output.patches, keep=keep, grid=self.encoder.grid(views.shape[1:])),
            targets=patchify(views, patch_size=(rows, columns)),
            mask=group.mask.flatten(0, 1),
        )

    def _contrast(self, queries: Tensor, keys: Tensor, *, index: Tensor, progress: float) -> Tensor:
        more = None if self.hallucinator is None else self.hallucinator.positives(queries, keys, index=index, progress=progress)
        return self.contrast_objective(queries=queries, keys=keys, hallucinated=more)

    @staticmethod
    def _project(branch: Branch, cls: Tensor, num_views: int) -> list[Tensor]:
        """V times Float[B contrast_dim]: the head's batch norms see one view at a time, as in SiT."""
        return [branch.heads["contrast"](view) for view in cls.unflatten(0, (num_views, -1))]


def _decoder_of(encoder: Encoder, *, dim: int | None, depth: int, num_heads: int) -> nn.Module:
    """The decoder of MAE for images, of Point-MAE for clouds."""
    width, card = encoder.embed_dim, encoder.card
    if isinstance(encoder, PointTransformer):
        if dim not in (None, width):
            raise ValueError(f"MMC: decoder_dim={dim} given; the decoder of clouds is as wide as the encoder, {width}: leave it out")
        return GroupDecoder(width, depth=depth, num_heads=num_heads, group_size=encoder.group_size)
    patch_dim = math.prod(card.patch_size) * len(card.mean)
    return TokenDecoder(width, patch_dim=patch_dim, embed_dim=_DECODER_DIM if dim is None else dim, depth=depth, num_heads=num_heads)
