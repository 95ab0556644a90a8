"""Derivatives of many outputs by one input per sample, and how alike two of them are."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patching import patched
from target_models import TargetModel

MLP = Callable[[Float[Tensor, "sample 1 d_in"]], Float[Tensor, "sample 1 d_out"]]


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


def local_jacobian(mlp: MLP, x: Float[Tensor, "sample 1 d_in"]) -> Float[Tensor, "sample d_out d_in"]:
    """Derivative of one token's MLP output by its input."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        return jacobian(mlp(x)[:, 0], x)


def logit_jacobian(
    target: TargetModel, mlp: MLP, tokens: Int[Tensor, "sample seq"], *, layer: int, top: Int[Tensor, "sample 10"]
) -> Float[Tensor, "sample 10 d_in"]:
    """Derivative of chosen logits by the input of the last token's MLP; the stream around it stays as it is."""
    shift = torch.zeros(len(tokens), 1, target.d_model, device=tokens.device, requires_grad=True)

    def last(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[:, :-1], mlp(x[:, -1:].detach() + shift)], dim=1)

    with torch.enable_grad(), patched(target, {layer: last}):
        logits = target.logits(tokens)[:, -1].gather(1, top)
    return jacobian(logits, shift)
