"""The pages of the methods: each recipe has one, with its picture, the values that the recipes have, and scores that were measured."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from test_documents import MEASUREMENTS, REPOSITORY

METHODS = REPOSITORY / "docs" / "methods"
PAGES = sorted(path for path in METHODS.glob("*.md") if path.name != "index.md")
WITHOUT_PAGE = {"mmc_points": "mmc", "dinov3": "dinov2", "infobatch": "mae"}  # by the page that has it
Plain = dict[str, "Plain"] | list["Plain"] | str | float | bool | None


def name_of(path: Path) -> str:
    return path.stem


def found_in(recipe: Plain, setting: str) -> Plain:
    """The value of a setting by its whole path, or by what stands behind `model.init_args`.

    Raises:
        KeyError: the recipe does not set it.
    """
    whole = setting if setting.startswith(("data.", "trainer.")) else f"model.init_args.{setting}"
    value = recipe
    for name in whole.split("."):
        if not isinstance(value, dict):
            raise KeyError(name)
        value = value[name]
    return value


def settings_of(path: Path) -> list[tuple[str, str, str]]:
    """Recipe, setting and what the page says of its value, of all cells of the table of settings."""
    rows = [re.split(r" *\| *", line.strip("| \n")) for line in path.read_text().splitlines() if line.startswith("|")]
    head, _, *body = rows
    return [(recipe.strip("`"), row[0].strip("`"), said) for row in body for recipe, said in zip(head[2:], row[2:], strict=True)]


def test_every_recipe_has_a_page_that_readme_and_index_link_to() -> None:
    recipes = {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")}
    targets = {name: f"{WITHOUT_PAGE.get(name, name)}.md" for name in recipes}
    assert {path.name for path in PAGES} == set(targets.values())
    linked = dict(re.findall(r"^\| \[`(\w+)`\]\(docs/methods/([\w.]+)", (REPOSITORY / "README.md").read_text(), re.MULTILINE))
    listed = dict(re.findall(r"^\| \[(\w+)\]\(([\w.]+)", (METHODS / "index.md").read_text(), re.MULTILINE))
    assert linked == listed == targets
    assert set(re.findall(r"methods/([\w.]+)", (REPOSITORY / "mkdocs.yml").read_text())) == {"index.md", *targets.values()}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_values_are_those_of_the_recipes(path: Path) -> None:
    cells = settings_of(path)
    compared = 0
    for recipe, setting, said in cells:
        contents = yaml.safe_load((REPOSITORY / recipe).read_text())
        if re.fullmatch("`[^`]+`", said):  # other cells say it in words
            assert found_in(contents, setting) == yaml.safe_load(said.strip("`")), f"{recipe}: {setting}"
            compared += 1
        elif said.startswith("not set"):
            with pytest.raises(KeyError):
                found_in(contents, setting)
    assert compared >= 5


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_scores_were_measured(path: Path) -> None:
    text = path.read_text()
    linked = re.findall(r"\]\(\.\./measurements\.md#([\w-]+)\)", text)
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", MEASUREMENTS.read_text(), re.MULTILINE | re.DOTALL))
    assert path.stem in linked and set(linked) <= set(sections)
    measured = " ".join(sections[name] for name in linked)
    number = r"\d+\.\d+"
    scores = re.findall(rf"{number} -> {number} ± {number}|{number} ± {number}", text.replace("\n", " "))
    assert not [score for score in scores if score not in measured]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_picture_is_drawn_and_says_what_it_shows(path: Path) -> None:
    (picture,) = re.findall(r"^!\[[^\]]+\]\((\S+\.svg)\)$", path.read_text(), re.MULTILINE)
    root = ElementTree.parse(path.parent / picture).getroot()
    assert (path.parent / picture).name == f"{path.stem}.svg" and root.get("aria-label")
    assert "prefers-color-scheme: dark" in "".join(root.itertext())
