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


def test_kernels_are_plain_indexing_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    folder = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", CHECKS], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "all checks passed" in run.stdout, run.stderr
