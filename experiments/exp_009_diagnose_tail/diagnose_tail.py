"""Do the components that SPD calls unimportant matter, and if they do, when?

Components of each matrix are ranked by mean causal importance g_lo over held-out tokens; then only the first n of every
matrix are kept, n over a log grid, and CE is measured on other held-out tokens (protocol `frozen`, all decomposed layers).

    gated   a kept component works (mask 1) where its importance is above 0, as the ruler deploys SPD
    open    a kept component works on every token; all kept and Δ added is the target itself, so ΔCE must be 0
    delta   W − Σ U V of all components, kept or not, is added
    random  the components are kept in random order instead: what the ranking is worth

    python experiments/exp_009_diagnose_tail/diagnose_tail.py                # GPT-2, what exp_004 trained: GPU, network
    python experiments/exp_009_diagnose_tail/diagnose_tail.py --target tiny  # the shipped SPD, offline
    … --replot draws the figure again from components.csv and points.csv

Expected: gated, little is lost with the tail, which seldom fires; open, much, because it carries weight all the same.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from tail_figure import Component, draw, write_components
from torch import Tensor

from evaluation import evaluate, held_out
from logs import write_settings
from pareto import write_points
from patching import Captured, capture
from replacement import Origin
from spd_replacement import CleanImportances, SPDReplacement
from spd_runs import find_spd
from study import StudySettings, run_study
from target_models import load_target


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    target: str = "gpt2"
    kept: tuple[int, ...] = (16, 64, 256, 1024, 3072)  # components kept of every matrix; all of them are measured too
    rank_tokens: int = 131_072  # held-out tokens that rank the components
    eval_tokens: int = 1_000_000  # held-out tokens after those, that CE is measured on
    output: Path = Path(__file__).parent / "output"


PRESETS = (
    Settings(),
    Settings(target="tiny", kept=(32, 128), rank_tokens=65_536, eval_tokens=61_440, device="cpu"),
)


class OneCleanPass(SPDReplacement):
    """A decomposition that remembers the gates of the last clean pass it saw: all cuts of it read the same."""

    seen: tuple[Captured, CleanImportances] | None = None

    def clean_importances(self, captured: Captured) -> CleanImportances:
        if self.seen is None or not torch.equal(captured.inputs, self.seen[0].inputs):
            self.seen = captured, super().clean_importances(captured)
        return self.seen[1]


class Cut(SPDReplacement):
    """The decomposition `whole` without the components outside `kept`; `always`: what is kept works on every token."""

    def __init__(
        self, whole: OneCleanPass, kept: dict[str, Bool[Tensor, "component"]], n: int, *, always: bool, delta: bool,
        order: str = "",
    ) -> None:  # fmt: skip
        super().__init__(whole.target, whole.model, delta=delta, origin=whole.origin)
        self.method = f"spd-{'open' if always else 'gated'}{'-delta' if delta else ''}{order}"
        self.whole, self.kept, self.k, self.always = whole, kept, n, always

    def clean_importances(self, captured: Captured) -> CleanImportances:
        return self.whole.clean_importances(captured)

    def on(self, path: str, z: Float[Tensor, "batch seq component"]) -> Bool[Tensor, "batch seq component"]:
        return self.kept[path].expand(z.shape) if self.always else self.kept[path] & super().on(path, z)


@torch.inference_mode()
def rank(spd: SPDReplacement, tokens: Tensor) -> tuple[list[Component], dict[str, Tensor]]:
    """Every component, and each matrix's components from the most to the least important."""
    mean = {path: torch.zeros(2, n, device=tokens.device) for path, n in spd.model.sizes.items()}
    for part in tokens.split(16):
        for path, z in spd.clean_importances(capture(spd.target, part, spd.reads)).z.items():
            g = spd.model.lower(z[:, 1:]).flatten(0, 1)
            mean[path] += torch.stack([g.sum(0), (g > 0).sum(0)]) / (tokens.numel() - len(tokens))
    components, order = [], {}
    for path, (importance, firing) in mean.items():
        parts = spd.model.components[path]
        norm, order[path] = parts.U.norm(dim=1) * parts.V.norm(dim=0), importance.argsort(descending=True, stable=True)
        rows = torch.stack([importance, firing, norm])[:, order[path]].T.tolist()
        components += [Component(path, i, *row) for i, row in enumerate(rows, 1)]
    return components, order


def main(s: Settings) -> None:
    target = load_target(s.target, s.device)
    model, record = find_spd(target, ())  # the one there is
    origin = Origin(record.seed, record.train_tokens, record.train_seconds, record.name)
    whole = OneCleanPass(target, model, origin=origin)
    components, ranked = rank(whole, held_out(target, s.rank_tokens, "tuning").tokens)
    generator = torch.Generator().manual_seed(s.seed)
    shuffled = {path: order[torch.randperm(len(order), generator=generator)] for path, order in ranked.items()}

    def keep(order: dict[str, Tensor], n: int) -> dict[str, Tensor]:
        return {path: torch.zeros_like(o, dtype=torch.bool).index_fill(0, o[:n], True) for path, o in order.items()}

    all_ = max(map(len, ranked.values()))
    fewer = [n for n in s.kept if n < all_]
    cuts = [
        Cut(whole, keep(ranked, n), n, always=always, delta=delta)
        for always in (False, True) for delta in (False, True) for n in (*fewer, all_)
    ]  # fmt: skip
    cuts += [Cut(whole, keep(shuffled, n), n, always=True, delta=True, order="-random") for n in fewer]
    measured = evaluate(target, cuts, held_out(target, s.eval_tokens), ("frozen",))
    s.output.mkdir(parents=True, exist_ok=True)
    write_points(s.output / "points.csv", measured.points)
    write_components(s.output / "components.csv", components)
    write_settings(s.output, s, s.device)
    redraw(s.output)


def redraw(folder: Path) -> None:
    draw(folder, __doc__)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=redraw)
