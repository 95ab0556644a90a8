"""Trained coders in place of a target's MLPs: SAEs, per-layer transcoders and cross-layer transcoders.

    SAE          ŷ = decode(encode(y))             y: what the MLP (or another site) wrote
    transcoder   ŷ = decode(encode(x)) (+ W_skip x)
    CLT          ŷʲ = Σ_{i ≤ j} decode^{i→j}(encodeⁱ(xⁱ))

Each shares the tensors of its coder, in eval mode; `top_k` puts the k largest latents of a token in place of the trained
sparsity rule.
"""

import copy
import dataclasses
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor

from checkpoints import Checkpoint
from clt import CrossLayerTranscoder
from coder import Coder, LayerCoder
from config import BatchTopK, CLTConfig, CoderConfig, EncoderConfig, SAEConfig, TopK
from logs import REPOSITORY
from replacement import UNKNOWN, Coded, CodedPass, Origin, PartGroup, jointly_named, method_name
from sae import BaseAutoencoder
from sparse_ops import Codes
from sparsity import SparseEncoder, TrainingCodes
from transcoder import BaseTranscoder


def deployed[K: Coder](coder: K, top_k: int | None) -> K:
    """The coder's deployed face as a view that shares its tensors; `top_k` puts TopK(top_k) in place of its rule.

    The view's codes are then the top_k largest positive pre-activations of each token, whatever the threshold.
    """
    return _view(coder, lambda _, encoder: encoder if top_k is None else encoder.with_top_k(top_k))


def _view[K: Coder](coder: K, swapped: Callable[[int, SparseEncoder[Any]], SparseEncoder[Any]]) -> K:
    """The coder in eval mode, sharing its tensors, with swapped(i, encoder) in place of the encoder of its i-th layer."""
    shared = {id(t): t for t in chain(coder.parameters(), coder.buffers())}
    view = copy.deepcopy(coder, shared).eval()
    encoders = [(path, module) for path, module in view.named_modules() if isinstance(module, SparseEncoder)]
    for i, (path, encoder) in enumerate(encoders):
        view.set_submodule(path, swapped(i, encoder))
    return view


def _common_k(coders: Sequence[Coder], top_k: int | None) -> int | None:
    ks = {coder.k for coder in coders}
    return top_k if top_k is not None else ks.pop() if len(ks) == 1 else None


RULE_NAMES: dict[type[Any], str] = {BatchTopK: "", TopK: "per_token"}  # in methods; other rules have their class' name


def _named(method: str, coders: Sequence[Coder[Any]], top_k: int | None, *variants: str) -> str:
    """A method with what tells it from the plain one: what the coders say of themselves, their rule, and more."""
    rule = type(coders[0].config.rule)
    own = sorted({coder.config.variant for coder in coders})[-1]
    words = (own, RULE_NAMES.get(rule, rule.__name__.lower()), *variants)
    return method_name(method, top_k, "-".join(filter(None, words)))


def one_per_layer[K: LayerCoder](coders: Iterable[K]) -> dict[int, K]:
    """Layer → coder, in order. Raises ValueError where two coders stand for one layer."""
    ordered = sorted(coders, key=lambda coder: coder.config.layer)
    layers = [coder.config.layer for coder in ordered]
    if len(set(layers)) != len(layers):
        raise ValueError(f"one coder per layer, not layers {layers}: measure the others as a replacement of their own")
    return dict(zip(layers, ordered))


class Reading(NamedTuple):
    """What encodes at a layer, and what it reads there."""

    coder: Coder[Any]
    i: int  # which of the coder's layers that is
    x: Float[Tensor, "token d_in"]


