"""The Triton kernels say what plain indexing says, run by Triton's interpreter in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CHECKS = """
import torch
import sparse_encode
import sparse_ops
from sparse_triton import triton_pair_dots as pair_dots, triton_segment_sums as segment_sums

g = torch.Generator().manual_seed(0)
close = torch.testing.assert_close


def dense_segment_sums(index, starts, weights, table):
    spans = zip(starts[:-1].tolist(), starts[1:].tolist())
    return torch.stack([(weights[i:j, None] * table[index[i:j]]).sum(0) for i, j in spans])


for n, d, lengths in ((5, 3, [0, 2, 0, 40, 1, 0]), (9, 300, [17, 0, 16]), (1, 1, [0])):  # empty ones at either end
    starts = torch.tensor([0, *lengths]).cumsum(0)
    index = torch.randint(n, (sum(lengths),), generator=g)
    weights = torch.randn(sum(lengths), generator=g)
    wide = torch.randn(n, d + 4, generator=g)
    for table in (wide[:, :d].contiguous(), wide[:, 2 : d + 2], wide.T.contiguous().T[:, :d]):  # rows apart, too
        close(segment_sums(index, starts, weights, table), dense_segment_sums(index, starts, weights, table))
    close(segment_sums(index.int(), starts.int(), weights, table), dense_segment_sums(index, starts, weights, table))
    low = table.bfloat16()  # summed in float32, rounded once
    exact = dense_segment_sums(index, starts, weights, low.float()).bfloat16()
    close(segment_sums(index, starts, weights, low), exact)

for n, m, d, pairs in ((4, 6, 5, 37), (3, 2, 300, 16), (1, 1, 1, 0)):
    a, b = torch.randn(n, d, generator=g), torch.randn(m, d + 1, generator=g)[:, 1:]
    rows, cols = torch.randint(n, (pairs,), generator=g), torch.randint(m, (pairs,), generator=g)
    close(pair_dots(a, rows, b, cols), (a[rows] * b[cols]).sum(1))

# a whole step through these kernels is the step of the dense twin
sparse_ops.segment_sums = segment_sums
sparse_ops.pair_dots = lambda a, rows, starts, b, cols: pair_dots(a, rows, b, cols)
x, W, D = (torch.randn(*shape, generator=g) for shape in ((6, 5), (40, 5), (40, 7)))
b = torch.randn(40, generator=g) - 1
one, two = ([t.clone().requires_grad_() for t in (x, W, b, D)] for _ in range(2))
y = sparse_ops.decode(sparse_encode.encode_topk(*one[:3], 2), one[3])
twin = sparse_ops.dense_decode(sparse_encode.dense_encode_topk(*two[:3], 2), two[3])
close(y, twin)
y.square().sum().backward()
twin.square().sum().backward()
for ours, theirs in zip(one, two):
    close(ours.grad, theirs.grad)
print("all checks passed")
"""


SELECTION = """
import sys
sys.path.insert(0, "tests")
import torch
import sparse_encode
import sparse_triton as kernels
from kernel_twins import TWINS, _keys

g = torch.Generator().manual_seed(0)
N, D, LATENTS, K = 5, 24, 1024, 8


class Eager:  # the twin in the kernel's place
    def __init__(self, name):
        self.run = TWINS[name]

    def __getitem__(self, grid):
        return lambda *args, num_warps=4, **constants: self.run(*args, **constants)


def problem(n=N, d_dict=LATENTS, d=D):
    shapes = (n, d), (d_dict, d), (d_dict,)
    x, W, b = (torch.randn(shape, generator=g) for shape in shapes)
    return x, W / d**0.5, b / 10


# rounded rows and their bounds, by the kernels and by their twins
for x, W, b in (problem(3, 40, 13), problem(2, 33, 5), problem(1, 64, 16)):
    W[3], b[4:8] = 0.0, torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-30])
    W[5, 1], W[6, 0], x[0, 2] = torch.nan, torch.inf, 0.0
    bounds = kernels.triton_upper_bounds(x, W, b)  # the interpreter cuts bf16 off
    real = kernels._round_weights, kernels._round_inputs
    kernels._round_weights, kernels._round_inputs = Eager("_round_weights"), Eager("_round_inputs")
    torch.testing.assert_close(bounds, kernels.triton_upper_bounds(x, W, b), rtol=0.05, atol=0.05, equal_nan=True)
    kernels._round_weights, kernels._round_inputs = real
    pre, upper = x.double() @ W.double().T + b, bounds.double()
    assert ((upper + upper.abs() * 2.0**-8 >= pre) | upper.isnan() | pre.isnan()).all()
    assert (upper - pre)[pre.isfinite()].max() < 0.2 and bounds[:, 6].isnan().all() and not bounds[:, 7:].isnan().any()
kernels._round_weights = Eager("_round_weights")  # a program per latent: the interpreter takes seconds for it


