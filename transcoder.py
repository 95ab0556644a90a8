"""Per-layer transcoders: a sparse stand-in for one MLP, from its input to its output.

    a = rule(x̃ W_encᵀ + b_enc),   ỹ = a W_dec + b_dec (+ x̃ W_skipᵀ),   x̃ = x · x_scale,  y = ỹ / y_scale

Decoder norms are free. Initialisation (methods: sparsify, arXiv 2501.18823): b_dec = E[ỹ], b_enc = −W_enc E[x̃],
W_dec and W_skip zero, so that training starts at the mean ablation and nothing has to be unlearnt.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coder import ActivationStats, LayerCoder
from config import BatchTopK, EncoderConfig, Gated, JumpReLU, Relu, Rule, TopK
from pinned import pin
from sparse_ops import Codes
from sparsity import new_encoder


class BaseTranscoder(LayerCoder):
    """x: Float["batch d_in"] ↦ y_hat: Float["batch d_out"], raw units; a subclass bears the name of its rule."""

    config: EncoderConfig
    rule_type: ClassVar[type[Rule]]

    def __init__(self, config: EncoderConfig, generator: torch.Generator) -> None:
        super().__init__()
        assert isinstance(config.rule, self.rule_type), f"{type(self).__name__} is no coder of {config.rule}"
        self.config = config
        self.encoder = new_encoder(config.d_in, config.d_dict, rule=config.rule, generator=generator)
        self.W_dec = nn.Parameter(torch.zeros(config.d_dict, config.d_out))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(config.d_out, config.d_in))
        self.register_buffer("x_scale", torch.ones(1))
        self.register_buffer("y_scale", torch.ones(1))
        self.cones = pin(config.pinned, self.encoders, config.d_out, generator)

    @property
    def skip(self) -> nn.Parameter | None:
        return self.W_skip if self.config.skip else None

    def encoder_input(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return x * self.x_scale

    @torch.no_grad()
    def initialise(self, stats: ActivationStats) -> None:
        self.x_scale.copy_(stats.x_scale)
        self.y_scale.copy_(stats.y_scale)
        self.b_dec.copy_(stats.y_mean[0] * self.y_scale)
        self.encoder.centre(stats.x_mean[0] * self.x_scale)

    def skip_output(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        return (x * self.x_scale) @ self.W_skip.T / self.y_scale

    def reconstruct(self, codes: Codes, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        return self.decode(codes) + self.skip_output(x) if self.config.skip else self.decode(codes)


class VanillaTranscoder(BaseTranscoder):
    """Relu with an L1 penalty."""

    rule_type = Relu


class TopKTranscoder(BaseTranscoder):
    """The k largest of each token."""

    rule_type = TopK


class BatchTopKTranscoder(BaseTranscoder):
    """The k·B largest of a batch; a threshold when deployed."""

    rule_type = BatchTopK


class JumpReLUTranscoder(BaseTranscoder):
    """A learnt threshold per latent."""

    rule_type = JumpReLU


class GatedTranscoder(BaseTranscoder):
    """A gate says which latents are active, a magnitude how much."""

    rule_type = Gated


TRANSCODERS: dict[type[Rule], type[BaseTranscoder]] = {
    cls.rule_type: cls
    for cls in (VanillaTranscoder, TopKTranscoder, BatchTopKTranscoder, JumpReLUTranscoder, GatedTranscoder)
}


def build_transcoder(config: EncoderConfig, generator: torch.Generator) -> BaseTranscoder:
    """The class that bears the name of the configuration's rule."""
    return TRANSCODERS[type(config.rule)](config, generator)
