"""Sums over held-out tokens and the columns of the table that they become: activity, reconstruction error, intervals.

    FVU = E‖y − ŷ‖² / E‖y − E y‖²                         y: what the original model's MLP wrote, under every protocol
    bits per token = Σ_parts H(p) + 8 Σ_groups L0         H(p) = −p log₂ p − (1 − p) log₂(1 − p), p: firing frequency
    CE recovered = (CE_ablated − CE) / (CE_ablated − CE_original)

FVU, L0 and firing leave each sequence's first position out, which no replacement writes. Intervals are 95 % percentile
bootstraps over documents, whose sequences are drawn together: what two sequences of one file share is not counted twice.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from pareto import Identity, LayerPoint, PairPoint, ParetoPoint
from replacement import Active, Replacement

VALUE_BITS = 8  # stands for an active value until a measured quantisation replaces it


class _Error(NamedTuple):
    """Sums over one layer's tokens."""

    squared: list[Tensor]  # Σ‖y − ŷ‖², one number per batch
    ratio: list[Float[Tensor, "token"]]  # ‖y − ŷ‖ / ‖y‖


class _Count(NamedTuple):
    """One part group's activity, summed over tokens."""

    histogram: Int[Tensor, "l0"]  # tokens by their number of active parts
    fired: Int[Tensor, "part"]  # tokens on which each part was active


class Sums(NamedTuple):
    """What one run adds up over batches."""

    ce: list[Float[Tensor, "sequence"]]
    kl: list[Float[Tensor, "sequence"]]
    errors: dict[int, _Error]
    counts: dict[tuple[int, str], _Count]


class Draws(NamedTuple):
    """Documents drawn with replacement, as many as there are, again and again."""

    weights: Float[Tensor, "resample sequence"]  # how often the document of each sequence was drawn
    n_documents: int


def document_draws(documents: Int[Tensor, "sequence"], resamples: int, seed: int) -> Draws:
    """The bootstrap's draws of the documents that the sequences were cut from."""
    numbers = documents.unique(return_inverse=True)[1]
    n = int(numbers.max()) + 1
    drawn = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
    )
    return Draws(times[:, numbers], n)


def _zeros(n: int, device: torch.device) -> Int[Tensor, "n"]:
    return torch.zeros(n, dtype=torch.int64, device=device)


