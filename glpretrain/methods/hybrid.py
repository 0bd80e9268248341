"""Hybrid Distillation: final features of a contrastive expert, and token relations of an expert trained by masked image modelling.

Idea: a contrastive (or supervised) expert discriminates, but its tokens become alike; one trained by masked image modelling keeps them
diverse. The student matches the final features of the first and the relations between tokens in a middle block of the second.
Paper: Shi et al., "Hybrid distillation: connecting masked autoencoders with contrastive learners", ICLR 2024.
Reference code: none was published. The abstract and the reviews give the two places of comparison and weights of 1.
Ours: the features are whitened and compared by smooth L1 with a corner at 2 (feature distillation, Wei et al. 2022); relations are query to
key and value to value as in TinyMIM, of the expert's block at three quarters of its depth and the student's last; instead of
dropping redundant tokens step by step the student may see a random part of its tokens (`data.mask`), and both comparisons
then run over that part, relations renormalised within it.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from glpretrain.core.batch import Batch, Uses
from glpretrain.encoders.attention import AttentionInputs, attention_inputs
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.objectives.experts import TokenRelations, WhitenedFeatures
from glpretrain.training.branch import Branch
from glpretrain.training.teacher import FrozenTeacher


class HybridDistillation(Method):
    """Final features of one expert, token relations of another.

    Args:
        encoder: the trunk; a ViT.
        contrastive: expert for the final features; its grid must equal the student's.
        masked: expert for the relations, a ViT; its grid must equal the student's.
        num_relation_heads: number of heads of the relations, see `TokenRelations`.
        masked_depth: which of the expert's blocks is compared, as a share of its depth.
        student_depth: which of the student's blocks is compared, as a share of its depth.
        corner: corner of the smooth L1 distance, see `WhitenedFeatures`.
        **kwargs: arguments of `Method`.

    Raises:
        ValueError: a depth outside (0, 1].
    """

    terms = ("feature", "relation")
    uses: ClassVar = {"global": Uses(takes=("mask",))}

    def __init__(
        self,
        encoder: Encoder,
        *,
        contrastive: FrozenTeacher,
        masked: FrozenTeacher,
        num_relation_heads: int = 12,
        masked_depth: float = 0.75,
        student_depth: float = 1.0,
        corner: float = 2.0,
        **kwargs,  # noqa: ANN003
    ) -> None:
        encoder.require_keep()
        super().__init__(Branch(encoder, {"feature": nn.Linear(encoder.embed_dim, contrastive.embed_dim)}), **kwargs)
        self.contrastive, self.masked = contrastive, masked
        self.masked_block = _block_at(masked_depth, depth=masked.encoder.num_layers, name="masked_depth")
        self.student_block = _block_at(student_depth, depth=encoder.num_layers, name="student_depth")
        self.feature_objective = WhitenedFeatures(corner=corner)
        self.relation_objective = TokenRelations(num_heads=num_relation_heads)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`feature`: distance of the final features; `relation`: divergence of the token relations."""
        group = batch.views["global"]
        num_global = len(group.items)
        views = group.items.flatten(0, 1)  # [(G B) C H W]
        keep = None if group.mask is None else group.visible_tokens()  # [(G B) M]
        grid, card = self.encoder.grid(views.shape[1:]), self.encoder.card
        for name, expert in (("contrastive", self.contrastive), ("masked", self.masked)):
            if expert.grid != grid:
                raise ValueError(f"{name}: its grid is {expert.grid}, the student's {grid}; set its size so that they are equal")
        features = self.contrastive(views, card=card).patches
        with attention_inputs(self.masked.encoder, block=self.masked_block) as theirs:
            self.masked(views, card=card)
        with attention_inputs(self.encoder, block=self.student_block) as ours:
            output = self.student.encode(views, keep=keep, keys=group.keys)
        inputs = _joined(theirs, "masked", num_views=len(views))
        if keep is not None:
            features = features.gather(1, keep.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
            places = keep[:, None, :, None]
            inputs = AttentionInputs(*(x.gather(2, places.expand(-1, x.shape[1], -1, x.shape[3])) for x in inputs))
        student = _joined(ours, "encoder", num_views=len(views))
        terms = {
            "feature": self.feature_objective(predictions=self.student.heads["feature"](output.patches), targets=features),
            "relation": self.relation_objective(
                student_queries=student.queries,
                student_keys=student.keys,
                student_values=student.values,
                expert_queries=inputs.queries,
                expert_keys=inputs.keys,
                expert_values=inputs.values,
            ),
        }
        return {name: value.unflatten(0, (num_global, -1)).mean(dim=0) for name, value in terms.items()}


def _joined(seen: list[AttentionInputs], name: str, *, num_views: int) -> AttentionInputs:
    """What a block saw, of all chunks of the views."""
    if sum(len(inputs.queries) for inputs in seen) != num_views:
        raise ValueError(f"{name}: its block ran {len(seen)} fused attentions; accepted: ViTs with one (timm's default, TIMM_FUSED_ATTN=1)")
    return AttentionInputs(*(torch.cat(tensors) for tensors in zip(*seen, strict=True)))


def _block_at(share: float, *, depth: int, name: str) -> int:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{name}: accepted are shares in (0, 1], not {share}")
    return math.ceil(share * depth) - 1
