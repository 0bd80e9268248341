"""Video object segmentation by label propagation: the first frame's mask is carried on from patch to patch by similarity alone.

The protocol is that of DINO (Caron et al., arXiv 2104.14294; github.com/facebookresearch/dino, eval_video_segmentation.py), measured
as DAVIS-2017 does for the semi-supervised task:

- a frame's short side is brought to `short_side` and the other to the nearest smaller multiple of the patch; the first mask is
  brought to the patch grid by nearest neighbour and one-hot;
- sources of frame t are the first frame, with its true labels, and the up to `num_frames` frames before t, with their soft ones;
- a patch takes the mean label of its `num_neighbours` most similar patches in all sources, weighted by exp(cosine / temp), among
  those at most `window` rows and columns away; those that tie with the last of them are taken too;
- soft labels are upsampled bilinearly, each channel is stretched to [0, 1], the largest wins, and nearest neighbour brings the
  result to the frame's own size;
- J and F are means over the frames but the first and the last, then over the objects of all videos.

Known differences: DINO floors the long side to a multiple of 64 pixels whatever the patch, resizes without antialiasing and
normalises with a standard deviation of 0.228 in the first channel; here the size follows the patch, resizing is antialiased and the
encoder's card normalises. Ids that the first frame does not show are no objects. Pixels to be ignored are ground when they are
propagated and do not count in J and F; without such pixels the numbers are those of the official evaluation.

Objects that appear later, recall and decay are left out on purpose.
"""

import hashlib
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional

from glpretrain.data.sources.base import UnreadableItemError
from glpretrain.data.sources.images.videos import Video
from glpretrain.encoders.base import Encoder
from glpretrain.encoders.states import bytes_of
from glpretrain.evaluate.base import Evaluator, Result, Score, require_positive
from glpretrain.evaluate.cache import FeatureCache
from glpretrain.evaluate.encoding import Encoding, device_of, encode_batch
from glpretrain.evaluate.features import Features
from glpretrain.evaluate.items import Sources
from glpretrain.evaluate.metrics.intervals import mean_score
from glpretrain.evaluate.metrics.roc import numbered
from glpretrain.evaluate.metrics.video_metrics import object_ids, object_scores, scored_frames
from glpretrain.evaluate.progress import tracked
from glpretrain.evaluate.rows import require_finite

_LOG = logging.getLogger(__name__)
_TILE = 4  # rows of patches that are matched at a time: bounds the memory, and few rows outside the window are compared
_MAX_PICTURED = 4
_MOMENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a video, that a picture shows


class _Frames(NamedTuple):
    """Frames of a video at the size for an encoder."""

    items: Tensor  # UInt8[T C H W]
    digests: Sequence[str]


class ObjectScore(NamedTuple):
    """J and F of one object, Float[2] each, for three predictions."""

    video: str
    propagated: Tensor
    still: Tensor  # of the first mask in every frame
    grid: Tensor  # of the truth, brought to the patch grid and back


