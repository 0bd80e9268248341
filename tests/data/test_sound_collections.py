"""Sounds from lists, tar shards and columns of Hugging Face datasets: labels, damage, silence, and the words of what is refused."""

import io
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from glpretrain import modalities
from glpretrain.core.fbank import RATE
from glpretrain.core.imports import imported
from glpretrain.data import AudioFolder, HuggingFaceSounds, SoundList, SoundShards, UnreadableItemError
from glpretrain.data.own import source_for


def wav(hertz: float = 500.0, *, rate: int = 22_050, seconds: float = 0.25) -> bytes:
    """A sine of two channels, the second one silent, in 16 bits."""
    sine = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    held = io.BytesIO()
    wavfile.write(held, rate, np.stack([np.round(32_767 * sine), np.zeros(len(sine))], axis=1).astype(np.int16))
    return held.getvalue()


def silence() -> bytes:
    held = io.BytesIO()
    wavfile.write(held, RATE, np.zeros(4000, dtype=np.int16))
    return held.getvalue()


def hertz_of(samples: torch.Tensor) -> float:
    """The loudest frequency of Float[1 S], and its amplitude is checked: half of one half is left of the mean of two channels."""
    assert samples.shape[0] == 1 and abs(samples.shape[1] - 4000) <= 1 and 0.2 < float(samples[0, 500:3500].abs().max()) < 0.3
    return float(torch.fft.rfft(samples[0]).abs().argmax()) * RATE / samples.shape[1]


FILES = {"a/0.wav": wav(400.0), "a/1.wav": wav(800.0, rate=8_000), "b/2.wav": wav(1200.0, rate=48_000), "b/3.wav": silence()}


