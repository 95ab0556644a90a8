"""What are the latents of one layer? One HTML file that opens anywhere: no server, nothing fetched.

For each latent: density, the text around its strongest activations (colour: activation), the logits it raises and
lowers, and its explanation where autointerp.py wrote one. The logit effect is measured: the mean change of the logits
when the latent's mean write is added to the MLP's output at every position of a batch of held-out text.

    python experiments/exp_008_interp_pile/dashboard.py                 # pile: GPU to train, network
    python experiments/exp_008_interp_pile/dashboard.py --target tiny   # offline

Writes dashboard.html. `--replot` is refused: the page is the result.
"""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from dashboard_page import PAGE
from example_windows import windows
from jaxtyping import Float, Int
from latent_activations import Activations, collect, draw_latents
from methods_and_nulls import TINY, InterpSettings, replacements
from torch import Tensor

from evaluation import held_out
from logs import atomic_path, read_csv, write_settings
from patching import patched
from replacement import Coded
from sparse_ops import Codes, Layout
from study import check_fits, run_study
from target_models import TargetModel, load_target

HERE = Path(__file__).parent
EXAMPLES, EFFECTS = 8, 8


@dataclass(frozen=True, kw_only=True)
class Settings(InterpSettings):
    method: str = "transcoder"  # transcoder, clt or neurons
    explanations: Path = HERE / "output" / "autointerp" / "results.csv"  # its latents are shown, where it exists
    output: Path = HERE / "output" / "dashboard"


PRESETS = (Settings(), Settings(**TINY))


class Effect(NamedTuple):
    raised: list[tuple[int, float]]  # (token, mean change of its logit in nats), largest first
    lowered: list[tuple[int, float]]


def write_vector(
    replacement: Coded, x: Float[Tensor, "1 d_in"], *, layer: int, latent: int, value: float
) -> Float[Tensor, "1 1 d_out"]:
    """What `latent` at `value` adds to the output of `layer`; x, any input, says width and device."""
    size = next(group.n_parts for group in replacement.part_groups(replacement.layers) if group.layer == layer)
    none = torch.zeros(0, dtype=torch.int64, device=x.device)
    empty = Codes(torch.zeros(0, device=x.device), Layout(none, none, 1, size))
    index = torch.tensor([latent], device=x.device)
    one = Codes(torch.tensor([value], device=x.device), Layout(torch.zeros_like(index), index, 1, size))
    outputs = []
    for codes in (one, empty):
        pass_ = replacement.begin()
        pass_.codes = dict.fromkeys([own for own in replacement.layers if own < layer], empty) | {layer: codes}
        outputs.append(replacement.write(pass_, layer, x, x))
    return (outputs[0] - outputs[1])[:, None]


@torch.inference_mode()
def logit_effect(
    target: TargetModel, vector: Float[Tensor, "1 1 d_out"], tokens: Int[Tensor, "batch seq"], *, layer: int,
    before: Float[Tensor, "vocab"],
) -> Effect:  # fmt: skip
    """Mean change of the logits over all positions, from `before` on, less its mean over the vocabulary."""
    with patched(target, {layer: lambda x, y: y + vector}):
        change = target.logits(tokens).float().mean((0, 1)) - before
    change = change - change.mean()
    up, down = change.topk(EFFECTS), (-change).topk(EFFECTS)
    return Effect(
        list(zip(up.indices.tolist(), up.values.tolist())), list(zip(down.indices.tolist(), (-down.values).tolist()))
    )


def shown(piece: str) -> str:
    return html.escape(piece).replace("\n", "⏎")


def latent_card(
    target: TargetModel, acts: Activations, latent: int, *, density: float, effect: Effect, explanation: str | None
) -> str:
    """One latent as HTML."""
    tokens, values = windows(acts.tokens), windows(acts.of(latent))
    peaks, largest = values.amax(1), values.max().item()
    lines = []
    for w in peaks.topk(min(EXAMPLES, int((peaks > 0).sum()))).indices.tolist():
        pieces = [
            f'<mark style="--a:{a / largest:.2f}" title="{a:.3f}">{shown(target.tokenizer.decode([t]))}</mark>'
            if a > 0 else shown(target.tokenizer.decode([t]))
            for t, a in zip(tokens[w].tolist(), values[w].tolist())
        ]  # fmt: skip
        lines.append(f"<li>{''.join(pieces)}</li>")
    effects = [
        f"<p class=effect>{name}: "
        + " ".join(f"<code>{shown(target.tokenizer.decode([t]))}</code> {v:+.2f}" for t, v in side) + "</p>"
        for name, side in zip(("raises", "lowers"), effect)
    ]  # fmt: skip
    said = f"<p>“{html.escape(explanation)}”</p>" if explanation else "<p class=none>no explanation</p>"
    head = f"<h2>latent {latent}</h2><p>active on {density:.3%} of tokens, at most {largest:.3g}</p>"
    return f'<section data-density="{density:.6g}">{head}{said}<ol>{"".join(lines)}</ol>{"".join(effects)}</section>'


def main(s: Settings) -> None:
    target = load_target(s.target, s.device)
    check_fits(s, target)
    tokens = held_out(target, s.eval_tokens).tokens
    replacement = replacements(s, target, (s.method,))[s.method][1]
    acts = collect(target, replacement, tokens, layer=s.layer)
    rows = read_csv(s.explanations) if s.explanations.exists() else []
    said = {int(row["latent"]): row["explanation"] for row in rows if row["method"] == s.method}
    generator = torch.Generator().manual_seed(s.seed)
    latents = list(said) or draw_latents(acts, s.latents, active=EXAMPLES, generator=generator)["uniform"]
    sample, origin = tokens[:8, :64], torch.zeros(1, target.d_model, device=target.device)
    with torch.inference_mode():
        before = target.logits(sample).float().mean((0, 1))
    cards, density = [], acts.density
    for latent in latents:
        values = acts.values[acts.latents == latent]
        vector = write_vector(replacement, origin, layer=s.layer, latent=latent, value=values.mean().item())
        effect = logit_effect(target, vector, sample, layer=s.layer, before=before)
        share, words = density[latent].item(), said.get(latent) or None
        cards.append(latent_card(target, acts, latent, density=share, effect=effect, explanation=words))
    title = f"{s.method}, layer {s.layer} of {s.target}"
    text = f"{len(latents)} latents of {acts.d_dict}; {tokens.numel():,} held-out tokens; strongest examples first."
    with atomic_path(s.output / "dashboard.html") as temporary:
        temporary.write_text(PAGE.format(title=html.escape(title), text=text, cards="\n".join(cards)), encoding="utf-8")
    write_settings(s.output, s, s.device)
    print(s.output / "dashboard.html")


def redraw(folder: Path) -> None:
    raise ValueError(f"the page in {folder} is the result itself: write it again without --replot")


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=redraw)
