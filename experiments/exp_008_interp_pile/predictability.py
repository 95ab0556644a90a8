"""Is a latent's activity a simple function of the tokens around it?

A tree of depth 3 asks "is the token at offset o equal to t?", o in −8…8, chosen greedily by Gini impurity over every
(o, t) on the first half of the text. A leaf says active where its share of active tokens reaches the threshold that is
best on that half. Score: Matthews correlation on the other half; 0 is chance. (scikit-learn's tree would need
17 · vocabulary one-hot columns; counting is exact and shorter.)

    python experiments/exp_008_interp_pile/predictability.py                 # pile: GPU to train, network
    python experiments/exp_008_interp_pile/predictability.py --target tiny   # offline
    … --replot draws the figure again from results.csv

Expected: shuffled activations at 0; the random-weights target well above 0, since its latents detect tokens: high
predictability alone is no evidence of anything learnt.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from interval_report import dots, means, table, write_readme, write_results
from jaxtyping import Bool, Float, Int
from latent_activations import WIDTH, all_activations, draw_latents
from methods_and_nulls import TINY, InterpSettings
from torch import Tensor, nn

from evaluation import held_out
from logs import read_csv, write_settings
from study import check_fits, run_study
from target_models import load_target

REACH, DEPTH = 8, 3


@dataclass(frozen=True, kw_only=True)
class Settings(InterpSettings):
    output: Path = Path(__file__).parent / "output" / "predictability"


PRESETS = (Settings(), Settings(**TINY | {"latents": 30}))


class Result(NamedTuple):
    method: str
    drawn: str
    latent: int
    density: float
    mcc: float


def context(tokens: Int[Tensor, "sequence seq"], vocab: int) -> Int[Tensor, "token feature"]:
    """One feature per (offset, token): offset · (vocab + 1) + token, where token = vocab lies outside the sequence."""
    padded = nn.functional.pad(tokens, (REACH, REACH), value=vocab)
    around = padded.unfold(1, 2 * REACH + 1, 1)[:, 1:].flatten(0, 1)  # without first positions
    return around + torch.arange(2 * REACH + 1) * (vocab + 1)


def leaf_rates(
    train: Int[Tensor, "n feature"], y: Bool[Tensor, "n"], test: Int[Tensor, "m feature"], *, n_features: int,
    depth: int = DEPTH,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "m"]]:  # fmt: skip
    """Share of active training tokens in the leaf of each training and test token."""
    n, p = len(y), int(y.sum())
    n1 = torch.bincount(train.flatten(), minlength=n_features).double()
    splits = (n1 > 0) & (n1 < n)
    if depth == 0 or p in (0, n) or not splits.any():
        return torch.full((n,), p / n), torch.full((len(test),), p / n)
    p1 = torch.bincount(train[y].flatten(), minlength=n_features).double()
    purity = p1.square() / n1.clamp_min(1) + (p - p1).square() / (n - n1).clamp_min(1)  # Gini: Σ p(1 − p/n) is least
    best = int(purity.masked_fill(~splits, -1).argmax())
    sides, out = ((train == best).any(1), (test == best).any(1)), (torch.empty(n), torch.empty(len(test)))
    for a, b in (sides, (~sides[0], ~sides[1])):
        out[0][a], out[1][b] = leaf_rates(train[a], y[a], test[b], n_features=n_features, depth=depth - 1)
    return out


def mcc(predicted: Bool[Tensor, "n"], y: Bool[Tensor, "n"]) -> float:
    """Matthews correlation; 0 where either side never varies."""
    pair = torch.stack([predicted, y]).double()
    pair = pair - pair.mean(1, keepdim=True)
    size = pair.norm(dim=1).prod()
    return float(pair[0] @ pair[1] / size) if size > 0 else 0.0


def predictability(train: Tensor, y: Tensor, test: Tensor, y_test: Tensor, *, n_features: int) -> float:
    """Held-out Matthews correlation of the tree with the threshold that is best in training."""
    rates, test_rates = leaf_rates(train, y, test, n_features=n_features)
    thresholds = rates.unique().tolist()
    best = max(thresholds, key=lambda threshold: mcc(rates >= threshold, y))
    return mcc(test_rates >= best, y_test)


def main(s: Settings) -> None:
    target, rows = load_target(s.target, s.home), []
    check_fits(s, target)
    everything = all_activations(s, target, held_out(target, s.eval_tokens).tokens)
    tokens = everything["transcoder"].tokens
    half, n_features = len(tokens) // 2, (2 * REACH + 1) * (target.vocab_size + 1)
    train, test = (context(part, target.vocab_size) for part in (tokens[:half], tokens[half:]))
    for method, acts in everything.items():
        generator, density = torch.Generator().manual_seed(s.seed), acts.density
        for how, latents in draw_latents(acts, s.latents, active=2 * WIDTH, generator=generator).items():
            for latent in latents:
                active = acts.of(latent)[:, 1:] > 0
                y, y_test = active[:half].flatten(), active[half:].flatten()
                score = predictability(train, y, test, y_test, n_features=n_features)
                rows.append(Result(method, how, latent, density[latent].item(), score))
    write_results(s.output / "results.csv", rows)
    write_settings(s.output, s, s.device)
    draw(s.output)


def draw(folder: Path) -> None:
    """predictability.png and README.md from results.csv alone."""
    found = means(read_csv(folder / "results.csv"), "drawn", "mcc")
    dots(found, folder / "predictability.png", null=0.0, label="held-out Matthews correlation")
    title, image = "Predictability from nearby tokens", "predictability.png"
    write_readme(folder, [table(found)], title=title, doc=__doc__, image=image)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=draw)
