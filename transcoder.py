"""Per-layer transcoders: a sparse stand-in for one MLP, from its input to its output.

    a = rule(x̃ W_encᵀ + b_enc),   ỹ = a W_dec + b_dec (+ x̃ W_skipᵀ),   x̃ = x · x_scale,  y = ỹ / y_scale

Decoder norms are free. Initialisation (methods: sparsify, arXiv 2501.18823): b_dec = E[ỹ], b_enc = −W_enc E[x̃],
W_dec and W_skip zero, so that training starts at the mean ablation and nothing has to be unlearnt.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from config import BatchTopK, EncoderConfig, JumpReLU, Relu, TopK
from sparse_ops import Codes, decode
from sparsity import ActivationStats, Coder, SparseEncoder, latent_bias, unscaled


class BaseTranscoder(Coder):
    """x: Float["batch d_in"] ↦ y_hat: Float["batch d_out"], raw units."""

    config: EncoderConfig

    def __init__(self, config: EncoderConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.encoder = SparseEncoder(config.d_in, config.d_dict, config.rule, generator)
        self.W_dec = nn.Parameter(torch.zeros(config.d_dict, config.d_out))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(config.d_out, config.d_in))
        self.register_buffer("x_scale", torch.ones(1))
        self.register_buffer("y_scale", torch.ones(1))

    @property
    def encoders(self) -> tuple[SparseEncoder, ...]:  # type: ignore[override]
        return (self.encoder,)

    @torch.no_grad()
    def initialise(self, stats: ActivationStats) -> None:
        self.x_scale.copy_(stats.x_scale)
        self.y_scale.copy_(stats.y_scale)
        self.b_dec.copy_(stats.y_mean[0] * self.y_scale)
        self.encoder.b_enc.copy_(latent_bias(self.encoder.W_enc, stats.x_mean[0] * self.x_scale))

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        return self.encoder.encode(x * self.x_scale)

    def encode_with_penalty(self, x: Float[Tensor, "batch d_in"]) -> tuple[Codes, Float[Tensor, ""]]:
        return self.encoder.encode_with_penalty(x * self.x_scale, self.W_dec)

    def decode(self, codes: Codes) -> Float[Tensor, "batch d_out"]:
        """The codes' part and the bias; a skip's part is `skip_output`."""
        return unscaled(decode(codes, self.W_dec), self.b_dec, self.y_scale)

    def skip_output(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        return (x * self.x_scale) @ self.W_skip.T / self.y_scale

    def reconstruct(self, codes: Codes, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        return self.decode(codes) + self.skip_output(x) if self.config.skip else self.decode(codes)

    def aux_reconstruction(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """What the dead latents would write, without b_dec: AuxK's ê in raw units."""
        dead = self.encoder.dead
        return self.encoder.aux_activations(x * self.x_scale) @ self.W_dec[dead] / self.y_scale

    def calibrate(self, batches: list[Float[Tensor, "batch d_in"]]) -> None:
        """Set the deployed threshold on held-out MLP inputs (raw units)."""
        self.encoder.calibrate(x * self.x_scale for x in batches)


class VanillaTranscoder(BaseTranscoder):
    """Relu with an L1 penalty."""


class TopKTranscoder(BaseTranscoder):
    """The k largest of each token."""


class BatchTopKTranscoder(BaseTranscoder):
    """The k·B largest of a batch; a threshold when deployed."""


class JumpReLUTranscoder(BaseTranscoder):
    """A learnt threshold per latent."""


TRANSCODERS: dict[type, type[BaseTranscoder]] = {
    Relu: VanillaTranscoder,
    TopK: TopKTranscoder,
    BatchTopK: BatchTopKTranscoder,
    JumpReLU: JumpReLUTranscoder,
}


def build_transcoder(config: EncoderConfig, generator: torch.Generator) -> BaseTranscoder:
    """The class that bears the name of the configuration's rule."""
    return TRANSCODERS[type(config.rule)](config, generator)
