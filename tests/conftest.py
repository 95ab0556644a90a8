"""A small random target with a local corpus: everything a test needs, offline and in milliseconds."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from shapes import check_shapes
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

os.environ.setdefault("WANDB_MODE", "disabled")
check_shapes([file.stem for file in Path(__file__).parents[1].glob("*.py") if file.stem != "sparse_triton"])

from llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, initialise  # noqa: E402
from target_models import Parts, TargetModel, make_target  # noqa: E402
from token_stream import DatasetSpec  # noqa: E402

torch.set_num_threads(1)
WORDS = [f"w{i}" for i in range(60)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def write_corpus(folder: Path, documents: int = 400, seed: int = 0) -> Path:
    """A folder with train.jsonl and val.jsonl of random words."""
    generator = random.Random(seed)
    for split, n in (("train", documents), ("val", documents // 4)):
        texts = [" ".join(generator.choices(WORDS, k=generator.randint(5, 60))) for _ in range(n)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_small_target(folder: Path, layers: int = 2, seed: int = 0, d_mlp: int = 32) -> TargetModel:
    config = LlamaSimpleMLPConfig(16, len(WORDS) + 2, layers, 2, 16, d_mlp, 1)
    model = LlamaSimpleMLP(config)
    initialise(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for block in model.h:
            block.mlp.c_fc.weight.mul_(20)
            block.mlp.down_proj.weight.mul_(20)
    spec = DatasetSpec(str(folder), val_split="val")
    return make_target("small", Parts(model, word_tokenizer(), config.block_size, spec), "cpu")


@pytest.fixture
def small_target(tmp_path: Path) -> TargetModel:
    folder = tmp_path / "corpus"
    folder.mkdir()
    return make_small_target(write_corpus(folder))
