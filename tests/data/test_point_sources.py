"""Clouds from files: every format, folders, stacks, and the layouts of published sets."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import trimesh
from golden import noise

from glpretrain.data import ModelNet40, PointArrays, PointFolder, ScanObjectNN, ShapeNet55, Solids, UnreadableItemError
from glpretrain.data.sources.points.clouds import read_points, sampled_by_area
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
