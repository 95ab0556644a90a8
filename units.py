"""The units of a decomposition, and what each says: when it is active, what it writes, which tokens that makes more likely.

A unit is a latent of a dictionary, or a component of a weight matrix (SPD). Its activation a is the size of what it writes:

    latent      a = code · ‖w‖,               w: its decoder, raw units; of a CLT √(Σ_j ‖w_j‖²) over the layers it writes to
    component   a = (x V_c) · ‖U_c‖ where its causal importance is above 0; signed so that it is positive on the whole

Its direction is what a unit with a = 1 adds to the residual stream: w / ‖w‖; of a CLT Σ_j w_j over their common size; of a
component of a first matrix what W_down makes of U_c / ‖U_c‖, as if neurons were linear.
"""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from coder import Coder
from coder_replacements import CoderReplacement
from patching import Captured, kept_streams, patched, resumed
from replacement import Replacement
from spd_replacement import SPDReplacement
from target_models import TargetModel, at_site
from unit_activity import Events

CHUNK = 2**24  # entries of the largest product that is held at once
STEP = 0.1


@dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """Units that stand side by side: latents of a layer, or components of a weight matrix; all of them, or a sample."""

    method: str
    layer: int
    part: str  # "latents", or the weight matrix
    total: int  # latents of the layer, components of the matrix
    numbers: Int[Tensor, "unit"]  # which of these, ascending
    directions: Float[Tensor, "unit d_model"]
    sizes: Float[Tensor, "unit"]  # ‖w‖ or ‖U_c‖
    targets: tuple[int, ...] = ()  # layers that a latent writes to
    target_sizes: Float[Tensor, "unit target"] | None = None  # ‖w_j‖; None: a component


class Related(NamedTuple):
    """Other units that have to do with one, first the nearest."""

    units: Int[Tensor, "unit n"]
    cosines: Float[Tensor, "unit n"]


class Units(ABC):
    """The units of one replacement, in groups; which of them are active where."""

    replacement: Replacement
    groups: list[UnitGroup]

    @abstractmethod
    def events(self, captured: Captured) -> list[Events]:
        """Of each group, on a clean pass that spans the replacement's `reads` and `watches`; first positions don't count."""

    @abstractmethod
    def partners(self, n: int) -> list[Related]:
        """Of each group, at most n of each unit, counted through the replacement's groups; none where there is no such thing."""


def drawn_numbers(total: int, most: int) -> Int[Tensor, "unit"]:
    """All of 0…total − 1, or `most` of them drawn evenly: the same on every call."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:most].sort().values


class Latents(Units):
    """Of coders: the latents of every layer they span."""

    def __init__(self, replacement: CoderReplacement, most: int) -> None:
        self.replacement: CoderReplacement = replacement
        name = f"{replacement.method} k={replacement.k}" if replacement.k else replacement.method
        self.groups = [
            self._group(name, coder, i, most) for coder in replacement.members for i in range(len(coder.config.layers))
        ]

    def _group(self, method: str, coder: Coder[Any], i: int, most: int) -> UnitGroup:
        c = coder.config
        numbers = drawn_numbers(c.d_dict, most).to(coder.decoders[i].device)
        W = coder.decoders[i].detach()[numbers].float().view(len(numbers), -1, c.d_out) / coder.y_scale[i:, None]
        norms = W.norm(dim=-1)
        sizes = norms.norm(dim=-1)
        directions = W.sum(1) / sizes.clamp_min(1e-12)[:, None]
        return UnitGroup(
            method=method, layer=c.layers[i], part="latents", total=c.d_dict, numbers=numbers, directions=directions, sizes=sizes,
            targets=c.layers[i:], target_sizes=norms,
        )  # fmt: skip

    def events(self, captured: Captured) -> list[Events]:
        pass_, seq, found = self.replacement.frozen(captured), captured.inputs.shape[2], []
        for group in self.groups:
            codes = pass_.encode(group.layer)
            at = torch.full((group.total,), -1, device=codes.cols.device).index_copy_(
                0, group.numbers, torch.arange(len(group.numbers), device=codes.cols.device)
            )
            own = at[codes.cols]
            kept = (own >= 0) & (codes.rows % seq != 0)
            own = own[kept]
            found.append(Events.of(own, codes.rows[kept], codes.values[kept] * group.sizes[own]))
        return found

    def partners(self, n: int) -> list[Related]:
        return [_unrelated(len(group.numbers)) for group in self.groups]


class RankOneParts(Units):
    """Of SPD: the components of every decomposed matrix of its MLPs."""

    def __init__(self, replacement: SPDReplacement, most: int) -> None:
        self.replacement: SPDReplacement = replacement
        pairs = [(layer, *pair) for layer, paths in replacement.paths.items() for pair in paths.items()]
        self.paths = [path for _, _, path in pairs]
        self.groups = [self._group(layer, name, path, most) for layer, name, path in pairs]

    def _group(self, layer: int, name: str, path: str, most: int) -> UnitGroup:
        target, U = self.replacement.target, self.replacement.model.components[path].U.detach()
        numbers = drawn_numbers(len(U), most).to(U.device)
        directions = normalize(U[numbers], dim=-1)
        if path != target.mlps[layer].down:
            directions = directions @ target.down_weight(layer).detach().float().T
        return UnitGroup(
            method=self.replacement.method, layer=layer, part=name, total=len(U), numbers=numbers, directions=directions,
            sizes=U[numbers].norm(dim=-1),
        )  # fmt: skip

    def events(self, captured: Captured) -> list[Events]:
        inputs, z = self.replacement.clean_importances(captured)
        found = []
        for path, group in zip(self.paths, self.groups):
            on = self.replacement.on(path, z[path])[..., group.numbers]
            on[:, 0] = False
            places, units = on.flatten(0, 1).nonzero().unbind(1)
            h = self.replacement.model.component_activations(path, inputs[path])[..., group.numbers].flatten(0, 1)
            found.append(Events.of(units, places, h[places, units] * group.sizes[units]))
        return found

    def partners(self, n: int) -> list[Related]:
        """By the cosine, of either sign, of what one writes to the neurons of its layer with what the other reads of them."""
        starts = list(itertools.accumulate((len(group.numbers) for group in self.groups), initial=0))
        found = []
        for i, group in enumerate(self.groups):
            others = [
                j
                for j, other in enumerate(self.groups)
                if other.layer == group.layer and self._down(i) != self._down(j)
            ]
            if not others:
                found.append(_unrelated(len(group.numbers)))
                continue
            ids = torch.cat([torch.arange(starts[j], starts[j + 1]) for j in others])
            cosines = (self._on_neurons(i) @ torch.cat([self._on_neurons(j) for j in others]).T).cpu()
            best = cosines.abs().topk(min(n, len(ids))).indices
            found.append(Related(ids[best], cosines.gather(1, best)))
        return found

    def _down(self, i: int) -> bool:
        """Whether a group's matrix reads the neurons, and does not write them."""
        return self.paths[i] == self.replacement.target.mlps[self.groups[i].layer].down

    def _on_neurons(self, i: int) -> Float[Tensor, "unit neuron"]:
        part = self.replacement.model.components[self.paths[i]]
        return normalize((part.V.mT if self._down(i) else part.U).detach()[self.groups[i].numbers], dim=-1)


