"""Sounds: Float[1 S] at 16 kHz in sources, Float[1 T F], a log-mel filterbank, for an encoder.

The first axis of a filterbank is time, in frames that are 10 ms apart; the second is frequency, in bins of the mel scale, from low to high.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from glpretrain.core.fbank import FRAMES_PER_SECOND, log_mel, num_frames, num_samples
from glpretrain.core.patches import inputs_of_patches
from glpretrain.core.types import EncoderCard, Item
from glpretrain.modalities.base import Fit, Modality, Size
from glpretrain.modalities.image import DIMMED, resized_ids

_DARKEST, _BRIGHTEST = -1.5, 1.5  # of a normalised filterbank in a picture


class Audio(Modality):
    """Sounds of one channel."""

    name = "audio"
    axes = ("1", "S")
    num_coordinates = 2
    channel_axis = 0
    embedded_source = "glpretrain.data.Sounds"
    embedded_size = "frames"
    own_sources = ("glpretrain.data.SoundShards", "glpretrain.data.SoundList", "glpretrain.data.AudioFolder")
    held = ("glpretrain.data.sources.audio.held.sounds", "glpretrain.data.sources.audio.held.sound_values")
    masked_source = "glpretrain.data.AudioFolder"
    default_evaluators: ClassVar[dict[str, str]] = {
        "knn": "glpretrain.evaluate.KNN",
        "linear": "glpretrain.evaluate.LinearProbe",
        "prompt": "glpretrain.evaluate.PromptSegmentation",
    }
    page = "glpretrain.report.write_sound_report"
    tuning = ("--config finetune/sounds",)
    page_data = "glpretrain.report.sound_page.sound_data"

    def item_shape(self, card: EncoderCard, size: Size | None) -> tuple[int, ...]:
        """One channel, frames and bins; one number is that of the frames."""
        channels, frames, bins = card.item_shape
        if size is None:
            return channels, frames, bins
        sides = (size, bins) if isinstance(size, int) else tuple(size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"size: {size} given; a sound has frames and bins; give one positive number of frames, or both")
        return channels, *sides

    def resize(self, item: Item, shape: Sequence[int], *, fit: Fit) -> Item:
        """The filterbank with so many frames. Silence follows a sound that is too short. Of one that is too long, `crop` takes the middle,
        and `stretch` averages over time; masks, Int[T F], follow, by the nearest cell."""
        if fit == "inner_crop":
            raise ValueError("features.crop: inner given; a sound has no border that could be cut off; leave it out")
        if item.values.dim() != 2 or item.values.shape[0] != 1:
            raise ValueError(f"an item of shape {tuple(item.values.shape)} is no sound; the encoder needs sounds of one channel (1 S)")
        _, frames, bins = shape
        wave, total = item.values, num_frames(item.values.shape[1])
        masks = {"instances": item.instances, "semantic": item.semantic}
        if fit == "stretch" and total > frames:
            whole = log_mel(wave, num_bins=bins)  # [1 total F]
            values = F.interpolate(whole[None], size=(frames, bins), mode="bilinear", antialias=True)[0]
        else:
            first = max(0, total - frames) // 2
            wave = wave[:, num_samples(1 + first) - num_samples(1) :][:, : num_samples(frames)]
            values = log_mel(F.pad(wave, (0, num_samples(frames) - wave.shape[1])), num_bins=bins)
            cut = {name: None if mask is None else mask[first : first + frames] for name, mask in masks.items()}
            masks = {name: None if mask is None else F.pad(mask, (0, 0, 0, frames - len(mask))) for name, mask in cut.items()}
        fitted = {name: None if mask is None else resized_ids(mask, (frames, bins)) for name, mask in masks.items()}
        return item._replace(values=values, instances=fitted["instances"], semantic=fitted["semantic"])

    def normalise(self, items: Tensor, card: EncoderCard) -> Tensor:
        """(filterbank - mean) / std."""
        return (items.float() - card.mean[0]) / card.std[0]

    def inputs_of_tokens(self, tokens: Tensor, views: Tensor, *, grid: tuple[int, ...]) -> Tensor:
        """Every cell belongs to the token of its patch."""
        return inputs_of_patches(tokens, size=views.shape[2:], grid=grid)

    def pictures(self, views: Tensor, *, card: EncoderCard, dimmed: Tensor | None = None) -> Tensor:
        """Spectrograms in grey, time to the right and high frequencies above."""
        shade = ((views[:, 0].float().cpu() - _DARKEST) / (_BRIGHTEST - _DARKEST)).clamp(0, 1)  # [B T F]
        if dimmed is not None:
            shade = torch.where(dimmed.cpu(), DIMMED * shade, shade)
        return shade.transpose(1, 2).flip(1).unsqueeze(-1).expand(-1, -1, -1, 3)  # [B F T 3]

    def thumbnail(self, item: Item, *, card: EncoderCard, side: int) -> Tensor:
        """The middle of the sound, as long as the encoder's items."""
        fitted = self.resize(item, self.item_shape(card, None), fit="crop")
        picture = self.pictures(self.normalise(fitted.values[None], card), card=card)[0]  # [F T 3]
        height, width = picture.shape[:2]
        scale = min(1.0, side / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        return F.interpolate(picture.permute(2, 0, 1)[None], size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)

    def describe_size(self, card: EncoderCard) -> str:
        """Seconds and bins."""
        _, frames, bins = card.item_shape
        return f"{frames / FRAMES_PER_SECOND:g} s of {bins} bins"
