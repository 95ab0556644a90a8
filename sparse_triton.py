"""Triton kernels for CUDA: the two sums over active entries, and the search for those that may be active.

    segment_sums:  out[s] = Σ_{starts[s] ≤ e < starts[s+1]} weights[e] · table[index[e]]
    pair_dots:     out[e] = a[rows[e]] · b[cols[e]]
    candidates:    entries with the largest upper bounds, of each token or of the batch, and the largest bound left out

Every element of an output is written once, by one program that sums in float32 in the order of the entries: no float
atomics, so that a step is deterministic, and no zeros to fill first. Tables may be views with strided rows (one target's
columns of a cross-layer decoder). `sparse_ops` and `sparse_encode` import this module on CUDA alone; tests run it in Triton's
interpreter, and `tests/emulated_cuda.py` has a twin of every kernel in plain torch.

Bounds are bf16, compared as integers of the same order: a `key` is the int16 whose bits they are, negative ones turned
round, NaN of either sign above all. A static number of candidates has room; places of the batch that stay free hold latent −1.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Shaped
from torch import Tensor

ENTRIES = 16  # active entries a program reads at a time
COLUMNS = 256  # columns of a table a program reads at a time; both untuned
TILE = 4096  # bounds that a program counts at a time
NUMBERED, WIDTH = 8192, 64  # bounds that a program writes candidates of at a time, and those of a segment of them
SLOTS = tl.constexpr(32)  # candidates that it writes at a time
HELD = 32_768  # bounds of a token that a program can hold while it searches; of more it reads tiles of so many again
MEMBERS = 32  # the floor of a batch's candidates is sought among maxima of so many bounds or more,
MAXIMA = 8192  # of so many bounds at a time
COPIES = 64  # of a histogram, so that few programs add to one counter at once
KEYS = 65_536
NONE = tl.constexpr(-40_000)  # below every key


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
def _dots(a, row, b, col, exists, a_stride, b_stride, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros((ENTRIES,), tl.float32)
    for begin in range(0, d, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        mask = exists[:, None] & (column < d)[None, :]
        left = tl.load(a + row[:, None] * a_stride + column[None, :], mask=mask, other=0).to(tl.float32)
        right = tl.load(b + col[:, None] * b_stride + column[None, :], mask=mask, other=0).to(tl.float32)
        total += tl.sum(left * right, 1)
    return total


@triton.jit
def _pair_dots(
    out, a, rows, b, cols, a_stride, b_stride, n, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    exists = pair < n
    row = tl.load(rows + pair, mask=exists, other=0).to(tl.int64)
    col = tl.load(cols + pair, mask=exists, other=0).to(tl.int64)
    total = _dots(a, row, b, col, exists, a_stride, b_stride, d, ENTRIES, COLUMNS)
    tl.store(out + pair, total.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _pre_activations(
    out, x, rows, W, cols, b, x_stride, W_stride, n, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = pair < n
    col = tl.load(cols + pair, mask=inside, other=-1)
    exists = col >= 0
    row = tl.load(rows + pair, mask=exists, other=0)
    col = tl.where(exists, col, 0)
    total = _dots(x, row, W, col, exists, x_stride, W_stride, d, ENTRIES, COLUMNS)
    total += tl.load(b + col, mask=exists, other=0.0)
    tl.store(out + pair, tl.where(exists, total, float("-inf")), mask=inside)


@triton.jit
def _rounded(source, column, d):
    value = tl.load(source + column, mask=column < d, other=0.0)
    rest = value - value.to(tl.bfloat16).to(tl.float32)
    return value, tl.sqrt(tl.sum(rest * rest, 0)), tl.sqrt(tl.sum(value * value, 0))


@triton.jit
def _round_weights(low, ratios, W, b, stride, d, width, gamma, WIDTH: tl.constexpr):
    j = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    value, rest, norm = _rounded(W + j * stride, column, d)
    bias = tl.load(b + j)
    b_low = bias.to(tl.bfloat16).to(tl.float32)
    b_rest = bias - b_low
    b_rest = b_rest + tl.abs(b_rest) * 0.0078125 + tl.abs(bias) * gamma + 1e-30
    b_rest = tl.where(tl.abs(bias) < float("inf"), b_rest, 0.0)  # an infinite bias is its own bound
    value = tl.where(column == d, norm * 1.0078125, value)
    value = tl.where(column == d + 1, b_low, value)
    value = tl.where(column == d + 2, b_rest, value)
    tl.store(low + j * width + column, value.to(tl.bfloat16), mask=column < width)
    ratio = rest / tl.maximum(norm, 1e-30)
    tl.store(ratios + j, tl.where(ratio < 1.0, ratio, 0.0))  # a row that is not finite has NaN for its own bounds


@triton.jit
def _round_inputs(low, x, ratio, stride, d, width, gamma, WIDTH: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    value, rest, norm = _rounded(x + t * stride, column, d)
    margin = rest + (tl.load(ratio) * 1.00390625 + gamma) * norm
    value = tl.where(column == d, margin * 1.0078125, value)
    value = tl.where((column == d + 1) | (column == d + 2), 1.0, value)
    tl.store(low + t * width + column, value.to(tl.bfloat16), mask=column < width)


@triton.jit
def _keys(row, column, d_dict):
    bits = tl.load(row + column, mask=column < d_dict, other=0).to(tl.int32)
    key = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    key = tl.where((key > 0x7F80) | (key < -0x7F81), 0x7FFF, key)
    return tl.where(column < d_dict, key, NONE)


@triton.jit
def _bound_of(key):
    bits = tl.where(key < 0, key ^ 0x7FFF, key) << 16
    bound = bits.to(tl.float32, bitcast=True)
    bound = tl.where(bound > 0, bound * 1.00390625, bound * 0.99609375)  # at least what was rounded to it
    return tl.where(key == NONE, float("-inf"), bound)


@triton.jit
def _write_candidates(
    rows, cols, t, row, d_dict, threshold, above, equal, room, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    rest, given = threshold * 0 + NONE, equal
    for begin in range(0, d_dict, SEGMENTS * WIDTH):
        columns = begin + tl.arange(0, SEGMENTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        keys = _keys(row, columns, d_dict)
        rest = tl.maximum(rest, tl.max(tl.where(keys < threshold - 1, keys, NONE)))
        n_equal = tl.sum((keys == threshold - 1).to(tl.int32), 1)
        n_above = tl.sum((keys >= threshold).to(tl.int32), 1)
        fit = tl.minimum(n_equal, tl.maximum(room - equal - tl.cumsum(n_equal, 0) + n_equal, 0))
        ends, total = tl.cumsum(n_above + fit, 0), tl.sum(n_above + fit, 0)
        first = above + tl.minimum(equal, room)
        for done in range(0, total, SLOTS):  # each place looks for its segment, and there for its column
            place = done + tl.arange(0, SLOTS)
            before = ends[:, None] <= place[None, :]
            segment = tl.sum(before.to(tl.int32), 0)
            nth = place - tl.max(tl.where(before, ends[:, None], 0), 0)
            room_here = room - equal - tl.sum(tl.where(before, n_equal[:, None], 0), 0)
            column = begin + segment[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            key = _keys(row, column, d_dict)
            equals = (key == threshold - 1).to(tl.int32)
            fits = (equals > 0) & (tl.cumsum(equals, 1) <= room_here[:, None])
            taken = ((key >= threshold) | fits).to(tl.int32)
            own = (taken > 0) & (tl.cumsum(taken, 1) == nth[:, None] + 1)
            exists = place < total
            tl.store(cols + first + place, tl.sum(tl.where(own, column, 0), 1).to(tl.int64), mask=exists)
            tl.store(rows + first + place, tl.zeros((SLOTS,), tl.int64) + t, mask=exists)
        above += tl.sum(n_above, 0)
        equal += tl.sum(n_equal, 0)
    return tl.where((equal > given) & (equal > room), tl.maximum(rest, threshold - 1), rest)


@triton.jit
def _candidates_by_token(
    rows, cols, rest, bounds, d_dict, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, HOLDS: tl.constexpr,
    SEGMENTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = bounds + t * d_dict
    column = tl.arange(0, BLOCK // CAPACITY)[:, None] * CAPACITY + tl.arange(0, CAPACITY)[None, :]
    keys = _keys(row, column, d_dict)
    largest = tl.max(keys, 0)  # of as many groups as there is room for
    if not HOLDS:
        for begin in range(BLOCK, d_dict, BLOCK):
            largest = tl.maximum(largest, tl.max(_keys(row, begin + column, d_dict), 0))
    high = tl.max(largest, 0) + 1  # at most CAPACITY keys reach `high`, at least as many reach `low`
    low = tl.maximum(tl.min(largest, 0), -32768)
    found = high * 0
    while (high - low > 1) & (found < CAPACITY):
        middle = (low + high) >> 1
        n = tl.sum((keys >= middle).to(tl.int32))
        if not HOLDS:
            for begin in range(BLOCK, d_dict, BLOCK):
                n += tl.sum((_keys(row, begin + column, d_dict) >= middle).to(tl.int32))
        fits = n <= CAPACITY
        found = tl.where(fits, n, found)
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
    own = t * CAPACITY
    left = _write_candidates(
        rows + own, cols + own, t, row, d_dict, high, high * 0, high * 0, CAPACITY - found, SEGMENTS, WIDTH
    )  # fmt: skip
    tl.store(rest + t, _bound_of(left))


@triton.jit
def _winners_by_token(
    winner_rows, winner_cols, winner_pre, unproven, cols, pre, rest, k, CAPACITY: tl.constexpr, ENTRIES: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    own = t * CAPACITY
    slot = tl.arange(0, CAPACITY)
    exact = tl.load(pre + own + slot)
    value = tl.where(exact == exact, exact, float("inf"))
    rank = tl.zeros((CAPACITY,), tl.int32)
    for begin in range(0, CAPACITY, ENTRIES):
        nth = begin + tl.arange(0, ENTRIES)
        other = tl.load(pre + own + nth)
        other = tl.where(other == other, other, float("inf"))
        earlier = (other[None, :] == value[:, None]) & (nth[None, :] < slot[:, None])
        rank += tl.sum(((other[None, :] > value[:, None]) | earlier).to(tl.int32), 1)
    wins = rank < k
    place = t * k + tl.cumsum(wins.to(tl.int32), 0) - 1
    tl.store(winner_rows + place, tl.zeros((CAPACITY,), tl.int64) + t, mask=wins)
    tl.store(winner_cols + place, tl.load(cols + own + slot), mask=wins)
    tl.store(winner_pre + place, exact, mask=wins)
    smallest = tl.min(tl.where(wins, value, float("inf")), 0)
    tl.store(unproven + t, 1 - (smallest > tl.load(rest + t)).to(tl.int32))


@triton.jit
def _histogram(
    counts, bounds, last, d_dict, COPIES: tl.constexpr, KEYS: tl.constexpr, MEMBERS: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    row = bounds + t * d_dict
    own = counts + (t % COPIES) * KEYS
    lowest = tl.load(last)
    for begin in range(0, d_dict, MEMBERS * GROUPS):
        column = begin + tl.arange(0, MEMBERS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
        nth = 32767 - tl.max(_keys(row, column, d_dict), 0)
        tl.atomic_add(own + nth, tl.full((GROUPS,), 1, tl.int32), mask=nth <= lowest, sem="relaxed")


@triton.jit
def _count_candidates(above, equal, bounds, cut, last, d_dict, TILE: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    threshold = 32768 - tl.minimum(tl.load(cut), tl.load(last) + 1)
    n_above, n_equal = threshold * 0, threshold * 0
    for begin in range(0, d_dict, TILE):
        key = _keys(bounds + t * d_dict, begin + tl.arange(0, TILE), d_dict)
        n_above += tl.sum((key >= threshold).to(tl.int32), 0)
        n_equal += tl.sum((key == threshold - 1).to(tl.int32), 0)
    tl.store(above + t, n_above)
    tl.store(equal + t, n_equal)


@triton.jit
def _candidates_in_batch(
    rows, cols, rest, bounds, cut, last, above, equal, above_ends, equal_ends, n, d_dict, capacity,
    SEGMENTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    threshold = 32768 - tl.minimum(tl.load(cut), tl.load(last) + 1)
    before, equal_before = tl.load(above_ends + t) - tl.load(above + t), tl.load(equal_ends + t) - tl.load(equal + t)
    room = capacity - tl.load(above_ends + n - 1)
    row = bounds + t * d_dict
    left = _write_candidates(
        rows, cols, t, row, d_dict, threshold, before, equal_before, room, SEGMENTS, WIDTH
    )  # fmt: skip
    tl.store(rest + t, _bound_of(left))


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


def triton_upper_bounds(
    x: Float[Tensor, "batch d"], W: Float[Tensor, "d_dict d"], b: Float[Tensor, "d_dict"]
) -> Shaped[Tensor, "batch d_dict"]:
    """bf16 upper bounds of x Wᵀ + b but for their own rounding: one product, as `sparse_encode._UpperBounds` says."""
    x, W, b = _with_contiguous_rows(x), _with_contiguous_rows(W), b.contiguous()
    d = x.shape[1]
    width = (d + 3 + 7) // 8 * 8  # whole 16 bytes, as tensor cores want them
    gamma, block = (d + 8) * 2.0**-23, triton.next_power_of_2(width)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # partial sums stay float32
    x_low, W_low = (torch.empty(len(rows), width, dtype=torch.bfloat16, device=x.device) for rows in (x, W))
    ratios = torch.empty(len(W), device=x.device)
    with torch.cuda.device_of(x):
        _round_weights[(len(W),)](W_low, ratios, W, b, W.stride(0), d, width, gamma, WIDTH=block)
        _round_inputs[(len(x),)](x_low, x, ratios.amax(), x.stride(0), d, width, gamma, WIDTH=block)
    return x_low @ W_low.T


class Candidates(NamedTuple):
    """Entries in row-major order, with room for a static number of them."""

    rows: Int[Tensor, "capacity"]
    cols: Int[Tensor, "capacity"]  # −1 where a place is free
    rest: Float[Tensor, "batch"]  # no entry of a token that is no candidate has a pre-activation above this


def triton_candidates_by_token(bounds: Shaped[Tensor, "batch d_dict"], k: int) -> Candidates:
    """Each token's 2k entries with the largest upper bounds, or up to the next power of two; ties to the lowest latent."""
    (n, d_dict), capacity = bounds.shape, max(32, triton.next_power_of_2(2 * k))
    assert k < capacity < d_dict, f"{k=} {capacity=} {d_dict=}"
    rows, cols = torch.empty(2, n * capacity, dtype=torch.int64, device=bounds.device)
    rest = torch.empty(n, device=bounds.device)
    block = min(HELD, triton.next_power_of_2(d_dict))
    with torch.cuda.device_of(bounds):
        _candidates_by_token[(n,)](
            rows, cols, rest, bounds.view(torch.int16), d_dict, CAPACITY=capacity, BLOCK=block, HOLDS=d_dict <= block,
            **_segments(d_dict), num_warps=max(4, block // 2048),
        )  # fmt: skip
    return Candidates(rows, cols, rest)


def triton_candidates_in_batch(bounds: Shaped[Tensor, "batch d_dict"], k: int) -> Candidates:
    """The batch's 2k·B entries with the largest upper bounds; ties of the smallest go to the lowest (token, latent).

    Keys are counted from the largest down. First only of maxima of groups of latents: from where these are 2k·B on, so are
    all; then of all entries from there up, which are few.
    """
    (n, d_dict), device = bounds.shape, bounds.device
    capacity = 2 * k * n
    assert capacity <= n * d_dict // MEMBERS, f"{k=} {d_dict=}: there are fewer than 2k·B maxima"
    members = MEMBERS  # twice and four times as many halve and quarter what is counted, and find nearly the same floor
    while members < 4 * MEMBERS and 2 * capacity <= n * d_dict // (2 * members):
        members *= 2
    rows = torch.empty(capacity, dtype=torch.int64, device=device)
    cols, rest = torch.full_like(rows, -1), torch.empty(n, device=device)
    counts = torch.empty(2, n, dtype=torch.int32, device=device)
    bits = bounds.view(torch.int16)
    with torch.cuda.device_of(bounds):
        histogram = torch.zeros(2, COPIES, KEYS, dtype=torch.int32, device=device)
        everything = torch.full((), KEYS - 1, dtype=torch.int32, device=device)
        sizes = {"COPIES": COPIES, "KEYS": KEYS, "num_warps": 8}
        _histogram[(n,)](histogram[0], bits, everything, d_dict, **sizes, MEMBERS=members, GROUPS=MAXIMA // members)
        last = (_totals(histogram[0]) < capacity).sum(dtype=torch.int32)  # from this key up are at least `capacity`
        _histogram[(n,)](histogram[1], bits, last, d_dict, **sizes, MEMBERS=1, GROUPS=TILE)
        cut = (_totals(histogram[1]) <= capacity).sum(dtype=torch.int32)  # above this key are at most `capacity`
        _count_candidates[(n,)](counts[0], counts[1], bits, cut, last, d_dict, TILE=TILE, num_warps=8)
        ends = counts.cumsum(1, dtype=torch.int32)
        _candidates_in_batch[(n,)](
            rows, cols, rest, bits, cut, last, *counts, *ends, n, d_dict, capacity, **_segments(d_dict), num_warps=8
        )  # fmt: skip
    return Candidates(rows, cols, rest)


def _segments(d_dict: int) -> dict[str, int]:
    """How a program cuts what it writes candidates of."""
    numbered = min(NUMBERED, triton.next_power_of_2(d_dict))
    width = min(WIDTH, numbered // 2)
    return {"SEGMENTS": numbered // width, "WIDTH": width}


def _totals(histogram: Int[Tensor, "copy key"]) -> Int[Tensor, "key"]:
    """How many keys are as large as each, from the largest down."""
    return histogram.sum(0, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def triton_pre_activations(
    x: Float[Tensor, "batch d"], W: Float[Tensor, "d_dict d"], b: Float[Tensor, "d_dict"], candidates: Candidates
) -> Float[Tensor, "capacity"]:
    """x[t] · W[j] + b[j] at every candidate (t, j), in float32; −∞ where a place is free."""
    x, W, b = _with_contiguous_rows(x), _with_contiguous_rows(W), b.contiguous()
    out = torch.empty(len(candidates.cols), device=x.device)
    with torch.cuda.device_of(x):
        _pre_activations[(triton.cdiv(len(out), ENTRIES),)](
            out, x, candidates.rows, W, candidates.cols, b, x.stride(0), W.stride(0), len(out), x.shape[1],
            ENTRIES=ENTRIES, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out


def triton_winners_by_token(
    candidates: Candidates, pre: Float[Tensor, "capacity"], k: int
) -> tuple[Int[Tensor, "active"], Int[Tensor, "active"], Float[Tensor, "active"], Int[Tensor, "batch"]]:
    """(rows, cols, pre) of each token's k largest candidates, ties to the lowest latent, NaN the largest; 1 if unproven.

    A token is proven if its smallest winner is larger than the upper bound of everything that is no candidate.
    """
    n = len(candidates.rest)
    capacity = len(pre) // n
    rows, cols = torch.empty(2, n * k, dtype=torch.int64, device=pre.device)
    won, unproven = pre.new_empty(n * k), torch.empty(n, dtype=torch.int32, device=pre.device)
    with torch.cuda.device_of(pre):
        _winners_by_token[(n,)](
            rows, cols, won, unproven, candidates.cols, pre, candidates.rest, k, CAPACITY=capacity, ENTRIES=ENTRIES,
            num_warps=min(16, max(4, capacity // 64)),
        )  # fmt: skip
    return rows, cols, won, unproven


def _with_contiguous_rows(table: Tensor) -> Tensor:
    return table if table.stride(1) == 1 else table.contiguous()
