"""DICOM folders: order, windows, kinds of pixels, what is left out, and that no text of a header gets anywhere."""

import logging
import random
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import counted, damaged, time_limit
from image_files import write_image

from glpretrain.core.listing import say_once
from glpretrain.data import DicomFolder, ImageFolder, UnreadableItemError, source_for
from glpretrain.data.own import source_spec, train_test_parts
from glpretrain.data.sources import saved_listings
from glpretrain.data.sources.images import dicom, dicom_files
from glpretrain.data.sources.images.dicom_files import Scale, read_header

pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGLosslessSV1, RLELossless  # noqa: E402

PATIENT = "Doe^Jane 1931-02-03"
CT, REPORT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.88.11"


def ramp(height: int = 11, width: int = 13, *, low: int = 0, high: int = 4095) -> np.ndarray:
    return np.linspace(low, high, height * width).round().astype(np.int16).reshape(height, width)


def scan(path: Path, array: np.ndarray | None = None, *, syntax: str = ExplicitVRLittleEndian, plain: bool = False, **elements) -> Path:
    """Write a DICOM file; `array` is Int[H W], Int[F H W] with frames=F, or UInt8[H W 3]."""
    array = ramp() if array is None else array
    found = Dataset()
    found.SOPClassUID, found.SOPInstanceUID = CT, "1.2.3"
    found.PatientName, found.PatientID = PATIENT, PATIENT
    found.StudyInstanceUID, found.SeriesInstanceUID = "1.2.3.4", "1.2.3.4.5"
    colours = array.shape[-1] == 3
    frames = array.shape[0] if array.ndim == 3 and not colours else 0
    if frames:
        found.NumberOfFrames = frames
    found.Rows, found.Columns = array.shape[-3:-1] if colours else array.shape[-2:]
    found.SamplesPerPixel, found.PhotometricInterpretation = (3, "RGB") if colours else (1, "MONOCHROME2")
    if colours:
        found.PlanarConfiguration = 0
    bits = array.dtype.itemsize * 8
    found.BitsAllocated, found.BitsStored, found.HighBit = bits, bits, bits - 1
    found.PixelRepresentation = int(array.dtype.kind == "i")
    found.PixelData = array.tobytes() + b"\0" * (array.nbytes % 2)
    for name, value in elements.items():
        setattr(found, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    if plain:  # no preamble, as some archives send files
        found.save_as(path, enforce_file_format=False, implicit_vr=True, little_endian=True)
        return path
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax in (JPEG2000Lossless, RLELossless) else syntax
    if found.file_meta.TransferSyntaxUID != syntax:
        found.compress(syntax, encoding_plugin="pydicom" if syntax == RLELossless else "pylibjpeg")
    found.save_as(path, enforce_file_format=True)
    return path


def transcoded(path: Path) -> None:
    """Write the pixels anew as lossless JPEG, which most archives hold and only GDCM decodes."""
    gdcm = pytest.importorskip("gdcm")
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def at(position: float, **elements) -> dict[str, object]:
    """The elements of an axial slice at this place in mm."""
    return {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [-5, 7, position], **elements}


def values(folder: Path, index: int = 0, **settings) -> torch.Tensor:
    return DicomFolder(folder, channels=1, **settings)[index].values[0]


def test_slices_of_several_series_come_in_the_order_of_their_positions(tmp_path: Path) -> None:
    places = [3, -20, 11, 0.5]
    for number, place in enumerate(places):
        for series in (0, 1):
            array = np.full((5, 7), 10 * int(place + 21) + series, dtype=np.int16)
            scan(tmp_path / f"{number}{series}.dcm", array, SeriesInstanceUID=f"1.9.{9 - series}", **at(place, InstanceNumber=9 - number))
    source = DicomFolder(tmp_path, channels=1, value_range=[0, 1000])
    assert [source.named(index) for index in range(8)] == [
        *("10.dcm", "30.dcm", "00.dcm", "20.dcm"),
        *("11.dcm", "31.dcm", "01.dcm", "21.dcm"),
    ]
    flat = [round(source[index].values.float().mean().item() / 255 * 1000, -1) for index in range(4)]
    assert flat == sorted(flat) and len(set(flat)) == 4
    assert (
        source.fingerprint()
        == DicomFolder(tmp_path, channels=1, value_range=[0, 1000]).fingerprint()
        != DicomFolder(tmp_path).fingerprint()
    )


def test_without_positions_numbers_decide_and_repeats_of_a_position_are_volumes(tmp_path: Path) -> None:
    for name, number in {"a10": 2, "a9": 2, "b": 1, "c": 30}.items():
        scan(tmp_path / "numbers" / f"{name}.dcm", InstanceNumber=number)
    assert [DicomFolder(tmp_path / "numbers").named(index) for index in range(4)] == ["b.dcm", "a9.dcm", "a10.dcm", "c.dcm"]
    for number in range(6):  # three positions, twice
        scan(tmp_path / "times" / f"{number}.dcm", np.full((5, 7), number, np.int16), **at(-(number % 3), InstanceNumber=number))
    source = DicomFolder(tmp_path / "times", stack=3, value_range=[0, 255])
    assert [source[index].values[:, 0, 0].tolist() for index in range(6)] == [
        [2, 2, 1],
        [2, 1, 0],
        [1, 0, 0],
        [5, 5, 4],
        [5, 4, 3],
        [4, 3, 3],
    ]


def test_neighbouring_slices_are_channels_within_their_series_only(tmp_path: Path) -> None:
    for number in range(5):
        array = np.full((5, 7), 10 * number, np.uint8)
        scan(tmp_path / f"{number}.dcm", array, SeriesInstanceUID=f"1.{number // 3}", **at(number))
    source = DicomFolder(tmp_path, stack=3)
    assert [source[index].values[:, 2, 3].tolist() for index in range(5)] == [
        [0, 0, 10],
        [0, 10, 20],
        [10, 20, 20],
        [30, 30, 40],
        [30, 40, 40],
    ]
    assert source.stored(0) is None and DicomFolder(tmp_path).stored(1).way.startswith("dicom 3")
    assert DicomFolder(tmp_path)[1].values[:, 2, 3].tolist() == [10, 10, 10]
    with pytest.raises(ValueError, match="stack is 3 and channels is 1"):
        DicomFolder(tmp_path, channels=1, stack=3)
    scan(tmp_path / "9.dcm", np.zeros((5, 7, 3), np.uint8))
    with pytest.raises(ValueError, match=r"stack is 3, but .*9\.dcm has colours; give stack=1"):
        DicomFolder(tmp_path, stack=3)


def test_a_frame_of_a_file_is_an_item(tmp_path: Path) -> None:
    scan(tmp_path / "a.dcm", np.stack([np.full((5, 7), 40 * frame, np.uint8) for frame in range(3)]))
    scan(tmp_path / "b.dcm", np.full((5, 7), 200, np.uint8))
    source = DicomFolder(tmp_path, channels=1)
    assert [source.named(index) for index in range(4)] == ["a.dcm[0]", "a.dcm[1]", "a.dcm[2]", "b.dcm[0]"]
    assert [int(source[index].values[0, 0, 0]) for index in range(4)] == [0, 40, 80, 200]
    assert len({source.stored(index) for index in range(4)}) == 4 and source.paths == ()
    stacked = DicomFolder(tmp_path, stack=3)
    assert stacked[1].values[:, 0, 0].tolist() == [0, 40, 80] and stacked[3].values[:, 0, 0].tolist() == [200, 200, 200]


def test_settings_of_a_frame_may_be_in_sequences(tmp_path: Path) -> None:
    def window(centre: float) -> Dataset:
        settings, group = Dataset(), Dataset()
        settings.WindowCenter, settings.WindowWidth, settings.VOILUTFunction = centre, 100, "LINEAR_EXACT"
        group.FrameVOILUTSequence = [settings]
        return group

    shared, rescale = Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, -100
    shared.PixelValueTransformationSequence = [rescale]
    frames = np.full((2, 5, 7), 75, np.int16)  # 50 after the rescale
    groups = {"PerFrameFunctionalGroupsSequence": [window(50), window(100)], "SharedFunctionalGroupsSequence": [shared]}
    scan(tmp_path / "a.dcm", frames, **groups)
    source = DicomFolder(tmp_path, channels=1)
    assert [int(source[index].values[0, 0, 0]) for index in range(2)] == [128, 0]


def test_windows_agree_with_pydicom(tmp_path: Path) -> None:
    from pydicom.pixels.processing import apply_modality_lut, apply_windowing

    for number, function in enumerate(("LINEAR", "LINEAR_EXACT", "SIGMOID")):
        settings = {
            "WindowCenter": [40, 7],
            "WindowWidth": [400, 9],
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
            "VOILUTFunction": function,
        }
        path = scan(tmp_path / function / "a.dcm", ramp(low=-200, high=3000), **settings)
        found = pydicom.dcmread(path)
        theirs = apply_windowing(apply_modality_lut(found.pixel_array, found), found)
        low, high = -1024 - 32768, -1024 + 32767  # the range of pydicom's output
        ours = values(path.parent).numpy()
        assert np.abs(ours - (theirs - low) / (high - low) * 255).max() <= 0.51, number
        assert 0 < (ours == 255).mean() < 1 and 0 < (ours == 0).mean() < 1


def test_a_given_window_or_range_replaces_the_one_of_the_file(tmp_path: Path) -> None:
    scan(tmp_path / "a.dcm", ramp(low=0, high=2000), WindowCenter=5, WindowWidth=3, RescaleSlope=1, RescaleIntercept=-1000)
    expected = Scale(-160, 240).bytes_of(ramp(low=0, high=2000).astype(np.float32) - 1000)
    assert np.array_equal(values(tmp_path, window=[40, 400]), expected) and np.array_equal(
        values(tmp_path, value_range=[-160, 240]), expected
    )
    spec = source_spec(tmp_path, "glpretrain.data.DicomFolder", channels=1)
    assert spec.init_args["channels"] == 1
    for settings, message in (
        ({"window": [40, 0]}, r"window is \[40, 0\]; expected \[centre, width\] with a width above 0"),
        ({"window": [40]}, r"window is \[40\]"),
        ({"value_range": [3, 2]}, r"value_range is \[3, 2\]; expected \[low, high\] with low below high"),
        ({"value_range": [3, 4], "window": [3, 4]}, "window and value_range are given"),
        ({"stack": 2}, "stack is 2; expected 1 or 3"),
        ({"labels": "folders"}, "no two folders that hold all files"),
    ):
        with pytest.raises(ValueError, match=message):
            DicomFolder(tmp_path, **settings)


@pytest.mark.parametrize(("bits", "kind"), [(12, "u"), (16, "u"), (16, "i"), (12, "i")])
def test_without_a_window_the_range_of_the_picture_is_shown(bits: int, kind: str, tmp_path: Path) -> None:
    array = ramp(low=-300 if kind == "i" else 5, high=1700).astype(f"{kind}2")
    scan(tmp_path / "a.dcm", array, BitsStored=bits, HighBit=bits - 1)
    shown = values(tmp_path)
    assert (int(shown.min()), int(shown.max())) == (0, 255) and torch.equal(shown.flatten().sort().values, shown.flatten())
    scan(tmp_path / "inverted" / "a.dcm", array, BitsStored=bits, HighBit=bits - 1, PhotometricInterpretation="MONOCHROME1")
    assert torch.equal(values(tmp_path / "inverted"), 255 - shown)


def test_padding_is_black_and_does_not_stretch_the_rest(tmp_path: Path) -> None:
    array = ramp(low=100, high=1100)
    array[0] = -2000
    for name, kind in {"plain": "MONOCHROME2", "inverted": "MONOCHROME1"}.items():
        scan(tmp_path / name / "a.dcm", array, PixelPaddingValue=-2000, PhotometricInterpretation=kind)
        shown = values(tmp_path / name)
        assert (shown[0] == 0).all() and {int(shown[1, 0]), int(shown[-1, -1])} == {0, 255} and len(shown.unique()) > 100
    scan(tmp_path / "none" / "a.dcm", np.full((5, 7), -2000, np.int16), PixelPaddingValue=-2000)
    with pytest.raises(UnreadableItemError, match=r"a\.dcm: its pixels cannot be decoded \(ValueError\)"):
        DicomFolder(tmp_path / "none")[0]


def test_eight_bits_and_colours_stay_as_they_are(tmp_path: Path) -> None:
    grey = (ramp(high=90) + 20).astype(np.uint8)
    colours = np.stack([grey, grey + 50, 255 - grey], -1)
    scan(tmp_path / "grey" / "a.dcm", grey)
    scan(tmp_path / "rgb" / "a.dcm", colours)
    assert np.array_equal(values(tmp_path / "grey"), grey)
    assert np.array_equal(DicomFolder(tmp_path / "rgb")[0].values.permute(1, 2, 0), colours)
    planes = {"PlanarConfiguration": 1, "PixelData": np.ascontiguousarray(colours.transpose(2, 0, 1)).tobytes() + b"\0"}
    scan(tmp_path / "planes" / "a.dcm", colours, **planes)
    assert np.array_equal(DicomFolder(tmp_path / "planes")[0].values.permute(1, 2, 0), colours)
    assert DicomFolder(tmp_path / "rgb", channels=1)[0].values.shape == (1, 11, 13)
    tables = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in ("Red", "Green", "Blue")}
    entries = np.arange(256, dtype=np.uint16)
    for name, table in (("Red", entries), ("Green", 255 - entries), ("Blue", entries // 2)):
        tables[f"{name}PaletteColorLookupTableData"] = (table << 8).astype("<u2").tobytes()
    scan(tmp_path / "palette" / "a.dcm", grey, PhotometricInterpretation="PALETTE COLOR", **tables)
    assert np.array_equal(DicomFolder(tmp_path / "palette")[0].values.permute(1, 2, 0), np.stack([grey, 255 - grey, grey // 2], -1))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLosslessSV1, "no preamble"])
def test_every_way_of_storing_pixels_gives_the_same(syntax: str, tmp_path: Path) -> None:
    if syntax == JPEG2000Lossless:
        pytest.importorskip("openjpeg")
    array = ramp(64, 65).astype(np.uint16)
    written = syntax if syntax in (ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless) else ExplicitVRLittleEndian
    scan(tmp_path / "a.dcm", array, syntax=written, plain=syntax == "no preamble", BitsStored=12, HighBit=11)
    if syntax == JPEGLosslessSV1:
        transcoded(tmp_path / "a.dcm")
        assert pydicom.dcmread(tmp_path / "a.dcm").file_meta.TransferSyntaxUID == syntax
    scan(tmp_path / "b" / "b.dcm", array, BitsStored=12, HighBit=11)
    assert torch.equal(values(tmp_path / "b"), DicomFolder(tmp_path, channels=1)[0].values[0])


def test_a_missing_decoder_is_named_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openjpeg")
    scan(tmp_path / "a.dcm", ramp(64, 64).astype(np.uint16), syntax=JPEG2000Lossless)
    monkeypatch.setattr(dicom_files, "_DECODERS", ())
    needed = r"a\.dcm: compressed as JPEG 2000 .* which needs a package that is not installed: pip install 'glpretrain\[dicom\]'"
    with pytest.raises(UnreadableItemError, match=needed):
        DicomFolder(tmp_path)[0]
    monkeypatch.setattr(dicom, "is_installed", lambda: False)
    with pytest.raises(ImportError, match=r"needs? the package pydicom: pip install 'glpretrain\[dicom\]'"):
        DicomFolder(tmp_path)


def odd_files(folder: Path) -> None:
    """A report, an index, a mask of bits, something damaged, and files of other kinds."""
    scan(folder / "report.dcm", SOPClassUID=REPORT)
    found = pydicom.dcmread(folder / "report.dcm")
    for name in ("Rows", "Columns", "PixelData", "PhotometricInterpretation", "BitsAllocated"):
        delattr(found, name)
    found.save_as(folder / "report.dcm")
    found.DirectoryRecordSequence = []
    found.save_as(folder / "DICOMDIR")
    scan(folder / "mask.dcm", np.zeros((4, 8), np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=bytes(4))
    (folder / "damaged.dcm").write_bytes(b"no scan" * 99)
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "notes.txt").write_text(PATIENT)


def test_files_without_pictures_are_counted_and_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    scan(tmp_path / "IM0001")
    scan(tmp_path / "1.2.840.113619.2")
    odd_files(tmp_path)
    source = DicomFolder(tmp_path)
    assert sorted(path.name for path in source.paths) == ["1.2.840.113619.2", "IM0001"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "2 pictures; left out: 2 damaged DICOM files" in line
    for said in (
        "1 DICOM files without pixels",
        "1 DICOMDIR",
        "1 DICOM files of one bit",
        "1 .txt",
        "damaged.dcm",
        "mask.dcm",
        "report.dcm",
    ):
        assert said in line
    (tmp_path / "none").mkdir()
    odd_files(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no picture in .*none; accepted: files that end in \.dcm"):
        DicomFolder(tmp_path / "none")
    for part in ("train", "val"):
        scan(tmp_path / "parts" / part / "a.dcm")
    with pytest.raises(ValueError, match=r"has parts; give each of them as a source of its own: .*train and .*val"):
        DicomFolder(tmp_path / "parts")


def test_class_folders_are_labels_unless_they_are_patients(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(8):
        scan(tmp_path / "classes" / "ab"[number % 2] / f"{number}.dcm", PatientID=f"p{number // 4}", SeriesInstanceUID=f"1.{number}")
        scan(tmp_path / "patients" / f"p{number // 4}" / f"{number}.dcm", PatientID=f"p{number // 4}")
        scan(tmp_path / "studies" / f"{number}.dcm", PatientID="", StudyInstanceUID=f"1.{number // 4}", SeriesInstanceUID=f"1.{number}")
    source = DicomFolder(tmp_path / "classes")
    assert source.classes == ["a", "b"] and [source[index].label for index in range(8)] == [0] * 4 + [1] * 4
    train, test = train_test_parts(source)
    assert len(set(source.groups)) == 2 and len(train) + len(test) == 8
    patients = DicomFolder(tmp_path / "patients")
    assert patients.classes == [] and patients[0].label == -1 and len(set(patients.groups)) == 2
    assert "each of the 2 folders in" in caplog.text and "so they are no classes; labels='folders'" in caplog.text
    assert DicomFolder(tmp_path / "patients", labels="folders").classes == ["p0", "p1"]
    assert DicomFolder(tmp_path / "classes", labels="none").classes == []
    assert len(set(DicomFolder(tmp_path / "studies").groups)) == 2


def test_a_folder_of_scans_is_recognised(tmp_path: Path) -> None:
    scan(tmp_path / "scans" / "a" / "IM0")
    scan(tmp_path / "scans" / "a" / "IM1.dcm")
    write_image(tmp_path / "scans" / "overview.png")
    write_image(tmp_path / "photos" / "a.png")
    write_image(tmp_path / "photos" / "b.png")
    scan(tmp_path / "photos" / "c.dcm")
    assert source_for(tmp_path / "scans", "image") == "glpretrain.data.DicomFolder"
    assert source_for(tmp_path / "photos", "image") == "glpretrain.data.ImageFolder"
    assert len(ImageFolder(tmp_path / "photos")) == 2 and len(DicomFolder(tmp_path / "scans")) == 2


def test_a_saved_listing_holds_until_a_file_changes_and_has_no_text_of_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dicom, "_LEAST", 1)
    monkeypatch.setattr(saved_listings, "_may_be_kept", lambda walked, started: walked.is_certain)
    monkeypatch.setattr(saved_listings, "_keep_times", lambda folders: True)
    for number in range(3):
        scan(tmp_path / "set" / f"{number}.dcm", **at(number))
    odd_files(tmp_path / "set")
    first = DicomFolder(tmp_path / "set")
    read: list[Path] = []

    def counting(path: Path) -> object:
        read.append(path)
        return read_header(path)

    monkeypatch.setattr(dicom, "read_header", counting)
    assert DicomFolder(tmp_path / "set").fingerprint() == first.fingerprint() and not read
    kept = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert kept and all(b"Doe" not in file.read_bytes() and b"1.2.3.4" not in file.read_bytes() for file in kept)
    scan(tmp_path / "set" / "0.dcm", **at(7))
    assert [DicomFolder(tmp_path / "set").named(index) for index in range(3)] == ["1.dcm", "2.dcm", "0.dcm"] and read


def _items(folder: Path) -> list[str]:
    """What becomes of the items of a folder."""
    try:
        source = DicomFolder(folder, channels=1)
    except ValueError as error:
        return [str(error)]
    outcomes = []
    for index in range(min(len(source), 3)):
        try:
            outcomes.append(f"{source[index].values.shape}")
        except UnreadableItemError as error:
            outcomes.append(str(error))
    return outcomes


def _fuzz(folder: Path, *, count: int, seed: int, caught: Callable[[], str]) -> None:
    draw = random.Random(seed)
    tall = np.stack([ramp()] * 2)
    kinds: list[dict[str, object]] = [
        {},
        {"array": tall},
        {"syntax": RLELossless},
        {"plain": True},
        {"array": np.zeros((5, 7, 3), np.uint8)},
    ]
    seeds = [scan(folder / "whole" / f"{number}.dcm", **at(0), **kind).read_bytes() for number, kind in enumerate(kinds)]
    if util.find_spec("gdcm") is not None:
        transcoded(scan(folder / "whole" / "lossless.dcm", ramp().astype(np.uint16)))
        seeds.append((folder / "whole" / "lossless.dcm").read_bytes())
    with counted("dicom", megabytes=1500) as outcomes:
        for number in range(count):
            path = folder / "one" / f"{number}.dcm"
            path.parent.mkdir(exist_ok=True)
            content = draw.choice(seeds)
            path.write_bytes(damaged(content, draw, heads=(128, 300, len(content) - 400)))
            with time_limit(f"file {number}"):
                said = _items(path.parent)
            text = " ".join(said) + caught()
            assert "Doe" not in text and "1931" not in text, f"file {number}: {text}"
            outcomes["read" if all(line.startswith("torch") for line in said) else "refused"] += 1
            path.unlink()
    assert len(outcomes) == 2


def test_damaged_files_are_read_or_named_and_nothing_is_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    with caplog.at_level(logging.DEBUG):
        _fuzz(tmp_path, count=60, seed=3, caught=lambda: caplog.text)
    warned: Sequence[object] = recwarn.list
    assert capfd.readouterr().err == "" and not warned


@pytest.mark.slow
def test_thousands_of_damaged_scans_are_read_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    _fuzz(tmp_path, count=4000, seed=4, caught=lambda: "")
    assert "Doe" not in caplog.text and capfd.readouterr().err == ""
