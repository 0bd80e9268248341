"""`Sounds`: synthetic sounds of tones, bells, sirens, hisses and their like over a noisy ground.

Each sound is a pure function of (seed, split, index), in any number and length, and nothing is downloaded. A class is one way to make a
source of sound: how its pitch moves, which partials it has, and how it fades. Pitch, onset, duration and ground are independent of it. The
loudest source gives the label; one or two others, each of any class, may sound at the same time. A mask says which cells of time and
frequency belong to which source.

Left out: rooms, and everything else that a recording has.
"""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glpretrain.core import keys
from glpretrain.core.fbank import RATE, log_mel, num_samples
from glpretrain.data.label_sets import joined
from glpretrain.data.sources.audio.decoding import AudioSource
from glpretrain.data.sources.base import Item, Source, Split, SyntheticSource, check_choice

BINS = 128  # of the masks
_SOURCES = (1, 1, 2, 2, 3)  # numbers of sources in a sound, equally likely
_NUM_DRAWS = 8  # random numbers per source, and as many for the sound
_HIGHEST = 7_600.0  # Hz, the highest partial
_MOST_PARTIALS = 24
_LOUD, _QUIETER = 0.2, 0.35  # amplitude of the first source, and that of others as a share of it
_GROUND = (0.002, 0.02)  # smallest and largest standard deviation of the ground
_RANGE = 6.9  # how far below its maximum a source's energy may lie in its cells: a factor of 1,000, 30 dB
_LEAST_FRAMES = 32
_EDGE = 0.02  # seconds in which a source begins and ends

# A source is made from its time in seconds Float[n], its lowest pitch in Hz, its duration in seconds, noise Float[n] and two draws.
_Make = Callable[[np.ndarray, float, float, np.ndarray, list[float]], np.ndarray]


