"""Who may import whom. The table is the one of the design; a package or module that is not in it may not exist."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "glpretrain"
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "masking": {"core"},
    "modalities": {"core"},
    "encoders": {"core"},
    "training": {"core", "encoders"},
    "objectives": {"core", "training"},
    "methods": {"core", "training", "encoders", "objectives", "modalities"},
    "prepare.workers": set(),
    "prepare.slides": {"core", "prepare.workers"},
    "data": {"core", "masking", "modalities", "prepare.slides"},
    "prepare.faces": {"core", "data", "prepare.workers"},
    "evaluate": {"core", "modalities", "encoders", "data"},
    "use": {"core", "modalities", "encoders", "data", "evaluate"},
    "weights": {"core", "encoders", "training"},
    "finetune": {"core", "modalities", "encoders", "training", "methods", "data", "evaluate", "weights"},
    "report": {"core", "modalities", "encoders", "data"},
    "callbacks": {"core", "modalities", "objectives", "encoders", "training", "data", "evaluate"},
    "bench": {"core", "encoders", "training", "methods"},
    "runs": {"core", "encoders", "weights"},
    "compare": {"core", "runs"},
    "run_report": {"core", "modalities", "encoders", "data", "evaluate", "use", "report", "compare", "runs"},
    "cli": {
        *("core", "encoders", "modalities", "methods", "data", "prepare.slides", "prepare.faces"),
        *(
            "prepare.workers",
            "evaluate",
            "weights",
            "report",
            "callbacks",
            "runs",
            "training",
            "masking",
            "bench",
            "finetune",
            "use",
            "compare",
            "run_report",
        ),
    },
    "": {"cli", "runs", "weights"},  # glpretrain/__init__.py, lazily
}
HOMES: dict[str, tuple[str, ...]] = {
    "pytorch_lightning": ("methods/base.py", "data/module.py", "callbacks/", "cli/"),
    "lightning": (),  # the same library under its other name
    "lightning_fabric": (),
    "timm": ("encoders/", "finetune/"),  # architectures, and the augmentation of fine-tuning
    "kornia": ("data/views/",),
    "triton": ("training/prototype_kernels.py",),
    "wandb": ("callbacks/",),
    "jsonargparse": ("cli/",),
    "huggingface_hub": ("weights/",),
    "faiss": ("use/",),
    "pyarrow": ("use/",),
    "pydicom": ("data/sources/images/dicom_files.py",),
    "pillow_heif": ("data/sources/images/heif.py",),
    "soundfile": ("data/sources/audio/decoding.py",),
    "onnxruntime": ("weights/exports/",),
    "openslide": ("prepare/slides/",),
    "dask": ("prepare/workers/",),
    "distributed": ("prepare/workers/",),
    "dask_jobqueue": ("prepare/workers/",),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def layer(path: Path) -> str:
    """The room of a file. `prepare` is three: slides are cut without the rest of the package, faces are read with it, by workers."""
    return room(path.relative_to(PACKAGE).with_suffix("").parts)


def room(parts: tuple[str, ...]) -> str:
    if parts[0] == "__init__":
        return ""
    return ".".join(parts[:2]) if parts[0] == "prepare" and parts[1:2] != ("__init__",) else parts[0]


def short(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_the_package_was_found() -> None:
    assert {"core", "methods", "cli"} <= {layer(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=short)
def test_imports_point_down_the_table(path: Path) -> None:
    if layer(path) == "prepare":  # its docstring
        assert not imported(path)
        return
    assert layer(path) in ALLOWED, f"{layer(path)} is in no layer; add it to the table here and to ARCHITECTURE.md"
    own = {room(tuple(name.split(".")[1:])) for name in imported(path) if name.startswith("glpretrain.")}
    forbidden = own - ALLOWED[layer(path)] - {layer(path), "__version__"}
    assert not forbidden, f"{short(path)} imports {sorted(forbidden)}; {layer(path)} may import {sorted(ALLOWED[layer(path)])}"


@pytest.mark.parametrize("name", sorted(ALLOWED.keys() - {""}))
def test_the_table_permits_nothing_that_is_not_used(name: str) -> None:
    used: set[str] = set()
    for path in FILES:
        if layer(path) == name:
            used |= {room(tuple(dotted.split(".")[1:])) for dotted in imported(path) if dotted.startswith("glpretrain.")}
    assert not ALLOWED[name] - used, f"{name} imports no {sorted(ALLOWED[name] - used)}; strike them off the table"


@pytest.mark.parametrize("path", FILES, ids=short)
def test_frameworks_stay_at_home(path: Path) -> None:
    used = {name.split(".")[0] for name in imported(path)}
    for framework, homes in HOMES.items():
        assert framework not in used or short(path).startswith(homes), f"{short(path)} imports {framework}; its home: {homes or 'none'}"


@pytest.mark.parametrize("path", [path for path in FILES if layer(path) in ("methods", "objectives")], ids=short)
def test_siblings_import_only_their_base(path: Path) -> None:
    if path.name == "__init__.py":
        return
    package = f"glpretrain.{layer(path)}"
    siblings = {".".join(name.split(".")[:3]) for name in imported(path) if name == package or name.startswith(f"{package}.")}
    assert siblings - {package} <= {f"{package}.base"}


@pytest.mark.parametrize("path", FILES, ids=short)
def test_sources_are_ascii_and_short(path: Path) -> None:
    text = path.read_text()
    assert text.isascii(), f"{short(path)}: {[character for character in text if not character.isascii()][:5]}"
    assert len(text.splitlines()) <= 350


def test_no_module_is_called_utils() -> None:
    assert not [short(path) for path in FILES if path.stem in ("utils", "helpers", "misc")]
