"""Rows, figure and table of exp_016: cost by steps of ascent, a colour per method, with Δ attacked and closed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from logs import read_csv
from pareto_figure import STYLES, base, save_figure
from study import write_readme


class Row(NamedTuple):
    method: str
    k: int | None
    l0: float  # active parts per module and token
    gates: str  # own or dealt
    delta: str  # attacked or closed
    steps: int  # of ascent; 0: the deployed replacement
    ce: float  # ΔCE on the attacked text, nats
    ce_low: float  # its 95 % interval over documents
    ce_high: float
    kl: float
    ce_elsewhere: float  # on text that the sources were not chosen on
    ce_elsewhere_low: float
    ce_elsewhere_high: float
    kl_elsewhere: float
    seconds: float  # of the whole ascent
    documents: int  # of the attacked text
    commit: str


def redraw(folder: Path, text: str) -> None:
    """Figure and README from adversarial.csv alone; `text` says what it is about, a notes.md there what was found."""
    rows = read_csv(folder / "adversarial.csv")
    draw(rows, folder / "adversarial.png")
    write_readme(folder, "One adversary for every method", text, "![Cost by steps](adversarial.png)", table(rows))


def table(rows: Sequence[dict[str, str]]) -> str:
    """ΔCE of each rung that was climbed to, and of the last one elsewhere."""
    steps = sorted({int(row["steps"]) for row in rows})
    head = ["method", "L0", "gates", "Δ", *(f"{n} steps" for n in steps), "the last, elsewhere"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key in dict.fromkeys((row["method"], row["gates"], row["delta"]) for row in rows):
        own = {int(row["steps"]): row for row in rows if (row["method"], row["gates"], row["delta"]) == key}
        last = own[max(own)]
        cells = [
            f"{float(own[n]['ce']):.3f} [{float(own[n]['ce_low']):.3f}, {float(own[n]['ce_high']):.3f}]"
            if n in own
            else ""
            for n in steps
        ]
        elsewhere = "{:.3f} [{:.3f}, {:.3f}]".format(
            *(float(last[f"ce_elsewhere{end}"]) for end in ("", "_low", "_high"))
        )
        lines.append(f"| {' | '.join([key[0], f'{float(last["l0"]):.1f}', *key[1:], *cells, elsewhere])} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """A panel for Δ attacked and one for Δ closed; dashed: dealt gates; bands: 95 % over documents."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    steps = sorted({int(row["steps"]) for row in rows})
    for panel, delta, title in zip(panels, ("attacked", "closed"), ("parts and Δ attacked", "parts alone, Δ closed")):
        for method in dict.fromkeys(row["method"] for row in rows):
            for gates, line in (("own", "-"), ("dealt", ":")):
                own = [row for row in rows if (row["method"], row["gates"], row["delta"]) == (method, gates, delta)]
                if not own:
                    continue
                style = STYLES.get(base(method))
                colour, marker = (style.colour, style.marker) if style else ("#8a8a8a", "x")
                x = [steps.index(int(row["steps"])) for row in own]
                y, low, high = ([max(float(row[key]), 1e-3) for row in own] for key in ("ce", "ce_low", "ce_high"))
                panel.plot(
                    x, y, line, color=colour, marker=marker, markersize=4, label=method if gates == "own" else None
                )
                panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        panel.set(yscale="log", title=title, xlabel="steps of ascent (0: deployed)", xticks=range(len(steps)))
        panel.set_xticklabels(map(str, steps))
        panel.grid(True, color="#e4e4e4", linewidth=0.7)
    panels[0].set_ylabel("ΔCE on the attacked text (nats per token)")
    names = panels[0].get_legend_handles_labels()
    panels[1].legend(*names, fontsize=8, frameon=False, title="own gates; dotted: dealt at random", title_fontsize=8)
    save_figure(figure, path)
