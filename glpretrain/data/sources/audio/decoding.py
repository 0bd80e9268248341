"""Sounds from files: one channel at 16 kHz, as floating-point numbers in [-1, 1].

The package soundfile, which is an extra, reads every format. Without it only wav files can be read, by SciPy. Left out: formats that
libsndfile does not know (m4a, wma), and the sound of videos.
"""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from glpretrain.data.sources.paths import Paths

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


def check_seconds(seconds: float | None, *, owner: str) -> None:
    """Refuse, with a ValueError, a length that is not above 0."""
    if seconds is not None and not seconds > 0.0:
        raise ValueError(f"{owner}: seconds is {seconds}; expected a number above 0, or none for whole files")


def require_readable(paths: Paths, *, owner: str) -> None:
    """Refuse, with a ValueError, files that need a package that is not installed."""
    if soundfile() is None and (others := sum(not name.lower().endswith(WAV) for name in paths.names)):
        raise ValueError(f"{owner}: {others} of {len(paths)} files cannot be read: {NEEDED}")


def way_of(seconds: float | None) -> str:
    """How a sound of which so much is read is decoded, see `Stored`."""
    return "sound" if seconds is None else f"sound of {seconds} s"


def decode(path: Path, *, seconds: float | None = None) -> Tensor:
    """The sound of a file, Float[S]: the mean of its channels, resampled with a polyphase filter.

    Args:
        path: the file.
        seconds: how much is read, from its beginning; None reads all of it.

    Raises:
        UnreadableItemError: the file is missing, damaged, empty or silent, or its format needs a package that is not there.
    """
    with damage_named(path):
        if not path.is_file():  # a pipe would never end
            raise FileNotFoundError("there is no such file")
        return torch.from_numpy(_checked(*_read(path, ending=path.suffix, seconds=seconds)))


def decode_bytes(content: bytes, *, ending: str, seconds: float | None = None) -> Tensor:
    """The same of the bytes of a file.

    Args:
        content: the bytes.
        ending: ending of the file's name, with its dot.
        seconds: as for `decode`.

    Raises:
        Exception: whatever the reader raises for a damaged file; the caller names it with `damage_named`.
    """
    return torch.from_numpy(_checked(*_read(io.BytesIO(content), ending=ending, seconds=seconds)))


@contextmanager
def damage_named(what: object) -> Iterator[None]:
    """Turn whatever a reader raises for a damaged file into an `UnreadableItemError` that names it as `what`."""
    try:
        yield
    except Exception as error:  # a reader may raise anything for a damaged file
        raise UnreadableItemError(f"{what}: {reason_of(error)}") from error


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


def _read(source: Path | io.BytesIO, *, ending: str, seconds: float | None) -> tuple[np.ndarray, int]:
    """Float[S' C] in [-1, 1], and samples in a second."""
    package = soundfile()
    if package is None:
        return _read_wav(source, ending=ending, seconds=seconds)
    with package.SoundFile(source) as file:
        count = -1 if seconds is None else max(1, round(seconds * file.samplerate))
        return file.read(count, dtype="float32", always_2d=True), file.samplerate


def _read_wav(source: Path | io.BytesIO, *, ending: str, seconds: float | None) -> tuple[np.ndarray, int]:
    if ending.lower() not in WAV:
        raise ValueError(NEEDED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks with texts
        warnings.filterwarnings("error", message=".*EOF.*", category=wavfile.WavFileWarning)
        rate, samples = wavfile.read(source)
    samples = samples[:, None] if samples.ndim == 1 else samples
    samples = samples if seconds is None else samples[: max(1, round(seconds * rate))]
    if samples.dtype.kind == "f":
        return samples.astype(np.float32), rate
    middle, half = (128, 128) if samples.dtype == np.uint8 else (0, 2 ** (8 * samples.dtype.itemsize - 1))
    return ((samples.astype(np.float64) - middle) / half).astype(np.float32), rate
