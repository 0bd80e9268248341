"""Files of features: .npy with the names in a .csv beside it, .csv, or .parquet; complete or absent, however the work was interrupted.

Left out: encoding (`embedding`), and searching in such files (`neighbours`).
"""

import csv
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from glpretrain.core.files import locked, part_file, write_json
from glpretrain.data.sources.base import Source
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.states import fingerprint
from glpretrain.evaluate.features import Features
from glpretrain.use.embedding import What, check_what, embedded, nothing_to_read, num_batches
from glpretrain.use.index import build_index, require_faiss
from glpretrain.use.row_file import RowFile

Number = Literal["float32", "float16"]
ENDINGS = (".parquet", ".npy", ".csv")
FILE, CLASS, FEATURES = "file", "class", "features"  # columns
_GROUP = 4096  # rows that are written to a parquet file together
_LARGEST_FLOAT16 = 65504.0


class Written(NamedTuple):
    """What was written."""

    path: Path
    shape: tuple[int, ...]  # of all rows
    unreadable: int  # items without a row
    others: tuple[Path, ...]  # files beside it
    resumed: int  # batches that an earlier process had done
    batches: int  # in all


def beside(out: Path, ending: str) -> Path:
    """Path of a file that belongs to a file of features: `features.parquet.json`, say."""
    return out.with_name(out.name + ending)


def unreadable_report(out: Path) -> Path:
    """The list of items that have no row."""
    return out.with_name(f"{out.stem}_unreadable.txt")


def written_name(name: str) -> str:
    """The name of an item as text that any file can hold: a file may be named by any bytes."""
    return name.encode("utf-8", "backslashreplace").decode()


def write_features(
    encoder: Encoder,
    source: Source,
    out: Path,
    *,
    what: What = "cls",
    features: Features,
    number: Number = "float32",
    index: bool = False,
    num_workers: int | None = None,
    origin: dict[str, str],
) -> Written:
    """Write the features of all items of a source. The same call goes on with what an interrupted one had done.

    Args:
        encoder: the encoder.
        source: source of the items; its listing, and not the contents of its files, decides whether a call is the same.
        out: path of the file; its ending decides on the format.
        what: `cls`, the mean of the patches, or all patches, which only .npy holds.
        features: size, number of items in a batch and precision.
        number: type of the numbers that are kept.
        index: whether an index of nearest neighbours is written too.
        num_workers: number of processes that read, see `embedded`.
        origin: where backbone and items come from, for the `.json` beside the file.

    Raises:
        ValueError: the ending is another one, the file was made with other settings, another process is writing it, no item can be read, or
            features are too large for float16.
        ImportError: a package that this needs is missing; the message says how to install it.
    """
    check_what(what)
    _check(out, what=what, index=index)
    settings: dict[str, object] = {
        "weights": fingerprint(encoder),
        "items": source.fingerprint(),
        "count": len(source),
        "what": what,
        "shape": list(features.shape(encoder)),
        "bf16": features.bf16,
        "batch_size": features.batch_size,
        "number": number,
    }
    if source.value_range:
        settings["value_range"] = [list(pair) for pair in source.value_range]
    record, total = beside(out, ".json"), num_batches(source, features)
    if out.exists():
        return _known(out, record, settings, batches=total, index=index)
    folder = beside(out, ".parts")
    with locked(folder, argument="out"):
        rows = RowFile(folder, settings=settings, dtype=number, argument="out")
        resumed = rows.batches_done
        try:
            if resumed < total:
                _fill(rows, encoder, source, what=what, features=features, number=number, num_workers=num_workers)
            if not rows.num_rows:
                raise nothing_to_read(source, rows.reasons.read_text().partition("\t")[2].partition("\n")[0])
            array = rows.complete()
            others = _write_others(out, rows, source, settings, origin=origin, index=index)
            if out.suffix == ".npy":
                array.replace(out)
            else:
                writer = _write_csv if out.suffix == ".csv" else _write_parquet
                writer(out, rows, source, json.dumps(origin | {"what": what}))
        finally:
            rows.close()
        found = Written(out, rows.shape, rows.num_unreadable, others, resumed, total)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _check(out: Path, *, what: str, index: bool) -> None:
    """Refuse what would fail after hours."""
    if out.suffix not in ENDINGS:
        raise ValueError(f"out: {out} given; accepted: a name that ends in {', '.join(ENDINGS)}")
    if what == "patches" and (out.suffix != ".npy" or index):
        raise ValueError(f"out: {out} given for patches{' with an index' if index else ''}; accepted: a .npy file without an index")
    if out.suffix == ".npy" and not out.exists() and not beside(out, ".parts").exists() and out.with_suffix(".csv").exists():
        raise ValueError(f"out: {out.with_suffix('.csv')}, where the names would be written, is there already; give another name")
    if out.suffix == ".parquet":
        require("pyarrow", extra="parquet", why=f"out: {out}")
    if index:
        require_faiss()


def require(package: str, *, extra: str, why: str) -> None:
    """Refuse, with an ImportError, what needs a package that is not installed."""
    if find_spec(package) is None:
        raise ImportError(f"{why}: {package} is not installed; pip install 'glpretrain[{extra}]'")


def _fill(
    rows: RowFile, encoder: Encoder, source: Source, *, what: What, features: Features, number: Number, num_workers: int | None
) -> None:
    """Encode what is missing. What was done is kept, however this ends."""
    try:
        for one in embedded(encoder, source, what=what, features=features, num_workers=num_workers, first=rows.batches_done):
            if number == "float16" and one.features.numel() and one.features.abs().max() > _LARGEST_FLOAT16:
                raise ValueError(f"number: features of {source.named(int(one.index[0]))} or its neighbours exceed float16; give float32")
            lost = [(source.named(index), reason) for index, reason in one.unreadable.items()]
            rows.add(one.features.numpy(), index=one.index.numpy(), labels=one.labels.numpy(), unreadable=lost)
    finally:
        rows.note()


