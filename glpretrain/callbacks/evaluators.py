"""Scores of the backbone before, during and after training, and the one table that compares them.

Left out: what a score is (`glpretrain.evaluate`), and anything that would change the training: mode and random state are put back.
"""

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from pytorch_lightning.utilities.seed import isolate_rng
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from glpretrain.core.batch import Batch
from glpretrain.evaluate import Evaluator, FeatureCache, Result, default_evaluators

if TYPE_CHECKING:
    from collections.abc import Iterator


class RunEvaluators(pl.Callback):
    """Runs evaluators on `pl_module.backbone()` when the fit starts and when it ends.

    What a fit starts from are random weights or those of `init_from`; a resumed one is not scored at its start.

    Only the first process evaluates; the others wait for it.

    Args:
        evaluators: by name; None for the default ones on the data module's `labelled_sources()` and `masked_source()`.
        every_n_steps: also during training.
    """

    def __init__(self, evaluators: dict[str, Evaluator] | None = None, *, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"RunEvaluators: every_n_steps is a positive number or null, not {every_n_steps}")
        self.evaluators = evaluators
        self.every_n_steps = every_n_steps
        self.measured_on: dict[str, str] = {}
        self.before: dict[str, float] | None = None
        self.after: dict[str, float] | None = None
        self.seconds = 0.0  # spent on evaluation so far
        self._evaluated_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scores of what the run starts from."""
        if self.evaluators is None:
            self.evaluators = default_evaluators(trainer.datamodule.labelled_sources(), trainer.datamodule.masked_source())
        self.measured_on = {name: evaluator.scored.name for name, evaluator in self.evaluators.items()}
        if trainer.ckpt_path is None:
            self.before = self._evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Tensor, batch: Batch, batch_idx: int) -> None:
        """Scores on the way, once per optimizer step that asks for them."""
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step != self._evaluated_step:
            self._evaluated_step = step
            self._evaluate(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scores of the trained backbone, and the table."""
        self.after = self._evaluate(trainer, pl_module)
        if trainer.is_global_zero and self.after:
            Console().print(self.table())

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        start = time.perf_counter()
        scores: dict[str, float] = {}
        logged: dict[str, float] = {}
        if trainer.is_global_zero:
            encoder = pl_module.backbone()
            with isolate_rng(), _mode_restored(encoder):
                encoder.eval()
                cache = FeatureCache(encoder)  # of this moment's weights: k-NN and linear probe share one pass
                for name, evaluator in self.evaluators.items():
                    found = evaluator.run(encoder, cache=cache)
                    scores |= flat(name, found)
                    logged |= {f"eval/{name}/{score}": value.value for score, value in found.scores.items()}
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=trainer.global_step)
        trainer.strategy.barrier("evaluation")
        self.seconds += time.perf_counter() - start
        return scores

    def table(self) -> Table:
        """One row per headline score; the others are in results.json."""
        table = Table(title="the backbone before and after", title_justify="left")
        for column, justify in (("score", "left"), ("before", "right"), ("after", "right"), ("change", "right"), ("measured on", "left")):
            table.add_column(column, justify=justify)
        for name, evaluator in self.evaluators.items():
            for score in (result_key(name, headline) for headline in evaluator.headlines):
                before = None if self.before is None else self.before[score]
                table.add_row(
                    score,
                    "" if before is None else _shown(self.before, score),
                    _shown(self.after, score),
                    "" if before is None else f"{self.after[score] - before:+.1f}",
                    self.measured_on.get(name, ""),
                )
        return table


def result_key(evaluator: str, score: str) -> str:
    """Name of a score in results.json: `knn` for the accuracy of "knn", `prompt_miou` for the miou of "prompt"."""
    return f"{evaluator}_{score}".replace("_accuracy", "", 1)


def flat(evaluator: str, result: Result) -> dict[str, float]:
    """A result as results.json holds it: each score, its half-width as `_ci`, how many it rests on as `_n`, and what was chosen."""
    values: dict[str, float] = {}
    for name, score in result.scores.items():
        key = result_key(evaluator, name)
        values |= {key: score.value, f"{key}_ci": score.ci, f"{key}_n": float(score.n)}
    return values | {f"{evaluator}_{name}": value for name, value in result.chosen.items()}


def _shown(scores: dict[str, float], score: str) -> str:
    return f"{scores[score]:.1f} +- {scores[f'{score}_ci']:.1f}"


@contextmanager
def _mode_restored(module: nn.Module) -> "Iterator[None]":
    """Put every submodule back into its own mode: a frozen part may be in eval mode inside a training module."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
