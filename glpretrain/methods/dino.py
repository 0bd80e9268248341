"""DINO: the student assigns a crop to prototypes as the momentum teacher assigns another crop of the same item.

Idea: no negatives and no labels; the teacher is the moving average of the student, its assignments are centred (against one
prototype winning all) and sharpened (against the uniform answer); small crops must agree with large ones.
Paper: Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021.
Reference code: facebookresearch/dino at 7c446df (main_dino.py, utils.py, vision_transformer.py).
Known differences: temperatures follow progress step by step, not epoch by epoch; bf16 in place of fp16 with a scaler; the
centre of accumulated micro-batches is the mean of all of them.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.schedule import Schedule
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.objectives.distillation import ViewDistillation
from glpretrain.training.branch import Branch
from glpretrain.training.heads import ProjectionHead
from glpretrain.training.prototypes import Prototypes


class DINO(Method):
    """Self-distillation between crops.

    Args:
        encoder: the trunk; any encoder.
        num_prototypes: number of prototypes, K.
        hidden_dim: hidden width of the head's MLP.
        bottleneck_dim: width of the head's output, which is on the unit sphere.
        num_layers: number of layers of the head's MLP.
        train_gain: whether one gain per prototype is learned (the official `norm_last_layer` false).
        student_temp: temperature of the student's assignment.
        teacher_temp: temperature of the teacher's targets, over progress.
        centre_momentum: momentum of the running centre of the teacher's logits.
        momentum: momentum of the teacher's moving average, over progress.
        **kwargs: arguments of `Method`.
    """

    terms = ("cls",)
    views_together: ClassVar = True
    uses: ClassVar = {"global": Uses(paired_with=("global", "local")), "local": Uses(required=False)}
    gram_tokens: ClassVar = ("all",)

    def __init__(
        self,
        encoder: Encoder,
        *,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        train_gain: bool = False,
        student_temp: float = 0.1,
        teacher_temp: Schedule = Schedule(0.07, warmup=0.3, warmup_start=0.04, shape="constant"),  # noqa: B008
        centre_momentum: float = 0.9,
        momentum: Schedule = Schedule(0.996, 1.0),  # noqa: B008
        **kwargs,  # noqa: ANN003
    ) -> None:
        head = nn.Sequential(
            ProjectionHead(encoder.embed_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_layers=num_layers),
            Prototypes(bottleneck_dim, num_prototypes=num_prototypes, train_gain=train_gain),
        )
        super().__init__(Branch(encoder, {"cls": head}), momentum=momentum, **kwargs)
        self.teacher_temp = teacher_temp
        self.cls_objective = ViewDistillation(num_prototypes=num_prototypes, student_temp=student_temp, centre_momentum=centre_momentum)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`cls`: every pair of a teacher view and another student view."""
        groups = [batch.views[name] for name in ("global", "local") if name in batch.views]
        views = [group.items.flatten(0, 1) for group in groups]  # [(V B) *item] each
        num_global, num_items = groups[0].items.shape[:2]
        with torch.no_grad():
            seen = self.teacher_branch.encode(views[0], cls_only=True)
            teacher_logits = self.teacher_branch.heads["cls"](seen.cls).unflatten(0, (num_global, num_items))  # [G B K]
        outputs = self.student.encode(views, keys=[group.keys for group in groups], cls_only=True)
        cls = torch.cat([output.cls for output in outputs])  # [(V B) D]
        student_logits = self.student.heads["cls"](cls).unflatten(0, (-1, num_items))  # [V B K]
        loss = self.cls_objective(student_logits=student_logits, teacher_logits=teacher_logits, teacher_temp=self.teacher_temp(progress))
        self.cls_objective.update(teacher_logits=teacher_logits)
        return {"cls": loss}
