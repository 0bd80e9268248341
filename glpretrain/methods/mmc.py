"""MMC: masked image modelling and momentum distillation of patches, and contrast of `cls`.

Idea: the patches that resemble one patch of an object should cover that object. Three terms serve this: pixels of corrupted
groups are predicted (M), every patch of the corrupted view is assigned to prototypes as the momentum teacher
assigns it in the clean view (M), and `cls` is contrasted between views (C).
Paper: "MMC", arXiv 2308.11448. Only its abstract was available to us: it names the three ingredients and their purpose.
EVERYTHING ELSE HERE IS OUR CHOICE, the smallest method that fits the abstract and the same group's published code: pixel
head, corruption and contrast as in SiT (Sara-Ahmed/SiT @ 7f22e9c), distillation of all patches as in MC-SSL. Local views are
optional: they are clean, as in MC-SSL, and their `cls` is contrasted with the teacher's global views. Clouds of points have
the same three terms; the points of each token are predicted and compared by an objective for sets (`CorruptedPoints`).
Reference code: none for MMC.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.schedule import Schedule
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.objectives.base import Objective
from glpretrain.objectives.contrastive import InfoNCE
from glpretrain.objectives.distillation import PatchDistillation
from glpretrain.objectives.reconstruction import CorruptedPixels
from glpretrain.training.branch import Branch
from glpretrain.training.heads import ContrastHead, Hallucinator, PixelHead, ProjectionHead
from glpretrain.training.prototypes import Prototypes


class MMC(Method):
    """Masked image modelling, momentum distillation of patches, contrast of `cls`.

    Args:
        encoder: the trunk; any encoder.
        num_prototypes: number of prototypes, K, of the patches.
        hidden_dim: hidden width of the distillation head's MLP.
        bottleneck_dim: width of the distillation head's output, which is on the unit sphere.
        num_layers: number of layers of the distillation head's MLP.
        contrast_hidden_dim: hidden width of the contrast head's MLP.
        contrast_dim: width of the contrast head's output.
        contrast_temp: temperature of the contrast.
        hallucinate: largest strength of hallucinated positives of the contrast (`Hallucinator`; the paper's is 0.1); 0 makes none.
        pixel_layers: hidden layers of the pixel head.
        pixel_objective: compares predicted inputs with the clean ones; None is `CorruptedPixels`, for images.
        student_temp: temperature of the student's assignments.
        teacher_temp: temperature of the teacher's targets, over progress.
        centre_momentum: momentum of the running centre of the teacher's logits.
        momentum: momentum of the teacher's moving average, over progress.
        **kwargs: arguments of `Method`.
    """

    terms = ("pixels", "patch", "contrast")
    in_batch = ("pixels", "contrast")  # pixels: the number of replaced ones in the batch divides their error
    uses: ClassVar = {"global": Uses(num_views=2, needs=("corrupted", "corruption")), "local": Uses(required=False)}

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
        pixel_layers: int = 3,
        pixel_objective: Objective | None = None,
        student_temp: float = 0.1,
        teacher_temp: Schedule = Schedule(0.07, warmup=0.3, warmup_start=0.04, shape="constant"),  # noqa: B008
        centre_momentum: float = 0.9,
        momentum: Schedule = Schedule(0.996, 1.0),  # noqa: B008
        **kwargs,  # noqa: ANN003
    ) -> None:
        width, card = encoder.embed_dim, encoder.card
        heads = {
            "pixels": PixelHead(width, patch_dim=math.prod(card.patch_size) * len(card.mean), num_layers=pixel_layers),
            "patch": nn.Sequential(
                ProjectionHead(width, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_layers=num_layers),
                Prototypes(bottleneck_dim, num_prototypes=num_prototypes),
            ),
            "contrast": ContrastHead(width, hidden_dim=contrast_hidden_dim, out_dim=contrast_dim),
        }
        super().__init__(Branch(encoder, heads), momentum=momentum, **kwargs)
        self.teacher_temp = teacher_temp
        self.hallucinator = Hallucinator(contrast_dim, largest=hallucinate) if hallucinate != 0.0 else None
        self.pixel_objective = CorruptedPixels() if pixel_objective is None else pixel_objective
        self.patch_objective = PatchDistillation(num_prototypes=num_prototypes, student_temp=student_temp, centre_momentum=centre_momentum)
        self.contrast_objective = InfoNCE(temp=contrast_temp)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`pixels` of the corrupted groups, `patch` assignments, `contrast` of `cls` with the teacher's `cls` of every other view.

        The contrast is the mean over pairs times two: without local views that is SiT's sum of two directions.
        """
        group, local = batch.views["global"], batch.views.get("local")
        assert group.corrupted is not None and group.corruption is not None
        num_global, num_items = group.items.shape[:2]
        num_views = num_global + (0 if local is None else len(local.items))
        pairs = [(v, g) for v in range(num_views) for g in range(num_global) if v != g]  # student view, teacher view
        clean = group.items.flatten(0, 1)  # [(G B) *item]
        with torch.no_grad():
            seen = self.teacher_branch.encode(clean)
            teacher_logits = self.teacher_branch.heads["patch"](seen.patches)  # [(G B) N K]
            keys = self._project(self.teacher_branch, seen.cls, num_global)
        views, view_keys = [group.corrupted.flatten(0, 1)], [group.keys]
        if local is not None:
            views.append(local.items.flatten(0, 1))
            view_keys.append(local.keys)
        output, *local_outputs = self.student.encode(views, keys=view_keys, cls_only=[False] + [True] * (len(views) - 1))
        num_tokens = output.patches.shape[1]
        targets, replaced = self.encoder.token_inputs(clean, corruption=group.corruption.flatten(0, 1))  # [(G B) C N M], [(G B) N M]
        # The head gives channel after channel for each input, as MAE does.
        predictions = self.student.heads["pixels"](output.patches).unflatten(2, (-1, targets.shape[1])).permute(0, 3, 1, 2)
        student_logits = self.student.heads["patch"](output.patches)  # [(G B) N K]
        queries = self._project(self.student, torch.cat([output.cls, *(other.cls for other in local_outputs)]), num_views)
        everything = torch.ones(num_global, num_items, num_tokens, dtype=torch.bool, device=clean.device)
        pixels = self.pixel_objective(predictions=predictions, targets=targets, corruption=replaced)  # [(G B)]
        contrast = [self._contrast(queries[v], keys[g], index=batch.index, progress=progress) for v, g in pairs]
        terms = {
            "pixels": pixels.unflatten(0, (num_global, -1)).mean(dim=0),
            "patch": self.patch_objective(
                student_logits=student_logits.flatten(0, 1),
                teacher_logits=teacher_logits.flatten(0, 1),
                mask=everything,
                teacher_temp=self.teacher_temp(progress),
            ),
            "contrast": 2.0 * torch.stack(contrast).mean(dim=0),
        }
        self.patch_objective.update(teacher_logits=teacher_logits)
        return terms

    def _contrast(self, queries: Tensor, keys: Tensor, *, index: Tensor, progress: float) -> Tensor:
        more = None if self.hallucinator is None else self.hallucinator.positives(queries, keys, index=index, progress=progress)
        return self.contrast_objective(queries=queries, keys=keys, hallucinated=more)

    @staticmethod
    def _project(branch: Branch, cls: Tensor, num_views: int) -> list[Tensor]:
        """V times Float[B contrast_dim]: the head's batch norms see one view at a time, as in SiT."""
        return [branch.heads["contrast"](view) for view in cls.unflatten(0, (num_views, -1))]
