"""Can a latent's activity be told from an explanation of it, better than its nulls'?

Counts are SAEBench's: an explanation from 10 top examples and 5 drawn by activation; 14 examples to score (2 top, 2 by
activation, 10 random ones, each checked to be inactive). Answering "inactive" always scores 10/14 = .714 in accuracy
and .5 in balanced accuracy, so the latter is reported. A reply that is empty, cut off or unreadable is a failure:
counted, shown, never scored. Without a language model (`--client tokens`) the explanation is a list of the tokens most
often marked, read and judged through the same prompts: a floor for explanations in words, the same for every method.

    python experiments/exp_008_interp_pile/autointerp.py --client endpoint:MODEL   # pile: GPU, network
    python experiments/exp_008_interp_pile/autointerp.py --target tiny             # offline
    … --replot draws the figure again from results.csv

Expected: transcoder and CLT latents near .8, shuffled activations at .5; the random-weights target between.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from example_windows import numbered, text, windows
from interval_report import dots, means, table, write_readme, write_results
from jaxtyping import Int
from judge_clients import Client, make_client, parse_explanation, parse_numbers
from latent_activations import Activations, all_activations, draw_latents
from methods_and_nulls import TINY, InterpSettings
from torch import Tensor

from evaluation import held_out
from logs import read_csv, write_settings
from study import check_fits, run_study
from target_models import load_target

TOP, DRAWN, SCORED_TOP, SCORED_DRAWN, SCORED_RANDOM = 10, 5, 2, 2, 10
ACTIVE = TOP + DRAWN + SCORED_TOP + SCORED_DRAWN
CUT = 0.01  # tokens below this share of the latent's largest activation are not marked


@dataclass(frozen=True, kw_only=True)
class Settings(InterpSettings):
    client: str = "tokens"  # tokens, endpoint:MODEL or local:FOLDER
    max_tokens: int = 4096  # of a reply; a reasoning model thinks within it
    output: Path = Path(__file__).parent / "output" / "autointerp"


PRESETS = (Settings(), Settings(**TINY))

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
    accuracy: float | None  # None for a failure
    balanced: float | None
    failure: Literal["explanation", "answer"] | None
    explanation: str | None


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
    client: Client, acts: Activations, latent: int, *, tokenizer: Any, max_tokens: int, generator: torch.Generator
) -> tuple[str | None, set[int] | None, list[bool]]:
    """(explanation, numbers answered, which of the pieces are active); None for a failure."""
    tokens, values = windows(acts.tokens), windows(acts.of(latent))
    examples, marked = pick(values.amax(1), generator), values > CUT * values.max()
    shown = numbered([text(tokenizer, tokens[w], marked[w]) for w in examples.explain.tolist()])
    explanation = parse_explanation(client.complete(EXPLAIN.format(examples=shown), max_tokens))
    if explanation is None:
        return None, None, examples.active
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
    client, target, rows = make_client(s.client, s.device), load_target(s.target, s.home), []
    check_fits(s, target)
    for method, acts in all_activations(s, target, held_out(target, s.eval_tokens).tokens).items():
        generator, density = torch.Generator().manual_seed(s.seed), acts.density
        drawn = draw_latents(acts, s.latents, active=ACTIVE, generator=generator, silent=SCORED_RANDOM)
        for how, latents in drawn.items():
            for latent in latents:
                explanation, answer, truth = judge(
                    client, acts, latent, tokenizer=target.tokenizer, max_tokens=s.max_tokens, generator=generator
                )
                scores = (None, None) if answer is None else score(answer, truth)
                failure = "explanation" if explanation is None else "answer" if answer is None else None
                rows.append(Result(method, how, latent, density[latent].item(), *scores, failure, explanation))
    write_results(s.output / "results.csv", rows)
    write_settings(s.output, s, s.device)
    draw(s.output)


def draw(folder: Path) -> None:
    """scores.png and README.md from results.csv alone."""
    rows = read_csv(folder / "results.csv")
    found = means(rows, "drawn", "balanced")
    dots(found, folder / "scores.png", null=0.5, label="balanced accuracy")
    failures = Counter((row["method"], row["failure"]) for row in rows if row["failure"])
    lines = [f"{n} of {method} ({kind})" for (method, kind), n in failures.items()]
    failed = f"Failures among {len(rows)} latents (counted, not scored): " + ("; ".join(lines) or "none") + "."
    write_readme(folder, [table(found), failed], title="Autointerp", doc=__doc__, image="scores.png")


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=draw)
