"""How few rank-one parts of c_fc and down_proj does a token need, when the parts are learnt from the weights themselves?

Stochastic parameter decomposition of the MLP matrices of the chosen layers: KL objective, stochastic masks on half of the
sequences and the masks of deployment on the others, importance minimality with p annealed from 2 to 0.4, shared-MLP gates
that read their own module's input at the same position (and so cannot see the future), start from a least-squares
factorisation in place of faithfulness warm-up. `recipes.train_decomposition` says more.

Rows `spd` and `spd-0.5` are SPD as it is deployed: a component works at full strength where its importance g exceeds 0 or 0.5
(masks called `rounded`), else not at all; `-delta` adds what the components leave of the matrix. `spd-unmasked` has every
component at full strength, `-importance` at strength g, `-stochastic` at g + (1 − g) u, as in training, with u drawn evenly from
0 to 1 and what the components leave of the matrix at a u of its own, `-random` at u, `-zero` none: it writes biases alone and has
no place on a logarithmic axis. L0 counts the components that work at all.

    python experiments/exp_004_train_spd_gpt2/train_spd_gpt2.py                # GPT-2, layer 8: GPU, network
    python experiments/exp_004_train_spd_gpt2/train_spd_gpt2.py --target tiny  # layer 2 of `tiny`, offline
    python experiments/exp_004_train_spd_gpt2/train_spd_gpt2.py --target tiny --layers 0 1 2 3 --components 512 \\
        --steps 2000 --ship assets/spd_tiny                                    # the shipped decomposition
    … --replot draws the figures again from points.csv and importances.csv

Expected: unmasked near the target, random far from it, stochastic between; importance, which no step of training runs with,
worse than rounded, which half of each step does.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

from importance_figures import draw_importances, measure_importances, write_importances

from baselines import baselines
from checkpoints import checkpoint_folder, save_checkpoint
from evaluation import evaluate, held_out
from recipes import SPDRecipe, train_decomposition
from spd_replacement import SPDReplacement, spd_replacements
from spd_variants import spd_variants
from study import Report, StudySettings, check_fits, run_study
from target_models import load_target


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    target: str = "gpt2"
    layers: tuple[int, ...] = (8,)
    components: int = 6144  # C of every matrix
    gate_hidden: int = 768  # hidden width of each gate
    steps: int = 100_000
    batch: int = 32  # sequences per step
    lr: float = 1e-3  # peak of AdamW, cosine to a tenth
    minimality: float = 5e-4
    ship: Path | None = None  # also write a half-precision copy here
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(
        target="tiny", layers=(2,), components=512, gate_hidden=192, steps=400, batch=4, eval_tokens=61_440,
        device="cpu",
    ),
)  # fmt: skip
REPORT = Report("SPD of MLP matrices", __doc__, draw_importances)


def main(s: Settings) -> None:
    target = load_target(s.target, s.device)
    check_fits(s, target)
    recipe = SPDRecipe(
        components=s.components, gate_hidden=s.gate_hidden, steps=s.steps, batch=s.batch, lr=s.lr,
        minimality=s.minimality, seed=s.seed,
    )  # fmt: skip
    decomposition = train_decomposition(target, recipe, layers=s.layers, folder=checkpoint_folder(s.target))
    if s.ship is not None:
        save_checkpoint(s.ship, copy.deepcopy(decomposition.model).half(), decomposition.record)
    text = held_out(target, s.eval_tokens)
    replacements = spd_replacements(target, decomposition, s.layers)
    replacements += spd_variants(target, decomposition, s.layers, s.seed)
    replacements += baselines(target, s.layers, (16, 64, 256))
    measured = evaluate(target, replacements, text)
    whole = SPDReplacement(target, decomposition.model, layers=s.layers)
    write_importances(s.output, measure_importances(whole, text.tokens))
    REPORT.write(s, measured)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=REPORT.redraw)
