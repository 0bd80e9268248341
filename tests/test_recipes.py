"""Every recipe: says how it is run, parses, builds what it names, and takes two steps once it is shrunk."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from published_settings import Resolved
from shrinking import EVALUATIONS, FINE_TUNING, RECIPES, ROOT, built, method_of, name_of, shrunk, tuned, tuned_kind

import glpretrain
from glpretrain.cli.training import Training
from glpretrain.core.batch import Batch
from glpretrain.data import Scenes
from glpretrain.data.module import DataModule
from glpretrain.encoders import PointTransformer, ViT
from glpretrain.finetune import FineTuned
from glpretrain.methods.base import Method
from glpretrain.runs import find_recipe, recipe_name
from glpretrain.weights import export


def test_there_are_recipes() -> None:
    assert {"mmc", "dino", "ibot", "mae", "local_contrast"} <= {name_of(path) for path in RECIPES}
    assert any(name_of(path).startswith("paper/") for path in RECIPES)
    assert {"finetune/classification", "finetune/imagenet_vitb16_mae"} <= {name_of(path) for path in FINE_TUNING}


def comments(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("#")]


@pytest.mark.parametrize("path", RECIPES + EVALUATIONS + FINE_TUNING, ids=name_of)
def test_recipe_says_how_it_is_run(path: Path) -> None:
    assert any("Command:" in line and name_of(path) in line for line in comments(path))
    assert find_recipe(name_of(path)).resolve() == path
    assert recipe_name(path) == name_of(path)


@pytest.mark.parametrize("path", RECIPES + EVALUATIONS + FINE_TUNING, ids=name_of)
def test_recipe_begins_with_a_short_header(path: Path) -> None:
    header = comments(path)
    assert path.read_text().splitlines()[: len(header)] == header, "comments stand before the settings"
    assert len(header) <= 12, "what, command, needs, costs, result; the rest belongs in docs/measurements.md"
    assert max(map(len, header)) <= 140


@pytest.mark.parametrize("path", RECIPES + FINE_TUNING, ids=name_of)
def test_recipe_says_what_it_needs_costs_and_gave(path: Path) -> None:
    labels = {line.removeprefix("# ").split(":")[0] for line in comments(path)}
    assert labels >= {"Needs", "Costs", "Measured"}


@pytest.mark.parametrize("path", RECIPES + FINE_TUNING, ids=name_of)
def test_recipe_is_flat_and_literal(path: Path) -> None:
    text = path.read_text()
    assert "${" not in text and "<<:" not in text
    assert yaml.safe_load(text).keys() == {"seed_everything", "model", "data", "trainer"}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_parses_as_it_stands(path: Path) -> None:
    class ParsedOnly(Training):
        def instantiate_classes(self) -> None:
            """Data and devices of a published setting are not here."""

    config = ParsedOnly(["--config", str(path)]).config
    assert config.model.class_path.startswith("glpretrain.methods.")


# The quick tests take one published recipe of each method; those for one GPU take twenty steps, see below.
PUBLISHED = {method_of(path): path for path in reversed(RECIPES) if path.parent.name == "paper"}.values()
STEPS = [
    pytest.param(path, id=name_of(path), marks=() if path.parent == ROOT or path in PUBLISHED else pytest.mark.slow) for path in RECIPES
]


@pytest.mark.parametrize("path", STEPS)
def test_recipe_takes_two_steps(path: Path, tmp_path: Path) -> None:
    training = built(shrunk(path, tmp_path), tmp_path)
    run = training.fit()
    assert run.results["steps"] == 2
    assert all(bool(torch.isfinite(parameter).all()) for parameter in training.model.parameters())
    assert run.backbone.embed_dim == 24


@pytest.mark.parametrize("path", FINE_TUNING, ids=name_of)
def test_recipe_of_fine_tuning_takes_two_steps_and_gives_a_model(path: Path, tmp_path: Path) -> None:
    small = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    if tuned_kind(path) == "audio":
        sizes = {"img_size": [48, 32], "patch_size": 8, "in_chans": 1, "mean": [-4.0], "std": [9.0], "modality": "audio"}
        export(ViT("vit_tiny_patch16_224", **sizes, **small), tmp_path / "backbone")
    elif tuned_kind(path) == "image":
        export(ViT("vit_tiny_patch16_224", img_size=48, patch_size=8, **small), tmp_path / "backbone")
    else:
        points = {"num_points": 48, "points_per_token": 6, "group_size": 8, "tokens_dim": 8}
        export(PointTransformer("point_mae", **small, **points), tmp_path / "backbone")
    tuning = tuned(path, tmp_path / "backbone", tmp_path)
    run = tuning.fit()
    assert run.results["steps"] == 2 and run.results["scores"][tuning.model.headline]["n"] > 0
    assert all(bool(torch.isfinite(parameter).all()) for parameter in tuning.model.parameters())
    model = FineTuned.load(run.folder / "model")
    assert (model.card.task, list(model.classes)) == (tuning.model.task, tuning.datamodule.classes)


PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "classification_flowers" / "train"
ONE_GPU = [path for path in RECIPES if path.parent.name == "single_gpu"]


def test_there_is_a_recipe_for_one_gpu_of_every_kind() -> None:
    assert [path.stem for path in ONE_GPU] == ["dino_vits16", "dinov2_vits16", "ibot_vits16", "mae_vits16", "mmc_vits16"]
    for path in ONE_GPU:
        recipe = yaml.safe_load(path.read_text())
        assert recipe["model"]["init_args"]["optimization"]["lr"]["per"], "the rate follows the batch"
        assert (recipe["trainer"]["devices"], recipe["trainer"]["precision"]) == (1, "bf16-mixed")


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"no photographs in {PHOTOGRAPHS}")
@pytest.mark.parametrize("path", ONE_GPU, ids=name_of)
def test_a_recipe_for_one_gpu_takes_twenty_steps_on_photographs(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in PHOTOGRAPHS.iterdir():
        (tmp_path / "photos" / folder.name).mkdir(parents=True)
        for photograph in sorted(folder.iterdir())[:60]:
            shutil.copy(photograph, tmp_path / "photos" / folder.name)
    in_chunks = "chunk_size" in yaml.safe_load(path.read_text())["model"]["init_args"]["optimization"]
    smaller = {
        "data.batch_size": 4 if in_chunks else 2,
        **({"model.init_args.optimization.chunk_size": 4} if in_chunks else {"trainer.accumulate_grad_batches": 2}),
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.logger": "false",
        "evaluate": "false",
    }
    overrides = [word for name, value in smaller.items() for word in (f"--{name}", str(value))]
    run = glpretrain.fit(name_of(path), data=tmp_path / "photos", max_steps=20, runs=tmp_path / "runs", overrides=overrides)
    assert (run.results["steps"], run.results["images_seen"], run.results["refused_steps"]) == (20, 80, 0)
    assert run.results["data"] == "photos" and run.backbone.embed_dim == 384
    assert "(4 items a step / " in capsys.readouterr().out  # the rate of the smaller batch, accumulated batches counted in


def saved_bytes(method: Method, batch: Batch) -> int:
    """What is kept for the backward pass of a step in bfloat16, weights not counted."""
    kept: dict[int, torch.Tensor] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage().data_ptr()) not in weights:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        method.losses(batch, 0.5)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def small_batch(run: Resolved, count: int) -> Batch:
    """So many scenes of 256 pixels as a batch of the recipe."""
    data = DataModule(Scenes(count, size=256), run.views, batch_size=count, mask=run.mask, corruption=run.corruption)
    return data.make_batch(data.raw_batch(list(range(count)), encoder=run.encoder, epoch=0), encoder=run.encoder)


@pytest.mark.slow
@pytest.mark.parametrize("path", ONE_GPU, ids=name_of)
def test_what_a_recipe_for_one_gpu_keeps_for_the_backward_pass_leaves_room_on_24_gb(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Resolved(path, device="cpu")
    two, four = (saved_bytes(run.method, small_batch(run, count)) for count in (2, 4))
    per_item = (four - two) / 2  # apart from it are weights in bfloat16, which a batch of any size has once
    together = two + per_item * (run.settings["data"]["batch_size"] - 2)
    if (chunk := run.optimization.chunk_size) is not None:  # what lies inside the encoder is kept for a chunk; global views are the largest
        batch = small_batch(run, 2)
        large = batch._replace(views={"global": batch.views["global"]})
        outside = saved_bytes(run.method, large)
        run.method.student.set_chunk_size(None)
        together += (saved_bytes(run.method, large) - outside) / (2 * len(large.views["global"].items)) * chunk
    with capsys.disabled():
        print(f"{name_of(path)}: {together / 1e9:.1f} GB")
    assert together < 16e9
