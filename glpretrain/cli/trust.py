"""What a file may ask for: how large a configuration may be, which modules it may name, and which classes are built from it.

A configuration is data from anybody. Nothing outside `PACKAGES` is imported because a file names it, only what the user allows with
`--import`. Left out: what the classes themselves accept (their constructors), and files of weights (`weights.files`).
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse._actions import _ActionConfigLoad
from jsonargparse._typehints import ActionTypeHint

PACKAGES = ("glpretrain", "torch", "torchvision", "timm", "kornia", "pytorch_lightning")
_OTHERS = (*PACKAGES[1:], "lightning_fabric")  # the last is the home of Lightning's plugins
IMPORT = "--import"
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH, _MAX_TEXT = 1_000_000, 50_000, 32, 10_000
_LEAST_NESTED = 64  # characters: no shorter text can hold more values than this as YAML in YAML
_SPEC = {"class_path", "init_args", "dict_kwargs"}  # how a class is written; no argument has one of these names
_CORE_TAG = "tag:yaml.org,2002:"
# Damaged scalars make PyYAML's constructors fail in any of these ways.
_DAMAGE = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@contextmanager
def buildable() -> Iterator[None]:
    """Make a mistake in the settings of whatever a constructor raises for settings that it did not expect, such as a null for a number."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"these settings cannot be built: {error or type(error).__name__}") from error