class Tally:
    """What one run adds up over the batches."""

    def __init__(self, replacement: Replacement, layers: Sequence[int], device: torch.device, given: int = 0) -> None:
        """`given`: parameters that compute what the replacement reads, beside its own."""
        self.replacement, self.layers, self.given = replacement, tuple(layers), given
        self.part_groups = replacement.part_groups(layers)
        counts = {
            (g.layer, g.name): _Count(_zeros(g.n_parts + 1, device), _zeros(g.n_parts, device))
            for g in self.part_groups
        }
        self.sums = Sums([], [], {layer: _Error([], []) for layer in layers}, counts)

    def add(self, later: Sums) -> None:
        """What the same run added up over the batches that come after these."""
        self.sums.ce.extend(later.ce)
        self.sums.kl.extend(later.kl)
        for layer, error in later.errors.items():
            self.sums.errors[layer].squared.extend(error.squared)
            self.sums.errors[layer].ratio.extend(error.ratio)
        for key, count in later.counts.items():
            self.sums.counts[key].histogram.add_(count.histogram)
            self.sums.counts[key].fired.add_(count.fired)

    def add_losses(self, ce: Float[Tensor, "batch"], kl: Float[Tensor, "batch"]) -> None:
        self.sums.ce.append(ce.cpu())
        self.sums.kl.append(kl.cpu())

    def add_error(self, layer: int, y: Float[Tensor, "batch seq d"], y_hat: Float[Tensor, "batch seq d"]) -> None:
        y = y[:, 1:].float()
        e = (y - y_hat[:, 1:].float()).square().sum(-1)
        self.sums.errors[layer].squared.append(e.sum(dtype=torch.float64))
        self.sums.errors[layer].ratio.append((e / y.square().sum(-1).clamp_min(1e-30)).sqrt().flatten().cpu())

    def add_activity(self, active: dict[tuple[int, str], Active], batch: int, seq: int) -> None:
        for key, count in self.sums.counts.items():
            rows, cols = active[key]
            cols = cols[rows % seq != 0]
            by_token = rearrange(torch.bincount(rows, minlength=batch * seq), "(batch seq) -> batch seq", seq=seq)
            l0 = by_token[:, 1:].flatten()
            count.histogram.add_(torch.bincount(l0, minlength=len(count.histogram)))
            count.fired.add_(torch.bincount(cols, minlength=len(count.fired)))

    @property
    def ce(self) -> Float[Tensor, "sequence"]:
        return torch.cat(self.sums.ce)

    @property
    def kl(self) -> Float[Tensor, "sequence"]:
        return torch.cat(self.sums.kl)

    @property
    def histograms(self) -> dict[tuple[int, str], Int[Tensor, "l0"]]:
        return {key: count.histogram.cpu() for key, count in self.sums.counts.items()}

    def l0(self, n: int) -> dict[tuple[int, str], float]:
        """Active parts per token of each part group, over n tokens."""
        return {key: (h * torch.arange(len(h))).sum().item() / n for key, h in self.histograms.items()}

    def firing(self, n: int) -> dict[tuple[int, str], Float[Tensor, "part"]]:
        """Each part's share of n tokens on which it was active."""
        return {key: count.fired.cpu().double() / n for key, count in self.sums.counts.items()}

    def squared_error(self, layer: int) -> float:
        return torch.stack(self.sums.errors[layer].squared).sum().item()

    def error_ratios(self, layer: int) -> Float[Tensor, "token"]:
        return torch.cat(self.sums.errors[layer].ratio)


