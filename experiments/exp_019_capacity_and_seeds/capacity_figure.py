"""Figure and README of exp_019: cost, live units, decoder cosines and children by capacity."""

from pathlib import Path

from unit_tables import Rows, alive_table, children_table, cost_table, distinct, ladder, mean_of, neighbour_table

from logs import read_csv
from metrics import average
from pareto_figure import STYLES, base, save_figure
from study import write_readme

LEVELS = (0.1, 0.2, 0.3, 0.5, 1, 2, 5)  # ticks, nats
RHO_STYLE = {"1e-06": "-", "1e-05": "--", "0.0001": "-.", "0.001": ":"}


def redraw(folder: Path, text: str) -> None:
    """Figure and README from the tables alone; `text` says what it is about, a notes.md there what was found."""
    costs, alive, neighbours, children = (
        read_csv(folder / f"{name}.csv") for name in ("costs", "alive", "neighbours", "children")
    )
    draw(costs, alive, neighbours, children, folder / "capacity.png")
    first = cost_table(costs)
    others = [alive_table(alive), neighbour_table(neighbours), children_table(children)]
    write_readme(folder, "Capacity and seeds", text, "![By capacity](capacity.png)", first, *others)
    print(f"{first}\n\nAll tables, and the figure: {folder / 'README.md'}")


def draw(costs: Rows, alive: Rows, neighbours: Rows, children: Rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    (cost, live, spd), (cosine, jaccard, contained) = grid
    for method in distinct(costs, "method"):
        style, rungs = STYLES[base(method)], ladder(costs, method)
        own = {c: [float(r["free"]) for r in costs if (r["method"], r["capacity"]) == (method, c)] for c in rungs}
        x = [float(c) for c in rungs]
        cost.plot(x, [average(v) for v in own.values()], style.marker + "-", color=style.colour, label=method)
        cost.vlines(x, [min(v) for v in own.values()], [max(v) for v in own.values()], color=style.colour, alpha=0.6)
    cost.set(title="cost in place of the MLPs, free", ylabel="ΔCE (nats per token)", yscale="log")

    def shares(panel, method: str, rule: str, rho: str, line: str, colour: str, label: str | None) -> None:
        rungs = ladder(alive, method)
        picked = [
            [r for r in alive if (r["method"], r["capacity"], r["rule"], r["rho"]) == (method, c, rule, rho)]
            for c in rungs
        ]
        y = [sum(int(r["alive"]) for r in rows) / sum(int(r["units"]) for r in rows) for rows in picked]
        panel.plot([float(c) for c in rungs], y, line, marker=".", color=colour, label=label)

    coders = [m for m in distinct(alive, "method") if not m.startswith("spd")]
    for method in coders:
        for rho, line in RHO_STYLE.items():
            shares(live, method, "fires", rho, line, STYLES[base(method)].colour, f"{method}, ρ = {float(rho):g}")
    live.set(title="latents that fire on a share > ρ of tokens", ylabel="share alive", ylim=(0, 1.03))
    if ladder(alive, "spd"):
        rules = [rule for rule in distinct(alive, "rule") if rule != "fires"]
        for rule, colour in zip(rules, ("#009E73", "#0072B2", "#D55E00", "#333333")):
            for rho in ("1e-06", "0.001"):
                shares(spd, "spd", rule, rho, RHO_STYLE[rho], colour, f"{rule}, ρ = {float(rho):g}")
    spd.set(title="components of SPD, by both rules", ylabel="share alive", ylim=(0, 1.03))
    for method in distinct(neighbours, "method"):
        rungs, style = ladder(neighbours, method), STYLES[base(method)]
        within = [mean_of(neighbours, "mean", method=method, capacity=c, other="within") for c in rungs]
        apart = [
            [r for r in neighbours if r["other"] != "within" and (r["method"], r["capacity"]) == (method, c)]
            for c in rungs
        ]
        x = [float(c) for c in rungs]
        cosine.plot(
            x, within, style.marker + ":", color=style.colour, fillstyle="none", label=f"{method}, nearest within"
        )
        if all(apart):
            cosine.plot(
                x,
                [mean_of(r, "mean") for r in apart],
                style.marker + "-",
                color=style.colour,
                label=f"{method}, assigned across seeds",
            )
    cosine.set(title="decoder cosines of live units", ylabel="mean cosine", ylim=(0, 1))
    for panel, rule in ((jaccard, "jaccard"), (contained, "contained")):
        for method in distinct(children, "method"):
            for against, line, fill in (("larger", "-", "full"), ("null", "--", "none")):
                own = [r for r in children if (r["method"], r["rule"], r["against"]) == (method, rule, against)]
                rungs = ladder(own, method)
                y = [mean_of(own, "mean", capacity=c) for c in rungs]
                label = f"{method}, {'same seed' if against == 'larger' else 'another seed'}"
                style = STYLES[base(method)]
                panel.plot(
                    [float(c) for c in rungs], y, style.marker + line, color=style.colour, fillstyle=fill, label=label
                )
        panel.set(title=f"children of a unit of 1×, {rule}", ylabel="children per unit", ylim=(0, None))
    cost.set_yticks(LEVELS, map(str, LEVELS))
    cost.set_ylim(0.8 * min(float(row["free"]) for row in costs), 1.2 * max(float(row["free"]) for row in costs))
    every = sorted({float(row["capacity"]) for row in costs})
    for panel in grid.flat:
        panel.set_xscale("log", base=2)
        panel.set_xticks(every, [f"{c:g}×" for c in every])
        panel.minorticks_off()
        panel.grid(True, color="#e4e4e4", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7, frameon=False)
    for panel in grid[-1]:
        panel.set_xlabel("capacity")
    save_figure(figure, path)
