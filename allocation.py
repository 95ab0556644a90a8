"""Active parts shared out over all layers together, in place of an equal number for each: by one threshold, or by trained k's.

    joint      part i of layer l is active  ⟺  |a_i| s_i > θ,   s_i² = Σ_j λ_j ‖what a unit of it writes to layer j‖²
               λ_j = KL(original ‖ MLP j alone replaced) / E‖y_j − ŷ_j‖²
    by_layer   k_l = argmin Σ_l KL(original ‖ MLP l alone replaced at k_l)   of coders trained at those k,   Σ_l k_l ≤ k · layers

Where errors are small and have nothing to do with each other, a model that loses e_j of what its MLP j writes loses
Σ_j λ_j E‖e_j‖² nats. Of all parts on a token, one that is left out adds (a_i s_i)² to that, whatever its layer: so those are
left out that add least, and layers and tokens share a mean k as they need it. λ is measured with the replacement's own
errors at an equal k in every layer. All is decided on text that is neither trained nor measured on.

With all four MLPs of `tiny` replaced (`free`, 16 thousand tokens), 32 and 64 neurons cost 1.74 and .47 nats, jointly .47 and
.105; transcoders after 3·10⁵ tokens at k 16 and 32 .383 and .294, jointly .379 and .286, by layer .345 and .273; a CLT at k 16
.316, jointly .298. A coder was trained for its k: it gains most where it was trained for those that it gets.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from checkpoints import Checkpoint
from coder_replacements import CoderReplacement, as_replacement, as_replacements
from devices import give_back_memory, in_processes
from losses import Original, sequence_losses
from patching import Captured, MLPFunction, kept_streams, patched, resumed
from replacement import Coded, replaced_logits
from sparse_ops import Codes
from target_models import TargetModel
from token_stream import held_out_text

TUNING_TOKENS = 8192  # or as many as there are
LOGITS = 2**24  # of a batch: bounds the memory of large vocabularies


def tuning_batches(target: TargetModel) -> list[Int[Tensor, "batch seq"]]:
    """Text that thresholds are set on."""
    tokens = held_out_text(target.stream("tuning", 1), TUNING_TOKENS, or_fewer=True).tokens.to(target.device)
    return list(tokens.split(max(1, min(16, LOGITS // (target.context * target.vocab_size)))))


def jointly(
    target: TargetModel, replacements: Sequence[Coded], batches: Sequence[Int[Tensor, "batch seq"]] | None = None
) -> list[Coded]:
    """Each replacement that has a k, with one threshold over all its layers under which k parts of a layer are active on average.

    `batches` of tokens (None: of the target's tuning text) decide the layers' weights and the threshold.
    """
    batches = tuning_batches(target) if batches is None else batches
    counted = [replacement for replacement in replacements if replacement.k is not None]
    found = in_processes(lambda replacement: least(target, replacement, batches), counted, target.device)
    shown = tqdm(found, total=len(counted), desc="thresholds over layers", unit="method", mininterval=1.0)
    return [replacement.with_least(own) for replacement, own in zip(counted, shown, strict=True)]


def least(
    target: TargetModel, replacement: Coded, batches: Sequence[Int[Tensor, "batch seq"]]
) -> dict[int, Float[Tensor, "part"]]:
    """θ / s_i of each part of each layer: what |a_i| has to exceed."""
    weights = {layer: own.weight for layer, own in alone(target, replacement, batches).items()}
    sizes = {layer: replacement.sizes(layer, weights) for layer in replacement.layers}
    theta = joint_threshold(target, replacement, sizes, batches)
    return {layer: theta / size for layer, size in sizes.items()}


def by_layer(
    target: TargetModel, checkpoints: Sequence[Checkpoint], batches: Sequence[Int[Tensor, "batch seq"]] | None = None
) -> list[CoderReplacement]:
    """Per-layer coders trained at several k, recombined: for each k but the least and the largest, a set of that mean k."""
    batches = tuning_batches(target) if batches is None else batches
    equal = as_replacements(checkpoints)
    costs: dict[int, dict[int, float]] = {layer: {} for layer in equal[0].layers}
    for replacement in equal:
        assert replacement.k is not None and replacement.layers == equal[0].layers, (
            f"{replacement.k=} {replacement.layers=}"
        )
        for layer, own in alone(target, replacement, batches).items():
            costs[layer][replacement.k] = own.kl
    trained = {(c.coder.config.layers[0], c.coder.k): c for c in checkpoints}
    found = []
    for k in sorted(next(iter(costs.values())))[1:-1]:
        mixed = as_replacement([trained[chosen] for chosen in allocated(costs, k * len(costs)).items()])
        mixed.method, mixed.k = f"{mixed.method}-by_layer", k
        found.append(mixed)
    return found


def allocated(costs: Mapping[int, Mapping[int, float]], total: int) -> dict[int, int]:
    """The k of each layer, one of those with a cost, by which the sum of costs is least where Σ k ≤ total."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by Σ k of the layers so far
    for options in costs.values():
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (cost, ks) in best.items():
            for k, own in options.items():
                if spent + k <= total:
                    longer[spent + k] = min(longer.get(spent + k, (math.inf, ())), (cost + own, (*ks, k)))
        best = longer
    assert best, f"{total=} is less than any k of {costs=}"
    return dict(zip(costs, min(best.values())[1]))


class Alone(NamedTuple):
    """What it costs to replace one layer alone, on a clean stream."""

    kl: float  # nats per token
    squared: float  # E‖y − ŷ‖²

    @property
    def weight(self) -> float:
        """λ: nats for each unit of squared error."""
        return max(self.kl, 0.0) / max(self.squared, 1e-30)


@torch.no_grad()
def alone(target: TargetModel, replacement: Coded, batches: Iterable[Int[Tensor, "batch seq"]]) -> dict[int, Alone]:
    """What each layer of a replacement costs alone; first positions, which are left to the model, are not counted."""
    kl, squared, n = dict.fromkeys(replacement.layers, 0.0), dict.fromkeys(replacement.layers, 0.0), 0
    resumable = replacement.layers if target.site == "mlp_out" else []  # elsewhere a site is not inside its block
    for tokens in batches:
        with kept_streams(target, resumable) as streams:
            logits, captured = _original_pass(target, tokens, replacement.layers)
        original, pass_ = Original.of(logits, tokens), replacement.frozen(captured)

        def observe(layer: int, y_hat: Tensor, captured: Captured = captured) -> None:
            y = captured.outputs[replacement.layers.index(layer)]
            squared[layer] += (y_hat - y)[:, 1:].float().square().sum(dtype=torch.float64).item()

        for layer in replacement.layers:
            with resumed(target, layer if layer in streams else 0, streams.get(layer)):
                q = replaced_logits(target, tokens, pass_, [layer], observe)
            kl[layer] += sequence_losses(original, q, tokens)[1].sum().item() * tokens.shape[1]
        n += len(tokens) * (tokens.shape[1] - 1)
        give_back_memory()
    return {layer: Alone(kl[layer] / n, squared[layer] / n) for layer in replacement.layers}


def _original_pass(
    target: TargetModel, tokens: Int[Tensor, "batch seq"], layers: Sequence[int]
) -> tuple[Float[Tensor, "batch seq vocab"], Captured]:
    """Logits of the original model, and what the MLPs of `layers` were given and wrote."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int) -> MLPFunction:
        def note(x: Tensor, y: Tensor) -> Tensor:
            seen[layer] = (x, y)
            return y

        return note

    with patched(target, {layer: keep(layer) for layer in layers}):
        logits = target.logits(tokens)
    return logits, Captured(*(torch.stack([seen[layer][side] for layer in layers]) for side in range(2)))


@torch.no_grad()
def joint_threshold(
    target: TargetModel, replacement: Coded, sizes: Mapping[int, Float[Tensor, "part"]],
    batches: Iterable[Int[Tensor, "batch seq"]],
) -> Float[Tensor, ""]:  # fmt: skip
    """θ that the scores |a| s of k parts per token and layer exceed; first positions are left out."""
    everything = replacement.with_least({layer: torch.zeros_like(size) for layer, size in sizes.items()})
    n, largest = 0, []
    for tokens in batches:
        pass_ = everything.frozen(_original_pass(target, tokens, replacement.layers)[1])
        scores = torch.cat([_counted(pass_.encode(i), tokens.shape[1], size) for i, size in sizes.items()])
        wanted = replacement.k * len(sizes) * len(tokens) * (tokens.shape[1] - 1)
        largest.append(scores.topk(min(2 * wanted, len(scores))).values)  # a batch may hold more than its share
        n += wanted
        give_back_memory()
    found = torch.cat(largest)
    return found.topk(min(n, len(found))).values[-1]


def _counted(codes: Codes, seq: int, size: Float[Tensor, "part"]) -> Float[Tensor, "active"]:
    """|a| s of the entries that are not of a sequence's first position."""
    return (codes.values.abs() * size[codes.cols])[codes.rows % seq != 0]
