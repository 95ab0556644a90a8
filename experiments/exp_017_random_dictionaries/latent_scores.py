"""Exp_008's scores of latents that need no language model, of any dictionary, beside its nulls.

intruder: the share of items in which a judge by tf-idf finds the window that another latent lent, chance 1/5;
predictability: held-out Matthews correlation of a tree that reads nearby tokens, chance 0. Latents are drawn uniformly among
those with examples enough for both.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

sys.path.append(str(Path(__file__).parents[1] / "exp_008_interp_pile"))
from example_windows import windows  # noqa: E402
from interval_report import write_results  # noqa: E402
from intruder import DONORS  # noqa: E402
from intruder_items import DECILES, OWN, grams, items, odd_one, tfidf_vectors  # noqa: E402
from latent_activations import Activations, collect, draw_latents, shuffled  # noqa: E402
from methods_and_nulls import randomised  # noqa: E402
from predictability import REACH, context, predictability  # noqa: E402

from checkpoints import checkpoint_folder  # noqa: E402
from coder_replacements import as_replacement  # noqa: E402
from config import BatchTopK  # noqa: E402
from evaluation import held_out  # noqa: E402
from recipes import train_coders, transcoder_configs  # noqa: E402
from replacement import Coded  # noqa: E402
from target_models import TargetModel  # noqa: E402


class Scored(NamedTuple):
    method: str
    score: str  # intruder or predictability
    latent: int
    density: float
    value: float


class ScoreSettings(Protocol):
    target: str
    layer: int
    latents: int
    score_tokens: int
    repeated_k: tuple[int, ...]
    d_dict: int
    tokens: int
    batch: int
    seed: int


def null_replacement(s: ScoreSettings, target: TargetModel) -> tuple[TargetModel, Coded]:
    """A transcoder of the target with every matrix drawn afresh."""
    redrawn, rules = randomised(target, s.seed), [BatchTopK(s.repeated_k[0])]
    configs = transcoder_configs(redrawn, layers=(s.layer,), rules=rules, d_dict=s.d_dict)
    folder = checkpoint_folder(s.target) / f"n{s.tokens}"
    trained = train_coders(
        configs, redrawn, tokens=s.tokens, batch=s.batch, seed=s.seed, harvest=s.harvest, folder=folder
    )
    return redrawn, as_replacement(trained)


def scored(s: ScoreSettings, target: TargetModel, dictionaries: Sequence[Coded], path: Path) -> None:
    """Write a row for each latent and score."""
    tokens = held_out(target, s.score_tokens).tokens
    found = {d.method: collect(target, d, tokens, layer=s.layer) for d in dictionaries}
    found["transcoder-shuffled"] = shuffled(found["transcoder"], torch.Generator().manual_seed(s.seed))
    found["transcoder-random-target"] = collect(*null_replacement(s, target), tokens, layer=s.layer)
    rows = []
    for method, acts in found.items():
        drawn = draw_latents(acts, s.latents, active=DECILES * OWN, generator=torch.Generator().manual_seed(s.seed))
        own = drawn.get("uniform", [])
        for score, values in (
            ("intruder", intruder_accuracy(acts, own, s.seed)),
            ("predictability", correlations(acts, own, target.vocab_size)),
        ):
            rows += [Scored(method, score, i, acts.density[i].item(), value) for i, value in zip(own, values)]
        print(f"{method}: {len(own)} latents of layer {s.layer} scored")
    write_results(path, rows)


def intruder_accuracy(acts: Activations, latents: Sequence[int], seed: int) -> Iterator[float]:
    """The share of a latent's items, one for each decile of its activation, in which the intruder is found."""
    generator, texts = torch.Generator().manual_seed(seed), windows(acts.tokens).tolist()
    frequency = Counter(gram for row in texts for gram in set(grams(row)))
    able = draw_latents(acts, acts.d_dict, active=DECILES * OWN, generator=generator).get("uniform", [])
    for latent in latents:
        apart = (acts.density[torch.tensor(able)] / acts.density[latent]).log().abs()
        donors = [i for _, i in sorted(zip(apart.tolist(), able)) if i != latent][:DONORS]
        own = items(acts, latent, donors=donors, generator=generator)
        hits = [odd_one(tfidf_vectors(item, frequency, len(texts)), generator) == item.intruder for item in own]
        yield sum(hits) / max(1, len(hits))


def correlations(acts: Activations, latents: Sequence[int], vocab: int) -> Iterator[float]:
    half, n_features = len(acts.tokens) // 2, (2 * REACH + 1) * (vocab + 1)
    train, test = (context(part, vocab) for part in (acts.tokens[:half], acts.tokens[half:]))
    for latent in latents:
        active = acts.of(latent)[:, 1:] > 0
        y, y_test = active[:half].flatten(), active[half:].flatten()
        yield predictability(train, y, test, y_test, n_features=n_features)
