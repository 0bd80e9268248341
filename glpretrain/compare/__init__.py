"""Runs side by side: rows of equal runs with different seeds, their means, tests over common seeds, tables, and a page."""

from glpretrain.compare.page import write_page
from glpretrain.compare.reading import HEADLINES, Record, headlines, read_record, records_below
from glpretrain.compare.rows import Pair, Row, Summary, labels, pairs, rows_of
from glpretrain.compare.tables import csv_table, markdown, pair_lines, spread, table

__all__ = [
    "HEADLINES",
    "Pair",
    "Record",
    "Row",
    "Summary",
    "csv_table",
    "headlines",
    "labels",
    "markdown",
    "pair_lines",
    "pairs",
    "read_record",
    "records_below",
    "rows_of",
    "spread",
    "table",
    "write_page",
]
