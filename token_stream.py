"""Any dataset → packed token batches, Int["batch seq"].

Documents are tokenised as they are read, joined by the tokenizer's end-of-text token and cut into rows of `seq`
tokens: no padding, nothing truncated. Every row begins with the tokenizer's BOS token where it adds one to a text, as
Llama's and Gemma's do, for their models know no other beginning. Rows that somebody has packed already are taken as they
are. A stream's position is (pieces read, tokens left over), so that a resumed stream yields exactly what the
interrupted one would have.

Text to train on is read in pieces of about one row (4 · `seq` characters), each as if it were a document, in a random order
over the next PIECES of them: a million tokens then come from thousands of documents, not from the first two hundred.
Text to measure on (`held_out_text`) is drawn at random over all documents, as many sequences of each as must be.

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
import random
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from python_corpus import (
    HELD_OUT_SHARE,
    Split,
    docstring_texts,
    environment_corpus,
    environment_files,
    held_out_split,
    python_texts,
)

DOCUMENTS_AT_ONCE = 64  # tokenised together, on all cores
SHUFFLE_BUFFER = 10_000  # documents
PIECES, PIECE_TOKENS = 32_768, 2**23  # that training text is shuffled over: so many pieces, or of so many rows' tokens
CHARACTERS = 4  # of a piece, for every token of a row
DOCUMENTS_PER_SEQUENCE = 4  # read at most, to draw held-out sequences from
KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # ending → builder of `datasets`


Document = str | Sequence[int]  # a text, or its token ids


@dataclass(frozen=True)
class DatasetSpec:
    path: str  # "python", "docstrings", a token folder, a hub dataset or a local folder or file
    column: str = "text"  # of text, or of token ids where `tokenised`
    tokenised: bool = False
    train_split: str = "train"
    val_split: str = ""  # of held-out text; empty: one document in 50 of the training split is held out
    bos: bool = True  # each packed row begins with BOS where the tokenizer adds one to a text; False: never


# --------------------------------------------------------------------------------------------------------- streams


def documents(spec: DatasetSpec, split: Split, seed: int) -> Iterator[str | list[int]]:
    """The documents of one split in a shuffled, reproducible order: texts, or token ids where `spec.tokenised`."""
    if spec.path in ("python", "docstrings"):
        paths = [f.path for f in environment_corpus(split)]
        read = python_texts if spec.path == "python" else docstring_texts
        yield from (text.removeprefix("\ufeff") for text in read(paths[i] for i in _order(len(paths), seed)))
        return
    if (Path(spec.path) / "train.npy").exists():
        yield from token_documents(spec, split, seed)
        return
    name = spec.val_split if split != "train" and spec.val_split else spec.train_split
    rows = load_rows(spec.path, name, lone=not spec.val_split).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    for i, row in enumerate(_readable(iter(rows), spec.path)):
        document = _document(spec, row, i)
        if split == _split_of(document, has_own=bool(spec.val_split), of_training=split == "train"):
            yield document


def _split_of(document: str | list[int], *, has_own: bool, of_training: bool) -> Split:
    """The split of a document by its hash; held-out text of its own, if a dataset has it, is split in tuning and test."""
    number = _document_hash(document)
    if of_training if has_own else number % HELD_OUT_SHARE:
        return "train"
    return held_out_split(number // HELD_OUT_SHARE)


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
    """The documents of a token folder: train.npy or val.npy holds uint16 ids, and its first id stands before every document.

    Raises ValueError for another kind of array, and where the specification says that the text is not tokenised.
    """
    file = Path(spec.path) / f"{'train' if split == 'train' else 'val'}.npy"
    ids = np.load(file)
    if ids.dtype != np.uint16 or ids.ndim != 1 or len(ids) == 0:
        raise ValueError(
            f"{file} holds {ids.dtype}{list(ids.shape)}: a token folder has one row of uint16 ids per split"
        )
    if not spec.tokenised:
        raise ValueError(f"{file} holds token ids: its DatasetSpec needs tokenised=True")
    starts = np.append(np.flatnonzero(ids == ids[0]), len(ids))
    for i in _order(len(starts) - 1, seed):
        document = ids[starts[i] + 1 : starts[i + 1]].tolist()
        if split == _split_of(document, has_own=True, of_training=split == "train"):
            yield document


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
    `part`: which of how many parts of the documents, or in training of their pieces; every n-th is of a part.
    """

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, split: Split, batch: int, seq: int, seed: int = 0,
        vocab_size: int | None = None, part: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        self.part = part
        self.spec, self.tokenizer, self.split = spec, tokenizer, split
        self.batch, self.seq, self.seed, self.vocab_size = batch, seq, seed, vocab_size or len(tokenizer)
        self.separator, self.bos = separator(tokenizer), added_bos(tokenizer) if spec.bos else None
        self.n_read = 0  # documents, or in training their pieces
        self.leftover: list[int] = []
        self._open()

    def _open(self) -> None:
        rest = documents(self.spec, self.split, self.seed)
        first = list(itertools.islice(rest, DOCUMENTS_AT_ONCE))
        self.packed = self.spec.tokenised and are_rows(first, self.seq)
        everything: Iterator[Document] = itertools.chain(first, rest)
        if self.split == "train":
            everything = shuffled(self._pieces(everything), min(PIECES, PIECE_TOKENS // self.seq), self.seed)
        own = itertools.islice(everything, self.part[0], None, self.part[1])
        self._documents = itertools.islice(own, self.n_read, None)

    def _pieces(self, whole: Iterator[Document]) -> Iterator[Document]:
        """The documents in pieces that fill about a row; those of token ids fill one exactly."""
        length = self.seq if self.packed else self.seq - 1 - (self.bos is not None)
        for document in whole:
            if isinstance(document, str):
                yield from text_pieces(document, CHARACTERS * self.seq)
            else:
                ids = array("i", self._content(document))
                yield from (ids[i : i + length] for i in range(0, len(ids), max(1, length)))

    def __iter__(self) -> "TokenStream":
        return self

    def __next__(self) -> Int[Tensor, "batch seq"]:
        needed = self.batch * self.seq
        while len(self.leftover) < needed:
            chunk = list(itertools.islice(self._documents, DOCUMENTS_AT_ONCE))
            if not chunk:
                if self.n_read == 0:
                    raise ValueError(f"dataset {self.spec.path!r} has no documents in its {self.split} split")
                raise StopIteration
            self.n_read += len(chunk)
            for ids in self._tokenise(chunk):
                self._append(ids)
        rows = torch.tensor(self.leftover[:needed]).view(self.batch, self.seq)
        del self.leftover[:needed]
        self.check(rows)
        return rows

    def _content(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids without the separators that some data sets bring; of packed rows, as many as fill rows of `seq`."""
        if self.packed:
            return ids[: len(ids) // self.seq * self.seq]
        return ids[ids[0] == self.separator : len(ids) - (ids[-1] == self.separator)] if ids else ids

    def _append(self, ids: Sequence[int]) -> None:
        """Add a document to the tokens left over: rows packed by somebody as they are, others behind a separator."""
        ids = list(self._content(ids)) if self.spec.tokenised else ids
        ids = ids if self.packed else [self.separator, *ids]
        if self.bos is None or self.packed:
            self.leftover += ids
            return
        while ids:
            if len(self.leftover) % self.seq == 0:
                self.leftover.append(self.bos)
            room = self.seq - len(self.leftover) % self.seq
            self.leftover += ids[:room]
            ids = ids[room:]

    def check(self, rows: Int[Tensor, "batch seq"]) -> None:
        for worst in (int(rows.min()), int(rows.max())):
            if not 0 <= worst < self.vocab_size:
                given = self.spec.tokenised and worst not in (self.separator, self.bos)
                origin = f"dataset {self.spec.path!r}" if given else "the tokenizer"
                raise ValueError(
                    f"{origin} gives token {worst}, which the model's vocabulary of {self.vocab_size} does not have: "
                    f"use the tokenizer that the model was trained with"
                )

    def _tokenise(self, chunk: list[Document]) -> list[Sequence[int]]:
        if self.spec.tokenised:
            return chunk  # type: ignore[return-value]
        return self.tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]

    def rows_by_document(self, most: int) -> list[list[list[int]]]:
        """The whole rows of each of at most `most` documents; short ones are packed together, and such a row stands by itself."""
        assert self.n_read == 0 and self.split != "train", f"{self.n_read=} {self.split=}"
        found, short, chosen = [], [], itertools.islice(self._documents, most)
        while chunk := list(itertools.islice(chosen, DOCUMENTS_AT_ONCE)):
            for ids in self._tokenise(chunk):
                if rows := self._rows([ids]):
                    found.append(rows)
                elif rows := self._rows(short := [*short, ids]):
                    found.append(rows)
                    short = []
        return found

    def _rows(self, documents: list[Sequence[int]]) -> list[list[int]]:
        """The whole rows that documents fill, packed anew."""
        self.leftover = []
        for ids in documents:
            self._append(ids)
        return [self.leftover[i : i + self.seq] for i in range(0, len(self.leftover) - self.seq + 1, self.seq)]

    def state_dict(self) -> dict[str, int | Tensor]:
        return {"read": self.n_read, "leftover": torch.tensor(self.leftover, dtype=torch.int32)}

    def load_state_dict(self, state: dict[str, int | Tensor]) -> None:
        assert isinstance(state["leftover"], Tensor) and isinstance(state["read"], int), f"{state.keys()=}"
        self.n_read, self.leftover = state["read"], state["leftover"].tolist()
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


def are_rows(documents: Sequence[Document], seq: int) -> bool:
    """Whether token ids are equally long and fill whole rows of `seq`; one token more is the last one's target."""
    lengths = {len(ids) for ids in documents}
    return len(lengths) == 1 and (length := lengths.pop()) >= seq and length % seq in (0, 1)


def text_pieces(text: str, length: int) -> Iterator[str]:
    """The text cut into pieces of at most `length` characters, at the ends of lines, else of words, where there are any."""
    start = 0
    while start < len(text):
        end = start + length
        if end < len(text):
            breaks = (text.rfind(space, start + length // 2, end) + 1 for space in "\n ")
            end = next((found for found in breaks if found), end)
        yield text[start:end]
        start = end


def shuffled[P](pieces: Iterator[P], buffer: int, seed: int) -> Iterator[P]:
    """The pieces in a random order: each is drawn from the next `buffer` that were not drawn yet."""
    generator = random.Random(seed)
    waiting = list(itertools.islice(pieces, buffer))
    for piece in pieces:
        i = generator.randrange(buffer)
        yield waiting[i]
        waiting[i] = piece
    generator.shuffle(waiting)
    yield from waiting


# --------------------------------------------------------------------------------------------------- held-out text


class HeldOutText(NamedTuple):
    """Sequences to measure on, and the document that each was cut from: what a bootstrap may take for independent."""

    tokens: Int[Tensor, "sequence seq"]
    documents: Int[Tensor, "sequence"]  # their numbers, from 0; a sequence packed of short documents has one of its own

    def to(self, device: torch.device) -> "HeldOutText":
        return HeldOutText(self.tokens.to(device), self.documents)


def held_out_text(stream: TokenStream, n_tokens: int, or_fewer: bool = False) -> HeldOutText:
    """⌈n_tokens / seq⌉ sequences drawn at random over the documents of a split that nothing was read of yet.

    Long documents are cut into sequences, of which each gives as few as must be: none a second one before every document
    gave its first. Short ones are packed, whole, into sequences of their own. The draw is the same on every call.
    Raises ValueError where the split is too small, with `or_fewer` where it holds no whole sequence, and for no tokens.
    """
    if n_tokens < 1:
        raise ValueError(f"{n_tokens} held-out tokens were asked for (--tokens, --eval-tokens): ask for 1 or more")
    n = -(-n_tokens // stream.seq)
    documents = stream.rows_by_document(DOCUMENTS_PER_SEQUENCE * n)
    if (held := sum(map(len, documents))) < (1 if or_fewer else n):
        raise ValueError(
            f"{stream.spec.path!r} ({stream.split}) holds only {held * stream.seq} tokens of the {n_tokens} asked for, in "
            f"sequences of {stream.seq}: ask for fewer"
        )
    n, generator = min(n, held), random.Random(0)
    documents = [generator.sample(rows, len(rows)) for rows in documents]
    cap = next(cap for cap in itertools.count(1) if sum(min(cap, len(rows)) for rows in documents) >= n)
    whole = [(i, row) for i, rows in enumerate(documents) for row in rows[: cap - 1]]
    more = [(i, rows[cap - 1]) for i, rows in enumerate(documents) if len(rows) >= cap]
    drawn = sorted(whole + generator.sample(more, n - len(whole)), key=lambda pair: pair[0])
    numbers = torch.tensor([i for i, _ in drawn]).unique(return_inverse=True)[1]
    tokens = torch.tensor([row for _, row in drawn])
    stream.check(tokens)
    return HeldOutText(tokens, numbers)
