"""The main job: train transcoders and cross-layer transcoders on one stream, measure everything with one ruler.

    python main.py                      # the embedded model, offline, minutes on two cores
    python main.py --tokens 50000 --eval-tokens 4096   # to see that it runs
    python main.py --target pile --device cuda --tokens 500000000 --d-dict 4096 --transcoder-k 16 32 64

Writes points.csv, pareto.png, settings.json and README.md into `output/main`, checkpoints into `checkpoints/main`, and
prints the table. Coders that are already trained with the same settings are not trained again.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from baselines import baselines  # fmt: skip
from checkpoints import CHECKPOINTS
from coder_replacements import as_replacements  # fmt: skip
from config import BatchTopK
from evaluation import (
    evaluate,
    held_out_tokens,  # fmt: skip
)
from recipes import clt_configs, train_coders, train_decomposition, transcoder_configs  # fmt: skip
from spd_replacement import spd_replacements  # fmt: skip
from spd_runs import find_spd
from study import settings_for, write_report  # fmt: skip
from target_models import load_target

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Settings:
    target: str = "tiny"  # tiny, pile, simplestories, gpt2, smollm2, hf:NAME or tl:NAME
    layers: tuple[int, ...] = (0, 1, 2, 3)
    transcoder_k: tuple[int, ...] = (8, 32)  # active latents per token of the BatchTopK transcoders
    clt_k: tuple[int, ...] = (16,)  # active latents per token and layer of the cross-layer transcoders
    neuron_k: tuple[int, ...] = (16, 128)  # neurons kept per token by the neuron baseline
    d_dict: int = 1536  # latents per layer
    tokens: int = 1_000_000  # training tokens seen by every coder
    batch: int = 2048  # tokens per training batch
    retrain_spd: bool = False  # decompose afresh, briefly, instead of taking the shipped decomposition of `tiny`
    spd_steps: int = 200  # of four sequences each, where SPD is trained
    eval_tokens: int = 32_768  # held-out tokens the table is measured on
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seed: int = 0
    output: Path = HERE / "output" / "main"
    checkpoints: Path = CHECKPOINTS / "main"


TEXT = """Every row is one method under one protocol, on held-out text. `single`: one layer replaced. `frozen`: all layers
replaced, codes from a clean pass. `free`: all layers replaced, every encoder reads the stream that the replacements
produced."""


def main(s: Settings) -> None:
    began = time.perf_counter()
    target = load_target(s.target, s.device)
    configs = [
        *transcoder_configs(target, s.layers, [BatchTopK(k) for k in s.transcoder_k], s.d_dict),
        *clt_configs(target, s.layers, [BatchTopK(k) for k in s.clt_k], s.d_dict),
    ]
    checkpoints = train_coders(configs, target, s.tokens, s.batch, s.seed, s.checkpoints)
    replacements = as_replacements(checkpoints) + baselines(target, s.layers, s.neuron_k)
    if s.retrain_spd:
        spd = train_decomposition(target, s.layers, 512, 192, s.spd_steps, 4, s.seed, s.checkpoints)
        replacements += spd_replacements(target, spd, s.layers, deltas=(False,))
    elif s.target == "tiny":
        replacements += spd_replacements(target, find_spd(target, s.layers), s.layers, deltas=(False,))
    measured = evaluate(target, replacements, held_out_tokens(target, s.eval_tokens), ("single", "frozen", "free"))
    write_report(s.output, measured, s, "The main job", TEXT, began, s.device)


if __name__ == "__main__":
    main(settings_for({"tiny": Settings()}, __doc__))
