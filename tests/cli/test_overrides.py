"""What is written in full replaces what a recipe says there, whichever way it is given; the run's config.yaml holds the outcome."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from jsonargparse import Namespace
from PIL import Image
from scipy.io import wavfile
from shrinking import RECIPES, ROOT, name_of

from glpretrain.cli.pretraining import pretrain
from glpretrain.cli.training import Training

VIEW = "{size: 48, scale: [0.4, 1.0], count: 2}"
LOCAL = "{size: 24, scale: [0.1, 0.6], count: 2}"
VIEWS = "data.views.init_args."


class ParsedOnly(Training):
    """What is tested is the configuration."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def parsed(*arguments: str, recipe: str = "mmc") -> Namespace:
    return ParsedOnly(["--config", str(ROOT / f"{recipe}.yaml"), *arguments]).config


def overlay(folder: Path, key: str, value: str) -> list[str]:
    text: object = yaml.safe_load(value)
    for name in reversed(key.split(".")):
        text = {name: text}
    (folder / "overlay.yaml").write_text(yaml.safe_dump(text))
    return ["--config", str(folder / "overlay.yaml")]


@pytest.mark.parametrize("way", ["two words", "one word", "file"])
@pytest.mark.parametrize(("name", "view"), [("global_views", VIEW), ("local_views", LOCAL)])
def test_views_written_in_full_replace_those_of_the_recipe(way: str, name: str, view: str, tmp_path: Path) -> None:
    key, value = f"{VIEWS}{name}", f"[{view}]"
    ways = {"two words": [f"--{key}", value], "one word": [f"--{key}={value}"], "file": overlay(tmp_path, key, value)}
    (made,) = parsed(*ways[way]).data.views.init_args[name]
    assert (made.brightness, made.contrast, made.saturation, made.grayscale_prob, made.interpolation) == (0.0, 0.0, 0.0, 0.0, "bicubic")


def test_views_may_be_named_without_init_args() -> None:
    (made,) = parsed("--data.views.global_views", f"[{VIEW}]").data.views.init_args.global_views
    assert made.brightness == 0.0


def test_a_view_that_is_added_leaves_the_others_as_they_are() -> None:
    first, second = parsed(f"--{VIEWS}global_views+", VIEW).data.views.init_args.global_views
    assert (first.brightness, second.brightness) == (0.4, 0.0)


def test_one_setting_of_a_class_leaves_the_others_as_they_are() -> None:
    source = parsed("--data.source.init_args.length", "12").data.source
    assert (source.init_args.length, source.init_args.size) == (12, 64)
    schedule = parsed("--model.init_args.momentum", "{base: 0.5}").model.init_args.momentum
    assert (schedule.base, schedule.end) == (0.5, 0.99)


@pytest.mark.parametrize("from_file", [False, True])
def test_a_class_written_in_full_replaces_the_one_of_the_recipe(from_file: bool, tmp_path: Path) -> None:
    key, value = "data.source", "{class_path: glpretrain.data.Scenes, init_args: {length: 12}}"
    source = parsed(*(overlay(tmp_path, key, value) if from_file else [f"--{key}", value])).data.source
    assert (source.init_args.length, source.init_args.size) == (12, 64), "the size is the default of Scenes"
    smaller = parsed("--data.source.init_args.size", "48", f"--{key}", value).data.source
    assert smaller.init_args.size == 64


def test_experts_written_in_full_replace_those_of_the_recipe() -> None:
    def experts(*names: str, **init_args: str) -> str:
        return json.dumps({name: {"class_path": "glpretrain.weights.load_expert", "init_args": init_args} for name in names})

    key = "--model.init_args.experts"
    made = parsed(key, experts("one", "two", path="old", which="student"), key, experts("one", path="new"), recipe="gpfm")
    assert set(made.model.init_args.experts) == {"one"}
    written = made.model.init_args.experts["one"].init_args
    assert (written.path, written.which) == ("new", "teacher")


def test_evaluators_of_a_callback_written_in_full_replace_those_before() -> None:
    def callbacks(init_args: dict[str, object], **more: object) -> str:
        knn = {"class_path": "glpretrain.evaluate.KNN", "init_args": init_args}
        return json.dumps([{"class_path": "glpretrain.callbacks.RunEvaluators", "init_args": {"evaluators": {"knn": knn}, **more}}])

    key = "--trainer.callbacks"
    (made,) = parsed(key, callbacks({"k": [3]}, every_n_steps=5), key, callbacks({})).trainer.callbacks
    assert made.init_args.every_n_steps is None
    assert made.init_args.evaluators["knn"].init_args.k is None


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.parent.name == "paper" and "fsfm" not in path.stem], ids=name_of)
def test_own_data_replaces_all_that_a_published_recipe_says_of_its_source(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glpretrain.cli.pretraining.train", ParsedOnly)
    folder = tmp_path / "own"
    folder.mkdir()
    for number in range(3):
        if "SoundCrops" in recipe.read_text():
            wavfile.write(folder / f"{number}.wav", 16_000, np.arange(-200, 200, dtype=np.int16) * (number + 1))
        elif "PointCrops" in recipe.read_text():
            (folder / f"{number}.xyz").write_text("".join(f"{i} {i * i % 7} {number}\n" for i in range(20)))
        else:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    training = pretrain(str(recipe), data=str(folder))
    assert isinstance(training, ParsedOnly)
    given = training.config.data.source.init_args.as_dict()
    assert str(folder) in given.values()
    assert given.get("split") is None


@pytest.mark.parametrize("null", ["null", "~"])
@pytest.mark.parametrize("joined", [False, True])
def test_null_takes_a_setting_away_inside_a_group_of_settings_and_leaves_the_others(null: str, joined: bool) -> None:
    def given(key: str) -> list[str]:
        return [f"--{key}={null}"] if joined else [f"--{key}", null]

    optimization = "model.init_args.optimization"
    plain = parsed(recipe="dino").model.init_args.optimization
    found = parsed(f"--{optimization}.chunk_size", "8", *given(f"{optimization}.chunk_size"), *given(f"{optimization}.clip"), recipe="dino")
    changed = found.model.init_args.optimization
    assert (changed.chunk_size, changed.clip) == (None, None)
    assert (changed.lr, changed.weight_decay, changed.betas) == (plain.lr, plain.weight_decay, plain.betas) and plain.clip is not None
    trunk = parsed(f"--{optimization}.trunk", "{frozen: 0.2, tolerance: 0.1}", *given(f"{optimization}.trunk.tolerance"), recipe="dino")
    assert (trunk.model.init_args.optimization.trunk.tolerance, trunk.model.init_args.optimization.trunk.frozen) == (None, 0.2)
    assert parsed(*given("model.init_args.encoder.init_args.depth")).model.init_args.encoder.init_args.depth is None
