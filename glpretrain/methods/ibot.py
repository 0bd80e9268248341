"""iBOT: DINO between views, and the same loss on hidden patches within a view.

Idea: the student sees its global views with blocks of patches hidden and must assign every hidden patch to prototypes as the
teacher does, which sees the whole view; one head for `cls` and patches, so what `cls` learns reaches the patches.
Paper: Zhou et al., "iBOT: image BERT pre-training with online tokenizer", ICLR 2022.
Reference code: bytedance/ibot at da316d8 (main_ibot.py, loader.py, models/head.py).
Known differences: the head is shared (the paper's recommendation, `shared_head` and `shared_head_teacher` true); the student's
head runs on hidden patches only, which changes no number; the mask token decays with `optimization.mask_token: embedding` only;
otherwise as listed for DINO.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.schedule import Schedule
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.objectives.distillation import PatchDistillation, ViewDistillation
from glpretrain.training.branch import Branch
from glpretrain.training.heads import ProjectionHead
from glpretrain.training.prototypes import Prototypes


class IBOT(Method):
    """Self-distillation between crops, and of hidden patches.

    Args:
        encoder: the trunk; it must be able to hide tokens.
        num_prototypes: number of prototypes, K, of `cls` and patches.
        hidden_dim: hidden width of the head's MLP.
        bottleneck_dim: width of the head's output, which is on the unit sphere.
        num_layers: number of layers of the head's MLP.
        train_gain: whether one gain per prototype is learned (the official `norm_last_layer` false).
        student_temp: temperature of the student's assignments.
        cls_teacher_temp: temperature of the teacher's targets for `cls`, over progress.
        patch_teacher_temp: temperature of the teacher's targets for patches, over progress.
        centre_momentum: momentum of the running centres of the teacher's logits.
        patch_centre: "shared", one centre of the logits of all patches, or "position", one for each place in the grid, as POS-BERT has for
            the tokens of clouds (fukexue/POS-BERT at d922651, pretrain.py).
        momentum: momentum of the teacher's moving average, over progress.
        **kwargs: arguments of `Method`.
    """

    terms = ("cls", "patch")
    views_together: ClassVar = True
    uses: ClassVar = {"global": Uses(needs=("mask",), paired_with=("global", "local")), "local": Uses(required=False)}
    gram_tokens: ClassVar = ("all", "masked", "unmasked")

    def __init__(
        self,
        encoder: Encoder,
        *,
        num_prototypes: int = 8192,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        train_gain: bool = False,
        student_temp: float = 0.1,
        cls_teacher_temp: Schedule = Schedule(0.07, warmup=0.3, warmup_start=0.04, shape="constant"),  # noqa: B008
        patch_teacher_temp: Schedule = Schedule(0.07, warmup=0.3, warmup_start=0.04, shape="constant"),  # noqa: B008
        centre_momentum: float = 0.9,
        patch_centre: Literal["shared", "position"] = "shared",
        momentum: Schedule = Schedule(0.996, 1.0),  # noqa: B008
        **kwargs,  # noqa: ANN003
    ) -> None:
        encoder.add_mask_token()
        head = nn.Sequential(
            ProjectionHead(encoder.embed_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_layers=num_layers),
            Prototypes(bottleneck_dim, num_prototypes=num_prototypes, train_gain=train_gain),
        )
        super().__init__(Branch(encoder, {"shared": head}), momentum=momentum, **kwargs)
        self.cls_teacher_temp, self.patch_teacher_temp = cls_teacher_temp, patch_teacher_temp
        sizes = {"num_prototypes": num_prototypes, "student_temp": student_temp, "centre_momentum": centre_momentum}
        self.cls_objective = ViewDistillation(**sizes)
        if patch_centre not in ("shared", "position"):
            raise ValueError(f"IBOT: patch_centre={patch_centre!r} given; accepted: shared, position")
        num_positions = None if patch_centre == "shared" else math.prod(encoder.grid(encoder.card.item_shape))
        if num_positions is not None:
            uses = {**self.uses, "global": self.uses["global"]._replace(one_size=True)}
            self.uses = uses  # pyright: ignore[reportAttributeAccessIssue]  of this object alone
        self.patch_objective = PatchDistillation(**sizes, num_positions=num_positions)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`cls`: as in DINO, with masked global views of the student; `patch`: hidden patches, same view, same position."""
        group = batch.views["global"]
        assert group.mask is not None
        num_global, num_items = group.items.shape[:2]
        clean, hidden = group.items.flatten(0, 1), group.hidden_places()  # [(G B) C H W], [M]
        with torch.no_grad():
            seen = self.teacher_branch.encode(clean)
            teacher_head = self.teacher_branch.heads["shared"]
            teacher_cls = teacher_head(seen.cls).unflatten(0, (num_global, num_items))  # [G B K]
            teacher_patches = teacher_head(seen.patches)  # [(G B) N K]: all of them, for the centre
        local = [batch.views["local"]] if "local" in batch.views else []
        views = [clean, *(one.items.flatten(0, 1) for one in local)]
        keys = [group.keys, *(one.keys for one in local)]
        masks = [group.mask.flatten(0, 1), *[None] * len(local)]
        outputs = self.student.encode(views, mask=masks, keys=keys, cls_only=[False] + [True] * len(local))
        cls = torch.cat([output.cls for output in outputs])  # [(V B) D]
        selected = outputs[0].patches.flatten(0, 1)[hidden]  # [M D]
        logits = self.student.heads["shared"](torch.cat([cls, selected]))  # [(V B) + M, K]
        student_cls, student_patches = logits.split([len(cls), len(selected)])
        terms = {
            "cls": self.cls_objective(
                student_logits=student_cls.unflatten(0, (-1, num_items)),
                teacher_logits=teacher_cls,
                teacher_temp=self.cls_teacher_temp(progress),
            ),
            "patch": self.patch_objective(
                student_logits=student_patches,
                teacher_logits=teacher_patches.flatten(0, 1)[hidden],
                mask=group.mask,
                places=hidden,
                teacher_temp=self.patch_teacher_temp(progress),
            ),
        }
        self.cls_objective.update(teacher_logits=teacher_cls)
        self.patch_objective.update(teacher_logits=teacher_patches)
        return terms
