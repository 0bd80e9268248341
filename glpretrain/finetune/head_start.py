"""A head that starts as a linear probe: logistic regression on what the head sees of the training items, before the backbone learns.

Fresh heads send random gradients into a backbone, which loses in the first steps what it knew (Kumar et al., "Fine-tuning can distort
pretrained features and underperform out-of-distribution", 2022); after so few epochs as a small set allows it may end below its own probe.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from glpretrain.core.batch import Batch
from glpretrain.evaluate import MultilabelProbe
from glpretrain.evaluate.logistic import fit_logistic
from glpretrain.evaluate.probes import in_parts, stratified_split
from glpretrain.evaluate.rows import LabelledFeatures
from glpretrain.finetune.base import HEAD, FineTune
from glpretrain.finetune.class_heads import ClassHead
from glpretrain.finetune.data import LabelledData
from glpretrain.training.branch import Branch

HeadStart = Literal["fresh", "probe"]
INVERSE_L2 = (0.001, 0.01, 0.1, 1.0)  # scikit-learn's C
_HELD_OUT, _MAX_ITER, _MIN_STD = 0.2, 500, 1e-6
_OF_FEW = 0.1  # the strength where items are too few to choose one
_AT_MOST = 20_000  # items that it is fitted to


class Layer(NamedTuple):
    """A fitted linear layer."""

    weight: Tensor  # Float[K D]
    bias: Tensor  # Float[K]
    strength: float  # scikit-learn's C, chosen among `INVERSE_L2` on a held-out part


def check_head_start(value: str, *, owner: str, head: str) -> None:
    """Refuse an unknown start, and a probe for a head of several layers.

    Raises:
        ValueError: it is one of these.
    """
    if value not in get_args(HeadStart):
        raise ValueError(f"{owner}: head_start={value!r} given; accepted: {', '.join(get_args(HeadStart))}")
    if value == "probe" and head != "linear":
        raise ValueError(f"{owner}: head_start='probe' given with head={head!r}; accepted: fresh, or the head linear")


def begin_with_probe(model: FineTune, *, fitted: Callable[[LabelledFeatures], Layer]) -> None:
    """Give the head of a model, before its first step, a layer that is fitted to what it sees of at most 20,000 training items.

    The first process fits it, and all take it over. A run that goes on from a checkpoint has its head already, and keeps it.

    Args:
        model: the model, whose trainer is about to fit it.
        fitted: function of the rows and targets to the layer.

    Raises:
        ValueError: the weights are sharded, so that no process can compute alone.
    """
    data = model.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  its stub
    if model.trainer.ckpt_path is not None or not isinstance(data, LabelledData):
        return
    if any(isinstance(parameter, DTensor) for parameter in model.student.parameters()):
        raise ValueError("head_start=probe given with sharded weights; accepted: fresh, or a strategy that keeps them whole, such as ddp")
    layer: Layer | None = None
    if model.trainer.is_global_zero:
        seen = seen_by_head(model.student, data.plain_batches(data.source, at_most=_AT_MOST), device=model.device)
        layer = fitted(seen)
        print(f"the head starts as a linear probe of {len(seen.labels)} items, C {layer.strength:g}", flush=True)
    layer = model.trainer.strategy.broadcast(layer)
    head = model.student.heads[HEAD]
    assert layer is not None and isinstance(head, ClassHead)
    with torch.no_grad():
        head.linear.weight.copy_(layer.weight)
        head.linear.bias.copy_(layer.bias)
    if model.ema is not None:
        model.ema.set(model.student)


def seen_by_head(branch: Branch, batches: Iterable[Batch], *, device: torch.device) -> LabelledFeatures:
    """What the linear layer of a `ClassHead` sees of items, Float[B D], and their targets; the branch is in evaluation mode meanwhile."""
    head = branch.heads[HEAD]
    assert isinstance(head, ClassHead)
    mode, rows, targets, index = branch.training, list[Tensor](), list[Tensor](), list[Tensor]()
    branch.eval()
    with torch.no_grad():
        for batch in batches:
            if batch.targets is not None:
                rows.append(head.features(branch.encode(batch.views["global"].items.squeeze(0).to(device))).float().cpu())
                targets.append(batch.targets.cpu())
                index.append(batch.index.cpu())
    branch.train(mode)
    return LabelledFeatures(torch.cat(rows), torch.cat(targets), torch.cat(index))


def label_layer(seen: LabelledFeatures) -> Layer:
    """A layer that computes what `MultilabelProbe` does; labels that all items have, or none, get the smallest bias and no weight.

    Args:
        seen: rows of the training items, with the labels that each has, Float[B K], in place of its class.

    Raises:
        ValueError: no label tells the items apart.
    """
    truth, probe = seen.labels > 0.5, MultilabelProbe(inverse_l2=INVERSE_L2)
    learned = (truth.any(dim=0) & ~truth.all(dim=0)).nonzero()[:, 0]
    if not len(learned):
        raise ValueError("head_start=probe given with training items that all have the same labels; accepted: fresh")
    mean, std = seen.cls.mean(dim=0), seen.cls.std(dim=0).clamp_min(_MIN_STD)
    rows, truth = (seen.cls - mean) / std, truth[:, learned]
    chosen = probe.choose(rows, truth, None) or _OF_FEW
    units = torch.cat([rows.new_zeros(1, rows.shape[1]), torch.eye(rows.shape[1])])
    logits = probe.fitted(rows, truth, units, chosen)  # [1+D K'], the bias first
    own = (logits[1:] - logits[0]).T / std  # [K' D]
    return _placed(own, logits[0] - own @ mean, learned, num_classes=seen.labels.shape[1], strength=chosen)


def _placed(own: Tensor, own_bias: Tensor, places: Tensor, *, num_classes: int, strength: float) -> Layer:
    """The layer for all classes, of one for those at `places`."""
    weight, bias = own.new_zeros(num_classes, own.shape[1]), own_bias.min().repeat(num_classes)
    weight[places], bias[places] = own, own_bias
    return Layer(weight, bias, strength)


def probe_layer(seen: LabelledFeatures, *, num_classes: int, device: torch.device) -> Layer:
    """A layer that computes what a logistic regression on standardised rows does.

    Args:
        seen: rows of the training items, with their classes.
        num_classes: number of classes K; those without an item get the smallest bias and no weight.
        device: where the regression is computed.

    Raises:
        ValueError: there is one class only.
    """
    if len(seen.labels.unique()) < 2:
        raise ValueError("head_start=probe given with training items of one class; accepted: two or more classes, or fresh")
    mean, std = seen.cls.mean(dim=0), seen.cls.std(dim=0).clamp_min(_MIN_STD)
    standardised = seen.with_cls((seen.cls - mean) / std)

    held_out, fitted = (standardised.at(part) for part in stratified_split(seen.labels, None, ratio=_HELD_OUT))

    def score(inverse_l2: float) -> float:
        """The mean over the classes of the share of held-out items that are found; plain accuracy may be best without any rare class."""
        found = fit_logistic(fitted.cls, fitted.labels, inverse_l2=inverse_l2, max_iter=_MAX_ITER, device=device)
        right = in_parts(found.predict, held_out.cls, num_scores=num_classes) == held_out.labels
        return torch.stack([right[held_out.labels == label].double().mean() for label in held_out.labels.unique()]).mean().item()

    chosen = max(INVERSE_L2, key=score) if len(held_out.labels) else _OF_FEW  # the strongest penalty on a tie
    found = fit_logistic(standardised.cls, standardised.labels, inverse_l2=chosen, max_iter=_MAX_ITER, device=device)
    own = found.weight.cpu().T / std  # [C D]
    return _placed(own, found.bias.cpu() - own @ mean, found.labels, num_classes=num_classes, strength=chosen)
