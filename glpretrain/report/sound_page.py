"""The page of sounds: spectrograms that can be heard, in which a click on a cell shows what resembles it.

It is drawn by the script of the page of pictures: time runs to the right and high frequencies are above, so the patches of an encoder,
whose first axis is time, are put into the order of that picture. Of a sound that is longer than the encoder's items, the middle is shown
and played. The sound is stored in the page as a wav file of 16 bits.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import wavfile
from torch import Tensor

from glpretrain import modalities
from glpretrain.core.fbank import RATE, num_frames, num_samples
from glpretrain.core.types import Item
from glpretrain.data.sources.audio.decoding import decode
from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.encoders import Encoder
from glpretrain.report.figures import DIMMED, OPACITY
from glpretrain.report.image_page import Named, data_url
from glpretrain.report.maps import Layers, Picture, Seen, Size, patch_pca, shape_of
from glpretrain.report.page import Plain, Threshold, base64_of, described, opening, stored, write_page

_LOUDEST = 32_767


def write_sound_report(
    encoders: Mapping[str, Encoder],
    files: Sequence[str | Path],
    *,
    out: str | Path,
    size: Size = None,
    threshold: Threshold = None,
    layers: Layers = "all",
) -> Path:
    """Write the page of some sounds.

    Args:
        encoders: encoders of sounds, by the name that they are shown under; in evaluation mode.
        files: the sounds.
        out: a new .html file; its folder is made where it is missing.
        size: number of frames, or frames and bins, that encoders are shown; None is each card's own.
        threshold: threshold that the page opens with, see `image_page.write_report`.
        layers: blocks whose attention is stored, see `image_page.write_report`.

    Returns:
        The file.

    Raises:
        ValueError: a sound cannot be read, or see `write_page`.
    """

    def contents(paths: Sequence[Path]) -> Plain:
        return sound_data(encoders, [Named(path.name, path) for path in paths], size=size, threshold=threshold, layers=layers)

    options = {"modality": "audio", "part": "audio_page", "script": "image_page.js"}
    return write_page(encoders, files, contents=contents, out=out, threshold=threshold, layers=layers, **options)


def sound_data(encoders: Mapping[str, Encoder], shown: Sequence[Named], *, size: Size, threshold: Threshold, layers: Layers) -> Plain:
    """What a page holds of some sounds. Other arguments and errors are those of `write_sound_report`.

    Args:
        shown: the sounds, as files or as samples, Float[1 S].
    """
    shapes = {name: shape_of(encoder, size) for name, encoder in encoders.items()}
    waves = [_read(one.picture) for one in shown]
    distinct = list(dict.fromkeys(shapes.values()))
    pictures: list[list[str]] = [[""] * len(distinct) for _ in shown]
    views: list[list[Plain]] = [[] for _ in shown]
    backbones: list[Plain] = []
    for name, encoder in encoders.items():
        shape, card, errors, seen_patches = shapes[name], encoder.card, [], []
        rows, columns = encoder.grid(shape)
        for number, wave in enumerate(waves):
            seen = hear(encoder, wave, shape=shape)
            view, error = stored(encoder, seen.items, seen.patches, layers=layers, order=drawn_order((rows, columns)))
            views[number].append(view | {"pca": base64_of((patch_pca(seen) * 255).round().byte().numpy())})
            pictures[number][distinct.index(shape)] = _spectrogram(encoder, seen.items)
            errors.append(error)
            seen_patches.append(seen.patches)
        sizes = {"patch": list(card.patch_size[::-1]), "trained": list(card.item_shape[:0:-1]), "size": list(shape[:0:-1])}
        own = {"grid": [columns, rows], "picture": distinct.index(shape), "error": max(errors)}
        opens = opening(name, threshold, seen_patches)
        backbones.append(described(name, encoder, layers=layers, opening=opens) | sizes | own)
    longest = max(distinct)
    sounds = [
        {
            "name": one.name,
            "size": list(longest[:0:-1]),
            "extent": f"{middle.shape[1] / RATE:.2f} of {wave.shape[1] / RATE:.2f} s",
            "shown": own[distinct.index(longest)],
            "pictures": own,
            "sound": wav_url(middle),
        }
        for one, wave, own in zip(shown, waves, pictures, strict=True)
        for middle in (_middle(wave, frames=longest[1]),)
    ]
    words = {"noun": "sound", "unit": "cells"}
    return {"opacity": OPACITY, "dimmed": DIMMED, "images": sounds, "backbones": backbones, "views": views, **words}


def hear(encoder: Encoder, wave: Tensor, *, shape: Sequence[int]) -> Seen:
    """A sound as an encoder sees it, its patches in the order of the picture.

    Args:
        encoder: an encoder of sounds in evaluation mode.
        wave: Float[1 S] at 16 kHz.
        shape: channels, frames and bins that it is shown.

    Raises:
        ValueError: the features are not finite.
    """
    modality = modalities.get(encoder.card.modality)
    values = modality.resize(Item(wave, label=-1, instances=None, regions=None), shape, fit="crop").values
    items = modality.normalise(values[None].to(next(encoder.parameters()).device), encoder.card)  # [1 1 T F]
    with torch.no_grad():
        patches = encoder(items).patches[0].float().cpu()  # [N D]
    if not patches.isfinite().all():
        raise ValueError("inspect: the encoder's patch features are not finite; nothing can be drawn from them")
    rows, columns = encoder.grid(shape)
    return Seen(values, items, patches[drawn_order((rows, columns))], (columns, rows))


def drawn_order(grid: tuple[int, int]) -> Tensor:
    """Int[N]: the numbers of the tokens of a grid of time and frequency, row by row of the picture: the highest frequencies come first."""
    times, bins = grid
    return torch.arange(times * bins).unflatten(0, grid).T.flip(0).flatten()


def wav_url(wave: Tensor) -> str:
    """A data URL of a wav file of 16 bits, of Float[1 S]; only a sound beyond [-1, 1] is made less loud."""
    held = io.BytesIO()
    scaled = wave[0] / max(1.0, float(wave.abs().max()))
    wavfile.write(held, RATE, (scaled * _LOUDEST).round().numpy().astype(np.int16))
    return f"data:audio/wav;base64,{base64.b64encode(held.getvalue()).decode()}"


def _read(sound: Picture) -> Tensor:
    """Float[1 S]."""
    if isinstance(sound, Tensor):
        return sound
    try:
        return decode(Path(sound)).unsqueeze(0)
    except UnreadableItemError as error:
        raise ValueError(f"inspect: {sound} cannot be read as a sound: {error}") from error


def _middle(wave: Tensor, *, frames: int) -> Tensor:
    """The samples that `Audio.resize` shows an encoder of so many frames, without silence behind them."""
    first = max(0, num_frames(wave.shape[1]) - frames) // 2
    return wave[:, num_samples(1 + first) - num_samples(1) :][:, : num_samples(frames)]


def _spectrogram(encoder: Encoder, items: Tensor) -> str:
    """A data URL of the picture of Float[1 1 T F]."""
    picture = modalities.get(encoder.card.modality).pictures(items, card=encoder.card)[0, :, :, 0]  # [F T]
    return data_url(Image.fromarray((picture * 255).round().byte().numpy()), "PNG", optimize=True)
