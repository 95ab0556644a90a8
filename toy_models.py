"""Toy targets whose mechanisms are known, several seeds stacked side by side, and how well a decomposition finds them.

TMS:       out = relu(W₁ᵀ (I) W₁ x + b);  x_i ~ U[0, 1] with probability .05, else 0;  loss mean (x − out)²
ResidMLP:  r ← r + W_out relu(W_in r) per layer, r₀ = x W_E, out = r W_Eᵀ;  x_i ~ U[−1, 1] w.p. .01;  label x + relu(x)

Definitions, sizes and recipes: goodfire-ai/spd (arXiv 2506.20790).
MMCS = mean_j max_c cos(U_c V_cj, W_j),  ML2R = mean_j ‖U_c V_cj‖ / ‖W_j‖ at that c, W_j the weights read by feature j.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from config import SPDConfig
from spd_model import ComponentModel, Mask, StackedLinear, weight_map


@dataclass(frozen=True)
class Toy:
    """One toy: its sizes, and how its target is trained."""

    kind: str  # tms | resid
    features: int
    width: int  # TMS: hidden width; ResidMLP: neurons per layer
    layers: int  # TMS: inserted identity layers; ResidMLP: MLPs
    batch: int  # for training the target
    steps: int
    lr: float

    @property
    def probability(self) -> float:
        return 0.05 if self.kind == "tms" else 0.01


TOYS = {
    "tms_5-2": Toy("tms", 5, 2, 0, 1024, 10_000, 5e-3),
    "tms_5-2_id": Toy("tms", 5, 2, 1, 1024, 10_000, 5e-3),
    "tms_40-10": Toy("tms", 40, 10, 0, 2048, 5_000, 5e-3),
    "tms_40-10_id": Toy("tms", 40, 10, 1, 2048, 5_000, 5e-3),
    "resid_1": Toy("resid", 100, 50, 1, 1024, 1_000, 3e-3),
    "resid_2": Toy("resid", 100, 25, 2, 1024, 1_000, 3e-3),
    "resid_3": Toy("resid", 102, 17, 3, 1024, 2_500, 3e-3),
}
D_EMBED = 1000


class TMS(nn.Module):
    def __init__(
        self, W: Float[Tensor, "stack hidden feature"], b: Float[Tensor, "stack feature"], identities: int
    ) -> None:
        super().__init__()
        eye = torch.eye(W.shape[1]).expand(W.shape[0], -1, -1).clone()
        self.linear1 = StackedLinear(W, None)
        self.hidden_layers = nn.ModuleList(StackedLinear(eye, None) for _ in range(identities))
        self.linear2 = StackedLinear(W.mT, b)

    def forward(self, x: Float[Tensor, "stack batch feature"]) -> Float[Tensor, "stack batch feature"]:
        h = self.linear1(x)
        for layer in self.hidden_layers:
            h = layer(h)
        return torch.relu(self.linear2(h))


class ResidBlock(nn.Module):
    def __init__(self, W_in: Float[Tensor, "stack mlp embed"], W_out: Float[Tensor, "stack embed mlp"]) -> None:
        super().__init__()
        self.mlp_in, self.mlp_out = StackedLinear(W_in, None), StackedLinear(W_out, None)

    def forward(self, r: Float[Tensor, "stack batch embed"]) -> Float[Tensor, "stack batch embed"]:
        return r + self.mlp_out(torch.relu(self.mlp_in(r)))


class ResidMLP(nn.Module):
    def __init__(self, W_E: Float[Tensor, "stack feature embed"], blocks: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.register_buffer("W_E", W_E)
        self.layers = nn.ModuleList(ResidBlock(*weights) for weights in blocks)

    def forward(self, x: Float[Tensor, "stack batch feature"]) -> Float[Tensor, "stack batch feature"]:
        r = x @ self.W_E
        for layer in self.layers:
            r = layer(r)
        return r @ self.W_E.mT

    def folded(self, x: Float[Tensor, "stack batch feature"]) -> Float[Tensor, "stack batch feature"]:
        """The same function, the embedding never formed: r = y R with y = [x, hidden units], R = [W_E; W_out]."""
        y, R = x, self.W_E
        for layer in self.layers:
            y = torch.cat([y, torch.relu(y @ (R @ layer.mlp_in.weight.mT))], -1)
            R = torch.cat([R, layer.mlp_out.weight.mT], -2)
        return y @ (R @ self.W_E.mT)


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
        gate, layer = self._ci_fns[path.replace(".", "-")], int(path.split(".")[1])
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


class ToyBatches:
    """Endless sparse features for all seeds at once; each draw is its own."""

    def __init__(self, toy: Toy, stack: int, batch: int, seed: int) -> None:
        self.toy, self.shape = toy, (stack, batch, toy.features)
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> "ToyBatches":
        return self

    def __next__(self) -> Float[Tensor, "stack batch feature"]:
        value, fires = torch.rand(2, *self.shape, generator=self.generator)
        if self.toy.kind == "resid":
            value = 2 * value - 1
        return value * (fires < self.toy.probability)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def _xavier(*shape: int, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=generator) * (2 / (shape[-1] + shape[-2])) ** 0.5)


def train_target(toy: Toy, stack: int, seed: int) -> nn.Module:
    """Train targets from different initialisations, on different data; `stack` of them, frozen, in eval mode.

    A TMS may settle where some feature has no direction at all, so that there is no mechanism to find: 4 · `stack` are
    trained and those of least loss are kept.
    """
    keep, stack = stack, 4 * stack if toy.features == 5 else stack
    g, batches = torch.Generator().manual_seed(seed), ToyBatches(toy, stack, toy.batch, seed + 1)
    n, w = toy.features, toy.width
    if toy.kind == "tms":
        W = _xavier(stack, w, n, generator=g)
        bias = torch.rand(stack, n, generator=g) * 2 - 1 if n == 5 else torch.zeros(stack, n)
        b = nn.Parameter(bias / w**0.5)  # nn.Linear's default for 5-2, zero for 40-10
        parameters, forward = [W, b], lambda x: torch.relu(x @ W.mT @ W + b[:, None])
    else:
        W_E = torch.randn(stack, n, D_EMBED, generator=g)
        W_E /= W_E.norm(dim=-1, keepdim=True)
        blocks = [
            (_xavier(stack, w, D_EMBED, generator=g), _xavier(stack, D_EMBED, w, generator=g))
            for _ in range(toy.layers)
        ]
        target = ResidMLP(W_E, blocks).requires_grad_(True)
        parameters, forward = list(target.parameters()), target.folded
    optimiser = torch.optim.AdamW(parameters, lr=toy.lr, weight_decay=0.01, fused=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, toy.steps if toy.kind == "resid" else 10**9)
    for _ in range(toy.steps):
        x = next(batches)
        label = x + torch.relu(x) if toy.kind == "resid" else x
        ((forward(x) - label).square().mean() * stack).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        cosine.step()
    if toy.kind == "tms":
        x = next(batches)
        best = (forward(x) - x).square().mean((1, 2)).argsort()[:keep].sort().values
        return TMS(W.detach()[best], b.detach()[best], toy.layers).requires_grad_(False).eval()
    return target.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------------- what it found


def _reads(toy: Toy, model: ComponentModel) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(W, V, U) of each module that reads features, W and V's input axis taken to the feature basis."""
    target, parts = model.target_model, model.components
    paths = ["linear1"] if toy.kind == "tms" else [f"layers.{i}.mlp_in" for i in range(toy.layers)]
    out = []
    for path in paths:
        W, V, U = weight_map(target.get_submodule(path)), parts[path].V.detach(), parts[path].U.detach()
        out.append((W, V, U) if toy.kind == "tms" else (target.W_E @ W, target.W_E @ V, U))
    return out


