"""Sparse autoencoders of one activation site.

    a = rule((x̃ − b_dec) W_encᵀ + b_enc),   x̃_hat = a W_dec + b_dec,   ‖W_dec[i]‖ = 1,   x̃ = x · x_scale

W_enc starts as W_dec (apart from it where one of them is pinned), b_dec as E[x̃]. The unit norm is kept by: remove the
gradient's part along each row → clip → step → renormalise, in that order (Bricken et al. 2023; the order matters, since
Adam's step leaves the sphere).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coder import ActivationStats, LayerCoder
from config import BatchTopK, Gated, JumpReLU, Pinned, Relu, Rule, SAEConfig, TopK
from pinned import pin, random_directions
from sparsity import new_encoder


class BaseAutoencoder(LayerCoder):
    """x: Float["batch d_in"] ↦ y_hat: Float["batch d_in"], raw units; a subclass bears the name of its rule."""

    config: SAEConfig
    rule_type: ClassVar[type[Rule]]

    def __init__(self, config: SAEConfig, generator: torch.Generator) -> None:
        super().__init__()
        assert isinstance(config.rule, self.rule_type), f"{type(self).__name__} is no coder of {config.rule}"
        self.config = config
        self.encoder = new_encoder(config.d_in, config.d_dict, rule=config.rule, generator=generator)
        self.cones = pin(config.pinned, self.encoders, config.d_in, generator)
        start = self.encoder.W_enc.detach()
        if config.pinned is not None:
            start = self.cones[0].directions if self.cones else random_directions(*start.shape, generator)
        self.W_dec = nn.Parameter(start.clone(), requires_grad=config.pinned != Pinned("decoder"))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.register_buffer("x_scale", torch.ones(1))

    @property
    def y_scale(self) -> Float[Tensor, "1"]:  # type: ignore[override]
        return self.x_scale

    def encoder_input(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return x * self.x_scale - self.b_dec

    def aux_reconstruction(self, x: Float[Tensor, "batch d_in"], dead_after: int) -> Float[Tensor, "batch d_in"]:
        """AuxK's ê, through which b_dec gets no gradient although the encoder reads it."""
        a, dead = self.encoder.aux_activations(x * self.x_scale - self.b_dec.detach(), dead_after)
        return self.ranks.sum(a @ self.W_dec[dead]) / self.x_scale

    @torch.no_grad()
    def initialise(self, stats: ActivationStats) -> None:
        self.x_scale.copy_(stats.x_scale)
        self.b_dec.copy_(stats.x_mean[0] * self.x_scale)

    def view(
        self, inputs: Float[Tensor, "all_layers batch d_in"], targets: Float[Tensor, "all_layers batch d_out"],
        rows: Sequence[int],
    ) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, "batch d_out"]]:  # fmt: skip
        """What is written at its site, as input and as target."""
        return targets[rows[0]], targets[rows[0]]

    def stats_of(self, stats: ActivationStats, rows: Sequence[int]) -> ActivationStats:
        """Those of what is written at its site, as input and as target."""
        return super().stats_of(stats._replace(x_mean=stats.y_mean, x_scale=stats.y_scale), rows)

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        if not self.W_dec.requires_grad:
            return
        assert self.W_dec.grad is not None, "constrain_gradients comes after the backward pass"
        along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
        self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def constrain_weights(self) -> None:
        if self.W_dec.requires_grad:
            super().constrain_weights()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


class VanillaSAE(BaseAutoencoder):
    """Relu with an L1 penalty."""

    rule_type = Relu


class TopKSAE(BaseAutoencoder):
    """The k largest of each token."""

    rule_type = TopK


class BatchTopKSAE(BaseAutoencoder):
    """The k·B largest of a batch; a threshold when deployed."""

    rule_type = BatchTopK


class JumpReLUSAE(BaseAutoencoder):
    """A learnt threshold per latent."""

    rule_type = JumpReLU


class GatedSAE(BaseAutoencoder):
    """A gate says which latents are active, a magnitude how much."""

    rule_type = Gated


SAES: dict[type[Rule], type[BaseAutoencoder]] = {
    cls.rule_type: cls for cls in (VanillaSAE, TopKSAE, BatchTopKSAE, JumpReLUSAE, GatedSAE)
}


def build_sae(config: SAEConfig, generator: torch.Generator) -> BaseAutoencoder:
    """The class that bears the name of the configuration's rule."""
    return SAES[type(config.rule)](config, generator)
