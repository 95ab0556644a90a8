"""Encode, select, decode: dense work only where it decides who wins, sparse work everywhere else.

    pre   = x W_encᵀ + b_enc                                       one dense product, B·d_in·d_dict
    codes = {(t, j): relu(pre[t, j]) for (t, j) selected}          k·B entries
    ŷ[t]  = Σ_j codes[t, j] W_dec[j]                               k·B·d_out

    ∂/∂codes[t, j] = g[t] · W_dec[j]            ∂/∂W_dec[j] = Σ_t codes[t, j] g[t]
    ∂/∂W_enc[j]    = Σ_t δ[t, j] x[t]           ∂/∂x[t]     = Σ_j δ[t, j] W_enc[j],   δ = ∂/∂codes · [pre > 0]

All sums over active entries are `embedding_bag`s: bags are tokens in token order, or latents in latent order; one stable
sort per step (`Layout`) gives the second order to both weight gradients. Nothing of size B·d_dict is kept for backward.
Every function has a dense twin (`dense_*`) that says the same in plain matrix products; tests compare the two.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class Layout:
    """Where the active entries of a batch lie, by token and by latent; the second order is sorted once, when needed."""

    def __init__(self, rows: Int[Tensor, "active"], cols: Int[Tensor, "active"], n_rows: int, d_dict: int) -> None:
        self.rows, self.cols, self.n_rows, self.d_dict = rows, cols, n_rows, d_dict

    @cached_property
    def row_starts(self) -> Int[Tensor, "batch"]:
        return torch.searchsorted(self.rows, torch.arange(self.n_rows, device=self.rows.device))

    @cached_property
    def by_latent(self) -> Int[Tensor, "active"]:
        """Positions of the entries in the order of their latents."""
        return self.cols.argsort(stable=True)

    @cached_property
    def rows_by_latent(self) -> Int[Tensor, "active"]:
        return self.rows[self.by_latent]

    @cached_property
    def latent_starts(self) -> Int[Tensor, "d_dict"]:
        return torch.searchsorted(self.cols[self.by_latent], torch.arange(self.d_dict, device=self.cols.device))

    def sum_by_row(self, values: Float[Tensor, "active"], W: Float[Tensor, "d_dict d"]) -> Float[Tensor, "batch d"]:
        """out[t] = Σ_j values[t, j] W[j]."""
        return F.embedding_bag(self.cols, W, self.row_starts, mode="sum", per_sample_weights=values)

    def sum_by_latent(self, values: Float[Tensor, "active"], x: Float[Tensor, "batch d"]) -> Float[Tensor, "d_dict d"]:
        """out[j] = Σ_t values[t, j] x[t]."""
        weights = values[self.by_latent]
        return F.embedding_bag(self.rows_by_latent, x, self.latent_starts, mode="sum", per_sample_weights=weights)

    def dots(self, x: Float[Tensor, "batch d"], W: Float[Tensor, "d_dict d"]) -> Float[Tensor, "active"]:
        """x[t] · W[j] at every active (t, j), without copies of the gathered rows."""
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x.contiguous(), W, self.cols, self.row_starts, self.rows, 0
        )


class Codes(NamedTuple):
    """The active parts of a batch, in row-major order."""

    values: Float[Tensor, "active"]  # ≥ 0
    rows: Int[Tensor, "active"]  # token, non-decreasing
    cols: Int[Tensor, "active"]  # latent
    n_rows: int
    d_dict: int
    shared: Layout | None = None  # made by the encoder, so that decoder and gradients sort once

    @property
    def layout(self) -> Layout:
        return self.shared if self.shared is not None else Layout(self.rows, self.cols, self.n_rows, self.d_dict)


class _Encode(torch.autograd.Function):
    """relu(pre) at the selected entries, given those pre-activations; sparse gradients of x, W_enc and b_enc."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, selected: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(x, W_enc, selected)
        ctx.layout = layout
        return selected.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W_enc, selected = ctx.saved_tensors
        delta = grad * (selected > 0)
        d_x = ctx.layout.sum_by_row(delta, W_enc) if ctx.needs_input_grad[0] else None
        d_W = ctx.layout.sum_by_latent(delta, x) if ctx.needs_input_grad[1] else None
        d_b = delta.new_zeros(len(W_enc)).index_add_(0, ctx.layout.cols, delta) if ctx.needs_input_grad[2] else None
        return d_x, d_W, d_b, None, None


