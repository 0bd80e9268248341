"""Verbs from typed functions: arguments, help and completion, and mistakes in one line that says what would have been accepted.

What the verbs do is left out. A recipe and a configuration are parsed by the same parser, so its messages are explained here too.
"""

import argparse
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, Namespace

from glpretrain.cli.trust import IMPORT, PACKAGES, enforce, known, read_yaml, require_classes

# The parser makes the word "None" of a null inside settings that are no class, such as `optimization.clip`, unless their mapping is given.
_NULLS = ("null", "Null", "NULL", "~")
_OF_A_PART = re.compile(r"(--.*\.init_args\.\w+)\.([\w.]+)")
_FORGET = "--forget"  # our own, before an argument that replaces; not for users
REST = "overrides"  # name of the parameter of a verb that gets what its parser does not know
_KEY = re.compile(r'Parser key "([\w.]+)"')
_CLASS = re.compile(r"class_path '([\w.]+)'")
_NO_CLASS = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_NO_NAME = re.compile(r"(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'|unrecognized arguments: --([\w.]+)")
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")
_VALUE = re.compile(r"(?:Given|Got) value: (.*)")
_TYPES = re.compile(r"Subtypes: \[(.*)\]|Expected an? (.*?)\. Got value")


def verb_parser(function: Callable, *, verb: str) -> ArgumentParser:
    """The parser of a verb.

    A parameter that can be given by position is a positional argument, any other one an option. A bool is a flag; a list is an option that
    may be repeated, or a positional argument with any number of values; a tuple is an option with several values.

    Args:
        function: what the verb does; its docstring is the help.
        verb: name of the verb.
    """
    text = docstring_parser.parse(inspect.getdoc(function) or "")
    described = {parameter.arg_name: " ".join((parameter.description or "").split()) for parameter in text.params}
    parser = ArgumentParser(
        prog=f"glpretrain {verb}",
        description="\n\n".join(part for part in (text.short_description, text.long_description) if part),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    hints = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if name != REST:
            _add(parser, parameter, hints[name], description=described[name])
    return parser


def _add(parser: ArgumentParser, parameter: inspect.Parameter, hint: object, *, description: str) -> None:
    name, default = parameter.name, parameter.default
    by_position, required = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, default is inspect.Parameter.empty
    text = description if required or not default else f"{description} (default: {default})"
    add = partial(parser.add_argument, name if by_position else f"--{name}", help=text)
    if hint is bool:
        add(action="store_true")
        return
    parts = (hint, *get_args(hint))  # of a union, its members
    if str in parts or Path in parts:
        hint = str if str in parts else Path  # taken as it is; a part of a union would be read as YAML first
    several = next((part for part in parts if get_origin(part) in (list, tuple)), None)
    choices = next((get_args(part) for part in parts if get_origin(part) is Literal), ())
    metavar = "{" + ",".join(choices) + "}" if choices else name.upper()
    add = partial(add, type=hint if several is None else get_args(several)[0], metavar=metavar)
    if several is not None and get_origin(several) is list and not by_position:
        add = partial(add, action="append")
    elif several is not None:
        add = partial(add, nargs="*" if by_position and not required else "+")
    elif by_position and not required:
        add = partial(add, nargs="?")
    if not required:
        add = partial(add, default=default)
    elif not by_position:
        add = partial(add, required=True)
    add()


def parse_verb(function: Callable, arguments: Sequence[str], *, verb: str) -> Mapping[str, object]:
    """The arguments of a verb's function.

    Raises:
        ValueError: an argument is unknown or missing, or has a value that is not accepted.
    """
    parser = verb_parser(function, verb=verb)
    own, rest = _divided(arguments, parser)
    takes_rest = REST in inspect.signature(function).parameters
    values = parse(parser, own if takes_rest else [*own, *rest]).as_dict()
    return values | {REST: rest} if takes_rest else values


def _divided(arguments: Sequence[str], parser: ArgumentParser) -> tuple[list[str], list[str]]:
    """What a parser knows, with what is given by position first, and the options that it does not know, each with its value."""
    known = parser._option_string_actions
    by_position: list[str] = []
    own: list[str] = []
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("-"):
            by_position.append(word)
            continue
        target, nargs = (own, known[name].nargs) if name in known else (rest, None)
        if name in known and nargs is None and not equals and words and not words[0].startswith("--"):
            own.append(f"{word}={words.pop(0)}")  # joined, since a path may begin with a dash
            continue
        target.append(word)
        while words and not equals and nargs != 0 and not words[0].startswith("--"):
            target.append(words.pop(0))
            if nargs != "+":
                break
    return [*by_position, *own], rest


class _Forget(argparse.Action):
    """Takes the value of a key out of the configuration that earlier arguments and files have set."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:  # noqa: ANN001  argparse's signature
        inner, (*parents, last) = namespace, str(values).split(".")
        for name in parents:
            inner = _inner(inner, name)
        for owner in (inner, _inner(inner, "init_args")):
            if isinstance(owner, Namespace | dict) and last in owner:
                del owner[last]


def _inner(settings: object, name: str) -> object:
    """The settings under a name, also where `init_args` was left out."""
    if not isinstance(settings, Namespace | dict):
        return None
    return settings[name] if name in settings else _inner(settings["init_args"], name) if "init_args" in settings else None


def _replacing(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, so that what is written in full replaces: the parser alone would merge a list into one of the same length."""
    words = list(arguments)
    for number, word in enumerate(words):
        following = words[number + 1] if number + 1 < len(words) else ""
        if word.startswith("--") and "=" not in word and _is_negative(following):  # the parser takes -1e-3 for an option
            words[number + 1] = f"{word}={following}"
            continue
        name, equals, value = word.partition("=")
        if name.startswith("--") and not name.endswith("+"):
            value = value if equals else following
            if value in _NULLS and (outer := _OF_A_PART.fullmatch(name)):
                name, value = outer[1], _nested(outer[2], value)
                word = f"{name}={value}" if equals else name
                if not equals:
                    words[number + 1] = value
            key, given = name.removeprefix("--"), _loaded(value)
            if key == "config":
                key, given = "", read_yaml(Path(value)) if Path(value).is_file() else None
            yield from (f"{_FORGET}={full}" for full in _written_in_full(key, given))
        yield word


def _nested(key: str, value: str) -> str:
    """`{a: {b: value}}` of the key `a.b`."""
    for part in reversed(key.split(".")):
        value = f"{{{part}: {value}}}"
    return value


def _is_negative(word: str) -> bool:
    try:
        return word.startswith("-") and float(word) <= 0.0
    except ValueError:
        return False


def _loaded(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # the parser will say so
        return None


def _written_in_full(key: str, value: object) -> Iterator[str]:
    """The keys of all lists and of all classes in a value; in any other mapping, what is left out stays as it was."""
    if key and (isinstance(value, list) or (isinstance(value, dict) and "class_path" in value)):
        yield key
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _written_in_full(f"{key}.{name}" if key else str(name), inner)


def parse(parser: ArgumentParser, arguments: Sequence[str], *, values: Mapping[str, object] | None = None) -> Namespace:
    """Parse arguments. A list, and a class with its `class_path`, replace what a configuration had there; other mappings add to it.

    Args:
        parser: the parser.
        arguments: words of the command line.
        values: a configuration that they override.

    Raises:
        ValueError: says in one line what is wrong and what is accepted.
    """
    if _FORGET not in parser._option_string_actions:
        parser.add_argument(_FORGET, action=_Forget, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    enforce()
    path, sys.path = sys.path, [os.path.abspath(place) for place in sys.path]  # the parser goes into the folder of a configuration
    try:
        given = list(_replacing(arguments))
        parsed = parser.parse_args(given, namespace=None if values is None else parser.parse_object(dict(values)))
    except argparse.ArgumentError as error:
        raise ValueError(explained(str(error), parser)) from error
    except (AttributeError, LookupError, TypeError, RecursionError) as error:  # the parser fails so on values of odd kinds
        raise ValueError(f"the arguments or the configuration cannot be parsed: {type(error).__name__}: {error}") from error
    finally:
        sys.path = path
    require_classes(parsed)
    return parsed


def parse_values(parser: ArgumentParser, values: Mapping[str, object]) -> Namespace:
    """Parse a configuration that no arguments override.

    Raises:
        ValueError: says in one line what is wrong and what is accepted.
    """
    enforce()
    try:
        parsed = parser.parse_object(dict(values))
    except argparse.ArgumentError as error:
        raise ValueError(explained(str(error), parser)) from error
    require_classes(parsed)
    return parsed


def require_one_recipe(files: Iterable[object]) -> None:
    """Refuse two whole recipes at once; a file without `class_path` of a model may be laid over a recipe.

    Raises:
        ValueError: names both.
    """
    recipes = [path for path in map(str, files) if Path(path).is_file() and _names_a_model(path)]
    if len(recipes) > 1:
        raise ValueError(
            f"--config: {' and '.join(recipes)} are both whole recipes; give one of them, or leave model.class_path and what is not to"
            " change out of the second"
        )


def _names_a_model(path: str) -> bool:
    written = read_yaml(Path(path))
    model = written.get("model") if isinstance(written, dict) else None
    return isinstance(model, dict) and "class_path" in model


def completion(verbs: Mapping[str, Callable], *, shell: str) -> str:
    """The script that completes verbs and their options in a shell: bash, zsh, fish or tcsh."""
    parser = ArgumentParser(prog="glpretrain", description="Self-supervised pretraining.")
    subcommands = parser.add_subcommands()
    for verb, function in verbs.items():
        subcommands.add_subcommand(verb, verb_parser(function, verb=verb))
    return parser.get_completion_script(f"shtab-{shell}")


def meant(name: str, accepted: Iterable[str]) -> str:
    """The end of a message: `; did you mean ...?` where one of the accepted names is close, and all of them."""
    names = list(accepted)
    close = difflib.get_close_matches(name, names, n=1)
    return (f"; did you mean {close[0]}?" if close else "") + (f" (accepted: {', '.join(names)})" if names else "")


def explained(message: str, parser: ArgumentParser) -> str:
    """One line for what the parser says over many: the key, the value, what is accepted, and what may have been meant."""
    where, classes = ".".join(_KEY.findall(message)), _CLASS.findall(message)
    if found := _DENIED.search(message):
        module = found[1].partition(".")[0]
        advice = "" if module in sys.stdlib_module_names else f"; if you trust the module {module}, add {IMPORT} {module}"
        return f"{where}: {found[1]} is not imported because a file names it{meant(module, PACKAGES)}{advice}"
    if found := _NO_CLASS.search(message):
        module, name = found.groups()
        return f"{where}: there is no class {module}.{name}" + meant(name, vars(sys.modules.get(module, sys)).get("__all__", ()))
    if found := _NO_NAME.search(message):
        owner = known(classes[-1]) if classes else None
        names = argument_names(owner) if callable(owner) else _names(parser)
        group, _, name = ".".join(part for part in found.groups() if part).rpartition(".")
        while group and not _below(names, group):
            group, _, name = group.rpartition(".")
        place = ".".join(part for part in (where, group) if part)
        return (f"{place}: " if place else "") + f"nothing reads {name!r}" + meant(name, _below(names, group))
    last = message.rpartition("Parser key")[2]
    value, types = _VALUE.search(last), _TYPES.search(last)
    if where and value and types:
        return f"{where}: {value[1]!r} given; accepted: {_plain(types[1] or types[2])}"
    return " ".join(line.strip().removeprefix("- ") for line in message.splitlines())


def argument_names(owner: Callable) -> list[str]:
    """What a class, or a function that makes one, can be given in a recipe, as dotted names."""
    return _names(_parser_of(owner))


class Argument(NamedTuple):
    """What can be given."""

    default: object
    help: str  # what the docstring says of it, in one line


def described_arguments(owner: Callable) -> dict[str, Argument]:
    """The arguments of a class, or of a function that makes one, by their dotted names."""
    parser = _parser_of(owner)
    actions = {name: parser._option_string_actions[f"--{name}"] for name in _names(parser)}
    return {name: Argument(action.default, " ".join(str(action.help or "").split())) for name, action in actions.items()}


def _parser_of(owner: Callable) -> ArgumentParser:
    parser = ArgumentParser()
    if isinstance(owner, type):
        parser.add_class_arguments(owner)
    else:
        parser.add_function_arguments(owner)
    return parser


def _names(parser: ArgumentParser) -> list[str]:
    """Of all options, as dotted names."""
    options = (option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--"))
    return [name for name in options if not name.endswith(("help", "print_config", "print_shtab", "forget", "+"))]


def _below(names: Iterable[str], group: str | None) -> list[str]:
    """The next parts of the dotted names that begin with `group`, each once."""
    prefix = f"{group}." if group else ""
    return list(dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)))


def _plain(types: str) -> str:
    """Names of types for a person: `int, null` of `<class 'int'>, <class 'NoneType'>`."""
    text = re.sub(r"<class '(?:[\w]+\.)*(\w+)'>", r"\1", types).replace("NoneType", "null")
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)
