"""Does a latent that may write to every later layer need fewer companions than one that writes to its own?

Cross-layer transcoders over layers 0–3 with top_k 16 and 64 per layer, trained on one stream, all four MLPs replaced.

    python experiments/exp_003_train_clt_pile/train_clt_pile.py                # pile: GPU, network, hours
    python experiments/exp_003_train_clt_pile/train_clt_pile.py --target tiny  # offline, 13 min of a core
    … --replot draws the figure again from points.csv

Expected: at equal L0 per layer the CLT reconstructs better than per-layer transcoders on a clean stream (`frozen`).
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
from recipes import clt_configs, train_coders  # fmt: skip
from study import replot, settings_for, write_report  # fmt: skip
from target_models import load_target


@dataclass(frozen=True)
class Settings:
    target: str = "pile"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    top_k: tuple[int, ...] = (16, 64)  # active latents per token and layer, one CLT each
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
    "tiny": Settings("tiny", top_k=(8, 16), d_dict=1536, tokens=1_000_000, batch=2048, device="cpu"),
}


def main(s: Settings) -> None:
    if s.replot:
        return replot(s.output)
    began = time.perf_counter()
    target = load_target(s.target, s.device)
    configs = clt_configs(target, s.layers, [BatchTopK(k) for k in s.top_k], s.d_dict)
    checkpoints = train_coders(configs, target, s.tokens, s.batch, s.seed, checkpoint_folder(s.target))
    replacements = as_replacements(checkpoints) + baselines(target, s.layers, neurons=(16, 64))
    measured = evaluate(target, replacements, held_out_tokens(target, s.eval_tokens), ("single", "frozen", "free"))
    write_report(s.output, measured, s, "Cross-layer transcoders", __doc__, began, s.device)


if __name__ == "__main__":
    main(settings_for(PRESETS, __doc__))
