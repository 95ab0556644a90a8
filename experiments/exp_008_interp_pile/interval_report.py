"""Rows of a results.csv; their means with intervals, as a figure and as a table, from that file and nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch

from logs import atomic_path, write_csv
from metrics import bootstrap_interval, document_draws
from pareto_figure import STYLES, save_figure

Rows = Sequence[dict[str, str]]


def write_results(path: Path, rows: Sequence[NamedTuple]) -> None:
    if not rows:
        raise ValueError("no latent of any method has enough examples: give more --eval-tokens")
    write_csv(path, rows[0]._fields, ([f"{v:.5g}" if isinstance(v, float) else v for v in row] for row in rows))


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean with its 95 % percentile bootstrap over the values (latents, or tokens of different sequences)."""
    sample = torch.tensor(values, dtype=torch.float64)
    draws = document_draws(torch.arange(len(sample)), 1000, seed)
    return Interval(sample.mean().item(), *bootstrap_interval(sample, draws))


def means(rows: Rows, by: str, value: str) -> dict[tuple[str, str], Interval]:
    """(method, group) → mean of `value` over the rows that have one."""
    keys = dict.fromkeys((row["method"], row[by]) for row in rows)
    kept = {key: [float(r[value]) for r in rows if (r["method"], r[by]) == key and r[value]] for key in keys}
    return {key: interval(values) for key, values in kept.items() if values}


def dots(found: dict[tuple[str, str], Interval], path: Path, *, null: float, label: str) -> None:
    """One panel per group, one dot with its interval per method; the dashed line is chance."""
    groups = list(dict.fromkeys(group for _, group in found))
    methods = list(dict.fromkeys(m for m, _ in found))
    figure, panels = plt.subplots(
        1, len(groups), figsize=(1.8 + 3.2 * len(groups), 0.9 + 0.38 * len(methods)),
        sharey=True, sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, group in zip(panels[0], groups):
        panel.axvline(null, color="#8a8a8a", linestyle="--", linewidth=1)
        for place, method in enumerate(methods):
            if (method, group) in found:
                mean, low, high = found[method, group]
                style = STYLES.get(method.partition("-")[0])
                colour, marker = (style.colour, style.marker) if style else ("#777777", "o")
                face = "white" if "-" in method else colour
                panel.plot([low, high], [place, place], color=colour, linewidth=1.6)
                panel.plot([mean], [place], marker=marker, color=colour, markerfacecolor=face, markersize=7)
        panel.set_title(group, fontsize=10)
        panel.set_xlabel(label, fontsize=9)
        panel.set_yticks(range(len(methods)), methods)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    panels[0][0].set_ylim(len(methods) - 0.5, -0.5)
    save_figure(figure, path, dpi=130)


def table(found: dict[tuple[str, str], Interval]) -> str:
    """Methods × groups, mean [95 % interval], as Markdown."""
    groups, methods = (list(dict.fromkeys(key[i] for key in found)) for i in (1, 0))

    def cell(key: tuple[str, str]) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(*found[key]) if key in found else "–"

    lines = [["method", *groups], ["---"] * (len(groups) + 1), *([m, *(cell((m, g)) for g in groups)] for m in methods)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_readme(folder: Path, parts: Sequence[str], *, title: str, doc: str, image: str) -> None:
    """A report: title, the script's docstring, its figure, then the parts, which are printed too."""
    body = "\n\n".join([f"# {title}", doc.strip(), f"![{title}]({image})", *parts])
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(body + "\n")
    print(*parts, sep="\n\n")
