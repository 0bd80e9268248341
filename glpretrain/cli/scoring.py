"""Scores of an exported backbone, as lines that can be collected in a file.

Left out: training and its numbers (`training`).
"""

from datetime import datetime
from pathlib import Path

from glpretrain.backbones import load_backbone
from glpretrain.data import ImageFolder, MaskedFolder, Scenes
from glpretrain.evaluate import PromptSegmentation, default_evaluators

_NUM_SCENES = 2400


def evaluate(backbone: str | Path, *, data: str | Path | None = None, masks: str | Path | None = None) -> list[dict[str, object]]:
    """Run the default evaluators.

    Args:
        backbone: exported folder.
        data: class folders divided into train/ and val/; scenes when left out.
        masks: images/ beside masks/; scenes when left out.

    Returns:
        One mapping per score: evaluator, score, value, measured_on, backbone, card, parameters, time.

    Raises:
        ValueError: a folder that is not what is accepted.
    """
    encoder = load_backbone(backbone)
    channels, height, width = encoder.card.item_shape
    if channels != 3 and (data is None or masks is None):
        raise ValueError(f"evaluate: the backbone takes {channels} channels and scenes have 3; give both --data and --masks")
    scenes = Scenes(_NUM_SCENES, size=(height, width))
    labelled = scenes.division() if data is None else ImageFolder(data, channels=channels).division()
    if labelled is None:
        raise ValueError(f"evaluate: {data} is not divided; accepted: train/<class>/ beside val/<class>/ (or test/<class>/)")
    masked = scenes.division()[1] if masks is None else MaskedFolder(masks, channels=channels)
    common = {
        "backbone": str(backbone),
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