def recovery(toy: Toy, model: ComponentModel) -> tuple[Float[Tensor, "stack"], Float[Tensor, "stack"]]:
    """(MMCS, ML2R) of each seed, W_j what feature j feeds to one layer; means over layers."""
    cosines, ratios = [], []
    for W, V, U in _reads(toy, model):
        dot = V * (W @ U.mT)  # ⟨U_c V_cj, W_j⟩: stack, feature, component
        norm, length = V.abs() * U.norm(dim=-1)[:, None], W.norm(dim=-1, keepdim=True)
        best, index = (dot / (norm * length).clamp_min(1e-12)).max(-1, keepdim=True)
        cosines.append(best.mean((-1, -2)))
        ratios.append((norm / length).gather(-1, index).mean((-1, -2)))
    return torch.stack(cosines).mean(0), torch.stack(ratios).mean(0)


def importance_matrix(toy: Toy, model: ComponentModel) -> dict[str, Float[Tensor, "stack feature component"]]:
    """g_lo of every module for each feature alone, at 0.75."""
    x = 0.75 * torch.eye(toy.features).expand(model.stack, -1, -1)
    with torch.no_grad():
        z = model.importance_logits(model.inputs_capture(x)[0])
    return {path: model.lower(logit) for path, logit in z.items()}


def permute_to_identity(g: Float[Tensor, "feature component"]) -> Float[Tensor, "feature component"]:
    """Columns reordered so that the diagonal is as large as it can be (Hungarian); unmatched columns last, by mass."""
    _, match = linear_sum_assignment(g.numpy(), maximize=True)
    rest = [c for c in g.sum(0).argsort(descending=True).tolist() if c not in set(match)]
    return g[:, list(match) + rest]


def identity_error(g: Float[Tensor, "feature component"], tolerance: float) -> int:
    """Entries off the diagonal above the tolerance, plus entries on it below 1 − tolerance, after permuting."""
    g = permute_to_identity(g)
    diagonal = g.diagonal()
    off = (g > tolerance).sum() - (diagonal > tolerance).sum()
    return int(off + (diagonal < 1 - tolerance).sum())


def dense_error(g: Float[Tensor, "feature component"], k: int, tolerance: float) -> int:
    """The k columns of most mass need an entry ≥ 1 − tolerance; any entry above the tolerance elsewhere is an error."""
    g = g[:, g.sum(0).argsort(descending=True)]
    return int((g[:, :k].amax(0) < 1 - tolerance).sum() + (g[:, k:] > tolerance).sum())


def importance_errors(toy: Toy, g: dict[str, Float[Tensor, "stack feature component"]], tolerance: float) -> list[int]:
    """Per seed, summed over modules: features read and written one by one; identities and ResidMLP outputs dense.

    In a ResidMLP of several layers each input matrix has an identity of its own (features are spread over all layers)
    and each output matrix is dense of its layer's width.
    """
    stack = next(iter(g.values())).shape[0]
    if toy.kind == "tms":
        ones, dense = ["linear1", "linear2"], [path for path in g if path.startswith("hidden")]
    else:
        ones, dense = ([path for path in g if path.endswith(end)] for end in ("mlp_in", "mlp_out"))
    return [
        sum(identity_error(g[p][s], tolerance) for p in ones)
        + sum(dense_error(g[p][s], toy.width, tolerance) for p in dense)
        for s in range(stack)
    ]
