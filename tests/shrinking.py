"""Recipes made so small that two steps take a second: what tests of recipes, of the command line and of callbacks share."""

from pathlib import Path

import torch
import yaml

import glpretrain.finetune
import glpretrain.masking
import glpretrain.methods
from glpretrain.cli.finetune import Tuning
from glpretrain.cli.parsing import argument_names
from glpretrain.cli.training import Training
from glpretrain.encoders import ViT
from glpretrain.weights import export

ROOT = Path(__file__).parents[1] / "recipes"
EVALUATIONS = sorted((ROOT / "eval").glob("*.yaml"))
FINE_TUNING = sorted((ROOT / "finetune").glob("*.yaml"))
# Arguments of a run that is only trained: nothing scored, drawn, logged or shown.
QUIET = ("--evaluate", "false", "--report", "false", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false")
RECIPES = sorted(set(ROOT.rglob("*.yaml")) - {*EVALUATIONS, *FINE_TUNING})


def method_of(path: Path) -> str:
    return yaml.safe_load(path.read_text())["model"]["class_path"].rpartition(".")[2]


# The contract of a method is checked on one quick recipe of each: the one that is named like the method, or else the first.
_QUICK = sorted((path for path in RECIPES if path.parent == ROOT), key=lambda path: path.stem == method_of(path).lower())
ONE_PER_METHOD = sorted({method_of(path): path for path in _QUICK}.values())
SMALL_WIDTHS = {
    "num_prototypes": 16,
    "hidden_dim": 16,
    "bottleneck_dim": 8,
    "projection_dim": 8,
    "predictor_dim": 16,
    "queue_size": 24,
    "memory_size": 24,
    "contrast_hidden_dim": 16,
    "contrast_dim": 8,
    "decoder_dim": 24,
    "decoder_depth": 1,
    "decoder_heads": 3,
    "expert_bottleneck_dim": 8,
    "num_relation_heads": 4,
    "rep_depth": 1,
    "rep_heads": 3,
}
SMALL_IF_GIVEN = {"num_patch_prototypes": 16, "patch_hidden_dim": 16, "patch_bottleneck_dim": 8}
# Of another width, patch size, input size and normalisation than the student; as many tokens.
TINY_EXPERT = {
    "class_path": "glpretrain.training.teacher.FrozenTeacher",
    "init_args": {
        "encoder": {
            "class_path": "glpretrain.encoders.ViT",
            "init_args": {
                "name": "vit_tiny_patch16_224",
                "img_size": 96,
                "patch_size": 16,
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "mean": [0.5, 0.4, 0.3],
                "std": [0.2, 0.3, 0.25],
            },
        },
    },
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def without_files(settings: object) -> object:
    """The settings with a tiny untrained expert wherever one would be read from a file."""
    if not isinstance(settings, dict):
        return settings
    if settings.get("class_path") == "glpretrain.weights.load_expert":
        return TINY_EXPERT
    return {name: without_files(value) for name, value in settings.items()}


def _shrink_images(encoder: dict, data: dict) -> None:
    patch = 8
    encoder |= {"patch_size": patch, "embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 6 * patch}
    if "align" in data.get("corruption", {}).get("init_args", {}):
        data["corruption"]["init_args"]["align"] = patch
    mask = vars(glpretrain.masking)[data["mask"]["class_path"].rpartition(".")[2]] if "mask" in data else object
    source = "LFWSubset" if issubclass(mask, glpretrain.masking.RegionMask) else "Scenes"  # the embedded one with region maps
    data["source"] = {"class_path": f"glpretrain.data.{source}", "init_args": {"length": 12, "size": 7 * patch}}
    for kind, side in (("global_views", 6), ("student_views", 6), ("local_views", 3)):
        for view in data["views"]["init_args"].get(kind) or []:
            view["size"] = side * patch
    if data["views"]["init_args"].get("clean_size"):
        data["views"]["init_args"]["clean_size"] = 12 * patch
    for number, sizes in enumerate(data["views"]["init_args"].get("other_sizes") or []):
        sizes |= {"global_size": 7 * patch, "local_size": (2 + number) * patch, "clean_size": 10 * patch}


def _shrink_points(encoder: dict, data: dict) -> None:
    encoder |= {"embed_dim": 24, "depth": 1, "num_heads": 3, "tokens_dim": 8, "num_points": 48, "points_per_token": 6, "group_size": 8}
    data["source"] = {"class_path": "glpretrain.data.Solids", "init_args": {"length": 12, "num_points": 64}}
    data["views"]["init_args"]["item_points"] = 64
    if "num_points" in data["views"]["init_args"]:
        data["views"]["init_args"]["num_points"] = 56
    for kind, points in (("global_views", 48), ("local_views", 24), ("coarse_views", 16)):
        for view in data["views"]["init_args"].get(kind) or []:
            view["points"] = points


def _shrink_sounds(encoder: dict, data: dict) -> None:
    encoder |= {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": [24, 16]}
    if data.get("corruption", {}).get("init_args", {}).get("align", 1) > 1:
        data["corruption"]["init_args"]["align"] = 4
    data["source"] = {"class_path": "glpretrain.data.Sounds", "init_args": {"length": 12, "frames": 40}}
    views = data["views"]["init_args"]
    views["num_bins"] = 16
    for kind, frames in (("global_views", 24), ("local_views", 8)):
        for view in views.get(kind) or []:
            view["frames"] = frames


_SHRINK = {"MultiCrop": _shrink_images, "PointCrops": _shrink_points, "SoundCrops": _shrink_sounds}


def _backbone(arguments: dict, folder: Path) -> Path:
    """An exported ViT with the same random weights in every process."""
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            export(ViT(**arguments), folder)
    return folder


def shrunk(path: Path, folder: Path) -> Path:
    """The recipe with a tiny encoder, few prototypes, small views and embedded data; everything else as it stands."""
    recipe = yaml.safe_load(path.read_text())
    recipe["model"] = without_files(recipe["model"])
    model, data = recipe["model"]["init_args"], recipe["data"]
    _SHRINK[data["views"]["class_path"].rpartition(".")[2]](model["encoder"]["init_args"], data)
    method = vars(glpretrain.methods)[recipe["model"]["class_path"].rpartition(".")[2]]
    model |= {name: value for name, value in SMALL_WIDTHS.items() if name in argument_names(method)}
    model |= {name: value for name, value in SMALL_IF_GIVEN.items() if model.get(name) is not None}
    data["batch_size"] = 4
    if isinstance(model.get("koleo_among"), int):  # one group, so that the order of the items does not matter
        model["koleo_among"] = 4
    for role in ("labelled", "labelled_test", "masked"):  # nobody has these files where the tests run
        data.pop(role, None)
    recipe["trainer"] |= {"max_steps": 2, "accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
    recipe["trainer"].pop("max_epochs", None)
    recipe["trainer"]["accumulate_grad_batches"] = min(recipe["trainer"].get("accumulate_grad_batches", 1), 2)
    if method.needs_backbone:  # which a command line would name
        model["encoder"]["init_args"]["depth"] = 2  # a teacher that leaves one block out
        recipe["init_from"] = str(_backbone(model["encoder"]["init_args"], folder / "init_from"))
    written = folder / path.name
    written.write_text(yaml.safe_dump(recipe))
    return written


def built(path: Path, folder: Path) -> Training:
    options = ["--trainer.logger", "false", "--evaluate", "false", "--report", "false", "--runs", str(folder / "runs")]
    return Training(["--config", str(path), *options, "--trainer.enable_progress_bar", "false"])


def tuned_kind(path: Path) -> str:
    """What a recipe of fine-tuning is for: images, points or audio."""
    return vars(glpretrain.finetune)[yaml.safe_load(path.read_text())["data"]["views"]["class_path"].rpartition(".")[2]].modality


def tuned(path: Path, backbone: Path, folder: Path) -> Tuning:
    """A recipe of fine-tuning on few small items, for two steps; everything else as it stands."""
    sources = {"image": ("Scenes", "size", 56), "points": ("Solids", "num_points", 64), "audio": ("Sounds", "frames", 56)}
    name, argument, size = sources[tuned_kind(path)]
    small = {
        "data.source": f'{{"class_path": "glpretrain.data.{name}", "init_args": {{"length": 12, "{argument}": {size}}}}}',
        "data.batch_size": 4,
        "data.num_workers": 0,
        "data.views.init_args.size": "null",
        **{"trainer.max_steps": 2, "trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.num_nodes": 1},
        **{"trainer.strategy": "auto", "trainer.precision": "32-true", "trainer.limit_val_batches": 1},
        **{"trainer.logger": "false", "trainer.enable_progress_bar": "false", "runs": folder / "runs", "probe": "false"},
    }
    if "positive:" in path.read_text():
        small["data.source"] = '{"class_path": "glpretrain.data.FaceSwaps", "init_args": {"size": 56, "frames": 2}}'
        small["model.init_args.positive"] = "fake"
    if "{by: folder}" in path.read_text():  # embedded faces lie in no folders
        small["data.order.init_args.by"] = "class"
    if "parts" in path.stem:
        small |= {"model.init_args.num_categories": 15, "model.init_args.layers": "[0, 1]", "model.init_args.hidden_dim": 16}
    overrides = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    return Tuning(["--config", str(path), "--backbone", str(backbone), *overrides])
