"""A probe of the next token: what features of a position tell beside what is known of it already.

    p(y) ∝ exp(a · known_y + b_y + Σ_c x_c W_cy),   x_c 0 or 1

First a and b are fitted; then, round by round, one feature takes the step after which each class is as frequent where it is
active as predicted,

    W_cy += log (n_c r + κ) / (n_c + κ),   r = class y there, counted / predicted;   n_c positions, κ more of r = 1

the one that gains most by it: Σ_y counted · step. Trained on some documents, stopped where the cross-entropy on others is least,
measured on a third lot. (A probe of all features at once, trained by Adam, learnt the noise of thousands of components by heart
before it used a bit that was planted among them: it did not see the leak. One that took a feature's Newton step saw the bit and
nothing else: where a class is rare but for one feature, the curvature before the step is a hundredth of that after it.)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

PRIOR = 3.0  # κ, in positions: a feature active at so few moves half as far
PATIENCE = 5  # rounds without gain on the stopping documents


class Positions(NamedTuple):
    """The positions that are probed, and which documents they are of."""

    y: Int[Tensor, "position"]  # class of the next token
    train: Bool[Tensor, "position"]
    stop: Bool[Tensor, "position"]
    test: Bool[Tensor, "position"]


@torch.no_grad()
def probe(
    positions: Positions, x: Tensor, known: Float[Tensor, "position class"], *, rounds: int
) -> Float[Tensor, "tested"]:
    """Cross-entropy (nats) of each test position."""
    y, train, stop, test = positions
    logits = calibrated(positions, known)
    of_train = x[train].T.float().contiguous()
    assert ((of_train == 0) | (of_train == 1)).all(), "features are active or not"
    n, counted = of_train.sum(1, keepdim=True), of_train @ F.one_hot(y[train], logits.shape[1]).float()
    best, measured, waited = torch.inf, torch.empty(0), 0
    for _ in range(rounds + 1):
        reading = F.cross_entropy(logits[stop], y[stop]).item()
        waited = 0 if reading < best else waited + 1
        if reading < best:
            best, measured = reading, F.cross_entropy(logits[test], y[test], reduction="none")
        if waited == PATIENCE or not x.shape[1]:
            break
        predicted = of_train @ logits[train].softmax(-1)
        step = ((n * counted / predicted.clamp_min(1e-12) + PRIOR) / (n + PRIOR)).log()
        chosen = (counted * step).sum(1).argmax()
        logits += x[:, chosen, None].float() * step[chosen]
    return measured


def calibrated(positions: Positions, known: Float[Tensor, "position class"]) -> Float[Tensor, "position class"]:
    """a · known + b, fitted on the training documents."""
    a, b, train = torch.ones((), requires_grad=True), torch.zeros(known.shape[1], requires_grad=True), positions.train
    optimiser = torch.optim.LBFGS([a, b], max_iter=50, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(a * known[train] + b, positions.y[train]) + 1e-4 * b.square().mean()
        value.backward()
        return value

    optimiser.step(loss)
    return (a * known + b).detach()


def no_features(positions: Positions) -> Float[Tensor, "position 0"]:
    return torch.zeros(len(positions.y), 0)


def interval(gain: Float[Tensor, "position"], document: Int[Tensor, "position"]) -> list[float]:
    """95 % of the mean over resampled documents."""
    n = int(document.max()) + 1
    sums, counts = torch.zeros(n).index_add(0, document, gain), torch.bincount(document, minlength=n)
    draws = torch.randint(n, (1000, n), generator=torch.Generator().manual_seed(0))
    return (sums[draws].sum(1) / counts[draws].sum(1).clamp_min(1)).quantile(torch.tensor([0.025, 0.975])).tolist()


def worth(known: Float[Tensor, "position class"], positions: Positions) -> float:
    """Nats by which a prediction gains where the parity of the next token's class is told: −log p(its parity)."""
    own, odd = positions.y % 2, torch.arange(known.shape[1]) % 2
    of_parity = calibrated(positions, known).log_softmax(-1).masked_fill(own[:, None] != odd, -torch.inf).logsumexp(1)
    return -of_parity[positions.test].mean().item()
