"""Six methods beside each other on embedded scenes and on photographs: a developer's tool that trains, scores and writes the table.

    python tests/method_table.py --data DATA --work FOLDER                    train what is missing, score it, print the table
    python tests/method_table.py --data DATA --work FOLDER --print            only print what was measured

DATA holds classification_flowers, classification_cifar10, segmentation_camvid and segmentation_davis2016val. Every method is trained by its
own quick start, whose steps take about as long as those of MMC: `glpretrain pretrain RECIPE` on scenes, and again on flowers with CamVid's
validation part as masks. The backbone of flowers is then scored on CIFAR-10 (8,000 pictures to learn from, 2,000 to score) and on DAVIS,
which no setting was chosen on. One process at a time, seed by seed, so that an interrupted table has whole seeds.

`*` marks the best mean of a column, and `=` what lies within Student's 95 % interval of that mean over its seeds.
"""

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image
from scipy import stats
from score_table import METHODS

from glpretrain import load_backbone
from glpretrain.compare import spread
from glpretrain.report import untrained
from glpretrain.weights import export

FLOWERS, CIFAR, CAMVID, DAVIS = (
    "classification_flowers",
    "classification_cifar10",
    "segmentation_camvid",
    "segmentation_davis2016val",
)
_LEVEL = 0.95
_COLUMNS = (  # of the table: heading, which file of a seed, score
    ("scenes: k-NN", "scenes", "knn"),
    ("linear", "scenes", "linear"),
    ("IoU", "scenes", "prompt_miou"),
    ("AUC", "scenes", "prompt_auc"),
    ("flowers: k-NN", "flowers", "knn"),
    ("linear", "flowers", "linear"),
    ("CIFAR-10: k-NN", "elsewhere", "knn"),
    ("linear", "elsewhere", "linear"),
    ("CamVid: IoU", "flowers", "prompt_miou"),
    ("AUC", "flowers", "prompt_auc"),
    ("DAVIS: IoU", "elsewhere", "prompt_miou"),
    ("AUC", "elsewhere", "prompt_auc"),
)


class Place(NamedTuple):
    """Where the runs of one method with one seed lie."""

    work: Path
    recipe: str
    seed: int

    @property
    def folder(self) -> Path:
        """Folder of this method and seed."""
        return self.work / self.recipe / f"seed{self.seed}"

    def runs(self, data: str) -> Path:
        """Folder of run folders."""
        return self.folder / data

    def results(self, data: str) -> Path:
        """Where a finished run wrote its scores."""
        return self.runs(data) / self.recipe / "latest" / "results.json"

    @property
    def elsewhere(self) -> Path:
        """Scores of the backbone of flowers on pictures that it was not trained on, a line each."""
        return self.folder / "elsewhere.jsonl"

    @property
    def random(self) -> Path:
        """The same of fresh weights, which all methods begin with."""
        return self.work / "random" / f"seed{self.seed}.jsonl"


def unpack_cifar(source: Path, target: Path, *, counts: dict[str, int]) -> None:
    """Write the first images of each part of the packed CIFAR-10 as class folders, bytes unchanged, unless that was done before."""
    if (done := target / ".done").exists():
        return
    packed = np.load(source)
    for part, (name, count) in zip(("train", "test"), counts.items(), strict=True):
        data, ends, labels = (packed[f"{part}_{kind}"] for kind in ("jpeg", "offsets", "labels"))
        chosen = np.random.default_rng(0).permutation(len(labels))[:count]  # files may be sorted by class
        for number in sorted(chosen.tolist()):
            picture = data[ends[number] : ends[number + 1]].tobytes()
            Image.open(io.BytesIO(picture)).verify()
            folder = target / name / str(packed["class_names"][labels[number]])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:05d}.jpg").write_bytes(picture)
    done.touch()


def link_davis(source: Path, target: Path) -> None:
    """DAVIS as one folder of images and one of masks, every fifth frame of each sequence."""
    for sequence in sorted((source / "Annotations").iterdir()):
        for mask in sorted(sequence.glob("*.png"))[::5]:
            for name, path in (("masks", mask), ("images", source / "JPEGImages" / sequence.name / f"{mask.stem}.jpg")):
                copy = target / name / f"{sequence.name}_{path.name}"
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())


def elsewhere_config(work: Path) -> dict[str, object]:
    """Sources and evaluators of what the backbone of flowers is scored on besides."""
    folder = "glpretrain.data.ImageFolder"
    return {
        "sources": {
            "train": {"class_path": folder, "init_args": {"root": str(work / "cifar10" / "train")}},
            "test": {"class_path": folder, "init_args": {"root": str(work / "cifar10" / "val")}},
            "masked": {"class_path": "glpretrain.data.MaskedFolder", "init_args": {"root": str(work / "davis")}},
        },
        "evaluators": {
            "knn": {"class_path": "glpretrain.evaluate.KNN"},
            "linear": {"class_path": "glpretrain.evaluate.LinearProbe"},
            "prompt": {"class_path": "glpretrain.evaluate.PromptSegmentation"},
        },
    }


