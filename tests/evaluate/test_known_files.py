"""A second evaluation of files that are the same reads none of them, and one of files that are not is never served what was read before."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glpretrain.data import ImageFolder, ImageList, Scenes, TarShards
from glpretrain.data.sources.base import Source, Subset
from glpretrain.data.sources.images import folders, lists, shards
from glpretrain.encoders import ViT
from glpretrain.evaluate import KNN, ClusterSegmentation, DecodedItems, FeatureCache, Features, LinearSweep, Result, Sources, known_files
from glpretrain.evaluate.cache import shrink
from glpretrain.evaluate.known_files import record_files

BATCH = Features(batch_size=5)


@pytest.fixture
def model() -> ViT:
    made = ViT("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3).eval()
    for number, parameter in enumerate(made.parameters()):
        parameter.data = torch.sin(torch.arange(parameter.numel()) * 1.7 + number).reshape(parameter.shape) * 0.3
    return made


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of nine pictures, which count as written long ago."""
    for name in ("b", "c"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(9):
            write(tmp_path / "set" / name / f"{number}.png", number + 10 * (name == "c"))
    monkeypatch.setattr(known_files, "_SETTLED", -1e6)
    return tmp_path / "set"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every file that is decoded."""
    found: list[str] = []
    for module, name in ((folders, "decode"), (lists, "decode"), (shards, "decode_pil")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, plain=plain, **given: (found.append(str(args[0])), plain(*args, **given))[1])
    return found


def write(path: Path, number: int) -> None:
    """A picture of 9 x 8 pixels of noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def scored(model: ViT, source: Source, folder: Path) -> Result:
    """k-NN with what an earlier call has left in the folder, and what it was computed on."""
    sources = Sources({"train": source, "test": source})
    result = KNN(k=(3,), features=BATCH).run(model, sources, FeatureCache(model, folder=folder))
    plain = KNN(k=(3,), features=BATCH).run(model, {"train": source, "test": source})
    assert result == plain
    return result._replace(chosen={role: sources[role].fingerprint() for role in sources})


@pytest.mark.parametrize("kind", ["folder", "list", "subset", "shards"])
def test_what_was_read_before_is_not_read_again(kind: str, root: Path, model: ViT, decoded: list[str]) -> None:
    source: Source = ImageFolder(root)
    if kind == "list":
        (root / "list.txt").write_text("".join(f"{name}/{number}.png {name}\n" for name in "cb" for number in range(9)))
        source = ImageList(root / "list.txt")
    elif kind == "shards":
        shutil.make_archive(str(root / "shard"), "tar", root, "b")
        shutil.make_archive(str(root / "shard2"), "tar", root, "c")
        source = TarShards(root)
        source.classes, source._shards.labels = ["b", "c"], np.array([0] * 9 + [1] * 9)
    elif kind == "subset":
        source = Subset(source, indices=[16, 3, 9, 0, 1, 2, 11, 12])
    evaluator, sources = LinearSweep(num_blocks=(2,), num_steps=3, features=BATCH), {"train": source, "test": source}
    first = evaluator.run(model, sources, FeatureCache(model, folder=root.parent / "kept"))
    assert len(decoded) == len(source)  # the second role has them from the first
    decoded.clear()
    warm = Sources(sources)
    assert evaluator.run(model, warm, FeatureCache(model, folder=root.parent / "kept")) == first and not decoded
    expected = DecodedItems(source).fingerprint()
    decoded.clear()
    assert warm["test"].fingerprint() == expected and not decoded


def test_a_file_with_other_content_is_read(root: Path, model: ViT, decoded: list[str]) -> None:
    before = scored(model, ImageFolder(root), root.parent / "kept")
    size = (root / "b" / "4.png").stat().st_size
    times = (root / "b" / "4.png").stat().st_mtime_ns
    write(root / "b" / "4.png", 99)
    content = (root / "b" / "4.png").read_bytes()
    assert abs(len(content) - size) < 50
    os.utime(root / "b" / "4.png", ns=(times, times))  # its time is set back
    decoded.clear()
    after = KNN(k=(3,), features=BATCH)
    sources = Sources({"train": ImageFolder(root), "test": ImageFolder(root)})
    after.run(model, sources, FeatureCache(model, folder=root.parent / "kept"))
    assert {path[-7:] for path in decoded} == {f"b/{number}.png" for number in range(5)}  # those of its batch
    assert sources["train"].fingerprint() == DecodedItems(ImageFolder(root)).fingerprint() != before.chosen["train"]


def test_labels_and_channels_are_those_of_now(root: Path, model: ViT, decoded: list[str]) -> None:
    nine, folder = Features(batch_size=9), root.parent / "kept"  # the batches stay what they are
    nine.labelled(model, DecodedItems(ImageFolder(root)), FeatureCache(model, folder=folder))
    (root / "a").mkdir()
    for number in range(9):
        write(root / "a" / f"{number}.png", 50 + number)  # now b and c are the second and third class
    items = DecodedItems(ImageFolder(root))
    found = nine.labelled(model, items, FeatureCache(model, folder=folder))
    assert found.labels.tolist() == [0] * 9 + [1] * 9 + [2] * 9
    assert items.fingerprint() == DecodedItems(ImageFolder(root)).fingerprint()  # labels are part of it
    decoded.clear()
    again = nine.labelled(model, DecodedItems(ImageFolder(root)), FeatureCache(model, folder=folder))
    assert torch.equal(again.labels, found.labels) and torch.equal(again.cls, found.cls) and not decoded
    grey = DecodedItems(ImageFolder(root, channels=1))
    known = known_files.KnownFiles(root.parent / "kept" / "files")
    known.recall(grey.source, grey.known)
    assert len(grey.known.unseen(grey.indices)) == len(grey)


def test_a_file_that_was_written_a_moment_ago_is_read_again(
    root: Path, model: ViT, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_files, "_SETTLED", 4.0)
    scored(model, ImageFolder(root), root.parent / "kept")
    assert not record_files(root.parent / "kept" / "files")


def test_pixels_are_read_where_somebody_looks(root: Path, model: ViT, decoded: list[str]) -> None:
    items, folder = DecodedItems(ImageFolder(root)), root.parent / "kept"
    expected = torch.cat([batch.items for batch in DecodedItems(ImageFolder(root)).batches((3, 8, 8), resize="crop", batch_size=5)])
    BATCH.labelled(model, items, FeatureCache(model, folder=folder))
    decoded.clear()
    warm = list(
        BATCH.encode(model, DecodedItems(ImageFolder(root)), resize="crop", patches="none", cache=FeatureCache(model, folder=folder))
    )
    assert not decoded
    assert torch.equal(torch.cat([batch.items for batch, _ in warm]), expected) and len(decoded) == len(items)
    assert torch.equal(warm[1][0].items, expected[5:10]) and len(decoded) == len(items)


def test_other_layers_and_backbones_read_what_they_need(root: Path, model: ViT, decoded: list[str]) -> None:
    folder = root.parent / "kept"
    BATCH.labelled(model, DecodedItems(ImageFolder(root)), FeatureCache(model, folder=folder))
    decoded.clear()
    other = Features(batch_size=5, layer=0)
    found = other.labelled(model, DecodedItems(ImageFolder(root)), FeatureCache(model, folder=folder))
    assert len(decoded) == 18 and torch.equal(found.cls, other.labelled(model, DecodedItems(ImageFolder(root))).cls)


def test_records_of_many_evaluations_are_joined_and_removed_like_features(
    root: Path, model: ViT, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_files, "_MOST_FILES", 3)
    folder, source = root.parent / "kept", ImageFolder(root)
    for number in range(18):
        BATCH.labelled(model, DecodedItems(Subset(source, indices=[number])), FeatureCache(model, folder=folder))
    assert len(record_files(folder / "files")) <= 4
    (folder / "files" / "99999999999999999999-0.npy").write_bytes(b"damaged")
    decoded.clear()
    items = DecodedItems(source)
    known_files.KnownFiles(folder / "files").recall(source, items.known)
    assert not items.known.unseen(items.indices) and not decoded
    shrink(folder, to=0)
    assert not (folder / "files").exists()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_read_what_this_process_reads(num_workers: int, root: Path, model: ViT) -> None:
    (root / "b" / "5.png").write_bytes(b"no picture")
    for source in (ImageFolder(root), Scenes(13, size=16)):
        options = {"resize": "stretch", "batch_size": 4}
        plain, others = (DecodedItems(source, num_workers=number) for number in (0, num_workers))
        for expected, found in zip(plain.batches((3, 8, 8), **options), others.batches((3, 8, 8), **options), strict=True):
            assert torch.equal(found.items, expected.items) and found.digests == expected.digests
            assert torch.equal(found.labels, expected.labels) and torch.equal(found.index, expected.index)
            if source.has_masks:
                assert torch.equal(found.instance_masks(), expected.instance_masks())
                assert torch.equal(found.class_masks(), expected.class_masks())
        assert plain.fingerprint() == others.fingerprint()
    with pytest.raises(ValueError, match=r"source 'set': item 0: .*3 channels; the encoder needs 4"):
        list(DecodedItems(ImageFolder(root), num_workers=num_workers).batches((4, 8, 8), resize="crop", batch_size=4))
    with pytest.raises(ValueError, match="num_workers: -1; accepted: 0 or more"):
        DecodedItems(ImageFolder(root), num_workers=-1)


def test_masks_are_read_for_evaluators_that_look_at_them(model: ViT) -> None:
    items, cache = DecodedItems(Scenes(9, size=16)), FeatureCache(model, memory_bytes=1 << 20)
    evaluator = ClusterSegmentation(num_starts=1)
    first = evaluator.run(model, {"masked": items}, cache)
    assert evaluator.run(model, {"masked": items}, cache) == first == evaluator.run(model, {"masked": Scenes(9, size=16)})
