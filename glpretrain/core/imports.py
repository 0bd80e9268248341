"""Classes and functions by their import path. Settings name them, so that a package need not import what it only points to.

Left out: which paths a recipe may give (`cli.parsing`).
"""

from collections.abc import Callable
from importlib import import_module


def imported(path: str) -> Callable:
    """The class or function at an import path, such as `glpretrain.data.Scenes`.

    Raises:
        ImportError: there is no such module, or something that it needs is missing.
        KeyError: the module has no such name.
    """
    module, _, name = path.rpartition(".")
    return vars(import_module(module))[name]
