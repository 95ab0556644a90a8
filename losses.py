"""Pure functions that compare what a model gave with what it should have given.

Coders:   FVU = Σ‖y − ŷ‖² / (N · E‖y − ȳ‖²),   ȳ and the denominator from a large sample, not from the batch
AuxK:     FVU of ŷ + αê, ŷ a constant, ê = decode(dead latents) without b_dec, α in [0, 1] the best for each token
Output:   CE = −log q(next token),  KL(p‖q) = Σ_v p_v (log p_v − log q_v)
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from config import Lp, SmoothL0
from sparse_c import c_squared_residuals


def wide(x: Tensor) -> Tensor:
    """In float32 or, where it already is, in float64."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------------------------------------------------------------ reconstruction


def fvu(
    y: Float[Tensor, "*layer batch d_out"],
    y_hat: Float[Tensor, "*layer batch d_out"],
    variance: Float[Tensor, "*layer"],
) -> Float[Tensor, "*layer"]:
    """Fraction of variance unexplained, per layer. `variance` = E‖y − ȳ‖² per token, from a large sample."""
    if (squares := c_squared_residuals(y, y_hat)) is not None:
        return squares.sum(-1) / (y.shape[-2] * variance)
    errors = F.mse_loss(wide(y_hat), wide(y), reduction="none")  # one pass over memory, and one in its gradient
    return errors.sum((-1, -2)) / (y.shape[-2] * variance)


def auxk(
    y: Float[Tensor, "*layer batch d_out"],
    y_hat: Float[Tensor, "*layer batch d_out"],
    *,
    e_hat: Float[Tensor, "*layer batch d_out"],
    variance: Float[Tensor, "*layer"],
) -> Float[Tensor, "*layer"]:
    """The FVU that were left if the dead latents wrote ê too, shortened at each token to where it helps most.

        Σ min over 0 ≤ α ≤ 1 of ‖e − αê‖² / (N · variance),   e = y − ŷ, without gradient

    The idea is OpenAI's (arXiv 2406.04093), where α = 1 and ê, unbounded, can be many times e. With the best α the term is
    at most the FVU, and its gradient at a token of ê, −2α(e − αê), at most as long as the FVU's at that token of ŷ, 2e.
    """
    if (squares := c_squared_residuals(y, e_hat, y_hat)) is not None:
        return squares.sum(-1) / (y.shape[-2] * variance)
    e = (y - y_hat).detach()
    along, square = (e * e_hat.detach()).sum(-1, keepdim=True), e_hat.detach().square().sum(-1, keepdim=True)
    alpha = torch.where(along < square, along.clamp_min(0) / square, 1.0)  # 1 at ê = 0, so that it can grow
    return fvu(e, alpha * e_hat, variance)


# ------------------------------------------------------------------------------------------------ language models


