"""Does a latent that may write to every later layer need fewer companions than one that writes to its own?

Cross-layer transcoders over layers 0–3, one for each top_k per layer, trained on one stream, all four MLPs replaced.

    python experiments/exp_003_train_clt_pile/train_clt_pile.py                # pile: GPU, network
    python experiments/exp_003_train_clt_pile/train_clt_pile.py --target tiny  # offline
    … --replot draws the figure again from points.csv

Expected: at an equal k per layer and on a clean stream (`frozen`), a CLT costs less than exp_010's transcoders.
"""

from dataclasses import dataclass
from pathlib import Path

from baselines import baselines
from coder_replacements import as_replacements
from config import BatchTopK
from evaluation import evaluate, held_out
from recipes import clt_configs
from study import CoderStudySettings, Report, check_fits, run_study, train_for
from target_models import load_target


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "pile"
    layers: tuple[int, ...] = (0, 1, 2, 3)
    top_k: tuple[int, ...] = (16, 64)  # active latents per token and layer, one CLT each
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(target="tiny", top_k=(8, 16), d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=61_440, device="cpu"),
)
REPORT = Report("Cross-layer transcoders", __doc__)


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    configs = clt_configs(target, layers=s.layers, rules=[BatchTopK(k) for k in s.top_k], d_dict=s.d_dict)
    trained = train_for(s, target, configs)
    replacements = as_replacements(trained) + baselines(target, s.layers, neurons=(16, 64))
    measured = evaluate(target, replacements, held_out(target, s.eval_tokens), ("single", "frozen", "free"))
    REPORT.write(s, measured)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=REPORT.redraw)
