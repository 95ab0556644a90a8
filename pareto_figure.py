"""The figure of every study: damage against sparsity, one curve per method, drawn from the rows of `points.csv`.

One panel per axis of sparsity, one row per protocol, both axes logarithmic. Curves and baselines are labelled directly, in
colours and markers that can be told apart in grey. The grey steps behind them are the Pareto front: the least damage that
any method does at so many parts or fewer.
"""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from logs import atomic_path
from pareto import ParetoPoint


class Style(NamedTuple):
    """How a method looks in every figure of the project: colours of Okabe and Ito, told apart in grey by the rest."""

    colour: str
    marker: str
    line: str | tuple[float, tuple[float, ...]]


STYLES = {
    "transcoder": Style("#0072B2", "o", "-"),
    "clt": Style("#D55E00", "s", (0, (5, 1.5))),
    "spd": Style("#009E73", "^", (0, (6, 1.5, 1.5, 1.5))),
    "sae": Style("#CC79A7", "D", (0, (1.5, 1.2))),
    "neurons": Style("#333333", "P", (0, (3, 1.5, 1, 1.5, 1, 1.5))),
}
FILLS = {
    "": "full", "topk": "none", "joint": "top", "skip": "bottom", "delta": "left", "c_fc-topk": "top", "down_proj-topk": "bottom"
}  # fmt: skip
BASELINES = ("affine", "mean", "zero")  # horizontal lines; identity is ΔCE = 0, below any log axis
AXES = {
    "l0": "active parts per module",
    "l0_per_mlp": "active parts per MLP output",
    "active_params": "active parameters per token",
    "bits_per_token": "bits per token",
}
LEFT_AXIS = {"ce_degradation": "ΔCE (nats per token)", "kl": "KL to the original (nats)", "fvu": "FVU", "mse": "MSE"}
ROWS = {
    "single": "single: one layer replaced",
    "frozen": "frozen: each reads the clean stream",
    "gates": "gates: a clean pass decides what is active",
    "free": "free: all follows the stream",
}


def base(method: str) -> str:
    """The method without its variant: what decides colour and marker."""
    return method.split("-")[0]


def family(method: str) -> str:
    """The method without a number at its end (a gate's threshold): what is joined to one curve."""
    return re.sub(r"-\d+(\.\d+)?$", "", method)


def fill(method: str) -> str:
    """How much of the marker is filled tells variants of a method apart; hollow: sparsity imposed after training."""
    return FILLS.get(family(method).removeprefix(base(method)).removeprefix("-"), "right")


class _Mark(NamedTuple):
    """A point of a curve: the mean over layers (`single`) and seeds."""

    x: float
    y: float
    low: float
    high: float


def _marks(points: Sequence[ParetoPoint], x: str, y: str) -> list[_Mark]:
    """One mark per method and k (per checkpoint where there is no k), by rising x > 0; intervals exist for ΔCE alone."""
    groups: dict[tuple[object, ...], list[ParetoPoint]] = {}
    for p in points:
        if (getattr(p, x) or 0) > 0 and getattr(p, y) is not None:
            groups.setdefault((p.method, p.k, None if p.k is not None else _settings(p)), []).append(p)
    marks = []
    for group in groups.values():
        columns = (x, y, "ce_low", "ce_high") if y == "ce_degradation" else (x, y, y, y)
        marks.append(_Mark(*(sum(getattr(p, c) for p in group) / len(group) for c in columns)))
    return sorted(marks)


def front(marks: Iterable[_Mark]) -> list[_Mark]:
    """The marks that no other dominates, by rising x: none is as sparse or sparser and does as little damage or less."""
    best: list[_Mark] = []
    for mark in sorted(marks):
        if not best or mark.y < best[-1].y:
            best.append(mark)
    return best


def _settings(point: ParetoPoint) -> tuple[object, ...]:
    """What tells two rules without a k apart; layers of one replacement and seeds of one rule stay together."""
    return (re.sub(r"_s\d+(?![^\W_])", "", point.checkpoint), point.train_tokens)


