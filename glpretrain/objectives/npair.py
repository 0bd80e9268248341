"""N-pair contrast between a teacher's assignments and a student's logits (PointGLR; dead code of POS-BERT)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from glpretrain.core.distributed import gather_with_grad, rank
from glpretrain.objectives.base import Objective


class NPair(Objective):
    """For every item and crop: which of all items' crops, by the student's logits, fits the teacher's assignment of the item?

    mean over teacher views g, crops v and items b of -log softmax_j(scale * <assignments[g, b], logits[v, j] / student_temp>)[b], as
    POS-BERT's pretrain.py, get_npair_loss. Ours: the items of all processes are compared. Zero in the limit of assignments that only
    their own item's logits fit.

    Args:
        scale: of the products.
        student_temp: of the logits.
    """

    def __init__(self, *, scale: float = 64.0, student_temp: float = 0.1) -> None:
        super().__init__()
        if scale <= 0.0 or student_temp <= 0.0:
            raise ValueError(f"scale and student_temp: accepted are values above 0, not {scale} and {student_temp}")
        self.scale, self.student_temp = scale, student_temp

    def forward(self, *, assignments: Tensor, logits: Tensor) -> Tensor:
        """Contrast of every teacher view with every crop.

        Args:
            assignments: Float[G B K], rows sum to one; no gradient flows into them.
            logits: Float[V B K].

        Returns:
            Float[].
        """
        num_global, num_items, num_prototypes = assignments.shape
        num_views, *rest = logits.shape
        assert rest == [num_items, num_prototypes], f"{tuple(assignments.shape)} and {tuple(logits.shape)}"
        keys = gather_with_grad(logits.float().transpose(0, 1)) / self.student_temp  # [world*B V K]
        scores = self.scale * torch.einsum("gbk,jvk->gvbj", assignments.detach().float(), keys)
        labels = torch.arange(num_items, device=scores.device) + num_items * rank()
        return F.cross_entropy(scores.flatten(0, 2), labels.repeat(num_global * num_views))
