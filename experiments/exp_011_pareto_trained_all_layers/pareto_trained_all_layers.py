"""The headline: natively trained coders only. Which method wins under which protocol and axis, and what did it cost?

Transcoders, CLTs and SAEs at the k they were trained for (exp_010, exp_003), SPD at its own thresholds, neurons, and the
baselines, all MLPs replaced at once. Panels by x-axis, rows by protocol; every method under every protocol; training
tokens, gate parameters and training time stand in the table.

    python experiments/exp_011_pareto_trained_all_layers/pareto_trained_all_layers.py                # pile: GPU, network
    python experiments/exp_011_pareto_trained_all_layers/pareto_trained_all_layers.py --target tiny  # offline, minutes
    … --target smollm2         # a real language model, offline (requirements-smollm2.txt): half an hour on one core
    … --replot draws the figure again from points.csv
"""

import time
from dataclasses import dataclass
from pathlib import Path

from baselines import baselines  # fmt: skip
from checkpoints import checkpoint_folder
from coder_replacements import as_replacements  # fmt: skip
from config import BatchTopK
from evaluation import (
    evaluate,
    held_out_tokens,  # fmt: skip
)
from recipes import clt_configs, sae_configs, train_coders, transcoder_configs  # fmt: skip
from spd_replacement import spd_replacements  # fmt: skip
from spd_runs import find_spd
from study import replot, settings_for, write_report  # fmt: skip
from target_models import load_target

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Settings:
    target: str = "pile"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    top_k: tuple[int, ...] = (8, 16, 32, 64)  # of the transcoders
    clt_top_k: tuple[int, ...] = (8, 16, 64)  # of the CLTs, per layer
    sae_top_k: tuple[int, ...] = (16, 64)  # of the SAEs of MLP outputs
    neurons: tuple[int, ...] = (8, 32, 128, 512)
    d_dict: int = 4096  # latents per layer
    tokens: int = 500_000_000  # training tokens
    batch: int = 4096  # tokens per training batch
    eval_tokens: int = 131_072  # held-out tokens
    spd: bool = True  # the target's decomposition (exp_004's) beside them
    device: str = "cuda"
    seed: int = 0
    output: Path = HERE / "output"
    replot: bool = False  # draw the figure from points.csv and stop


PRESETS = {
    "pile": Settings(),
    "tiny": Settings(
        "tiny", clt_top_k=(8, 16), d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=102_400, device="cpu"
    ),
    "smollm2": Settings(
        "smollm2", layers=(8, 9, 10), top_k=(16, 32, 64), clt_top_k=(32,), sae_top_k=(32,), neurons=(64, 256), d_dict=2304,
        tokens=204_800, batch=2048, eval_tokens=10_240, spd=False, device="cpu", output=HERE / "output" / "smollm2",
    ),
}  # fmt: skip


def main(s: Settings) -> None:
    if s.replot:
        return replot(s.output)
    began = time.perf_counter()
    target = load_target(s.target, s.device)
    folder = checkpoint_folder(s.target)
    configs = [
        *transcoder_configs(target, s.layers, [BatchTopK(k) for k in s.top_k], s.d_dict),
        *clt_configs(target, s.layers, [BatchTopK(k) for k in s.clt_top_k], s.d_dict),
        *sae_configs(target, s.layers, [BatchTopK(k) for k in s.sae_top_k], s.d_dict),
    ]
    trained = train_coders(configs, target, s.tokens, s.batch, s.seed, folder)
    replacements = [
        *as_replacements(trained),
        *(spd_replacements(target, find_spd(target, s.layers), s.layers) if s.spd else []),
        *baselines(target, s.layers, s.neurons),
    ]
    measured = evaluate(target, replacements, held_out_tokens(target, s.eval_tokens), ("frozen", "free"))
    write_report(s.output, measured, s, "Natively trained coders, all MLPs replaced", __doc__, began, s.device)


if __name__ == "__main__":
    main(settings_for(PRESETS, __doc__))
