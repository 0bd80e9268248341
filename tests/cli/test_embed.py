"""`glpretrain embed` and `glpretrain neighbours`: names, formats, damaged files, and work that is interrupted."""

import csv
import importlib
import json
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from embed_parts import COUNT, backbone, picture, write_photos
from image_files import write_map

from glpretrain import load_backbone
from glpretrain.cli import main
from glpretrain.use import files, index, row_file
from glpretrain.use.files import read_features

NAMES = [f"{'ab'[number % 2]}/{number:02d}.png" for number in (*range(0, COUNT, 2), *range(1, COUNT, 2))]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    backbone(tmp_path / "backbone")
    return tmp_path


def embed(*options: str) -> int:
    return main(["embed", "backbone", "photos", "--batch_size", "4", *options])


def csv_rows(path: str) -> list[list[str]]:
    with Path(path).open(newline="") as file:
        return list(csv.reader(file))


def test_rows_are_the_features_of_the_named_pictures_in_order(here: Path) -> None:
    assert embed("--out", "f.npy") == 0
    rows, found = csv_rows("f.csv"), np.load("f.npy")
    assert rows == [["file", "class"], *([name, name[0]] for name in NAMES)]
    encoder = load_backbone("backbone")
    with torch.no_grad():
        by_hand = torch.cat([encoder(encoder.transform(here / "photos" / name)).cls for name in NAMES])
    assert found.dtype == np.float32 and np.allclose(found, by_hand.numpy(), atol=5e-5)  # batches of other sizes sum in another order
    assert sorted(path.name for path in here.iterdir()) == ["backbone", "f.csv", "f.npy", "f.npy.json", "photos"]


def test_every_format_holds_the_same_numbers(here: Path) -> None:
    embed("--out", "f.npy")
    embed("--out", "g.csv")
    expected = np.load("f.npy")
    ((names, rows),) = read_features(Path("g.csv"))
    assert names == NAMES and np.array_equal(rows, expected)
    assert csv_rows("g.csv")[1][:2] == ["a/00.png", "a"]
    parquet = pytest.importorskip("pyarrow.parquet")
    embed("--out", "h.parquet")
    table = parquet.read_table("h.parquet")
    assert table.column_names == ["file", "class", "features"] and table["class"].to_pylist() == [name[0] for name in NAMES]
    assert json.loads(table.schema.metadata[b"glpretrain"])["folder"] == str(here / "photos")
    ((names, rows),) = read_features(Path("h.parquet"))
    assert names == NAMES and np.array_equal(rows, expected)