class OriginalTally:
    """What the original model adds up over the batches: its cross-entropy, and the moments of what its MLPs wrote."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = list(layers)
        self._ce: list[Float[Tensor, "sequence"]] = []
        self.n = 0  # tokens, first positions left out
        self._total: Tensor | float = 0.0
        self._squared: Tensor | float = 0.0

    def add(self, ce: Float[Tensor, "batch"], y: Float[Tensor, "layer batch seq d"]) -> None:
        self._ce.append(ce.cpu())
        kept = y[:, :, 1:].double()
        self.n += kept.shape[1] * kept.shape[2]
        self._total = self._total + reduce(kept, "layer batch seq d -> layer d", "sum")
        self._squared = self._squared + reduce(kept.square(), "layer batch seq d -> layer", "sum")
        self.d = y.shape[-1]

    def join(self, later: "OriginalTally") -> None:
        """What it added up over the batches that come after these."""
        self._ce.extend(later._ce)
        self.n, self.d = self.n + later.n, later.d
        self._total, self._squared = self._total + later._total, self._squared + later._squared

    @property
    def ce(self) -> Float[Tensor, "sequence"]:
        return torch.cat(self._ce)

    def size(self, layer: int) -> float:
        """E‖y‖² of one layer."""
        return (self._squared[self._layers.index(layer)] / self.n).item()  # type: ignore[index]

    def variance(self, layer: int) -> float:
        """E‖y − E y‖² of one layer; 0 where it is lost in the rounding of E‖y‖²."""
        mean = self._total[self._layers.index(layer)] / self.n  # type: ignore[index]
        variance = self.size(layer) - mean.square().sum().item()
        return variance if variance > 1e-12 * self.size(layer) else 0.0


def layer_points(identity: Identity, tally: Tally, original: OriginalTally) -> list[LayerPoint]:
    """A row per part group, or per layer where nothing is sparse; errors are void where a layer is read but not replaced.

    FVU is void where the original wrote the same on every token, the tail where that was zero."""
    l0, firing, rows = tally.l0(original.n), tally.firing(original.n), []
    for layer, name in [(g.layer, g.name) for g in tally.part_groups] or [(layer, "") for layer in tally.layers]:
        key = (layer, name)
        rows.append(
            LayerPoint(
                **vars(identity),
                checkpoint=tally.replacement.origin.checkpoint,
                layer=layer,
                module=name,
                l0=l0.get(key),
                l0_median=_quantile(tally.histograms[key], 0.5) if key in l0 else None,
                l0_p95=_quantile(tally.histograms[key], 0.95) if key in l0 else None,
                fired=(firing[key] > 0).double().mean().item() if key in l0 else None,
                **_reconstruction(tally, original, layer)._asdict(),
            )
        )
    return rows


class _Reconstruction(NamedTuple):
    fvu: float | None = None
    mse: float | None = None
    tail_p999: float | None = None
    tail_max: float | None = None


def _reconstruction(tally: Tally, original: OriginalTally, layer: int) -> _Reconstruction:
    if layer not in tally.layers:
        return _Reconstruction()
    squared, ratios = tally.squared_error(layer) / original.n, tally.error_ratios(layer)
    rank = max(1, -(-len(ratios) * 999 // 1000))  # the smallest value that 99.9 % of the tokens do not exceed
    tail = ratios.kthvalue(rank).values.item(), ratios.max().item()
    variance = original.variance(layer)
    fvu = squared / variance if variance else None
    return _Reconstruction(fvu, squared / original.d, *(tail if original.size(layer) else (None, None)))


def point(
    identity: Identity,
    tally: Tally,
    original: OriginalTally,
    *,
    ablated: Sequence[Tally | None],
    draws: Draws,
    commit: str | None,
) -> ParetoPoint:
    """The row of one run. `ablated`: the same layers at zero and at their mean (or None); `draws`: the bootstrap's documents."""
    replacement, ce, n = tally.replacement, tally.ce, original.n
    l0, firing = tally.l0(n), tally.firing(n)
    errors = [_reconstruction(tally, original, layer) for layer in tally.layers]
    difference = ce - original.ce
    low, high = bootstrap_interval(difference, draws)
    recovered = [None if tally is None else ce_recovered(ce, original.ce, tally.ce) for tally in ablated]
    sparse, gates = bool(tally.part_groups), replacement.gate_parameters(tally.layers)
    parameters = replacement.active_parameters(l0, tally.layers) + tally.given
    return ParetoPoint(
        **vars(identity),
        tokens=n,
        documents=draws.n_documents,
        l0=average(list(l0.values())) if sparse else None,
        l0_p95=average([float(_quantile(h, 0.95)) for h in tally.histograms.values()]) if sparse else None,
        l0_per_mlp=sum(l0[g.layer, g.name] * g.writes for g in tally.part_groups) / len(tally.layers)
        if sparse
        else None,
        active_params=parameters if sparse or parameters else None,
        bits_per_token=_bits(l0, firing) if sparse else None,
        ce=ce.mean().item(),
        ce_degradation=difference.mean().item(),
        ce_low=low,
        ce_high=high,
        ce_recovered_zero=recovered[0],
        ce_recovered_mean=recovered[1],
        kl=tally.kl.mean().item(),
        fvu=_or_void(average, [e.fvu for e in errors]),
        mse=average([e.mse for e in errors]),
        dead=_dead(tally, firing, n) if sparse else None,
        train_tokens=replacement.origin.train_tokens,
        gate_params=None if gates is None else gates + tally.given,
        train_seconds=replacement.origin.train_seconds,
        checkpoint=replacement.origin.checkpoint,
        commit=commit,
        tail_p999=_or_void(max, [e.tail_p999 for e in errors]),
        tail_max=_or_void(max, [e.tail_max for e in errors]),
        l0_by_layer=_by_layer(l0) if sparse else None,
    )


