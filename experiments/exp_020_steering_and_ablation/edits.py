"""Edits of the original model, of one strength each: units taken away, or added at every token."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from edited_units import Units, Vectors
from jaxtyping import Bool, Int
from torch import Tensor
from unit_scores import Scored

from evaluation import ignore
from patching import after
from replacement import replaced_logits
from target_models import TargetModel

Forward = Callable[
    [Int[Tensor, "window seq"], Bool[Tensor, "window seq"]], Tensor
]  # (tokens, which have the topic) → logits
Edit = Callable[[float], Forward]  # by its strength


def ablation(units: Units, ranked: Sequence[int]) -> Edit:
    """Takes away the first units of a ranking; a strength of 2.5 two of them and half of the third."""
    order = torch.tensor(ranked)

    def of(strength: float) -> Forward:
        w = torch.zeros(sum(units.groups.values()))
        w[order] = (strength - torch.arange(len(order), dtype=torch.float32)).clamp(0, 1)
        layers = units.replacement.layers
        return lambda tokens, _: replaced_logits(units.target, tokens, units.ablated(w), layers, ignore)

    return of


def steering(target: TargetModel, vectors: Vectors) -> Edit:
    """Adds vectors to what modules write, at every token."""

    def of(strength: float) -> Forward:
        def forward(tokens: Tensor, _: Tensor) -> Tensor:
            with ExitStack() as stack:
                for path, vector in vectors.items():
                    module = target.model.get_submodule(path)
                    stack.enter_context(after(module, lambda _args, out, v=vector: out + strength * v))
                return target.logits(tokens)

        return forward

    return of


def typical_vectors(units: Units, scored: Scored, topic: int, chosen: Sequence[int]) -> Vectors:
    """What the chosen units write together where the topic activates them."""
    s = torch.zeros_like(scored.effect)
    s[list(chosen)] = scored.typical[topic, list(chosen)]
    return units.written(s)