class _Decode(torch.autograd.Function):
    """Σ values · W_dec[cols]; sparse gradients of values and W_dec."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.layout = layout
        return layout.sum_by_row(values, W_dec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        d_values = ctx.layout.dots(grad, W_dec) if ctx.needs_input_grad[0] else None
        d_W = ctx.layout.sum_by_latent(values, grad) if ctx.needs_input_grad[1] else None
        return d_values, d_W, None


def encode_topk(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_dict d_in"], b_enc: Float[Tensor, "d_dict"], k: int
) -> Codes:
    """relu(pre) at the k largest pre-activations of each token; k·B entries. Ties go to the lowest latent."""
    with torch.no_grad():
        pre = torch.addmm(b_enc, x, W_enc.T)
        flat = _topk_mask(pre, k).flatten().nonzero()[:, 0]
    return _at(x, W_enc, b_enc, pre, flat)


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
    with torch.no_grad():
        pre = torch.addmm(b_enc, x, W_enc.T)
        flat = largest(pre.flatten(), k * len(x), bound - 0.05 * bound.abs())
    return _at(x, W_enc, b_enc, pre, flat)


def largest(flat: Float[Tensor, "n"], k: int, bound: Float[Tensor, ""]) -> Int[Tensor, "k"]:
    """Ascending positions of the k largest values; ties go to the lowest position.

    Values above `bound` are candidates: if there are at least k, the winners are among them. Else the bound is lowered
    to where a sample of the values says that k·3/2 should be found, and to −inf if even that was too high.
    """
    if flat.device.type == "cuda":  # static shapes, no synchronisation
        smallest = flat.topk(k).values[-1]
        candidates = torch.arange(len(flat), device=flat.device)
    else:
        candidates = (flat > bound).nonzero()[:, 0] if bound > -torch.inf else flat.new_empty(0, dtype=torch.int64)
        if len(candidates) < k:
            sample = flat[:: max(1, len(flat) // 65_536)]
            rank = min(len(sample), int(1.5 * k * len(sample) / len(flat)) + 8)
            candidates = (flat >= sample.topk(rank).values[-1]).nonzero()[:, 0]
        if len(candidates) < k:
            candidates = torch.arange(len(flat))
        smallest = flat[candidates].kthvalue(len(candidates) - k + 1).values
    values = flat[candidates]
    above, equal = values > smallest, values == smallest
    keep = above | (equal & (equal.cumsum(0) <= k - above.sum()))
    return candidates[keep.nonzero()[:, 0]] if flat.device.type == "cpu" else candidates[keep.nonzero_static(size=k)[:, 0]]


def encode_threshold(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_dict d_in"],
    b_enc: Float[Tensor, "d_dict"],
    threshold: Float[Tensor, ""] | Float[Tensor, "d_dict"],
) -> Codes:
    """Every pre-activation above max(threshold, 0): the deployed face of BatchTopK, JumpReLU and Relu."""
    with torch.no_grad():
        pre = torch.addmm(b_enc, x, W_enc.T)
        flat = (pre > threshold.clamp_min(0)).flatten().nonzero()[:, 0]
    return _at(x, W_enc, b_enc, pre, flat)


def decode(codes: Codes, W_dec: Float[Tensor, "d_dict d_out"]) -> Float[Tensor, "batch d_out"]:
    """Σ values · W_dec[cols] for each token; no bias."""
    return _Decode.apply(codes.values, W_dec, codes.layout)  # type: ignore[no-any-return]


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


def _at(x: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Float[Tensor, "batch d_dict"], flat: Int[Tensor, "active"]) -> Codes:
    """Codes at the given flat positions."""
    rows, cols = flat // pre.shape[1], flat % pre.shape[1]
    layout = Layout(rows, cols, *pre.shape)
    values = _Encode.apply(x, W_enc, b_enc, pre.flatten()[flat], layout)
    return Codes(values, rows, cols, *pre.shape, layout)


def _gather(pre: Float[Tensor, "batch d_dict"], flat: Int[Tensor, "active"]) -> Codes:
    d_dict = pre.shape[1]
    return Codes(pre.flatten()[flat].relu(), flat // d_dict, flat % d_dict, pre.shape[0], d_dict)


def _topk_mask(pre: Float[Tensor, "batch d_dict"], k: int) -> Tensor:
    """True at the k largest of each row; ties go to the lowest index."""
    smallest = pre.topk(k, dim=1).values[:, -1:]
    mask = pre >= smallest
    if pre.device.type == "cpu" and mask.sum() == k * len(pre):  # no ties
        return mask
    above, equal = pre > smallest, pre == smallest
    return above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
