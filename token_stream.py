"""Any dataset → packed token batches, Int["batch seq"].

Documents are tokenised as they are read, joined by the tokenizer's end-of-text token and cut into rows of `seq`
tokens: no padding, nothing truncated. Every row begins with the tokenizer's BOS token where it adds one to a text, as
Llama's and Gemma's do, for their models know no other beginning. Rows that somebody has packed already are taken as they
are. A stream's position is (documents read, tokens left over), so that a resumed stream yields exactly what the
interrupted one would have.

Four kinds of source (`DatasetSpec.path`):
  "python"        the .py files of the standard library and site-packages of the running environment
  "docstrings"    the docstrings in those files: English prose about code
  a token folder  train.npy and val.npy, each one stream as it was packed; read without the package `datasets`
  anything else   a dataset for `datasets.load_dataset`: a hub name, or a local folder or file (txt, jsonl, parquet)

The first two are read and split by `python_corpus.py`.
"""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from python_corpus import (
    VALIDATION_SHARE,
    Split,
    docstring_documents,
    environment_corpus,
    environment_files,
    python_documents,
)

DOCUMENTS_AT_ONCE = 64  # tokenised together, on all cores
SHUFFLE_BUFFER = 10_000  # documents
KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # ending → builder of `datasets`


@dataclass(frozen=True)
class DatasetSpec:
    path: str  # "python", "docstrings", a token folder, a hub dataset or a local folder or file
    column: str = "text"  # of text, or of token ids where `tokenised`
    tokenised: bool = False
    train_split: str = "train"
    val_split: str = ""  # empty: one document in 50 of the training split is held out
    bos: bool = True  # each packed row begins with BOS where the tokenizer adds one to a text; False: never


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
        yield from (_document(spec, row, i) for i, row in enumerate(rows))
        return
    if (Path(spec.path) / "train.npy").exists():
        yield from token_documents(spec, split, seed)
        return
    name = spec.val_split if split == "val" and spec.val_split else spec.train_split
    rows = load_rows(spec.path, name, lone=not spec.val_split).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    for i, row in enumerate(_readable(iter(rows), spec.path)):
        document = _document(spec, row, i)
        if spec.val_split or split == ("train" if _document_hash(document) % VALIDATION_SHARE else "val"):
            yield document


def _readable(rows: Iterator[dict[str, Any]], path: str) -> Iterator[dict[str, Any]]:
    """The rows; raises ValueError in one line where the files are empty or not of the kind that their endings say."""
    while (row := _next_row(rows, path)) is not None:
        yield row


def _next_row(rows: Iterator[dict[str, Any]], path: str) -> dict[str, Any] | None:
    with _data_errors(path):
        return next(rows, None)


@contextlib.contextmanager
def _data_errors(path: str) -> Iterator[None]:
    """What `datasets` and its readers say over many lines of a damaged file, in one."""
    try:
        yield
    except (ValueError, StopIteration) as error:  # the latter: an empty file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"dataset {path!r} cannot be read ({reason}): is a file of it empty or damaged?") from error


def _document(spec: DatasetSpec, row: dict[str, Any], number: int) -> str | list[int]:
    """The text, or the token ids, of one row; raises ValueError for another column or kind, by the number of the row read."""
    if spec.column not in row:
        has = ", ".join(map(repr, row))
        raise ValueError(f"dataset {spec.path!r} has no column {spec.column!r}: its DatasetSpec must name one of {has}")
    document = row[spec.column]
    if spec.tokenised and isinstance(document, list) and all(type(i) is int for i in document):
        return document
    if not spec.tokenised and isinstance(document, str):
        return document.removeprefix("\ufeff")
    kind = "null" if document is None else type(document).__name__
    if isinstance(document, list):
        kind = f"a list of {type(document[0]).__name__ if document else 'nothing'}"
    wanted = "a list of token ids, as tokenised=True says" if spec.tokenised else "a text, as tokenised=False says"
    raise ValueError(f"dataset {spec.path!r}, row {number}: column {spec.column!r} holds {kind}, not {wanted}")


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


def load_rows(path: str, split: str, lone: bool = True):  # type: ignore[no-untyped-def]  # datasets.IterableDataset
    """A local folder or file of txt, jsonl/json or parquet, or a hub dataset, streamed.

    A file belongs to a split whose name is a word of its own: `val` is one in `pile-val-0.jsonl`, not in `retrieval.jsonl`.
    `lone`: the only file there is belongs to every split.
    """
    import datasets

    if not Path(path).exists():
        return datasets.load_dataset(path, split=split, streaming=True)
    there = [f for f in local_files(path) if f.suffix in KINDS]
    word = re.compile(rf"(^|[^a-z]){re.escape(split)}([^a-z]|$)", re.IGNORECASE)
    files = [f for f in there if word.search(f.stem)] or (there if lone and len(there) == 1 else [])
    if not files:
        raise ValueError(
            f"{path} holds no file of split {split!r}: name its files like {split}.jsonl ({', '.join(KINDS)} are read)"
        )
    if len(kinds := {KINDS[f.suffix] for f in files}) > 1:
        raise ValueError(
            f"{path} holds files of split {split!r} of several kinds ({', '.join(sorted(kinds))}): leave one"
        )
    data = {split: [str(f) for f in files]}
    with _data_errors(path):
        return datasets.load_dataset(kinds.pop(), data_files=data, split=split, streaming=True)


