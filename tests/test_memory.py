"""Theorems about memory: what a store, a training step and the ruler hold at most is what their docstrings say, in bytes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from small import D, H, each_by_itself, transcoders
from test_output_objective import set_of

import evaluation
import losses
import sparse_encode
from activation_store import ActivationBatch, ActivationsStore, DataConfig
from coder import ActivationStats
from coder_replacements import TranscoderReplacement
from config import BatchTopK, EncoderConfig, Output, Rule, TopK, TrainConfig
from evaluation import evaluate
from llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, initialise
from output_objective import Run, backward, frame_of, unembedding
from target_models import Loaded, TargetModel, make_target
from token_stream import DatasetSpec
from training import group_step, start_run
from transcoder import build_transcoder

BLOCK, VOCAB = 2**14, 4096


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NN_BF16", "off")


# ------------------------------------------------------------------------------------------------------- the helper


def test_live_bytes_are_those_of_the_tensors_that_live() -> None:
    """Views count once, until the last is gone; what was there before counts nothing; what autograd saves is alive."""
    before = torch.zeros(500)
    with LiveBytes() as live:
        x = before.view(5, 100).clone()
        view = x[3]
        before.mul_(2)
        assert live.now == live.peak == 2000
        del x
        assert live.now == 2000
        del view
        assert live.now == 0 and live.peak == 2000
        w = torch.zeros(50, requires_grad=True)
        loss = (2 * w).exp().sum()
        assert live.now == 200 + 200 + 4, "w, the exponential that its gradient needs, and the sum"
        loss.backward()
        assert live.now == 200 + 200 + 4, "w, its gradient, and the sum"
    outside = torch.zeros(1000)
    del w, loss
    assert live.now == 0 and live.peak == 2000 and len(outside) == 1000


def test_live_bytes_sees_custom_functions_and_inference() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1000).sum() + x  # 4,000 bytes for a moment

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return torch.zeros(2000).sum() + grad

    x = torch.zeros((), requires_grad=True)
    with LiveBytes() as live:
        y = Twice.apply(x)
        assert 4000 <= live.peak <= 4016
        y.backward()
        assert 8000 <= live.peak <= 8016
    with LiveBytes() as live, torch.inference_mode():
        torch.zeros(1000) + 1
    assert live.peak == 8000 and live.now == 0


# --------------------------------------------------------------------------------------------------------- the store


def test_a_store_holds_its_buffer_and_nothing_that_grows(small_target: TargetModel) -> None:
    """The buffer, 16 bytes a slot for its order, and the statistics; in a step 6 bytes for each number of a batch."""
    data = DataConfig(layers=(0, 1), batch_tokens=32, buffer_tokens=2048, model_batch=4)
    slots, numbers, refills = 2048 + 4 * 15, 2 * 2 * 32 * 16, []
    with LiveBytes() as live:
        store = ActivationsStore(small_target, data)
        buffer = 2 * 2 * slots * 16 * 2
        rest = 16 * slots + 4 * (4 * 16 + 3 * 2 + 4) + 512
        assert store.bytes == buffer and buffer <= live.now <= buffer + rest, f"{live.now - buffer=} {rest=}"
        assert live.peak <= buffer + rest + 14 * 2048 * 16, "statistics take one side of one layer at a time"
        for step in range(160):
            live.peak, before = live.now, live.now
            batch = next(store)
            del batch
            assert live.now <= buffer + rest, f"{step=}: {live.now - buffer=} {rest=}"
            if step % 32:
                assert live.now == before and live.peak == before + 6 * numbers, f"{step=} {live.peak - before=}"
            elif step:
                refills.append(live.peak)
    assert len(refills) == 4 and max(refills) <= refills[0], f"a refill costs what the first one did: {refills=}"


# -------------------------------------------------------------------------------------------------------- local steps


def peak_of_a_step(rule: Rule, d: int, batch: int, d_dict: int, folder: Path) -> tuple[int, int]:
    """The most bytes that a step holds beside the parameters and Adam's moments, and the parameters' own bytes."""
    coder = build_transcoder(
        EncoderConfig(layer=0, d_in=d, d_out=d, d_dict=d_dict, rule=rule), torch.Generator().manual_seed(0)
    )
    x, y = torch.randn(2, 1, batch, d, generator=torch.Generator().manual_seed(1))
    one, zero = torch.ones(1), torch.zeros(1, d)
    store: Any = SimpleNamespace(
        target=SimpleNamespace(site="mlp_out"),
        device=torch.device("cpu"),
        stats=ActivationStats(zero, one, zero, one, one * d, batch),
        config=DataConfig(layers=(0,), batch_tokens=batch),
    )
    config = TrainConfig(tokens=100 * batch)
    run = start_run("coder", coder, store=store, config=config, folder=folder)
    coder.set_k(rule.k)
    for _ in range(3):  # until the guess of the smallest winner is one
        group_step([run], ActivationBatch(x, y), config=config, factor=0.5)
    with LiveBytes() as live:
        group_step([run], ActivationBatch(x, y), config=config, factor=0.5)
    return live.peak, sum(parameter.nbytes for parameter in coder.parameters())


@pytest.mark.parametrize(("bf16", "per_entry"), [("off", 60), ("on", 140)])
@pytest.mark.parametrize("rule", [TopK, BatchTopK])
@pytest.mark.parametrize(
    ("d", "k", "batch", "d_dict"),
    [(16, 4, 1024, 2048), (32, 4, 1024, 2048), (16, 16, 1024, 2048), (16, 4, 2048, 1024), (16, 4, 1024, 4096)],
)
def test_a_step_holds_what_it_says_and_no_matrix_of_pre_activations(
    rule: type[TopK] | type[BatchTopK],
    d: int,
    k: int,
    batch: int,
    d_dict: int,
    bf16: str,
    per_entry: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """`training_step`'s formula bounds the peak, far below one byte for each pre-activation."""
    monkeypatch.setenv("NN_BF16", bf16)
    monkeypatch.setattr(sparse_encode, "BLOCK", BLOCK)
    peak, parameters = peak_of_a_step(rule(k), d, batch, d_dict, tmp_path)
    stated = parameters + batch * (4 * 2 * d + per_entry * k + 16) + 20 * d_dict + 5 * BLOCK
    assert peak <= stated, f"{peak=} {stated=}"
    assert stated - parameters < 4 * batch * d_dict, "else the bound would say nothing"


