"""Sparse autoencoders of one activation site.

    a = rule((x̃ − b_dec) W_encᵀ + b_enc),   x̃_hat = a W_dec + b_dec,   ‖W_dec[i]‖ = 1,   x̃ = x · x_scale

W_enc starts as W_dec, b_dec as E[x̃]. The unit norm is kept by: remove the gradient's part along each row → clip →
step → renormalise, in that order (Bricken et al. 2023; the order matters, since Adam's step leaves the sphere).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from config import BatchTopK, JumpReLU, Relu, SAEConfig, TopK
from sparse_ops import Codes, decode
from sparsity import ActivationStats, Coder, SparseEncoder, unscaled


class BaseAutoencoder(Coder):
    """x: Float["batch d_in"] ↦ y_hat: Float["batch d_in"], raw units."""

    config: SAEConfig

    def __init__(self, config: SAEConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.encoder = SparseEncoder(config.d_in, config.d_dict, config.rule, generator)
        self.W_dec = nn.Parameter(self.encoder.W_enc.detach().clone())
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.register_buffer("x_scale", torch.ones(1))

    @property
    def encoders(self) -> tuple[SparseEncoder, ...]:  # type: ignore[override]
        return (self.encoder,)

    @property
    def y_scale(self) -> Float[Tensor, "1"]:  # type: ignore[override]
        return self.x_scale

    @torch.no_grad()
    def initialise(self, stats: ActivationStats) -> None:
        """From the statistics of the site's activations, which are both input and target."""
        self.x_scale.copy_(stats.x_scale)
        self.b_dec.copy_(stats.x_mean[0] * self.x_scale)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        return self.encoder.encode(x * self.x_scale - self.b_dec)

    def encode_with_penalty(self, x: Float[Tensor, "batch d_in"]) -> tuple[Codes, Float[Tensor, ""]]:
        return self.encoder.encode_with_penalty(x * self.x_scale - self.b_dec, self.W_dec)

    def decode(self, codes: Codes) -> Float[Tensor, "batch d_in"]:
        return unscaled(decode(codes, self.W_dec), self.b_dec, self.x_scale)

    def aux_reconstruction(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """What the dead latents would write, without b_dec: AuxK's ê in raw units."""
        activations = self.encoder.aux_activations(x * self.x_scale - self.b_dec)
        return activations @ self.W_dec[self.encoder.dead] / self.x_scale

    @torch.no_grad()
    def calibrate(self, batches: list[Float[Tensor, "batch d_in"]]) -> None:
        """Set the deployed threshold on held-out activations (raw units)."""
        self.encoder.calibrate(x * self.x_scale - self.b_dec for x in batches)

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        assert self.W_dec.grad is not None, "constrain_gradients comes after the backward pass"
        along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
        self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def constrain_weights(self) -> None:
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


class VanillaSAE(BaseAutoencoder):
    """Relu with an L1 penalty."""


class TopKSAE(BaseAutoencoder):
    """The k largest of each token."""


class BatchTopKSAE(BaseAutoencoder):
    """The k·B largest of a batch; a threshold when deployed."""


class JumpReLUSAE(BaseAutoencoder):
    """A learnt threshold per latent."""


SAES: dict[type, type[BaseAutoencoder]] = {
    Relu: VanillaSAE,
    TopK: TopKSAE,
    BatchTopK: BatchTopKSAE,
    JumpReLU: JumpReLUSAE,
}


def build_sae(config: SAEConfig, generator: torch.Generator) -> BaseAutoencoder:
    """The class that bears the name of the configuration's rule."""
    return SAES[type(config.rule)](config, generator)
