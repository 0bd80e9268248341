"""A recipe becomes a run: parsed strictly, given the callbacks and loggers that every run has, trained, exported, summed up.

The loop (Lightning's) and the mathematics (the method's) are left out. A recipe may bring callbacks or a logger of its own; a
callback of the same class as a default one replaces it.
"""

import logging
import os
import pickle
import platform
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # pyright: ignore[reportPrivateImportUsage] - its public home

from glpretrain import __version__, modalities
from glpretrain.callbacks import LogViews, RunEvaluators, RunProgress, Throughput, default_loggers, finish
from glpretrain.cli.init_from import InitFrom, Origin
from glpretrain.cli.parsing import parse
from glpretrain.cli.trust import Parser, known, read_part, take_imports
from glpretrain.data.module import DataModule
from glpretrain.data.own import source_for, source_spec
from glpretrain.data.views import ViewMaker
from glpretrain.methods.base import Method
from glpretrain.runs import Run, find_recipe, new_folder, recipe_name, write_json
from glpretrain.weights import export

_CHECKPOINT_EVERY = 1000  # steps; a run that is cut short loses no more
_VERSIONS = ("torch", "torchvision", "pytorch-lightning", "timm", "kornia")


class _Parser(Parser, LightningArgumentParser):
    """Lightning's parser, which reads configurations within bounds."""


