"""Edits that no unit of a method makes: along the difference of class means, by labels, by the gradient of what is measured."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from edits import Edit, Forward, steering
from jaxtyping import Float
from topics import Labelled, Windows
from torch import Tensor
from units import Vectors

from evaluation import clean_pass
from losses import cross_entropy
from patching import patched
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


def gradient_vectors(target: TargetModel, windows: Windows, topic: int) -> Vectors:
    """The direction at all MLP outputs that lowers CE on the topic's tokens fastest against that on text without it."""
    vectors = {paths.write: torch.zeros(target.d_model, requires_grad=True) for paths in target.mlps}
    with torch.enable_grad():
        tokens = torch.cat([windows.own.tokens, windows.neutral.tokens]).clone()
        ce = cross_entropy(steering(target, vectors)(1.0)(tokens, tokens), tokens)
        n, on = len(windows.own.tokens), windows.own.on[topic][:, 1:]
        contrast = ce[:n][on].mean() - ce[n:].mean()
        gradients = torch.autograd.grad(contrast, list(vectors.values()))
    return {path: -gradient for path, gradient in zip(vectors, gradients)}
