"""Rows, figure and table of exp_018: scores by sparsity, a colour per method."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from logs import read_csv
from metrics import average
from pareto_figure import save_figure
from study import write_readme

COLOURS = {
    "exact": "#000000", "lookup": "#8a8a8a", "transcoder": "#0072B2", "transcoder-skip": "#56B4E9", "clt": "#D55E00",
    "clt-own_layer": "#E69F00", "spd": "#009E73", "transcoder-frozen_encoder": "#CC79A7", "clt-frozen_encoder": "#7B3294",
}  # fmt: skip
PANELS = {
    "mediation": "mediation R (faithful: 1)", "bypass": "bypass B (faithful: 0)", "one_hop": "one-hop share H (faithful: 0)",
    "fvu": "FVU of the output y", "recall": "recall of planted neurons", "deep_recall": "recall behind layer 0",
}  # fmt: skip
BEHAVES = 0.05  # FVU of y up to which a replacement counts as behaving like the target


class Row(NamedTuple):
    """One method at one sparsity on one seed; the middle columns are those of `PathScores`."""

    method: str
    rule: str  # what decided its sparsity
    seed: int
    fvu: float
    accuracy: float
    local_fvu: float
    l0: float
    one_hop: float
    mediation: float
    bypass: float
    mediation_0: float
    mediation_1: float
    bypass_0: float
    bypass_1: float
    recall: float
    deep_recall: float
    seconds: float
    commit: str


Cell = tuple[str, str]  # a method and its rule


def by_setting(rows: Sequence[dict[str, str]]) -> dict[Cell, list[dict[str, str]]]:
    found: dict[Cell, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["rule"]), []).append(row)
    return found


def column(rows: Sequence[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def table(rows: Sequence[dict[str, str]]) -> str:
    """Means over seeds, with the least and the largest of the path's scores."""
    head = ["method", "sparsity", "seeds", "L0", "FVU of y", "accuracy", "R", "B", "H", "recall", "deep recall", "s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (method, rule), own in by_setting(rows).items():
        spans = [
            f"{average(values):.3f} ({min(values):.3f}–{max(values):.3f})"
            for values in (column(own, name) for name in ("mediation", "bypass", "one_hop"))
        ]
        l0, fvu, accuracy, recall, deep, seconds = (
            average(column(own, name)) for name in ("l0", "fvu", "accuracy", "recall", "deep_recall", "seconds")
        )
        cells = [method, rule, str(len(own)), f"{l0:.2f}", f"{fvu:.3f}", f"{accuracy:.3f}", *spans, f"{recall:.2f}"]
        lines.append(f"| {' | '.join([*cells, f'{deep:.2f}', f'{seconds:.0f}'])} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Means over seeds, bars from the least to the largest; hollow where y's FVU exceeds 0.05; dashed: BatchTopK."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = by_setting(rows)
    figure, grid = plt.subplots(2, 3, figsize=(13, 7.4), sharex=True, layout="constrained")
    for panel, (name, title) in zip(grid.flat, PANELS.items()):
        for method in dict.fromkeys(row["method"] for row in rows):
            colour = COLOURS.get(method, "#8a8a8a")
            for is_top_k in (False, True):
                cells = [own for (m, rule), own in found.items() if m == method and rule.startswith("k ") == is_top_k]
                marks = sorted((average(column(own, "l0")), own) for own in cells)
                if not marks:
                    continue
                x, values = [mark[0] for mark in marks], [column(mark[1], name) for mark in marks]
                line, y = "--" if is_top_k else "-", [average(own) for own in values]
                label = None if is_top_k else method
                panel.plot(x, y, line, color=colour, linewidth=1.4, label=label)
                panel.vlines(x, [min(own) for own in values], [max(own) for own in values], color=colour, alpha=0.6)
                for where, height, (_, own) in zip(x, y, marks):
                    shape = {"exact": "*", "lookup": "X"}.get(method, "o")
                    full = average(column(own, "fvu")) <= BEHAVES
                    panel.plot(where, height, shape, color=colour, fillstyle="full" if full else "none", markersize=6)
        panel.set(title=title, xscale="log")
        panel.grid(True, color="#e4e4e4", linewidth=0.7)
    for panel in grid[-1]:
        panel.set_xlabel("active parts per layer and token")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    save_figure(figure, path, dpi=100)


def redraw(folder: Path, text: str) -> None:
    """Figure and README from points.csv alone; `text` says what it is about, a notes.md there what was found."""
    rows = read_csv(folder / "points.csv")
    draw(rows, folder / "paths.png")
    write_readme(folder, "Planted paths", text, "![Scores by sparsity](paths.png)", table(rows))
