"""Any dataset → packed token batches, Int["batch seq"].

Documents are tokenised as they are read, joined by the tokenizer's end-of-text token and cut into rows of `seq`
tokens: no padding, nothing truncated. A stream's position is (documents read, tokens left over), so that a resumed
stream yields exactly what the interrupted one would have.

Four kinds of source (`DatasetSpec.path`):
  "python"        the .py files of the standard library and site-packages of the running environment
  "docstrings"    the docstrings in those files: English prose about code
  a token folder  train.npy and val.npy, each one stream as it was packed; read without the package `datasets`
  anything else   a dataset for `datasets.load_dataset`: a hub name, or a local folder or file (txt, jsonl, parquet)

The first two are read and split by `python_corpus.py`.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class DatasetSpec:
    path: str  # "python", "docstrings", a token folder, a hub dataset or a local folder or file
    column: str = "text"  # of text, or of token ids where `tokenised`
    tokenised: bool = False
    train_split: str = "train"
    val_split: str = ""  # empty: one document in 50 of the training split is held out


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
