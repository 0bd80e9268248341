"""Views of sounds for classification: a random stretch of each training sound, mixed with that of its neighbour, under SpecAugment.

The mixture is that of AST's training: samples are mixed, not filterbanks, with a share from a symmetric beta distribution, and each of the
two classes weighs as much as its sound. Reference code: YuanGongND/ast at 31088be (src/dataloader.py).
Known differences: the other sound is the neighbour in the batch, not any sound of the data set; bands are at most as wide as the view.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from glpretrain.core.fbank import log_mel, num_samples
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.sources.base import Source
from glpretrain.data.views.sounds import masked_bands
from glpretrain.encoders.base import Encoder
from glpretrain.finetune.classification import classes_of
from glpretrain.finetune.data import TaskViews, stacked
from glpretrain.finetune.sound_transform import SoundTransform
from glpretrain.finetune.transforms import drawn_from


class SoundViews(TaskViews):
    """A random stretch of each training sound; the middle of each test sound.

    Args:
        size: number of frames of a view; None is that of the sounds that the backbone was trained on.
        num_bins: number of bins; None is that of the backbone.
        shift: largest circular shift of a view, as a share of its length, in either direction.
        time_mask: largest number of frames in a row that are set to the mean.
        frequency_mask: largest number of bins in a row that are set to the mean.
        mix_prob: probability that a sound is mixed with its neighbour in the batch.
        mix_alpha: both parameters of the beta distribution of its share.

    Raises:
        ValueError: a value out of range.
    """

    modality: ClassVar[str] = "audio"

    def __init__(
        self,
        size: int | None = None,
        *,
        num_bins: int | None = None,
        shift: float = 0.0,
        time_mask: int = 0,
        frequency_mask: int = 0,
        mix_prob: float = 0.0,
        mix_alpha: float = 10.0,
    ) -> None:
        super().__init__(size)
        for name, value in (("shift", shift), ("mix_prob", mix_prob)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"views: {name}={value} given; accepted: from 0 to 1")
        for name, value in (("time_mask", time_mask), ("frequency_mask", frequency_mask)):
            if value < 0:
                raise ValueError(f"views: {name}={value} given; accepted: numbers from 0 on")
        if not mix_alpha > 0.0:
            raise ValueError(f"views: mix_alpha={mix_alpha} given; accepted: numbers above 0")
        if num_bins is not None and num_bins < 1:
            raise ValueError(f"views: num_bins={num_bins} given; accepted: numbers from 1 on, or null for those of the backbone")
        self.num_bins, self.shift, self.time_mask, self.frequency_mask = num_bins, shift, time_mask, frequency_mask
        self.mix_prob, self.mix_alpha = mix_prob, mix_alpha

    @classmethod
    def settings_of(cls, card: EncoderCard) -> dict[str, int]:
        """Frames and bins."""
        _, frames, bins = card.item_shape
        return {"size": frames, "num_bins": bins}

    @classmethod
    def sized(cls, encoder: Encoder, settings: Mapping[str, int]) -> Encoder:
        """The encoder as it is, which resizes its positions to the length of a view.

        Raises:
            ValueError: it accepts no view of this size.
        """
        encoder.grid((1, settings["size"], settings["num_bins"]))
        return encoder

    def classes_of(self, source: Source) -> list[str]:
        """The classes of the source.

        Raises:
            ValueError: there are fewer than two.
        """
        return classes_of(source)

    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """One global view."""
        return {"global": (1, (num_channels, self.default_size(), self._bins()))}

    def transform(self, card: EncoderCard) -> SoundTransform:
        """The middle of a sound."""
        return SoundTransform(self.default_size(), self._bins(), card.mean[0], card.std[0])

    def augmented(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """A random view, Float[1 T F], and the class, Int[]."""
        return self._bank(self._stretch(item.values[0]), card=card), torch.tensor(item.label)

    def plain(self, item: Item, *, card: EncoderCard) -> tuple[Tensor, Tensor]:
        """The middle of a sound, Float[1 T F], and the class, Int[]."""
        return self.transform(card)(item.values[0]), torch.tensor(item.label)

    def prepare(self, items: Sequence[Item], *, keys: Tensor, card: EncoderCard) -> dict[str, Tensor]:
        """Augmented items, Float[B 1 T F], and their classes, Int[B], or with mixtures Float[B 3]: the class of the sound, that of the
        other one, and the share of the other one."""
        if self.mix_prob == 0.0:
            return super().prepare(items, keys=keys, card=card)
        stretches = []
        for item, key in zip(items, keys, strict=True):
            with drawn_from(key):
                stretches.append(self._stretch(item.values[0]))
        made = []
        for number, (item, key) in enumerate(zip(items, keys, strict=True)):
            neighbour = number ^ 1 if number ^ 1 < len(items) else max(number - 1, 0)
            with drawn_from(key + 1):  # other draws than those of the stretch
                share = float(torch.distributions.Beta(self.mix_alpha, self.mix_alpha).sample())
                share = share if float(torch.rand(())) < self.mix_prob and neighbour != number else 0.0
                wave = torch.lerp(stretches[number], stretches[neighbour], share)
                target = torch.tensor([item.label, items[neighbour].label, share])
                made.append((self._bank(wave, card=card), target))
        return stacked(made)

    def _bins(self) -> int:
        assert self.num_bins is not None, "the bins of the backbone are filled in before training"
        return self.num_bins

    def _stretch(self, wave: Tensor) -> Tensor:
        """Float[S] of the length of a view, from a random sample on, shifted circularly; silence follows a sound that is too short."""
        length = num_samples(self.default_size())
        start = int(torch.randint(max(1, len(wave) - length + 1), ()))
        cut = F.pad(wave[start : start + length], (0, max(0, length - len(wave))))
        most = round(self.shift * length)
        return cut.roll(int(torch.randint(-most, most + 1, ()))) if most else cut

    def _bank(self, wave: Tensor, *, card: EncoderCard) -> Tensor:
        """Float[1 T F]: the normalised filterbank of Float[S], with bands of time and frequency set to the mean."""
        bank = (log_mel(wave, num_bins=self._bins()) - card.mean[0]) / card.std[0]  # [T F]
        ends: list[int] = []
        for most, side in zip((self.time_mask, self.frequency_mask), bank.shape, strict=True):
            width = int(torch.randint(min(most, side) + 1, ()))
            first = int(torch.randint(side - width + 1, ()))
            ends += [first, first + width]
        return masked_bands(bank[None, None], ends=torch.tensor(ends)[None, None])[0]
