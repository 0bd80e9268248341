"""What `glpretrain evaluate` scores on: the sources of a run, of a recipe or of a configuration, or the user's own.

How scores are computed and shown is left out (`scoring`).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jsonargparse import Namespace

from glpretrain import modalities
from glpretrain.callbacks.evaluators import sources_of
from glpretrain.cli.parsing import meant, parse
from glpretrain.cli.trust import Parser, read_part, read_yaml
from glpretrain.core.imports import imported
from glpretrain.core.listing import expanded
from glpretrain.core.types import EncoderCard
from glpretrain.data.module import DataModule
from glpretrain.data.own import SourceSpec, source_for, source_spec, train_test_parts
from glpretrain.data.sources.base import Source
from glpretrain.data.sources.images.layouts import Split, names_its_classes
from glpretrain.data.sources.images.masked import mask_roles
from glpretrain.data.sources.images.videos import VideoSource
from glpretrain.evaluate import ROLES, Evaluator, Sources, default_evaluators, unlabelled_evaluators, unlabelled_sources
from glpretrain.runs import find_recipe

DEFAULT_RECIPE = "mmc"
BESIDE = "config.yaml"  # of the run that a backbone lies in
_OF_SOURCES = ("source", "labelled", "labelled_test", "masked", "views", "batch_size")  # what is built of a run's data


class Own(NamedTuple):
    """The user's own items, in place of a configuration's."""

    data: str | Path | None
    masks: str | Path | None
    videos: str | Path | None

    @property
    def paths(self) -> list[str]:
        """Where they are, each once."""
        return list(dict.fromkeys(str(path) for path in self if path is not None))


def recipe_of(backbone: str | Path, recipe: str | None) -> Path:
    """The recipe whose sources a backbone is scored on: the one named, that of the run it lies in, or that of the quick start."""
    of_run = Path(backbone).resolve().parent / BESIDE
    return of_run if recipe is None and of_run.is_file() else find_recipe(recipe or DEFAULT_RECIPE)


def _own_data(path: str | Path, card: EncoderCard) -> SourceSpec:
    return source_spec(path, source_for(path, card.modality), channels=card.item_shape[0], value_range=card.value_range)


def _require_nearby(values: dict[str, object], path: Path, own: Own) -> None:
    """What lies beside a downloaded backbone does not choose which files of this machine are read; runs/ holds the user's own."""
    here = Path.cwd()
    replaced = ("source", "labelled", "labelled_test") if own.data is not None else ()
    for name in set(values) - {*replaced, *(("masked",) if own.masks is not None else ())}:
        source = values[name]
        arguments = source.get("init_args") if isinstance(source, dict) else None
        for given in (arguments[key] for key in ("root", "path") if key in arguments) if isinstance(arguments, dict) else ():
            place = expanded(str(given))
            if not (path.is_relative_to(here / "runs") or (place.exists() and place.resolve().is_relative_to(here))):
                option = "--masks" if name == "masked" else "--data"
                raise ValueError(
                    f"evaluate: {path}, found beside the backbone, names {given} as data.{name}; give --recipe {path} if the file is"
                    f" yours, or {option} FOLDER"
                )


def sources_of_recipe(path: Path, *, card: EncoderCard, own: Own, beside: bool) -> Sources:
    """A training recipe's sources, with the user's folders in place of its own as `pretrain` puts them.

    Args:
        path: the recipe.
        card: card of the backbone.
        own: the user's folders.
        beside: whether the file was found beside the backbone, and not named by the user.
    """
    values = {name: value for name, value in read_part(path, "data").items() if name in _OF_SOURCES}
    if beside:
        _require_nearby(values, path, own)
    if own.data is not None:
        values |= {"source": _own_data(own.data, card)._asdict(), "labelled": None, "labelled_test": None}
    if own.masks is not None:
        values["masked"] = _masked(None, own.masks, card)
    parser = Parser(exit_on_error=False)
    parser.add_class_arguments(DataModule, "data")
    module: DataModule = parser.instantiate(parse(parser, [], values={"data": values})).data
    if own.data is not None and not module.source.classes:
        masked = sources_of(module, ("masked",)) if own.masks is not None else Sources({})
        return unlabelled_sources(module.source, reason=_no_classes(own.data)) | masked
    return sources_of(module, ("train", "test", "masked"))


