"""Can a latent's activity be told from an explanation of it, better than its nulls'?

Counts are SAEBench's: an explanation from 10 top examples and 5 drawn by activation; 14 examples to score (2 top, 2 by
activation, 10 random ones, each checked to be inactive). Answering "inactive" always scores 10/14 = .714 in accuracy
and .5 in balanced accuracy, so the latter is reported. A reply that is empty, cut off or unreadable is a failure:
counted, shown, never scored. Without a language model (`--client tokens`) the explanation is a list of the tokens most
often marked, read and judged through the same prompts: a floor for explanations in words, the same for every method.

    python experiments/exp_008_interp_pile/autointerp.py --client endpoint:MODEL   # pile: GPU, network
    python experiments/exp_008_interp_pile/autointerp.py --target tiny             # offline; minutes on 2 cores
    … --replot draws the figure again from results.csv

Expected: transcoder and CLT latents near .8, shuffled activations at .5; the random-weights target between.
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clients import Client, make_client, parse_explanation, parse_numbers
from examples import numbered, text, windows
from features import TINY, Activations, Common, all_activations, draw_latents
from figures import dots, means, read_csv, table, write_csv, write_readme
from jaxtyping import Int
from torch import Tensor

from evaluation import held_out_tokens
from logs import write_settings
from study import settings_for
from target_models import load_target

TOP, DRAWN, SCORED_TOP, SCORED_DRAWN, SCORED_RANDOM = 10, 5, 2, 2, 10
ACTIVE = TOP + DRAWN + SCORED_TOP + SCORED_DRAWN
CUT = 0.01  # tokens below this share of the latent's largest activation are not marked


@dataclass(frozen=True)
class Settings(Common):
    client: str = "tokens"  # tokens, endpoint:MODEL or local:FOLDER
    max_tokens: int = 4096  # of a reply; a reasoning model thinks within it
    output: Path = Path(__file__).parent / "output" / "autointerp"


PRESETS = {"pile": Settings(), "tiny": Settings(**vars(TINY))}

EXPLAIN = """EXPLAIN one unit of a language model. Below are pieces of text on which it is active. << and >> were added
by us around the active tokens; they are not part of the text. What do the marked tokens have in common? Think as long
as you like, then end with one line: EXPLANATION: (at most 20 words)
---
{examples}"""
SCORE = """JUDGE where a unit of a language model is active. This describes it:
EXPLANATION: {explanation}
Below are {n} numbered pieces of text. Think as long as you like, then end with one line: ANSWER: followed by the
numbers of the pieces in which the unit is active, separated by commas, or none.
---
{examples}"""


class Result(NamedTuple):
    method: str
    drawn: str  # uniform or mass
    latent: int
    density: float
    accuracy: float | str  # empty for a failure
    balanced: float | str
    failure: str  # "", explanation or answer
    explanation: str


class Examples(NamedTuple):
    """Windows of one latent, by index."""

    explain: Int[Tensor, "n"]
    score: Int[Tensor, "m"]
    active: list[bool]  # of the windows to score


def pick(peaks: Tensor, generator: torch.Generator) -> Examples:
    """`peaks`: the largest activation in each window, 0 where the latent is inactive throughout."""
    active = int((peaks > 0).sum())
    assert ACTIVE <= active <= len(peaks) - SCORED_RANDOM, f"{active} of {len(peaks)} windows are active"
    order = peaks.argsort(descending=True)
    top = order[: TOP + SCORED_TOP][torch.randperm(TOP + SCORED_TOP, generator=generator)]
    rest = order[TOP + SCORED_TOP : active]
    drawn = rest[torch.multinomial(peaks[rest], DRAWN + SCORED_DRAWN, generator=generator)]
    silent = (peaks == 0).nonzero()[:, 0]
    random = silent[torch.randperm(len(silent), generator=generator)[:SCORED_RANDOM]]
    score = torch.cat([top[TOP:], drawn[DRAWN:], random])
    mixed = score[torch.randperm(len(score), generator=generator)]
    return Examples(torch.cat([top[:TOP], drawn[:DRAWN]]), mixed, (peaks[mixed] > 0).tolist())


def judge(
    client: Client, max_tokens: int, tokenizer: Any, acts: Activations, latent: int, generator: torch.Generator
) -> tuple[str, set[int] | None, list[bool]]:
    """(explanation, numbers answered, which of them are active); an empty explanation or None for a failure."""
    tokens, values = windows(acts.tokens), windows(acts.of(latent))
    examples, marked = pick(values.amax(1), generator), values > CUT * values.max()
    shown = numbered([text(tokenizer, tokens[w], marked[w]) for w in examples.explain.tolist()])
    explanation = parse_explanation(client.complete(EXPLAIN.format(examples=shown), max_tokens))
    if explanation is None:
        return "", None, examples.active
    n = len(examples.score)
    plain = numbered([tokenizer.decode(tokens[w]) for w in examples.score.tolist()])
    prompt = SCORE.format(explanation=explanation, n=n, examples=plain)
    return explanation, parse_numbers(client.complete(prompt, max_tokens), n), examples.active


def score(answer: set[int], truth: list[bool]) -> tuple[float, float]:
    """(accuracy, balanced accuracy) of the numbers answered."""
    hits = [(i in answer) == active for i, active in enumerate(truth, 1)]
    by_class = [[hit for hit, active in zip(hits, truth) if active == c] for c in (True, False)]
    return sum(hits) / len(hits), sum(sum(own) / len(own) for own in by_class) / 2


def main(s: Settings) -> None:
    if s.replot:
        return draw(s.output)
    began, client = time.perf_counter(), make_client(s.client, s.device)
    target = load_target(s.target, s.device)
    rows = []
    for method, acts in all_activations(s, target, held_out_tokens(target, s.eval_tokens)).items():
        generator, density = torch.Generator().manual_seed(s.seed), acts.density
        for how, latents in draw_latents(acts, s.latents, ACTIVE, generator, silent=SCORED_RANDOM).items():
            for latent in latents:
                explanation, answer, truth = judge(client, s.max_tokens, target.tokenizer, acts, latent, generator)
                scores = ("", "") if answer is None else score(answer, truth)
                failure = "explanation" if not explanation else "answer" if answer is None else ""
                rows.append(Result(method, how, latent, density[latent].item(), *scores, failure, explanation))
    write_csv(s.output / "results.csv", rows)
    write_settings(s.output, s, s.device, time.perf_counter() - began)
    draw(s.output)


def draw(folder: Path) -> None:
    """scores.png and README.md from results.csv alone."""
    rows = read_csv(folder / "results.csv")
    found = means(rows, "drawn", "balanced")
    dots(found, 0.5, "balanced accuracy", folder / "scores.png")
    failures = Counter((row["method"], row["failure"]) for row in rows if row["failure"])
    lines = [f"{n} of {method} ({kind})" for (method, kind), n in failures.items()]
    failed = f"Failures among {len(rows)} latents (counted, not scored): " + ("; ".join(lines) or "none") + "."
    write_readme(folder, "Autointerp", __doc__, "scores.png", [table(found), failed])


if __name__ == "__main__":
    main(settings_for(PRESETS, __doc__))
