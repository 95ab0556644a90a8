"""Masks of SPD's components: random ones, routed ones, and ones that an adversary chooses.

    m = g_lo + (1 − g_lo) r,   r ~ U(0, 1), or chosen by gradient ascent on the loss (PGD)
    routing: a position that keeps the original map has m = m_Δ = 1

g_lo is the importance of each component, m_Δ the mask of what the components leave of the weight matrix.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spd_gates import align


class Mask(NamedTuple):
    """One module's mask; `delta` None: the path through Δ is closed."""

    components: Float[Tensor, "*batch component"]
    delta: Float[Tensor, "*batch"] | None


def stochastic_masks(g_lo: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Mask]:
    """m = g_lo + (1 − g_lo) r and m_Δ, all draws U(0, 1) per position."""
    return {
        path: Mask(_blend(g, torch.rand(g.shape, generator=generator, device=g.device)),
                   torch.rand(g.shape[:-1], generator=generator, device=g.device))
        for path, g in g_lo.items()
    }  # fmt: skip


def source_masks(
    g_lo: Mapping[str, Tensor], sources: Mapping[str, Float[Tensor, "*batch component+1"]]
) -> dict[str, Mask]:
    """m = g_lo + (1 − g_lo) r with given sources r; the last channel is m_Δ."""
    return {
        path: Mask(_blend(g, sources[path][..., :-1]), sources[path][..., -1].expand(g.shape[:-1]))
        for path, g in g_lo.items()
    }


def _blend(g: Tensor, r: Tensor) -> Tensor:
    return torch.lerp(g, g.new_ones(()), r.to(g.dtype)) if r.shape == g.shape else g + (1 - g) * r


Routing = dict[str, Float[Tensor, "*batch"]]  # 1 where a position of a module goes through the decomposition


def route_subset(paths: list[str], shape: tuple[int, ...], generator: torch.Generator) -> Routing:
    """uniform-k-subset: k ~ U{1..M} per position, then k of the M modules, uniformly."""
    k = torch.randint(1, len(paths) + 1, shape, generator=generator, device=generator.device)
    rank = torch.rand(len(paths), *shape, generator=generator, device=generator.device).argsort(0).argsort(0)
    return {path: (rank[i] < k).float() for i, path in enumerate(paths)}


def routed(masks: Mapping[str, Mask], routing: Routing) -> dict[str, Mask]:
    """Where a position is not routed, its mask is all ones with m_Δ = 1: the original map, by the Δ identity."""
    out = {}
    for path, (m, delta) in masks.items():
        r = routing[path]
        original = 1 - r if delta is None else 1 - r + r * delta
        out[path] = Mask(torch.lerp(torch.ones_like(m), m, r[..., None].to(m.dtype)), original)
    return out


Objective = Callable[[dict[str, Tensor]], Float[Tensor, "*stack"]]  # of sources; each seed of a stack has a value


def pgd_sources(objective: Objective, sources: dict[str, Tensor], steps: int, step_size: float) -> dict[str, Tensor]:
    """Sources that raise the objective by projected gradient ascent: r ← clamp(r + η · sign ∇_r objective, 0, 1).

    Of the `steps` + 1 iterates the best is returned, for each seed of a stack its own, so that no seed's objective falls below
    its start (published code returns the last iterate).
    """
    best, best_value = sources, None
    for step in range(steps + 1):
        leaves = {path: r.detach().requires_grad_() for path, r in sources.items()}
        value = objective(leaves)
        if best_value is None:
            best_value = torch.full_like(value.detach(), -torch.inf)
        better = value.detach() > best_value  # stays on the device
        best = {path: torch.where(align(better, r, 0), r.detach(), best[path]) for path, r in leaves.items()}
        best_value = torch.where(better, value.detach(), best_value)
        if step < steps:
            grads = torch.autograd.grad(value.sum(), list(leaves.values()))
            sources = {p: (r + step_size * g.sign()).clamp(0, 1).detach() for (p, r), g in zip(leaves.items(), grads)}
    return best


class PersistentSources(nn.Module):
    """Adversarial sources r ∈ [0, 1] kept across training steps; Adam ascent, clamped. State travels in checkpoints.

    `shape`: () one vector for all positions, (seq,) one per position index, (batch, seq) one per batch slot, (stack, 1) one
    per seed of a stack, (particle,) a pool that sequences draw from.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        shape: tuple[int, ...],
        lr: float,
        betas: tuple[float, float],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.paths = list(sizes)
        self.r = nn.ParameterList(
            torch.rand(*shape, n + 1, generator=generator, device=generator.device) for n in sizes.values()
        )
        self.optimiser = torch.optim.Adam(self.r, lr=lr, betas=betas, maximize=True)

    def sources(self) -> dict[str, Tensor]:
        return dict(zip(self.paths, self.r))

    def drawn(self, particles: Bool[Tensor, "sequence particle"]) -> dict[str, Float[Tensor, "sequence 1 component+1"]]:
        """Each sequence's own particle of the pool, the same for all its positions.

        `particles` has one True a sequence: a product with it has a gradient without atomics, which differ from run to run.
        """
        return {path: (particles.to(r.dtype) @ r)[:, None] for path, r in self.sources().items()}

    def ascend(self, value: Tensor) -> None:
        """One step of ascent on the gradient of `value`; the other leaves of the graph get none."""
        params = list(self.r)
        for p, g in zip(params, torch.autograd.grad(value, params)):
            p.grad = g
        self.follow(1.0)

    def follow(self, scale: float) -> None:
        """One step of ascent on `scale` times the gradient that the sources hold; they hold none afterwards."""
        params = list(self.r)
        torch._foreach_mul_([p.grad for p in params], scale)
        self.optimiser.step()
        with torch.no_grad():
            for p in params:
                p.clamp_(0, 1)
                p.grad = None
