"""DCGLR: self-distillation between global and local crops of a shape, and a contrast between shapes that steadies the teacher.

Idea: the teacher sees global crops, the student global and local ones and lower resolutions; distillation teaches the whole and what
a part says about it, and a contrastive term keeps shapes apart, so that "the teacher network be better updated".
Paper: Fu et al., "Distillation with contrast is all you need for self-supervised point cloud representation learning",
arXiv 2202.04241. Only its abstract was available to us, and no code was published.
Reference code: fukexue/POS-BERT at d922651 (pretrain.py, dataloader.py), by the same first author and a continuation of it. From there:
the crops, the distillation over all pairs of a teacher view and another student view, temperatures, centre, head, and the
N-pair contrast, which is dead code there.
WHAT IS OURS: that the contrast is InfoNCE on the heads' bottlenecks by default, and its temperature and weight; that its negatives
are the items of all processes; POS-BERT's masked tokens are left out, which are its own addition.
Known differences: centres and temperatures as listed for DINO; the teacher's batch norms use the student's running statistics.
"""

import torch
from torch import Tensor

from glpretrain.encoders.base import Encoder
from glpretrain.heads import ProjectionHead, Prototypes
from glpretrain.methods.base import Branch, Method
from glpretrain.objectives.contrastive import InfoNCE
from glpretrain.objectives.distillation import ViewDistillation
from glpretrain.objectives.npair import NPair
from glpretrain.schedule import Schedule
from glpretrain.types import Batch


class DCGLR(Method):
    """Distillation with contrast.

    Args:
        encoder: any; views of several sizes must be welcome.
        num_prototypes: K.
        hidden_dim: of the head's MLP.
        bottleneck_dim: of the head's output on the sphere.
        num_layers: of the head's MLP.
        student_temp: of the student's assignments.
        teacher_temp: of the targets, over progress.
        centre_momentum: of the centre.
        contrast: InfoNCE of bottlenecks, or NPair of the teacher's assignments with the student's logits; None is InfoNCE(temp=0.2).
        momentum: of the teacher.
        **kwargs: see `Method`.
    """

    terms = ("cls", "contrast")
    takes = ("local_views", "coarse_views")

    def __init__(
        self,
        encoder: Encoder,
        *,
        num_prototypes: int = 512,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        student_temp: float = 0.1,
        teacher_temp: Schedule = Schedule(0.04, warmup=0.0, shape="constant"),  # noqa: B008
        centre_momentum: float = 0.9,
        contrast: InfoNCE | NPair | None = None,
        momentum: Schedule = Schedule(0.996, 1.0),  # noqa: B008
        **kwargs,  # noqa: ANN003
    ) -> None:
        heads = {
            "projection": ProjectionHead(encoder.embed_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_layers=num_layers),
            "prototypes": Prototypes(bottleneck_dim, num_prototypes=num_prototypes),
        }
        super().__init__(Branch(encoder, heads), momentum=momentum, **kwargs)
        self.teacher_temp = teacher_temp
        self.objective = ViewDistillation(num_prototypes=num_prototypes, student_temp=student_temp, centre_momentum=centre_momentum)
        self.contrast_objective = InfoNCE(temp=0.2) if contrast is None else contrast

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`cls`: every pair of a teacher view and another student view; `contrast`: the same pairs, against the other items."""
        num_global, num_items = batch.global_views.shape[:2]
        with torch.no_grad():
            seen = self.teacher.branch.encoder(batch.global_views.flatten(0, 1))
            teacher_projections, teacher_logits = self._project(self.teacher.branch, seen.cls, num_items)  # [G B P], [G B K]
        views = [batch.global_views, *([] if batch.local_views is None else [batch.local_views]), *(batch.coarse_views or ())]
        cls = torch.cat([output.cls for output in self.student.encoder([view.flatten(0, 1) for view in views])])  # [(V B) D]
        projections, logits = self._project(self.student, cls, num_items)  # [V B P], [V B K]
        temp = self.teacher_temp(progress)
        terms = {"cls": self.objective(student_logits=logits, teacher_logits=teacher_logits, teacher_temp=temp)}
        if isinstance(self.contrast_objective, NPair):
            # Every teacher view with every crop, itself included, as the reference code has it.
            terms["contrast"] = self.contrast_objective(
                assignments=self.objective.targets(teacher_logits, teacher_temp=temp), logits=logits
            )
        else:
            pairs = [(v, g) for v in range(len(logits)) for g in range(num_global) if v != g]
            contrasts = [self.contrast_objective(queries=projections[v], keys=teacher_projections[g]) for v, g in pairs]
            terms["contrast"] = torch.stack(contrasts).mean()
        self.objective.update(teacher_logits=teacher_logits)
        return terms

    @staticmethod
    def _project(branch: Branch, cls: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
        """Bottlenecks Float[V B P] and logits Float[V B K] of Float[(V B) D]."""
        projections = branch.heads["projection"](cls)
        return projections.unflatten(0, (-1, num_items)), branch.heads["prototypes"](projections).unflatten(0, (-1, num_items))
