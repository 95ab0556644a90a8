"""One layer's coder as the field's files hold it: tensors on raw activations, without scales.

    a = rule(z W_encᵀ + b_enc),   ŷ = a W_dec + b_dec (+ x W_skipᵀ),   z = x − b_dec for an SAE, else x

Our scales x̃ = s x, y = ỹ / t (an SAE has t = s) fold into the tensors, which leaves activations and outputs alike:

    W_enc ← s W_enc,   W_dec ← W_dec / t,   b_dec ← b_dec / t,   W_skip ← (s / t) W_skip

A gated coder's values, relu(e^r ⊙ (z W_encᵀ) + b), need no more: r and b stay as they are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from checkpoints import build_coder
from coder import Coder
from config import CoderConfig
from sparsity import SparseEncoder


class Magnitude(NamedTuple):
    """How a gated coder's active latents get their values: a = relu(e^r ⊙ (z W_encᵀ) + b)."""

    r: Float[Tensor, "d_dict"]
    b: Float[Tensor, "d_dict"]


class FoldedLayer(NamedTuple):
    W_enc: Float[Tensor, "d_dict d_in"]
    b_enc: Float[Tensor, "d_dict"]
    W_dec: Float[Tensor, "d_dict targets*d_out"]  # one target, but for a cross-layer transcoder
    b_dec: Float[Tensor, "d_out"]
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    theta: Float[Tensor, "d_dict"] | None = None  # of BatchTopK and JumpReLU, else None
    magnitude: Magnitude | None = None  # of Gated, else None


@torch.no_grad()
def fold(coder: Coder) -> tuple[FoldedLayer, ...]:
    """A coder without its scales, a FoldedLayer per layer. Raises ValueError for a BatchTopK that has no threshold yet."""
    n, d_out = len(coder.config.layers), coder.config.d_out
    decoders, skip = coder.decoders, coder.skip
    return tuple(
        FoldedLayer(
            W_enc=encoder.W_enc * coder.x_scale[i],
            b_enc=encoder.b_enc.clone(),
            W_dec=decoders[i] / repeat(coder.y_scale[i:], "target -> (target d_out)", d_out=d_out),
            b_dec=coder.b_dec.view(n, d_out)[i] / coder.y_scale[i],
            W_skip=None if skip is None else skip * coder.x_scale / coder.y_scale,
            theta=_threshold(encoder),
            magnitude=_magnitude(encoder),
        )
        for i, encoder in enumerate(coder.encoders)
    )


@torch.no_grad()
def build(config: CoderConfig, parts: Sequence[FoldedLayer]) -> Coder:
    """Inverse of `fold`: a coder in eval mode with scales of one.

    Raises ValueError where a value is not finite, as after arithmetic on what a file holds.
    """
    coder = build_coder(config, torch.Generator())
    for i, (part, encoder, W_dec) in enumerate(zip(parts, coder.encoders, coder.decoders, strict=True)):
        encoder.W_enc.copy_(part.W_enc)
        encoder.b_enc.copy_(part.b_enc)
        W_dec.copy_(part.W_dec)
        coder.b_dec.view(len(parts), -1)[i].copy_(part.b_dec)
        if part.W_skip is not None:
            assert coder.skip is not None, f"{config} has no skip to put W_skip into"
            coder.skip.copy_(part.W_skip)
        if part.theta is not None:
            encoder.load_threshold(part.theta)
        if part.magnitude is not None:
            encoder.load_magnitude(*part.magnitude)
    for name, tensor in coder.state_dict().items():
        if not (tensor.exp() if name.endswith("r_mag") else tensor).isfinite().all():
            raise ValueError(
                f"{name} of layers {config.layers} exceeds float32: scale the dictionary down where it was trained"
            )
    return coder.eval()


def _threshold(encoder: SparseEncoder[Any]) -> Float[Tensor, "d_dict"] | None:
    """θ of a threshold rule, one per latent; what is negative acts as zero."""
    theta = encoder.deployed_threshold
    if theta is None:
        return None
    if not theta.isfinite().all():
        raise ValueError("this BatchTopK coder has no threshold yet: calibrate it (training does at its end)")
    return theta.clamp_min(0).expand(encoder.d_dict).clone()


def _magnitude(encoder: SparseEncoder[Any]) -> Magnitude | None:
    return None if encoder.magnitude is None else Magnitude(*(value.clone() for value in encoder.magnitude))
