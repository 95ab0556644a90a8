"""The sparsity rules: an encoder class for each, which holds the rule's own parameters and says what is active.

    pre = x W_encᵀ + b_enc
    Relu       a = relu(pre)                                     penalty l1 · Σ a ‖W_dec‖
    TopK       a = relu(pre) at the k largest of each token
    BatchTopK  a = relu(pre) at the k·B largest of the batch     deployed: a = pre · [pre > θ], one θ
    JumpReLU   a = pre · [pre > θ], a θ per latent               penalty l0 · Σ [pre > θ] + preact · Σ relu(θ − pre) ‖W_dec‖
    Gated      a = [pre > 0] · relu(e^r ⊙ (pre − b_enc) + b_mag) penalty l1 · Σ relu(pre) ‖W_dec‖ + FVU of ŷ(relu(pre))

Straight-through gradients of JumpReLU (arXiv 2407.14435, eqs. 11–12), K the rectangle of width 1 and ε the bandwidth:

    ∂a/∂θ = −(θ/ε) K((pre − θ)/ε),   ∂[pre > θ]/∂θ = −(1/ε) K((pre − θ)/ε),   ∂·/∂log θ = θ ∂·/∂θ

Pre-activations are in scaled units: coders hand over x with E‖x‖ = √d_in. A BatchTopK code of a deployed coder never
depends on the token's neighbours, since θ is a buffer: a running mean of each batch's smallest winner in training
(decay 0.99), set on held-out tokens at the end so that the mean L0 is k.

A new rule is a value in config.py, an encoder class here with its row in ENCODERS, and the name of its SAE and transcoder.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from config import BatchTopK, Gated, JumpReLU, Relu, Rule, TopK
from parallel import ALONE, Ranks
from sparse_encode import encode_batch_topk, encode_threshold, encode_topk
from sparse_ops import Codes, fire_counts, from_dense

THRESHOLD_DECAY = 0.99  # per training batch
AUX_SHARE = 0.01  # of a batch's tokens: those at which AuxK holds a dead latent active


class TrainingCodes(NamedTuple):
    """What an encoder says of a training batch."""

    codes: Codes
    penalty: Float[Tensor, ""]  # per token
    gates: Codes | None = (
        None  # codes from which a frozen decoder must rebuild the target as well; None: none asks for it
    )


class SparseEncoder[R](nn.Module, ABC):
    """x ↦ codes: W_enc, b_enc, a rule R with its state, and the counters that tell dead latents.

    Subclasses define `encode`, and whatever their rule has of penalty, threshold, calibration and a k.
    """

    k: int | None = None  # active latents per token that the rule asks for; None where it has no such number
    ranks: Ranks = ALONE  # the processes that train it together

    def __init__(self, W_enc: Float[Tensor, "d_dict d_in"], rule: R) -> None:
        super().__init__()
        self.rule = rule
        self.W_enc = nn.Parameter(W_enc)
        self.b_enc = nn.Parameter(W_enc.new_zeros(len(W_enc)))
        self.register_buffer("tokens_since_fired", torch.zeros(len(W_enc), dtype=torch.int64))
        self.register_buffer("unproven", torch.zeros((), dtype=torch.int64), persistent=False)
        self.n_dead = 0  # at the last count; AuxK works on so many latents

    @property
    def d_dict(self) -> int:
        return self.W_enc.shape[0]

    def pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_dict"]:
        return torch.addmm(self.b_enc, x, self.W_enc.T)

    @abstractmethod
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """The training face in train mode, the deployed face in eval mode."""

    def encode_with_penalty(
        self, x: Float[Tensor, "batch d_in"], W_dec: Float[Tensor, "d_dict targets_d_out"]
    ) -> TrainingCodes:
        """The training face and the rule's penalty, which weighs a latent by ‖W_dec‖ (over all targets of a CLT)."""
        return TrainingCodes(self.encode(x), x.new_zeros(()))

    def centre(self, mean: Float[Tensor, "d_in"]) -> None:
        """Set the biases so that pre-activations are zero at the mean input: b_enc = −W_enc E[x] (as sparsify does)."""
        self.b_enc.copy_(-(self.W_enc @ mean))

    @property
    def deployed_threshold(self) -> Float[Tensor, ""] | Float[Tensor, "d_dict"] | None:
        """θ above which a pre-activation is active when deployed; None where the rule has no θ."""
        return None

    def load_threshold(self, theta: Float[Tensor, "d_dict"]) -> None:
        """Deploy at these thresholds, one per latent."""
        raise AssertionError(f"{self.rule} has no threshold")

    @property
    def magnitude(self) -> tuple[Float[Tensor, "d_dict"], Float[Tensor, "d_dict"]] | None:
        """(r, b) where an active latent has the value relu(e^r ⊙ (x W_encᵀ) + b); None where it has its pre-activation."""
        return None

    def load_magnitude(self, r: Float[Tensor, "d_dict"], b: Float[Tensor, "d_dict"]) -> None:
        raise AssertionError(f"{self.rule} has no magnitudes beside its pre-activations")

    def calibrate(self, batches: Iterable[Float[Tensor, "batch d_in"]]) -> None:
        """Set what deployment needs from held-out, scaled tokens; only BatchTopK needs anything."""

    def set_k(self, k: int) -> None:
        """Train with k active latents from now on, while k is annealed."""
        raise AssertionError(f"{self.rule} has no k to anneal")

    def with_top_k(self, k: int) -> "SparseEncoder[Any]":
        """An encoder of the same tensors whose codes are each token's k largest positive pre-activations."""
        return self._shared_with(TopKEncoder(self.W_enc, TopK(k)))

    def values_at(self, x: Float[Tensor, "batch d_in"], active: Codes) -> Codes:
        """What the active latents of these codes are worth on x: as many of them, or fewer where one falls to zero."""
        r, b = self.magnitude or (torch.zeros_like(self.b_enc), self.b_enc)
        linear = active.layout.dots(x, self.W_enc)
        values = (r.exp()[active.cols] * linear + b[active.cols]).relu()
        return active._replace(values=torch.where(active.values != 0, values, 0.0))

    def with_least(self, least: Float[Tensor, "d_dict"]) -> "SparseEncoder[Any]":
        """An encoder of the same tensors whose latents are active where their pre-activation exceeds their own `least`."""
        assert self.magnitude is None, f"{self.rule}: what a latent adds is not its pre-activation"
        view = self._shared_with(JumpReLUEncoder(self.W_enc, JumpReLU(l0=0.0)))
        view.log_theta = nn.Parameter(log_threshold(least), requires_grad=False)
        return view

    def _shared_with[E: "SparseEncoder[Any]"](self, view: E) -> E:
        """The view, holding this encoder's own tensors wherever it has one of that name."""
        names = {name for name, _ in chain(view.named_parameters(), view.named_buffers())}
        for name, tensor in chain(self.named_parameters(), self.named_buffers()):
            if name in names:
                setattr(view, name, tensor)
        return view.train(self.training)

    @torch.no_grad()
    def update_statistics(self, codes: Codes) -> None:
        """Advance the counters by one training batch."""
        fired, n_tokens = self.ranks.fired(fire_counts(codes) > 0, codes.n_rows)
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired.masked_fill_(fired, 0)
        if codes.layout.unproven is not None:
            self.unproven += codes.layout.unproven

    @property
    def step_shape(self) -> tuple[int, ...]:
        """What decides the shapes within a training step."""
        return (self.n_dead,)

    def count_dead(self, dead_after: int) -> None:
        """Count the latents that were silent for `dead_after` tokens (synchronises the device)."""
        self.n_dead = int((self.tokens_since_fired >= dead_after).sum())

    def aux_activations(
        self, x: Float[Tensor, "batch d_in"], dead_after: int
    ) -> tuple[Float[Tensor, "batch dead"], Int[Tensor, "dead"]]:
        """(a, dead): the latents that were silent for longest, each as if it were active at its own largest tokens.

            a = (pre − min(θ, 0)) · [pre > θ],   θ, a constant, is exceeded at AUX_SHARE of the batch's tokens, a θ per latent

        So a ≥ 0, as of a live latent: with signs, one that fell silent far below zero would write many times the residual,
        and rectified, it would get no gradient. Who has fired since the last count is left out, and nothing synchronises.
        """
        silence, dead = self.tokens_since_fired.topk(self.n_dead)
        pre = torch.addmm(self.b_enc[dead, None], self.W_enc[dead], x.T)
        theta = pre.detach().topk(math.ceil(AUX_SHARE * len(x)) + 1, dim=1).values[:, -1:]
        active = (pre > theta) & (silence >= dead_after)[:, None]
        return ((pre - theta.clamp(max=0)) * active).T, dead


