"""Derivatives of many outputs by one input per sample, and how alike two of them are."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def jacobian(out: Float[Tensor, "sample m"], x: Float[Tensor, "sample 1 d"]) -> Float[Tensor, "sample m d"]:
    """∂out/∂x of each sample; samples do not see each other."""
    zero = torch.zeros_like(x)
    if not out.requires_grad:  # a constant, such as the mean
        return zero.expand(-1, out.shape[1], -1)
    rows = [torch.autograd.grad(o.sum(), x, retain_graph=True, allow_unused=True)[0] for o in out.unbind(1)]
    return torch.stack([(zero if row is None else row)[:, 0] for row in rows], dim=1)


def cosines(a: Float[Tensor, "sample m d"], b: Float[Tensor, "sample m d"]) -> list[float]:
    """Cosine of the two matrices of each sample, flattened."""
    return nn.functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1).tolist()
