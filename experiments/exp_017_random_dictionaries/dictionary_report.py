"""Figures and tables of exp_017: what dictionaries cost whose parts are kept random, and how their latents score."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from logs import read_csv
from pareto import ParetoPoint, markdown_table, read_points
from pareto_figure import ROWS, save_figure
from study import Report, summary, write_readme

sys.path.append(str(Path(__file__).parents[1] / "exp_008_interp_pile"))
from interval_report import dots, means, table  # noqa: E402

KINDS = {"sae": "SAE", "transcoder": "transcoder", "clt": "CLT"}
COLOURS = {"trained": "#333333", "soft": "#0072B2", "frozen-decoder": "#D55E00", "frozen-encoder": "#009E73"}
MARKERS = {"trained": "o", "soft": "^", "frozen-decoder": "s", "frozen-encoder": "D"}
LEVELS = (0.1, 0.2, 0.5, 1, 2, 5, 10)  # ticks, nats
SCORES = {"intruder": (0.2, "intruder found (chance 1/5)"), "predictability": (0.0, "held-out Matthews correlation")}
HEAD = "| | pinned | k | seeds | FVU | Σ single | frozen | free | kept: Σ single | frozen | free | above affine, free |"


class Share(NamedTuple):
    """What one dictionary costs under one protocol (`single`: the sum over layers), and the share of training's gain it keeps."""

    method: str
    kind: str
    pin: str  # trained where nothing is pinned
    k: int
    protocol: str
    seeds: int
    ce: float  # ΔCE, mean over seeds
    ce_least: float  # of the seeds
    ce_largest: float
    fvu: float  # mean over layers and seeds
    l0: float
    floor: str  # mean (ablation) or affine
    floor_ce: float
    share: (
        float | None
    )  # (ce − floor) / (trained − floor); None where `trained` does not surely cost less than the floor
    low: float | None  # its 95 % interval over documents
    high: float | None


def look(pin: str) -> dict[str, str]:
    """A soft decoder's name says its τ."""
    name = "soft" if pin.startswith("soft") else pin
    return {"color": COLOURS[name], "marker": MARKERS[name]}


def share_table(rows: Sequence[dict[str, str]]) -> str:
    """A line per dictionary; `kept` is 1 where the pinned part need not have been learnt, and 0 at mean ablation."""
    lines = [HEAD, "|---" * 12 + "|"]
    for method, k in dict.fromkeys((row["method"], row["k"]) for row in rows):
        own = {(row["protocol"], row["floor"]): row for row in rows if (row["method"], row["k"]) == (method, k)}
        by = [own[protocol, "mean"] for protocol in ("single", "frozen", "free")]
        cells = [KINDS[by[0]["kind"]], by[0]["pin"], k, by[0]["seeds"], f"{float(by[0]['fvu']):.3f}"]
        cells += [f"{float(row['ce']):.3f}" for row in by]
        cells += [kept(row) for row in by] + [kept(own["free", "affine"]) if ("free", "affine") in own else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kept(row: dict[str, str]) -> str:
    if row["pin"] == "trained" or not row["share"]:
        return "1" if row["share"] else "–"
    return "{:.2f} [{:.2f}, {:.2f}]".format(*(float(row[c]) for c in ("share", "low", "high")))


def draw(rows: Sequence[dict[str, str]], points: Sequence[ParetoPoint], path: Path) -> None:
    """A row of panels per kind, one per protocol; bars span the seeds; grey: floors that need no dictionary."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds, protocols = list(dict.fromkeys(row["kind"] for row in rows)), ("single", "frozen", "free")
    figure, grid = plt.subplots(
        len(kinds), 3, figsize=(11, 2.9 * len(kinds) + 0.6), sharex=True, squeeze=False, layout="constrained"
    )
    for kind, panels in zip(kinds, grid):
        for protocol, panel in zip(protocols, panels):
            of_panel = [row for row in rows if (row["kind"], row["protocol"]) == (kind, protocol)]
            own = [row for row in of_panel if row["floor"] == "mean"]
            for pin in dict.fromkeys(row["pin"] for row in own):
                marks = [row for row in own if row["pin"] == pin]
                x, y = [int(row["k"]) for row in marks], [float(row["ce"]) for row in marks]
                panel.plot(x, y, label=pin, markersize=5, **look(pin))
                spans = [[float(row[c]) for row in marks] for c in ("ce_least", "ce_largest")]
                panel.vlines(x, *spans, color=look(pin)["color"], alpha=0.5)
            for floor, line in (("mean", "-."), ("affine", ":")):
                for level in {float(row["floor_ce"]) for row in of_panel if row["floor"] == floor}:
                    panel.axhline(
                        level, color="#8a8a8a", linestyle=line, label={"mean": "mean ablation"}.get(floor, floor)
                    )
            neurons: dict[int, float] = {}
            for p in points:
                if p.method == "neurons-joint" and p.protocol == protocol and p.k is not None:
                    neurons[p.k] = neurons.get(p.k, 0.0) + p.ce_degradation
            panel.plot(list(neurons), list(neurons.values()), "P--", color="#b0b0b0", markersize=5, label="neurons")
            sum_of = "Σ over layers, " if protocol == "single" else ""
            panel.set(xscale="log", yscale="log", title=f"{KINDS[kind]}: {sum_of}{ROWS[protocol].partition(':')[0]}")
            ticks = sorted({int(row["k"]) for row in rows})
            panel.set_xticks(ticks, map(str, ticks))
            panel.set_yticks(LEVELS, map(str, LEVELS))
            panel.minorticks_off()
            panel.set_ylim(0.8 * min(float(row["ce"]) for row in own), 1.2 * float(own[0]["floor_ce"]))
            panel.grid(True, color="#e4e4e4", linewidth=0.7)
        panels[0].set_ylabel("ΔCE (nats per token)")
    for panel in grid[-1]:
        panel.set_xlabel("k: active latents (neurons) per token and layer")
    figure.legend(
        *grid[-1][0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8, frameon=False
    )
    save_figure(figure, path)


@dataclass(frozen=True)
class DictionaryReport(Report):
    """Its README shows what is kept, how latents score, and all rows."""

    def redraw(self, folder: Path) -> None:
        points, rows = read_points(folder / "points.csv"), read_csv(folder / "shares.csv")
        draw(rows, points, folder / "dictionaries.png")
        below = ["![Cost by what is learnt](dictionaries.png)", share_table(rows)]
        found = read_csv(folder / "scores.csv")
        for score, (null, label) in SCORES.items():
            own = [row | {"group": score} for row in found if row["score"] == score]
            by_method = means(own, "group", "value")
            dots(by_method, folder / f"{score}.png", null=null, label=label)
            below += [f"![{score}]({score}.png)", table(by_method)]
        write_readme(folder, self.title, self.text, *below, markdown_table(points))
        print(f"{summary(points)}\n\nAll {len(points)} rows, and the figures: {folder / 'README.md'}")
