"""Figure and tables of exp_015: cost by L0, a row of panels per kind of coder, a panel per protocol, a colour per objective."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from additivity import NO_CODERS, additivity_table, costs, split
from metrics import average
from pareto import ParetoPoint, markdown_table, read_points
from pareto_figure import ROWS, save_figure
from study import Report, summary, write_readme

COLOURS = {
    "local": "#333333", "single": "#0072B2", "frozen": "#009E73", "free": "#D55E00", "mixed": "#CC79A7",
}  # fmt: skip


def draw(points: Sequence[ParetoPoint], path: Path) -> None:
    """`single` is the mean over layers. Dashed: from scratch. Bars span the seeds; grey crosses are SPD's thresholds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = costs(points)
    kinds = list(dict.fromkeys(split(method)[0] for method, _ in found if method.split("-")[0] not in NO_CODERS))
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
            if spd:
                costs_of_spd = [getattr(c, protocol) / share for c in spd]
                panel.plot([c.l0 for c in spd], costs_of_spd, "x", color="#8a8a8a", label="SPD")
            if not wide:
                panel.set_xlim(0.5 * min(l0), 1.5 * max(l0))
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