def cross_entropy(
    logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq-1"]:
    """−log q(tokens[t+1]) at every position but the last, in nats."""
    predicted = rearrange(logits[:, :-1], "batch seq vocab -> (batch seq) vocab").float()
    flat = F.cross_entropy(predicted, rearrange(tokens[:, 1:], "batch seq -> (batch seq)"), reduction="none")
    return rearrange(flat, "(batch seq) -> batch seq", batch=len(tokens))


def kl_divergence(
    logits_p: Float[Tensor, "*batch vocab"], logits_q: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p‖q) per position, in nats; p is the original model."""
    log_p, log_q = wide(logits_p).log_softmax(-1), wide(logits_q).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class Original(NamedTuple):
    """The original model's prediction at every position: what a replaced model's is compared with, many times over."""

    p: Float[Tensor, "batch seq vocab"]  # softmax of the logits
    negentropy: Float[Tensor, "batch seq"]  # Σ p log p
    ce: Float[Tensor, "batch"]  # each sequence's mean cross-entropy, in nats

    @staticmethod
    def of(logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"]) -> "Original":
        p, parts = torch.empty_like(logits, dtype=torch.float32), []
        for part in _cached(logits):
            log_p = logits[part].float().log_softmax(-1)
            torch.exp(log_p, out=p[part])
            parts.append((torch.linalg.vecdot(p[part], log_p), _sequence_ce(log_p, tokens[part])))
        return Original(p, *(torch.cat(kept) for kept in zip(*parts)))


def _cached(logits: Float[Tensor, "batch seq vocab"]) -> list[slice]:
    """Sequences at a time, whose logits stay in a CPU's cache."""
    at_once = max(1, (2**20 if logits.device.type == "cpu" else 2**25) // logits[0].numel())
    return [slice(i, i + at_once) for i in range(0, len(logits), at_once)]


def _sequence_ce(log_p: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch"]:
    """− log p of the next token, averaged over each sequence."""
    return -log_p[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].double().mean(1)


def sequence_losses(
    original: Original, logits: Float[Tensor, "batch seq vocab"], tokens: Int[Tensor, "batch seq"]
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Each sequence's mean of `cross_entropy` and of `kl_divergence`, faster: one exponential per logit, KL 0 where q is p.

    KL = Σ p log p − Σ p log q.
    """
    ce, kl = [], []
    for part in _cached(logits):
        log_q = logits[part].float().log_softmax(-1)
        ce.append(_sequence_ce(log_q, tokens[part]))
        kl.append((original.negentropy[part] - torch.linalg.vecdot(original.p[part], log_q)).double().mean(1))
    return torch.cat(ce), torch.cat(kl)


Head = Callable[[Float[Tensor, "row d"]], Float[Tensor, "row vocab"]]


@torch.no_grad()
def log_probabilities(hidden: Float[Tensor, "batch seq d"], head: Head) -> Float[Tensor, "token vocab"]:
    """log softmax(head(hidden)) of every token; logits exist for a few tokens at a time."""
    flat, vocab = hidden.flatten(0, -2), _width(hidden, head)
    log_p = wide(flat).new_empty(len(flat), vocab)
    rows = _rows_at_once(vocab, hidden.device)
    for part, out in zip(flat.split(rows), log_p.split(rows)):
        torch.log_softmax(wide(head(part)), -1, out=out)
    return log_p


def _width(hidden: Tensor, head: Head) -> int:
    return head(hidden.detach().flatten(0, -2)[:1]).shape[-1]


def _rows_at_once(vocab: int, device: torch.device) -> int:
    """Tokens whose logits stay in a CPU's cache, or are worth a call of a GPU, but enough for a matrix product."""
    return max(64, (2**20 if device.type == "cpu" else 2**25) // vocab)


class _KLThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, log_p: Tensor, head: Head) -> Tensor:  # type: ignore[no-untyped-def,override]
        rows, flat = _rows_at_once(log_p.shape[-1], hidden.device), hidden.flatten(0, -2)
        grad, total = torch.empty_like(flat), log_p.new_zeros(())
        for h, of_p, g in zip(flat.split(rows), log_p.split(rows), grad.split(rows)):
            with torch.enable_grad():
                own = h.detach().requires_grad_()
                logits = head(own)
            log_q, p = wide(logits.detach()).log_softmax(-1), of_p.exp()
            total += (p * (of_p - log_q)).sum()
            (d_h,) = torch.autograd.grad(logits, own, (log_q.exp_() - p).div_(len(flat)).to(logits.dtype))
            g.copy_(d_h)
        ctx.save_for_backward(grad)
        ctx.shape = hidden.shape
        return total / len(flat)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def,override]
        return (ctx.saved_tensors[0] * grad).view(ctx.shape), None, None


def kl_through_head(
    log_p: Float[Tensor, "token vocab"], hidden: Float[Tensor, "batch seq d"], head: Head
) -> Float[Tensor, ""]:
    """KL(p‖q) with q = softmax(head(hidden)), mean over tokens, in nats; gradient in `hidden` alone.

    Logits of q and their gradient exist for a few tokens at a time, so that of all that is as wide as the vocabulary only
    log p is held. Memory of that width, in bytes: 4 · vocab · (tokens + 6 · tokens at a time); the 6 are logits, their
    gradient and what lies between.
    """
    return _KLThroughHead.apply(hidden, log_p, head)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------- stochastic parameter decomposition
# Where tensors carry a leading `stack` axis (one toy, several seeds), each loss is the sum of the seeds' own losses, so
# that every seed trains as it would alone.


def faithfulness(deltas: Mapping[str, Float[Tensor, "*stack d_in d_out"]]) -> Float[Tensor, ""]:
    """Σ_l ‖Δ_l‖²_F / Σ_l numel(W_l)."""
    numel = sum(delta.shape[-2] * delta.shape[-1] for delta in deltas.values())
    return torch.stack([delta.square().sum() for delta in deltas.values()]).sum() / numel


def relative_faithfulness(
    deltas: Mapping[str, Float[Tensor, "*stack d_in d_out"]], weights: Mapping[str, Float[Tensor, "*stack d_in d_out"]]
) -> Float[Tensor, ""]:
    """Mean over the matrices of ‖Δ_l‖²_F / ‖W_l‖²_F: every matrix counts alike, whatever its size (SPEC.md S17)."""
    shares = [
        (delta.square().sum((-2, -1)) / weights[path].square().sum((-2, -1))).sum() for path, delta in deltas.items()
    ]
    return torch.stack(shares).mean()


def annealed(ends: tuple[float, float], between: tuple[float, float], progress: float) -> float:
    """The first value before, the second after, and on the line between the two fractions of training."""
    first, last = between
    share = min(1.0, max(0.0, (progress - first) / max(last - first, 1e-12)))
    return ends[0] + (ends[1] - ends[0]) * share


def importance_cost(
    g_up: Float[Tensor, "*batch"], minimality: Lp | SmoothL0, progress: float
) -> Float[Tensor, "*batch"]:
    """What an importance costs at this fraction of training: (g_up + 1e-12)^p, or ψ(g) = g² / (g² + γ²) of smooth L0.

    |ψ′| ≤ 0.65/γ with its peak at γ/√3: the pull is bounded and sits at small gates, where that of g^p grows without bound.
    goodfire-ai/param-decomp, docs/smooth_l0_importance_minimality.md.
    """
    if isinstance(minimality, Lp):
        return (g_up + 1e-12).pow(annealed(minimality.p, minimality.between, progress))
    square, width = g_up.square(), annealed(minimality.gamma, minimality.between, progress) ** 2
    return square / (square + width) * (1 + width if minimality.normalise_at_one else 1.0)


def frequency_cost(
    f: Float[Tensor, "*stack component"], mean: Float[Tensor, "*stack component"], positions: float
) -> Float[Tensor, ""]:
    """Φ(f̄) = Σ_c f̄_c log₂(1 + a f̄_c) of an average f̄ over many steps, with the gradient Φ′(f̄) · ∂f of this step's f.

    a = `positions`. Φ is convex, so that Φ of one batch's f would cost rare components too much, the more so the smaller
    the batch (goodfire-ai/param-decomp, SPEC.md S8″).
    """
    count = positions * mean
    slope = torch.log2(1 + count) + count / ((1 + count) * math.log(2))
    return (mean * torch.log2(1 + count) + slope * (f - f.detach())).sum()


def locality(weights: Float[Tensor, "component unit"], t: float) -> Float[Tensor, "component"]:
    """On how many units each component lies, softly: Σ_u f_u / (f_u + t/N) with f_u = w_u² / ‖w‖², N units.

    On m units in equal shares: m / (1 + t m/N). `weights`: rows of U where units are written, columns of V where they are
    read (goodfire-ai/param-decomp, SPEC.md S36).
    """
    square = weights.square()
    share = square / square.sum(-1, keepdim=True)
    return (share / (share + t / weights.shape[-1])).sum(-1)


def squared_error(target: Float[Tensor, "*batch"], prediction: Float[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """Σ (target − prediction)² / numel."""
    return F.mse_loss(prediction, target)


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_p: Tensor, logits_q: Tensor, rows: int) -> Tensor:  # type: ignore[no-untyped-def,override]
        p_flat, q_flat = (rearrange(logits, "... vocab -> (...) vocab") for logits in (logits_p, logits_q))
        grad, total = torch.empty_like(q_flat), torch.zeros((), device=q_flat.device)
        for p, q, g in zip(p_flat.split(rows), q_flat.split(rows), grad.split(rows)):
            log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            prob = log_p.exp()
            total += (prob * (log_p - log_q)).sum()
            g.copy_((log_q.exp_() - prob) / len(q_flat))
        ctx.save_for_backward(grad)
        ctx.shape = logits_q.shape
        return total / len(q_flat)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[no-untyped-def,override]
        return None, (ctx.saved_tensors[0] * grad).view(ctx.shape), None


def mean_kl(
    logits_p: Float[Tensor, "*batch vocab"], logits_q: Float[Tensor, "*batch vocab"], rows: int = 256
) -> Float[Tensor, ""]:
    """KL(p‖q), mean over positions, in nats; gradient in q only. Chunked over positions, `rows` at a time: the fp32
    vocabulary-wide temporaries exist for one chunk only, and the gradient (q − p)/N is written in the same pass."""
    return _ChunkedKL.apply(logits_p, logits_q, rows)  # type: ignore[no-any-return]
