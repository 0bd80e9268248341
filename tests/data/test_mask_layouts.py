"""Published data sets of images with masks, as small folders that lie like theirs, and what a folder says of its own masks."""

from pathlib import Path

import numpy as np
import pytest
from image_files import write_image, write_map
from PIL import Image

from glpretrain.data import ImageFolder, MaskedFolder, UnreadableItemError
from glpretrain.data.own import source_spec

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_palette(path: Path, values: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(np.array(values, dtype=np.uint8), mode="P")
    mask.putpalette([(7 * place) % 256 for place in range(768)])
    mask.save(path)


def write_voc(root: Path) -> Path:
    for number, part in enumerate(("train", "val", "unlisted")):
        write_image(root / "JPEGImages" / f"2007_{part}.jpg", 50 * number, size=(2, 3))
    for part in ("train", "val"):
        write_palette(root / "SegmentationClass" / f"2007_{part}.png", [[0, 15, 255], [20, 15, 15]])
        write_palette(root / "SegmentationObject" / f"2007_{part}.png", [[0, 1, 255], [2, 3, 1]])
        lists = root / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{part}.txt").write_text(f"2007_{part}\n")
    (root / "Annotations").mkdir()
    (root / "Annotations" / "2007_train.xml").write_text("<annotation/>")
    return root


def write_ade20k(root: Path) -> Path:
    for part in ("training", "validation"):
        write_image(root / "images" / part / f"ADE_{part}_1.jpg", size=(1, 4))
        write_map(root / "annotations" / part / f"ADE_{part}_1.png", np.array([[0, 1, 2, 150]]))
    rows = [f"{number}\t0.1\t1\t1\t0\tname {number}, other {number}" for number in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]))
    return root


def write_coco_stuff(root: Path, masks: str) -> Path:
    for part in ("train2017", "val2017"):
        write_image(root / "images" / part / "000000000009.jpg", size=(1, 4))
        write_map(root / masks / part / "000000000009.png", np.array([[0, 181, 255, 91]]))
    return root


def test_pascal_voc_gives_objects_and_classes_of_the_listed_images(tmp_path: Path) -> None:
    source = MaskedFolder(write_voc(tmp_path / "VOC2012"))
    assert [path.name for path in source.paths] == ["2007_val.jpg"] and source.name == "VOC2012/val"
    assert source[0].instances.tolist() == [[0, 1, -1], [2, 3, 1]]
    assert source[0].semantic.tolist() == [[0, 15, -1], [20, 15, 15]]
    assert source.mask_classes[0] == "background" and source.mask_classes[15] == "person" and source.mask_classes[20] == "tvmonitor"
    train = MaskedFolder(tmp_path / "VOC2012", split="train")
    assert [path.name for path in train.paths] == ["2007_train.jpg"] and train.fingerprint() != source.fingerprint()


def test_pascal_voc_without_masks_of_objects_has_a_class_for_an_object(tmp_path: Path) -> None:
    write_voc(tmp_path)
    for file in (tmp_path / "SegmentationObject").iterdir():
        file.unlink()
    (tmp_path / "SegmentationObject").rmdir()
    assert MaskedFolder(tmp_path)[0].instances.tolist() == [[0, 15, -1], [20, 15, 15]]


def test_ade20k_has_no_background_and_ignores_what_is_other(tmp_path: Path) -> None:
    source = MaskedFolder(write_ade20k(tmp_path / "ADEChallengeData2016"), split="train")
    assert source.name == "ADEChallengeData2016/train" and source.paths[0].name == "ADE_training_1.jpg"
    assert source[0].semantic.tolist() == [[-1, 0, 1, 149]]
    assert source[0].instances.tolist() == [[-1, 1, 2, 150]]
    assert len(source.mask_classes) == 150 and source.mask_classes[149] == "name 150"


@pytest.mark.parametrize("masks", ["annotations", "stuffthingmaps"])
def test_coco_stuff_counts_classes_from_zero(tmp_path: Path, masks: str) -> None:
    source = MaskedFolder(write_coco_stuff(tmp_path, masks))
    assert source[0].semantic.tolist() == [[0, 181, -1, 91]]
    assert source[0].instances.tolist() == [[1, 182, -1, 92]]
    named = [source.mask_classes[number] for number in (0, 79, 90, 91, 181)]
    assert named == ["person", "toaster", "hair brush", "banner", "wood"] and len(source.mask_classes) == 182


