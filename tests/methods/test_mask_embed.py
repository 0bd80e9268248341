"""MaskEmbed against the official code: masks, targets, decoder, scale, losses, gradients and moved weights; and what it is handed."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from batches import Optimized, batch_of, fitted, largest_difference, method, views_of
from contract import build
from golden import assert_matches, load, noise, official_weights
from processes import free_port, together
from shrinking import ROOT, shrunk
from torch import Tensor

from glpretrain.cli.training import Training
from glpretrain.core.batch import Batch
from glpretrain.core.schedule import Schedule
from glpretrain.encoders import Encoder, FeatureMap, ViT
from glpretrain.encoders.layers import features_of_layers, without_last_blocks
from glpretrain.encoders.sequences import joined_tokens
from glpretrain.methods import MaskEmbed
from glpretrain.objectives.reconstruction import MaskedFeatures
from glpretrain.training.optim import TrunkRelease
from glpretrain.training.target_scale import TargetScale

MASKS, GOLDEN = load("mask_embed_masks"), load("mask_embed_model")
COUNTED = {"mse": "all", "masked_mse": "hidden", "unmasked_mse": "visible"}
NAMES = (
    ("encoder.head.", "student.heads.embed."),
    ("encoder.", "student.encoder.model."),
    ("decoder.pos_embed", "student.heads.decoder.position"),
    ("decoder.head.", "student.heads.decoder.predict."),
    ("decoder.", "student.heads.decoder."),
)


def encoder(*, depth: int = 3, size: int = 32, **changes: object) -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=size, patch_size=8, embed_dim=12, depth=depth, num_heads=3, **changes)


def name_of(official: str) -> str:
    theirs, ours = next(pair for pair in NAMES if official.startswith(pair[0]))
    return ours + official.removeprefix(theirs)


def shares(name: str, *, first: int, count: int) -> Tensor:
    """Float[count], the numbers in [0, 1] that the generators of the golden runs were replaced by."""
    return ((noise(100000, name=name).double()[first : first + count] + 1) / 2).float()


def hidden_masks(name: str, *, step: int = 0) -> Tensor:
    """Bool[1 3 16]: the first of every three rows that the official sampler draws; the others it writes over."""
    draws = shares(name, first=step * 9 * 17, count=9 * 17).reshape(9, 17)[::3]
    return (draws[:, 1:] <= draws[:, :1]).unsqueeze(0)


def made(**settings: object) -> MaskEmbed:
    """Student and teacher with the weights of the golden run."""
    optimized = Optimized(Schedule(1e-3, shape="constant"), betas=(0.9, 0.95), layer_decay=1.0, trunk=TrunkRelease(ramp=0.0))
    model = method(MaskEmbed, encoder(), optimized, decoder_dim=16, decoder_heads=2, **{"scale_items": None, **settings})
    start = encoder()
    theirs = {f"teacher.{name}": shape for name, shape in GOLDEN["teacher_shapes"].items()}
    weights = {name.removeprefix("teacher."): value for name, value in official_weights(theirs).items()}
    start.load_backbone_state(start.backbone_state() | weights)  # the last block keeps its own: the teacher leaves it out
    model.init_from(start)
    state = model.state_dict()
    for name, value in official_weights(GOLDEN["shapes"]).items():
        state[name_of(name)] = value.reshape(state[name_of(name)].shape)
    model.load_state_dict(state)
    return model


def batch(step: int, *, masks: str = "masks") -> Batch:
    return batch_of(views_of("g", 1, step=step), mask=hidden_masks(masks, step=step))


def test_the_student_has_every_tensor_of_the_official_one() -> None:
    own = {name for name in made().state_dict() if name.startswith("student.")}
    assert own == {name_of(name) for name in GOLDEN["shapes"]}


@pytest.mark.parametrize("case", MASKS["uniform"], ids=lambda case: f"antithetical {case['antithetical']} null {case['null']}")
def test_masks_stand_in_the_official_order(case: dict) -> None:
    rows = torch.tensor(case["masks"], dtype=torch.bool)  # [(B M) N]
    num_masks = 1 + case["antithetical"] + case["null"]
    model = method(MaskEmbed, encoder(), antithetical=case["antithetical"], null=case["null"])
    drawn = ~rows.unflatten(0, (-1, num_masks))[:, 0]  # [B N]
    visible = model.visible(batch_of(views_of("g", 1, items=len(drawn)), mask=drawn.unsqueeze(0)))
    assert torch.equal(visible.flatten(0, 1), rows)


def test_targets_are_those_of_the_official_teacher() -> None:
    model = made()
    found = model.targets(views_of("g", 1)[0], visible=model.visible(batch(0))).flatten(0, 1)
    assert_matches(found[:, ::3, ::2], GOLDEN["targets"], atol=1e-5)


def test_predictions_are_those_of_the_official_student() -> None:
    model = made().eval()
    heads, visible = model.student.heads, model.visible(batch(0))
    with torch.no_grad():
        found = heads["decoder"](heads["embed"](model.encoder(views_of("g", 1)[0]).patches), visible=visible).flatten(0, 1)
    assert_matches(found[:, ::3, ::2], GOLDEN["decoded"], atol=1e-5)


def test_the_scale_is_the_official_one() -> None:
    model = made()

    def targets(number: int) -> Tensor:
        draws = shares(f"measured {number}", first=0, count=9 * 17).reshape(9, 17)[::3]
        drawn = batch_of(views_of("g", 1, step=number), mask=(draws[:, 1:] <= draws[:, :1]).unsqueeze(0))
        return model.targets(drawn.views["global"].items[0], visible=model.visible(drawn))

    model.scale.measure(targets(number) for number in range(2))
    assert float(model.scale.scale) == pytest.approx(GOLDEN["variance"] ** -0.5, rel=1e-5)


@pytest.mark.parametrize("loss", COUNTED)
def test_it_follows_the_official_run_from_views_to_moved_weights(loss: str) -> None:
    golden = GOLDEN["runs"][loss]
    model = made(counted=COUNTED[loss])
    if loss == "mse":  # the official code scales the targets of no other loss
        model.scale.scale.fill_(GOLDEN["variance"] ** -0.5)
    names = {name: name_of(name) for name in GOLDEN["shapes"]}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = fitted(model, [batch(step) for step in range(len(golden["losses"]))])
    assert [logged["train/features"] for logged in seen.logged] == pytest.approx(golden["losses"], rel=1e-5)
    for step, expected in zip((0, -1), golden["gradients"], strict=False):
        found = {name: seen.gradients[step][ours] for name, ours in names.items()}
        assert largest_difference(found, expected, GOLDEN["shapes"]) < (1e-5 if step == 0 else 3e-5), step
    if "moved" in golden:
        # Without biases of queries, keys and values: those of keys change nothing, so that rounding alone decides where they go.
        expected = {name: values for name, values in golden["moved"].items() if not name.endswith("attn.qkv.bias")}
        after = {name: seen.states[-1][names[name]] - before[names[name]] for name in expected}
        assert largest_difference(after, expected, GOLDEN["shapes"]) < 3e-4


# What is handed to whom -----------------------------------------------------------------------------------------------------


def inputs_of(part: torch.nn.Module) -> list[Tensor]:
    """A list that gets what the module is given."""
    seen: list[Tensor] = []
    part.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    return seen


def test_the_teacher_sees_masked_images_and_the_student_whole_ones() -> None:
    model, given = made(), batch(0)
    (views,), visible = given.views["global"].items, model.visible(given)
    taught, learned = inputs_of(model.original.encoder), inputs_of(model.encoder)
    model.losses(given, 0.5)
    assert len(taught) == len(learned) == 1 and torch.equal(learned[0], views)
    for item in range(3):
        for mask in range(3):
            for row in range(4):
                for column in range(4):
                    place = (..., slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
                    expected = views[item][place] * visible[item, mask, 4 * row + column]
                    assert torch.equal(taught[0][3 * item + mask][place], expected)


def test_the_teacher_is_the_backbone_without_its_last_block() -> None:
    start = encoder()
    items = views_of("g", 1)[0]
    for count in (0, 1, 2):
        expected = features_of_layers(start, items, layers=[2 - count])[0]
        shortened = without_last_blocks(start, count=count)
        assert shortened.num_layers == 3 - count and shortened.card.arguments["depth"] == 3 - count
        torch.testing.assert_close(shortened(items).patches, expected.patches, rtol=0.0, atol=0.0)
    assert start.num_layers == 3


def test_the_decoder_is_handed_nothing_of_hidden_patches_nor_of_tokens_before_them() -> None:
    model, given = made(), batch(0)
    visible = model.visible(given)
    seen = inputs_of(model.student.heads["decoder"].blocks)
    model.losses(given, 0.5)
    embeddings = model.student.heads["embed"](model.encoder(given.views["global"].items[0]).patches)  # [B N E]
    tokens = seen[0] - model.student.heads["decoder"].position
    assert torch.count_nonzero(tokens[:, 0].abs() > 1e-6) == 0
    expected = torch.where(visible.unsqueeze(-1), embeddings.unsqueeze(1), 0.0).flatten(0, 1)
    torch.testing.assert_close(tokens[:, 1:], expected, rtol=1e-5, atol=1e-5)


def test_before_the_first_step_all_images_are_predicted_alike() -> None:
    model = method(MaskEmbed, encoder())
    heads, given = model.student.heads, batch(0)
    found = heads["decoder"](heads["embed"](model.encoder(given.views["global"].items[0]).patches), visible=model.visible(given))
    assert torch.equal(found, found[:1, :1].expand_as(found)) and float(found[0, 0].detach().std()) > 0.01


def test_registers_stand_between_class_token_and_patches() -> None:
    model = ViT("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3, reg_tokens=2)
    items = views_of("g", 1)[0]
    torch.testing.assert_close(joined_tokens(model(items), has_class_token=True), model.model.forward_features(items))
    aligned = method(MaskEmbed, model)
    assert aligned.targets(items, visible=torch.ones(3, 2, 16, dtype=torch.bool)).shape == (3, 2, 19, 12)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_other_kinds_of_vits_are_aligned_too(name: str) -> None:
    model = method(MaskEmbed, ViT(name, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
    model.init_from(ViT(name, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3))
    torch.nn.init.ones_(model.student.heads["embed"].weight)
    loss = model.losses(batch(0), 0.5)["features"].mean()
    loss.backward()
    assert bool(torch.isfinite(loss)) and model.original.encoder.num_layers == 1
    assert any(float(parameter.grad.abs().max()) > 0 for parameter in model.encoder.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("counted", ["all", "hidden", "visible"])
def test_the_loss_counts_the_tokens_that_it_says(counted: str) -> None:
    predictions, targets = noise(2, 3, 7, 5, name="predictions"), noise(2, 3, 7, 5, name="targets")
    visible = noise(2, 3, 5, name="visible") > 0  # two tokens before five patches
    found = MaskedFeatures(counted=counted)(predictions=predictions, targets=targets, visible=visible)
    for item in range(2):
        total = 0.0
        for mask in range(3):
            for token in range(7):
                is_visible = token >= 2 and bool(visible[item, mask, token - 2])
                if token < 2 or counted == "all" or (counted == "visible") == is_visible:
                    total += float((predictions[item, mask, token] - targets[item, mask, token]).square().sum())
        assert float(found[item]) == pytest.approx(total / (3 * 7 * 5), rel=1e-5)


# The scale, the start, and what is refused -----------------------------------------------------------------------------------


def test_the_scale_is_measured_on_the_runs_own_data_before_the_first_step_and_saved(tmp_path: Path) -> None:
    training = build(ROOT / "mask_embed.yaml", tmp_path, "--model.init_args.scale_items", "10")
    model, data = training.model, training.datamodule
    assert isinstance(model, MaskEmbed)
    training.fit()
    indices = [number * 32 // 10 for number in range(10)]
    given = data.make_batch(data.raw_batch(indices, encoder=model.encoder, epoch=0), encoder=model.encoder)
    targets = model.targets(given.views["global"].items.flatten(0, 1), visible=model.visible(given))
    assert float(model.scale.scale) == pytest.approx(1 / float(targets.std(correction=0)), rel=1e-4)
    saved = torch.load(next((tmp_path / "runs").rglob("last.ckpt")), weights_only=True)
    assert torch.equal(saved["state_dict"]["scale.scale"], model.scale.scale)
    assert not [name for name in saved["state_dict"] if name.startswith("original.")] and set(saved["experts"]) == {"original"}


def test_a_scale_that_a_checkpoint_brought_is_not_measured_again() -> None:
    model = made(scale_items=5)
    model.scale.load_state_dict({"scale": torch.tensor(0.37), "num_measured": torch.tensor(11)})
    fitted(model, [batch(0)])  # which has no data to measure it on
    assert float(model.scale.scale) == pytest.approx(0.37)


def measured(values: Sequence[Tensor]) -> float:
    scale = TargetScale()
    scale.measure(values)
    return float(scale.scale)


def test_two_processes_measure_the_scale_of_all_features() -> None:
    values = [noise(5, 7, name="first") + 3.0, 2.0 * noise(5, 7, name="second")]
    port = free_port()

    def own(rank: int) -> float:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        try:
            return measured(values[rank : rank + 1])
        finally:
            dist.destroy_process_group()

    first, second = (ended.value for ended in together(own, count=2))
    assert first == second == pytest.approx(1 / float(torch.stack(values).std(correction=0)), rel=1e-6)


@pytest.mark.parametrize("values", [[], [torch.ones(3)], [torch.tensor([1.0, math.inf])]], ids=["none", "equal", "infinite"])
def test_features_that_do_not_vary_are_refused(values: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="features of the frozen teacher have a variance of"):
        measured(values)


def test_a_run_from_random_weights_is_refused(tmp_path: Path) -> None:
    recipe = shrunk(ROOT / "mask_embed.yaml", tmp_path)
    recipe.write_text("\n".join(line for line in recipe.read_text().splitlines() if not line.startswith(("init_from:", "  trunk"))))
    options = ["--evaluate", "false", "--report", "false", "--trainer.logger", "false", "--runs", str(tmp_path / "runs")]
    with pytest.raises(ValueError, match=r"MaskEmbed: the run starts from random weights; .* give init_from"):
        Training(["--config", str(recipe), *options]).fit()
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_the_final_norm_starts_anew_where_it_is_asked_for() -> None:
    start: Encoder = encoder()
    with torch.no_grad():
        start.get_submodule("model.norm").weight.fill_(2.0)
    for fresh, expected in ((False, 2.0), (True, 1.0)):
        model = method(MaskEmbed, encoder(), fresh_norm=fresh)
        model.init_from(start)
        assert torch.equal(model.encoder.get_submodule("model.norm").weight, torch.full((12,), expected))
        assert torch.equal(model.original.encoder.get_submodule("model.norm").weight, torch.full((12,), 2.0))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"skip_blocks=3 of 3 blocks given; accepted: 0 to 2"):
        method(MaskEmbed, encoder(), skip_blocks=3)
    with pytest.raises(ValueError, match="only a ViT can end at an earlier block"):
        method(MaskEmbed, FeatureMap("resnet18", img_size=32))
    with pytest.raises(ValueError, match="a width of 16 given with 3 heads"):
        method(MaskEmbed, encoder(), decoder_dim=16)
    with pytest.raises(ValueError, match="scale_items=0 given"):
        method(MaskEmbed, encoder(), scale_items=0)
    model = method(MaskEmbed, encoder())
    with pytest.raises(ValueError, match=r"views of \[16, 16\] pixels given; accepted: \[32, 32\]"):
        model.losses(batch_of(views_of("g", 1, size=16), mask=torch.zeros(1, 3, 4, dtype=torch.bool)), 0.5)
    with pytest.raises(ValueError, match="scale_items=256 given, but the run has no DataModule"):
        model.init_from(encoder())
        fitted(model, [batch(0)])
