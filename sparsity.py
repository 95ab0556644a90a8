"""The four sparsity rules, and the encoder that holds one.

    pre = x W_encᵀ + b_enc
    Relu       a = relu(pre)                                     penalty l1 · Σ a ‖W_dec‖
    TopK       a = relu(pre) at the k largest of each token
    BatchTopK  a = relu(pre) at the k·B largest of the batch     deployed: a = pre · [pre > θ], one θ
    JumpReLU   a = pre · [pre > θ], a θ per latent               penalty l0 · Σ [pre > θ] + preact · Σ relu(θ − pre) ‖W_dec‖

Straight-through gradients of JumpReLU (arXiv 2407.14435, eqs. 11–12), K the rectangle of width 1 and ε the bandwidth:

    ∂a/∂θ = −(θ/ε) K((pre − θ)/ε),   ∂[pre > θ]/∂θ = −(1/ε) K((pre − θ)/ε),   ∂·/∂log θ = θ ∂·/∂θ

Pre-activations are in scaled units: coders hand over x with E‖x‖ = √d_in. A BatchTopK code of a deployed coder never
depends on the token's neighbours, since θ is a buffer: a running mean of each batch's smallest winner in training
(decay 0.99), set on held-out tokens at the end so that the mean L0 is k.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from config import BatchTopK, CoderConfig, JumpReLU, Relu, Rule, TopK, check_rule
from sparse_ops import Codes, encode_batch_topk, encode_threshold, encode_topk, fire_counts, from_dense

THRESHOLD_DECAY = 0.99  # per training batch


class ActivationStats(NamedTuple):
    """What a coder must know of its data before the first step; one row per layer it spans, raw units."""

    x_mean: Float[Tensor, "layer d_in"]
    x_scale: Float[Tensor, "layer"]  # √d_in / E‖x‖
    y_mean: Float[Tensor, "layer d_out"]
    y_scale: Float[Tensor, "layer"]  # √d_out / E‖y‖
    y_variance: Float[Tensor, "layer"]  # E‖y − ȳ‖²
    n_tokens: int


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


def _codes_within_the_kernel(a: Tensor, pre: Tensor, log_theta: Tensor, bandwidth: float) -> Codes:
    """Active entries, and those just below θ: they have value 0 but carry θ's straight-through gradient."""
    return from_dense(a, (pre > log_theta.exp() - bandwidth / 2).detach())


