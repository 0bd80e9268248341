"""Local contrast: `cls` of two crops of an item must agree, and so must patches that show the same place.

Idea: the plain baseline for every local loss. InfoNCE between the `cls` of two views, and InfoNCE between patches that
are matched by their places in the item; no teacher, no prototypes.
Paper: none; the two halves are MoCo v3's loss (Chen et al., ICCV 2021) and the location matching of dense contrastive
methods such as PixPro (Xie et al., CVPR 2021). What is ours: negatives of a patch are the other patches of its item.
Reference code: none.
"""

from typing import ClassVar

import torch
from torch import Tensor

from glpretrain import modalities
from glpretrain.core.batch import Batch, Uses
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Method
from glpretrain.objectives.contrastive import InfoNCE, PatchInfoNCE
from glpretrain.training.branch import Branch
from glpretrain.training.heads import ContrastHead, Hallucinator, ProjectionHead


class LocalContrast(Method):
    """InfoNCE of `cls` between views and of patches that show the same place.

    Args:
        encoder: the trunk; any encoder.
        hidden_dim: hidden width of both heads' MLPs.
        projection_dim: width of both heads' outputs.
        temp: temperature of both losses.
        max_distance: largest distance between the centres of matched patches, in patches of the other view.
        hallucinate: largest strength of hallucinated positives of `cls` (`Hallucinator`; the paper's is 0.1); 0 makes none.
        **kwargs: arguments of `Method`.
    """

    terms = ("cls", "patch")
    in_batch = ("cls",)
    uses: ClassVar = {"global": Uses(num_views=2)}

    def __init__(
        self,
        encoder: Encoder,
        *,
        hidden_dim: int = 2048,
        projection_dim: int = 256,
        temp: float = 0.2,
        max_distance: float = 0.75,
        hallucinate: float = 0.0,
        **kwargs,  # noqa: ANN003
    ) -> None:
        num_axes = modalities.get(encoder.card.modality).num_coordinates
        if len(encoder.grid(encoder.card.item_shape)) != num_axes:
            raise ValueError(
                f"LocalContrast: patches are matched by their places on a grid of {num_axes} axes, but the tokens of encoder"
                f" {encoder.card.encoder} ({encoder.card.modality}) are on none; give an encoder of images"
            )
        heads = {
            "cls": ContrastHead(encoder.embed_dim, hidden_dim=hidden_dim, out_dim=projection_dim),
            "patch": ProjectionHead(encoder.embed_dim, hidden_dim=hidden_dim, bottleneck_dim=projection_dim, num_layers=2),
        }
        super().__init__(Branch(encoder, heads), **kwargs)
        self.hallucinator = Hallucinator(projection_dim, largest=hallucinate) if hallucinate != 0.0 else None
        self.cls_objective = InfoNCE(temp=temp)
        self.patch_objective = PatchInfoNCE(temp=temp, max_distance=max_distance)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`cls` and `patch`, each the mean of both directions between the two global views."""
        group = batch.views["global"]
        assert group.frame is not None
        frames = group.frame
        num_global, num_items = group.items.shape[:2]
        views = group.items.flatten(0, 1)
        output = self.student.encode(views, keys=group.keys)
        grid = self.encoder.grid(views.shape[1:])
        # View by view, so that the head's batch norms use the same statistics in both directions.
        first, second = (self.student.heads["cls"](cls) for cls in output.cls.unflatten(0, (num_global, num_items)))
        patches = self.student.heads["patch"](output.patches).unflatten(0, (num_global, num_items))  # [2 B N D]
        cls = []
        for queries, keys in ((first, second), (second, first)):
            more = None
            if self.hallucinator is not None:
                more = self.hallucinator.positives(queries, keys, index=batch.index, progress=progress)
            cls.append(self.cls_objective(queries=queries, keys=keys, hallucinated=more))
        patch = []
        for a, b in ((0, 1), (1, 0)):
            nearest, valid = self.patch_objective.match(query_frames=frames[a], key_frames=frames[b], grid=grid)
            patch.append(self.patch_objective(queries=patches[a], keys=patches[b], nearest=nearest, valid=valid))
        return {"cls": torch.stack(cls).mean(dim=0), "patch": torch.stack(patch).mean(dim=0)}
