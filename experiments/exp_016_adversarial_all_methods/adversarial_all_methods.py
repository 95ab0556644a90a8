"""What can the parts that a method calls inactive be made to do, if somebody tries? One attack for every method and baseline.

Transcoders, CLTs, SAEs, SPD, neurons and the affine map in place of all MLPs, gates from a clean pass. An adversary may let
each inactive part, and what all parts together leave of the MLP (Δ), in to any degree, the same on all tokens, and climbs the
KL of the output for up to 160 steps (adversary.py has the definition). Costs are told on the text that it climbed on and on
text that it did not see; beside them gates dealt at random among live parts, and Δ closed.

    python experiments/exp_016_adversarial_all_methods/adversarial_all_methods.py --target tiny  # offline
    python experiments/exp_016_adversarial_all_methods/adversarial_all_methods.py                # pile: GPU, network
    … --replot draws figure and README again from adversarial.csv

Expected: methods whose inactive parts would write little are hard to attack: neurons, whose remainder is nothing and whose small
parts are dropped for being small, least of all; SPD, trained against random masks, less than latents trained on nothing of the
kind; own gates several times better than dealt ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from adversary import Attack, Rung, constant_sources
from baselines import baselines
from checkpoints import checkpoint_folder
from coder_replacements import as_replacements
from config import BatchTopK
from evaluation import held_out
from logs import atomic_path, git_commit, read_csv, write_csv, write_settings
from metrics import Draws, bootstrap_interval, document_draws
from pareto_figure import STYLES, base
from recipes import clt_configs, sae_configs, train_coders, transcoder_configs
from replacement import Replacement
from spd_replacement import spd_replacements
from spd_runs import find_spd
from study import CoderStudySettings, check_fits, run_study
from target_models import TargetModel, load_target
from token_stream import HeldOutText

METHODS = ("transcoder", "clt", "sae", "spd", "neurons-joint", "affine")


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "pile"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    k: int = 32  # active latents or neurons per token and layer
    methods: tuple[str, ...] = METHODS
    ladder: tuple[int, ...] = (20, 40, 80, 160)  # steps of ascent
    eval_tokens: int = 16_384  # half of the sequences are attacked, the others see what was found there
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(target="tiny", d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=16_384, device="cpu"),
)


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


def replacements(s: Settings, target: TargetModel) -> list[Replacement]:
    sizes = {"layers": s.layers, "rules": [BatchTopK(s.k)], "d_dict": s.d_dict}
    configs = [
        config
        for build in (transcoder_configs, clt_configs, sae_configs)
        for config in build(target, **sizes)
        if config.kind in s.methods
    ]
    trained = []
    if configs:
        folder = checkpoint_folder(s.target)
        trained = train_coders(configs, target, tokens=s.tokens, batch=s.batch, seed=s.seed, folder=folder)
    spd = spd_replacements(target, find_spd(target, s.layers), s.layers, deltas=(False,)) if "spd" in s.methods else []
    return [*as_replacements(trained), *spd[:1], *baselines(target, s.layers, (s.k,))]


def halves(text: HeldOutText) -> tuple[HeldOutText, HeldOutText]:
    """Of different documents."""
    numbers = text.documents.unique()
    first = text.documents < numbers[len(numbers) // 2]
    return tuple(HeldOutText(text.tokens[own], text.documents[own]) for own in (first, ~first))  # type: ignore[return-value]


def attacked(
    s: Settings,
    target: TargetModel,
    replacement: Replacement,
    text: tuple[HeldOutText, HeldOutText],
    draws: list[Draws],
) -> list[Row]:
    """Every rung, with Δ attacked and closed, and with gates dealt at random where there are gates."""
    here, there = (own.tokens for own in text)
    surface = replacement.surface(replacement.layers)
    has_parts, rows, commit = any(surface.values()), [], git_commit() or ""
    for gates, delta in (("own", "attacked"), ("own", "closed"), ("dealt", "attacked"), ("dealt", "closed")):
        if not has_parts and (gates, delta) != ("own", "attacked"):
            continue
        attack = Attack(target, replacement, here, deltas=delta == "attacked", dealt=gates == "dealt", seed=s.seed)
        rungs, seconds = attack.run(there, s.ladder)
        zero = constant_sources(replacement, 0.0, target.device)._replace(dealt=attack.start.dealt)
        rungs = [Rung(0, zero, *attack.everywhere(zero, there)), *rungs]
        l0 = sum(fired.sum().item() for fired in attack.firing().values()) / here[:, 1:].numel() / len(surface)
        for rung in rungs:
            costs = [
                value
                for own, drawn in zip((rung.attacked, rung.transferred), draws)
                for value in (own.ce.mean().item(), *bootstrap_interval(own.ce, drawn), own.kl.mean().item())
            ]
            rows.append(
                Row(
                    replacement.method,
                    replacement.k,
                    l0,
                    gates,
                    delta,
                    rung.steps,
                    *costs,
                    seconds,
                    draws[0].n_documents,
                    commit,
                )
            )
        print(f"{rows[-1].method}, gates {gates}, Δ {delta}: ΔCE {rows[-1].ce:.3f} after {rows[-1].steps} steps")
    return rows


def main(s: Settings) -> None:
    target = load_target(s.target, s.device)
    check_fits(s, target)
    text = halves(held_out(target, s.eval_tokens))
    draws = [document_draws(own.documents, 1000, s.seed) for own in text]
    rows: list[Row] = []
    for replacement in replacements(s, target):
        if replacement.method in s.methods:
            rows += attacked(s, target, replacement, text, draws)
            write_csv(s.output / "adversarial.csv", Row._fields, rows)
    write_settings(s.output, s, s.device)
    redraw(s.output)


# ---------------------------------------------------------------------------------------------------------- figure


def redraw(folder: Path) -> None:
    rows, notes = read_csv(folder / "adversarial.csv"), folder / "notes.md"
    draw(rows, folder / "adversarial.png")
    said = [notes.read_text().strip()] if notes.exists() else []
    parts = [
        "# One adversary for every method",
        __doc__.strip(),
        *said,
        "![Cost by steps](adversarial.png)",
        table(rows),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def table(rows: Sequence[dict[str, str]]) -> str:
    """ΔCE of each rung, and of the last one elsewhere."""
    steps = sorted({int(row["steps"]) for row in rows})
    head = ["method", "L0", "gates", "Δ", *(f"{n} steps" for n in steps), f"{steps[-1]}, elsewhere"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key in dict.fromkeys((row["method"], row["gates"], row["delta"]) for row in rows):
        own = {int(row["steps"]): row for row in rows if (row["method"], row["gates"], row["delta"]) == key}
        last = own[steps[-1]]
        cells = [
            f"{float(own[n]['ce']):.3f} [{float(own[n]['ce_low']):.3f}, {float(own[n]['ce_high']):.3f}]" for n in steps
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
    for panel, delta, title in zip(panels, ("attacked", "closed"), ("parts and Δ attacked", "parts alone, Δ closed")):
        for method in dict.fromkeys(row["method"] for row in rows):
            for gates, line in (("own", "-"), ("dealt", ":")):
                own = [row for row in rows if (row["method"], row["gates"], row["delta"]) == (method, gates, delta)]
                if not own:
                    continue
                style = STYLES.get(base(method))
                colour, marker = (style.colour, style.marker) if style else ("#8a8a8a", "x")
                x = range(len(own))
                y, low, high = ([max(float(row[key]), 1e-3) for row in own] for key in ("ce", "ce_low", "ce_high"))
                panel.plot(
                    x, y, line, color=colour, marker=marker, markersize=4, label=method if gates == "own" else None
                )
                panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        steps = sorted({int(row["steps"]) for row in rows})
        panel.set(yscale="log", title=title, xlabel="steps of ascent (0: deployed)", xticks=range(len(steps)))
        panel.set_xticklabels(map(str, steps))
        panel.grid(True, color="#e4e4e4", linewidth=0.7)
    panels[0].set_ylabel("ΔCE on the attacked text (nats per token)")
    panels[0].legend(fontsize=8, frameon=False, title="own gates; dotted: dealt at random", title_fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=redraw)