class SparseEncoder(nn.Module):
    """x ↦ codes: W_enc, b_enc, a rule with its state, and the counters that tell dead latents."""

    def __init__(self, d_in: int, d_dict: int, rule: Rule, generator: torch.Generator) -> None:
        super().__init__()
        check_rule(rule, d_dict)
        rows = torch.randn(d_dict, d_in, generator=generator)
        self.rule = rule
        self.W_enc = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))  # unit rows: pre ≈ N(0, 1) in scaled units
        self.b_enc = nn.Parameter(torch.zeros(d_dict))
        if isinstance(rule, JumpReLU):
            self.log_theta = nn.Parameter(torch.full((d_dict,), rule.theta).log())
        if isinstance(rule, BatchTopK):
            self.register_buffer("threshold", torch.tensor(-torch.inf))
            self.register_buffer("smallest_winner", torch.tensor(-torch.inf), persistent=False)  # of the last batch
        self.register_buffer("tokens_since_fired", torch.zeros(d_dict, dtype=torch.int64))
        self.k_now = rule.k if isinstance(rule, TopK | BatchTopK) else 0  # annealed by the training loop
        self.dead = torch.zeros(0, dtype=torch.int64)  # latents AuxK works on; refreshed now and then

    @property
    def d_dict(self) -> int:
        return self.W_enc.shape[0]

    def pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_dict"]:
        return torch.addmm(self.b_enc, x, self.W_enc.T)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """The training face in train mode, the deployed face in eval mode."""
        match self.rule:
            case TopK(k):
                return encode_topk(x, self.W_enc, self.b_enc, self.k_now if self.training else k)
            case BatchTopK() if self.training:
                return encode_batch_topk(x, self.W_enc, self.b_enc, self.k_now, self.smallest_winner)
            case _:
                return encode_threshold(x, self.W_enc, self.b_enc, self.deployed_threshold)

    @property
    def deployed_threshold(self) -> Float[Tensor, ""] | Float[Tensor, "d_dict"]:
        """θ of the deployed face: a number (BatchTopK), one per latent (JumpReLU) or zero (Relu)."""
        match self.rule:
            case BatchTopK():
                return self.threshold
            case JumpReLU():
                return self.log_theta.detach().exp()
            case Relu():
                return self.b_enc.new_zeros(())
        raise AssertionError(f"{self.rule} is deployed without a threshold")

    def encode_with_penalty(
        self, x: Float[Tensor, "batch d_in"], W_dec: Float[Tensor, "d_dict targets_d_out"]
    ) -> tuple[Codes, Float[Tensor, ""]]:
        """Codes and the rule's penalty per token, which weighs a latent by ‖W_dec‖ (over all targets of a CLT)."""
        if isinstance(self.rule, TopK | BatchTopK):
            return self.encode(x), x.new_zeros(())
        pre, norms = self.pre_activations(x), W_dec.norm(dim=1)
        if isinstance(self.rule, Relu):
            a = pre.relu()
            return from_dense(a, a.detach() > 0), self.rule.l1 * (a @ norms).mean()
        a, gate = jumprelu(pre, self.log_theta, self.rule.bandwidth)
        below = ((self.log_theta.exp() - pre).relu() @ norms).mean()
        penalty = self.rule.l0 * gate.sum(1).mean() + self.rule.preact * below
        return _codes_within_the_kernel(a, pre, self.log_theta, self.rule.bandwidth), penalty

    @torch.no_grad()
    def update_statistics(self, codes: Codes) -> None:
        """Advance the counters by one training batch, and BatchTopK's running threshold."""
        fired = fire_counts(codes) > 0
        self.tokens_since_fired += codes.n_rows
        self.tokens_since_fired.masked_fill_(fired, 0)
        if isinstance(self.rule, BatchTopK):
            self.smallest_winner.copy_(smallest_positive(codes))
            moved = self.threshold.lerp(self.smallest_winner, 1 - THRESHOLD_DECAY)
            self.threshold.copy_(torch.where(self.threshold.isfinite(), moved, self.smallest_winner))

    def refresh_dead(self, dead_after: int) -> None:
        """List the latents that were silent for `dead_after` tokens (synchronises the device)."""
        self.dead = (self.tokens_since_fired >= dead_after).nonzero()[:, 0]

    def aux_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch dead"]:
        """The d_in/2 largest pre-activations among the dead, not rectified: a negative one must get a gradient."""
        pre = torch.addmm(self.b_enc[self.dead], x, self.W_enc[self.dead].T)
        k = min(self.W_enc.shape[1] // 2, len(self.dead))
        values, indices = pre.topk(k, dim=1)
        return torch.zeros_like(pre).scatter(1, indices, values)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "batch d_in"]]) -> None:
        """Set BatchTopK's threshold so that these (held-out, scaled) tokens have k active latents on average."""
        assert isinstance(self.rule, BatchTopK), f"{self.rule} has no threshold to calibrate"
        k, n_tokens, largest, smallest = self.rule.k, 0, [], torch.full_like(self.threshold, -torch.inf)
        for x in batches:  # twice k per batch leaves room for batches that hold more than their share of winners
            codes = encode_batch_topk(x, self.W_enc, self.b_enc, min(2 * k, self.d_dict), smallest)
            smallest = smallest_positive(codes)
            largest.append(codes.values)
            n_tokens += len(x)
        values = torch.cat(largest)
        assert n_tokens > 0, "calibration needs at least one batch of held-out tokens"
        self.threshold.copy_(values.topk(k * n_tokens).values[-1].clamp_min(0))


