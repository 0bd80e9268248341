"""torch's flex attention on a CPU with gradients.

torch refuses these there ("FlexAttention does not support backward on CPU"), because no kernel is compiled for it; the plain products that
it runs in place of a kernel have a backward pass all the same, which is what tests compare with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def gradients_on_a_cpu() -> Iterator[None]:
    """Inside this context, torch does not refuse them."""
    with patch("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None):
        yield