class Parser(ArgumentParser):
    """Reads configuration files within bounds, and takes no value of a configuration for the name of a further file."""

    def parse_path(self, path: str, **kwargs) -> Namespace:  # noqa: ANN003 - handed on unchanged
        """Parse a configuration file."""
        if "config" in read_yaml(Path(path)):
            raise ValueError(f"{path}: nothing reads 'config'; a configuration is one file")
        return super().parse_path(path, **kwargs)

    def add_class_arguments(self, *args, **kwargs) -> list[str]:  # noqa: ANN002, ANN003 - likewise
        """Add the arguments of a class."""
        added = super().add_class_arguments(*args, **kwargs)
        self._read_no_files()
        return added

    def add_subclass_arguments(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003 - likewise
        """Add an argument for a class of a kind."""
        super().add_subclass_arguments(*args, **kwargs)
        self._read_no_files()

    def instantiate(self, *args, **kwargs) -> Namespace:  # noqa: ANN002, ANN003 - likewise
        """Build what a configuration names. Nothing but settings goes in, so whatever fails here is one of them.

        Raises:
            ValueError: says what could not be built.
        """
        with buildable():
            return super().instantiate(*args, **kwargs)

    def _read_no_files(self) -> None:
        for action in self._actions:  # no setting of the library says this
            if isinstance(action, ActionTypeHint):
                action._enable_path = False
            elif isinstance(action, _ActionConfigLoad):
                action._load_config = partial(_loaded_without_file, action._load_config, action.dest)


def _loaded_without_file(load: Callable[[object, ArgumentParser], Namespace], key: str, value: object, parser: ArgumentParser) -> Namespace:
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        raise TypeError(f'Parser key "{key}": {value!r} given; accepted: a mapping, written out here')
    return load(value, parser)


def read_yaml(path: Path) -> dict[str, object]:
    """The mapping in a YAML file.

    Raises:
        ValueError: the file is no YAML mapping in UTF-8, is too large or nested too deeply, or asks for objects by tags.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; accepted: a yaml file")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{path}: more than {_MAX_BYTES} bytes; a configuration is a short text")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    return mapping_of(text, path)


def mapping_of(text: str, where: str | Path) -> dict[str, object]:
    """The mapping in a text of YAML, within the bounds of `read_yaml`; messages begin with `where`."""
    try:
        _require_bounded(text)
        values = yaml.load(text, Loader=_LOADER)
    except _DAMAGE as error:
        raise ValueError(f"{where}: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{where}: a {type(values).__name__} given; accepted: names with a colon behind each, as in `data:`")
    return values


def read_part(path: Path, *names: str) -> dict[str, object]:
    """The mapping below these names in a YAML file.

    Raises:
        ValueError: see `read_yaml`, or there is none.
    """
    part: object = read_yaml(path)
    for count, name in enumerate(names, start=1):
        part = part.get(name) if isinstance(part, dict) else None
        if not isinstance(part, dict):
            raise ValueError(f"{path}: {'.'.join(names[:count])} is missing or has no entries; accepted: what recipes/mmc.yaml has there")
    return part


def _require_bounded(text: str, *, nested: bool = False) -> None:
    """Refuse what becomes large or deep once it is read, while it is still text: an alias counts as all that it stands for.

    Args:
        text: YAML.
        nested: whether it is a value in YAML. The parser reads such a text again, and keeps it as it is if it is no YAML.
    """
    open_collections: list[tuple[str | None, int]] = []
    sizes: dict[str, int] = {}
    count = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if getattr(event, "tag", None) is not None and (not nested or event.tag.startswith(_CORE_TAG)):
            raise ValueError(f"the tag {event.tag!r} asks for an object; accepted: values without tags")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{event.anchor} stands for nothing, or for a part that holds it")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if len(event.value) > _MAX_TEXT:
                raise ValueError(f"a value of {len(event.value)} characters; accepted: at most {_MAX_TEXT}")
            if event.anchor:
                sizes[event.anchor] = 1
            if event.value != text and (len(event.value) > _LEAST_NESTED or event.value.startswith("!")):
                _require_nested_bounded(event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_collections.append((event.anchor, count))
            sizes.pop(event.anchor, None)
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, start = open_collections.pop()
            if anchor:
                sizes[anchor] = count - start
        if count > _MAX_VALUES or len(open_collections) > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_VALUES} values (an alias counts as what it stands for), or nested deeper than {_MAX_DEPTH}")


def _require_nested_bounded(text: str) -> None:
    try:
        _require_bounded(text, nested=True)
    except yaml.YAMLError:
        return  # plain text


def take_imports(arguments: Sequence[str]) -> list[str]:
    """Import the modules that `--import` names, whose classes configurations may name from now on.

    The current folder is searched for them behind all other places, so that a file in it never replaces an installed module.

    Returns:
        The other arguments.

    Raises:
        ValueError: there is no such module, or it is none that could be the user's.
    """
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        option, equals, name = word.partition("=")
        if option != IMPORT:
            rest.append(word)
            continue
        name = name if equals or not words else words.pop(0)
        top, is_path = name.partition(".")[0], name.endswith(".py") or not all(part.isidentifier() for part in name.split("."))
        if is_path or top in {*sys.stdlib_module_names, "jsonargparse"}:
            raise ValueError(f"{IMPORT} {name}: accepted: the name of a module with classes of yours, as in my_methods for my_methods.py")
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{IMPORT} {name}: {error}; it is looked for among installed packages and in {Path.cwd()}") from error
        set_parsing_settings(import_path_allowlist=[name])
    return rest


def enforce() -> None:
    """Make the parser refuse to import anything else than `PACKAGES` and what the user has named, before it is imported."""
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[PACKAGES[0], *_OTHERS],
        instantiate_subclass_spec_in_any=False,
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
    )


def known(path: object) -> object:
    """What an import path stands for, if its module has been imported, and None otherwise."""
    module, _, name = str(path).rpartition(".")
    return vars(sys.modules[module]).get(name) if module in sys.modules else None


def require_classes(value: object, *, where: str = "", declared: bool = True) -> None:
    """Refuse what is called without being a class of the kind that its key declares: functions, modules, and any class for a `Callable`.

    The parser has compared every class with the type of its key, but takes any function for a `Callable`. Only functions and callables of
    this package and of the user's modules are accepted.

    Args:
        value: what was parsed, before anything is built.
        where: its key.
        declared: whether a class is declared for it.

    Raises:
        ValueError: names the key and the import path.
    """
    if isinstance(value, Namespace | dict) and isinstance(value.get("class_path"), str):
        path, owner = value["class_path"], known(value["class_path"])
        if not _is_trusted(owner) and not (declared and isinstance(owner, type)):
            raise ValueError(_refused(where, path))
        arguments = value.get("init_args")
        unread = {str(name) for name, _ in _items(arguments)} & _SPEC
        if path.startswith(f"{PACKAGES[0]}."):  # the parser hands these on without a look at the parameters
            unread |= {str(name) for name, _ in _items(value.get("dict_kwargs"))}
        if unread:
            raise ValueError(f"{where}: {path}: nothing reads {', '.join(sorted(unread))}")
        for name, inner in _items(arguments):
            place = f"{where}.{name}" if where else str(name)
            require_classes(inner, where=place, declared=isinstance(owner, type) and _declares_class(owner, str(name)))
    elif isinstance(value, Namespace | dict | list | tuple | set | frozenset):
        for name, inner in _items(value):
            require_classes(inner, where=f"{where}.{name}" if where else str(name), declared=declared)
    elif (callable(value) or isinstance(value, ModuleType)) and not _is_trusted(value):
        raise ValueError(_refused(where, f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"))


def _items(value: object) -> Iterator[tuple[object, object]]:
    if isinstance(value, Namespace):
        yield from vars(value).items()
    elif isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from enumerate(value)


def _is_trusted(value: object) -> bool:
    """Whether it is defined in this package or in a module of the user's, the only one that the parser has imported besides."""
    return str(getattr(value, "__module__", _OTHERS[0])).partition(".")[0] not in _OTHERS


def _refused(where: str, path: str) -> str:
    return f"{where}: {path} given; accepted: classes that this setting declares, and functions of modules that you allow with {IMPORT}"


def _declares_class(owner: type, name: str) -> bool:
    """Whether the type of a constructor's parameter says which classes it takes."""
    for base in owner.__mro__:
        if name in inspect.signature(base.__init__).parameters:
            try:
                return not _is_open(get_type_hints(base.__init__).get(name, object))
            except NameError:  # a type that its module does not import
                return False
    return False


def _is_open(hint: object) -> bool:
    """Whether a type, or a part of it, takes any class or anything that can be called."""
    return hint in (Any, object, Callable) or get_origin(hint) is Callable or any(_is_open(part) for part in get_args(hint))