def _unrelated(n: int) -> Related:
    return Related(torch.zeros(n, 0, dtype=torch.int64), torch.zeros(n, 0))


def units_of(replacement: CoderReplacement | SPDReplacement, most: int) -> Units:
    """At most so many of each layer or matrix."""
    return RankOneParts(replacement, most) if isinstance(replacement, SPDReplacement) else Latents(replacement, most)


# ---------------------------------------------------------------------------------------------------- what they say


@torch.no_grad()
def logit_jacobian(target: TargetModel, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "d_model vocab"]:
    """Mean over positions of ∂ logits / ∂ the residual stream after the last block: the direct path, with the last norm
    linearised at this text. First positions don't count; `target` is the target itself, not a view at another site.

    By central differences of `STEP` times the size of a stream's coordinates: along one of d coordinates a norm is straight up to
    about STEP² / d, and logits are float32."""
    last, d_model = target.n_layers - 1, target.d_model
    at_once = max(1, min(d_model, CHUNK // (tokens.numel() * target.vocab_size)))
    view, repeated = at_site(target, "resid"), tokens.repeat(at_once, 1)
    with kept_streams(target, [last]) as streams:
        target.logits(repeated)

    def moved(along: Float[Tensor, "direction d_model"], steps: float) -> Float[Tensor, "direction batch seq vocab"]:
        """Logits with each stream so many of its root mean squares further."""
        each = along.repeat_interleave(len(tokens), 0)[:, None]
        sizes = {}

        def further(x: Tensor, y: Tensor) -> Tensor:
            sizes["rms"] = y.square().mean(-1, keepdim=True).sqrt()
            return y + steps * sizes["rms"] * each

        with patched(view, {last: further}):
            logits = target.logits(repeated) / (2 * steps * sizes["rms"])
        return rearrange(logits, "(direction batch) seq vocab -> direction batch seq vocab", batch=len(tokens))

    rows = []
    with resumed(target, last, streams.get(last)):
        for some in torch.eye(d_model, device=target.device).split(at_once):
            along = torch.cat([some, some.new_zeros(at_once - len(some), d_model)])
            change = moved(along, STEP) + moved(along, -STEP)
            rows.append(change[: len(some), :, 1:].mean((1, 2)))
    return torch.cat(rows)


class LogitEffects(NamedTuple):
    """Tokens whose logits units raise and lower most, and by how much, in nats, less the mean over the vocabulary."""

    promoted: Int[Tensor, "unit n"]
    promotion: Float[Tensor, "unit n"]  # largest first
    suppressed: Int[Tensor, "unit n"]
    suppression: Float[Tensor, "unit n"]  # smallest first


def logit_effects(
    writes: Float[Tensor, "unit d_model"], jacobian: Float[Tensor, "d_model vocab"], n: int
) -> LogitEffects:
    """What adding `writes` to the residual stream does to the logits by the direct path, to first order."""
    centred = jacobian - jacobian.mean(1, keepdim=True)
    found = []
    for some in writes.split(max(1, CHUNK // centred.shape[1])):
        effect = some @ centred
        up, down = effect.topk(n), effect.topk(n, largest=False)
        found.append((up.indices, up.values, down.indices, down.values))
    return LogitEffects(*(torch.cat(side) for side in zip(*found)))


def nearest(directions: Float[Tensor, "unit d_model"], counts: Int[Tensor, "unit"], n: int) -> Related:
    """Other units, among those ever active, whose directions have the largest cosine with a unit's."""
    ways, ids = normalize(directions, dim=-1), torch.arange(len(directions), device=directions.device)
    n, chunk = min(n, len(directions) - 1), max(1, CHUNK // len(ways))
    found = []
    for some, own in zip(ways.split(chunk), ids.split(chunk)):
        cosines = (some @ ways.T).masked_fill_(counts == 0, -2.0).scatter_(1, own[:, None], -3.0)
        found.append(cosines.topk(n))
    return Related(torch.cat([part.indices for part in found]), torch.cat([part.values for part in found]))
