"""`glpretrain pretrain` and `glpretrain.fit`: a recipe by name, with the user's own items, as the arguments of a training.

The training itself is left out (`training`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from glpretrain import modalities
from glpretrain.cli.parsing import parse
from glpretrain.cli.seeds import seeds_of, train_seeds
from glpretrain.cli.training import train
from glpretrain.cli.trust import Parser, known, read_part, take_imports
from glpretrain.data.own import source_for, source_spec
from glpretrain.data.views import ViewMaker
from glpretrain.runs import Run, find_recipe, recipe_name


def pretrain(
    recipe: str,
    *,
    data: str | None = None,
    masks: str | None = None,
    init_from: str | None = None,
    seeds: str | None = None,
    resume: Literal["auto", "never", "force"] = "auto",
    overrides: Sequence[str] = (),
) -> Run | int:
    """Train a recipe by name, evaluate before and after, export.

    Everything lands in runs/<recipe>/<time>/; runs/<recipe>/latest points at it. Any other argument overrides the recipe, as in
      glpretrain pretrain mmc --trainer.max_steps 100 --model.init_args.optimization.lr.base 1e-3
    `glpretrain fit --help` lists what there is.
    With --seeds every seed is a run of its own, one after the other, and their table follows. A signal ends the run at hand with a
    checkpoint; the same command goes on with it, and seeds that have finished are not trained again. After a failure of one seed the next
    one starts, and the exit status is 1.

    Args:
        recipe: a name below recipes/ (mmc, paper/...) or the path of a yaml file
        data: folder of images, of faces with region maps, of tiles or of clouds, tar shards, or a file of clouds, instead of the
            recipe's source
        masks: score segmentation on this folder, images/ beside masks/ or one of Pascal VOC, ADE20K or COCO-Stuff (`MaskedFolder`), or on
            this file of clouds with parts
        init_from: go on from this backbone instead of random weights; '{path: BACKBONE, encoder: true}' takes its encoder in place of the
            recipe's, and '{path: CHECKPOINT, heads: true}' the heads of a run
        seeds: train once per seed, as in 0,1,2
        resume: go on with the newest run of the recipe where it was interrupted and has the same settings and items; never; or force,
            although they differ
        overrides: further arguments of `glpretrain fit`
    """
    given, own = list(overrides), take_imports(overrides)
    arguments = [*training_arguments(recipe, data=data, masks=masks, init_from=init_from), "--resume", resume]
    if seeds is not None:
        return train_seeds(seeds_of(seeds), [*arguments, *given])  # with the modules to import, for other processes
    return train([*arguments, *own])


def training_arguments(recipe: str, *, data: str | None = None, masks: str | None = None, init_from: str | None = None) -> list[str]:
    """The arguments of `glpretrain fit` for a recipe by name, on the user's own items.

    Args:
        recipe: see `pretrain`, and so are the others.
        data: folder, tar shards or file.
        masks: folder or file.
        init_from: backbone.

    Raises:
        ValueError: there is no such recipe, it trains nothing, or nothing reads what was given.
    """
    path = find_recipe(recipe)
    if (name := recipe_name(path)).startswith("eval/"):
        raise ValueError(f"{name} says how a backbone is scored, not trained; use it as in: glpretrain evaluate BACKBONE --config {name}")
    if name.startswith("finetune/"):
        raise ValueError(f"{name} says how a backbone is fine-tuned; use it as in: glpretrain finetune BACKBONE --config {name}")
    arguments = ["--config", str(path)]
    if data is not None:
        arguments += source_spec(data, source_for(data, views_of(path).modality)).arguments("data.source")
        arguments += ["--data.labelled_test", "null", "--data.labelled", "null"]  # scores on the same folder where it has classes
    if masks is not None:
        arguments += source_spec(masks, modalities.get(views_of(path).modality).masked_source).arguments("data.masked")
    if init_from is not None:
        arguments += ["--init_from", init_from]
    return arguments


def views_of(recipe: Path) -> type[ViewMaker]:
    """The class of a recipe's views, which know what kind of items they are made of."""
    parser = Parser(exit_on_error=False)
    parser.add_argument("--views", type=ViewMaker, required=True)
    given = {"views": read_part(recipe, "data", "views")}
    views = known(parse(parser, [], values=given).views.class_path)
    assert isinstance(views, type) and issubclass(views, ViewMaker)
    return views


def fit(
    recipe: str,
    *,
    data: str | Path | None = None,
    masks: str | Path | None = None,
    init_from: str | Path | None = None,
    max_steps: int | None = None,
    seed: int | None = None,
    resume: Literal["auto", "never", "force"] = "never",
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
        resume: go on with the newest run of the recipe where it was interrupted: see `glpretrain pretrain --help`.
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
    own = take_imports([*arguments, *overrides])
    return train([*training_arguments(recipe, **paths), "--resume", resume, *own])
