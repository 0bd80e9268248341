"""Videos: the layouts of folders, what is refused, and scenes whose objects move."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glpretrain.data import SceneVideos, UnreadableItemError, VideoFolder
from glpretrain.data.sources.images.scenes import MAX_OBJECTS, NUM_DRAWS, Pose, render
from glpretrain.data.sources.images.videos import IGNORED, UNKNOWN

DATA = Path(__file__).parents[3] / "shared" / "data"
COUNT, HEIGHT, WIDTH = 5, 13, 17


def write_sequence(frames: Path, masks: Path, *, count: int = COUNT, unknown: tuple[int, ...] = (), value: int = 1) -> None:
    """Frames whose pixels are their number, and masks with one object in columns number to number + 3 and one in the last row."""
    frames.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 10 * number, dtype=np.uint8)).save(frames / f"{number:05d}.png")
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        mask[2:9, number : number + 4] = value
        mask[-1] = 2
        picture = Image.fromarray(mask)
        picture.putpalette(list(range(256)) * 3)
        if number not in unknown:
            picture.save(masks / f"{number:05d}.png")


@pytest.mark.parametrize(
    ("frames", "masks"),
    [("JPEGImages/{}", "Annotations/{}"), ("JPEGImages/480p/{}", "Annotations/480p/{}"), ("{}/frames", "{}/masks")],
)
def test_every_layout_gives_the_same(tmp_path: Path, frames: str, masks: str) -> None:
    for name in ("owl", "bee"):
        write_sequence(tmp_path / frames.format(name), tmp_path / masks.format(name), unknown=(2,))
    videos = VideoFolder(tmp_path)
    assert (len(videos), videos.name) == (2, tmp_path.name)
    assert [videos[0].name, videos[1].name] == ["bee", "owl"]
    video = videos[1]
    assert video.frames.shape == (COUNT, 3, HEIGHT, WIDTH) and video.frames.dtype == torch.uint8
    assert video.frames[:, 1, 0, 0].tolist() == [0, 10, 20, 30, 40]
    assert video.masks.shape == (COUNT, HEIGHT, WIDTH)
    assert (video.masks[2] == UNKNOWN).all()
    assert video.masks[3, 2].tolist() == [0] * 3 + [1] * 4 + [0] * (WIDTH - 7)
    with pytest.raises(IndexError):
        videos[2]


def test_sequences_and_frames_are_chosen(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cow"):
        write_sequence(tmp_path / "JPEGImages" / name, tmp_path / "Annotations" / name)
    assert len(VideoFolder(tmp_path)) == 3
    assert [video.name for video in (VideoFolder(tmp_path, sequences=["cow", "ant"])[n] for n in range(2))] == ["cow", "ant"]
    assert VideoFolder(tmp_path, max_frames=2)[0].frames.shape[0] == 2
    (tmp_path / "mine.txt").write_text("bee\n\n")
    assert VideoFolder(tmp_path, sequences="mine.txt")[0].name == "bee"
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("cow\nbee\n")
    assert [VideoFolder(tmp_path)[n].name for n in range(2)] == ["cow", "bee"]  # the official list, in its order
    with pytest.raises(ValueError, match=r"sequences has \['dog'\], but .* holds only \['ant', 'bee', 'cow'\]"):
        VideoFolder(tmp_path, sequences=["dog"])
    with pytest.raises(ValueError, match=r"sequences is 'theirs\.txt', but .*theirs\.txt is not a file"):
        VideoFolder(tmp_path, sequences="theirs.txt")
    with pytest.raises(ValueError, match="max_frames is 0"):
        VideoFolder(tmp_path, max_frames=0)


def test_grey_masks_of_0_and_255_have_one_object_unless_255_is_ignored(tmp_path: Path) -> None:
    write_sequence(tmp_path / "a" / "frames", tmp_path / "a" / "masks", value=255)
    assert VideoFolder(tmp_path)[0].masks.unique().tolist() == [0, 2, 255]
    assert VideoFolder(tmp_path, ignore=255)[0].masks.unique().tolist() == [IGNORED, 0, 2]
    assert VideoFolder(tmp_path, channels=1)[0].frames.shape == (COUNT, 1, HEIGHT, WIDTH)


def test_what_does_not_fit_together_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no sequence; accepted: JPEGImages/<sequence>/ beside"):
        VideoFolder(tmp_path)
    frames, masks = tmp_path / "a" / "frames", tmp_path / "a" / "masks"
    write_sequence(frames, masks)
    (masks / "00000.png").rename(masks / "x.png")
    with pytest.raises(ValueError, match="1 masks of 'a' have no frame"):
        VideoFolder(tmp_path)
    (masks / "x.png").unlink()
    with pytest.raises(ValueError, match=r"first frame of 'a'.* needs a PNG"):
        VideoFolder(tmp_path)
    Image.fromarray(np.zeros((HEIGHT, WIDTH + 1), dtype=np.uint8)).save(masks / "00000.png")
    with pytest.raises(UnreadableItemError, match=r"00000.png: shape \(13, 18\), but the image has \(13, 17\)"):
        VideoFolder(tmp_path)[0]
    write_sequence(tmp_path / "b" / "frames", tmp_path / "b" / "masks")
    (tmp_path / "b" / "masks" / "00001.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableItemError, match=r"00001\.png"):
        VideoFolder(tmp_path, sequences=["b"])[0]
    for path in (tmp_path / "b" / "frames").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no frame in"):
        VideoFolder(tmp_path, sequences=["b"])


def test_fingerprint_is_of_what_is_decoded(tmp_path: Path) -> None:
    write_sequence(tmp_path / "a" / "frames", tmp_path / "a" / "masks")
    first = VideoFolder(tmp_path).fingerprint()
    assert first == VideoFolder(tmp_path, sequences=["a"]).fingerprint()
    assert first != VideoFolder(tmp_path, max_frames=4).fingerprint()
    assert first != VideoFolder(tmp_path, ignore=2).fingerprint()
    mask = tmp_path / "a" / "masks" / "00003.png"
    mask.unlink()
    assert first != VideoFolder(tmp_path).fingerprint()


def test_real_videos() -> None:
    folder = DATA / "segmentation_davis2016val"
    if not folder.is_dir():
        pytest.skip("no shared/data beside the repository")
    videos = VideoFolder(folder, max_frames=3)
    assert len(videos) == 20 and videos.name == "segmentation_davis2016val"
    video = VideoFolder(folder, sequences=["dog"])[0]
    assert video.frames.shape == (25, 3, 180, 320) and video.masks.unique().tolist() == [0, 1]


def test_a_frame_of_a_moving_scene_depends_on_seed_split_and_indices_alone() -> None:
    short, long = SceneVideos(3, frames=4, size=32), SceneVideos(9, frames=6, size=32)
    assert torch.equal(short[2].frames, long[2].frames[:4]) and torch.equal(short[2].masks, long[2].masks[:4])
    assert short.fingerprint() == SceneVideos(3, frames=4, size=32).fingerprint() != SceneVideos(3, frames=4, size=32, seed=1).fingerprint()
    assert not torch.equal(short[2].frames, SceneVideos(3, frames=4, size=32, split="train")[2].frames)
    assert long[8].frames.shape == (6, 3, 32, 32) and long.name == "scene_videos"


def centres(masks: torch.Tensor) -> torch.Tensor:
    """Float[T 2] of Bool[T H W]."""
    return torch.stack([mask.nonzero().double().mean(dim=0) for mask in masks])


def test_objects_move_a_little_per_frame_and_far_in_all() -> None:
    source = SceneVideos(12, frames=16, size=(64, 96))
    far = []
    for index in range(len(source)):
        masks = source[index].masks
        largest = int(masks[0].flatten().bincount()[1:].argmax()) + 1
        path = centres(masks == largest)
        # At most 0.025 * pi of the way there is, itself below 64 and 96 px, makes 5 and 7.5 px; an occlusion moves a centre too.
        assert path.diff(dim=0).norm(dim=1).max() < 9
        far.append((path - path[0]).norm(dim=1).max().item())
    assert sum(far) / len(far) > 16
    assert {int(source[index].masks[0].max()) for index in range(12)} == {1, 2, 3}


def test_objects_move_and_the_background_does_not() -> None:
    video = SceneVideos(1, frames=2, size=64)[0]
    background = (video.masks == 0).all(dim=0)
    near_object = torch.nn.functional.max_pool2d((~background).float()[None], 3, stride=1, padding=1)[0] > 0  # the rim is smoothed
    background &= ~near_object
    assert torch.equal(video.frames[0][:, background], video.frames[1][:, background])
    assert not torch.equal(video.frames[0], video.frames[1])


def test_the_pose_as_drawn_changes_no_pixel_and_a_full_turn_nearly_none() -> None:
    for seed in range(5):
        draws = torch.sin(torch.arange((1 + MAX_OBJECTS) * NUM_DRAWS) * 1.7 + seed).abs().reshape(-1, NUM_DRAWS).tolist()
        pixels, ids, labels = render(draws, (37, 61), "test")
        posed = render(draws, (37, 61), "test", poses=[Pose(scale=1.0, turn=0.0)] * MAX_OBJECTS)
        assert np.array_equal(pixels, posed[0]) and np.array_equal(ids, posed[1]) and labels == posed[2]
        turned = render(draws, (37, 61), "test", poses=[Pose(turn=2 * np.pi)] * MAX_OBJECTS)
        assert (turned[1] != ids).mean() < 0.01
        assert np.abs(turned[0].astype(int) - pixels).mean() < 1
        half = render(draws, (37, 61), "test", poses=[Pose(scale=0.5)] * MAX_OBJECTS)
        assert (half[1] > 0).sum() < 0.5 * (ids > 0).sum()


def test_bad_settings_of_moving_scenes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="frames is 0"):
        SceneVideos(3, frames=0)
    with pytest.raises(ValueError, match="split is 'val'"):
        SceneVideos(3, split="val")
    with pytest.raises(ValueError, match="size is 8"):
        SceneVideos(3, size=8)
