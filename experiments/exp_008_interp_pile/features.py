"""What the parts of this experiment share: coders and their nulls, where their latents are active, and examples of it.

    method               codes
    transcoder, clt      deployed sparse codes of one layer's latents (the CLT's latents of that layer)
    neurons              the k neurons of a token with the largest |h| · ‖W_out‖
    transcoder-shuffled  null: the transcoder's activations, dealt to other tokens (one permutation of all tokens)
    transcoder-random    null: a transcoder trained alike on the target with every weight matrix drawn afresh

Held-out text only. The first position of a sequence belongs to no example: coders never train on it.
"""

import copy
import csv
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from config import BatchTopK
from logs import atomic_path
from replacement import Neurons, Replacement
from study import as_replacement, checkpoint_folder, clt_configs, train_coders, transcoder_configs
from target_models import TargetModel, capture, weights_fingerprint

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


def replacements(s: Common, target: TargetModel, names: Sequence[str]) -> dict[str, tuple[TargetModel, Replacement]]:
    """Method → (the target it belongs to, its replacement); missing coders are trained with the usual recipe."""
    rule, found, folder = [BatchTopK(s.k)], {}, checkpoint_folder(s.target)
    for name in names:
        own = randomised(target, s.seed) if name == "transcoder-random" else target
        layers = (s.layer,) if name == "transcoder-random" else s.layers
        if name == "neurons":
            found[name] = (own, Neurons(own, layers, s.k))
            continue
        build = clt_configs if name == "clt" else transcoder_configs
        coders = train_coders(build(own, layers, rule, s.d_dict), own, s.tokens, s.batch, s.seed, folder)
        found[name] = (own, as_replacement(coders))
    return found


@torch.inference_mode()
def collect(
    s: Common, target: TargetModel, replacement: Replacement, tokens: Int[Tensor, "sequence seq"]
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


def draw_latents(acts: Activations, n: int, at_least: int, generator: torch.Generator) -> dict[str, list[int]]:
    """n latents drawn `uniform`ly and n by `mass` of activation, among those active in `at_least` windows."""
    n_windows = acts.tokens.numel() // WIDTH
    pairs = torch.unique(acts.latents * n_windows + acts.places // WIDTH)
    alive = torch.bincount(pairs // n_windows, minlength=acts.d_dict) >= at_least
    mass = torch.zeros(acts.d_dict).index_add_(0, acts.latents, acts.values) * alive
    n = min(n, int(alive.sum()))
    if n == 0:
        raise SystemExit(f"no latent is active in {at_least} windows of {WIDTH} tokens: give more --eval-tokens")
    weights = {"uniform": alive.float(), "mass": mass}
    return {how: torch.multinomial(weight, n, generator=generator).tolist() for how, weight in weights.items()}


# ------------------------------------------------------------------------------------------------------- examples


def windows(grid: Tensor) -> Tensor:
    """(sequence, seq) cut into disjoint windows: (window, WIDTH)."""
    assert grid.shape[1] % WIDTH == 0, f"{grid.shape=} {WIDTH=}"
    return grid.view(-1, WIDTH)


def text(tokenizer: Any, tokens: Int[Tensor, "width"], active: Bool[Tensor, "width"]) -> str:
    """A window as text; runs of active tokens stand in << >>."""
    pieces, inside = [], False
    for token, on in zip(tokens.tolist(), active.tolist()):
        pieces.append(("<<" if on and not inside else ">>" if inside and not on else "") + tokenizer.decode([token]))
        inside = on
    return "".join(pieces) + (">>" if inside else "")


def numbered(pieces: Sequence[str]) -> str:
    """One numbered, quoted example per line of a prompt."""
    return "\n".join(f"{i}. {json.dumps(piece, ensure_ascii=False)}" for i, piece in enumerate(pieces, 1))


def write_csv(path: Path, rows: Sequence[NamedTuple]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0]._fields)
        writer.writerows([f"{v:.5g}" if isinstance(v, float) else v for v in row] for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean with its 95 % percentile bootstrap over the values (latents, or tokens of different sequences)."""
    sample = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(sample), (1000, len(sample)), generator=torch.Generator().manual_seed(seed))
    low, high = sample[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(sample.mean().item(), low, high)
