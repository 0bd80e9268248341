"""Where weights lie that are not given as a file or folder: published names, in the cache of huggingface_hub, and addresses.

Nothing that is downloaded is trusted more than a file of one's own: it is read by the same readers, which run nothing. A file of the hub is
compared with the SHA-256 by which the hub names it, and one from an address with the SHA-256 that is given with it. Left out: reading
(`folders`, `published`).
"""

import difflib
import hashlib
import logging
import re
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from glpretrain.core.files import cache_folder, part_file

_LOG = logging.getLogger(__name__)
HUB = "hf:"  # before the name of any repository of the hub
_CONFIGURATIONS = ["config.json", "preprocessor_config.json", "card.json"]
_SAFE = [*_CONFIGURATIONS, "model*.safetensors", "model.safetensors.index.json"]
_PICKLED = [*_CONFIGURATIONS, "pytorch_model*.bin", "pytorch_model.bin.index.json"]  # where there is no safe one; read with weights_only
_AT_ONCE, _PATIENCE = 1 << 20, 30.0  # bytes, seconds
_APACHE, _DINOV3 = "Apache-2.0", "DINOv3 License"


class Published(NamedTuple):
    """Weights that others publish."""

    architecture: str  # name of the same ViT in timm
    millions: float  # parameters of the encoder at the size of its card
    licence: str
    is_gated: bool = False  # whether the publisher asks for an account and for the licence to be accepted


# Names of repositories at huggingface.co. Licences are those of the official code and weights; for MAE, what timm gives. Publishers name no
# checksums, but the hub keeps each large file under its SHA-256, with which `located` compares it.
PUBLISHED = {
    "facebook/dinov2-small": Published("vit_small_patch14_dinov2", 22.1, _APACHE),
    "facebook/dinov2-base": Published("vit_base_patch14_dinov2", 86.6, _APACHE),
    "facebook/dinov2-large": Published("vit_large_patch14_dinov2", 304.4, _APACHE),
    "facebook/dinov2-giant": Published("vit_giant_patch14_dinov2", 1136.5, _APACHE),
    "facebook/dinov2-with-registers-small": Published("vit_small_patch14_reg4_dinov2", 22.1, _APACHE),
    "facebook/dinov2-with-registers-base": Published("vit_base_patch14_reg4_dinov2", 86.6, _APACHE),
    "facebook/dinov2-with-registers-large": Published("vit_large_patch14_reg4_dinov2", 304.4, _APACHE),
    "facebook/dinov2-with-registers-giant": Published("vit_giant_patch14_reg4_dinov2", 1136.5, _APACHE),
    "facebook/dinov3-vits16-pretrain-lvd1689m": Published("vit_small_patch16_dinov3", 21.6, _DINOV3, is_gated=True),
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": Published("vit_small_plus_patch16_dinov3", 28.7, _DINOV3, is_gated=True),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": Published("vit_base_patch16_dinov3", 85.6, _DINOV3, is_gated=True),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": Published("vit_large_patch16_dinov3", 303.1, _DINOV3, is_gated=True),
    "facebook/dinov3-vitl16-pretrain-sat493m": Published("vit_large_patch16_dinov3", 303.1, _DINOV3, is_gated=True),
    "facebook/dino-vits16": Published("vit_small_patch16_224", 21.7, _APACHE),
    "facebook/dino-vits8": Published("vit_small_patch8_224", 21.7, _APACHE),
    "facebook/dino-vitb16": Published("vit_base_patch16_224", 85.8, _APACHE),
    "facebook/dino-vitb8": Published("vit_base_patch8_224", 85.8, _APACHE),
    "timm/vit_base_patch16_224.mae": Published("vit_base_patch16_224", 85.8, "CC-BY-NC-4.0"),
    "timm/vit_large_patch16_224.mae": Published("vit_large_patch16_224", 303.3, "CC-BY-NC-4.0"),
}


class Place(NamedTuple):
    """A file or folder with weights."""

    path: Path
    name: str  # what the user calls it
    source: str = ""  # where it comes from, for the card; empty where the user knows
    licence: str = ""


