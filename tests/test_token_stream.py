"""Theorems about token streams and the embedded corpus."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import word_tokenizer, write_corpus
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from python_corpus import SourceFile, drop_near_duplicates
from token_stream import DatasetSpec, TokenStream, documents, held_out_text, shuffled, text_fingerprint, text_pieces


def test_packing_loses_and_pads_nothing(tmp_path: Path) -> None:
    spec, tokenizer = DatasetSpec(str(write_corpus(tmp_path, 40)), val_split="val"), word_tokenizer()
    stream = TokenStream(spec, tokenizer, "train", batch=2, seq=64)  # rows that the longest document fits into
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


@pytest.mark.parametrize("length", [1, 7, 64, 10_000])
def test_pieces_are_the_text_cut_at_ends_of_lines_and_words(length: int) -> None:
    text = "\n".join("word " * (i % 9) + "x" * (i % 30) for i in range(200))
    pieces = list(text_pieces(text, length))
    assert "".join(pieces) == text and all(0 < len(piece) <= length for piece in pieces)
    if length == 64:
        assert all(piece[-1] in " \n" for piece in pieces[:-1]) and sum(piece[-1] == "\n" for piece in pieces) > 40


def test_shuffling_loses_nothing_and_mixes_what_the_buffer_holds() -> None:
    mixed = list(shuffled(iter(range(1000)), 100, seed=1))
    assert sorted(mixed) == list(range(1000)) and mixed != list(shuffled(iter(range(1000)), 100, seed=2))
    assert all(value < place + 100 for place, value in enumerate(mixed)), "drawn before it was read"
    assert sorted(shuffled(iter(range(7)), 100, seed=1)) == list(range(7))


def test_training_rows_come_from_all_documents_and_not_from_the_first(tmp_path: Path) -> None:
    """Twenty documents of one word each, 1,000 times: the first 60 rows of 16 hold almost all of the words."""
    lines = [json.dumps({"text": f"w{i} " * 1000}) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    stream = TokenStream(DatasetSpec(str(tmp_path), val_split="train"), word_tokenizer(), "train", 60, 16)
    assert len(set(next(stream).flatten().tolist())) > 17


def long_and_short(folder: Path) -> TokenStream:
    """Documents 2 to 21 hold one word each, 70 times; a hundred others hold three words. All are for testing."""
    texts = [f"w{i} " * 70 for i in range(20)] + [f"w{20 + i % 40} w{20 + i // 40} w59" for i in range(100)]
    (folder / "train.jsonl").write_text("")
    (folder / "val.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return TokenStream(DatasetSpec(str(folder), val_split="val"), word_tokenizer(), "test", 1, 16)


@pytest.mark.parametrize("n", [10, 45])
def test_held_out_sequences_are_spread_over_the_documents(tmp_path: Path, n: int) -> None:
    stream = long_and_short(tmp_path)
    tokens, numbers = held_out_text(stream, n * 16)
    assert tokens.shape == (n, 16)
    words = [set(row.tolist()) - {0} for row in tokens]
    of_long = {min(own): number for own, number in zip(words, numbers.tolist()) if max(own) < 22}
    counts = numbers.bincount()
    assert (numbers.diff() >= 0).all() and len(counts) == counts.count_nonzero()
    for own, number in zip(words, numbers.tolist()):
        if max(own) < 22:
            assert len(own) == 1 and of_long[min(own)] == number, f"a sequence of two documents: {own}"
        else:
            assert min(own) >= 22 and counts[number] == 1, f"a packed sequence shares a document: {own}"
    assert counts.max() == (1 if n == 10 else 2), f"{counts=}"
    everything = long_and_short(tmp_path).rows_by_document(1000)
    assert n == 10 or len(counts) == len(everything), f"a document gave two before all gave one: {counts=}"
    again = held_out_text(long_and_short(tmp_path), n * 16)
    assert torch.equal(again.tokens, tokens) and torch.equal(again.documents, numbers)


def test_tuning_and_test_text_share_no_document(tmp_path: Path) -> None:
    spec = DatasetSpec(str(write_corpus(tmp_path, 400)), val_split="val")
    tuning, test = (list(documents(spec, split, 0)) for split in ("tuning", "test"))  # type: ignore[arg-type]
    lines = (json.loads(line)["text"] for line in (tmp_path / "val.jsonl").read_text().splitlines())
    assert sorted(tuning + test) == sorted(lines) and 10 < len(tuning) < 40


def test_more_held_out_text_than_there_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds only \d+ tokens of the 1000000 asked for, in sequences of 16: ask for"
    ):
        held_out_text(long_and_short(tmp_path), 10**6)


def test_pretokenised_columns_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"input_ids": [5, 6, 7]}\n' * 40)
    first = next(
        TokenStream(DatasetSpec(str(tmp_path), "input_ids", True, val_split="train"), word_tokenizer(), "train", 1, 8)
    )
    assert first.tolist() == [[0, 5, 6, 7, 0, 5, 6, 7]]


def write_tokens(folder: Path, split: str, ids: list[int]) -> DatasetSpec:
    np.save(folder / f"{split}.npy", np.array(ids, dtype=np.uint16))
    return DatasetSpec(str(folder), tokenised=True)


def test_a_token_folder_gives_the_documents_it_was_written_from(tmp_path: Path) -> None:
    spec = DatasetSpec(str(write_corpus(tmp_path, 200)), val_split="val")
    stream = TokenStream(spec, word_tokenizer(), "train", 1, 64)
    written = torch.cat([rows.flatten() for rows in stream]).tolist() + stream.leftover
    expected = [word_tokenizer()(text)["input_ids"] for text in documents(spec, "train", 0)]
    tokens = write_tokens(tmp_path, "train", written)
    assert sorted(documents(tokens, "train", 0)) == sorted(expected)
    write_tokens(tmp_path, "val", written)
    tuning, test = (list(documents(tokens, split, 0)) for split in ("tuning", "test"))  # type: ignore[arg-type]
    assert sorted(tuning + test) == sorted(expected) and 20 < len(tuning) < 80


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


def tokenizer_with_bos() -> PreTrainedTokenizerFast:
    """<bos> before every text, as Llama's and Gemma's tokenizers put it."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "w0"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("w0 $A", special_tokens=[("w0", 2)])
    return tokenizer


