"""Does SPD find mechanisms that are known? TMS and ResidMLP toys, trained and decomposed, three seeds each.

    python experiments/exp_012_spd_known_mechanisms/spd_known_mechanisms.py                 # what points.csv lacks
    python experiments/exp_012_spd_known_mechanisms/spd_known_mechanisms.py --toys tms_5-2  # one toy

The seeds of a toy (target and decomposition both) run side by side in batched products. `mmcs_null` and `ml2r_null` are those of
components at their initialisation, nothing learnt: in two hidden dimensions some random direction is always near. Expected: one
component per feature in linear1 and linear2 (MMCS and ML2R 1, no importance error); in a ResidMLP one per feature in each input
matrix, and outputs of rank 50, 25 per layer, 17 per layer. ResidMLPs run without ever forming their embedding.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from folded import FoldedDecomposition
from recovered import importance_errors, importance_matrix, recovery
from toy_figures import draw_directions, draw_importance

from checkpoints import CHECKPOINTS
from config import GateConfig, Lp, Recon, SPDConfig, SPDTrainConfig
from logs import errors_in_one_line, read_csv, write_csv, write_settings
from spd_model import ComponentModel
from spd_training import train_spd
from study import check_counts
from toy_models import TOYS, Toy, ToyBatches, train_target

COLUMNS = [
    "toy", "seed", "mmcs", "mmcs_null", "ml2r", "ml2r_null", "ci_error_01", "ci_error_02", "l0", "steps", "seconds",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Components learn faster than gates, and those that read features are many more than the features.

    p falls from 2 to 1 between 0.3 and 0.7 of the steps: first directions settle, then small importances come to cost as much
    per unit as large ones.
    """

    C: int  # components of a matrix that reads features, and of its transpose
    C_rest: int  # of every other
    minimality: float
    p: tuple[float, float] = (2.0, 1.0)
    lr: float
    gate_lr: float
    steps: int
    batch: int = 256  # draws in which some feature fires


# Published: minimality 3e-3 (TMS 5-2), 1e-4 (40-10), 1e-5 (ResidMLP-1, 3) and 1e-4 (ResidMLP-2) at a constant p; one rate for
# components and gates, 3e-4 to 2e-3; batches of 2,048 or 4,096, for 10k to 50k steps.
TMS_5 = Recipe(C=20, C_rest=20, minimality=3e-3, p=(1.0, 1.0), lr=3e-3, gate_lr=3e-3, steps=6000, batch=512)
TMS_40 = Recipe(C=500, C_rest=100, minimality=2e-4, lr=8e-3, gate_lr=4e-3, steps=2200)
RECIPES = {
    "tms_5-2": TMS_5,
    "tms_5-2_id": TMS_5,
    "tms_40-10": TMS_40,
    "tms_40-10_id": TMS_40,
    "resid_1": Recipe(C=300, C_rest=75, minimality=4e-5, lr=1.5e-2, gate_lr=3e-4, steps=3500),
    "resid_2": Recipe(C=600, C_rest=50, minimality=1.5e-5, lr=1e-2, gate_lr=7e-4, steps=1400, batch=512),
    "resid_3": Recipe(C=600, C_rest=50, minimality=1.5e-5, lr=1e-2, gate_lr=7e-4, steps=1400, batch=512),
}
GATE = GateConfig(kind="mlp", hidden=(8,))
RECON = (Recon(coefficient=1.0), Recon(coefficient=1.0, routing="layerwise"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    toys: tuple[str, ...] = tuple(RECIPES)  # in this order; a toy already in points.csv is skipped
    seeds: int = 3  # side by side
    scale: float = 1.0  # steps are multiplied by this
    compile_gates: bool = True  # where there is a C++ compiler; about twice as fast
    seed: int = 0
    output: Path = Path(__file__).parent / "output"


def decompose(name: str, toy: Toy, s: Settings) -> None:
    recipe, folder = RECIPES[name], CHECKPOINTS / f"toy_{name}_s{s.seed}"
    target = train_target(toy, s.seeds, s.seed)
    if toy.kind == "tms":
        inserted = [("hidden_layers.*", recipe.C_rest)] * (toy.layers > 0)
        patterns = [("linear1", recipe.C), ("linear2", recipe.C), *inserted]
        tied: tuple[tuple[str, str], ...] = (("linear1", "linear2"),)
    else:
        patterns, tied = [("layers.*.mlp_in", recipe.C), ("layers.*.mlp_out", recipe.C_rest)], ()
    config = SPDConfig(components=tuple(patterns), gate=GATE, tied=tied)
    decomposition = ComponentModel if toy.kind == "tms" else FoldedDecomposition
    model, random = (decomposition(target, config, torch.Generator().manual_seed(s.seed + i)) for i in (1, 5))
    if s.compile_gates:
        model.importances.compile_gates()
    steps = round(recipe.steps * s.scale)
    train = SPDTrainConfig(
        steps=steps, lr=recipe.lr, gate_lr=recipe.gate_lr, recon=RECON,
        minimality=Lp(coefficient=recipe.minimality, p=recipe.p, between=(0.3, 0.7)),
        schedule="cosine", seed=s.seed + 2,
    )  # fmt: skip
    batches = ToyBatches(toy, s.seeds, recipe.batch, s.seed + 3, active=True)
    seconds = train_spd(model, batches, train, folder, f"spd_{name}")
    importances = importance_matrix(toy, model)
    scores = *recovery(toy, model, importances), *recovery(toy, random, None)
    mmcs, ml2r, mmcs_null, ml2r_null = (score.tolist() for score in scores)
    with torch.no_grad():
        x = next(ToyBatches(toy, s.seeds, 8192, s.seed + 4))
        z = model.importance_logits(model.inputs_capture(x)[0])
        l0 = torch.stack([(model.lower(logit) > 0.1).sum(-1).float().mean(-1) for logit in z.values()]).mean(0)
    errors = [importance_errors(toy, importances, tolerance) for tolerance in (0.1, 0.2)]
    rows = [
        [name, s.seed + i, *(round(v[i], 5) for v in (mmcs, mmcs_null, ml2r, ml2r_null)), errors[0][i], errors[1][i],
         round(l0[i].item(), 3), steps, round(seconds, 1)]
        for i in range(s.seeds)
    ]  # fmt: skip
    before = [[row.get(column) for column in COLUMNS] for row in read_rows(s.output)]
    write_csv(s.output / "points.csv", COLUMNS, [*before, *rows])
    draw_importance(importances, s.output / f"importance_{name}.png", name)
    if name == "tms_5-2":
        draw_directions(model, s.output / "directions_tms_5-2.png")
    print(*rows, sep="\n")


def read_rows(folder: Path) -> list[dict[str, str]]:
    file = folder / "points.csv"
    return read_csv(file) if file.exists() else []


def main(s: Settings) -> None:
    if unknown := [toy for toy in s.toys if toy not in RECIPES]:
        raise ValueError(f"unknown toy {unknown[0]!r}: use {', '.join(RECIPES)}")
    done = {row["toy"] for row in read_rows(s.output)}
    for name in s.toys:
        if name in done:
            print(f"{name} is in {s.output / 'points.csv'}: delete its rows to run it again", file=sys.stderr)
        else:
            decompose(name, TOYS[name], s)
            write_settings(s.output, s, "cpu")


if __name__ == "__main__":
    errors_in_one_line()
    settings = tyro.cli(Settings, description=__doc__)
    check_counts(settings)
    main(settings)