def test_patches_are_a_mapped_array_of_either_precision(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed("--out", "p.npy", "--what", "patches")
    embed("--out", "h.npy", "--what", "patches", "--number", "float16")
    embed("--out", "m.npy", "--what", "mean")
    patches, half = np.load("p.npy", mmap_mode="r"), np.load("h.npy", mmap_mode="r")
    assert patches.shape == half.shape == (COUNT, 16, 48) and half.dtype == np.float16
    assert "h.npy: float16 23 x 16 x 48" in capsys.readouterr().out
    assert np.array_equal(half, patches.astype(np.float16))
    assert np.allclose(np.load("m.npy"), patches.mean(axis=1), atol=5e-5)


def test_both_parts_of_a_divided_folder_are_read(here: Path) -> None:
    for part, numbers in (("train", range(4)), ("val", range(4, 6))):
        for number in numbers:
            write_map(here / "divided" / part / "ab"[number % 2] / f"{number}.png", picture(number))
    assert main(["embed", "backbone", "divided", "--out", "d.npy"]) == 0
    names = ["train/a/0.png", "train/a/2.png", "train/b/1.png", "train/b/3.png", "val/a/4.png", "val/b/5.png"]
    assert csv_rows("d.csv")[1:] == [[name, name.split("/")[1]] for name in names]


def test_items_of_shards_and_lists_have_names(here: Path) -> None:
    with tarfile.open("photos.tar", "w") as shard:
        for name in NAMES[:3]:
            shard.add(f"photos/{name}", arcname=name)
    assert main(["embed", "backbone", "photos.tar", "--out", "t.npy"]) == 0
    assert [row[0] for row in csv_rows("t.csv")[1:]] == [f"photos.tar:{name}" for name in NAMES[:3]]
    Path("list.txt").write_text("".join(f"photos/{name} {name[0]}\n" for name in reversed(NAMES[-3:])))
    assert main(["embed", "backbone", "list.txt", "--out", "l.npy"]) == 0
    assert csv_rows("l.csv")[1:] == [[f"photos/{name}", name[0]] for name in reversed(NAMES[-3:])]


def test_a_damaged_picture_costs_a_line_and_is_listed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/00.png", "b/13.png"):
        (here / "photos" / name).write_bytes(b"damaged")
    assert embed("--out", "f.npy") == 0
    assert "2 of 23 items cannot be read: f_unreadable.txt" in capsys.readouterr().out
    lines = [line.split("\t") for line in Path("f_unreadable.txt").read_text().splitlines()]
    assert [name for name, _ in lines] == ["a/00.png", "b/13.png"] and "no image file that Pillow can read" in lines[0][1]
    assert [row[0] for row in csv_rows("f.csv")[1:]] == [name for name in NAMES if name not in ("a/00.png", "b/13.png")]
    assert len(np.load("f.npy")) == COUNT - 2
    for path in (here / "photos").rglob("*.png"):
        path.write_bytes(b"damaged")
    assert embed("--out", "g.npy") == 2
    assert "none of 23 items can be read" in capsys.readouterr().err and not Path("g.npy").exists()


def killed_after(batches: int, *options: str) -> None:
    """An `embed` in a process of its own that is killed in the middle of a batch, after the state was noted."""
    add, done = row_file.RowFile.add, []

    def counted(self: row_file.RowFile, *arguments: object, **named: object) -> None:
        add(self, *arguments, **named)  # pyright: ignore[reportArgumentType]
        done.append(1)
        if len(done) == batches:
            self._rows.write(b"half a row")
            self._rows.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    row_file.RowFile.add, row_file._EVERY = counted, 0.0  # pyright: ignore[reportAttributeAccessIssue]
    embed(*options)


@pytest.mark.parametrize("name", ["f.npy", "f.csv", "f.parquet"])
def test_a_killed_command_goes_on_to_the_same_bytes(here: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (here / "photos" / "a" / "00.png").write_bytes(b"damaged")
    embed("--out", f"whole/{name}")
    process = multiprocessing.get_context("fork").Process(target=killed_after, args=(3, "--out", f"cut/{name}"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not Path("cut", name).exists() and Path("cut", f"{name}.parts", "state.json").is_file()
    capsys.readouterr()
    assert embed("--out", f"cut/{name}") == 0
    assert "3 of 6 batches were there before" in capsys.readouterr().out
    whole, cut = ({path.name: path.read_bytes() for path in Path(folder).iterdir()} for folder in ("whole", "cut"))
    assert whole == cut and name in cut and "f_unreadable.txt" in cut
    assert embed("--out", f"cut/{name}") == 0
    assert f"cut/{name} is complete already" in capsys.readouterr().out


def test_what_was_begun_with_other_settings_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_after, args=(2, "--out", "f.npy"))
    process.start()
    process.join()
    assert embed("--out", "f.npy", "--what", "mean", "--bf16") == 2
    assert "f.npy.parts was begun with other settings (bf16, what); give the same ones, or remove it" in capsys.readouterr().err
    write_map(here / "photos" / "a" / "new.png", picture(50))
    assert embed("--out", "f.npy") == 2
    assert "(count, items)" in capsys.readouterr().err
    Path("f.npy.parts/state.json").write_text("{")
    assert embed("--out", "f.npy") == 2
    assert "state.json is damaged; remove f.npy.parts and begin again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "f.txt"], "out: f.txt given; accepted: a name that ends in .parquet, .npy, .csv"),
        (["--out", "f.csv", "--what", "patches"], "out: f.csv given for patches; accepted: a .npy file without an index"),
        (["--out", "photos/f.npy"], "out: photos/f.npy lies in photos"),
        (["--out", "f.npy", "--size", "33"], "33"),
        (["--out", "f.npy", "--batch_size", "0"], "features.batch_size: 0; accepted: a positive number"),
        (["--out", "taken.npy"], "out: taken.csv, where the names would be written, is there already; give another name"),
        (["--out", "taken.csv"], "out: taken.csv is there already, made with another backbone, other items or other settings"),
    ],
)
def test_mistakes_cost_one_line_and_no_work(here: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken.csv").write_text("mine")
    assert embed(*options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and Path("taken.csv").read_text() == "mine"
    assert not list(here.glob("*.parts"))


@pytest.mark.parametrize(("package", "options"), [("pyarrow", ["--out", "f.parquet"]), ("faiss", ["--out", "f.npy", "--index"])])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    here: Path, package: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find(name: str) -> object:
        return None if name == package else importlib.util.find_spec(name)

    monkeypatch.setattr(files, "find_spec", find)
    monkeypatch.setattr(index, "find_spec", find)
    assert embed(*options) == 2
    extra = {"pyarrow": "parquet", "faiss": "index"}[package]
    assert f"{package} is not installed; pip install 'glpretrain[{extra}]'" in capsys.readouterr().err


def found_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main(["neighbours", *arguments]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line[:2] in ("0.", "1.", "-0")]


def test_a_picture_is_its_own_nearest_neighbour(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed("--out", "f.csv")
    ((names, rows),) = read_features(Path("f.csv"))
    found = found_by(capsys, "f.csv", "photos/b/07.png", "--k", "4")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ unit[names.index("b/07.png")]
    assert found == [f"{cosines[place]:.4f}  {names[place]}" for place in np.argsort(-cosines, kind="stable")[:4]]
    assert found[0] == "1.0000  b/07.png"


def test_an_index_finds_what_a_search_finds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    embed("--out", "f.npy", "--index")
    assert Path("f.npy.faiss").is_file()
    for name in ("a/00.png", "b/07.png"):
        by_index, exact = (found_by(capsys, "f.npy", f"photos/{name}", *options) for options in ([], ["--exact"]))
        assert [line.split()[1] for line in by_index] == [line.split()[1] for line in exact] and by_index[0] == f"1.0000  {name}"
    Path("f.npy.faiss").unlink()
    assert embed("--out", "f.npy", "--index") == 0 and Path("f.npy.faiss").is_file()  # added to what is complete
    Path("f.npy.faiss").write_bytes(b"damaged")
    assert main(["neighbours", "f.npy", "photos/a/00.png"]) == 2
    assert "is no index that faiss reads; remove it" in capsys.readouterr().err


def test_a_contact_sheet_shows_the_query_and_its_neighbours(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed("--out", "f.csv")
    assert main(["neighbours", "f.csv", "photos/b/07.png", "--k", "7", "--picture", "sheet.png"]) == 0
    assert "sheet.png: the query and 7 neighbours" in capsys.readouterr().out
    assert Path("sheet.png").read_bytes().startswith(b"\x89PNG")
    (here / "photos").rename(here / "moved")
    assert main(["neighbours", "f.csv", "moved/b/07.png", "--picture", "again.png", "--folder", "moved"]) == 0
    assert Path("again.png").is_file()


def test_features_of_another_backbone_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed("--out", "f.csv")
    encoder = load_backbone("backbone")
    with torch.no_grad():
        next(encoder.parameters()).add_(1.0)
    from glpretrain.weights import export

    export(encoder, "other")
    assert main(["neighbours", "f.csv", "photos/a/00.png", "--backbone", "other"]) == 2
    assert "f.csv was made by a backbone with other weights" in capsys.readouterr().err
    assert main(["neighbours", "f.csv", "photos/a/missing.png"]) == 2
    assert "missing.png: there is no such file" in capsys.readouterr().err
    Path("f.csv.json").unlink()
    assert main(["neighbours", "f.csv", "photos/a/00.png"]) == 2
    assert "f.csv.json, which `glpretrain embed` writes beside f.csv, is missing or damaged" in capsys.readouterr().err
