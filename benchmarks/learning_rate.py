"""Which peak learning rate, and which initial decoder, suit a run of a given length? Behind `training.default_learning_rate`.

All coders of a run see the same batches; they differ in learning rate and initial decoder. Appends held-out FVU of the
deployed face, mean over layers, to results/learning_rate.csv.

    python benchmarks/learning_rate.py --tokens 300000 --lrs 1e-3 2e-3 4e-3 8e-3
"""

import itertools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from tqdm import tqdm

from activation_store import ActivationsStore, DataConfig
from clt import CrossLayerTranscoder
from coder import Coder
from config import BatchTopK, CLTConfig, EncoderConfig, TrainConfig
from logs import read_csv, write_csv
from losses import fvu
from target_models import TargetModel, load_target
from training import CoderRun, annealed_k, schedule, start_run, training_step
from transcoder import BaseTranscoder, build_transcoder

Initial = Literal["zero", "tied", "response"]  # decoder rows: 0; the encoder's; what the MLP answers to the encoder's


@dataclass(frozen=True)
class Settings:
    target: str = "tiny"
    tokens: int = 300_000
    batch: int = 2048
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    initials: tuple[Initial, ...] = ("zero",)
    kinds: tuple[Literal["transcoder", "clt"], ...] = ("transcoder",)
    k: int = 16
    d_dict: int = 1536
    held_out: int = 32_768  # validation tokens
    seed: int = 0
    device: str = "cpu"
    output: Path = Path(__file__).parent / "results" / "learning_rate.csv"


class Row(NamedTuple):
    kind: str
    initial: str
    d_dict: int
    k: int
    batch: int
    tokens: int
    seed: int
    lr: float
    fvu: float  # held-out, deployed threshold, mean over layers
    fvu_by_layer: str
    l0: float


@torch.no_grad()
def set_decoder(coder: Coder, initial: Initial, target: TargetModel, x_mean: torch.Tensor) -> None:
    """Rows of norm 0.1 (a start at a quarter and at four times that is no better); a CLT starts at zero always."""
    if initial == "zero" or not isinstance(coder, BaseTranscoder):
        return
    rows = coder.encoder.W_enc
    if initial == "response":
        d_in = rows.shape[1]
        step = rows * d_in**0.5 / coder.x_scale  # as long as a token's input
        layer = coder.config.layer
        rows = target.mlp(layer, x_mean + step) - target.mlp(layer, x_mean)
    coder.W_dec.copy_(0.1 * rows / rows.norm(dim=1, keepdim=True))


def new_coders(s: Settings, target: TargetModel, kind: str) -> list[Coder]:
    layers, d = tuple(range(target.n_layers)), target.d_model
    generator = torch.Generator().manual_seed(s.seed)
    if kind == "clt":
        return [
            CrossLayerTranscoder(
                CLTConfig(layers=layers, d_in=d, d_out=d, d_dict=s.d_dict, rule=BatchTopK(s.k)), generator
            )
        ]
    return [
        build_transcoder(EncoderConfig(layer=i, d_in=d, d_out=d, d_dict=s.d_dict, rule=BatchTopK(s.k)), generator)
        for i in layers
    ]


def main(s: Settings) -> None:
    target = load_target(s.target, s.device)
    data = DataConfig(layers=tuple(range(target.n_layers)), batch_tokens=s.batch, seed=s.seed)
    store = ActivationsStore(target, data)
    config = TrainConfig(tokens=s.tokens, lr=0.0, seed=s.seed)
    unused = tempfile.mkdtemp()
    groups: list[tuple[str, Initial, float, list[CoderRun]]] = []
    for kind, initial, lr in itertools.product(s.kinds, s.initials, s.lrs):
        runs = [
            start_run("", coder, store=store, config=config, folder=Path(unused))
            for coder in new_coders(s, target, kind)
        ]
        for run in runs:
            set_decoder(run.coder, initial, target, store.stats.x_mean[run.rows[0]])
        groups.append((kind, initial, lr, runs))
    steps = s.tokens // s.batch
    for step in tqdm(range(steps), mininterval=10):
        batch, k = next(store), annealed_k(s.k, step, steps=steps, config=config)
        for _, _, lr, runs in groups:
            for run in runs:
                run.coder.set_k(k)
                training_step(run, batch, config=config, lr=lr * schedule(step, steps, config))
    calibration = list(itertools.islice(store, 32))
    held_out = list(itertools.islice(ActivationsStore(target, data, split="val"), s.held_out // s.batch))
    rows = []
    for kind, initial, lr, runs in groups:
        by_layer: list[float] = []
        l0 = 0.0
        for run in runs:
            run.coder.calibrate([run.coder.view(*batch, run.rows)[0] for batch in calibration])
            run.coder.eval()
            errors = []
            with torch.no_grad():
                for batch in held_out:
                    x, y = run.coder.view(*batch, run.rows)
                    y_hat, codes = run.coder(x)
                    errors.append(fvu(y, y_hat, run.variance))
                    parts = (codes,) if kind == "transcoder" else codes
                    l0 += sum(len(own.values) / own.n_rows for own in parts)
            by_layer += torch.stack(errors).mean(0).flatten().tolist()
        n = len(by_layer)
        text = " ".join(f"{value:.4f}" for value in by_layer)
        rows.append(
            Row(kind, initial, s.d_dict, s.k, s.batch, s.tokens, s.seed, lr, round(sum(by_layer) / n, 4), text,
                round(l0 / n / len(held_out), 2))
        )  # fmt: skip
        print(*rows[-1])
    old = read_csv(s.output) if s.output.exists() else []
    write_csv(s.output, Row._fields, [*(row.values() for row in old), *rows])


if __name__ == "__main__":
    os.environ["WANDB_MODE"] = "disabled"
    main(tyro.cli(Settings, description=__doc__))
