"""Tiles as a source: labels from folders, slides kept apart, and training, scoring and shards by the plain `--data DIR`."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_image, write_map
from shrinking import ROOT, shrunk

import glpretrain
from glpretrain.cli.scoring import score
from glpretrain.data import TarShards, TileFolder, UnreadableItemError, source_for
from glpretrain.encoders import ViT
from glpretrain.prepare.slides import Settings, cut_slides
from glpretrain.prepare.slides.synthetic import write_synthetic_slide

OSCC = Path(__file__).parents[3] / "shared" / "data" / "pathology_oscc"


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slides of two classes in tiles."""
    folder = tmp_path_factory.mktemp("cut")
    for number in range(6):
        path = folder / "slides" / ("calm", "crowded")[number % 2] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synthetic_slide(path, width=640, height=512, seed=number, lesion=0.7 * (number % 2), levels=(1, 4))
    cut_slides([folder / "slides"], out=folder / "tiles", settings=Settings(size=64, min_tissue=0.9, per_shard=20), workers=1)
    return folder / "tiles"


def test_slides_and_classes(cut: Path) -> None:
    source = TileFolder(cut)
    assert source.slides == [f"calm/{number}" for number in (0, 2, 4)] + [f"crowded/{number}" for number in (1, 3, 5)]
    assert source.name == "tiles" and list(source.classes) == ["calm", "crowded"]
    for slide in source.slides:
        tiles = source.tiles_of(slide)
        assert len(tiles) > 5 and {source[int(tile)].label for tile in tiles[:3]} == {("calm", "crowded").index(slide.split("/")[0])}
    assert list(TileFolder(cut, labels="slides").classes) == source.slides
    assert TileFolder(cut, labels="slides")[len(source) - 1].label == 5
    assert not TileFolder(cut, labels="none").classes and TileFolder(cut, labels="none").train_test_split() is None
    assert TileFolder(cut, channels=1)[0].values.shape == (1, 64, 64)
    assert source.tissue.min() >= 0.9 and source.corners.shape == (len(source), 2) and set(source.sides.tolist()) == {64}
    with pytest.raises(ValueError, match="'x' is not in"):
        source.tiles_of("x")
    with pytest.raises(IndexError):
        source[len(source)]


def test_no_slide_is_in_both_splits(cut: Path) -> None:
    source = TileFolder(cut)
    train, test = source.train_test_split()
    slides = [{source.slides[source.slide_of[index]] for index in part.indices} for part in (train, test)]
    assert slides == [{"calm/0", "calm/2", "crowded/1", "crowded/3"}, {"calm/4", "crowded/5"}]
    assert len(train) + len(test) == len(source)


