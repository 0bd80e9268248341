"""Cards of encoders: what is written now, what was written before cards had a format, and what a newer version might write.

`export_of_format_1/` was written by `export` before cards had a format; the numbers are what its encoder computed then.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from golden import wave

from glpretrain import __version__
from glpretrain.core.types import EncoderCard
from glpretrain.encoders.states import fingerprint
from glpretrain.weights import export, load_backbone

OLD = Path(__file__).parent / "export_of_format_1"
CLS = [-0.51633549, 0.42633376, -0.94125581, -0.36642659, 0.69661802, -0.00411689, -0.03780136, -0.45788300]
FINGERPRINT = "d46082ce60acfc5cf26a24a3eb43556f49b7adf227636910dac7d50944d426e0"


def old_card() -> dict:
    return json.loads((OLD / "card.json").read_text())


def test_an_export_of_format_1_is_read_and_computes_what_it_did() -> None:
    encoder = load_backbone(OLD)
    with torch.no_grad():
        cls = encoder(wave(1, 1, 8, 8, phase=0.5)).cls[0]
    # Kernels of other machines sum in another order.
    torch.testing.assert_close(cls, torch.tensor(CLS), rtol=0.0, atol=1e-5)
    assert (encoder.card.licence, encoder.card.source) == ("CC-BY-4.0", "dino, 500 steps")
    assert encoder.card.item_shape == (1, 8, 8) and encoder.card.patch_size == (4, 4)


def test_the_format_of_a_card_changes_no_fingerprint(tmp_path: Path) -> None:
    encoder = load_backbone(OLD)
    assert fingerprint(encoder) == fingerprint(load_backbone(export(encoder, tmp_path / "out"))) == FINGERPRINT


def test_a_card_says_its_format_and_who_wrote_it(tmp_path: Path) -> None:
    encoder = load_backbone(OLD)
    written = json.loads((export(encoder, tmp_path / "out") / "card.json").read_text())
    assert (written.pop("format"), written.pop("written_by")) == (3, f"glpretrain {__version__}")
    assert written == old_card() | {"value_range": []}
    assert load_backbone(tmp_path / "out").card == encoder.card


@dataclass(frozen=True)
class CardWithAnotherField(EncoderCard):
    """What the next format might be."""

    format: ClassVar[int] = 4
    frame_rate: float = 25.0


def test_a_field_that_an_older_card_lacks_gets_its_default() -> None:
    for card in (old_card(), EncoderCard.from_json(old_card()).to_json()):
        read = CardWithAnotherField.from_json(card)
        assert isinstance(read, CardWithAnotherField) and read.frame_rate == 25.0 and read.embed_dim == 8


def test_a_card_of_a_newer_format_is_refused_with_the_version_that_reads_it(tmp_path: Path) -> None:
    folder = export(load_backbone(OLD), tmp_path / "out")
    newer = {**old_card(), "format": 4, "written_by": "glpretrain 7.5.0", "frame_rate": 24.0}
    (folder / "card.json").write_text(json.dumps(newer))
    with pytest.raises(ValueError, match=r"card\.json: encoder card: format=4 given, written by 'glpretrain 7\.5\.0'") as refusal:
        load_backbone(folder)
    message = str(refusal.value)
    assert message.endswith("reads formats 1 to 3; install the version that wrote the card or a newer one")
    assert "\n" not in message and f"glpretrain {__version__} reads" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "2"}, "format='2' given; accepted: 1 to 3"),
        ({"format": 0}, "format=0 given; accepted: 1 to 3"),
        ({"format": True}, "format=True given; accepted: 1 to 3"),
        ({"colour": 1}, r"unknown fields \['colour'\]; accepted: \['arguments',"),
        ({"format": 3, "colour": 1}, r"unknown fields \['colour'\]"),
        ({"arguments": 3}, "arguments=3 given; accepted: dict"),
        ({"item_shape": 3}, "item_shape=3 given; accepted: list"),
        ({"encoder": ["ViT"]}, r"encoder=\['ViT'\] given; accepted: str"),
    ],
)
def test_a_card_with_anything_else_in_it_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"encoder card: {message}"):
        EncoderCard.from_json({**old_card(), **change})


def test_a_card_that_lacks_a_field_is_refused() -> None:
    for name in ("arguments", "embed_dim"):
        with pytest.raises(ValueError, match=rf"encoder card: missing fields \['{name}'\]"):
            EncoderCard.from_json({field: value for field, value in old_card().items() if field != name})
    with pytest.raises(ValueError, match="a list given; accepted: a JSON object"):
        EncoderCard.from_json([])


NUMBERS: list[tuple[dict, str]] = [
    ({"mean": ["abc"]}, r"mean=\['abc'\] given; accepted: finite numbers"),
    ({"mean": [float("nan")]}, "mean=.* given; accepted: finite numbers"),
    ({"std": [0.0]}, "std=.* given; accepted: finite numbers above 0"),
    ({"std": [10**400]}, "std=.* given; accepted: finite numbers above 0"),
    ({"item_shape": [1, 8.5, 8]}, "item_shape=.* given; accepted: whole numbers"),
    ({"item_shape": []}, "item_shape=.* given; accepted: whole numbers"),
    ({"patch_size": [0, 4]}, "patch_size=.* given; accepted: whole numbers"),
    ({"embed_dim": True}, "embed_dim=.* given; accepted: whole numbers"),
]


@pytest.mark.parametrize(("change", "message"), NUMBERS)
def test_numbers_of_a_card_are_bounded(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"encoder card: {message}"):
        EncoderCard.from_json({**old_card(), **change})


ARGUMENTS: dict[str, list[object]] = {
    "depth": [20_000, 0, -1, 1.5, "2", True, [2], 10**400],
    "embed_dim": [10**9, "abc"],
    "num_heads": [10**6],
    "patch_size": [10**6, [4, 4]],
    "in_chans": [10**6],
    "img_size": [10**9, [8], [8, 8, 8], "abc", [8, 10**9], 8.5, [0, 8]],
    "mlp_ratio": [1e9, "4"],
    "norm_eps": [-1.0, 2.0, "abc"],
    "init_values": [-1.0, 1e9],
    "reg_tokens": [10**6, -1],
    "drop_path_rate": [1.0, "abc"],
    "mean": ["abc", ["a"], 0.5, [1e300]],
    "std": [[0.0], [-1.0]],
    "rope_periods": ["abc", [1.0]],
    "name": ["resnet18", 3, ["vit_tiny_patch16_224"]],
    "position_resize": [3, "nearest"],
    "drop_path_uniform": ["yes"],
    "no_embed_class": ["abc"],
    "licence": [3],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_a_card_are_bounded_before_anything_is_built(name: str, tmp_path: Path) -> None:
    folder, started = export(load_backbone(OLD), tmp_path / "out"), time.monotonic()
    for value in ARGUMENTS[name]:
        card = old_card()
        (folder / "card.json").write_text(json.dumps({**card, "arguments": {**card["arguments"], name: value}}))
        with pytest.raises(ValueError, match=r"^load_backbone: ") as refusal:
            load_backbone(folder)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000
    assert time.monotonic() - started < 30


def test_constants_that_json_does_not_know_are_refused(tmp_path: Path) -> None:
    folder = export(load_backbone(OLD), tmp_path / "out")
    text = (folder / "card.json").read_text()
    for constant in ("NaN", "Infinity"):
        (folder / "card.json").write_text(text.replace('"norm_eps": null', f'"norm_eps": {constant}'))
        with pytest.raises(ValueError, match=f"card.json is not JSON: {constant} is no number of JSON"):
            load_backbone(folder)
    (folder / "card.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"card\.json is not JSON"):
        load_backbone(folder)


def test_a_card_that_contradicts_its_arguments_is_refused(tmp_path: Path) -> None:
    folder = export(load_backbone(OLD), tmp_path / "out")
    for change in ({"mean": [0.1]}, {"embed_dim": 9}, {"patch_size": [2, 2]}, {"modality": "points"}, {"modality": "\n"}):
        (folder / "card.json").write_text(json.dumps({**old_card(), **change}))
        with pytest.raises(ValueError, match=f"the card says {next(iter(change))}=") as refusal:
            load_backbone(folder)
        assert "\n" not in str(refusal.value)
