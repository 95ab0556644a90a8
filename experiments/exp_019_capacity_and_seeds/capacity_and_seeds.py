"""Does a larger dictionary find more or split what a smaller one has, and do two seeds find the same?

Transcoders (`--kinds sae clt` for others) of half to eight times as many latents as a layer has neurons, at equal tokens and k;
beside them SPD of the same matrices, of half to eight times 64 components each, after as many tokens, and the shipped SPD.

alive      firing, i.e. being in the deployed code, on more than a share ρ of the counted training tokens; SPD at several gate
           thresholds τ, and by the published rule for components, mean importance above ρ, side by side
neighbour  largest cosine of a live unit's decoder with another one's; across seeds that of the unit assigned to it, where
           an assignment makes the sum of cosines largest
children   of a live unit of capacity 1×, in a larger dictionary: decoder cosine above 0.5 and activation Jaccard above 0.5, or,
           since two disjoint halves of a unit's tokens cannot both reach that, more than half of the child's tokens among the
           unit's (contained); null: another seed at the capacity of the unit, and another seed at the larger capacity

    python experiments/exp_019_capacity_and_seeds/capacity_and_seeds.py --target tiny  # offline
    python experiments/exp_019_capacity_and_seeds/capacity_and_seeds.py                # pile: GPU, network
    … --replot draws figure and README again from the tables

Expected: ΔCE falls by less than a tenth per doubling at so few tokens; most units of the small dictionaries live, a falling share
of the large ones; a fifth of the units find a match of cosine 0.7 in another seed, fewer the larger the dictionary; children by
Jaccard are no more than the null's, contained ones grow with capacity: splitting is seen by the second rule alone. For SPD the
rule decides: by mean importance nearly all components live, by firing at τ = 0.5 a tenth.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capacity_figure import redraw
from spd_units import spd_alive
from unit_counts import alive_rows, children_rows, counted, neighbour_rows
from unit_tables import Alive, Children, Cost, Neighbours

from checkpoints import Checkpoint, checkpoint_folder
from coder_replacements import as_replacement
from config import BatchTopK
from evaluation import evaluate, held_out
from logs import write_csv, write_settings
from metrics import average
from pareto import ParetoPoint, write_points
from recipes import SPDRecipe, clt_configs, sae_configs, train_coders, train_decomposition, transcoder_configs
from replacement import Origin, Replacement
from spd_replacement import SPDReplacement
from spd_runs import find_spd
from study import CoderStudySettings, check_fits, run_study
from target_models import TargetModel, load_target
from token_stream import HeldOutText

BUILD = {"sae": sae_configs, "transcoder": transcoder_configs, "clt": clt_configs}


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "pile"
    kinds: tuple[str, ...] = ("transcoder",)
    layers: tuple[int, ...] = (1, 3)  # replaced together, and each examined
    capacities: tuple[float, ...] = (0.5, 1, 2, 4, 8)  # times `d_dict`, which here is the layer's number of neurons
    k: int = 16  # active latents per token and layer, at every capacity
    n_seeds: int = 5  # from `seed` on
    count_tokens: int = 1_000_000  # training tokens on which firing is counted, of the first seed
    match_tokens: int = 65_536  # those of them on which units are compared
    components: int = 64  # of every matrix, at capacity 1×
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(d_dict=3072),
    Settings(
        target="tiny", d_dict=768, tokens=102_400, batch=1024, eval_tokens=10_240, count_tokens=262_144, device="cpu"
    ),
)


def dictionaries(s: Settings, target: TargetModel, kind: str, seed: int) -> dict[float, list[Checkpoint]]:
    """Capacity → its coders; all of a seed and kind are trained on one stream."""
    sizes = {capacity: round(capacity * s.d_dict) for capacity in s.capacities}
    rules = [BatchTopK(s.k)]
    asked = {c: BUILD[kind](target, layers=s.layers, rules=rules, d_dict=size) for c, size in sizes.items()}
    every = [config for own in asked.values() for config in own]
    folder = checkpoint_folder(s.target) / f"n{s.tokens}"
    trained = train_coders(every, target, tokens=s.tokens, batch=s.batch, seed=seed, harvest=s.harvest, folder=folder)
    return {c: [t for t in trained if t.coder.config.d_dict == size] for c, size in sizes.items()}


def decompositions(s: Settings, target: TargetModel) -> dict[float, SPDReplacement]:
    """Capacity → an SPD of the layers after as many tokens as the coders."""
    found, folder = {}, checkpoint_folder(s.target) / "capacity"
    steps, sequences = s.tokens // s.batch, s.batch // target.context
    for capacity in s.capacities:
        components = round(capacity * s.components)
        recipe = SPDRecipe(components=components, gate_hidden=16, steps=steps, batch=sequences, seed=s.seed)
        model, record = train_decomposition(target, recipe, layers=s.layers, folder=folder)
        origin = Origin(record.seed, record.train_tokens, record.train_seconds)
        found[capacity] = SPDReplacement(target, model, origin=origin)
    return found


def cost(points: list[ParetoPoint], kind: str, capacity: float, units: int) -> Cost:
    """One dictionary, of all its layers together."""
    (free,) = [p for p in points if p.protocol == "free"]
    alone = sum(p.ce_degradation for p in points if p.protocol == "single")
    return Cost(
        kind, capacity, units, free.seed or 0, alone, free.ce_degradation, free.ce_low, free.ce_high, free.l0 or 0.0,
        average([p.fvu for p in points if p.protocol == "single" and p.fvu is not None]), free.train_tokens or 0,
    )  # fmt: skip


def measured(target: TargetModel, replacements: Sequence[Replacement], text: HeldOutText) -> list[list[ParetoPoint]]:
    """The rows of each replacement: one for each layer alone, and one for all."""
    points = evaluate(target, replacements, text, ("single", "free")).points
    return [list(own) for own in itertools.batched(points, len(points) // len(replacements), strict=True)]


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    text = held_out(target, s.eval_tokens)
    points, costs, alive, neighbours, children = [], [], [], [], []
    for kind in s.kinds:
        by_seed = [dictionaries(s, target, kind, seed) for seed in range(s.seed, s.seed + s.n_seeds)]
        for of_seed in by_seed:
            rows = measured(target, [as_replacement(own) for own in of_seed.values()], text)
            costs += [cost(own, kind, c, round(c * s.d_dict)) for c, own in zip(of_seed, rows)]
            points += itertools.chain(*rows)
        for layer in s.layers:
            by_capacity = {
                capacity: [counted(of_seed[capacity], target, layer, s.match_tokens) for of_seed in by_seed]
                for capacity in s.capacities
            }
            alive += alive_rows(kind, {c: by_seed[0][c] for c in s.capacities}, target, layer, s.count_tokens)
            neighbours += neighbour_rows(kind, layer, by_capacity)
            children += children_rows(kind, layer, by_capacity)
    spds = decompositions(s, target)
    rows = measured(target, list(spds.values()), text)
    costs += [cost(own, "spd", c, round(c * s.components)) for c, own in zip(spds, rows)]
    points += itertools.chain(*rows)
    for capacity, spd in spds.items():
        alive += spd_alive("spd", capacity, spd, s.match_tokens)
    alive += spd_alive("spd (shipped)", 0.0, SPDReplacement(target, find_spd(target, s.layers).model), s.match_tokens)
    write_points(s.output / "points.csv", points)
    for name, kind_of_row, rows_of in (
        ("costs", Cost, costs), ("alive", Alive, alive), ("neighbours", Neighbours, neighbours), ("children", Children, children)
    ):  # fmt: skip
        write_csv(s.output / f"{name}.csv", kind_of_row._fields, rows_of)
    write_settings(s.output, s, s.device)
    redraw(s.output, __doc__)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=lambda folder: redraw(folder, __doc__))