def commands(place: Place, data: Path) -> Iterator[tuple[Path, list[str]]]:
    """What must be there, and the arguments of `glpretrain` that make it."""
    own = ["--seed_everything", str(place.seed), "--resume", "auto", "--trainer.enable_progress_bar", "false"]
    yield place.results("scenes"), ["pretrain", place.recipe, *own, "--runs", str(place.runs("scenes"))]
    photographs = ["--data", str(data / FLOWERS), "--masks", str(data / CAMVID / "val")]
    masked = ["--data.masked.init_args.ignore", "11", "--data.masked.init_args.offset", "1"]
    yield place.results("flowers"), ["pretrain", place.recipe, *own, *photographs, *masked, "--runs", str(place.runs("flowers"))]
    config, backbone = place.work / "elsewhere.yaml", place.results("flowers").parent / "backbone"
    yield place.elsewhere, ["evaluate", str(backbone), "--config", str(config), "--out", str(place.elsewhere)]
    yield place.random, ["evaluate", str(place.random.with_suffix("")), "--config", str(config), "--out", str(place.random)]


def train(places: Sequence[Place], *, data: Path, work: Path) -> None:
    """Make what is missing, one process after another, each with one thread."""
    unpack_cifar(data / CIFAR / "cifar10_jpeg.npz", work / "cifar10", counts={"train": 8000, "val": 2000})
    link_davis(data / DAVIS, work / "davis")
    (work / "elsewhere.yaml").write_text(yaml.safe_dump(elsewhere_config(work)))
    for place in places:
        for result, arguments in commands(place, data):
            if not result.exists():
                if result == place.random:
                    backbone = place.results("flowers").parent / "backbone"
                    export(untrained(load_backbone(backbone), seed=place.seed), place.random.with_suffix(""))
                print(f"{place.recipe}, seed {place.seed}: {' '.join(arguments[:2])} ...", flush=True)
                result.parent.parent.mkdir(parents=True, exist_ok=True)
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run([sys.executable, "-m", "glpretrain.cli", *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)


def scores(place: Place, *, fresh: bool = False) -> dict[tuple[str, str], float]:
    """Every score of one method with one seed, by file and name; those that are missing are left out."""
    found: dict[tuple[str, str], float] = {}
    for data in ("scenes", "flowers"):
        if (path := place.results(data)).exists():
            measured = json.loads(path.read_text())
            found |= {(data, name): value for name, value in measured["before" if fresh else "after"].items()}
    path = place.random if fresh else place.elsewhere
    if path.exists():
        for line in map(json.loads, path.read_text().splitlines()):
            name = line["evaluator"] if line["score"] == "accuracy" else f"{line['evaluator']}_{line['score']}"
            found["elsewhere", name] = line["value"]
    return found


def within(values: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the mean of some values reaches the lower end of Student's interval of the best mean."""
    if len(best) < 2:
        return False
    half = float(stats.t.ppf((1 + _LEVEL) / 2, len(best) - 1)) * float(np.std(best, ddof=1)) / len(best) ** 0.5
    return float(np.mean(values)) >= float(np.mean(best)) - half


def table(work: Path, *, recipes: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Lines of Markdown: random weights, and a row for each method, with mean and standard deviation over the seeds that there are."""
    rows: dict[str, list[dict[tuple[str, str], float]]] = {}
    for recipe in recipes:
        places = [Place(work, recipe, seed) for seed in seeds]
        if recipe == recipes[0]:
            rows["random weights"] = [scores(place, fresh=True) for place in places]
        rows[METHODS[recipe]] = [scores(place) for place in places]
    cells = {name: [name] for name in rows}
    for _, data, score in _COLUMNS:
        values = {name: [one[data, score] for one in found if (data, score) in one] for name, found in rows.items()}
        trained = {name: one for name, one in values.items() if one and name != "random weights"}
        first = max(trained, key=lambda name: float(np.mean(trained[name])), default=None)
        for name, one in values.items():
            mark = ""
            if first is not None and name != "random weights" and one:
                mark = "*" if name == first else "=" if within(one, trained[first]) else ""
            cells[name].append(spread(one) + mark if one else "")
    head = ["", *(heading for heading, _, _ in _COLUMNS)]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells.values())]


def main(arguments: Sequence[str]) -> int:
    """Train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="recipes (default: all six)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--print", action="store_true", help="only print what was measured")
    given = parser.parse_args(arguments)
    places = [Place(given.work.resolve(), recipe, seed) for seed in given.seeds for recipe in given.methods]
    if not given.print:
        train(places, data=given.data.resolve(), work=given.work.resolve())
    print("\n".join(table(given.work.resolve(), recipes=given.methods, seeds=given.seeds)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