# ------------------------------------------------------------------------------------------------------------------ Relu


class ReluEncoder(SparseEncoder[Relu]):
    """a = relu(pre), with an L1 penalty."""

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        return encode_threshold(x, self.W_enc, self.b_enc, self.b_enc.new_zeros(()))

    def encode_with_penalty(
        self, x: Float[Tensor, "batch d_in"], W_dec: Float[Tensor, "d_dict targets_d_out"]
    ) -> TrainingCodes:
        a, norms = self.pre_activations(x).relu(), W_dec.norm(dim=1)
        return TrainingCodes(from_dense(a, a.detach() > 0), self.rule.l1 * (a @ norms).mean())


# ------------------------------------------------------------------------------------------------------ TopK, BatchTopK


def check_k(k: int, d_dict: int) -> None:
    """k ≤ d_dict; raises ValueError with the value and the remedy."""
    if k > d_dict:
        raise ValueError(f"k={k} exceeds d_dict={d_dict}: choose a smaller k or a larger dictionary")


class _Counted[R: TopK | BatchTopK](SparseEncoder[R]):
    """A rule with a number of active latents, which training anneals."""

    def __init__(self, W_enc: Float[Tensor, "d_dict d_in"], rule: R) -> None:
        super().__init__(W_enc, rule)
        check_k(rule.k, self.d_dict)
        self.k = self.k_now = rule.k
        self.most = self.d_dict

    def set_k(self, k: int) -> None:
        self.k_now = min(k, self.most)

    @property
    def step_shape(self) -> tuple[int, ...]:
        return self.n_dead, self.k_now