def default_parts(path: Path, *, card: EncoderCard, own: Own, beside: bool) -> tuple[dict[str, Evaluator], Sources]:
    """The evaluators that every run is scored with, and their sources. Items without classes are scored with what needs none; a line says
    what is left out, and why. Arguments as of `sources_of_recipe`.

    Raises:
        ValueError: the user's items have no classes, and nothing scores items of their kind without.
    """
    sources, evaluators = sources_of_recipe(path, card=card, own=own, beside=beside), default_evaluators(card.modality)
    if own.data is None or "train" in sources:
        return evaluators, sources
    if not (unlabelled := unlabelled_evaluators(card.modality)):
        raise ValueError(f"evaluate: {_no_classes(own.data)}")
    kept = {name: evaluator for name, evaluator in evaluators.items() if _can_score(name, evaluator, sources, path, own)}
    return {**unlabelled, **kept}, sources


def parts_of_config(path: Path, overrides: Sequence[str], *, card: EncoderCard, own: Own) -> tuple[dict[str, Evaluator], Sources]:
    """The evaluators of a configuration and its sources, with the user's folders in place of its own.

    Raises:
        ValueError: a name is unknown, a value is not accepted, or an evaluator needs a source that is not there.
    """
    values = read_yaml(path)
    groups = {name: dict(entries) for name, entries in values.items() if isinstance(entries, dict)}
    if set(values) != {"sources", "evaluators"} or len(groups) < 2:
        raise ValueError(f"{path}: accepted are `sources` and `evaluators`, each with entries by name; found {sorted(values)}")
    if own.masks is not None:
        folder = expanded(own.masks)
        splits = mask_roles(folder) if folder.is_dir() else {"masked": None}
        kept = {role: entry for role, entry in groups["sources"].items() if role not in ("masked_train", "masked")}
        groups["sources"] = kept | {
            role: _masked(groups["sources"].get(role), own.masks, card, split=split) for role, split in splits.items()
        }
    if own.videos is not None:
        groups["sources"]["videos"] = source_spec(own.videos, "glpretrain.data.VideoFolder", channels=card.item_shape[0])._asdict()
    if own.data is not None:
        groups["sources"] = {role: entry for role, entry in groups["sources"].items() if role not in ("train", "test")}
    parser = Parser(exit_on_error=False)
    for role in groups["sources"]:
        parser.add_argument(f"--sources.{role}", type=VideoSource if role == "videos" else Source, required=True)
    for name in groups["evaluators"]:
        parser.add_argument(f"--evaluators.{name}", type=Evaluator, required=True)
    made = parser.instantiate(parse(parser, overrides, values=groups))
    evaluators: dict[str, Evaluator] = vars(made.get("evaluators", Namespace()))
    given: dict[str, Source | VideoSource] = vars(made.get("sources", Namespace()))
    missing: dict[str, str] = {}
    if own.data is not None:
        spec = _own_data(own.data, card)
        folder = imported(spec.class_path)(**spec.init_args)
        if folder.classes:
            given["train"], given["test"] = train_test_parts(folder)
        else:  # what needs no labels scores all of them
            given["test"], missing = folder, {"train": _no_classes(own.data)}
    accepted = dict.fromkeys((*ROLES, *(role for evaluator in evaluators.values() for role in evaluator.roles)))
    if unknown := next((role for role in given if role not in accepted), None):
        raise ValueError(f"{path}: sources.{unknown}: no evaluator reads it{meant(unknown, accepted)}")
    sources = Sources(given, missing=missing)  # decoded once, however many evaluators look at them
    return {name: evaluator for name, evaluator in evaluators.items() if _can_score(name, evaluator, sources, path, own)}, sources


def _can_score(name: str, evaluator: Evaluator, sources: Sources, path: Path, own: Own) -> bool:
    try:
        evaluator.check(sources)
    except ValueError as error:
        if not own.paths:  # the configuration's own sources do not fit: its author's mistake
            raise ValueError(f"{path}: evaluators.{name}: {error}") from error
        print(f"left out: {name}: {error} (sources from {', '.join(own.paths)})", file=sys.stderr, flush=True)
        return False
    return True


def _masked(entry: object, path: str | Path, card: EncoderCard, *, split: Split | None = None) -> dict[str, object]:
    """The user's masks in place of a source. What the configuration says of its own masks (names, ignored value) stays, unless the folder
    says it of its own."""
    options = {"channels": card.item_shape[0], "split": split, "value_range": card.value_range}
    spec = source_spec(path, modalities.get(card.modality).masked_source, **options)
    kept = entry.get("init_args", {}) if isinstance(entry, dict) and entry.get("class_path") == spec.class_path else {}
    if (folder := expanded(path)).is_dir() and names_its_classes(folder):
        kept = {}
    return {"class_path": spec.class_path, "init_args": {**kept, **spec.init_args}}


def _no_classes(folder: str | Path) -> str:
    return f"{folder} has no classes; accepted: <class>/ folders, in train/ beside val/ (or test/) or not split"
