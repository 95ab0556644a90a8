"""Any dataset → packed token batches, Int["batch seq"].

Documents are tokenised as they are read, joined by the tokenizer's end-of-text token and cut into rows of `seq`
tokens: no padding, nothing truncated. A stream's position is (documents read, tokens left over), so that a resumed
stream yields exactly what the interrupted one would have.

Four kinds of source (`DatasetSpec.path`):
  "python"        the .py files of the standard library and site-packages of the running environment
  "docstrings"    the docstrings in those files: English prose about code
  a token folder  train.npy and val.npy, each one stream as it was packed; read without the package `datasets`
  anything else   a dataset for `datasets.load_dataset`: a hub name, or a local folder or file (txt, jsonl, parquet)

The environment's files are ordered and split by a hash of their path inside their package (1 in 50 is validation), and
near-duplicates are dropped: a file at least half of whose lines of 20 characters or more stand in earlier files.
Validation files come first in that order, so no training file is a near-copy of one of them.
"""

import ast
import functools
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from logs import atomic_path

Split = Literal["train", "val"]
VALIDATION_SHARE = 50  # one document in this many is held out where a dataset has no validation split of its own
DOCUMENTS_AT_ONCE = 64  # tokenised together, on all cores
SHUFFLE_BUFFER = 10_000  # documents


@dataclass(frozen=True)
class DatasetSpec:
    path: str  # "python", "docstrings", a token folder, a hub dataset or a local folder or file
    column: str = "text"  # of text, or of token ids where `tokenised`
    tokenised: bool = False
    train_split: str = "train"
    val_split: str = ""  # empty: one document in 50 of the training split is held out


def cache_folder() -> Path:
    """Where caches live: $NN_CACHE_HOME or ~/.cache/nn_decompositions."""
    return Path(os.environ.get("NN_CACHE_HOME", Path.home() / ".cache" / "nn_decompositions"))


# ------------------------------------------------------------------------------------------ the running environment


class SourceFile(NamedTuple):
    order: int  # a hash of `name`
    name: str  # path inside the standard library or site-packages
    path: str

    @property
    def split(self) -> Split:
        return "train" if self.order % VALIDATION_SHARE else "val"


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
    """Files of 200 bytes to 500 kB most of whose lines are new, validation files first."""
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


def python_documents(paths: list[str]) -> Iterator[dict[str, str]]:
    for path in paths:
        yield {"text": read_source(path)}


def docstring_documents(paths: list[str]) -> Iterator[dict[str, str]]:
    """One document per file: its docstrings of 200 characters or more, in order."""
    for path in paths:
        text = read_source(path)
        if text.count('"""') < 2:
            continue
        tree = ast.parse(text)
        owners = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        prose = [doc for owner in owners if len(doc := ast.get_docstring(owner) or "") >= 200]
        if prose:
            yield {"text": "\n\n".join(prose)}


# --------------------------------------------------------------------------------------------------------- streams


def documents(spec: DatasetSpec, split: Split, seed: int) -> Iterator[str | list[int]]:
    """The documents of one split in a shuffled, reproducible order: texts, or token ids where `spec.tokenised`."""
    if spec.path in ("python", "docstrings"):
        import datasets

        paths = [f.path for f in environment_corpus(split)]
        reader = python_documents if spec.path == "python" else docstring_documents
        rows = datasets.IterableDataset.from_generator(
            reader, gen_kwargs={"paths": [paths[i] for i in _order(len(paths), seed)]}
        )
        yield from (row[spec.column] for row in rows)
        return
    if (Path(spec.path) / "train.npy").exists():
        yield from token_documents(spec, split, seed)
        return
    name = spec.val_split if split == "val" and spec.val_split else spec.train_split
    rows = load_rows(spec.path, name).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    for row in rows:
        if spec.val_split or split == ("train" if _document_hash(row[spec.column]) % VALIDATION_SHARE else "val"):
            yield row[spec.column]


