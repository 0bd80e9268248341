"""A picture of the first batch as the method sees it: look at it before you wait for a run.

Clouds of points are seen along an axis of theirs, nearer points brighter. Left out: pictures of features (`glpretrain.report`).
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from glpretrain.core.clouds import farthest_points, nearest_points, take
from glpretrain.core.types import Batch, EncoderCard
from glpretrain.encoders.base import Encoder

_DIMMED = 0.2  # what is left of a hidden pixel's brightness


class LogViews(pl.Callback):
    """Saves a grid of the first batch's views: one row per item; its global views, what is hidden of them, corrupted views,
    the student's own with a red line below the strongly augmented ones, and local views.

    Args:
        path: of the PNG.
        num_items: rows.
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
        grid_figure(columns(batch, pl_module.encoder, num_items=self.num_items)).savefig(self.path, dpi=130)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("views", [str(self.path)])


def columns(batch: Batch, encoder: Encoder, *, num_items: int) -> dict[str, Tensor]:
    """The pictures of a batch by title, each Float[B H W 3] in [0, 1] with B at most `num_items`."""
    if encoder.card.modality == "points":
        return _cloud_columns(batch, encoder, num_items=num_items)
    shown: dict[str, Tensor] = {}
    for g, view in enumerate(batch.global_views[:, :num_items]):
        picture = unnormalise(view, encoder.card)
        shown[f"global {g + 1}"] = picture
        if batch.mask is not None:
            hidden = batch.mask[g, :num_items]  # [B N]
            rows, columns = encoder.grid(view.shape[1:])
            cells = hidden.unflatten(1, (rows, columns)).repeat_interleave(picture.shape[1] // rows, 1)
            shown[f"hidden {g + 1}"] = _dim(picture, cells.repeat_interleave(picture.shape[2] // columns, 2))
        if batch.corrupted_views is not None:
            shown[f"replaced {g + 1}"] = _dim(picture, batch.corruption[g, :num_items])
            shown[f"corrupted {g + 1}"] = unnormalise(batch.corrupted_views[g, :num_items], encoder.card)
    if batch.student_views is not None:
        for number, view in enumerate(batch.student_views[:, :num_items]):
            shown[f"student {number + 1}"] = _underline(unnormalise(view, encoder.card), ~batch.weak[:num_items])
    if batch.local_views is not None:
        for number, view in enumerate(batch.local_views[:, :num_items]):
            shown[f"local {number + 1}"] = unnormalise(view, encoder.card)
    return shown


def _cloud_columns(batch: Batch, encoder: Encoder, *, num_items: int) -> dict[str, Tensor]:
    shown: dict[str, Tensor] = {}
    for g, view in enumerate(batch.global_views[:, :num_items]):
        shown[f"global {g + 1}"] = cloud_picture(view)
        if batch.mask is not None:
            (num_tokens,) = encoder.grid(view.shape[1:])
            centres = take(view, farthest_points(view, count=num_tokens))
            hidden = batch.mask[g, :num_items].gather(1, nearest_points(view, centres, count=1).squeeze(2))  # [B P]
            shown[f"hidden {g + 1}"] = cloud_picture(view, dimmed=hidden)
        if batch.corrupted_views is not None:
            shown[f"replaced {g + 1}"] = cloud_picture(view, dimmed=batch.corruption[g, :num_items])
            shown[f"corrupted {g + 1}"] = cloud_picture(batch.corrupted_views[g, :num_items])
    others = [("local", batch.local_views), *((f"{len(views[0, 0])} points", views) for views in batch.coarse_views or ())]
    for title, views in others:
        for number, view in enumerate(() if views is None else views[:, :num_items]):
            shown[f"{title} {number + 1}"] = cloud_picture(view)
    return shown


def cloud_picture(points: Tensor, *, dimmed: Tensor | None = None, size: int = 96, reach: float = 1.5) -> Tensor:
    """Clouds seen along their second axis, the third one up; black ground, nearer points brighter.

    Args:
        points: Float[B P 3].
        dimmed: Bool[B P], points that are drawn darker.
        size: of the picture in pixels.
        reach: coordinate at its edge.

    Returns:
        Float[B size size 3] in [0, 1].
    """
    points = points.float().cpu()
    shade = 0.4 + 0.6 * ((reach - points[..., 1]) / (2 * reach)).clamp(0, 1)  # [B P]
    if dimmed is not None:
        shade = torch.where(dimmed.cpu(), _DIMMED * shade, shade)
    column = ((points[..., 0] / reach + 1) / 2 * size).long().clamp(0, size - 1)
    row = ((1 - points[..., 2] / reach) / 2 * size).long().clamp(0, size - 1)
    picture = torch.zeros(len(points), size * size).scatter_reduce(1, row * size + column, shade, "amax")
    return picture.unflatten(1, (size, size)).unsqueeze(-1).expand(-1, -1, -1, 3)


def unnormalise(items: Tensor, card: EncoderCard) -> Tensor:
    """Float[B C H W] as the encoder gets it, to Float[B H W 3] in [0, 1]; of more than three channels the first three."""
    mean, std = (torch.tensor(values, device=items.device)[:, None, None] for values in (card.mean, card.std))
    picture = (items.float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).cpu()  # [B H W C]
    return picture[..., :3] if picture.shape[-1] >= 3 else picture[..., :1].expand(*picture.shape[:-1], 3)


def _dim(picture: Tensor, hidden: Tensor) -> Tensor:
    """Darken the pixels of Bool[B H W]."""
    return torch.where(hidden.cpu()[..., None], picture * _DIMMED, picture)


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
