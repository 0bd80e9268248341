"""Recipes explain themselves: the list from their headers, and the help of each with arguments that the parser understands."""

import re
import shlex
from pathlib import Path

import pytest
from shrinking import EVALUATIONS, RECIPES, ROOT, name_of

from glpretrain import __version__
from glpretrain.cli import main
from glpretrain.cli.pretraining import pretrain
from glpretrain.cli.recipe_help import recipe_help
from glpretrain.cli.recipe_list import _OPTIONS, header_of
from glpretrain.cli.training import Training
from glpretrain.runs import settings_that_count


def said_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert said_by(["--version"], capsys) == f"glpretrain {__version__}\n"


@pytest.mark.parametrize("path", RECIPES + EVALUATIONS, ids=name_of)
def test_every_header_says_what_a_recipe_is_for_and_costs(path: Path) -> None:
    header = header_of(name_of(path), path)
    assert len(header.purpose) > 10 and ": " not in header.purpose.partition(" ")[0]
    assert header.fields["Needs"] and (path in EVALUATIONS or header.fields["Costs"])


def test_kinds_of_data_are_told_apart() -> None:
    names = {
        "mmc": "images",
        "mmc_points": "points",
        "fsfm": "faces",
        "gpfm": "tissue",
        "asit": "sounds",
        "single_gpu/mae_vits16": "images",
    }
    assert {name: header_of(name, ROOT / f"{name}.yaml").data for name in names} == names


def test_words_filter_the_list_in_name_and_header(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    said = said_by(["recipes", "POINTS", "embedded"], capsys)
    assert "mmc_points" in said and "dcglr" in said and "single_gpu/mae_vits16" not in said
    assert "mmc_points" not in said_by(["recipes", "single_gpu"], capsys)
    assert f"launchers: {ROOT / 'cluster' / 'slurm.sh'}" in said


def test_a_word_that_is_nowhere_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "mmcc"]) == 2
    assert "recipes: none has 'mmcc'; did you mean mmc?" in capsys.readouterr().err


class ParsedOnly(Training):
    """The configuration of a run, which nothing is built of."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def arguments_in(text: str) -> list[str]:
    """The arguments that a help shows with their values, as they would be given."""
    found: list[str] = []
    prefix = ""
    for line in text.partition("common:\n")[2].splitlines():
        if group := re.fullmatch(r"\w[^:]*: --(.*)NAME", line):
            prefix = f"--{group[1]}"
        elif setting := re.match(r"  ((?:--)?\w[\w.]*) +([\[{].*[\]}]|\S+)", line):
            name, value = setting.groups()
            if name != "also" and (name.startswith("--") or prefix) and not line.startswith("    "):
                found += [name if name.startswith("--") else prefix + name, value]
    own = ("--data", "--masks", "--init_from", "--seeds", "--resume")
    return [word for name, value in zip(found[::2], found[1::2], strict=True) if name not in own for word in (name, value)]


@pytest.mark.parametrize("name", ["mmc", "mmc_points", "single_gpu/dinov2_vits16"])
def test_what_the_help_shows_is_understood_and_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = recipe_help(name, verb=pretrain)
    assert len(text.splitlines()) <= 120 and max(map(len, text.splitlines())) < 400
    given = arguments_in(text)
    assert len(given) > 40 and "--model.init_args.optimization.lr.base" in given and "--data.batch_size" in given
    path = str(ROOT / f"{name}.yaml")
    shown, plain = (settings_that_count(ParsedOnly(["--config", path, *more]).config.as_dict()) for more in (given, []))
    changed = {key for key in {*shown, *plain} if shown.get(key) != plain.get(key)}
    assert changed <= {"trainer.devices"} and str(shown["trainer.devices"]) == str(plain["trainer.devices"])


def test_help_of_a_recipe_begins_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by(["pretrain", "mae", "--help"], capsys)
    assert said.startswith("usage: glpretrain pretrain mae [--NAME VALUE ...]\n\nMAE") and "Needs: a CPU" in said
    assert said.index("common:") < said.index("--seeds") < said.index("method (MAE): --model.init_args.NAME") < said.index("trainer:")
    assert "Path to a configuration file" not in said and "source=null" not in said


def test_help_of_no_recipe_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "mmcc", "--help"]) == 2
    assert "there is no 'mmcc'" in capsys.readouterr().err


def test_options_of_every_recipe_are_listed_and_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", "mae"]) == 0
    shown = capsys.readouterr().out
    for option in _OPTIONS:
        assert option in shown
        name, words = ("dino", shlex.split(option)) if "gram" in option else ("mae", shlex.split(option))
        if "--init_from" not in words:
            small = ["--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu", "--data.source.init_args.length", "64"]
            end = ["--trainer.max_epochs", "1"] if "max_epochs" in option else ["--trainer.max_steps", "2"]
            quiet = ["--runs", str(tmp_path), "--evaluate", "false", "--report", "false", "--trainer.logger", "false"]
            assert main(["pretrain", name, *words, *small, *end, *quiet]) == 0
