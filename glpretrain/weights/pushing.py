"""A repository of the hub from a backbone: the folder that timm and this package open, one for transformers, and a model card.

Left out: where a run keeps its scores (`cli.push`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glpretrain.core.files import new_folder, write_whole
from glpretrain.encoders import Encoder
from glpretrain.weights.exports import export_as
from glpretrain.weights.folders import CARD, described, export

CARD_FILE, TRANSFORMERS = "README.md", "transformers"
_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class ScoreLine:
    """A score as a model card shows it."""

    name: str
    before: str  # with random weights; empty where it was not measured
    after: str  # with its interval
    measured_on: str
    count: str


def write_repository(
    encoder: Encoder, folder: Path, *, repository: str, licence: str | None, facts: Mapping[str, str], scores: Sequence[ScoreLine]
) -> Path:
    """Write all files of a repository to a new folder.

    Args:
        encoder: the encoder.
        folder: a new or empty folder.
        repository: `user/name`.
        licence: licence of the weights; None keeps that of the encoder's card.
        facts: what is known of the training (data, method, steps), in the order in which it is shown.
        scores: its scores.

    Raises:
        ValueError: the name is no `user/name`, or the folder has something in it.
    """
    check_repository(repository)
    with new_folder(folder, last=CARD_FILE, argument="push") as part:
        export(encoder, part / "own", licence=licence)
        for path in sorted((part / "own").iterdir(), key=lambda path: path.name == CARD):
            path.replace(part / path.name)
        (part / "own").rmdir()
        try:
            export_as(encoder, part / TRANSFORMERS, format="huggingface", licence=licence)
            why_not = ""
        except ValueError as error:
            why_not = str(error).removeprefix("export: ")
        config = part / "config.json"
        architecture = str(json.loads(config.read_text())["architecture"]) if config.is_file() else ""
        text = _card_text(encoder, repository, licence, facts, scores, timm=architecture, why_not=why_not)
        write_whole(part / CARD_FILE, text.encode())
    return folder


def check_repository(repository: str) -> None:
    """Refuse, with a ValueError, what is no `user/name`."""
    if not _NAME.fullmatch(repository):
        raise ValueError(f"push: {repository!r} given; accepted: user/name, with letters, digits, dots, dashes and underscores")


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder to huggingface.co, with the account of `hf auth login`; the address of what was uploaded.

    Raises:
        ValueError: there is no network, no account, or no right to write there.
    """
    from huggingface_hub import HfApi, constants, errors

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by glpretrain push")
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"push: {constants.ENDPOINT}/{repository}: {reason}; log in with `hf auth login`, or write the files with --dry_run"
        ) from error
    return f"{constants.ENDPOINT}/{repository}"


def _card_text(
    encoder: Encoder,
    repository: str,
    licence: str | None,
    facts: Mapping[str, str],
    scores: Sequence[ScoreLine],
    *,
    timm: str,
    why_not: str,
) -> str:
    card = described(encoder.card, licence=licence, source=None)
    parameters = sum(tensor.numel() for tensor in encoder.backbone_state().values())
    known = {
        "architecture": f"{card.arguments.get('name', card.encoder)}, {parameters / 1e6:.1f} M parameters",
        "input": f"{card.modality}, {' x '.join(map(str, card.item_shape))}",
        "mean, standard deviation": f"{_numbers(card.mean)}; {_numbers(card.std)}",
        "features": f"`cls` and `patches`, {card.embed_dim} numbers each",
        "weights": card.source or "not stated",
        **facts,
        "licence": card.licence or "not stated; ask who has trained it before you use it",
    }
    lines = [
        "---",
        *_front_matter(card.licence, timm=timm),
        "---",
        "",
        f"# {repository.partition('/')[2]}",
        "",
        "A backbone that was pretrained without labels, with glpretrain: `cls` says what is in an item, `patches` where.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in known.items()),
        "",
        "## Scores",
        "",
    ]
    if scores:
        lines += ["In percent, with the 95 % interval over the items that were scored.", ""]
        lines += ["| score | random weights | trained | n | measured on |", "|---|---|---|---|---|"]
        lines += [f"| {_cell(one.name)} | {one.before} | {one.after} | {one.count} | {_cell(one.measured_on)} |" for one in scores]
    else:
        lines.append("None were measured. `glpretrain evaluate` measures them.")
    lines += ["", "## Use", "", "```python", "import glpretrain", ""]
    lines += [f'backbone = glpretrain.load_backbone("hf:{repository}")']
    lines += ["features = backbone(backbone.transform(image)).cls  # image: PIL, array (H W C) or tensor (C H W)"]
    if timm:
        lines += ["", "import timm", "", f'model = timm.create_model("hf-hub:{repository}", pretrained=True, num_classes=0).eval()']
    if not why_not:
        lines += ["", "from transformers import AutoModel", ""]
        lines += [f'model = AutoModel.from_pretrained("{repository}", subfolder="{TRANSFORMERS}")']
    lines += ["```", ""]
    lines += [f"transformers has no class for it: {_cell(why_not)}.", ""] if why_not else []
    return "\n".join(lines)


def _front_matter(licence: str, *, timm: str) -> list[str]:
    """What the hub reads of a card."""
    is_known = re.fullmatch(r"(?i)(apache|mit|bsd|cc|cc0|gpl|lgpl|agpl|mpl)[\w.-]*", licence) is not None
    named = [f"license: {licence.lower()}"] if is_known else ["license: other", f"license_name: {json.dumps(licence)}"]
    return [
        *(named if licence else []),
        f"library_name: {'timm' if timm else 'glpretrain'}",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in ("glpretrain", "self-supervised-learning", "feature-extraction")),
    ]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _cell(text: str) -> str:
    """Text in a cell of a table."""
    return " ".join(str(text).replace("|", "\\|").split())
