"""The site of the documents is built without a warning, and holds every document."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None or find_spec("mkdocs_jupyter") is None, reason="mkdocs is not installed: make docs")
def test_the_site_holds_every_document_and_what_a_notebook_has_shown(tmp_path: Path) -> None:
    folder, site = tmp_path / "checkout", tmp_path / "site"
    folder.mkdir()
    for name in ("docs", "notebooks", "glpretrain", "mkdocs.yml", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    executed = folder / "build" / "notebooks" / NOTEBOOKS[0].name
    executed.parent.mkdir(parents=True)
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    shown = nbformat.v4.new_output("stream", text="shown by the kernel")
    next(cell for cell in notebook.cells if cell.cell_type == "code").outputs = [shown]
    nbformat.write(notebook, executed)
    # Not with --quiet, which counts no warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert DOCUMENTS and not [page for page in DOCUMENTS if not (site / page).with_suffix(".html").is_file()]
    holding = {path.name: "shown by the kernel" in path.read_text() for path in (site / "notebooks").glob("*.html")}
    assert holding == {path.with_suffix(".html").name: path == NOTEBOOKS[0] for path in NOTEBOOKS}
    assert not re.findall(r"<(?:script|link)[^>]+=\"https?:", (site / "notebooks" / NOTEBOOKS[0].with_suffix(".html").name).read_text())


def test_every_document_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    assert DOCUMENTS and not [name for name in DOCUMENTS if str(name) not in navigation]
    assert [line for line in navigation.splitlines() if ".ipynb" in line] == [f"      - notebooks/{path.name}" for path in NOTEBOOKS]
