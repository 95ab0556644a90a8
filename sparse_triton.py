"""The two sums over active entries as Triton kernels, for CUDA.

    segment_sums:  out[s] = Σ_{starts[s] ≤ e < starts[s+1]} weights[e] · table[index[e]]
    pair_dots:     out[e] = a[rows[e]] · b[cols[e]]

Every element of an output is written once, by one program that sums in float32 in the order of the entries: no atomics,
so that a step is deterministic, and no zeros to fill first. Tables may be views with strided rows (one target's columns
of a cross-layer decoder). `sparse_ops` imports this module on CUDA alone; tests run it in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

ENTRIES = 16  # active entries a program reads at a time
COLUMNS = 256  # columns of a table a program reads at a time; both untuned


@triton.jit
def _segment_sums(
    out, index, starts, weights, table, row_stride, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    first, last = tl.load(starts + segment), tl.load(starts + segment + 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(first, last, ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)
        row = tl.load(index + entry, mask=entry < last, other=0).to(tl.int64)
        weight = tl.load(weights + entry, mask=entry < last, other=0).to(tl.float32)
        place = table + row[:, None] * row_stride + column[None, :]
        part = tl.load(place, mask=(entry < last)[:, None] & inside[None, :], other=0).to(tl.float32)
        total += tl.sum(weight[:, None] * part, 0)
    tl.store(out + segment * d + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pair_dots(
    out, a, rows, b, cols, a_stride, b_stride, n, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    exists = pair < n
    row = tl.load(rows + pair, mask=exists, other=0).to(tl.int64)
    col = tl.load(cols + pair, mask=exists, other=0).to(tl.int64)
    total = tl.zeros((ENTRIES,), tl.float32)
    for begin in range(0, d, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        mask = exists[:, None] & (column < d)[None, :]
        left = tl.load(a + row[:, None] * a_stride + column[None, :], mask=mask, other=0).to(tl.float32)
        right = tl.load(b + col[:, None] * b_stride + column[None, :], mask=mask, other=0).to(tl.float32)
        total += tl.sum(left * right, 1)
    tl.store(out + pair, total.to(out.dtype.element_ty), mask=exists)


def triton_segment_sums(
    index: Int[Tensor, "active"],
    starts: Int[Tensor, "segment+1"],
    weights: Float[Tensor, "active"],
    table: Float[Tensor, "n d"],
) -> Float[Tensor, "segment d"]:
    """out[s] = Σ weights[e] · table[index[e]] over starts[s] ≤ e < starts[s + 1]; zero for an empty segment."""
    table = _with_contiguous_rows(table)
    d, segments = table.shape[1], len(starts) - 1
    out = torch.empty(segments, d, dtype=table.dtype, device=table.device)
    grid = (segments, triton.cdiv(d, COLUMNS))
    if out.numel() > 0:
        with torch.cuda.device_of(table):  # Triton launches on the current device
            _segment_sums[grid](
                out, index.contiguous(), starts.contiguous(), weights.contiguous(), table, table.stride(0), d,
                ENTRIES=ENTRIES, COLUMNS=COLUMNS,
            )  # fmt: skip
    return out


def triton_pair_dots(
    a: Float[Tensor, "n d"], rows: Int[Tensor, "pair"], b: Float[Tensor, "m d"], cols: Int[Tensor, "pair"]
) -> Float[Tensor, "pair"]:
    """out[e] = a[rows[e]] · b[cols[e]]; nothing of size pair × d is written."""
    assert a.shape[1] == b.shape[1], f"{a.shape=} {b.shape=}"
    a, b = _with_contiguous_rows(a), _with_contiguous_rows(b)
    out = torch.empty(len(rows), dtype=a.dtype, device=a.device)
    if out.numel() > 0:
        with torch.cuda.device_of(a):
            _pair_dots[(triton.cdiv(len(rows), ENTRIES),)](
                out, a, rows.contiguous(), b, cols.contiguous(), a.stride(0), b.stride(0), len(rows), a.shape[1],
                ENTRIES=ENTRIES, COLUMNS=COLUMNS,
            )  # fmt: skip
    return out


def _with_contiguous_rows(table: Tensor) -> Tensor:
    return table if table.stride(1) == 1 else table.contiguous()
