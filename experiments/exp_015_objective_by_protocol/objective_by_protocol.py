"""What does a coder gain from being trained on the model's output, and under which protocols does it keep the gain?

SAEs, transcoders, skip transcoders and CLTs at every k, at equal training tokens: on what their layers write (N tokens), the
same (N / 2, SmolLM2: 4 N / 5) and then on the KL of the output under one protocol or a mixture of them (the rest), or on that KL
from scratch (N).
Each is measured under every protocol; beside them SPD, whose objective is the KL, and the baselines. Additivity is the cost of
all layers together over the sum of each alone: 1 where errors are independent, far below where layers repair each other.

    python experiments/exp_015_objective_by_protocol/objective_by_protocol.py --target tiny  # offline
    python experiments/exp_015_objective_by_protocol/objective_by_protocol.py                # pile: GPU, network
    … --replot draws figure and README again from points.csv

Expected: a set is best under the protocol that it was trained under; one trained `free` costs more than a local one where a
layer stands alone; a mixture loses little anywhere; SPD is beaten at its own objective.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from objective_figure import ObjectiveReport

from baselines import baselines
from checkpoints import Checkpoint, checkpoint_folder
from coder_replacements import as_replacements
from config import BatchTopK, CoderConfig, Mixed, Output
from evaluation import Measurement, Protocol, evaluate, held_out
from recipes import clt_configs, sae_configs, train_coders, transcoder_configs, tune_coders
from spd_replacement import spd_replacements
from spd_runs import find_spd
from study import CoderStudySettings, run_study
from target_models import TargetModel, load_target

PROTOCOLS: tuple[Protocol, ...] = ("single", "frozen", "free")
Kind = Literal["sae", "transcoder", "transcoder-skip", "clt"]
CoderObjective = Literal["single", "frozen", "free", "mixed"]


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "pile"
    kinds: tuple[Kind, ...] = ("sae", "transcoder", "transcoder-skip", "clt")
    layers: tuple[int, ...] = (0, 1, 2, 3)
    top_k: tuple[int, ...] = (8, 16, 32)  # active latents per token and layer
    tuned: tuple[CoderObjective, ...] = ("single", "frozen", "free", "mixed")  # trained locally, then on the KL
    tuned_share: float = 0.5  # of the tokens, on the KL
    scratch: tuple[CoderObjective, ...] = ("free",)  # all of the tokens on the KL
    local: float = 0.0  # weight of the local loss beside the KL
    n_seeds: int = 3  # from `seed` on
    spd: bool = True  # the target's decomposition (exp_004's) beside them
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(
        target="tiny", d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=102_400, n_seeds=1, device="cpu"
    ),
    Settings(
        target="smollm2", layers=(8, 9, 10, 11), kinds=("transcoder", "transcoder-skip"), top_k=(16,), tuned=("free",),
        tuned_share=0.2, scratch=(), d_dict=2304, tokens=750_000, batch=2048, eval_tokens=10_240, n_seeds=1, spd=False,
        device="cpu", output=Path(__file__).parent / "output" / "smollm2",
    ),
)  # fmt: skip
REPORT = ObjectiveReport("Objective by protocol", __doc__)


def configs(s: Settings, target: TargetModel, kind: Kind) -> Sequence[CoderConfig]:
    """Of every k."""
    sizes = {"layers": s.layers, "rules": [BatchTopK(k) for k in s.top_k], "d_dict": s.d_dict}
    build: dict[Kind, Callable[[], Sequence[CoderConfig]]] = {
        "sae": lambda: sae_configs(target, **sizes),
        "transcoder": lambda: transcoder_configs(target, **sizes),
        "transcoder-skip": lambda: transcoder_configs(target, skip=True, **sizes),
        "clt": lambda: clt_configs(target, **sizes),
    }
    return build[kind]()


def objective(s: Settings, name: CoderObjective) -> Output:
    return Output(Mixed() if name == "mixed" else name, s.local)


def train(s: Settings, target: TargetModel, seed: int) -> list[Checkpoint]:
    """Coders of every kind, k and objective, all of an objective on one stream."""
    asked = [config for kind in s.kinds for config in configs(s, target, kind)]
    on_output, folder = round(s.tuned_share * s.tokens), checkpoint_folder(s.target)

    def local(tokens: int) -> list[Checkpoint]:
        return train_coders(
            asked, target, tokens=tokens, batch=s.batch, seed=seed, harvest=s.harvest, folder=folder / f"n{tokens}"
        )

    sizes = {"target": target, "batch": s.batch, "seed": seed, "folder": folder}
    starts = local(s.tokens - on_output) if s.tuned else []
    tuned = [tune_coders(starts, tokens=on_output, objective=objective(s, name), **sizes) for name in s.tuned]
    scratch = [train_coders(asked, tokens=s.tokens, objective=objective(s, name), **sizes) for name in s.scratch]
    return [checkpoint for group in (local(s.tokens), *tuned, *scratch) for checkpoint in group]


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    text = held_out(target, s.eval_tokens)
    beside = baselines(target, s.layers, neurons=s.top_k)
    beside += spd_replacements(target, find_spd(target, s.layers), s.layers, deltas=(False,)) if s.spd else []
    measured = evaluate(target, beside, text, PROTOCOLS)
    for seed in range(s.seed, s.seed + s.n_seeds):
        trained = train(s, target, seed)
        for kind in s.kinds:  # what is compared in pairs.csv
            own = [c for c in trained if c.coder.config in configs(s, target, kind)]
            rows = evaluate(target, as_replacements(own), text, PROTOCOLS)
            measured = Measurement(*(before + more for before, more in zip(measured, rows)))
    REPORT.write(s, measured)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=REPORT.redraw)
