"""Weights by a published name and by an address: a cache as huggingface_hub keeps it, a server on this machine, and no network."""

import hashlib
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from embed_parts import encoder

from glpretrain import load_backbone
from glpretrain.core.files import cache_folder
from glpretrain.encoders import build_from
from glpretrain.weights import export, export_as
from glpretrain.weights.places import PUBLISHED, located

NAME, COMMIT = "facebook/dino-vits16", "c0ffee" + 34 * "0"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub, and no network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def keep(hub: Path, name: str, folder: Path) -> Path:
    """Put a folder into the cache as the hub's newest snapshot; large files are named by their SHA-256."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()[: 64 if file.suffix == ".safetensors" else 40]
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def pixels() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)


def test_a_published_name_is_read_from_the_cache_with_its_licence_and_source(hub: Path, tmp_path: Path) -> None:
    export_as(encoder(), tmp_path / "layout", format="huggingface")
    keep(hub, NAME, tmp_path / "layout")
    loaded = load_backbone(NAME)
    assert torch.allclose(loaded(pixels()).cls, encoder()(pixels()).cls, atol=1e-5)  # zeros for what the layout does without
    assert loaded.card.licence == "Apache-2.0" and loaded.card.source == f"{NAME} at {COMMIT[:12]}"


def test_any_repository_is_read_by_its_name_and_keeps_its_own_card(hub: Path, tmp_path: Path) -> None:
    keep(hub, "someone/something", export(encoder(), tmp_path / "own", licence="CC0", source="a run"))
    loaded = load_backbone("hf:someone/something")
    assert torch.equal(loaded(pixels()).patches, encoder()(pixels()).patches)
    assert (loaded.card.licence, loaded.card.source) == ("CC0", "a run")


def test_a_file_of_the_hub_with_other_bytes_is_refused(hub: Path, tmp_path: Path) -> None:
    snapshot = keep(hub, NAME, export(encoder(), tmp_path / "own"))
    with (snapshot / "model.safetensors").resolve().open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"model.safetensors has SHA-256 [0-9a-f]{64}, the hub says [0-9a-f]{64}; remove .* and try again"):
        load_backbone(NAME)


def test_without_a_network_one_line_says_what_was_tried_and_what_to_do(hub: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_backbone(NAME)
    text = str(caught.value)
    assert f"{NAME} is not in {hub} and cannot be downloaded from https://huggingface.co" in text and "\n" not in text
    assert f"run `hf download {NAME} --local-dir FOLDER`, copy FOLDER here and give it" in text


def test_a_folder_here_comes_before_a_published_name(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export(encoder(), Path(NAME), source="mine")
    assert load_backbone(NAME).card.source == "mine"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("facebook/dinov2-smal", r"facebook/dinov2-smal does not exist; .* did you mean facebook/dinov2-small"),
        ("runs/latest/backbone", r"runs/latest/backbone does not exist; accepted: a folder or a checkpoint file, a published name"),
        ("https://example.com/weights.pth", r"accepted: https://\.\.\.#sha256=HEX, with the 64 digits that the publisher gives"),
        ("https://example.com/weights.pth#sha256=abc", "https://example.com/weights.pth#sha256=abc given; accepted"),
        ("hf:no/such/name", "hf:no/such/name given; accepted: hf:OWNER/NAME"),
    ],
)
def test_what_is_nowhere_is_named_with_what_is_accepted(hub: Path, given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(given)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server on this machine, and its folder."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


def test_an_address_is_downloaded_once_and_compared_with_its_checksum(served: tuple[str, Path]) -> None:
    address, folder = served
    file = folder / "vit weights.pth"
    torch.save(encoder().backbone_state(), file)
    good, url = hashlib.sha256(file.read_bytes()).hexdigest(), f"{address}/vit%20weights.pth"
    with pytest.raises(ValueError, match=f"has SHA-256 {good}, {64 * '0'} was given; nothing was kept"):
        load_backbone(f"{url}#sha256={64 * '0'}")
    assert not list(cache_folder("weights").rglob("*.*"))
    loaded = load_backbone(f"{url}#sha256={good}", num_heads=3, img_size=32)
    assert torch.equal(loaded(pixels()).cls, encoder()(pixels()).cls) and loaded.card.source == url
    file.unlink()
    assert load_backbone(f"{url}#sha256={good}", num_heads=3).card.source == url  # from this package's cache
    with pytest.raises(ValueError, match=r"cannot be downloaded \(File not found\); download it where there is a network, copy it here"):
        load_backbone(f"{url}#sha256={64 * '1'}")


def test_the_table_says_how_large_models_are_and_names_no_repository_twice() -> None:
    assert all(name.count("/") == 1 for name in PUBLISHED)
    for name, published in PUBLISHED.items():
        size = {"img_size": 518} if "dinov2" in published.architecture else {}
        with torch.device("meta"):
            made = build_from("ViT", {"name": published.architecture, **size})
        count = sum(tensor.numel() for tensor in made.backbone_state().values())
        assert published.millions == round(count / 1e6, 1), name
    assert located(Path(__file__)).path == Path(__file__)


def test_the_documents_show_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "use.md").read_text()
    table = text.partition("<!-- published -->")[2].partition("<!-- /published -->")[0]
    rows = [tuple(line.strip("| ").split(" | ")) for line in table.splitlines() if "/" in line]
    assert rows == [(name, str(published.millions), published.licence) for name, published in PUBLISHED.items()]