def write_files(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def check_items(source: AudioFolder | SoundList | SoundShards | HuggingFaceSounds) -> None:
    """The files above, with classes a and b; the last one is silent."""
    assert source.modality == "audio" and list(source.classes) == ["a", "b"] and len(source) == 4
    found = [source[index] for index in range(3)]
    assert [item.label for item in found] == [0, 0, 1]
    assert [hertz_of(item.values) for item in found] == pytest.approx([400.0, 800.0, 1200.0], abs=4.0)
    with pytest.raises(UnreadableItemError, match="silent: none of its 4000 samples"):
        source[3]
    with pytest.raises(IndexError, match="index 4"):
        source[4]


def test_a_list_names_sounds_with_and_without_classes(tmp_path: Path) -> None:
    write_files(tmp_path)
    path = tmp_path / "list.txt"
    path.write_text("# sounds\n\n" + "\n".join(f"{name} {name[0]}" for name in FILES))
    source = SoundList(path)
    check_items(source)
    assert source_for(path, "audio") == "glpretrain.data.SoundList"
    assert source.stored(1).way == "sound" and source.label_of(2) == 1 and source.named(1) == "a/1.wav"
    path.write_text("\n".join(FILES))
    plain = SoundList(path, seconds=0.125)
    assert plain.classes == [] and plain[0].label == -1 and plain[0].values.shape == (1, 2000)
    assert plain.fingerprint() != source.fingerprint() and plain.stored(0).way == "sound of 0.125 s"
    (tmp_path / "b" / "4 low.WAV").write_bytes(wav(200.0))
    path.write_text("b/4 low.WAV\n")
    assert hertz_of(SoundList(path)[0].values) == pytest.approx(200.0, abs=4.0)
    path.write_text("a/0.wav a\nmissing.wav b\n")
    with pytest.raises(UnreadableItemError, match=r"missing\.wav: .*there is no such file"):
        SoundList(path)[1]


def test_wrong_lists_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(ValueError, match=r"SoundList: .*list\.txt is not a file"):
        SoundList(path)
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="lists no sound; expected a path"):
        SoundList(path)
    path.write_text("0.wav a\n1.wav\n")
    with pytest.raises(ValueError, match="1 of 2 items have a class name"):
        SoundList(path)
    path.write_text("0.wav\n1.mp3\n")
    with pytest.raises(ValueError, match=r"SoundList: seconds is -1"):
        SoundList(path, seconds=-1)
    monkeypatch.setattr("glpretrain.data.sources.audio.decoding.soundfile", lambda: None)
    with pytest.raises(ValueError, match=r"1 of 2 files cannot be read: .*glpretrain\[audio\]"):
        SoundList(path)


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_shards_hold_sounds_with_labels(ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members: dict[str, bytes] = {}
    for name, content in FILES.items():
        stem = name.replace("/", "-").removesuffix(".wav")
        members |= {f"{stem}.wav": content, f"{stem}.cls": name[0].encode(), f"{stem}.txt": b"a text"}
    write_shard(tmp_path / f"0.{ending}", members | {"note.txt": b"."})
    source = SoundShards(tmp_path, unpack_to=str(tmp_path / "room"))
    check_items(source)
    assert "SoundShards" in caplog.text and "1 of 5 samples hold no sound" in caplog.text
    assert source_for(tmp_path, "audio") == "glpretrain.data.SoundShards" and source.shard_starts.tolist() == [0]
    assert source.named(2) == f"0.{ending}:b-2.wav" and source.stored(2).way.startswith("sound at [") and source.label_of(2) == 1
    assert SoundShards(tmp_path, seconds=0.125, unpack_to=str(tmp_path / "room"))[0].values.shape == (1, 2000)


def test_a_damaged_member_is_named_and_another_key_is_chosen(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "a.tar", {"0.left.wav": wav(400.0), "0.right.wav": wav(900.0), "1.left.wav": b"RIFF", "1.right.wav": wav()}
    )
    with pytest.raises(
        ValueError, match=r"SoundShards: sample .* holds 2 sounds: left\.wav, right\.wav.* give sound_key, such as 'left\.wav'"
    ):
        SoundShards(path)
    source = SoundShards(path, sound_key="left.wav")
    assert hertz_of(source[0].values) == pytest.approx(400.0, abs=4.0)
    assert hertz_of(SoundShards(path, sound_key="right.wav")[0].values) == pytest.approx(900.0, abs=4.0)
    with pytest.raises(UnreadableItemError, match=r"a\.tar:1\.left\.wav: "):
        source[1]
    with pytest.raises(ValueError, match=r"SoundShards: no sound in the 1 shards .*sound_key='flac'"):
        SoundShards(path, sound_key="flac")
    with pytest.raises(ValueError, match=r"SoundShards: unpack_gb is 0"):
        SoundShards(path, unpack_gb=0)


def test_shards_are_read_without_soundfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glpretrain.data.sources.audio.decoding.soundfile", lambda: None)
    path = write_shard(tmp_path / "a.tar", {"0.wav": wav(400.0), "1.flac": b"fLaC"})
    assert hertz_of(SoundShards(path)[0].values) == pytest.approx(400.0, abs=4.0)
    with pytest.raises(UnreadableItemError, match=r"glpretrain\[audio\]"):
        SoundShards(path)[1]


class FakeFeature:
    """A column of files."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class FakeValue:
    """A column of plain values, which may be paths."""


class FakeLabels:
    """A column of classes."""

    names = ("a", "b")


class FakeDataset:
    """What `Column` uses of a dataset of the package `datasets`."""

    def __init__(self, rows: list[dict], features: dict[str, object]) -> None:
        self._rows, self.features, self.column_names = rows, features, list(features)

    def cast_column(self, name: str, feature: object) -> "FakeDataset":
        assert name == "audio" and getattr(feature, "decode", None) is False
        return self

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return self._rows[index]


def rows(folder: Path) -> list[dict]:
    """The files above: two of them as bytes, two as paths."""
    write_files(folder)
    held = [{"bytes": FILES[name], "path": None if number else "0.wav"} for number, name in enumerate(list(FILES)[:2])]
    held += [{"bytes": None, "path": str(folder / name)} for name in list(FILES)[2:]]
    return [{"audio": audio, "label": int(name[0] == "b")} for audio, name in zip(held, FILES, strict=True)]


def test_a_column_of_sounds_is_read_by_its_bytes_and_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(Audio=FakeFeature, Image=FakeFeature, Value=FakeValue, ClassLabel=FakeLabels, DatasetDict=dict)
    features = {"audio": package.Audio(), "label": package.ClassLabel(), "length": "a number"}
    made = FakeDataset([*rows(tmp_path)], features)
    package.load_dataset = lambda path: {"train": made}
    monkeypatch.setitem(sys.modules, "datasets", package)
    check_items(HuggingFaceSounds("name/of-it", label="label"))
    monkeypatch.setattr("glpretrain.data.sources.audio.decoding.soundfile", lambda: None)
    check_items(HuggingFaceSounds("name/of-it", label="label"))
    made._rows[1]["audio"] = None
    with pytest.raises(UnreadableItemError, match=r"name/of-it\[1\]: .*no sound in column 'audio'"):
        HuggingFaceSounds("name/of-it")[1]
    for wrong, message in (
        ({"split": "dev"}, "no split 'dev'"),
        ({"audio": "sound"}, "no column 'sound'"),
        ({"audio": "length"}, "one sound"),
    ):
        with pytest.raises(ValueError, match=message):
            HuggingFaceSounds("name/of-it", **wrong)


def test_a_saved_column_of_the_package_itself_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra huggingface")
    arrow = pytest.importorskip("pyarrow")
    features = datasets.Features({"audio": datasets.Audio(), "label": datasets.ClassLabel(names=["a", "b"])})
    held = {name: [row[name] for row in rows(tmp_path / "files")] for name in ("audio", "label")}
    table = arrow.table(held, schema=features.arrow_schema)
    datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="made").save_to_disk(str(tmp_path / "set"))
    check_items(HuggingFaceSounds(str(tmp_path / "set"), label="label"))


def test_the_kind_of_item_finds_the_source_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    write_files(tmp_path / "sounds")
    assert source_for(tmp_path / "sounds", "audio") == "glpretrain.data.AudioFolder"
    with pytest.raises(ValueError, match=r"accepted: .*\.tar.*; a list of sounds .*; a folder of sounds"):
        source_for(tmp_path / "sounds" / "a" / "0.wav", "audio")
    assert [imported(name).__name__ for name in modalities.get("audio").own_sources] == ["SoundShards", "SoundList", "AudioFolder"]
