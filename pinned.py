"""Parts of a coder that stay at random directions, or near them, so that a score tells how little of it had to be learnt.

    frozen encoder   W_enc stays as it was drawn; biases, thresholds and the decoder are learnt
    frozen decoder   w = s d⁰ with a learnt s ≥ 0 (an SAE's rows have unit norm, so s = 1)
    soft decoder     cos(w, d⁰) ≥ τ after every step, the norm of w is free

w is what a latent writes to one target; d⁰ is drawn evenly from the sphere, one for a latent, whatever its targets (so a
CLT's latent writes to all of them along one direction, to each as much as it has learnt). No d⁰ is drawn from the encoder:
what is said of tied starts (W_dec = W_encᵀ) does not hold here. Korznikov et al. 2602.14111, who have SAEs alone.
"""

import math
from collections.abc import Iterable

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from config import Pinned
from sparsity import SparseEncoder


def random_directions(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Evenly from the unit sphere."""
    return normalize(torch.randn(n, d, generator=generator), dim=1)


def reach_bound(n: int, d: int, cosine: float) -> float:
    """Bound n · exp(−d τ² / 2) of the probability that some of n random directions is within cosine τ of a given one.

    Where it is far below 1, a soft decoder cannot have found a feature by chance: its latents' directions are mostly d⁰'s.
    """
    return n * math.exp(-d * cosine**2 / 2)


def within_cone(
    w: Float[Tensor, "latent target d"], directions: Float[Tensor, "latent d"], cosine: float
) -> Float[Tensor, "latent target d"]:
    """Of the vectors as long as w whose cosine with d⁰ is at least τ < 1, the nearest to w in angle.

    w itself, or ‖w‖ (τ d⁰ + √(1 − τ²) u), where u is the unit part of w orthogonal to d⁰.
    """
    along = einsum(w, directions, "latent target d, latent d -> latent target")[..., None]
    norm, d0 = w.norm(dim=2, keepdim=True), directions[:, None]
    u = normalize(w - along * d0, dim=2)
    return torch.where(along >= cosine * norm, w, norm * (cosine * d0 + math.sqrt(1 - cosine**2) * u))


def on_ray(
    w: Float[Tensor, "latent target d"], directions: Float[Tensor, "latent d"]
) -> Float[Tensor, "latent target d"]:
    """The nearest to w of the vectors s d⁰, s ≥ 0."""
    along = einsum(w, directions, "latent target d, latent d -> latent target")
    return einsum(along.relu(), directions, "latent target, latent d -> latent target d")


class Cone(nn.Module):
    """Where the rows of a decoder may point: along directions that were drawn once, or within an angle of them."""

    def __init__(self, cosine: float, directions: Float[Tensor, "latent d"]) -> None:
        super().__init__()
        self.cosine = cosine  # 1: along them
        self.register_buffer("directions", directions)

    def _by_target(self, wide: Float[Tensor, "latent targets_d"]) -> Float[Tensor, "latent target d"]:
        """A view."""
        return wide.unflatten(1, (-1, self.directions.shape[1]))

    @torch.no_grad()
    def constrain_gradient(self, gradient: Float[Tensor, "latent targets_d"]) -> None:
        """Of a frozen decoder only the gradient of s is left: its part along d⁰."""
        if self.cosine == 1:
            own = self._by_target(gradient)
            along = einsum(own, self.directions, "latent target d, latent d -> latent target")
            own.copy_(einsum(along, self.directions, "latent target, latent d -> latent target d"))

    @torch.no_grad()
    def constrain(self, W_dec: Float[Tensor, "latent targets_d"]) -> None:
        """Bring a decoder back after a step."""
        own = self._by_target(W_dec)
        if self.cosine == 1:
            own.copy_(on_ray(own, self.directions))
        else:
            own.copy_(within_cone(own, self.directions, self.cosine))


def pin(
    pinned: Pinned | None, encoders: Iterable[SparseEncoder], d_out: int, generator: torch.Generator
) -> nn.ModuleList:
    """A cone for the decoder of each encoder, or none where decoders are free; a frozen encoder's W_enc takes no gradient."""
    cones = nn.ModuleList()
    if pinned is None:
        return cones
    for encoder in encoders:
        if pinned.part == "encoder":
            encoder.W_enc.requires_grad_(False)
        else:
            cones.append(Cone(pinned.cosine, random_directions(encoder.d_dict, d_out, generator)))
    return cones
