"""Which source reads a folder that somebody names without saying what is in it."""

from pathlib import Path

from glpretrain.data.sources.faces import holds_faces
from glpretrain.prepare.slides.folder import SETTINGS


def source_for(root: str | Path) -> str:
    """Name of the class in `glpretrain.data`.

    `TileFolder` for what `glpretrain tiles` wrote, `Faces` for what `glpretrain faces` wrote, `TarShards` for a .tar file or a folder
    with some at its top, else `ImageFolder`, which says what is wrong with anything else.
    """
    folder = Path(root).expanduser()
    if (folder / SETTINGS).is_file():
        return "TileFolder"
    if holds_faces(folder):
        return "Faces"
    return "TarShards" if folder.is_file() or any(folder.glob("*.tar")) else "ImageFolder"
