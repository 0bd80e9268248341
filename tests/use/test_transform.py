"""`backbone.transform` makes of what a program holds what evaluations make of files, and `backbone.embed` gives the features of these."""

from pathlib import Path

import numpy as np
import pytest
import torch
from embed_parts import COUNT, encoder, picture, write_photos
from image_files import write_map
from PIL import Image

from glpretrain.data import ImageFolder, Solids
from glpretrain.encoders import PointTransformer, ViT
from glpretrain.evaluate.encoding import normalised
from glpretrain.evaluate.reading import read


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def fed(photos: Path, backbone: ViT) -> torch.Tensor:
    """Float[B C H W]: what an evaluator feeds to a backbone."""
    source = ImageFolder(photos)
    values = read(source, range(len(source)), backbone.card.item_shape, "crop").values
    assert values is not None
    return normalised(values, backbone)


def test_every_form_of_a_picture_gives_what_evaluators_feed(photos: Path) -> None:
    backbone = encoder()
    paths = list(ImageFolder(photos).paths)
    images = [Image.open(path) for path in paths]
    arrays = [np.asarray(image) for image in images]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    forms = (paths, images, arrays, tensors, [array / 255 for array in arrays], [tensor.float() / 255 for tensor in tensors])
    for form in forms:
        assert torch.equal(backbone.transform(form), fed(photos, backbone))
    assert torch.equal(backbone.transform(images[3]), fed(photos, backbone)[3:4])
    together = np.stack([picture(0), picture(1)])
    assert torch.equal(backbone.transform(together), backbone.transform([together[0], together[1]]))
    assert torch.equal(backbone.transform(torch.from_numpy(together).permute(0, 3, 1, 2)), backbone.transform(together))


def test_opacity_and_grey_are_converted_as_in_files(tmp_path: Path) -> None:
    backbone, colours = encoder(), picture(5)
    opacity = np.full((*colours.shape[:2], 1), 77, dtype=np.uint8)
    assert torch.equal(backbone.transform(np.concatenate([colours, opacity], axis=2)), backbone.transform(colours))
    path = write_map(tmp_path / "grey.png", colours[..., 0])
    for grey in (colours[..., 0], colours[..., :1], Image.fromarray(colours[..., 0]), torch.from_numpy(colours[..., 0].copy())):
        assert torch.equal(backbone.transform(grey), backbone.transform(path))
    single = ViT("vit_tiny_patch16_224", img_size=32, patch_size=8, in_chans=1, embed_dim=48, depth=1, num_heads=3)
    write_map(tmp_path / "colours.png", colours)
    assert torch.equal(single.transform(colours), single.transform(tmp_path / "colours.png"))


def test_a_turned_picture_is_turned_as_in_files(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(picture(2)).save(tmp_path / "turned.jpg", exif=tags, quality=100)
    with Image.open(tmp_path / "turned.jpg") as image:
        turned = encoder().transform(image)
    assert torch.equal(turned, encoder().transform(tmp_path / "turned.jpg"))
    assert not torch.equal(turned, encoder().transform(np.asarray(Image.open(tmp_path / "turned.jpg"))))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((3, 40, 52), dtype=np.uint8), r"52 channels in shape \(3, 40, 52\) given; the backbone takes 3; arrays are \(H W C\)"),
        (torch.full((3, 40, 52), -2.1), r"pixels from -2.1 to -2.1 given; accepted: 0 to 1, or uint8; they are normalised here"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "numbers of torch.int64 given; accepted: uint8, or floating-point numbers from 0 to 1"),
        (b"bytes", r"bytes given; accepted: path, PIL image, array \(H W C\), tensor \(C H W\), list of these"),
        ([], "an empty list given; accepted: at least one item"),
        ("missing.jpg", "missing.jpg: there is no such file"),
    ],
)
def test_what_is_no_picture_is_named_in_one_line(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder().transform(given)


def test_clouds_are_brought_to_the_size_of_the_backbone() -> None:
    backbone = PointTransformer("point_mae", num_points=64, embed_dim=48, depth=1, num_heads=3, group_size=8, points_per_token=8)
    values = Solids(3, num_points=128)[1].values
    batch = backbone.transform([values, values.numpy()])
    assert batch.shape == (2, 64, 3) and torch.equal(batch[0], batch[1]) and batch[0].norm(dim=1).max() <= 1.001


def test_embed_gives_the_features_of_a_folder_and_of_paths(photos: Path) -> None:
    backbone = encoder()
    output = backbone(fed(photos, backbone))
    expected = {"cls": output.cls, "mean": output.patches.mean(dim=1), "patches": output.patches}
    for what, features in expected.items():
        found = backbone.embed(photos, what=what, batch_size=5)
        assert torch.allclose(found.features, features, atol=5e-5)  # batches of other sizes sum in another order
        assert found.names == [f"{'ab'[number % 2]}/{number:02d}.png" for number in (*range(0, COUNT, 2), *range(1, COUNT, 2))]
    (photos / "a" / "00.png").write_bytes(b"damaged")
    paths = [photos / "b" / "01.png", photos / "a" / "00.png", photos / "b" / "03.png"]
    found = backbone.embed(paths)
    assert found.names == [str(paths[0]), str(paths[2])] and list(found.unreadable) == [str(paths[1])]
    with pytest.raises(ValueError, match="none of 1 items can be read"):
        backbone.embed(paths[1:2])
    with pytest.raises(ValueError, match="what: 'class' given; accepted: cls, mean, patches"):
        backbone.embed(paths, what="class")
