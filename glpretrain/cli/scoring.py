"""Scores of a backbone: which evaluators, on which sources, and the lines, table and pictures that come of it.

Left out: what a score is (`glpretrain.evaluate`), training and its numbers (`training`).
"""

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import import_module
from itertools import zip_longest
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from glpretrain import __version__
from glpretrain.cli.own_data import own_clouds
from glpretrain.core.types import EncoderCard
from glpretrain.data.module import DataModule
from glpretrain.data.sources.base import Source
from glpretrain.data.sources.images import mask_folders, source_for
from glpretrain.encoders import Encoder
from glpretrain.evaluate import ROLES, Evaluator, FeatureCache, Pixels, Result, default_evaluators
from glpretrain.runs import find_recipe
from glpretrain.weights import load_backbone

_DEFAULT_RECIPE = "mmc"


def score(
    backbone: str | Path | Encoder,
    *,
    config: str | Path | None = None,
    recipe: str | None = None,
    data: str | Path | None = None,
    masks: str | Path | None = None,
    videos: str | Path | None = None,
    overrides: dict[str, object] | None = None,
    out: Path | None = None,
    pictures: Path | None = None,
    cache: Path | None = None,
) -> list[dict[str, object]]:
    """Score a backbone with the evaluators of a configuration, or with those that every run is scored with.

    Args:
        backbone: an encoder, or whatever `load_backbone` takes.
        config: yaml with `sources` and `evaluators` (recipes/eval/); None for the default evaluators on a run's sources.
        recipe: without `config`: name or path of the recipe whose sources are used; when left out the config.yaml of the run that
            the backbone lies in, else the quick start.
        data: class folders, divided into train/ and val/ or not, or tiles or tar shards with classes; instead of the train and test
            sources.
        masks: images/ beside masks/, or such in train/ beside val/ (or test/); instead of the masked sources.
        videos: with `config`: a folder as `VideoFolder` takes it; instead of the videos.
        overrides: of `config`, values by dotted name, such as {"evaluators.knn.init_args.k": [5]}.
        out: JSON lines are appended to it, evaluator by evaluator, so that an interrupted evaluation loses none.
        pictures: folder for PNGs, `<evaluator>_<picture>.png`; None draws none.
        cache: folder where features outlive this call.

    Returns:
        One mapping per score: evaluator, score, value, ci, n, measured_on, fingerprint, protocol, chosen, backbone, card and more.

    Raises:
        ValueError: a folder, recipe or evaluator that is not what is accepted.
    """
    encoder = backbone if isinstance(backbone, Encoder) else load_backbone(backbone)
    if torch.cuda.is_available():
        encoder.cuda()
    if config is not None and recipe is not None:
        raise ValueError(f"evaluate: config {config} and recipe {recipe} both say where the items are; accepted: one of them")
    if config is None and videos is not None:
        raise ValueError(f"evaluate: videos {videos} need a config with an evaluator of videos; accepted: config eval/images, say")
    if config is None:
        path = find_recipe(recipe or _DEFAULT_RECIPE) if isinstance(backbone, Encoder) else _recipe_of(backbone, recipe)
        evaluators = _of_recipe(path, card=encoder.card, data=data, masks=masks)
    else:
        path = find_recipe(str(config))
        values = _overridden(yaml.safe_load(path.read_text()), overrides or {}, path)
        evaluators = _of_config(path, values, card=encoder.card, data=data, masks=masks, videos=videos)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    features = FeatureCache(encoder, folder=cache)
    common = {
        "backbone": encoder.card.source if isinstance(backbone, Encoder) else str(backbone),
        "recipe": str(path),
        "version": __version__,
        "parameters": sum(tensor.numel() for tensor in encoder.backbone_state().values()),
        "weights": features.fingerprint,
        "card": encoder.card.to_json(),
    }
    lines: list[dict[str, object]] = []
    results: dict[str, tuple[Evaluator, Result]] = {}
    refusals: list[str] = []
    for name, evaluator in evaluators.items():
        start = time.perf_counter()
        try:
            result = evaluator.run(encoder, cache=features)
        except ValueError as error:  # what this backbone or these items cannot do must not cost the other scores
            refusals.append(f"{name}: {error}")
            print(f"left out: {refusals[-1]}", file=sys.stderr, flush=True)
            continue
        results[name] = (evaluator, result)
        own = [
            {
                "evaluator": name,
                "score": score,
                **found._asdict(),
                "measured_on": evaluator.scored.name,
                "fingerprint": evaluator.scored.fingerprint(),
                "protocol": {"class": type(evaluator).__name__, **evaluator.protocol},
                "chosen": result.chosen,
                "time": datetime.now().isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - start, 3),
                **common,
            }
            for score, found in result.scores.items()
        ]
        if out is not None:
            with out.open("a") as file:
                file.writelines(json.dumps(line, default=str) + "\n" for line in own)
        if pictures is not None:
            for title, figure in evaluator.pictures(encoder, cache=features).items():
                figure.savefig(pictures / f"{name}_{title}.png", dpi=120)
        lines += own
    if not results:
        raise ValueError("evaluate: no score could be computed; " + "; ".join(refusals))
    Console().print(table(results))
    return lines


