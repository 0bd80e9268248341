"""Local contrast: two crops of an item must agree as wholes, and patch by patch where they show the same place.

Idea: the plain baseline for every local loss. InfoNCE between the `cls` of two views, and InfoNCE between patches that are
matched by where they came from, which the crops and flips tell; no teacher, no prototypes.
Paper: none; the two halves are MoCo v3's loss (Chen et al., ICCV 2021) and the location matching of dense contrastive
methods such as PixPro (Xie et al., CVPR 2021). What is ours: negatives of a patch are the other patches of its item.
Reference code: none.
"""

from torch import Tensor

from glpretrain.core.types import Batch
from glpretrain.encoders.base import Encoder
from glpretrain.methods.base import Branch, Method
from glpretrain.objectives.contrastive import InfoNCE, PatchInfoNCE
from glpretrain.training.heads import ContrastHead, Hallucinator, ProjectionHead


class LocalContrast(Method):
    """InfoNCE of `cls` between views and of patches that show the same place.

    Args:
        encoder: any.
        hidden_dim: of both heads' MLPs.
        projection_dim: of both heads' outputs.
        temp: of both losses.
        max_distance: between matched patch centres, in patches of the other view.
        hallucinate: largest strength of hallucinated positives of `cls` (`Hallucinator`; the paper's is 0.1); 0 makes none.
        **kwargs: see `Method`.
    """

    terms = ("cls", "patch")
    num_global_views = 2

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
        if encoder.card.modality != "image":
            raise ValueError(
                f"LocalContrast: patches are matched by their crops' boxes, which {encoder.card.modality} have not; accepted: image"
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
        """`cls` and `patch`, each the mean of both directions between the first two global views."""
        num_global, num_items = batch.global_views.shape[:2]
        views = batch.global_views.flatten(0, 1)
        output = self.student.encoder(views)
        grid = self.encoder.grid(views.shape[1:])
        # The head normalises over rows, view by view, so that the two directions see the same statistics.
        first, second = (self.student.heads["cls"](cls) for cls in output.cls.unflatten(0, (num_global, num_items)))
        patches = self.student.heads["patch"](output.patches).unflatten(0, (num_global, num_items))  # [2 B N D]
        boxes = batch.boxes
        cls = 0.0
        for queries, keys in ((first, second), (second, first)):
            more = None
            if self.hallucinator is not None:
                more = self.hallucinator.positives(queries, keys, index=batch.index, progress=progress)
            cls = cls + self.cls_objective(queries=queries, keys=keys, hallucinated=more)
        patch = sum(
            self.patch_objective(queries=patches[a], keys=patches[b], query_boxes=boxes[a], key_boxes=boxes[b], grid=grid)
            for a, b in ((0, 1), (1, 0))
        )
        return {"cls": cls / 2, "patch": patch / 2}
