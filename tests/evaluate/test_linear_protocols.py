"""The linear protocols of DINO and MAE: ten steps of the official code come out, truth scores 100, noise chance, crops differ by epoch."""

import pytest
import torch
from evaluate_stubs import NUM_CLASSES, StubEncoder, TableSource, chance, labelled, noisy, output, truth
from golden import assert_matches, load, wave
from torch import Tensor

from glpretrain import modalities
from glpretrain.encoders import ViT
from glpretrain.evaluate import DecodedItems, DINOLinear, Evaluator, Features, MAELinear
from glpretrain.evaluate.cls.linear_heads import LARS, Heads, initial_heads, train_heads
from glpretrain.evaluate.cls.linear_protocols import LinearProtocol
from glpretrain.evaluate.encoding import normalised

SHORT = {"num_blocks": 1, "epochs": 30}  # of one step
RATES = {DINOLinear: 20.0, MAELinear: 60.0}  # for thirty steps in place of thousands
PROTOCOLS = [pytest.param(DINOLinear, {}, id="dino"), pytest.param(MAELinear, {"warmup_epochs": 2}, id="mae")]


def sources(train: int, test: int) -> dict[str, TableSource]:
    """Items 0 to `train` learn, the `test` next ones are scored."""
    truths = [index % NUM_CLASSES for index in range(train + test)]  # as many of each, so that no bias is needed
    scored = labelled(truths, num_classes=NUM_CLASSES)
    scored.items = scored.items[train:]
    return {"train": labelled(truths[:train], num_classes=NUM_CLASSES), "test": scored}


def ten_steps(evaluator: LinearProtocol, *, rate: float, dim: int, blocks: int) -> tuple[Heads, list[float], list[float]]:
    """Five epochs of two steps on the inputs of the golden numbers: the layer, the losses and the learning rates."""
    heads = initial_heads(evaluator.norm(dim), [rate], dim=dim, num_classes=5)
    heads.layers[0].weight.data.copy_(wave(5, dim, phase=20, scale=0.1))
    optimizer = evaluator.optimizer(heads.layers[0], rate)
    truths = torch.arange(14) ** 2 % 7 % 5
    features = [torch.cat([wave(14, 3, phase=block + 3 * epoch) for block in range(blocks)], dim=1) for epoch in range(5)]
    batches = [(part, truths[7 * step : 7 * step + 7]) for rows in features for step, part in enumerate(rows.split(7))]
    losses: list[float] = []
    rates: list[float] = []
    for loss in train_heads(heads, [optimizer], batches, share=lambda step: evaluator.share(step / 2)):
        losses += loss
        rates.append(optimizer.param_groups[0]["lr"])
    return heads, losses, rates


def test_ten_steps_are_those_of_dinos_code() -> None:
    reference = load("dino_linear")
    heads, losses, rates = ten_steps(DINOLinear(epochs=5, num_blocks=2), rate=40 * 7 / 256, dim=6, blocks=2)
    assert_matches(torch.tensor(rates, dtype=torch.float64), reference["learning_rates"])
    assert_matches(torch.tensor(losses, dtype=torch.float64), reference["losses"])
    assert_matches(heads.layers[0].weight.detach(), reference["weight"])
    assert_matches(heads.layers[0].bias.detach(), reference["bias"])


def test_ten_steps_are_those_of_maes_code() -> None:
    reference = load("mae_linear")
    heads, losses, rates = ten_steps(MAELinear(epochs=5, warmup_epochs=2), rate=100 * 7 / 256, dim=3, blocks=1)
    assert_matches(torch.tensor(rates, dtype=torch.float64), reference["learning_rates"])
    assert_matches(torch.tensor(losses, dtype=torch.float64), reference["losses"])
    assert_matches(heads.layers[0].weight.detach(), reference["weight"])
    assert_matches(heads.layers[0].bias.detach(), reference["bias"])
    assert isinstance(heads.norm, torch.nn.BatchNorm1d)
    assert_matches(heads.norm.running_mean, reference["mean"])
    assert_matches(heads.norm.running_var, reference["variance"])


@pytest.mark.parametrize(("protocol", "options"), PROTOCOLS)
def test_truth_scores_100_and_noise_scores_chance(protocol: type[LinearProtocol], options: dict[str, int]) -> None:
    settings = {**SHORT, **options, "learning_rates": (RATES[protocol],)}
    result = protocol(**settings).run(StubEncoder(truth), sources(60, 43))
    assert result.scores["accuracy"].value == 100 and result.scores["accuracy"].n == 43
    score = protocol(**settings).run(StubEncoder(chance), sources(60, 300)).scores["accuracy"]
    assert abs(score.value - 20) < 100 * 4 * (0.2 * 0.8 / 300) ** 0.5  # 4 standard deviations


@pytest.mark.parametrize(("protocol", "options"), PROTOCOLS)
def test_the_learning_rate_is_chosen_on_held_out_items(protocol: type[LinearProtocol], options: dict[str, int]) -> None:
    rates = (1e-6, RATES[protocol])
    evaluator = protocol(**{**SHORT, **options, "learning_rates": rates})
    given = sources(60, 43)
    result = evaluator.run(StubEncoder(noisy), given)
    assert result.chosen == {"learning_rate": rates[1]}
    alone = protocol(**{**SHORT, **options, "learning_rates": rates[1:]}).run(StubEncoder(noisy), given)
    assert result.scores == alone.scores  # it is trained again on all items
    given["test"].items = [item._replace(label=0) for item in given["test"].items]
    assert evaluator.run(StubEncoder(noisy), given).chosen == result.chosen  # whatever is scored


