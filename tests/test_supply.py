"""What `make setup` installs: exact versions, a hash for every file, a known licence; and a set-up that uses them."""

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
LOCK = (ROOT / "requirements.lock").read_text()
ENTRIES = [entry.replace("\\\n", " ") for entry in re.split(r"\n(?=[a-z0-9])", LOCK) if not entry.startswith("#")]
LICENCES = (ROOT / "docs" / "licences.md").read_text()


def locked() -> dict[str, Requirement]:
    found = [Requirement(entry.split("--hash")[0]) for entry in ENTRIES]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_every_pin_is_locked_and_everything_else_is_for_other_systems() -> None:
    assert len(PINS) > 100
    versions = {name: str(requirement.specifier) for name, requirement in locked().items()}
    assert {name: versions.get(name) for name in PINS} == {name: f"=={version}" for name, version in PINS.items()}
    linux = {"sys_platform": "linux", "platform_system": "Linux", "implementation_name": "cpython"}
    for name in locked().keys() - PINS.keys():
        marker = locked()[name].marker
        assert marker is not None and not marker.evaluate(linux), f"{name} is installed on Linux and has no pin; run make lock"


def test_every_locked_file_has_a_hash_and_no_address() -> None:
    for entry in ENTRIES:
        words = entry.split("--hash=")
        assert len(words) > 1 and all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", word) for word in words[1:]), words[0]
    assert "://" not in LOCK and "index" not in LOCK.replace("index-url", "index")


def test_every_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        requirement = Requirement(text)
        version = PINS.get(canonicalize_name(requirement.name))
        assert version is not None and requirement.specifier.contains(version), f"{text}: {version} is pinned; run make lock"


def test_a_new_environment_is_installed_from_hashes_and_an_old_one_keeps_its_packages(tmp_path: Path) -> None:
    def commands(venv: Path) -> str:
        return subprocess.run(["make", "-n", "setup", f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    fresh = commands(tmp_path / "new")
    assert fresh.index("--require-hashes --no-deps --only-binary :all: --requirement requirements.lock") < fresh.index(
        "--no-deps --editable"
    )
    assert "--require-hashes" not in commands(tmp_path) and "--no-deps" not in commands(tmp_path)


def rows() -> list[list[str]]:
    return [line.strip("| \n").split(" | ") for line in LICENCES.splitlines() if line.startswith("| ")][1:]


def test_the_table_of_licences_has_every_pin() -> None:
    assert {row[0]: row[1] for row in rows()} == PINS, "run make lock"


def test_copyleft_is_named() -> None:
    for name, kind in (("certifi", "MPL"), ("tqdm", "MPL"), ("openslide-python", "LGPL"), ("openslide-bin", "LGPL")):
        assert re.search(rf"^- {kind}: .*\b{name} \(", LICENCES, re.MULTILINE)
    assert re.search(r"^- wheels with libraries of GCC .*numpy.*scipy", LICENCES, re.MULTILINE)
    assert re.search(r"^- wheels with codecs under the GPL and the LGPL: pillow-heif \(\[heic\]\)$", LICENCES, re.MULTILINE)
    assert all(row[2] == "[slides]" for row in rows() if row[0].startswith("openslide"))


def test_the_table_says_what_the_installed_packages_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import licences

    compared = 0
    for name, version, _, text, *_ in rows():
        try:
            package = distribution(name)
        except PackageNotFoundError:  # an environment that was there before, or another system
            continue
        if package.version == version:
            compared += 1
            assert licences.licence(package) == text, f"{name}: run python docs/licences.py"
    assert compared > 0


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("MIT", ""),
        ("LGPL-2.1-only AND (BSD-3-Clause OR GPL-2.0-only)", "LGPL"),
        ("GPL-3.0-or-later", "GPL"),
        ("AGPL-3.0", "GPL"),
        ("MPL-2.0 AND MIT", "MPL"),
        ("Mozilla Public License 2.0 (MPL 2.0)", "MPL"),
        ("NVIDIA Proprietary Software", "proprietary"),
        ("(GPL-2.0 OR LGPL-2.1)", "LGPL"),
    ],
)
def test_the_strictest_condition_counts_and_of_a_choice_the_mildest(monkeypatch: pytest.MonkeyPatch, text: str, kind: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import licences

    assert licences.kind(text) == kind
