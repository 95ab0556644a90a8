"""What the parts of this experiment share: coders and their nulls, and where their latents are active.

    method               codes
    transcoder, clt      deployed sparse codes of one layer's latents (the CLT's latents of that layer)
    neurons              the k neurons of a token with the largest |h| · ‖W_out‖
    transcoder-shuffled  null: the transcoder's activations, dealt to other tokens (one permutation of all tokens)
    transcoder-random    null: a transcoder trained alike on the target with every weight matrix drawn afresh

Held-out text only. The first position of a sequence belongs to no example: coders never train on it.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baselines import NeuronsReplacement
from checkpoints import checkpoint_folder
from coder_replacements import as_replacement
from config import BatchTopK
from patching import capture
from recipes import clt_configs, train_coders, transcoder_configs
from replacement import Coded
from target_models import TargetModel, weights_fingerprint

WIDTH = 16  # tokens of an example: texts are cut into disjoint windows
METHODS = ("transcoder", "clt", "neurons", "transcoder-shuffled", "transcoder-random")


@dataclass(frozen=True)
class Common:
    target: str = "pile"
    layer: int = 3
    layers: tuple[int, ...] = (0, 1, 2, 3)  # layers the coders are trained on
    k: int = 16  # active latents (neurons) per token and layer
    d_dict: int = 4096  # latents per layer
    tokens: int = 500_000_000  # training tokens
    batch: int = 4096  # tokens per training batch
    eval_tokens: int = 1_000_000  # held-out tokens that examples are taken from
    latents: int = 100  # latents examined per method, and per way of drawing them
    methods: tuple[str, ...] = METHODS  # methods and nulls examined (faithfulness has its own)
    device: str = "cuda"
    seed: int = 0
    replot: bool = False  # draw the figure from the results and stop


TINY = Common("tiny", d_dict=1536, tokens=1_000_000, batch=2048, eval_tokens=131_072, latents=50, device="cpu")


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


def randomised(target: TargetModel, seed: int) -> TargetModel:
    """The same architecture; every matrix (embeddings too) drawn afresh with its own mean and deviation. 2501.17727."""
    model, generator = copy.deepcopy(target.model), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim >= 2:
            fresh = torch.randn(p.shape, generator=generator).to(p)
            p.data.copy_(p.mean() + p.std() * fresh)
    name, fingerprint = f"{target.name}-random", weights_fingerprint(model)
    return dataclasses.replace(target, name=name, model=model, fingerprint=fingerprint)


def replacements(s: Common, target: TargetModel, names: Sequence[str]) -> dict[str, tuple[TargetModel, Coded]]:
    """Method → (the target it belongs to, its replacement); missing coders are trained with the usual recipe."""
    rule, found, folder = [BatchTopK(s.k)], {}, checkpoint_folder(s.target)
    for name in names:
        own = randomised(target, s.seed) if name == "transcoder-random" else target
        layers = (s.layer,) if name == "transcoder-random" else s.layers
        if name == "neurons":
            found[name] = (own, NeuronsReplacement(own, layers, s.k))
            continue
        build = clt_configs if name == "clt" else transcoder_configs
        coders = train_coders(build(own, layers, rule, s.d_dict), own, s.tokens, s.batch, s.seed, folder)
        found[name] = (own, as_replacement(coders))
    return found


@torch.inference_mode()
def collect(
    s: Common, target: TargetModel, replacement: Coded, tokens: Int[Tensor, "sequence seq"]
) -> Activations:
    """Where each latent of `s.layer` is active, on clean inputs; |h| for neurons."""
    latents, places, values, seq = [], [], [], tokens.shape[1]
    for start in range(0, len(tokens), 16):
        x, y = (kept[0].flatten(0, 1).float() for kept in capture(target, tokens[start : start + 16], [s.layer]))
        codes = replacement.encode(s.layer, x, y)
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


def all_activations(s: Common, target: TargetModel, tokens: Int[Tensor, "sequence seq"]) -> dict[str, Activations]:
    """Method or null → activations on the same held-out text."""
    if "transcoder" not in s.methods or not set(s.methods) <= set(METHODS):
        raise SystemExit(f"--methods {' '.join(s.methods)}: choose among {', '.join(METHODS)}, and keep transcoder")
    real = [name for name in s.methods if name != "transcoder-shuffled"]
    found = {name: collect(s, *pair, tokens) for name, pair in replacements(s, target, real).items()}
    if "transcoder-shuffled" in s.methods:
        found["transcoder-shuffled"] = shuffled(found["transcoder"], torch.Generator().manual_seed(s.seed))
    return {name: found[name] for name in s.methods}


def draw_latents(
    acts: Activations, n: int, active: int, generator: torch.Generator, silent: int = 1
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
