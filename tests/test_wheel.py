"""What a wheel holds: recipes and launchers as data of the package, wherever pip puts it; and every printed extra exists."""

import re
import tomllib
import zipfile
from pathlib import Path

import pytest
import wheels
from wheels import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def printed_extras() -> dict[str, str]:
    """Extras that code, documents and recipes name, each with a file that does."""
    places = [path for part in ("glpretrain", "docs", "recipes", "notebooks") for path in (REPOSITORY / part).rglob("*")]
    texts = [path for path in (*places, *REPOSITORY.glob("*.md")) if path.suffix in (".py", ".md", ".yaml", ".ipynb")]
    found: dict[str, str] = {}
    for path in texts:
        if path.is_file():
            for names in re.findall(r"glpretrain\[([\w, -]+)\]", path.read_text()):
                found |= dict.fromkeys((name.strip() for name in names.split(",")), str(path))
    return found


def test_every_printed_extra_exists() -> None:
    found = printed_extras()
    assert {"onnx", "slides", "points", "completion", "tensorboard", "mlflow"} <= set(found)
    assert {name: path for name, path in found.items() if name not in PROJECT["optional-dependencies"]} == {}


@pytest.mark.slow
def test_recipes_are_found_where_pip_has_put_the_package(tmp_path: Path) -> None:
    wheel = wheels.built(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    recipes = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "recipes").rglob("*") if path.is_file())
    assert sorted(name.removeprefix("glpretrain/") for name in names if name.startswith("glpretrain/recipes/")) == recipes
    assert not [name for name in names if name.startswith("recipes/") or ".data/" in name]
    site = wheels.installed(wheel, tmp_path / "site")
    (tmp_path / "empty").mkdir()

    def said(*words: str) -> str:
        return wheels.said(["-m", "glpretrain.cli", *words], site=site, folder=tmp_path / "empty")

    listed = said("recipes")
    assert "single_gpu/dino_vits16" in listed
    assert f"files: {tmp_path}/site/glpretrain/recipes; launchers: {tmp_path}/site/glpretrain/recipes/cluster/slurm.sh" in listed
    assert "--trainer.max_steps" in said("pretrain", "mmc", "--help")
    assert said("--version") == f"glpretrain {version()}\n"


def version() -> str:
    text = (REPOSITORY / "glpretrain" / "__init__.py").read_text()
    return re.search(r'__version__ = "(.*)"', text)[1]
