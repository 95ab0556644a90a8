"""Do a latent's examples belong together: can the one taken from another latent be told from four of its own?

Items and the judges `tfidf` and `embedding`, which need no language model, are explained in intruder_items.py; chance is 1/5.
`--client` adds a language model as a judge; replies that are no single number are failures: counted, not scored.

    python experiments/exp_008_interp_pile/intruder.py --client endpoint:MODEL   # pile: GPU, network
    python experiments/exp_008_interp_pile/intruder.py --target tiny             # offline
    … --replot draws the figure again from results.csv

Expected: transcoder and CLT latents far above 1/5, shuffled activations at 1/5; the random-weights target between.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from example_windows import numbered, text, windows
from interval_report import dots, means, table, write_readme, write_results
from intruder_items import DECILES, OWN, Item, embedding_vectors, grams, items, odd_one, tfidf_vectors
from judge_clients import Client, make_client, parse_numbers
from latent_activations import all_activations, draw_latents
from methods_and_nulls import TINY, InterpSettings
from torch import nn

from evaluation import held_out
from logs import read_csv, write_settings
from study import check_fits, run_study
from target_models import load_target

DONORS = 20  # the latents nearest in density, of which one lends the intruder


@dataclass(frozen=True, kw_only=True)
class Settings(InterpSettings):
    client: str | None = None  # endpoint:MODEL or local:FOLDER
    max_tokens: int = 4096  # of a reply
    output: Path = Path(__file__).parent / "output" / "intruder"


PRESETS = (Settings(), Settings(**TINY))
PROMPT = """Five pieces of text, in which << and >> were added by us. In four of them the marked tokens have something
in common. Think as long as you like, then end with one line: ANSWER: followed by the number of the piece that does not
belong.
---
{examples}"""


class Result(NamedTuple):
    method: str
    drawn: str
    latent: int
    density: float
    judge: str
    accuracy: float | None  # over deciles; None where every item failed
    low_deciles: float | None  # deciles 1–5
    high_deciles: float | None  # deciles 6–10
    failures: int


def ask(client: Client, item: Item, *, tokenizer: Any, max_tokens: int) -> int | None:
    shown = numbered([text(tokenizer, *pair) for pair in zip(item.tokens, item.active)])
    numbers = parse_numbers(client.complete(PROMPT.format(examples=shown), max_tokens), OWN + 1)
    return next(iter(numbers)) - 1 if numbers and len(numbers) == 1 else None


def main(s: Settings) -> None:
    client = None if s.client is None else make_client(s.client, s.device)
    target = load_target(s.target, s.home)
    check_fits(s, target)
    embedding = next(m for m in target.model.modules() if isinstance(m, nn.Embedding)).weight.float().cpu()
    embedding, rows = embedding - embedding.mean(0), []
    everything = all_activations(s, target, held_out(target, s.eval_tokens).tokens)
    texts = windows(everything["transcoder"].tokens).tolist()
    frequency = Counter(gram for row in texts for gram in set(grams(row)))
    for method, acts in everything.items():
        generator, density = torch.Generator().manual_seed(s.seed), acts.density
        drawn = draw_latents(acts, s.latents, active=DECILES * OWN, generator=generator)
        able = draw_latents(acts, acts.d_dict, active=DECILES * OWN, generator=generator)["uniform"] if drawn else []
        for how, latents in drawn.items():
            for latent in latents:
                apart = (density[torch.tensor(able)] / density[latent]).log().abs()
                donors = [i for _, i in sorted(zip(apart.tolist(), able)) if i != latent][:DONORS]
                own = items(acts, latent, donors=donors, generator=generator)
                answers: dict[str, list[int | None]] = {
                    "tfidf": [odd_one(tfidf_vectors(item, frequency, len(texts)), generator) for item in own],
                    "embedding": [odd_one(embedding_vectors(item, embedding), generator) for item in own],
                }
                if client is not None and s.client is not None:
                    asked = {"tokenizer": target.tokenizer, "max_tokens": s.max_tokens}
                    answers[s.client] = [ask(client, item, **asked) for item in own]
                for judge, given in answers.items():
                    hits = [None if a is None else float(a == item.intruder) for a, item in zip(given, own)]
                    parts = (hits, hits[: DECILES // 2], hits[DECILES // 2 :])
                    scores = [sum(h) / len(h) if (h := [x for x in part if x is not None]) else None for part in parts]
                    rows.append(Result(method, how, latent, density[latent].item(), judge, *scores, hits.count(None)))
    write_results(s.output / "results.csv", rows)
    write_settings(s.output, s, s.device)
    draw(s.output)


def draw(folder: Path) -> None:
    """intruder.png and README.md from results.csv alone."""
    rows = [row | {"group": f"{row['judge']}, latents by {row['drawn']}"} for row in read_csv(folder / "results.csv")]
    found = means(rows, "group", "accuracy")
    dots(found, folder / "intruder.png", null=1 / (OWN + 1), label="intruder found")
    ends = [f"{n} deciles of activation:\n\n{table(means(rows, 'group', f'{n}_deciles'))}" for n in ("low", "high")]
    failed = f"Failures (counted, not scored): {sum(int(row['failures']) for row in rows)}."
    parts = [table(found), *ends, failed]
    write_readme(folder, parts, title="Intruder detection", doc=__doc__, image="intruder.png")


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=draw)
