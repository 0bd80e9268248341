"""`glpretrain evaluate`: which evaluators run on which sources, and the lines, table and pictures that come of it.

What a score is is left out (`glpretrain.evaluate`), and so are training and its numbers (`training`).
"""

import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glpretrain import __version__
from glpretrain.callbacks.evaluators import explain, left_out_lines
from glpretrain.cli.opening import opened
from glpretrain.cli.scored_sources import BESIDE, DEFAULT_RECIPE, Own, default_parts, parts_of_config, recipe_of
from glpretrain.cli.trust import take_imports
from glpretrain.core.files import append_lines, part_file
from glpretrain.encoders import Encoder
from glpretrain.evaluate import Evaluator, FeatureCache, Result, Sources
from glpretrain.evaluate.cache import DISK_GB, default_folder
from glpretrain.evaluate.estimates import announce
from glpretrain.runs import find_recipe, require_outside


class Scores(list[dict[str, object]]):
    """One mapping per score: evaluator, score, value, low, high, n, measured_on, fingerprint, protocol, chosen, backbone, card and more."""

    def __init__(self) -> None:
        super().__init__()
        self.refusals: list[str] = []  # of evaluators all of whose scores are missing, and why


def evaluate(
    backbone: str,
    *,
    config: str | None = None,
    recipe: str | None = None,
    data: Path | None = None,
    masks: Path | None = None,
    videos: Path | None = None,
    out: Path = Path("results.jsonl"),
    pictures: Path | None = None,
    no_pictures: bool = False,
    cache: Path | None = None,
    cache_gb: float = DISK_GB,
    no_cache: bool = False,
    num_workers: int | None = None,
    overrides: Sequence[str] = (),
) -> int:
    """Score a backbone: what its cls and its patches know, with intervals.

    The headline scores are printed, and one JSON line per score is appended to a file.
      glpretrain evaluate runs/mmc/latest/backbone                               the scores that a run reports
      glpretrain evaluate runs/mmc/latest/backbone --config eval/images          every evaluator, on embedded data
      glpretrain evaluate BACKBONE --config eval/images --data photos/ --masks annotated/ --videos davis/
    With --config, anything in it can be overridden: --evaluators.knn.init_args.k [5] --sources.test.init_args.length 300
    The exit status is 1 where an evaluator was refused: the other scores are written, its own are missing. Evaluators whose sources
    your own folders cannot give are left out with a line, and do not change the status.

    Args:
        backbone: folder written by a run or by `glpretrain export`, or a published checkpoint (DINO, MAE, DINOv2 and many others,
            which docs/weights.md lists)
        config: sources and evaluators: a name below recipes/ (eval/images) or a yaml file
        recipe: without --config: recipe whose data it is scored on; that of the run it lies in, or mmc, when left out
        data: class folders, split into train/ and val/ or not, instead of train and test; a folder without classes is scored with what
            needs none: health of the features, and agreement of neighbours
        masks: images/ beside masks/, in train/ and val/ or not, or a folder of Pascal VOC, ADE20K or COCO-Stuff (`MaskedFolder`),
            instead of the masked sources
        videos: with --config: JPEGImages/ beside Annotations/, as DAVIS, or a folder per video
        out: file that lines are appended to
        pictures: folder of the pictures; the name of --out with _pictures when left out
        no_pictures: draw none
        cache: folder where features are kept; ~/.cache/glpretrain/features when left out
        cache_gb: gigabytes that this folder is kept to; features that were not used for longest are removed first
        no_cache: keep features in memory only
        num_workers: processes that read the items; when left out, one for each core if there are 2,048 items or more, and else none
    """
    own = Own(data, masks, videos)
    drawn = None if no_pictures else pictures or out.with_name(f"{out.stem}_pictures")
    kept = None if no_cache else cache or default_folder()
    if drawn is not None:
        require_outside("pictures", drawn, given=own.paths)
    options = {"overrides": overrides, "out": out, "pictures": drawn, "cache": kept, "cache_gb": cache_gb, "num_workers": num_workers}
    found = score(backbone, config=config, recipe=recipe, **own._asdict(), **options)
    print(f"{len(found)} scores appended to {out}" + ("" if drawn is None else f", pictures in {drawn}/"))
    return 1 if found.refusals else 0


