"""Sums over held-out tokens and the columns of the table that they become: activity, reconstruction error, intervals.

    FVU = E‖y − ŷ‖² / E‖y − E y‖²                         y: what the original model's MLP wrote, under every protocol
    bits per token = Σ_parts H(p) + 8 Σ_groups L0         H(p) = −p log₂ p − (1 − p) log₂(1 − p), p: firing frequency
    CE recovered = (CE_ablated − CE) / (CE_ablated − CE_original)

FVU, L0 and firing leave each sequence's first position out, which no replacement writes. Intervals are 95 % percentile
bootstraps over sequences.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement import Active, PartGroup, Replacement

VALUE_BITS = 8  # stands for an active value until a measured quantisation replaces it


class _Error(NamedTuple):
    """Sums over one layer's tokens."""

    squared: list[Tensor]  # Σ‖y − ŷ‖², one number per batch
    ratio: list[Float[Tensor, "token"]]  # ‖y − ŷ‖ / ‖y‖


class _Count(NamedTuple):
    """One module's activity, summed over tokens."""

    histogram: Int[Tensor, "l0"]  # tokens by their number of active parts
    fired: Int[Tensor, "part"]  # tokens on which each part was active


def _zeros(n: int, device: torch.device) -> Int[Tensor, "n"]:
    return torch.zeros(n, dtype=torch.int64, device=device)


class Tally:
    """What one run adds up over the batches."""

    def __init__(self, groups: Sequence[PartGroup], layers: Sequence[int], device: torch.device) -> None:
        self.part_groups = groups
        self.ce: list[Float[Tensor, "sequence"]] = []
        self.kl: list[Float[Tensor, "sequence"]] = []
        self.errors = {layer: _Error([], []) for layer in layers}
        self.counts = {
            (m.layer, m.name): _Count(_zeros(m.n_parts + 1, device), _zeros(m.n_parts, device)) for m in groups
        }

    def add_error(self, layer: int, y: Float[Tensor, "batch seq d"], y_hat: Float[Tensor, "batch seq d"]) -> None:
        y = y[:, 1:].float()
        e = (y - y_hat[:, 1:].float()).square().sum(-1)
        self.errors[layer].squared.append(e.sum(dtype=torch.float64))
        self.errors[layer].ratio.append((e / y.square().sum(-1).clamp_min(1e-30)).sqrt().flatten().cpu())

    def add_activity(self, active: dict[tuple[int, str], Active], batch: int, seq: int) -> None:
        for key, count in self.counts.items():
            rows, cols = active[key]
            cols = cols[rows % seq != 0]
            l0 = torch.bincount(rows, minlength=batch * seq).view(batch, seq)[:, 1:].flatten()
            count.histogram.add_(torch.bincount(l0, minlength=len(count.histogram)))
            count.fired.add_(torch.bincount(cols, minlength=len(count.fired)))


class Moments:
    """Σ y and Σ‖y‖² of what the original's MLPs wrote, first positions left out."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = list(layers)
        self.n = 0
        self.total: Tensor | float = 0.0
        self.squared: Tensor | float = 0.0

    def add(self, y: Float[Tensor, "layer batch seq d"]) -> None:
        kept = y[:, :, 1:].flatten(1, 2).double()
        self.n += kept.shape[1]
        self.total = self.total + kept.sum(1)
        self.squared = self.squared + kept.square().sum((1, 2))
        self.d = y.shape[-1]

    def variance(self, layer: int) -> float:
        i = self.layers.index(layer)
        return (self.squared[i] / self.n - (self.total[i] / self.n).square().sum()).item()  # type: ignore[index]


class _Detail(NamedTuple):
    layer: int
    module: str
    l0: float | None
    l0_median: int | None
    l0_p95: int | None
    fired: float | None
    fvu: float | None
    mse: float | None
    tail_p999: float | None
    tail_max: float | None


class _Summary(NamedTuple):
    l0: float | None
    l0_p95: float | None
    l0_per_mlp: float | None
    active_params: float | None
    bits_per_token: float | None
    dead: float | None
    details: list[_Detail]


def summarise(tally: Tally, moments: Moments, replacement: Replacement, layers: Sequence[int]) -> _Summary:
    n = moments.n
    histograms = {key: count.histogram.cpu() for key, count in tally.counts.items()}
    l0 = {key: (h * torch.arange(len(h))).sum().item() / n for key, h in histograms.items()}
    fired = {key: count.fired.cpu().double() / n for key, count in tally.counts.items()}
    details: list[_Detail] = []
    for m in tally.part_groups or [PartGroup(layer, "", 0, 1, 0) for layer in layers]:
        key, activity = (m.layer, m.name), (None, None, None, None)
        if key in l0:
            median, p95 = (_quantile(histograms[key], q) for q in (0.5, 0.95))
            activity = (l0[key], median, p95, (fired[key] > 0).double().mean().item())
        details.append(_Detail(m.layer, m.name, *activity, *_reconstruction(tally, moments, m.layer)))
    if not tally.part_groups:
        dense = replacement.dense_parameters(layers)
        return _Summary(None, None, None, float(dense) if dense else None, None, None, details)
    bits = sum(binary_entropy(p).sum().item() for p in fired.values()) + VALUE_BITS * sum(l0.values())
    silent = torch.cat([p == 0 for p in fired.values()]).double().mean().item()
    return _Summary(
        l0=average(list(l0.values())),
        l0_p95=average([float(_quantile(h, 0.95)) for h in histograms.values()]),
        l0_per_mlp=sum(l0[m.layer, m.name] * m.writes for m in tally.part_groups) / len(layers),
        active_params=replacement.active_parameters(l0, layers),
        bits_per_token=bits,
        dead=silent if n >= 1_000_000 else replacement.dead(),
        details=details,
    )


def _reconstruction(
    tally: Tally, moments: Moments, layer: int
) -> tuple[float, float, float, float] | tuple[None, None, None, None]:
    """FVU, MSE and the residual's tail of one layer; void where it is read but not replaced."""
    if layer not in tally.errors:
        return None, None, None, None
    squared = torch.stack(tally.errors[layer].squared).sum().item() / moments.n
    ratio = torch.cat(tally.errors[layer].ratio)
    rank = max(1, -(-len(ratio) * 999 // 1000))  # the smallest value that 99.9 % of the tokens do not exceed
    variance = moments.variance(layer)
    return squared / variance, squared / moments.d, ratio.kthvalue(rank).values.item(), ratio.max().item()


def _quantile(histogram: Int[Tensor, "value"], q: float) -> int:
    """The smallest value that a share q of the tokens do not exceed."""
    return int(torch.searchsorted(histogram.cumsum(0).double(), q * histogram.sum().item()).item())


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ce_recovered(ce: float, original: float, ablated: float) -> float | None:
    """None where the ablation costs nothing, so that there is nothing to recover."""
    return (ablated - ce) / (ablated - original) if ablated != original else None


def binary_entropy(p: Float[Tensor, "part"]) -> Float[Tensor, "part"]:
    """−p log₂ p − (1 − p) log₂(1 − p), in bits; 0 at 0 and 1."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / torch.log(torch.tensor(2.0, dtype=p.dtype))


def bootstrap_interval(
    values: Float[Tensor, "sequence"], draws: Int[Tensor, "resample sequence"]
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentiles of the mean over resampled sequences."""
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
