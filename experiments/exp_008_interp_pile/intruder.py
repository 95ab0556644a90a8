"""Do a latent's examples belong together: can the one taken from another latent be told from four of its own?

Items and the judges `tfidf` and `embedding`, which need no language model, are explained in oddity.py; chance is 1/5.
`--client` adds a language model as a judge; replies that are no single number are failures: counted, not scored.

    python experiments/exp_008_interp_pile/intruder.py --client endpoint:MODEL   # pile: GPU, network
    python experiments/exp_008_interp_pile/intruder.py --target tiny             # offline; minutes on 2 cores
    … --replot draws the figure again from results.csv

Expected: transcoder and CLT latents far above 1/5, shuffled activations at 1/5; the random-weights target between.
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clients import Client, make_client, parse_numbers
from examples import numbered, text, windows
from features import TINY, Common, all_activations, draw_latents
from figures import dots, means, read_csv, table, write_csv, write_readme
from oddity import DECILES, OWN, Item, embedding_vectors, grams, items, odd_one, tfidf_vectors
from torch import nn

from evaluation import held_out_tokens
from logs import write_settings
from study import settings_for
from target_models import load_target

DONORS = 20  # the latents nearest in density, of which one lends the intruder


@dataclass(frozen=True)
class Settings(Common):
    client: str = "none"  # none, endpoint:MODEL or local:FOLDER
    max_tokens: int = 4096  # of a reply
    output: Path = Path(__file__).parent / "output" / "intruder"


PRESETS = {"pile": Settings(), "tiny": Settings(**vars(TINY))}
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
    accuracy: float | str  # over deciles; empty where every item failed
    low_deciles: float | str  # deciles 1–5
    high_deciles: float | str  # deciles 6–10
    failures: int


def ask(client: Client, max_tokens: int, tokenizer: Any, item: Item) -> int | None:
    shown = numbered([text(tokenizer, *pair) for pair in zip(item.tokens, item.active)])
    numbers = parse_numbers(client.complete(PROMPT.format(examples=shown), max_tokens), OWN + 1)
    return next(iter(numbers)) - 1 if numbers and len(numbers) == 1 else None


def main(s: Settings) -> None:
    if s.replot:
        return draw(s.output)
    began, client = time.perf_counter(), None if s.client == "none" else make_client(s.client, s.device)
    target = load_target(s.target, s.device)
    embedding = next(m for m in target.model.modules() if isinstance(m, nn.Embedding)).weight.float().cpu()
    embedding, rows = embedding - embedding.mean(0), []
    everything = all_activations(s, target, held_out_tokens(target, s.eval_tokens))
    texts = windows(everything["transcoder"].tokens).tolist()
    frequency = Counter(gram for row in texts for gram in set(grams(row)))
    for method, acts in everything.items():
        generator, density = torch.Generator().manual_seed(s.seed), acts.density
        drawn = draw_latents(acts, s.latents, DECILES * OWN, generator)
        able = draw_latents(acts, acts.d_dict, DECILES * OWN, generator)["uniform"] if drawn else []
        for how, latents in drawn.items():
            for latent in latents:
                apart = (density[torch.tensor(able)] / density[latent]).log().abs()
                donors = [i for _, i in sorted(zip(apart.tolist(), able)) if i != latent][:DONORS]
                own = items(acts, latent, donors, generator)
                answers: dict[str, list[int | None]] = {
                    "tfidf": [odd_one(tfidf_vectors(item, frequency, len(texts)), generator) for item in own],
                    "embedding": [odd_one(embedding_vectors(item, embedding), generator) for item in own],
                }
                if client is not None:
                    answers[s.client] = [ask(client, s.max_tokens, target.tokenizer, item) for item in own]
                for judge, given in answers.items():
                    hits = [None if a is None else float(a == item.intruder) for a, item in zip(given, own)]
                    parts = (hits, hits[: DECILES // 2], hits[DECILES // 2 :])
                    scores = [sum(h) / len(h) if (h := [x for x in part if x is not None]) else "" for part in parts]
                    rows.append(Result(method, how, latent, density[latent].item(), judge, *scores, hits.count(None)))
    write_csv(s.output / "results.csv", rows)
    write_settings(s.output, s, s.device, time.perf_counter() - began)
    draw(s.output)


def draw(folder: Path) -> None:
    """intruder.png and README.md from results.csv alone."""
    rows = [row | {"group": f"{row['judge']}, latents by {row['drawn']}"} for row in read_csv(folder / "results.csv")]
    found = means(rows, "group", "accuracy")
    dots(found, 1 / (OWN + 1), "intruder found", folder / "intruder.png")
    ends = [f"{n} deciles of activation:\n\n{table(means(rows, 'group', f'{n}_deciles'))}" for n in ("low", "high")]
    failed = f"Failures (counted, not scored): {sum(int(row['failures']) for row in rows)}."
    write_readme(folder, "Intruder detection", __doc__, "intruder.png", [table(found), *ends, failed])


if __name__ == "__main__":
    main(settings_for(PRESETS, __doc__))
