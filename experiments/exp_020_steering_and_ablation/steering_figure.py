"""Rows, figure and table of exp_020: what ablation and steering do to a topic and to other text, by method."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from logs import read_csv
from pareto_figure import STYLES, base, save_figure
from study import write_readme

UNITS = {"own": "full", "random": "none", "control": "full"}


class Row(NamedTuple):
    """One edit; topic `all` is the mean over topics. The columns of `Summary` stand in the middle."""

    method: str
    units: str  # own, random or control
    mode: str  # ablation or steering
    topic: str
    ce_topic: float  # ΔCE on the topic's tokens, nats
    ce_topic_low: float
    ce_topic_high: float
    ce_general: float  # ΔCE on text without the topic
    ce_general_low: float
    ce_general_high: float
    difference: float
    difference_low: float
    difference_high: float
    quotient: float
    quotient_low: float
    quotient_high: float
    mass: float  # rise of log P(the topic's vocabulary) on general text less that of other topics', nats
    mass_low: float
    mass_high: float
    kl: float  # on text without the topic, test half
    strength: float | None
    auroc: float | None  # of the method's best unit, selection half
    null: float | None  # the same with labels dealt at random
    commit: str


def chosen(rows: Sequence[dict[str, str]], mode: str, topic: str) -> list[dict[str, str]]:
    return [row for row in rows if (row["mode"], row["topic"]) == (mode, topic)]


def label(row: dict[str, str]) -> str:
    return row["method"] if row["units"] != "random" else f"{row['method']}, random"


def spread(row: dict[str, str], name: str, digits: int = 3) -> str:
    """With its interval; void where it is infinite: a quotient by nothing."""
    middle, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    if not math.isfinite(middle):
        return "–"
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


TOLD = {"ablation": "difference", "steering": "mass"}  # by which an edit is judged
HEADS = {
    "ablation": ["units", "ΔCE topic", "ΔCE general", "Σ topic / Σ general", "difference", "KL general"],
    "steering": ["units", "log P of the vocabulary", "ΔCE topic", "ΔCE general", "KL general"],
}
SHOWN = {
    "ablation": {"ce_topic": 3, "ce_general": 3, "quotient": 2, "difference": 3},
    "steering": {"mass": 3, "ce_topic": 3, "ce_general": 3},
}  # columns, and their digits


def table(rows: Sequence[dict[str, str]], mode: str) -> str:
    """Means over topics."""
    lines = [f"| {mode}: {' | '.join(HEADS[mode])} |", "|---" * len(HEADS[mode]) + "|"]
    for row in chosen(rows, mode, "all"):
        cells = [label(row), *(spread(row, name, digits) for name, digits in SHOWN[mode].items())]
        lines.append(f"| {' | '.join([*cells, f'{float(row["kl"]):.3f}'])} |")
    return "\n".join(lines)


def by_topic(rows: Sequence[dict[str, str]]) -> str:
    """Each topic: difference of ΔCE (ablation; the best unit's AUROC, and with labels dealt at random), log P (steering)."""
    lines = []
    for mode in ("ablation", "steering"):
        own = [row for row in rows if row["mode"] == mode and row["units"] != "random" and row["topic"] != "all"]
        methods = list(dict.fromkeys(row["method"] for row in own))
        lines += [f"| {mode} | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
        for topic in dict.fromkeys(row["topic"] for row in own):
            cells = []
            for row in [row for row in own if row["topic"] == topic]:
                told = f" ({float(row['auroc']):.2f}; {float(row['null']):.2f})" if row["auroc"] else ""
                cells.append(f"{float(row[TOLD[mode]]):+.3f}{told if mode == 'ablation' else ''}")
            lines.append(f"| {topic} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).strip()


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """What an edit is judged by, mean over topics: bars of 95 %; a grey dot for each topic; hollow: random units."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    titles = {
        "ablation": "ablation: ΔCE of the topic less that of other text",
        "steering": "steering: rise of log P of the topic's vocabulary",
    }
    for panel, (mode, title) in zip(panels, titles.items()):
        marks = chosen(rows, mode, "all")
        for height, row in enumerate(reversed(marks)):
            style = STYLES.get(base(row["method"]))
            colour, fill = style.colour if style else "#8a8a8a", UNITS[row["units"]]
            key = (row["method"], row["units"], mode)
            each = [
                float(r[TOLD[mode]])
                for r in rows
                if (r["method"], r["units"], r["mode"]) == key and r["topic"] != "all"
            ]
            panel.plot(each, [height] * len(each), ".", color="#b5b5b5", markersize=4)
            middle, low, high = (float(row[f"{TOLD[mode]}{end}"]) for end in ("", "_low", "_high"))
            panel.hlines(height, low, high, color=colour, linewidth=1.8)
            panel.plot(middle, height, "o", color=colour, fillstyle=fill, markersize=7)
        panel.set_yticks(range(len(marks)), [label(row) for row in reversed(marks)])
        panel.axvline(0, color="#8a8a8a", linewidth=0.8)
        panel.set(title=title, xlabel="nats per token, at equal KL on neutral text")
        panel.grid(True, axis="x", color="#e4e4e4", linewidth=0.7)
    save_figure(figure, path, dpi=100)


def redraw(folder: Path, text: str) -> None:
    """Figure and README from points.csv alone; `text` says what it is about, a notes.md there what was found."""
    rows = read_csv(folder / "points.csv")
    draw(rows, folder / "selectivity.png")
    below = ["![Selectivity by method](selectivity.png)", table(rows, "ablation"), table(rows, "steering")]
    write_readme(folder, "Steering and ablation", text, *below, (by_topic.__doc__ or "").strip(), by_topic(rows))
