"""The documents point to what exists: recipes, headings and files."""

import re
from pathlib import Path

import pytest
from shrinking import EVALUATIONS, RECIPES, ROOT, name_of

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


@pytest.mark.parametrize("path", RECIPES + EVALUATIONS, ids=name_of)
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