def test_what_a_published_data_set_lacks_is_named_in_one_line(tmp_path: Path) -> None:
    def refusal(root: Path, **settings: str) -> str:
        with pytest.raises(ValueError) as caught:
            MaskedFolder(root, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    voc, ade20k = write_voc(tmp_path / "VOC2012"), write_ade20k(tmp_path / "ADE")
    (voc / "SegmentationObject" / "2007_val.png").unlink()
    assert "val.txt names 1 images; 1 files are missing, the first" in refusal(voc)
    assert refusal(voc).endswith("SegmentationObject/2007_val.png")
    (voc / "ImageSets" / "Segmentation" / "val.txt").unlink()
    assert "VOC2012 has no ImageSets/Segmentation/val.txt; accepted: Pascal VOC: JPEGImages, SegmentationClass, " in refusal(voc)
    (ade20k / "objectInfo150.txt").unlink()
    assert "has no objectInfo150.txt, which names its classes" in refusal(ade20k)
    assert MaskedFolder(ade20k, mask_classes=[f"class {number}" for number in range(150)])[0].semantic.tolist() == [[-1, 0, 1, 149]]
    (ade20k / "annotations" / "validation").rename(ade20k / "elsewhere")
    assert "has no annotations/validation; accepted: ADE20K: images/{training,validation}, annotations/{" in refusal(ade20k)
    nothing = refusal(tmp_path)
    assert "images/ beside masks/" in nothing and all(name in nothing for name in ("Pascal VOC", "ADE20K", "COCO-Stuff"))
    write_image(tmp_path / "own" / "images" / "0.png")
    write_map(tmp_path / "own" / "masks" / "0.png", np.ones((20, 30)))
    assert "split='train', but" in refusal(tmp_path / "own", split="train")
    assert "split is 'test'; expected 'train' or 'val'" in refusal(tmp_path / "own", split="test")


def test_a_value_without_a_class_is_named(tmp_path: Path) -> None:
    write_ade20k(tmp_path)
    write_map(tmp_path / "annotations" / "validation" / "ADE_validation_1.png", np.array([[0, 151, 1, 2]]))
    with pytest.raises(UnreadableItemError, match=r"value 151; accepted: 1 to 150 \(mask_classes\), and ignore=0"):
        MaskedFolder(tmp_path)[0]


def test_the_masks_of_a_published_data_set_are_no_images_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds masks \(annotations/\); use MaskedFolder, or give .*images"):
        ImageFolder(write_ade20k(tmp_path))
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "captions.json").write_text("{}")
    write_image(tmp_path / "coco" / "images" / "train2017" / "0.jpg")
    assert len(ImageFolder(tmp_path / "coco")) == 1  # COCO without the masks of COCO-Stuff


def write_street(root: Path, classes: str) -> Path:
    for part in ("train", "val"):
        write_image(root / part / "images" / "0.png", size=(1, 3))
        write_map(root / part / "masks" / "0.png", np.array([[0, 1, 2]]))
    (root / "classes.csv").write_text(classes)
    return root


def test_a_folder_names_the_values_of_its_masks(tmp_path: Path) -> None:
    root = write_street(tmp_path / "street", "index,name\n0,Sky\n1,Road\n2,Unlabelled\n")
    for source in (MaskedFolder(root), MaskedFolder(root, split="train"), MaskedFolder(root / "val")):
        assert source.mask_classes == ("Sky", "Road")
        assert source[0].semantic.tolist() == [[0, 1, -1]] and source[0].instances.tolist() == [[1, 2, -1]]
    assert MaskedFolder(root).name == "street/val" and MaskedFolder(root, split="train").name == "street/train"
    given = MaskedFolder(root, mask_classes=["a", "b", "c"])
    assert given.mask_classes == ("a", "b", "c") and given[0].instances.tolist() == [[0, 1, 2]]
    (root / "classes.csv").write_text("index,name\n0,background\n1,Road\n2,Car\n")
    assert MaskedFolder(root)[0].instances.tolist() == [[0, 1, 2]]
    (root / "classes.csv").write_text("index,name\n0,void\n1,Road\n2,Car\n")
    assert MaskedFolder(root)[0].semantic.tolist() == [[-1, 0, 1]]
    (root / "classes.csv").write_text("index,name\n0,Sky\n2,Car\n")
    with pytest.raises(ValueError, match=r"classes.csv: classes \[0, 2\] and ignored values \[\]; accepted: numbers without gaps"):
        MaskedFolder(root)
    (root / "classes.csv").write_text("something else\n1\n")
    assert not MaskedFolder(root).mask_classes


def test_only_a_source_of_parts_is_given_one() -> None:
    assert source_spec("x", "glpretrain.data.MaskedFolder", split="train").init_args == {"root": "./x", "split": "train"}
    assert "split" not in source_spec("x", "glpretrain.data.VideoFolder", split="train").init_args


@pytest.mark.skipif(not (DATA / "segmentation_camvid").is_dir(), reason="the real data sets are not beside this repository")
def test_camvid_is_read_as_it_lies() -> None:
    source = MaskedFolder(DATA / "segmentation_camvid", split="train")
    assert len(source) == 367 and len(source.mask_classes) == 11 and source.mask_classes[10] == "Bicyclist"
    item = source[0]
    assert item.semantic.min() == -1 and item.instances.unique().tolist() == [-1, *(item.semantic.unique()[1:] + 1).tolist()]
