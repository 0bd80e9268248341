"""From what a program holds to what an encoder takes, as evaluations make it of files: brought to the encoder's size by keeping the
proportions and cutting the centre, and normalised as its card says."""

import torch
from torch import Tensor

from glpretrain import modalities
from glpretrain.core.imports import imported
from glpretrain.core.types import Item
from glpretrain.encoders.base import Encoder
from glpretrain.evaluate.encoding import device_of


class Transform:
    """Makes batches for an encoder.

    Args:
        encoder: the encoder; of its card the size, the mean and the standard deviation are taken, and of its weights the device.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.card, self.device = encoder.card, device_of(encoder)

    def __call__(self, held: object) -> Tensor:
        """Float[B *item] on the encoder's device, one item for each that is given.

        Args:
            held: pictures: a path, an image of PIL, an array [H W C] or a tensor [C H W] in uint8 or from 0 to 1; grey or colour, with
                opacity or without. Clouds: a path, an array or a tensor [P 3]. Or a list of these, whose sizes may differ, or an array or
                a tensor with an axis for them.

        Raises:
            ValueError: something else is given, or a file cannot be read.
        """
        modality = modalities.get(self.card.modality)
        divided, values_of = map(imported, modality.held)
        shape = modality.item_shape(self.card, None)
        how = {"value_range": self.card.value_range} if self.card.value_range else {}  # which only images have
        found: list[Tensor] = []
        for one in divided(held):
            values = values_of(one, channels=shape[modality.channel_axis], **how)
            found.append(modality.resize(Item(values, label=-1, instances=None, regions=None), shape, fit="crop").values)
        if not found:
            raise ValueError("transform: an empty list given; accepted: at least one item")
        return modality.normalise(torch.stack(found).to(self.device), self.card)  # [B *item]
