"""HEIC files: how they are turned, of which image, how deep; and what is said where the package that reads them is missing."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from image_files import write_image
from PIL import Image

from glpretrain.core.listing import say_once
from glpretrain.data import ImageFolder, UnreadableItemError
from glpretrain.data.sources.images import decoding, heif
from glpretrain.data.sources.images.decoding import decode, decode_mask

COMMAND = r"pip install 'glpretrain\[heic\]'"


@pytest.fixture
def package():
    return pytest.importorskip("pillow_heif", reason="needs the extra heic")


def heic(array: np.ndarray, **settings: object) -> bytes:
    assert heif.register()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "HEIF", **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_a_heic_file_is_honoured_once(orientation: int, package: object, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.zeros((40, 56, 3), dtype=np.uint8)
    upright[:16, :24] = 255
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2)}
    stored |= {6: np.rot90(upright, 1), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1)}
    (tmp_path / "a.heic").write_bytes(heic(stored[orientation], exif=exif.tobytes()))
    values = decode(tmp_path / "a.heic", channels=3).float()
    assert values.shape == (3, 40, 56)
    assert values[:, :16, :24].mean() > 230 and values[:, 24:, 32:].mean() < 25


def test_ten_bits_become_eight(package: object, tmp_path: Path) -> None:
    ramp = np.linspace(0, 1023, 64, dtype=np.uint16).reshape(1, 64, 1).repeat(40, 0).repeat(3, 2)
    image = package.from_bytes(mode="RGB;16", size=(64, 40), data=(ramp << 6).tobytes())
    image.save(tmp_path / "a.heif", quality=-1)
    assert Image.open(tmp_path / "a.heif").info["bit_depth"] == 10
    values = decode(tmp_path / "a.heif", channels=3).float()
    # A lossless file of another colour space rounds by a level or two.
    assert np.abs(values[:, 20].numpy() - ramp[20].T / 1023 * 255).max() < 4


def test_of_several_images_the_primary_one_is_read(package: object, tmp_path: Path) -> None:
    for primary in (0, 1):
        file = package.HeifFile()
        for value in (40, 200):
            file.add_from_pillow(Image.new("RGB", (32, 24), (value, value, value)))
        file.save(tmp_path / f"{primary}.heic", primary_index=primary)
    source = ImageFolder(tmp_path)
    assert [round(source[index].values.float().mean().item() / 40) for index in range(2)] == [1, 5]


def test_a_thumbnail_inside_is_not_taken_for_the_picture(package: object, tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(heic(np.full((300, 400, 3), 90, dtype=np.uint8), thumbnails=[128]))
    assert decode(tmp_path / "a.heic", channels=3, side=64).shape == (3, 300, 400)


def test_a_heic_file_is_known_by_its_beginning(package: object, tmp_path: Path) -> None:
    content = heic(np.full((24, 32, 3), 90, dtype=np.uint8))
    (tmp_path / "IMG_2024.05").write_bytes(content)
    (tmp_path / "upload.jpg").write_bytes(content)
    (tmp_path / "generic.heic").write_bytes(content[:8] + b"mif1" + content[12:])
    (tmp_path / "d.HIF").write_bytes(content)
    Image.new("RGB", (32, 24), (90, 90, 90)).save(tmp_path / "avif.avif")
    avif = (tmp_path / "avif.avif").read_bytes()
    (tmp_path / "generic.avif").write_bytes(avif[:8] + b"mif1" + avif[12:])
    source = ImageFolder(tmp_path)
    assert len(source) == 6
    assert all(abs(source[index].values.float().mean().item() - 90) < 3 for index in range(6))
    write_image(tmp_path / "mask.png")
    (tmp_path / "mask.png").write_bytes(content)
    with pytest.raises(UnreadableItemError, match=r"mask\.png: a HEIF file does not keep labels"):
        decode_mask(tmp_path / "mask.png", size=(24, 32))


def test_without_the_package_every_message_has_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # import fails
    for cached in (heif.register, decoding._formats, say_once):
        cached.cache_clear()
    try:
        content = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(50)
        for name in ("a.heic", "b.HEIC", "c.jpg", "scan"):
            (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "set" / name).write_bytes(content)
        write_image(tmp_path / "set" / "d.png")
        source = ImageFolder(tmp_path / "set")
        assert len(source) == 5 and source[3].values.shape == (3, 20, 30)
        for index in (0, 1, 2, 4):
            with pytest.raises(UnreadableItemError, match=rf"{source.paths[index].name}: HEIC and HEIF files need .*{COMMAND}"):
                source[index]
        assert "set: 2 of 5 images cannot be read. HEIC and HEIF files need the package pillow-heif" in caplog.text
        (tmp_path / "only").mkdir()
        with pytest.raises(ValueError, match=rf"no image in .*\.heic \.heif \.hif\. HEIC and HEIF files need .*{COMMAND}"):
            ImageFolder(tmp_path / "only")
        (tmp_path / "only" / "a.heic").write_bytes(content)
        with pytest.raises(ValueError, match=rf"only: all of its 1 images are HEIC files\. .*{COMMAND}"):
            ImageFolder(tmp_path / "only")
    finally:
        for cached in (heif.register, decoding._formats, say_once):
            cached.cache_clear()
