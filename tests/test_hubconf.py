"""`torch.hub.load` on the repository, as on a machine where the package is not installed."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from glpretrain.encoders import Encoder, ViT
from glpretrain.weights import export

ROOT = Path(__file__).parents[1]
HUB: Callable[..., object] = partial(torch.hub.load, str(ROOT), source="local")


def load(entry: str, *arguments: object, **options: object) -> Encoder:
    encoder = HUB(entry, *arguments, **options)
    assert isinstance(encoder, Encoder)
    return encoder


def tiny() -> ViT:
    return ViT("vit_tiny_patch16_224", img_size=24, patch_size=8, embed_dim=48, depth=2, num_heads=3)


def test_hub_loads_an_exported_backbone(tmp_path: Path) -> None:
    encoder = tiny().eval()
    again = load("backbone", export(encoder, tmp_path / "out"))
    items = torch.sin(torch.arange(2 * 3 * 24 * 24) * 0.37).reshape(2, 3, 24, 24)
    assert not again.training
    assert torch.equal(again(items).patches, encoder(items).patches)


def test_hub_builds_a_fresh_encoder() -> None:
    encoder = load("encoder", "vit_tiny_patch16_224", img_size=24, patch_size=8, depth=1)
    assert not encoder.training
    assert encoder.card.item_shape == (3, 24, 24) and encoder.num_layers == 1


def test_hub_passes_errors_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load("backbone", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="ViT: name='resnet18' given"):
        load("encoder", "resnet18")


def test_hub_works_where_the_package_is_not_installed(tmp_path: Path) -> None:
    folder = export(tiny(), tmp_path / "out")
    code = (
        "import importlib.util, sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in str(finder)]\n"
        "import torch\n"
        "assert importlib.util.find_spec('glpretrain') is None\n"
        f"encoder = torch.hub.load({str(ROOT)!r}, 'backbone', {str(folder)!r}, source='local')\n"
        "assert encoder(torch.zeros(1, 3, 24, 24)).cls.shape == (1, 48)\n"
        f"assert sys.modules['glpretrain'].__file__.startswith({str(ROOT)!r})\n"
    )
    # Isolated: neither the working folder nor PYTHONPATH offers the package.
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=120, cwd=tmp_path)
