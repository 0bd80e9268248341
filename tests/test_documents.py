"""The documents point to what exists: recipes, headings and files; and the commands in them and in the help are understood."""

import ast
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from shrinking import EVALUATIONS, FINE_TUNING, RECIPES, ROOT, name_of

from glpretrain.cli import VERBS
from glpretrain.cli.finetune import Tuning
from glpretrain.cli.parsing import REST, parse_verb
from glpretrain.cli.training import Training
from glpretrain.core.imports import imported
from glpretrain.runs import find_recipe

REPOSITORY = ROOT.parent
MEASUREMENTS = REPOSITORY / "docs" / "measurements.md"


def anchors(document: Path) -> set[str]:
    """What a link to a heading of this document may end in, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_recipes_named_in_the_measurements_exist() -> None:
    text = MEASUREMENTS.read_text()
    patterns = (r"RECIPE=([\w/]+)", r"glpretrain pretrain (\w[\w/]*)", r"--config (eval/\w+)", r"recipes/([\w/]+)\.yaml")
    named = {name for pattern in patterns for name in re.findall(pattern, text)}
    assert {"mmc", "eval/points"} <= named
    for name in sorted(named):
        assert find_recipe(name).is_file()


def test_links_within_the_measurements_lead_to_a_heading() -> None:
    targets = re.findall(r"\]\(#([^)]+)\)", MEASUREMENTS.read_text())
    assert targets and set(targets) <= anchors(MEASUREMENTS)


@pytest.mark.parametrize("path", RECIPES + EVALUATIONS + FINE_TUNING, ids=name_of)
def test_header_points_to_what_exists(path: Path) -> None:
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    links = re.findall(r"\b(docs/[\w./-]+\.md)(?:#([\w-]+))?", header)
    assert links or path in EVALUATIONS or path.parent.name == "paper", "what was measured here has a section in docs/measurements.md"
    for document, heading in links:
        assert (REPOSITORY / document).is_file()
        assert not heading or heading in anchors(REPOSITORY / document)
    for file in re.findall(r"\b(?:glpretrain|recipes)/[\w/.]*\w", header):
        assert (REPOSITORY / file).exists(), file


def test_files_named_in_the_architecture_exist() -> None:
    text = (REPOSITORY / "ARCHITECTURE.md").read_text()
    linked, named = re.findall(r"\]\(([\w./-]+)\)", text), re.findall(r"`([a-z]\w*/[\w./]*)`", text)
    assert linked and named
    assert not [name for name in linked if not (REPOSITORY / name).exists()]
    assert not [name for name in named if not any((root / name).exists() for root in (REPOSITORY, REPOSITORY / "glpretrain"))]


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "README.md", "docs/measurements.md"])
def test_paths_in_the_document_exist(document: str) -> None:
    text = (REPOSITORY / document).read_text()
    named = re.findall(r"`((?:recipes|notebooks|glpretrain|tests|docs)/[\w./-]*|[A-Z]+\.md)`", text)
    named += re.findall(r"\]\(\.\./([\w./-]+)\)", text)  # links from docs/ to the rest
    assert named
    assert not [name for name in named if not (REPOSITORY / name).exists()]


def test_every_fault_has_a_test_that_exists_and_is_slow_where_it_says_so() -> None:
    lines = re.findall(r"^\| (?!\*\*|fault \|).+", (REPOSITORY / "docs" / "faults.md").read_text(), re.MULTILINE)
    rows = [re.fullmatch(r"\| ([^|]+) \| [^|]+ \| `(tests/[\w/]+\.py)::(\w+)`( slow)? \|", line) for line in lines]
    assert not [line for line, row in zip(lines, rows, strict=True) if row is None]
    found = [row.groups() for row in rows if row is not None]
    assert len({fault for fault, *_ in found}) == len(found) >= 60
    marks = {
        (path, node.name): "pytest.mark.slow" in map(ast.unparse, node.decorator_list)
        for path in {path for _, path, *_ in found}
        for node in ast.parse((REPOSITORY / path).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert not [(path, name) for _, path, name, slow in found if marks.get((path, name)) != (slow is not None)]


# What stands in capitals in a command is to be replaced by the reader; these are replaced where a value of its kind is needed.
PLACEHOLDERS = {
    "GLOBAL": "[{size: 48, scale: [0.4, 1.0], count: 2}]",
    "LOCAL": "[{size: 24, scale: [0.1, 0.6], count: 2}]",
    "SEED": "0",
    "mine.yaml": "mmc",
}
OF_DEVELOPERS = {
    "docs",
    "lint",
    "types",
    "test",
    "test-slow",
    "setup",
    "notebooks",
    "clean",
    "lock",
}  # targets that start no verb with arguments


def commands_in(text: str) -> list[str]:
    """Lines that begin with `glpretrain` or `make`, without what is said of them behind two spaces or a hash."""
    found = re.findall(r"^ *(?:# )?(?:[A-Z][\w ]+: +)?((?:glpretrain|make) [^`\n]+)$", text, re.MULTILINE)
    told = (re.split(r"  +|  *# ", command)[0] for command in found)
    return [command.strip() for several in told for command in re.split(r"&&|, then", several)]


def documented() -> list[str]:
    """All commands of the documents' blocks, the headers of recipes, and the help of the verbs."""
    documents = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    texts = [
        block
        for path in documents
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
        if not language
    ]
    texts += [
        "\n".join(line for line in path.read_text().splitlines() if line.startswith("#")) for path in RECIPES + EVALUATIONS + FINE_TUNING
    ]
    texts += [inspect.getdoc(imported(verb.function)) or "" for verb in VERBS.values()]
    return list(dict.fromkeys(command for text in texts for command in commands_in(text)))


