"""Recipes by name, the folder of a run, and the run as Python sees it afterwards.

Training is left out. Nothing here needs Lightning, so results can be read where it is not installed.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glpretrain.core.files import point

if TYPE_CHECKING:
    from glpretrain.encoders.base import Encoder  # not before a backbone is asked for: `--help` lists recipes at once

_OURS = Path(__file__).parent / "recipes"  # a link in a checkout, files where a wheel was installed
RESULTS, CONFIG = "results.json", "config.yaml"  # files of a run folder
ITEMS = "items.json"  # in it: which items a run trains on
FAILED = "failed.txt"  # in it: why a run ended with an error; not there after a signal
BACKBONE, START = "backbone", "start"  # folders in it: what was trained, and what it started from
# What may differ between two starts of one run: where it is written, what is shown, and how items reach the device.
_FREE = (
    *("config", "ckpt_path", "resume", "runs", "report", "trainer.logger", "trainer.enable_progress_bar", "trainer.log_every_n_steps"),
    *("trainer.enable_model_summary", "trainer.profiler", "data.num_workers", "data.cache", "data.max_unreadable"),
)


def recipe_roots() -> list[Path]:
    """Folders that hold recipes, nearest first: that of the current directory, and that of this package."""
    roots = [Path.cwd() / "recipes", _OURS]
    return list(dict.fromkeys(root.resolve() for root in roots if root.is_dir()))


def recipe_names() -> list[str]:
    """What `find_recipe` accepts besides paths."""
    found = {path.relative_to(root).with_suffix("").as_posix() for root in recipe_roots() for path in root.rglob("*.yaml")}
    return sorted(found, key=lambda name: (name.count("/"), name))


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: `mmc` for recipes/mmc.yaml, `paper/mmc_vits16_in1k` for one in a subfolder, or a path.

    Raises:
        ValueError: there is none; lists those there are.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    for root in recipe_roots():
        if (root / f"{name}.yaml").is_file():
            return root / f"{name}.yaml"
    raise ValueError(f"recipe: there is no {name!r}; accepted: a path of a yaml file, or one of {', '.join(recipe_names())}")


def recipe_name(path: Path) -> str:
    """Name of a recipe file: what `find_recipe` accepts where it lies among recipes; the run's recipe for a run's config.yaml."""
    path = path.resolve()
    for root in recipe_roots():
        if path.is_relative_to(root):
            return path.relative_to(root).with_suffix("").as_posix()
    return path.parents[1].name if path.name == "config.yaml" else path.stem


def new_folder(recipe: str, *, runs: Path) -> Path:
    """Make `runs/<recipe>/<time>/`.

    A second run in the same second gets a number behind its time; no folder is ever used twice.
    """
    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    count = 1
    while True:
        folder = runs / recipe / (time if count == 1 else f"{time}-{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():  # `runs` itself is a file
                raise
            count += 1
            continue
        return folder


def point_latest(folder: Path) -> None:
    """Point `runs/<recipe>/latest` at the folder of a run."""
    point(folder.parent / "latest", folder.name)


def discard(folder: Path, *, runs: Path) -> None:
    """Remove the folder of a run that has nothing to show, and those above it, down from `runs`, that are empty then."""
    shutil.rmtree(folder)
    for parent in folder.parents:
        try:
            parent.rmdir()
        except OSError:  # it holds other runs
            return
        if parent == runs:
            return


def without_links(path: str) -> str:
    """The path with every link in it followed, so that it means the same when `latest` has moved; relative if it was given so."""
    given = Path(os.path.expanduser(path))
    if not given.exists():
        return path
    return str(given.resolve()) if given.is_absolute() else os.path.relpath(given.resolve())


def require_outside(name: str, out: Path, *, given: Iterable[str | Path]) -> None:
    """Refuse to write where items are read from: what is written would be read as items the next time.

    Args:
        name: argument that says where is written, in messages.
        out: folder that is written to.
        given: files and folders that are read.

    Raises:
        ValueError: it lies in one of them.
    """
    for folder in given:
        if Path(folder).is_dir() and out.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"{name}: {out} lies in {folder}, and would be read as items of it the next time; give a folder outside of it")


def run_folders(folder: Path) -> list[Path]:
    """The run folders at a path and below it, finished or not, the oldest first. Links such as `latest` are not followed below it."""
    found: list[Path] = []
    for path, below, files in os.walk(folder):
        if CONFIG in files or RESULTS in files:
            found.append(Path(path))
            below.clear()
    return sorted(found, key=lambda path: (path.name, path))


def settings_that_count(values: Mapping[str, object]) -> dict[str, object]:
    """The settings of a configuration by their dotted names, without those that change where and how a run is done, not what is learned."""
    return {name: value for name, value in _flat(values, "") if not any(name == free or name.startswith(f"{free}.") for free in _FREE)}


def _flat(values: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list) and values:
        for place, value in enumerate(values):
            yield from _flat(value, f"{name}[{place}]")
    else:
        yield name, values


def calibrated_threshold(run: Path, *, when: Literal["before", "after"]) -> float | None:
    """The threshold of prompt segmentation that the evaluation of a run chose on pictures with masks.

    Args:
        run: folder of the run.
        when: whether it is that of what the run started from, or of what was trained.

    Returns:
        A cosine; None where the run has no results, or none of prompt segmentation.
    """
    try:
        found = json.loads((run / RESULTS).read_text())[when]["prompt_threshold"]
    except (OSError, ValueError, KeyError, TypeError):  # a page can be made without it
        return None
    return float(found) if isinstance(found, int | float) else None


class Run:
    """A finished run.

    Args:
        folder: where it lies.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @cached_property
    def results(self) -> dict:
        """What results.json holds: `before`, `after`, `seconds`, `images_per_second` and the rest."""
        return json.loads((self.folder / RESULTS).read_text())

    @cached_property
    def backbone(self) -> "Encoder":
        """The exported encoder."""
        from glpretrain.weights import load_backbone

        return load_backbone(self.folder / BACKBONE)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"
