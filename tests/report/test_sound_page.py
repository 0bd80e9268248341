"""The page of sounds: spectrograms with time to the right, patches and attention in their order, and the sound itself."""

import base64
import io
import wave as wav
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import MISSING, Browser
from golden import noise
from PIL import Image
from scipy.io import wavfile
from test_report import features_of, stored
from torch.nn import functional

from glpretrain import modalities
from glpretrain.core.fbank import RATE, num_samples
from glpretrain.core.types import Item
from glpretrain.encoders import ViT
from glpretrain.encoders.attention import cls_attention_of_blocks
from glpretrain.report import untrained, write_sound_report
from glpretrain.report.sound_page import drawn_order, wav_url

TIMES, BINS, PATCH = 6, 4, 8  # of patches


def small(**changes: object) -> ViT:
    sizes = {"img_size": [TIMES * PATCH, BINS * PATCH], "patch_size": PATCH, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return untrained(ViT("vit_tiny_patch16_224", **{**sizes, **changes}, mean=[-4.3], std=[9.1], modality="audio"))


def save(path: Path, *, frames: int) -> Path:
    """Noise of 16 bits, louder towards its end."""
    count = num_samples(frames)
    samples = noise(count, name=path.name).numpy() * np.linspace(0.1, 0.9, count)
    wavfile.write(path, RATE, np.round(samples * 32_767).astype(np.int16))
    return path


def samples_of(address: str) -> np.ndarray:
    """Float[S] of the wav file in a data URL."""
    head, _, content = address.partition(",")
    assert head == "data:audio/wav;base64"
    with wav.open(io.BytesIO(base64.b64decode(content))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32_767


def test_the_page_holds_what_the_encoder_computes_in_the_order_of_the_picture(tmp_path: Path) -> None:
    encoder, path = small(), save(tmp_path / "a.wav", frames=70)
    data = stored(write_sound_report({"one": encoder, "two": small(img_size=[32, 32])}, [path], out=tmp_path / "new" / "r.html"))
    sound, view, backbone = data["images"][0], data["views"][0][0], data["backbones"][0]
    assert (backbone["grid"], backbone["size"], backbone["patch"]) == ([BINS, TIMES], [BINS * PATCH, TIMES * PATCH], [PATCH, PATCH])
    assert (data["noun"], data["unit"], sound["name"], sound["extent"]) == ("sound", "cells", "a.wav", "0.49 of 0.71 s")
    whole = torch.from_numpy(wavfile.read(path)[1] / 32_768).float()[None]
    middle = whole[:, 11 * 160 :][:, : num_samples(TIMES * PATCH)]  # 22 frames more than it sees
    np.testing.assert_allclose(samples_of(sound["sound"]), middle[0].numpy(), atol=1e-4)
    audio = modalities.get("audio")
    values = audio.resize(Item(whole, -1, None, None), (1, TIMES * PATCH, BINS * PATCH), fit="crop").values
    items = audio.normalise(values[None], encoder.card)
    with torch.no_grad():
        patches = encoder(items).patches[0]  # [T F D], time first
    # Row by row of the picture, from the highest frequencies down.
    ordered = [time * BINS + BINS - 1 - row for row in range(BINS) for time in range(TIMES)]
    unit = functional.normalize(patches[ordered], dim=-1)
    assert np.abs(features_of(view) @ features_of(view).T - (unit @ unit.T).numpy()).max() < backbone["error"] + 1e-6
    maps = cls_attention_of_blocks(encoder, items, blocks=[0, 1])[:, 0].flatten(2)[:, :, ordered].numpy()  # [L heads N]
    shades = np.frombuffer(base64.b64decode(view["attention"]), np.uint8).reshape(maps.shape)
    peaks = np.array(view["peaks"]).reshape(2, 3, 1)
    assert np.abs(shades / 255 * peaks - maps).max() <= peaks.max() / 255 / 2 + 1e-6
    png = Image.open(io.BytesIO(base64.b64decode(sound["pictures"][backbone["picture"]].partition(",")[2])))
    expected = audio.pictures(items, card=encoder.card)[0, :, :, 0] * 255
    assert png.size == (TIMES * PATCH, BINS * PATCH) and np.abs(np.asarray(png) - expected.numpy()).max() <= 0.51


def test_the_order_turns_time_to_the_right_and_high_frequencies_up() -> None:
    assert drawn_order((3, 2)).tolist() == [1, 3, 5, 0, 2, 4]


def test_a_sound_beyond_full_scale_is_made_less_loud_and_others_are_not() -> None:
    np.testing.assert_allclose(samples_of(wav_url(torch.tensor([[0.5, -2.0]]))), [0.25, -1.0], atol=1e-4)
    np.testing.assert_allclose(samples_of(wav_url(torch.tensor([[0.5, -0.25]]))), [0.5, -0.25], atol=1e-4)


def test_what_cannot_be_shown_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"broken\.wav cannot be read as a sound"):
        write_sound_report({"one": small()}, [tmp_path / "broken.wav"], out=tmp_path / "r.html")
    images = untrained(ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3))
    with pytest.raises(ValueError, match="one is for image; accepted on this page: backbones for audio"):
        write_sound_report({"one": images}, [save(tmp_path / "a.wav", frames=20)], out=tmp_path / "r.html")


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_sound_can_be_played_without_a_network(tmp_path: Path) -> None:
    page = write_sound_report({"one": small()}, [save(tmp_path / "a.wav", frames=70)], out=tmp_path / "r.html")
    with Browser() as browser:
        browser.open(page)
        browser.run("return window.glpretrainReport.ready")
        ready = """
            const sound = document.querySelector("audio");
            return new Promise((answer) => {
              sound.addEventListener("error", () => answer(-1));
              if (sound.readyState) answer(sound.duration);
              else sound.addEventListener("loadedmetadata", () => answer(sound.duration));
            });
        """
        assert browser.run(ready) == pytest.approx(num_samples(TIMES * PATCH) / RATE, abs=0.01)
        assert browser.run("return window.glpretrainReport.prompt(0, 0)") == {"row": 2, "column": 3, "index": 2 * TIMES + 3}
        assert [url for url in browser.requested() if not url.startswith("data:")] == [page.as_uri()] and browser.console() == []
