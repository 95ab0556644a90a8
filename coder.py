"""What SAEs, transcoders and cross-layer transcoders have in common, and all that training and measuring ask of them.

    codes = encode(x),   ŷ = reconstruct(codes, x),   loss = FVU(y, ŷ) + what encode_with_penalty adds

A coder takes and returns raw activations; inside, x · x_scale and y · y_scale have mean norm √d. A new kind of coder
defines the abstract methods of `Coder`, or of `LayerCoder` where it has one encoder and one decoder.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from config import CoderConfig, require
from losses import fvu
from parallel import ALONE, Ranks, is_spread
from pinned import Cone
from sparse_ops import Codes, decode
from sparsity import SparseEncoder


class ActivationStats(NamedTuple):
    """What a coder must know of its data before the first step; one row per layer it spans, raw units."""

    x_mean: Float[Tensor, "layer d_in"]
    x_scale: Float[Tensor, "layer"]  # √d_in / E‖x‖
    y_mean: Float[Tensor, "layer d_out"]
    y_scale: Float[Tensor, "layer"]  # √d_out / E‖y‖
    y_variance: Float[Tensor, "layer"]  # E‖y − ȳ‖²
    n_tokens: int


def codes_by_layer(codes: Codes | tuple[Codes, ...]) -> tuple[Codes, ...]:
    """One `Codes` per layer spanned, whatever coder they come from."""
    return (codes,) if isinstance(codes, Codes) else codes


class CoderOutput[C](NamedTuple):
    y_hat: Float[Tensor, "*layer batch d_out"]  # raw units
    codes: C


class Coder[C: (Codes, tuple[Codes, ...])](nn.Module, ABC):
    """x ↦ codes C ↦ ŷ. `Float["*layer batch d"]` is (batch, d) for a coder of one layer, (layer, batch, d) for a CLT."""

    config: CoderConfig
    encoders: Sequence[SparseEncoder[Any]]  # one per layer spanned
    cones: Sequence[Cone]  # one per layer spanned where the decoders are pinned, else none
    b_dec: nn.Parameter
    x_scale: Float[Tensor, "layer"]
    y_scale: Float[Tensor, "layer"]
    ranks: Ranks = ALONE  # the processes that train it together
    n_dead: int = 0  # latents of all its encoders that were silent at the last count

    def forward(self, x: Float[Tensor, "*layer batch d_in"]) -> CoderOutput[C]:
        codes = self.encode(x)
        return CoderOutput(self.reconstruct(codes, x), codes)

    # ------------------------------------------------------------------------------------- what a coder of its kind is

    @abstractmethod
    def initialise(self, stats: ActivationStats) -> None:
        """Scales and biases from the statistics that `stats_of` gives."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "*layer batch d_in"]) -> C:
        """The training face in train mode, the deployed face in eval mode."""

    @abstractmethod
    def encoder_inputs(self, i: int, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """What the encoder of the i-th layer spanned reads, in scaled units."""

    @abstractmethod
    def encode_with_penalty(
        self, x: Float[Tensor, "*layer batch d_in"], y: Float[Tensor, "*layer batch d_out"],
        variance: Float[Tensor, "*layer"],
    ) -> tuple[C, Float[Tensor, ""]]:  # fmt: skip
        """Codes, and all that the rule adds to a loss of FVU; `variance` is E‖y − ȳ‖² of the targets, as the method says."""

    @abstractmethod
    def decode(self, codes: C) -> Float[Tensor, "*layer batch d_out"]:
        """What the codes write, and the bias."""

    @abstractmethod
    def aux_reconstruction(
        self, x: Float[Tensor, "*layer batch d_in"], dead_after: int
    ) -> Float[Tensor, "*layer batch d_out"]:
        """What the latents that were silent for `dead_after` tokens would write, without b_dec: AuxK's ê, in raw units."""

    @abstractmethod
    def calibrate(self, batches: Sequence[Float[Tensor, "*layer batch d_in"]]) -> None:
        """Set what deployment needs on held-out inputs."""

    @abstractmethod
    def view(
        self, inputs: Float[Tensor, "all_layers batch d_in"], targets: Float[Tensor, "all_layers batch d_out"],
        rows: Sequence[int],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(x, y) of a batch in which its layers are the given rows."""

    @abstractmethod
    def variance(self, stats: ActivationStats) -> Float[Tensor, "*layer"]:
        """E‖y − ȳ‖² of its targets."""

    @property
    @abstractmethod
    def decoders(self) -> Sequence[Float[Tensor, "d_dict targets_d_out"]]:
        """W_dec of each layer spanned."""

    @property
    def skip(self) -> Float[Tensor, "d_out d_in"] | None:
        """The weight of a linear map from the scaled input to the scaled output beside the codes; None without one."""
        return None

    def stats_of(self, stats: ActivationStats, rows: Sequence[int]) -> ActivationStats:
        """Those of its own layers, which are the given rows."""
        return ActivationStats(*(value[rows] for value in stats[:-1]), stats.n_tokens)

    def reconstruct(self, codes: C, x: Float[Tensor, "*layer batch d_in"]) -> Float[Tensor, "*layer batch d_out"]:
        """ŷ from codes; x is read only by a skip connection."""
        return self.decode(codes)

    def frozen_error(
        self, codes: C, x: Float[Tensor, "*layer batch d_in"], *, y: Float[Tensor, "*layer batch d_out"],
        variance: Float[Tensor, "*layer"],
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Mean FVU of ŷ from these codes, whose gradient reaches the codes alone and not the decoder that it passes."""
        with frozen(self):
            return fvu(y, self.reconstruct(codes, x), variance).mean()

    # ---------------------------------------------------------------------------------------------- what training asks

    @property
    def k(self) -> int | None:
        """Trained number of active latents per token and layer; None where the rule has none."""
        return self.encoders[0].k

    def set_k(self, k: int) -> None:
        for encoder in self.encoders:
            encoder.set_k(k)

    @property
    def gate_parameters(self) -> int:
        """Parameters that decide which latents are active: encoder weights, biases and thresholds."""
        return sum(p.numel() for encoder in self.encoders for p in encoder.parameters())

    def update_statistics(self, codes: C) -> None:
        """Advance every encoder's counters by one training batch."""
        for encoder, own in zip(self.encoders, codes_by_layer(codes)):
            encoder.update_statistics(own)

    def count_dead(self, dead_after: int) -> None:
        for encoder in self.encoders:
            encoder.count_dead(dead_after)
        self.n_dead = self.ranks.total(sum(encoder.n_dead for encoder in self.encoders))

    def join(self, ranks: Ranks) -> None:
        """Train together with other processes from now on."""
        require(self.config.pinned is None or not ranks.selects, "latents of pinned coders are not spread: use data")
        self.ranks = ranks
        for encoder in self.encoders:
            encoder.ranks = ranks

    @property
    def step_shape(self) -> tuple[tuple[int, ...], ...]:
        """What decides the shapes within a training step, of every encoder."""
        return tuple(encoder.step_shape for encoder in self.encoders)

    @property
    def unproven(self) -> int:
        """Tokens trained on in this process whose active latents may not be those of float32 (synchronises the device)."""
        return sum(int(encoder.unproven) for encoder in self.encoders)

    def dead_fraction(self, window: int) -> float:
        """Share of latents that were silent in the last `window` training tokens."""
        silent = [(encoder.tokens_since_fired >= window).float().mean().item() for encoder in self.encoders]
        return sum(silent) / len(silent)

    def constrain_gradients(self) -> None:
        """Before the optimiser's step; only SAEs and pinned decoders constrain anything."""
        for cone, W_dec in self._pinned():
            cone.constrain_gradient(W_dec.grad)

    def clip_gradients(self, longest: float) -> None:
        """Shorten the gradient of all parameters together to this norm, where it is longer."""
        given = [(name, p.grad) for name, p in self.named_parameters() if p.grad is not None]
        spread, whole = ([g for name, g in given if is_spread(name, g) == side] for side in (True, False))
        norm = self.ranks.norm(spread, whole)
        if norm is None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), longest)
        else:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), longest, norm)

    def constrain_weights(self) -> None:
        """After the optimiser's step; only SAEs and pinned decoders constrain anything."""
        for cone, W_dec in self._pinned():
            cone.constrain(W_dec)

    def _pinned(self) -> Iterable[tuple[Cone, Tensor]]:
        return zip(self.cones, self.decoders) if self.cones else ()


