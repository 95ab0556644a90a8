"""How does the quality of a transcoder grow with the sparsity it was trained for, layer by layer?

BatchTopK transcoders at top_k 8, 16, 32 and 64 on every layer. All k of a layer train on one stream; layers are worker
processes in batches, one per device, and a worker that dies costs its own layer alone.

    python experiments/exp_010_train_transcoder_pile_sweep/train_transcoder_pile_sweep.py                # pile: GPUs
    python experiments/exp_010_train_transcoder_pile_sweep/train_transcoder_pile_sweep.py --target tiny  # offline: 17 min, a core
    … --replot draws the figure again from points.csv

Expected: FVU and CE degradation fall with k in every layer; all layers together cost more than the sum of the single ones.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from baselines import baselines  # fmt: skip
from checkpoints import checkpoint_folder  # fmt: skip
from coder_replacements import as_replacements  # fmt: skip
from config import BatchTopK
from evaluation import (
    evaluate,
    held_out_tokens,  # fmt: skip
)
from recipes import train_coders, transcoder_configs  # fmt: skip
from study import replot, settings_for, write_report  # fmt: skip
from target_models import load_target
from workers import Job, run_jobs


@dataclass(frozen=True)
class Settings:
    target: str = "pile"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    top_k: tuple[int, ...] = (8, 16, 32, 64)  # active latents per token
    d_dict: int = 4096  # latents per layer
    tokens: int = 500_000_000  # training tokens
    batch: int = 4096  # tokens per training batch
    eval_tokens: int = 131_072  # held-out tokens
    devices: tuple[str, ...] = ("cuda:0",)  # one worker process each
    seed: int = 0
    output: Path = Path(__file__).parent / "output"
    replot: bool = False  # draw the figure from points.csv and stop


PRESETS = {
    "pile": Settings(),
    "tiny": Settings("tiny", d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=102_400, devices=("cpu",)),
}


def train_layer(s: Settings, layer: int, device: str) -> None:
    target = load_target(s.target, device)
    configs = transcoder_configs(target, (layer,), [BatchTopK(k) for k in s.top_k], s.d_dict)
    train_coders(configs, target, s.tokens, s.batch, s.seed, checkpoint_folder(s.target))


def main(s: Settings) -> None:
    if s.replot:
        return replot(s.output)
    began = time.perf_counter()
    run_jobs([Job(f"layer {layer}", train_layer, (s, layer)) for layer in s.layers], s.devices)
    target = load_target(s.target, s.devices[0])
    configs = transcoder_configs(target, s.layers, [BatchTopK(k) for k in s.top_k], s.d_dict)
    checkpoints = train_coders(configs, target, s.tokens, s.batch, s.seed, checkpoint_folder(s.target))  # all are there
    replacements = as_replacements(checkpoints) + baselines(target, s.layers, neurons=(s.top_k[0], s.top_k[-1]))
    measured = evaluate(target, replacements, held_out_tokens(target, s.eval_tokens), ("single", "frozen", "free"))
    write_report(s.output, measured, s, "Transcoders, k swept", __doc__, began, s.devices[0])


if __name__ == "__main__":
    main(settings_for(PRESETS, __doc__))
