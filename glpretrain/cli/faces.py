"""`glpretrain faces`: a bar while faces are prepared, a line for each picture without one, and a count at the end.

What is done to a picture is left out (`glpretrain.prepare.faces`).
"""

from collections import Counter
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from glpretrain.core.listing import printable
from glpretrain.prepare.faces import CascadeDetector, FaceParser, FacerParser, MapParser, Preparation, TemplateParser


def faces(
    folder: Path,
    *,
    out: Path,
    parser: Literal["template", "maps", "facer"] = "template",
    maps: Path | None = None,
    table: Literal["lapa", "celebamask", "bisenet", "fasseg"] | None = None,
    detector: Literal["cascade", "none"] = "cascade",
    size: int = 224,
    margin: float = 1.3,
    workers: int | None = None,
    cluster: str | None = None,
) -> Counter[str]:
    """Make a folder of faces with region maps of pictures: detect, crop, resize, parse.

    The face in every picture of a folder is detected, cropped with a margin, resized, and written to OUT/images, with a map of its
    regions in OUT/regions: what glpretrain.data.Faces reads. An interrupted run goes on where it stopped; a picture that cannot be
    used is skipped with a line, which OUT/skipped.txt keeps.

    parsers (where the maps come from):
      template  ellipses at the places of an upright frontal face; needs nothing
      maps      label maps that you have, in --maps, with the same relative paths; --table says whose labels they are
      facer     the package FACER, the official choice (pip install pyfacer; it fetches its own weights)
    detectors: cascade (scikit-image's LBP cascade, frontal faces, nothing to fetch), none (pictures that are faces already)

    Args:
        folder: pictures, flat or nested; relative paths, and so classes, are kept
        out: a new folder, or one of an earlier run with the same settings
        parser: where the region maps come from
        maps: folder of label maps (.png or .npy), for --parser maps
        table: labels of these maps; lapa when left out
        detector: how faces are found
        size: side of a face in pixels
        margin: side of the crop over that of the face
        workers: number of processes; one per core, at most 8, when left out
        cluster: work on many machines that share the folders: the address of a Dask scheduler, the file that it writes, or slurm for
            --workers SLURM jobs as ~/.config/dask/jobqueue.yaml describes them (pip install 'glpretrain[cluster]')

    Returns:
        How many pictures are `written`, were `there`, and were `skipped`.

    Raises:
        ValueError: an argument is not what is accepted, or no picture could be used.
    """
    if (parser == "maps") != (maps is not None):
        raise ValueError(
            f"maps: {maps} given with parser {parser!r}; accepted: a folder of label maps with parser 'maps', and only with it"
        )
    if table is not None and parser != "maps":
        raise ValueError(f"table: {table} given with parser {parser!r}; accepted with parser 'maps' only")
    if maps is not None:
        made: FaceParser = MapParser(maps if cluster is None else maps.absolute(), table=table or "lapa")
    else:
        made = TemplateParser() if parser == "template" else FacerParser()
    found = CascadeDetector() if detector == "cascade" else None
    preparation = Preparation(folder, out, parser=made, detector=found, size=size, margin=margin, workers=workers, cluster=cluster)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    counts: Counter[str] = Counter()
    run = track(preparation.run(), total=len(preparation), description="faces", console=console, disable=not console.is_terminal)
    for outcome in run:
        counts["skipped" if outcome.reason else "there" if outcome.was_there else "written"] += 1
        if outcome.reason:
            console.print(f"skipped: {printable(outcome.reason)}", markup=False)
    if counts["skipped"] == len(preparation):
        raise ValueError(f"faces: none of {len(preparation)} pictures could be used; why is in {Path(out) / 'skipped.txt'}")
    total = counts["written"] + counts["there"]
    print(f"{total} faces in {out} ({counts['there']} were there before), {counts['skipped']} skipped (see {out}/skipped.txt)")
    return counts
