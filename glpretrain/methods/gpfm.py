"""GPFM: DINOv2 and distillation from frozen experts, whose `cls` and patches the student predicts. Without experts it is DINOv2.

Idea: no expert is best everywhere, so one student learns from several and from its own moving copy. Its terms are DINO's
between views, iBOT's on hidden patches, KoLeo, which spreads `cls` of a batch, and for each expert the distance from its tokens to those
that a small head predicts. The student's global views are masked; the experts and the teacher see the whole views.
Paper: Ma et al., "A generalizable pathology foundation model using a unified knowledge distillation pretraining framework", Nature
Biomedical Engineering 2025; Oquab et al., "DINOv2: learning robust visual features without supervision", TMLR 2024.
Reference code: birkhoffkiki/GPFM at 4f8be2b (pretrain/dinov2: train/ssl_meta_arch.py, kl_loss.py, fms.py), facebookresearch/dinov2 at
b8931f7 (loss/, data/masking.py, data/collate.py).
Known differences: an expert gets views in its own normalisation and size, the official ones those of the student; the patch centre is
the mean over the hidden patches of all processes, the official one the mean of their means; with `DINOv2Mask` every view is masked or not
by its own draw, where the official code masks exactly half of a batch and spreads the ratios evenly over it. What is official only when it
is asked for: neighbours for KoLeo from one process (`koleo_among: process`); SwiGLU, its fresh weights, positions resized as theirs, and
paths dropped evenly (`ffn: swiglu`, `initial: dinov2`, `position_resize: dino` and `drop_path_uniform` of `ViT`); clipping by module
without the experts' heads, prototypes frozen by their rate, and a mask token that decays and learns like the embedding
(`optimization: {clip: {mode: module, skip: [expert_heads]}, freeze_by: rate, mask_token: embedding}`).
DINOv3 (Simeoni et al., arXiv 2508.10104; facebookresearch/dinov3 at 6876159, train/ssl_meta_arch.py) is this method with `gram`,
`last_layer: linear`, `local_weight`, `koleo_among`, `DINOv3Mask`, and `initial: dinov3`, `rope_augmentation`, `local_norm` and `key_bias`
of `ViT`.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.schedule import Schedule
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Batched, Method
from glpretrain.objectives.distillation import PatchDistillation, ViewDistillation
from glpretrain.objectives.experts import CosineDistance, FeatureDistance
from glpretrain.objectives.regularization import KoLeo, KoLeoAmong
from glpretrain.training.branch import Branch
from glpretrain.training.heads import ProjectionHead
from glpretrain.training.prototypes import LastLayer, Prototypes
from glpretrain.training.teacher import FrozenTeacher

_KINDS = ("cls", "patch")


class GPFM(Method):
    """Self-distillation of views and hidden patches with KoLeo, and distillation from frozen experts.

    The terms are `cls`, `patch`, `koleo`, and `<expert>_cls` and `<expert>_patch` of every expert. An expert's term that `weights`
    leaves out is not computed; each expert needs at least one.

    Args:
        encoder: the trunk; it must be able to hide tokens.
        experts: frozen teachers by name, see `glpretrain.weights.load_expert`.
        weights: weights of the terms; None is 0.1 for `koleo` and 1 for all others.
        num_prototypes: number of prototypes, K.
        num_patch_prototypes: number of prototypes of a separate head for patches; None shares the head of `cls`.
        hidden_dim: hidden width of the heads' MLPs.
        patch_hidden_dim: that width of a separate head for patches; None is `hidden_dim`.
        bottleneck_dim: width of the heads' outputs, which are on the unit sphere.
        patch_bottleneck_dim: that width of a separate head for patches; None is `bottleneck_dim` (256 beside 384 in DINOv2's ViT-L/14).
        num_layers: number of layers of the heads' MLPs.
        expert_bottleneck_dim: output width of the experts' heads, whose MLP is one layer.
        train_gain: whether one gain per prototype is learned, as the official heads do.
        last_layer: last layer of the heads, see `Prototypes`; DINOv3's is `linear`.
        student_temp: temperature of the student's assignments.
        teacher_temp: temperature of the teacher's targets, over progress.
        centre_momentum: momentum of the running centres of the teacher's logits.
        local_weight: factor on the pairs of `cls` with a local view, over progress; DINOv3's falls from 1 to 0.5 when `gram` comes in.
        koleo_among: where KoLeo searches the nearest item, see `KoLeo`.
        sinkhorn_iterations: balance the targets by Sinkhorn-Knopp instead of a centre; the official number is 3.
        momentum: momentum of the teacher's moving average, over progress.
        **kwargs: arguments of `Method`.

    Raises:
        ValueError: an expert's name cannot name a module, `weights` has other names than the terms, or a width of a separate head
            for patches is given without one.
    """

    views_together: ClassVar = True
    uses: ClassVar = {"global": Uses(needs=("mask",), paired_with=("global", "local")), "local": Uses(required=False)}
    gram_tokens: ClassVar = ("all", "masked", "unmasked")

    def __init__(
        self,
        encoder: Encoder,
        *,
        experts: dict[str, FrozenTeacher] | None = None,
        weights: dict[str, float] | None = None,
        num_prototypes: int = 65536,
        num_patch_prototypes: int | None = None,
        hidden_dim: int = 2048,
        patch_hidden_dim: int | None = None,
        bottleneck_dim: int = 256,
        patch_bottleneck_dim: int | None = None,
        num_layers: int = 3,
        expert_bottleneck_dim: int = 256,
        train_gain: bool = True,
        last_layer: LastLayer = "weight_norm",
        student_temp: float = 0.1,
        teacher_temp: Schedule = Schedule(0.07, warmup=0.075, warmup_start=0.04, shape="constant"),  # noqa: B008
        centre_momentum: float = 0.9,
        local_weight: Schedule = Schedule(1.0, shape="constant"),  # noqa: B008
        koleo_among: KoLeoAmong = "joint",
        sinkhorn_iterations: int | None = None,
        momentum: Schedule = Schedule(0.992, 1.0),  # noqa: B008
        **kwargs,  # noqa: ANN003
    ) -> None:
        experts = experts or {}
        self.terms = _terms(experts, weights)
        self.joint = ("koleo",)
        self.in_batch = ("koleo",) if sinkhorn_iterations is None else ("cls", "patch", "koleo")
        weights = {name: 0.1 if name == "koleo" else 1.0 for name in self.terms} if weights is None else weights

        for name, given in (("patch_bottleneck_dim", patch_bottleneck_dim), ("patch_hidden_dim", patch_hidden_dim)):
            if given is not None and num_patch_prototypes is None:
                raise ValueError(f"{name}={given} would be ignored: give num_patch_prototypes, or leave it out")

        def head(count: int, hidden: int, width: int) -> nn.Sequential:
            return nn.Sequential(
                ProjectionHead(encoder.embed_dim, hidden_dim=hidden, bottleneck_dim=width, num_layers=num_layers),
                Prototypes(width, num_prototypes=count, train_gain=train_gain, last_layer=last_layer),
            )

        encoder.add_mask_token()
        heads: dict[str, nn.Module] = {"cls": head(num_prototypes, hidden_dim, bottleneck_dim)}
        if num_patch_prototypes is not None:
            heads["patch"] = head(num_patch_prototypes, patch_hidden_dim or hidden_dim, patch_bottleneck_dim or bottleneck_dim)
        super().__init__(Branch(encoder, heads), weights=weights, momentum=momentum, **kwargs)
        self._patch_head = "cls" if num_patch_prototypes is None else "patch"
        local_weight.require("local_weight")
        self.teacher_temp, self.local_weight = teacher_temp, local_weight
        balance = {"student_temp": student_temp, "centre_momentum": centre_momentum, "sinkhorn_iterations": sinkhorn_iterations}
        self.cls_objective = ViewDistillation(num_prototypes=num_prototypes, **balance)
        self.patch_objective = PatchDistillation(num_prototypes=num_patch_prototypes or num_prototypes, **balance)
        self.koleo_objective = KoLeo(among=koleo_among)
        # Not in the branch, because the teacher has no copy of them.
        self.experts = nn.ModuleDict(experts)
        self.expert_heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    ProjectionHead(encoder.embed_dim, bottleneck_dim=expert_bottleneck_dim, num_layers=1),
                    Prototypes(expert_bottleneck_dim, num_prototypes=expert.embed_dim, train_gain=True),
                )
                for name, expert in experts.items()
            }
        )
        self.expert_cls_objective, self.expert_patch_objective = CosineDistance(), FeatureDistance()

    def setup(self, stage: str) -> None:
        """Refuse groups for KoLeo into which the items of a step cannot be cut."""
        super().setup(stage)
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  its stub
        if isinstance(data, Batched):
            self.koleo_objective.require_items(data.batch_size * self.trainer.world_size)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`cls`: every pair of a teacher view and another student view; `patch`: hidden patches; `koleo`: sum over global views."""
        group = batch.views["global"]
        assert group.mask is not None
        num_global, num_items = group.items.shape[:2]
        clean, hidden = group.items.flatten(0, 1), group.hidden_places()  # [(G B) C H W], [M]
        with torch.no_grad():
            seen = self.teacher_branch.encode(clean)
            teacher_cls = self.teacher_branch.heads["cls"](seen.cls).unflatten(0, (num_global, num_items))  # [G B K]
            teacher_patches = self.teacher_branch.heads[self._patch_head](seen.patches.flatten(0, 1)[hidden])  # [M K]
        local = [batch.views["local"]] if "local" in batch.views else []
        views = [clean, *(one.items.flatten(0, 1) for one in local)]
        keys = [group.keys, *(one.keys for one in local)]
        masks = [group.mask.flatten(0, 1), *[None] * len(local)]
        outputs = self.student.encode(views, mask=masks, keys=keys, cls_only=[False] + [True] * len(local))
        cls = torch.cat([output.cls for output in outputs])  # [(V B) D]
        student_cls = self.student.heads["cls"](cls).unflatten(0, (-1, num_items))  # [V B K]
        student_patches = self.student.heads[self._patch_head](outputs[0].patches.flatten(0, 1)[hidden])  # [M K]
        temp = self.teacher_temp(progress)
        terms = {
            "cls": self.cls_objective(
                student_logits=student_cls, teacher_logits=teacher_cls, teacher_temp=temp, local_weight=self.local_weight(progress)
            ),
            "patch": self.patch_objective(
                student_logits=student_patches, teacher_logits=teacher_patches, mask=group.mask, teacher_temp=temp
            ),
            # View by view, because two views of one item must not be pushed apart.
            "koleo": torch.stack([self.koleo_objective(features=view) for view in outputs[0].cls.chunk(num_global)]).sum(),
        }
        self.cls_objective.update(teacher_logits=teacher_cls)
        self.patch_objective.update(teacher_logits=teacher_patches)
        for name, expert in self.experts.items():
            targets, head = expert(clean, card=self.encoder.card), self.expert_heads[name]
            found = {}
            if f"{name}_cls" in self.terms:
                found["cls"] = self.expert_cls_objective(predictions=head(outputs[0].cls).dense(), targets=targets.cls)
            if f"{name}_patch" in self.terms:
                found["patch"] = self.expert_patch_objective(
                    predictions=head(outputs[0].patches).dense(),
                    targets=targets.patches,
                    grid=self.encoder.grid(clean.shape[1:]),
                    target_grid=expert.grid,
                )
            terms |= {f"{name}_{kind}": value.unflatten(0, (num_global, -1)).mean(dim=0) for kind, value in found.items()}
        return terms


def _terms(experts: dict[str, FrozenTeacher], weights: dict[str, float] | None) -> tuple[str, ...]:
    """Names of the terms that are computed.

    Raises:
        ValueError: an expert's name cannot name a module, or the expert has no term.
    """
    terms = ["cls", "patch", "koleo"]
    for name in experts:
        if not name.isidentifier() or name in dir(nn.ModuleDict):
            raise ValueError(f"experts: {name!r} given; accepted: names of letters, digits and underscores, such as uni")
        own = [f"{name}_{kind}" for kind in _KINDS if weights is None or f"{name}_{kind}" in weights]
        if not own:
            raise ValueError(f"weights: {name} has none; give {name}_cls, {name}_patch or both, or leave the expert out")
        terms += own
    return tuple(terms)
