"""Every file of reference numbers says where they come from."""

from pathlib import Path

import pytest
from golden import load

FOLDER = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_there_are_reference_numbers() -> None:
    assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_reference_numbers_can_be_made_again_and_are_explained(name: str) -> None:
    reference = load(name)
    assert reference["repository"].startswith("https://github.com/")
    # What was run from a release has its version and the digest of the source archive instead.
    assert len(reference["sha256"]) == 64 and reference["release"] if "release" in reference else len(reference["commit"]) == 40
    assert reference["called"] and reference["command"] and reference["formula"]
    assert f"| {name} |" in (FOLDER / "README.md").read_text()
