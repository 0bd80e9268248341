"""Scores of the backbone before, during and after training, and the one table that compares them.

What a score is is left out (`glpretrain.evaluate`), and so is anything that would change the training: mode and random state are put back.
"""

import time
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import pytorch_lightning as pl
from pytorch_lightning.utilities.seed import isolate_rng
from pytorch_lightning.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.table import Table

from glpretrain.core.batch import Batch
from glpretrain.data.module import DataModule
from glpretrain.data.sources.base import Source
from glpretrain.data.sources.images.videos import VideoSource
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate import Evaluator, FeatureCache, Result, Sources, default_evaluators, default_sources
from glpretrain.evaluate.features import evaluating


@runtime_checkable
class Trained(Protocol):
    """What callbacks have to know of a method."""

    @property
    def encoder(self) -> Encoder:
        """The encoder that is trained."""
        ...

    def backbone(self) -> Encoder:
        """The encoder that a run exports."""
        ...


class RunEvaluators(pl.Callback):
    """Runs evaluators on `pl_module.backbone()` when the fit starts and when it ends.

    A fit starts from random weights or from those of `init_from`; a resumed fit is not scored at its start. Only the first process
    evaluates; the others wait for it.

    Args:
        evaluators: evaluators by name; None for the default ones of the encoder's kind of items.
        sources: what they are run on, by role; a role that is missing is taken from the data module's `labelled_sources()` and
            `masked_source()`.
        every_n_steps: number of steps between two evaluations during training; None evaluates before and after only.
    """

    def __init__(
        self,
        evaluators: dict[str, Evaluator] | None = None,
        sources: dict[str, Source | VideoSource] | None = None,
        *,
        every_n_steps: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"RunEvaluators: every_n_steps is a positive number or null, not {every_n_steps}")
        self.evaluators: Mapping[str, Evaluator] = evaluators or {}
        self.sources: Sources = Sources(sources or {})
        self.every_n_steps = every_n_steps
        self.measured_on: dict[str, str] = {}
        self.before: dict[str, float] | None = None
        self.after: dict[str, float] | None = None
        self.seconds = 0.0  # spent on evaluation so far
        self._takes_defaults = evaluators is None
        self._evaluated_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scores of what the run starts from."""
        assert isinstance(pl_module, Trained)
        if self._takes_defaults:
            self.evaluators = default_evaluators(pl_module.encoder.card.modality)
        if any(role not in self.sources for evaluator in self.evaluators.values() for role in evaluator.needs):
            data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue] - Lightning sets it without declaring it
            assert isinstance(data, DataModule)
            self.sources = default_sources(data.labelled_sources(), data.masked_source()) | self.sources
        for evaluator in self.evaluators.values():
            evaluator.check(self.sources)
        self.measured_on = {name: self.sources.measured(evaluator.scored).name for name, evaluator in self.evaluators.items()}
        if trainer.ckpt_path is None:
            self.before = self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
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
            assert isinstance(pl_module, Trained)
            encoder = pl_module.backbone()
            with isolate_rng(), evaluating(encoder):
                cache = FeatureCache(encoder)  # of this moment's weights: k-NN and linear probe share one pass
                for name, evaluator in self.evaluators.items():
                    found = evaluator.run(encoder, self.sources, cache)
                    scores |= flat(name, found)
                    logged |= {f"eval/{name}/{score}": value.value for score, value in found.scores.items()}
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=trainer.global_step)
        trainer.strategy.barrier("evaluation")
        self.seconds += time.perf_counter() - start
        return scores

    def table(self) -> Table:
        """One row per headline score; the others are in results.json."""
        table = Table("score", title="the backbone before and after", title_justify="left")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right")
        table.add_column("measured on")
        before, after = self.before, self.after or {}
        for name, evaluator in self.evaluators.items():
            for score in (result_key(name, headline) for headline in evaluator.headlines):
                change = "" if before is None else f"{after[score] - before[score]:+.1f}"
                shown = "" if before is None else _shown(before, score)
                table.add_row(score, shown, _shown(after, score), change, self.measured_on.get(name, ""))
        return table


def result_key(evaluator: str, score: str) -> str:
    """Name of a score in results.json: `knn` for the accuracy of "knn", `prompt_miou` for the miou of "prompt"."""
    return f"{evaluator}_{score}".replace("_accuracy", "", 1)


def flat(evaluator: str, result: Result) -> dict[str, float]:
    """A result as results.json holds it: each score, its half-width as `_ci`, of how many it is as `_n`, and what was chosen."""
    values: dict[str, float] = {}
    for name, score in result.scores.items():
        key = result_key(evaluator, name)
        values |= {key: score.value, f"{key}_ci": score.ci, f"{key}_n": float(score.n)}
    return values | {f"{evaluator}_{name}": value for name, value in result.chosen.items()}


def _shown(scores: dict[str, float], score: str) -> str:
    return f"{scores[score]:.1f} +- {scores[f'{score}_ci']:.1f}"
