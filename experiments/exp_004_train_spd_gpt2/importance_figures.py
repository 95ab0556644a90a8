"""How important components are: measured over held-out tokens, as a table, in two figures and in words.

g is a component's importance on one token, clamp(z, 0, 1) of its gate's logit z in a clean pass; each sequence's first
position is left out, as the ruler leaves it out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from evaluation import clean_pass
from logs import read_csv, write_csv
from pareto_figure import save_figure
from spd_replacement import SPDReplacement

TABLE = "importances.csv"
BINS = 20  # of equal width in (0, 1]
ALIVE = 1e-6  # mean importance above which Goodfire's reports call a component alive


class Importances(NamedTuple):
    """Of one matrix' components."""

    matrix: str
    means: list[float]  # each component's mean g, largest first
    counts: list[int]  # (token, component) pairs with g = 0 exactly, then with g in (0, 0.05], …, (0.95, 1]


@torch.inference_mode()
def measure_importances(spd: SPDReplacement, tokens: Int[Tensor, "sequence seq"]) -> list[Importances]:
    """Of every decomposed matrix."""
    total = {path: torch.zeros(n, dtype=torch.float64) for path, n in spd.model.sizes.items()}
    counts = {path: torch.zeros(BINS + 1, dtype=torch.int64) for path in total}
    for part in tokens.split(4):
        clean = clean_pass(spd.target, part.to(spd.target.device), spd.reads, spd.watches)
        for path, z in spd.clean_importances(clean.activations).z.items():
            g = spd.model.lower(z[:, 1:]).flatten(0, 1)
            edges = torch.linspace(0, 1, BINS + 1, device=g.device)
            total[path] += g.sum(0, dtype=torch.float64).cpu()
            counts[path] += torch.bincount(torch.bucketize(g, edges).flatten(), minlength=BINS + 1).cpu()
    n = tokens.numel() - len(tokens)
    return [
        Importances(path, (total[path] / n).sort(descending=True).values.tolist(), counts[path].tolist())
        for path in total
    ]


def write_importances(folder: Path, found: Sequence[Importances]) -> None:
    """A line per component, by rank from 1, and a line per bin, by its upper edge."""
    means = [(f.matrix, "mean", rank, f"{mean:.4g}") for f in found for rank, mean in enumerate(f.means, 1)]
    counts = [(f.matrix, "count", f"{i / BINS:g}", count) for f in found for i, count in enumerate(f.counts)]
    write_csv(folder / TABLE, ("matrix", "what", "rank or bin", "value"), [*means, *counts])


def read_importances(folder: Path) -> list[Importances]:
    rows = read_csv(folder / TABLE)

    def values(matrix: str, what: str) -> list[str]:
        return [row["value"] for row in rows if (row["matrix"], row["what"]) == (matrix, what)]

    return [
        Importances(matrix, list(map(float, values(matrix, "mean"))), list(map(int, values(matrix, "count"))))
        for matrix in dict.fromkeys(row["matrix"] for row in rows)
    ]


def draw_importances(folder: Path) -> list[str]:
    """mean_importances.png and importance_histograms.png from importances.csv, and what a README says of each."""
    found = read_importances(folder)
    _draw_means(found, folder / "mean_importances.png")
    _draw_histograms(found, folder / "importance_histograms.png")
    alive = "; ".join(f"{f.matrix} {sum(m > ALIVE for m in f.means)} of {len(f.means)}" for f in found)
    zero = "; ".join(f"{f.matrix} {_share(f.counts[:1], f):.1%} and {_share(f.counts[-1:], f):.2%}" for f in found)
    return [
        f"Mean importance of every component on held-out tokens, the largest first: above {ALIVE:g}, alive, are {alive}.",
        "![Sorted mean importances](mean_importances.png)",
        f"Importance of every component on every held-out token: exactly 0 and above 0.95 are {zero} of the pairs; "
        "columns show what lies above 0.",
        "![Histograms of importances](importance_histograms.png)",
    ]


def _share(counts: Sequence[int], of: Importances) -> float:
    return sum(counts) / sum(of.counts)


def _draw_means(found: Sequence[Importances], path: Path) -> None:
    """A curve per matrix; components that are never important lie below any logarithmic axis."""
    figure, panel = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for i, f in enumerate(found):
        means = [mean for mean in f.means if mean > 0]
        colour = plt.get_cmap("viridis")(0.9 * (i // 2) / max(1, (len(found) - 1) // 2))
        panel.plot(range(1, len(means) + 1), means, label=f.matrix, color=colour, linestyle=("-", "--")[i % 2])
    panel.axhline(ALIVE, color="#8a8a8a", linewidth=1, linestyle=":")
    panel.set(yscale="log", xlabel="rank by mean importance", ylabel="mean importance", xlim=(0, None))
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    _save(figure, [panel], path)


def _draw_histograms(found: Sequence[Importances], path: Path) -> None:
    """A panel per matrix: the share of all pairs in each bin above 0, and in words the share at 0."""
    rows = -(-len(found) // 2)
    size = (8.5, 0.4 + 1.9 * rows)
    figure, grid = plt.subplots(rows, 2, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained")
    for panel, f in zip(grid.flat, found):
        shares = [_share([count], f) for count in f.counts[1:]]
        panel.bar([(i + 0.5) / BINS for i in range(BINS)], shares, width=0.9 / BINS, color="#009E73")
        panel.set(yscale="log", xlim=(0, 1))
        panel.set_title(f"{f.matrix}: {_share(f.counts[:1], f):.2%} are 0", loc="left", fontsize=10)
    for panel in grid[-1]:
        panel.set_xlabel("importance, where above 0")
    figure.get_layout_engine().set(wspace=0.06)
    figure.supylabel("share of all pairs", fontsize=10)
    _save(figure, list(grid.flat), path)


def _save(figure: Figure, panels: Sequence[Any], path: Path) -> None:
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e4e4e4", linewidth=0.7)
        panel.set_axisbelow(True)
    save_figure(figure, path)
