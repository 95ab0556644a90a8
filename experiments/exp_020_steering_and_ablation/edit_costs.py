"""What an edit costs a topic and the general text, at a strength that is matched.

The strength is found by Brent's method (in its logarithm, between two octaves) so that the KL on neutral text of the selection
half is what was asked for. On the test half the edit is measured: ΔCE is the rise of the cross-entropy, nats per token.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from edits import Edit, Forward
from jaxtyping import Float, Int
from scipy.optimize import brentq
from topics import Windows
from torch import Tensor

from losses import cross_entropy, kl_divergence
from metrics import Draws, percentiles
from target_models import TargetModel

OCTAVES = (-6, 10)  # between which strengths are looked for
START = 2.0


class Text(NamedTuple):
    """Windows with what the original model makes of them."""

    windows: Windows
    own_ce: Float[Tensor, "window seq-1"]
    neutral_ce: Float[Tensor, "window seq-1"]
    neutral_logits: Float[Tensor, "window seq vocab"]


def text_of(target: TargetModel, windows: Windows) -> Text:
    own, neutral = (target.logits(part.tokens) for part in windows)
    ce = [cross_entropy(logits, part.tokens) for logits, part in zip((own, neutral), windows)]
    return Text(windows, *ce, neutral)


class Cost(NamedTuple):
    """Σ of ΔCE and number of tokens, by window."""

    topic: Float[Tensor, "window"]
    topic_tokens: Float[Tensor, "window"]
    topic_documents: Int[Tensor, "window"]
    general: Float[Tensor, "neutral"]
    general_tokens: Float[Tensor, "neutral"]
    general_documents: Int[Tensor, "neutral"]
    mass: Float[
        Tensor, "neutral"
    ]  # Σ over tokens of the rise of log P(the topic's vocabulary) less that of other topics'
    kl: float  # on the neutral windows


def log_mass(
    logits: Float[Tensor, "window seq vocab"], words: Int[Tensor, "topic word"]
) -> Float[Tensor, "topic window seq"]:
    """log P(next token is one of a topic's vocabulary)."""
    return torch.stack([logits[..., own].logsumexp(-1) for own in words]) - logits.logsumexp(-1)


def general_kl(text: Text, forward: Forward) -> float:
    neutral = text.windows.neutral
    logits = forward(neutral.tokens, torch.zeros_like(neutral.tokens, dtype=torch.bool))
    return kl_divergence(text.neutral_logits, logits).mean().item()


def matched(edit: Edit, text: Text, kl: float) -> float:
    """The strength at which the KL on the neutral windows is `kl`; the last that was looked at where none reaches it."""

    @functools.cache
    def error(octave: float) -> float:
        return math.log(max(general_kl(text, edit(2.0**octave)), 1e-9) / kl)

    here, step = START, 2.0 if error(START) < 0 else -2.0
    while OCTAVES[0] <= here + step <= OCTAVES[1]:
        here += step
        if error(here) * step > 0:
            return 2.0 ** brentq(error, here - step, here, xtol=0.03)
    return 2.0**here


def cost(text: Text, forward: Forward, topic: int, words: Int[Tensor, "topic word"]) -> Cost:
    own, neutral = text.windows
    on = own.on[topic]
    changed = cross_entropy(forward(own.tokens, on), own.tokens) - text.own_ce
    counted = on[:, 1:].float()
    none = torch.zeros_like(neutral.tokens, dtype=torch.bool)
    logits = forward(neutral.tokens, none)
    general = cross_entropy(logits, neutral.tokens) - text.neutral_ce
    mass = (log_mass(logits, words) - log_mass(text.neutral_logits, words))[:, :, :-1].sum(-1)
    others = (mass.sum(0) - mass[topic]) / max(1, len(mass) - 1)
    return Cost(
        (changed * counted).sum(1), counted.sum(1), own.documents,
        general.sum(1), torch.full((len(general),), float(general.shape[1])), neutral.documents,
        mass[topic] - others, kl_divergence(text.neutral_logits, logits).mean().item(),
    )  # fmt: skip


class Summary(NamedTuple):
    """ΔCE of topic and general text, their difference and quotient, each with a 95 % bootstrap interval over documents."""

    topic: float
    topic_low: float
    topic_high: float
    general: float
    general_low: float
    general_high: float
    difference: float
    difference_low: float
    difference_high: float
    quotient: float  # Σ topic / Σ general
    quotient_low: float
    quotient_high: float
    mass: float  # rise of log P(the topic's vocabulary) on general text less that of other topics', nats
    mass_low: float
    mass_high: float


def summary(costs: Sequence[Cost], draws: Draws) -> Summary:
    """Of one topic, or the mean over several; `draws` has a column for every document number."""
    weights = torch.cat([torch.ones(1, draws.weights.shape[1], dtype=torch.float64), draws.weights])
    topic = torch.stack([_means(weights, c.topic, c.topic_tokens, c.topic_documents) for c in costs]).mean(0)
    general = torch.stack([_means(weights, c.general, c.general_tokens, c.general_documents) for c in costs]).mean(0)
    mass = torch.stack([_means(weights, c.mass, c.general_tokens, c.general_documents) for c in costs]).mean(0)
    columns = [
        topic,
        general,
        topic - general,
        topic / general,
        mass,
    ]  # infinite where an edit leaves the general text alone
    return Summary(*(value for column in columns for value in (column[0].item(), *percentiles(column[1:]))))


def _means(weights: Tensor, sums: Tensor, tokens: Tensor, documents: Tensor) -> Float[Tensor, "resample"]:
    """Σ over tokens, of each resample of documents, first the text itself."""
    drawn = weights[:, documents]
    return (drawn @ sums.double()) / (drawn @ tokens.double()).clamp_min(1)
