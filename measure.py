"""The command line that measures checkpoints of any kind on a target's held-out text, beside the baselines.

    python measure.py CHECKPOINT… --target tiny                      checkpoints of this project, SPD's included
    python measure.py FOLDER… --target gpt2 --format saelens         dictionaries in another library's format
    python measure.py wandb:ENTITY/PROJECT/runs/ID --target pile     an SPD run of Goodfire's, or the folder of one

Rows are added to a points.csv and its layers.csv; the table goes to standard output.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from baselines import baselines
from coder_replacements import as_replacements
from config import Site
from evaluation import PROTOCOLS, Measurement, Protocol, evaluate, held_out
from foreign_files import Place
from foreign_formats import Named
from logs import command_line
from pareto import (
    LayerPoint,
    ParetoPoint,
    markdown_table,
    read_layers,
    read_points,
    row_key,
    write_layers,
    write_points,
)
from replacement import Origin, Replacement
from spd_replacement import SPDReplacement
from spd_runs import GateInputs
from target_models import load_target


def main(
    checkpoints: tuple[str, ...],
    target: str = "tiny",
    tokens: int = 100_000,
    protocols: tuple[Protocol, ...] = PROTOCOLS,
    top_k: tuple[int, ...] = (),
    neurons: tuple[int, ...] = (),
    format: str = "",
    layer: int | None = None,
    site: Site | None = None,
    unproven_target: bool = False,
    gate_inputs: GateInputs | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    points: Path = Path("output/evaluation/points.csv"),
) -> None:
    """Measure dictionaries on a target's held-out text, beside the baselines; print the table and add it to a CSV.

    Args:
        checkpoints: Folders, W&B artifacts or Goodfire's SPD runs, wandb:ENTITY/PROJECT/runs/ID;
            per-layer coders of one kind, rule and size are measured together.
        target: tiny, pile, pile-32d1bb3b, simplestories, gpt2, smollm2, hf:NAME or tl:NAME.
        tokens: Held-out tokens to measure on.
        protocols: single, frozen, gates and free, or some of them.
        top_k: Measure each coder also at these numbers of active latents, imposed in place of its rule.
        neurons: Numbers of neurons to measure beside.
        format: upstream, saelens, sparsify, dictionary_learning, circuit-tracer or crosslayer-coding; empty: our own.
        layer: Layer of a foreign dictionary whose files do not say it.
        site: What a foreign SAE reads, where its files do not say.
        unproven_target: Measure a Goodfire run also where it lacks the weights that prove which model it decomposes.
        gate_inputs: Whether the transformer gate of a Goodfire run norms what it reads, where nothing else says it.
        device: cpu, cuda, cuda:1, …
        points: Rows are added to this file and its layers.csv; a row measured anew replaces the old one.
    """
    given = Named(checkpoints, format, Place(layer, site))
    given.check()
    if few := [k for k in top_k if k < 1]:
        raise ValueError(f"--top-k {few[0]}: a token needs at least one active part")
    old = _read(points)  # before the measuring: it may be another kind of table
    model = load_target(target, device)
    found = given.open(model, unproven=unproven_target, gate_inputs=gate_inputs)
    model = found.target
    replacements: list[Replacement] = []
    for reference, (components, record) in found.decompositions.items():
        origin = Origin(record.seed, record.train_tokens, record.train_seconds, reference)
        replacements += [SPDReplacement(model, components, t, origin=origin) for t in (0.0, 0.5)]
        replacements += [SPDReplacement(model, components, top_k=k, origin=origin) for k in top_k]
    replacements += [r for k in (None, *top_k) for r in as_replacements(found.coders, k)]
    layers = sorted({layer for r in replacements for layer in r.layers})
    replacements += baselines(model, layers, neurons)
    measured = evaluate(model, replacements, held_out(model, tokens), tuple(dict.fromkeys(protocols)))
    _append(points, old, measured)
    print(markdown_table(measured.points))


class _Tables(NamedTuple):
    """points.csv and the layers.csv beside it, as rows."""

    points: list[ParetoPoint]
    layers: list[LayerPoint]


def _read(path: Path) -> _Tables:
    """The rows that are there; raises ValueError for a file that is no such table."""
    if path.is_dir():
        raise ValueError(f"--points {path} is a folder: name a file in it, such as {path / 'points.csv'}")
    detail = path.with_name("layers.csv")
    return _Tables(read_points(path) if path.exists() else [], read_layers(detail) if detail.exists() else [])


def _append(path: Path, old: _Tables, measured: Measurement) -> None:
    """Add rows to points.csv and layers.csv, in place of older ones of the same name."""
    new = {row_key(p) for p in measured.points}
    write_points(path, [p for p in old.points if row_key(p) not in new] + measured.points)
    write_layers(path.with_name("layers.csv"), [d for d in old.layers if row_key(d) not in new] + measured.layers)


if __name__ == "__main__":
    command_line(main, "measure.py")
