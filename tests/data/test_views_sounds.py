"""Views of sounds: keyed, where their frames say, mixed with the neighbour, masked as SpecAugment does, and corrupted as ASiT does."""

import pytest
import torch
from golden import load, noise
from torch import Tensor

from glpretrain.core import keys as rng
from glpretrain.core.batch import ViewGroup
from glpretrain.core.fbank import log_mel, num_samples
from glpretrain.core.frames import token_centres
from glpretrain.core.types import EncoderCard, Item
from glpretrain.data import Sounds
from glpretrain.data.module import DataModule
from glpretrain.data.views import SoundCrops, SoundViewSpec
from glpretrain.masking import GroupCorruption

CARD = EncoderCard("ViT", {"name": "a"}, "audio", (1, 24, 16), (8, 8), 4, (-4.0,), (9.0,))
SILENT = (float(log_mel(torch.zeros(400)).max()) + 4.0) / 9.0


def keys(count: int = 4, *, epoch: int = 0) -> Tensor:
    return rng.item_keys(seed=3, epoch=epoch, index=torch.arange(count))


def items(count: int = 4, *, length: int = 9000) -> list[Item]:
    return [Item(noise(1, length + 800 * number, name=f"sound {number}"), -1, None, None) for number in range(count)]


def made(crops: SoundCrops, sounds: list[Item], own: Tensor) -> dict[str, ViewGroup]:
    parts = crops.prepare(sounds, keys=own, card=CARD)
    return crops.make(parts, changes=crops.draw(own), keys=own, card=CARD).groups


def test_a_view_depends_on_its_items_key_only() -> None:
    crops = SoundCrops([SoundViewSpec(24, count=2, time_mask=6, frequency_mask=5)], [SoundViewSpec(16, count=3)], 16, shift_prob=0.5)
    whole, part = made(crops, items(), keys()), made(crops, items()[2:], keys()[2:])
    assert whole["global"].items.shape == (2, 4, 1, 24, 16) and whole["local"].items.shape == (3, 4, 1, 16, 16)
    for name in ("global", "local"):
        torch.testing.assert_close(whole[name].items[:, 2:], part[name].items)
        assert torch.equal(whole[name].frame[:, 2:], part[name].frame)
    assert not torch.equal(whole["global"].items[0], whole["global"].items[1])
    assert not torch.equal(whole["global"].items, made(crops, items(), keys(epoch=1))["global"].items)
    assert crops.groups(1) == {"global": (2, (1, 24, 16)), "local": (3, (1, 16, 16))} and crops.default_size() == 32


def test_one_more_global_view_changes_no_other() -> None:
    one = made(SoundCrops([SoundViewSpec(24)], [SoundViewSpec(16)], 16), items(), keys())
    two = made(SoundCrops([SoundViewSpec(24, count=2)], [SoundViewSpec(16)], 16), items(), keys())
    assert torch.equal(one["local"].items, two["local"].items) and torch.equal(one["global"].items, two["global"].items[:1])


def test_a_view_is_the_filterbank_of_the_stretch_that_its_frame_names() -> None:
    sounds = items()
    group = made(SoundCrops([SoundViewSpec(24, count=2)], num_bins=16), sounds, keys())["global"]
    for view in range(2):
        for number, item in enumerate(sounds):
            frame, length = group.frame[view, number], item.values.shape[1]
            start = round(float(frame[0, 2]) * length)
            assert frame[0, 0].item() * length == pytest.approx(num_samples(24), rel=1e-5)
            expected = (log_mel(item.values[:, start : start + num_samples(24)], num_bins=16) + 4.0) / 9.0
            torch.testing.assert_close(group.items[view, number], expected)
    centres = token_centres(group.frame, grid=(3, 2))  # [V B 6 2]
    assert bool(((centres > 0) & (centres < 1)).all()) and centres[0, 0, :2, 1].tolist() == [0.25, 0.75]


def test_starts_are_uniform_over_the_sound() -> None:
    sound = items(1, length=num_samples(24) + 1000)[0]
    frames = SoundCrops([SoundViewSpec(24)], num_bins=16).prepare([sound] * 600, keys=keys(600), card=CARD)["global_frames"]
    starts = frames[:, 0, 0, 2] * sound.values.shape[1]
    assert starts.min() < 15 and starts.max() > 985
    assert abs(starts.mean().item() - 500) < 4.5 * 289 / 600**0.5


def test_silence_follows_a_sound_that_is_too_short() -> None:
    group = made(SoundCrops([SoundViewSpec(24)], num_bins=16), items(1, length=num_samples(10)), keys(1))["global"]
    torch.testing.assert_close(group.items[0, 0, 0, 13:], torch.full((11, 16), SILENT))
    assert group.frame[0, 0, 0, 0].item() == pytest.approx(num_samples(24) / num_samples(10))


def test_half_of_the_sounds_are_shifted_in_a_circle() -> None:
    ramps = [Item(torch.arange(1.0, 501.0).unsqueeze(0), -1, None, None)] * 400
    crops = SoundCrops([SoundViewSpec(1, count=2)], num_bins=4, shift_prob=0.5)
    parts = crops.prepare(ramps, keys=keys(400), card=CARD)
    begins, starts = parts["global"][:, :, 0], (parts["global_frames"][:, :, 0, 2] * 500).round()
    moved = (begins - 1 - starts) % 500  # [B V]
    assert torch.equal(moved[:, 0], moved[:, 1])  # one shift for all views of an item
    assert abs((moved[:, 0] > 0).float().mean().item() - 0.5) < 4.5 * (0.25 / 400) ** 0.5
    assert bool((parts["global"].diff(dim=2).remainder(500) == 1).all())


