"""What a run refuses to go on with: a checkpoint of another run."""

import pytest
from batches import method

from glpretrain.encoders import ViT
from glpretrain.methods import DINO
from glpretrain.training.checks import identity, require_same_run
from glpretrain.training.item_losses import ItemLosses


def dino(*, from_weights: bool = False) -> DINO:
    def encoder() -> ViT:
        return ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3)

    model = method(DINO, encoder(), num_prototypes=7, hidden_dim=11, bottleneck_dim=5)
    if from_weights:
        model.init_from(encoder())
    return model


def written(model: DINO) -> dict[str, object]:
    return {"state_dict": model.state_dict(), **identity(model)}


@pytest.mark.parametrize("from_weights", [False, True])
def test_a_run_goes_on_from_its_own_checkpoint_and_from_no_other(from_weights: bool) -> None:
    model, other = dino(from_weights=from_weights), dino(from_weights=not from_weights)
    require_same_run(model, written(model))
    with pytest.raises(ValueError, match="checkpoint: it was written by IBOT, this run is DINO; give the same method"):
        require_same_run(model, {**written(model), "method": "IBOT"})
    with pytest.raises(ValueError, match=r"checkpoint: its experts\.uni has the weights 123abc, this run's none; give the same experts"):
        require_same_run(model, {**written(model), "experts": {"experts.uni": "123abc"}})
    how = "without" if from_weights else "with"
    with pytest.raises(ValueError, match=f"checkpoint: it was written {how} init_from; resume it {how} init_from"):
        require_same_run(model, written(other))


@pytest.mark.parametrize("remembers", [False, True])
def test_a_run_that_remembers_losses_of_items_goes_on_from_one_that_did(remembers: bool) -> None:
    model, other = dino(), dino()
    (model if remembers else other).item_losses = ItemLosses(3)
    require_same_run(model, written(model))
    how = "without" if remembers else "with"
    with pytest.raises(ValueError, match=f"checkpoint: it was written {how} a data.order that looks at losses; resume it with the same"):
        require_same_run(model, written(other))
