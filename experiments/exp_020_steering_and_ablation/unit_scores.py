"""Which units tell a topic, and which are like them in all but that.

A unit's score on a span is its largest |value| · ‖d‖ there, of the deployed values, the first position left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from edited_units import Units
from einops import rearrange, reduce
from jaxtyping import Float
from scipy.stats import rankdata
from topics import SPAN, Labelled
from torch import Tensor

from evaluation import clean_pass


class Scored(NamedTuple):
    """What units are worth on the selection half."""

    auroc: Float[Tensor, "topic unit"]  # of the score, spans with the topic against all others
    null: Float[Tensor, "topic"]  # the largest AUROC of any unit where labels are dealt at random over spans
    typical: Float[
        Tensor, "topic unit"
    ]  # mean value over the topic's tokens on which a unit is active; 0 where none is
    effect: Float[Tensor, "unit"]  # mean |value| · ‖d‖ over all tokens


@torch.no_grad()
def scored(units: Units, half: Labelled, seed: int, batch: int = 16) -> Scored:
    sizes, layers = torch.cat(list(units.sizes().values())), units.replacement.layers
    best, on = [], half.on.float()
    total, count, effect = torch.zeros(len(on), len(sizes)), torch.zeros(len(on), len(sizes)), torch.zeros(len(sizes))
    for windows in torch.arange(len(half.tokens)).split(batch):
        captured = clean_pass(units.target, half.tokens[windows], layers, units.replacement.watches).activations
        values = torch.cat(list(units.values(captured).values()), -1)
        values[:, 0] = 0
        weighed = values.abs() * sizes
        best.append(reduce(weighed, "window (span token) unit -> (window span) unit", "max", token=SPAN))
        effect += weighed.sum((0, 1))
        own = rearrange(on[:, windows], "topic window seq -> topic (window seq)")
        flat = values.flatten(0, 1)
        total, count = total + own @ flat, count + own @ (flat != 0).float()
    labels, spans = half.spans.flatten(1), torch.cat(best)
    shuffled = labels[:, torch.randperm(labels.shape[1], generator=torch.Generator().manual_seed(seed))]
    both = auroc(spans, torch.cat([labels, shuffled]))
    own, null = both.split(len(labels))
    return Scored(own, null.amax(1), total / count.clamp_min(1), effect / half.tokens.numel())


def auroc(scores: Float[Tensor, "span unit"], labels: Float[Tensor, "topic span"]) -> Float[Tensor, "topic unit"]:
    """P(score of a labelled span > that of another), ties ½: the Mann–Whitney statistic by average ranks."""
    labels = labels.double()
    ranks = torch.from_numpy(rankdata(scores.numpy(), axis=0)).double()
    n = labels.sum(1, keepdim=True)
    return ((labels @ ranks - n * (n + 1) / 2) / (n * (labels.shape[1] - n))).float()


def ranking(scored: Scored, topic: int) -> list[int]:
    """Live units, best first."""
    order = scored.auroc[topic].argsort(descending=True, stable=True)
    return [unit for unit in order.tolist() if scored.effect[unit] > 0]


def of_like_effect(ranked: Sequence[int], effect: Float[Tensor, "unit"], seed: int, bin_size: int = 20) -> list[int]:
    """The ranking with a random unit of about the same mean effect in each unit's place, nobody twice."""
    generator = torch.Generator().manual_seed(seed)
    live = torch.tensor(sorted(ranked, key=lambda unit: -effect[unit].item()))
    swapped = torch.cat([own[torch.randperm(len(own), generator=generator)] for own in live.split(bin_size)])
    other = dict(zip(live.tolist(), swapped.tolist()))
    return [other[unit] for unit in ranked]
