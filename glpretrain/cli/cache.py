"""`glpretrain cache`: what evaluations keep on disk, as a table, and room for something else.

How features are kept is left out (`glpretrain.evaluate.cache`).
"""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glpretrain.evaluate.cache import default_folder, entries, shrink


def cache(*, folder: Path | None = None, keep_gb: float | None = None, empty: bool = False) -> None:
    """Show the features that evaluations keep on disk, or remove them.

    Features that are removed are computed again when an evaluation needs them. Nothing else in the folder is touched.
      glpretrain cache                 one line per backbone: number of files, size, last use
      glpretrain cache --keep_gb 2     remove what was not used for longest, until less than 2 GB are left
      glpretrain cache --empty         remove all

    Args:
        folder: folder that `glpretrain evaluate --cache` was given; ~/.cache/glpretrain/features when left out
        keep_gb: number of gigabytes to keep
        empty: remove all features
    """
    root = folder or default_folder()
    if root.exists() and not root.is_dir():
        raise ValueError(f"cache: {root} is a file; accepted: a folder of features")
    if empty and keep_gb is not None:
        raise ValueError(f"cache: --empty and --keep_gb {keep_gb} given; accepted: one of them")
    if keep_gb is not None and not 0 < keep_gb < float("inf"):
        raise ValueError(f"cache: --keep_gb {keep_gb}; accepted: a positive number of gigabytes; --empty removes all")
    if empty or keep_gb is not None:
        num_files, num_bytes = shrink(root, to=0 if keep_gb is None else int(keep_gb * 1e9))
        print(f"{root}: {num_files} files removed, {_size(num_bytes)}")
    found = entries(root)
    total = sum(entry.num_bytes for entry in found)
    print(f"{root}: features of {len(found)} backbones, {sum(entry.num_files for entry in found)} files, {_size(total)}")
    if found:
        table = Table("backbone", "weights from")
        for column in ("files", "size", "last use"):
            table.add_column(column, justify="right", no_wrap=True)
        for entry in found:
            numbers = (str(entry.num_files), _size(entry.num_bytes), entry.last_use.strftime("%Y-%m-%d %H:%M"))
            table.add_row(escape(entry.name), escape(entry.source), *numbers)
        Console().print(table)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"
