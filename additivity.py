"""What the layers of a set cost together, as a share of the sum of what each costs alone: are their errors independent?

    A = ΔCE(all layers) / Σ_l ΔCE(layer l alone)      under `frozen` and under `free`

1 where errors add up; above 1 where a layer is thrown off by what an earlier one wrote; far below 1 where layers repair each
other, as sets do that were trained together on the model's output, and that are good only together.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from logs import write_csv
from metrics import average
from pareto import ParetoPoint

TOGETHER = ("frozen", "free")
NO_CODERS = ("identity", "affine", "mean", "zero", "neurons", "spd")
HEAD = (
    "| method | objective | k | seeds | L0 (free) | Σ single | frozen | free | A frozen | A free | training s |\n"
    + "|---" * 11
    + "|"
)


class Cost(NamedTuple):
    """ΔCE of one set of coders, in nats, under every protocol."""

    l0: float  # active parts per module, free
    single: float  # Σ over layers
    frozen: float
    free: float
    seconds: float

    def additivity(self, protocol: str) -> float | None:
        """Cost of all layers over the sum of each alone; None where layers alone cost nothing."""
        return getattr(self, protocol) / self.single if self.single > 0 else None


def split(method: str) -> tuple[str, str]:
    """(kind, objective): `transcoder-skip-kl-free-scratch` is a skip transcoder of `free-scratch`."""
    kind, _, trained_for = method.partition("-kl-")
    return kind, trained_for or "local"


def costs(points: Sequence[ParetoPoint]) -> dict[tuple[str, int | None], list[Cost]]:
    """(method, k) → one cost per seed."""
    sets: dict[tuple[str, int | None, int | None], list[ParetoPoint]] = {}
    for p in points:
        sets.setdefault((p.method, p.k, p.seed), []).append(p)
    found: dict[tuple[str, int | None], list[Cost]] = {}
    for (method, k, _), own in sets.items():
        alone = [p.ce_degradation for p in own if p.protocol == "single"]
        (frozen,), (free,) = ([p for p in own if p.protocol == protocol] for protocol in TOGETHER)
        seconds = free.train_seconds or 0.0
        cost = Cost(free.l0 or 0.0, sum(alone), frozen.ce_degradation, free.ce_degradation, seconds)
        found.setdefault((method, k), []).append(cost)
    return found


def mean_costs(points: Sequence[ParetoPoint]) -> dict[tuple[str, int | None], tuple[int, Cost]]:
    """(method, k) → number of seeds and the mean over them."""
    return {key: (len(own), Cost(*map(average, zip(*own)))) for key, own in costs(points).items()}


def additivity_table(points: Sequence[ParetoPoint]) -> str:
    """Means over seeds."""
    rows = [HEAD]
    for (method, k), (seeds, mean) in mean_costs(points).items():
        kind, trained_for = split(method)
        trained_for = trained_for if kind.split("-")[0] not in NO_CODERS else ""
        shares = [mean.additivity(protocol) for protocol in TOGETHER]
        cells = [
            kind, trained_for, "" if k is None else k, seeds, f"{mean.l0:.1f}" if mean.l0 else "",
            *(f"{value:.3f}" for value in (mean.single, mean.frozen, mean.free)),
            *("–" if share is None else f"{share:.2f}" for share in shares), f"{mean.seconds:,.0f}" if mean.seconds else "",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def write_additivity(path: Path, points: Sequence[ParetoPoint]) -> None:
    """The table as a CSV."""
    shares = tuple(f"additivity_{protocol}" for protocol in TOGETHER)
    rows = [
        (
            method,
            "" if k is None else k,
            seeds,
            *mean,
            *("" if (a := mean.additivity(p)) is None else a for p in TOGETHER),
        )
        for (method, k), (seeds, mean) in mean_costs(points).items()
    ]
    write_csv(path, ("method", "k", "seeds", *Cost._fields, *shares), rows)
