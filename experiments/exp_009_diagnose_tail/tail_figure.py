"""The tail's components as a table, in one figure and in words."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from logs import read_csv, write_csv
from pareto import ParetoPoint, markdown_table, read_points
from pareto_figure import STYLES, save_figure

COLUMNS = ("method", "k", "l0", "ce_degradation", "kl", "fvu")
PARTS = (("importance", 1), ("firing", 1), ("norm", 2))
LABELS = {"importance": "mean importance", "firing": "share of tokens, importance > 0", "norm": "‖U‖ ‖V‖"}
TABLE = "Kept of every matrix (k), components working per token and matrix (L0), and what that costs:"


class Component(NamedTuple):
    matrix: str
    rank: int  # by importance within its matrix, from 1
    importance: float  # mean g_lo
    firing: float  # share of tokens with g_lo > 0
    norm: float  # ‖U_c‖ ‖V_c‖


def write_components(path: Path, components: Sequence[Component]) -> None:
    rows = ([f"{v:.4g}" if isinstance(v, float) else v for v in component] for component in components)
    write_csv(path, Component._fields, rows)


def read_components(path: Path) -> list[Component]:
    rows = read_csv(path)
    return [Component(r["matrix"], int(r["rank"]), *(float(r[f]) for f in Component._fields[2:])) for r in rows]


def conclusion(rows: Sequence[Component], points: Sequence[ParetoPoint]) -> str:
    """What each matrix's components beyond the largest cut to at most half of them are worth, in words."""
    n = max(r.rank for r in rows) // 2
    half = max(p.k for p in points if p.k is not None and p.k <= n)
    tail = [r for r in rows if r.rank > half]
    shares = [sum(getattr(r, f) ** e for r in tail) / sum(getattr(r, f) ** e for r in rows) for f, e in PARTS]
    silent = sum(r.firing == 0 for r in tail) / len(tail)
    full = max(p.k or 0 for p in points)
    loss = {(p.method, p.k): p.ce_degradation for p in points}
    names = [m for m in dict.fromkeys(p.method for p in points) if (m, full) in loss]
    costs = "; ".join(f"{m} {loss[m, full]:+.3f} → {loss[m, half]:+.3f}" for m in names)
    return (
        f"The tail, what lies beyond the {half} most important of {full} components of every matrix, holds {shares[0]:.1%} "
        f"of all importance, {shares[1]:.1%} of all firing and {shares[2]:.1%} of all squared norm; {silent:.0%} of it never "
        f"fires. ΔCE with everything kept → with the tail cut: {costs}; kept in random order (open, delta) "
        f"{loss['spd-open-delta-random', half]:+.3f}."
    )


def draw(folder: Path, doc: str) -> None:
    """tail.png and README.md from components.csv and points.csv alone."""
    rows = read_components(folder / "components.csv")
    points = read_points(folder / "points.csv")
    figure, panels = plt.subplots(2, 2, figsize=(10.5, 7.2), layout="constrained")
    matrices = list(dict.fromkeys(r.matrix for r in rows))
    for panel, field in zip(panels.flat, ("importance", "firing", "norm")):
        for i, matrix in enumerate(matrices):
            own = [r for r in rows if r.matrix == matrix and getattr(r, field) > 0]
            colour = plt.get_cmap("viridis")(0.9 * (i // 2) / max(1, (len(matrices) - 1) // 2))
            panel.plot([r.rank for r in own], [getattr(r, field) for r in own], label=matrix, color=colour,
                       linestyle=("-", "--")[i % 2], linewidth=1.3)  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="rank by mean importance", ylabel=LABELS[field])
    panels[0][0].legend(fontsize=8, frameon=False)
    for method in dict.fromkeys(p.method for p in points):
        own = sorted((p for p in points if p.method == method), key=lambda p: p.k or 0)
        look = {"color": "#777777" if "random" in method else STYLES["spd"].colour if "gated" in method else "#D55E00"}
        look |= {"linestyle": "-" if "delta" in method else ":", "marker": "o" if "delta" in method else "^"}
        panels[1][1].plot([p.k for p in own], [p.ce_degradation for p in own], label=method, markersize=5, **look)
    panels[1][1].set_yscale("symlog", linthresh=0.1)
    panels[1][1].set(xscale="log", xlabel="components kept of every matrix", ylabel="ΔCE (nats per token)")
    panels[1][1].xaxis.set_minor_formatter(NullFormatter())
    panels[1][1].legend(fontsize=8, frameon=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e4e4e4", linewidth=0.7)
    save_figure(figure, folder / "tail.png")
    said = conclusion(rows, points)
    parts = ["# The tail of SPD", said, "![importance, firing, norm and ΔCE by rank](tail.png)", TABLE,
             markdown_table(points, COLUMNS), "```\n" + doc.strip() + "\n```"]  # fmt: skip
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")
    print(said)
