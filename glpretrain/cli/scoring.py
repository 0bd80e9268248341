"""Scores of an exported backbone, as lines that can be collected in a file: on a run's own data the numbers that the run reported.

Left out: training and its numbers (`training`).
"""

from datetime import datetime
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser

from glpretrain.backbones import load_backbone
from glpretrain.data.module import DataModule
from glpretrain.evaluate import PromptSegmentation, default_evaluators
from glpretrain.runs import find_recipe

_DEFAULT_RECIPE = "mmc"


def evaluate(
    backbone: str | Path, *, recipe: str | None = None, data: str | Path | None = None, masks: str | Path | None = None
) -> list[dict[str, object]]:
    """Run the default evaluators on the sources that a run of the recipe is scored on.

    Args:
        backbone: exported folder.
        recipe: name or path; when left out the config.yaml of the run that the backbone lies in, else the quick start.
        data: class folders, divided into train/ and val/ or not; instead of the recipe's data.
        masks: images/ beside masks/; instead of the recipe's.

    Returns:
        One mapping per score: evaluator, score, value, measured_on, backbone, recipe, time, parameters, card.

    Raises:
        ValueError: a folder or recipe that is not what is accepted.
    """
    encoder = load_backbone(backbone)
    if torch.cuda.is_available():
        encoder.cuda()
    channels, *_ = encoder.card.item_shape
    of_run = Path(backbone).resolve().parent / "config.yaml"
    path = of_run if recipe is None and of_run.is_file() else find_recipe(recipe or _DEFAULT_RECIPE)
    module = _data_module(path, channels=channels, data=data, masks=masks)
    if data is not None and not module.source.classes:
        raise ValueError(f"evaluate: {data} has no classes; accepted: <class>/ folders, in train/ beside val/ (or test/) or undivided")
    labelled, masked = module.labelled_sources(), module.masked_source()
    common = {
        "backbone": str(backbone),
        "recipe": str(path),
        "time": datetime.now().isoformat(timespec="seconds"),
        "parameters": sum(tensor.numel() for tensor in encoder.backbone_state().values()),
        "card": encoder.card.to_json(),
    }
    lines: list[dict[str, object]] = []
    for name, evaluator in default_evaluators(labelled, masked).items():
        source = masked if isinstance(evaluator, PromptSegmentation) else labelled[1]
        for score, value in evaluator.run(encoder).items():
            lines.append({"evaluator": name, "score": score, "value": value, "measured_on": source.name, **common})
    return lines


def _data_module(recipe: Path, *, channels: int, data: str | Path | None, masks: str | Path | None) -> DataModule:
    """The recipe's data, with folders in place of its sources as `pretrain` puts them."""
    values = yaml.safe_load(recipe.read_text())["data"]
    if data is not None:
        source = {"class_path": "glpretrain.data.ImageFolder", "init_args": {"root": str(data), "channels": channels}}
        values |= {"source": source, "labelled": None, "labelled_test": None}
    if masks is not None:
        values["masked"] = {"class_path": "glpretrain.data.MaskedFolder", "init_args": {"root": str(masks), "channels": channels}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DataModule, "data")
    return parser.instantiate_classes(parser.parse_object({"data": values})).data
