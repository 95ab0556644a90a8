"""Encode, select, decode: dense work only where it decides who wins, sparse work everywhere else.

    pre   = x W_encᵀ + b_enc                                       one dense product, B·d_in·d_dict
    codes = {(t, j): relu(pre[t, j]) for (t, j) selected}          k·B entries
    ŷ[t]  = Σ_j codes[t, j] W_dec[j]                               k·B·d_out

    ∂/∂codes[t, j] = g[t] · W_dec[j]            ∂/∂W_dec[j] = Σ_t codes[t, j] g[t]
    ∂/∂W_enc[j]    = Σ_t δ[t, j] x[t]           ∂/∂x[t]     = Σ_j δ[t, j] W_enc[j],   δ = ∂/∂codes · [pre > 0]

Every function has a dense twin (`dense_*`) that says the same in plain matrix products; tests compare the two.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Codes(NamedTuple):
    """The active parts of a batch, in row-major order."""

    values: Float[Tensor, "active"]  # ≥ 0
    rows: Int[Tensor, "active"]  # token, non-decreasing
    cols: Int[Tensor, "active"]  # latent
    n_rows: int
    d_dict: int


def encode_topk(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_dict d_in"], b_enc: Float[Tensor, "d_dict"], k: int
) -> Codes:
    """relu(pre) at the k largest pre-activations of each token; k·B entries. Ties go to the lowest latent."""
    pre = torch.addmm(b_enc, x, W_enc.T)
    return _gather(pre, _topk_mask(pre.detach(), k).flatten().nonzero()[:, 0])


def encode_batch_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_dict d_in"],
    b_enc: Float[Tensor, "d_dict"],
    k: int,
    bound: Float[Tensor, ""],
) -> Codes:
    """relu(pre) at the k·B largest pre-activations of the batch; ties go to the lowest (token, latent).

    `bound` is a guess of the smallest winner (a running threshold, −inf if unknown). It decides how fast the winners
    are found, never who they are.
    """
    pre = torch.addmm(b_enc, x, W_enc.T)
    flat = _topk_mask(pre.detach().reshape(1, -1), k * len(x))
    return _gather(pre, flat[0].nonzero()[:, 0])


def encode_threshold(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_dict d_in"],
    b_enc: Float[Tensor, "d_dict"],
    threshold: Float[Tensor, ""] | Float[Tensor, "d_dict"],
) -> Codes:
    """Every pre-activation above max(threshold, 0): the deployed face of BatchTopK, JumpReLU and Relu."""
    pre = torch.addmm(b_enc, x, W_enc.T)
    return _gather(pre, (pre.detach() > threshold.clamp_min(0)).flatten().nonzero()[:, 0])


def decode(codes: Codes, W_dec: Float[Tensor, "d_dict d_out"]) -> Float[Tensor, "batch d_out"]:
    """Σ values · W_dec[cols] for each token; no bias."""
    return to_dense(codes) @ W_dec


def to_dense(codes: Codes) -> Float[Tensor, "batch d_dict"]:
    flat = codes.values.new_zeros(codes.n_rows * codes.d_dict)
    return flat.index_put((codes.rows * codes.d_dict + codes.cols,), codes.values).view(codes.n_rows, codes.d_dict)


def from_dense(acts: Float[Tensor, "batch d_dict"]) -> Codes:
    """The positive entries of a dense matrix of activations; differentiable."""
    return _gather(acts, (acts.detach() > 0).flatten().nonzero()[:, 0])


def fire_counts(codes: Codes) -> Int[Tensor, "d_dict"]:
    """Number of tokens on which each latent is active."""
    fired = (codes.values.detach() > 0).to(torch.int64)
    return torch.zeros(codes.d_dict, dtype=torch.int64, device=codes.cols.device).index_add_(0, codes.cols, fired)


def _gather(pre: Float[Tensor, "batch d_dict"], flat: Int[Tensor, "active"]) -> Codes:
    d_dict = pre.shape[1]
    return Codes(pre.flatten()[flat].relu(), flat // d_dict, flat % d_dict, pre.shape[0], d_dict)


def _topk_mask(pre: Float[Tensor, "batch d_dict"], k: int) -> Tensor:
    """True at the k largest of each row; ties go to the lowest index."""
    smallest = pre.topk(k, dim=1).values[:, -1:]
    above, equal = pre > smallest, pre == smallest
    return above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
