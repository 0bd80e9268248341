"""Runs that differ in nothing but their seed are one row; rows have means with intervals, and are compared over the seeds they share.

Reading runs (`reading`) and writing tables (`tables`) are left out.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy import stats

from glpretrain.compare.reading import SEED_SETTINGS, Record

NAMES = ("recipe", "method", "data", "seed", "steps")  # what rows can be made by, besides settings
_DEFAULT = ("recipe", "data")
_SHOWN = 3
_LEVEL = 0.95


class Summary(NamedTuple):
    """A score of a row."""

    count: int  # seeds
    before: float | None  # mean of what the runs started from
    mean: float
    std: float | None  # over seeds, n - 1 in the denominator; None of one seed, and so are the ends
    low: float | None  # ends of Student's 95 % interval of the mean
    high: float | None


class Pair(NamedTuple):
    """Two rows compared in one score over the seeds that both have, by Student's paired test."""

    score: str
    first: str
    second: str
    seeds: tuple[int, ...]
    difference: float  # mean of first minus second
    low: float | None  # ends of its 95 % interval; None where all differences are equal, and so are both p
    high: float | None
    p: float | None
    adjusted: float | None  # by Holm's method over all pairs of rows in this score


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seed.

    Args:
        key: what they were put together by, as name and value.
        records: one run per seed, by seed.
    """

    key: tuple[tuple[str, str], ...]
    records: tuple[Record, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the runs."""
        return tuple(record.seed for record in self.records)

    @property
    def seconds(self) -> float:
        """Median over the seeds."""
        return statistics.median(record.seconds for record in self.records)

    def values(self, score: str) -> dict[int, float]:
        """A score after training by seed; runs that do not have it are left out."""
        return {record.seed: record.after[score] for record in self.records if score in record.after}

    def summary(self, score: str) -> Summary | None:
        """A score over the seeds; None where no run has it."""
        values = list(self.values(score).values())
        if not values:
            return None
        before = [record.before[score] for record in self.records if score in record.before]
        count, mean = len(values), statistics.mean(values)
        started = statistics.mean(before) if len(before) == count else None
        if count == 1:
            return Summary(1, started, mean, None, None, None)
        std = statistics.stdev(values)
        half = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1)) * std / math.sqrt(count)
        return Summary(count, started, mean, std, mean - half, mean + half)


def rows_of(records: Sequence[Record], *, by: Sequence[str] = ()) -> tuple[list[Row], list[str]]:
    """Put runs together in rows, and say in lines which runs were left out because a newer one has the same row and seed.

    Args:
        records: runs, the oldest first.
        by: what makes a row: recipe, method, data, seed, steps, or names of settings as in config.yaml, such as `data.batch_size`
            (`init_args` may be left out). Empty: recipe and data, and each setting in which runs of one recipe on one source differ.

    Raises:
        ValueError: nothing has such a name, or a row would hold runs that differ in more than their seed.
    """
    names = tuple(by) or _DEFAULT
    grouped: dict[tuple[tuple[str, str], ...], list[Record]] = defaultdict(list)
    for record in records:
        grouped[tuple((name, _value(record, name)) for name in names)].append(record)
    for name in names:
        if name not in NAMES and all(_value(record, name) == "" for record in records):
            raise ValueError(f"by: no run has a setting {name!r}; accepted: {', '.join(NAMES)}, or one in config.yaml (data.batch_size)")
    rows: list[Row] = []
    replaced: list[Record] = []
    for key, members in grouped.items():
        differing = _differing(members)
        if differing and by:
            shown = "; ".join(f"{name} is {' and '.join(values)}" for name, values in list(differing.items())[:_SHOWN])
            more = f", and {len(differing) - _SHOWN} more settings differ" if len(differing) > _SHOWN else ""
            where = " and ".join(f"{name} {value}" for name, value in key)
            raise ValueError(f"by: runs with {where} differ in more than their seed: {shown}{more}; add what differs to --by")
        parts: dict[tuple[tuple[str, str], ...], dict[int, Record]] = defaultdict(dict)
        for record in members:
            full = (*key, *((name, _value(record, name)) for name in differing))
            if record.seed in parts[full]:
                replaced.append(parts[full][record.seed])
            parts[full][record.seed] = record  # the newest counts
        rows += [Row(full, tuple(by_seed[seed] for seed in sorted(by_seed))) for full, by_seed in parts.items()]
    older = ", ".join(str(record.folder) for record in replaced)
    return rows, [f"left out, a newer run has the same settings and seed: {older}"] if replaced else []