class Training(LightningCLI):
    """Parses a recipe and its overrides, builds what they name, and trains.

    Args:
        arguments: of the command line, `--config FILE` among them.
    """

    model: Method
    datamodule: DataModule

    def __init__(self, arguments: Sequence[str]) -> None:
        self.folder: Path | None = None  # None in every process but the first: only that one writes
        self.origin: Origin | None = None  # None: the run starts from random weights
        super().__init__(
            Method,
            DataModule,
            save_config_callback=None,
            seed_everything_default=0,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            run=False,
            parser_class=_Parser,
            parser_kwargs={"exit_on_error": False, "prog": "glpretrain fit", "description": "Train what --config FILE describes."},
            args=take_imports(arguments),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run has beyond the method, the data and the trainer."""
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to resume from")
        parser.add_argument(
            "--init_from", type=InitFrom | str | None, default=None, help="backbone to go on from, instead of random weights"
        )
        parser.add_argument("--evaluate", type=bool, default=True, help="score the backbone before and after training")
        parser.add_argument("--runs", type=str, default="runs", help="where run folders go")
        parser.link_arguments("seed_everything", "data.seed")  # one seed: weights, order, views and masks

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse `args` whatever the interpreter was started with (Lightning warns when both are there)."""
        assert isinstance(args, list)
        self.config = parse(parser, args)
        if not self.config.config:
            raise ValueError("--config is missing; give the path of a recipe, or use `glpretrain pretrain RECIPE`")
        checkpoint = self.config.ckpt_path
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise ValueError(f"ckpt_path: {checkpoint} is not a file; accepted: a checkpoint (.ckpt) of the same method")
        if checkpoint is not None and not zipfile.is_zipfile(checkpoint):  # what torch.save writes, with its contents at the end
            raise ValueError(f"ckpt_path: {checkpoint} is no checkpoint or is cut short; accepted: a checkpoint (.ckpt) of the same method")

    @property
    def recipe(self) -> str:
        """Name of what is trained."""
        return recipe_name(Path(str(self.config.config[0])))

    def before_instantiate_classes(self) -> None:
        """The views normalise as the encoder's card says, so a backbone is read before an encoder is built."""
        if self.config.init_from is not None:
            encoder = self.config.model.init_args.encoder
            self.origin = Origin(self.config.init_from, in_chans=encoder.init_args.get("in_chans"))
            self.origin.complete(encoder)

    def instantiate_trainer(self, **kwargs: object) -> pl.Trainer:
        """The trainer, with the callbacks and loggers of every run."""
        if self.origin is not None:  # here: what does not fit is refused before a run folder is made
            self.origin.start(self.model)
        assert isinstance(self.config_init, Namespace)
        given = self.config_init.trainer
        if given.default_root_dir is not None:
            raise ValueError(f"trainer.default_root_dir={given.default_root_dir} would be ignored; --runs says where run folders go")
        if _is_first_process():
            self.folder = new_folder(self.recipe, runs=Path(self.config.runs))
            kwargs["default_root_dir"] = str(self.folder)
            if given.logger in (None, True):
                kwargs["logger"] = default_loggers(self.folder, recipe=self.recipe)
            self.parser.save(self.config, self.folder / "config.yaml")
        elif given.logger in (None, True):
            kwargs["logger"] = False
        if given.enable_model_summary is None:
            kwargs["enable_model_summary"] = False  # `fit` says it in one line
        own = given.callbacks or []
        kwargs["callbacks"] = [*own, *self._default_callbacks(given, own)]
        return super().instantiate_trainer(**kwargs)

    def _default_callbacks(self, given: Namespace, own: list[pl.Callback]) -> list[pl.Callback]:
        evaluators = next((callback for callback in own if isinstance(callback, RunEvaluators)), None)
        if evaluators is None and self.config.evaluate:
            evaluators = RunEvaluators()
        self.evaluators, self.throughput = evaluators, Throughput(evaluators=evaluators)
        callbacks: list[pl.Callback] = [] if evaluators is None else [evaluators]
        callbacks.append(self.throughput)
        if given.enable_progress_bar is not False:
            callbacks.append(RunProgress(self.throughput))
        if self.folder is not None:
            callbacks.append(LogViews(self.folder / "views.png"))
        if given.enable_checkpointing is not False:
            folder = None if self.folder is None else self.folder / "checkpoints"
            options = {"filename": "last", "every_n_train_steps": _CHECKPOINT_EVERY, "enable_version_counter": False}
            callbacks.append(ModelCheckpoint(folder, save_on_exception=True, **options))
        return [callback for callback in callbacks if type(callback) not in [type(one) for one in own]]

    def fit(self) -> Run:
        """Train, save the last state, export the backbone and write results.json.

        Returns:
            The run, the same in every process.
        """
        if self.folder is not None:
            print(self._summary(), flush=True)
        start = time.perf_counter()
        with _interruptible(self.trainer):
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path, weights_only=True)
        seconds = time.perf_counter() - start
        folder = Path(self.trainer.strategy.broadcast(str(self.folder)))
        if self.config.trainer.enable_checkpointing is not False:
            self.trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=False)
        if self.trainer.is_global_zero:
            start = "" if self.origin is None else f" from {self.origin.name}"
            source = f"{type(self.model).__name__}, recipe {self.recipe}, {self.trainer.global_step} steps{start}"
            export(self.model.backbone(), folder / "backbone", source=source)
            write_json(folder / "results.json", self._results(seconds))
            finish(self.trainer.loggers)
            print(f"results, checkpoint and backbone: {folder}", flush=True)
        self.trainer.strategy.barrier("run folder")
        return Run(folder)

    def _summary(self) -> str:
        card = self.model.encoder.card
        size = modalities.get(card.modality).describe_size(card)
        start = "" if self.origin is None else f"init_from: {self.origin.name}: {self.origin.transfer}\n"
        trained = sum(parameter.numel() for parameter in self.model.student.parameters() if parameter.requires_grad)
        return (
            f"{type(self.model).__name__}: {card.encoder} {card.arguments.get('name', '')} at {size}, "
            f"{trained / 1e6:.1f} M parameters with heads; {len(self.datamodule.source)} items of {self.datamodule.source.name}, "
            f"{self.datamodule.batch_size * self.trainer.world_size} a step\n"
            f"{start}run folder: {self.folder}"
        )

    def _results(self, seconds: float) -> dict[str, object]:
        evaluators, card = self.evaluators, self.model.encoder.card
        evaluation_seconds = 0.0 if evaluators is None else evaluators.seconds
        return {
            "recipe": self.recipe,
            "method": type(self.model).__name__,
            "seed": self.config.seed_everything,
            "before": None if evaluators is None else evaluators.before,
            "after": None if evaluators is None else evaluators.after,
            "measured_on": {} if evaluators is None else evaluators.measured_on,
            "data": self.datamodule.source.name,
            "steps": self.trainer.global_step,
            "images_seen": self.throughput.images_seen,
            "seconds": seconds - evaluation_seconds,
            "evaluation_seconds": evaluation_seconds,
            "images_per_second": self.throughput.images_per_second,
            "init_from": None if self.origin is None else self.origin.results(self.model),
            "resumed_from": self.config.ckpt_path,
            "encoder": card.to_json(),
            "devices": self.trainer.world_size,
            "precision": str(self.trainer.precision),
            "device": torch.cuda.get_device_name() if self.trainer.strategy.root_device.type == "cuda" else "cpu",
            "versions": {"python": platform.python_version(), "glpretrain": __version__} | {name: version(name) for name in _VERSIONS},
        }


def _is_first_process() -> bool:
    """Known before the trainer is: a launcher says it in the environment, and without one there is a single process so far."""
    rank = rank_zero_only.rank  # pyright: ignore[reportFunctionMemberAccess] - Lightning keeps it there
    return rank == 0 and os.environ.get("NODE_RANK", "0") == "0"


