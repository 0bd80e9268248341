"""What `make docs` changes in the documents: a link to a file of the repository that is no document becomes its text, and a notebook is
shown with the outputs of the copy that was executed (build/notebooks/), if there is one.

Left out: links between documents, which mkdocs checks, and executing notebooks (the Makefile).
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)\)")


_EXECUTED = Path("build", "notebooks")


class _File(Protocol):
    src_uri: str  # path of a document below docs/
    abs_src_path: str  # where it is read


class _Page(Protocol):
    file: _File


def on_files(files: Iterable[_File], **others: object) -> Iterable[_File]:
    """The files of the site, as mkdocs asks for them."""
    for file in files:
        path = PurePosixPath(file.src_uri)
        if path.suffix == ".ipynb" and (executed := _EXECUTED / path.name).exists():
            file.abs_src_path = str(executed.resolve())
    return files


def on_page_markdown(markdown: str, *, page: _Page, **others: object) -> str:
    """The text of a page, as mkdocs asks for it."""
    folder = Path("docs", PurePosixPath(page.file.src_uri).parent)

    def text_of(link: re.Match[str]) -> str:
        leads_out = not os.path.normpath(folder / link[2]).startswith("docs/")  # docs/notebooks is a link
        return link[1] if leads_out else link[0]

    return _LINK.sub(text_of, markdown)
