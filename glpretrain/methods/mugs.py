"""Mugs: one trunk learns to discriminate items, neighbourhoods of items, and groups.

Idea: the student agrees with its momentum teacher on three things. Instance: `cls` of a crop is contrasted with a queue of
earlier items (InfoNCE). Local group: a relation block lets the crop's pooled tokens attend to their nearest neighbours in a memory
of earlier items, and its result is contrasted in the same way. Group: `cls` is assigned to prototypes as in DINO. The student
has crops of its own, half of them strongly augmented; only items without strong augmentation enter its memory.
Paper: Zhou et al., "Mugs: A Multi-Granular Self-Supervised Learning Framework", arXiv 2203.14415.
Reference code: sail-sg/mugs @ 10ab634 (main.py, src/loss.py, src/model.py, src/vision_transformer.py). Details that are
kept from it: neighbours are searched with the mean of all tokens before the final norm, and found among means of patches after
it; the k-NN memory of the student and that of the teacher are two; crop i of the student is never compared with crop i of the
teacher, though they are different crops.
Known differences: memories fill every row (the official pointer moves on twice per write and skips half of them, see
`FeatureQueue.advance_twice`); one buffer per memory where the official code keeps three equal ones; weights multiply the terms (officially
they only switch them on; 1/3 each is the same); the mean over terms also without local views, where the official code divides by
zero; temperature follows progress step by step, not epoch by epoch; no batch norm in heads, an official option that is off.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from glpretrain.core.batch import Batch, Uses
from glpretrain.core.schedule import Schedule
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.layers import RelationBlock, pooled_tokens
from glpretrain.encoders.vit import ViT
from glpretrain.methods.base import Method
from glpretrain.objectives.contrastive import QueueInfoNCE
from glpretrain.objectives.distillation import ViewDistillation
from glpretrain.training.branch import Branch
from glpretrain.training.heads import Hallucinator, Predictor, ProjectionHead
from glpretrain.training.memory import FeatureQueue
from glpretrain.training.prototypes import PrototypeLogits, Prototypes


class Mugs(Method):
    """Instance, local-group and group discrimination.

    Args:
        encoder: the trunk; a plain ViT.
        queue_size: rows of each of the two queues of negatives.
        memory_size: rows of each of the two memories that neighbours come from.
        num_neighbours: number of neighbours, k, of each crop.
        projection_dim: output width of the instance and the local-group head.
        predictor_dim: hidden width of the student's predictors.
        contrast_temp: temperature of both contrasts.
        num_prototypes: number of prototypes, K, of the group head.
        hidden_dim: hidden width of all projections.
        bottleneck_dim: output width of the group head's projection.
        num_layers: number of layers of all projections.
        train_gain: whether one gain per prototype is learned (the official `norm_last_layer` false).
        student_temp: temperature of the student's assignment.
        teacher_temp: temperature of the teacher's targets, over progress.
        centre_momentum: momentum of the running centre of the teacher's logits.
        hallucinate: largest strength of hallucinated positives of the instance term (`Hallucinator`); 0 makes none.
        momentum: momentum of the teacher's moving average, over progress.
        weights: weights of the terms; a third each when left out.
        **kwargs: arguments of `Method`.

    Raises:
        ValueError: the encoder is no plain ViT, or there are more neighbours than rows.
    """

    terms = ("instance", "local_group", "group")
    uses: ClassVar = {"global": Uses(num_views=2), "local": Uses(required=False), "student": Uses(required=False, takes=("strong",))}

    def __init__(
        self,
        encoder: Encoder,
        *,
        queue_size: int = 65536,
        memory_size: int = 65536,
        num_neighbours: int = 8,
        projection_dim: int = 256,
        predictor_dim: int = 4096,
        contrast_temp: float = 0.2,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        train_gain: bool = False,
        student_temp: float = 0.1,
        teacher_temp: Schedule = Schedule(0.07, warmup=0.0375, warmup_start=0.04, shape="constant"),  # noqa: B008
        centre_momentum: float = 0.9,
        hallucinate: float = 0.0,
        momentum: Schedule = Schedule(0.996, 1.0),  # noqa: B008
        weights: dict[str, float] | None = None,
        **kwargs,  # noqa: ANN003
    ) -> None:
        if not 1 <= num_neighbours <= memory_size:
            raise ValueError(f"Mugs: num_neighbours is {num_neighbours}; accepted: 1 to memory_size, which is {memory_size}")
        width = encoder.embed_dim

        def projection() -> ProjectionHead:
            return ProjectionHead(width, hidden_dim=hidden_dim, bottleneck_dim=projection_dim, num_layers=num_layers, bias=False)

        heads = {
            "relation": RelationBlock(encoder),
            "instance": projection(),
            "local_group": projection(),
            "group": nn.Sequential(
                ProjectionHead(width, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_layers=num_layers),
                Prototypes(bottleneck_dim, num_prototypes=num_prototypes, train_gain=train_gain),
            ),
        }
        weights = dict.fromkeys(self.terms, 1.0 / 3.0) if weights is None else weights
        super().__init__(Branch(encoder, heads), weights=weights, momentum=momentum, **kwargs)
        self.predictors = nn.ModuleDict({name: Predictor(projection_dim, hidden_dim=predictor_dim) for name in ("instance", "local_group")})
        self.hallucinator = Hallucinator(projection_dim, largest=hallucinate) if hallucinate != 0.0 else None
        self.num_neighbours = num_neighbours
        self.teacher_temp = teacher_temp
        self.student_memory = FeatureQueue(memory_size, width)
        self.teacher_memory = FeatureQueue(memory_size, width)
        self.instance_objective = QueueInfoNCE(dim=projection_dim, queue_size=queue_size, temp=contrast_temp)
        self.local_group_objective = QueueInfoNCE(dim=projection_dim, queue_size=queue_size, temp=contrast_temp)
        self.group_objective = ViewDistillation(num_prototypes=num_prototypes, student_temp=student_temp, centre_momentum=centre_momentum)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`instance` and `local_group` against their queues, `group` assignments; then queues, memories and centre are updated."""
        clean = batch.views["global"].items
        num_global, num_items = clean.shape[:2]
        student = batch.views.get("student", batch.views["global"])
        groups = [student, batch.views["local"]] if "local" in batch.views else [student]
        views = [group.items.flatten(0, 1) for group in groups]
        assert isinstance(self.encoder, ViT) and isinstance(self.teacher_branch.encoder, ViT)  # `RelationBlock` takes no other
        with torch.no_grad():
            with pooled_tokens(self.teacher_branch.encoder) as pooled:
                seen = self.teacher_branch.encode(clean.flatten(0, 1))
            keys, key_groups, teacher_logits = self._heads(self.teacher_branch, seen.cls, torch.cat(pooled), self.teacher_memory, num_items)
        with pooled_tokens(self.encoder) as pooled:
            outputs = self.student.encode(views, keys=[group.keys for group in groups])
        cls = torch.cat([output.cls for output in outputs])  # [(V B) D]
        projections, related, student_logits = self._heads(self.student, cls, torch.cat(pooled), self.student_memory, num_items)
        queries = self.predictors["instance"](projections)  # [V B projection_dim]
        hallucinated = None
        if self.hallucinator is not None:  # for every pair of a key view and a query view
            hallucinated = self.hallucinator.positives(queries.unsqueeze(0), keys.unsqueeze(1), index=batch.index, progress=progress)
        terms = {
            "instance": self.instance_objective(queries=queries, keys=keys, hallucinated=hallucinated),
            "local_group": self.local_group_objective(queries=self.predictors["local_group"](related), keys=key_groups),
            "group": self.group_objective(
                student_logits=student_logits, teacher_logits=teacher_logits, teacher_temp=self.teacher_temp(progress), balanced=True
            ),
        }
        self.instance_objective.update(keys=keys)
        self.local_group_objective.update(keys=key_groups)
        self.group_objective.update(teacher_logits=teacher_logits)
        # The first global view of every item; the teacher's is never strongly augmented.
        mean_patches = [output.patches.mean(dim=1).unflatten(0, (num_global, num_items))[:1] for output in (outputs[0], seen)]
        self.student_memory.update(mean_patches[0], chosen=None if student.strong is None else ~student.strong)
        self.teacher_memory.update(mean_patches[1])
        return terms

    def _heads(
        self, branch: Branch, cls: Tensor, pooled: Tensor, memory: FeatureQueue, num_items: int
    ) -> tuple[Tensor, Tensor, PrototypeLogits]:
        """The heads in front of the predictors: Float[V B projection_dim] of instances and of local groups, and logits Float[V B K]."""
        neighbours = memory.neighbours(pooled, count=self.num_neighbours)  # [(V B) k D]
        related = branch.heads["relation"](pooled, neighbours, encoder=branch.encoder)  # [(V B) D]
        projections = (branch.heads["instance"](cls), branch.heads["local_group"](related), branch.heads["group"](cls))
        instance, local_group, logits = (rows.unflatten(0, (-1, num_items)) for rows in projections)
        return instance, local_group, logits
