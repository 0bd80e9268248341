"""Sounds from files: one channel at 16 kHz, as floating-point numbers in [-1, 1].

The package soundfile, which is an extra, reads every format. Without it only wav files can be read, by SciPy. Left out: formats that
libsndfile does not know (m4a, wma), and the sound of videos.
"""

import math
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor

from glpretrain.core.fbank import RATE
from glpretrain.data.sources.base import Item, Source, UnreadableItemError, reason_of

WAV = (".wav", ".wave")
ENDINGS = (*WAV, ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")
NEEDED = "sounds other than wav need the package soundfile: pip install 'glpretrain[audio]'"
_QUIETEST = 2.0**-15  # from the lowest to the highest sample: one step of 16 bits
_RATES = (1_000, 768_000)  # a header that says something else is damaged


class AudioSource(Source):
    """A source of sounds: `values` is Float[1 S] at `core.fbank.RATE`, and masks are Int[T F], frames by bins of the mel scale."""

    @property
    def modality(self) -> Literal["audio"]:
        return "audio"


@cache
def soundfile() -> ModuleType | None:
    """The package that reads all formats; None where it is not installed."""
    try:
        import soundfile  # pyright: ignore[reportMissingImports]  # an optional extra
    except (ImportError, OSError):  # OSError: the package without its library
        return None
    return soundfile


def audio_item(samples: Tensor, *, label: int) -> Item:
    """A sound, Float[S], as an item."""
    return Item(samples.unsqueeze(0), label, None, None)


def decode(path: Path, *, seconds: float | None = None) -> Tensor:
    """The sound of a file, Float[S]: the mean of its channels, resampled with a polyphase filter.

    Args:
        path: the file.
        seconds: how much is read, from its beginning; None reads all of it.

    Raises:
        UnreadableItemError: the file is missing, damaged, empty or silent, or its format needs a package that is not there.
    """
    try:
        if not path.is_file():  # a pipe would never end
            raise FileNotFoundError("there is no such file")
        samples, rate = _read(path, seconds=seconds)
        return torch.from_numpy(_checked(samples, rate))
    except Exception as error:  # a reader may raise anything for a damaged file
        raise UnreadableItemError(f"{path}: {reason_of(error)}") from error


def _checked(samples: np.ndarray, rate: int) -> np.ndarray:
    """Float[S] at 16 kHz from Float[S' C]; a ValueError says what is wrong with it."""
    if not _RATES[0] <= rate <= _RATES[1]:
        raise ValueError(f"{rate} samples in a second; accepted: {_RATES[0]} to {_RATES[1]}")
    if samples.size == 0:
        raise ValueError("the file is empty: it holds no sample")
    if not np.isfinite(samples).all():
        raise ValueError(f"{int((~np.isfinite(samples)).sum())} of {samples.size} samples are not finite")
    mono = samples.mean(axis=1, dtype=np.float64)
    if np.ptp(mono) < _QUIETEST:
        raise ValueError(f"the file is silent: none of its {len(mono)} samples differs from another by a step of 16 bits")
    return resampled(mono, rate=rate).astype(np.float32)


def resampled(samples: np.ndarray, *, rate: int) -> np.ndarray:
    """Float[S'] at `rate` to Float[S] at 16 kHz, by SciPy's polyphase filter (a Kaiser window against aliasing)."""
    common = math.gcd(rate, RATE)
    return samples if rate == RATE else resample_poly(samples, RATE // common, rate // common)


def _read(path: Path, *, seconds: float | None) -> tuple[np.ndarray, int]:
    """Float[S' C] in [-1, 1], and samples in a second."""
    package = soundfile()
    if package is None:
        return _read_wav(path, seconds=seconds)
    with package.SoundFile(path) as file:
        count = -1 if seconds is None else max(1, round(seconds * file.samplerate))
        return file.read(count, dtype="float32", always_2d=True), file.samplerate


def _read_wav(path: Path, *, seconds: float | None) -> tuple[np.ndarray, int]:
    if path.suffix.lower() not in WAV:
        raise ValueError(NEEDED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks with texts
        warnings.filterwarnings("error", message=".*EOF.*", category=wavfile.WavFileWarning)
        rate, samples = wavfile.read(path)
    samples = samples[:, None] if samples.ndim == 1 else samples
    samples = samples if seconds is None else samples[: max(1, round(seconds * rate))]
    if samples.dtype.kind == "f":
        return samples.astype(np.float32), rate
    middle, half = (128, 128) if samples.dtype == np.uint8 else (0, 2 ** (8 * samples.dtype.itemsize - 1))
    return ((samples.astype(np.float64) - middle) / half).astype(np.float32), rate
