"""Trained coders in place of a target's MLPs: SAEs, per-layer transcoders and cross-layer transcoders.

    SAE          ŷ = decode(encode(y))             y: what the MLP (or another site) wrote
    transcoder   ŷ = decode(encode(x)) (+ W_skip x)
    CLT          ŷʲ = Σ_{i ≤ j} decode^{i→j}(encodeⁱ(xⁱ))

Each shares the tensors of its coder, in eval mode; `top_k` puts the k largest latents of a token in place of the trained
sparsity rule. The same object trains: with its `members` in train mode, `training_codes` are the codes that learn.
"""

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from checkpoints import Checkpoint
from clt import CrossLayerTranscoder
from coder import Coder, LayerCoder
from config import CLTConfig, CoderConfig, EncoderConfig, SAEConfig
from logs import REPOSITORY
from replacement import UNKNOWN, Coded, CodedPass, Origin, PartGroup, method_name
from sae import BaseAutoencoder
from sparse_ops import Codes
from sparsity import SparseEncoder, TrainingCodes
from transcoder import BaseTranscoder


def deployed[K: Coder](coder: K, top_k: int | None) -> K:
    """The coder's deployed face as a view that shares its tensors; `top_k` puts TopK(top_k) in place of its rule.

    The view's codes are then the top_k largest positive pre-activations of each token, whatever the threshold.
    """
    shared = {id(t): t for t in chain(coder.parameters(), coder.buffers())}
    view = copy.deepcopy(coder, shared).eval()
    encoders = [(path, module) for path, module in view.named_modules() if isinstance(module, SparseEncoder)]
    for path, encoder in encoders if top_k is not None else ():
        view.set_submodule(path, encoder.with_top_k(top_k))
    return view


def _common_k(coders: Sequence[Coder], top_k: int | None) -> int | None:
    ks = {coder.k for coder in coders}
    return top_k if top_k is not None else ks.pop() if len(ks) == 1 else None


def _dead(coders: Sequence[Coder], origin: Origin) -> float | None:
    if not origin.train_tokens or origin.train_tokens < 1_000_000:
        return None
    return sum(coder.dead_fraction(1_000_000) for coder in coders) / len(coders)


def by_layer[K: LayerCoder](coders: Iterable[K]) -> dict[int, K]:
    """Layer → coder, in order. Raises ValueError where two coders stand for one layer."""
    ordered = sorted(coders, key=lambda coder: coder.config.layer)
    layers = [coder.config.layer for coder in ordered]
    if len(set(layers)) != len(layers):
        raise ValueError(f"one coder per layer, not layers {layers}: measure the others as a replacement of their own")
    return dict(zip(layers, ordered))


class Reading(NamedTuple):
    """What encodes at a layer, and what it reads there."""

    coder: Coder
    i: int  # which of the coder's layers that is
    x: Float[Tensor, "token d_in"]


class CoderReplacement(Coded):
    """Coders in place of the MLPs of the layers that they span; in train mode they are what training steps."""

    @property
    @abstractmethod
    def members(self) -> tuple[Coder, ...]:
        """The coders at work, in the order of their layers."""

    @abstractmethod
    def reading(self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "own d_out"]) -> Reading:
        """Who encodes at `layer` and what it reads there, given the MLP's input x and output y."""

    def encode(self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "own d_out"]) -> Codes:
        coder, i, read = self.reading(layer, x, y)
        return coder.encode_layer(i, read)

    def training_codes(
        self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "own d_out"]
    ) -> TrainingCodes:
        """Codes with gradients of all that the layer's encoder learns, and what its rule adds to the loss."""
        coder, i, read = self.reading(layer, x, y)
        return coder.training_codes(i, read)


class _PerLayer[K: LayerCoder](CoderReplacement):
    """One coder per layer."""

    def __init__(self, method: str, coders: Iterable[K], top_k: int | None, variant: str, origin: Origin) -> None:
        originals = by_layer(coders)
        self.method = method_name(method, top_k, variant)
        self.layers = tuple(originals)
        self.k = _common_k(list(originals.values()), top_k)
        self.origin = origin
        self.coders = {layer: deployed(coder, top_k) for layer, coder in originals.items()}

    @property
    def members(self) -> tuple[K, ...]:
        return tuple(self.coders.values())

    def gate_parameters(self, layers: Sequence[int]) -> int:
        return sum(self.coders[layer].gate_parameters for layer in layers)

    def dead(self) -> float | None:
        return _dead(list(self.coders.values()), self.origin)


