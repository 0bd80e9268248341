"""`glpretrain finetune`: a backbone, a recipe and labelled items become a model, with its score beside that of the frozen backbone.

The loop is that of every run (`training`), and so are run folders, checkpoints and resuming. What is learned is left out
(`glpretrain.finetune`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser

from glpretrain.callbacks import KeepRefused, TrainingHealth
from glpretrain.cli.pretraining import views_of
from glpretrain.cli.trainer import machine_of
from glpretrain.cli.training import Training, train
from glpretrain.cli.trust import known, read_part, take_imports
from glpretrain.data.sources.base import Source
from glpretrain.encoders import Encoder
from glpretrain.evaluate import Sources
from glpretrain.evaluate.base import Score
from glpretrain.finetune import FineTune, FineTuned, LabelledData, TaskViews
from glpretrain.report import untrained
from glpretrain.runs import Run, find_recipe, without_links
from glpretrain.weights import load_backbone

DEFAULT_RECIPE = "finetune/classification"


def finetune(
    backbone: str,
    *,
    config: str = DEFAULT_RECIPE,
    data: str | None = None,
    test: str | None = None,
    seed: int | None = None,
    epochs: int | None = None,
    from_scratch: bool = False,
    freeze: bool = False,
    no_probe: bool = False,
    resume: Literal["auto", "never", "force"] = "auto",
    overrides: Sequence[str] = (),
) -> Run:
    """Fine-tune a backbone on labelled items or on images with masks, and score the model.

    The score of a linear probe on the frozen backbone is printed first, then that of the model after every epoch. Everything lands in
    runs/finetune/<task>/<time>/, with the model in model/; runs/finetune/<task>/latest points at it.
      glpretrain finetune runs/mmc/latest/backbone --data photos/                  class folders, in train/ and val/ or not split
      glpretrain finetune runs/mmc/latest/backbone --data photos/ --from_scratch   the same network from fresh weights
      glpretrain predict runs/finetune/classification/latest/model new_photos/     classes of new files
      glpretrain finetune runs/mmc/latest/backbone --config finetune/segmentation --data masked/   the class of every pixel
      glpretrain finetune runs/point_mae/latest/backbone --config finetune/clouds --data shapes/   the class of a cloud of points
    Any other argument overrides the recipe, as in --trainer.max_epochs 50 --model.init_args.optimization.lr.base 5e-4.

    Args:
        backbone: folder of a run or export, a checkpoint, or a published checkpoint, as `glpretrain.load_backbone` takes it
        config: a name below recipes/ (finetune/...) or the path of a yaml file
        data: class folders, in train/ beside val/ or not split, or tar shards with classes, instead of the recipe's source; for
            segmentation images/ beside masks/, in train/ and val/ or not, with classes.csv (index,name), or a folder of Pascal VOC, ADE20K
            or COCO-Stuff
        test: what is scored on, in any form that --data takes, instead of a part of the items
        seed: seed of head, order and augmentation, instead of the recipe's
        epochs: passes over the training items, instead of the recipe's
        from_scratch: start from fresh weights of the same architecture
        freeze: train the head only
        no_probe: leave out the linear probe on the frozen backbone, which encodes all items once
        resume: go on with the newest run of the recipe where it was interrupted and has the same settings and items; never; or force,
            although they differ
        overrides: further arguments
    """
    path = find_recipe(config)
    if str(read_part(path, "model").get("class_path")).startswith("glpretrain.methods."):
        raise ValueError(f"finetune: --config {config} pretrains; accepted: a recipe of fine-tuning, such as {DEFAULT_RECIPE}")
    arguments = ["--config", str(path), "--backbone", backbone]
    given = {"seed_everything": seed, "trainer.max_epochs": epochs}
    for name, value in given.items():
        arguments += [] if value is None else [f"--{name}", str(value)]
    for name, flag in {"from_scratch": from_scratch, "model.init_args.freeze": freeze}.items():
        arguments += [f"--{name}", "true"] if flag else []
    for name, own in {"source": data, "test": test}.items():
        if own is not None:
            views = views_of(path)
            if not issubclass(views, TaskViews):
                raise ValueError(f"finetune: --config {config} has {views.__name__}; accepted: views of a task, as in {DEFAULT_RECIPE}")
            arguments += views.own_source(own).arguments(f"data.{name}")
    if no_probe:
        arguments += ["--probe", "false"]
    return train([*arguments, "--resume", resume, *take_imports(overrides)], kind=Tuning)


class Tuning(Training):
    """Parses a recipe and its overrides, opens the backbone, builds what they name, and trains.

    Args:
        arguments: of the command line, `--config FILE` and `--backbone` among them.
    """

    model: FineTune
    datamodule: LabelledData
    encoder: Encoder
    kinds: ClassVar = (FineTune, LabelledData)
    verb: ClassVar[str] = "finetune"
    saved: ClassVar[str] = "model"

    def add_start(self, parser: LightningArgumentParser) -> None:
        """The backbone."""
        parser.add_argument("--backbone", type=str, required=True, help="backbone to start from")
        parser.add_argument("--from_scratch", type=bool, default=False, help="start from fresh weights of its architecture")
        parser.add_argument("--probe", type=bool, default=True, help="score a linear probe on the frozen backbone first")
        parser.link_arguments("data", "model.init_args.classes", compute_fn=lambda data: data.classes, apply_on="instantiate")
        parser.link_arguments("data", "model.init_args.encoder", compute_fn=lambda _: self.encoder, apply_on="instantiate")

    def follow_links(self) -> None:
        """Name the backbone so that it is the same when `latest` has moved."""
        self.config.backbone = without_links(self.config.backbone)

    def before_instantiate_classes(self) -> None:
        """Open the backbone, at the size of the images; they have its own size where the recipe names none."""
        views, kind = self.config.data.views.init_args, known(self.config.data.views.class_path)
        assert isinstance(kind, type) and issubclass(kind, TaskViews)
        of_images = kind.modality == "image"
        with torch.random.fork_rng(devices=[]):  # the head draws what it draws in a run from another backbone
            size = {"img_size": views.size} if of_images and views.size is not None else {}
            self.encoder = load_backbone(self.config.backbone, **size)
            if self.config.from_scratch:
                self.encoder = untrained(self.encoder, seed=self.config.seed_everything)
        card = self.encoder.card
        if card.modality != kind.modality:
            others = "images, or --config finetune/clouds or finetune/sounds"
            accepted = f"backbones for {others if of_images else kind.modality}"
            raise ValueError(f"finetune: {self.config.backbone} is a backbone for {card.modality}; accepted: {accepted}")
        settings = {name: own if views[name] is None else views[name] for name, own in kind.settings_of(card).items()}
        if settings != kind.settings_of(card):
            self.encoder = kind.sized(self.encoder, settings)
        for name, value in settings.items():
            views[name] = value
        for source in (self.config.data.source, self.config.data.test):
            if source is None:
                continue
            if "channels" in source.init_args:
                source.init_args.channels = card.item_shape[0]
            if card.value_range and "value_range" in source.init_args and source.init_args.value_range is None:
                source.init_args.value_range = [list(pair) for pair in card.value_range]  # an empty one of the user's stays

    def instantiate_trainer(self, **kwargs: object) -> pl.Trainer:
        """A trainer that scores whole epochs only, on items that are divided between the processes already."""
        self.model.from_scratch = self.config.from_scratch
        return super().instantiate_trainer(num_sanity_val_steps=0, use_distributed_sampler=False, **kwargs)

    def _default_callbacks(self, given: Namespace, own: list[pl.Callback]) -> list[pl.Callback]:
        """Those of every run, without what is for pretraining only, and a line for every evaluation."""
        kept = [one for one in super()._default_callbacks(given, own) if not isinstance(one, KeepRefused | TrainingHealth)]
        return [SayScores(), *kept]

    def fit(self) -> Run:
        """Score the frozen backbone, train, save the model and write results.json."""
        self.frozen = self._probed()
        run = super().fit()
        if self.trainer.is_global_zero:
            final = self.model.found[self.model.headline]
            frozen = "" if self.frozen is None else f"; linear probe on the frozen backbone {self.frozen}"
            print(f"{self.model.headline} {final} on {final.n} items of {self.datamodule.test.name}{frozen}", flush=True)
        return run

    def _finished(self, seconds: float) -> Run:
        """Score what was trained, if the run has not ended with a whole epoch."""
        if self.model.found_at != self.trainer.global_step:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        return super()._finished(seconds)

    def _probed(self) -> Score | None:
        """The score of a linear probe on the frozen backbone; None where it was not asked for, or cannot be computed."""
        if not self.config.probe or not self.trainer.is_global_zero:
            return None
        probe, name = self.model.probe_for(self.datamodule.separator), self.model.headline
        sources = Sources(dict(zip(probe.needs, (self.datamodule.source, self.datamodule.test), strict=True)))
        result = probe.attempt(self.encoder, sources)
        found = result.scores.get(name)
        said = f"left out: {result.left_out[name]}" if found is None else f"{name} {found}"
        print(f"linear probe on the frozen backbone: {said}, on {self.datamodule.test.name}", flush=True)
        return found

    def _summary(self) -> str:
        data = self.datamodule
        start = "fresh weights of" if self.config.from_scratch else "start:"
        frozen = ", frozen" if self.model.freeze_backbone else ""
        return (
            f"{super()._summary()}\n{start} {self.config.backbone}{frozen}; {len(data.classes)} classes;"
            f" scored on {len(data.test)} items of {data.test.name}"
        )

    def save(self, backbone: Encoder, folder: Path, *, source: str) -> None:
        """Write the model."""
        card = replace(self.model.backbone().card, source=f"{source} from {self.config.backbone}")
        model = FineTuned.of(self.model, transform=self.datamodule.transform, scores=self._scores())
        FineTuned(model.branch, replace(model.card, encoder=card)).save(folder)

    def _scores(self) -> dict[str, dict[str, object]]:
        test = self.datamodule.test
        return {name: {**score._asdict(), "measured_on": test.name} for name, score in self.model.found.items()}

    def _results(self, seconds: float) -> dict[str, object]:
        return {
            "recipe": self.recipe,
            "task": self.model.task,
            "seed": self.config.seed_everything,
            "backbone": self.config.backbone,
            "from_scratch": self.config.from_scratch,
            "frozen_backbone": self.model.freeze_backbone,
            "linear_probe": None if self.frozen is None else self.frozen._asdict(),
            "scores": self._scores(),
            "classes": self.datamodule.classes,
            "data": self._parts(),
            "epochs": self.trainer.current_epoch,
            "steps": self.trainer.global_step,
            "refused_steps": self.model.step.num_refused,
            "seconds": seconds,
            "images_per_second": self.throughput.images_per_second,
            "resumed_from": self.config.ckpt_path or (None if self.resumed.checkpoint is None else str(self.resumed.checkpoint)),
            "encoder": self.model.encoder.card.to_json(),
            **machine_of(self.trainer),
        }

    def _parts(self) -> dict[str, object]:
        data = self.datamodule
        parts = {"train": data.source, "test": data.test, "development": data.development}
        return {name: self._part(source) for name, source in parts.items() if source is not None}

    @staticmethod
    def _part(source: Source) -> dict[str, object]:
        return {"name": source.name, "items": len(source), "fingerprint": source.fingerprint()}


class SayScores(pl.Callback):
    """A line for every evaluation."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the scores, in the first process."""
        if trainer.is_global_zero and isinstance(pl_module, FineTune):
            said = "  ".join(f"{name} {score}" for name, score in pl_module.said.items())
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {said}", flush=True)
