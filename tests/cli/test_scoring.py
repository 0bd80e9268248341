"""`glpretrain evaluate --config`: configurations of recipes/eval run, take folders and overrides, and lose nothing to one refusal."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from shrinking import EVALUATIONS, name_of

import glpretrain
from glpretrain.cli import main
from glpretrain.cli.scored_sources import Own, sources_of_recipe
from glpretrain.cli.scoring import score
from glpretrain.data import Scenes
from glpretrain.encoders import ViT
from glpretrain.evaluate import ROLES
from glpretrain.runs import find_recipe
from glpretrain.weights import export

SHARED = Path(__file__).parents[3] / "shared" / "data"
CAMVID = SHARED / "segmentation_camvid"


def encoder() -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=48, patch_size=8, embed_dim=24, depth=2, num_heads=3, source="a test").eval()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two evaluators on few scenes."""
    monkeypatch.chdir(tmp_path)
    scenes = {"train": (40, "train"), "test": (20, "test"), "masked": (16, "test")}
    sources = {
        role: {"class_path": "glpretrain.data.Scenes", "init_args": {"length": length, "size": 48, "split": split}}
        for role, (length, split) in scenes.items()
    }
    evaluators = {
        "knn": {"class_path": "glpretrain.evaluate.KNN", "init_args": {"k": [1, 5]}},
        "prompt": {"class_path": "glpretrain.evaluate.PromptSegmentation"},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"sources": sources, "evaluators": evaluators}))
    return path


def write_masked(folder: Path, count: int) -> None:
    scenes = Scenes(count, size=48)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(count):
        item = scenes[index]
        Image.fromarray(item.values.permute(1, 2, 0).numpy()).save(folder / "images" / f"{index}.png")
        Image.fromarray(item.instances.byte().numpy()).save(folder / "masks" / f"{index}.png")


def test_there_are_configurations() -> None:
    assert {"eval/images", "eval/street_scenes"} <= {name_of(path) for path in EVALUATIONS}


