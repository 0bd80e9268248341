"""Write docs/licences.md: the licence of every package in constraints.txt, from the metadata of the installed packages.

    python docs/licences.py

Needs an environment with these exact versions, as `make setup` makes it. Left out: packages that are installed on macOS or Windows only.
"""

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "licences.md"
# Conditions of a licence beyond a notice, the strictest first.
_KINDS = (
    ("GPL", r"\bA?GPL"),
    ("LGPL", r"\bLGPL"),
    ("MPL", r"\bMPL|Mozilla"),
    ("other copyleft", r"\b(EPL|CDDL|EUPL|OSL|CPAL)\b"),
    ("proprietary", r"[Pp]roprietary"),
)
# Shared libraries of GCC that wheels carry: GPL-3.0, with the exception that a program that was compiled with GCC keeps its own licence.
_RUNTIME = re.compile(r"lib(?:gfortran|quadmath|gomp)(?=[-.])")
# Libraries under the GPL (x265) and the LGPL (libheif, libde265) that a wheel carries although its own licence asks for a notice only.
_CODECS = re.compile(r"lib(?:x265|heif|de265)(?=[-.])")
_EXTRAS = ("slides", "points", "heic", "dicom", "cluster", "onnx", "parquet", "index", "tensorboard", "completion", "notebooks", "dev")
_HEADER = """# Licences of the dependencies

Written by `python docs/licences.py` from the metadata of the packages; a test compares it with `constraints.txt`. glpretrain itself is
Apache-2.0 and contains no code of these packages: pip installs them beside it. What to know before you pass an environment on (an image,
an installer):

"""


def pins(path: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """The version of each package."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE))


def licence(package: Distribution) -> str:
    """What a package says of its licence: an SPDX expression, or the classifiers, or a short free text."""
    metadata = package.metadata
    classifiers = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", []) if text.startswith("License :: ")]
    text = metadata.get("License", "").strip()
    short = text if len(text) < 60 and "\n" not in text and text != "UNKNOWN" else ""
    return metadata.get("License-Expression", "") or short or " and ".join(classifiers) or "not stated"


def bundled(package: Distribution, libraries: re.Pattern[str] = _RUNTIME) -> list[str]:
    """The libraries in a package whose names are of this form; those of GCC's runtime when left out."""
    return sorted({found[0] for file in package.files or [] if (found := libraries.match(file.name))})


def kind(text: str) -> str:
    """The strictest condition in a licence; empty where a notice is enough. Of a choice, (A OR B), the mildest counts."""
    text = re.sub(r"\(([^()]+ OR [^()]+)\)", lambda choice: max(choice[1].split(" OR "), key=_mildness), text)
    place = _mildness(text)
    return _KINDS[place][0] if place < len(_KINDS) else ""


def _mildness(text: str) -> int:
    return next((place for place, (_, pattern) in enumerate(_KINDS) if re.search(pattern, text)), len(_KINDS))


def _reached(requirements: Iterable[str]) -> set[str]:
    """Names of all packages that requirements bring with them here."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        found.add(name)
        for text in distribution(name).requires or []:
            inner = Requirement(text)
            if any(inner.marker is None or inner.marker.evaluate({"extra": extra}) for extra in (*requirement.extras, "")):
                waiting.append(inner)
    return found


def rows() -> list[tuple[str, str, str, str, str]]:
    """Package, version, part of glpretrain that needs it, licence, and what is to be known.

    Raises:
        PackageNotFoundError: a package is not installed.
        ValueError: a package is installed in another version.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    parts = [("always", _reached(project["dependencies"]))]
    parts += [(f"[{name}]", _reached(extras[name])) for name in _EXTRAS]
    found: list[tuple[str, str, str, str, str]] = []
    for name, version in pins().items():
        package = distribution(name)
        if package.version != version:
            raise ValueError(f"{name}: {package.version} is installed; constraints.txt says {version}; run make setup")
        part = next((part for part, names in parts if name in names), "[dev]")
        text = licence(package)
        notes = [kind(text)] if kind(text) else []
        notes += [f"with {', '.join(bundled(package))} (GPL with GCC's runtime exception)"] if bundled(package) else []
        notes += [f"with {', '.join(bundled(package, _CODECS))} (GPL, LGPL)"] if bundled(package, _CODECS) else []
        found.append((name, version, part, text, "; ".join(notes)))
    return found


def table() -> str:
    """The content of docs/licences.md."""
    found = rows()
    lines = [_HEADER]
    for name, _ in _KINDS:
        if named := [f"{package} ({part})" for package, _, part, text, _ in found if kind(text) == name]:
            lines.append(f"- {name}: {', '.join(named)}\n")
    carriers = [f"{package} ({part})" for package, _, part, _, note in found if "GCC" in note]
    lines.append(f"- wheels with libraries of GCC (GPL with the runtime exception): {', '.join(carriers)}\n")
    codecs = [f"{package} ({part})" for package, _, part, _, note in found if "(GPL, LGPL)" in note]
    lines.append(f"- wheels with codecs under the GPL and the LGPL: {', '.join(codecs)}\n")
    if unstated := [package for package, _, _, text, _ in found if text == "not stated"]:
        lines.append(f"- without a word on their licence: {', '.join(unstated)}\n")
    lines.append("\n| package | version | needed by | licence | to know |\n|---|---|---|---|---|\n")
    lines += [f"| {' | '.join(row)} |\n" for row in found]
    return "".join(lines)


if __name__ == "__main__":
    try:
        TABLE.write_text(table())
    except (PackageNotFoundError, ValueError) as error:
        sys.exit(f"licences: {error}")
    print(f"{TABLE}: {len(pins())} packages")