def labels(rows: Sequence[Row]) -> list[str]:
    """What tells rows apart: the values of their keys that are not the same in all, those of settings with their names."""
    shared = set[tuple[str, str]](rows[0].key).intersection(*(row.key for row in rows)) if len(rows) > 1 else set()
    parts = [[part for part in row.key if part not in shared] or row.key for row in rows]
    return [", ".join(value if name in NAMES[:3] else f"{name} {value}" for name, value in own) for own in parts]


def _short(name: str) -> str:
    return name.replace(".init_args", "")


def _all_values(record: Record) -> dict[str, str]:
    """Everything that rows can be made by."""
    own = {name: str(getattr(record, name)) for name in NAMES}
    return own | {_short(name): str(value) for name, value in record.settings.items()}


def _value(record: Record, name: str) -> str:
    return _all_values(record).get(_short(name), "")


def _differing(records: Sequence[Record]) -> dict[str, list[str]]:
    """What runs differ in besides their seeds, with the values. Where all have settings, these say it."""
    left_out = {*SEED_SETTINGS, "recipe", "seed"} | ({*NAMES} if all(record.settings for record in records) else set())
    found = [_all_values(record) for record in records]
    names = dict.fromkeys(name for values in found for name in values if name not in left_out)
    values = {name: list(dict.fromkeys(one.get(name, "not set") for one in found)) for name in names}
    return {name: several for name, several in values.items() if len(several) > 1}


def pairs(rows: Sequence[Row], score: str) -> list[Pair]:
    """Every two rows that were scored on the same items with two seeds or more in common, by Student's paired test.

    Runs of one seed share order, initial weights of equal encoders, and items, so their difference varies less than either. The test
    takes differences to be normal; with three seeds it can tell only what is large beside their spread.

    Args:
        rows: rows of a table.
        score: name of a score.

    Returns:
        Pairs whose first row has the greater mean; those of the best row come first.
    """
    found: list[Pair] = []
    means = {number: summary.mean for number, row in enumerate(rows) if (summary := row.summary(score)) is not None}
    ranked = [(labels(rows)[number], rows[number]) for number in sorted(means, key=lambda number: -means[number])]
    for number, (name, first) in enumerate(ranked):
        for other_name, second in ranked[number + 1 :]:
            ours, theirs = first.values(score), second.values(score)
            seeds = tuple(seed for seed in ours if seed in theirs)
            if len(seeds) < 2 or _scored_on(first, score) != _scored_on(second, score):
                continue
            left, right = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
            differences = [one - other for one, other in zip(left, right, strict=True)]
            mean = statistics.mean(differences)
            if statistics.pstdev(differences) <= 1e-9 * max(1.0, abs(mean)):  # the test divides by it
                found.append(Pair(score, name, other_name, seeds, mean, None, None, None, None))
                continue
            test = stats.ttest_rel(left, right)
            ends = test.confidence_interval(_LEVEL)
            found.append(Pair(score, name, other_name, seeds, mean, float(ends.low), float(ends.high), float(test.pvalue), None))
    return _adjusted(found)


def _scored_on(row: Row, score: str) -> set[str]:
    """The items that a score was measured on: those of the evaluator whose name it begins with, else the training data."""
    return {
        next((items for name, items in record.scored_on.items() if score == name or score.startswith(f"{name}_")), record.data)
        for record in row.records
    }


def _adjusted(found: list[Pair]) -> list[Pair]:
    """With Holm's p: the smallest of m is taken m times, the next one m - 1 times, and none is smaller than one before it."""
    tested = sorted((pair for pair in found if pair.p is not None), key=lambda pair: pair.p or 0.0)
    largest, adjusted = 0.0, {}
    for number, pair in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - number) * (pair.p or 0.0)))
        adjusted[pair.first, pair.second] = largest
    return [pair._replace(adjusted=adjusted.get((pair.first, pair.second))) for pair in found]
