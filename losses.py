"""Pure functions that compare what a model gave with what it should have given.

Coders:   FVU = Σ‖y − ŷ‖² / (N · E‖y − ȳ‖²),   ȳ and the denominator from a large sample, not from the batch
AuxK:     ‖e − ê‖² / ‖e − ē‖² with e = stop_gradient(y − ŷ), ê = decode(top dead latents) without b_dec
Output:   CE = −log q(next token),  KL(p‖q) = Σ_v p_v (log p_v − log q_v)
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# ------------------------------------------------------------------------------------------------ reconstruction


def fvu(
    y: Float[Tensor, "*layer batch d_out"], y_hat: Float[Tensor, "*layer batch d_out"], variance: Float[Tensor, "*layer"]
) -> Float[Tensor, "*layer"]:
    """Fraction of variance unexplained, per layer. `variance` = E‖y − ȳ‖² per token, from a large sample."""
    return (y - y_hat).float().square().sum(-1).mean(-1) / variance


def auxk(e: Float[Tensor, "batch d_out"], e_hat: Float[Tensor, "batch d_out"]) -> Float[Tensor, ""]:
    """How badly the dead latents explain the residual (1 = not at all); the residual carries no gradient.

    OpenAI's AuxK (arXiv 2406.04093) with sparsify's normalisation; 0 where the residual has no variance.
    """
    e = e.detach()
    variance = (e - e.mean(0)).square().sum()
    return torch.where(variance > 0, (e - e_hat).square().sum() / variance.clamp_min(1e-30), 0.0)


# ------------------------------------------------------------------------------------------------ language models


def cross_entropy(logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq-1"]:
    """−log q(tokens[t+1]) at every position but the last, in nats."""
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)


def kl_divergence(
    logits_p: Float[Tensor, "*batch vocab"], logits_q: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p‖q) per position, in nats; p is the original model."""
    log_p, log_q = logits_p.float().log_softmax(-1), logits_q.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
