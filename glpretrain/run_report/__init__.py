"""The report that ends a run: its facts and curves, and a person's own items before and after training.

Looking into backbones (`glpretrain.report`) and comparing runs (`glpretrain.compare`) have rooms of their own, whose parts are used here.
"""

from glpretrain.run_report.page import Written, write_run_report
from glpretrain.run_report.sampling import MOST_ITEMS

__all__ = ["MOST_ITEMS", "Written", "write_run_report"]
