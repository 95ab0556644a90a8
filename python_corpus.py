"""A text that every machine has: the Python files of the running environment, and the docstrings in them.

The environment's files are ordered and split by a hash of their path inside their package (1 in 50 is held out), and
near-duplicates are dropped: a file at least half of whose lines of 20 characters or more stand in earlier files.
Held-out files come first in that order, so no training file is a near-copy of one of them.
"""

import ast
import functools
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from logs import atomic_path, cache_folder

Split = Literal["train", "tuning", "test"]  # what is trained on, what settings are chosen on, what is reported
HELD_OUT: tuple[Split, ...] = ("tuning", "test")
HELD_OUT_SHARE = 50  # one document in this many is held out where a dataset has no split of its own for that
TUNING_SHARE = 4  # one held-out document in this many is for tuning


class SourceFile(NamedTuple):
    order: int  # a hash of `name`
    name: str  # path inside the standard library or site-packages
    path: str

    @property
    def split(self) -> Split:
        return "train" if self.order % HELD_OUT_SHARE else held_out_split(self.order // HELD_OUT_SHARE)


def held_out_split(document_hash: int) -> Split:
    """The split of a held-out document: one in TUNING_SHARE is for tuning, the others are for testing."""
    return "test" if document_hash % TUNING_SHARE else "tuning"


@functools.cache
def environment_files() -> list[SourceFile]:
    """Every .py file of the standard library and site-packages, in the order of the hash of its name."""
    files = []
    for root in {Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))}:
        for path in root.rglob("*.py"):
            name = path.relative_to(root).as_posix()
            if "site-packages/" not in name:
                order = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16)
                files.append(SourceFile(order, name, str(path)))
    return sorted(files)


def read_source(path: str) -> str:
    return Path(path).read_bytes().decode("utf-8", errors="ignore")


def drop_near_duplicates(files: list[SourceFile]) -> list[SourceFile]:
    """Files of 200 bytes to 500 kB most of whose lines are new, held-out files first."""
    seen: set[int] = set()
    kept = []
    for file in sorted(files, key=lambda f: (f.split == "train", f)):
        if not 200 <= os.path.getsize(file.path) <= 500_000:
            continue
        lines = {hash(s) for line in read_source(file.path).split("\n") if len(s := line.strip()) >= 20}
        if len(lines) >= 5 and len(lines & seen) < 0.5 * len(lines):
            kept.append(file)
        seen |= lines
    return kept


@functools.cache
def environment_corpus(split: Split) -> list[SourceFile]:
    """The de-duplicated files of one split; the list is cached under a fingerprint of names and sizes."""
    files = environment_files()
    listing = "\n".join(f"{f.path} {os.path.getsize(f.path)}" for f in files)
    cache = cache_folder() / "corpus" / f"{hashlib.sha256(listing.encode()).hexdigest()[:16]}.json"
    if not cache.exists():
        kept = drop_near_duplicates(files)
        with atomic_path(cache) as temporary:
            temporary.write_text(json.dumps(kept))
    return [f for f in (SourceFile(*row) for row in json.loads(cache.read_text())) if f.split == split]


def python_texts(paths: Iterable[str]) -> Iterator[str]:
    yield from map(read_source, paths)


def docstring_texts(paths: Iterable[str]) -> Iterator[str]:
    """One text per file: its docstrings of 200 characters or more, in order."""
    for path in paths:
        text = read_source(path)
        if text.count('"""') < 2:
            continue
        tree = ast.parse(text)
        owners = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        prose = [doc for owner in owners if len(doc := ast.get_docstring(owner) or "") >= 200]
        if prose:
            yield "\n\n".join(prose)
