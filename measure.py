"""The command line that measures checkpoints of any kind on a target's held-out text, beside the baselines.

    python measure.py CHECKPOINT… --target tiny                      checkpoints of this project, SPD's included
    python measure.py FOLDER… --target gpt2 --format saelens         dictionaries in another library's format
    python measure.py wandb:ENTITY/PROJECT/runs/ID --target pile     an SPD run of Goodfire's, or the folder of one

Rows are added to a points.csv and its layers.csv; the table goes to standard output.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from baselines import baselines
from checkpoints import Checkpoint, TrainingRecord, check_target, load_checkpoint
from coder_replacements import as_replacements
from config import Site
from evaluation import PROTOCOLS, Measurement, Protocol, evaluate, held_out
from foreign_files import Place, fitted
from foreign_formats import import_dictionaries
from logs import errors_in_one_line
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
from spd_runs import GateInputs, is_decomposition, load_decomposition
from target_models import TargetModel, at_site, load_target


def _load(reference: str, target: TargetModel, form: str, layer: int | None, site: Site | None) -> list[Checkpoint]:
    """One checkpoint, or every dictionary of a folder in another library's format, on the target's device."""
    if form:
        found = import_dictionaries(form, reference, Place(layer, site))
        paths = [reference if len(found) == 1 else f"{reference}/{entry.name}" for entry in found]
        loaded = [
            Checkpoint(
                entry.coder.to(target.device).eval(), TrainingRecord.imported(path, target.name, entry.hooks), path
            )
            for entry, path in zip(found, paths)
        ]
    else:
        loaded = [load_checkpoint(reference, str(target.device))]
    for checkpoint in loaded:
        check_target(checkpoint, target)
        config = checkpoint.coder.config
        if outside := [i for i in config.layers if not 0 <= i < target.n_layers]:
            raise ValueError(f"{reference} is for layer {outside[0]}: {target.name!r} has {target.n_layers} from 0 on")
        if {config.d_in, config.d_out} != {target.d_model}:
            raise ValueError(f"{reference} reads {config.d_in} dimensions: {target.name!r} has {target.d_model}")
    return [replace(c, coder=fitted(c.coder, c.record.hooks, target).to(target.device)) for c in loaded]


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
    if not checkpoints:
        raise ValueError("name at least one checkpoint to measure: a folder or a W&B artifact")
    if twice := [reference for reference in checkpoints if checkpoints.count(reference) > 1]:
        raise ValueError(f"{twice[0]} was named {len(twice)} times: once is enough")
    if not format and (layer, site) != (None, None):
        raise ValueError(
            "--layer and --site are of foreign dictionaries, named with --format: ours say where they stand"
        )
    if few := [k for k in top_k if k < 1]:
        raise ValueError(f"--top-k {few[0]}: a token needs at least one active part")
    old = _read(points)  # before the measuring: it may be another kind of table
    model = load_target(target, device)
    coders: list[Checkpoint] = []
    replacements: list[Replacement] = []
    for reference in checkpoints:
        if not format and is_decomposition(reference):
            components, record = load_decomposition(reference, model, unproven=unproven_target, gate_inputs=gate_inputs)
            origin = Origin(record.seed, record.train_tokens, record.train_seconds, reference)
            replacements += [SPDReplacement(model, components, t, origin=origin) for t in (0.0, 0.5)]
            replacements += [SPDReplacement(model, components, top_k=k, origin=origin) for k in top_k]
        else:
            coders += _load(reference, model, format, layer, site)
    sites = {checkpoint.coder.config.site for checkpoint in coders} or {"mlp_out"}
    if len(sites) > 1 or (replacements and sites != {"mlp_out"}):
        raise ValueError(
            f"these dictionaries stand at several sites ({', '.join(sorted(sites))}): measure each by itself"
        )
    model = at_site(model, sites.pop())
    replacements += [r for k in (None, *top_k) for r in as_replacements(coders, k)]
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


def command_line(arguments: Sequence[str] | None = None) -> None:
    """`main` with arguments from the command line; what is wrong with them is said in one line."""
    import tyro

    errors_in_one_line()
    tyro.cli(main, args=arguments, prog="measure.py", config=(tyro.conf.PositionalRequiredArgs,))


if __name__ == "__main__":
    command_line()
