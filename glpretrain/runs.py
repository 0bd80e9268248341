"""Recipes by name, the folder of a run, and the run as Python sees it afterwards.

Training is left out. Nothing here needs Lightning, so results can be read where it is not installed.
"""

import json
import sysconfig
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glpretrain.encoders.base import Encoder  # not before a backbone is asked for: `--help` lists recipes at once

_CHECKOUT = Path(__file__).parents[1] / "recipes"
_INSTALLED = Path(sysconfig.get_path("data")) / "share" / "glpretrain" / "recipes"


def recipe_roots() -> list[Path]:
    """Folders that hold recipes, nearest first: that of the current directory, of the checkout, of an installed wheel."""
    roots = [Path.cwd() / "recipes", _CHECKOUT, _INSTALLED]
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
    path = Path(name).expanduser()
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
    """Make `runs/<recipe>/<time>/` and point `runs/<recipe>/latest` at it.

    A second run in the same second gets a number behind its time; no folder is ever used twice.
    """
    parent = runs / recipe
    parent.mkdir(parents=True, exist_ok=True)
    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    count = 1
    while True:
        folder = parent / (time if count == 1 else f"{time}-{count}")
        try:
            folder.mkdir()
        except FileExistsError:
            count += 1
            continue
        break
    # Made beside and moved over: a reader sees the old or the new target, and two runs that start together do not collide.
    link = parent / f".latest-{folder.name}"
    link.symlink_to(folder.name, target_is_directory=True)
    link.replace(parent / "latest")
    return folder


def write_json(path: Path, values: dict[str, object]) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


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
        return json.loads((self.folder / "results.json").read_text())

    @cached_property
    def backbone(self) -> "Encoder":
        """The exported encoder."""
        from glpretrain.weights import load_backbone

        return load_backbone(self.folder / "backbone")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"
