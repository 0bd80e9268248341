"""Surfaces of triangles in .off, .ply and .obj files: the corners and the faces, and nothing else.

A file that ends before it holds what its header names is refused, and so is one that goes on behind it, since half a surface would look
like a whole one. No other file that a mesh names (materials, textures) is opened. Left out: points on the surface (`clouds`).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

MESHES = (".off", ".ply", ".obj")
_MOST_HEADER = 2**16  # bytes of the header of a .ply file
_OFF = re.compile(r"\s*(?:ST)?C?(N?)OFF(?![A-Za-z])(.*)")
_PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4", "double": "f8"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}
_PLY_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}
_PLY_CORNERS = ("vertex_indices", "vertex_index")
_CUT = "the file is cut short or damaged"


class Surface(NamedTuple):
    """A surface of triangles. A file that holds points only has no faces."""

    vertices: np.ndarray  # Float[V 3]
    faces: np.ndarray  # Int[F 3], indices of the corners


def read_surface(path: Path) -> Surface:
    """The surface in a file. Faces of more than three corners become a fan of triangles.

    Raises:
        ValueError: the file ends early or is no mesh. Damage may raise other errors.
    """
    readers = {".off": _read_off, ".ply": _read_ply, ".obj": _read_obj}
    return readers[path.suffix.lower()](path.read_bytes())


def _lines(content: bytes) -> list[str]:
    """The lines that hold something, without comments."""
    text = re.sub("#[^\r\n]*", "", content.decode("utf-8-sig", errors="replace"))
    return [line for line in text.splitlines() if line.strip()]


def _check_count(lines: Sequence[str], expected: int, *, what: str) -> None:
    if len(lines) != expected:
        raise ValueError(f"the header names {what}, which take {expected} lines, but {len(lines)} follow: {_CUT}")


def _surface(vertices: np.ndarray, polygons: Sequence[Sequence[int]] | np.ndarray) -> Surface:
    """A surface from its corners and from the corners of its faces, Int[F K] or a list; points and lines among the faces are left out."""
    if isinstance(polygons, np.ndarray):
        fan = [polygons[:, [0, place, place + 1]] for place in range(1, polygons.shape[1] - 1)]
        triangles = np.stack(fan, axis=1) if fan else []
    else:
        triangles = [(face[0], face[place], face[place + 1]) for face in polygons for place in range(1, len(face) - 1)]
    faces = np.array(triangles, dtype=np.int64).reshape(-1, 3)
    if len(faces) and not (faces.min() >= 0 and faces.max() < len(vertices)):
        raise ValueError(f"a face has the corner {faces.min() if faces.min() < 0 else faces.max()} of {len(vertices)} vertices: {_CUT}")
    return Surface(vertices, faces)


def _read_off(content: bytes) -> Surface:
    lines = _lines(content)
    found = _OFF.match(lines[0]) if lines else None
    if found is None:
        raise ValueError("the file does not begin with OFF")
    rest = [found[2], *lines[1:]] if found[2].strip() else lines[1:]  # many files of ModelNet have the numbers behind the word
    num_vertices, num_faces = (int(word) for word in rest[0].split()[:2])
    if num_vertices < 0 or num_faces < 0:
        raise ValueError(f"the header names {num_vertices} vertices and {num_faces} faces")
    _check_count(rest[1:], num_vertices + num_faces, what=f"{num_vertices} vertices and {num_faces} faces")
    rows = [line.split() for line in rest[1 : 1 + num_vertices]]
    smallest = 6 if found[1] else 3  # with normals, or without
    if any(len(row) < smallest for row in rows):
        raise ValueError(f"a vertex has fewer than {smallest} numbers: {_CUT}")
    vertices = np.array([row[:3] for row in rows], dtype=np.float64).reshape(-1, 3)
    return _surface(vertices, [_listed(line.split()) for line in rest[1 + num_vertices :]])


def _listed(words: Sequence[str]) -> list[int]:
    """The numbers of a list that begins with their count. Colours may follow."""
    count = int(words[0])
    if not 0 <= count < len(words):
        raise ValueError(f"a face of {count} corners has {len(words) - 1}: {_CUT}")
    return [int(word) for word in words[1 : 1 + count]]


def _read_obj(content: bytes) -> Surface:
    vertices: list[tuple[float, float, float]] = []
    polygons: list[list[int]] = []
    for line in _lines(re.sub(rb"\\\r?\n", b" ", content)):
        word, *rest = line.split()
        if word == "v":
            x, y, z, *_ = rest
            vertices.append((float(x), float(y), float(z)))
        elif word == "f":
            if len(rest) < 3:
                raise ValueError(f"a face of {len(rest)} corners: {_CUT}")
            # A corner is `vertex/texture/normal`. A negative number counts back from the vertices that were read so far.
            corners = [int(corner.partition("/")[0]) for corner in rest]
            polygons.append([corner - 1 if corner >= 0 else len(vertices) + corner for corner in corners])
    return _surface(np.array(vertices, dtype=np.float64).reshape(-1, 3), polygons)


class _Property(NamedTuple):
    name: str
    dtype: np.dtype
    count: np.dtype | None  # type of the length of a list; None for one number


class _Element(NamedTuple):
    name: str
    length: int
    properties: list[_Property]


# The columns of an element by name: numbers are Float[N]; the corners of faces are Int[N K], or a list of lists.
_Columns = dict[str, np.ndarray | list[list[int]]]


def _read_ply(content: bytes) -> Surface:
    end = re.search(rb"[\r\n]end_header[ \t]*(\r\n|\r|\n)", content[:_MOST_HEADER])
    if not content.startswith(b"ply") or end is None:
        raise ValueError("the file does not begin with the header of a PLY file")
    lines = [line.split() for line in content[: end.start()].decode("utf-8", errors="replace").splitlines()]
    order = next((words[1] for words in lines if len(words) > 1 and words[0] == "format"), "")
    if order not in _PLY_ORDERS:
        raise ValueError(f"the format is {order!r}; accepted: {', '.join(_PLY_ORDERS)}")
    elements = _ply_elements(lines, _PLY_ORDERS[order])
    read = _ply_text(content[end.end() :], elements) if order == "ascii" else _ply_bytes(content, end.end(), elements)
    vertices, polygons = np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64)
    for element, columns in zip(elements, read, strict=True):
        if element.name == "vertex":
            if missing := [name for name in "xyz" if name not in columns]:
                raise ValueError(f"the vertices have no {' and no '.join(missing)}")
            vertices = np.stack([np.asarray(columns[name], dtype=np.float64) for name in "xyz"], axis=1)
        elif element.name == "face":
            polygons = next((columns[name] for name in _PLY_CORNERS if name in columns), polygons)
    return _surface(vertices, polygons)


def _ply_elements(lines: Sequence[Sequence[str]], order: str) -> list[_Element]:
    elements: list[_Element] = []
    for words in lines:
        match words:
            case ["element", name, count]:
                if (length := int(count)) < 0:
                    raise ValueError(f"the header names {count} of {name}")
                elements.append(_Element(name, length, []))
            case ["property", "list", count, dtype, name]:
                elements[-1].properties.append(_Property(name, np.dtype(order + _PLY_TYPES[dtype]), np.dtype(order + _PLY_TYPES[count])))
            case ["property", dtype, name]:
                elements[-1].properties.append(_Property(name, np.dtype(order + _PLY_TYPES[dtype]), None))
            case ["element" | "property", *_]:
                raise ValueError(f"the header has the line {' '.join(words)!r}")
    return [element for element in elements if element.properties]


def _columns(rows: Sequence[Sequence[Sequence[str] | Sequence[float]]], element: _Element) -> _Columns:
    """The columns of an element from the values of each property of each row."""
    columns: _Columns = {}
    for place, own in enumerate(element.properties):
        if own.count is None:
            columns[own.name] = np.array([row[place][0] for row in rows], dtype=np.float64)
        elif own.name in _PLY_CORNERS:
            columns[own.name] = [[int(value) for value in row[place]] for row in rows]
    return columns


def _ply_text(body: bytes, elements: Sequence[_Element]) -> Iterator[_Columns]:
    lines = [line for line in body.decode("utf-8", errors="replace").splitlines() if line.strip()]
    what = " and ".join(f"{element.length} of {element.name}" for element in elements)
    _check_count(lines, sum(element.length for element in elements), what=what)
    start = 0
    for element in elements:
        yield _columns([_ply_row(line.split(), element) for line in lines[start : start + element.length]], element)
        start += element.length


def _ply_row(words: Sequence[str], element: _Element) -> list[Sequence[str]]:
    """The words of each property of one line."""
    row: list[Sequence[str]] = []
    at = 0
    for own in element.properties:
        start, count = (at, 1) if own.count is None else (at + 1, int(words[at]))
        at = start + count
        row.append(words[start:at])
        if count < 0 or at > len(words):
            break
    if at != len(words):
        raise ValueError(f"a line of {element.name} has {len(words)} numbers, which are not those that the header names: {_CUT}")
    return row


def _ply_bytes(content: bytes, at: int, elements: Sequence[_Element]) -> Iterator[_Columns]:
    for element in elements:
        smallest = sum((own.dtype if own.count is None else own.count).itemsize for own in element.properties)
        if element.length * smallest > len(content) - at:
            raise ValueError(f"the header names {element.length} of {element.name}, but {len(content) - at} bytes follow: {_CUT}")
        table = _ply_table(content, at, element)
        if table is not None:
            at += table.nbytes
            columns = {own.name: table[f"{place}"] for place, own in enumerate(element.properties)}
            yield {own.name: columns[own.name][:, 0] if own.count is None else columns[own.name] for own in element.properties}
            continue
        rows: list[list[list[float]]] = []
        for _ in range(element.length):
            row, at = _ply_row_at(content, at, element)
            rows.append([values.tolist() for values in row])
        yield _columns(rows, element)
    if content[at:].strip():
        raise ValueError(f"{len(content) - at} bytes follow behind what the header names: the file is damaged")


def _ply_row_at(content: bytes, at: int, element: _Element) -> tuple[list[np.ndarray], int]:
    """The numbers of each property of one row, and where the next row begins."""
    row: list[np.ndarray] = []
    for own in element.properties:
        count = 1
        if own.count is not None:
            count = int(np.frombuffer(content, own.count, count=1, offset=at)[0])
            at += own.count.itemsize
        if count < 0 or at + count * own.dtype.itemsize > len(content):
            raise ValueError(f"a row of {element.name} has a list of {count} numbers, which does not fit into the file: {_CUT}")
        row.append(np.frombuffer(content, own.dtype, count=count, offset=at))
        at += row[-1].nbytes
    return row, at


def _ply_table(content: bytes, at: int, element: _Element) -> np.ndarray | None:
    """The rows of an element as one array if all of its lists have the length of the first one, as in most files; otherwise None."""
    first = _ply_row_at(content, at, element)[0] if element.length else [np.zeros(1)] * len(element.properties)
    fields: list[tuple[str, np.dtype] | tuple[str, np.dtype, tuple[int]]] = []
    lists: list[tuple[str, int]] = []
    for place, (own, values) in enumerate(zip(element.properties, first, strict=True)):
        if own.count is not None:
            lists.append((f"count {place}", len(values)))
            fields.append((f"count {place}", own.count))
        fields.append((f"{place}", own.dtype, (len(values),)))
    row = np.dtype(fields)
    if at + element.length * row.itemsize > len(content):
        return None
    table = np.frombuffer(content, row, count=element.length, offset=at)
    return table if all((table[name] == length).all() for name, length in lists) else None
