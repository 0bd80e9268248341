"""The costs of a recipe at several values of one number: local views, items of a batch, prototypes, or files.

Left out: how one value is measured (`benched`).
"""

import json
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Literal

from glpretrain.bench.summary import Costs
from glpretrain.cli.benched import measured_costs
from glpretrain.cli.planned import Unbuilt

Number = Literal["locals", "batch", "prototypes", "files"]
_FACTORS: dict[str, tuple[float, ...]] = {"locals": (0.0, 0.5, 1.0, 2.0), "batch": (0.25, 0.5, 1.0, 2.0), "prototypes": (0.25, 1.0, 4.0)}
_FILES = (10_000, 100_000, 1_000_000, 10_000_000)
_SIMULATED, _PICTURES = "glpretrain.data.sources.images.simulated.SimulatedFiles", "MultiCrop"  # the latter cuts views of pictures


def scaled_costs(arguments: Sequence[str], *, number: Number, steps: int) -> dict[str, Costs]:
    """What the steps cost, by the value of the number.

    Args:
        arguments: of `glpretrain fit`.
        number: what is changed.
        steps: number of steps that are measured for every value.

    Raises:
        ValueError: the recipe has no such number, or another setting is wrong.
    """
    run = Unbuilt(arguments)
    data, model = run.part("data"), run.part("model")
    if number == "files":
        return _costs_of_files(arguments, data, steps=steps)
    found: dict[str, Costs] = {}
    for factor in _FACTORS[number]:
        value, override = _scaled(data, model, number=number, factor=factor)
        if value not in found:
            found[value] = measured_costs([*arguments, *override], steps=steps)
    return found


def _scaled(data: dict, model: dict, *, number: Number, factor: float) -> tuple[str, list[str]]:
    """A value in words, and the arguments that set it."""
    if number == "batch":
        count = max(1, round(factor * data["batch_size"]))
        return f"{count} items", ["--data.batch_size", str(count)]
    if number == "prototypes":
        if "num_prototypes" not in model["init_args"]:
            raise ValueError(f"bench: --scaling prototypes: {model['class_path']} has none; accepted: batch, files, locals")
        count = max(1, round(factor * model["init_args"]["num_prototypes"]))
        return f"{count} prototypes", ["--model.init_args.num_prototypes", str(count)]
    views = data["views"]["init_args"].get("local_views") or []
    if not views:
        raise ValueError("bench: --scaling locals: the recipe has no local views; accepted: batch, files, prototypes")
    scaled = [{**view, "count": round(factor * view.get("count", 1))} for view in views]
    kept = [view for view in scaled if view["count"] > 0]
    value = f"{sum(view['count'] for view in kept)} local views"
    return value, ["--data.views.init_args.local_views", json.dumps(kept)]


def _costs_of_files(arguments: Sequence[str], data: dict, *, steps: int) -> dict[str, Costs]:
    """What the steps cost with listings of files that do not exist. Nothing is kept in memory, as little of so many could be."""
    if not data["views"]["class_path"].endswith(_PICTURES):
        raise ValueError(f"bench: --scaling files: {data['views']['class_path']} makes views of no pictures; accepted: batch")
    found: dict[str, Costs] = {}
    with TemporaryDirectory(prefix="glpretrain-bench-") as folder:
        for count in _FILES:
            source = {"class_path": _SIMULATED, "init_args": {"count": count, "folder": folder}}
            override = ["--data.source", json.dumps(source), "--data.cache", "false"]
            found[f"{count:,} files"] = measured_costs([*arguments, *override], steps=steps)
    return found
