"""The tool that writes the tables of scores reads run folders, and changes nothing but its own columns."""

import json
from pathlib import Path

import pytest
from score_table import line, main, read

README = """before
<!-- numbers -->
| | scenes: k-NN | linear | prompt IoU | photographs: k-NN | linear | prompt IoU |
|---|---|---|---|---|---|---|
| random weights | 1 | 2 | 3 | 4 | 5 | 6 |
| MMC | 1 | 2 | 3 | 4 | 5 | 6 |
| DINO | 1 | 2 | 3 | 4 | 5 | 6 |
<!-- /numbers -->
after
"""


def write_run(runs: Path, *, recipe: str, time: str, seed: int, score: float, steps: int = 10) -> None:
    folder = runs / recipe / time
    folder.mkdir(parents=True)
    scores = {"knn": score, "linear": score + 1, "prompt_miou": score + 2}
    found = {"recipe": recipe, "data": "scenes", "seed": seed, "steps": steps, "seconds": 7.0, "health": {"verdicts": []}}
    (folder / "results.json").write_text(json.dumps({**found, "before": dict.fromkeys(scores, 5.0), "after": scores}))


def test_the_table_gets_means_over_seeds_of_the_newest_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, runs = tmp_path / "README.md", tmp_path / "runs"
    readme.write_text(README)
    write_run(runs, recipe="mmc", time="1", seed=0, score=90.0)  # an older one of the same seed
    write_run(runs, recipe="mmc", time="2", seed=0, score=20.0)
    write_run(runs, recipe="mmc", time="3", seed=1, score=22.0)
    assert main([str(runs), "--write", str(readme)]) == 0
    expected = README.replace("| random weights | 1 | 2 | 3 |", "| random weights | 5.0 ± 0.0 | 5.0 ± 0.0 | 5.0 ± 0.0 |")
    assert readme.read_text() == expected.replace("| MMC | 1 | 2 | 3 |", "| MMC | 21.0 ± 1.4 | 22.0 ± 1.4 | 23.0 ± 1.4 |")
    assert "mmc on scenes, seeds 0, 1, 10 steps, 7 s: k-NN 5.0 -> 21.0 ± 1.4" in capsys.readouterr().out


def test_the_columns_may_be_called_otherwise_than_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, runs = tmp_path / "README.md", tmp_path / "runs"
    readme.write_text(README)
    write_run(runs, recipe="mmc", time="1", seed=0, score=20.0)
    assert main([str(runs), "--write", str(readme), "--column", "photographs"]) == 0
    assert "| MMC | 1 | 2 | 3 | 20.0 | 21.0 | 22.0 |" in readme.read_text()
    assert main([str(runs), "--write", str(readme), "--column", "tissue"]) == 2
    assert "the table has no columns of tissue" in capsys.readouterr().err


def test_runs_of_different_lengths_are_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, recipe="mmc", time="1", seed=0, score=20.0)
    write_run(tmp_path, recipe="mmc", time="2", seed=1, score=20.0, steps=11)
    assert main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "runs with recipe mmc and data scenes differ in more than their seed: steps is 10 and 11" in err and err.count("\n") == 1


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    write_run(tmp_path, recipe="mae", time="1", seed=2, score=20.0)
    (row,) = read(tmp_path)
    assert "k-NN 5.0 -> 20.0   " in line(row)