def located(x: str | Path) -> Place:
    """Where the weights are that a user asks for; they are downloaded where they are not here.

    Args:
        x: a file or folder; a name in `PUBLISHED`; `hf:OWNER/NAME` for any other repository of the hub; `https://...#sha256=HEX`.

    Raises:
        ValueError: nothing is there, it cannot be downloaded, or its bytes are not those that were published.
    """
    name = str(x)
    if re.match("https?:/", name):
        return _of_address(name)
    if (path := Path(x)).exists():
        return Place(path, name)
    if name in PUBLISHED or name.startswith(HUB):
        return _of_hub(name.removeprefix(HUB))
    near = difflib.get_close_matches(name, PUBLISHED, n=1)
    meant = f"; did you mean {near[0]}" if near else ""
    raise ValueError(
        f"load_backbone: {name} does not exist; accepted: a folder or a checkpoint file, a published name (such as facebook/dinov2-small),"
        f" {HUB}OWNER/NAME, or https://...#sha256=HEX{meant}"
    )


def _of_hub(repository: str) -> Place:
    """The newest snapshot in the cache of huggingface_hub, which asks for a newer one where there is a network."""
    folder = _snapshot(repository, _SAFE)
    if not any(folder.glob("model*.safetensors")):
        folder = _snapshot(repository, _PICKLED)
    for file in (path for pattern in (*_SAFE, *_PICKLED) for path in folder.glob(pattern)):
        published = file.resolve().name  # the cache keeps a file under the name that the hub gives it: of large ones, their SHA-256
        if file.is_symlink() and re.fullmatch("[0-9a-f]{64}", published) and (found := _digest(file)) != published:
            raise ValueError(f"load_backbone: {file} has SHA-256 {found}, the hub says {published}; remove {file.resolve()} and try again")
    licence = PUBLISHED[repository].licence if repository in PUBLISHED else ""
    return Place(folder, repository, f"{repository} at {folder.name[:12]}", licence)


def _snapshot(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except errors.HFValidationError as error:
        raise ValueError(f"load_backbone: {HUB}{repository} given; accepted: {HUB}OWNER/NAME") from error
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        what = "its licence has to be accepted" if isinstance(error, errors.GatedRepoError) else "there is none, or it is not public"
        address = f"{constants.ENDPOINT}/{repository}"
        raise ValueError(f"load_backbone: {address}: {what}; see that page, and give your account with `hf auth login`") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, RuntimeError) as error:
        reason = type(error.__cause__ or error).__name__
        raise ValueError(
            f"load_backbone: {repository} is not in {constants.HF_HUB_CACHE} and cannot be downloaded from {constants.ENDPOINT} ({reason});"
            f" where there is a network, run `hf download {repository} --local-dir FOLDER`, copy FOLDER here and give it"
        ) from error


def _of_address(address: str) -> Place:
    """A file that is downloaded once, into this package's own cache."""
    url, _, fragment = address.partition("#")
    given = re.fullmatch("sha256=([0-9a-f]{64})", fragment)
    parts = urlsplit(url)
    file = Path(unquote(parts.path)).name
    if given is None or not parts.hostname or not file:
        raise ValueError(f"load_backbone: {address} given; accepted: https://...#sha256=HEX, with the 64 digits that the publisher gives")
    path = cache_folder("weights") / given[1] / file
    if not path.is_file():
        try:
            _download(url, path, sha256=given[1])
        except (urllib.error.URLError, HTTPException, OSError) as error:
            reason = str(getattr(error, "reason", "") or error)
            advice = "download it where there is a network, copy it here and give its path"
            raise ValueError(f"load_backbone: {url} cannot be downloaded ({reason}); {advice}") from error
    return Place(path, url, url)


def _download(url: str, path: Path, *, sha256: str) -> None:
    _LOG.warning("downloading %s to %s", url, path)
    digest = hashlib.sha256()
    with part_file(path) as part, urllib.request.urlopen(url, timeout=_PATIENCE) as answer, part.open("wb") as file:
        while content := answer.read(_AT_ONCE):
            digest.update(content)
            file.write(content)
        if digest.hexdigest() != sha256:
            raise ValueError(f"load_backbone: {url} has SHA-256 {digest.hexdigest()}, {sha256} was given; nothing was kept")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
