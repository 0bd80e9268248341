"""`glpretrain pretrain RECIPE --help`: what a recipe sets, with its values, the common arguments first.

The list of recipes (`recipe_list`) and all arguments of a run (`glpretrain fit --help`) are left out.
"""

import shutil
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import pytorch_lightning as pl
import yaml

from glpretrain.cli.parsing import described_arguments, verb_parser
from glpretrain.cli.recipe_list import header_of
from glpretrain.cli.trust import PACKAGES, known, read_yaml
from glpretrain.core.imports import imported
from glpretrain.data.module import DataModule
from glpretrain.runs import find_recipe, recipe_name

# What is changed most, by the end of its name; shown first, with the values of the recipe.
_COMMON = {
    "seed_everything": "seed of weights, order, views and masks",
    "trainer.max_steps": "number of optimizer steps",
    "trainer.max_epochs": "number of passes over the items",
    "data.batch_size": "items of a step, per process",
    "model.init_args.optimization.lr.base": "learning rate at its highest, or for `per` items",
    "model.init_args.encoder.init_args.img_size": "pixels that the encoder is made for",
}
_ALWAYS = {  # arguments of every run that recipes leave out
    "trainer.devices": ("auto", "number of processes, one per GPU"),
    "trainer.accelerator": ("auto", "cpu, gpu, or what there is"),
    "evaluate": ("true", "score the backbone before and after"),
    "runs": ("runs", "where run folders go"),
}
_NAME, _VALUE = 30, 24  # widths of columns
_LONGEST_DEFAULT = 16
_NO_TEXT = "Path to a configuration file."  # what the parser says of a group of settings


class _Group(NamedTuple):
    """The settings of one class."""

    title: str
    prefix: str  # of their names
    values: Mapping[str, object]
    owner: object  # the class, or None where it is not imported
    inner: tuple[str, ...]  # settings that are classes, which have groups of their own


def recipe_help(recipe: str, *, verb: Callable) -> str:
    """The help of a recipe.

    Args:
        recipe: name or path.
        verb: function that trains it, for its own arguments.

    Raises:
        ValueError: there is no such recipe, or it cannot be read.
    """
    path = find_recipe(recipe)
    header, values = header_of(recipe_name(path), path), read_yaml(path)
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    lines = [f"usage: glpretrain pretrain {recipe} [--NAME VALUE ...]", "", header.purpose]
    for name in ("Needs", "Costs"):
        if name in header.fields:
            lines += textwrap.wrap(f"{name}: {header.fields[name]}", width, subsequent_indent="  ")
    lines += ["", "common:"]
    for action in verb_parser(verb, verb="pretrain")._actions:
        if action.option_strings and "--help" not in action.option_strings:
            lines += _lines(action.option_strings[-1], "", " ".join((action.help or "").split()), width)
    for name, text in _COMMON.items():
        if (value := _at(values, name)) is not None:
            lines += _lines(f"--{name}", _plain(value), text, width)
    for name, (value, text) in _ALWAYS.items():
        given = _at(values, name)
        lines += _lines(f"--{name}", value if given is None else _plain(given), text, width)
    for group in _groups(values):
        lines += ["", f"{group.title}: {f'--{group.prefix}NAME' if group.prefix else ''}", *_settings(group, width)]
    more = "`glpretrain fit --help` lists every argument; a file laid over the recipe changes several at once: --config mine.yaml"
    return "\n".join([*lines, "", *textwrap.wrap(more, width), ""])


def _at(values: object, name: str) -> object:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _plain(value: object) -> str:
    """A value as it is written on the command line, in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("...").strip()


def _lines(name: str, value: str, text: str, width: int) -> list[str]:
    """Name, value and what it is: in columns, and the rest of a long text below its beginning."""
    head = f"  {name:<{_NAME}} {value:<{_VALUE}}" if value else f"  {name:<{_NAME}}"
    room = width - _NAME - _VALUE - 4
    if len(head) > _NAME + _VALUE + 3 or not text:
        return [
            head.rstrip(),
            *(textwrap.wrap(text, width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6, max_lines=1) if text else []),
        ]
    if not value:
        return textwrap.wrap(f"{head} {text}", width, subsequent_indent=" " * (_NAME + 3), max_lines=2)
    return [f"{head} {textwrap.shorten(text, room, placeholder='...')}"]


def _groups(values: Mapping[str, object]) -> Iterator[_Group]:
    """The method and what is in it, the data and what is in it, and the trainer."""
    yield from _of_class("method", values.get("model"), "model.")
    data = values.get("data")
    if isinstance(data, Mapping):
        yield from _of_values("data", data, "data.", DataModule)
    trainer = values.get("trainer")
    if isinstance(trainer, Mapping):
        yield from _of_values("trainer", trainer, "trainer.", pl.Trainer)


def _of_class(role: str, spec: object, prefix: str) -> Iterator[_Group]:
    path, given = _at(spec, "class_path"), _at(spec, "init_args")
    if not isinstance(path, str):
        return
    owner = imported(path) if path.partition(".")[0] in PACKAGES else known(path)
    yield from _of_values(f"{role} ({path.rpartition('.')[2]})", given if isinstance(given, Mapping) else {}, f"{prefix}init_args.", owner)


def _of_values(title: str, given: Mapping[str, object], prefix: str, owner: object) -> Iterator[_Group]:
    """A group, without the classes that are in it, and a group for each of those."""
    inner = {name: value for name, value in given.items() if isinstance(value, Mapping) and "class_path" in value}
    yield _Group(title, prefix, {name: value for name, value in given.items() if name not in inner}, owner, tuple(inner))
    for name, value in inner.items():
        yield from _of_class(name, value, f"{prefix}{name}.")


def _settings(group: _Group, width: int) -> Iterator[str]:
    """A line for each setting of a recipe, and one for what is left at its default."""
    known_names = described_arguments(group.owner) if callable(group.owner) else {}
    for name, value in group.values.items():
        for part, one in _leaves(name, value, known_names):
            text = known_names[part].help if part in known_names else ""
            yield from _lines(part, _plain(one), text if text != _NO_TEXT else "", width)
    left = [name for name in known_names if "." not in name and name not in (*group.values, *group.inner)]
    if left and group.title not in ("trainer",):
        said = (f"{name}={text}" if len(text := _plain_default(known_names[name].default)) <= _LONGEST_DEFAULT else name for name in left)
        yield from textwrap.wrap(f"also: {', '.join(said)}", width, initial_indent="  ", subsequent_indent="    ")


def _leaves(name: str, value: object, known_names: Collection[str]) -> Iterator[tuple[str, object]]:
    """The settings in a value by their dotted names, as far as they have names."""
    if isinstance(value, Mapping) and value and all(f"{name}.{key}" in known_names for key in value):
        for key, one in value.items():
            yield from _leaves(f"{name}.{key}", one, known_names)
    else:
        yield name, value


def _plain_default(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
