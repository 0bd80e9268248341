"""A recipe becomes a run: parsed strictly, given the callbacks and loggers that every run has, trained, exported, summed up.

The loop (Lightning's) and the mathematics (the method's) are left out. A recipe may bring callbacks or a logger of its own; a
callback of the same class as a default one replaces it.
"""

import os
import pickle
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal

import pytorch_lightning as pl
from jsonargparse import Namespace
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import Logger

from glpretrain.callbacks import (
    Checkpoints,
    EndTogether,
    KeepRefused,
    LogViews,
    RunProgress,
    StopOnSignal,
    StoppedBySignalError,
    Throughput,
    TrainingHealth,
)
from glpretrain.callbacks.evaluators import RunEvaluators, scored
from glpretrain.callbacks.loggers import finish, run_loggers
from glpretrain.cli import provenance, resume
from glpretrain.cli.init_from import InitFrom, Origin
from glpretrain.cli.parsing import parse, require_one_recipe
from glpretrain.cli.reporting import after_run, keeping_start
from glpretrain.cli.run_folder import RunFolder
from glpretrain.cli.summary import summary
from glpretrain.cli.trainer import (
    chosen,
    interruptible,
    is_first_process,
    machine_of,
    quiet,
    read_folders,
    refusals,
    require_callbacks,
    require_settings,
)
from glpretrain.cli.trust import Parser, buildable, mapping_of, take_imports
from glpretrain.core.files import part_file, write_json
from glpretrain.core.rendezvous import meet_anew
from glpretrain.data.module import DataModule
from glpretrain.encoders import Encoder
from glpretrain.methods.base import Method
from glpretrain.runs import BACKBONE, ITEMS, RESULTS, Run, recipe_name, require_outside, without_links
from glpretrain.training.sharding import class_name
from glpretrain.weights import export

_RESUMED = "GLPRETRAIN_RESUMED"  # environment: the checkpoint that the first process has found, for those that it starts


class _Parser(Parser, LightningArgumentParser):
    """Lightning's parser, which reads configurations within bounds."""


