"""The text that `tiny` is trained on, as tokens: a byte-pair encoding learnt from it, and all of a split in one row."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from logs import atomic_path
from python_corpus import Split
from token_stream import DatasetSpec, documents

CORPUS = DatasetSpec("python")


def train_tokenizer(file: Path, *, vocab: int, files: int) -> None:
    """A byte-pair encoding learnt from the first `files` training documents, written to `file`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(itertools.islice(documents(CORPUS, "train", 0), files), trainer)
    with atomic_path(file) as temporary:
        tokenizer.save(str(temporary))


def tokenise(file: Path, splits: Sequence[Split]) -> tuple[Int[Tensor, "token"], int]:
    """All tokens of some splits, an end-of-text token before each document, and the documents' bytes."""
    tokenizer, parts, n_bytes = Tokenizer.from_file(str(file)), [], 0
    texts_of_all = itertools.chain.from_iterable(documents(CORPUS, split, 0) for split in splits)
    for texts in itertools.batched(texts_of_all, 512):
        n_bytes += sum(len(text.encode()) for text in texts)
        parts += [np.array([0, *encoded.ids], dtype=np.uint16) for encoded in tokenizer.encode_batch(list(texts))]
    return torch.from_numpy(np.concatenate(parts).astype(np.int32)), n_bytes
