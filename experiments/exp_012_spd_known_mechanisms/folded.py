"""A decomposition of a ResidMLP toy that never forms its wide embedding; the same functions and gradients as without."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from config import SPDConfig
from spd_masks import Mask
from spd_model import ComponentModel
from toy_models import ResidMLP


class FoldedDecomposition(ComponentModel):
    """A decomposition of a ResidMLP that never forms the embedding. The same parameters, functions and gradients.

    The stream before a layer is  r = y R + Σ_l a_l U_l:  y = [x, m_Δ · hidden of each earlier layer] and R = [W_E; its
    W_out] hold what passes through the target's own weights, a_l = (m − m_Δ) ⊙ h and U_l what passes through the
    components of earlier mlp_out. Whatever reads r, M = W_in, V of mlp_in, a gate's first layer or the unembedding,
    sees  r M = y (R M) + Σ_l a_l (U_l M).  R M and U_l M are multiplied out once a step for all of its passes: each
    clean pass forgets those of the step before.
    """

    def __init__(self, target: ResidMLP, config: SPDConfig, generator: torch.Generator) -> None:
        super().__init__(target, config, generator)
        assert config.gate.kind in ("mlp", "shared_mlp"), f"{config.gate.kind=}"
        self._products: dict[tuple[str, str], Tensor] = {}
        R, self._rows = [target.W_E], []
        for layer in target.layers:
            self._rows.append(torch.cat(R, -2))
            R.append(layer.mlp_out.weight.mT)
        self._rows.append(torch.cat(R, -2))

    def _read(self, name: str, M: Tensor, y: Tensor, writes: dict[int, Tensor], layer: int) -> Tensor:
        """r M at the entrance of a layer; `name` is M's."""
        part = y @ self._product(f"R{layer}", name, self._rows[layer], M)
        for before, a in writes.items():
            part = part + a @ self._product(f"U{before}", name, self.components[f"layers.{before}.mlp_out"].U, M)
        return part

    def _product(self, left: str, right: str, A: Tensor, B: Tensor) -> Tensor:
        if (left, right) not in self._products:
            self._products[left, right] = A @ B
        return self._products[left, right]

    def inputs_capture(self, x: Float[Tensor, "stack batch feature"]) -> tuple[dict[str, Tensor], Tensor]:  # type: ignore[override]
        """(y before each mlp_in, hidden units before each mlp_out, of a clean pass; output)."""
        self._products = {}
        seen: dict[str, Tensor] = {}
        return seen, self._forward(x, {}, seen)

    def importance_logit(self, path: str, x: Tensor) -> Float[Tensor, "stack batch component"]:
        if path.endswith("mlp_out"):
            return super().importance_logit(path, x)
        gate, layer = self.importances.gate(path), int(path.split(".")[1])
        if gate.kind == "mlp":
            h = self._read(f"V{layer}", self.components[path].V, x, {}, layer)
            return gate(h, h)
        first, *rest = gate.layers
        z = self._read(f"gate{layer}", first.W, x, {}, layer) + first.b[:, None]
        for module in rest:
            z = module(z)
        return z

    def run_masked(self, masks: Mapping[str, Mask], x: Tensor) -> Float[Tensor, "stack batch feature"]:  # type: ignore[override]
        return self._forward(x, masks, {})

    def _forward(self, x: Tensor, masks: Mapping[str, Mask], seen: dict[str, Tensor]) -> Tensor:
        target, y, writes = self.target_model, x, {}
        for i, layer in enumerate(target.layers):
            read, write = f"layers.{i}.mlp_in", f"layers.{i}.mlp_out"
            seen[read] = y
            u = self._read(f"W{i}", layer.mlp_in.weight.mT, y, writes, i)
            if read in masks:
                part, (m, delta) = self.components[read], _opened(masks[read])
                u = delta * u + ((m - delta) * self._read(f"V{i}", part.V, y, writes, i)) @ part.U
            hidden = torch.relu(u)
            seen[write] = hidden
            if write in masks:
                m, delta = _opened(masks[write])
                writes[i] = (m - delta) * (hidden @ self.components[write].V)
                hidden = delta * hidden
            y = torch.cat([y, hidden], -1)
        return self._read("W_U", target.W_E.mT, y, writes, len(target.layers))


def _opened(mask: Mask) -> tuple[Tensor, Tensor]:
    """(m, m_Δ) that broadcast against each other; a closed Δ is 0."""
    m, delta = mask
    return m, torch.zeros_like(m[..., :1]) if delta is None else delta[..., None]
