"""Where latents are active in held-out text, and which of them are examined.

The first position of a sequence belongs to no example: coders never train on it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from methods_and_nulls import METHODS, InterpSettings, replacements
from torch import Tensor

from patching import capture
from replacement import Coded
from target_models import TargetModel

WIDTH = 16  # tokens of an example: texts are cut into disjoint windows


class Activations(NamedTuple):
    """Activations over held-out text, sorted by latent."""

    tokens: Int[Tensor, "sequence seq"]
    latents: Int[Tensor, "active"]
    places: Int[Tensor, "active"]  # token, counted through the text
    values: Float[Tensor, "active"]  # > 0
    d_dict: int

    @property
    def counts(self) -> Int[Tensor, "d_dict"]:
        return torch.bincount(self.latents, minlength=self.d_dict)

    @property
    def density(self) -> Float[Tensor, "d_dict"]:
        """Share of tokens on which a latent is active; first positions don't count."""
        return self.counts / (self.tokens.numel() - len(self.tokens))

    def of(self, latent: int) -> Float[Tensor, "sequence seq"]:
        """One latent's activations on every token."""
        begin, end = torch.searchsorted(self.latents, torch.tensor([latent, latent + 1])).tolist()
        flat = torch.zeros(self.tokens.numel())
        flat[self.places[begin:end]] = self.values[begin:end]
        return flat.view(self.tokens.shape)


@torch.inference_mode()
def collect(target: TargetModel, replacement: Coded, tokens: Int[Tensor, "sequence seq"], *, layer: int) -> Activations:
    """Where each latent of one layer is active, on clean inputs; |h| for neurons."""
    latents, places, values, seq = [], [], [], tokens.shape[1]
    for start in range(0, len(tokens), 16):
        x, y = (kept[0].flatten(0, 1).float() for kept in capture(target, tokens[start : start + 16], [layer])[:2])
        codes = replacement.encode(layer, x, y)
        kept = (codes.values != 0) & (codes.rows % seq != 0)
        latents.append(codes.cols[kept].cpu())
        places.append(codes.rows[kept].cpu() + start * seq)
        values.append(codes.values[kept].abs().cpu())
    order = torch.cat(latents).argsort(stable=True)
    parts = (torch.cat(part)[order].clone() for part in (latents, places, values))
    return Activations(tokens.cpu(), *parts, codes.d_dict)


def shuffled(acts: Activations, generator: torch.Generator) -> Activations:
    """The same activations dealt to other tokens: densities and values stay, their meaning goes."""
    sequences, seq = acts.tokens.shape
    inner = torch.arange(sequences * seq).view(sequences, seq)[:, 1:].flatten()
    dealt = torch.arange(sequences * seq)
    dealt[inner] = inner[torch.randperm(len(inner), generator=generator)]
    return acts._replace(places=dealt[acts.places])


def all_activations(
    s: InterpSettings, target: TargetModel, tokens: Int[Tensor, "sequence seq"]
) -> dict[str, Activations]:
    """Method or null → activations on the same held-out text."""
    if "transcoder" not in s.methods or not set(s.methods) <= set(METHODS):
        raise ValueError(f"--methods {' '.join(s.methods)}: choose among {', '.join(METHODS)}, and keep transcoder")
    real = [name for name in s.methods if name != "transcoder-shuffled"]
    found = {name: collect(*pair, tokens, layer=s.layer) for name, pair in replacements(s, target, real).items()}
    if "transcoder-shuffled" in s.methods:
        found["transcoder-shuffled"] = shuffled(found["transcoder"], torch.Generator().manual_seed(s.seed))
    return {name: found[name] for name in s.methods}


def draw_latents(
    acts: Activations, n: int, *, active: int, generator: torch.Generator, silent: int = 1
) -> dict[str, list[int]]:
    """n latents drawn `uniform`ly and n by `mass`, among those with at least so many active and silent windows.

    Fewer than n where there are fewer; {} where there is none, said in one line.
    """
    n_windows = acts.tokens.numel() // WIDTH
    pairs = torch.unique(acts.latents * n_windows + acts.places // WIDTH)
    counts = torch.bincount(pairs // n_windows, minlength=acts.d_dict)
    usable = (counts >= active) & (counts <= n_windows - silent)
    if not usable.any():
        print(f"not examined: none of {acts.d_dict} latents is active in {active} windows and silent in {silent}")
        return {}
    n, mass = min(n, int(usable.sum())), torch.zeros(acts.d_dict).index_add_(0, acts.latents, acts.values)
    weights = {"uniform": usable.float(), "mass": mass * usable}
    return {how: torch.multinomial(weight, n, generator=generator).tolist() for how, weight in weights.items()}
