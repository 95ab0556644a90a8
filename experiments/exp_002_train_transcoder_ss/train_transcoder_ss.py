"""Do transcoders do as well on a model of simple stories, whose text is far more regular?

BatchTopK transcoders on layers 0–3, one k for all layers, trained on one stream, then all four MLPs replaced. Offline,
where no story model is at hand, the embedded model stands in and the seed is another one than exp_001's.

    python experiments/exp_002_train_transcoder_ss/train_transcoder_ss.py                # SimpleStories: GPU, network, hours
    python experiments/exp_002_train_transcoder_ss/train_transcoder_ss.py --target tiny  # offline, 6 min of a core
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
    target: str = "simplestories"
    top_k: tuple[int, ...] = (16, 16, 16, 16)  # active latents per token, layer by layer
    d_dict: int = 4096  # latents per layer
    tokens: int = 500_000_000  # training tokens
    batch: int = 4096  # tokens per training batch
    eval_tokens: int = 131_072  # held-out tokens
    device: str = "cuda"
    seed: int = 0
    output: Path = Path(__file__).parent / "output"
    replot: bool = False  # draw the figure from points.csv and stop


PRESETS = {
    "simplestories": Settings(),
    "tiny": Settings("tiny", d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=102_400, device="cpu", seed=1),
}


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
    measured = evaluate(target, replacements, held_out_tokens(target, s.eval_tokens), ("frozen", "free"))
    write_report(s.output, measured, s, "Transcoders on SimpleStories", __doc__, began, s.device)


if __name__ == "__main__":
    main(settings_for(PRESETS, __doc__))
