"""Theorems about cross-layer transcoders whose later decoders are a shared one and something of low rank."""

from pathlib import Path

import pytest
import torch
from small import each_by_itself, make_tiny, randomise, some_tokens

from checkpoints import TrainingRecord, load_checkpoint, save_checkpoint
from clt import CrossLayerTranscoder
from coder_replacements import CLTReplacement
from config import CLTConfig, JumpReLU, Rule, TopK, from_json, full_kind, to_json
from evaluation import evaluate
from folding import fold
from parallel import LatentRanks
from recipes import new_coder
from sparse_ops import to_dense

N, D, F, R = 3, 16, 24, 2
TOPK = TopK(4)


def config(rank: int | None, rule: Rule = TOPK) -> CLTConfig:
    return CLTConfig(layers=(0, 1, 2), d_in=D, d_out=D, d_dict=F, rule=rule, rank=rank)


def clt(rank: int | None = R, rule: Rule = TOPK) -> CrossLayerTranscoder:
    return CrossLayerTranscoder(config(rank, rule), torch.Generator().manual_seed(0))


def x() -> torch.Tensor:
    return torch.randn(N, 10, D, generator=torch.Generator().manual_seed(1))


def test_a_latent_writes_what_is_shared_and_something_of_low_rank_to_later_layers() -> None:
    coder = randomise(clt())
    for i, W_dec in enumerate(coder.decoders):
        targets = W_dec.view(F, N - i, D)
        later = targets[:, 1:] - targets[:, :1]
        assert all(torch.linalg.matrix_rank(later[:, j].double(), rtol=1e-5) == R for j in range(N - 1 - i))
    dense = [to_dense(codes) for codes in coder.encode(x())]
    for j in range(N):
        written = sum(dense[i] @ coder.decoders[i].view(F, N - i, D)[:, j - i] for i in range(j + 1))
        expected = (written + coder.b_dec[j]) / coder.y_scale[j]
        torch.testing.assert_close(coder(x()).y_hat[j], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(coder.decode_layer(j, coder.encode(x())[: j + 1]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", [TOPK, JumpReLU(l0=0.01)])
def test_gradients_are_those_of_the_full_decoders(rule: Rule) -> None:
    """By the chain rule through S + A B."""
    coder = randomise(clt(rule=rule))
    codes, penalty = coder.encode_with_penalty(x(), x(), torch.ones(N))
    (coder.reconstruct(codes, x()).square().sum() + penalty).backward()
    full = randomise(clt(None, rule))
    full.load_state_dict(coder.state_dict() | {f"W_dec.{i}": W for i, W in enumerate(coder.decoders)}, strict=False)
    codes, penalty = full.encode_with_penalty(x(), x(), torch.ones(N))
    (full.reconstruct(codes, x()).square().sum() + penalty).backward()
    for i in range(N):
        of_targets, own = full.W_dec[i].grad.view(F, N - i, D), coder.W_dec[i].grad
        torch.testing.assert_close(own[:, :D], of_targets.sum(1), rtol=1e-3, atol=1e-3)
        for j in range(N - 1 - i):
            A = coder.W_dec[i][:, D + j * R : D + (j + 1) * R]
            of_A, of_B = of_targets[:, j + 1] @ coder.B_dec[i][j].T, A.T @ of_targets[:, j + 1]
            torch.testing.assert_close(own[:, D + j * R : D + (j + 1) * R], of_A, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(coder.B_dec[i].grad[j], of_B, rtol=1e-3, atol=1e-3)


def test_at_the_start_a_latent_writes_the_same_everywhere_and_b_can_learn() -> None:
    coder = clt()
    with torch.no_grad():
        for W_dec in coder.W_dec:
            W_dec[:, :D].normal_(generator=torch.Generator().manual_seed(2))
    assert all(torch.equal(W.view(F, -1, D), W[:, None, :D].expand(F, W.shape[1] // D, D)) for W in coder.decoders)
    coder(x()).y_hat.square().sum().backward()
    assert all(B.grad.abs().sum() > 0 for B in coder.B_dec)
    parameters = sum(p.numel() for name, p in coder.named_parameters() if "_dec." in name)
    assert parameters == N * F * D + N * (N - 1) // 2 * R * (F + D)


def test_it_is_saved_measured_and_folded_as_any_other(tmp_path: Path) -> None:
    coder, target = randomise(clt()), make_tiny()
    record = TrainingRecord(
        name="name", target="random", target_fingerprint=target.fingerprint, train_tokens=1, train_seconds=1.0, seed=0,
        commit=None,
    )  # fmt: skip
    save_checkpoint(tmp_path / "clt", coder, record)
    loaded = load_checkpoint(str(tmp_path / "clt"), "cpu").coder
    assert full_kind(loaded.config) == "clt-rank2" and from_json(to_json(coder.config)) == coder.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.decoders, coder.decoders, strict=True))
    measured = evaluate(target, [CLTReplacement(loaded)], each_by_itself(some_tokens(8)), ["free"])
    assert len(measured.points) == 1
    torch.testing.assert_close(fold(coder)[0].W_dec, coder.decoders[0] / coder.y_scale.repeat_interleave(D))


def test_numbers_of_full_ones_stay_and_latents_of_low_rank_are_not_spread() -> None:
    """The start of a coder depends on what its configuration says of itself."""
    assert "rank" not in repr(config(None)) and repr(config(None)) == repr(config(3))
    assert torch.equal(new_coder(config(None), 0).encoders[0].W_enc, new_coder(config(3), 0).encoders[0].W_enc)
    with pytest.raises(ValueError, match="^latents of decoders of low rank are not spread: use data$"):
        clt().join(LatentRanks(F))
    with pytest.raises(ValueError, match="^a decoder of rank 0: ask for 1 or more$"):
        config(0)