@pytest.mark.parametrize("path", EVALUATIONS, ids=name_of)
def test_configuration_says_how_it_is_run_and_names_roles(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#") and any("Command:" in line and name_of(path) in line for line in text.splitlines() if line.startswith("#"))
    assert find_recipe(name_of(path)).resolve() == path
    values = yaml.safe_load(text)
    assert set(values) == {"sources", "evaluators"} and set(values["sources"]) <= set(ROLES)


def test_lines_carry_all_that_a_score_rests_on(small: Path) -> None:
    lines = score(encoder(), config=small, out=Path("out.jsonl"), pictures=Path("drawn"))
    assert [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()] == json.loads(json.dumps(lines))
    first = lines[0]
    assert first["evaluator"] == "knn" and first["score"] == "accuracy" and first["n"] == 20
    assert 0 <= first["low"] <= first["value"] < first["high"] < 100
    assert list(first["protocol"]["k"]) == [1, 5] and first["protocol"]["class"] == "KNN"
    assert first["measured_on"] == "scenes" and len(first["fingerprint"]) == len(first["weights"]) == 64
    assert first["card"]["source"] == first["backbone"] == "a test"
    assert {line["evaluator"] for line in lines} == {"knn", "prompt"}
    assert Path("drawn/prompt_similarity.png").stat().st_size > 5_000
    assert lines[-1]["chosen"].keys() == {"threshold", "threshold_centre", "threshold_centred"}


def test_scores_are_the_same_with_and_without_features_on_disk(small: Path) -> None:
    model = encoder()
    first, second, third = (score(model, config=small, cache=cache) for cache in (None, Path("cache"), Path("cache")))
    values = [[(line["value"], line["low"], line["high"]) for line in lines] for lines in (first, second, third)]
    assert values[0] == values[1] == values[2]


def test_overrides_reach_sources_and_evaluators(small: Path) -> None:
    given = ["--evaluators.knn.init_args.k", "[3]", "--sources.test.init_args.length=7", "--evaluators.prompt.init_args.min_patches", "5"]
    lines = score(encoder(), config=small, overrides=[*given, "--evaluators.prompt.init_args.features.batch_size=7"])
    assert lines[0]["n"] == 7 and list(lines[0]["protocol"]["k"]) == [3]
    assert lines[-1]["protocol"]["min_patches"] == 5 and lines[-1]["protocol"]["features"]["batch_size"] == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--evaluators.nearest.init_args.k", "[3]"], r"evaluators: nothing reads 'nearest' \(accepted: knn, prompt\)"),
        (["--evaluators.kn.init_args.k", "[3]"], r"evaluators: nothing reads 'kn'; did you mean knn\?"),
        (["--evaluator.knn.init_args.k", "[3]"], r"nothing reads 'evaluator'; did you mean evaluators\?"),
        (["--evaluators.knn.init_args.kk", "[3]"], r"evaluators.knn: nothing reads 'kk'; did you mean k\? \(accepted: features, k, temp\)"),
        (["--evaluators.knn.init_args.features.layr", "3"], r"evaluators.knn.features: nothing reads 'layr'; did you mean layer\?"),
        (["--evaluators.knn.init_args.k", "many"], r"evaluators.knn.k: 'many' given; accepted: Sequence\[int\], null"),
        (["--evaluators.knn.init_args.temp", "[1]"], r"evaluators.knn.temp: '\[1\]' given; accepted: float"),
        (["--evaluators.knn.init_args.temp", "0"], "KNN: temp: 0.0; accepted: a positive number"),
        (["--evaluators.knn", "glpretrain.evaluate.KN"], r"there is no class glpretrain.evaluate.KN; did you mean KNN\?"),
        (["--sources.train.init_args.lenth", "3"], r"sources.train: nothing reads 'lenth'; did you mean length\?"),
        (["--sources.train", "glpretrain.evaluate.KNN"], "glpretrain.evaluate.KNN does not correspond to a subclass of Source"),
        (["--k", "3"], "nothing reads 'k'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_override_that_nothing_reads_is_named_with_what_is_accepted(small: Path, given: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        score(encoder(), config=small, overrides=given)
    assert "\n" not in str(caught.value)


def test_folders_take_the_place_of_sources(small: Path) -> None:
    write_masked(Path("annotated"), 9)
    lines = score(encoder(), config=small, masks="annotated")
    assert {line["evaluator"]: line["measured_on"] for line in lines} == {"knn": "scenes", "prompt": "annotated"}


def test_masks_without_classes_cost_only_the_scores_that_need_them(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(small.read_text())
    values["sources"]["masked_train"] = values["sources"]["masked"]
    values["evaluators"]["linear_segmentation"] = {"class_path": "glpretrain.evaluate.LinearSegmentation"}
    values["evaluators"]["clustering"] = {"class_path": "glpretrain.evaluate.ClusterSegmentation"}
    small.write_text(yaml.safe_dump(values))
    write_masked(Path("annotated"), 9)
    lines = score(encoder(), config=small, masks="annotated")
    assert {line["evaluator"] for line in lines} == {"knn", "prompt"}
    said = capsys.readouterr().err
    assert "left out: linear_segmentation: LinearSegmentation: needs the sources ['masked_train']" in said
    assert "left out: clustering: ClusterSegmentation: source 'annotated' has no masks of classes" in said


def test_only_a_refused_evaluator_changes_the_exit_status(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(encoder(), "backbone")
    write_masked(Path("annotated"), 9)
    options = ["evaluate", "backbone", "--config", str(small), "--no_cache", "--no_pictures"]
    assert main(options) == 0
    assert main([*options, "--masks", "annotated", "--evaluators.prompt", "glpretrain.evaluate.ClusterSegmentation"]) == 0
    assert "left out: prompt: ClusterSegmentation: source 'annotated' has no masks of classes" in capsys.readouterr().err
    before = len(Path("results.jsonl").read_text().splitlines())
    assert main([*options, "--evaluators.prompt.init_args.features.size", "50"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refused")]
    assert len(said) == 1 and said[0].startswith("refused: prompt: vit_tiny_patch16_224: height 50 does not divide by the patch of 8")
    added = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()[before:]]
    assert {line["evaluator"] for line in added} == {"knn"}


def test_divided_masks_give_both_sources_and_keep_what_is_said_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        write_masked(tmp_path / "street" / part, 9)
    lines = score(encoder(), config="eval/street_scenes", masks="street", overrides=["--sources.masked.init_args.offset", "0"])
    assert {line["measured_on"] for line in lines} == {"street/val"}
    assert "iou_building" in {line["score"] for line in lines}  # value 1 of the masks, as the configuration names it


def test_a_published_data_set_names_its_own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = Scenes(6, size=48, split="test")
    for number, name in enumerate(("a", "b", "c", "d", "e", "f")):
        item = source[number]
        for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject"):
            (tmp_path / "VOC2012" / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(item.values.permute(1, 2, 0).numpy()).save(tmp_path / "VOC2012" / "JPEGImages" / f"{name}.jpg")
        classes = torch.where(item.instances > 0, 15, 0)
        for folder, values in (("SegmentationClass", classes), ("SegmentationObject", item.instances)):
            Image.fromarray(values.byte().numpy()).save(tmp_path / "VOC2012" / folder / f"{name}.png")
    lists = tmp_path / "VOC2012" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\nd\ne\nf\n")
    overrides = ["--evaluators.linear_segmentation.init_args.num_steps", "5", "--evaluators.prompt.init_args.min_patches", "1"]
    lines = score(encoder(), config="eval/street_scenes", masks="VOC2012", overrides=overrides)
    assert {line["measured_on"] for line in lines} == {"VOC2012/val"}
    found = {(line["evaluator"], line["score"]) for line in lines}
    assert {("linear_segmentation", "iou_person"), ("linear_segmentation", "iou_background"), ("prompt", "iou_person")} <= found
    assert "iou_sky" not in {name for _, name in found}  # a class of the configuration's own masks
    masked = sources_of_recipe(find_recipe("mmc"), card=encoder().card, own=Own(None, "VOC2012", None), beside=False)["masked"]
    assert masked.name == "VOC2012/val" and len(masked) == 4


def test_what_cannot_be_scored_is_named_and_costs_no_other_score(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    too_large = [f"--evaluators.{name}.init_args.features.size=50" for name in ("prompt", "knn")]
    lines = score(encoder(), config=small, overrides=too_large[:1])
    assert {line["evaluator"] for line in lines} == {"knn"}
    assert "refused: prompt: vit_tiny_patch16_224: height 50" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no score could be computed; knn: .*; prompt: "):
        score(encoder(), config=small, overrides=too_large)


def test_mistakes_in_a_configuration_cost_one_line(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(values: dict) -> str:
        small.write_text(yaml.safe_dump(values))
        with pytest.raises(ValueError) as caught:
            score(encoder(), config=small)
        return str(caught.value)

    good = yaml.safe_load(small.read_text())
    assert "accepted are `sources` and `evaluators`" in refusal({"evaluators": {}})
    assert "found ['evaluators', 'evaluatorz', 'sources']" in refusal({**good, "evaluatorz": {}})
    assert "sources.tran: no evaluator reads it; did you mean train?" in refusal(
        {**good, "sources": {**good["sources"], "tran": good["sources"]["train"]}}
    )
    assert "evaluators.knn: KNN: needs the sources ['train', 'test']; given: ['masked']" in refusal(
        {**good, "sources": {"masked": good["sources"]["masked"]}}
    )
    unknown = refusal({**good, "evaluators": {"knn": {"class_path": "glpretrain.evaluate.KNN", "init_args": {"neighbours": 3}}}})
    assert unknown == "evaluators.knn: nothing reads 'neighbours' (accepted: features, k, temp)"
    mistyped = refusal({**good, "evaluators": {"knn": {"class_path": "glpretrain.evaluate.KNN", "init_args": {"temp": "cold"}}}})
    assert mistyped == "evaluators.knn.temp: 'cold' given; accepted: float"
    assert "evaluators.knn: there is no class glpretrain.evaluate.KN; did you mean KNN? (accepted: KNN" in refusal(
        {**good, "evaluators": {"knn": {"class_path": "glpretrain.evaluate.KN"}}}
    )
    assert "evaluators.knn" in refusal({**good, "evaluators": {"knn": None}})
    elsewhere = refusal({**good, "evaluators": {"knn": {"class_path": "glpretrane.evaluate.KNN"}}})
    assert "evaluators.knn" in elsewhere and "did you mean glpretrain?" in elsewhere
    assert main(["evaluate", "nowhere", "--k", "3"]) == 2
    assert "--k 3: accepted with --config only" in capsys.readouterr().err


def test_a_role_of_ones_own_is_read_where_an_evaluator_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(find_recipe("eval/faces").read_text())
    faces = {"class_path": "glpretrain.data.FaceSwaps", "init_args": {"size": 48, "split": "test"}}
    values["sources"]["wild"] = faces
    values["evaluators"] = {"forgery": {"class_path": "glpretrain.evaluate.ForgeryDetection", "init_args": {"others": ["wild"]}}}
    Path("own.yaml").write_text(yaml.safe_dump(values))
    lines = {line["score"]: line for line in score(encoder(), config="own.yaml")}
    assert {"auc", "wild_auc", "mean_auc"} <= lines.keys()
    assert set(lines["auc"]["sources"]) == {"train", "test", "wild"}


def test_score_is_offered_by_the_package() -> None:
    assert glpretrain.score is score


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"no street scenes in {SHARED}")
def test_real_street_scenes_are_scored(tmp_path: Path) -> None:
    overrides = ["--evaluators.linear_segmentation.init_args.num_steps", "50"]
    lines = score(encoder(), config="eval/street_scenes", masks=CAMVID, overrides=overrides, out=tmp_path / "out.jsonl")
    found = {(line["evaluator"], line["score"]): line for line in lines}
    assert found["prompt", "miou"]["n"] > 200 and 10 < found["prompt", "miou"]["value"] < 60
    assert {"iou_Sky", "iou_Road", "iou_Building"} <= {name for _, name in found}
