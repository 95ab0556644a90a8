"""Theorems about token streams and the embedded corpus."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from small import word_tokenizer, write_corpus

from python_corpus import SourceFile, drop_near_duplicates
from token_stream import DatasetSpec, TokenStream, documents, take_tokens


def test_packing_loses_and_pads_nothing(tmp_path: Path) -> None:
    spec, tokenizer = DatasetSpec(str(write_corpus(tmp_path, 40)), val_split="val"), word_tokenizer()
    stream = TokenStream(spec, tokenizer, "train", batch=2, seq=10)
    packed = torch.cat([rows.flatten() for rows in stream]).tolist() + stream.leftover
    words = [line.split('"')[3].split() for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    documents = [
        list(group) for end, group in itertools.groupby(packed, lambda t: t == tokenizer.eos_token_id) if not end
    ]
    assert sorted(map(tuple, documents)) == sorted(tuple(tokenizer.convert_tokens_to_ids(w)) for w in words)


def test_a_stream_resumes_exactly_and_ends_visibly(tmp_path: Path) -> None:
    spec = DatasetSpec(str(write_corpus(tmp_path, 200)), val_split="val")
    stream, other = (TokenStream(spec, word_tokenizer(), "train", batch=4, seq=16, seed=3) for _ in range(2))
    for _ in range(5):
        next(stream)
    other.load_state_dict(stream.state_dict())
    rest, again = list(stream), list(other)
    assert len(rest) == len(again) > 0 and all(torch.equal(a, b) for a, b in zip(rest, again))
    with pytest.raises(ValueError, match="holds only"):
        take_tokens(TokenStream(spec, word_tokenizer(), "val", batch=4, seq=16), 10**6)
    with pytest.raises(ValueError, match="holds only 0 tokens of the 10 asked for, in batches of 1000 sequences"):
        take_tokens(TokenStream(spec, word_tokenizer(), "val", batch=1000, seq=16), 10)


def test_pretokenised_columns_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"input_ids": [5, 6, 7]}\n' * 40)
    first = next(
        TokenStream(DatasetSpec(str(tmp_path), "input_ids", True, val_split="train"), word_tokenizer(), "train", 1, 8)
    )
    assert first.tolist() == [[0, 5, 6, 7, 0, 5, 6, 7]]


def write_tokens(folder: Path, split: str, ids: list[int]) -> DatasetSpec:
    np.save(folder / f"{split}.npy", np.array(ids, dtype=np.uint16))
    return DatasetSpec(str(folder), tokenised=True)


def test_a_token_folder_gives_the_stream_it_was_written_from(tmp_path: Path) -> None:
    text = TokenStream(DatasetSpec(str(write_corpus(tmp_path, 200)), val_split="val"), word_tokenizer(), "train", 4, 16)
    rows = list(text)
    spec = write_tokens(tmp_path, "train", torch.cat(rows).flatten().tolist() + text.leftover)
    again = TokenStream(spec, word_tokenizer(), "train", 4, 16)
    assert torch.equal(torch.cat(list(again)), torch.cat(rows)) and again.leftover == text.leftover


def test_the_documents_of_a_token_folder_are_shuffled_whole(tmp_path: Path) -> None:
    spec = write_tokens(tmp_path, "train", [0, 5, 6, 0, 0, 7, 0, *range(8, 40)])
    kept, mixed = (list(documents(spec, "train", seed)) for seed in (0, 1))
    assert kept == [[5, 6], [], [7], list(range(8, 40))]
    assert mixed != kept and sorted(mixed) == sorted(kept)


def test_a_folder_of_other_arrays_is_refused(tmp_path: Path) -> None:
    spec = write_tokens(tmp_path, "train", [0, 5])
    with pytest.raises(ValueError, match="needs tokenised=True"):
        next(documents(DatasetSpec(str(tmp_path)), "train", 0))
    np.save(tmp_path / "train.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"holds float64\[2, 3\]"):
        next(documents(spec, "train", 0))


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no file of split 'train'"):
        next(TokenStream(DatasetSpec(str(tmp_path), val_split="val"), word_tokenizer(), "train", 1, 8))
    (tmp_path / "train.txt").write_text("\n")
    (tmp_path / "val.txt").write_text("\n")
    spec = DatasetSpec(str(tmp_path), tokenised=False)
    with pytest.raises(ValueError, match="has no documents in its val split"):
        next(TokenStream(spec, word_tokenizer(), "val", 1, 8))


def test_near_duplicates_go_and_the_held_out_copy_stays(tmp_path: Path) -> None:
    text = "\n".join(f"a line number {i} that is long enough" for i in range(20))
    other = "\n".join(f"another line {i} that is long enough too" for i in range(20))
    files = []
    for order, body in ((51, text), (50, text + "\nand one line more that is new"), (52, other), (53, other)):
        path = tmp_path / f"{order}.py"
        path.write_text(body)
        files.append(SourceFile(order, path.name, str(path)))
    kept = [f.order for f in drop_near_duplicates(files)]
    assert kept == [50, 52], "50 is held out (50 % 50 == 0); 51 is its near-copy, 53 a copy of 52"
