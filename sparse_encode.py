"""Which latents win: dense products and selection, which give the same codes as float32 and cost less.

    pre   = x W_encᵀ + b_enc                                       one dense product, B·d_in·d_dict
    codes = {(t, j): relu(pre[t, j]) for (t, j) selected}          k·B entries

    ∂/∂W_enc[j] = Σ_t δ[t, j] x[t]           ∂/∂x[t] = Σ_j δ[t, j] W_enc[j],   δ = ∂/∂codes · [pre > 0]

The dense product runs in bf16 and still selects what float32 selects, because it computes an upper bound of pre. With
x̂, ŵ the rounded rows, γ the relative error of a float32 sum of d terms and ρ = max_j ‖w_j − ŵ_j‖/‖w_j‖ (Cauchy–Schwarz):

    pre[t, j] ≤ upper[t, j] = x̂_t·ŵ_j + b_j + m_t ‖w_j‖,    m_t = ‖x_t − x̂_t‖ + (ρ + γ)‖x_t‖

m and ‖w‖ are one more column of the product. Whoever wins has upper ≥ the smallest winner, so (1) entries whose upper
bound exceeds a guess are kept, (2) the k·B largest of them and a few more get float32 values, whose k·B-th largest T can
only be too low, (3) every entry with upper ≥ T gets its float32 value too, and the winners are among these. A guess
that proves higher than T is lowered to T. Nothing of size B·d_dict outlives a block of tokens, and every thread has
blocks of its own. On a processor without bf16 products the float32 product gives not bounds but the pre-activations
themselves, and (1) is followed by the selection.

On CUDA, (1) and (3) would wait for the device to count. There a static number of entries with the largest bounds, about
2k·B, get float32 values, the winners are the largest of these, and a token is proven if the smallest winner is larger than
every bound left out. Tokens that are not are counted (`Layout.unproven`), and a training logs their number. Where bounds
cannot pay (`_bounds_pay`), the product and the selection are float32. No float32 product is TF32: it gives values of codes.

Every function has a dense twin (`dense_*`) that says the same in plain matrix products; tests compare the two. Scans, float32
values and winners are C where it can be compiled (`sparse_c.py`), else torch and numpy: here, too, each says the other's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from devices import bf16_is_fast, in_threads
from parallel import ALONE, Ranks
from sparse_c import c_largest, c_pair_dots, c_rounded, c_scan, c_winners_by_token, takes
from sparse_ops import Codes, Layout, layout_of, nonzero_positions

# k / d_dict by token, and in the batch, from which on all pre-activations are written down and partitioned in float32
DENSE_SELECTION_ABOVE = {torch.bfloat16: (1 / 16, 1 / 16), torch.float32: (1 / 32, 1 / 8)}  # by the product's precision
GROUP = 16  # latents per group: k groups must exist
THREADS_ABOVE = 1 << 32  # multiply-adds of the product; in less, our threads would wait for OpenMP's, which spin
BLOCK = 1 << 21  # entries of pre that are computed and filtered while they are in the cache


class _Encode(torch.autograd.Function):
    """relu(pre) at the selected entries, given those pre-activations; sparse gradients of x, W_enc and b_enc."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, selected: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(x, W_enc, selected)
        ctx.layout = layout
        return selected.relu()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W_enc, selected = ctx.saved_tensors
        delta = grad * (selected > 0)
        d_x = ctx.layout.sum_by_row(delta, W_enc) if ctx.needs_input_grad[0] else None
        d_W = ctx.layout.sum_by_latent(delta, x) if ctx.needs_input_grad[1] else None
        d_b = ctx.layout.totals(delta) if ctx.needs_input_grad[2] else None
        return d_x, d_W, d_b, None, None


# ---------------------------------------------------------------------------------------------------- encode, decode


def encode_topk(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_dict d_in"], b_enc: Float[Tensor, "d_dict"], k: int,
    ranks: Ranks = ALONE,
) -> Codes:  # fmt: skip
    """relu(pre) at the k largest pre-activations of each token; k·B entries. Ties go to the lowest latent.

    Where `ranks` hold other latents the k are the largest of all, and these codes are those of the latents here.
    """
    return _encode_largest(x, W_enc, b_enc, k, None, ranks)