def test_every_row_begins_with_bos_where_the_tokenizer_adds_one_and_nothing_else_moves(tmp_path: Path) -> None:
    spec = DatasetSpec(str(write_corpus(tmp_path, 200)), val_split="val")
    with_bos = TokenStream(spec, tokenizer_with_bos(), "test", 4, 17)
    rows = torch.cat(list(with_bos))
    assert (rows[:, 0] == 2).all()
    plain = torch.cat(list(TokenStream(spec, word_tokenizer(), "test", 1, 16)))
    assert torch.equal(rows[:, 1:], plain[: len(rows)])
    without = next(TokenStream(DatasetSpec(spec.path, val_split="val", bos=False), tokenizer_with_bos(), "test", 4, 16))
    assert torch.equal(without, plain[:4])
    again, other = (TokenStream(spec, tokenizer_with_bos(), "test", 4, 17) for _ in range(2))
    next(again)
    other.load_state_dict(again.state_dict())
    assert torch.equal(next(other), rows[4:8])


@pytest.mark.parametrize(("length", "per_document"), [(8, 1), (9, 1), (16, 2), (17, 2)])
@pytest.mark.parametrize("tokenizer", [word_tokenizer, tokenizer_with_bos])
def test_rows_that_somebody_packed_stay_as_they_are(tmp_path: Path, length: int, per_document: int, tokenizer) -> None:
    """Of the context's length, of several, or with the last position's target at their end."""
    ids = torch.randint(2, 62, (100, length), generator=torch.Generator().manual_seed(0))
    lines = [json.dumps({"input_ids": row}) for row in ids.tolist()]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    stream = TokenStream(DatasetSpec(str(tmp_path), "input_ids", True, val_split="train"), tokenizer(), "train", 2, 8)
    expected = ids[:, : 8 * per_document].reshape(-1, 8).tolist()
    assert sorted(torch.cat(list(stream)).tolist()) == sorted(expected)


def test_documents_that_bring_their_separators_get_no_second_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"input_ids": [0, 5, 6, 7, 0]}\n{"input_ids": [0]}\n{"input_ids": []}\n' * 2)
    stream = TokenStream(
        DatasetSpec(str(tmp_path), "input_ids", True, val_split="train"), word_tokenizer(), "train", 1, 8
    )
    assert sorted(next(stream).flatten().tolist()) == [0, 0, 5, 5, 6, 6, 7, 7], "and an empty one gives nothing"


def test_a_split_is_a_word_of_a_files_name_and_hidden_files_are_no_text(tmp_path: Path) -> None:
    files = {
        "val": ("val.jsonl", "pile-val-0.jsonl", "more/Val_1.jsonl"),
        "train": ("train.jsonl", "train-00000-of-00002.jsonl"),
        "": ("retrieval.jsonl", "constrained.jsonl", ".val.jsonl", ".cache/huggingface/val.jsonl", "val.jsonl.lock"),
    }
    for word, names in enumerate(files.values()):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(json.dumps({"text": f"w{word}"}) + "\n")
    spec = DatasetSpec(str(tmp_path), val_split="val")
    held_out = [*documents(spec, "tuning", 0), *documents(spec, "test", 0)]
    assert held_out == ["w0"] * 3 and list(documents(spec, "train", 0)) == ["w1"] * 2
    hidden = text_fingerprint(spec)
    (tmp_path / ".cache" / "huggingface" / "val.jsonl").write_text("changed")
    assert text_fingerprint(spec) == hidden
    (tmp_path / "val.jsonl").write_text(json.dumps({"text": "w0 w0"}) + "\n")
    assert text_fingerprint(spec) != hidden


