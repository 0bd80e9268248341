"""What a user calls from Python: `fit`, `load_backbone`, `score`. Importing it imports nothing heavy; names load on first use."""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["Run", "fit", "load_backbone", "score"]

_HOMES = {
    "Run": "glpretrain.runs",
    "fit": "glpretrain.cli.pretraining",
    "load_backbone": "glpretrain.weights",
    "score": "glpretrain.cli.scoring",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'glpretrain' has no attribute {name!r}; it offers {__all__}")
    return vars(import_module(_HOMES[name]))[name]