def _write_others(
    out: Path, rows: RowFile, source: Source, settings: dict[str, object], *, origin: dict[str, str], index: bool
) -> tuple[Path, ...]:
    """What lies beside the file; it is there before the file is."""
    others = [beside(out, ".json")]
    if out.suffix == ".npy":
        others.append(out.with_suffix(".csv"))
        _write_csv(out.with_suffix(".csv"), rows, source, "", with_features=False)
    if rows.num_unreadable:
        others.append(unreadable_report(out))
        with part_file(others[-1]) as part:
            shutil.copyfile(rows.reasons, part)
    else:
        unreadable_report(out).unlink(missing_ok=True)  # that of an earlier file
    if index:
        others.append(beside(out, ".faiss"))
        build_index((part for part, *_ in rows.parts()), others[-1])
    write_json(others[0], {"settings": settings, **origin, "rows": list(rows.shape), "unreadable": rows.num_unreadable})
    return tuple(others)


def _known(out: Path, record: Path, settings: dict[str, object], *, batches: int, index: bool) -> Written:
    """A file that is complete; an index that it lacks is added."""
    values = json.loads(record.read_text()) if record.is_file() else {}
    if values.get("settings") != settings:
        raise ValueError(f"out: {out} is there already, made with another backbone, other items or other settings; give another name")
    others: list[Path] = []
    if index and not beside(out, ".faiss").is_file():
        others.append(beside(out, ".faiss"))
        build_index((part for _, part in read_features(out)), others[-1])
    return Written(out, tuple(values["rows"]), values["unreadable"], tuple(others), batches, batches)


def _names(rows: RowFile, source: Source) -> Iterator[tuple[list[str], list[str], np.ndarray]]:
    """Names, classes and features, a part at a time."""
    for numbers, index, labels in rows.parts():
        names = [written_name(source.named(place)) for place in index.tolist()]
        yield names, [written_name(source.classes[int(label)]) if label >= 0 else "" for label in labels.tolist()], numbers


def _write_csv(path: Path, rows: RowFile, source: Source, note: str, *, with_features: bool = True) -> None:
    """A row for every item. Nine digits are enough for every float32."""
    columns = [str(number) for number in range(rows.shape[1])] if with_features else []
    with part_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([FILE, CLASS, *columns])
        for names, classes, numbers in _names(rows, source):
            cells = ([f"{value:.9g}" for value in row] for row in numbers.tolist()) if with_features else ([] for _ in names)
            writer.writerows([name, label, *row] for name, label, row in zip(names, classes, cells, strict=True))


def _write_parquet(path: Path, rows: RowFile, source: Source, note: str) -> None:
    pa, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    numbers = pa.list_(pa.from_numpy_dtype(rows.dtype), rows.shape[1])
    columns = [(FILE, pa.string()), (CLASS, pa.string()), (FEATURES, numbers)]
    schema = pa.schema(columns, metadata={"glpretrain": note})
    with part_file(path) as part, parquet.ParquetWriter(part, schema) as writer:
        for names, classes, found in _names(rows, source):
            for start in range(0, len(names), _GROUP):
                here = slice(start, start + _GROUP)
                flat = pa.FixedSizeListArray.from_arrays(pa.array(found[here].reshape(-1)), rows.shape[1])
                writer.write_table(pa.table([names[here], classes[here], flat], schema=schema), row_group_size=_GROUP)


def read_features(path: Path) -> Iterator[tuple[Sequence[str], np.ndarray]]:
    """Names and Float[B D] of a file of features, a bounded part at a time.

    Raises:
        ValueError: the file is missing, is damaged, or is of another kind.
        ImportError: pyarrow is missing.
    """
    if not path.is_file() or path.suffix not in ENDINGS:
        raise ValueError(f"features: {path} {'is' if path.exists() else 'is missing; accepted:'} no file that `glpretrain embed` wrote")
    readers: dict[str, Callable[[Path], Iterator[tuple[Sequence[str], np.ndarray]]]]
    readers = {".npy": _read_npy, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from readers[path.suffix](path)
    except (OSError, LookupError, StopIteration, ValueError) as error:
        raise ValueError(f"features: {path} cannot be read: {error}") from error


def _read_npy(path: Path) -> Iterator[tuple[Sequence[str], np.ndarray]]:
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if rows.ndim != 2:
        raise ValueError(f"an array of shape {rows.shape}; accepted: a row for every item, as of cls or mean")
    names = path.with_suffix(".csv")
    with names.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        next(lines)
        for start in range(0, len(rows), _GROUP):
            part = np.array(rows[start : start + _GROUP])
            yield [line[0] for _, line in zip(range(len(part)), lines, strict=False)], part


def _read_csv(path: Path) -> Iterator[tuple[Sequence[str], np.ndarray]]:
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        if len(next(lines)) < 3:
            raise ValueError("it holds names only; give the .npy file beside it")
        while part := [line for _, line in zip(range(_GROUP), lines, strict=False)]:
            yield [line[0] for line in part], np.array([line[2:] for line in part], dtype=np.float32)


def _read_parquet(path: Path) -> Iterator[tuple[Sequence[str], np.ndarray]]:
    require("pyarrow", extra="parquet", why=f"features: {path}")
    with import_module("pyarrow.parquet").ParquetFile(path) as file:
        for part in file.iter_batches(_GROUP, columns=[FILE, FEATURES]):
            numbers = part.column(FEATURES)
            yield part.column(FILE).to_pylist(), numbers.flatten().to_numpy(zero_copy_only=False).reshape(len(part), -1)
