"""Edits that no unit of a method makes: along the difference of class means, by labels, by the gradient of what is measured."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from edit_costs import log_mass
from edited_units import Vectors
from edits import Edit, Forward
from jaxtyping import Float, Int
from topics import Labelled
from torch import Tensor

from evaluation import clean_pass
from losses import cross_entropy
from patching import after, patched
from target_models import TargetModel


class Means(NamedTuple):
    """Of what every MLP writes: on a topic's tokens less on the others', and on the others'."""

    difference: dict[int, Float[Tensor, "d"]]
    other: dict[int, Float[Tensor, "d"]]


def class_means(target: TargetModel, half: Labelled, layers: Sequence[int], batch: int = 16) -> list[Means]:
    """One for each topic, of the selection half, first positions left out."""
    on = half.on[:, :, 1:].float()
    sums, others = 0.0, 0.0
    for windows in torch.arange(len(half.tokens)).split(batch):
        y = clean_pass(target, half.tokens[windows], layers).activations.outputs[:, :, 1:]
        here = on[:, windows].flatten(1)
        sums, others = sums + here @ y.flatten(1, 2), others + (1 - here) @ y.flatten(1, 2)  # layer, topic, d
    n = on.flatten(1).sum(1)[:, None]
    own, other = sums / n.clamp_min(1), others / (on[0].numel() - n)
    return [
        Means(
            {layer: own[i, t] - other[i, t] for i, layer in enumerate(layers)},
            {layer: other[i, t] for i, layer in enumerate(layers)},
        )
        for t in range(len(on))
    ]


def directional_ablation(target: TargetModel, means: Means) -> Edit:
    """Takes away the part of each MLP's output along the difference of means, as far as it differs from the others' mean."""

    def of(strength: float) -> Forward:
        def without(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
            u, centre = means.difference[layer] / means.difference[layer].norm(), means.other[layer]
            return lambda _x, y: y - strength * ((y - centre) @ u)[..., None] * u

        def forward(tokens: Tensor, _: Tensor) -> Tensor:
            with patched(target, {layer: without(layer) for layer in means.difference}):
                return target.logits(tokens)

        return forward

    return of


def planted_ablation(target: TargetModel, means: Means) -> Edit:
    """A unit that knows the labels: takes the difference of means away on the topic's tokens alone."""

    def of(strength: float) -> Forward:
        def forward(tokens: Tensor, on: Tensor) -> Tensor:
            gate = strength * on.float()[..., None]
            functions = {layer: lambda _x, y, v=v: y - gate * v for layer, v in means.difference.items()}
            with patched(target, functions):
                return target.logits(tokens)

        return forward

    return of


def gradient_vectors(target: TargetModel, text: Labelled, words: Int[Tensor, "topic word"], topic: int) -> Vectors:
    """The direction at the last MLP's output that steers to a topic most at a small KL: (F + λ)⁻¹ g.

    g is the mean gradient, in what that MLP writes at a token, of log P(the topic's vocabulary) less the mean of other topics'
    there, F the second moment of the CE's gradient, λ its mean eigenvalue: the natural gradient of what is measured.
    """
    last, wrote = target.mlps[-1].write, []

    def keep(_args: tuple[Any, ...], y: Tensor) -> Tensor:
        wrote.append(y.detach().requires_grad_())
        return wrote[-1]

    with torch.enable_grad(), after(target.model.get_submodule(last), keep):
        logits = target.logits(text.tokens)
        mass = log_mass(logits, words)[:, :, :-1].sum((1, 2))
        gain = mass[topic] - (mass.sum() - mass[topic]) / max(1, len(mass) - 1)
        g, of_ce = (
            torch.autograd.grad(of, wrote[-1], retain_graph=True)[0][:, :-1].flatten(0, 1)
            for of in (gain, cross_entropy(logits, text.tokens).sum())
        )
    fisher = of_ce.T @ of_ce / len(of_ce)
    ridge = fisher.diagonal().mean() * torch.eye(len(fisher))
    return {last: torch.linalg.solve(fisher + ridge, g.mean(0))}
