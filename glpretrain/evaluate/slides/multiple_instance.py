"""From the tiles of a slide to the slide: attention over a bag of features, fitted to one label per bag.

Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", 2018, equation 9 (gated). Settings as in GPFM's evaluation:
Adam, rate 2e-4, decay 1e-4, dropout 0.25, one slide a step, and a stop 20 epochs after the best loss of held-out slides, not before epoch
50. Known difference: rare classes count more in the loss, where GPFM draws their slides more often. Survival is left out.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from glpretrain.core import keys
from glpretrain.evaluate.probes import stratified_split

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
    class_weights: bool = False,
    held_out_ratio: float = 0.0,
    patience: int = 20,
    min_epochs: int = 50,
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
        class_weights: whether the loss of a bag is divided by how frequent its class is, so that every class counts alike.
        held_out_ratio: share of the bags of each class that does not fit but stops; 0 fits all bags for all epochs.
        patience: number of epochs after the lowest loss of the held-out bags; then fitting stops, and the weights of that epoch are taken.
        min_epochs: number of epochs before which it does not stop.
        seed: seed of weights, order and dropout.

    Returns:
        The module in evaluation mode.

    Raises:
        ValueError: bags and labels do not match, a bag is empty, there is one class only, no class has a bag to hold out, or a setting is
            out of range.
    """
    if len(bags) != len(labels):
        raise ValueError(f"labels: {len(labels)} for {len(bags)} bags; accepted: one each")
    if empty := [number for number, bag in enumerate(bags) if len(bag) == 0]:
        raise ValueError(f"bags: number {empty[0]} has no rows; accepted: at least one")
    if len(set(labels)) < 2 or min(labels) < 0:
        raise ValueError(f"labels: {sorted(set(labels))}; accepted: at least two classes, counted from 0")
    if not 0.0 <= held_out_ratio < 1.0 or patience < 1:
        raise ValueError(f"held_out_ratio={held_out_ratio}, patience={patience} given; accepted: a share below 1, and at least 1 epoch")
    truth = torch.tensor(labels)
    stops, fits = torch.empty(0, dtype=torch.int64), torch.arange(len(bags))
    if held_out_ratio > 0.0:
        stops, fits = stratified_split(truth, None, ratio=held_out_ratio)
        if not len(stops):
            raise ValueError(f"held_out_ratio={held_out_ratio} given; no class has two bags, so none can be held out: set it to 0")
    weight = balanced_weights(truth[fits], num_classes=max(labels) + 1) if class_weights else None
    every = torch.cat([bags[number] for number in fits.tolist()])  # [N D]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attention = GatedAttention(every.shape[1], num_classes=max(labels) + 1, hidden_dim=hidden_dim, dropout=dropout)
        attention.mean.copy_(every.mean(dim=0))
        attention.std.copy_(every.std(dim=0, correction=0).clamp_min(_MIN_STD))
        optimizer = torch.optim.Adam(attention.parameters(), lr=lr, weight_decay=weight_decay)
        best, since, state = math.inf, 0, attention.state_dict()
        for epoch in range(epochs):
            for number in keys.permutation(keys.fold_in(torch.tensor(seed), epoch), len(fits)).tolist():
                loss = _loss(attention, bags, truth, int(fits[number]), weight=weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if not len(stops):
                continue
            attention.eval()
            with torch.no_grad():
                held_out = torch.stack([_loss(attention, bags, truth, number, weight=weight) for number in stops.tolist()]).mean().item()
            attention.train()
            since += 1
            if held_out < best:
                best, since, state = held_out, 0, {name: value.clone() for name, value in attention.state_dict().items()}
            if since >= patience and epoch + 1 >= min_epochs:
                break
        attention.load_state_dict(state)  # the same tensors where no bag was held out
    return attention.eval()


def balanced_weights(labels: Tensor, *, num_classes: int) -> Tensor:
    """Float[K]: weights of classes in inverse proportion to how often they are among Int[B], 1 on average over the items."""
    counts = torch.bincount(labels, minlength=num_classes)
    return len(labels) / ((counts > 0).sum() * counts.clamp(min=1))


def _loss(attention: GatedAttention, bags: Sequence[Tensor], labels: Tensor, number: int, *, weight: Tensor | None) -> Tensor:
    """Float[]: cross-entropy of one bag, times the weight of its class; torch's own mean over one bag would cancel the weight."""
    logits, _ = attention(bags[number])
    loss = functional.cross_entropy(logits[None], labels[number : number + 1])
    return loss if weight is None else weight[labels[number]] * loss
