"""What a file costs that is odd or damaged: at most one item, with its name. And a fuzz of all readers of image files."""

import io
import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tifffile
import torch
from fuzzing import counted, damaged, time_limit
from image_files import write_image, write_map
from PIL import Image

from glpretrain.core.listing import say_once
from glpretrain.data import HuggingFaceImages, ImageFolder, ImageList, MaskedFolder, Subset, UnreadableItemError, VideoFolder
from glpretrain.data.items import Asked, Items, RawItems
from glpretrain.data.sources.images.decoding import decode, decode_mask
from glpretrain.data.sources.images.face_regions import TABLES, read_map
from glpretrain.data.sources.images.heif import register

FAST, SLOW = 300, 30_000  # files of the fuzz
_MEGABYTES = 2000  # that all files together may add: Pillow refuses more than 179 million pixels, which take 10 bytes each


def waves(height: int = 40, width: int = 56, channels: int = 3) -> np.ndarray:
    """UInt8[H W C]."""
    ramp = np.arange(height * width * channels).reshape(height, width, channels)
    return (127 + 120 * np.sin(ramp * 0.013)).astype(np.uint8)


def odd_exif() -> bytes:
    """Orientation 6 and XResolution -1/0, an unsigned rational that Pillow reads but cannot write."""
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    return head + struct.pack("<HHIII", 0x011A, 10, 1, 38, 0) + struct.pack("<ii", -1, 0)


def test_odd_exif_data_cost_nothing(tmp_path: Path) -> None:
    Image.fromarray(waves(40, 56)).save(tmp_path / "a.jpg", exif=odd_exif())
    assert ImageFolder(tmp_path)[0].values.shape == (3, 56, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_every_orientation_is_honoured(orientation: int, ending: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.zeros((40, 56, 3), dtype=np.uint8)
    upright[:16, :24] = 255  # the upper left corner
    # How a camera stores it so that the orientation turns it back.
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2)}
    stored |= {6: np.rot90(upright, 1), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1)}
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(tmp_path / f"a.{ending}", exif=exif)
    values = decode(tmp_path / f"a.{ending}", channels=3).float()
    assert values.shape == (3, 40, 56)
    assert values[:, :16, :24].mean() > 230 and values[:, 24:, 32:].mean() < 25


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf, 3.4028235e38, -3.4028235e38, -9999.0])
def test_missing_values_leave_the_others_as_they_are(missing: float, tmp_path: Path) -> None:
    values = np.linspace(0, 255, 40 * 56, dtype=np.float32).reshape(40, 56)
    tifffile.imwrite(tmp_path / "whole.tif", values)
    values[3, 5] = missing
    tifffile.imwrite(tmp_path / "holes.tif", values)
    whole, holes = (decode(tmp_path / f"{name}.tif", channels=1)[0] for name in ("whole", "holes"))
    assert holes[3, 5] == 0
    whole[3, 5] = 0
    assert torch.equal(whole, holes) and len(holes.unique()) == 256


def test_the_value_that_gdal_marks_as_missing_does_not_stretch_the_others(tmp_path: Path) -> None:
    values = np.linspace(0, 200, 40 * 56, dtype=np.float32).reshape(40, 56)
    values[0] = 99999.0
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(42113, 2, 0, "99999", True)])
    assert decode(tmp_path / "a.tif", channels=1).max() == 255 and len(decode(tmp_path / "a.tif", channels=1).unique()) > 200
    tifffile.imwrite(tmp_path / "b.tif", np.full((40, 56), np.nan, dtype=np.float32))
    with pytest.raises(UnreadableItemError, match=r"b\.tif: no pixel has a value"):
        decode(tmp_path / "b.tif", channels=1)


