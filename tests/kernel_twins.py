"""What every Triton kernel of `sparse_triton.py` does, in plain torch and with the same arguments.

`emulated_cuda.py` runs these in place of the kernels, `test_sparse_triton.py` compares the kernels with them. Nothing here
makes a host wait for a device.
"""

from typing import Any

import torch

NONE = -40_000


def _segment_sums(
    out: Any, index: Any, starts: Any, weights: Any, table: Any, row_stride: int, d: int, ENTRIES: int, COLUMNS: int
) -> None:
    """out[s] = Σ weights[e] · table[index[e]] over starts[s] ≤ e < starts[s + 1]."""
    assert table.stride() == (row_stride, 1) and all(x.is_contiguous() for x in (out, index, starts, weights))
    segment = torch.repeat_interleave(starts.diff(), output_size=len(index))
    total = torch.zeros(out.shape, device=out.device)  # in float32, whatever the tables hold
    out.copy_(total.index_add_(0, segment, weights.float()[:, None] * table.index_select(0, index).float()))


def _pair_dots(
    out: Any, a: Any, rows: Any, b: Any, cols: Any, a_stride: int, b_stride: int, n: int, d: int, ENTRIES: int,
    COLUMNS: int,
) -> None:  # fmt: skip
    """out[e] = a[rows[e]] · b[cols[e]]."""
    assert a.stride() == (a_stride, 1) and b.stride() == (b_stride, 1) and out.shape == rows.shape == cols.shape == (n,)
    out.copy_((a.index_select(0, rows).float() * b.index_select(0, cols).float()).sum(1))


def _pre_activations(
    out: Any, x: Any, rows: Any, W: Any, cols: Any, b: Any, x_stride: int, W_stride: int, n: int, d: int, ENTRIES: int,
    COLUMNS: int,
) -> None:  # fmt: skip
    """out[e] = x[rows[e]] · W[cols[e]] + b[cols[e]]; −∞ where cols[e] is −1, whatever rows[e] is."""
    assert x.stride() == (x_stride, 1) and W.stride() == (W_stride, 1) and out.shape == rows.shape == cols.shape == (n,)
    exists, j = cols >= 0, cols.clamp_min(0)
    t = torch.where(exists, rows, 0)
    pre = (x.index_select(0, t) * W.index_select(0, j)).sum(1) + b.index_select(0, j)
    out.copy_(torch.where(exists, pre, -torch.inf))


