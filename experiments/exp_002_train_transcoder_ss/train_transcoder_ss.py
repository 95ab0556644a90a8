"""Do transcoders do as well on a model of simple stories, whose text is far more regular?

BatchTopK transcoders on layers 0–3, one k for all layers, trained on one stream, then all four MLPs replaced. Offline,
where no story model is at hand, the embedded model stands in and the seed is another one than exp_001's.

    python experiments/exp_002_train_transcoder_ss/train_transcoder_ss.py                # SimpleStories: GPU, network
    python experiments/exp_002_train_transcoder_ss/train_transcoder_ss.py --target tiny  # offline
    … --replot draws the figure again from points.csv

Expected: all four MLPs together cost no more than in exp_001, and more where encoders read the stream that earlier
replacements wrote (`free`) than where they read a clean one (`frozen`).
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
    target: str = "simplestories"
    top_k: tuple[int, ...] = (16, 16, 16, 16)  # active latents per token, layer by layer
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(target="tiny", d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=61_440, device="cpu", seed=1),
)
REPORT = Report("Transcoders on SimpleStories", __doc__)


def main(s: Settings) -> None:
    target, layers = load_target(s.target, s.home), range(len(s.top_k))
    configs = [
        config
        for layer, k in zip(layers, s.top_k)
        for config in transcoder_configs(target, layers=(layer,), rules=[BatchTopK(k)], d_dict=s.d_dict)
    ]
    trained = train_for(s, target, configs)
    replacements = [as_replacement(trained), *baselines(target, layers, neurons=(16, 64))]
    measured = evaluate(target, replacements, held_out(target, s.eval_tokens), ("frozen", "free"))
    REPORT.write(s, measured)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=REPORT.redraw)
