"""What a report says of its run in words and numbers, as HTML: what was trained on what, and its scores with their intervals.

Pictures of the user's items are left out (`page`).
"""

from collections.abc import Iterable, Mapping, Sequence

from glpretrain.compare.page import escaped
from glpretrain.compare.reading import HEADLINES, Record, score_names

_ARROW = "\N{RIGHTWARDS ARROW}"
_NAMED = 6  # classes that are named
_WIDTH, _HEIGHT, _PAD = 320, 30, 8  # of the picture of a score, in pixels


def duration(seconds: float) -> str:
    """`41 s`, `9 min 12 s`, `5 h 3 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def card(title: str, facts: Mapping[str, object]) -> str:
    """A card of names and values; those that are empty are left out."""
    rows = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(str(value))}</dd>" for name, value in facts.items() if value not in (None, ""))
    return f'<div class="card"><h3>{escaped(title)}</h3><dl>{rows}</dl></div>'


def cards(record: Record, results: Mapping, *, classes: Sequence[str], num_items: int, num_shown: int, num_lost: int) -> str:
    """The cards of a run.

    Args:
        record: the run.
        results: its results.json.
        classes: names of the classes of its items.
        num_items: number of items that it was trained on.
        num_shown: number of those that are on the page.
        num_lost: number of those of the sample that cannot be read.
    """
    encoder, versions = results.get("encoder") or {}, results.get("versions") or {}
    arguments, machine = encoder.get("arguments") or {}, results.get("machine") or {}
    shape = "x".join(map(str, encoder.get("item_shape", [])))
    shown = f"all {num_items}" if num_shown + num_lost == num_items else f"{num_shown}, evenly spaced"
    rate = results.get("images_per_second")
    start = results.get("init_from")
    run = {
        "recipe": record.recipe,
        "method": record.method,
        "encoder": f"{arguments.get('name', encoder.get('encoder', ''))}, {shape}",
        "start": "random weights" if start is None else (start.get("name") or start.get("path") if isinstance(start, dict) else start),
        "seed": record.seed,
        "steps": f"{record.steps}, {results.get('images_seen', 0)} items seen" if results.get("images_seen") else record.steps,
        "refused steps": results.get("refused_steps") or None,
    }
    data = {
        "items": f"{num_items} of {record.data}",
        "classes": ", ".join(classes[:_NAMED]) + (f" and {len(classes) - _NAMED} more" if len(classes) > _NAMED else "") or "none",
        "on this page": shown,
        "not readable": num_lost or None,
        "scored on": ", ".join(dict.fromkeys(record.scored_on.values())),
    }
    took = {
        "training": duration(record.seconds) + (" in its last part" if record.went_on else ""),
        "scores": duration(results.get("evaluation_seconds") or 0.0),
        "speed": None if rate is None else f"{rate:.0f} items per second",
        "machine": machine.get("device"),
        "precision": results.get("precision"),
        "software": ", ".join(f"{name} {versions[name]}" for name in ("glpretrain", "torch", "timm") if name in versions),
        "commit": (results.get("commit") or "")[:12],
    }
    return card("Run", run) + card("Data", data) + card("Cost", took)


def verdicts(results: Mapping) -> str:
    """What the health of the run says, where it says anything."""
    found = (results.get("health") or {}).get("verdicts") or []
    said = [f"<li><b>{escaped(one['name'])}</b>, step {one['step']}: {escaped(one['text'])}</li>" for one in found]
    return f'<div class="warning"><h3>Health of the run</h3><ul>{"".join(said)}</ul></div>' if said else ""


def scores(record: Record, left_out: Mapping[str, str]) -> str:
    """The scores before and after training, with their intervals; headlines first, the others behind a click."""
    names = score_names([record])
    first = [name for name in names if name in HEADLINES] or names
    rows = [_row(record, name) for name in first]
    if not rows and not left_out:
        return '<p class="note">This run was not scored (--evaluate false).</p>'
    lost = "".join(f'<p class="note">left out: {escaped(name)}: {escaped(reason)}</p>' for name, reason in left_out.items())
    if not rows:
        return lost
    others = [name for name in names if name not in first]
    more = f"<details><summary>{len(others)} more scores</summary>{_table(_row(record, name) for name in others)}</details>"
    return _table(rows) + (more if others else "") + _measured(record) + lost


def _measured(record: Record) -> str:
    elsewhere = sorted({name for name in record.scored_on.values() if name != record.data})
    if not elsewhere:
        return ""
    what = " and ".join(elsewhere)
    text = (
        f"Measured on {what}, and not on your items: scores like these need classes or masks. They say how general the features are; the"
        " map and the neighbours below are about your own items."
    )
    return f'<p class="note">{escaped(text)}</p>'


def _table(rows: Iterable[str]) -> str:
    head = '<th>score</th><th class="number">before</th><th class="number">after</th><th class="plot">0 to 100 %</th><th>measured on</th>'
    return f'<div class="wide"><table class="scores"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(record: Record, name: str) -> str:
    ends = [_with_ends(scores, name) for scores in (record.before, record.after)]
    shown = "".join(f'<td class="number">{_text(end)}</td>' for end in ends)
    scored = next((items for owner, items in record.scored_on.items() if name == owner or name.startswith(f"{owner}_")), "")
    plot = _plot(*ends) if all(end is None or 0 <= end[0] <= 100 for end in ends) else ""
    return f'<tr><td>{escaped(HEADLINES.get(name, name))}</td>{shown}<td class="plot">{plot}</td><td>{escaped(scored)}</td></tr>'


def _with_ends(scores: Mapping[str, float], name: str) -> tuple[float, float, float] | None:
    if name not in scores:
        return None
    value = scores[name]
    return value, scores.get(f"{name}_low", value), scores.get(f"{name}_high", value)


def _text(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "-"
    value, low, high = found
    return f"{value:.1f}<small>[{low:.1f}, {high:.1f}]</small>"


def _plot(before: tuple[float, float, float] | None, after: tuple[float, float, float] | None) -> str:
    """Both values with their intervals on a line from 0 to 100: a ring before training, a dot after it."""

    def x(value: float) -> str:
        return f"{_PAD + (_WIDTH - 2 * _PAD) * value / 100:.1f}"

    parts = [f'<line class="axis" x1="{_PAD}" x2="{_WIDTH - _PAD}" y1="{_HEIGHT / 2}" y2="{_HEIGHT / 2}"/>']
    parts += [f'<line class="tick" x1="{x(at)}" x2="{x(at)}" y1="9" y2="{_HEIGHT - 9}"/>' for at in (0, 25, 50, 75, 100)]
    for kind, found in (("before", before), ("after", after)):
        if found is not None:
            value, low, high = found
            parts.append(f'<line class="{kind}" x1="{x(low)}" x2="{x(high)}" y1="{_HEIGHT / 2}" y2="{_HEIGHT / 2}"/>')
            parts.append(f'<circle class="{kind}" cx="{x(value)}" cy="{_HEIGHT / 2}" r="5"/>')
    said = " ".join("-" if found is None else f"{found[0]:.1f}" for found in (before, after))
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="xMinYMid"'
    return f'<svg {box} role="img" aria-label="before and after: {said}">{"".join(parts)}</svg>'


def improvement(record: Record, names: Sequence[str] = tuple(HEADLINES)) -> str:
    """The headline scores in one line: `k-NN 18.1 -> 45.6`."""
    both = [name for name in names if name in record.before and name in record.after]
    return ", ".join(f"{HEADLINES.get(name, name)} {record.before[name]:.1f} {_ARROW} {record.after[name]:.1f}" for name in both)
