"""`glpretrain embed` and `glpretrain neighbours`: features of a user's items in files, and what resembles a picture.

Encoding, files and search are left out (`glpretrain.use`).
"""

import time
from pathlib import Path
from typing import Literal

from glpretrain.cli.opening import opened_to_work, read_in_range
from glpretrain.core.files import part_file
from glpretrain.core.listing import expanded
from glpretrain.evaluate.features import Features
from glpretrain.runs import require_outside
from glpretrain.use import neighbours as found_neighbours
from glpretrain.use import own_source, write_features
from glpretrain.use.files import unreadable_report
from glpretrain.use.neighbours import Record, contact_sheet


def embed(
    backbone: str,
    folder: str,
    *,
    out: Path,
    what: Literal["cls", "mean", "patches"] = "cls",
    size: tuple[int, ...] | None = None,
    batch_size: int = 64,
    bf16: bool = False,
    number: Literal["float32", "float16"] = "float32",
    num_workers: int | None = None,
    index: bool = False,
    value_range: str | None = None,
) -> None:
    """Write the features of your items to a file: .parquet, .npy or .csv.

    Every item gets a row: its name (the path below the folder), its class folder if there are any, and its features. A .npy file has the
    names in a .csv beside it. An item that cannot be read costs one line, and is listed in NAME_unreadable.txt. An interrupted command goes
    on where it stopped when it is given again.
      glpretrain embed runs/mmc/latest/backbone photos/ --out features.parquet
      glpretrain embed runs/mmc/latest/backbone photos/ --out features.npy --what patches --number float16
    numpy.load("features.npy", mmap_mode="r") opens patches of any number of images: [images, patches, width].

    Args:
        backbone: folder of a run or export, a published checkpoint, or the name of published weights
        folder: a folder of images (nested or not, in train/ and val/ or not), a list of them, or tar shards; clouds or meshes for points
        out: file that is written; .parquet needs pip install 'glpretrain[parquet]'
        what: cls, the mean of the patches, or all patches (.npy only)
        size: pixels, or height and width, or number of points; the backbone's own when left out
        batch_size: items that are encoded at a time
        bf16: encode under bfloat16 autocast
        number: type of the numbers in the file (a .csv has their digits)
        num_workers: processes that read the items; when left out, one for each core if there are 2,048 items or more, and else none
        index: also write an index of nearest neighbours (pip install 'glpretrain[index]')
        value_range: LOW,HIGH: the values of files that become black and white, for .npy, TIFF, DICOM and 16-bit images; none takes files as
            they are; that of the backbone's training when left out
    """
    out = expanded(out)
    require_outside("out", out, given=[folder])
    encoder = opened_to_work(backbone)
    read_in_range(encoder, value_range)
    side = size[0] if size is not None and len(size) == 1 else size
    features = Features(size=side, batch_size=batch_size, bf16=bf16)
    source, start = own_source(folder, encoder.card), time.perf_counter()
    origin = {"backbone": _lasting(backbone), "folder": _lasting(folder)}
    options = {"what": what, "features": features, "number": number, "index": index, "num_workers": num_workers, "origin": origin}
    written = write_features(encoder, source, out, **options)
    seconds, done = time.perf_counter() - start, written.batches - written.resumed
    if written.resumed == written.batches and not written.others:
        print(f"{out} is complete already")
    else:
        before = f"; {written.resumed} of {written.batches} batches were there before" if written.resumed else ""
        rate = min(done * batch_size, len(source)) / seconds
        print(f"{len(source)} items in {seconds:.1f} s ({rate:.0f} per second){before}")
    if written.unreadable:
        print(f"{written.unreadable} of {len(source)} items cannot be read: {unreadable_report(out)}")
    print(f"{out}: {number} {' x '.join(map(str, written.shape))}" + "".join(f", {path.name}" for path in written.others))


def neighbours(
    features: Path,
    query: Path,
    *,
    k: int = 5,
    backbone: str | None = None,
    folder: str | None = None,
    picture: Path | None = None,
    exact: bool = False,
) -> None:
    """Name the items that resemble a picture most, with their cosines.

    With an index beside the features (`glpretrain embed --index`) a graph is followed, otherwise all of them are compared.
      glpretrain neighbours features.parquet photo.jpg --k 12 --picture neighbours.png

    Args:
        features: file that `glpretrain embed` wrote, of cls or of the mean of patches
        query: a picture, or a cloud where the features are of clouds
        k: number of items
        backbone: backbone that made the features, if it lies elsewhere now
        folder: items that the features are of, if they lie elsewhere now; for --picture
        picture: a .png to draw the query and its neighbours in
        exact: compare all of them, also where there is an index
    """
    record = Record.of(features)
    encoder = opened_to_work(backbone or record.backbone)
    encoder.set_value_range(record.value_range)
    found = found_neighbours(encoder, features, query, k=k, exact=exact)
    for one in found:
        print(f"{one.cosine:.4f}  {one.name}")
    if picture is not None:
        figure = contact_sheet(encoder, query, found, folder=folder or record.folder)
        with part_file(picture) as part:
            figure.savefig(part, dpi=120, format="png")
        print(f"{picture}: the query and {len(found)} neighbours")


def _lasting(given: str) -> str:
    """A path that means the same from another folder, and when `latest` has moved; anything else as it is."""
    path = expanded(given)
    return str(path.resolve()) if path.exists() else given
