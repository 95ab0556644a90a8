"""How few rank-one parts of c_fc and down_proj does a token need, when the parts are learnt from the weights themselves?

Stochastic parameter decomposition of the MLP matrices of the chosen layers: KL objective, stochastic masks on half of the
sequences and the masks of deployment on the others, importance minimality with p annealed from 2 to 0.4, shared-MLP gates
that read their own module's input at the same position (and so cannot see the future), start from a least-squares
factorisation in place of faithfulness warm-up. `recipes.train_decomposition` says more.

    python experiments/exp_004_train_spd_gpt2/train_spd_gpt2.py                # GPT-2, layer 8: GPU, network, a day
    python experiments/exp_004_train_spd_gpt2/train_spd_gpt2.py --target tiny  # layer 2 of `tiny`, 7 minutes of one core
    python experiments/exp_004_train_spd_gpt2/train_spd_gpt2.py --target tiny --layers 0 1 2 3 --components 512 \\
        --steps 2000 --ship assets/spd_tiny                                    # the shipped decomposition, 46 minutes
    … --replot draws the figure again from points.csv
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path

from baselines import baselines
from checkpoints import checkpoint_folder, save_checkpoint
from evaluation import evaluate, held_out_tokens
from recipes import train_decomposition
from spd_replacement import spd_replacements
from study import replot, settings_for, write_report
from target_models import load_target


@dataclass(frozen=True)
class Settings:
    target: str = "gpt2"
    layers: tuple[int, ...] = (8,)
    components: int = 6144  # C of every matrix
    gate_hidden: int = 768  # hidden width of each gate
    steps: int = 100_000
    batch: int = 32  # sequences per step
    lr: float = 1e-3  # peak of AdamW, cosine to a tenth
    minimality: float = 5e-4
    eval_tokens: int = 131_072  # held-out tokens
    device: str = "cuda"
    seed: int = 0
    ship: Path = Path()  # also write a half-precision copy here
    output: Path = Path(__file__).parent / "output"
    replot: bool = False  # draw the figure from points.csv and stop


PRESETS = {
    "gpt2": Settings(),
    "tiny": Settings(
        "tiny", (2,), components=512, gate_hidden=192, steps=400, batch=4, eval_tokens=102_400, device="cpu"
    ),
}


def main(s: Settings) -> None:
    if s.replot:
        return replot(s.output)
    began = time.perf_counter()
    target = load_target(s.target, s.device)
    decomposition = train_decomposition(
        target,
        s.layers,
        s.components,
        s.gate_hidden,
        s.steps,
        s.batch,
        s.seed,
        checkpoint_folder(s.target),
        s.lr,
        s.minimality,
    )
    if s.ship != Path():
        save_checkpoint(s.ship, copy.deepcopy(decomposition.model).half(), decomposition.record)
    replacements = spd_replacements(target, decomposition, s.layers) + baselines(target, s.layers, (16, 64, 256))
    measured = evaluate(target, replacements, held_out_tokens(target, s.eval_tokens))
    write_report(s.output, measured, s, "SPD of MLP matrices", __doc__, began, s.device)


if __name__ == "__main__":
    main(settings_for(PRESETS, __doc__))
