"""Which method wins under which protocol and axis, and what did it cost? The headline: natively trained coders only.

Transcoders, CLTs and SAEs at the k they were trained for (exp_010, exp_003), SPD at its own thresholds, neurons, and the
baselines, all MLPs replaced at once. Coders and neurons stand there with an equal k in every layer, and better: transcoders of
a sweep recombined (`by_layer`), CLTs, SAEs and neurons by one threshold over all layers (`joint`; allocation.py). Sets of one k
are also trained further on the KL of the model's output (`kl-free`), beside sets trained locally for about as many seconds more
(`longer`). Panels by x-axis, rows by protocol; every method under every protocol; training tokens, gate parameters and training
time stand in the table. Additivity is the cost of all layers together over the sum of each alone.

    python experiments/exp_011_pareto_trained_all_layers/pareto_trained_all_layers.py                # pile: GPU, network
    python experiments/exp_011_pareto_trained_all_layers/pareto_trained_all_layers.py --target tiny  # offline
    … --target smollm2         # a real language model, offline (requirements-smollm2.txt)
    … --replot draws the figure again from points.csv
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from additivity import additivity_table, write_additivity
from allocation import by_layer, jointly
from baselines import baselines
from checkpoints import Checkpoint, checkpoint_folder
from coder_replacements import as_replacements
from config import BatchTopK, Output
from evaluation import PROTOCOLS, evaluate, held_out
from pareto import read_points
from recipes import clt_configs, sae_configs, transcoder_configs, tune_coders
from replacement import Replacement
from spd_replacement import spd_replacements
from spd_runs import find_spd
from study import CoderStudySettings, Report, check_fits, run_study, train_for
from target_models import TargetModel, load_target

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "pile"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    top_k: tuple[int, ...] = (8, 16, 32, 64)  # of the transcoders
    clt_top_k: tuple[int, ...] = (8, 16, 64)  # of the CLTs, per layer
    sae_top_k: tuple[int, ...] = (16, 64)  # of the SAEs of MLP outputs
    neurons: tuple[int, ...] = (8, 32, 128, 512)
    tuned_k: int = 16  # of the transcoders, CLTs and SAEs that are trained further
    tune_tokens: int = 60_000_000  # of that training, on the model's output under `free`; 0: none
    longer: int = 160_000_000  # tokens of local training beyond `tokens` that take about as many seconds
    n_seeds: int = 1  # trainings of every coder, with seeds from `seed` on
    spd: bool = True  # the target's decomposition (exp_004's) beside them
    output: Path = HERE / "output"


PRESETS = (
    Settings(),
    Settings(
        target="tiny", clt_top_k=(8, 16), d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=30_720, device="cpu",
        tune_tokens=120_000, longer=330_000, n_seeds=3,
    ),
    Settings(
        target="smollm2", layers=(8, 9, 10), top_k=(16, 32, 64), clt_top_k=(32,), sae_top_k=(32,), neurons=(64, 256),
        d_dict=2304, tokens=204_800, tune_tokens=0, batch=2048, eval_tokens=10_240, spd=False, device="cpu",
        output=HERE / "output" / "smollm2",
    ),
)  # fmt: skip


def additive(folder: Path) -> list[str]:
    """The table of it, and additivity.csv, where layers were measured alone."""
    points = read_points(folder / "points.csv")
    if not any(p.protocol == "single" for p in points):
        return []
    write_additivity(folder / "additivity.csv", points)
    return [additivity_table(points)]


REPORT = Report("Natively trained coders, all MLPs replaced", __doc__, additive)


def trained(s: Settings, target: TargetModel) -> list[Replacement]:
    """Coders of one seed at their own k's, with their k's shared out over the layers, and trained further."""
    kinds = ((transcoder_configs, s.top_k), (clt_configs, s.clt_top_k), (sae_configs, s.sae_top_k))
    configs = [
        config
        for build, ks in kinds
        for config in build(target, layers=s.layers, rules=[BatchTopK(k) for k in ks], d_dict=s.d_dict)
    ]
    coders = train_for(s, target, configs)
    swept, others = ([c for c in coders if (c.coder.config.kind == "transcoder") == is_so] for is_so in (True, False))
    allocated = [*by_layer(target, swept), *jointly(target, as_replacements(others))]
    return [*as_replacements(coders), *allocated, *(further(s, target, coders) if s.tune_tokens else [])]


def further(s: Settings, target: TargetModel, coders: Sequence[Checkpoint]) -> list[Replacement]:
    """Sets of one k of every kind: on the model's output, and locally for about as long."""
    starts = [c for c in coders if c.coder.k == s.tuned_k]
    sizes = {"tokens": s.tune_tokens, "batch": s.batch, "seed": s.seed, "folder": checkpoint_folder(s.target)}
    tuned = tune_coders(starts, target, objective=Output("free"), **sizes)
    again = [c.coder.config for c in starts]
    longer = as_replacements(train_for(replace(s, tokens=s.tokens + s.longer), target, again))
    for replacement in longer:
        replacement.method = f"{replacement.method}-longer"
    return [*as_replacements(tuned), *longer]


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    spd = spd_replacements(target, find_spd(target, s.layers), s.layers) if s.spd else []  # there may be none
    seeds = range(s.seed, s.seed + s.n_seeds)
    coders = [replacement for seed in seeds for replacement in trained(replace(s, seed=seed), target)]
    replacements = [*coders, *spd, *baselines(target, s.layers, s.neurons)]
    REPORT.write(s, evaluate(target, replacements, held_out(target, s.eval_tokens), PROTOCOLS))


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=REPORT.redraw)
