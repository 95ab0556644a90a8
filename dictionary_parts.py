"""One layer's coder as the field's files hold it: tensors on raw activations, without scales.

    a = rule(z W_encᵀ + b_enc),   ŷ = a W_dec + b_dec (+ x W_skipᵀ),   z = x − b_dec for an SAE, else x

Our scales x̃ = s x, y = ỹ / t (an SAE has t = s) fold into the tensors, which leaves activations and outputs alike:

    W_enc ← s W_enc,   W_dec ← W_dec / t,   b_dec ← b_dec / t,   W_skip ← (s / t) W_skip

A gated coder's values, relu(e^r ⊙ (z W_encᵀ) + b), need no more: r and b stay as they are.
Beside `fold` and its inverse `build` stand the checks of files that others wrote: every name, shape and value is looked
at, only safetensors and torch files of plain tensors are opened, and what is wrong is said in one line.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import build_coder, load_tensors
from coder import Coder
from config import CoderConfig
from sparsity import SparseEncoder

Tensors = dict[str, Tensor]


class Magnitude(NamedTuple):
    """How a gated coder's active latents get their values: a = relu(e^r ⊙ (z W_encᵀ) + b)."""

    r: Float[Tensor, "d_dict"]
    b: Float[Tensor, "d_dict"]


class Parts(NamedTuple):
    W_enc: Float[Tensor, "d_dict d_in"]
    b_enc: Float[Tensor, "d_dict"]
    W_dec: Float[Tensor, "d_dict targets*d_out"]  # one target, but for a cross-layer transcoder
    b_dec: Float[Tensor, "d_out"]
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    theta: Float[Tensor, "d_dict"] | None = None  # of BatchTopK and JumpReLU, else None
    magnitude: Magnitude | None = None  # of Gated, else None


# ------------------------------------------------------------------------------------------------- coders and parts


@torch.no_grad()
def fold(coder: Coder) -> tuple[Parts, ...]:
    """A coder without its scales, a Parts per layer. Raises ValueError for a BatchTopK that has no threshold yet."""
    n, d_out = len(coder.config.layers), coder.config.d_out
    decoders, skip = coder.decoders, coder.skip
    return tuple(
        Parts(
            W_enc=encoder.W_enc * coder.x_scale[i],
            b_enc=encoder.b_enc.clone(),
            W_dec=decoders[i] / coder.y_scale[i:].repeat_interleave(d_out),
            b_dec=coder.b_dec.view(n, d_out)[i] / coder.y_scale[i],
            W_skip=None if skip is None else skip * coder.x_scale / coder.y_scale,
            theta=_threshold(encoder),
            magnitude=_magnitude(encoder),
        )
        for i, encoder in enumerate(coder.encoders)
    )


@torch.no_grad()
def build(config: CoderConfig, parts: Sequence[Parts]) -> Coder:
    """Inverse of `fold`: a coder in eval mode with scales of one."""
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


# ------------------------------------------------------------------------------------------------- untrusted files


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML object; ValueError in one line for anything else."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path")
    try:
        blob = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{path} is truncated or not {path.suffix[1:].upper()}: fetch it again") from None
    if not isinstance(blob, dict):
        raise ValueError(f"{path} holds a {type(blob).__name__}, not a configuration")
    return blob


def read_tensors(path: Path) -> Tensors:
    """Named tensors of a safetensors or torch file, on the CPU; nothing is unpickled but tensors."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path")
    kind = "safetensors" if path.suffix == ".safetensors" else "torch"
    try:
        state: Any = load_file(path) if kind == "safetensors" else load_tensors(path, "cpu")
    except (SafetensorError, RuntimeError):  # the latter: a zip archive that torch did not write
        raise ValueError(f"{path} is truncated or no {kind} file: fetch it again") from None
    named = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named:
        raise ValueError(f"{path} holds something other than named tensors: it is not opened")
    return state  # type: ignore[no-any-return]


def check(source: Path, state: Tensors, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """float32 copies; ValueError naming the first tensor that is missing, unexpected, misshapen or not finite."""
    for name in sorted(state.keys() ^ shapes.keys()):
        raise ValueError(f"{source}: tensor {name!r} is {'not expected' if name in state else 'missing'}")
    floats = {name: tensor.to(torch.float32) for name, tensor in state.items()}
    for name, shape in shapes.items():
        if floats[name].shape != shape:
            raise ValueError(f"{source}: tensor {name!r} has shape {tuple(floats[name].shape)}, expected {shape}")
        if not floats[name].isfinite().all():
            raise ValueError(f"{source}: tensor {name!r} holds NaN or infinity")
    return floats


def size(source: Path, blob: dict[str, Any], name: str) -> int:
    """A positive whole number of a configuration."""
    value = blob.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{source}: {name} is {value!r}, not a positive whole number")
    return value


def only(source: Path, blob: dict[str, Any], name: str, *, allowed: Sequence[Any], remedy: str) -> Any:
    """The value of `name`, which must be one of `allowed`."""
    if blob.get(name) not in allowed:
        raise ValueError(f"{source}: {name} is {blob.get(name)!r}: {remedy}")
    return blob.get(name)
