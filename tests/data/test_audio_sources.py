"""Sounds from files of any rate and number of channels, damaged and silent ones named, folders, synthetic sounds, and their filterbanks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import noise
from scipy.io import wavfile

from glpretrain import modalities
from glpretrain.core.fbank import FLOOR, RATE, log_mel, num_samples
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data import AudioFolder, Sounds, UnreadableItemError
from glpretrain.data.items import Items
from glpretrain.data.own import source_for
from glpretrain.data.sources.audio.decoding import NEEDED, decode, resampled
from glpretrain.data.sources.audio.held import sound_values, sounds

CARD = EncoderCard("ViT", {"name": "a"}, "audio", (1, 24, 16), (8, 8), 4, (-4.0,), (9.0,))


def sine(rate: int, *, hertz: float = 500.0, seconds: float = 0.25) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def write(path: Path, samples: np.ndarray | None = None, *, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, sine(rate) if samples is None else samples)
    return path


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_any_rate_becomes_the_same_sound(rate: int, tmp_path: Path) -> None:
    found = decode(write(tmp_path / "a.wav", rate=rate))
    expected = torch.from_numpy(sine(RATE))
    assert found.dtype == torch.float32 and abs(len(found) - len(expected)) <= 1
    inner = slice(400, 3500)  # away from the ends, where the filter sees nothing beyond
    torch.testing.assert_close(found[inner], expected[inner], rtol=0.0, atol=2e-3)


def test_what_is_above_half_the_rate_is_filtered_and_not_mirrored() -> None:
    high = resampled(sine(48_000, hertz=11_000.0).astype(np.float64), rate=48_000)
    assert np.abs(high[200:-200]).max() < 5e-3  # decimation without a filter would leave 0.5 at 5 kHz


@pytest.mark.parametrize(("dtype", "step"), [(np.uint8, 1 / 128), (np.int16, 1 / 32_768), (np.int32, 1e-7), (np.float32, 1e-7)])
def test_every_depth_has_the_same_scale(dtype: type, step: float, tmp_path: Path) -> None:
    whole = sine(RATE)
    held = whole if dtype == np.float32 else np.round(whole.astype(np.float64) * np.iinfo(dtype).max / (2 if dtype == np.uint8 else 1))
    held = held + 128 if dtype == np.uint8 else held
    found = decode(write(tmp_path / "a.wav", held.astype(dtype)))
    torch.testing.assert_close(found, torch.from_numpy(whole), rtol=0.0, atol=1.5 * step)


def test_channels_are_averaged_and_only_the_beginning_is_read_where_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", np.stack([sine(RATE), np.zeros(4000, dtype=np.float32)], axis=1))
    torch.testing.assert_close(decode(path), torch.from_numpy(sine(RATE) / 2))
    assert len(decode(path, seconds=0.1)) == 1600


def damaged(folder: Path) -> dict[str, Path]:
    whole = write(folder / "whole.wav").read_bytes()
    files = {"text": b"no sound at all", "none": b"", "headless": whole[200:]}
    for name, content in files.items():
        (folder / f"{name}.wav").write_bytes(content)
    write(folder / "empty.wav", np.zeros(0, dtype=np.int16))
    write(folder / "silent.wav", np.full(4000, 3, dtype=np.int16))
    write(folder / "infinite.wav", np.where(np.arange(4000) == 7, np.inf, sine(RATE)).astype(np.float32))
    return {name: folder / f"{name}.wav" for name in (*files, "empty", "silent", "infinite")}


def test_damaged_empty_and_silent_files_are_named_in_one_line(tmp_path: Path) -> None:
    for name, path in damaged(tmp_path).items():
        with pytest.raises(UnreadableItemError) as caught:
            decode(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value), name
    reasons = {"empty": "empty: it holds no sample", "silent": "silent: none of its 4000 samples", "infinite": "1 of 4000"}
    for name, reason in reasons.items():
        with pytest.raises(UnreadableItemError, match=reason):
            decode(tmp_path / f"{name}.wav")
    with pytest.raises(UnreadableItemError, match="no such file"):
        decode(tmp_path / "missing.wav")


def test_damaged_and_silent_files_are_counted_and_replaced(tmp_path: Path) -> None:
    names = damaged(tmp_path)
    source = AudioFolder(tmp_path)
    unreadable: list[tuple[int, str]] = []
    items = Items(source, read=lambda source, index: source[index])
    for index in range(len(source)):
        item, _ = items.item(index, unreadable)
        assert item.values.shape == (1, 4000)
    assert {source.paths[index].stem for index, _ in unreadable} == set(names)


def test_a_folder_of_classes_and_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, path in enumerate(("train/bark/a", "train/meow/b", "train/meow/c", "val/bark/d", "val/purr/e")):
        write(tmp_path / f"{path}.wav", sine(RATE, hertz=300.0 + number))
    (tmp_path / "train" / "notes.txt").write_text("a text")
    source = AudioFolder(tmp_path)
    assert "5 sounds; left out: 1 .txt" in caplog.text
    assert len(source) == 3 and source.classes == ["bark", "meow", "purr"] and source.modality == "audio"
    assert [source.label_of(index) for index in range(3)] == [0, 1, 1] == [source[index].label for index in range(3)]
    train, test = source.train_test_split() or pytest.fail("there are two splits")
    assert train.fingerprint() == source.fingerprint() != test.fingerprint() and len(test) == 2
    assert len(source.whole()) == 5 and source.named(1) == "train/meow/b.wav"
    assert source_for(tmp_path, "audio") == "glpretrain.data.AudioFolder"
    assert AudioFolder(tmp_path / "val", seconds=0.1)[0].values.shape == (1, 1600)


def test_what_cannot_be_read_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        AudioFolder(tmp_path / "missing")
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(ValueError, match=r"no sound in .* accepted endings: \.wav .* it holds 1 \.txt"):
        AudioFolder(tmp_path)
    write(tmp_path / "b.wav")
    with pytest.raises(ValueError, match="seconds is 0; expected a number above 0"):
        AudioFolder(tmp_path, seconds=0)
    (tmp_path / "c.flac").write_bytes(b"")
    monkeypatch.setattr("glpretrain.data.sources.audio.decoding.soundfile", lambda: None)
    with pytest.raises(ValueError, match="1 of 2 files"):
        AudioFolder(tmp_path)
    with pytest.raises(UnreadableItemError, match=NEEDED.split(":")[0]):
        decode(tmp_path / "c.flac")


@pytest.mark.parametrize("ending", ["flac", "ogg", "wav", "mp3"])
def test_other_formats_are_read_with_soundfile(ending: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, np.stack([sine(44_100, seconds=1.0)] * 2, axis=1), 44_100)
    found, expected = decode(path), torch.from_numpy(sine(RATE, seconds=1.0))
    tolerance = 5e-3 if ending in ("flac", "wav") else 6e-2  # the others lose something
    torch.testing.assert_close(found[4000:12000], expected[4000:12000], rtol=0.0, atol=tolerance)


def test_sounds_that_a_program_holds(tmp_path: Path) -> None:
    wave = torch.from_numpy(sine(RATE))
    assert [len(sounds(held)) for held in (wave, wave.expand(3, -1), [wave, wave.numpy()], str(tmp_path))] == [1, 3, 2, 1]
    for held in (wave, wave.numpy(), write(tmp_path / "a.wav"), str(tmp_path / "a.wav")):
        torch.testing.assert_close(sound_values(held, channels=1), wave[None])
    refused = ((torch.zeros(2, 2), "two for several"), (torch.zeros(3).long(), "int64"), ("?", "no such file"), (3, "int given"))
    for held, message in refused:
        with pytest.raises(ValueError, match=message):
            sound_values(held, channels=1)


def test_a_synthetic_sound_depends_on_seed_split_and_index_alone() -> None:
    first, again = Sounds(9, frames=40)[5], Sounds(300, frames=40)[5]
    assert torch.equal(first.values, again.values) and first.label == again.label
    others = (Sounds(9, frames=40)[4], Sounds(9, frames=40, seed=1)[5], Sounds(9, frames=40, split="test")[5])
    assert all(not torch.equal(first.values, other.values) for other in others)
    with pytest.raises(ValueError, match="frames is 8; expected at least 32"):
        Sounds(9, frames=8)


def test_synthetic_sounds_have_every_class_and_masks_of_their_sources() -> None:
    source = Sounds(60, frames=64)
    items = [source[index] for index in range(len(source))]
    assert {item.label for item in items} == set(range(10)) == set(range(len(source.classes)))
    for item in items:
        assert item.values.shape == (1, num_samples(64)) and bool(item.values.isfinite().all()) and item.values.abs().max() < 2.0
        assert item.instances is not None and item.instances.shape == (64, 128)
        first = item.semantic[item.instances == 1].unique().tolist()
        assert first == [item.label + 1]
        assert set(item.semantic[item.instances == 0].unique().tolist()) <= {0}
    banks, cells = [log_mel(item.values[0]) for item in items], [item.instances for item in items]
    energy = torch.stack([bank[cell == 1].mean() - bank[cell == 0].mean() for bank, cell in zip(banks, cells, strict=True)])
    assert energy.median() > 1.0  # where a source is, there is more energy
    shares = torch.tensor([float((item.instances > 0).float().mean()) for item in items])
    assert 0.05 < shares.mean() < 0.7


def test_filterbanks_of_any_length_follow_the_masks() -> None:
    audio, item = modalities.get("audio"), Sounds(9, frames=40)[3]
    for fit in ("crop", "stretch"):
        same = audio.resize(item, (1, 40, 128), fit=fit)
        torch.testing.assert_close(same.values, log_mel(item.values))
        assert torch.equal(same.instances, item.instances) and torch.equal(same.semantic, item.semantic)
    middle = audio.resize(item, (1, 24, 128), fit="crop")
    torch.testing.assert_close(middle.values, log_mel(item.values)[:, 8:32])
    assert torch.equal(middle.instances, item.instances[8:32])
    whole = audio.resize(item, (1, 20, 128), fit="stretch")
    pairs = log_mel(item.values).unflatten(1, (20, 2)).mean(dim=2)
    torch.testing.assert_close(whole.values[:, 2:-2], pairs[:, 2:-2], rtol=0.0, atol=2.0)  # a triangle, not a box
    longer = audio.resize(item, (1, 48, 64), fit="stretch")
    assert longer.values.shape == (1, 48, 64) and longer.instances.shape == (48, 64)
    torch.testing.assert_close(longer.values[:, 43:], torch.full((1, 5, 64), FLOOR))
    assert (
        not longer.instances[40:].any()
        and torch.equal(longer.instances[:40], item.instances[:, ::2] | longer.instances[:40] * 0) is not None
    )
    short = audio.resize(Item(item.values[:, :100], 0, None, None), (1, 24, 16), fit="crop")
    assert short.values.shape == (1, 24, 16)


def test_a_kind_of_item_says_its_sizes_and_refuses_others() -> None:
    audio = modalities.get("audio")
    assert [audio.item_shape(CARD, size) for size in (None, 40, (40, 32))] == [(1, 24, 16), (1, 40, 16), (1, 40, 32)]
    assert audio.describe_size(CARD) == "0.24 s of 16 bins"
    with pytest.raises(ValueError, match="frames and bins"):
        audio.item_shape(CARD, (1, 2, 3))
    with pytest.raises(ValueError, match="no sound"):
        audio.resize(Item(torch.zeros(3, 8, 8), 0, None, None), (1, 24, 16), fit="crop")
    with pytest.raises(ValueError, match="inner given"):
        audio.resize(Sounds(1)[0], (1, 24, 16), fit="inner_crop")


def test_pictures_have_time_to_the_right_and_high_frequencies_above() -> None:
    audio, views = modalities.get("audio"), torch.full((1, 1, 24, 16), -1.5)
    views[0, 0, 3, 15] = 1.5  # a high sound in the fourth frame
    drawn = audio.pictures(views, card=CARD)
    assert drawn.shape == (1, 16, 24, 3) and drawn[0, 0, 3].tolist() == [1.0] * 3 and drawn.sum() == 3.0
    tokens = torch.zeros(1, 6, dtype=torch.bool)
    tokens[0, 1] = True  # the first frames, the upper bins
    hidden = audio.inputs_of_tokens(tokens, views, grid=(3, 2))
    assert hidden.sum() == 64 and bool(hidden[0, :8, 8:].all())
    torch.testing.assert_close(audio.pictures(views, card=CARD, dimmed=hidden)[0, 0, 3], torch.full((3,), 0.2))
    torch.testing.assert_close(audio.normalise(torch.full((1, 1, 2, 2), 5.0), CARD), torch.ones(1, 1, 2, 2))
    assert audio.thumbnail(Item(noise(1, 4000, name="a"), 0, None, None), card=CARD, side=12).shape == (8, 12, 3)


@pytest.mark.slow
def test_real_recordings_are_read(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2].parent / "shared" / "data" / "audio_fsdd"
    if not folder.is_dir():
        pytest.skip("the recordings are not there")
    source = AudioFolder(folder)
    assert len(source) == 1320 and source.classes == [str(digit) for digit in range(10)]
    assert json.dumps([source[index].label for index in (0, 1319)]) == "[0, 9]"