def smallest_positive(codes: Codes) -> Float[Tensor, ""]:
    """The smallest value above zero; 0 where there is none."""
    values = codes.values.detach()
    smallest = values.masked_fill(values <= 0, torch.inf).amin()
    return torch.where(smallest.isfinite(), smallest, 0.0)


def codes_by_layer(codes: Any) -> tuple[Codes, ...]:
    """One `Codes` per layer spanned, whatever coder they come from."""
    return (codes,) if isinstance(codes, Codes) else codes


class CoderOutput(NamedTuple):
    y_hat: Float[Tensor, "*layer batch d_out"]  # raw units
    codes: Any  # Codes; tuple[Codes, ...] for a cross-layer transcoder


class Coder(nn.Module):
    """What SAEs, transcoders and cross-layer transcoders share: encoders with statistics, and scales.

    Subclasses define `encode`, `encode_with_penalty`, `decode`, `aux_reconstruction` and `initialise`.
    They take and return raw activations; inside, x · x_scale and y · y_scale have mean norm √d.
    """

    config: CoderConfig
    encoders: nn.ModuleList  # one SparseEncoder per layer spanned
    x_scale: Float[Tensor, "layer"]
    y_scale: Float[Tensor, "layer"]

    def forward(self, x: Float[Tensor, "*layer batch d_in"]) -> CoderOutput:
        codes = self.encode(x)
        return CoderOutput(self.reconstruct(codes, x), codes)

    @property
    def gate_parameters(self) -> int:
        """Parameters that decide which latents are active: encoder weights, biases and thresholds."""
        return sum(p.numel() for encoder in self.encoders for p in encoder.parameters())

    @property
    def k(self) -> int | None:
        """Trained number of active latents per token and layer; None where the rule has none."""
        return self.config.rule.k if isinstance(self.config.rule, TopK | BatchTopK) else None

    def reconstruct(self, codes: Any, x: Float[Tensor, "*layer batch d_in"]) -> Float[Tensor, "*layer batch d_out"]:
        """ŷ from codes; x is read only by a skip connection."""
        return self.decode(codes)

    def update_statistics(self, codes: Any) -> None:
        """Advance every encoder's counters by one training batch."""
        for encoder, own in zip(self.encoders, codes_by_layer(codes)):
            encoder.update_statistics(own)

    @property
    def n_dead(self) -> int:
        return sum(len(encoder.dead) for encoder in self.encoders)

    def set_k(self, k: int) -> None:
        for encoder in self.encoders:
            encoder.k_now = min(k, encoder.d_dict)

    def refresh_dead(self, dead_after: int) -> None:
        for encoder in self.encoders:
            encoder.refresh_dead(dead_after)

    def dead_fraction(self, window: int) -> float:
        """Share of latents that were silent in the last `window` training tokens."""
        silent = [(encoder.tokens_since_fired >= window).float().mean().item() for encoder in self.encoders]
        return sum(silent) / len(silent)

    def constrain_gradients(self) -> None:
        """Before the optimiser's step; only SAEs constrain anything."""

    def constrain_weights(self) -> None:
        """After the optimiser's step; only SAEs constrain anything."""


def unscaled(
    y: Float[Tensor, "*layer batch d_out"], b_dec: Float[Tensor, "*#layer batch d_out"], scale: Float[Tensor, "*#layer"]
) -> Float[Tensor, "*layer batch d_out"]:
    """(y + b_dec) / scale in one pass over memory."""
    return torch.addcmul(b_dec / scale, y, 1 / scale)


def latent_bias(W_enc: Float[Tensor, "d_dict d_in"], mean: Float[Tensor, "d_in"]) -> Float[Tensor, "d_dict"]:
    """b_enc = −W_enc E[x]: pre-activations start centred (sparsify's initialisation)."""
    return -(W_enc @ mean)