def test_a_mixture_is_with_the_neighbour_by_the_share_that_is_drawn() -> None:
    spec = SoundViewSpec(24, mix_prob=0.5, mix_share=(0.2, 0.4))
    crops, sounds = SoundCrops([spec], num_bins=16), items(6)
    parts = crops.prepare(sounds, keys=keys(6), card=CARD)
    share, waves = parts["global_mixed"][:, 0], parts["global"][:, 0]
    assert 0 < int((share > 0).sum()) < 6 and bool(((share == 0) | ((share >= 0.2) & (share <= 0.4))).all())
    found = made(crops, sounds, keys(6))["global"].items[0, :, 0]
    for number in range(6):
        mixture = (1 - share[number]) * waves[number] + share[number] * waves[number ^ 1]
        torch.testing.assert_close(found[number], (log_mel(mixture, num_bins=16) + 4.0) / 9.0, rtol=1e-4, atol=1e-4)
    always = SoundCrops([SoundViewSpec(24, mix_prob=1.0)], num_bins=16)
    alone = made(always, sounds[:1], keys(1))["global"].items[0, 0]
    torch.testing.assert_close(alone, (log_mel(always.prepare(sounds[:1], keys=keys(1), card=CARD)["global"][0], num_bins=16) + 4.0) / 9.0)


def test_masks_of_frames_and_bins_are_uniform_and_hold_the_mean() -> None:
    spec = SoundViewSpec(24, time_mask=8, frequency_mask=4)
    crops, sounds = SoundCrops([spec], num_bins=16), items(1) * 500
    masked = crops.prepare(sounds, keys=keys(500), card=CARD)["global_masked"][:, 0]  # [B 4]
    first_frame, last_frame, first_bin, last_bin = masked.unbind(1)
    for first, last, most, size in ((first_frame, last_frame, 8, 24), (first_bin, last_bin, 4, 16)):
        width = last - first
        assert width.min() == 0 and width.max() == most and first.min() == 0 and last.max() == size
        assert abs(width.float().mean().item() - most / 2) < 4.5 * (most * (most + 2) / 12 / 500) ** 0.5
    found = made(crops, sounds[:20], keys(20))["global"].items[0, :, 0] == 0.0
    for number in range(20):
        frames, bins = torch.arange(24), torch.arange(16)
        in_time = (frames >= first_frame[number]) & (frames < last_frame[number])
        assert torch.equal(found[number], in_time[:, None] | ((bins >= first_bin[number]) & (bins < last_bin[number]))[None])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 0}, "at least 1"),
        ({"frames": 8, "mix_prob": 1.5}, "mix_prob"),
        ({"frames": 8, "mix_share": (0.5, 0.2)}, "mix_share"),
        ({"frames": 8, "time_mask": 9}, "from 0 to 8, not 9"),
        ({"frames": 8, "frequency_mask": -1}, "frequency_mask"),
    ],
    ids=["frames", "mix_prob", "mix_share", "time_mask", "frequency_mask"],
)
def test_settings_outside_their_range_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoundViewSpec(**wrong)


def test_makers_refuse_what_does_not_fit() -> None:
    view = SoundViewSpec(24)
    refused = (
        (([],), "global_views is empty"),
        (([view, SoundViewSpec(16)],), r"\[16, 24\] frames"),
        (([SoundViewSpec(24, frequency_mask=17)], None, 16), "num_bins = 16"),
        (([view], None, 0), "num_bins is at least 1"),
        (([view], None, 16, 2.0), "shift_prob"),
    )
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            SoundCrops(*arguments)
    with pytest.raises(ValueError, match="no sound of one channel"):
        SoundCrops([view]).prepare([Item(torch.zeros(3, 8, 8), -1, None, None)], keys=keys(1), card=CARD)


def test_a_batch_of_sounds_has_corrupted_views_of_its_own_shape() -> None:
    class Patches:
        card = CARD

        @staticmethod
        def grid(shape: tuple[int, ...]) -> tuple[int, int]:
            return shape[1] // 8, shape[2] // 8

    crops = SoundCrops([SoundViewSpec(24, count=2)], num_bins=16)
    data = DataModule(Sounds(6, frames=40), crops, batch_size=6, corruption=GroupCorruption(0.5, align=1))
    group = data.make_batch(data.raw_batch(range(6), encoder=Patches(), epoch=0), encoder=Patches()).views["global"]
    assert group.corrupted.shape == group.items.shape == (2, 6, 1, 24, 16) and group.corruption.shape == (2, 6, 24, 16)
    kept = ~group.corruption.unsqueeze(2)
    assert torch.equal(group.corrupted[kept], group.items[kept]) and 0.3 < group.corruption.float().mean() < 0.6


@pytest.mark.parametrize("case", load("asit_masks")["cases"], ids=lambda case: f"align {case['align']} ratio {case['ratio']}")
def test_corruption_of_a_long_view_is_distributed_as_asits(case: dict) -> None:
    """Means at most 4.5 standard errors apart, as in `masking/test_token_masks.py`."""
    count, (rows, columns) = 200, case["size"]
    corrupt = GroupCorruption(case["ratio"], align=case["align"], replace_prob=0.0)
    corruption = corrupt(torch.ones(count, 1, rows, columns), keys(count))[1].float()
    patches = corruption.unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).mean(dim=(2, 4))
    found = {
        "share": corruption.mean(dim=(1, 2)),
        "touched": (patches > 0).float().mean(dim=(1, 2)),
        "hidden": (patches == 1).float().mean(dim=(1, 2)),
    }
    for name, values in found.items():
        mean, deviation = case[name]
        error = (deviation**2 / case["draws"] + float(values.var()) / count) ** 0.5
        assert abs(float(values.mean()) - mean) <= 4.5 * error + 1e-6, (name, float(values.mean()), mean)