def draw(
    points: Iterable[ParetoPoint],
    path: Path,
    axes: Sequence[str] = tuple(AXES),
    y: str = "ce_degradation",
    title: str = "",
) -> None:
    """One panel per x-axis, one row per protocol, both axes logarithmic; curves and baselines are labelled directly.

    Values ≤ 0 lie on the lower edge, marked ▾; a row without active parts has no place. In `single` a mark is the mean over
    layers. Full marks are sparsities that were trained, hollow ones (`-topk`) were imposed afterwards; half-full ones are
    other variants.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    points = [p for p in points if base(p.method) != "identity" and getattr(p, y) is not None]
    rows = [protocol for protocol in ROWS if any(p.protocol == protocol for p in points)]
    assert rows, "there is no point to draw"
    longest = max(len(family(p.method)) for p in points)
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8}):
        margins = (0.95, 0.55 + 0.095 * max(longest, 13))  # inches: the y-axis' label; the names of the curves
        for_names = 0.24 * len({family(p.method) for p in points})
        height = max(3.4 if len(rows) == 1 else 2.9, for_names)
        size = (3.1 * len(axes) + sum(margins), height * len(rows) + 0.9)
        figure, grid = plt.subplots(len(rows), len(axes), figsize=size, sharex="col", sharey="row", squeeze=False)
        figure.subplots_adjust(
            left=margins[0] / size[0], right=1 - margins[1] / size[0], bottom=0.6 / size[1],
            top=1 - (0.7 if title else 0.4) / size[1], wspace=0.08, hspace=0.17,
        )  # fmt: skip
        labels = []
        for i, protocol in enumerate(rows):
            chosen = [p for p in points if p.protocol == protocol]
            floor = _floor([m for axis in axes for m in _marks(chosen, axis, y)])
            for j, axis in enumerate(axes):
                panel = grid[i][j]
                panel.set_xscale("log")
                panel.set_yscale("log")
                panel.grid(True, which="major", color="#e4e4e4", linewidth=0.7)
                panel.set_axisbelow(True)
                names = _draw_baselines(panel, chosen, y) + _draw_curves(panel, chosen, axis, y, floor)
                panel.tick_params(which="both", length=2.5)
                if i == len(rows) - 1:
                    panel.set_xlabel(AXES.get(axis, axis))
                if j == 0:
                    panel.set_ylabel(LEFT_AXIS.get(y, y))
                    panel.set_title(_row_title(protocol, chosen), loc="left", fontsize=11, fontweight="bold")
            labels.append(names)
            grid[i][0].set_ylim(bottom=floor * 0.8)
        for panel in {*grid[:, 0], *grid[0]}:  # the panels that own a shared axis
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_locator(_ticks(*sorted(axis.get_view_interval())))
                axis.set_major_formatter(FuncFormatter(_tick))
                axis.set_minor_locator(NullLocator())
                axis.set_minor_formatter(NullFormatter())
        figure.canvas.draw()
        for i in range(len(rows)):
            _label(grid[i][-1], labels[i])
        figure.suptitle(title, x=margins[0] / size[0], ha="left", fontsize=13)
        save_figure(figure, Path(path))


def save_figure(figure: Any, path: Path, dpi: int = 110) -> None:
    """A matplotlib figure as a PNG, whole or not at all, and closed."""
    import matplotlib.pyplot as plt

    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    plt.close(figure)


def _tick(value: float, _position: int) -> str:
    """0.02, 5, 200, 10k, 2M."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _ticks(low: float, high: float) -> Any:
    """Ticks at powers of ten, also at 2 and 5 times those where the axis spans less than two decades."""
    from matplotlib.ticker import FixedLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 100 else (1,)
    return FixedLocator([step * 10.0**e for e in decades for step in steps if low <= step * 10.0**e <= high])


def _row_title(protocol: str, points: Sequence[ParetoPoint]) -> str:
    layers = sorted({p.layers for p in points})
    if protocol == "single":
        return ROWS[protocol] + (f" (layer {layers[0][0]})" if len(layers) == 1 else f" (mean over {len(layers)})")
    return ROWS[protocol] + (
        f", {len(layers[0])} layer{'s' * (len(layers[0]) > 1)} replaced" if len(layers) == 1 else ""
    )


class _Label(NamedTuple):
    text: str
    colour: str
    marker: str
    fill: str
    x: float  # data coordinates of what it names; infinite: the panel's right edge
    y: float


def _floor(marks: Sequence[_Mark]) -> float:
    """Where values ≤ 0 are put: half the smallest positive one."""
    positive = [m.y for m in marks if m.y > 0]
    return min(positive, default=1e-3) / (1.6 if all(m.low > 0 for m in marks) else 2.5)


