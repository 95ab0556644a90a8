"""What an optimiser does to a gradient, written out in float64: the references of whole training steps share it."""

import math

from torch import Tensor

Named = dict[str, Tensor]


def norm(g: Named) -> float:
    """√Σ g² over all tensors."""
    return math.sqrt(sum(own.square().sum().item() for own in g.values()))


def clipped(g: Named, longest: float) -> Named:
    """The gradient, shortened to this norm where it is longer."""
    return {name: own * min(1.0, longest / norm(g)) for name, own in g.items()}


class Adam:
    """m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², p ← (1 − lr · decay) p − lr · m̂ / (√v̂ + 1e-8)."""

    def __init__(self, betas: tuple[float, float], decay: float = 0.0) -> None:
        self.betas, self.decay, self.t = betas, decay, 0
        self.m: Named = {}
        self.v: Named = {}

    def __call__(self, p: Named, g: Named, lr: float) -> Named:
        """The parameters after one more step; p and g are left as they are."""
        (a, b), out = self.betas, {}
        self.t += 1
        for name, own in g.items():
            self.m[name] = a * self.m.get(name, 0) + (1 - a) * own
            self.v[name] = b * self.v.get(name, 0) + (1 - b) * own.square()
            root = (self.v[name] / (1 - b**self.t)).sqrt() + 1e-8
            out[name] = p[name].detach() * (1 - lr * self.decay) - lr * self.m[name] / (1 - a**self.t) / root
        return out