def score(
    backbone: str | Path | Encoder,
    *,
    config: str | Path | None = None,
    recipe: str | None = None,
    data: str | Path | None = None,
    masks: str | Path | None = None,
    videos: str | Path | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    pictures: Path | None = None,
    cache: Path | None = None,
    cache_gb: float = DISK_GB,
    num_workers: int | None = None,
) -> Scores:
    """Score a backbone with the evaluators of a configuration, or with those that every run is scored with.

    Args:
        backbone: an encoder, or whatever `load_backbone` takes.
        config: yaml file with `sources` and `evaluators` (recipes/eval/); None for the default evaluators on a run's sources.
        recipe: without `config`: name or path of the recipe whose sources are used; when left out the config.yaml of the run that
            the backbone lies in, or the quick start.
        data: class folders, split into train/ and val/ or not, or tiles or tar shards with classes; instead of the train and test
            sources. Items without classes are scored with what needs none.
        masks: a folder as `MaskedFolder` takes it; instead of the masked sources.
        videos: with `config`: a folder as `VideoFolder` takes it; instead of the videos.
        overrides: of `config`, arguments as on the command line, such as `["--evaluators.knn.init_args.k", "[5]"]`.
        out: file that JSON lines are appended to, evaluator by evaluator, so that an interrupted evaluation loses none.
        pictures: folder for PNGs, `<evaluator>_<picture>.png`; None draws none.
        cache: folder where features outlive this call.
        cache_gb: number of gigabytes that this folder is kept to.
        num_workers: number of processes that read the items, see `DecodedItems`.

    Raises:
        ValueError: a folder, recipe or evaluator is not what is accepted, or no score could be computed.
    """
    own, overrides = Own(data, masks, videos), take_imports(overrides)
    if overrides and config is None:
        raise ValueError(f"{' '.join(overrides)}: accepted with --config only (see glpretrain evaluate --help)")
    encoder = backbone if isinstance(backbone, Encoder) else opened(backbone)
    if torch.cuda.is_available():
        encoder.cuda()
    if config is not None and recipe is not None:
        raise ValueError(f"evaluate: config {config} and recipe {recipe} both say where the items are; accepted: one of them")
    if config is None and own.videos is not None:
        raise ValueError(f"evaluate: videos {own.videos} need a config with an evaluator of videos; accepted: config eval/images, say")
    if config is None:
        path = find_recipe(recipe or DEFAULT_RECIPE) if isinstance(backbone, Encoder) else recipe_of(backbone, recipe)
        beside = recipe is None and path.name == BESIDE
        evaluators, sources = default_parts(path, card=encoder.card, own=own, beside=beside)
    else:
        path = find_recipe(str(config))
        evaluators, sources = parts_of_config(path, overrides, card=encoder.card, own=own)
    sources.read_with(num_workers)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
    features = FeatureCache(encoder, folder=cache, disk_gb=cache_gb)
    common = {
        "backbone": encoder.card.source if isinstance(backbone, Encoder) else str(backbone),
        "recipe": str(path),
        "version": __version__,
        "parameters": sum(tensor.numel() for tensor in encoder.backbone_state().values()),
        "weights": features.fingerprint,
        "card": encoder.card.to_json(),
    }
    found = Scores()
    results: dict[str, tuple[Evaluator, Result]] = {}
    for name, evaluator in evaluators.items():
        announce(name, evaluator, encoder, sources, features)
        start = time.perf_counter()
        result = evaluator.attempt(encoder, sources, features)
        results[name] = (evaluator, result)
        if not result.scores:  # what this backbone or these items cannot do must not cost the other scores
            found.refusals.append(f"{name}: {'; '.join(dict.fromkeys(result.left_out.values()))}")
            print(f"refused: {found.refusals[-1]}", file=sys.stderr, flush=True)
            continue
        for line in left_out_lines({f"{name} {score}": reason for score, reason in result.left_out.items()}):
            print(line, file=sys.stderr, flush=True)
        used = {role: sources.measured(role).fingerprint() for role in evaluator.roles if role in sources}
        lines: list[dict[str, object]] = [
            {
                "evaluator": name,
                "score": score,
                **one._asdict(),
                "measured_on": sources.measured(evaluator.scored).name,
                "fingerprint": used[evaluator.scored],
                "sources": used,
                "protocol": {"class": type(evaluator).__name__, **evaluator.protocol},
                "chosen": result.chosen,
                "time": datetime.now().isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - start, 3),
                **common,
            }
            for score, one in result.scores.items()
        ]
        if out is not None:
            append_lines(out, [json.dumps(line, default=str, allow_nan=False) for line in lines])
        if pictures is not None:
            try:
                figures = evaluator.pictures(encoder, sources, features)
            except ValueError as error:
                figures = {}
                print(f"no pictures: {name}: {error}", file=sys.stderr, flush=True)
            for title, figure in figures.items():
                with part_file(pictures / f"{name}_{title}.png") as part:
                    figure.savefig(part, dpi=120, format="png")
        found += lines
    if not found:
        raise ValueError("evaluate: no score could be computed; " + ("; ".join(found.refusals) or "the lines above say why"))
    Console().print(table(results, sources))
    return found


def table(results: dict[str, tuple[Evaluator, Result]], sources: Sources) -> Table:
    """The headline scores with their intervals, and below why scores were left out; all scores are in the lines."""
    shown = Table("evaluator", "score", title="scores of the backbone, with 95 % intervals", title_justify="left")
    for column in ("value", "n"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("measured on")
    for name, (evaluator, result) in results.items():
        measured_on = sources.measured(evaluator.scored).name if evaluator.scored in sources else ""
        for score in evaluator.headlines:
            found = result.scores.get(score)
            shown.add_row(name, score, *(("left out", "") if found is None else (str(found), str(found.n))), Text(measured_on))
    reasons = {f"{name} {score}": reason for name, (_, result) in results.items() for score, reason in result.left_out.items()}
    explain(shown, reasons)
    return shown
