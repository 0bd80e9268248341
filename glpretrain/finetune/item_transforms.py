"""What fine-tuned models of any kind do to an item, as their folders name it."""

from glpretrain.finetune.cloud_transform import CloudTransform
from glpretrain.finetune.sound_transform import SoundTransform
from glpretrain.finetune.transforms import Transform

AnyTransform = Transform | CloudTransform | SoundTransform


def transform_from_json(values: object) -> AnyTransform:
    """Inverse of `to_json` of every kind.

    Raises:
        ValueError: a field is missing, unknown or of another kind.
    """
    if isinstance(values, dict) and "num_points" in values:
        return CloudTransform.from_json(values)
    if isinstance(values, dict) and "frames" in values:
        return SoundTransform.from_json(values)
    return Transform.from_json(values)
