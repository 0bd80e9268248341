"""Log-mel filterbanks against torchaudio's Kaldi-compatible ones, and what must be true of any."""

import pytest
import torch
from golden import load
from torch import Tensor

from glpretrain.core.fbank import FLOOR, log_mel, num_frames, num_samples

GOLDEN = load("kaldi_fbank")["results"]


def sound(rate: int, *, seconds: float = 0.3) -> Tensor:
    """The formula behind the numbers."""
    t = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    swept = 0.4 * torch.sin(2 * torch.pi * (300 + 900 * t) * t)
    fading = 0.1 * torch.sin(2 * torch.pi * 2500 * t) * torch.exp(-3 * t)
    return (swept + fading + 0.02 * torch.sin(12345.6 * torch.sin(7919 * t))).float()


@pytest.mark.parametrize(("rate", "bins"), [(16_000, 128), (16_000, 64), (8_000, 40), (44_100, 128), (32_000, 128)])
def test_the_filterbank_is_that_of_torchaudio(rate: int, bins: int) -> None:
    expected = GOLDEN[f"{rate}_{bins}"]
    found = log_mel(sound(rate), num_bins=bins, rate=rate)
    assert list(found.shape) == expected["shape"]
    rows = found[[0, len(found) // 2, len(found) - 1]]
    # Both are computed in float32; a logarithm of a small energy shows the rounding of the transform, which differs between processors.
    torch.testing.assert_close(rows, torch.tensor(expected["rows"]), rtol=1e-5, atol=1e-4)
    assert found.double().mean().item() == pytest.approx(expected["mean"], abs=1e-5)
    assert found.double().norm().item() == pytest.approx(expected["norm"], rel=1e-6)


def test_silence_is_the_floor() -> None:
    assert GOLDEN["silence"] == pytest.approx(FLOOR, abs=1e-5)
    torch.testing.assert_close(log_mel(torch.zeros(2, 1600)), torch.full((2, 8, 128), FLOOR))


def test_frames_and_samples_are_counted_as_torchaudio_does() -> None:
    for samples, frames in GOLDEN["frames"].items():
        assert num_frames(int(samples)) == frames == log_mel(torch.zeros(int(samples)), num_bins=16).shape[0]
    for frames in (1, 2, 592):
        assert num_frames(num_samples(frames)) == frames and num_frames(num_samples(frames) - 1) == frames - 1


def test_a_batch_is_its_sounds_one_by_one() -> None:
    sounds = torch.stack([sound(16_000), 0.3 * sound(16_000).flip(0)])
    together = log_mel(sounds.expand(3, 2, -1))
    for number, one in enumerate(sounds):
        torch.testing.assert_close(together[:, number], log_mel(one).expand(3, -1, -1))


def test_a_constant_changes_nothing_and_a_factor_shifts() -> None:
    whole = log_mel(sound(16_000))
    kept = whole > FLOOR + 4.0  # away from the floor, where nothing can be shifted down
    torch.testing.assert_close(log_mel(sound(16_000) + 0.25)[kept], whole[kept], rtol=0.0, atol=2e-2)
    torch.testing.assert_close(log_mel(2.0 * sound(16_000))[kept], (whole + 2 * torch.tensor(2.0).log())[kept], rtol=0.0, atol=1e-4)
    assert kept.float().mean() > 0.9


def test_half_precision_around_it_changes_nothing() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_mel(sound(16_000))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, log_mel(sound(16_000)), rtol=0.0, atol=0.0)


def test_a_sound_shorter_than_a_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="399 samples given; a frame has 400 at 16000 Hz"):
        log_mel(torch.zeros(399))
