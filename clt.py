"""Cross-layer transcoders: layer i's latents read the i-th MLP input and write to the MLP outputs of layers j ≥ i.

    aⁱ = rule(x̃ⁱ W_encⁱᵀ + b_encⁱ),   ỹʲ = Σ_{i ≤ j} aⁱ W_dec^{i→j} + b_decʲ,   x̃ = x · x_scale,  y = ỹ / y_scale

The decoders of one source lie side by side, W_dec[i]: (d_dict, (n − i)·d_out) with target j in columns
[(j − i)·d_out, (j − i + 1)·d_out), so that one gather of an active latent's row serves all the targets it writes to.
Norms are free; the scales make every layer's target count alike. Ameisen et al., 'Circuit Tracing' (2025).

With `rank` r a latent writes the same to every layer and something of low rank to each later one beside it:

    W_dec^{i→i} = S_i,   W_dec^{i→j} = S_i + A_{ij} B_{ij},   A: (d_dict, r), B: (r, d_out), B = 0 at the start

S_i and the A_{ij} lie side by side, W_dec[i]: (d_dict, d_out + (n − 1 − i)·r), and no full decoder is made in a training step of
TopK or BatchTopK: (n d_out + n(n−1)/2 · r) d_dict + n(n−1)/2 · r d_out parameters stand for n(n+1)/2 · d_dict d_out (CircuitLab).
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from coder import ActivationStats, Coder, unscaled
from config import CLTConfig, require
from parallel import Ranks
from pinned import pin
from sparse_ops import Codes, decode
from sparsity import new_encoder


class CrossLayerTranscoder(Coder[tuple[Codes, ...]]):
    """x: Float["layer batch d_in"] ↦ y_hat: Float["layer batch d_out"], raw units; layers as in config.layers."""

    config: CLTConfig

    def __init__(self, config: CLTConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        n = len(config.layers)
        self.encoders = nn.ModuleList(
            new_encoder(config.d_in, config.d_dict, rule=config.rule, generator=generator) for _ in range(n)
        )
        self.W_dec = nn.ParameterList(torch.zeros(config.d_dict, self._columns(i)) for i in range(n))
        if (r := config.rank) is not None:
            self.B_dec = nn.ParameterList(torch.zeros(n - 1 - i, r, config.d_out) for i in range(n - 1))
            with torch.no_grad():
                for W_dec in self.W_dec:
                    W_dec[:, config.d_out :].uniform_(-(r**-0.5), r**-0.5, generator=generator)
        self.b_dec = nn.Parameter(torch.zeros(n, config.d_out))
        self.register_buffer("x_scale", torch.ones(n))
        self.register_buffer("y_scale", torch.ones(n))
        self.cones = pin(config.pinned, self.encoders, config.d_out, generator)

    def _columns(self, i: int) -> int:
        """Of W_dec[i]."""
        c, later = self.config, len(self.config.layers) - 1 - i
        return c.d_out * (1 + later) if c.rank is None else c.d_out + c.rank * later

    @property
    def decoders(self) -> tuple[Tensor, ...]:
        if self.config.rank is None:
            return tuple(self.W_dec)
        return tuple(torch.cat(self._writes(i, W_dec), 1) for i, W_dec in enumerate(self.W_dec))

    def _writes(self, i: int, wide: Float[Tensor, "row columns"]) -> list[Float[Tensor, "row d_out"]]:
        """What rows of W_dec[i], or sums of them, write to layers i, …, n − 1."""
        d = self.config.d_out
        if self.config.rank is None:
            return list(rearrange(wide, "row (target d_out) -> row target d_out", d_out=d).unbind(1))
        low = wide[:, d:].split(self.config.rank, 1) if wide.shape[1] > d else ()
        return [wide[:, :d], *(wide[:, :d] + a @ B for a, B in zip(low, self.B_dec[i] if low else (), strict=True))]

    def join(self, ranks: Ranks) -> None:
        require(
            self.config.rank is None or not ranks.selects, "latents of decoders of low rank are not spread: use data"
        )
        super().join(ranks)

    @torch.no_grad()
    def initialise(self, stats: ActivationStats) -> None:
        self.x_scale.copy_(stats.x_scale)
        self.y_scale.copy_(stats.y_scale)
        self.b_dec.copy_(stats.y_mean * self.y_scale[:, None])
        for i, encoder in enumerate(self.encoders):
            encoder.centre(stats.x_mean[i] * self.x_scale[i])

    def encoder_inputs(self, i: int, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return x * self.x_scale[i]

    def encode_layer(self, i: int, x: Float[Tensor, "batch d_in"]) -> Codes:
        """Codes of the i-th layer spanned."""
        return self.encoders[i].encode(x * self.x_scale[i])

    def encode(self, x: Float[Tensor, "layer batch d_in"]) -> tuple[Codes, ...]:
        return tuple(self.encode_layer(i, x_i) for i, x_i in enumerate(x))

    def encode_with_penalty(
        self, x: Float[Tensor, "layer batch d_in"], y: Float[Tensor, "layer batch d_out"],
        variance: Float[Tensor, "layer"],
    ) -> tuple[tuple[Codes, ...], Float[Tensor, ""]]:  # fmt: skip
        """The penalty is the mean over the layers' encoders; what it asks of all codes together is counted once."""
        weighed = self.decoders if self.k is None else self.W_dec  # rules with a k weigh nothing by its decoder
        trained = [
            encoder.encode_with_penalty(x[i] * self.x_scale[i], W_dec)
            for i, (encoder, W_dec) in enumerate(zip(self.encoders, weighed, strict=True))
        ]
        penalty = self.ranks.sum(torch.stack([of_layer.penalty for of_layer in trained]).mean())
        gates = tuple(of_layer.gates for of_layer in trained if of_layer.gates is not None)
        penalty = penalty + self.frozen_error(gates, x, y=y, variance=variance) if gates else penalty
        return tuple(of_layer.codes for of_layer in trained), penalty

    def decode_layer(self, j: int, codes: Sequence[Codes]) -> Float[Tensor, "batch d_out"]:
        """ŷ of the j-th layer from the codes of layers 0…j."""
        assert len(codes) == j + 1, f"layer {j} is written by {j + 1} layers, not {len(codes)}"
        by_target = (
            rearrange(W_dec, "d_dict (target d_out) -> target d_dict d_out", d_out=self.config.d_out)
            for W_dec in self.decoders
        )
        parts = [decode(codes_i, W_dec[j - i]) for i, (codes_i, W_dec) in enumerate(zip(codes, by_target))]
        return unscaled(sum(parts), self.b_dec[j], self.y_scale[j])

    def _gather(self, per_source: list[Float[Tensor, "batch targets_d_out"]]) -> Float[Tensor, "layer batch d_out"]:
        """Sum what each source writes: per_source[i] holds targets i…n−1 side by side."""
        n, writes = len(self.config.layers), [self._writes(i, wide) for i, wide in enumerate(per_source)]
        return torch.stack([sum(writes[i][j - i] for i in range(j + 1)) for j in range(n)])  # type: ignore[misc]

    def decode(self, codes: tuple[Codes, ...]) -> Float[Tensor, "layer batch d_out"]:
        wide = [decode(codes_i, self.W_dec[i]) for i, codes_i in enumerate(codes)]
        return unscaled(self.ranks.sum(self._gather(wide)), self.b_dec[:, None], self.y_scale[:, None, None])

    def aux_reconstruction(
        self, x: Float[Tensor, "layer batch d_in"], dead_after: int
    ) -> Float[Tensor, "layer batch d_out"]:
        """What every layer's dead latents would write to every target, without b_dec."""
        pairs = [encoder.aux_activations(x[i] * self.x_scale[i], dead_after) for i, encoder in enumerate(self.encoders)]
        wide = [a @ W_dec[dead] for (a, dead), W_dec in zip(pairs, self.W_dec)]
        return self.ranks.sum(self._gather(wide)) / self.y_scale[:, None, None]

    def calibrate(self, batches: Sequence[Float[Tensor, "layer batch d_in"]]) -> None:
        for i, encoder in enumerate(self.encoders):
            encoder.calibrate(x[i] * self.x_scale[i] for x in batches)

    def view(
        self, inputs: Float[Tensor, "all_layers batch d_in"], targets: Float[Tensor, "all_layers batch d_out"],
        rows: Sequence[int],
    ) -> tuple[Float[Tensor, "layer batch d_in"], Float[Tensor, "layer batch d_out"]]:  # fmt: skip
        x, y = (torch.stack([side[row] for row in rows]) for side in (inputs, targets))  # a list of rows would be sent
        return x, y

    def variance(self, stats: ActivationStats) -> Float[Tensor, "layer"]:
        return stats.y_variance
