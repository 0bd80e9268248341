"""Views of sounds: crops in time, cut by workers; mixing, the log-mel filterbank and SpecAugment on the device.

As in `multicrop`, all draws come from one key per item, and workers make them, so that nothing on the device waits. The crops are those of
ASiT (data_transformations.py): long and short stretches that begin at any sample. Left out: changes of speed and pitch, and rooms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.core.batch import ViewGroup
from glpretrain.core.fbank import log_mel, num_samples
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data.views.base import ViewMaker, Views
from glpretrain.data.views.changes import Changes

_START, _MIX, _SHARE, _TIME, _FREQUENCY = range(5)
_LOCAL = 1 << 16  # number of the first local view, so that one more global view changes no other
_SHIFT = 1 << 18  # what the key of an item is folded with to shift it


@dataclass(frozen=True)
class SoundViewSpec:
    """One view of a sound, or `count` equal ones. Settings that are left out change nothing.

    Args:
        frames: number of frames T of the view, which are 10 ms apart.
        count: number of such views.
        mix_prob: probability that another sound of the batch is added to the view.
        mix_share: smallest and largest share s of the other sound; the sum is (1 - s) times the own sound plus s times the other.
        time_mask: largest number of frames in a row that are set to the mean; their number and their place are uniform (SpecAugment).
        frequency_mask: largest number of bins in a row that are set to the mean.

    Raises:
        ValueError: a value outside its range.
    """

    frames: int
    count: int = 1
    mix_prob: float = 0.0
    mix_share: tuple[float, float] = (0.1, 0.5)
    time_mask: int = 0
    frequency_mask: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1 or self.count < 1:
            raise ValueError(f"SoundViewSpec: frames and count are at least 1, not {self.frames} and {self.count}")
        if not 0.0 <= self.mix_prob <= 1.0:
            raise ValueError(f"SoundViewSpec: mix_prob is a probability in [0, 1], not {self.mix_prob}")
        if len(self.mix_share) != 2 or not 0.0 < self.mix_share[0] <= self.mix_share[1] < 1.0:
            raise ValueError(f"SoundViewSpec: mix_share is a (smallest, largest) pair in (0, 1), not {tuple(self.mix_share)}")
        if not 0 <= self.time_mask <= self.frames:
            raise ValueError(f"SoundViewSpec: time_mask is a number of frames from 0 to {self.frames}, not {self.time_mask}")
        if self.frequency_mask < 0:
            raise ValueError(f"SoundViewSpec: frequency_mask is a number of bins from 0 on, not {self.frequency_mask}")


class SoundCrops(ViewMaker):
    """Stretches of sounds, as normalised log-mel filterbanks.

    A sound that is shorter than a view is followed by silence. The axes of a view's frame (`ViewGroup.frame`) are time and frequency, both
    in [0, 1]. After a circular shift it refers to the shifted sound, which is the same for all views of an item.

    Ours: the other sound of a mixture is the same view of the neighbour in the batch (position p ^ 1; the last item of an odd batch takes
    the one before it), as in `masking.GroupCorruption`. In a batch of one nothing is mixed.

    Args:
        global_views: settings of the global views, in order; all of one number of frames.
        local_views: settings of the local views, in order; all of one number of frames.
        num_bins: number of bins F of the filterbank.
        shift_prob: probability that a sound is shifted circularly by a random part of its length before all crops (ASiT of 2023: 0.5).

    Raises:
        ValueError: no global view, views that are stacked have different numbers of frames, or a value is outside its range.
    """

    modality = "audio"

    def __init__(
        self,
        global_views: list[SoundViewSpec],
        local_views: list[SoundViewSpec] | None = None,
        num_bins: int = 128,
        shift_prob: float = 0.0,
    ) -> None:
        super().__init__()
        if not global_views:
            raise ValueError("SoundCrops: global_views is empty; give at least one SoundViewSpec")
        for name, specs in (("global_views", global_views), ("local_views", local_views or [])):
            if len(numbers := sorted({spec.frames for spec in specs})) > 1:
                raise ValueError(f"SoundCrops: {name} have {numbers} frames; they are stacked, so give all of them one number")
            for spec in specs:
                if spec.frequency_mask > num_bins:
                    raise ValueError(f"SoundCrops: frequency_mask is {spec.frequency_mask}, but there are num_bins = {num_bins} bins")
        if num_bins < 1:
            raise ValueError(f"SoundCrops: num_bins is at least 1, not {num_bins}")
        if not 0.0 <= shift_prob <= 1.0:
            raise ValueError(f"SoundCrops: shift_prob is a probability in [0, 1], not {shift_prob}")
        self.global_views = tuple(spec for spec in global_views for _ in range(spec.count))
        self.local_views = tuple(spec for spec in local_views or () for _ in range(spec.count))
        self.num_bins, self.shift_prob = num_bins, shift_prob

    def _kinds(self) -> dict[str, tuple[int, tuple[SoundViewSpec, ...]]]:
        """The number of the first view of each group, which tells its draws from those of other views, and the settings of its views."""
        kinds = {"global": (0, self.global_views), "local": (_LOCAL, self.local_views)}
        return {name: kind for name, kind in kinds.items() if kind[1]}

    def groups(self, num_channels: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """`global`, and `local` where the recipe asks for it; channels, frames and bins of each."""
        return {name: (len(specs), (num_channels, specs[0].frames, self.num_bins)) for name, (_, specs) in self._kinds().items()}

    def default_size(self) -> int:
        """A third more frames than the view has, rounded up."""
        return -(-4 * self.global_views[0].frames // 3)

    @torch.no_grad()
    def prepare(self, items: Sequence[Item], *, keys: Tensor, card: EncoderCard) -> dict[str, Tensor]:
        """Stretches of the sounds, and what is drawn for them.

        Args:
            items: sounds Float[1 S], each of its own length.
            keys: Int[B], one key per item.
            card: card of the encoder.

        Returns:
            By the name of each group its stretches, Float[B V S]; as `<name>_frames`, Float[B V 2 3], where they lie in their items; as
            `<name>_mixed`, Float[B V], the share of the other sound; and as `<name>_masked`, Int[B V 4], first and last (exclusive) frame
            and bin that are set to the mean.

        Raises:
            ValueError: an item is no sound of one channel.
        """
        for item in items:
            if item.values.dim() != 2 or item.values.shape[0] != 1:
                raise ValueError(f"views: an item of shape {tuple(item.values.shape)} is no sound of one channel (1 S)")
        waves = self._shifted([item.values[0] for item in items], rng.fold_in(keys, _SHIFT))
        parts = {}
        for name, (first, specs) in self._kinds().items():
            view_keys = rng.numbered(keys, count=len(specs), first=first)  # [V B]
            cut = [self._cut(waves, frames=specs[0].frames, keys=own) for own in view_keys]
            stretches, frames = (torch.stack(values, dim=1) for values in zip(*cut, strict=True))
            drawn = [self._drawn(spec, own) for spec, own in zip(specs, view_keys, strict=True)]
            mixed, masked = (torch.stack(values, dim=1) for values in zip(*drawn, strict=True))
            parts |= {name: stretches, f"{name}_frames": frames, f"{name}_mixed": mixed, f"{name}_masked": masked}
        return parts

    def _shifted(self, waves: list[Tensor], keys: Tensor) -> list[Tensor]:
        """Float[S] each: the sounds, some of them from a random sample on, their beginning behind their end."""
        if self.shift_prob == 0.0:
            return waves
        is_shifted = (rng.uniform(rng.fold_in(keys, 0)) < self.shift_prob).tolist()
        shares = rng.uniform(rng.fold_in(keys, 1)).tolist()
        return [wave.roll(int(share * len(wave))) if own else wave for wave, own, share in zip(waves, is_shifted, shares, strict=True)]

    @staticmethod
    def _cut(waves: Sequence[Tensor], *, frames: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Float[B S] and Float[B 2 3]: stretches of so many frames, and where they lie in the items."""
        length = num_samples(frames)
        lengths = torch.tensor([max(len(wave), length) for wave in waves])
        starts = rng.integers(rng.fold_in(keys, _START), 0, lengths - length + 1)  # [B]
        cut = [wave[start : start + length] for wave, start in zip(waves, starts.tolist(), strict=True)]
        whole = torch.tensor([len(wave) for wave in waves]).float()  # silence behind an item lies beyond 1
        frame = torch.zeros(len(waves), 2, 3)
        frame[:, 0, 0], frame[:, 0, 2], frame[:, 1, 1] = length / whole, starts / whole, 1.0
        return torch.stack([F.pad(one, (0, length - len(one))) for one in cut]), frame

    def _drawn(self, spec: SoundViewSpec, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Float[B] and Int[B 4]: the share of the other sound, and what is masked, for keys Int[B]."""
        low, high = spec.mix_share
        share = low + (high - low) * rng.uniform(rng.fold_in(keys, _SHARE))
        share = torch.where(rng.uniform(rng.fold_in(keys, _MIX)) < spec.mix_prob, share, 0.0)
        ends = []
        for purpose, most, size in ((_TIME, spec.time_mask, spec.frames), (_FREQUENCY, spec.frequency_mask, self.num_bins)):
            count = rng.integers(rng.fold_in(rng.fold_in(keys, purpose), 0), 0, most + 1)  # [B]
            start = rng.integers(rng.fold_in(rng.fold_in(keys, purpose), 1), 0, size - count + 1)
            ends += [start, start + count]
        return share, torch.stack(ends, dim=1)

    @torch.no_grad()
    def make(self, parts: Mapping[str, Tensor], *, changes: Mapping[str, Changes], keys: Tensor, card: EncoderCard) -> Views:
        """Views in float32 of what `prepare` gave."""
        groups = {}
        for name, (_, specs) in self._kinds().items():
            waves = parts[name].transpose(0, 1)  # [V B S]
            if any(spec.mix_prob > 0.0 for spec in specs):
                waves = _mixed(waves, share=parts[f"{name}_mixed"].transpose(0, 1))
            banks = (log_mel(waves, num_bins=self.num_bins) - card.mean[0]) / card.std[0]  # [V B T F]
            if any(spec.time_mask or spec.frequency_mask for spec in specs):
                banks = masked_bands(banks, ends=parts[f"{name}_masked"].transpose(0, 1))
            groups[name] = ViewGroup(banks.unsqueeze(2), frame=parts[f"{name}_frames"].transpose(0, 1))
        return Views(groups)


def _mixed(waves: Tensor, *, share: Tensor) -> Tensor:
    """Float[V B S]: the sounds with a share Float[V B] of their neighbour's."""
    B = waves.shape[1]
    position = torch.arange(B, device=waves.device)
    neighbour = torch.where((position ^ 1) < B, position ^ 1, position - 1).clamp(min=0)
    return torch.lerp(waves, waves[:, neighbour], share.unsqueeze(2))


def masked_bands(banks: Tensor, *, ends: Tensor) -> Tensor:
    """Float[V B T F] with zeros, the mean, in the frames and bins that Int[V B 4] names."""
    first_frame, last_frame, first_bin, last_bin = ends.unsqueeze(-1).unbind(2)  # [V B 1] each
    frames, bins = (torch.arange(size, device=banks.device) for size in banks.shape[2:])
    hidden = ((frames >= first_frame) & (frames < last_frame)).unsqueeze(3) | ((bins >= first_bin) & (bins < last_bin)).unsqueeze(2)
    return banks.masked_fill(hidden, 0.0)