def test_each_layer_learns_as_it_would_alone() -> None:
    rates, features, truths = [0.5, 4.0], wave(14, 3), torch.arange(14) % 5
    batches = [(features[:7], truths[:7]), (features[7:], truths[7:])] * 3

    def trained(chosen: list[float]) -> Heads:
        heads = initial_heads(torch.nn.Identity(), chosen, dim=3, num_classes=5)
        optimizers = [LARS(layer.parameters(), lr=rate) for layer, rate in zip(heads.layers, chosen, strict=True)]
        assert len(list(train_heads(heads, optimizers, batches, share=lambda step: 1 - step / 6))) == 6
        return heads

    together = trained(rates)
    for layer, rate in zip(together.layers, rates, strict=True):
        assert torch.equal(layer.weight, trained([rate]).layers[0].weight)


class Seen(StubEncoder):
    """Knows nothing, and keeps what it is shown in one step."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []
        super().__init__(self._keep, size=8)

    def _keep(self, items: Tensor) -> object:
        self.shown.append(items)
        return output(items.mean(dim=(2, 3)) @ torch.ones(3, 8))


def gradient_items(count: int) -> TableSource:
    """Pictures of 24 x 40 whose pixels say where they are."""
    source = labelled([index % 2 for index in range(count)], num_classes=2)
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(40), indexing="ij")
    values = torch.stack([10 * rows, 6 * columns, torch.zeros_like(rows)]).to(torch.uint8)
    source.items = [item._replace(values=values) for item in source.items]
    return source


def test_pictures_are_cropped_anew_in_every_epoch_and_scored_by_their_centres() -> None:
    def shown(**options: int) -> list[Tensor]:
        encoder = Seen()
        given = {"train": gradient_items(5), "test": gradient_items(4)}
        DINOLinear(num_blocks=1, epochs=2, items_per_step=3, **options).run(encoder, given)
        return encoder.shown

    batches = shown()
    assert [len(batch) for batch in batches] == [5, 3, 2, 3, 2, 4]  # all of them, two epochs of two steps, what is scored
    centre = batches[0][0]
    assert torch.equal(batches[-1][0], centre) and torch.equal(batches[0][1], centre)
    item = modalities.get("image").resize(gradient_items(1)[0], (3, 8, 8), fit="inner_crop")
    assert torch.equal(centre, item.values.float())
    first, second = torch.cat(batches[1:3]), torch.cat(batches[3:5])
    crops = torch.cat([first, second]).flatten(1)
    assert len(crops.unique(dim=0)) == 10  # of one picture
    steps = torch.cat([first, second])[:, 1, 4].diff(dim=1)  # along the columns
    assert (steps[:, 3] > 0).any() and (steps[:, 3] < 0).any()  # some are flipped
    assert all(torch.equal(one, other) for one, other in zip(shown(), batches, strict=True))
    assert not torch.equal(shown(seed=1)[1], batches[1])


def test_a_last_step_of_fewer_items_is_left_out_by_mae() -> None:
    encoder = Seen()
    given = {"train": gradient_items(5), "test": gradient_items(4)}
    MAELinear(epochs=2, warmup_epochs=0, items_per_step=3).run(encoder, given)
    assert [len(batch) for batch in encoder.shown] == [5, 3, 3, 4]


def test_features_are_the_class_tokens_of_the_last_blocks() -> None:
    encoder = ViT("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=3).eval()
    for number, parameter in enumerate(encoder.parameters()):
        parameter.data = torch.sin(torch.arange(parameter.numel()) * 1.7 + number).reshape(parameter.shape) * 0.3
    pictures = (torch.arange(2 * 3 * 8 * 8) % 251).to(torch.uint8).reshape(2, 3, 8, 8)
    found = DINOLinear(num_blocks=2)._features(encoder, pictures)
    source = labelled([0, 1], num_classes=2)
    source.items = [item._replace(values=picture) for item, picture in zip(source.items, pictures, strict=True)]
    by_layer = [Features(layer=layer).labelled(encoder, DecodedItems(source)).cls for layer in (1, 2)]
    torch.testing.assert_close(found, torch.cat(by_layer, dim=1))
    with torch.no_grad():
        torch.testing.assert_close(found[:, 12:], encoder(normalised(pictures, encoder)).cls)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DINOLinear(epochs=0), "DINOLinear: epochs: 0; accepted: a positive number"),
        (lambda: DINOLinear(learning_rates=()), r"DINOLinear: learning_rates: \[\]; accepted: positive numbers"),
        (lambda: MAELinear(epochs=5), "MAELinear: warmup_epochs: 10; accepted: 0 to 4, fewer than epochs"),
        (lambda: MAELinear(features=Features(crop="inner")), r"features\.crop: inner; this evaluator does not use it"),
    ],
)
def test_settings_are_refused_by_name(make: type[Evaluator], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks: 4; accepted: numbers from 1 to 1, the encoder's depth"):
        DINOLinear().run(StubEncoder(truth), sources(20, 10))
    huge = StubEncoder(lambda items: output(truth(items).cls * 1e25))
    with pytest.raises(ValueError, match=r"learning_rates: \[0\.5\]; a loss is not finite; accepted: smaller ones"):
        DINOLinear(num_blocks=1, epochs=3, learning_rates=(0.5,)).run(huge, sources(20, 10))
