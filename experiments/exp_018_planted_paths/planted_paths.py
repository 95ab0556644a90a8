"""Does a dictionary compute along the path that the model computes along, or does it look the answer up in one hop?

A target whose path is planted (planted_circuit.py: eight bits, XORs, ANDs, an AND, three MLPs, no attention) is decomposed by
transcoders, skip transcoders, CLTs and SPD, of several sparsities and seeds, and what lies on the path is swapped in the
replacement run free (path_scores.py: mediation R, bypass B, one-hop share H, recall). Controls: a dictionary of the circuit's own
neurons, a lookup of the answer at layer 0 (both by hand), a CLT whose decoders to later layers are held at zero, and coders whose
encoders stay random.

    python experiments/exp_018_planted_paths/planted_paths.py                      # what points.csv lacks
    python experiments/exp_018_planted_paths/planted_paths.py --method transcoder  # of one method
    … --replot draws figure and README again from points.csv

Expected: at equal sparsity and behaviour a CLT's R is lower and its B and H higher than a transcoder's, the more so the sparser,
as Lange et al. (2026) found of their toy; transcoders and SPD, which can write to their own layer alone, have H near 0, R near
1 and B near 0; so has a CLT held to its own layer. A method of one's own: a `Method` in `methods`, its settings in `strengths`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import tyro
from path_figure import Row, redraw
from path_methods import CoderMethod, Method
from path_scores import scores
from planted_circuit import OUTPUT, PlantedBatches, PlantedStack
from planted_controls import exact_transcoders, lookup_clt
from planted_training import Budget, SPDBudget, train_coders, train_spd
from tqdm import tqdm

from coder_replacements import CLTReplacement, TranscoderReplacement
from config import BatchTopK, JumpReLU
from logs import errors_in_one_line, git_commit, read_csv, write_csv, write_settings
from study import check_counts

BANDWIDTH = 2.0  # of JumpReLU's kernel: Boolean inputs give few pre-activations, and far from each other
Kind = Literal[
    "exact", "lookup", "transcoder", "transcoder-skip", "clt", "clt-own_layer", "transcoder-frozen_encoder",
    "clt-frozen_encoder", "spd",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    method: tuple[Kind, ...] = get_args(Kind)
    l0_penalty: tuple[float, ...] = (0.01, 0.03, 0.1)  # JumpReLU: of one active latent, beside a loss of FVU
    top_k: tuple[int, ...] = (3, 4)  # BatchTopK: active latents per token and layer
    minimality: tuple[float, ...] = (1e-5, 1e-4)  # SPD
    seeds: int = 5  # each has directions, initial weights and inputs of its own
    steps: int = 1500
    spd_steps: int = 2500
    inputs: int = 8192  # that the scores are taken over
    output: Path = Path(__file__).parent / "output"
    replot: bool = False  # draw figure and README again from points.csv, and stop


class Strength(NamedTuple):
    """How sparse a method is asked to be."""

    name: str  # in the table
    rule: BatchTopK | JumpReLU | None = None
    minimality: float = 0.0


def strengths(s: Settings, kind: Kind) -> list[Strength]:
    """Controls that are trained have the last penalty alone."""
    jump = [Strength(f"l0 {c:g}", JumpReLU(l0=c, bandwidth=BANDWIDTH)) for c in s.l0_penalty]
    if kind in ("exact", "lookup"):
        return [Strength("by hand")]
    if kind == "spd":
        return [Strength(f"minimality {c:g}", minimality=c) for c in s.minimality]
    if kind in ("clt-own_layer", "transcoder-frozen_encoder", "clt-frozen_encoder"):
        return jump[-1:]
    top_k = [Strength(f"k {k}", BatchTopK(k)) for k in s.top_k] if kind != "transcoder-skip" else []
    return jump + top_k


def methods(s: Settings, kind: Kind, strength: Strength, seeds: Sequence[int]) -> list[Method]:
    """One for every seed's target."""
    targets = [PlantedStack([seed]) for seed in seeds]
    if kind == "spd":
        return train_spd(strength.minimality, seeds, SPDBudget(steps=s.spd_steps))
    if kind in ("exact", "lookup"):
        exact = kind == "exact"
        made = [
            TranscoderReplacement(exact_transcoders(t)) if exact else CLTReplacement(lookup_clt(t)) for t in targets
        ]
        return [CoderMethod(own, target.basis[0, OUTPUT]) for own, target in zip(made, targets)]
    assert strength.rule is not None, f"{strength=}"
    budget = Budget(steps=s.steps)
    return [train_coders(kind, strength.rule, target, budget, seed) for target, seed in zip(targets, seeds)]


def measured(s: Settings, kind: Kind, strength: Strength) -> list[Row]:
    began, rows = time.perf_counter(), []
    seeds = range(s.seeds)
    own = methods(s, kind, strength, seeds)
    seconds = (time.perf_counter() - began) / s.seeds
    for seed, method in zip(seeds, own, strict=True):
        target = PlantedStack([seed])
        score = scores(method, target, next(PlantedBatches(target, s.inputs, seed + 5000)))
        rows.append(Row(kind, strength.name, seed, *score, seconds, git_commit() or ""))
    return rows


def main(s: Settings) -> None:
    table = s.output / "points.csv"
    rows = [Row(*row.values()) for row in read_csv(table)] if table.exists() else []
    known = {(row.method, row.rule) for row in rows}
    asked = [(kind, strength) for kind in s.method for strength in strengths(s, kind)]
    for kind, strength in tqdm([pair for pair in asked if (pair[0], pair[1].name) not in known], unit="set"):
        rows += measured(s, kind, strength)
        write_csv(table, Row._fields, rows)
    write_settings(s.output, s, "cpu")
    redraw(s.output, __doc__)


if __name__ == "__main__":
    errors_in_one_line()
    settings = tyro.cli(Settings, description=__doc__)
    check_counts(settings)
    redraw(settings.output, __doc__) if settings.replot else main(settings)
