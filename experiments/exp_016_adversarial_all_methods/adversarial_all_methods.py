"""What can the parts that a method calls inactive be made to do, if somebody tries? One attack for every method and baseline.

Transcoders, CLTs, SAEs, SPD, neurons and the affine map in place of all MLPs, gates from a clean pass. An adversary may let
each inactive part, and what all parts together leave of the MLP (Δ), in to any degree, the same on all tokens, and climbs the
KL of the output for up to 160 steps (adversary.py has the definition). Costs are told on the text that it climbed on and on
text that it did not see; beside them the same with Δ closed, and with gates dealt at random among live parts.

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

from adversarial_figure import Row, redraw

from adversary import Attack, Batch, constant_sources, prepared
from baselines import baselines
from coder_replacements import as_replacements
from config import BatchTopK
from evaluation import held_out
from logs import git_commit, write_csv, write_settings
from metrics import Draws, bootstrap_interval, document_draws
from recipes import clt_configs, sae_configs, transcoder_configs
from replacement import Replacement
from spd_replacement import spd_replacements
from spd_runs import find_spd
from study import CoderStudySettings, check_fits, run_study, train_for
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


def replacements(s: Settings, target: TargetModel) -> list[Replacement]:
    sizes = {"layers": s.layers, "rules": [BatchTopK(s.k)], "d_dict": s.d_dict}
    configs = [
        config
        for build in (transcoder_configs, clt_configs, sae_configs)
        for config in build(target, **sizes)
        if config.kind in s.methods
    ]
    trained = train_for(s, target, configs) if configs else []
    spd = spd_replacements(target, find_spd(target, s.layers), s.layers, deltas=(False,)) if "spd" in s.methods else []
    return [*as_replacements(trained), *spd[:1], *baselines(target, s.layers, (s.k,))]


def halves(text: HeldOutText) -> tuple[HeldOutText, HeldOutText]:
    """Of different documents."""
    numbers = text.documents.unique()
    first = text.documents < numbers[len(numbers) // 2]
    return tuple(HeldOutText(text.tokens[own], text.documents[own]) for own in (first, ~first))  # type: ignore[return-value]


def attacked(
    s: Settings, target: TargetModel, attack: Attack, elsewhere: Sequence[Batch], draws: Sequence[Draws]
) -> list[Row]:
    """Every rung of one attack; `elsewhere` is the text that it does not see, and `draws` are of both texts."""
    replacement = attack.replacement
    rungs, seconds = attack.run(elsewhere, s.ladder)
    zero = constant_sources(replacement, 0.0, target.device)._replace(dealt=attack.start.dealt)
    firing, n_tokens = attack.firing(), sum(batch.tokens[:, 1:].numel() for batch in attack.batches)
    l0 = sum(fired.sum().item() for fired in firing.values()) / n_tokens / len(firing)
    rows, commit = [], git_commit() or ""
    for rung in [attack.rung(0, zero, elsewhere), *rungs]:
        costs = [
            value
            for own, drawn in zip((rung.attacked, rung.transferred), draws)
            for value in (own.ce.mean().item(), *bootstrap_interval(own.ce, drawn), own.kl.mean().item())
        ]
        gates, delta = "dealt" if attack.start.dealt else "own", "attacked" if attack.deltas else "closed"
        what = (replacement.method, replacement.k, l0, gates, delta, rung.steps)
        rows.append(Row(*what, *costs, seconds, draws[0].n_documents, commit))
    print(f"{rows[-1].method}, gates {gates}, Δ {delta}: ΔCE {rows[-1].ce:.3f} after {rows[-1].steps} steps")
    return rows


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    here, there = halves(held_out(target, s.eval_tokens))
    draws = [document_draws(own.documents, 1000, s.seed) for own in (here, there)]
    chosen, rows = [r for r in replacements(s, target) if r.method in s.methods], []
    for dealt, deltas in ((False, True), (False, False), (True, True)):
        for replacement in chosen:
            if not any(replacement.surface(replacement.layers).values()) and (dealt or not deltas):
                continue  # without parts there are no gates, and nothing is left where Δ is closed
            attack = Attack(target, replacement, here.tokens, deltas=deltas, dealt=dealt, seed=s.seed)
            rows += attacked(s, target, attack, prepared(target, replacement, there.tokens), draws)
            write_csv(s.output / "adversarial.csv", Row._fields, rows)
    write_settings(s.output, s, s.device)
    redraw(s.output, __doc__)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=lambda folder: redraw(folder, __doc__))