class CoderReplacement(Coded):
    """Coders in place of the MLPs of the layers that they span; the same object trains, with its `members` in train mode."""

    @property
    @abstractmethod
    def members(self) -> tuple[Coder[Any], ...]:
        """The coders at work, in the order of their layers."""

    @abstractmethod
    def reading(self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "own d_out"]) -> Reading:
        """Who encodes at `layer` and what it reads there, given the MLP's input x and output y."""

    @abstractmethod
    def encoders(self, layers: Sequence[int]) -> list[SparseEncoder[Any]]:
        """Those at work when only `layers` are replaced."""

    def encode(self, layer: int, x: Tensor, y: Tensor) -> Codes:
        coder, i, read = self.reading(layer, x, y)
        return coder.encoders[i].encode(coder.encoder_inputs(i, read))

    def training_codes(
        self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "own d_out"]
    ) -> TrainingCodes:
        """The codes of `layer` with gradients of all that its encoder learns, and what its rule adds to the loss."""
        coder, i, read = self.reading(layer, x, y)
        return coder.encoders[i].encode_with_penalty(coder.encoder_inputs(i, read), coder.decoders[i])

    def values_at(self, layer: int, x: Tensor, y: Tensor, active: Codes) -> Codes:
        coder, i, read = self.reading(layer, x, y)
        return coder.encoders[i].values_at(coder.encoder_inputs(i, read), active)

    def gate_parameters(self, layers: Sequence[int]) -> int:
        return sum(p.numel() for encoder in self.encoders(layers) for p in encoder.parameters())

    def dead(self, layers: Sequence[int]) -> float | None:
        """Silent in the last tenth of the training tokens, at most ten million: later than k has fallen to what it stays at."""
        if self.origin.train_tokens is None:
            return None
        window = min(10_000_000, self.origin.train_tokens // 10)
        silent = torch.cat([encoder.tokens_since_fired >= window for encoder in self.encoders(layers)])
        return silent.double().mean().item()


class _PerLayer[K: LayerCoder](CoderReplacement):
    """One coder per layer."""

    def with_least(self, least: Mapping[int, Float[Tensor, "part"]]) -> Self:
        view = copy.copy(self)
        view.method = jointly_named(self.method)
        view.coders = {i: _view(own, lambda _, e, i=i: e.with_least(least[i])) for i, own in self.coders.items()}
        return view

    def sizes(self, layer: int, weights: Mapping[int, float]) -> Float[Tensor, "part"]:
        coder = self.coders[layer]
        return (weights[layer] ** 0.5 * coder.W_dec.norm(dim=1) / coder.y_scale).detach()

    def __init__(self, method: str, coders: Iterable[K], top_k: int | None, variant: str, origin: Origin) -> None:
        originals = one_per_layer(coders)
        self.method = _named(method, list(originals.values()), top_k, variant)
        self.layers = tuple(originals)
        self.k = _common_k(list(originals.values()), top_k)
        self.origin = origin
        self.coders = {layer: deployed(coder, top_k) for layer, coder in originals.items()}

    @property
    def members(self) -> tuple[K, ...]:
        return tuple(self.coders.values())

    def encoders(self, layers: Sequence[int]) -> list[SparseEncoder[Any]]:
        return [self.coders[layer].encoder for layer in layers]


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
        super().__init__("sae", saes, top_k, variant, origin)

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
        super().__init__("transcoder", coders, top_k, variant, origin)

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
        self.method = _named("clt", [coder], top_k, variant)
        self.layers = coder.config.layers
        self.k = _common_k([coder], top_k)
        self.origin = origin
        self.coder = deployed(coder, top_k)

    def with_least(self, least: Mapping[int, Float[Tensor, "part"]]) -> Self:
        view = copy.copy(self)
        view.method = jointly_named(self.method)
        view.coder = _view(self.coder, lambda i, encoder: encoder.with_least(least[self.layers[i]]))
        return view

    def sizes(self, layer: int, weights: Mapping[int, float]) -> Float[Tensor, "part"]:
        coder, i = self.coder, self.layers.index(layer)
        written = coder.decoders[i].view(coder.config.d_dict, -1, coder.config.d_out) / coder.y_scale[i:, None]
        each = torch.tensor([weights[target] for target in self.layers[i:]], device=written.device)
        return (written.square().sum(-1) @ each).sqrt().detach()

    @property
    def members(self) -> tuple[CrossLayerTranscoder]:
        return (self.coder,)

    def encoders(self, layers: Sequence[int]) -> list[SparseEncoder[Any]]:
        """Of every layer that writes to one of `layers`."""
        return [encoder for i, encoder in zip(self.layers, self.coder.encoders) if i <= max(layers)]

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


def as_replacement(group: Sequence[Checkpoint], top_k: int | None = None) -> CoderReplacement:
    """One CLT, or one coder per layer; `top_k` puts the top_k largest of a token in place of the trained rule.

    Raises ValueError for coders whose seed, tokens or recipe differ: their row would say of all what is so of one.
    """
    records, coders = [checkpoint.record for checkpoint in group], [checkpoint.coder for checkpoint in group]
    if len({_training(checkpoint) for checkpoint in group}) > 1:
        raise ValueError(
            f"{records[0].name} and {records[-1].name} were trained differently: measure each as a replacement"
        )
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
    """One replacement for each set of `side_by_side`."""
    return [as_replacement(own, top_k) for own in side_by_side(checkpoints)]


def side_by_side(checkpoints: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    """Sets of coders that replace their layers together: each CLT, and per-layer coders that differ in their layer alone.

    Coders that differ in k too stand together where each layer has one alone. Those of one set are of equal seeds, tokens and
    recipes. Of several equal coders of one layer the first of each layer stand together, then the second, and so on.
    """
    of_one_rule: dict[object, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        family = checkpoint.coder.config.family
        whatever_k = dataclasses.replace(family, rule=type(family.rule)), _training(checkpoint)
        of_one_rule.setdefault(whatever_k, []).append(checkpoint)
    return [own for found in of_one_rule.values() for own in _each_layer_once(found)]


def _training(checkpoint: Checkpoint) -> tuple[object, ...]:
    """What coders of one row have in common beside their kind."""
    record = checkpoint.record
    return record.seed, record.train_tokens, record.recipe


def _each_layer_once(found: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    """Checkpoints in sets that have a layer once."""
    layers = [checkpoint.coder.config.layers for checkpoint in found]
    if len(set(layers)) == len(layers) and isinstance(found[0].coder, LayerCoder):
        return [list(found)]
    groups: dict[object, list[Checkpoint]] = {}
    before: Counter[object] = Counter()
    for checkpoint in found:
        config = checkpoint.coder.config
        groups.setdefault((config.family, before[config]), []).append(checkpoint)
        before[config] += 1
    return list(groups.values())
