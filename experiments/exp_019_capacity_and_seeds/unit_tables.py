"""Rows of exp_019, and its tables in words: cost, live units, decoder cosines and children by capacity."""

from collections.abc import Sequence
from typing import NamedTuple

from metrics import average

RHO = (1e-6, 1e-5, 1e-4, 1e-3)  # shares of tokens
MATCHED = 0.7  # cosine from which a unit counts as found again

Rows = Sequence[dict[str, str]]


class Cost(NamedTuple):
    """What a dictionary of all layers costs in place of the MLPs, in nats."""

    method: str
    capacity: float
    units: int  # latents per layer, components per matrix
    seed: int
    single: float  # Σ over layers, each alone
    free: float
    free_low: float
    free_high: float
    l0: float
    fvu: float  # mean over layers
    train_tokens: int


class Alive(NamedTuple):
    method: str
    capacity: float  # 0: not part of the ladder
    module: str  # a layer's latents, or a matrix
    units: int
    rule: str  # fires; g > τ; mean g
    rho: float  # the rate, or the mean importance, that is exceeded
    alive: int
    effective: float | None  # exp of the entropy of the units' shares of Σ a ‖d‖; None: not measured
    tokens: int


class Neighbours(NamedTuple):
    """Decoder cosines of live units, `within` a dictionary or across two seeds."""

    method: str
    capacity: float
    layer: int
    seed: int
    other: str  # within, or the other seed
    units: int  # live ones of the first
    mean: float
    matched: float  # share with a cosine above MATCHED


class Children(NamedTuple):
    """Of units at capacity 1×: similar units of another dictionary."""

    method: str
    layer: int
    capacity: float  # of the other dictionary
    against: str  # larger: of the same seed; null: of another seed
    rule: str  # jaccard or contained
    parents: int  # live ones
    mean: float  # children per parent
    any: float  # share of the parents with a child
    several: float  # with two or more


def mean_of(rows: Rows, value: str, **of: str) -> float:
    """Over the rows of which all this is so."""
    return average([float(row[value]) for row in rows if all(row[key] == text for key, text in of.items())])


def distinct(rows: Rows, column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def ladder(rows: Rows, method: str) -> list[str]:
    return sorted(
        {row["capacity"] for row in rows if row["method"] == method and float(row["capacity"]) > 0}, key=float
    )


def cost_table(costs: Rows) -> str:
    lines = ["| | capacity | units | seeds | L0 | FVU | Σ single | free (least–largest seed) |", "|---" * 8 + "|"]
    for method, capacity in dict.fromkeys((row["method"], row["capacity"]) for row in costs):
        own = [row for row in costs if (row["method"], row["capacity"]) == (method, capacity)]
        free = [float(row["free"]) for row in own]
        middle = (f"{mean_of(own, column):.{n}f}" for column, n in (("l0", 1), ("fvu", 3), ("single", 3)))
        span = f"{average(free):.3f} ({min(free):.3f}–{max(free):.3f})"
        lines.append(
            f"| {' | '.join([method, f'{float(capacity):g}×', own[0]['units'], str(len(own)), *middle, span])} |"
        )
    return "\n".join(lines)


def alive_table(alive: Rows) -> str:
    """Sums over the examined modules, as a share of their units; by every rule."""
    rates = distinct(alive, "rho")
    head = ["", "capacity", "units", "rule", *(f"> {float(rho):g}" for rho in rates), "effective"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, capacity, rule in dict.fromkeys((row["method"], row["capacity"], row["rule"]) for row in alive):
        own = [r for r in alive if (r["method"], r["capacity"], r["rule"]) == (method, capacity, rule)]
        by_rho = {rho: [r for r in own if r["rho"] == rho] for rho in rates}
        units = sum(int(r["units"]) for r in by_rho[rates[0]])
        cells = [f"{sum(int(r['alive']) for r in rows) / units:.1%}" for rows in by_rho.values()]
        effective = [float(r["effective"]) for r in by_rho[rates[0]] if r["effective"]]
        size = f"{float(capacity):g}×" if float(capacity) else ""
        lines.append(
            f"| {' | '.join([method, size, str(units), rule, *cells, f'{sum(effective):.0f}' if effective else ''])} |"
        )
    return "\n".join(lines)


def neighbour_table(neighbours: Rows) -> str:
    lines = ["| | capacity | live units | nearest within | assigned across seeds | above 0.7 |", "|---" * 6 + "|"]
    for method in distinct(neighbours, "method"):
        for capacity in ladder(neighbours, method):
            own = [row for row in neighbours if (row["method"], row["capacity"]) == (method, capacity)]
            across = [row for row in own if row["other"] != "within"]
            cells = [f"{mean_of(own, column, other='within'):.{n}f}" for column, n in (("units", 0), ("mean", 3))]
            cells += [f"{mean_of(across, 'mean'):.3f}", f"{mean_of(across, 'matched'):.1%}"] if across else ["", ""]
            lines.append(f"| {' | '.join([method, f'{float(capacity):g}×', *cells])} |")
    return "\n".join(lines)


def children_table(children: Rows) -> str:
    lines = ["| | capacity | against | rule | children per unit | of units with any | with several |", "|---" * 7 + "|"]
    for key in dict.fromkeys((row["method"], row["capacity"], row["against"], row["rule"]) for row in children):
        own = [r for r in children if (r["method"], r["capacity"], r["against"], r["rule"]) == key]
        cells = [f"{mean_of(own, 'mean'):.2f}", f"{mean_of(own, 'any'):.1%}", f"{mean_of(own, 'several'):.1%}"]
        lines.append(f"| {' | '.join([key[0], f'{float(key[1]):g}×', *key[2:], *cells])} |")
    return "\n".join(lines)
