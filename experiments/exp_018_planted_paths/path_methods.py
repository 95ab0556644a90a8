"""What can be scored on the planted circuit: whatever stands in for its MLPs, and says what its parts write, when they fire."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from planted_circuit import OUTPUT, PlantedStack
from torch import Tensor

from coder_replacements import CLTReplacement, TranscoderReplacement
from replacement import CodedPass
from sparse_ops import to_dense
from spd_model import ComponentModel


class Reading(NamedTuple):
    """What a replacement does at one layer."""

    y_hat: Float[Tensor, "batch d"]  # in place of the MLP's output
    direct: Float[
        Tensor, "batch"
    ]  # what this layer's own parts write along u_y, over all their targets, without biases
    fires: Bool[Tensor, "batch part"]
    l0: float  # active parts per token, of the layer


class Method(ABC):
    """A replacement of all three MLPs of one seed's target: a row of the benchmark."""

    @abstractmethod
    def begin(self) -> Callable[[int, Float[Tensor, "batch d"]], Reading]:
        """One forward pass: called at each layer, in order, with the stream."""


class CoderMethod(Method):
    """Transcoders, one per layer, or a CLT."""

    def __init__(self, replacement: TranscoderReplacement | CLTReplacement, u_y: Float[Tensor, "d"]) -> None:
        self.replacement, self.u_y = replacement, u_y

    def begin(self) -> Callable[[int, Float[Tensor, "batch d"]], Reading]:
        pass_ = self.replacement.begin()

        def read(layer: int, r: Float[Tensor, "batch d"]) -> Reading:
            unread = torch.zeros(len(r), 1, r.shape[1])
            y_hat = pass_(layer, r[:, None], unread)[:, 0]
            a = to_dense(pass_.codes[layer])
            return Reading(y_hat, self.direct(pass_, layer, y_hat), a > 0, (a > 0).sum(1).float().mean().item())

        return read

    def direct(self, pass_: CodedPass, layer: int, y_hat: Float[Tensor, "batch d"]) -> Float[Tensor, "batch"]:
        """A transcoder's is all that it writes, its skip included."""
        replacement = self.replacement
        if isinstance(replacement, TranscoderReplacement):
            coder = replacement.coders[layer]
            return (y_hat - coder.b_dec / coder.y_scale) @ self.u_y
        coder = replacement.coder
        decoders = rearrange(coder.W_dec[layer], "latent (target d) -> latent target d", d=coder.config.d_out)
        along_u = (decoders / coder.y_scale[layer:, None] @ self.u_y).sum(1)
        return to_dense(pass_.codes[layer]) @ along_u


class SPDMethod(Method):
    """Components of both matrices, of one seed of a stack: 1 where the importance is positive, else 0, without Δ."""

    def __init__(self, model: ComponentModel, seed: int, u_y: Float[Tensor, "d"]) -> None:
        self.model, self.seed, self.u_y = model, seed, u_y

    def begin(self) -> Callable[[int, Float[Tensor, "batch d"]], Reading]:
        model, seed = self.model, self.seed

        def read(layer: int, r: Float[Tensor, "batch d"]) -> Reading:
            on: dict[str, Tensor] = {}

            def gate(path: str) -> Callable[[Tensor], Tensor]:
                def mask(x: Tensor) -> Tensor:
                    on[path] = model.lower(model.importance_logit(path, x)) > 0
                    return on[path].float()

                return mask

            paths = [f"layers.{layer}.{name}" for name in ("mlp_in", "mlp_out")]
            with model.masked({path: gate(path) for path in paths}):
                y_hat = model.target_model.layers[layer](r.expand(model.stack, -1, -1))[seed]
            fires = torch.cat([on[path][seed] for path in paths], 1)
            return Reading(y_hat, y_hat @ self.u_y, fires, fires.sum(1).float().mean().item())

        return read


class TargetMethod(Method):
    """The target itself, its neurons as parts."""

    def __init__(self, target: PlantedStack) -> None:
        self.target = target

    def begin(self) -> Callable[[int, Float[Tensor, "batch d"]], Reading]:
        def read(layer: int, r: Float[Tensor, "batch d"]) -> Reading:
            fires = self.target.layers[layer].mlp_in(r[None])[0] > 0
            y_hat = self.target.layers[layer](r[None])[0]
            return Reading(y_hat, y_hat @ self.target.basis[0, OUTPUT], fires, fires.sum(1).float().mean().item())

        return read