def test_bands_in_either_order_and_damage_in_one_file(tmp_path: Path) -> None:
    bands = waves(channels=5)
    tifffile.imwrite(tmp_path / "0.tif", bands, compression="zlib", photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "1.tif", bands.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate")
    damaged = bytearray((tmp_path / "0.tif").read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 200] = bytes(200)
    (tmp_path / "2.tif").write_bytes(damaged)
    with (tmp_path / "3.npy").open("wb") as file:
        np.savez(file, a=bands)
    (tmp_path / "4.tif").write_bytes(b"II*\0" + bytes(4))
    (tmp_path / "5.npy").write_bytes(b"")
    source = ImageFolder(tmp_path, channels=5)
    assert torch.equal(source[0].values, source[1].values) and torch.equal(source[0].values, torch.from_numpy(bands).permute(2, 0, 1))
    for index, reason in {2: r"2\.tif: .*decompress", 3: r"3\.npy: an \.npz archive", 4: r"4\.tif: .*pages", 5: r"5\.npy: "}.items():
        with pytest.raises(UnreadableItemError, match=reason):
            source[index]
    with pytest.raises(UnreadableItemError, match=r"4\.tif: "):
        ImageFolder(tmp_path)[4]


def test_a_header_that_promises_too_much_costs_no_memory(tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 400000, 3), }".ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(100))
    start = time.perf_counter()
    with pytest.raises(UnreadableItemError, match=r"a\.npy: "):
        decode(tmp_path / "a.npy", channels=3)
    assert time.perf_counter() - start < 1.0


def test_a_script_in_postscript_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UnreadableItemError, match=r"a\.jpg: no image file that Pillow can read"):
        decode(tmp_path / "a.jpg", channels=3)


def test_a_very_large_jpeg_is_decoded_at_a_reduced_scale(tmp_path: Path) -> None:
    for name, size in {"large": (4096, 4200), "small": (4095, 4200)}.items():
        Image.new("L", size[::-1], 90).save(tmp_path / f"{name}.jpg")
    source = ImageFolder(tmp_path, channels=1)
    assert source[0].values.shape == (1, 2048, 2100) and source[0].values.unique().tolist() == [90]
    assert source[1].values.shape == (1, 4095, 4200)
    assert Subset(source, indices=[1]).reduced(0, side=2047).values.shape == (1, 2048, 2100)
    assert decode(tmp_path / "large.jpg", channels=1).shape == (1, 4096, 4200)  # for masks and faces, whose places must agree


def masked(folder: Path, values: np.ndarray, ending: str = "png") -> MaskedFolder:
    write_image(folder / "images" / "0.png", size=values.shape[:2])
    write_map(folder / "masks" / f"0.{ending}", values)
    return MaskedFolder(folder)


def test_void_is_ignored_only_beside_labels(tmp_path: Path) -> None:
    assert masked(tmp_path / "voc", np.array([[0, 1, 255], [0, 20, 255]]))[0].instances.tolist() == [[0, 1, -1], [0, 20, -1]]
    assert masked(tmp_path / "binary", np.array([[0, 255]]))[0].instances.tolist() == [[0, 255]]
    given = MaskedFolder(tmp_path / "voc", ignore=-1)[0].instances
    assert given.tolist() == [[0, 1, 255], [0, 20, 255]]
    named = MaskedFolder(tmp_path / "binary", mask_classes=["road", "sky"])[0]
    assert named.instances.tolist() == [[0, -1]] and named.semantic.tolist() == [[0, -1]]
    assert MaskedFolder(tmp_path / "binary", offset=1)[0].instances.tolist() == [[1, -1]]


def test_in_videos_255_stays_an_object_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "a" / "frames" / "0.png", size=(1, 3))
    write_map(tmp_path / "a" / "masks" / "0.png", np.array([[0, 1, 255]]))
    assert VideoFolder(tmp_path)[0].masks.tolist() == [[[0, 1, 255]]]
    assert "ignore=255 if it marks no object" in caplog.text


def test_masks_that_hold_no_labels_say_what_they_hold(tmp_path: Path) -> None:
    ramp = np.arange(6).reshape(2, 3)
    with pytest.raises(UnreadableItemError, match=r"0\.png: holds colours; a mask has one number per pixel"):
        masked(tmp_path / "colours", np.stack([ramp, ramp * 2, ramp * 3], -1))[0]
    grey = masked(tmp_path / "grey", np.stack([ramp] * 3, -1))  # a grey mask that was saved with three equal channels
    assert grey[0].instances.tolist() == ramp.tolist()
    assert masked(tmp_path / "capitals", ramp, "PNG")[0].instances.tolist() == ramp.tolist()
    with pytest.raises(ValueError, match="1 of 1 images have no mask"):
        masked(tmp_path / "lossy", ramp, "jpg")
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "mask.png", "JPEG")
    with pytest.raises(UnreadableItemError, match="a JPEG file does not keep labels"):
        decode_mask(tmp_path / "mask.png", size=(2, 3))
    tifffile.imwrite(tmp_path / "mask.tif", ramp.astype(np.float32) / 2)
    with pytest.raises(UnreadableItemError, match="holds fractions"):
        decode_mask(tmp_path / "mask.tif", size=(2, 3))