class TopKEncoder(_Counted[TopK]):
    """a = relu(pre) at the k largest of each token."""

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        return encode_topk(x, self.W_enc, self.b_enc, self.k_now if self.training else self.rule.k, self.ranks)


class BatchTopKEncoder(_Counted[BatchTopK]):
    """a = relu(pre) at the k·B largest of the batch; deployed, above one threshold."""

    def __init__(self, W_enc: Float[Tensor, "d_dict d_in"], rule: BatchTopK) -> None:
        super().__init__(W_enc, rule)
        self.register_buffer("threshold", torch.tensor(-torch.inf))
        self.register_buffer("smallest_winner", torch.tensor(-torch.inf), persistent=False)  # of the last batch

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        if self.training:
            return encode_batch_topk(x, self.W_enc, self.b_enc, self.k_now, self.smallest_winner, self.ranks)
        return encode_threshold(x, self.W_enc, self.b_enc, self.threshold)

    @property
    def deployed_threshold(self) -> Float[Tensor, ""]:
        return self.threshold

    def load_threshold(self, theta: Float[Tensor, "d_dict"]) -> None:
        self.threshold.copy_(theta[0])

    @torch.no_grad()
    def update_statistics(self, codes: Codes) -> None:
        """Advance the counters by one training batch, and the running threshold."""
        super().update_statistics(codes)
        self.smallest_winner.copy_(self.ranks.smallest(smallest_positive(codes)))
        moved = self.threshold.lerp(self.smallest_winner, 1 - THRESHOLD_DECAY)
        self.threshold.copy_(torch.where(self.threshold.isfinite(), moved, self.smallest_winner))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "batch d_in"]]) -> None:
        """Set the threshold so that these (held-out, scaled) tokens have k active latents on average."""
        k, n_tokens, largest, smallest = self.rule.k, 0, [], torch.full_like(self.threshold, -torch.inf)
        for x in batches:  # twice k per batch leaves room for batches that hold more than their share of winners
            codes = encode_batch_topk(x, self.W_enc, self.b_enc, min(2 * k, self.d_dict), smallest)
            smallest = smallest_positive(codes)
            largest.append(codes.values)
            n_tokens += len(x)
        assert n_tokens > 0, "calibration needs at least one batch of held-out tokens"
        found, n_tokens = self.ranks.pooled(torch.cat(largest), n_tokens)
        self.threshold.copy_(found.topk(k * n_tokens).values[-1].clamp_min(0))


