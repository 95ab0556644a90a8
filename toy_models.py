"""Toy targets whose mechanisms are known, several seeds stacked side by side.

TMS:       out = relu(W₁ᵀ (I) W₁ x + b);  x_i ~ U[0, 1] with probability .05, else 0;  loss mean (x − out)²
ResidMLP:  r ← r + W_out relu(W_in r) per layer, r₀ = x W_E, out = r W_Eᵀ;  x_i ~ U[−1, 1] w.p. .01;  label x + relu(x)

Definitions, sizes and recipes: goodfire-ai/spd (arXiv 2506.20790).
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import reduce, repeat
from jaxtyping import Float
from torch import Tensor, nn

from spd_model import StackedLinear


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
        eye = repeat(torch.eye(W.shape[1]), "hidden out -> stack hidden out", stack=len(W)).clone()
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


class ToyBatches:
    """Endless sparse features for all seeds at once; each draw is its own.

    `active`: only draws in which some feature fires. Of all draws these are 1 − (1 − p)ⁿ: 23 % (5 features), 87 % (40) and
    63 % (100). The first feature to fire is i with probability p (1 − p)ⁱ / (1 − (1 − p)ⁿ); those after it fire as ever.
    """

    def __init__(self, toy: Toy, stack: int, batch: int, seed: int, active: bool = False) -> None:
        self.toy, self.shape, self.active = toy, (stack, batch, toy.features), active
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> "ToyBatches":
        return self

    def __next__(self) -> Float[Tensor, "stack batch feature"]:
        value, fires = torch.rand(2, *self.shape, generator=self.generator)
        if self.toy.kind == "resid":
            value = 2 * value - 1
        on = fires < self.toy.probability
        if self.active:
            i = torch.arange(self.toy.features)
            # of all draws: the first to fire is i or before
            share = (1 - (1 - self.toy.probability) ** (i + 1)).to(fires)
            drawn = share[-1] * torch.rand(self.shape[:-1], generator=self.generator)
            first = torch.searchsorted(share, drawn).clamp_max(self.toy.features - 1)[..., None]
            on = (i == first) | ((i > first) & on)
        return value * on

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
        losses = reduce((forward(x) - x).square(), "stack batch feature -> stack", "mean")
        best = losses.argsort()[:keep].sort().values
        return TMS(W.detach()[best], b.detach()[best], toy.layers).requires_grad_(False).eval()
    return target.requires_grad_(False).eval()