def _order(n: int, seed: int) -> list[int]:
    """A random order of n documents; seed 0 is the order in which they are found."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist() if seed else list(range(n))


def token_documents(spec: DatasetSpec, split: Split, seed: int) -> Iterator[list[int]]:
    """The documents of a token folder: `split`.npy holds uint16 ids, and its first id stands before every document.

    Raises ValueError for another kind of array, and where the specification says that the text is not tokenised.
    """
    file = Path(spec.path) / f"{split}.npy"
    ids = np.load(file)
    if ids.dtype != np.uint16 or ids.ndim != 1 or len(ids) == 0:
        raise ValueError(
            f"{file} holds {ids.dtype}{list(ids.shape)}: a token folder has one row of uint16 ids per split"
        )
    if not spec.tokenised:
        raise ValueError(f"{file} holds token ids: its DatasetSpec needs tokenised=True")
    starts = np.append(np.flatnonzero(ids == ids[0]), len(ids))
    for i in _order(len(starts) - 1, seed):
        yield ids[starts[i] + 1 : starts[i + 1]].tolist()


def load_rows(path: str, split: str):  # type: ignore[no-untyped-def]  # datasets.IterableDataset
    """A local folder or file of txt, jsonl/json or parquet, or a hub dataset, streamed."""
    import datasets

    local, files = Path(path), local_files(path)
    if not local.exists():
        return datasets.load_dataset(path, split=split, streaming=True)
    files = [f for f in files if not local.is_dir() or split in f.stem or len(files) == 1]
    if not files:
        raise ValueError(f"{path} holds no file of split {split!r}: name its files like {split}.jsonl")
    kinds = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if files[0].suffix not in kinds:
        raise ValueError(f"{files[0]} is of a kind this project does not read: use one of {sorted(kinds)}")
    return datasets.load_dataset(
        kinds[files[0].suffix], data_files={split: [str(f) for f in files]}, split=split, streaming=True
    )


def local_files(path: str) -> list[Path]:
    """The files of a local folder, or a local file itself; none of a dataset on the hub."""
    local = Path(path)
    return sorted(p for p in local.rglob("*") if p.is_file()) if local.is_dir() else [local] if local.exists() else []


def text_fingerprint(spec: DatasetSpec) -> str:
    """16 hex digits that change with name, size or time of any file of a text on this machine; a hub's text has its name."""
    own = spec.path in ("python", "docstrings")
    files = [Path(f.path) for f in environment_files()] if own else local_files(spec.path)
    listing = [spec.path, *(f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]


def _document_hash(document: str | list[int]) -> int:
    return int(hashlib.sha256(str(document)[:1000].encode()).hexdigest()[:16], 16)


class TokenStream:
    """An iterator of Int["batch seq"] (int64, CPU); ends when the documents do."""

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, split: Split, batch: int, seq: int, seed: int = 0
    ) -> None:
        self.spec, self.tokenizer, self.split, self.batch, self.seq, self.seed = (
            spec,
            tokenizer,
            split,
            batch,
            seq,
            seed,
        )
        self.n_documents = 0
        self.leftover: list[int] = []
        self._open()

    def _open(self) -> None:
        rest = documents(self.spec, self.split, self.seed)
        self._documents = itertools.islice(rest, self.n_documents, None)

    def __iter__(self) -> "TokenStream":
        return self

    def __next__(self) -> Int[Tensor, "batch seq"]:
        needed = self.batch * self.seq
        while len(self.leftover) < needed:
            chunk = list(itertools.islice(self._documents, DOCUMENTS_AT_ONCE))
            if not chunk:
                if self.n_documents == 0:
                    raise ValueError(f"dataset {self.spec.path!r} has no documents in its {self.split} split")
                raise StopIteration
            self.n_documents += len(chunk)
            for ids in self._tokenise(chunk):
                self.leftover += [self.separator, *ids]
        rows = torch.tensor(self.leftover[:needed]).view(self.batch, self.seq)
        del self.leftover[:needed]
        return rows

    @property
    def separator(self) -> int:
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    def _tokenise(self, chunk: list[str | list[int]]) -> list[list[int]]:
        if self.spec.tokenised:
            return chunk  # type: ignore[return-value]
        return self.tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]

    def state_dict(self) -> dict[str, int | Tensor]:
        return {"documents": self.n_documents, "leftover": torch.tensor(self.leftover, dtype=torch.int32)}

    def load_state_dict(self, state: dict[str, int | Tensor]) -> None:
        assert isinstance(state["leftover"], Tensor) and isinstance(state["documents"], int), f"{state.keys()=}"
        self.n_documents, self.leftover = state["documents"], state["leftover"].tolist()
        self._open()


def take_tokens(stream: TokenStream, n_tokens: int) -> Int[Tensor, "sequence seq"]:
    """The first ⌈n_tokens / seq⌉ sequences of a stream, rounded up to its batches, cut to size."""
    n = -(-n_tokens // stream.seq)
    batches = list(itertools.islice(stream, -(-n // stream.batch)))
    if (held := len(batches) * stream.batch * stream.seq) < n * stream.seq:
        raise ValueError(
            f"{stream.spec.path!r} ({stream.split}) holds only {held} tokens of the {n_tokens} asked for, in batches of "
            f"{stream.batch} sequences: ask for fewer"
        )
    return torch.cat(batches)[:n]
