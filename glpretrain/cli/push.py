"""`glpretrain push`: a backbone, its scores and a model card as a repository of huggingface.co.

The card and the upload are left out (`glpretrain.weights.pushing`).
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from glpretrain.cli.opening import opened
from glpretrain.core.listing import expanded
from glpretrain.weights.pushing import ScoreLine, check_repository, upload, write_repository

_BACKBONE, _RESULTS = "backbone", "results.json"  # in the folder of a run
_FACTS = {"data": "data", "method": "method", "recipe": "recipe", "steps": "steps", "seed": "seed", "images_seen": "images seen"}
_ENDS = ("_low", "_high", "_n")


def push(
    folder: Path, repository: str, *, licence: str | None = None, private: bool = False, dry_run: bool = False, out: Path | None = None
) -> None:
    """Upload a backbone to huggingface.co with a model card: data, scores, licence, use.

    The repository gets the folder that glpretrain and timm open, a folder for transformers where it has a class for the encoder, and
    README.md. Scores come from results.json of the run.
      glpretrain push runs/mmc/latest user/name --licence CC-BY-4.0 --dry_run

    Args:
        folder: folder of a run, or of a backbone
        repository: user/name
        licence: licence of the weights; that of the backbone's card when left out
        private: let nobody else see a new repository
        dry_run: write the files to a folder and upload nothing
        out: with --dry_run: a new or empty folder; hub/USER/NAME when left out
    """
    check_repository(repository)
    if out is not None and not dry_run:
        raise ValueError(f"push: --out {out} given; accepted with --dry_run only")
    folder = expanded(folder)
    run = folder if (folder / _RESULTS).is_file() else folder.resolve().parent
    backbone = folder / _BACKBONE if (folder / _BACKBONE).is_dir() else folder
    results = _results(run / _RESULTS) if (run / _RESULTS).is_file() and (run / _BACKBONE).resolve() == backbone.resolve() else {}
    encoder = opened(backbone)
    parts = {"licence": licence, "facts": _facts(results), "scores": _scores(results), "repository": repository}
    if dry_run:
        written = write_repository(encoder, out or Path("hub", repository), **parts)
        print(f"{written}: {', '.join(sorted(path.name for path in written.iterdir()))}; nothing was uploaded")
        return
    with tempfile.TemporaryDirectory() as place:
        print(upload(write_repository(encoder, Path(place, "files"), **parts), repository, private=private))


def _results(path: Path) -> dict:
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"push: {path} is no JSON: {error}") from error
    if not isinstance(results, dict):
        raise ValueError(f"push: {path} holds a {type(results).__name__}; accepted: what a run writes")
    return results


def _facts(results: Mapping[str, object]) -> dict[str, str]:
    return {shown: str(results[name]) for name, shown in _FACTS.items() if results.get(name) is not None}


def _scores(results: Mapping) -> list[ScoreLine]:
    """The scores of a run, each of which has its ends and its number of items beside it."""
    before, after, measured_on = (results.get(name) or {} for name in ("before", "after", "measured_on"))
    names = [name for name, value in after.items() if value is not None and not name.endswith(_ENDS)]
    return [
        ScoreLine(name, _shown(before, name), _shown(after, name), _source(name, measured_on), str(after.get(f"{name}_n", "")))
        for name in names
    ]


def _source(score: str, measured_on: Mapping) -> str:
    """What a score was measured on; its name begins with that of its evaluator."""
    owners = [name for name in measured_on if score == name or score.startswith(f"{name}_")]
    return str(measured_on[max(owners, key=len)]) if owners else ""


def _shown(scores: Mapping, name: str) -> str:
    value, low, high = (scores.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return ""
    return f"{value:.1f}" if low is None or high is None else f"{value:.1f} [{low:.1f}, {high:.1f}]"
