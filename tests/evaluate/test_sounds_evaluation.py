"""Evaluators score sounds as they score images: a click on a cell of time and frequency finds the cells that resemble it."""

import pytest
import torch
from evaluate_stubs import StubEncoder
from golden import noise
from torch import Tensor

from glpretrain.core.fbank import num_samples
from glpretrain.core.types import EncoderCard, EncoderOutput, Item
from glpretrain.data import Sounds, Source
from glpretrain.encoders import PointTransformer, ViT
from glpretrain.evaluate import KNN, LinearSegmentation, PromptSegmentation, default_evaluators

FRAMES, BINS, PATCH = 48, 32, 8


class Bursts(Source):
    """Noise between silence: frames 16 to 32 of the first half of the items, 8 to 24 of the others."""

    name, modality, has_masks = "bursts", "audio", True
    classes = ("late", "early")

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Item:
        early = index >= 12
        first = 8 if early else 16
        start, stop = num_samples(1 + first) - 400, num_samples(first + 16)
        wave = torch.zeros(1, num_samples(FRAMES))
        wave[0, start:stop] = 0.1 * noise(stop - start, name=f"burst {index}")
        instances = torch.zeros(FRAMES, BINS, dtype=torch.int64)
        instances[first : first + 16] = 1
        return Item(wave, int(early), instances, None)


def loud_patches(items: Tensor) -> EncoderOutput:
    """Whether a patch is loud, and in `cls` when it is."""
    energy = items[:, 0].unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).mean(dim=(2, 4))  # [B 6 4]
    loud = (energy > -0.5).float()
    return EncoderOutput(cls=loud.mean(dim=2), patches=torch.stack([loud, 1 - loud], dim=-1).flatten(1, 2))


class LoudEncoder(StubEncoder):
    @property
    def card(self) -> EncoderCard:
        return EncoderCard("LoudEncoder", {}, "audio", (1, FRAMES, BINS), (PATCH, PATCH), 2, (-4.2677393,), (9.1379948,))

    def grid(self, item_shape) -> tuple[int, ...]:
        return item_shape[1] // PATCH, item_shape[2] // PATCH

    def _encode(self, items, *, mask=None, keep=None):
        return self.features(items)


def test_cells_that_know_the_truth_are_found_by_a_click() -> None:
    encoder = LoudEncoder(loud_patches)
    found = PromptSegmentation().run(encoder, {"masked": Bursts()}).scores
    # The frames at the ends of a burst are half silent, and the map is bilinear between patches.
    assert found["miou"].value > 90.0 and found["auc"].value > 99.0
    assert KNN(k=[1]).run(encoder, {"train": Bursts(), "test": Bursts()}).scores["accuracy"].value == 100.0
    assert set(PromptSegmentation().pictures(encoder, {"masked": Bursts()})) == {"similarity", "prompts"}


class ClassifiedBursts(Bursts):
    """The same, with the class of the cells of a burst: whether its sound is an early one."""

    mask_classes = ("silence", "late", "early")

    def __getitem__(self, index: int) -> Item:
        item = super().__getitem__(index)
        return item._replace(semantic=item.instances * (1 + item.label))


def test_a_linear_layer_finds_where_and_when_an_event_is() -> None:
    encoder = LoudEncoder(loud_patches)
    evaluator = LinearSegmentation(learning_rates=[0.3], l2=[1e-5], num_steps=150)
    found = evaluator.run(encoder, {"masked_train": ClassifiedBursts(), "masked": ClassifiedBursts()}).scores
    # A cell knows that it is loud, and not which class it has: silence is found, and one of the two classes stands for both.
    assert found["iou_silence"].value > 90.0 and found["accuracy"].value > 75.0
    assert max(found["iou_late"].value, found["iou_early"].value) > 40.0 > min(found["iou_late"].value, found["iou_early"].value)
    assert set(evaluator.pictures(encoder, {"masked_train": ClassifiedBursts(), "masked": ClassifiedBursts()})) == {"classes"}


def test_the_default_evaluators_of_sounds_score_a_vit() -> None:
    sizes = {"img_size": [32, 32], "patch_size": 8, "in_chans": 1, "embed_dim": 12, "depth": 1, "num_heads": 3}
    encoder = ViT("vit_tiny_patch16_224", **sizes, mean=[-4.3], std=[9.1], modality="audio").eval()
    sources = {"train": Sounds(40, frames=40), "test": Sounds(20, frames=40, split="test"), "masked": Sounds(16, frames=40, split="test")}
    evaluators = default_evaluators("audio")
    assert set(evaluators) == {"knn", "linear", "prompt"}
    for name, evaluator in evaluators.items():
        scores = evaluator.run(encoder, {role: sources[role] for role in evaluator.needs}).scores
        assert all(0.0 <= scores[headline].value <= 100.0 for headline in evaluator.headlines), name


def test_tokens_that_are_on_no_such_grid_are_refused() -> None:
    points = PointTransformer("pos_bert_base", num_points=40, points_per_token=4, group_size=4, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ValueError, match="tokens on a grid of 1 axes; PromptSegmentation accepts: 2"):
        PromptSegmentation().run(points, {"masked": Bursts()})
