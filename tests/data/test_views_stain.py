"""Stain jitter is colour deconvolution, turns are torch's, and both belong to the item alone."""

import pytest
import torch
from scipy.stats import kstest
from skimage.color import hed2rgb, rgb2hed
from view_parts import augment, flips, views_of

from glpretrain.core import keys as rng
from glpretrain.core.frames import token_centres
from glpretrain.data.views import MultiCrop, ViewSpec, colour
from glpretrain.data.views.resample import oriented
from glpretrain.data.views.stain import quarter_turns, restain

KEYS = rng.item_keys(seed=0, epoch=0, index=torch.arange(4000))


def tissue(count: int) -> torch.Tensor:
    """Float[B 3 5 7]: mixtures of the three dyes, none of them negative, none so much that a pixel is black."""
    amounts = 0.02 + 0.05 * (1 + torch.sin(torch.arange(count * 5 * 7 * 3, dtype=torch.float64) ** 1.3)).reshape(count, 5, 7, 3)
    return torch.from_numpy(hed2rgb(amounts.numpy())).permute(0, 3, 1, 2).float()


def test_dyes_are_separated_and_mixed_as_scikit_image_does() -> None:
    images = tissue(3)
    gains, offsets = torch.tensor([[1.3, 0.7, 1.0], [0.8, 1.0, 1.2], [1.0, 1.1, 0.9]]), torch.zeros(3, 3)
    ours = restain(images, gains=gains, offsets=offsets)
    for image, gain, result in zip(images, gains, ours, strict=True):
        theirs = hed2rgb(rgb2hed(image.permute(1, 2, 0).numpy()) * gain.numpy())
        torch.testing.assert_close(result.permute(1, 2, 0), torch.from_numpy(theirs).float(), rtol=0, atol=1e-5)


def test_an_offset_adds_the_dyes_own_density() -> None:
    images, amount = tissue(1), 0.2
    for dye, densities in enumerate(([0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78])):
        offsets = torch.zeros(1, 3)
        offsets[0, dye] = amount
        changed = restain(images, gains=torch.ones(1, 3), offsets=offsets)
        expected = images * torch.exp(-amount * torch.tensor(densities)).view(1, 3, 1, 1)
        torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-6)


def test_no_change_gives_the_image_and_black_and_white_stay_finite() -> None:
    images = torch.cat([tissue(1), torch.zeros(1, 3, 5, 7), torch.ones(1, 3, 5, 7)])
    same = restain(images, gains=torch.ones(3, 3), offsets=torch.zeros(3, 3))
    torch.testing.assert_close(same, images.clamp(min=1e-3), rtol=0, atol=2e-6)
    wild = restain(images, gains=torch.full((3, 3), 1.5), offsets=torch.full((3, 3), -0.5))
    assert torch.isfinite(wild).all() and wild.min() >= 0 and wild.max() <= 1


def stained(images: torch.Tensor, *, strength: float, prob: float) -> torch.Tensor:
    return augment(images, spec=ViewSpec(16, (0.5, 1.0), stain=strength, stain_prob=prob), keys=KEYS[: len(images)])


def test_gains_are_uniform_and_hit_their_share() -> None:
    grey = torch.full((4000, 3, 1, 1), 0.5)
    moved = (stained(grey, strength=0.2, prob=0.25) != grey).flatten(1).any(dim=1)
    assert abs(moved.float().mean().item() - 0.25) < 0.028  # four standard deviations
    changed = stained(grey, strength=0.2, prob=1.0)
    draws = 0.4 * rng.uniform(rng.fold_in(rng.fold_in(KEYS, colour._STAIN), 1), 2, 3) - 0.2
    expected = restain(grey, gains=1 + draws[:, 0], offsets=draws[:, 1])
    torch.testing.assert_close(changed, expected)
    assert kstest((draws[:, 0, 1] / 0.4 + 0.5).double().numpy(), "uniform").pvalue > 1e-3


