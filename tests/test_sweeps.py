"""The examples of docs/sweeps.md: the script runs in small, with what Optuna does in it; the arguments of a sweep are understood."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from shrinking import ROOT, shrunk
from test_documents import ParsedOnly

from glpretrain.cli.parsing import REST, parse_verb
from glpretrain.cli.pretraining import pretrain
from glpretrain.runs import find_recipe

REPOSITORY = ROOT.parent
SCRIPT = REPOSITORY / "docs" / "examples" / "optuna_search.py"


class Trial:
    """The middle of every range."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return (low * high) ** 0.5 if log else (low + high) / 2


class Study:
    """Runs trials, as Optuna does."""

    def __init__(self, **settings: object) -> None:
        self.values: list[float] = []
        self.best_params = settings

    def optimize(self, objective, *, n_trials: int, catch: type[Exception]) -> None:
        self.values += [objective(Trial()) for _ in range(n_trials)]

    @property
    def best_value(self) -> float:
        return max(self.values)


@pytest.mark.slow
def test_the_search_with_optuna_trains_scores_and_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("optuna")
    stub.Trial = Trial
    monkeypatch.setitem(sys.modules, "optuna", stub)
    monkeypatch.chdir(tmp_path)
    recipe = shrunk(ROOT / "mmc.yaml", tmp_path)
    settings = yaml.safe_load(recipe.read_text())
    for role, (length, split) in {"labelled": (40, "train"), "labelled_test": (20, "test"), "masked": (12, "test")}.items():
        settings["data"][role] = {"class_path": "glpretrain.data.Scenes", "init_args": {"length": length, "size": 56, "split": split}}
    recipe.write_text(yaml.safe_dump(settings))
    script = runpy.run_path(str(SCRIPT))
    score_of = script["score_of"]
    score_of.__globals__.update(RECIPE=str(recipe), STEPS=2)
    study = Study()
    study.optimize(score_of, n_trials=1, catch=ValueError)
    assert 0 <= study.best_value <= 100
    (folder,) = [path.parent for path in (tmp_path / "searched").rglob("results.json") if not path.parent.is_symlink()]
    written = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
    assert written["optimization"]["lr"]["base"] == pytest.approx((3e-4 * 1e-2) ** 0.5) and written["momentum"]["base"] == pytest.approx(
        0.895
    )
    assert json.loads((folder / "results.json").read_text())["steps"] == 2


def test_the_search_says_what_it_does_and_is_short() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 40 and "create_study" in text and "load_if_exists=True" in text


def test_the_arguments_of_a_sweep_are_understood() -> None:
    (block,) = re.findall(r"^```yaml\n(project: .*?)^```", (REPOSITORY / "docs" / "sweeps.md").read_text(), re.MULTILINE | re.DOTALL)
    sweep = yaml.safe_load(block)
    given = [f"--{name}={setting.get('value', setting.get('min'))}" for name, setting in sweep["parameters"].items()]
    program, verb, *words = sweep["command"]
    assert (program, verb, words.pop()) == ("glpretrain", "pretrain", "${args}")
    values = dict(parse_verb(pretrain, [*words, *given], verb="pretrain"))
    assert values["recipe"] == "mmc" and values["resume"] == "never"
    config = ParsedOnly(["--config", str(find_recipe("mmc")), *values[REST]]).config
    assert config.model.init_args.optimization.lr.base == 3e-4 and config.trainer.max_steps == 300
