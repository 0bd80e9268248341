"""The list of mutants keeps up with the sources: every text that it replaces is there once, and every test that it names."""

from collections import Counter

import pytest
from mutants import PACKAGE, ROOT, Mutant, load_mutants

MUTANTS = load_mutants()


def test_there_are_mutants_and_each_has_a_name_of_its_own() -> None:
    assert len(MUTANTS) > 200
    assert not [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_replaces_is_there_once_and_still_compiles_afterwards(mutant: Mutant) -> None:
    text = (PACKAGE / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file}: {text.count(mutant.old)} times {mutant.old!r}; change tests/mutants.toml"
    assert mutant.new != mutant.old
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert mutant.tests and all((ROOT / test.partition("::")[0]).is_file() for test in mutant.tests), mutant.tests
