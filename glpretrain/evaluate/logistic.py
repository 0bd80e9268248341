"""Multinomial logistic regression for many items or on a GPU: scikit-learn's problem and minimiser, a bounded number of logits at a time.

scikit-learn's own computes on the CPU and holds the logits of all items and their gradients, 15 GB for ImageNet. Both find the minimum of

    sum of cross-entropies / B + sum(weight ** 2) / (2 * inverse_l2 * B)

with L-BFGS-B of scipy from zero, and stop by the same rules. scikit-learn takes one vector for two classes, whose penalty is that of two
opposite ones with twice the strength.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

_LOGITS = 1 << 26  # at a time
_TOLERANCE, _MAX_LINE_SEARCH = 1e-4, 50  # scikit-learn's


class Logistic(NamedTuple):
    """A fitted classifier."""

    weight: Tensor  # Float[D C], on the device where it was fitted
    bias: Tensor  # Float[C]
    labels: Tensor  # Int[C]  label of each column
    has_converged: bool

    def predict(self, rows: Tensor) -> Tensor:
        """Int[B] on the CPU: the class of Float[B D]."""
        return self.labels[(rows.to(self.bias.device) @ self.weight + self.bias).argmax(dim=1).cpu()]


def fit_logistic(rows: Tensor, labels: Tensor, *, inverse_l2: float, max_iter: int, device: torch.device) -> Logistic:
    """The classifier with the smallest penalised loss.

    Args:
        rows: Float[B D], features.
        labels: Int[B], labels of at least two classes.
        inverse_l2: scikit-learn's C.
        max_iter: number of L-BFGS iterations.
        device: where the loss is computed.
    """
    classes, targets = labels.unique(return_inverse=True)
    count, dim, num_classes = len(rows), rows.shape[1], len(classes)
    strength = 1 / (count * (inverse_l2 / 2 if num_classes == 2 else inverse_l2))
    rows, targets = rows.to(device), targets.to(device)
    parts = torch.arange(count, device=device).split(max(1, _LOGITS // num_classes))

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        values = torch.from_numpy(parameters).to(device).reshape(dim + 1, num_classes)
        weight, bias = values[:-1].to(rows.dtype), values[-1].to(rows.dtype)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        gradient = torch.zeros_like(values)
        for part in parts:
            some, truth = rows[part[0] : part[-1] + 1], targets[part[0] : part[-1] + 1]
            log_probability = (some @ weight + bias).log_softmax(dim=1)
            loss -= log_probability.gather(1, truth[:, None]).double().sum()
            error = log_probability.exp_().scatter_add_(1, truth[:, None], -torch.ones_like(log_probability[:, :1]))
            gradient[:-1] += some.T @ error
            gradient[-1] += error.double().sum(dim=0)
        penalty = values[:-1]
        loss = loss / count + strength / 2 * penalty.square().sum()
        gradient /= count
        gradient[:-1] += strength * penalty
        return loss.item(), gradient.flatten().cpu().numpy()

    options = {"maxiter": max_iter, "maxls": _MAX_LINE_SEARCH, "gtol": _TOLERANCE, "ftol": 64 * np.finfo(np.float64).eps}
    found = minimize(objective, np.zeros((dim + 1) * num_classes), method="L-BFGS-B", jac=True, options=options)
    values = torch.from_numpy(found.x).reshape(dim + 1, num_classes).to(rows.dtype).to(device)
    return Logistic(values[:-1], values[-1], classes, found.status == 0)