def test_stain_is_off_unless_asked_and_leaves_other_draws_alone() -> None:
    images = tissue(6)
    plain = ViewSpec(16, (0.5, 1.0), brightness=0.3, jitter_prob=1.0)
    never = ViewSpec(16, (0.5, 1.0), brightness=0.3, jitter_prob=1.0, stain=0.2, stain_prob=0.0)
    assert torch.equal(augment(images, spec=plain, keys=KEYS[:6]), augment(images, spec=never, keys=KEYS[:6]))
    some = ViewSpec(16, (0.5, 1.0), jitter_prob=0.0, stain=0.2, stain_prob=1.0)
    together = augment(images, spec=some, keys=KEYS[:6])
    alone = torch.cat([augment(image[None], spec=some, keys=key[None]) for image, key in zip(images, KEYS[:6], strict=True)])
    assert torch.equal(together, alone) and (together != images).flatten(1).any(dim=1).all()


def test_turns_are_torchs_and_hit_their_shares() -> None:
    images, turns = torch.arange(4 * 2 * 5 * 5.0).reshape(4, 2, 5, 5), torch.tensor([0, 1, 2, 3])
    for image, count in zip(images, turns.tolist(), strict=True):
        assert torch.equal(oriented(image, flip=True, turns=count), torch.rot90(image.flip(2), count, (1, 2)))
    counts = torch.bincount(quarter_turns(KEYS, prob=0.6), minlength=4) / 4000
    assert (counts - torch.tensor([0.4, 0.2, 0.2, 0.2])).abs().max() < 0.031  # four standard deviations


def place_of(views: torch.Tensor) -> torch.Tensor:
    """Float[B N 2] of views of an image whose channels hold x and y: what each of 4 x 4 tokens shows."""
    return torch.nn.functional.avg_pool2d(views[:, :2], 4).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_frames_tell_where_tokens_of_turned_views_came_from(flip: float) -> None:
    """The image says of every pixel where it is, so a view says where its tokens came from; the frames must say the same."""
    ramp = (torch.arange(240) + 0.5).round()  # levels: as exact as bytes can be
    image = torch.stack([ramp.expand(240, 240), ramp.view(-1, 1).expand(240, 240), torch.zeros(240, 240)]).to(torch.uint8)
    crops = MultiCrop([ViewSpec(16, (0.3, 0.8), turn_prob=0.75, flip=flip, jitter_prob=0.0, interpolation="bilinear")])
    regions = (image[0] // 60).long()
    statistics = {"mean": [0.0] * 3, "std": [240 / 255] * 3}
    views = views_of(crops, images=[image] * 24, keys=KEYS[:24], **statistics, regions=[regions] * 24)
    frames = views.groups["global"].frame[0]  # [B 2 3]
    assert (flips(frames) == bool(flip)).all()
    assert len({tuple(frame) for frame in frames[..., :2].sign().flatten(1).tolist()}) == 4  # all quarter turns
    centres = token_centres(frames, grid=(4, 4)).flip(-1)  # columns, rows
    torch.testing.assert_close(place_of(views.groups["global"].items[0]), centres, rtol=0, atol=0.01)
    # Regions, strips of x here, are turned with the pixels.
    strips = views.groups["global"].items[0][:, 0] * 4
    away = (strips - strips.round()).abs() > 0.1  # of the border between two
    assert torch.equal(views.regions[0][away], strips.long()[away])


def test_what_cannot_be_turned_or_stained_is_refused() -> None:
    with pytest.raises(ValueError, match=r"turn_prob is 0\.5 and size is \(16, 24\); expected a square view"):
        ViewSpec((16, 24), (0.5, 1.0), turn_prob=0.5)
    with pytest.raises(ValueError, match=r"turn_prob is 2; expected a value in \[0, 1\]"):
        ViewSpec(16, (0.5, 1.0), turn_prob=2)
    with pytest.raises(ValueError, match=r"stain is -0\.1; expected a value in \[0, inf\]"):
        ViewSpec(16, (0.5, 1.0), stain=-0.1)
    grey = MultiCrop([ViewSpec(16, (0.5, 1.0), stain=0.1)])
    with pytest.raises(ValueError, match=r"stain=0.1 needs RGB items"):
        views_of(grey, images=torch.zeros(1, 1, 16, 16, dtype=torch.uint8), keys=KEYS[:1], mean=[0.0], std=[1.0])