# ----------------------------------------------------------------------------------------------------- on the output


def wide_target() -> TargetModel:
    """A small model whose logits are larger than all else."""
    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(16, VOCAB, 2, 2, D, H, 1))
    initialise(model, torch.Generator().manual_seed(0))
    return make_target("wide", Loaded(model, None, 16, DatasetSpec("python")), "cpu")  # type: ignore[arg-type]


def tokens_of(sequences: int) -> torch.Tensor:
    return torch.randint(VOCAB, (sequences, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("sequences", [16, 64])
def test_training_on_the_output_holds_log_p_and_logits_of_few_tokens(
    sequences: int, follows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is as wide as the vocabulary log p of all tokens, and 6 times the logits of `_rows_at_once` tokens."""
    monkeypatch.setattr(losses, "_rows_at_once", lambda vocab, device: 64)
    target, tokens, part = wide_target(), 16 * sequences, 4 * 64 * VOCAB
    narrow = 4 * tokens * 2000  # activations, codes and their gradients: none is as wide as the vocabulary
    with LiveBytes() as live:
        frame = frame_of(target, unembedding(target), tokens_of(sequences), (0, 1))
    assert frame.log_p.nbytes == 4 * tokens * VOCAB <= live.now <= live.peak <= 4 * tokens * VOCAB + 2 * part + narrow
    replacement = TranscoderReplacement(transcoders((0, 1)))
    for coder in replacement.members:
        coder.train()
    coders, config = set_of(replacement, frame), TrainConfig(objective=Output("free"), tokens=100)
    with LiveBytes() as live:
        backward(coders, frame, [Run((0, 1), follows)], config=config)
    assert live.peak <= 6 * part + narrow, f"{live.peak / part=}"
    assert sequences == 16 or 6 * part + narrow < 4 * tokens * VOCAB, "less than the logits would take once"


# ---------------------------------------------------------------------------------------------------------- the ruler


def test_the_ruler_holds_four_batches_of_logits_however_much_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the text and eight times the replacements: four tensors of one batch's logits, as before, and a part."""
    monkeypatch.setattr(evaluation, "give_back_memory", lambda: None)  # what is measured must not rest on collections
    target, logits, peaks = wide_target(), 4 * 8 * 16 * VOCAB, []
    for replacements, sequences in ((1, 8), (8, 8), (1, 64), (8, 64)):
        methods = [TranscoderReplacement(transcoders((0, 1))) for _ in range(replacements)]
        with LiveBytes() as live:
            evaluate(target, methods, each_by_itself(tokens_of(sequences)), batch=8)
        peaks.append(live.peak / logits)
    assert 4 <= min(peaks) <= max(peaks) < 4.6, f"{peaks=}"
