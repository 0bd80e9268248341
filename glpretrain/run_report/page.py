"""The report of a run as one page that needs no network: its facts and curves, and the user's own items in its features.

The page holds small pictures, places and neighbours; a picture is looked into with the parts of the page of `glpretrain inspect`. What is
stored is bounded by the number of items on the page, and not by that of the run.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Literal, NamedTuple

import numpy as np

import glpretrain
from glpretrain import modalities
from glpretrain.compare.figures import curves
from glpretrain.compare.page import escaped, panels
from glpretrain.compare.reading import Record
from glpretrain.compare.rows import rows_of
from glpretrain.core.files import write_whole
from glpretrain.core.imports import imported
from glpretrain.data.sources.base import Source
from glpretrain.encoders import Encoder
from glpretrain.report.image_page import Named
from glpretrain.report.maps import Picture
from glpretrain.report.page import Plain, as_json, base64_of, common, guide_of, scripts
from glpretrain.run_report.facts import cards, duration, improvement, scores, verdicts
from glpretrain.run_report.findings import Apart, Neighbours, Pair, agreement, apart, as_csv, copies, nearest
from glpretrain.run_report.projection import projected
from glpretrain.run_report.sampling import MOST_ITEMS, Sample, evenly_spaced, sampled
from glpretrain.run_report.sheet import sheet
from glpretrain.runs import calibrated_threshold

_SAMPLES = 6  # items whose neighbours are shown without a click
_INSIDE, _FEWER, _MANY_PATCHES = 4, 2, 400  # pictures to look into; fewer where each has many patches
_MOMENTS: tuple[Literal["before"], Literal["after"]] = ("before", "after")


class Written(NamedTuple):
    """What was written."""

    page: Path
    table: Path
    num_shown: int  # items on the page
    num_copies: int  # pairs of near duplicates among them
    num_apart: int


class Findings(NamedTuple):
    """What the page shows of the items."""

    neighbours: Mapping[str, Neighbours]  # before and after training
    copies: Sequence[Pair]
    apart: Sequence[Apart]


def write_run_report(
    record: Record,
    results: Mapping,
    encoders: Mapping[str, Encoder],
    source: Source,
    *,
    out: Path,
    start: str,
    commands: Sequence[str],
    max_items: int = MOST_ITEMS,
) -> Written:
    """Write the report of a run, and a table of what to act on beside it; both replace what was there.

    Args:
        record: the run.
        results: its results.json.
        encoders: `before`, what it started from, and `after`, what was trained; in evaluation mode.
        source: its items, or others of the user's.
        out: path of the page.
        start: what `before` is, in words.
        commands: commands that go on from here.
        max_items: number of items that are encoded and shown at most; evenly spaced ones.

    Raises:
        ValueError: no item can be read, or does not fit the backbones.
    """
    sample = sampled({name: encoders[name] for name in _MOMENTS}, source, max_items=max_items)
    is_image = source.modality == "image"
    neighbours = {name: nearest(sample.features[name]) for name in _MOMENTS}
    twice = copies(neighbours["after"], sample.pictures) if is_image else []
    found = Findings(neighbours, twice, apart(neighbours["after"]))
    places = {"after": projected(sample.features["after"])}
    places["before"] = projected(sample.features["before"], like=places["after"].places)
    table = out.with_suffix(".csv")
    data: Plain = {
        **common(),
        "items": [{"name": name, "label": label} for name, label in zip(sample.names, sample.labels, strict=True)],
        "classes": list(source.classes),
        "sheet": sheet(sample.pictures),
        "moments": {name: _moment(places[name].places, neighbours[name]) for name in _MOMENTS},
        "samples": evenly_spaced(len(sample), _SAMPLES) if len(sample) > 1 else [],
        "copies": [list(pair) for pair in found.copies],
        "apart": [[one.item, one.deviations] for one in found.apart],
    }
    looks = _looks(record, encoders, sample, source)
    inside, options = _inside(looks, source.modality)
    parts = ("maps.js", "drawing.js", *(("image_page.js",) if isinstance(looks, dict) else ()))
    folder = resources.files("glpretrain.run_report")
    gained = improvement(record)
    text = Template((folder / "page.html").read_text()).substitute(
        title=escaped(f"Report of {record.recipe} on {record.data}"),
        heading=escaped(f"What {record.method} learned from {record.data}"),
        lead=escaped(f"{len(source)} items, {record.steps} steps, {duration(record.seconds)}. {gained}{'.' if gained else ''}"),
        style=(resources.files("glpretrain.report") / "page.css").read_text() + (folder / "page.css").read_text(),
        cards=cards(record, results, classes=source.classes, num_items=len(source), num_shown=len(sample), num_lost=len(sample.unreadable)),
        verdicts=verdicts(results),
        scores=scores(record, results.get("left_out") or {}),
        curves=panels("Curves", [picture for _, picture in curves(rows_of([record])[0])]).replace("h2>", "h3>"),
        shown=escaped(_shown(sample)),
        method=escaped(f"Map: {places['after'].method}. Before training: {start}."),
        changed=escaped(_changed(found, sample)),
        inside=inside,
        guide=options,
        csv=escaped(table.name),
        copies=escaped(_copies_text(found, is_image)),
        apart=escaped(_apart_text(found)),
        unreadable=_unreadable(sample),
        commands=escaped("\n".join(commands)),
        version=glpretrain.__version__,
        data=as_json(data | looks if isinstance(looks, dict) else data),
        script=scripts(*parts) + "\n" + (folder / "map.js").read_text(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(table, as_csv(sample.names, found.apart, found.copies).encode())
    write_whole(out, text.encode("ascii"))
    return Written(out, table, len(sample), len(found.copies), len(found.apart))


def _moment(places: np.ndarray, found: Neighbours) -> Plain:
    """Places and neighbours at one moment, as 16-bit numbers."""
    low, high = places.min(axis=0), places.max(axis=0)
    filling = (places - low) / np.maximum(high - low, 1e-12)  # both axes fill the canvas, whatever its proportions
    cosines = ((found.cosine.clamp(-1, 1) + 1) * 32767).round()
    return {
        "places": base64_of(np.rint(filling * 65535).astype("<u2")),
        "neighbours": base64_of(found.index.numpy().astype("<u2")),
        "cosines": base64_of(cosines.numpy().astype("<u2")),
        "k": found.index.shape[1],
    }


def _looks(record: Record, encoders: Mapping[str, Encoder], sample: Sample, source: Source) -> Plain | str:
    """A few items to look into, in both backbones, each opening with its own threshold; or why there are none."""
    if not (made := modalities.get(source.modality).page_data):
        return f"Items of kind {source.modality} are looked into by the command `glpretrain inspect`."
    encoder = encoders["after"]
    try:
        rows, columns = encoder.grid(encoder.card.item_shape)
        chosen = evenly_spaced(len(sample), _INSIDE if rows * columns <= _MANY_PATCHES else _FEWER)
        shown: list[Named] = []
        for place in chosen:
            picture: Picture = source[sample.index[place]].values
            shown.append(Named(sample.names[place], picture))
        names = {f"{name} training": encoders[name] for name in _MOMENTS}
        found = {f"{name} training": calibrated_threshold(record.folder, when=name) for name in _MOMENTS}
        known = {name: value for name, value in found.items() if value is not None}
        return imported(made)(names, shown, size=None, threshold=known, layers="last")
    except ValueError as error:  # such as images of five channels: the rest of the report can be made
        return f"No pictures to look into: {error}."


def _inside(looks: Plain | str, modality: str) -> tuple[str, str]:
    """The section of pictures to look into, and how these are read, as HTML."""
    if isinstance(looks, str):
        return f'<p class="note">{escaped(looks)}</p>', ""
    options, guide = guide_of(f"{modality}_page")
    return Template((resources.files("glpretrain.run_report") / "inside.html").read_text()).substitute(options=options), guide


def _shown(sample: Sample) -> str:
    if len(sample) == sample.num_items:
        return f"all {sample.num_items}"
    lost = f", {len(sample.unreadable)} of them cannot be read" if sample.unreadable else ""
    if sample.num_asked == sample.num_items:
        return f"{len(sample)} of {sample.num_items}{lost}"
    return f"{sample.num_asked} of {sample.num_items}, evenly spaced{lost}"


def _changed(found: Findings, sample: Sample) -> str:
    """What training has done to neighbours, in words."""
    before, after = (found.neighbours[name] for name in _MOMENTS)
    k = after.index.shape[1]
    if k == 0:
        return "One item has no neighbours."
    kept = (after.index[:, :, None] == before.index[:, None, :]).any(dim=2).float().sum(dim=1).mean().item()
    text = f"Of the {k} nearest neighbours of an item, {kept:.1f} were among its {k} nearest before training, on average."
    shares = [agreement(found.neighbours[name], sample.labels) for name in _MOMENTS]
    if shares[0] is not None and shares[1] is not None:
        text += f" Of the neighbours, {shares[0]:.0f} % had the class of their item before training, and {shares[1]:.0f} % have it now."
    return text + " Below each picture stands its cosine."


def _copies_text(found: Findings, is_image: bool) -> str:
    if not is_image:
        return "Only pictures are compared."
    if not found.copies:
        return "None among the items of this page."
    return (
        f"{_count(len(found.copies), 'pair')} of neighbours whose grey values correlate by 0.95 or more. Copies are learned twice, and a"
        " copy in a test part makes its score too good."
    )


def _apart_text(found: Findings) -> str:
    if not found.apart:
        return "None: no item is much farther from its neighbours than the others are."
    return (
        f"{_count(len(found.apart), 'item')} far from all others: a broken file, another kind of picture, or the rare one that matters. sd:"
        " standard deviations from the median distance to neighbours."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _unreadable(sample: Sample) -> str:
    if not sample.unreadable:
        return ""
    lines = "".join(f"<li>{escaped(reason)}</li>" for reason in list(sample.unreadable.values())[:20])
    return f'<h3>Not readable</h3><ul class="note">{lines}</ul>'