def compare(x, W, b, k, proven=None):
    '''Winners of proven tokens are those of float32; returns how many tokens are unproven, by token and in the batch.'''
    want = sparse_encode._select_static(x, W, b, k, flat=False)
    bounds = kernels.triton_upper_bounds(x, W, b)
    candidates = kernels.triton_candidates_by_token(bounds, k)
    pre = kernels.triton_pre_activations(x, W, b, candidates)
    capacity, keys = len(pre) // len(x), _keys(bounds.view(torch.int16))
    largest = keys.sort(dim=1, descending=True, stable=True).indices[:, :capacity].sort(dim=1).values
    assert torch.equal(candidates.cols.view(-1, capacity), largest) and capacity >= 2 * k
    rows, cols, won, unproven = kernels.triton_winners_by_token(candidates, pre, k)
    assert torch.equal(rows, torch.arange(len(x)).repeat_interleave(k)) and cols.min() >= 0
    assert (cols.view(-1, k).diff() > 0).all()
    wrong = (cols.view(-1, k) != (want.flat % len(W)).view(-1, k)).any(1)
    assert not (wrong & (unproven == 0)).any(), f"{wrong=} {unproven=}"
    right = ~wrong.repeat_interleave(k)
    torch.testing.assert_close(won[right], want.pre[right], rtol=1e-4, atol=1e-5, equal_nan=True)
    layout, pre = sparse_encode._select_by_bounds(x, W, b, k, flat=False)
    assert torch.equal(layout.cols, cols) and torch.equal(layout.row_starts, torch.arange(len(x) + 1) * k)
    assert layout.unproven == unproven.sum() and torch.equal(pre.isnan(), won.isnan())
    want = sparse_encode._select_static(x, W, b, k, flat=True)
    layout, pre = sparse_encode._select_by_bounds(x, W, b, k, flat=True)
    flat = layout.rows * len(W) + layout.cols
    assert len(flat) == k * len(x) and (flat.diff() > 0).all()
    if layout.unproven == 0:
        assert torch.equal(flat, want.flat)
        torch.testing.assert_close(pre, want.pre, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(pre.isnan().any(), want.pre.isnan().any())
    found = int(unproven.sum()), int(layout.unproven)
    assert proven is None or found == (0, 0) or not proven, found
    return found


compare(*problem(), K, proven=True)
compare(*problem(1, 1500), 16, proven=True)  # one token; latents that are no power of two
compare(*problem(3), 1, proven=True)
compare(*problem(2, 2050), 32, proven=True)
x, W, b = problem()
compare(x.T.contiguous().T, torch.cat([W, W], 1)[:, :D], b, K, proven=True)  # rows apart
x[1] = 100 * x[1]  # nearly all the batch's winners are of one token
x[3] = 0.0
compare(x, W, b, K)
assert sparse_encode._select_by_bounds(x, W, b, 16, flat=True)[0].rows.bincount(minlength=N)[1] > 3 * 16

# more latents than a program holds, counts and numbers at a time; more candidates than it writes at a time
sizes = {name: getattr(kernels, name) for name in ("HELD", "TILE", "NUMBERED", "WIDTH")}
for name, size in (("HELD", 256), ("TILE", 64), ("NUMBERED", 128), ("WIDTH", 16)):
    setattr(kernels, name, size)
compare(*problem(2, 1100), 17, proven=True)
x, W, b = (t.mul(2).round().clamp(-2, 2) for t in problem(2, 2100))
compare(x, W, b, 20)
for name, size in sizes.items():
    setattr(kernels, name, size)
compare(*problem(1, 4500), 70, proven=True)

# ties, of exact products: the lowest latent wins, and where bounds cannot tell them apart it is said
x, W, b = (t.mul(2).round().clamp(-2, 2) for t in problem())
compare(x, W, b, K)
flat = torch.zeros(N, D), torch.zeros(LATENTS, D), torch.zeros(LATENTS)
layout, _ = sparse_encode._select_by_bounds(*flat, K, flat=False)
assert torch.equal(layout.cols.view(N, K), torch.arange(K).expand(N, K)) and layout.unproven == N
layout, _ = sparse_encode._select_by_bounds(*flat, K, flat=True)
assert torch.equal(layout.rows * LATENTS + layout.cols, torch.arange(N * K)) and layout.unproven == N

# pre-activations closer than bounds are sharp: few are proven, and those rightly
x, W, b = problem()
b.zero_()[5] = 100.0  # the largest winner is above every bound left out
unproven = compare(x, W[:1] + 1e-4 * W, b, K)
assert unproven[0] > 0 and unproven[1] > 0, unproven

# what is not finite is seen
for place in (0, LATENTS - 1):
    for value in (torch.nan, -torch.nan, torch.inf):
        for i in range(3):
            tensors = problem(2)
            tensors[i].view(-1)[place if i == 2 else -1 if place else 0] = value
            layouts = [sparse_encode._select_by_bounds(*tensors, K, flat=flat) for flat in (False, True)]
            dense = [sparse_encode._select_static(*tensors, K, flat=flat) for flat in (False, True)]
            for (layout, pre), want in zip(layouts, dense):
                assert pre.isfinite().all() == want.pre.isfinite().all(), (place, value, i, pre, want.pre)
x, W, b = problem(2)
b[::3] = -torch.inf
compare(x, W, b, K, proven=True)
print("all checks passed")
"""


@pytest.mark.parametrize("checks", [CHECKS, SELECTION], ids=["sums", "selection"])
def test_kernels_are_plain_indexing_in_the_interpreter(checks: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    folder = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", checks], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "all checks passed" in run.stdout, run.stderr