def local_files(path: str) -> list[Path]:
    """The files of a text or tokens in a local folder, hidden ones left out, or a local file itself; none of a hub's."""
    local = Path(path)
    if not local.is_dir():
        return [local] if local.exists() else []
    names = (p.relative_to(local) for p in local.rglob("*") if p.is_file() and p.suffix in (*KINDS, ".npy"))
    return sorted(local / name for name in names if not any(part.startswith(".") for part in name.parts))


def text_fingerprint(spec: DatasetSpec) -> str:
    """16 hex digits that change with name, size or time of any file of a text on this machine; a hub's text has its name."""
    own = spec.path in ("python", "docstrings")
    files = [Path(f.path) for f in environment_files()] if own else local_files(spec.path)
    listing = [spec.path, *(f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]


def _document_hash(document: str | list[int]) -> int:
    return int(hashlib.sha256(str(document)[:1000].encode()).hexdigest()[:16], 16)


class TokenStream:
    """An iterator of Int["batch seq"] (int64, CPU); ends when the documents do.

    Raises ValueError for a document of another kind than its DatasetSpec says, for ids outside the vocabulary (the
    model's `vocab_size`; None: the tokenizer's) and for a tokenizer that has no token to put between documents.
    """

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, split: Split, batch: int, seq: int, seed: int = 0,
        vocab_size: int | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.tokenizer, self.split = spec, tokenizer, split
        self.batch, self.seq, self.seed, self.vocab_size = batch, seq, seed, vocab_size or len(tokenizer)
        self.separator, self.bos = separator(tokenizer), added_bos(tokenizer) if spec.bos else None
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
            self._pack(self._tokenise(chunk))
        rows = torch.tensor(self.leftover[:needed]).view(self.batch, self.seq)
        del self.leftover[:needed]
        self._check(rows)
        return rows

    def _pack(self, chunk: list[list[int]]) -> None:
        """Add documents to the tokens left over: rows packed by somebody as they are, others with a separator before each."""
        if self._are_rows(chunk):
            for ids in chunk:
                self.leftover += ids[: len(ids) // self.seq * self.seq]
            return
        for ids in chunk:
            if self.spec.tokenised and ids:  # those of some data sets bring their separators
                ids = ids[ids[0] == self.separator : len(ids) - (ids[-1] == self.separator)]
            self._append([self.separator, *ids])

    def _are_rows(self, chunk: list[list[int]]) -> bool:
        """Whether tokenised documents are equally long and fill whole rows; one token more is the last one's target."""
        lengths = {len(ids) for ids in chunk} if self.spec.tokenised else set()
        whole = len(lengths) == 1 and (length := lengths.pop()) >= self.seq and length % self.seq in (0, 1)
        return whole and len(self.leftover) % self.seq == 0

    def _append(self, ids: list[int]) -> None:
        if self.bos is None:
            self.leftover += ids
            return
        while ids:
            if len(self.leftover) % self.seq == 0:
                self.leftover.append(self.bos)
            room = self.seq - len(self.leftover) % self.seq
            self.leftover += ids[:room]
            ids = ids[room:]

    def _check(self, rows: Int[Tensor, "batch seq"]) -> None:
        for worst in (int(rows.min()), int(rows.max())):
            if not 0 <= worst < self.vocab_size:
                given = self.spec.tokenised and worst not in (self.separator, self.bos)
                origin = f"dataset {self.spec.path!r}" if given else "the tokenizer"
                raise ValueError(
                    f"{origin} gives token {worst}, which the model's vocabulary of {self.vocab_size} does not have: "
                    f"use the tokenizer that the model was trained with"
                )

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


def separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between two documents: end of text, or where the tokenizer has none, its separator or BOS token."""
    candidates = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
    found = next((i for i in candidates if i is not None), None)
    if found is None:
        raise ValueError("the tokenizer has no end-of-text token to put between documents: set its eos_token")
    return found  # type: ignore[no-any-return]


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token, where the tokenizer adds it to a text; else None."""
    begins = tokenizer("a", verbose=False)["input_ids"][:1]
    return tokenizer.bos_token_id if begins == [tokenizer.bos_token_id] else None


def take_tokens(stream: TokenStream, n_tokens: int) -> Int[Tensor, "sequence seq"]:
    """The first ⌈n_tokens / seq⌉ sequences of a stream, rounded up to its batches, cut to size."""
    if n_tokens < 1:
        raise ValueError(f"{n_tokens} held-out tokens were asked for (--tokens, --eval-tokens): ask for 1 or more")
    n = -(-n_tokens // stream.seq)
    batches = list(itertools.islice(stream, -(-n // stream.batch)))
    if (held := len(batches) * stream.batch * stream.seq) < n * stream.seq:
        raise ValueError(
            f"{stream.spec.path!r} ({stream.split}) holds only {held} tokens of the {n_tokens} asked for, in batches of "
            f"{stream.batch} sequences: ask for fewer"
        )
    return torch.cat(batches)[:n]