def test_rows_of_a_hugging_face_dataset_without_an_image_cost_one_item_each(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra huggingface")
    arrow = pytest.importorskip("pyarrow")
    buffer = io.BytesIO()
    Image.fromarray(waves()).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    kinds = {"image": datasets.Image(), "images": datasets.Sequence(datasets.Image()), "label": datasets.ClassLabel(names=["a", "b"])}
    features = datasets.Features(kinds)
    table = arrow.table({"image": [image, None], "images": [[image], [image, image]], "label": [1, None]}, schema=features.arrow_schema)
    datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="made").save_to_disk(str(tmp_path / "set"))
    source = HuggingFaceImages(str(tmp_path / "set"), label="label")
    assert source[0].values.shape == (3, 40, 56) and source[0].label == 1
    with pytest.raises(UnreadableItemError, match=r"set\[1\]: no image in column 'image'"):
        source[1]
    with pytest.raises(ValueError, match=r"column 'images' of .* expected one image per row"):
        HuggingFaceImages(str(tmp_path / "set"), image="images")


def test_a_batch_goes_on_past_a_damaged_file(tmp_path: Path) -> None:
    Image.fromarray(waves()).save(tmp_path / "0.jpg", exif=odd_exif())
    (tmp_path / "1.tif").write_bytes(b"II*\0" + bytes(4))
    Image.fromarray(waves()).save(tmp_path / "2.jpg")
    items = Items(ImageFolder(tmp_path), read=lambda source, index: source[index])
    batch = RawItems(items, prepare=lambda items, keys: {"keys": keys}, draw=lambda keys: {}, seed=0)[Asked(0, [0, 1, 2])]
    assert batch.index.tolist() == [0, 2, 2] and [index for index, _ in batch.unreadable] == [1]


# The fuzz: files of every kind, changed in every way that a disk or a download changes them.


def _seeds() -> dict[str, bytes]:
    """Whole files by their names."""
    seeds: dict[str, bytes] = {}
    image, grey = Image.fromarray(waves()), Image.fromarray(waves(channels=1)[..., 0])
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    options = {"jpg": {"exif": exif}, "png": {"exif": exif}, "webp": {"exif": exif, "quality": 50}, "tif": {"compression": "tiff_lzw"}}
    kinds = ("jpg", "mpo", "png", "webp", "avif", "gif", "bmp", "tif", "jp2", "ppm", "pfm", "tga", "pcx", "qoi", "sgi", "dds", "ico")
    for kind in kinds:
        buffer = io.BytesIO()
        made = grey.convert("F") if kind == "pfm" else image
        made.save(buffer, Image.registered_extensions()[f".{kind}"], **options.get(kind, {}))
        seeds[f"image.{kind}"] = buffer.getvalue()
    wide = Image.fromarray((waves(channels=1)[..., 0].astype(np.uint16)) * 257)
    for name, made, settings in (
        ("progressive.jpg", image, {"progressive": True}),
        ("grey.jpg", grey, {}),
        ("palette.png", image.quantize(16), {}),
        ("labels.png", Image.fromarray(waves(channels=1)[..., 0] % 11), {}),
        ("alpha.png", image.convert("RGBA"), {}),
        ("wide.png", wide, {}),
        ("deflate.tif", image, {"compression": "tiff_adobe_deflate"}),
        ("packed.tif", image, {"compression": "packbits"}),
        ("float.tif", grey.convert("F"), {}),
        ("bits.tif", grey.convert("1"), {"compression": "group4"}),
    ):
        buffer = io.BytesIO()
        made.save(buffer, Image.registered_extensions()[f".{name.partition('.')[2]}"], **settings)
        seeds[name] = buffer.getvalue()
    if register():  # the extra heic
        for name, picture in (("image.heic", image), ("grey.heif", grey)):
            buffer = io.BytesIO()
            picture.save(buffer, "HEIF")
            seeds[name] = buffer.getvalue()
    for name, settings in (("bands.tif", {}), ("bands_zlib.tif", {"compression": "zlib"}), ("bands_tiled.tif", {"tile": (16, 16)})):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, waves(channels=5), photometric="minisblack", planarconfig="contig", **settings)
        seeds[name] = buffer.getvalue()
    for name, array in (
        ("bands.npy", waves(channels=5)),
        ("wide.npy", waves(channels=5).astype(np.uint16)),
        ("map.npy", waves()[..., 0] % 11),
    ):
        buffer = io.BytesIO()
        np.save(buffer, array)
        seeds[name] = buffer.getvalue()
    seeds["list.txt"] = "# images\nimage.jpg\tcat\nsub folder/image.png\tdog\n\nimage.webp bird\n/dev/zero\t\u00e4\n".encode()
    return seeds


