"""What `make docs` changes in the documents: a link to a file of the repository that is no document becomes its text.

Left out: links between documents, which mkdocs checks.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Protocol

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)\)")


class _File(Protocol):
    src_uri: str  # path of a document below docs/


class _Page(Protocol):
    file: _File


def on_page_markdown(markdown: str, *, page: _Page, **others: object) -> str:
    """The text of a page, as mkdocs asks for it."""
    folder = Path("docs", PurePosixPath(page.file.src_uri).parent)

    def text_of(link: re.Match[str]) -> str:
        leads_out = not (folder / link[2]).resolve().is_relative_to(Path("docs").resolve())
        return link[1] if leads_out else link[0]

    return _LINK.sub(text_of, markdown)
