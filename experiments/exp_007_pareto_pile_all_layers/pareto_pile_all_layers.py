"""All four MLPs replaced: which method degrades least, as L0 is swept, on every x-axis?

Codes are cut to each token's L0 largest, whatever the trained sparsity, for transcoders, CLT, SPD and neurons alike; only
exp_011 compares coders at the sparsity they were trained for. x-axes: parts per module, parts per MLP, active parameters,
bits per token.

    python experiments/exp_007_pareto_pile_all_layers/pareto_pile_all_layers.py                # pile: GPU, network
    python experiments/exp_007_pareto_pile_all_layers/pareto_pile_all_layers.py --target tiny  # offline, 17 min of a core
    … --replot draws the figure again from points.csv
"""

import time
from dataclasses import dataclass
from pathlib import Path

from baselines import baselines  # fmt: skip
from checkpoints import checkpoint_folder  # fmt: skip
from coder_replacements import as_replacement  # fmt: skip
from config import BatchTopK
from evaluation import (
    evaluate,
    held_out_tokens,  # fmt: skip
)
from recipes import clt_configs, train_coders, transcoder_configs  # fmt: skip
from spd_replacement import spd_sweep  # fmt: skip
from study import replot, settings_for, write_report  # fmt: skip
from target_models import load_target


@dataclass(frozen=True)
class Settings:
    target: str = "pile"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    trained_k: int = 16  # active latents per token and layer in training, transcoders and CLT
    l0: tuple[int, ...] = (1, 4, 16, 64, 256)  # active latents, components or neurons in evaluation
    d_dict: int = 4096  # latents per layer
    tokens: int = 500_000_000  # training tokens
    batch: int = 4096  # tokens per training batch
    eval_tokens: int = 131_072  # held-out tokens
    device: str = "cuda"
    seed: int = 0
    output: Path = Path(__file__).parent / "output"
    replot: bool = False  # draw the figure from points.csv and stop


PRESETS = {
    "pile": Settings(),
    "tiny": Settings(
        "tiny", l0=(1, 4, 16, 64, 256), d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=102_400, device="cpu"
    ),
}


def main(s: Settings) -> None:
    if s.replot:
        return replot(s.output)
    began = time.perf_counter()
    target = load_target(s.target, s.device)
    rule, folder = [BatchTopK(s.trained_k)], checkpoint_folder(s.target)
    transcoders = train_coders(
        transcoder_configs(target, s.layers, rule, s.d_dict), target, s.tokens, s.batch, s.seed, folder
    )
    clts = train_coders(clt_configs(target, s.layers, rule, s.d_dict), target, s.tokens, s.batch, s.seed, folder)
    replacements = [
        *(as_replacement(trained, top_k=k) for trained in (transcoders, clts) for k in s.l0),
        *spd_sweep(target, s.layers, s.l0),
        *baselines(target, s.layers, neurons=s.l0),
    ]
    measured = evaluate(target, replacements, held_out_tokens(target, s.eval_tokens), ("frozen", "free"))
    write_report(s.output, measured, s, "All MLPs replaced, L0 swept", __doc__, began, s.device)


if __name__ == "__main__":
    main(settings_for(PRESETS, __doc__))