def _every_item(path: Path) -> None:
    source = ImageList(path)
    for index in range(len(source)):
        try:
            source[index]
        except UnreadableItemError:
            continue


READERS: dict[str, Callable[[Path], object]] = {
    "colour": lambda path: decode(path, channels=3, side=2048),
    "grey": lambda path: decode(path, channels=1),
    "channels": lambda path: decode(path, channels=5),
    "mask": lambda path: decode_mask(path, size=(40, 56)),
    "regions": lambda path: read_map(path, table=TABLES["lapa"], size=(40, 56)),
    "list": _every_item,
}


def _readers_of(name: str) -> list[str]:
    if name.endswith(".txt"):
        return ["list"]
    if name.startswith(("bands", "wide.npy")):
        return ["channels", "regions"]
    return ["regions", "channels"] if name == "map.npy" else ["colour", "grey", "mask", "regions"]


def _fuzz(folder: Path, *, count: int, seed: int) -> Counter[str]:
    """Read `count` damaged files; what a reader raises other than a `ValueError` that names the file is raised."""
    draw, seeds = random.Random(seed), _seeds()
    for name, content in seeds.items():  # whole files are read
        (folder / name).write_bytes(content)
        for reader in _readers_of(name)[:1]:
            READERS[reader](folder / name)
    with counted("images", megabytes=_MEGABYTES) as outcomes:
        for number in range(count):
            name = draw.choice(list(seeds))
            path = folder / f"{number:05d}_{name}"
            path.write_bytes(damaged(seeds[name], draw))
            reader = draw.choice(_readers_of(name))
            with time_limit(f"{reader} {path}"):
                try:
                    READERS[reader](path)
                    outcomes[f"{reader}: read"] += 1
                except ValueError as error:  # UnreadableItemError, or the ValueError of a list
                    assert path.name in str(error) and "\n" not in str(error), f"{path.name}: {error!r}"
                    outcomes[f"{reader}: refused"] += 1
            path.unlink()
    say_once.cache_clear()
    return outcomes


def test_damaged_files_are_read_or_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    outcomes = _fuzz(tmp_path, count=FAST, seed=14)
    assert outcomes.total() == FAST and len(outcomes) >= 10
    assert capfd.readouterr().err == "" and not recwarn.list, "a reader has written to stderr by itself"


@pytest.mark.parametrize(("compression", "channels"), [("zlib", 3), ("zlib", 5), (None, 3), (None, 5)])
def test_a_damaged_tile_of_a_tiff_file_is_the_reason_and_nothing_else_is_written(
    compression: Literal["zlib"] | None, channels: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tiles.tif"
    pixels = (np.arange(128 * 128 * channels) % 251).astype(np.uint8).reshape(128, 128, channels)
    photometric = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(path, pixels, tile=(64, 64), compression=compression, photometric=photometric, planarconfig="contig")
    assert torch.equal(decode(path, channels=channels), torch.from_numpy(pixels).permute(2, 0, 1))
    content = path.read_bytes()
    if compression is None:
        path.write_bytes(content[: len(content) * 2 // 3])
    else:
        path.write_bytes(content[:-9] + bytes(8) + content[-1:])
    with pytest.raises(UnreadableItemError) as raised:
        decode(path, channels=channels)
    reason = str(raised.value).removeprefix(f"{path}: ")
    assert len(reason) > 20 and "decoder error" not in reason and "\n" not in reason
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_thousands_of_damaged_files_are_read_or_named(tmp_path: Path) -> None:
    outcomes = _fuzz(tmp_path, count=SLOW, seed=15)
    assert outcomes.total() == SLOW and len(outcomes) == 2 * len(READERS)
