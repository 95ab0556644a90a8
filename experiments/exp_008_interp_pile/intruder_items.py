"""Items of intruder detection, and judges that need no language model.

Four windows of an item come from one decile of a latent's activation: windows ranked by their peak, ties broken at
random, so that every latent gives every decile. The fifth, the intruder, is a window in which another latent of about
the same density is really active, in the same decile of its own, and marked where it is; it holds no activation of the
first.

A judge turns each example into a vector and names the one least like the others by mean cosine:

    tfidf      uni- and bigrams near the marks, by log(n / document frequency)
    embedding  the mean of the target's token embeddings (centred) near the marks

"Near" weighs a token by 1/(1 + distance to the nearest mark), 0 beyond a distance of 2.
"""

import math
from collections import Counter
from typing import NamedTuple

import torch
from example_windows import windows
from jaxtyping import Float, Int
from latent_activations import Activations
from torch import Tensor, nn

DECILES, OWN, REACH = 10, 4, 2


class Item(NamedTuple):
    tokens: Int[Tensor, "5 width"]
    active: Tensor  # bool, alike
    intruder: int


def deciles(peaks: Float[Tensor, "window"], generator: torch.Generator) -> tuple[Int[Tensor, "n"], ...]:
    """Windows in which the latent is active, in ten equal parts by rank; ties fall at random."""
    active = (peaks > 0).nonzero()[:, 0]
    mixed = active[torch.randperm(len(active), generator=generator)]
    return mixed[peaks[mixed].argsort(stable=True)].tensor_split(DECILES)


def items(acts: Activations, latent: int, *, donors: list[int], generator: torch.Generator) -> list[Item]:
    """One item per decile; the donor is drawn anew until it has a window in which `latent` is silent."""
    tokens, own = windows(acts.tokens), windows(acts.of(latent))
    found = []
    for d, bin_ in enumerate(deciles(own.amax(1), generator)):
        mine = bin_[torch.randperm(len(bin_), generator=generator)[:OWN]]
        for donor in [donors[i] for i in torch.randperm(len(donors), generator=generator)]:
            other = windows(acts.of(donor))
            theirs = deciles(other.amax(1), generator)[d]
            theirs = theirs[own[theirs].amax(1) == 0]
            if len(theirs):
                break
        else:
            continue
        chosen = theirs[torch.randint(len(theirs), (1,), generator=generator)]
        assert own[chosen].count_nonzero() == 0, f"the intruder of latent {latent} is one of its own examples"
        order = torch.randperm(OWN + 1, generator=generator)
        active = torch.cat([own[mine] > 0, other[chosen] > 0])[order]
        found.append(Item(tokens[torch.cat([mine, chosen])][order], active, int((order == OWN).nonzero())))
    return found


def nearness(active: Tensor) -> Float[Tensor, "5 width"]:
    """1/(1 + distance) to the nearest marked token, 0 beyond REACH."""
    marks, shifts = active.float(), range(-REACH, REACH + 1)
    return torch.stack([nn.functional.pad(marks, (shift, -shift)) / (1 + abs(shift)) for shift in shifts]).amax(0)


def odd_one(vectors: Float[Tensor, "5 feature"], generator: torch.Generator) -> int:
    """The example least like the others (mean cosine); ties fall at random."""
    unit = nn.functional.normalize(vectors, dim=1)
    likeness = (unit @ unit.T).fill_diagonal_(0).sum(1)
    lowest = (likeness <= likeness.min() + 1e-6).nonzero()[:, 0]
    return int(lowest[torch.randint(len(lowest), (1,), generator=generator)])


def grams(row: list[int]) -> list[tuple[int, ...]]:
    return [(t,) for t in row] + list(zip(row, row[1:]))


def tfidf_vectors(item: Item, frequency: Counter[tuple[int, ...]], n: int) -> Float[Tensor, "5 feature"]:
    """Uni- and bigrams near the marks (a bigram weighs as its second token), by log(n / document frequency)."""
    weights = nearness(item.active).tolist()
    rows = [list(zip(grams(row), near + near[1:])) for row, near in zip(item.tokens.tolist(), weights)]
    columns = {gram: i for i, gram in enumerate(dict.fromkeys(gram for row in rows for gram, _ in row))}
    out = torch.zeros(len(rows), len(columns))
    for i, row in enumerate(rows):
        for gram, near in row:
            out[i, columns[gram]] += near * math.log((n + 1) / (frequency[gram] + 1))
    return out


def embedding_vectors(item: Item, embedding: Float[Tensor, "vocab d"]) -> Float[Tensor, "5 d"]:
    """Token embeddings near the marks, summed."""
    return (nearness(item.active)[..., None] * embedding[item.tokens]).sum(1)
