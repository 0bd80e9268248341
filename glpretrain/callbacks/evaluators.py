"""Scores of the backbone before, during and after training, and the one table that compares them.

What a score is is left out (`glpretrain.evaluate`), and so is anything that would change the training: mode and random state are put back.
"""

import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Protocol, runtime_checkable

import pytorch_lightning as pl
from pytorch_lightning.utilities.seed import isolate_rng
from pytorch_lightning.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glpretrain.core.batch import Batch
from glpretrain.core.mailbox import exchanged
from glpretrain.data.module import DataModule
from glpretrain.data.sources.base import Source
from glpretrain.data.sources.images.videos import VideoSource
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate import Evaluator, FeatureCache, Result, Score, Sources, default_evaluators, default_sources
from glpretrain.evaluate.encoding import evaluating, shared_encoding
from glpretrain.evaluate.estimates import announce


@runtime_checkable
class Trained(Protocol):
    """What callbacks have to know of a method."""

    @property
    def encoder(self) -> Encoder:
        """The encoder that is trained."""
        ...

    def backbone(self) -> Encoder:
        """The encoder that a run exports, sharded where the run is."""
        ...

    def whole_backbone(self) -> Encoder:
        """The encoder that a run exports; all processes have to ask for it."""
        ...


class RunEvaluators(pl.Callback):
    """Runs evaluators on `pl_module.backbone()` when the fit starts and when it ends.

    A fit starts from random weights or from those of `init_from`; a resumed fit is not scored at its start. The first process evaluates;
    the others encode their share of the items for it. Scoring never stops training: what cannot be scored is left out, and the table says
    why.

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
        self.before: dict[str, float | None] | None = None
        self.after: dict[str, float | None] | None = None
        self.left_out: dict[str, str] = {}  # scores that could not be computed, by their names in results.json, each with the reason
        self.seconds = 0.0  # spent on evaluation so far
        self._takes_defaults = evaluators is None
        self._evaluated_step = self._num_evaluations = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scores of what the run starts from."""
        assert isinstance(pl_module, Trained)
        if self._takes_defaults:
            self.evaluators = default_evaluators(pl_module.encoder.card.modality)
        needed = {role for evaluator in self.evaluators.values() for role in evaluator.needs if role not in self.sources}
        if needed:
            data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue] - Lightning sets it without declaring it
            assert isinstance(data, DataModule)
            self.sources = sources_of(data, needed) | self.sources
        self.measured_on = {
            name: self.sources.measured(evaluator.scored).name
            for name, evaluator in self.evaluators.items()
            if evaluator.scored in self.sources
        }
        if trainer.ckpt_path is None:
            self.before = self._evaluate(trainer, pl_module)

    def state_dict(self) -> dict[str, object]:
        """The scores before training, which a resumed run does not compute again."""
        return {"before": self.before, "left_out": self.left_out}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over what the interrupted run had."""
        self.before, self.left_out = state_dict["before"], dict(state_dict["left_out"])

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

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float | None]:
        start = time.perf_counter()
        scores: dict[str, float | None] = {}
        logged: dict[str, float] = {}
        assert isinstance(pl_module, Trained)
        encoder = pl_module.whole_backbone()
        self._num_evaluations += 1
        moment, is_whole = f"evaluation {self._num_evaluations}", encoder is pl_module.backbone()
        # In a sharded run only the first process has the whole encoder, so it encodes alone.
        sharing = shared_encoding(moment, encoder, self.sources) if is_whole else nullcontext()
        with isolate_rng(), evaluating(encoder), sharing as team:
            if trainer.is_global_zero:
                cache = FeatureCache(encoder, team=team)  # of this moment's weights: k-NN and linear probe share one pass
                for name, evaluator in self.evaluators.items():
                    if self._num_evaluations == 1:
                        announce(name, evaluator, encoder, self.sources, cache)
                    found = evaluator.attempt(encoder, self.sources, cache)
                    self._leave_out({result_key(name, score): reason for score, reason in found.left_out.items()})
                    scores |= flat(name, found)
                    logged |= {f"eval/{name}/{score}": value.value for score, value in found.scores.items()}
                for logger in trainer.loggers:
                    logger.log_metrics(logged, step=trainer.global_step)
        if not is_whole:
            exchanged(moment, "done", ranks=(0,))  # a collective would give up after half an hour
        self.seconds += time.perf_counter() - start
        return scores

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        for line in left_out_lines({score: reason for score, reason in reasons.items() if score not in self.left_out}):
            print(line, file=sys.stderr, flush=True)
        self.left_out |= reasons

    def table(self) -> Table:
        """One row per headline score, and below why scores were left out; all scores are in results.json."""
        table = Table("score", title="the backbone before and after, with 95 % intervals", title_justify="left")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right", no_wrap=column != "change")
        table.add_column("measured on")
        before, after = self.before, self.after or {}
        for name, evaluator in self.evaluators.items():
            for score in (result_key(name, headline) for headline in evaluator.headlines):
                ends = [None if scores is None else scores.get(score) for scores in (before, after)]
                change = "" if ends[0] is None or ends[1] is None else f"{ends[1] - ends[0]:+.1f}"
                shown = "" if before is None else _shown(before, score)
                table.add_row(score, shown, _shown(after, score), change, Text(self.measured_on.get(name, "")))
        explain(table, self.left_out)
        return table


def scored(evaluators: RunEvaluators | None) -> dict[str, object]:
    """What results.json holds of the scores of a run; None of one that was not scored."""
    if evaluators is None:
        return {"before": None, "after": None, "left_out": {}, "measured_on": {}}
    return {name: vars(evaluators)[name] for name in ("before", "after", "left_out", "measured_on")}


def sources_of(data: DataModule, roles: Collection[str]) -> Sources:
    """The sources of these roles that a data module has for scores; where it has none, the reason."""
    makers: dict[tuple[str, ...], Callable[[], Sources]] = {
        ("train", "test"): lambda: default_sources(data.labelled_sources(), None),
        ("masked",): lambda: default_sources(None, data.masked_source()),
    }
    found = Sources({})
    for given, make in makers.items():
        if not set(given).isdisjoint(roles):
            try:
                found |= make()
            except ValueError as error:
                found |= Sources({}, missing=dict.fromkeys(given, str(error)))
    return found


def explain(table: Table, left_out: Mapping[str, str]) -> None:
    """Say below a table which scores were left out, and why."""
    table.caption, table.caption_justify = Text("\n".join(left_out_lines(left_out))) if left_out else None, "left"


def left_out_lines(reasons: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the scores that it costs."""
    scores = {reason: [name for name, own in reasons.items() if own == reason] for reason in reasons.values()}
    return [f"left out: {', '.join(names)}: {reason}" for reason, names in scores.items()]


def result_key(evaluator: str, score: str) -> str:
    """Name of a score in results.json: `knn` for the accuracy of "knn", `prompt_miou` for the miou of "prompt"."""
    return f"{evaluator}_{score}".replace("_accuracy", "", 1)


def flat(evaluator: str, result: Result) -> dict[str, float | None]:
    """A result as results.json holds it: each score, the ends of its interval as `_low` and `_high` (null where a single observation gives
    none), of how many it is as `_n`, and what was chosen."""
    values: dict[str, float | None] = {}
    for name, score in result.scores.items():
        key = result_key(evaluator, name)
        values |= {key: score.value, f"{key}_low": score.low, f"{key}_high": score.high, f"{key}_n": score.n}
    return values | {f"{evaluator}_{name}": value for name, value in result.chosen.items()}


def _shown(scores: Mapping[str, float | None], score: str) -> str:
    value = scores.get(score)
    return "left out" if value is None else str(Score(value, scores.get(f"{score}_low"), scores.get(f"{score}_high"), 0))