class SAEReplacement(_PerLayer[BaseAutoencoder]):
    """Sparse autoencoders of one site, MLP outputs or another: what was written there, rebuilt from latents that read it."""

    reads_y = True

    def __init__(
        self, saes: Iterable[BaseAutoencoder], top_k: int | None = None, variant: str = "", origin: Origin = UNKNOWN
    ) -> None:
        saes = list(saes)
        sites = {sae.config.site for sae in saes}
        if len(sites) != 1:
            raise ValueError(f"these SAEs read {sorted(sites)}: measure the SAEs of each site as one replacement")
        self.site = sites.pop()
        place = "" if self.site == "mlp_out" else self.site
        super().__init__("sae", saes, top_k, "-".join(filter(None, [place, variant])), origin)

    def reading(self, layer: int, x: Tensor, y: Tensor) -> Reading:
        return Reading(self.coders[layer], 0, y)

    def write(self, pass_: CodedPass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return self.coders[layer].decode(pass_.encode(layer, x, y))

    def part_groups(self, layers: Sequence[int]) -> list[PartGroup]:
        configs = [self.coders[layer].config for layer in layers]
        return [PartGroup(c.layer, "latents", c.d_dict, 1, c.d_in + c.d_out) for c in configs]


class TranscoderReplacement(_PerLayer[BaseTranscoder]):
    """Per-layer transcoders, each in place of its MLP."""

    def __init__(
        self, coders: Iterable[BaseTranscoder], top_k: int | None = None, variant: str = "", origin: Origin = UNKNOWN
    ) -> None:
        coders = list(coders)
        skip = "skip" if any(coder.config.skip for coder in coders) else ""
        super().__init__("transcoder", coders, top_k, "-".join(filter(None, [skip, variant])), origin)

    def reading(self, layer: int, x: Tensor, y: Tensor) -> Reading:
        return Reading(self.coders[layer], 0, x)

    def write(self, pass_: CodedPass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return self.coders[layer].reconstruct(pass_.encode(layer, x, y), x)

    def part_groups(self, layers: Sequence[int]) -> list[PartGroup]:
        configs = [self.coders[layer].config for layer in layers]
        return [PartGroup(c.layer, "latents", c.d_dict, 1, c.d_in + c.d_out) for c in configs]

    def dense_parameters(self, layers: Sequence[int]) -> int:
        configs = [self.coders[layer].config for layer in layers]
        return sum(c.d_in * c.d_out for c in configs if c.skip)


class CLTReplacement(CoderReplacement):
    """A cross-layer transcoder. With one layer replaced, earlier layers' codes are those of the clean pass."""

    def __init__(
        self, coder: CrossLayerTranscoder, top_k: int | None = None, variant: str = "", origin: Origin = UNKNOWN
    ) -> None:
        self.method = method_name("clt", top_k, variant)
        self.layers = coder.config.layers
        self.k = _common_k([coder], top_k)
        self.origin = origin
        self.coder = deployed(coder, top_k)

    @property
    def members(self) -> tuple[CrossLayerTranscoder]:
        return (self.coder,)

    def gate_parameters(self, layers: Sequence[int]) -> int:
        """Of every layer that writes to one of `layers`."""
        sources = zip(self.layers, self.coder.encoders)
        return sum(p.numel() for i, encoder in sources if i <= max(layers) for p in encoder.parameters())

    def reading(self, layer: int, x: Tensor, y: Tensor) -> Reading:
        return Reading(self.coder, self.layers.index(layer), x)

    def write(self, pass_: CodedPass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        j = self.layers.index(layer)
        pass_.encode(layer, x, y)
        return self.coder.decode_layer(j, [pass_.encode(source) for source in self.layers[: j + 1]])

    def part_groups(self, layers: Sequence[int]) -> list[PartGroup]:
        c = self.coder.config
        targets = {source: sum(layer >= source for layer in layers) for source in self.layers}
        return [PartGroup(i, "latents", c.d_dict, n, c.d_in + n * c.d_out) for i, n in targets.items() if n]

    def dead(self) -> float | None:
        return _dead([self.coder], self.origin)


def as_replacement(group: Sequence[Checkpoint], top_k: int | None = None) -> CoderReplacement:
    """One CLT, or one coder per layer; `top_k` puts the top_k largest of a token in place of the trained rule."""
    records, coders = [checkpoint.record for checkpoint in group], [checkpoint.coder for checkpoint in group]
    seconds, paths = sum(record.train_seconds for record in records), " ".join(c.path for c in group)
    paths = paths.replace(f"{REPOSITORY}/", "")  # a table means the same on every machine
    origin = Origin(records[0].seed, records[0].train_tokens, seconds, paths)
    return REPLACEMENTS[type(coders[0].config)](coders, top_k, records[0].variant, origin)


def _one_clt(coders: Sequence[CrossLayerTranscoder], top_k: int | None, variant: str, origin: Origin) -> CLTReplacement:
    assert len(coders) == 1, f"{len(coders)} cross-layer transcoders cannot stand in one replacement"
    return CLTReplacement(coders[0], top_k, variant, origin)


REPLACEMENTS: dict[type[CoderConfig], Callable[..., CoderReplacement]] = {
    SAEConfig: SAEReplacement,
    EncoderConfig: TranscoderReplacement,
    CLTConfig: _one_clt,
}


def as_replacements(checkpoints: Sequence[Checkpoint], top_k: int | None = None) -> list[CoderReplacement]:
    """One replacement per group of `side_by_side`."""
    return [as_replacement(group, top_k) for group in side_by_side(checkpoints)]


def side_by_side(checkpoints: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    """Each CLT alone, and per-layer coders that differ in their layer alone together, of equal seeds and objectives.

    Of several such coders of one layer the first of each layer stand together, then the second, and so on.
    """
    groups: dict[object, list[Checkpoint]] = {}
    before: Counter[object] = Counter()
    for checkpoint in checkpoints:
        config, trained = checkpoint.coder.config, (checkpoint.record.seed, checkpoint.record.objectives)
        same_layer = (config, trained)
        groups.setdefault((config.family, trained, before[same_layer]), []).append(checkpoint)
        before[same_layer] += 1
    return list(groups.values())