def encode_batch_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_dict d_in"],
    b_enc: Float[Tensor, "d_dict"],
    k: int,
    bound: Float[Tensor, ""],
    ranks: Ranks = ALONE,
) -> Codes:
    """relu(pre) at the k·B largest pre-activations of the batch; ties go to the lowest (token, latent).

    `bound` is a guess of the smallest winner (that of the batch before, −inf if unknown). It decides how fast the
    winners are found, never who they are. On CUDA it is not read. `ranks`: as in `encode_topk`.
    """
    return _encode_largest(x, W_enc, b_enc, k, bound, ranks)


def encode_threshold(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_dict d_in"],
    b_enc: Float[Tensor, "d_dict"],
    threshold: Float[Tensor, ""] | Float[Tensor, "d_dict"],
) -> Codes:
    """Every pre-activation above max(threshold, 0): the deployed face of BatchTopK, JumpReLU and Relu."""
    return _encode(x, W_enc, b_enc, _above(x, W_enc, b_enc, threshold.clamp_min(0)))


# ------------------------------------------------------------------------------------------------------- dense twins


def dense_encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Float[Tensor, "batch d_dict"]:
    pre = torch.addmm(b_enc, x, W_enc.T)
    return pre.relu() * _largest(pre.detach(), k)


def dense_encode_batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Float[Tensor, "batch d_dict"]:
    pre = torch.addmm(b_enc, x, W_enc.T)
    return pre.relu() * _largest(pre.detach().view(1, -1), k * len(x)).view_as(pre)


def dense_encode_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> Float[Tensor, "batch d_dict"]:
    pre = torch.addmm(b_enc, x, W_enc.T)
    return pre * (pre.detach() > threshold.clamp_min(0))


# --------------------------------------------------------------------------------------------------------- selection


class _Selected(NamedTuple):
    flat: Int[Tensor, "active"]  # ascending positions t · d_dict + j
    pre: Float[Tensor, "active"]  # pre-activations there, in the precision of x


def _selected(flat: Int[Tensor, "found"], pre: Float[Tensor, "found"], keep: Int[Tensor, "active"]) -> _Selected:
    """Some of the found entries; `index_select` takes a fifth of the time that indexing does."""
    return _Selected(flat.index_select(0, keep), pre.index_select(0, keep))


def _encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, selected: _Selected) -> Codes:
    """Codes at the selected positions."""
    layout = layout_of(selected.flat, len(x), len(W_enc))
    values = _Encode.apply(x, W_enc, b_enc, selected.pre, layout)
    return Codes(values, layout)


def _encode_largest(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, bound: Tensor | None, ranks: Ranks) -> Codes:
    """Codes at the k largest of each token (`bound` None), or at the k·B largest of the batch."""
    if ranks.selects:
        selected = _select(x, W_enc, b_enc, min(k, len(W_enc)), bound)
        won = ranks.largest(*selected, n_rows=len(x), k=k, batch=bound is not None)
        return _encode(x, W_enc, b_enc, _selected(*selected, won))
    assert 1 <= k <= len(W_enc), f"{k=} must lie between 1 and {len(W_enc)} latents"
    if not _bounds_pay(x, W_enc, k):
        return _encode(x, W_enc, b_enc, _select(x, W_enc, b_enc, k, bound))
    layout, pre = _select_by_bounds(x, W_enc, b_enc, k, flat=bound is not None)
    return Codes(_Encode.apply(x, W_enc, b_enc, pre, layout), layout)


@torch.no_grad()
def _select(x: Tensor, W: Tensor, b: Tensor, k: int, bound: Tensor | None) -> _Selected:
    """The k largest of each token (`bound` None), or the k·B largest of the batch."""
    if x.device.type == "cuda":
        return _select_static(x, W, b, k, flat=bound is not None)
    low = torch.bfloat16 if bf16_is_fast(x.device) else torch.float32
    if k <= len(W) * DENSE_SELECTION_ABOVE[low][bound is not None]:
        selected = _select_by_token(x, W, b, k, low) if bound is None else _select_in_batch(x, W, b, k, bound, low)
        if selected is not None:
            return selected
    pre = torch.addmm(b, x, W.T)
    flat = _largest_positions(pre, k) if bound is None else _largest_positions(pre.view(1, -1), k * len(x))
    return _Selected(flat, pre.view(-1).index_select(0, flat))


