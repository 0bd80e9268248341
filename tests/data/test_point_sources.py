"""Clouds from files: every format, folders, stacks, and the layouts of published sets."""

import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import trimesh
from golden import noise
from numpy.lib import format as npy

from glpretrain.data import ModelNet40, PointArrays, PointFolder, ScanObjectNN, ShapeNet55, Solids, UnreadableItemError
from glpretrain.data.sources.points.clouds import read_points, sampled_by_area
from glpretrain.data.sources.points.meshes import read_surface
from glpretrain.modalities.points import with_count

CLOUD = noise(20, 3, name="file").numpy()


def write(path: Path, cloud: np.ndarray = CLOUD) -> Path:
    """A cloud in the format of the suffix; a box of three sides for meshes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".npy":
            np.save(path, cloud)
        case ".npz":
            np.savez(path, points=cloud)
        case ".h5":
            with h5py.File(path, "w") as file:
                file["data"] = cloud
        case ".txt":
            np.savetxt(path, np.concatenate([cloud, cloud], axis=1), delimiter=",")
        case _:
            trimesh.creation.box(extents=(1.0, 2.0, 3.0)).export(path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5", ".txt"])
def test_clouds_are_read_as_they_are(suffix: str, tmp_path: Path) -> None:
    points = read_points(write(tmp_path / f"a{suffix}"), num_points=7)
    np.testing.assert_allclose(points[:, :3], CLOUD, atol=1e-6)


@pytest.mark.parametrize("suffix", [".off", ".ply", ".obj"])
def test_meshes_are_sampled_on_their_surface(suffix: str, tmp_path: Path) -> None:
    points = read_points(write(tmp_path / f"a{suffix}"), num_points=4000)
    assert points.shape == (4000, 3)
    on_face = np.isclose(np.abs(points) / np.array([0.5, 1.0, 1.5]), 1.0)
    assert on_face.any(axis=1).all()
    # The two faces across x have 6 of 22 parts of the area: 2.5 standard deviations of 4,000 draws are 0.018.
    assert abs(on_face[:, 0].mean() - 6 / 11) < 0.02
    assert np.array_equal(points, read_points(tmp_path / f"a{suffix}", num_points=4000))


def test_a_ply_without_faces_is_a_cloud(tmp_path: Path) -> None:
    trimesh.PointCloud(CLOUD).export(tmp_path / "a.ply")
    np.testing.assert_allclose(read_points(tmp_path / "a.ply", num_points=3), CLOUD, atol=1e-6)


def test_degenerate_faces_are_never_chosen() -> None:
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [9, 9, 9]], dtype=float)
    points = sampled_by_area(vertices, np.array([[3, 3, 3], [0, 1, 2]]), num_points=50)
    assert (points[:, 2] == 0).all() and (points.sum(axis=1) <= 1).all() and (points >= 0).all()


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.off", "a.ply", "a.obj", "a.stl", "gone.npy"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if not name.startswith("gone"):
        path.write_bytes(b"damaged")
    with pytest.raises(UnreadableItemError, match=name):
        read_points(path, num_points=10)


def cube() -> tuple[np.ndarray, np.ndarray]:
    """Corners of a unit cube and its twelve triangles."""
    box = trimesh.creation.box(extents=(1.0, 1.0, 1.0))
    return np.asarray(box.vertices), np.asarray(box.faces)


def as_text(rows: np.ndarray) -> str:
    return "".join(" ".join(map(str, row)) + "\n" for row in rows.tolist())


def off(header: str = "OFF\n8 12 0\n") -> str:
    vertices, faces = cube()
    return header + as_text(vertices) + as_text(np.insert(faces, 0, 3, axis=1))


def ply(order: str, *, counts: tuple[int, int] = (8, 12)) -> bytes:
    vertices, faces = cube()
    lines = ["ply", f"format {order} 1.0", "comment made by a test", f"element vertex {counts[0]}"]
    lines += [*(f"property double {axis}" for axis in "xyz"), "property uchar red"]
    lines += [f"element face {counts[1]}", "property list uchar int vertex_indices", "end_header", ""]
    head = "\n".join(lines).encode()
    if order == "ascii":
        return head + (as_text(np.insert(vertices.astype(object), 3, 7, axis=1)) + as_text(np.insert(faces, 0, 3, axis=1))).encode()
    sign = "<" if "little" in order else ">"
    rows, corners = np.zeros(8, [("at", f"{sign}f8", 3), ("red", "u1")]), np.zeros(12, [("count", "u1"), ("at", f"{sign}i4", 3)])
    rows["at"], corners["at"], corners["count"] = vertices, faces, 3
    return head + rows.tobytes() + corners.tobytes()


ORDERS = ("ascii", "binary_little_endian", "binary_big_endian")


@pytest.mark.parametrize("order", ORDERS)
def test_a_ply_in_any_order_of_bytes_is_the_cube(order: str, tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(ply(order))
    (tmp_path / "a.off").write_text(off())
    surface = read_surface(tmp_path / "a.ply")
    assert np.array_equal(surface.vertices, cube()[0]) and np.array_equal(surface.faces, cube()[1])
    assert np.array_equal(read_points(tmp_path / "a.ply", num_points=50), read_points(tmp_path / "a.off", num_points=50))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("counts", [(8, 11), (8, 13), (7, 12), (9, 12), (10**12, 12), (8, 10**12), (-1, 12)])
def test_a_ply_whose_header_names_other_counts_is_refused(order: str, counts: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(ply(order, counts=counts))
    with pytest.raises(UnreadableItemError, match=r"a\.ply"):
        read_points(tmp_path / "a.ply", num_points=50)


@pytest.mark.parametrize("order", ORDERS)
def test_a_mesh_that_ends_early_is_refused_wherever(order: str, tmp_path: Path) -> None:
    for name, whole in (("a.ply", ply(order)), ("a.off", off().encode())):
        for length in range(0, len(whole) - 2, 7):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(UnreadableItemError, match=name):
                read_points(tmp_path / name, num_points=50)


def test_a_ply_with_faces_of_many_corners(tmp_path: Path) -> None:
    head = "ply\nformat binary_little_endian 1.0\nelement vertex 5\nproperty float x\nproperty float y\nproperty float z\n"
    head += "element face 2\nproperty list uchar uint vertex_index\nend_header\n"
    vertices = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype="<f4")
    faces = b"\4" + np.arange(4, dtype="<u4").tobytes() + b"\3" + np.array([0, 1, 4], dtype="<u4").tobytes()
    (tmp_path / "a.ply").write_bytes(head.encode() + vertices.tobytes() + faces)
    assert read_surface(tmp_path / "a.ply").faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 1, 4]]


OTHER_HEADERS = (
    *("OFF\n9 12 0\n", "OFF\n8 13 0\n", f"OFF\n{10**12} 12 0\n", "OFF\n8 11 0\n", "OFF\n-1 12 0\n", "OFF\n8\n"),
    *("OFFICE\n8 12 0\n", "NOFF\n8 12 0\n", "4OFF\n8 12 0\n", "OFF BINARY\n8 12 0\n"),
)


@pytest.mark.parametrize(
    "header", ["OFF\n8 12 0\n", "OFF 8 12 0\n", "OFF8 12 0\n", "# made by\nOFF # a cube\n\n8 12 0 # counts\n", "\ufeffOFF\n8 12\n"]
)
def test_headers_of_off(header: str, tmp_path: Path) -> None:
    (tmp_path / "a.off").write_text(off(header).replace("\n3 ", " # before a face\n3 "), encoding="utf-8")
    assert np.array_equal(read_surface(tmp_path / "a.off").faces, cube()[1])
    for other in OTHER_HEADERS:
        (tmp_path / "a.off").write_text(off(other))
        with pytest.raises(UnreadableItemError, match=r"a\.off"):
            read_points(tmp_path / "a.off", num_points=9)


def test_obj_with_vertices_between_faces_and_corners_counted_back(tmp_path: Path) -> None:
    vertices, faces = cube()
    text = "mtllib /etc/passwd\n"
    for number in range(3):
        corners = "".join(f"f {a - 8}/1 {b - 8}//2 \\\n {c - 8}/1/2 # c\n" for a, b, c in faces.tolist())
        text += f"o {number}\n" + "".join(f"v {x + 3 * number} {y} {z} 1 0 0\n" for x, y, z in vertices.tolist()) + "usemtl x\n" + corners
    (tmp_path / "a.obj").write_text(text)
    points = read_points(tmp_path / "a.obj", num_points=600)
    assert np.bincount(np.rint(points[:, 0] / 3).astype(int)).min() > 150  # three cubes, 200 each
    absolute = "".join(f"v {x} {y} {z}\n" for x, y, z in vertices.tolist()) + as_text(faces + 1).replace("\n", "\nf ")
    for end in ("1 2", "1 2 99", "0 1 2", "-9 1 2", "1 2 x"):
        (tmp_path / "b.obj").write_text(absolute.replace("v 0.5 0.5 0.5\n", "v 0.5 0.5 0.5\nf ") + end + "\n")
        with pytest.raises(UnreadableItemError, match=r"b\.obj"):
            read_points(tmp_path / "b.obj", num_points=9)


def test_clouds_in_the_coordinates_of_a_map_keep_their_values(tmp_path: Path) -> None:
    ramp = np.arange(600)
    cloud = np.stack([5 * np.sin(ramp) + 448_000, 5 * np.cos(1.3 * ramp) + 5_411_000, 2 * np.sin(0.7 * ramp) + 120], axis=1)
    np.save(tmp_path / "a.npy", cloud)
    np.save(tmp_path / "b.npy", cloud.astype(">f8"))
    np.savetxt(tmp_path / "c.xyz", cloud, fmt="%.9f")
    write(tmp_path / "d.npz", cloud)
    source = PointFolder(tmp_path)
    expected = (cloud - cloud.mean(axis=0)) / np.linalg.norm(cloud - cloud.mean(axis=0), axis=1).max()
    for index in range(4):
        values = source[index].values
        assert values.dtype == torch.float32 and len(values[:, 0].unique()) == len(np.unique(expected[:, 0].astype(np.float32)))
        np.testing.assert_allclose(values, expected, atol=1e-6)


def test_files_that_are_no_clouds_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        write(tmp_path / "a" / f"{number}.npy")
    write(tmp_path / "a" / "4.txt")
    for name in ("a/._0.npy", ".cache/0.npy", "__MACOSX/0.npy"):
        write(tmp_path / "x.npy").rename((tmp_path / name).parent.mkdir(exist_ok=True) or tmp_path / name)
    for name in ("README.txt", "LICENSE.txt", "a/classes.txt", "a/preview.png"):
        (tmp_path / name).write_text("MIT License\n\nCopyright 2024 1 2 3\n")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "up").symlink_to(tmp_path)
    assert len(PointFolder(tmp_path)) == 5 == len(PointFolder(tmp_path))
    assert len(caplog.records) == 1
    assert "5 clouds; left out: 3 texts without numbers in the first line, such as LICENSE.txt; 1 .png" in caplog.text
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.xyz").write_text("x y z\n1 2 3\n")
    with pytest.raises(ValueError, match=r"no point cloud in .*texts.*1 texts without numbers in the first line, such as a\.xyz"):
        PointFolder(tmp_path / "texts")


@pytest.mark.parametrize(("train", "test"), [("Train", "Val"), ("train", "validation"), ("training", "testing")])
def test_other_names_of_splits(train: str, test: str, tmp_path: Path) -> None:
    for part in (train, test):
        for label in "ab":
            write(tmp_path / part / label / "0.npy")
    source = PointFolder(tmp_path)
    assert list(source.classes) == ["a", "b"] and len(source) == 2 and source.train_test_split() is not None
    for label in ("valid", "broken"):
        write(tmp_path / "classes" / label / "0.npy")
    assert list(PointFolder(tmp_path / "classes").classes) == ["broken", "valid"]


def test_one_bad_cloud_of_a_stack_costs_one_item(tmp_path: Path) -> None:
    clouds = np.tile(CLOUD.astype(np.float64), (3, 1, 1))
    clouds[1, 4, 2] = np.nan
    clouds[2] *= 1e300
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"], file["label"] = clouds, np.arange(3)
    source = PointArrays(tmp_path / "a.h5")
    assert source[0].label == 0
    with pytest.raises(UnreadableItemError, match=r"a\.h5, cloud 1: 1 of 20 points have coordinates that are not finite or too large"):
        source[1]
    with pytest.raises(UnreadableItemError, match=r"a\.h5, cloud 2: 20 of 20"):
        source[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": np.array([0, 1, 10**12])}, "labels: from 0 to 1000000000000"),
        ({"labels": np.array([0.0, 1.0, np.nan])}, "labels: from nan to nan"),
        ({"labels": np.array(["a", "b", "c"])}, "labels: type <U1"),
        ({"labels": np.array([0, 1])}, r"labels: type int64 and shape \(2,\); expected numbers of shape \(3,\)"),
        ({"labels": np.array([0, 1, 2]), "class_names": np.array(["a", "b"])}, "labels: the largest number is 2, and there are 2 names"),
        ({"parts": np.zeros((3, 19), dtype=int)}, r"parts: type int64 and shape \(3, 19\)"),
        ({"points": np.zeros((0, 20, 3))}, r"points of shape \(0, 20, 3\)"),
        ({"points": np.full((3, 20, 3), "a")}, r"points of shape \(3, 20, 3\)"),
    ],
)
def test_fields_of_a_stack_that_do_not_fit_are_named(fields: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"points": np.tile(CLOUD, (3, 1, 1)), **fields})
    with pytest.raises(ValueError, match=message):
        PointArrays(tmp_path / "a.npz")


def header_of_112_gb(path: Path) -> None:
    with path.open("wb") as file:
        npy.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (5 * 10**9, 3)})


def bomb(path: Path, *, method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("points.npy", "w") as member:
        npy.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (2**22, 9)})
        for _ in range(2**22 * 9 // 2**16):
            member.write(bytes(2**19))


@pytest.mark.parametrize(
    "kind",
    [
        *("112 GB.npy", "objects.npy", "archive.npy", "bomb.npz", "bzip2.npz", "header.npz"),
        *("fill.h5", "chunk.h5", "link.h5", "soft.h5", "external.h5", "virtual.h5"),
    ],
)
def test_files_that_claim_or_name_what_is_not_in_them_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["points"] = CLOUD
    match kind:
        case "112 GB.npy":
            header_of_112_gb(path)
        case "objects.npy":
            np.save(path, np.array([[1, 2, 3]], dtype=object), allow_pickle=True)
        case "archive.npy":
            write(tmp_path / "a.npz").rename(path)
        case "bomb.npz":
            bomb(path)
        case "bzip2.npz":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
                archive.writestr("points.npy", b"")
        case "header.npz":
            header_of_112_gb(tmp_path / "a.npy")
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(tmp_path / "a.npy", "points.npy")
        case "external.h5":
            (tmp_path / "secret").write_bytes(bytes(240))
            with h5py.File(path, "w") as file:
                file.create_dataset("points", (10, 3), "f8", external=[(str(tmp_path / "secret"), 0, 240)])
        case _:
            with h5py.File(path, "w") as file:
                if kind == "fill.h5":
                    file.create_dataset("points", (10**10, 3), "f8", chunks=(1000, 3))
                elif kind == "chunk.h5":
                    made = file.create_dataset("points", (1000, 3), "f8", chunks=(1000, 3), compression="gzip")
                    made.id.write_direct_chunk((0, 0), zlib.compress(bytes(2**27), 1))
                elif kind == "virtual.h5":
                    layout = h5py.VirtualLayout((20, 3), "f8")
                    layout[:] = h5py.VirtualSource(other, "points", (20, 3))
                    file.create_virtual_dataset("points", layout)
                else:
                    file["points"] = h5py.ExternalLink(other, "points") if kind == "link.h5" else h5py.SoftLink("/x/points")
                    file["x"] = h5py.ExternalLink(other, "/")
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableItemError, match=kind):
            read_points(path, num_points=9)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize("cloud", [np.zeros((4, 2)), np.zeros(3), np.full((4, 3), np.nan), np.array([object()])])
def test_arrays_that_are_no_cloud_are_named(cloud: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", cloud, allow_pickle=True)
    with pytest.raises(UnreadableItemError, match=r"a\.npy"):
        read_points(tmp_path / "a.npy", num_points=10)


@pytest.mark.parametrize("pattern", ["{part}/{label}/{n}.npy", "{label}/{part}/{n}.npy"])
def test_folders_of_classes_and_splits(pattern: str, tmp_path: Path) -> None:
    for label in ("chair", "mug"):
        for part in ("train", "test"):
            for n in range(2):
                write(tmp_path / pattern.format(part=part, label=label, n=n))
    source = PointFolder(tmp_path)
    assert list(source.classes) == ["chair", "mug"] and len(source) == 4 and source.modality == "points"
    train, test = source.train_test_split()
    assert len(train) == len(test) == 4 and train.classes == source.classes
    assert sorted(train[i].label for i in range(4)) == [0, 0, 1, 1]
    assert len(PointFolder(tmp_path, split="test")) == 4 and len(PointFolder(tmp_path, split="all")) == 8
    assert source[0].values.shape == (20, 3) and source[0].values.norm(dim=1).max() == pytest.approx(1.0)


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    write(tmp_path / "a.npy")
    source = PointFolder(tmp_path, normalise=False)
    assert not source.classes and source[0].label == -1 and source.train_test_split() is None
    torch.testing.assert_close(source[0].values, torch.from_numpy(CLOUD))
    with pytest.raises(ValueError, match="split is 'train'; expected 'all'"):
        PointFolder(tmp_path, split="train")
    with pytest.raises(ValueError, match="is not a folder"):
        PointFolder(tmp_path / "gone")
    with pytest.raises(IndexError):
        source[1]


def test_stacks_with_labels_and_parts(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    clouds = noise(5, 6, 3, name="stack").numpy()
    parts = np.array([[0, 0, 2, 2, -1, 2]] * 5)
    fields = {"train_points": clouds, "train_labels": np.array([0, 1, 1, 0, 1]), "train_parts": parts}
    fields |= {"test_points": clouds[:2], "test_labels": np.array([2, 0]), "test_parts": parts[:2]}
    np.savez(path, **fields, class_names=np.array(["a", "b", "c"]))
    train, test = PointArrays(path).train_test_split()
    assert len(train) == 5 and len(test) == 2 and list(train.classes) == list(test.classes) == ["a", "b", "c"]
    assert list(test.mask_classes) == ["0", "1", "2"] and test.has_masks
    assert train[0].semantic.tolist() == [0, 0, 2, 2, -1, 2]
    instances = train[0].instances
    assert instances[4] == 0 and instances[0] == instances[1] != instances[2] == instances[3] and (instances[:4] > 0).all()
    assert len(PointArrays(path)) == 5 and len(PointArrays(path, split="all")) == 7
    np.savez(tmp_path / "bad.npz", points=clouds[0])
    with pytest.raises(ValueError, match=r"accepted: \(clouds, points, 3\)"):
        PointArrays(tmp_path / "bad.npz")


def test_modelnet40_in_its_three_layouts(tmp_path: Path) -> None:
    lists, stacks, meshes = tmp_path / "lists", tmp_path / "stacks", tmp_path / "meshes"
    for name in ("night_stand_0001", "sofa_0002", "sofa_0003"):
        write(lists / name.rpartition("_")[0] / f"{name}.txt")
    (lists / "modelnet40_shape_names.txt").write_text("night_stand\nsofa\n")
    (lists / "modelnet40_train.txt").write_text("sofa_0002\nnight_stand_0001\n")
    (lists / "modelnet40_test.txt").write_text("sofa_0003\n")
    stacks.mkdir()
    (stacks / "shape_names.txt").write_text("night_stand\nsofa\n")
    for part, labels in (("train", [1, 0]), ("test", [1])):
        with h5py.File(stacks / f"ply_data_{part}0.h5", "w") as file:
            file["data"], file["label"] = np.stack([CLOUD] * len(labels)), np.array(labels)[:, None]
    for name in ("sofa/train/sofa_0002.off", "night_stand/train/night_stand_0001.off", "sofa/test/sofa_0003.off"):
        write(meshes / name)
    for root in (lists, stacks, meshes):
        train, test = ModelNet40(root, split="all", num_points=30).train_test_split()
        assert list(train.classes) == list(test.classes) == ["night_stand", "sofa"]
        assert sorted(train[i].label for i in range(len(train))) == [0, 1] and [test[i].label for i in range(len(test))] == [1]
        assert train[0].values.shape[1] == 3
    with pytest.raises(ValueError, match=r"none of modelnet40_train\.txt"):
        ModelNet40(tmp_path)


def test_shapenet55(tmp_path: Path) -> None:
    for name in ("0269-aa-1", "0269-bb", "0437-cc"):
        write(tmp_path / "shapenet_pc" / f"{name}.npy")
    (tmp_path / "ShapeNet-55").mkdir()
    (tmp_path / "ShapeNet-55" / "train.txt").write_text("0269-aa-1.npy\n0437-cc.npy\n")
    (tmp_path / "ShapeNet-55" / "test.txt").write_text("0269-bb.npy\n")
    source = ShapeNet55(tmp_path, split="all")
    assert [source[i].label for i in range(3)] == [0, 1, 0] and list(source.classes) == ["0269", "0437"]
    assert [len(part) for part in source.train_test_split()] == [2, 1]
    with pytest.raises(ValueError, match=r"train\.txt is missing"):
        ShapeNet55(tmp_path / "shapenet_pc")


def test_scanobjectnn(tmp_path: Path) -> None:
    folder = tmp_path / "main_split"
    folder.mkdir()
    for part, count in (("training", 3), ("test", 2)):
        with h5py.File(folder / f"{part}_objectdataset.h5", "w") as file:
            file["data"], file["label"] = np.stack([CLOUD] * count), np.arange(count)
            file["mask"] = np.tile(np.where(np.arange(20) < 5, -1, 2), (count, 1))
    train, test = ScanObjectNN(tmp_path, split="all").train_test_split()
    assert len(train) == 3 and len(test) == 2 and test[1].label == 1 and len(test.classes) == 15
    assert train[0].instances.tolist() == [0] * 5 + [1] * 15
    with pytest.raises(ValueError, match=r"augmentedrot_scale75\.h5 cannot be read"):
        ScanObjectNN(tmp_path, variant="hardest")


def test_solids_are_a_function_of_the_index() -> None:
    source, again = Solids(40, num_points=64), Solids(400, num_points=64)
    for index in (0, 7, 39):
        one, two = source[index], again[index]
        assert one.label == two.label and torch.equal(one.values, two.values) and torch.equal(one.semantic, two.semantic)
    assert not torch.equal(source[0].values, Solids(40, num_points=64, split="test")[0].values)
    assert not torch.equal(source[0].values, Solids(40, num_points=64, seed=1)[0].values)
    with pytest.raises(IndexError):
        source[40]


def test_solids_have_all_classes_and_parts_that_lie_where_they_should() -> None:
    source = Solids(300, num_points=256)
    items = [source[index] for index in range(len(source))]
    assert {item.label for item in items} == set(range(len(source.classes)))
    for item in items:
        assert (
            item.values.shape == (256, 3) and item.values.isfinite().all() and item.values.norm(dim=1).max() == pytest.approx(1.0, abs=1e-5)
        )
        assert item.semantic.min() >= 0 and item.semantic.max() < len(source.mask_classes)
        assert item.instances.unique().tolist() == list(range(1, 1 + len(item.semantic.unique())))
    tables = [item for item in items if source.classes[item.label] == "table"]
    for item in tables:
        heights = [item.values[item.semantic == source.mask_classes.index(part), 2] for part in ("top", "leg")]
        assert heights[0].min() > heights[1].median()


def test_any_number_of_points_becomes_the_requested_number() -> None:
    item = Solids(3, num_points=64)[1]
    fewer, more = with_count(item, 10), with_count(item, 150)
    rows = {tuple(row) for row in item.values.tolist()}
    assert len({tuple(row) for row in fewer.values.tolist()} & rows) == 10 and len(fewer.semantic) == 10
    assert torch.equal(more.values[:64], item.values) and torch.equal(more.values[64:128], item.values) and len(more.instances) == 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"length": 3, "num_points": 5}, "num_points is 5"),
        ({"length": 3, "split": "val"}, "split is 'val'"),
    ],
)
def test_bad_arguments_of_solids(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Solids(**arguments)
