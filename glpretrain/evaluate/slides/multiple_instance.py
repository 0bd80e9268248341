"""From the tiles of a slide to the slide: attention over a bag of features, fitted to one label per bag.

Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", 2018, equation 9 (gated). Settings as in GPFM's evaluation:
Adam, rate 2e-4, decay 1e-4, dropout 0.25, one slide a step. Early stopping, class weights and survival are left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from glpretrain.core import keys

_MIN_STD = 1e-6  # a collapsed feature is not blown up beyond this


class GatedAttention(nn.Module):
    """A bag's class from the mean of its rows, weighted by softmax_k w . (tanh(V h_k) * sigmoid(U h_k)).

    Args:
        embed_dim: width D of the features.
        num_classes: number of classes K.
        hidden_dim: number of rows of V and U.
        dropout: dropout rate of the features, while it is fitted.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, embed_dim: int, *, num_classes: int, hidden_dim: int = 128, dropout: float = 0.25) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("std", torch.ones(embed_dim))
        self.dropout = nn.Dropout(dropout)
        self.content = nn.Linear(embed_dim, hidden_dim)  # V
        self.gate = nn.Linear(embed_dim, hidden_dim)  # U
        self.score = nn.Linear(hidden_dim, 1, bias=False)  # w; the softmax would cancel a bias
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        """One bag.

        Args:
            bag: Float[M D], the rows of the bag.

        Returns:
            Logits, Float[K], and the attention of each row, Float[M], which sums to 1.
        """
        rows = self.dropout((bag - self.mean) / self.std)  # [M D]
        gated = torch.tanh(self.content(rows)) * torch.sigmoid(self.gate(rows))  # [M hidden]
        attention = self.score(gated)[:, 0].softmax(dim=0)  # [M]
        return self.classifier(attention @ rows), attention


def fit_gated_attention(
    bags: Sequence[Tensor],
    labels: Sequence[int],
    *,
    hidden_dim: int = 128,
    dropout: float = 0.25,
    epochs: int = 100,
    lr: float = 2e-4,
    weight_decay: float = 1e-4,
    seed: int = 0,
) -> GatedAttention:
    """Fit attention to labelled bags; the caller's random numbers are left alone.

    Args:
        bags: rows of each bag, Float[M D]; M may differ.
        labels: class of each bag, from 0.
        hidden_dim: see `GatedAttention`.
        dropout: see `GatedAttention`.
        epochs: number of passes over the bags.
        lr: Adam's learning rate.
        weight_decay: Adam's weight decay.
        seed: seed of weights, order and dropout.

    Returns:
        The module in evaluation mode.

    Raises:
        ValueError: bags and labels do not match, a bag is empty, or there is one class only.
    """
    if len(bags) != len(labels):
        raise ValueError(f"labels: {len(labels)} for {len(bags)} bags; accepted: one each")
    if empty := [number for number, bag in enumerate(bags) if len(bag) == 0]:
        raise ValueError(f"bags: number {empty[0]} has no rows; accepted: at least one")
    if len(set(labels)) < 2 or min(labels) < 0:
        raise ValueError(f"labels: {sorted(set(labels))}; accepted: at least two classes, counted from 0")
    every = torch.cat(list(bags))  # [N D]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = GatedAttention(every.shape[1], num_classes=max(labels) + 1, hidden_dim=hidden_dim, dropout=dropout)
        attention.mean.copy_(every.mean(dim=0))
        attention.std.copy_(every.std(dim=0, correction=0).clamp_min(_MIN_STD))
        optimizer = torch.optim.Adam(attention.parameters(), lr=lr, weight_decay=weight_decay)
        for epoch in range(epochs):
            for number in keys.permutation(keys.fold_in(torch.tensor(seed), epoch), len(bags)).tolist():
                logits, _ = attention(bags[number])
                loss = functional.cross_entropy(logits[None], torch.tensor([labels[number]]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return attention.eval()
