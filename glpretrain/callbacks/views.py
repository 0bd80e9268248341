"""A picture of the first batch as the method sees it: look at it before you wait for a run.

How a view is drawn is said by its modality (`glpretrain.modalities`). Pictures of features are left out (`glpretrain.report`).
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from glpretrain import modalities
from glpretrain.callbacks.evaluators import Trained
from glpretrain.core.batch import Batch
from glpretrain.core.files import part_file
from glpretrain.encoders.base import Encoder


class LogViews(pl.Callback):
    """Saves a grid of the first batch's views: one row per item; its global views, what is hidden of them, corrupted views,
    the student's own with a red line below the strongly augmented ones, local and coarse views.

    Args:
        path: path of the PNG.
        num_items: number of rows.
    """

    def __init__(self, path: Path, *, num_items: int = 6) -> None:
        self.path = path
        self.num_items = num_items
        self._saved = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Save the picture of the first batch."""
        if self._saved or not trainer.is_global_zero:
            return
        self._saved = True
        assert isinstance(pl_module, Trained)
        with part_file(self.path) as part:
            grid_figure(columns(batch, pl_module.encoder, num_items=self.num_items)).savefig(part, dpi=130, format="png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("views", [str(self.path)])


def columns(batch: Batch, encoder: Encoder, *, num_items: int) -> dict[str, Tensor]:
    """The pictures of a batch by title, each Float[B h w 3] in [0, 1] with B at most `num_items`."""
    modality, card = modalities.get(encoder.card.modality), encoder.card
    shown: dict[str, Tensor] = {}
    for name, group in batch.views.items():
        for number, view in enumerate(group.items[:, :num_items]):
            picture = modality.pictures(view, card=card)
            title = f"{name} {number + 1}"
            shown[title] = picture if group.strong is None else _underline(picture, group.strong[:num_items])
            if group.mask is not None:
                hidden = modality.inputs_of_tokens(group.mask[number, :num_items], view, grid=encoder.grid(view.shape[1:]))
                shown[f"{title}, hidden"] = modality.pictures(view, card=card, dimmed=hidden)
            if group.corrupted is not None and group.corruption is not None:
                shown[f"{title}, replaced"] = modality.pictures(view, card=card, dimmed=group.corruption[number, :num_items])
                shown[f"{title}, corrupted"] = modality.pictures(group.corrupted[number, :num_items], card=card)
    return shown


def _underline(picture: Tensor, where: Tensor) -> Tensor:
    """A red line at the lower edge of the items Bool[B]."""
    marked = picture.clone()
    marked[where.cpu(), -max(1, picture.shape[1] // 24) :] = torch.tensor([1.0, 0.0, 0.0])
    return marked


def grid_figure(shown: dict[str, Tensor]) -> Figure:
    """Pictures, Float[B H W 3] by title, as a figure with one column per title."""
    num_rows = len(next(iter(shown.values())))
    figure = Figure(figsize=(1.15 * len(shown), 1.15 * num_rows + 0.3), layout="constrained")
    axes = figure.subplots(num_rows, len(shown), squeeze=False)
    for column, (title, pictures) in enumerate(shown.items()):
        axes[0, column].set_title(title, fontsize=8)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture.numpy(), interpolation="nearest")
    for axis in axes.flat:
        axis.set_axis_off()
    return figure
