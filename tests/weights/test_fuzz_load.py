"""Damaged checkpoints, folders and cards: each is loaded or refused in one line, soon, and in little memory.

The files are small, the damage is drawn from a fixed seed. A sample runs with the fast tests, thousands with the slow ones.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fuzzing import counted, time_limit
from golden import noise
from published import multicrop
from safetensors.torch import save_file
from timm.models import save_for_hf

from glpretrain.encoders import PointTransformer, ViT
from glpretrain.encoders.timm_model import create_model
from glpretrain.weights import export, export_as, load_backbone

MEGABYTES = 400  # of growth over all files of a kind
ODD = (
    *(None, True, -1, 0, 1, 3, 20_000, 10**9, 10**400, 0.5, float("nan"), float("inf"), "", "abc", "\n"),
    *([], [1], ["a"], [[1]], {}, {"a": 1}),
)
Make = Callable[[Path], Path]


def encoder() -> ViT:
    vit = ViT("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3).eval()
    vit.load_backbone_state({name: noise(*tensor.shape, name=name) for name, tensor in vit.backbone_state().items()})
    return vit


def torch_zip(folder: Path) -> Path:
    torch.save(multicrop(encoder().backbone_state(), loss="dino_loss"), folder / "file.pth")
    return folder / "file.pth"


def legacy(folder: Path) -> Path:
    torch.save({"state_dict": encoder().backbone_state(), "epoch": 3}, folder / "file.pth", _use_new_zipfile_serialization=False)
    return folder / "file.pth"


def safetensors(folder: Path) -> Path:
    save_file(encoder().backbone_state(), folder / "file.safetensors")
    return folder / "file.safetensors"


def own_checkpoint(folder: Path) -> Path:
    vit = encoder()
    state = {f"student.encoder.{name}": tensor for name, tensor in vit.state_dict().items()}
    torch.save({"encoder_card": vit.card.to_json(), "state_dict": state, "method": "DINO", "global_step": 3}, folder / "file.ckpt")
    return folder / "file.ckpt"


def own_folder(folder: Path) -> Path:
    return export(encoder(), folder / "out")


def timm_folder(folder: Path) -> Path:
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "init_values": 1e-5, "reg_tokens": 2}
    model = create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    save_for_hf(model, str(folder / "out"), model_args=arguments, safe_serialization=False)
    return folder / "out"


def huggingface(folder: Path) -> Path:
    return export_as(encoder(), folder / "out", format="huggingface").folder


def card(folder: Path) -> Path:
    return export(encoder(), folder / "out")


def card_of_points(folder: Path) -> Path:
    sizes = {"num_points": 40, "points_per_token": 4, "group_size": 6, "embed_dim": 12, "depth": 1, "num_heads": 3, "tokens_dim": 4}
    return export(PointTransformer("point_mae", **sizes), folder / "out")


CARDS = ("card", "card_of_points")  # only the card is damaged
FORMATS: dict[str, Make] = {
    made.__name__: made
    for made in (torch_zip, legacy, safetensors, own_checkpoint, own_folder, timm_folder, huggingface, card, card_of_points)
}


def damaged_bytes(whole: bytes, draw: random.Random) -> bytes:
    """The bytes with some flipped, overwritten, cut off, taken out, put in or said twice."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 8))):
        # The structure and the names come first, a table of contents last.
        place = draw.choice((draw.randrange(len(data)), draw.randrange(min(3000, len(data))), max(0, len(data) - 1 - draw.randrange(1500))))
        kind, length = draw.randrange(6), draw.choice((1, 2, 8, 100))
        if kind == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[place : place + length] = draw.choice((b"\0", b"\xff", b"\x7f")) * length
        elif kind == 2:
            del data[place + 1 :]
        elif kind == 3 and len(data) > length + 1:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = draw.randbytes(length)
        else:
            data[place:place] = data[place : place + length]
        if len(data) < 2:
            return bytes(data) + b"\0\0"
    return bytes(data)


def damaged_json(values: object, draw: random.Random) -> object:
    """The values with one of them, at any depth, replaced, taken out or added to."""
    entries = list(values.items()) if isinstance(values, dict) else list(enumerate(values)) if isinstance(values, list) else []
    if not entries or draw.random() < 0.1:
        return draw.choice(ODD)
    if isinstance(values, dict):
        name, value = draw.choice(entries)
        if (kind := draw.randrange(8)) == 0:
            return {key: entry for key, entry in values.items() if key != name}
        if kind == 1:
            return {**values, draw.choice(("", "depth", "abc", "model_type")): draw.choice(ODD)}
        return {**values, name: damaged_json(value, draw)}
    assert isinstance(values, list)
    place = draw.randrange(len(values))
    return values[:place] + draw.choice(([damaged_json(values[place], draw)], [])) + values[place + 1 :]


@contextmanager
def damage(file: Path, draw: random.Random) -> Iterator[None]:
    """Damage a file, and mend it again."""
    whole = file.read_bytes()
    if file.suffix == ".json" and draw.random() < 0.8:
        file.write_text(json.dumps(damaged_json(json.loads(whole), draw)))
    else:
        file.write_bytes(damaged_bytes(whole, draw))
    try:
        yield
    finally:
        file.write_bytes(whole)


def outcome(path: Path) -> str:
    """What became of loading: "loaded", "refused", or what went wrong."""
    try:
        with time_limit(path.name):
            load_backbone(path, num_heads=None if path.is_dir() or path.suffix == ".ckpt" else 3)
        return "loaded"
    except ValueError as error:
        text = str(error)
        return "refused" if text.startswith("load_backbone: ") and "\n" not in text and len(text) < 5000 else f"said {text[:300]!r}"
    except BaseException as error:  # whatever it is, it is counted as a failure
        return f"{type(error).__name__}: {str(error)[:300]}"


def fuzz(kind: str, folder: Path, *, count: int) -> None:
    path, draw = FORMATS[kind](folder), random.Random(f"fuzz {kind}")
    files = [path] if path.is_file() else [path / "card.json"] if kind in CARDS else sorted(path.iterdir())
    assert outcome(path) == "loaded"
    failures = []
    with counted(f"load_backbone, {kind}", megabytes=MEGABYTES) as outcomes:
        for number in range(count):
            with damage(draw.choice(files), draw):
                if (result := outcome(path)) not in ("loaded", "refused"):
                    failures.append(f"file {number}: {result}")
                outcomes[result] += 1
    assert not failures, failures[:10]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_few_damaged_files_are_loaded_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    fuzz(kind, tmp_path, count=12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_many_damaged_files_are_loaded_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    fuzz(kind, tmp_path, count=5000 if kind in CARDS else 1500)
