"""Topics of Python code, read off the text itself: a span of 32 tokens has a topic where its pattern matches the span's text.

Text is split by document, by the parity of its number: one half chooses units and strengths, the other tells what they do. Of
each topic some windows with labelled spans are taken, one of each document before a second one, and as many windows without any;
a token counts for the topic where its own span is labelled, and for the general text in the windows without.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from target_models import TargetModel
from token_stream import HeldOutText

SPAN = 32  # tokens
TOPICS = {
    "docstrings": r'"""',
    "imports": r"^\s*(from [\w.]+ )?import \w",
    "tests": r"\bassert\b|self\.assert|\bdef test_|\bpytest\b",
    "numeric": r"\bnp\.|\bnumpy\b|\bmath\.|\btorch\.|\bndarray\b",
    "formatting": r"\.format\(|\bf\"|\bf'|%[sdr]\b",
    "licences": r"[Cc]opyright|[Ll]icense",
    "decorators": r"^\s*@\w+",
    "exceptions": r"^\s*except\b|\braise \w+",
    "typing": r"\b(Optional|Union|List|Dict|Callable|Any|TypeVar)\b|-> ",
    "dunders": r"def __\w+__",
}


@dataclass(frozen=True)
class Topic:
    """A name and the pattern that makes it, with ^ at the beginning of any line."""

    name: str
    pattern: re.Pattern[str]


def topics(names: Sequence[str]) -> list[Topic]:
    return [Topic(name, re.compile(TOPICS[name], re.MULTILINE)) for name in names]


class Labelled(NamedTuple):
    """Windows of text, their documents, and the topics of their spans."""

    tokens: Int[Tensor, "window seq"]
    documents: Int[Tensor, "window"]
    spans: Bool[Tensor, "topic window span"]

    def of(self, windows: Int[Tensor, "chosen"]) -> "Labelled":
        return Labelled(self.tokens[windows], self.documents[windows], self.spans[:, windows])

    @property
    def on(self) -> Bool[Tensor, "topic window seq"]:
        """Of each token."""
        return self.spans.repeat_interleave(SPAN, dim=-1)


def labelled(target: TargetModel, text: HeldOutText, asked: Sequence[Topic]) -> Labelled:
    n, seq = text.tokens.shape
    assert seq % SPAN == 0, f"windows of {seq} tokens are not whole spans of {SPAN}"
    spans = [target.tokenizer.decode(span) for span in text.tokens.reshape(-1, SPAN)]
    found = [[bool(topic.pattern.search(span)) for span in spans] for topic in asked]
    return Labelled(text.tokens, text.documents, torch.tensor(found).view(len(asked), n, seq // SPAN))


def halves(text: Labelled) -> tuple[Labelled, Labelled]:
    """(selection, test): documents of even and of odd number."""
    even = text.documents % 2 == 0
    return text.of(even.nonzero()[:, 0]), text.of((~even).nonzero()[:, 0])


class Windows(NamedTuple):
    """A topic's text in one half."""

    own: Labelled  # windows with labelled spans
    neutral: Labelled  # windows without any


def windows_of(half: Labelled, topic: int, n_own: int, n_neutral: int) -> Windows:
    """Raises ValueError where the half has no window with the topic, or none without."""
    has = half.spans[topic].any(1)
    chosen = [_spread(half.documents, where, n) for where, n in ((has, n_own), (~has, n_neutral))]
    if min(map(len, chosen)) == 0:
        raise ValueError(f"no window with or without topic {topic}: ask for more text (--eval-tokens)")
    return Windows(*(half.of(windows) for windows in chosen))


def _spread(documents: Int[Tensor, "window"], where: Bool[Tensor, "window"], n: int) -> Int[Tensor, "chosen"]:
    """At most n of these windows: the first of each document, then the second, and so on."""
    turns: dict[int, int] = {}
    candidates = []
    for window in where.nonzero()[:, 0].tolist():
        turn = turns[int(documents[window])] = turns.get(int(documents[window]), -1) + 1
        candidates.append((turn, window))
    return torch.tensor([window for _, window in sorted(candidates)[:n]], dtype=torch.int64)


def vocabularies(half: Labelled, vocab_size: int, words: int = 20) -> Int[Tensor, "topic word"]:
    """The tokens that tell each topic best: the largest (c − e) / √(e + 1), c how often its spans hold a token, e how often
    they would if it were as frequent there as in all text.
    """
    every = torch.bincount(half.tokens.flatten(), minlength=vocab_size)
    chosen = []
    for on in half.on:
        inside = torch.bincount(half.tokens[on], minlength=vocab_size)
        expected = every * (inside.sum() / every.sum())
        chosen.append(((inside - expected) / (expected + 1).sqrt()).topk(words).indices)
    return torch.stack(chosen)
