"""The main job on real photographs, from the folder to the scores. Needs the data sets that lie beside the checkout."""

from pathlib import Path

import pytest
from shrinking import ROOT, shrunk

import glpretrain

DATA = Path(__file__).parents[2] / "shared" / "data"
PHOTOS, MASKS = DATA / "classification_flowers", DATA / "segmentation_davis2016val"


@pytest.mark.skipif(not (PHOTOS.is_dir() and MASKS.is_dir()), reason=f"no photographs in {DATA}")
def test_a_folder_of_photographs_is_trained_on_scored_and_exported(tmp_path: Path) -> None:
    recipe = shrunk(ROOT / "mmc.yaml", tmp_path)
    run = glpretrain.fit(str(recipe), data=PHOTOS, masks=MASKS, max_steps=3, runs=tmp_path / "runs")
    assert run.results["data"] == "classification_flowers"
    assert run.results["measured_on"] == {"knn": PHOTOS.name, "linear": PHOTOS.name, "prompt": MASKS.name}
    for scores in (run.results["before"], run.results["after"]):
        assert 20.0 < scores["knn"] < 100.0  # five classes: 20 is chance, and flowers differ in colour
        assert 20.0 < scores["linear"] < 100.0
        assert 0.0 < scores["prompt_miou"] < 100.0
    assert run.results["before"] != run.results["after"]
    assert (run.folder / "views.png").stat().st_size > 10_000
    assert run.backbone.embed_dim == 24
