"""When the units of a model's decomposition are active, gathered in one pass over text: counts, histograms and examples.

    example    a window of text in which a unit is active, shown around its strongest token there
    top        the `TOP` windows of each unit in which it is strongest
    drawn      `DRAWN` windows of each unit, drawn uniformly among those in which it is active: every window draws a number,
               and the largest numbers stay
    histogram  |a| in `BINS` equal bins from 0 to a power of two; when a larger |a| comes, neighbouring bins become one

Memory beyond one batch: 4 · (`TOP` + `DRAWN`) · (`SPAN` + 8) bytes for each unit, whatever the length of the text.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

TOP, DRAWN, QUARTERS = 8, 24, 4
PER_QUARTER = 2  # examples shown of each quarter of the drawn ones
WINDOW = 64  # tokens: a unit has at most one example in each window of a sequence
BEFORE, SPAN = 19, 32  # an example shows so many tokens before its strongest one, and so many in all
BINS = 32


class Events(NamedTuple):
    """Where units were active in a batch of sequences, ordered by unit, then by place."""

    units: Int[Tensor, "event"]
    places: Int[Tensor, "event"]  # token, counted through the batch
    values: Float[Tensor, "event"]  # signed, never 0

    @staticmethod
    def of(units: Int[Tensor, "event"], places: Int[Tensor, "event"], values: Float[Tensor, "event"]) -> "Events":
        """On the CPU and in order; zeros are not active."""
        units, places, values = (part[values != 0].cpu() for part in (units, places, values))
        order = (units * (places.max() + 1 if len(places) else 1) + places).argsort()
        return Events(units[order], places[order], values[order].float())


class Samples(NamedTuple):
    """Examples of units, in no order."""

    units: Int[Tensor, "example"]
    rank: Float[Tensor, "example"]  # the larger ones stay
    places: Int[Tensor, "example"]  # of the strongest token, counted through the text
    peaks: Float[Tensor, "example"]  # the activation there
    spans: Float[Tensor, "example span"]  # activations from `BEFORE` tokens before it on; 0 beyond the sequence


class Example(NamedTuple):
    """One example as a page shows it."""

    place: int
    quarter: int  # 0: among the strongest of all; else 1…QUARTERS, strongest first, of the drawn ones
    span: Float[Tensor, "span"]


def strongest(events: Events, seq: int) -> Int[Tensor, "window"]:
    """Which events are the strongest of their unit in their window: of equals the first."""
    per_sequence = -(-seq // WINDOW)
    window = events.places // seq * per_sequence + events.places % seq // WINDOW
    key = events.units * (int(window.max()) + 1 if len(window) else 1) + window
    _, segment, counts = key.unique_consecutive(return_inverse=True, return_counts=True)
    size = events.values.abs()
    peak = torch.zeros(len(counts)).scatter_reduce_(0, segment, size, "amax")
    at = (size == peak[segment]).nonzero()[:, 0]
    return torch.full((len(counts),), len(size)).scatter_reduce_(0, segment[at], at, "amin")


def spans(events: Events, chosen: Int[Tensor, "example"], seq: int) -> Float[Tensor, "example span"]:
    """The activations of the chosen events' units around them, within their sequences."""
    n = int(events.places.max()) + SPAN + 1 if len(events.places) else 1
    keys = events.units * n + events.places
    place = events.places[chosen, None] + torch.arange(-BEFORE, SPAN - BEFORE)
    wanted = events.units[chosen, None] * n + place
    found = torch.searchsorted(keys, wanted).clamp_max_(max(len(keys) - 1, 0))
    inside = place.div(seq, rounding_mode="floor") == events.places[chosen, None] // seq
    return events.values[found] * ((keys[found] == wanted) & inside)


def largest(units: Int[Tensor, "example"], rank: Float[Tensor, "example"], n: int) -> Int[Tensor, "kept"]:
    """Which examples are among the n of their unit with the largest rank, ascending."""
    order = rank.argsort(descending=True, stable=True)
    order = order[units[order].argsort(stable=True)]
    ordered = units[order]
    return order[torch.arange(len(order)) - torch.searchsorted(ordered, ordered) < n].sort().values