def smallest_positive(codes: Codes) -> Float[Tensor, ""]:
    """The smallest value above zero; 0 where there is none."""
    values = codes.values.detach()
    smallest = values.masked_fill(values <= 0, torch.inf).amin()
    return torch.where(smallest.isfinite(), smallest, 0.0)


# -------------------------------------------------------------------------------------------------------------- JumpReLU


class _JumpReLU(torch.autograd.Function):
    """(a, gate) = (pre · [pre > θ], [pre > θ]) with the straight-through gradients above."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, log_theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        theta = log_theta.exp()
        gate = (pre > theta).to(pre.dtype)
        ctx.save_for_backward(pre, theta, gate)
        ctx.bandwidth = bandwidth
        return pre * gate, gate

    @staticmethod
    def backward(ctx: Any, grad_a: Tensor, grad_gate: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        pre, theta, gate = ctx.saved_tensors
        kernel = ((pre - theta).abs() < ctx.bandwidth / 2).to(pre.dtype)
        d_theta = -(kernel * (theta * grad_a + grad_gate)).sum(0) / ctx.bandwidth
        return grad_a * gate, d_theta * theta, None


def jumprelu(
    pre: Float[Tensor, "batch d_dict"], log_theta: Float[Tensor, "d_dict"], bandwidth: float
) -> tuple[Float[Tensor, "batch d_dict"], Float[Tensor, "batch d_dict"]]:
    """(a, gate): activations and the 0/1 gate, both differentiable in log θ."""
    return _JumpReLU.apply(pre, log_theta, bandwidth)  # type: ignore[no-any-return]


def log_threshold(theta: Tensor) -> Tensor:
    """log θ; zero and below become the smallest normal number, which lets the same pre-activations through."""
    return theta.clamp_min(torch.finfo(torch.float32).tiny).log()


class JumpReLUEncoder(SparseEncoder[JumpReLU]):
    """a = pre · [pre > θ] with a learnt θ per latent."""

    def __init__(self, W_enc: Float[Tensor, "d_dict d_in"], rule: JumpReLU) -> None:
        super().__init__(W_enc, rule)
        self.log_theta = nn.Parameter(torch.full((self.d_dict,), rule.theta, device=W_enc.device).log())

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        return encode_threshold(x, self.W_enc, self.b_enc, self.deployed_threshold)

    def encode_with_penalty(
        self, x: Float[Tensor, "batch d_in"], W_dec: Float[Tensor, "d_dict targets_d_out"]
    ) -> TrainingCodes:
        """The codes hold active entries, and those just below θ: they have value 0 but carry θ's gradient."""
        pre, rule = self.pre_activations(x), self.rule
        a, gate = jumprelu(pre, self.log_theta, rule.bandwidth)
        below = ((self.log_theta.exp() - pre).relu() @ W_dec.norm(dim=1)).mean()
        within_the_kernel = (pre > self.log_theta.exp() - rule.bandwidth / 2).detach()
        return TrainingCodes(from_dense(a, within_the_kernel), rule.l0 * gate.sum(1).mean() + rule.preact * below)

    @property
    def deployed_threshold(self) -> Float[Tensor, "d_dict"]:
        return self.log_theta.detach().exp()

    def load_threshold(self, theta: Float[Tensor, "d_dict"]) -> None:
        self.log_theta.copy_(log_threshold(theta))