class LayerCoder(Coder[Codes]):
    """A coder of one layer: one encoder, one decoder. Subclasses say what the encoder reads, and how they begin."""

    encoder: SparseEncoder[Any]
    W_dec: nn.Parameter

    @abstractmethod
    def encoder_input(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """What the encoder reads, in scaled units."""

    @property
    def encoders(self) -> tuple[SparseEncoder[Any], ...]:  # type: ignore[override]
        return (self.encoder,)

    @property
    def decoders(self) -> tuple[nn.Parameter, ...]:
        return (self.W_dec,)

    def encoder_inputs(self, i: int, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return self.encoder_input(x)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        return self.encoder.encode(self.encoder_input(x))

    def encode_with_penalty(
        self, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"], variance: Float[Tensor, ""]
    ) -> tuple[Codes, Float[Tensor, ""]]:
        read = self.ranks.read(self.encoder_input(x))
        codes, penalty, gates = self.encoder.encode_with_penalty(read, self.W_dec)
        penalty = self.ranks.sum(penalty)
        return codes, penalty if gates is None else penalty + self.frozen_error(gates, x, y=y, variance=variance)

    def decode(self, codes: Codes) -> Float[Tensor, "batch d_out"]:
        return unscaled(self.ranks.sum(decode(codes, self.W_dec)), self.b_dec, self.y_scale)

    def aux_reconstruction(self, x: Float[Tensor, "batch d_in"], dead_after: int) -> Float[Tensor, "batch d_out"]:
        a, dead = self.encoder.aux_activations(self.encoder_input(x), dead_after)
        return self.ranks.sum(a @ self.W_dec[dead]) / self.y_scale

    def calibrate(self, batches: Sequence[Float[Tensor, "batch d_in"]]) -> None:
        self.encoder.calibrate(self.encoder_input(x) for x in batches)

    def view(
        self, inputs: Float[Tensor, "all_layers batch d_in"], targets: Float[Tensor, "all_layers batch d_out"],
        rows: Sequence[int],
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:  # fmt: skip
        return inputs[rows[0]], targets[rows[0]]

    def variance(self, stats: ActivationStats) -> Float[Tensor, ""]:
        return stats.y_variance[0]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, the module's parameters pass gradients on and take none."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def unscaled(
    y: Float[Tensor, "*layer batch d_out"], b_dec: Float[Tensor, "*#layer batch d_out"], scale: Float[Tensor, "*#layer"]
) -> Float[Tensor, "*layer batch d_out"]:
    """(y + b_dec) / scale in one pass over memory."""
    return torch.addcmul(b_dec / scale, y, 1 / scale)
