"""Look at what an encoder has learned: figures for notebooks, and one page to click in.

`glpretrain inspect` writes the page.
"""

from glpretrain.report.cloud_page import write_cloud_report
from glpretrain.report.figures import attention_figure, compare_figure, pca_figure, similarity_figure
from glpretrain.report.image_page import write_report
from glpretrain.report.maps import untrained
from glpretrain.report.sound_page import write_sound_report

__all__ = [
    "attention_figure",
    "compare_figure",
    "pca_figure",
    "similarity_figure",
    "untrained",
    "write_cloud_report",
    "write_report",
    "write_sound_report",
]