@contextmanager
def _interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Undo what Lightning makes of an interrupt: an exit, which ends a notebook too, with every later interrupt ignored."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not trainer.interrupted:
            raise
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
        finish(trainer.loggers)
        raise KeyboardInterrupt from stop


def _quiet() -> None:
    """Without advertisements and warnings about what is on purpose."""
    for message in (
        ".*does not have many workers.*",  # decoded items in memory need none
        ".*in eval mode at the start of training.*",  # the teacher's
        ".*is smaller than the logging interval.*",  # the interval counts steps, whatever an epoch is
        ".*isinstance.treespec, LeafSpec.*",  # Lightning's own
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


def train(arguments: Sequence[str]) -> Run:
    """Train from --config FILE and any number of overrides (LightningCLI).

    Args:
        arguments: words of the command line; `glpretrain fit --help` lists what there is.
    """
    _quiet()
    try:
        return Training(arguments).fit()
    except MisconfigurationException as error:  # such as accelerator: gpu where there is none
        raise ValueError(f"trainer: {error}") from error
    except pickle.UnpicklingError as error:  # what it would run is not run
        raise ValueError("ckpt_path: it holds more than tensors and plain values, or is damaged; nothing in it was run") from error


def pretrain(
    recipe: str,
    *,
    data: str | None = None,
    masks: str | None = None,
    init_from: str | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """Train a recipe by name, evaluate before and after, export.

    Everything lands in runs/<recipe>/<time>/; runs/<recipe>/latest points at it. Any other argument overrides the recipe, as in
      glpretrain pretrain mmc --trainer.max_steps 100 --model.init_args.lr.base 1e-3
    `glpretrain fit --help` lists what there is.

    Args:
        recipe: a name below recipes/ (mmc, paper/...) or the path of a yaml file
        data: folder of images, of faces with region maps, of tiles or of clouds, tar shards, or a file of clouds, instead of the
            recipe's source
        masks: score segmentation on this folder, images/ beside masks/, or on this file of clouds with parts
        init_from: go on from this backbone instead of random weights
        overrides: further arguments of `glpretrain fit`
    """
    overrides = take_imports(overrides)
    path = find_recipe(recipe)
    if (name := recipe_name(path)).startswith("eval/"):
        raise ValueError(f"{name} says how a backbone is scored, not trained; use it as in: glpretrain evaluate BACKBONE --config {name}")
    arguments = ["--config", str(path)]
    if data is not None:
        arguments += source_spec(data, source_for(data, _modality_of(path))).arguments("data.source")
        arguments += ["--data.labelled_test", "null", "--data.labelled", "null"]  # scores on the same folder where it has classes
    if masks is not None:
        arguments += source_spec(masks, modalities.get(_modality_of(path)).masked_source).arguments("data.masked")
    if init_from is not None:
        arguments += ["--init_from", init_from]
    return train([*arguments, *overrides])


def _modality_of(recipe: Path) -> str:
    """The kind of items of a recipe, which its views know."""
    parser = Parser(exit_on_error=False)
    parser.add_argument("--views", type=ViewMaker, required=True)
    given = {"views": read_part(recipe, "data", "views")}
    views = known(parse(parser, [], values=given).views.class_path)
    assert isinstance(views, type) and issubclass(views, ViewMaker)
    return views.modality


def fit(
    recipe: str,
    *,
    data: str | Path | None = None,
    masks: str | Path | None = None,
    init_from: str | Path | None = None,
    max_steps: int | None = None,
    seed: int | None = None,
    runs: str | Path = "runs",
    overrides: Sequence[str] = (),
) -> Run:
    """Train a recipe from Python.

    Args:
        recipe: name below recipes/ or path of a yaml file.
        data: folder of images or of tiles, or tar shards, instead of the recipe's source.
        masks: folder of images with masks, instead of the recipe's.
        init_from: backbone to go on from, as `glpretrain.load_backbone` takes it.
        max_steps: number of optimizer steps, instead of the recipe's.
        seed: seed of weights, order, views and masks, instead of the recipe's.
        runs: folder of run folders.
        overrides: further arguments as on the command line, such as `["--data.batch_size", "32"]`.

    Raises:
        ValueError: names what is wrong and what is accepted.
    """
    arguments = ["--runs", str(runs)]
    if max_steps is not None:
        arguments += ["--trainer.max_steps", str(max_steps)]
    if seed is not None:
        arguments += ["--seed_everything", str(seed)]
    given = {"data": data, "masks": masks, "init_from": init_from}
    paths = {name: None if value is None else str(value) for name, value in given.items()}
    return pretrain(recipe, **paths, overrides=[*arguments, *overrides])