@torch.no_grad()
def _above(x: Tensor, W: Tensor, b: Tensor, threshold: Tensor) -> _Selected:
    """Every pre-activation above a threshold."""
    if x.device.type == "cpu" and bf16_is_fast(x.device):
        upper = _UpperBounds(x, W, b - threshold, torch.bfloat16)
        scan = upper.scan(torch.zeros(()))
        if scan is not None:
            upper.b = b
            pre = upper.exact(scan.flat)
            return _selected(
                scan.flat,
                pre,
                nonzero_positions(pre > (threshold if threshold.ndim == 0 else threshold[scan.flat % len(W)])),
            )
    pre = torch.addmm(b, x, W.T)
    flat = nonzero_positions(pre > threshold)
    return _Selected(flat, pre.view(-1).index_select(0, flat))


def _rounded(x: Float[Tensor, "n d"], low: torch.dtype) -> tuple[Tensor, Float[Tensor, "n"], Float[Tensor, "n"]]:
    """x in low precision beside three columns that are not yet filled, the norms of its rows and of what rounding took."""
    if low == torch.bfloat16 and takes(x):
        return c_rounded(x, 3)
    x_low = x.new_empty(len(x), x.shape[1] + 3, dtype=low)
    rounded = x_low[:, :-3].copy_(x)
    return x_low, x.norm(dim=1), rounded.to(x.dtype).sub_(x).norm(dim=1)


