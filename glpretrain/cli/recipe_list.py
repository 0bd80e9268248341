"""`glpretrain recipes`: what can be trained and scored, from the headers of the recipes.

What a recipe sets is left out (`recipe_help`).
"""

import re
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from glpretrain.cli.parsing import meant
from glpretrain.runs import find_recipe, recipe_names, recipe_roots

_FIELD = re.compile(r"([A-Z][a-z]+(?: [a-z]+)?): +(.*)")
_SENTENCE = re.compile(r"; |\. ")
_SOURCES = re.compile(r"class_path: glpretrain\.data\.(\w+)")
_KINDS = {
    "points": {"Solids", "ModelNet40", "ShapeNet55", "Clouds"},
    "sounds": {"Sounds", "AudioFolder"},
    "faces": {"Faces", "FaceSwaps", "LFWSubset"},
    "tissue": {"Tissue", "TileFolder", "TileShards"},
}

_OPTIONS = {
    "--data.order glpretrain.data.infobatch.InfoBatch --trainer.max_epochs 16 --trainer.max_steps -1": (
        "InfoBatch: epochs leave out items of low loss, at random and without bias; any recipe"
    ),
    """--model.init_args.gram '{"start": 0.8}'""": (
        "Gram anchoring: patches keep the similarities of an earlier backbone; dino, ibot, dinov2, dinov3, gpfm, mmc"
    ),
    "--init_from BACKBONE": "start from a trained backbone; with mask_embed locality alignment, which goes on from it",
    "--init_from '{path: BACKBONE, encoder: true}'": "the same, with the backbone's encoder in place of the recipe's",
}


class Header(NamedTuple):
    """What the comment at the head of a recipe says."""

    name: str  # what `pretrain` accepts
    purpose: str  # its first paragraph
    data: str  # kind of items: images, faces, tissue, points, sounds
    fields: dict[str, str]  # Command, Needs, Costs, Measured and so on, each in one line


def recipes(words: list[str] = []) -> None:  # noqa: B006 - read only
    """List recipes: name, kind of data, cost, and what each is for.

    Words filter the list: a recipe is shown where all of them occur in its name or its header, as in
      glpretrain recipes points
      glpretrain recipes dino gpu
    `glpretrain pretrain RECIPE --help` says what a recipe sets.

    Args:
        words: words to look for, in small or capital letters
    """
    found = [header_of(name, find_recipe(name)) for name in recipe_names()]
    shown = [header for header in found if all(word.lower() in _text(header).lower() for word in words)]
    if not shown:
        raise ValueError(f"recipes: none has {' and '.join(map(repr, words))}{meant(words[0], [header.name for header in found])}")
    table = Table(title=f"{len(shown)} recipes", title_justify="left")
    for name in ("recipe", "data", "what it is for", "costs"):
        table.add_column(name, overflow="fold", no_wrap=name == "data")
    for header in shown:
        costs = _SENTENCE.split(header.fields.get("Costs", "").removesuffix("."))[0]
        table.add_row(*map(Text, (header.name, header.data, header.purpose.removesuffix("."), costs)))
    Console().print(table)
    print("options of these:")
    for option, purpose in _OPTIONS.items():
        print(f"  {option}\n      {purpose}")
    for root in recipe_roots():
        print(
            f"files: {root}"
            + (f"; launchers: {', '.join(map(str, sorted((root / 'cluster').glob('*.sh'))))}" if (root / "cluster").is_dir() else "")
        )


def header_of(name: str, path: Path) -> Header:
    """The header of a recipe.

    Args:
        name: its name.
        path: its file.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line.removeprefix("#").rstrip() for line in re.match(r"(?:#.*\n)*", text)[0].splitlines()]  # pyright: ignore[reportOptionalSubscript]
    purpose: list[str] = []
    fields: dict[str, str] = {}
    last = None
    for line in lines:
        if found := _FIELD.fullmatch(line.strip()):
            last, fields[found[1]] = found[1], found[2]
        elif last is not None:
            fields[last] += f" {' '.join(line.split())}"
        elif line.strip():
            purpose.append(line.strip())
    return Header(name, " ".join(purpose), _kind(text), fields)


def _kind(text: str) -> str:
    """Of the items that the sources of a recipe give."""
    names = set(_SOURCES.findall(text))
    return next((kind for kind, known in _KINDS.items() if names & known), "images")


def _text(header: Header) -> str:
    return " ".join((header.name, header.data, header.purpose, *header.fields.values()))
