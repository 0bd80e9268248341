"""How many prototypes the teacher uses while it trains: collapse shows here long before it shows in a loss.

Health of features, which needs no method (`evaluate.Health`), and a verdict are left out.
"""

from functools import partial

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor

from glpretrain.core.batch import Batch
from glpretrain.core.distributed import all_reduce_sum
from glpretrain.objectives.distillation import PatchDistillation, ViewDistillation


class PrototypeUsage(pl.Callback):
    """Logs, for every distillation of the method, over the teacher's assignments of the last steps, from all processes:

    `health/<term>/perplexity`: exp of the entropy of the mean assignment, from 1 (one prototype takes all) to the number of
    prototypes; `health/<term>/used`: percent of the prototypes that were the first choice of at least one row. Neither can
    exceed what the rows seen allow.

    Args:
        every_n_steps: number of steps between two reports.
        num_steps: number of steps that a report is over, the last ones before it: assignments are computed a second time in these.
    """

    def __init__(self, *, every_n_steps: int = 50, num_steps: int = 5) -> None:
        if not 1 <= num_steps <= every_n_steps:
            raise ValueError(f"PrototypeUsage: num_steps {num_steps}; accepted: from 1 to every_n_steps, which is {every_n_steps}")
        self.every_n_steps, self.num_steps = every_n_steps, num_steps
        self._sums: dict[str, Tensor] = {}  # Float[2 K]  assignments, first choices
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._reported_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to what the method's objectives are given."""
        for name, module in pl_module.named_modules():
            if isinstance(module, ViewDistillation | PatchDistillation):
                hook = partial(self._gather, trainer, name.removesuffix("_objective"))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Report, once per optimizer step that asks for it."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._reported_step:
            return
        self._reported_step = step
        for name, sums in self._sums.items():
            for score, value in usage(all_reduce_sum(sums)).items():
                pl_module.log(f"health/{name}/{score}", value, batch_size=len(batch.index))
        self._sums = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _gather(
        self,
        trainer: pl.Trainer,
        name: str,
        objective: ViewDistillation | PatchDistillation,
        args: tuple[Tensor, ...],
        kwargs: dict[str, object],
        output: Tensor,
    ) -> None:
        # global_step counts the steps done: the one at hand is the next.
        if trainer.global_step % self.every_n_steps < self.every_n_steps - self.num_steps:
            return
        logits, temp = kwargs["teacher_logits"], kwargs["teacher_temp"]
        assert isinstance(logits, Tensor) and isinstance(temp, float)
        with torch.no_grad():
            rows = objective.targets(logits, teacher_temp=temp).flatten(0, -2)  # [rows K]
            first = rows.new_zeros(rows.shape[1]).index_add_(0, rows.argmax(dim=-1), rows.new_ones(len(rows)))
            sums = torch.stack([rows.sum(dim=0), first])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums


def usage(sums: Tensor) -> dict[str, Tensor]:
    """Perplexity and percent used.

    Args:
        sums: Float[2 K], over rows: assignments, first choices.

    Returns:
        Float[] each, NaN without rows.
    """
    mean = sums[0] / sums[0].sum()
    return {"perplexity": torch.special.entr(mean).sum().exp(), "used": 100 * (sums[1] > 0).float().mean()}
