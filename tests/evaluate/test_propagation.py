"""Label propagation: official code, loops and truth agree with it; J and F are those of DAVIS; noise scores chance."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_stubs import StubEncoder, half_width, noise
from golden import assert_matches, load, wave
from PIL import Image
from scipy.ndimage import binary_dilation
from skimage.morphology import disk
from torch import Tensor
from torch.nn import functional

from glpretrain.core.types import EncoderOutput
from glpretrain.data import Scenes, SceneVideos, Video, VideoFolder, VideoSource
from glpretrain.data.sources.images.videos import IGNORED, UNKNOWN
from glpretrain.encoders import ViT
from glpretrain.evaluate import FeatureCache, Features, LabelPropagation, Result, Sources
from glpretrain.evaluate.metrics.video_metrics import boundary, boundary_similarity, object_scores, region_similarity
from glpretrain.evaluate.patches.propagation import nearest, one_hot, propagate, scaled_size, segmentation

DATA = Path(__file__).parents[3] / "shared" / "data"
HEIGHT, WIDTH, PATCH, LENGTH = 24, 36, 4, 7


class TableVideos(VideoSource):
    """Videos from a list."""

    def __init__(self, videos: list[Video]) -> None:
        super().__init__()
        self.videos = videos

    @property
    def name(self) -> str:
        return "table"

    def __len__(self) -> int:
        return len(self.videos)

    def _decoded(self, index: int) -> Video:
        return self.videos[index]


def video(number: int, *, height: int = HEIGHT, width: int = WIDTH, length: int = LENGTH) -> Video:
    """A rectangle that moves right and another that moves left below it. Pixels hold the id, the video and the frame."""
    masks = torch.zeros(length, height, width, dtype=torch.int32)
    frames = torch.zeros(length, 3, height, width, dtype=torch.uint8)
    for time in range(length):
        masks[time, 2:10, 1 + 3 * time + number : 10 + 3 * time + number] = 1
        masks[time, 15 : 20 + number, width - 11 - 2 * time : width - 2 * time] = 2
        frames[time, 0], frames[time, 1], frames[time, 2] = masks[time], number, time
    return Video(f"v{number}", frames, masks)


def videos(count: int = 3, **size: int) -> TableVideos:
    return TableVideos([video(number, **size) for number in range(count)])


def truth(patch: int):
    def features(items: Tensor) -> EncoderOutput:
        """One-hot of the id under the centre of each patch."""
        ids = items[:, 0, patch // 2 :: patch, patch // 2 :: patch].flatten(1).long()
        patches = functional.one_hot(ids, 8).float()
        return EncoderOutput(patches.mean(dim=1), patches)

    return features


def chance(items: Tensor) -> EncoderOutput:
    """Noise, another one in every frame of every video."""
    key = (items[:, 1, 0, 0] * 256 + items[:, 2, 0, 0]).long()
    patches = noise(key, items.shape[2] * items.shape[3] // PATCH**2, 8, seed=5)
    return EncoderOutput(patches.mean(dim=1), patches)


def stub(features, patch: int = PATCH) -> StubEncoder:
    return StubEncoder(features, size=HEIGHT, patch=patch)


def scores(features, source: VideoSource | None = None, *, patch: int = PATCH, **options) -> dict[str, float]:
    return {name: score.value for name, score in run(features, source, patch=patch, **options).scores.items()}


def run(features, source: VideoSource | None = None, *, patch: int = PATCH, **options) -> Result:
    return LabelPropagation(**options).run(stub(features, patch), {"videos": source or videos()})


# Official code ---------------------------------------------------------------------------------------------------------------------


def test_labels_of_a_video_are_those_of_dino() -> None:
    reference = load("dino_propagation")
    features = [0.5 * wave(35, 11).double() + wave(35, 11, phase=0.3 * time).double() for time in range(6)]
    targets = [functional.normalize(rows, dim=-1).unflatten(0, (5, 7)) for rows in features]
    mask = torch.zeros(19, 27, dtype=torch.int32)
    mask[3:11, 4:15] = 1
    mask[8:17, 16:24] = 2
    labels = [one_hot(nearest(mask, (5, 7)), [1, 2]).double()]
    for time in range(1, 6):
        sources = [0, *range(max(1, time - 2), time)]
        given = torch.stack([targets[source] for source in sources]), torch.stack([labels[source] for source in sources])
        labels.append(propagate(targets[time], *given, num_neighbours=5, window=2, temp=0.1))
        assert_matches(labels[-1].permute(2, 0, 1).flatten(1), reference["soft"][time - 1], rtol=0, atol=1e-5)

    def by_time(items: Tensor) -> EncoderOutput:
        patches = torch.stack([features[int(time)] for time in items[:, 0, 0, 0]])
        return EncoderOutput(patches.mean(dim=1), patches)

    frames = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 19, 27)
    given = Video("wave", frames, torch.stack([mask] + [torch.full_like(mask, UNKNOWN)] * 5))
    evaluator = LabelPropagation(short_side=20, window=2, num_frames=2, features=Features(batch_size=4))
    for predicted, expected in zip(evaluator.propagated(stub(by_time), given), reference["segmentation"], strict=True):
        assert ["".join(map(str, row)) for row in predicted.tolist()] == expected


def blob(height: int, width: int, phase: float, level: float) -> Tensor:
    y, x = np.mgrid[:height, :width].astype(np.float64)
    return torch.from_numpy(np.sin(5 * y / height + phase) + np.cos(7 * x / width - phase) > level)


def test_j_and_f_are_those_of_davis() -> None:
    for case in load("davis_metrics")["cases"]:
        masks = blob(*case["size"], *case["prediction"]), blob(*case["size"], *case["truth"])
        void = blob(*case["size"], *case["void"])
        for known, ending in ((torch.ones_like(void), ""), (~void, "_void")):
            assert region_similarity(*masks, known=known) == pytest.approx(case[f"j{ending}"], abs=1e-12), case
            assert boundary_similarity(*masks, known=known) == pytest.approx(case[f"f{ending}"], abs=1e-12), case


def test_means_over_frames_are_those_of_davis() -> None:
    reference = load("davis_metrics")
    for name, size in reference["sequences"].items():
        both = []
        for offset in (0.1, 0.0):
            frames = []
            for time in range(6):
                ids = blob(*size, 0.2 * time + offset, 0.4).int()
                ids[blob(*size, 2 + 0.2 * time + offset, 0.9)] = 2
                frames.append(ids)
            both.append(torch.stack(frames))
        expected = [[reference["per_object"][measure][f"{name}_{number}"] for measure in "JF"] for number in (1, 2)]
        assert_matches(object_scores(*both), expected, rtol=0, atol=1e-12)


# Another implementation --------------------------------------------------------------------------------------------------------------


def propagated_by_loops(target: Tensor, sources: Tensor, labels: Tensor, *, num_neighbours: int, window: int | None, temp: float) -> Tensor:
    height, width, _ = target.shape
    result = torch.zeros(height, width, labels.shape[-1])
    for row in range(height):
        for column in range(width):
            found = []
            for frame in range(len(sources)):
                for y in range(height):
                    for x in range(width):
                        if window is None or (abs(y - row) <= window and abs(x - column) <= window):
                            found.append((float(target[row, column] @ sources[frame, y, x]), labels[frame, y, x]))
            found.sort(key=lambda pair: -pair[0])
            weights = [math.exp(cosine / temp) for cosine, _ in found[:num_neighbours]]
            for weight, (_, label) in zip(weights, found, strict=False):
                result[row, column] += weight / sum(weights) * label
    return result


@pytest.mark.parametrize(
    ("num_neighbours", "window", "temp"), [(5, 2, 0.1), (1, 1, 0.5), (3, None, 0.1), (500, 2, 1.0), (5, 12, 0.1), (2, 0, 0.1)]
)
def test_propagation_is_what_loops_compute(num_neighbours: int, window: int | None, temp: float) -> None:
    target = functional.normalize(wave(5, 7, 11), dim=-1)
    sources = functional.normalize(wave(3, 5, 7, 11, phase=0.4), dim=-1)
    labels = wave(3, 5, 7, 2).abs()
    options = {"num_neighbours": num_neighbours, "window": window, "temp": temp}
    expected = propagated_by_loops(target, sources, labels, **options)
    torch.testing.assert_close(propagate(target, sources, labels, **options), expected, rtol=1e-4, atol=1e-5)


def test_boundary_measure_agrees_with_dilation_by_a_disk() -> None:
    for height, width in ((41, 59), (180, 320)):
        first, second = blob(height, width, 0.4, 0.3), blob(height, width, 0.5, 0.2)
        radius = math.ceil(0.008 * math.hypot(height, width))
        edges = [boundary(mask.numpy()) for mask in (first, second)]
        grown = [binary_dilation(edge, disk(radius)) for edge in edges]
        precision, recall = (edges[0] & grown[1]).sum() / edges[0].sum(), (edges[1] & grown[0]).sum() / edges[1].sum()
        found = boundary_similarity(first, second, known=torch.ones_like(first))
        assert 0 < found == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-12)


# Truth and chance ----------------------------------------------------------------------------------------------------------------------


def test_truth_scores_100_where_a_patch_is_a_pixel() -> None:
    found = scores(truth(1), videos(1), patch=1)
    assert found["jf"] == found["j"] == found["f"] == found["grid_jf"] == 100
    assert found["still_jf"] < 50


def test_truth_scores_what_the_patch_grid_allows() -> None:
    rows = []
    for number in range(3):
        masks = video(number).masks
        for identity in (1, 2):
            frames = []
            for mask in masks[1:-1].numpy().astype(np.uint8):
                small = np.array(Image.fromarray(mask).resize((WIDTH // PATCH, HEIGHT // PATCH), 0))
                channels = [Image.fromarray((small == channel).astype(np.float32)) for channel in (0, 1, 2)]
                # PIL's bilinear enlargement is torch's without aligned corners.
                large = np.stack([np.array(channel.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)) for channel in channels])
                predicted = (large / large.max(axis=(1, 2), keepdims=True)).argmax(axis=0) == identity
                frames.append((predicted & (mask == identity)).sum() / (predicted | (mask == identity)).sum())
            rows.append(np.mean(frames))
    found = scores(truth(PATCH))
    assert found["j"] == pytest.approx(100 * np.mean(rows), abs=1e-9)
    assert found["jf"] == found["grid_jf"] < 100
    assert found["j"] > 45


def test_noise_scores_chance() -> None:
    """A segment of share q that knows nothing of an object of share p has an expected overlap of about pq / (p + q - pq)."""
    source = videos(5)
    evaluator = LabelPropagation(window=None)
    expected = []
    for given in source.videos:
        masks = list(evaluator.propagated(stub(chance), given))[:-1]
        for identity in (1, 2):
            shares = [
                ((mask == identity).double().mean(), (real == identity).double().mean())
                for mask, real in zip(masks, given.masks[1:-1], strict=True)
            ]
            expected.append(torch.stack([p * q / (p + q - p * q) for p, q in shares]).mean())
    found = evaluator.run(stub(chance), {"videos": source}).scores
    level = 100 * torch.stack(expected).mean().item()
    assert abs(found["j"].value - level) < half_width(found["j"])
    assert found["jf"].value < found["grid_jf"].value / 3


def test_patches_that_all_look_the_same_share_their_labels() -> None:
    """All tie with the last of the five neighbours, so that each patch takes the mean over all."""

    def constant(items: Tensor) -> EncoderOutput:
        patches = torch.ones(len(items), items.shape[2] * items.shape[3] // PATCH**2, 8)
        return EncoderOutput(patches[:, 0], patches)

    labels = one_hot(nearest(video(0).masks[0], (6, 9)), [1, 2])
    features = functional.normalize(torch.ones(6, 9, 8), dim=-1)
    found = propagate(features, features[None], labels[None], num_neighbours=5, window=None, temp=0.1)
    torch.testing.assert_close(found, labels.mean(dim=(0, 1)).expand_as(found))
    assert math.isfinite(scores(constant)["jf"])


# Properties ----------------------------------------------------------------------------------------------------------------------------


def test_a_channel_that_is_the_same_everywhere_wins_if_it_is_not_empty() -> None:
    labels = torch.zeros(3, 4, 3)
    assert (segmentation(labels, scaled=(6, 8)) == 0).all()
    labels[..., 1] = 0.2
    labels[..., 0] = torch.arange(12).reshape(3, 4) / 12
    assert (segmentation(labels, scaled=(6, 8)) == 1).all()


def test_labels_stay_shares_and_come_from_within_the_window() -> None:
    target, sources = functional.normalize(wave(6, 9, 5), dim=-1), functional.normalize(wave(2, 6, 9, 5, phase=1), dim=-1)
    labels = torch.zeros(2, 6, 9, 3)
    labels[..., 0] = 1
    labels[:, 0, 0] = torch.tensor([0.0, 0.0, 1.0])
    found = propagate(target, sources, labels, num_neighbours=50, window=2, temp=1.0)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(6, 9))
    assert (found[:3, :3, 2] > 0).all() and found[3:, :, 2].max() == 0 and found[:, 3:, 2].max() == 0


def test_sizes_follow_the_patch_and_keep_the_short_side() -> None:
    assert scaled_size((480, 854), short_side=480, patch=(8, 8)) == (480, 848)  # 832 in the official code: a multiple of 64
    assert scaled_size((854, 480), short_side=480, patch=(16, 16)) == (848, 480)
    assert scaled_size((180, 320), short_side=96, patch=(8, 8)) == (96, 168)
    assert scaled_size((180, 320), short_side=180, patch=(4, 5)) == (180, 320)
    assert scaled_size((64, 64), short_side=48, patch=(8, 8)) == (48, 48)


def test_counts_and_intervals_are_over_objects() -> None:
    found = run(truth(PATCH))
    assert found.chosen == {}
    assert found.scores["jf"].n == found.scores["still_jf"].n == 6 and found.scores["jf_v1"].n == 2
    assert found.scores["jf"].value == pytest.approx((found.scores["j"].value + found.scores["f"].value) / 2)
    assert found.scores["jf"].value == pytest.approx(sum(found.scores[f"jf_v{n}"].value for n in range(3)) / 3)
    rows = []
    for given in videos().videos:
        predicted = LabelPropagation().propagated(stub(truth(PATCH)), given)
        rows.append(object_scores(torch.stack([given.masks[0], *predicted]), given.masks)[:, 0])
    residuals = torch.stack(rows) - torch.cat(rows).mean()  # objects of one video are not independent: what varies is a video's sum
    error = math.sqrt(3 / 2 * residuals.sum(dim=1).square().sum().item()) / 6
    assert half_width(found.scores["j"]) == pytest.approx(100 * 1.959964 * error)
    assert half_width(found.scores["jf_v1"]) < math.inf
    single = run(truth(PATCH), TableVideos([video(0)._replace(masks=video(0).masks.clamp_max(1))]))
    assert single.scores["jf"].n == 1 and math.isinf(half_width(single.scores["jf"]))


def test_frames_without_a_mask_and_ignored_pixels_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    given = video(0)
    masks = given.masks.clone()
    masks[2] = UNKNOWN
    kept = [1, 3, 4, 5]
    still = given.masks[:1].expand_as(masks)
    single = [object_scores(still[[0, time, time]], given.masks[[0, time, time]]) for time in kept]
    torch.testing.assert_close(object_scores(still, masks), torch.stack(single).mean(dim=0))
    masks[1:] = masks[1:].masked_fill(masks[1:] != masks[0], IGNORED)
    assert object_scores(still, masks)[:, 0].tolist() == [1, 1]  # where truth and prediction differ does not count
    unscored = Video("blank", given.frames, torch.cat([given.masks[:1], torch.full_like(given.masks[1:], UNKNOWN)]))
    empty = Video("empty", given.frames, torch.zeros_like(given.masks))
    found = run(truth(PATCH), TableVideos([unscored, given, empty]))
    assert found.scores["jf"].n == 2 and "jf_blank" not in found.scores
    assert "'blank' has no object, or no mask" in caplog.text and "'empty'" in caplog.text
    with pytest.raises(ValueError, match="none has an object and a mask"):
        run(truth(PATCH), TableVideos([unscored, empty]))


def test_ids_may_have_gaps_and_later_objects_are_ground() -> None:
    given = video(0)
    wide = given.masks.where(given.masks != 2, 255)
    later = wide.clone()
    later[3:, :2] = 7
    first = scores(truth(PATCH), TableVideos([given]))
    assert scores(truth(PATCH), TableVideos([given._replace(masks=wide)])) == first
    assert scores(truth(PATCH), TableVideos([given._replace(masks=later)]))["jf"] == first["jf"]


def test_a_repeat_gives_equal_scores_and_features_are_computed_once() -> None:
    model = tiny()
    source, cache = SceneVideos(2, frames=5, size=(24, 36)), FeatureCache(model)
    evaluator, sources = LabelPropagation(features=Features(batch_size=2)), Sources({"videos": source})
    first = evaluator.run(model, sources, cache)
    assert cache.num_computed == 2 * 3
    assert evaluator.run(model, sources, cache) == first == evaluator.run(model, sources)
    assert cache.num_computed == 2 * 3
    LabelPropagation(short_side=32, features=Features(batch_size=2)).run(model, sources, cache)
    LabelPropagation(features=Features(batch_size=2, layer=0)).run(model, sources, cache)
    assert cache.num_computed == 3 * 2 * 3
    # Batches change the sums inside a matrix product by rounding alone.
    other = LabelPropagation(features=Features(batch_size=5)).run(model, sources)
    assert other.scores["jf"].value == pytest.approx(first.scores["jf"].value, abs=2)
    assert evaluator.protocol == {
        "short_side": None, "num_neighbours": 5, "window": 12, "num_frames": 7, "temp": 0.1,
        "features": {"size": None, "layer": -1, "tokens": "output", "crop": "short_side", "batch_size": 2, "bf16": False},
    }  # fmt: skip
    assert LabelPropagation().features.batch_size == 16
    assert sources.measured("videos").fingerprint() == source.fingerprint()


def tiny() -> ViT:
    made = ViT("vit_tiny_patch16_224", img_size=24, patch_size=4, embed_dim=12, depth=2, num_heads=3)
    for number, parameter in enumerate(made.parameters()):
        parameter.data = torch.sin(torch.arange(parameter.numel()) * 1.7 + number).reshape(parameter.shape) * 0.3
    return made.eval()


def test_pictures_show_up_to_four_videos_at_five_moments() -> None:
    figure = LabelPropagation().pictures(stub(truth(PATCH)), {"videos": videos(6)})["videos"]
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 4 * 5
    assert titles[:5] == ["v0, frame 0", "v0, frame 2", "v0, frame 3", "v0, frame 4", "v0, frame 6"]
    assert [title[:2] for title in titles[::5]] == ["v0", "v1", "v3", "v4"]
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (HEIGHT, WIDTH, 3) and (shown[4, 4] != shown[0, 0]).any()


def test_real_videos_are_scored_between_0_and_100() -> None:
    folder = DATA / "segmentation_davis2016val"
    if not folder.is_dir():
        pytest.skip("no shared/data beside the repository")
    source = VideoFolder(folder, sequences=["blackswan", "libby"], max_frames=5)
    found = LabelPropagation(short_side=48).run(tiny(), {"videos": source}).scores
    assert all(0 <= score.value <= 100 for score in found.values())
    assert found["jf"].n == 2 and found["jf_blackswan"].n == 1
    assert found["still_jf"].value > 50 and found["grid_jf"].value > 40


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="videos: Scenes; accepted: a source of videos"):
        LabelPropagation().check({"videos": Scenes(3, size=16)})
    for options, message in (
        ({"num_neighbours": 0}, "num_neighbours: 0"),
        ({"window": -1}, "window: -1"),
        ({"num_frames": -1}, "num_frames: -1"),
        ({"temp": 0.0}, "temp: 0.0"),
        ({"features": Features(size=32)}, r"features\.size: 32; this evaluator does not use it"),
    ):
        with pytest.raises(ValueError, match=message):
            LabelPropagation(**options)
    with pytest.raises(ValueError, match="accepted: multiples of 4"):
        run(truth(PATCH), short_side=26)
    grey = TableVideos([video(0)._replace(frames=video(0).frames[:, :1])])
    with pytest.raises(ValueError, match="'v0': 1 channels; the encoder accepts 3"):
        run(truth(PATCH), grey)

    def broken(items: Tensor) -> EncoderOutput:
        output = chance(items)
        return output._replace(patches=output.patches / 0)

    with pytest.raises(ValueError, match="features are not finite"):
        run(broken)
