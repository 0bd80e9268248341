"""MAE's patches, masks and pixel loss against the official code."""

import pytest
import torch
from batches import unpatchify
from golden import assert_matches, load, wave

from glpretrain.core import keys
from glpretrain.core.batch import visible_indices
from glpretrain.core.patches import patchify
from glpretrain.masking import RandomMask
from glpretrain.objectives.reconstruction import PatchPixels

GOLDEN = load("mae")


def test_patchify_puts_the_numbers_of_a_patch_in_the_official_order() -> None:
    assert_matches(patchify(wave(2, 3, 6, 6, phase=0.5), patch_size=(2, 2)), GOLDEN["patches"], atol=1e-7, rtol=0.0)  # only moved


def test_unpatchify_is_the_official_one() -> None:
    images = unpatchify(wave(2, 9, 12, phase=1.5), patch_size=(2, 2), grid=(3, 3), num_channels=3)
    assert_matches(images, GOLDEN["images"], atol=1e-7, rtol=0.0)


@pytest.mark.parametrize(("num_tokens", "ratio", "num_kept"), GOLDEN["kept_counts"])
def test_random_mask_keeps_as_many_tokens_as_the_official_code(num_tokens: int, ratio: float, num_kept: int) -> None:
    key = keys.item_keys(seed=0, epoch=0, index=torch.arange(2))
    if num_kept == 0:
        with pytest.raises(ValueError, match="keeps none"):
            RandomMask(ratio)(key, (1, num_tokens))
    else:
        assert (~RandomMask(ratio)(key, (1, num_tokens))).sum(dim=1).tolist() == [num_kept, num_kept]


@pytest.mark.parametrize("case", GOLDEN["random_masking"], ids=lambda case: f"ratio {case['ratio']}")
def test_kept_names_the_tokens_that_the_official_code_keeps(case: dict) -> None:
    indices = visible_indices(torch.tensor(case["mask"]).bool())
    assert indices.tolist() == [sorted(row) for row in case["ids_keep"]]


@pytest.mark.parametrize("case", GOLDEN["losses"]["float64"], ids=lambda case: f"norm_pix_loss {case['norm_pix_loss']}")
def test_pixel_loss_and_gradient_are_the_official_ones(case: dict) -> None:
    mask = torch.tensor(GOLDEN["random_masking"][0]["mask"][:2]).bool()
    predictions = wave(2, 9, 12, phase=3.5).requires_grad_()
    targets = patchify(wave(2, 3, 6, 6, phase=0.5), patch_size=(2, 2))
    loss = PatchPixels(normalise=case["norm_pix_loss"])(predictions=predictions, targets=targets, mask=mask).mean()
    loss.backward()
    assert_matches(loss.detach(), case["loss"])
    assert_matches(predictions.grad, case["gradient"])
