"""A head that starts as a linear probe: logistic regression on what the head sees of the training items, before the backbone learns.

Fresh heads send random gradients into a backbone, which loses in the first steps what it knew (Kumar et al., "Fine-tuning can distort
pretrained features and underperform out-of-distribution", 2022); after so few epochs as a small set allows it may end below its own probe.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from glpretrain.core.batch import Batch
from glpretrain.evaluate.logistic import fit_logistic
from glpretrain.evaluate.probes import choose_strength, in_parts
from glpretrain.evaluate.rows import LabelledFeatures
from glpretrain.finetune.base import HEAD
from glpretrain.finetune.class_heads import ClassHead
from glpretrain.training.branch import Branch

INVERSE_L2 = (0.001, 0.01, 0.1, 1.0)  # scikit-learn's C
_HELD_OUT, _MAX_ITER, _MIN_STD = 0.2, 500, 1e-6


def seen_by_head(branch: Branch, batches: Iterable[Batch], *, device: torch.device) -> LabelledFeatures:
    """What the linear layer of a `ClassHead` sees of items, Float[B D], with their classes; the branch is in evaluation mode meanwhile."""
    head = branch.heads[HEAD]
    assert isinstance(head, ClassHead)
    mode, rows, labels, index = branch.training, list[Tensor](), list[Tensor](), list[Tensor]()
    branch.eval()
    with torch.no_grad():
        for batch in batches:
            if batch.targets is not None:
                rows.append(head.features(branch.encode(batch.views["global"].items.squeeze(0).to(device))).float().cpu())
                labels.append(batch.targets.cpu())
                index.append(batch.index.cpu())
    branch.train(mode)
    return LabelledFeatures(torch.cat(rows), torch.cat(labels), torch.cat(index))


def probe_layer(seen: LabelledFeatures, *, num_classes: int, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Weight Float[K D] and bias Float[K] of a linear layer that computes what a logistic regression on standardised rows does.

    Args:
        seen: rows of the training items, with their classes.
        num_classes: number of classes K; those without an item get the smallest bias and no weight.
        device: where the regression is computed.

    Returns:
        Weight, bias, and scikit-learn's C, chosen among `INVERSE_L2` on a held-out part.

    Raises:
        ValueError: there are too few items to choose, or one class only.
    """
    if len(seen.labels.unique()) < 2:
        raise ValueError("head_start=probe given with training items of one class; accepted: two or more classes, or fresh")
    mean, std = seen.cls.mean(dim=0), seen.cls.std(dim=0).clamp_min(_MIN_STD)
    standardised = seen.with_cls((seen.cls - mean) / std)

    def predict(part: LabelledFeatures, rows: Tensor, inverse_l2: float) -> Tensor:
        found = fit_logistic(part.cls, part.labels, inverse_l2=inverse_l2, max_iter=_MAX_ITER, device=device)
        return in_parts(found.predict, rows, num_scores=num_classes)

    chosen = choose_strength(standardised, INVERSE_L2, held_out_ratio=_HELD_OUT, predict=predict)
    found = fit_logistic(standardised.cls, standardised.labels, inverse_l2=chosen, max_iter=_MAX_ITER, device=device)
    own = found.weight.cpu().T / std  # [C D]
    own_bias = found.bias.cpu() - own @ mean
    weight = seen.cls.new_zeros(num_classes, seen.cls.shape[1])
    bias = own_bias.min().repeat(num_classes)
    weight[found.labels], bias[found.labels] = own, own_bias
    return weight, bias, chosen