class _UpperBounds:
    """Upper bounds of pre-activations from a product in low precision; float32 values where asked.

    Where `low` is x's own precision the bounds are `tight`: the pre-activations themselves.
    """

    def __init__(self, x: Tensor, W: Tensor, b: Tensor, low: torch.dtype) -> None:
        self.x, self.W, self.b = x, W, b
        self.tight = low == x.dtype  # the product is the pre-activations themselves
        if self.tight:
            self.x_low, self.W_low, self.slack = x, W, 0.0
            self.margin = 0 * (x.sum(1) + W.sum())  # NaN where x or W is not finite
            return
        (self.x_low, x_norm, x_rest), (self.W_low, w_norm, W_rest) = (_rounded(side, low) for side in (x, W))
        b_low, columns = b.to(low), slice(x.shape[1], None)
        gamma = (x.shape[1] + 8) * 2.0**-23  # of the float32 sum in the product, and of the one in `exact`
        rho = (W_rest / w_norm.clamp_min(1e-30)).max()
        margin = x_rest + (rho * (1 + 2.0**-8) + gamma) * x_norm
        b_rest = b - b_low
        b_rest = b_rest + b_rest.abs() * 2.0**-7 + b.abs() * gamma + 1e-30
        one, up = torch.ones_like(margin), 1 + 2.0**-7  # `up` outweighs rounding to nearest
        self.x_low[:, columns] = torch.stack([margin * up, one, one], 1)
        self.W_low[:, columns] = torch.stack([w_norm * up, b_low, b_rest], 1)
        self.margin = margin * w_norm.max()
        self.slack = 2.0**-8 if low == torch.bfloat16 else 2.0**-22  # the product's own rounding, relative

    def scan(self, floor: Tensor | None, k: int = 0, expected: int = GROUP) -> "_Scan | None":
        """Every entry whose upper bound reaches `floor`: a number, or one per token (column vector); `expected` per token.

        `floor` None: a little under `start`, the k-th largest of each token's maxima over groups of latents, which is at
        most the k-th largest of its bounds. Returns None where float32 selection is cheaper, because many reach the
        floor, and where NaN makes it necessary.
        """
        found = self._by_blocks(lambda own: self._scan(own, floor, k, expected))
        if found is None:
            return None
        flats, uppers, starts = zip(*found)
        upper = torch.cat(uppers)
        start = torch.cat(starts) if floor is None else None
        return _Scan(
            torch.cat(flats), upper + upper.abs() * self.slack, start, self._under(start) if floor is None else floor
        )

    def largest_by_token(self, k: int) -> _Selected | None:
        """The k largest pre-activations of each token, found in one pass; None as for `scan`, and where one is NaN."""
        found = self._by_blocks(lambda own: self._largest_by_token(own, k))
        return None if found is None else _Selected(*(torch.cat(side) for side in zip(*found)))

    def _by_blocks[A](self, of_blocks: Callable[[list[slice]], list[A]]) -> list[A] | None:
        """What is found in blocks of tokens that fit a cache, in large problems by all threads; None where one gave up."""
        n, d_dict = len(self.x), len(self.W)
        if not (self.margin.sum() + self.b.sum()).isfinite():  # NaN compares with nothing: float32 selection shows it
            return None
        workers = min(torch.get_num_threads(), n) if n * d_dict * self.x.shape[1] >= THREADS_ABOVE else 1
        rows = -(-n // (workers * -(-n * d_dict // (workers * BLOCK))))  # as many blocks for every worker
        parts = [slice(begin, min(begin + rows, n)) for begin in range(0, n, rows)]
        workers = min(workers, len(parts))
        shares = [parts[len(parts) * i // workers : len(parts) * (i + 1) // workers] for i in range(workers)]
        found = [block for share in in_threads(of_blocks, shares) for block in share]
        return found if len(found) == len(parts) else None

    def _product(self, part: slice, room: Tensor) -> Tensor:
        """The bounds of a part of the tokens."""
        block = room[: part.stop - part.start]
        if self.tight:
            return torch.addmm(self.b, self.x_low[part], self.W_low.T, out=block)
        return torch.mm(self.x_low[part], self.W_low.T, out=block)

    def _under(self, start: Float[Tensor, "rows 1"], part: slice = slice(None)) -> Float[Tensor, "rows 1"]:
        """A floor a little under the bounds `start` of a part of the tokens."""
        return start - 2.5 * self.margin[part, None].float()

    @torch.no_grad()
    def _largest_by_token(self, parts: list[slice], k: int) -> list[tuple[Tensor, Tensor]]:
        """(positions, pre-activations) of consecutive blocks of tokens; stops early where many must be looked at."""
        found, most = [], 1.0 if self.tight else self._worth_while
        bounds = self.x_low.new_empty(parts[0].stop - parts[0].start, len(self.W))
        for part in parts:
            block = self._product(part, bounds)
            won = c_winners_by_token(block, k, self.slack, self.x[part], self.W, self.b, first=part.start,
                                     room=int(most * block.numel()))  # fmt: skip
            if won is None:
                return []
            found.append(won)
        return found

    @torch.no_grad()
    def _scan(
        self, parts: list[slice], floor: Tensor | None, k: int, expected: int
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """(positions, bounds, start) of consecutive blocks of tokens; stops early where many reach the floor."""
        d_dict, found, compiled = len(self.W), [], takes(self.x, self.W, self.b)
        bounds = self.x_low.new_empty(parts[0].stop - parts[0].start, d_dict)
        room = (parts[-1].stop - parts[0].start) * d_dict * self._worth_while
        for part in parts:
            block = self._product(part, bounds)
            if floor is None:
                even = _ordered(block)[:, : d_dict // GROUP * GROUP]
                maxima = reduce(even, "token (member group) -> token group", "max", member=GROUP)
                start = _kth_largest(maxima.view(block.dtype).float(), k)
                own = self._under(start, part)
            else:
                start, own = None, floor[part] if floor.ndim else floor
            lowered = self._lowered(own)
            if compiled and lowered.ndim == 0:
                flat, upper = c_scan(block, lowered.item(), first=part.start, expected=expected * len(block))
            else:
                flat = _reaching(block, lowered)
                flat, upper = flat + part.start * d_dict, block.view(-1).index_select(0, flat).float()
            found.append((flat, upper, start))
            room -= len(flat)
            if room < 0:
                return []
        return found

    @property
    def _worth_while(self) -> float:
        """The share of all entries above which float32 selection is cheaper."""
        return 2 * max(DENSE_SELECTION_ABOVE[self.x_low.dtype])

    def _lowered(self, floor: Tensor) -> Tensor:
        """A floor for rounded bounds that no true bound above `floor` misses."""
        return (floor - floor.abs() * 4 * self.slack).to(self.x_low.dtype)

    def exact(self, flat: Int[Tensor, "pair"]) -> Float[Tensor, "pair"]:
        layout = layout_of(flat, len(self.x), len(self.W))
        if takes(self.x, self.W, self.b):
            return c_pair_dots(self.x, layout.rows, self.W, layout.cols, self.b)
        return layout.dots(self.x, self.W) + self.b.index_select(0, layout.cols)

    def put_exact(self, pre: Float[Tensor, "found"], flat: Int[Tensor, "found"], where: Int[Tensor, "some"]) -> None:
        """Float32 values at some of the found entries, in place."""
        pre.index_copy_(0, where, self.exact(flat.index_select(0, where)))


class _Scan(NamedTuple):
    flat: Int[Tensor, "found"]  # ascending positions of all entries whose upper bound reaches `floor`
    upper: Float[Tensor, "found"]  # their upper bounds
    start: Float[Tensor, "batch 1"] | None  # bounds from which a token's float32 values are worth computing first
    floor: Float[Tensor, "*batch_1"]


def _select_in_batch(x: Tensor, W: Tensor, b: Tensor, k: int, bound: Tensor, low: torch.dtype) -> _Selected | None:
    """The k·B largest of the batch; None where float32 selection is cheaper."""
    n, bounds = k * len(x), _UpperBounds(x, W, b, low)
    floor = bound - 0.05 * bound.abs()
    scan = bounds.scan(floor, expected=2 * k) if floor > -torch.inf else None
    if scan is None or len(scan.flat) < n:  # a bad guess: take one from a sample of the tokens
        sample = torch.mm(bounds.x_low[:: max(1, len(x) // 128)], bounds.W_low.T)
        sample = (sample + b if bounds.tight else sample).flatten().float()
        rank = int(1.5 * k * len(sample) / len(W)) + 8
        scan = bounds.scan(_kth_largest(sample[None], min(rank, len(sample)))[0, 0], expected=2 * k)
    while scan is not None and len(scan.flat) >= n:
        if bounds.tight:
            return _selected(scan.flat, scan.upper, _largest_positions(scan.upper[None], n))
        first = scan.upper >= _kth_largest(scan.upper[None], min(n + n // 32, len(scan.flat)))[0, 0]
        pre = torch.full_like(scan.flat, -torch.inf, dtype=x.dtype)
        bounds.put_exact(pre, scan.flat, nonzero_positions(first))
        smallest = _kth_largest(pre[None], n)[0, 0]
        if smallest >= scan.floor:
            bounds.put_exact(pre, scan.flat, nonzero_positions((scan.upper >= smallest) & ~first))
            return _selected(scan.flat, pre, _largest_positions(pre[None], n))
        scan = bounds.scan(smallest, expected=2 * k)
    return None


def _select_by_token(x: Tensor, W: Tensor, b: Tensor, k: int, low: torch.dtype) -> _Selected | None:
    """The k largest of each token; None where float32 selection is cheaper."""
    bounds = _UpperBounds(x, W, b, low)
    if takes(x, W, b):
        return bounds.largest_by_token(k)
    scan = bounds.scan(None, k)
    while scan is not None:
        layout = layout_of(scan.flat, len(x), len(W))
        rows, nth = layout.rows, torch.arange(len(scan.flat)) - layout.row_starts.index_select(0, layout.rows)
        table = x.new_full((len(x), int(nth.max()) + 1), -torch.inf)  # the entries of a token, side by side
        place = rows * table.shape[1] + nth
        if bounds.tight:
            table.view(-1).index_copy_(0, place, scan.upper)
            return _selected(
                scan.flat, scan.upper, nonzero_positions(_largest(table, k).view(-1).index_select(0, place))
            )
        start = scan.floor if scan.start is None else scan.start
        first = scan.upper >= start[:, 0].index_select(0, rows)
        pre = x.new_full(rows.shape, -torch.inf)
        bounds.put_exact(pre, scan.flat, nonzero_positions(first))
        table.view(-1).index_copy_(0, place, pre)
        smallest = _kth_largest(table, k)
        if (smallest >= scan.floor).all():
            rest = (scan.upper >= smallest[:, 0].index_select(0, rows)) & ~first
            bounds.put_exact(pre, scan.flat, nonzero_positions(rest))
            table.view(-1).index_copy_(0, place, pre)
            return _selected(scan.flat, pre, nonzero_positions(_largest(table, k).view(-1).index_select(0, place)))
        scan = bounds.scan(smallest)
    return None


def _bounds_pay(x: Tensor, W: Tensor, k: int) -> bool:
    """Whether CUDA selects by bounds: latents are many, candidates few, and bf16 products faster than those of x."""
    many = len(W) >= 1024 and k <= len(W) // 64
    return many and x.device.type == "cuda" and x.dtype == torch.float32 and bf16_is_fast(x.device)


@torch.no_grad()
def _select_by_bounds(x: Tensor, W: Tensor, b: Tensor, k: int, flat: bool) -> tuple[Layout, Float[Tensor, "active"]]:
    """For CUDA: the largest of a static number of entries with the largest bounds, without a wait, and their layout."""
    import sparse_triton as kernels

    n, d_dict = len(x), len(W)
    bounds = kernels.triton_upper_bounds(x, W, b)
    if flat:
        candidates = kernels.triton_candidates_in_batch(bounds, k)
        pre = kernels.triton_pre_activations(x, W, b, candidates)
        ordered, order = pre.sort(descending=True, stable=True)  # NaN first, ties to the lowest
        won = order[: k * n].sort().values
        rows, cols, pre = (kept.index_select(0, won) for kept in (candidates.rows, candidates.cols, pre))
        layout = Layout(rows, cols, n, d_dict)
        layout.unproven = n - (ordered[k * n - 1] > candidates.rest).sum()
        return layout, pre
    candidates = kernels.triton_candidates_by_token(bounds, k)
    pre = kernels.triton_pre_activations(x, W, b, candidates)
    rows, cols, pre, unproven = kernels.triton_winners_by_token(candidates, pre, k)
    layout = Layout(rows, cols, n, d_dict)
    layout.row_starts = torch.arange(0, n * k + 1, k, device=x.device)
    layout.unproven = unproven.sum()
    return layout, pre


def _select_static(x: Tensor, W: Tensor, b: Tensor, k: int, flat: bool) -> _Selected:
    """For CUDA: float32 selection in which every shape is known, so that nothing synchronises."""
    pre = torch.addmm(b, x, W.T)
    mask = _largest(pre.view(1, -1), k * len(x)) if flat else _largest(pre, k)
    winners = torch.nonzero_static(mask.flatten(), size=k * len(x))[:, 0]
    return _Selected(winners, pre.view(-1).index_select(0, winners))


def _kth_largest(values: Float[Tensor, "group n"], k: int) -> Float[Tensor, "group 1"]:
    n = values.shape[1]
    if values.device.type == "cuda":
        return values.topk(k, sorted=False).values.amin(1, keepdim=True)
    return torch.from_numpy(np.partition(values.numpy(), n - k, axis=1)[:, n - k, None])


def _largest(values: Float[Tensor, "group n"], k: int) -> Bool[Tensor, "group n"]:
    """True at the k largest of each group; ties go to the lowest index. NaN is the largest, and is seen in the loss."""
    if values.device.type == "cuda":
        values = values.nan_to_num(torch.inf, torch.inf, -torch.inf)
    smallest = _kth_largest(values, k)
    if values.device.type == "cpu" and smallest.isnan().any():
        values, smallest = values.nan_to_num(torch.inf, torch.inf, -torch.inf), smallest.nan_to_num(torch.inf)
    mask = ~(values < smallest)
    if values.device.type == "cpu" and mask.sum() == k * len(values):  # no ties
        return mask
    above, equal = ~(values <= smallest), values == smallest
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True)))


def _largest_positions(values: Float[Tensor, "group n"], k: int) -> Int[Tensor, "group_k"]:
    """Ascending flat positions of the k largest of each group, as `_largest` has them."""
    if takes(values) and len(values) == 1:
        return c_largest(values[0], k)
    return nonzero_positions(_largest(values, k))


def _ordered(values: Tensor) -> Tensor:
    """bf16 as integers, which processors compare many times faster: the same order where one of a pair is positive.

    Of negative numbers the least would pass for the largest.
    """
    return values.view(torch.int16) if values.dtype == torch.bfloat16 else values


def _reaching(values: Float[Tensor, "n d_dict"], floor: Float[Tensor, "*n_1"]) -> Int[Tensor, "active"]:
    """Ascending flat positions of values ≥ floor."""
    if (floor > 0).all():
        values, floor = _ordered(values), _ordered(floor)
    if values.dtype == torch.bfloat16:
        return nonzero_positions(torch.ge(values, floor))
    return torch.from_numpy(np.flatnonzero(values.numpy() >= floor.numpy()))
