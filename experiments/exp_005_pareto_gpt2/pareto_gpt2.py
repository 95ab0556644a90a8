"""What does one MLP cost to replace as its active parts grow from 1 to 500: transcoder or SPD?

One layer replaced (`single`). The transcoder's codes are cut to each token's L0 largest, or by a threshold that L0 of them
exceed on average (`joint`). Only the point at the trained k uses the sparsity the coder was trained for; it is drawn full,
the others hollow. SPD's components are ranked by pre-sigmoid importance, c_fc and down_proj each alone and both together;
neurons are ranked by |h|·‖W_out‖, of each token or by a threshold.

    python experiments/exp_005_pareto_gpt2/pareto_gpt2.py                # GPT-2, layer 8: GPU, network
    python experiments/exp_005_pareto_gpt2/pareto_gpt2.py --target tiny  # offline
    … --replot draws the figure again from points.csv
"""

from dataclasses import dataclass
from pathlib import Path

from allocation import jointly
from baselines import baselines
from coder_replacements import as_replacement
from config import BatchTopK
from evaluation import evaluate, held_out
from recipes import transcoder_configs
from spd_replacement import spd_sweep
from study import CoderStudySettings, Report, check_fits, run_study, train_for
from target_models import load_target


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "gpt2"
    layer: int = 8
    trained_k: int = 16  # active latents per token in training
    l0: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 500)  # active latents, components or neurons in evaluation
    d_dict: int = 12_288
    tokens: int = 200_000_000
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(target="tiny", layer=2, d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=61_440, device="cpu"),
)
REPORT = Report("One MLP of GPT-2", __doc__)


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    sweep = spd_sweep(target, (s.layer,), s.l0, each_matrix=True)  # before the training: there may be none
    configs = transcoder_configs(target, layers=(s.layer,), rules=[BatchTopK(s.trained_k)], d_dict=s.d_dict)
    trained = train_for(s, target, configs)
    cut = [as_replacement(trained, top_k=k) for k in s.l0]
    replacements = [
        as_replacement(trained),
        *cut,
        *jointly(target, cut),
        *sweep,
        *baselines(target, (s.layer,), neurons=s.l0),
    ]
    measured = evaluate(target, replacements, held_out(target, s.eval_tokens), ("single",))
    REPORT.write(s, measured)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=REPORT.redraw)
