"""DCGLR: self-distillation between global and local crops of a shape, and a contrast between shapes that stabilises the teacher.

Idea: the teacher sees global crops, the student global and local ones and lower resolutions; distillation makes
parts agree with the whole, and a contrastive term keeps shapes apart, so that "the teacher network be better updated".
Paper: Fu et al., "Distillation with contrast is all you need for self-supervised point cloud representation learning",
arXiv 2202.04241. Only its abstract was available to us, and no code was published.
Reference code: fukexue/POS-BERT at d922651 (pretrain.py, dataloader.py), by the same first author and a continuation of it. From there:
the crops, the distillation over all pairs of a teacher view and another student view, temperatures, centre, head, and the
N-pair contrast, which is never called there.
WHAT IS OURS: that the contrast is InfoNCE behind a head of its own (SiT's, whose batch norms let it learn from the first step on;
on the bottleneck of the distillation's head it stayed at chance for hundreds of steps), its temperature and weight, and that its
negatives are the items of all processes. POS-BERT's masked tokens, its own addition, are left out.
Known differences: centres and temperatures as listed for DINO.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.schedule import Schedule
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.objectives.contrastive import InfoNCE, NPair
from glpretrain.objectives.distillation import ViewDistillation
from glpretrain.training.branch import Branch
from glpretrain.training.heads import ContrastHead, ProjectionHead
from glpretrain.training.prototypes import PrototypeLogits, Prototypes


class DCGLR(Method):
    """Distillation with contrast.

    Args:
        encoder: the trunk; it must take views of several sizes.
        num_prototypes: number of prototypes, K.
        hidden_dim: hidden width of the head's MLP.
        bottleneck_dim: width of the head's output, which is on the unit sphere.
        num_layers: number of layers of the head's MLP.
        student_temp: temperature of the student's assignments.
        teacher_temp: temperature of the teacher's targets, over progress.
        centre_momentum: momentum of the running centre of the teacher's logits.
        contrast: InfoNCE behind a head of its own, or NPair of the teacher's assignments with the student's logits; None is
            InfoNCE(temp=0.2).
        contrast_hidden_dim: hidden width of the contrast head's MLP; unused with NPair.
        contrast_dim: width of the contrast head's output.
        momentum: momentum of the teacher's moving average, over progress.
        **kwargs: arguments of `Method`.
    """

    terms = ("cls", "contrast")
    in_batch = ("contrast",)
    uses: ClassVar = {
        "global": Uses(paired_with=("global", "local", "coarse_*")),
        "local": Uses(required=False),
        "coarse_*": Uses(required=False),
    }

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
        contrast_hidden_dim: int = 2048,
        contrast_dim: int = 256,
        momentum: Schedule = Schedule(0.996, 1.0),  # noqa: B008
        **kwargs,  # noqa: ANN003
    ) -> None:
        contrast = InfoNCE(temp=0.2) if contrast is None else contrast
        heads: dict[str, nn.Module] = {
            "cls": nn.Sequential(
                ProjectionHead(encoder.embed_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_layers=num_layers),
                Prototypes(bottleneck_dim, num_prototypes=num_prototypes),
            )
        }
        if isinstance(contrast, InfoNCE):
            heads["contrast"] = ContrastHead(encoder.embed_dim, hidden_dim=contrast_hidden_dim, out_dim=contrast_dim)
        super().__init__(Branch(encoder, heads), momentum=momentum, **kwargs)
        self.teacher_temp = teacher_temp
        self.cls_objective = ViewDistillation(num_prototypes=num_prototypes, student_temp=student_temp, centre_momentum=centre_momentum)
        self.contrast_objective = contrast

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`cls`: every pair of a teacher view and another student view; `contrast`: the same pairs, against the other items."""
        names = ["global", *(name for name in batch.views if name != "global")]
        groups = [batch.views[name] for name in names]
        views = [group.items.flatten(0, 1) for group in groups]  # [(V B) P 3] each
        num_global, num_items = groups[0].items.shape[:2]
        with torch.no_grad():
            teacher_cls = self.teacher_branch.encode(views[0], cls_only=True).cls  # [(G B) D]
            teacher_logits = self.teacher_branch.heads["cls"](teacher_cls).unflatten(0, (num_global, num_items))  # [G B K]
        outputs = self.student.encode(views, keys=[group.keys for group in groups], cls_only=True)
        cls = torch.cat([output.cls for output in outputs])  # [(V B) D]
        logits = self.student.heads["cls"](cls).unflatten(0, (-1, num_items))  # [V B K]
        temp = self.teacher_temp(progress)
        terms = {
            "cls": self.cls_objective(student_logits=logits, teacher_logits=teacher_logits, teacher_temp=temp),
            "contrast": self._contrast(cls, teacher_cls, logits=logits, teacher_logits=teacher_logits, temp=temp),
        }
        self.cls_objective.update(teacher_logits=teacher_logits)
        return terms

    def _contrast(
        self, cls: Tensor, teacher_cls: Tensor, *, logits: PrototypeLogits, teacher_logits: PrototypeLogits, temp: float
    ) -> Tensor:
        """Float[B]: InfoNCE of `cls`, Float[(V B) D] and Float[(G B) D], or NPair of logits Float[V B K] and assignments Float[G B K]."""
        if isinstance(self.contrast_objective, NPair):
            # Every teacher view with every crop, itself included, as the reference code has it.
            assignments = self.cls_objective.targets(teacher_logits, teacher_temp=temp)
            return self.contrast_objective(assignments=assignments, logits=logits.dense())
        num_views, num_items, _ = logits.shape
        # The head's batch norms see one view at a time, so that their statistics do not reveal a view's resolution.
        queries = [self.student.heads["contrast"](view) for view in cls.unflatten(0, (num_views, num_items))]
        with torch.no_grad():
            keys = [self.teacher_branch.heads["contrast"](view) for view in teacher_cls.unflatten(0, (-1, num_items))]
        pairs = [(v, g) for v in range(num_views) for g in range(len(keys)) if v != g]
        return torch.stack([self.contrast_objective(queries=queries[v], keys=keys[g]) for v, g in pairs]).mean(dim=0)
