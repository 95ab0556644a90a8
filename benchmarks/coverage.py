"""Do the ruler's 95 % intervals cover? A check on real text: intervals from one draw of documents, values from the others.

A few sequences of every held-out document are measured once, all layers replaced. Then `draws` times some of the documents
are drawn at random; each row's interval is made from them, as the ruler makes it, and also as if sequences were independent,
and compared with the row's value on all the other documents. That value has an error of its own: of exact intervals from
m documents a share P(|z| < 1.96 / √(1 + m / rest)) would contain it. Writes results/coverage.csv.

    python benchmarks/coverage.py        # takes the coders that main.py trained
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import trange

from checkpoints import CHECKPOINTS, CONFIG, load_checkpoint
from coder_replacements import as_replacements
from evaluation import RESAMPLES, evaluate
from logs import write_csv
from metrics import bootstrap_interval, document_draws
from python_corpus import HELD_OUT
from target_models import TargetModel, load_target
from token_stream import HeldOutText


@dataclass(frozen=True)
class Settings:
    checkpoints: Path = CHECKPOINTS / "main"
    per_document: int = 2  # sequences at most
    documents: int = 60  # of a draw
    draws: int = 200
    seed: int = 0
    output: Path = Path(__file__).parent / "results" / "coverage.csv"


class Row(NamedTuple):
    method: str
    k: str
    protocol: str
    layers: str
    value: float  # ΔCE over all documents
    covered: float  # share of draws whose interval over documents holds the value on the others
    covered_by_sequences: float  # the same, of a bootstrap over sequences
    expected: float  # share of exact intervals
    documents: int
    sequences: int


def every_document(target: TargetModel, most: int) -> HeldOutText:
    """At most `most` sequences of each held-out document, tuning and test."""
    tokens, numbers, n = [], [], 0
    for split in HELD_OUT:
        for rows in target.stream(split, 1).rows_by_document(10**6):
            generator = torch.Generator().manual_seed(n)
            chosen = torch.randperm(len(rows), generator=generator)[:most].tolist()
            tokens += [rows[i] for i in chosen]
            numbers += [n] * len(chosen)
            n += 1
    return HeldOutText(torch.tensor(tokens), torch.tensor(numbers))


def covers(
    values: Float[Tensor, "sequence"], documents: Int[Tensor, "sequence"], chosen: Int[Tensor, "sequence"]
) -> tuple[bool, bool]:
    """Whether the intervals from the chosen sequences, over documents and over sequences, hold the mean of the others."""
    others, own = values[~chosen].double().mean().item(), values[chosen]
    found = []
    for units in (documents[chosen], torch.arange(len(own))):
        low, high = bootstrap_interval(own, document_draws(units, RESAMPLES, seed=0))
        found.append(low <= others <= high)
    return found[0], found[1]


def main(s: Settings) -> None:
    target = load_target("tiny", "cpu")
    folders = sorted(config.parent for config in s.checkpoints.glob(f"*/{CONFIG}"))
    replacements = as_replacements([load_checkpoint(str(folder), "cpu") for folder in folders])
    text = every_document(target, s.per_document)
    measured = evaluate(target, replacements, text, ("frozen", "free"))
    n, generator = int(text.documents.max()) + 1, torch.Generator().manual_seed(s.seed)
    hits = torch.zeros(len(measured.points), 2)
    for _ in trange(s.draws, desc="draws", mininterval=2):
        chosen = torch.isin(text.documents, torch.randperm(n, generator=generator)[: s.documents])
        for i, values in enumerate(measured.differences):
            hits[i] += torch.tensor(covers(values, text.documents, chosen))
    expected = math.erf(1.96 / math.sqrt(1 + s.documents / (n - s.documents)) / math.sqrt(2))
    rows = [
        Row(
            p.method, str(p.k), p.protocol, " ".join(map(str, p.layers)), p.ce_degradation, *(hit / s.draws).tolist(),
            expected, n, len(text.tokens),
        )
        for p, hit in zip(measured.points, hits)
    ]  # fmt: skip
    write_csv(s.output, Row._fields, [tuple(map(str, row)) for row in rows])
    for name in ("covered", "covered_by_sequences", "expected"):
        print(name, sum(getattr(row, name) for row in rows) / len(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
