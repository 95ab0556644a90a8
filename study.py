"""The frame of every experiment: settings from the command line, and a report with table, figure and settings."""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from activation_cache import Cache
from activation_store import Harvest, check_layers
from checkpoints import Checkpoint, checkpoint_folder
from config import CoderConfig
from evaluation import Measurement
from logs import errors_in_one_line, write_settings
from parallel import Form, joined, world
from pareto import ParetoPoint, markdown_table, read_points, write_layers, write_pairs, write_points
from pareto_figure import draw
from recipes import train_coders
from target_models import TargetModel

# whole numbers that may be 0; all others but a seed count something
FROM_ZERO = ("layer", "layers", "gate_steps", "tune_tokens")
SO_FAR = "so_far.png"
SUMMARY = ("method", "k", "l0", "ce_degradation", "active_params")


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What can be chosen in every experiment on a target; an experiment adds its own settings."""

    target: str  # tiny, pile, pile-32d1bb3b, simplestories, gpt2, smollm2, hf:NAME or tl:NAME
    eval_tokens: int = 131_072  # held-out tokens that are measured on
    device: str = "cuda"
    seed: int = 0
    parallel: Form = "data"  # what the processes of torchrun share out
    output: Path
    replot: bool = False  # draw figure and README again from the tables in `output`, and stop


@dataclass(frozen=True, kw_only=True)
class CoderStudySettings(StudySettings):
    """What can be chosen beside that where coders are trained."""

    d_dict: int = 4096  # latents per layer
    tokens: int = 500_000_000  # training tokens
    batch: int = 4096  # tokens per training batch
    # activations on disk, fp16 or int8: a second training on the same text does not run the target
    cache: Cache = "none"
    target_device: str | None = None  # of the target, the ruler and training on the output; None: the one of the coders

    @property
    def harvest(self) -> Harvest:
        return Harvest(cache=self.cache, device=self.device if self.target_device else None)

    @property
    def home(self) -> str:
        """Where the target lies."""
        return self.target_device or self.device


def train_for(s: CoderStudySettings, target: TargetModel, configs: Sequence[CoderConfig]) -> list[Checkpoint]:
    """Coders of a study's size and seed, trained as it was asked to, or found among all that was trained on its target."""
    sizes = {"tokens": s.tokens, "batch": s.batch, "seed": s.seed}
    return train_coders(configs, target, harvest=s.harvest, folder=checkpoint_folder(s.target), **sizes)


def nothing_more(folder: Path) -> list[str]:
    """Draws nothing."""
    return []


def write_readme(folder: Path, title: str, text: str, *below: str) -> None:
    """README.md of title and text, what a notes.md there says of the run, and the paragraphs below."""
    notes = folder / "notes.md"
    said = [notes.read_text().strip()] if notes.exists() else []
    (folder / "README.md").write_text("\n\n".join([f"# {title}", text.strip(), *said, *below]) + "\n")


@dataclass(frozen=True)
class Report:
    """What an experiment leaves in its output folder: tables, settings, and a README of title, text, figure and table."""

    title: str
    text: str
    more: Callable[[Path], list[str]] = nothing_more  # draws what it also has to show; paragraphs below the figure

    def write(self, s: StudySettings, measured: Measurement) -> None:
        """points.csv, layers.csv, pairs.csv and settings.json, then what is drawn from them; prints a short table."""
        s.output.mkdir(parents=True, exist_ok=True)
        write_points(s.output / "points.csv", measured.points)
        write_layers(s.output / "layers.csv", measured.layers)
        write_pairs(s.output / "pairs.csv", measured.pairs)
        write_settings(s.output, s, s.device)
        self.redraw(s.output)
        (s.output / SO_FAR).unlink(missing_ok=True)

    def show(self, s: StudySettings, measured: Measurement) -> None:
        """so_far.png: the figure of what is measured so far; `write` takes it away."""
        s.output.mkdir(parents=True, exist_ok=True)
        draw(measured.points, s.output / SO_FAR, title=f"So far: {measured.points[0].tokens:,} tokens")

    def redraw(self, folder: Path) -> None:
        """pareto.png and README.md from the tables alone; what a notes.md there says of the run stands below the text."""
        points = read_points(folder / "points.csv")
        draw(points, folder / "pareto.png")
        below = ["![Pareto curves](pareto.png)", *self.more(folder), markdown_table(points)]
        write_readme(folder, self.title, self.text, *below)
        print(f"{summary(points)}\n\nAll {len(points)} rows, and the figure: {folder / 'README.md'}")


def summary(points: Sequence[ParetoPoint]) -> str:
    """What each method costs where it replaces every layer at once and reads its own stream (`free`), if that was measured."""
    free = [p for p in points if p.protocol == "free"]
    return markdown_table(free or points, SUMMARY)


def settings_for[S: StudySettings](presets: Sequence[S], doc: str) -> S:
    """The command line's settings; the preset of the named `--target` gives the defaults, the first one without a name.

    A single preset serves every target. Raises ValueError for a target that none of several presets is made for.
    """
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--target", default=presets[0].target)
    named = first.parse_known_args(sys.argv[1:])[0].target
    made_for = {preset.target: preset for preset in presets}
    if len(presets) > 1 and named not in made_for:
        raise ValueError(f"this experiment has no sizes for target {named!r}: use one of {', '.join(made_for)}")
    default = made_for.get(named, presets[0])
    return tyro.cli(type(default), default=default, description=doc)


def check_counts(s: Any) -> None:
    """Raises ValueError naming the first of a dataclass' settings that asks for fewer than one token, latent, step, …, or for
    a layer below 0."""
    for field in fields(s):
        value = getattr(s, field.name)
        least = 0 if field.name in FROM_ZERO else 1
        numbers = value if isinstance(value, tuple) else (value,)
        if field.name != "seed" and any(type(number) is int and number < least for number in numbers):
            option = f"--{field.name.replace('_', '-')} {' '.join(map(str, numbers))}"
            raise ValueError(f"{option} cannot be meant: ask for {least} or more")


def check_fits(s: StudySettings, target: TargetModel) -> None:
    """Raises ValueError where the settings ask for a layer or for more neurons than the target has: before any training."""
    asked = {field.name: getattr(s, field.name) for field in fields(s)}
    layers = asked.get("layers", ())
    if "layer" in asked and layers and asked["layer"] not in layers:
        raise ValueError(
            f"--layer {asked['layer']} is none of --layers {' '.join(map(str, layers))}: name it there too"
        )
    check_layers(target, layers or (asked.get("layer", 0),))
    for name in ("neurons", "neuron_k", "l0"):
        if too_many := [k for k in asked.get(name, ()) if k > target.d_mlp]:
            option = f"--{name.replace('_', '-')} {too_many[0]}"
            raise ValueError(f"{option} is more than the {target.d_mlp} neurons in a layer of {target.name!r}")


def run_study[S: StudySettings](
    main: Callable[[S], None], presets: Sequence[S], doc: str, *, redraw: Callable[[Path], None]
) -> None:
    """An experiment's command line: `main` with the settings it was given, or `redraw` of its output with `--replot`."""
    errors_in_one_line()
    s = settings_for(presets, doc)
    check_counts(s)
    if s.replot:
        return redraw(s.output)
    with joined(s.device, s.parallel) as device, contextlib.ExitStack() as stack:
        if not world().leads:  # repeats what comes after training, for nobody
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))  # progress bars; an error is said outside
            s = replace(s, output=Path(stack.enter_context(tempfile.TemporaryDirectory())))
        main(replace(s, device=device))
