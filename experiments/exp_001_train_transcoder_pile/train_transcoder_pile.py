"""How good are BatchTopK transcoders at the sparsity SPD reached on the same layers?

One transcoder per layer 0–3 with top_k 21, 8, 13, 27 (the mean L0 of SPD's components in each layer), trained on one
stream, then all four MLPs replaced.

    python experiments/exp_001_train_transcoder_pile/train_transcoder_pile.py                # pile: GPU, network, hours
    python experiments/exp_001_train_transcoder_pile/train_transcoder_pile.py --target tiny  # offline, 17 min of a core
    … --replot draws the figure again from points.csv

Expected: each layer alone costs a few hundredths of a nat, all four together several times their sum.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from baselines import baselines
from checkpoints import checkpoint_folder
from coder_replacements import as_replacement
from config import BatchTopK, EncoderConfig
from evaluation import evaluate, held_out_tokens
from recipes import train_coders
from study import replot, settings_for, write_report
from target_models import load_target


@dataclass(frozen=True)
class Settings:
    target: str = "pile"
    top_k: tuple[int, ...] = (21, 8, 13, 27)  # active latents per token, layer by layer
    d_dict: int = 4096  # latents per layer
    tokens: int = 500_000_000  # training tokens
    batch: int = 4096  # tokens per training batch
    eval_tokens: int = 131_072  # held-out tokens
    device: str = "cuda"
    seed: int = 0
    output: Path = Path(__file__).parent / "output"
    replot: bool = False  # draw the figure from points.csv and stop


PRESETS = {"pile": Settings(), "tiny": Settings("tiny", d_dict=1536, tokens=1_000_000, batch=2048, device="cpu")}


def main(s: Settings) -> None:
    if s.replot:
        return replot(s.output)
    began = time.perf_counter()
    target = load_target(s.target, s.device)
    layers, d = tuple(range(len(s.top_k))), target.d_model
    configs = [
        EncoderConfig(layer=layer, d_in=d, d_out=d, d_dict=s.d_dict, rule=BatchTopK(k))
        for layer, k in zip(layers, s.top_k)
    ]
    checkpoints = train_coders(configs, target, s.tokens, s.batch, s.seed, checkpoint_folder(s.target))
    replacements = [as_replacement(checkpoints), *baselines(target, layers, neurons=(16, 64))]
    measured = evaluate(target, replacements, held_out_tokens(target, s.eval_tokens), ("single", "frozen", "free"))
    write_report(s.output, measured, s, "Transcoders at SPD's sparsities", __doc__, began, s.device)


if __name__ == "__main__":
    main(settings_for(PRESETS, __doc__))
