"""The sparse operations say what their dense twins say, in values and in gradients."""

import torch

import sparse_ops as ops


def test_first():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=g)
    W = torch.randn(32, 8, generator=g)
    b = torch.randn(32, generator=g)
    pre = x @ W.T + b
    for codes, k in ((ops.encode_topk(x, W, b, 3), 3), (ops.encode_batch_topk(x, W, b, 3, torch.tensor(-torch.inf)), 3)):
        assert len(codes.values) == k * 16
        torch.testing.assert_close(codes.values, pre[codes.rows, codes.cols].relu())
        torch.testing.assert_close(ops.decode(codes, W), ops.to_dense(codes) @ W)
