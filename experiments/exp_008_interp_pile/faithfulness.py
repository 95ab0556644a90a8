"""Does a replacement change with its input as the MLP does, and do the logits, at an equal number of active parts?

    local       cos(∂ŷ/∂x, ∂y/∂x), flattened d_out × d_in, at the MLP input x of one token
    end-to-end  cos of ∂(the original's top-10 logits)/∂x through the MLP of that token, the rest of the model intact

One token per sequence (its last), so that the intervals are over independent texts. Codes are k active parts per MLP
output: deployed sparse codes of transcoder and CLT (earlier layers' codes held fixed), k neurons, k/2 SPD components
in each of the two matrices where SPD is there. Null, per method: its Jacobian against the MLP's at *another* token
(`-othertoken`), i.e. what a constant linear map would get. `affine` is the least-squares map, the same for every token.

    python experiments/exp_008_interp_pile/faithfulness.py                 # pile: GPU to train, network
    python experiments/exp_008_interp_pile/faithfulness.py --target tiny   # offline
    … --replot draws the figure again from results.csv

Published for the pile target, layer 3, local / end-to-end: transcoder .334 / .720, SPD .130 / .640.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from interval_report import dots, means, table, write_readme, write_results
from jacobians import MLP, cosines, local_jacobian, logit_jacobian
from jaxtyping import Int
from methods_and_nulls import TINY, InterpSettings, replacements
from torch import Tensor

from baselines import baselines
from coder_replacements import CLTReplacement
from evaluation import held_out
from logs import read_csv, write_settings
from patching import Captured, capture
from replacement import Coded, Pass
from spd_replacement import SPDReplacement, spd_sweep
from study import check_fits, run_study
from target_models import TargetModel, load_target

TOP_LOGITS = 10


@dataclass(frozen=True, kw_only=True)
class Settings(InterpSettings):
    samples: int = 500  # tokens, each from another sequence
    seq: int = 64  # tokens of a sequence: the last is measured
    spd: bool = True  # measure SPD's checkpoint too
    output: Path = Path(__file__).parent / "output" / "faithfulness"


PRESETS = (Settings(), Settings(**TINY, samples=100))


class Result(NamedTuple):
    method: str
    quantity: str  # local or end-to-end
    sample: int
    cosine: float
    active: float  # mean number of active parts per MLP output, as measured


def open_pass(replacement: Coded | SPDReplacement, clean: Captured, layer: int) -> Pass:
    """A pass over single tokens; `clean` spans all layers. Only the codes of `layer` follow its input.

    Masks are steps, whose derivative is zero: those of a clean pass are as good.
    """
    if isinstance(replacement, SPDReplacement):
        rows = list(replacement.layers)
        return replacement.gated(Captured(clean.inputs[rows], clean.outputs[rows]))
    pass_ = replacement.begin()
    for source in replacement.layers if isinstance(replacement, CLTReplacement) else ():
        if source < layer:
            pass_.encode(source, clean.inputs[source].flatten(0, 1), clean.outputs[source].flatten(0, 1))
    return pass_


def measure(
    target: TargetModel, methods: dict[str, Coded | SPDReplacement], tokens: Int[Tensor, "sample seq"], *, layer: int
) -> list[Result]:
    """Every method and its null on these tokens."""
    whole = capture(target, tokens, range(target.n_layers))
    clean = Captured(*(kept[:, :, -1:].clone().float() for kept in whole[:2]))
    x, y, rows = clean.inputs[layer], clean.outputs[layer], []
    with torch.no_grad():
        top = target.logits(tokens)[:, -1].topk(TOP_LOGITS).indices

    def both(make: Callable[[], MLP]) -> dict[str, Tensor]:
        logits = logit_jacobian(target, make(), tokens, layer=layer, top=top)
        return {"local": local_jacobian(make(), x), "end-to-end": logits}

    truth = both(lambda: lambda z: target.mlp(layer, z))
    for name, replacement in methods.items():
        passes: list[Pass] = []

        def make(replacement: Coded | SPDReplacement = replacement, passes: list[Pass] = passes) -> MLP:
            passes.append(open_pass(replacement, clean, layer))
            return lambda z: passes[-1](layer, z, y)

        for quantity, found in both(make).items():
            seen = [a for (i, _), a in passes[-1].active.items() if i == layer]
            active = sum(len(a.rows) for a in seen) / len(tokens)
            for suffix, reference in (("", truth[quantity]), ("-othertoken", truth[quantity].roll(1, 0))):
                values = cosines(found, reference)
                rows += [Result(name + suffix, quantity, i, value, active) for i, value in enumerate(values)]
    return rows


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    tokens = held_out(target, s.samples * target.context).tokens[:, : s.seq]
    methods = {n: r for n, (_, r) in replacements(s, target, ("transcoder", "clt", "neurons")).items()}
    if s.spd:
        methods["spd"] = spd_sweep(target, s.layers, (s.k // 2,))[0]
    methods |= {r.method: r for r in baselines(target, s.layers, ()) if r.method == "affine"}
    rows = [row for part in tokens.split(50) for row in measure(target, methods, part, layer=s.layer)]
    write_results(s.output / "results.csv", rows)
    write_settings(s.output, s, s.device)
    draw(s.output)


def draw(folder: Path) -> None:
    """faithfulness.png and README.md from results.csv alone."""
    rows = read_csv(folder / "results.csv")
    found, active = means(rows, "quantity", "cosine"), means(rows, "quantity", "active")
    dots(found, folder / "faithfulness.png", null=0.0, label="cosine of Jacobians")
    kept = [m for m, q in active if q == "local" and "-" not in m and m != "affine"]
    counts = ", ".join(f"{m} {active[m, 'local'].mean:.1f}" for m in kept)
    said = f"Active parts of this layer per MLP output, as measured: {counts}."
    write_readme(folder, [table(found), said], title="Jacobian faithfulness", doc=__doc__, image="faithfulness.png")


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=draw)
