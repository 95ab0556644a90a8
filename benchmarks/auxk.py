"""Does AuxK ever cost reconstruction, and does it wake latents that sleep? Behind `losses.auxk` and `training.dead_after`.

Coders of a seed see the same batches; they differ in kind, learning rate and AuxK's coefficient (0: none). With `asleep`,
so many latents of every encoder start with a bias 5 too low, where none fires, and a zero decoder where norms are free.
Appends to results/auxk.csv: held-out FVU of the deployed face (mean over layers), ΔCE of the free-running model with these
layers replaced, latents silent on the held-out tokens, and how many of those put to sleep fire there.

    python benchmarks/auxk.py --tokens 300000 --rates 6.67e-3 1.3e-2
    python benchmarks/auxk.py --tokens 300000 --rates 6.67e-3 --layers 0 2 --asleep 64
"""

import itertools
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from jaxtyping import Int
from learning_rate import train_at_once
from torch import Tensor

from activation_store import ActivationBatch, ActivationsStore, DataConfig
from coder import codes_by_layer
from coder_replacements import REPLACEMENTS
from config import BatchTopK, CoderConfig, TrainConfig
from evaluation import evaluate, held_out
from logs import git_commit, read_csv, write_csv
from losses import fvu
from recipes import clt_configs, new_coder, sae_configs, transcoder_configs
from replacement import Origin
from sparse_ops import fire_counts
from target_models import TargetModel, load_target
from training import CoderRun, dead_after, start_run

DEPTH = 5.0  # of sleep, in scaled pre-activation units; fresh latents have standard deviation 1
CONFIGS = {"transcoder": transcoder_configs, "sae": sae_configs, "clt": clt_configs}


@dataclass(frozen=True)
class Settings:
    target: str = "tiny"
    tokens: int = 300_000
    batch: int = 2048
    rates: tuple[float, ...] = (6.67e-3, 1.3e-2)
    auxs: tuple[float, ...] = (0.0, 1.0)
    kinds: tuple[str, ...] = ("transcoder", "sae", "clt")
    dead_share: float | None = None  # of the run in silence that makes a latent dead; None: the project's rule
    asleep: int = 0  # latents of every encoder put to sleep before the first step
    layers: tuple[int, ...] = (0, 1, 2, 3)
    k: int = 16
    d_dict: int = 1536
    eval_tokens: int = 32_768  # of the test split
    seed: int = 0
    device: str = "cpu"
    output: Path = Path(__file__).parent / "results" / "auxk.csv"


class Trial(NamedTuple):
    """Coders of one kind for all the layers, with one recipe."""

    kind: str
    config: TrainConfig
    runs: list[CoderRun]


class Row(NamedTuple):
    kind: str
    tokens: int
    rate: float
    seed: int
    aux: float
    dead_after: int
    asleep: int
    layers: str
    fvu: float
    fvu_by_layer: str
    ce_degradation: float
    silent: float  # share of latents without a held-out token
    awake: float | None  # of the latents put to sleep, per encoder
    commit: str


def new_trials(s: Settings, target: TargetModel, store: ActivationsStore, unused: Path) -> list[Trial]:
    silence = dead_after(s.tokens) if s.dead_share is None else int(s.dead_share * s.tokens)
    trials = []
    for kind, rate, aux in itertools.product(s.kinds, s.rates, s.auxs):
        config = TrainConfig(tokens=s.tokens, lr=rate, aux=aux, dead_after=silence, seed=s.seed)
        own: Sequence[CoderConfig] = CONFIGS[kind](target, layers=s.layers, rules=[BatchTopK(s.k)], d_dict=s.d_dict)
        coders = [new_coder(c, s.seed) for c in own]
        runs = [start_run("", coder, store=store, config=config, folder=unused) for coder in coders]
        for encoder in itertools.chain.from_iterable(coder.encoders for coder in coders):
            with torch.no_grad():
                encoder.b_enc[: s.asleep] -= DEPTH
        trials.append(Trial(kind, config, runs))
    return trials


def read(run: CoderRun, batches: Iterable[ActivationBatch]) -> tuple[list[float], Int[Tensor, "encoder d_dict"]]:
    """FVU per layer, and how often each latent fired."""
    errors, fired = [], []
    for batch in batches:
        x, y = run.coder.view(*batch, run.rows)
        y_hat, codes = run.coder(x)
        errors.append(fvu(y, y_hat, run.variance).flatten())
        fired.append(torch.stack([fire_counts(own) for own in codes_by_layer(codes)]))
    return torch.stack(errors).mean(0).tolist(), torch.stack(fired).sum(0)


def measure(s: Settings, target: TargetModel, trials: Sequence[Trial], data: DataConfig) -> list[Row]:
    batches = list(itertools.islice(ActivationsStore(target, data, split="test"), s.eval_tokens // s.batch))
    origin, replacements = Origin(s.seed, s.tokens, 0.0, ""), []
    for trial in trials:
        coders = [run.coder for run in trial.runs]
        replacements.append(REPLACEMENTS[type(coders[0].config)](coders, None, "", origin))
    points = evaluate(target, replacements, held_out(target, s.eval_tokens), ("free",)).points
    rows = []
    for (kind, config, runs), point in zip(trials, points, strict=True):
        readings = [read(run, batches) for run in runs]
        by_layer = [value for errors, _ in readings for value in errors]
        fired = torch.cat([counts for _, counts in readings]) > 0
        rows.append(
            Row(
                kind, s.tokens, config.lr, s.seed, config.aux, config.dead_after, s.asleep,
                " ".join(map(str, s.layers)), round(sum(by_layer) / len(by_layer), 4),
                " ".join(f"{value:.4f}" for value in by_layer), round(point.ce_degradation, 4),
                round(1 - fired.float().mean().item(), 4),
                round(fired[:, : s.asleep].float().sum(1).mean().item(), 1) if s.asleep else None, git_commit() or "",
            )
        )  # fmt: skip
    return rows


def main(s: Settings) -> None:
    target = load_target(s.target, s.device)
    data = DataConfig(layers=s.layers, batch_tokens=s.batch, seed=s.seed)
    store = ActivationsStore(target, data)
    with tempfile.TemporaryDirectory() as unused:
        trials = new_trials(s, target, store, Path(unused))
    train_at_once([(trial.config, run) for trial in trials for run in trial.runs], store, k=s.k)
    rows = measure(s, target, trials, data)
    print(*rows, sep="\n")
    earlier = [tuple(row.values()) for row in read_csv(s.output)] if s.output.exists() else []
    write_csv(s.output, Row._fields, [*earlier, *rows])


if __name__ == "__main__":
    os.environ["WANDB_MODE"] = "disabled"
    main(tyro.cli(Settings, description=__doc__))
