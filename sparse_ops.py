"""Active entries of a batch, and every sum over them: dense in nothing, sparse in decoder and weight gradients.

    ŷ[t] = Σ_j codes[t, j] W_dec[j]                                k·B·d_out

    ∂/∂codes[t, j] = g[t] · W_dec[j]            ∂/∂W_dec[j] = Σ_t codes[t, j] g[t]

All sums over active entries are `embedding_bag`s (on CUDA, the Triton kernels of `sparse_triton.py`): bags are tokens in
token order, or latents in latent order; one stable sort per step (`Layout`) serves decoder and both weight gradients. That
sort, and dots, are C where it can be compiled (`sparse_c.py`).
Which entries are active is decided in `sparse_encode.py`. `dense_decode` is the plain matrix product that tests compare with.
"""

import warnings
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_c import c_by_latent, c_located, c_pair_dots, takes

# Measured choices (benchmarks/): where a dense product beats what is sparse. None of them changes a result.
DENSE_SUMS_ABOVE = {"cpu": 1 / 8, "cuda": 1 / 32}  # active share of a batch; the cuda value is an estimate, unmeasured


class Layout:
    """Where the active entries of a batch lie, by token and by latent; the second order is sorted once, when needed."""

    unproven: Int[Tensor, ""] | None = None  # tokens whose winners may not be float32's; None where all are

    def __init__(self, rows: Int[Tensor, "active"], cols: Int[Tensor, "active"], n_rows: int, d_dict: int) -> None:
        self.rows, self.cols, self.n_rows, self.d_dict = rows, cols, n_rows, d_dict
        self.dense = len(rows) > n_rows * d_dict * DENSE_SUMS_ABOVE[rows.device.type]

    @cached_property
    def row_starts(self) -> Int[Tensor, "batch+1"]:
        return torch.searchsorted(self.rows, torch.arange(self.n_rows + 1, device=self.rows.device))

    @cached_property
    def by_latent(self) -> Int[Tensor, "active"]:
        """Positions of the entries in the order of their latents."""
        if takes(self.cols, dtype=torch.int64):
            order, self.latent_starts = c_by_latent(self.cols, self.d_dict)
            return order
        return self.cols.int().argsort(stable=True)

    @cached_property
    def rows_by_latent(self) -> Int[Tensor, "active"]:
        return self.rows.index_select(0, self.by_latent)

    @cached_property
    def cols_by_latent(self) -> Int[Tensor, "active"]:
        return self.cols.index_select(0, self.by_latent)

    @cached_property
    def latent_starts(self) -> Int[Tensor, "d_dict+1"]:
        return torch.searchsorted(self.cols_by_latent, torch.arange(self.d_dict + 1, device=self.cols.device))

    def matrix(self, values: Float[Tensor, "active"]) -> Float[Tensor, "batch d_dict"]:
        """The values at their places, zeros elsewhere."""
        flat = values.new_zeros(self.n_rows * self.d_dict)
        return flat.index_put((self.rows * self.d_dict + self.cols,), values).view(self.n_rows, self.d_dict)

    def sum_by_row(self, values: Float[Tensor, "active"], W: Float[Tensor, "d_dict d"]) -> Float[Tensor, "batch d"]:
        """out[t] = Σ_j values[t, j] W[j]."""
        return self.matrix(values) @ W if self.dense else segment_sums(self.cols, self.row_starts, values, W)

    def sum_by_latent(self, values: Float[Tensor, "active"], x: Float[Tensor, "batch d"]) -> Float[Tensor, "d_dict d"]:
        """out[j] = Σ_t values[t, j] x[t]."""
        if self.dense:
            return self.matrix(values).T @ x
        return segment_sums(self.rows_by_latent, self.latent_starts, values.index_select(0, self.by_latent), x)

    def totals(self, values: Float[Tensor, "active"]) -> Float[Tensor, "d_dict"]:
        """out[j] = Σ_t values[t, j], summed in the order of the tokens: the same on every run."""
        if self.dense:
            return self.matrix(values).sum(0)
        ordered = values.index_select(0, self.by_latent)
        return torch.segment_reduce(ordered, "sum", offsets=self.latent_starts, unsafe=True)  # unchecked: no wait

    def dots(self, x: Float[Tensor, "batch d"], W: Float[Tensor, "d_dict d"]) -> Float[Tensor, "active"]:
        """x[t] · W[j] at every active (t, j)."""
        if self.dense:
            return (x @ W.T).flatten()[self.rows * self.d_dict + self.cols]
        if len(self.rows) == 0:
            return x.new_empty(0)
        if takes(x, W):
            return c_pair_dots(x, self.rows, W, self.cols)
        if self.d_dict <= self.n_rows:
            return pair_dots(x, self.rows, self.row_starts, W, self.cols)
        by_latent = pair_dots(W, self.cols_by_latent, self.latent_starts, x, self.rows_by_latent)
        return torch.empty_like(by_latent).index_copy_(0, self.by_latent, by_latent)  # read each row of the larger once


