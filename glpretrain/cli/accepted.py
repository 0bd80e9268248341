"""What would have been accepted where a recipe has a name that nothing reads: the parser names the wrong one only."""

import inspect
import re
from collections.abc import Callable
from importlib import import_module

import pytorch_lightning as pl

from glpretrain.data.module import DataModule
from glpretrain.methods.base import Method

_UNKNOWN = re.compile(r"class_path '([\w.]+)':\s+Option '[\w.]+' is not accepted")
_UNKNOWN_CLASS = re.compile(r"class_path '([\w.]+)\.\w+':\s+module '[\w.]+' has no attribute")
_GROUPS = {"data": DataModule, "trainer": pl.Trainer}


def accepted_names(message: str) -> str:
    """`(accepted: ...)` for the parser's complaint about an unknown name, empty for any other."""
    if unknown := _UNKNOWN.findall(message):
        module, _, name = unknown[-1].rpartition(".")
        return _listed(parameter_names(vars(import_module(module))[name]))
    if unknown := _UNKNOWN_CLASS.findall(message):
        return _listed(sorted(vars(import_module(unknown[-1]))["__all__"]))
    if group := re.search(r"(?:Group '|arguments: --)(data|trainer)\b", message):
        return _listed(parameter_names(_GROUPS[group[1]]))
    return ""


def _listed(names: list[str]) -> str:
    return f"(accepted: {', '.join(names)})"


def parameter_names(owner: Callable[..., object]) -> list[str]:
    """What a class, or a function that makes one, can be given in a recipe; a method's are joined by those it forwards to `Method`."""
    names: list[str] = []
    for one in (owner, Method) if isinstance(owner, type) and issubclass(owner, Method) else (owner,):
        for name, parameter in inspect.signature(one).parameters.items():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name not in (*names, "student"):
                names.append(name)
    return names