def _draw_baselines(panel: Any, points: Sequence[ParetoPoint], y: str) -> list[_Label]:
    labels = []
    lines = dict(zip(BASELINES, ("-", "--", ":")))
    for name in sorted({p.method for p in points if base(p.method) in BASELINES}):
        values = [getattr(p, y) for p in points if p.method == name]
        if (value := sum(values) / len(values)) > 0:
            panel.axhline(value, color="#8a8a8a", linewidth=1.1, linestyle=lines[base(name)], zorder=1)
            text = {"affine": "affine map", "zero": "zero ablation", "mean": "mean ablation"}.get(
                name, name.replace("-", ", ")
            )
            labels.append(_Label(text, "#666666", "", "full", float("inf"), value))
    return labels


def _draw_curves(panel: Any, points: Sequence[ParetoPoint], x: str, y: str, floor: float) -> list[_Label]:
    labels, seen = [], []
    families = sorted({family(p.method) for p in points if base(p.method) not in BASELINES}, key=_order)
    for name in families:
        style = STYLES[base(name)]
        marks = _marks([p for p in points if family(p.method) == name], x, y)
        if not marks:
            continue
        seen += marks
        xs, ys = [m.x for m in marks], [max(m.y, floor) for m in marks]
        panel.plot(xs, ys, color=style.colour, linestyle=style.line, linewidth=1.6, zorder=3)
        panel.plot(xs, ys, color=style.colour, linestyle="", zorder=4, **_marker(style.marker, fill(name)))
        low, high = ([max(v, floor) for v in side] for side in ([m.low for m in marks], [m.high for m in marks]))
        panel.fill_between(xs, low, high, color=style.colour, alpha=0.15, linewidth=0, zorder=2)
        panel.vlines(xs, low, high, color=style.colour, linewidth=1.0, zorder=2)
        below = [m.x for m in marks if m.y <= 0]
        panel.plot(below, [floor] * len(below), linestyle="", marker="v", color=style.colour, markersize=8, zorder=4)
        labels.append(_Label(name, style.colour, style.marker, fill(name), xs[-1], ys[-1]))
    best = front(seen)
    steps = [max(mark.y, floor) for mark in best]
    panel.step([m.x for m in best], steps, where="post", color="#000000", alpha=0.13, linewidth=4, zorder=1)
    return labels


def _marker(shape: str, filled: str) -> dict[str, Any]:
    """A marker of the line's colour, its empty part white."""
    look = {"marker": shape, "markersize": 6, "markeredgewidth": 1.2}
    if filled == "none":
        return look | {"markerfacecolor": "white"}
    return look | {"fillstyle": filled, "markerfacecoloralt": "white"}


def _order(name: str) -> tuple[int, str]:
    return list(STYLES).index(base(name)), name


def _label(panel: Any, labels: Sequence[_Label]) -> None:
    """Names in the right margin, each at the height of what it names and pushed apart where they would overlap."""
    if not labels:
        return
    height = panel.get_window_extent().height
    gap = 15 * panel.figure.dpi / 72 / height  # one line of text, in axes units
    anchors = [panel.transAxes.inverted().transform(panel.transData.transform((1.0, label.y)))[1] for label in labels]
    places = _spread(anchors, gap, top=1.05)
    for label, anchor, place in zip(labels, anchors, places):
        start = 1.0 if label.x == float("inf") else panel.transAxes.inverted().transform(
            panel.transData.transform((label.x, label.y))
        )[0] + 0.02  # fmt: skip
        panel.plot([start, 1.03, 1.07], [anchor, anchor, place], color=label.colour, linewidth=0.7, alpha=0.75,
                   linestyle=(0, (1, 1.5)), transform=panel.transAxes, clip_on=False, zorder=1)  # fmt: skip
        if label.marker:
            panel.plot([1.11], [place], color=label.colour, clip_on=False, transform=panel.transAxes,
                       **_marker(label.marker, label.fill))  # fmt: skip
        panel.text(1.16 if label.marker else 1.09, place, label.text, color=label.colour, va="center", fontsize=10.5,
                   transform=panel.transAxes)  # fmt: skip


def _spread(anchors: Sequence[float], gap: float, top: float) -> list[float]:
    """Heights close to `anchors`, in the same order, at least `gap` apart, none above `top`: least squares, by pooling
    neighbours."""
    order = sorted(range(len(anchors)), key=lambda i: anchors[i])
    pools: list[tuple[float, int]] = []  # (mean of anchor − rank · gap, size): an isotonic regression
    for rank, i in enumerate(order):
        pools.append((anchors[i] - rank * gap, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, n), (b, m) = pools[-2], pools[-1]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    levels = [min(value, top - (len(anchors) - 1) * gap) for value, size in pools for _ in range(size)]
    places = [0.0] * len(anchors)
    for rank, i in enumerate(order):
        places[i] = levels[rank] + rank * gap
    return places
