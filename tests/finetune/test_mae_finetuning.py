"""Ten steps of fine-tuning follow the official loops of MAE and FSFM: mixed images, losses, gradients, rates, decay, moved weights.

Ours runs in float64 here, but for the loss, which is always computed in float32; so what moved agrees to about 1e-6.
"""

import pytest
import torch
from batches import Optimized, fitted, largest_difference, method
from golden import load, noise, official_weights
from torch import Tensor

from glpretrain.core.batch import Batch, ViewGroup
from glpretrain.core.schedule import Schedule
from glpretrain.encoders import ViT
from glpretrain.finetune import Classification, base

STEPS, ITEMS = 10, 4
PLACES = (("fc_norm.", "student.heads.task.norm."), ("head.", "student.heads.task.linear."), ("", "student.encoder.model."))


def place_of(name: str) -> str:
    theirs, ours = next(pair for pair in PLACES if name.startswith(pair[0]))
    return ours + name.removeprefix(theirs)


def batch(step: int, *, targets: Tensor) -> Batch:
    items = noise(ITEMS, 3, 32, 32, name=f"g0.{step}").double()
    keys = torch.zeros(1, ITEMS, dtype=torch.int64)
    return Batch(torch.arange(ITEMS), {"global": ViewGroup(items[None], keys=keys)}, torch.ones(ITEMS), targets)


@pytest.mark.parametrize(("name", "classes", "stride", "warmup"), [("mae_finetune", 7, 3, 0.2), ("fsfm_finetune", 2, 1, 0.5)])
def test_ten_steps_follow_the_official_loop_of_fine_tuning(
    name: str, classes: int, stride: int, warmup: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load(name)
    # The official run sets NumPy's generator to the number of the step before images are mixed.
    monkeypatch.setattr(base, "step_key", lambda *, seed, epoch, batch, rank: torch.tensor(batch))
    optimized = Optimized(Schedule(0.004, 0.001, warmup=warmup), Schedule(0.05), layer_decay=0.65, tokens_decay=False)
    encoder = ViT("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)
    settings = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
    model = method(Classification, encoder, optimized, classes=[str(number) for number in range(classes)], **settings).double()
    names = {name: place_of(name) for name in golden["shapes"]}
    assert {name for name, _ in model.named_parameters()} == set(names.values())
    model.load_state_dict({names[name]: value.double() for name, value in official_weights(golden["shapes"]).items()})
    before = {name: value.clone() for name, value in model.state_dict().items()}

    seen = fitted(model, [batch(step, targets=(stride * torch.arange(ITEMS) + step) % classes) for step in range(STEPS)])

    def of_theirs(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[ours] for name, ours in names.items()}

    for step, expected in enumerate(golden["steps"]):
        assert seen.logged[step]["train/classes"] == pytest.approx(expected["classes"], rel=1e-6), step
        if "gradients" in expected:
            assert largest_difference(of_theirs(seen.gradients[step]), expected["gradients"], golden["shapes"]) < 1e-5, step
        if "moved" in expected:
            moved = {name: seen.states[step][ours] - before[ours] for name, ours in names.items()}
            assert largest_difference(moved, expected["moved"], golden["shapes"]) < 1e-5, step
            for name, (rate, decay) in expected["rates"].items():
                assert seen.rates[step][names[name]] == (pytest.approx(rate, rel=1e-9), decay), (step, name)