def _with_columns(low: Any, rows: Any, columns: list[Any], width: int, WIDTH: int) -> None:
    """bf16 rows, the columns beside them, and zeros."""
    assert low.shape == (len(rows), width) and WIDTH >= width == -(-width // 8) * 8
    made = torch.cat([rows, torch.stack(columns, 1)], 1)
    low.zero_()
    low[:, : made.shape[1]].copy_(made)


def _round_weights(
    low: Any, ratios: Any, W: Any, b: Any, stride: int, d: int, width: int, gamma: float, WIDTH: int
) -> None:
    """low[j] = [ŵ, ‖w‖, b̂, b − b̂], the last two columns but one and the last enlarged; ratios[j] = ‖w − ŵ‖ / ‖w‖."""
    assert W.stride() == (stride, 1) and W.shape[1] == d and b.is_contiguous()
    norm, b_low = W.norm(dim=1), b.bfloat16().float()
    b_rest = (b - b_low) + (b - b_low).abs() * 2.0**-7 + b.abs() * gamma + 1e-30
    _with_columns(low, W, [norm * (1 + 2.0**-7), b_low, torch.where(b.isfinite(), b_rest, 0.0)], width, WIDTH)
    ratio = (W - W.bfloat16().float()).norm(dim=1) / norm.clamp_min(1e-30)
    ratios.copy_(torch.where(ratio < 1, ratio, 0.0))


def _round_inputs(low: Any, x: Any, ratio: Any, stride: int, d: int, width: int, gamma: float, WIDTH: int) -> None:
    """low[t] = [x̂, m, 1, 1], m = ‖x − x̂‖ + (ρ + γ)‖x‖ enlarged."""
    assert x.stride() == (stride, 1) and x.shape[1] == d and ratio.shape == ()
    margin = (x - x.bfloat16().float()).norm(dim=1) + (ratio * (1 + 2.0**-8) + gamma) * x.norm(dim=1)
    one = torch.ones_like(margin)
    _with_columns(low, x, [margin * (1 + 2.0**-7), one, one], width, WIDTH)


def _keys(bounds: Any) -> Any:
    """int16 bits of bf16 as integers of the same order, NaN the largest."""
    assert bounds.dtype == torch.int16 and bounds.is_contiguous()
    value, bits = bounds.view(torch.bfloat16), bounds.int()
    return torch.where(value.isnan(), 0x7FFF, torch.where(bits < 0, bits ^ 0x7FFF, bits))


def _bound_of(key: Any) -> Any:
    """The upper bound that was rounded to this key: an eighth of a percent is more than the rounding; −∞ of none."""
    bound = torch.where(key < 0, key ^ 0x7FFF, key).to(torch.int16).view(torch.bfloat16).float()
    bound = torch.where(bound > 0, bound * (1 + 2.0**-8), bound * (1 - 2.0**-8))
    return torch.where(key == NONE, -torch.inf, bound)


def _candidates_by_token(
    rows: Any, cols: Any, rest: Any, bounds: Any, d_dict: int, CAPACITY: int, BLOCK: int, HOLDS: bool,
    SEGMENTS: int, WIDTH: int,
) -> None:  # fmt: skip
    """The CAPACITY largest keys of each token in order of their latents, ties to the lowest; the largest left out."""
    assert bounds.shape[1] == d_dict > CAPACITY and (d_dict <= BLOCK or not HOLDS)
    keys = _keys(bounds)
    order = keys.sort(dim=1, descending=True, stable=True).indices
    cols.copy_(order[:, :CAPACITY].sort(dim=1).values.flatten())
    rows.copy_(torch.arange(len(bounds), device=rows.device).repeat_interleave(CAPACITY, output_size=len(rows)))
    rest.copy_(_bound_of(keys.gather(1, order[:, CAPACITY, None])[:, 0]))


def _winners_by_token(
    winner_rows: Any, winner_cols: Any, winner_pre: Any, unproven: Any, cols: Any, pre: Any, rest: Any, k: int,
    CAPACITY: int, ENTRIES: int,
) -> None:  # fmt: skip
    """The k largest of each token's candidates in order of their latents, NaN the largest, ties to the lowest."""
    table = pre.view(-1, CAPACITY)
    value = torch.where(table.isnan(), torch.inf, table)
    place = value.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    winner_rows.copy_(torch.arange(len(rest), device=rest.device).repeat_interleave(k, output_size=len(winner_rows)))
    winner_cols.copy_(cols.view(-1, CAPACITY).gather(1, place).flatten())
    winner_pre.copy_(table.gather(1, place).flatten())
    unproven.copy_(~(value.gather(1, place).amin(1) > rest))


def _histogram(
    counts: Any, bounds: Any, last: Any, d_dict: int, COPIES: int, KEYS: int, MEMBERS: int, GROUPS: int
) -> None:
    """Σ over copies of counts[·, i] grows by the number of groups' maxima that are i keys below the largest, i ≤ last."""
    assert counts.shape == (COPIES, KEYS) and last.shape == ()
    keys, tile = _keys(bounds), MEMBERS * GROUPS
    wide = torch.nn.functional.pad(keys, (0, -d_dict % tile), value=NONE).view(len(keys), -1, MEMBERS, GROUPS)
    nth = 32767 - wide.amax(2).flatten()
    counts[0].index_add_(0, nth.clamp_max(KEYS - 1), (nth <= last).int())


def _count_candidates(above: Any, equal: Any, bounds: Any, cut: Any, last: Any, d_dict: int, TILE: int) -> None:
    """How many keys of each token are candidates for certain, and how many are the next smaller one."""
    keys, threshold = _keys(bounds), 32768 - torch.minimum(cut, last + 1)
    above.copy_((keys >= threshold).sum(1))
    equal.copy_((keys == threshold - 1).sum(1))


def _candidates_in_batch(
    rows: Any, cols: Any, rest: Any, bounds: Any, cut: Any, last: Any, above: Any, equal: Any, above_ends: Any,
    equal_ends: Any, n: int, d_dict: int, capacity: int, SEGMENTS: int, WIDTH: int,
) -> None:  # fmt: skip
    """All keys above the cut, and of the next smaller one as many as there is room for, in row-major order."""
    assert bounds.shape == (n, d_dict) and rows.shape == cols.shape == (capacity,)
    keys, threshold = _keys(bounds).flatten(), 32768 - torch.minimum(cut, last + 1)
    for own, ends in ((above, above_ends), (equal, equal_ends)):
        torch._assert_async((own.cumsum(0) == ends).all())
    equals = keys == threshold - 1
    taken = (keys >= threshold) | (equals & (equals.cumsum(0) <= capacity - above_ends[-1]))
    place = torch.where(taken, taken.cumsum(0) - 1, capacity)
    flat = torch.arange(n * d_dict, device=keys.device)
    for out, values in ((rows, flat // d_dict), (cols, flat % d_dict)):
        out.copy_(torch.cat([out, out[:1]]).index_copy_(0, place, values)[:-1])
    rest.copy_(_bound_of(torch.where(taken, NONE, keys).view(n, d_dict).amax(1)))


TWINS = {
    twin.__name__: twin for twin in (
        _segment_sums, _pair_dots, _pre_activations, _round_weights, _round_inputs, _candidates_by_token,
        _winners_by_token, _histogram, _count_candidates, _candidates_in_batch,
    )
}  # fmt: skip
