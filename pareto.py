"""Points of the trade-off between sparsity and damage: their columns, their CSV, dominance, and the table.

A point dominates another where it is no worse on both axes and better on one; both axes are costs (less is better).
Imports nothing of the project but the file writer, so that tables can be written again from `points.csv` alone.
"""

import csv
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from logs import atomic_path


@dataclass(frozen=True)
class ParetoPoint:
    """One row of points.csv: one method at one sparsity under one protocol. None (empty) where a column is void."""

    target: str
    method: str  # sae, transcoder, clt, spd, neurons, affine, identity, zero, mean, with a suffix for a variant
    layers: tuple[int, ...]  # layers replaced
    k: int | None  # parts per token and layer by construction
    seed: int | None
    protocol: str  # single, frozen, free
    tokens: int  # predicted tokens
    l0: float | None  # active parts per module
    l0_p95: float | None  # 95th percentile over tokens, mean over modules
    l0_per_mlp: float | None  # active parts that one replaced MLP's output is made of
    active_params: float | None  # parameters at work per token, all replaced layers together
    bits_per_token: float | None  # Σ_parts H(firing frequency) + 8 · L0, all replaced layers together
    ce: float  # nats per predicted token
    ce_degradation: float  # ce − the original's, nats
    ce_low: float  # 95 % bootstrap interval of ce_degradation, over sequences
    ce_high: float
    ce_recovered_zero: float | None  # 1: the original, 0: the same layers zero-ablated
    ce_recovered_mean: float | None
    kl: float  # KL(original ‖ replaced), nats per position
    fvu: float | None  # mean over replaced layers, against what the original wrote there
    mse: float | None  # per coordinate, mean over replaced layers
    dead: float | None  # share of parts silent for ≥ 1M tokens
    train_tokens: int | None
    gate_params: int | None  # parameters that decide what is active
    train_seconds: float | None
    checkpoint: str
    commit: str
    tail_p999: float | None = None  # 99.9th percentile over tokens of ‖y − ŷ‖ / ‖y‖, worst replaced layer
    tail_max: float | None = None


@dataclass(frozen=True)
class LayerPoint:
    """One row of layers.csv: one module of one layer in the point named by the first columns."""

    target: str
    method: str
    layers: tuple[int, ...]
    k: int | None
    seed: int | None
    protocol: str
    checkpoint: str
    layer: int
    module: str  # latents, neurons, a weight matrix; empty where nothing is sparse
    l0: float | None
    l0_median: int | None
    l0_p95: int | None
    fired: float | None  # share of the module's parts that were active at least once on the measured tokens
    fvu: float | None  # empty where the layer is read (a CLT's earlier ones) but not replaced
    mse: float | None
    tail_p999: float | None
    tail_max: float | None


# -------------------------------------------------------------------------------------------------------------- CSV


def _parser(hint: Any) -> Callable[[str], Any]:
    if isinstance(hint, UnionType):
        inner = _parser(next(arg for arg in get_args(hint) if arg is not type(None)))
        return lambda text: None if text == "" else inner(text)
    if hint == tuple[int, ...]:
        return lambda text: tuple(int(part) for part in text.split())
    return hint  # type: ignore[no-any-return]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(str(part) for part in value)
    return repr(value) if isinstance(value, float) else str(value)


def _write[Row: (ParetoPoint, LayerPoint)](path: Path, rows: Iterable[Row], kind: type[Row]) -> None:
    with atomic_path(Path(path)) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(kind))
        writer.writerows([_text(value) for value in dataclasses.astuple(row)] for row in rows)


def _read[Row: (ParetoPoint, LayerPoint)](path: Path, kind: type[Row]) -> list[Row]:
    parsers = {name: _parser(hint) for name, hint in get_type_hints(kind).items()}
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or list(reader.fieldnames) != list(parsers):
            raise ValueError(f"{path} does not have the columns of a {kind.__name__}: write it anew with evaluate")
        return [kind(**{name: parsers[name](row[name]) for name in parsers}) for row in reader]


def write_points(path: Path, points: Iterable[ParetoPoint]) -> None:
    """points.csv; floats are written so that they read back exactly."""
    _write(path, points, ParetoPoint)


def read_points(path: Path) -> list[ParetoPoint]:
    return _read(path, ParetoPoint)


def write_layers(path: Path, rows: Iterable[LayerPoint]) -> None:
    """layers.csv, beside points.csv."""
    _write(path, rows, LayerPoint)


def read_layers(path: Path) -> list[LayerPoint]:
    return _read(path, LayerPoint)


# -------------------------------------------------------------------------------------------------------- dominance


def dominates(a: ParetoPoint, b: ParetoPoint, x: str, y: str = "ce_degradation") -> bool:
    """a is no worse than b on both axes and better on one."""
    ax, ay, bx, by = getattr(a, x), getattr(a, y), getattr(b, x), getattr(b, y)
    return ax <= bx and ay <= by and (ax < bx or ay < by)


def front(points: Iterable[ParetoPoint], x: str, y: str = "ce_degradation") -> list[ParetoPoint]:
    """The points of one protocol that no other dominates, by rising x; points without the axis are left out."""
    points = [p for p in points if getattr(p, x) is not None]
    assert len({p.protocol for p in points}) <= 1, "a front compares points of one protocol"
    return sorted((p for p in points if not any(dominates(q, p, x, y) for q in points)), key=lambda p: getattr(p, x))


# ------------------------------------------------------------------------------------------------------------ table

TABLE = ("method", "k", "protocol", "layers", "l0", "l0_per_mlp", "active_params", "bits_per_token", "ce_degradation",
         "ce_recovered_mean", "kl", "fvu", "dead", "train_tokens", "gate_params")  # fmt: skip
HEADINGS = {
    "l0": "L0", "l0_p95": "L0 p95", "l0_per_mlp": "active per MLP", "active_params": "active parameters",
    "bits_per_token": "bits/token", "ce": "CE", "ce_degradation": "ΔCE [95 %]", "kl": "KL", "fvu": "FVU", "mse": "MSE",
    "ce_recovered_mean": "CE recovered (mean)", "ce_recovered_zero": "CE recovered (zero)",
    "train_tokens": "training tokens", "gate_params": "gate parameters", "train_seconds": "training s",
    "tail_p999": "‖e‖/‖y‖ p99.9", "tail_max": "‖e‖/‖y‖ max",
}  # fmt: skip


def markdown_table(points: Iterable[ParetoPoint], columns: Sequence[str] = TABLE) -> str:
    """A Markdown table of the points; ΔCE comes with its interval. Columns that are empty in every row are left out."""
    points = list(points)
    columns = [c for c in columns if any(getattr(p, c) not in (None, "") for p in points)]
    lines = ["| " + " | ".join(HEADINGS.get(c, c) for c in columns) + " |"]
    numeric = {c: all(isinstance(getattr(p, c), int | float | None) for p in points) for c in columns}
    lines.append("|" + "|".join("--:" if numeric[c] else ":--" for c in columns) + "|")
    lines += ["| " + " | ".join(_cell(p, c) for c in columns) + " |" for p in points]
    return "\n".join(lines)


def _cell(point: ParetoPoint, column: str) -> str:
    value = getattr(point, column)
    if column == "ce_degradation":
        return f"{value:.3f} [{point.ce_low:.3f}, {point.ce_high:.3f}]"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return _text(value)