@dataclass(frozen=True, kw_only=True)
class LabelPropagation(Evaluator):
    """How well the similarity of patches follows the objects of the first frame through the videos of `videos`.

    Scores in percent, means over objects: `jf`, the mean of `j` (region) and `f` (boundary); `jf_<video>`, the same for the objects
    of one video. Two levels to read them by, the same for all encoders with one grid: `still_jf`, when the first mask stays where it
    is, and `grid_jf`, when the truth of each frame goes through the patch grid.

    Args:
        short_side: short side of a frame in pixels, a multiple of the patch; None for that of the card's item shape.
        num_neighbours: number of patches whose labels are averaged.
        window: how many rows and columns a source may be away, in patches; None for no limit. The default is DINO's for 60 rows; on
            a coarse grid it is no limit, and objects are confused with what looks like them elsewhere.
        num_frames: number of sources beside the first frame.
        temp: temperature of the weights.
        features: how frames are encoded.
    """

    headlines = ("jf", "j", "f")
    scored = "videos"
    needs = ("videos",)
    modality = "image"
    unused = ("size", "crop")

    short_side: int | None = None
    num_neighbours: int = 5
    window: int | None = 12
    num_frames: int = 7
    temp: float = 0.1
    features: Features = field(default=Features(batch_size=16))

    def validate(self) -> None:
        require_positive("num_neighbours", self.num_neighbours)
        if self.num_frames < 0 or (self.window is not None and self.window < 0):
            raise ValueError(f"num_frames: {self.num_frames}, window: {self.window}; accepted: 0 or more")
        require_positive("temp", self.temp)

    def check_items(self, sources: Sources) -> None:
        sources.videos()

    def compute(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> Result:
        objects: list[ObjectScore] = []
        videos = sources.videos()
        for index in tracked(range(len(videos)), total=len(videos), description=f"propagating labels in {videos.name}"):
            try:
                video = videos[index]
            except UnreadableItemError as error:
                _LOG.warning("left out of the evaluation: %s", error)
                continue
            found = self._score_video(encoder, video, cache)
            if not found:
                _LOG.warning("not scored: video %r has no object, or no mask between its first and its last frame", video.name)
            objects += found
        if not objects:
            raise ValueError(f"videos {videos.name!r}: none has an object and a mask between its first and its last frame")
        region, contour = torch.stack([score.propagated for score in objects]).unbind(dim=1)  # [O] each
        films = numbered([score.video for score in objects], count=len(objects))  # objects of one video share its difficulties
        values = {"jf": (region + contour) / 2, "j": region, "f": contour}
        scores = {name: mean_score(of_objects, films) for name, of_objects in values.items()}
        scores["still_jf"] = _mean_jf([score.still for score in objects], films)
        scores["grid_jf"] = _mean_jf([score.grid for score in objects], films)
        for name in dict.fromkeys(score.video for score in objects):
            scores[f"jf_{name}"] = _mean_jf([score.propagated for score in objects if score.video == name])
        return Result(scores, {})

    def draw(self, encoder: Encoder, sources: Sources, cache: FeatureCache | None) -> dict[str, Figure]:
        """`videos`: up to four videos at five moments, the propagated masks in colour and the outlines of the true ones in white."""
        videos = sources.videos()
        count = min(len(videos), _MAX_PICTURED)
        rows = []
        for index in (number * len(videos) // count for number in range(count)):
            video = videos[index]
            rows.append((video, torch.stack([video.masks[0], *self.propagated(encoder, video, cache=cache)])))
        return {"videos": _figure(rows)}

    def _score_video(self, encoder: Encoder, video: Video, cache: FeatureCache | None) -> list[ObjectScore]:
        ids = object_ids(video.masks)
        if not ids or not scored_frames(video.masks):
            return []
        masks = video.masks
        propagated = torch.stack([masks[0], *self.propagated(encoder, video, cache=cache)])
        (_, *size), grid = self._sizes(encoder, video)
        through_grid = [_through_grid(mask, ids, grid=grid, scaled=size) for mask in masks]
        levels = (propagated, masks[:1].expand_as(masks), torch.stack(through_grid))
        return [ObjectScore(video.name, *rows) for rows in zip(*(object_scores(level, masks) for level in levels), strict=True)]

    def _sizes(self, encoder: Encoder, video: Video) -> tuple[tuple[int, int, int], tuple[int, int]]:
        """Channels, height and width that frames are brought to, and the patch grid.

        Raises:
            ValueError: the encoder is not for images of so many channels, or the short side does not divide into its patches.
        """
        channels, *own = encoder.card.item_shape
        if video.frames.shape[1] != channels:
            raise ValueError(f"video {video.name!r}: {video.frames.shape[1]} channels; the encoder accepts {channels}")
        short_side = min(own) if self.short_side is None else self.short_side
        size = scaled_size(video.frames.shape[2:], short_side=short_side, patch=encoder.card.patch_size)
        grid = encoder.grid((channels, *size))
        return (channels, *size), (grid[0], grid[1])

    def propagated(self, encoder: Encoder, video: Video, *, cache: FeatureCache | None = None) -> Iterator[Tensor]:
        """Masks Int[H W] of ids that are predicted for every frame but the first. Of the video's masks only the first is used."""
        ids = object_ids(video.masks)
        shape, grid = self._sizes(encoder, video)
        device = device_of(encoder)
        start = one_hot(nearest(video.masks[0], grid), ids).to(device)  # [h w C]
        lookup = torch.tensor([0, *ids], dtype=torch.int32)
        first: Tensor | None = None
        recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.num_frames)
        for patches in self._features(encoder, video, shape[1:], cache):
            target = functional.normalize(patches.to(device), dim=-1).unflatten(0, grid)  # [h w D]
            if first is None:
                first = target
                continue
            sources = [(first, start), *recent]
            labels = propagate(
                target,
                torch.stack([source for source, _ in sources]),
                torch.stack([label for _, label in sources]),
                num_neighbours=self.num_neighbours,
                window=self.window,
                temp=self.temp,
            )  # [h w C]
            recent.append((target, labels))
            yield lookup[nearest(segmentation(labels, scaled=shape[1:]), video.frames.shape[2:])]

    def _features(self, encoder: Encoder, video: Video, size: Sequence[int], cache: FeatureCache | None) -> Iterator[Tensor]:
        """Float[N D] of every frame."""
        for times in torch.arange(len(video.frames)).split(self.features.batch_size):
            frames = video.frames[times]
            images = frames
            if images.shape[2:] != tuple(size):
                images = functional.interpolate(images, size=tuple(size), mode="bilinear", antialias=True)
            digests = [hashlib.sha256(f"{tuple(frame.shape)}".encode() + bytes_of(frame)).hexdigest() for frame in frames]
            layer, bf16, tokens = self.features.layer, self.features.bf16, self.features.tokens
            encoding = Encoding(tuple(images.shape[1:]), "bilinear", self.features.batch_size, {layer: "all"}, bf16, tokens)
            outputs = encode_batch(encoder, _Frames(images, digests), encoding, cache=cache)
            patches = outputs[layer].patches  # [B N D]
            require_finite(patches, times, what=f"video {video.name!r}: the patch features")
            yield from patches


def _mean_jf(values: Sequence[Tensor], films: Tensor | None = None) -> Score:
    return mean_score(torch.stack(list(values)).mean(dim=1), films)


def scaled_size(size: Sequence[int], *, short_side: int, patch: Sequence[int]) -> tuple[int, int]:
    """Height and width with the short side at `short_side` and the other at the nearest smaller multiple of the patch, at least one."""
    short = 0 if size[0] <= size[1] else 1
    long = 1 - short
    patches = max(1, short_side * size[long] // size[short] // patch[long])
    scaled = [0, 0]
    scaled[short], scaled[long] = short_side, patches * patch[long]
    return scaled[0], scaled[1]


def nearest(ids: Tensor, size: Sequence[int]) -> Tensor:
    """Int[H W] to Int[*size] by PIL, as the official code does: libraries round positions between two pixels differently."""
    picture = Image.fromarray(ids.cpu().numpy().astype(np.int32))
    return torch.from_numpy(np.array(picture.resize((size[1], size[0]), Image.Resampling.NEAREST))).long()


def one_hot(labels: Tensor, ids: Sequence[int]) -> Tensor:
    """Float[h w C] of Int[h w]: one channel per id behind that of all else, the ground."""
    objects = labels[..., None] == torch.tensor(ids)  # [h w C-1]
    return torch.cat([~objects.any(dim=-1, keepdim=True), objects], dim=-1).float()


def propagate(target: Tensor, sources: Tensor, labels: Tensor, *, num_neighbours: int, window: int | None, temp: float) -> Tensor:
    """Float[h w C]: soft labels of one frame; each patch takes the weighted mean of those of its most similar sources.

    Rows sum to one where those of all labels do. The settings are those of `LabelPropagation`.

    Args:
        target: Float[h w D], patches of the frame, of unit length.
        sources: Float[M h w D], patches of the source frames, of unit length.
        labels: Float[M h w C], soft labels of these.
    """
    height, width, _ = target.shape
    reach = max(height, width) if window is None else window
    rows, columns = torch.arange(height, device=target.device), torch.arange(width, device=target.device)
    close = (columns[:, None] - columns).abs() <= reach  # [w w]
    tiles = []
    for top in range(0, height, _TILE):
        bottom = min(top + _TILE, height)
        near = slice(max(top - reach, 0), min(bottom + reach, height))
        cosine = torch.einsum("twd,mrcd->twmrc", target[top:bottom], sources[:, near])
        allowed = ((rows[top:bottom, None] - rows[near]).abs() <= reach)[:, None, None, :, None] & close[:, None, None, :]
        cosine = cosine.masked_fill_(~allowed, -math.inf).flatten(2)  # [t w S]
        best = cosine.topk(min(num_neighbours, cosine.shape[-1]), dim=-1).values  # [t w k]
        kept = (cosine >= best[..., -1:]).nonzero(as_tuple=True)  # few of many: exponentials of all would cost more than the cosines
        weights = torch.zeros_like(cosine)
        weights[kept] = ((cosine[kept] - best[..., 0][kept[:2]]) / temp).exp()
        tiles.append(weights @ labels[:, near].flatten(0, 2) / weights.sum(dim=-1, keepdim=True))  # [t w C]
    return torch.cat(tiles)


def segmentation(labels: Tensor, *, scaled: Sequence[int]) -> Tensor:
    """Int[H W] on the CPU: the channel of soft labels Float[h w C], not negative, that wins at each pixel; the lower on a tie."""
    maps = functional.interpolate(labels.permute(2, 0, 1)[None], size=tuple(scaled), mode="bilinear", align_corners=False)[0]  # [C H W]
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    # A channel that is the same everywhere wins everywhere, unless it is empty: in the official code it is 0 / 0, which is the maximum.
    flat = torch.where(high > 0, math.inf, 0.0)
    return torch.where(high > low, (maps - low) / (high - low), flat).max(dim=0).indices.cpu()  # ten times as fast as argmax


def _through_grid(mask: Tensor, ids: Sequence[int], *, grid: Sequence[int], scaled: Sequence[int]) -> Tensor:
    """Int[H W]: a mask of ids after it went through the patch grid."""
    return torch.tensor([0, *ids], dtype=torch.int32)[nearest(segmentation(one_hot(nearest(mask, grid), ids), scaled=scaled), mask.shape)]


def _figure(rows: Sequence[tuple[Video, Tensor]]) -> Figure:
    """Frames of videos with masks, Int[T H W] each."""
    shapes = [video.frames.shape for video, _ in rows]
    figure = Figure(figsize=(2.2 * len(_MOMENTS), sum(2.2 * shape[2] / shape[3] + 0.25 for shape in shapes)), layout="constrained")
    axes = figure.subplots(len(rows), len(_MOMENTS), squeeze=False)
    for (video, masks), line in zip(rows, axes, strict=True):
        ids = object_ids(video.masks)
        for moment, axis in zip(_MOMENTS, line, strict=True):
            time = round(moment * (len(masks) - 1))
            frame = video.frames[time]
            shown = frame if len(frame) == 3 else frame[:1].expand(3, -1, -1)
            axis.imshow(_overlaid(shown.permute(1, 2, 0).numpy(), masks[time], ids), interpolation="nearest")
            truth = video.masks[time]
            for identity in ids:
                if 0 < (truth == identity).sum() < truth.numel():
                    axis.contour((truth == identity).numpy(), levels=[0.5], colors="white", linewidths=0.9)
            axis.set_title(f"{video.name}, frame {time}", fontsize=8)
            axis.set_axis_off()
    return figure


_COLOURS = np.array([[213, 94, 0], [0, 114, 178], [0, 158, 115], [230, 159, 0], [204, 121, 167]])  # Okabe and Ito's


def _overlaid(frame: np.ndarray, mask: Tensor, ids: Sequence[int]) -> np.ndarray:
    shown = frame.astype(np.float64) / 255
    for number, identity in enumerate(ids):
        inside = (mask == identity).numpy()
        shown[inside] = 0.45 * shown[inside] + 0.55 * _COLOURS[number % len(_COLOURS)] / 255
    return shown
