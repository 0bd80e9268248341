"""The head of FSFM's detector of spoofed faces: ten steps of the official one, fresh weights, and what it is saved and loaded as."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import assert_moments, load, noise, official_weights
from tuned_models import classifier, data, finished, pictures, trained, vit

from glpretrain.core.types import EncoderOutput
from glpretrain.finetune import Classification, FineTuned, NormalizedHead
from glpretrain.finetune.class_heads import class_head

GOLDEN = load("fsfm_spoofing")
NAMES = {
    "embedder.bottleneck_layer_fc.weight": "bottleneck.weight",
    "embedder.bottleneck_layer_fc.bias": "bottleneck.bias",
    "classifier.classifier_layer.weight": "linear.weight",
    "classifier.classifier_layer.bias": "linear.bias",
}


def head(*, dropout: float = 0.0) -> NormalizedHead:
    made = class_head(768, 2, kind="normalized", pool="mean", norm=False, dropout=dropout)
    assert isinstance(made, NormalizedHead)
    return made


def assert_close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


class _Tokens(torch.nn.Module):
    """Stands for the pooled token: the official ViT gives it as the first of its tokens."""

    def __init__(self, pooled: torch.Tensor) -> None:
        super().__init__()
        self.pooled = pooled

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        assert mean.shape == self.pooled.shape
        return self.pooled


def test_ten_steps_follow_the_official_head() -> None:
    ours = head().double()
    ours.load_state_dict({NAMES[name]: value.double() for name, value in official_weights(GOLDEN["shapes"]).items()})
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-4, weight_decay=0.0)
    ours.train()
    for step, expected in enumerate(GOLDEN["steps"]):
        tokens = noise(6, 5, 768, name=f"tokens.{step}").double().requires_grad_()
        ours.norm = _Tokens(tokens[:, 0])
        logits = ours(EncoderOutput(cls=tokens[:, 0], patches=tokens[:, 1:], registers=None), grid=(2, 2))
        loss = F.cross_entropy(logits, (torch.arange(6) + step) % 2)
        optimizer.zero_grad()
        loss.backward()
        assert_close(logits.flatten(), expected["logits"])
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-9), step
        if "gradients" in expected:
            assert_close(tokens.grad.flatten()[::97], expected["token_gradients"])
            for theirs, values in expected["gradients"].items():
                assert_close(ours.get_parameter(NAMES[theirs]).grad.flatten()[::997], values)
        optimizer.step()
        if "moved" in expected:
            for theirs, values in expected["moved"].items():
                assert_close((ours.get_parameter(NAMES[theirs]) - before[NAMES[theirs]]).detach().flatten()[::997], values)


def test_evaluation_gives_what_training_gives_and_changes_no_weight() -> None:
    torch.manual_seed(0)
    ours, tokens = head(), torch.randn(3, 5, 768)
    output = EncoderOutput(cls=tokens[:, 0], patches=tokens[:, 1:], registers=None)
    before = ours.linear.weight.clone()
    with torch.no_grad():
        evaluated = ours.eval()(output, grid=(2, 2))
        assert torch.equal(ours.linear.weight, before)
        trained = ours.train()(output, grid=(2, 2))
    torch.testing.assert_close(evaluated, trained)
    torch.testing.assert_close(ours.linear.weight.square().sum(dim=0), torch.ones(512))


def test_fresh_weights_are_drawn_as_officially() -> None:
    torch.manual_seed(0)
    ours = head(dropout=0.5)
    for theirs, moments in GOLDEN["initial"].items():
        name = {"bottleneck_layer_fc": "bottleneck", "classifier_layer": "linear"}[theirs.split(".")[0]] + "." + theirs.split(".")[1]
        assert_moments(ours.get_parameter(name), moments, name=theirs)


def test_a_detector_with_it_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = classifier(head="normalized")
    trained(model, data(pictures(tmp_path / "photos")), steps=2)
    saved = finished(model)
    again = FineTuned.load(saved.save(tmp_path / "model"))
    images = noise(2, 3, 16, 16, name="images")
    assert again.branch.heads["task"].settings == {"kind": "normalized", "pool": "mean", "norm": True, "dropout": 0.5}
    with torch.no_grad():
        torch.testing.assert_close(again(images), saved(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": "cls"}, "pool='cls' given with head='normalized'; accepted: mean"),
        ({"dropout": 1.0}, "dropout=1.0 given; accepted: 0 or more"),
    ],
)
def test_what_it_does_not_take_is_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classification(vit(), ["real", "fake"], head="normalized", **settings)