def words_of(command: str) -> list[str]:
    """The words behind `glpretrain` that a command ends in; none where a target of the Makefile starts no verb."""
    words = shlex.split(command)
    if words[0] == "make":
        done = subprocess.run(
            ["make", "-n", "--no-print-directory", "-o", ".venv/.glpretrain", *words[1:]],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        if words[1] in OF_DEVELOPERS:
            return []
        words = shlex.split(done.stdout[done.stdout.index("-m glpretrain.cli") :])[1:]
    if "--import" in words:  # every verb takes it, with a module of the user's
        del words[words.index("--import") : words.index("--import") + 2]
    return [PLACEHOLDERS.get(word, word) for word in words[1:]]


class ParsedOnly(Training):
    """The configuration of a run, which nothing is built of."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


class TuningParsedOnly(Tuning):
    """Likewise, of a fine-tuning whose backbone need not be there."""

    def before_instantiate_classes(self) -> None:
        """Open nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def test_there_are_commands_of_every_kind() -> None:
    commands = documented()
    assert {"make pretrain RECIPE=mmc", "glpretrain faces photos/ --out faces/"} <= set(commands)
    assert {command.split()[1] for command in commands if command.startswith("glpretrain")} >= {"pretrain", "evaluate", "inspect", "tiles"}


@pytest.mark.parametrize("command", documented())
def test_a_command_of_the_documents_is_understood(command: str) -> None:
    """Files that it names need not be here; names, options and values must be right."""
    if not (words := words_of(command)):
        return
    verb, *arguments = words
    values = dict(parse_verb(imported(VERBS[verb].function), arguments, verb=verb))
    rest = values.get(REST, [])
    assert isinstance(rest, list)
    if verb in ("pretrain", "bench") and rest:  # test_recipes.py parses recipes as they stand
        assert ParsedOnly(["--config", str(find_recipe(str(values["recipe"]))), *rest]).config
    elif verb == "finetune" and rest:
        assert TuningParsedOnly(["--config", str(find_recipe(str(values["config"]))), "--backbone", "b", *rest]).config
    elif rest:
        assert values.get("config"), f"{command}: {rest} are overrides of a configuration"
    for name in ("config", "recipe"):
        if values.get(name) is not None:
            assert find_recipe(str(values[name])).is_file()