def _by_layer(l0: dict[tuple[int, str], float]) -> tuple[float, ...]:
    """The mean over each layer's part groups."""
    layers = dict.fromkeys(layer for layer, _ in l0)
    return tuple(average([value for (own, _), value in l0.items() if own == layer]) for layer in layers)


def _bits(l0: dict[tuple[int, str], float], firing: dict[tuple[int, str], Float[Tensor, "part"]]) -> float:
    return sum(binary_entropy(p).sum().item() for p in firing.values()) + VALUE_BITS * sum(l0.values())


def _dead(tally: Tally, firing: dict[tuple[int, str], Float[Tensor, "part"]], n: int) -> float | None:
    """Silent on these tokens where they are a million; else what training saw last."""
    if n < 1_000_000:
        return tally.replacement.dead(tally.layers)
    return torch.cat([p == 0 for p in firing.values()]).double().mean().item()


def _quantile(histogram: Int[Tensor, "value"], q: float) -> int:
    """The smallest value that a share q of the tokens do not exceed."""
    return int(torch.searchsorted(histogram.cumsum(0).double(), q * histogram.sum().item()).item())


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _or_void(summary: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    """None where one of the values is."""
    known = [value for value in values if value is not None]
    return summary(known) if len(known) == len(values) else None


def ce_recovered(
    ce: Float[Tensor, "sequence"], original: Float[Tensor, "sequence"], ablated: Float[Tensor, "sequence"]
) -> float | None:
    """None where the ablation costs nothing, so that there is nothing to recover."""
    most, least, own = ablated.mean().item(), original.mean().item(), ce.mean().item()
    return (most - own) / (most - least) if most != least else None


def binary_entropy(p: Float[Tensor, "part"]) -> Float[Tensor, "part"]:
    """−p log₂ p − (1 − p) log₂(1 − p), in bits; 0 at 0 and 1."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / torch.log(torch.tensor(2.0, dtype=p.dtype))


def resampled_means(values: Float[Tensor, "sequence"], draws: Draws) -> Float[Tensor, "resample"]:
    """The mean over the sequences of the documents drawn, of each draw."""
    return draws.weights @ values.double() / draws.weights.sum(1)


def percentiles(means: Float[Tensor, "resample"]) -> tuple[float, float]:
    """The 2.5th and 97.5th."""
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def bootstrap_interval(values: Float[Tensor, "sequence"], draws: Draws) -> tuple[float, float]:
    """The 95 % percentile interval of the mean over documents."""
    return percentiles(resampled_means(values, draws))


def pair_points(rows: Sequence[tuple[Identity, Tally]], draws: Draws) -> list[PairPoint]:
    """The difference of every two rows in which all layers are replaced, under one protocol, on the same draws of documents;
    of those that were trained, with one seed."""
    whole = [(*row, resampled_means(row[1].ce, draws)) for row in rows if row[0].protocol != "single"]
    return [
        _pair(a, b) for i, a in enumerate(whole) for b in whole[i + 1 :]
        if (a[0].protocol, a[0].layers) == (b[0].protocol, b[0].layers)
        and (a[0].seed == b[0].seed or None in (a[0].seed, b[0].seed))
    ]  # fmt: skip


type _Resampled = tuple[Identity, Tally, Float[Tensor, "resample"]]


def _pair(first: _Resampled, second: _Resampled) -> PairPoint:
    (a, of_a, means), (b, of_b, others) = first, second
    low, high = percentiles(means - others)
    return PairPoint(
        target=a.target, protocol=a.protocol, layers=a.layers, method=a.method, k=a.k, seed=a.seed,
        other=b.method, other_k=b.k, other_seed=b.seed, difference=(of_a.ce - of_b.ce).mean().item(), low=low, high=high,
        checkpoint=of_a.replacement.origin.checkpoint, other_checkpoint=of_b.replacement.origin.checkpoint,
    )  # fmt: skip
