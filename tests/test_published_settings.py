"""Paper recipes against the official values: every difference that changes results is named in the recipe's header."""

import pytest
from published_settings import FIELDS, PAPER, TABLE, WITHOUT_CODE, compared, differs, official, table

REPOSITORIES, RECIPES = official()
ROWS = [(name, field, row) for name, recipe in RECIPES.items() for field, row in recipe["fields"].items()]
FILES = sorted(path.stem for path in PAPER.glob("*.yaml"))


def test_every_paper_recipe_has_official_values_or_says_that_there_is_no_code() -> None:
    assert sorted([*RECIPES, *WITHOUT_CODE]) == FILES
    assert all(len(repository["commit"]) == 40 for repository in REPOSITORIES.values())


def test_every_official_value_says_where_it_is() -> None:
    assert len(ROWS) > 400
    for name, field, row in ROWS:
        assert field in FIELDS, (name, field)
        path, _, line = row["at"].rpartition(":")
        assert path and line.isdigit(), (name, field)
        assert row.keys() <= {"value", "at", "named"} or row.keys() == {"value", "at", "harmless"}, (name, field)


@pytest.mark.parametrize("name", FILES)
def test_the_header_of_a_paper_recipe_says_how_it_differs(name: str) -> None:
    said = differs((PAPER / f"{name}.yaml").read_text())
    assert said, "a header without differences says: Differs: nothing known"
    missing = [row["named"] for other, _, row in ROWS if other == name and "named" in row and row["named"] not in said]
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_paper_recipe_builds_what_the_authors_code_does_or_says_that_it_differs(name: str) -> None:
    rows = compared(name, RECIPES[name]["fields"])
    open_rows = [(field, value, ours) for field, value, ours, row in rows if value != ours and not row.keys() & {"named", "harmless"}]
    assert not open_rows
    # A difference that is gone must not stay in the list.
    assert not [field for field, value, ours, row in rows if value == ours and row.keys() & {"named", "harmless"}]


@pytest.mark.slow
def test_the_published_table_is_up_to_date() -> None:
    assert TABLE.read_text() == table(), "python tests/published_settings.py writes it"
