"""Pieces of text in which a latent is active, as windows of tokens and as a prompt shows them."""

import json
from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Int
from latent_activations import WIDTH
from torch import Tensor


def windows(grid: Tensor) -> Tensor:
    """(sequence, seq) cut into disjoint windows: (window, WIDTH)."""
    assert grid.shape[1] % WIDTH == 0, f"{grid.shape=} {WIDTH=}"
    return grid.view(-1, WIDTH)


def text(tokenizer: Any, tokens: Int[Tensor, "width"], active: Bool[Tensor, "width"]) -> str:
    """A window as text; runs of active tokens stand in << >>."""
    pieces, inside = [], False
    for token, on in zip(tokens.tolist(), active.tolist()):
        pieces.append(("<<" if on and not inside else ">>" if inside and not on else "") + tokenizer.decode([token]))
        inside = on
    return "".join(pieces) + (">>" if inside else "")


def numbered(pieces: Sequence[str]) -> str:
    """One numbered, quoted example per line of a prompt."""
    return "\n".join(f"{i}. {json.dumps(piece, ensure_ascii=False)}" for i, piece in enumerate(pieces, 1))
