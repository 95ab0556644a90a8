"""What does one MLP cost to replace as its active parts grow from 1 to 500: transcoder or SPD?

One layer replaced (`single`). The transcoder's codes are cut to each token's L0 largest (off its trained sparsity but at
the trained k, which is marked); SPD's components are ranked by pre-sigmoid importance, c_fc and down_proj each alone and
both together; neurons are ranked by |h|·‖W_out‖.

    python experiments/exp_005_pareto_gpt2/pareto_gpt2.py                # GPT-2, layer 8: GPU, network
    python experiments/exp_005_pareto_gpt2/pareto_gpt2.py --target tiny  # offline, 19 min of a core
    … --replot draws the figure again from points.csv
"""

import time
from dataclasses import dataclass
from pathlib import Path

from baselines import baselines  # fmt: skip
from checkpoints import checkpoint_folder  # fmt: skip
from coder_replacements import as_replacement  # fmt: skip
from config import BatchTopK, EncoderConfig
from evaluation import (
    evaluate,
    held_out_tokens,  # fmt: skip
)
from recipes import train_coders  # fmt: skip
from spd_replacement import spd_sweep  # fmt: skip
from study import replot, settings_for, write_report  # fmt: skip
from target_models import load_target


@dataclass(frozen=True)
class Settings:
    target: str = "gpt2"
    layer: int = 8
    trained_k: int = 16  # active latents per token in training
    l0: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 500)  # active latents, components or neurons in evaluation
    d_dict: int = 12_288  # latents
    tokens: int = 200_000_000  # training tokens
    batch: int = 4096  # tokens per training batch
    eval_tokens: int = 131_072  # held-out tokens
    device: str = "cuda"
    seed: int = 0
    output: Path = Path(__file__).parent / "output"
    replot: bool = False  # draw the figure from points.csv and stop


PRESETS = {
    "gpt2": Settings(),
    "tiny": Settings("tiny", layer=2, d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=102_400, device="cpu"),
}


def main(s: Settings) -> None:
    if s.replot:
        return replot(s.output)
    began = time.perf_counter()
    target = load_target(s.target, s.device)
    config = EncoderConfig(
        layer=s.layer, d_in=target.d_model, d_out=target.d_model, d_dict=s.d_dict, rule=BatchTopK(s.trained_k)
    )
    trained = train_coders([config], target, s.tokens, s.batch, s.seed, checkpoint_folder(s.target))
    replacements = [
        as_replacement(trained),
        *(as_replacement(trained, top_k=k) for k in s.l0),
        *spd_sweep(target, (s.layer,), s.l0, each_matrix=True),
        *baselines(target, (s.layer,), neurons=s.l0),
    ]
    measured = evaluate(target, replacements, held_out_tokens(target, s.eval_tokens), ("single",))
    write_report(s.output, measured, s, "One MLP of GPT-2", __doc__, began, s.device)


if __name__ == "__main__":
    main(settings_for(PRESETS, __doc__))
