"""Points of the trade-off between sparsity and damage: their columns, their CSV and the table.

Imports nothing of the project but the file writer, so that tables can be written again from `points.csv` alone.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from logs import read_csv, write_csv


def column(heading: str, **options: Any) -> Any:
    """A field of a row with the heading that it bears in a printed table."""
    return field(metadata={"heading": heading}, **options)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What tells one measured row from another, beside its checkpoint."""

    target: str
    method: str  # sae, transcoder, clt, spd, neurons, affine, identity, zero, mean, with a suffix for a variant
    layers: tuple[int, ...]  # layers replaced
    k: int | None  # parts per token and layer by construction
    seed: int | None
    protocol: str  # single, frozen, gates, free


@dataclass(frozen=True, kw_only=True)
class ParetoPoint(Identity):
    """One row of points.csv: one method at one sparsity under one protocol. None (empty) where a column is void."""

    tokens: int  # predicted tokens
    l0: float | None = column("L0")  # active parts per module
    l0_p95: float | None = column("L0 p95")  # 95th percentile over tokens, mean over modules
    l0_per_mlp: float | None = column("active per MLP")  # active parts that one replaced MLP's output is made of
    active_params: float | None = column("active parameters")  # at work per token, all replaced layers together
    bits_per_token: float | None = column(
        "bits/token"
    )  # Σ_parts H(firing frequency) + 8 · L0, all replaced layers together
    ce: float = column("CE")  # nats per predicted token
    ce_degradation: float = column("ΔCE [95 %]")  # ce − the original's, nats
    ce_low: float  # 95 % bootstrap interval of ce_degradation, over documents
    ce_high: float
    ce_recovered_zero: float | None = column("CE recovered (zero)")  # 1: the original, 0: the same layers zero-ablated
    ce_recovered_mean: float | None = column("CE recovered (mean)")
    kl: float = column("KL")  # KL(original ‖ replaced), nats per position
    fvu: float | None = column("FVU")  # mean over replaced layers, against what the original wrote there
    mse: float | None = column("MSE")  # per coordinate, mean over replaced layers
    dead: (
        float | None
    )  # share of parts silent on these tokens, if they are a million, else in the last tenth of training
    train_tokens: int | None = column("training tokens")
    gate_params: int | None = column("gate parameters")  # parameters that decide what is active
    train_seconds: float | None = column("training s")
    checkpoint: str
    commit: str | None
    tail_p999: float | None = column(
        "‖e‖/‖y‖ p99.9", default=None
    )  # 99.9th percentile over tokens, worst replaced layer
    tail_max: float | None = column("‖e‖/‖y‖ max", default=None)
    documents: int | None = column("documents", default=None)  # independent ones that the tokens were cut from
    l0_by_layer: tuple[float, ...] | None = column("L0 by layer", default=None)  # mean over a layer's modules


@dataclass(frozen=True, kw_only=True)
class LayerPoint(Identity):
    """One row of layers.csv: one module of one layer in the point named by the first columns."""

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


@dataclass(frozen=True, kw_only=True)
class PairPoint(Identity):
    """One row of pairs.csv: how much more the row named by the first columns costs than another, on the same documents."""

    checkpoint: str
    other: str  # the other row's method
    other_k: int | None
    other_seed: int | None
    other_checkpoint: str
    difference: float  # CE − the other's CE, nats
    low: float  # its 95 % bootstrap interval over documents
    high: float


def row_key(row: ParetoPoint | LayerPoint) -> tuple[object, ...]:
    """What two rows share that say the same of the same thing: the identity and the checkpoint."""
    return (*(getattr(row, f.name) for f in dataclasses.fields(Identity)), row.checkpoint)


# -------------------------------------------------------------------------------------------------------------- CSV


def _parser(hint: Any) -> Callable[[str], Any]:
    if isinstance(hint, UnionType):
        inner = _parser(next(arg for arg in get_args(hint) if arg is not type(None)))
        return lambda text: None if text == "" else inner(text)
    if get_origin(hint) is tuple:
        return lambda text: tuple(get_args(hint)[0](part) for part in text.split())
    return hint  # type: ignore[no-any-return]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(str(part) for part in value)
    return repr(value) if isinstance(value, float) else str(value)


def _write[Row: (ParetoPoint, LayerPoint, PairPoint)](path: Path, rows: Iterable[Row], kind: type[Row]) -> None:
    columns = [f.name for f in dataclasses.fields(kind)]
    write_csv(path, columns, ([_text(value) for value in dataclasses.astuple(row)] for row in rows))


def _read[Row: (ParetoPoint, LayerPoint)](path: Path, kind: type[Row]) -> list[Row]:
    """Rows with the columns of `kind`; one that has a default may be absent. Raises ValueError naming a column that is not so."""
    parsers = {name: _parser(hint) for name, hint in get_type_hints(kind).items()}
    needed = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    rows = read_csv(path)
    for wrong in sorted({name for row in rows[:1] for name in (row.keys() - parsers.keys()) | (needed - row.keys())}):
        state = "unknown" if wrong in rows[0] else "missing"
        raise ValueError(f"{path}: column {wrong!r} of a {kind.__name__} is {state}: write it anew with measure.py")
    return [kind(**{name: parsers[name](text) for name, text in row.items()}) for row in rows]


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


def write_pairs(path: Path, rows: Iterable[PairPoint]) -> None:
    """pairs.csv, beside points.csv."""
    _write(path, rows, PairPoint)


# ------------------------------------------------------------------------------------------------------------ table

TABLE = ("method", "k", "protocol", "layers", "l0", "l0_by_layer", "l0_per_mlp", "active_params", "bits_per_token",
         "ce_degradation", "ce_recovered_mean", "kl", "fvu", "dead", "train_tokens", "gate_params")  # fmt: skip
HEADINGS = {f.name: f.metadata["heading"] for f in dataclasses.fields(ParetoPoint) if f.metadata}


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
    if column == "l0_by_layer" and value is not None:
        return " ".join(f"{part:.1f}" for part in value)
    return _text(value)
