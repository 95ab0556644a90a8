"""How good are BatchTopK transcoders at the sparsity SPD reached on the same layers?

One transcoder per layer 0–3 with top_k 21, 8, 13, 27 (the mean L0 of SPD's components in each layer), trained on one
stream, then each MLP and all four MLPs replaced.

    python experiments/exp_001_train_transcoder_pile/train_transcoder_pile.py                # pile: GPU, network
    python experiments/exp_001_train_transcoder_pile/train_transcoder_pile.py --target tiny  # offline
    … --replot draws the figure again from points.csv

Expected: each layer alone costs a few hundredths of a nat, all four together several times their sum.
"""

from dataclasses import dataclass
from pathlib import Path

from baselines import baselines
from coder_replacements import as_replacement
from config import BatchTopK
from evaluation import evaluate, held_out
from recipes import transcoder_configs
from study import CoderStudySettings, Report, run_study, train_for
from target_models import load_target


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "pile"
    top_k: tuple[int, ...] = (21, 8, 13, 27)  # active latents per token, layer by layer
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(target="tiny", d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=61_440, device="cpu"),
)
REPORT = Report("Transcoders at SPD's sparsities", __doc__)


def main(s: Settings) -> None:
    target, layers = load_target(s.target, s.home), range(len(s.top_k))
    configs = [
        config
        for layer, k in zip(layers, s.top_k)
        for config in transcoder_configs(target, layers=(layer,), rules=[BatchTopK(k)], d_dict=s.d_dict)
    ]
    trained = train_for(s, target, configs)
    replacements = [as_replacement(trained), *baselines(target, layers, neurons=(16, 64))]
    measured = evaluate(target, replacements, held_out(target, s.eval_tokens), ("single", "frozen", "free"))
    REPORT.write(s, measured)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=REPORT.redraw)
