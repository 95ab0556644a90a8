"""Figure and tables of exp_015: cost by L0, a row of panels per kind of coder, a panel per protocol, a colour per objective."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from metrics import average
from pareto import ParetoPoint, markdown_table, read_points
from pareto_figure import ROWS, save_figure
from study import Report, summary, write_readme

COLOURS = {
    "local": "#333333", "single": "#0072B2", "frozen": "#009E73", "free": "#D55E00", "mixed": "#CC79A7",
}  # fmt: skip
BASELINES = ("identity", "affine", "mean", "zero", "neurons", "spd")
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

    def additivity(self, protocol: str) -> str:
        """Cost of all layers over the sum of each alone; void where layers alone cost nothing."""
        return f"{getattr(self, protocol) / self.single:.2f}" if self.single > 0 else "–"


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
        (frozen,), (free,) = ([p for p in own if p.protocol == protocol] for protocol in ("frozen", "free"))
        seconds = free.train_seconds or 0.0
        cost = Cost(free.l0 or 0.0, sum(alone), frozen.ce_degradation, free.ce_degradation, seconds)
        found.setdefault((method, k), []).append(cost)
    return found


def additivity_table(points: Sequence[ParetoPoint]) -> str:
    """Means over seeds."""
    rows = [HEAD]
    for (method, k), own in costs(points).items():
        mean = Cost(*map(average, zip(*own)))
        kind, trained_for = split(method)
        trained_for = trained_for if kind.split("-")[0] not in BASELINES else ""
        cells = [
            kind, trained_for, "" if k is None else k, len(own), f"{mean.l0:.1f}" if mean.l0 else "",
            *(f"{value:.3f}" for value in (mean.single, mean.frozen, mean.free)), mean.additivity("frozen"),
            mean.additivity("free"), f"{mean.seconds:,.0f}" if mean.seconds else "",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def draw(points: Sequence[ParetoPoint], path: Path) -> None:
    """`single` is the mean over layers. Dashed: from scratch. Bars span the seeds; grey crosses are SPD's thresholds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = costs(points)
    kinds = list(dict.fromkeys(split(method)[0] for method, _ in found if method.split("-")[0] not in BASELINES))
    layers = max(len(p.layers) for p in points)
    l0 = [cost.l0 for (method, _), own in found.items() if split(method)[0] in kinds for cost in own]
    wide = max(l0) > 2 * min(l0)  # one k alone needs no logarithm
    figure, grid = plt.subplots(
        len(kinds), 3, figsize=(11, 2.9 * len(kinds) + 0.7), sharex=True, sharey="col", squeeze=False, layout="constrained"
    )  # fmt: skip
    for row, kind in enumerate(kinds):
        for column, protocol in enumerate(("single", "frozen", "free")):
            panel, share = grid[row][column], layers if protocol == "single" else 1
            for method in dict.fromkeys(method for method, _ in found if split(method)[0] == kind):
                name = split(method)[1]
                by_k = [own for (other, _), own in found.items() if other == method]
                marks = sorted(
                    (average([c.l0 for c in own]), [getattr(c, protocol) / share for c in own]) for own in by_k
                )
                x, y = [mark[0] for mark in marks], [average(mark[1]) for mark in marks]
                look = {"color": COLOURS[name.split("-")[0]], "linestyle": "--" if name.endswith("scratch") else "-"}
                filled = "none" if name.endswith("scratch") else "full"
                panel.plot(x, y, marker="o", markersize=4, fillstyle=filled, label=name, **look)
                panel.vlines(x, *zip(*((min(mark[1]), max(mark[1])) for mark in marks)), color=look["color"], alpha=0.5)
            spd = [own[0] for (method, _), own in found.items() if method.split("-")[0] == "spd"]
            panel.plot(
                [c.l0 for c in spd], [getattr(c, protocol) / share for c in spd], "x", color="#8a8a8a", label="SPD"
            )
            panel.set(
                xscale="log" if wide else "linear", yscale="log", title=f"{kind}: {ROWS[protocol].partition(':')[0]}"
            )
            panel.grid(True, color="#e4e4e4", linewidth=0.7)
        grid[row][0].set_ylabel("ΔCE (nats per token)")
        grid[row][2].legend(fontsize=8, frameon=False)
    for panel in grid[-1]:
        panel.set_xlabel("active parts per module (free)")
    save_figure(figure, path)


@dataclass(frozen=True)
class ObjectiveReport(Report):
    """Its README shows the figure, what is additive, and all rows."""

    def redraw(self, folder: Path) -> None:
        points = read_points(folder / "points.csv")
        draw(points, folder / "objectives.png")
        below = ["![Cost by objective and protocol](objectives.png)", additivity_table(points), markdown_table(points)]
        write_readme(folder, self.title, self.text, *below)
        print(f"{summary(points)}\n\nAll {len(points)} rows, and the figure: {folder / 'README.md'}")