class FullLayout(Layout):
    """Every entry of a batch, active or not: for CUDA, where knowing how many are active would wait for the device.

    Entries are in row-major order, so that values are a matrix as they lie and no index is stored.
    """

    dense = True

    def __init__(self, n_rows: int, d_dict: int, device: torch.device) -> None:
        self.n_rows, self.d_dict, self.device = n_rows, d_dict, device

    @cached_property
    def rows(self) -> Int[Tensor, "active"]:
        return torch.arange(self.n_rows, device=self.device).repeat_interleave(self.d_dict)

    @cached_property
    def cols(self) -> Int[Tensor, "active"]:
        return torch.arange(self.d_dict, device=self.device).repeat(self.n_rows)

    def matrix(self, values: Float[Tensor, "active"]) -> Float[Tensor, "batch d_dict"]:
        return values.view(self.n_rows, self.d_dict)

    def dots(self, x: Float[Tensor, "batch d"], W: Float[Tensor, "d_dict d"]) -> Float[Tensor, "active"]:
        return (x @ W.T).flatten()


def layout_of(flat: Int[Tensor, "active"], n_rows: int, d_dict: int) -> Layout:
    """The layout of ascending positions t · d_dict + j; counting tokens costs less than dividing positions."""
    if takes(flat, dtype=torch.int64):
        rows, cols, starts = c_located(flat, n_rows, d_dict)
    else:
        starts = torch.searchsorted(flat, torch.arange(n_rows + 1, device=flat.device) * d_dict)
        rows = torch.repeat_interleave(starts.diff(), output_size=len(flat))
        cols = flat - rows * d_dict
    layout = Layout(rows, cols, n_rows, d_dict)
    layout.row_starts = starts
    return layout


def segment_sums(
    index: Int[Tensor, "active"], starts: Int[Tensor, "segment+1"], weights: Float[Tensor, "active"],
    table: Float[Tensor, "n d"],
) -> Float[Tensor, "segment d"]:  # fmt: skip
    """out[s] = Σ weights[e] · table[index[e]] over starts[s] ≤ e < starts[s + 1]; every output row is written once."""
    if table.device.type == "cuda":
        from sparse_triton import triton_segment_sums

        return triton_segment_sums(index, starts, weights, table)
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def pair_dots(
    a: Float[Tensor, "n d"], rows: Int[Tensor, "pair"], starts: Int[Tensor, "n+1"], b: Float[Tensor, "m d"],
    cols: Int[Tensor, "pair"],
) -> Float[Tensor, "pair"]:  # fmt: skip
    """out[e] = a[rows[e]] · b[cols[e]], without copies of the gathered rows; starts[i] ≤ e < starts[i + 1] have row i."""
    if a.device.type == "cuda":
        from sparse_triton import triton_pair_dots

        return triton_pair_dots(a, rows, b, cols)
    if not torch.backends.mkl.is_available():  # the gradient of embedding_bag's weights is just this
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, cols, rows[:1], rows, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR is called beta; 'unchecked' is meant
        at = torch.sparse_csr_tensor(starts, cols, a.new_zeros(len(cols)), (len(a), len(b)), check_invariants=False)
    return torch.sparse.sampled_addmm(at, a, b.T, beta=0).values()


class Codes(NamedTuple):
    """The active parts of a batch, in row-major order."""

    values: Float[Tensor, "active"]  # ≥ 0
    layout: Layout  # shared by the encoder, the decoder and their gradients, so that all sort once

    @property
    def rows(self) -> Int[Tensor, "active"]:
        """The token of each entry, non-decreasing."""
        return self.layout.rows

    @property
    def cols(self) -> Int[Tensor, "active"]:
        """The latent of each entry."""
        return self.layout.cols

    @property
    def n_rows(self) -> int:
        return self.layout.n_rows

    @property
    def d_dict(self) -> int:
        return self.layout.d_dict


class _Decode(torch.autograd.Function):
    """Σ values · W_dec[cols]; sparse gradients of values and W_dec."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.layout = layout
        return layout.sum_by_row(values, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        d_values = ctx.layout.dots(grad, W_dec) if ctx.needs_input_grad[0] else None
        d_W = ctx.layout.sum_by_latent(values, grad) if ctx.needs_input_grad[1] else None
        return d_values, d_W, None


def decode(codes: Codes, W_dec: Float[Tensor, "d_dict d_out"]) -> Float[Tensor, "batch d_out"]:
    """Σ values · W_dec[cols] for each token; no bias."""
    return _Decode.apply(codes.values, W_dec, codes.layout)  # type: ignore[no-any-return]


def to_dense(codes: Codes) -> Float[Tensor, "batch d_dict"]:
    return codes.layout.matrix(codes.values)


def from_dense(acts: Float[Tensor, "batch d_dict"], kept: Bool[Tensor, "batch d_dict"]) -> Codes:
    """The kept entries of a dense matrix of activations, and on CUDA all of them; differentiable."""
    if acts.device.type == "cuda":
        return Codes(acts.flatten(), FullLayout(*acts.shape, acts.device))
    flat = nonzero_positions(kept)
    return Codes(acts.flatten().index_select(0, flat), layout_of(flat, *acts.shape))


def fire_counts(codes: Codes) -> Int[Tensor, "d_dict"]:
    """Number of tokens on which each latent is active."""
    return codes.layout.totals((codes.values.detach() > 0).to(codes.values.dtype)).to(torch.int64)


def dense_decode(acts: Float[Tensor, "batch d_dict"], W_dec: Tensor) -> Float[Tensor, "batch d_out"]:
    return acts @ W_dec


def nonzero_positions(mask: Bool[Tensor, "*shape"]) -> Int[Tensor, "active"]:
    """Ascending flat positions of True."""
    if mask.device.type == "cuda":
        return mask.flatten().nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # a third of torch's time
