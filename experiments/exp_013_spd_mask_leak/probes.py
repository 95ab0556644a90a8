"""A linear probe of the next token, beside what is known of it already.

    p(y) ∝ exp(a · known_y + x · W_y + b_y)

x are features of a position, `known` are logits (the model's own, or none: zeros). a, b and W are trained on some documents,
stopped where the cross-entropy on others is least, and measured on a third lot.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

READ_EVERY = 50  # steps between readings of the cross-entropy that says when to stop


class Positions(NamedTuple):
    """The positions that are probed, and which documents they are of."""

    y: Int[Tensor, "position"]  # class of the next token
    train: Bool[Tensor, "position"]
    stop: Bool[Tensor, "position"]
    test: Bool[Tensor, "position"]


def no_features(positions: Positions) -> Float[Tensor, "position 0"]:
    return torch.zeros(len(positions.y), 0)


def probe(
    positions: Positions, x: Tensor, known: Float[Tensor, "position class"] | None, *, classes: int, steps: int, lr: float,
    seed: int,
) -> float:  # fmt: skip
    """Cross-entropy (nats) on the test positions; `seed` draws the batches."""
    generator, train = torch.Generator().manual_seed(seed), positions.train.nonzero()[:, 0]
    frequency = torch.bincount(positions.y[train], minlength=classes) + 1.0
    b = frequency.div(frequency.sum()).log() if known is None else torch.zeros(classes)
    weights = [torch.zeros(x.shape[1], classes), b, torch.ones(())]
    W, b, a = (weight.requires_grad_() for weight in weights)
    optimiser = torch.optim.Adam([W, b, a], lr=lr)

    def cross_entropy(rows: Int[Tensor, "row"]) -> Float[Tensor, ""]:
        logits = x[rows].float() @ W + b
        return F.cross_entropy(logits if known is None else logits + a * known[rows], positions.y[rows])

    stop, test = (part.nonzero()[:, 0] for part in (positions.stop, positions.test))
    best, measured = float("inf"), float("inf")
    for step in range(steps + 1):
        if step % READ_EVERY == 0 or step == steps:
            with torch.no_grad():
                if (reading := cross_entropy(stop).item()) < best:
                    best, measured = reading, cross_entropy(test).item()
        cross_entropy(train[torch.randint(len(train), (1024,), generator=generator)]).backward()
        optimiser.step()
        optimiser.zero_grad()
    return measured


def worth(known: Float[Tensor, "position class"], positions: Positions) -> float:
    """Nats by which the model's prediction gains where the parity of the next token's class is told: −log p(its parity)."""
    own, odd = positions.y % 2, torch.arange(known.shape[1]) % 2
    of_parity = known.masked_fill(own[:, None] != odd, -torch.inf).logsumexp(1)
    return -of_parity[positions.test].mean().item()
