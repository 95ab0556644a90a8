"""SPD whose components run at other strengths than all or nothing: what its gates and the components under them are worth.

    y = ((m − m_Δ) ⊙ (x V)) U + m_Δ · (x W) + b,    m = g + (1 − g) s

    variant      g            s          m_Δ                                      counted as active
    unmasked     0            1          0      the components' sum               all
    importance   importance   0          0      gates as strengths                those with g > 0
    stochastic   importance   u          u      what training draws               all: every one runs
    random       0            u          0      what gates say is not heard       all
    zero         0            0          0      biases alone                      none

The sixth, rounded (m = 1 where g > τ, else 0), is how SPD is deployed: the rows `spd` and `spd-0.5` of `SPDReplacement`.
u ~ U(0, 1) is drawn anew for each component (and each m_Δ) at each token, from a seed made of the replacement's own, the matrix'
path and the bits of what a clean pass of the batch reads. So the same batch has the same u whenever and under whichever protocol
it runs, `stochastic` and `random` have the same, and another batch has others: also the same text in batches of another size.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from checkpoints import Decomposition
from patching import Captured
from replacement import UNKNOWN, Origin, Pass, Replacement, Sources
from spd_model import ComponentModel
from spd_replacement import CleanImportances, SPDPass, SPDReplacement
from target_models import TargetModel

VariantName = Literal["unmasked", "importance", "stochastic", "random", "zero"]


class Variant(NamedTuple):
    """A row of the table above."""

    gated: bool  # g is the importance; else 0
    source: float | None  # s; None: u
    draws_delta: bool = False  # m_Δ is a u of its own


VARIANTS: dict[VariantName, Variant] = {
    "unmasked": Variant(gated=False, source=1.0),
    "importance": Variant(gated=True, source=0.0),
    "stochastic": Variant(gated=True, source=None, draws_delta=True),
    "random": Variant(gated=False, source=None),
    "zero": Variant(gated=False, source=0.0),
}


class SPDVariant(SPDReplacement):
    """Rank-one components of an MLP's weight matrices at the strengths of one of the variants.

    A component is active where its mask is above 0. `delta` adds W − Σ U V whole. Variants without gates decide nothing.
    """

    def __init__(
        self,
        target: TargetModel,
        model: ComponentModel,
        name: VariantName,
        delta: bool = False,
        layers: Sequence[int] | None = None,
        origin: Origin = UNKNOWN,
        seed: int = 0,
    ) -> None:
        """`seed` draws the masks."""
        self.variant, self.seed = VARIANTS[name], seed
        assert not (delta and self.variant.draws_delta), f"{name} masks draw how much of Δ is open"
        super().__init__(target, model, delta=delta or self.variant.draws_delta, layers=layers, origin=origin)
        self.method = f"spd-{name}{'-delta' if delta else ''}"
        self.decides = self.variant.gated

    def gate_parameters(self, layers: Sequence[int]) -> int | None:
        return super().gate_parameters(layers) if self.variant.gated else None

    def clean_importances(self, captured: Captured) -> CleanImportances:
        return super().clean_importances(captured) if self.variant.gated else CleanImportances({}, {})

    def free(self, captured: Captured, run: Callable[[Pass], object]) -> SPDPass:
        return super().free(captured, run) if self.variant.gated else self.gated(captured)

    def opened(
        self,
        captured: Captured,
        inputs: dict[str, Tensor],
        z: dict[str, Tensor] | None,
        given: Mapping[int, Float[Tensor, "batch seq d_in"]] = MappingProxyType({}),
    ) -> "VariantPass":
        return VariantPass(self, inputs, z, given, BatchNoise.of(captured, self.seed))

    def attacked(self, captured: Captured, sources: Sources) -> SPDPass:
        raise ValueError(f"{self.method}: an adversary lets in what a gate keeps out, so attack SPD as it is deployed")


class BatchNoise(NamedTuple):
    """Random numbers for every token of one batch: the same name is given the same ones, however often it asks."""

    seed: str
    batch: int
    seq: int
    device: torch.device

    @staticmethod
    def of(captured: Captured, seed: int) -> "BatchNoise":
        x = captured.inputs
        bits = x.float().view(torch.int32).sum().item()
        return BatchNoise(f"{seed} {bits}", *x.shape[1:3], x.device)

    def uniform(self, name: str, *size: int) -> Float[Tensor, "batch seq *size"]:
        """U(0, 1], so that what is drawn is never shut."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return 1 - torch.rand(self.batch, self.seq, *size, generator=generator, device=self.device)


class VariantPass(SPDPass):
    """A forward pass by components at a variant's strengths."""

    replacement: SPDVariant

    def __init__(
        self,
        replacement: SPDVariant,
        inputs: dict[str, Tensor],
        z: dict[str, Tensor] | None,
        given: Mapping[int, Float[Tensor, "batch seq d_in"]],
        noise: BatchNoise,
    ) -> None:
        super().__init__(replacement, inputs, z, given)
        self.noise = noise

    def _deltas(self, layer: int) -> dict[str, Float[Tensor, "batch seq"] | float] | None:
        if not self.replacement.variant.draws_delta:
            return super()._deltas(layer)
        return {path: self.noise.uniform(f"{path} delta") for path in self.replacement.paths[layer].values()}

    def _mask(self, layer: int, name: str, path: str, x: Tensor) -> Float[Tensor, "batch seq component"]:
        variant, model = self.replacement.variant, self.replacement.model
        n = model.sizes[path]
        g = model.lower(self.importance_logit(path, x)) if variant.gated else x.new_zeros(*x.shape[:-1], n)
        s = self.noise.uniform(path, n) if variant.source is None else torch.full_like(g, variant.source)
        m = g + (1 - g) * s
        self.keep(layer, name, path, x, m > 0)
        return m.to(x.dtype)


def spd_variants(
    target: TargetModel, decomposition: Decomposition, layers: Sequence[int], seed: int = 0
) -> list[Replacement]:
    """The decomposition under every mask variant but rounded, which `spd_replacements` has."""
    model, record = decomposition
    origin = Origin(record.seed, record.train_tokens, record.train_seconds, record.name)
    return [SPDVariant(target, model, name, layers=layers, origin=origin, seed=seed) for name in get_args(VariantName)]