def test_a_file_of_no_split_is_all_there_is_only_where_no_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"w{i % 60} w{i // 60}" for i in range(400)))
    for path in (tmp_path, tmp_path / "text.txt"):
        train, tuning, test = (
            list(documents(DatasetSpec(str(path)), split, 0)) for split in ("train", "tuning", "test")
        )  # type: ignore[arg-type]
        assert train and test and len({*train, *tuning, *test}) == len(train) + len(tuning) + len(test) == 400
        with pytest.raises(ValueError, match="holds no file of split 'val'"):
            next(documents(DatasetSpec(str(path), val_split="val"), "test", 0))


WRONG_TEXTS = {
    "null": ('{"text": "w1"}\n{"text": null}', {}, "row 1: column 'text' holds null, not a text"),
    "number": ('{"text": 5}', {}, "row 0: column 'text' holds int, not a text"),
    "missing in one row": ('{"text": "w1"}\n{"other": "w1"}', {}, "row 1: column 'text' holds null"),
    "column": ('{"content": "w1"}', {}, "has no column 'text': its DatasetSpec must name one of 'content'"),
    "text as ids": (
        '{"text": "w1"}',
        {"tokenised": True},
        "holds str, not a list of token ids, as tokenised=True says",
    ),
    "ids as text": ('{"text": [5, 6]}', {}, "holds a list of int, not a text, as tokenised=False says"),
    "nested": ('{"text": [[5, 6], [7, 8]]}', {"tokenised": True}, "holds a list of list, not a list of token ids"),
    "floats": ('{"text": [1.5]}', {"tokenised": True}, "holds a list of float"),
    "truths": ('{"text": [true]}', {"tokenised": True}, "holds a list of bool"),
    "id beyond": (
        '{"text": [700, 1, 2]}',
        {"tokenised": True},
        "gives token 700, which the model's vocabulary of 62 does",
    ),
    "id below": (
        '{"text": [-7, 1, 2]}',
        {"tokenised": True},
        "gives token -7, which the model's vocabulary of 62 does",
    ),
    "truncated": ('{"text": "w1"}\n{"text": "w', {}, "cannot be read .*: is a file of it empty or damaged"),
    "empty": ("", {}, "cannot be read .*: is a file of it empty or damaged"),
}


@pytest.mark.parametrize("name", WRONG_TEXTS)
def test_a_wrong_text_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    content, spec, message = WRONG_TEXTS[name]
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"^dataset '{tmp_path}'[^\n]*{message}[^\n]*$"):
        next(TokenStream(DatasetSpec(str(tmp_path), val_split="train", **spec), word_tokenizer(), "train", 1, 2))


def test_damaged_files_of_other_kinds_are_refused_in_one_line(tmp_path: Path) -> None:
    for name, content in (("train.parquet", b""), ("train.parquet", b"PAR1"), ("train.txt", b"\xe9")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"^dataset [^\n]* cannot be read [^\n]*$"):
            next(documents(DatasetSpec(str(tmp_path), val_split="train"), "train", 0))
        (tmp_path / name).unlink()
    for name in ("train.txt", "train.jsonl"):
        (tmp_path / name).write_text('{"text": "w1"}\n')
    with pytest.raises(ValueError, match=r"holds files of split 'train' of several kinds \(json, text\): leave one"):
        next(documents(DatasetSpec(str(tmp_path), val_split="train"), "train", 0))


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbfw1\nw2\n")
    assert list(documents(DatasetSpec(str(tmp_path), val_split="train"), "train", 0)) == ["w1", "w2"]


def test_a_tokenizers_own_tokens_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "w1 w2"}\n')
    spec, tokenizer = DatasetSpec(str(tmp_path), val_split="train"), word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="^the tokenizer has no end-of-text token[^\n]*: set its eos_token$"):
        next(TokenStream(spec, tokenizer, "train", 1, 2))
    tokenizer.sep_token = "w9"
    assert next(TokenStream(spec, tokenizer, "train", 1, 3)).tolist() == [[11, 3, 4]]
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    with pytest.raises(ValueError, match="^the tokenizer gives token 62, which the model's vocabulary of 62 does not"):
        next(TokenStream(spec, tokenizer, "train", 1, 2, vocab_size=62))


def test_a_number_of_tokens_below_one_is_refused(tmp_path: Path) -> None:
    stream = TokenStream(DatasetSpec(str(write_corpus(tmp_path, 40)), val_split="val"), word_tokenizer(), "test", 4, 16)
    for n in (0, -5):
        with pytest.raises(ValueError, match=rf"^{n} held-out tokens were asked for \(--tokens, --eval-tokens\)"):
            held_out_text(stream, n)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no file of split 'train'"):
        next(TokenStream(DatasetSpec(str(tmp_path), val_split="val"), word_tokenizer(), "train", 1, 8))
    (tmp_path / "train.txt").write_text("\n")
    (tmp_path / "val.txt").write_text("\n")
    spec = DatasetSpec(str(tmp_path), tokenised=False)
    with pytest.raises(ValueError, match="has no documents in its test split"):
        next(TokenStream(spec, word_tokenizer(), "test", 1, 8))


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
