"""Log-mel filterbanks of sounds in plain PyTorch, in batches, on any device: those of Kaldi, for any sampling rate.

Equal to `torchaudio.compliance.kaldi.fbank` with `window_type="hanning"`, `dither=0.0` and `use_energy=False`, as AST and ASiT set it:
frames of 25 ms every 10 ms that lie within the sound, each without its mean, with pre-emphasis, a symmetric Hann window and zeros up to a
power of two; the power spectrum; triangles that are evenly spaced on the mel scale; the logarithm. Left out: Kaldi's other windows, dither,
energies, warped frequencies, and cepstra.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

RATE = 16_000  # samples in a second of the sounds that encoders see: AST, ASiT, and most published models of spectrograms
FRAMES_PER_SECOND = 100
_LENGTH, _SHIFT = 0.025, 0.010  # seconds
_LOWEST = 20.0  # Hz, the lower edge of the first triangle
_EMPHASIS = 0.97
_MEL, _BREAK = 1127.0, 700.0  # HTK's mel scale: _MEL times log(1 + hertz / _BREAK)
_FLOOR = torch.finfo(torch.float32).eps  # of an energy, before the logarithm
FLOOR = math.log(_FLOOR)  # what the filterbank of silence holds


def num_frames(num_samples: int, *, rate: int = RATE) -> int:
    """Number of frames T that lie within so many samples; 0 where not even one does."""
    length, shift = _window(rate)
    return 0 if num_samples < length else 1 + (num_samples - length) // shift


def num_samples(num_frames: int, *, rate: int = RATE) -> int:
    """Number of samples that so many frames need, at least one frame."""
    length, shift = _window(rate)
    return length + (num_frames - 1) * shift


def log_mel(waves: Tensor, *, num_bins: int = 128, rate: int = RATE) -> Tensor:
    """The log-mel filterbank of each of some sounds of equal length: Float[*S samples] to Float[*S T F], in float32.

    Args:
        waves: samples, as a rule in [-1, 1]. Their scale shifts the result.
        num_bins: number of triangles F.
        rate: samples in a second.

    Raises:
        ValueError: the sound is shorter than one frame.
    """
    length, shift = _window(rate)
    if waves.shape[-1] < length:
        raise ValueError(f"log_mel: {waves.shape[-1]} samples given; a frame has {length} at {rate} Hz; give a longer sound")
    padded = 1 << (length - 1).bit_length()
    # Under autocast the product with the triangles would run in half precision, whose error shows in the logarithm.
    with torch.autocast(device_type=waves.device.type, enabled=False):
        frames = waves.float().unfold(-1, length, shift)  # [*S T length]
        frames = frames - frames.mean(dim=-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        frames = (frames - _EMPHASIS * before) * _hann(length, device=waves.device)
        power = torch.fft.rfft(frames, n=padded).abs().square()  # [*S T padded/2+1]
        energy = power @ _triangles(num_bins, padded, rate, device=waves.device)  # [*S T F]
        return energy.clamp_min(_FLOOR).log()


def _window(rate: int) -> tuple[int, int]:
    """Samples of a frame, and samples from one frame to the next."""
    return int(rate * _LENGTH), int(rate * _SHIFT)


@lru_cache(maxsize=16)  # one for each device: a copy to it would be waited for in every step
def _hann(length: int, *, device: torch.device) -> Tensor:
    """Float[length]: the symmetric window."""
    return torch.hann_window(length, periodic=False).to(device)


@lru_cache(maxsize=16)
def _triangles(num_bins: int, padded: int, rate: int, *, device: torch.device) -> Tensor:
    """Float[padded/2+1 F]: weight of every frequency in every bin. Triangles overlap by half; the highest frequency counts in none.

    With 128 bins at 16 kHz the lowest triangles are narrower than the step between two frequencies, so that one of them holds none.
    """
    lowest, highest = (_MEL * math.log1p(hertz / _BREAK) for hertz in (_LOWEST, rate / 2))
    edges = torch.linspace(lowest, highest, num_bins + 2, dtype=torch.float64)
    frequency = torch.arange(padded // 2 + 1, dtype=torch.float64) * rate / padded
    place = (_MEL * torch.log1p(frequency / _BREAK)).unsqueeze(1)  # [padded/2+1 1]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    weight = torch.minimum((place - left) / (centre - left), (right - place) / (right - centre)).clamp_min(0.0)
    weight[-1] = 0.0
    return weight.float().to(device)