# ----------------------------------------------------------------------------------------------------------------- Gated


class GatedEncoder(SparseEncoder[Gated]):
    """a = [π > 0] relu(e^r ⊙ (π − b_enc) + b_mag): the gate π is the pre-activation, its scaled copy the magnitude."""

    def __init__(self, W_enc: Float[Tensor, "d_dict d_in"], rule: Gated) -> None:
        super().__init__(W_enc, rule)
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.b_mag = nn.Parameter(torch.zeros_like(self.b_enc))

    def gates(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """relu(π), where it is positive."""
        return encode_threshold(x, self.W_enc, self.b_enc, self.b_enc.new_zeros(()))

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        gates = self.gates(x)
        linear = gates.values - self.b_enc[gates.cols]
        magnitudes = (self.r_mag.exp()[gates.cols] * linear + self.b_mag[gates.cols]).relu()
        return gates._replace(values=torch.where(gates.values > 0, magnitudes, 0.0))

    def encode_with_penalty(
        self, x: Float[Tensor, "batch d_in"], W_dec: Float[Tensor, "d_dict targets_d_out"]
    ) -> TrainingCodes:
        """The gate learns from the penalty and from the target rebuilt from `gates`: its step passes no gradient."""
        linear = x @ self.W_enc.T
        gate = (linear + self.b_enc).relu()
        a = (self.r_mag.exp() * linear + self.b_mag).relu() * (gate.detach() > 0)
        penalty = self.rule.l1 * (gate @ W_dec.norm(dim=1)).mean()
        return TrainingCodes(from_dense(a, a.detach() > 0), penalty, from_dense(gate, gate.detach() > 0))

    def centre(self, mean: Float[Tensor, "d_in"]) -> None:
        super().centre(mean)
        self.b_mag.copy_(self.b_enc)

    @property
    def magnitude(self) -> tuple[Float[Tensor, "d_dict"], Float[Tensor, "d_dict"]]:
        return self.r_mag, self.b_mag

    def load_magnitude(self, r: Float[Tensor, "d_dict"], b: Float[Tensor, "d_dict"]) -> None:
        self.r_mag.copy_(r)
        self.b_mag.copy_(b)

    def with_top_k(self, k: int) -> "SparseEncoder[Any]":
        """An encoder of the same tensors that opens each token's k largest gates, where they are positive."""
        return self._shared_with(_TopKGatedEncoder(self.W_enc, self.rule, k))


class _TopKGatedEncoder(GatedEncoder):
    """Only the k largest gates of each token are open."""

    def __init__(self, W_enc: Float[Tensor, "d_dict d_in"], rule: Gated, k: int) -> None:
        super().__init__(W_enc, rule)
        check_k(k, self.d_dict)
        self.k_imposed = k

    def gates(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        return encode_topk(x, self.W_enc, self.b_enc, self.k_imposed)


# -------------------------------------------------------------------------------------------------- from rule to encoder

ENCODERS: dict[type[Rule], type[SparseEncoder[Any]]] = {
    Relu: ReluEncoder,
    TopK: TopKEncoder,
    BatchTopK: BatchTopKEncoder,
    JumpReLU: JumpReLUEncoder,
    Gated: GatedEncoder,
}


def new_encoder(d_in: int, d_dict: int, *, rule: Rule, generator: torch.Generator) -> SparseEncoder[Any]:
    """The encoder of a rule, with random rows of unit norm: pre ≈ N(0, 1) in scaled units."""
    rows = torch.randn(d_dict, d_in, generator=generator)
    return ENCODERS[type(rule)](rows / rows.norm(dim=1, keepdim=True), rule)
