"""From a backbone to its use: a head and the whole network learn a task from labels, and what comes of it is saved and exported.

Recipes name the classes below. Pretraining is left out (`methods`), and so are scores of frozen features (`evaluate`).
"""

from glpretrain.finetune.base import FineTune, Head
from glpretrain.finetune.class_heads import ClassHead, MLPHead, NormalizedHead
from glpretrain.finetune.classification import Classification, LabelledViews
from glpretrain.finetune.cloud_transform import CloudTransform
from glpretrain.finetune.clouds import CloudViews, with_num_points
from glpretrain.finetune.data import LabelledData, TaskViews
from glpretrain.finetune.model import FineTuned, is_fine_tuned
from glpretrain.finetune.multilabel import Multilabel
from glpretrain.finetune.parts import PartHead, Parts, PartViews
from glpretrain.finetune.predicting import Predicted, predictions
from glpretrain.finetune.segmentation import Segmentation, SegmentationViews
from glpretrain.finetune.segmentation_heads import LinearHead, MaskTransformer
from glpretrain.finetune.segmenting import Segmented, segmentations
from glpretrain.finetune.sound_transform import SoundTransform
from glpretrain.finetune.sounds import SoundViews
from glpretrain.finetune.transforms import Transform

__all__ = [
    "ClassHead",
    "Classification",
    "CloudTransform",
    "CloudViews",
    "FineTune",
    "FineTuned",
    "Head",
    "LabelledData",
    "LabelledViews",
    "LinearHead",
    "MLPHead",
    "MaskTransformer",
    "Multilabel",
    "NormalizedHead",
    "PartHead",
    "PartViews",
    "Parts",
    "Predicted",
    "Segmentation",
    "SegmentationViews",
    "Segmented",
    "SoundTransform",
    "SoundViews",
    "TaskViews",
    "Transform",
    "is_fine_tuned",
    "predictions",
    "segmentations",
    "with_num_points",
]