def values_by_name(arguments: Sequence[str]) -> dict[str, object]:
    """`--evaluators.knn.init_args.k [5]` and its like, or `--name=value`, as values by dotted name.

    Raises:
        ValueError: an argument is no dotted name with a value.
    """
    values: dict[str, object] = {}
    rest = [part for argument in arguments for part in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    for name, value in zip_longest(rest[::2], rest[1::2]):
        if not name.startswith(("--sources.", "--evaluators.")) or value is None:
            raise ValueError(
                f"{name}: accepted are --sources.NAME... and --evaluators.NAME... with a value (see glpretrain evaluate --help)"
            )
        values[name.removeprefix("--")] = yaml.safe_load(value)
    return values


def table(results: dict[str, tuple[Evaluator, Result]]) -> Table:
    """The headline scores with their intervals; the others are in the lines."""
    shown = Table(title="scores of the backbone, with 95 % intervals", title_justify="left")
    for column, justify in (("evaluator", "left"), ("score", "left"), ("value", "right"), ("n", "right"), ("measured on", "left")):
        shown.add_column(column, justify=justify)
    for name, (evaluator, result) in results.items():
        for score in evaluator.headlines:
            found = result.scores[score]
            shown.add_row(name, score, f"{found.value:.1f} +- {found.ci:.1f}", str(found.n), evaluator.scored.name)
    return shown


def _recipe_of(backbone: str | Path, recipe: str | None) -> Path:
    of_run = Path(backbone).resolve().parent / "config.yaml"
    return of_run if recipe is None and of_run.is_file() else find_recipe(recipe or _DEFAULT_RECIPE)


def _folder(root: str | Path, kind: str, *, card: EncoderCard) -> dict:
    """A source of the user's own items: images of some kind, or clouds, which lie in a folder or in one file of arrays."""
    if card.modality == "points":
        return own_clouds(root)
    return {"class_path": f"glpretrain.data.{kind}", "init_args": {"root": str(root), "channels": card.item_shape[0]}}


def _of_recipe(path: Path, *, card: EncoderCard, data: str | Path | None, masks: str | Path | None) -> dict[str, Evaluator]:
    """The default evaluators on a training recipe's data, with folders in place of its sources as `pretrain` puts them."""
    values = yaml.safe_load(path.read_text())["data"]
    if data is not None:
        values |= {"source": _folder(data, source_for(data), card=card), "labelled": None, "labelled_test": None}
    if masks is not None:
        values["masked"] = _folder(masks, "MaskedFolder", card=card)
    module = _instantiated(DataModule, values)
    if data is not None:
        _require_classes(module.source, data)
    return default_evaluators(module.labelled_sources(), module.masked_source())


def _overridden(values: object, overrides: dict[str, object], path: Path) -> dict:
    """The values with some of them replaced.

    Raises:
        ValueError: `values` is no configuration, or a name leads nowhere.
    """
    if not isinstance(values, dict) or set(values) != {"sources", "evaluators"}:
        raise ValueError(f"{path}: accepted are `sources` and `evaluators`, found {sorted(values) if isinstance(values, dict) else values}")
    for name, value in overrides.items():
        *parents, last = name.split(".")
        place = values
        for part in parents:
            accepted = sorted(place)
            # An evaluator that takes its defaults has no init_args yet.
            place = place.setdefault(part, {}) if part == "init_args" else place.get(part)
            if not isinstance(place, dict):
                raise ValueError(f"{path}: there is no {name}; accepted in place of {part!r}: {accepted}")
        place[last] = value
    return values


def _of_config(
    path: Path, values: dict, *, card: EncoderCard, data: str | Path | None, masks: str | Path | None, videos: str | Path | None
) -> dict[str, Evaluator]:
    """The evaluators of a configuration; a constructor parameter that is named as a role gets that source.

    Raises:
        ValueError: a name is unknown, or an evaluator needs a source that is not there.
    """
    entries = values["sources"]
    if unknown := set(entries) - set(ROLES):
        raise ValueError(f"{path}: sources {sorted(unknown)}; accepted: {', '.join(ROLES)}")
    if masks is not None:
        entries = {role: entry for role, entry in entries.items() if role not in ("masked_train", "masked")}
        entries |= {role: _masked(values["sources"].get(role), root, card) for role, root in _mask_folders(masks, card).items()}
    # Made once and shared, so that items are decoded once however many evaluators look at them.
    sources: dict[str, object] = {role: _named(entry, f"{path}: sources.{role}") for role, entry in entries.items()}
    if data is not None:
        folder = _named(_folder(data, source_for(data), card=card), "--data")
        _require_classes(folder, data)
        sources["train"], sources["test"] = DataModule.divided(folder)
    if videos is not None:
        sources["videos"] = _named(_folder(videos, "VideoFolder", card=card), "--videos")
    sources = {role: Pixels(source) if isinstance(source, Source) else source for role, source in sources.items()}
    evaluators: dict[str, Evaluator] = {}
    for name, entry in values["evaluators"].items():
        try:
            evaluators[name] = _named(entry, f"{path}: evaluators.{name}", **sources)
        except SourceError as error:
            given = list(dict.fromkeys(str(root) for root in (data, masks, videos) if root is not None))
            if not given:  # the configuration's own sources do not fit: its author's mistake
                raise
            print(f"left out: {error} (sources from {', '.join(given)})", file=sys.stderr, flush=True)
    return evaluators


class SourceError(ValueError):
    """A source that an evaluator needs is not there, or is not what it needs."""


def _masked(entry: dict | None, root: Path, card: EncoderCard) -> dict:
    """The folder in place of a source; what the configuration says of its own folder's masks (names, ignored value) stays."""
    if entry is not None and str(entry.get("class_path")).endswith(".MaskedFolder"):
        return {**entry, "init_args": {**entry.get("init_args", {}), "root": str(root)}}
    return _folder(root, "MaskedFolder", card=card)


def _mask_folders(root: str | Path, card: EncoderCard) -> dict[str, Path]:
    """Where the masks of each role are; clouds bring theirs in one file."""
    return {"masked": Path(root)} if card.modality == "points" else mask_folders(root)


def _require_classes(source: Source, folder: str | Path) -> None:
    if not source.classes:
        raise ValueError(f"evaluate: {folder} has no classes; accepted: <class>/ folders, in train/ beside val/ (or test/) or undivided")


def _named(entry: dict, where: str, **given: object) -> object:
    """What `class_path` and `init_args` describe; of `given`, what its constructor has a parameter for."""
    if not isinstance(entry, dict) or not set(entry) <= {"class_path", "init_args"} or "class_path" not in entry:
        raise ValueError(f"{where}: class_path and init_args expected, found {entry}")
    module, _, name = str(entry["class_path"]).rpartition(".")
    try:
        owner = vars(import_module(module))[name]
    except (ImportError, ValueError, KeyError) as error:
        raise ValueError(f"{where}: there is no class {entry['class_path']}") from error
    parameters = inspect.signature(owner).parameters
    roles = {role: value for role, value in given.items() if role in parameters}
    if missing := {role for role in ROLES if role in parameters and parameters[role].default is inspect.Parameter.empty} - set(roles):
        raise SourceError(f"{where}: {name} needs the sources {sorted(missing)}; given: {sorted(given)}")
    try:
        return _instantiated(owner, entry.get("init_args") or {}, **roles)
    except argparse.ArgumentError as error:
        accepted = [parameter for parameter in inspect.signature(owner).parameters if parameter not in ROLES]
        raise ValueError(f"{where}: {error}\n(accepted: {', '.join(accepted)})") from error
    except ValueError as error:
        raise (SourceError if roles else ValueError)(f"{where}: {error}") from error


def _instantiated(owner: Callable[..., object], values: dict, **given: object) -> object:
    """`owner` from yaml values, checked against its annotations."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(owner, "made", skip=set(given), instantiate=not given)
    made = parser.instantiate(parser.parse_object({"made": values} if values else {})).made
    return owner(**given, **vars(made)) if given else made
