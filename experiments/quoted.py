"""Numbers that prose quotes, each read from the row of the table that it claims to come from.

    free {transcoder k16 free: interval .3f}, after {@settings.json: seconds/60 .1f} minutes

In braces stand the words that choose a row, and after the colon a column and the format of its value. A word is a protocol, k16,
layer2, column=value (~ for a space), or the row's method (its toy or gate where it has none); @ names another file than
points.csv. Exactly one row must match, but where `mean`, `least` or `largest` of several is asked for. A column may be multiplied
or divided (l0*2); `interval` is ΔCE with its bounds; a format without a letter (.2) leaves out the zero before the point.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from logs import read_csv

PROTOCOLS = ("single", "frozen", "gates", "free")
NAMES = ("method", "toy", "gate")  # the column that names a row, whichever a table has
INTERVAL = ("ce_degradation", "ce_low", "ce_high")
SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: sum(values) / len(values), "least": min, "largest": max
}  # fmt: skip

rows_of = functools.cache(read_csv)


def quoted(text: str, folder: Path) -> str:
    """The text with the figure in place of every quotation; files are named from `folder` on."""
    return re.sub(r"\{([^{}]+)\}", lambda found: figure(found[1], folder), text)


def figure(quotation: str, folder: Path) -> str:
    """Raises ValueError where another number of rows matches than is asked for."""
    where, _, what = quotation.partition(":")
    words = where.split()
    file = folder / next((word[1:] for word in words if word.startswith("@")), "points.csv")
    *summary, column, form = what.split()
    if file.suffix == ".json":
        return shown(json.loads(file.read_text()), column, form)
    rows = matching(rows_of(file), [word for word in words if not word.startswith("@")])
    if summary:
        values = [value_of(row, column) for row in rows]
        return formatted(SUMMARIES[summary[0]](values), form)
    if len(rows) != 1:
        raise ValueError(f"{{{quotation}}} is said of {len(rows)} rows of {file}: name one")
    return shown(rows[0], column, form)


def matching(rows: Sequence[Mapping[str, str]], words: Sequence[str]) -> list[Mapping[str, str]]:
    """The rows of which all the words are true."""
    name = next((column for column in NAMES if rows and column in rows[0]), "")
    asked = dict(_as_pair(word, name) for word in words)
    return [row for row in rows if all(row[column] == value for column, value in asked.items())]


def _as_pair(word: str, name: str) -> tuple[str, str]:
    """The column that a word is about, and the value it asks for."""
    column, has_value, value = word.partition("=")
    if has_value:
        return column, value.replace("~", " ")
    if word in PROTOCOLS:
        return "protocol", word
    if numbered := re.fullmatch(r"(k|layer)(\d+)", word):
        return {"k": "k", "layer": "layers"}[numbered[1]], numbered[2]
    return name, word


def shown(row: Mapping[str, Any], column: str, form: str) -> str:
    if column == "interval":
        own, low, high = (formatted(float(row[part]), form) for part in INTERVAL)
        return f"{own} [{low}, {high}]"
    return formatted(value_of(row, column), form)


def value_of(row: Mapping[str, Any], column: str) -> float:
    name, sign, factor = re.fullmatch(r"(\w+?)(?:([*/])(\d+))?", column).groups()  # type: ignore[union-attr]
    value = float(row[name])
    return value if sign is None else value * float(factor) if sign == "*" else value / float(factor)


def formatted(value: float, form: str) -> str:
    if form[-1].isdigit():
        return f"{value:{form}f}".replace("0.", ".", 1)
    return f"{value:{form}}"