def _partials(pitch: np.ndarray, ratios: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Float[n]: sines at multiples `ratios` of the pitch Float[n], as far as they stay below the highest partial."""
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    audible = ratios * pitch.max() < _HIGHEST
    return (weights[audible, None] * np.sin(ratios[audible, None] * phase)).sum(axis=0)


def _harmonic(pitch: np.ndarray, *, count: int, slope: float) -> np.ndarray:
    ratios = np.arange(1, count + 1, dtype=np.float64)
    return _partials(pitch, ratios, ratios**-slope)


def _band(noise: np.ndarray, pitch: float) -> np.ndarray:
    """Noise within an octave around four times the pitch."""
    spectrum = np.fft.rfft(noise)
    distance = np.abs(np.log2(np.maximum(np.fft.rfftfreq(len(noise), 1 / RATE), 1.0) / (4 * pitch)))
    return np.fft.irfft(spectrum * np.clip(3.0 - 4.0 * distance, 0.0, 1.0), n=len(noise))


def _gate(time: np.ndarray, rate: float) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-12.0 * np.sin(2 * np.pi * rate * time)))


def _tone(time: np.ndarray, pitch: float, duration: float, noise: np.ndarray, d: list[float]) -> np.ndarray:
    return _harmonic(np.full_like(time, pitch), count=6, slope=0.7)


def _rising(time: np.ndarray, pitch: float, duration: float, noise: np.ndarray, d: list[float]) -> np.ndarray:
    return _harmonic(pitch * 2 ** ((0.8 + 0.6 * d[0]) * time / duration), count=5, slope=0.7)


def _falling(time: np.ndarray, pitch: float, duration: float, noise: np.ndarray, d: list[float]) -> np.ndarray:
    return _harmonic(pitch * 2 ** ((0.8 + 0.6 * d[0]) * (1 - time / duration)), count=5, slope=0.7)


def _siren(time: np.ndarray, pitch: float, duration: float, noise: np.ndarray, d: list[float]) -> np.ndarray:
    return _harmonic(1.4 * pitch * 2 ** (0.5 * np.sin(2 * np.pi * (3 + 3 * d[0]) * time)), count=5, slope=0.7)


def _pluck(time: np.ndarray, pitch: float, duration: float, noise: np.ndarray, d: list[float]) -> np.ndarray:
    return _harmonic(np.full_like(time, pitch), count=10, slope=0.5) * np.exp(-(4 + 3 * d[0]) * time / duration)


def _bell(time: np.ndarray, pitch: float, duration: float, noise: np.ndarray, d: list[float]) -> np.ndarray:
    ratios = np.array([1.0, 2.76, 4.07, 5.4, 8.93])
    return _partials(np.full_like(time, 1.5 * pitch), ratios, np.array([1.0, 0.9, 0.5, 0.7, 0.5])) * np.exp(-3 * time / duration)


def _hiss(time: np.ndarray, pitch: float, duration: float, noise: np.ndarray, d: list[float]) -> np.ndarray:
    return _band(noise, pitch)


def _rattle(time: np.ndarray, pitch: float, duration: float, noise: np.ndarray, d: list[float]) -> np.ndarray:
    return _band(noise, pitch) * _gate(time, 8 + 6 * d[0])


def _trill(time: np.ndarray, pitch: float, duration: float, noise: np.ndarray, d: list[float]) -> np.ndarray:
    return _harmonic(pitch * (1.0 + 0.5 * _gate(time, 8 + 6 * d[0])), count=5, slope=0.7)


def _buzz(time: np.ndarray, pitch: float, duration: float, noise: np.ndarray, d: list[float]) -> np.ndarray:
    return _harmonic(np.full_like(time, 0.4 * pitch), count=_MOST_PARTIALS, slope=0.1)


_CLASSES: dict[str, _Make] = {
    "tone": _tone,
    "rising": _rising,
    "falling": _falling,
    "siren": _siren,
    "pluck": _pluck,
    "bell": _bell,
    "hiss": _hiss,
    "rattle": _rattle,
    "trill": _trill,
    "buzz": _buzz,
}
CLASSES = tuple(_CLASSES)
_SETS = [names for count in sorted(set(_SOURCES)) for names in combinations(CLASSES, count)]  # of kinds that may sound together
_SET_NUMBER = {frozenset(names): number for number, names in enumerate(_SETS)}


class Sounds(SyntheticSource, AudioSource):
    """Synthetic sounds. The label is the kind of the loudest source, or of all together, and the masks are the cells of each source.

    Args:
        length: number of sounds.
        frames: length of each sound in frames of the filterbank, T, which are 10 ms apart.
        split: `train` and `test` have the same classes with different draws.
        seed: seed of all sounds.
        labels: `loudest`, the kind of the loudest source; or `all`, those of all sources, which the name of the class lists (`bell;hiss`).

    Raises:
        ValueError: `length` or `frames` is too small, or `split` or `labels` is unknown.
    """

    name = "sounds"
    classes = CLASSES
    mask_classes = ("ground", *CLASSES)

    def __init__(
        self, length: int, *, frames: int = 128, split: Split = "train", seed: int = 0, labels: Literal["loudest", "all"] = "loudest"
    ) -> None:
        super().__init__(length, split=split, seed=seed)
        check_choice(labels, ("loudest", "all"), what="Sounds: labels")
        self.labels: Literal["loudest", "all"] = labels
        if labels == "all":
            self.classes = tuple(map(joined, _SETS))
        if frames < _LEAST_FRAMES:
            raise ValueError(f"Sounds: frames is {frames}; expected at least {_LEAST_FRAMES}, of 10 ms each")
        self.frames = frames

    def with_split(self, split: Split, *, length: int) -> Source:
        return Sounds(length, frames=self.frames, split=split, seed=self.seed, labels=self.labels)

    def __getitem__(self, index: int) -> Item:
        key = self.key(index)
        count, level, colour, *_ = keys.uniform(keys.fold_in(key, 0), _NUM_DRAWS).tolist()
        sources: list[np.ndarray] = []
        labels: list[int] = []
        for number in range(_SOURCES[int(count * len(_SOURCES))]):
            label, samples = _source(keys.fold_in(key, 2 + number), num_samples(self.frames))
            labels.append(label)
            sources.append(samples * (_LOUD if number == 0 else _LOUD * _QUIETER))
        ground = _ground(keys.fold_in(key, 1), num_samples(self.frames), colour=colour)
        ground *= _GROUND[0] * (_GROUND[1] / _GROUND[0]) ** level
        instances = _cells(torch.from_numpy(np.stack(sources)))  # [T F]
        semantic = torch.tensor([0, *(label + 1 for label in labels)])[instances]
        values = torch.from_numpy(sum(sources, ground)).to(torch.float32).unsqueeze(0)
        label = labels[0] if self.labels == "loudest" else _SET_NUMBER[frozenset(CLASSES[label] for label in labels)]
        return Item(values, label, instances, None, semantic)


def _source(key: Tensor, length: int) -> tuple[int, np.ndarray]:
    """Class of a source, and Float[length], what it adds to the sound, of standard deviation one while it sounds."""
    label, onset, share, pitch, *rest = keys.uniform(keys.fold_in(key, 0), _NUM_DRAWS).tolist()
    number = int(label * len(CLASSES))
    count = int(length * (0.35 + 0.4 * share))
    first = int(onset * (length - count))
    time = np.arange(count) / RATE
    noise = keys.normal(keys.fold_in(key, 1), count).double().numpy()
    made = _CLASSES[CLASSES[number]](time, 220.0 * 2 ** (1.5 * pitch), count / RATE, noise, rest)
    edge = np.clip(np.minimum(time, time[::-1]) / _EDGE, 0.0, 1.0)
    samples = np.zeros(length)
    samples[first : first + count] = made * edge / made.std()
    return number, samples


def _ground(key: Tensor, length: int, *, colour: float) -> np.ndarray:
    """Float[length]: noise of standard deviation one, white or with up to 6 dB less in each octave."""
    spectrum = np.fft.rfft(keys.normal(key, length).double().numpy())
    frequency = np.maximum(np.fft.rfftfreq(length, 1 / RATE), 50.0)
    noise = np.fft.irfft(spectrum * frequency**-colour, n=length)
    return noise / noise.std()


def _cells(sources: Tensor) -> Tensor:
    """Int[T F]: 0 where no source sounds, otherwise 1 + the number of the loudest one there, of sources Float[N S].

    A source has the cells whose energy is within 30 dB of its largest, and in every frame those between its lowest and highest such cell.
    """
    energy = log_mel(sources, num_bins=BINS)  # [N T F]
    active = energy > energy.amax(dim=(1, 2), keepdim=True) - _RANGE
    below, above = active.int().cummax(dim=2).values, active.int().flip(2).cummax(dim=2).values.flip(2)
    active = (below & above).bool()  # [N T F]
    loudest = torch.where(active, energy, -math.inf).argmax(dim=0)  # [T F]
    return torch.where(active.any(dim=0), loudest + 1, 0)
