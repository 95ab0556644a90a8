"""How does the quality of a transcoder grow with the sparsity it was trained for, layer by layer?

BatchTopK transcoders at top_k 8, 16, 32 and 64 on every layer, also recombined with a k per layer (`by_layer`); and beside
them what differs in one thing: TopK (`per_token`), Relu, JumpReLU and Gated in the place of BatchTopK, and a skip connection.
All coders of a layer train on one stream; layers are worker processes in batches, one per device, and a worker that dies costs
its own layer alone.

    python experiments/exp_010_train_transcoder_pile_sweep/train_transcoder_pile_sweep.py                # pile: GPUs
    python experiments/exp_010_train_transcoder_pile_sweep/train_transcoder_pile_sweep.py --target tiny  # offline
    … --replot draws the figure again from points.csv

Expected: FVU and CE degradation fall with k in every layer; all layers together cost more than the sum of the single ones. At
the L0 that it comes to, JumpReLU is as good as BatchTopK, TopK and Relu are worse; a skip helps most where k is small.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from worker_processes import Job, run_jobs

from allocation import by_layer
from baselines import baselines
from checkpoints import Checkpoint
from coder_replacements import as_replacements
from config import BatchTopK, Gated, JumpReLU, Relu, TopK
from evaluation import evaluate, held_out
from recipes import transcoder_configs
from study import CoderStudySettings, Report, check_fits, run_study, train_for
from target_models import TargetModel, load_target


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "pile"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    top_k: tuple[int, ...] = (8, 16, 32, 64)  # active latents per token, of BatchTopK transcoders
    other_k: int = 16  # of TopK transcoders, and of those with a skip
    relu_l1: float = 2e-2  # coefficients of the rules without a k
    jumprelu_l0: float = 4e-3
    gated_l1: float = 5e-2
    devices: tuple[str, ...] = ("cuda:0",)  # one worker process each; `device` measures
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(
        target="tiny", d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=61_440, devices=("cpu",), device="cpu"
    ),
)


def train(s: Settings, target: TargetModel, layers: tuple[int, ...]) -> list[Checkpoint]:
    """Transcoders of these layers, of every rule."""
    others = [TopK(s.other_k), Relu(s.relu_l1), JumpReLU(s.jumprelu_l0), Gated(s.gated_l1)]
    rules = [*(BatchTopK(k) for k in s.top_k), *others]
    configs = [
        *transcoder_configs(target, layers=layers, rules=rules, d_dict=s.d_dict),
        *transcoder_configs(target, layers=layers, rules=[BatchTopK(s.other_k)], d_dict=s.d_dict, skip=True),
    ]
    return train_for(s, target, configs)


def train_layer(s: Settings, layer: int, device: str) -> None:
    own = replace(s, device=device)
    train(own, load_target(s.target, own.home), (layer,))


REPORT = Report("Transcoders, k swept", __doc__)


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    run_jobs([Job(f"layer {layer}", train_layer, (s, layer)) for layer in s.layers], s.devices)
    trained = train(s, target, s.layers)  # all are there
    sweep = [c for c in trained if isinstance(c.coder.config.rule, BatchTopK) and not c.coder.config.skip]
    replacements = [
        *as_replacements(trained),
        *by_layer(target, sweep),
        *baselines(target, s.layers, neurons=(s.top_k[0], s.top_k[-1])),
    ]
    measured = evaluate(target, replacements, held_out(target, s.eval_tokens), ("single", "frozen", "free"))
    REPORT.write(s, measured)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=REPORT.redraw)
