"""`glpretrain faces`: a bar while faces are prepared, a line for each picture without one, and a count at the end.

Left out: what is done to a picture (`glpretrain.prepare.faces`).
"""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track

from glpretrain.prepare.faces import CascadeDetector, FaceParser, FacerParser, MapParser, Preparation, TemplateParser

PARSERS = ("template", "maps", "facer")
DETECTORS = ("cascade", "none")


def faces(
    folder: str | Path,
    *,
    out: str | Path,
    parser: str = "template",
    maps: str | Path | None = None,
    table: str | None = None,
    detector: str = "cascade",
    size: int = 224,
    margin: float = 1.3,
    workers: int | None = None,
) -> Counter[str]:
    """Prepare a folder of faces; see `Preparation`.

    Args:
        folder: pictures.
        out: gets images/ and regions/, and skipped.txt with a line for each picture without a face.
        parser: one of `PARSERS`.
        maps: folder of label maps, for `maps`.
        table: their labels, for `maps`.
        detector: one of `DETECTORS`.
        size: side of a face in pixels.
        margin: side of the crop over that of the face.
        workers: processes.

    Returns:
        How many pictures are `written`, were `there`, and were `skipped`.

    Raises:
        ValueError: an argument that is not what is accepted, or no picture could be used.
    """
    if (parser == "maps") != (maps is not None):
        raise ValueError(
            f"maps: {maps} given with parser {parser!r}; accepted: a folder of label maps with parser 'maps', and only with it"
        )
    if table is not None and parser != "maps":
        raise ValueError(f"table: {table} given with parser {parser!r}; accepted with parser 'maps' only")
    made: FaceParser = (
        MapParser(maps, table=table or "lapa") if parser == "maps" else {"template": TemplateParser, "facer": FacerParser}[parser]()
    )
    found = {"cascade": CascadeDetector, "none": lambda: None}[detector]()
    preparation = Preparation(folder, out, parser=made, detector=found, size=size, margin=margin, workers=workers)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    counts: Counter[str] = Counter()
    with (Path(out) / "skipped.txt").open("w", encoding="utf-8") as skipped:
        run = track(preparation.run(), total=len(preparation), description="faces", console=console, disable=not console.is_terminal)
        for outcome in run:
            counts["skipped" if outcome.reason else "there" if outcome.was_there else "written"] += 1
            if outcome.reason:
                print(outcome.reason, file=skipped, flush=True)
                console.print(f"skipped: {outcome.reason}", markup=False)
    if counts["skipped"] == len(preparation):
        raise ValueError(f"faces: none of {len(preparation)} pictures could be used; why is in {Path(out) / 'skipped.txt'}")
    return counts
