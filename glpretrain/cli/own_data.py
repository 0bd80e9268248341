"""The user's own items in place of a recipe's: which source reads them, by what the recipe is about.

Left out: the sources (`glpretrain.data`).
"""

from pathlib import Path

import glpretrain.data.views


def own_clouds(path: str | Path) -> dict:
    """A source of clouds: of one file of arrays, or of a folder."""
    kind, argument = ("PointArrays", "path") if Path(path).is_file() else ("PointFolder", "root")
    return {"class_path": f"glpretrain.data.{kind}", "init_args": {argument: str(path)}}


def own_images(root: str | Path, kind: str) -> dict:
    """A source of images in a folder."""
    return {"class_path": f"glpretrain.data.{kind}", "init_args": {"root": str(root)}}


def own_source(recipe: dict, path: str | Path, *, kind: str) -> dict:
    """What reads `path` for a recipe.

    Args:
        recipe: as it stands in its file.
        path: a folder, or a file of clouds.
        kind: of source where the recipe is about images.
    """
    views = vars(glpretrain.data.views).get(str(recipe["data"]["views"].get("class_path")).rpartition(".")[2])
    return own_clouds(path) if views is not None and views.modality == "points" else own_images(path, kind)


def source_arguments(name: str, source: dict) -> list[str]:
    """The source as arguments of the command line, under this name."""
    arguments = [f"--{name}", source["class_path"]]
    for key, value in source["init_args"].items():
        arguments += [f"--{name}.init_args.{key}", value]
    return arguments
