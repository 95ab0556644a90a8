"""All four MLPs replaced: which method degrades least, as L0 is swept, on every x-axis?

Codes are cut to each token's L0 largest, whatever the trained sparsity, for transcoders, CLT, SPD and neurons alike, and but for
SPD by one threshold over all layers with that mean L0 (`joint`): an equal L0 suits no method. Only exp_011 compares coders at
the sparsity they were trained for. x-axes: parts per module, parts per MLP, active parameters,
bits per token.

    python experiments/exp_007_pareto_pile_all_layers/pareto_pile_all_layers.py                # pile: GPU, network
    python experiments/exp_007_pareto_pile_all_layers/pareto_pile_all_layers.py --target tiny  # offline
    … --replot draws the figure again from points.csv
"""

from dataclasses import dataclass
from pathlib import Path

from allocation import jointly
from baselines import baselines
from coder_replacements import as_replacement
from config import BatchTopK
from evaluation import evaluate, held_out
from recipes import clt_configs, transcoder_configs
from spd_replacement import spd_sweep
from study import CoderStudySettings, Report, check_fits, run_study, train_for
from target_models import load_target


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "pile"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    trained_k: int = 16  # active latents per token and layer in training, transcoders and CLT
    l0: tuple[int, ...] = (1, 4, 16, 64, 256)  # active latents, components or neurons in evaluation
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(target="tiny", d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=61_440, device="cpu"),
)
REPORT = Report("All MLPs replaced, L0 swept", __doc__)


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    sweep = spd_sweep(target, s.layers, s.l0)  # before the training: there may be none
    kinds = [
        build(target, layers=s.layers, rules=[BatchTopK(s.trained_k)], d_dict=s.d_dict)
        for build in (transcoder_configs, clt_configs)
    ]
    trained = [train_for(s, target, kind) for kind in kinds]
    cut = [as_replacement(coders, top_k=k) for coders in trained for k in s.l0]
    replacements = [
        *cut,
        *jointly(target, cut),
        *sweep,
        *baselines(target, s.layers, neurons=s.l0),
    ]
    measured = evaluate(target, replacements, held_out(target, s.eval_tokens), ("frozen", "gates", "free"))
    REPORT.write(s, measured)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=REPORT.redraw)
