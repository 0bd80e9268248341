"""Classification where an item has any number of labels, such as the events of a recording or the findings in an X-ray.

The head gives a logit for each label, and each is learned by binary cross-entropy; the score is mean average precision. Both are those of
AST's training on AudioSet, where samples are mixed and so are their labels (`SoundViews.mix_prob`).
Reference code: YuanGongND/ast at 31088be (src/traintest.py, src/utilities/stats.py).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from glpretrain.core.batch import Batch
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate import MultilabelProbe
from glpretrain.evaluate.base import Evaluator, Score
from glpretrain.evaluate.metrics.average_precision import mean_average_precision
from glpretrain.finetune.base import FineTune
from glpretrain.finetune.class_heads import Kind, Pool, with_class_head
from glpretrain.finetune.head_start import HeadStart, begin_with_probe, check_head_start, label_layer


class Multilabel(FineTune):
    """A classifier of items with any number of labels, that starts from a backbone. `data.separator` says how names hold several labels.

    Args:
        encoder: the backbone.
        classes: names of the K labels.
        pool: what the head sees, see `Classification`.
        head: `linear` or `mlp`, see `Classification`.
        dropout: share of the hidden values of the `mlp` that are dropped in training.
        drop_path: rate of stochastic depth in the last block; it grows evenly from 0 in the first one.
        freeze: see `FineTune`.
        head_start: `fresh` weights for the head, or `probe`, see `Classification`.
        **kwargs: arguments of `FineTune`.

    Raises:
        ValueError: a value out of range, or an encoder that the settings do not fit.
    """

    terms = ("labels",)
    task: ClassVar[str] = "multilabel"
    headline: str = "map"
    probe: Evaluator = MultilabelProbe()
    takes_label_sets: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoder,
        classes: Sequence[str],
        *,
        pool: Pool = "mean",
        head: Kind = "linear",
        dropout: float = 0.5,
        drop_path: float = 0.0,
        freeze: bool = False,
        head_start: HeadStart = "fresh",
        **kwargs,  # noqa: ANN003
    ) -> None:
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"Multilabel: drop_path={drop_path} given; accepted: 0 or more, and less than 1")
        encoder, task_head = with_class_head(
            encoder, len(classes), pool=pool, head=head, dropout=dropout, drop_path=drop_path, freeze=freeze
        )
        super().__init__(encoder, task_head, classes=classes, freeze=freeze, **kwargs)
        check_head_start(head_start, owner="Multilabel", head=head)
        self.head_start = head_start

    def on_fit_start(self) -> None:
        """Begin with the probe where that is asked for; a run that goes on has its head already."""
        super().on_fit_start()
        if self.head_start == "probe":
            begin_with_probe(self, fitted=label_layer)

    def probe_for(self, separator: str | None) -> Evaluator:
        """`MultilabelProbe` with the separator of the data."""
        return self.probe if separator is None else MultilabelProbe(separator=separator)

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """`labels`: the mean over the labels of binary cross-entropy, of mixed targets where the views mix."""
        assert batch.targets is not None
        errors = F.binary_cross_entropy_with_logits(self.logits(batch).float(), batch.targets, reduction="none")  # [B K]
        return {"labels": errors.mean(dim=1)}

    def outcomes(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Float[B 2 K]: the logits, and the labels that the items have."""
        return torch.stack([logits, targets], dim=1)

    def scores(self, outcomes: Tensor, groups: Tensor | None) -> dict[str, Score]:
        """`map`: mean average precision over the labels that test items have, in percent."""
        logits, targets = outcomes.unbind(dim=1)
        return {"map": mean_average_precision(logits, targets > 0.5, groups)}