class UnitActivity:
    """What is known of `n` units after any number of batches, all of `seq` tokens a sequence."""

    def __init__(self, n: int, seq: int, seed: int = 0) -> None:
        self.n, self.seq, self.generator = n, seq, torch.Generator().manual_seed(seed)
        self.counts = torch.zeros(n, dtype=torch.int64)  # tokens on which each was active
        self.sums, self.sizes = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)  # Σ a, Σ |a|
        self.peaks = torch.zeros(n)  # largest |a|
        self.histogram = torch.zeros(n, BINS, dtype=torch.int64)
        self.exponents = torch.full((n,), -126, dtype=torch.int64)  # a histogram ends at 2^exponent
        none = torch.zeros(0, dtype=torch.int64)
        self.top = self.drawn = Samples(none, torch.zeros(0), none, torch.zeros(0), torch.zeros(0, SPAN))

    def add(self, events: Events, first: int) -> None:
        """One batch of sequences, the first of whose tokens is the text's `first`."""
        units, size = events.units, events.values.abs()
        self.counts += torch.bincount(units, minlength=self.n)
        self.sums.index_add_(0, units, events.values.double())
        self.sizes.index_add_(0, units, size.double())
        self.peaks.scatter_reduce_(0, units, size, "amax")
        self._widen()
        bins = (size / torch.exp2(self.exponents[units].float()) * BINS).long().clamp_max_(BINS - 1)
        self.histogram += torch.bincount(units * BINS + bins, minlength=self.n * BINS).view(self.n, BINS)
        chosen = strongest(events, self.seq)
        drawn = torch.rand(len(chosen), generator=self.generator)
        self.top = self._kept(self.top, events, chosen, rank=size[chosen], n=TOP, first=first)
        self.drawn = self._kept(self.drawn, events, chosen, rank=drawn, n=DRAWN, first=first)

    def _widen(self) -> None:
        """Histograms whose end is below their unit's largest |a| get an end above it."""
        needed = torch.maximum(
            self.exponents, torch.frexp(self.peaks).exponent.long().masked_fill(self.peaks == 0, -126)
        )
        merged = torch.arange(BINS) >> (needed - self.exponents)[:, None].clamp_max(BINS)
        self.histogram = torch.zeros_like(self.histogram).scatter_add_(1, merged, self.histogram)
        self.exponents = needed

    def _kept(
        self, old: Samples, events: Events, chosen: Int[Tensor, "window"], *, rank: Float[Tensor, "window"], n: int,
        first: int,
    ) -> Samples:  # fmt: skip
        units = torch.cat([old.units, events.units[chosen]])
        kept = largest(units, torch.cat([old.rank, rank]), n)
        own, new = kept[kept < len(old.units)], kept[kept >= len(old.units)] - len(old.units)
        at = chosen[new]
        fresh = Samples(
            events.units[at], rank[new], events.places[at] + first, events.values[at], spans(events, at, self.seq)
        )
        return Samples(*(torch.cat([before[own], added]) for before, added in zip(old, fresh)))

    def examples(self) -> list[list[Example]]:
        """Of each unit the top ones, strongest first, then some of each quarter of the drawn ones that are not among them."""
        return [
            _shown(*pair) for pair in zip(_by_unit(self.top, self.n), _by_unit(self.drawn, self.n))
        ]  # fmt: skip


def _by_unit(samples: Samples, n: int) -> list[list[tuple[int, Tensor]]]:
    """(place, span) of each unit's examples, strongest first."""
    order = samples.peaks.abs().argsort(descending=True, stable=True)
    found: list[list[tuple[int, Tensor]]] = [[] for _ in range(n)]
    for unit, place, span in zip(samples.units[order].tolist(), samples.places[order].tolist(), samples.spans[order]):
        found[unit].append((place, span))
    return found


def _shown(top: list[tuple[int, Tensor]], drawn: list[tuple[int, Tensor]]) -> list[Example]:
    strongest_places = {place for place, _ in top}
    shown = [Example(place, 0, span) for place, span in top]
    for quarter in range(QUARTERS):
        begin, end = (len(drawn) * i // QUARTERS for i in (quarter, quarter + 1))
        rest = [one for one in drawn[begin:end] if one[0] not in strongest_places]
        shown += [Example(place, quarter + 1, span) for place, span in rest[:PER_QUARTER]]
    return shown