class Training(LightningCLI):
    """Parses a recipe and its overrides, builds what they name, and trains.

    Args:
        arguments: of the command line, `--config FILE` among them.
    """

    model: Method
    datamodule: DataModule
    kinds: ClassVar[tuple[type[Method], type[DataModule]]] = (Method, DataModule)
    verb: ClassVar[str] = "fit"
    saved: ClassVar[str] = BACKBONE  # name of the folder of what was trained

    def __init__(self, arguments: Sequence[str]) -> None:
        self.run_folder: RunFolder | None = None  # None in every process but the first: only that one writes
        self.loggers: list[Logger] = []  # those of every run
        self.resumed = resume.Found(None, None, [])  # the run that this one goes on with
        self.origin: Origin | None = None  # None: the run starts from random weights
        with self._leaving_nothing_behind():
            super().__init__(
                *self.kinds,
                save_config_callback=None,
                seed_everything_default=0,
                subclass_mode_model=True,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                run=False,
                parser_class=_Parser,
                parser_kwargs={"exit_on_error": False, "prog": f"glpretrain {self.verb}", "description": "Train what a recipe describes."},
                args=take_imports(arguments),
            )

    @property
    def folder(self) -> Path | None:
        """The run's folder in the first process."""
        return None if self.run_folder is None else self.run_folder.path

    @contextmanager
    def _leaving_nothing_behind(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # an interrupt too
            if self.run_folder is not None:
                self.run_folder.leave(self.loggers, error)
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run has beyond the method, the data and the trainer."""
        self.add_start(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to resume from")
        parser.add_argument(
            "--resume",
            type=Literal["auto", "never", "force"],
            default="never",
            help="go on with an interrupted run of the same settings: auto; never; or force, although settings differ",
        )
        parser.add_argument("--runs", type=str, default="runs", help="where run folders go")
        parser.link_arguments("seed_everything", "data.seed")  # one seed: weights, order, views and masks

    def add_start(self, parser: LightningArgumentParser) -> None:
        """What a run starts from and is compared with."""
        parser.add_argument("--init_from", type=InitFrom | str | None, default=None, help="backbone to go on from, or path, encoder, heads")
        parser.add_argument("--evaluate", type=bool, default=True, help="score the backbone before and after training")
        parser.add_argument("--report", type=bool, default=True, help="end with a page of scores, curves and your items: report.html")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse `args` whatever the interpreter was started with (Lightning warns when both are there)."""
        assert isinstance(args, list)
        self.config = parse(parser, args)
        if not self.config.config:
            raise ValueError("--config is missing; give the path of a recipe, or use `glpretrain pretrain RECIPE`")
        self.config.ckpt_path = resume.checkpoint_of(self.config.ckpt_path)
        self.follow_links()
        require_settings(self.config.trainer)
        require_one_recipe(self.config.config)
        require_outside("runs", Path(self.config.runs), given=read_folders(self.config.data))

    def follow_links(self) -> None:
        """Name the start of the run so that it stays the same when `latest` moves."""
        if isinstance(given := self.config.init_from, Namespace):
            given.path = without_links(given.path)
        elif given is not None:
            self.config.init_from = without_links(given)

    @property
    def recipe(self) -> str:
        """Name of what is trained."""
        return recipe_name(Path(str(self.config.config[0])))

    def before_instantiate_classes(self) -> None:
        """The views normalise as the encoder's card says, so a backbone is read before an encoder is built."""
        if self.config.init_from is not None:
            encoder = self.config.model.init_args.encoder
            self.origin = Origin(self.config.init_from, **{name: encoder.init_args.get(name) for name in ("in_chans", "modality")})
            self.origin.complete(encoder, views=self.config.data.views)

    def instantiate_classes(self) -> None:
        """Build what the configuration names. Nothing but settings goes in, so whatever fails here is one of them.

        Raises:
            ValueError: says what could not be built.
        """
        with buildable():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: object) -> pl.Trainer:
        """The trainer, with the callbacks and loggers of every run."""
        if self.origin is not None:  # here: what does not fit is refused before a run folder is made
            self.origin.start(self.model)
        assert isinstance(self.config_init, Namespace)
        given = self.config_init.trainer
        if is_first_process():
            self.resumed = self._interrupted_run()
            self.run_folder = RunFolder(self.recipe, runs=Path(self.config.runs), resumed=self.resumed.folder)
            folder = self.run_folder.path
            kwargs["default_root_dir"] = str(folder)
            if given.logger is not False:
                own = given.logger if isinstance(given.logger, list) else [] if given.logger in (None, True) else [given.logger]
                kwargs["logger"] = self.loggers = run_loggers(
                    folder, own=own, recipe=self.recipe, about=self._about(), resumed=self.resumed.folder is not None
                )
            with part_file(folder / resume.CONFIG) as part:
                self.parser.save(self.config, part, overwrite=True)
            write_json(folder / ITEMS, self._items())
        elif given.logger in (None, True):
            kwargs["logger"] = False
        kwargs |= chosen(given)
        if given.enable_model_summary is None:
            kwargs["enable_model_summary"] = False  # `fit` says it in one line
        own = given.callbacks if isinstance(given.callbacks, list) else [] if given.callbacks is None else [given.callbacks]
        require_callbacks(own)
        kwargs["callbacks"] = [*own, *self._default_callbacks(given, own)]
        if not any(isinstance(callback, ModelCheckpoint) for callback in own):
            kwargs["enable_checkpointing"] = False  # ours are written by `Checkpoints`
        return super().instantiate_trainer(**kwargs)

    def _default_callbacks(self, given: Namespace, own: list[pl.Callback]) -> list[pl.Callback]:
        evaluators = next((callback for callback in own if isinstance(callback, RunEvaluators)), None)
        if evaluators is None and self.config.get("evaluate"):
            evaluators = RunEvaluators()
        self.evaluators, self.throughput = evaluators, Throughput(evaluators=evaluators)
        self.health = next((callback for callback in own if isinstance(callback, TrainingHealth)), None) or TrainingHealth()
        callbacks: list[pl.Callback] = [*([] if evaluators is None else [evaluators]), self.throughput, self.health]
        if given.enable_progress_bar is not False:
            callbacks.append(RunProgress(self.throughput))
        if self.config.get("report"):
            callbacks.append(keeping_start(self.folder))
        if self.run_folder is not None:
            folder = self.run_folder.path
            callbacks += [LogViews(folder / "views.png"), KeepRefused(folder), self.run_folder]
        if given.enable_checkpointing is not False:  # before what ends a run or may fail at its end
            self.checkpoints = next((callback for callback in own if isinstance(callback, Checkpoints)), None) or Checkpoints()
            self.checkpoints.folder = None if self.folder is None else self.folder / "checkpoints"
            callbacks.insert(0, self.checkpoints)
        self.together = next((callback for callback in own if isinstance(callback, EndTogether)), EndTogether())
        callbacks += [StopOnSignal(), self.together]  # the last one: it tells other processes that the state has been saved
        return [callback for callback in callbacks if type(callback) not in [type(one) for one in own]]

    def _about(self) -> dict[str, object]:
        """What loggers are told of this run: all settings, and where it comes from."""
        found = provenance.origin(provenance.device_of(self.config.trainer.accelerator))
        return mapping_of(self.parser.dump(self.config, skip_validation=True), "this run") | found

    def _items(self) -> dict[str, object]:
        """What identifies the items of this run."""
        source = self.datamodule.source
        return {"name": source.name, "number": len(source), "listing": source.fingerprint()}

    def _interrupted_run(self) -> resume.Found:
        """The run that this one goes on with, which is said in a line, or none."""
        if self.config.resume == "never" or self.config.ckpt_path is not None:
            return resume.Found(None, None, [])
        config = mapping_of(self.parser.dump(self.config), "this run")
        parent = Path(self.config.runs) / self.recipe
        force, among = self.config.resume == "force", resume.AMONG_SEEDS in os.environ
        found = resume.find(parent, config=config, items=self._items(), force=force, among_seeds=among)
        for line in found.lines:
            print(line, flush=True)
        if found.finished:
            assert found.folder is not None
            raise resume.AlreadyFinishedError(found.folder)
        return found

    def _checkpoint(self) -> str | None:
        """The checkpoint that all processes start from; the first one has found it."""
        self._store = meet_anew(rank=self.trainer.global_rank, world_size=self.trainer.world_size)
        found = None if self.resumed.checkpoint is None else str(self.resumed.checkpoint)
        if self.config.ckpt_path is not None or self.trainer.world_size == 1:
            return self.config.ckpt_path or found
        if self.folder is None and _RESUMED in os.environ:
            return os.environ[_RESUMED] or None
        if self.trainer.strategy.cluster_environment.creates_processes_externally:  # pyright: ignore[reportAttributeAccessIssue]
            self.trainer.strategy.setup_environment()  # the processes are there already, and can be told
            return self.trainer.strategy.broadcast(found)
        os.environ[_RESUMED] = found or ""  # for the processes that this one starts
        return found

    def fit(self) -> Run:
        """Train, save the last state, export the backbone and write results.json.

        Returns:
            The run, the same in every process.
        """
        if self.folder is not None:
            print(self._summary(), flush=True)
        start = time.perf_counter()
        with self.together.ending(), self._leaving_nothing_behind(), interruptible(self.trainer):
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self._checkpoint(), weights_only=True)
            if self.trainer.global_step == 0:
                raise ValueError("trainer: the run ended before its first step; look at max_time and limit_train_batches")
            run = self._finished(time.perf_counter() - start)
        if self.folder is not None and self.config.get("report"):
            after_run(self.folder, self.datamodule.source)
        return run

    def _finished(self, seconds: float) -> Run:
        """Write what is left of a run that was trained to its end."""
        folder = Path(self.trainer.strategy.broadcast(str(self.folder)))
        backbone = self.model.whole_backbone()
        if self.trainer.is_global_zero:
            start = "" if self.origin is None else f" from {self.origin.name}"
            source = f"{class_name(self.model)}, recipe {self.recipe}, {self.trainer.global_step} steps{start}"
            assert self.run_folder is not None
            self.save(backbone, self.run_folder.emptied(self.saved), source=source)
            write_json(folder / RESULTS, self._results(seconds))
            finish(self.trainer.loggers)
            self.run_folder.show()
            self.run_folder.close()
            if refused := self.model.step.num_refused:
                print(f"{refused} of {self.trainer.global_step} steps had a loss or gradient that was not finite, and moved nothing")
            print(f"results, checkpoint and {self.saved}: {folder}", flush=True)
        self.trainer.strategy.barrier("run folder")
        return Run(folder)

    def save(self, backbone: Encoder, folder: Path, *, source: str) -> None:
        """Write what was trained."""
        export(backbone, folder, source=source)

    def _summary(self) -> str:
        return summary(self.model, self.datamodule, self.trainer, origin=self.origin, folder=self.folder)

    def _results(self, seconds: float) -> dict[str, object]:
        evaluation_seconds = 0.0 if self.evaluators is None else self.evaluators.seconds
        return {
            "recipe": self.recipe,
            "method": class_name(self.model),
            "seed": self.config.seed_everything,
            **scored(self.evaluators),
            "data": self.datamodule.source.name,
            "steps": self.trainer.global_step,
            "health": {"verdicts": [verdict._asdict() for verdict in self.health.verdicts], "last": self.health.numbers},
            "refused_steps": self.model.step.num_refused,
            "images_seen": self.throughput.images_seen,
            "seconds": seconds - evaluation_seconds,
            "evaluation_seconds": evaluation_seconds,
            "images_per_second": self.throughput.images_per_second,
            "init_from": None if self.origin is None else self.origin.results(self.model),
            "resumed_from": self.config.ckpt_path or (None if self.resumed.checkpoint is None else str(self.resumed.checkpoint)),
            "encoder": self.model.encoder.card.to_json(),
            **machine_of(self.trainer),
        }


def train(arguments: Sequence[str], *, kind: type[Training] = Training) -> Run:
    """Train from --config FILE and any number of overrides (LightningCLI).

    Args:
        arguments: words of the command line; `glpretrain fit --help` lists what there is.
        kind: what parses them and trains.
    """
    quiet()
    with refusals():
        try:
            return resume.told(kind(arguments).fit().folder)
        except resume.AlreadyFinishedError as done:
            return resume.told(done.folder)
        except StoppedBySignalError as stop:
            if stop.number == signal.SIGINT:
                raise KeyboardInterrupt from stop
            raise
        except pickle.UnpicklingError as error:  # what it would run is not run
            raise ValueError("ckpt_path: it holds more than tensors and plain values, or is damaged; nothing in it was run") from error