def test_an_index_of_many_tiles_takes_eight_bytes_for_each(tmp_path: Path) -> None:
    """190 million tiles are then 1.5 GB, which the workers of a process share."""
    (tmp_path / "tiles.json").write_text("{}")
    number, per_shard = 4000, 500
    with (tmp_path / "index.jsonl").open("w") as lines:
        for tile in range(number):
            slide, place = divmod(tile, per_shard)
            entry = {"slide": f"s{slide}", "level": 0, "x": 64 * place, "y": 0, "side": 64, "mpp": 0.5, "tissue": 0.75}
            lines.write(json.dumps({**entry, "shard": f"s{slide}-00000.tar", "offset": 512 + 5120 * place, "num_bytes": 4000}) + "\n")
    tracemalloc.start()
    try:
        source = TileFolder(tmp_path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == number and 8 * number <= kept < 8 * number + 20_000  # what does not grow with the tiles
    assert peak < 48 * number + 40_000
    assert source.tiles_of("s3").tolist() == list(range(3 * per_shard, 4 * per_shard))
    assert source.corners[per_shard + 7].tolist() == [7 * 64, 0] and source.tissue.dtype == np.float32


def test_a_damaged_shard_is_named(cut: Path, tmp_path: Path) -> None:
    slide = tmp_path / "a.tif"
    write_synthetic_slide(slide, width=400, height=400, levels=(1,))
    cut_slides([slide], out=tmp_path / "tiles", settings=Settings(size=64))
    shard = tmp_path / "tiles" / "shards" / "a-00000.tar"
    content = bytearray(shard.read_bytes())
    content[512:700] = bytes(188)
    shard.write_bytes(content)
    source = TileFolder(tmp_path / "tiles")
    with pytest.raises(UnreadableItemError, match=r"a-00000\.tar, tile 0"):
        source[0]
    assert source[1].values.shape == (3, 64, 64)
    with pytest.raises(ValueError, match="was not written by `glpretrain tiles`"):
        TileFolder(tmp_path)


def test_the_folder_says_what_reads_it(cut: Path, tmp_path: Path) -> None:
    calm = cut / "shards" / "calm"
    assert source_for(cut, "image") == "glpretrain.data.TileFolder"
    assert source_for(calm, "image") == source_for(calm / "0-00000.tar", "image") == "glpretrain.data.TarShards"
    assert len(TarShards(cut)) == len(TileFolder(cut))
    assert source_for(tmp_path, "image") == "glpretrain.data.ImageFolder" == source_for(tmp_path / "missing", "image")


def test_training_takes_the_folder_as_it_is(cut: Path, tmp_path: Path) -> None:
    recipe = shrunk(ROOT / "dino.yaml", tmp_path)
    for number in range(8):  # few images with masks, each with one object, keep the evaluation short
        write_image(tmp_path / "masked" / "images" / f"{number}.png", size=(48, 48))
        write_map(tmp_path / "masked" / "masks" / f"{number}.png", np.kron([[1, 0], [0, 0]], np.ones((24, 24))))
    options = {"masks": tmp_path / "masked", "runs": tmp_path / "runs", "overrides": ["--trainer.logger", "false"]}
    run = glpretrain.fit(str(recipe), data=cut, max_steps=2, **options)
    assert run.results["data"] == "tiles" and run.results["steps"] == 2
    assert run.results["measured_on"]["knn"] == "tiles"


def backbone() -> ViT:
    torch.manual_seed(0)
    return ViT("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=24, depth=2, num_heads=3, source="a test").eval()


def test_tiles_are_scored_by_their_slides_folders(cut: Path) -> None:
    lines = score(backbone(), config="eval/pathology", data=cut)
    assert {line["evaluator"] for line in lines} == {"knn", "linear", "retrieval"}
    assert {line["measured_on"] for line in lines} == {"tiles"}
    assert {line["n"] for line in lines if line["evaluator"] == "knn"} == {len(TileFolder(cut).train_test_split()[1])}
    assert next(line["value"] for line in lines if line["evaluator"] == "linear") > 70  # crowded nuclei are darker


def test_slides_are_scored_as_wholes(cut: Path) -> None:
    few = ["--sources.train.init_args.length", "320", "--sources.test.init_args.length", "160"]
    embedded = {line["score"]: line for line in score(backbone(), config="eval/slides", overrides=few)}
    assert embedded["accuracy"]["n"] == 10 and embedded["accuracy"]["value"] > 70 and embedded["auc"]["value"] > 70
    own = score(backbone(), config="eval/slides", data=cut)
    held_out = TileFolder(cut).train_test_split()[1]
    assert {line["measured_on"] for line in own} == {"tiles"}
    assert next(line["n"] for line in own if line["score"] == "accuracy") == len(set(held_out.groups)) < len(held_out)


@pytest.mark.skipif(not OSCC.is_dir(), reason=f"no tiles in {OSCC}")
def test_real_tiles_by_class_are_scored() -> None:
    lines = score(backbone(), config="eval/pathology", data=OSCC)
    assert {line["evaluator"] for line in lines} == {"knn", "linear", "retrieval"}
    assert all(line["measured_on"] == "pathology_oscc" and 0 < line["high"] - line["low"] < 40 for line in lines)
    assert next(line["n"] for line in lines if line["evaluator"] == "knn") == 179


@pytest.mark.parametrize("shard", ["../secret.tar", "a/../../secret.tar", "/etc/passwd"])
def test_an_index_names_no_shard_outside_its_folder(cut: Path, tmp_path: Path, shard: str) -> None:
    index = (cut / "index.jsonl").read_text().splitlines()
    (tmp_path / "tiles.json").write_text((cut / "tiles.json").read_text())
    (tmp_path / "index.jsonl").write_text(json.dumps({**json.loads(index[0]), "shard": shard}) + "\n")
    with pytest.raises(ValueError, match=f"names the shard '{shard}'"):
        TileFolder(tmp_path)
