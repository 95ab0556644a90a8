"""What stands in for a target's MLPs: one interface for every method and baseline, under the same protocols.

    y_hat = pass_(layer, x, y)      x: the MLP's input, y: the MLP's own output there, both on the stream as it runs

A `Replacement` opens a `Pass` for each forward pass. In a pass opened by `free` everything reads the running stream, which
earlier replaced layers may have changed. In one opened by `gated` a clean pass decides what is active, and what it opens
(latents, neurons, components, and a skip or a delta beside them) reads the running stream. In one opened by `frozen` everything
reads the clean stream: each layer writes what it would write there, whatever the method. `Coded` replacements decide by codes:
dictionaries, and an MLP's own neurons. Others (SPD, ablations) bring a pass of their own.
Only an SAE and the identity read y beyond a sequence's first position, so the others' MLPs are not computed beyond it.
A pass remembers what was active, so that every method is counted by the same lines of `metrics.py`:

    active parts per MLP = Σ_groups L0 · writes / layers,    active parameters = Σ_groups L0 · part_parameters + dense

The first position of a sequence is left to the model by `replaced_logits`: coders never train on it, no metric counts it.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Self

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from config import Site
from patching import Captured, patched
from sparse_ops import Codes, FullLayout, to_dense
from target_models import TargetModel


class Origin(NamedTuple):
    """Where a replacement comes from: columns of the table, empty where they don't apply."""

    seed: int | None = None
    train_tokens: int | None = None
    train_seconds: float | None = None
    checkpoint: str = ""


UNKNOWN = Origin()


class PartGroup(NamedTuple):
    """A group of parts that are counted together: a layer's latents, neurons, or one weight matrix's components."""

    layer: int
    name: str  # "latents", "neurons", or the weight matrix
    n_parts: int
    writes: int  # replaced layers that one of its parts writes to
    part_parameters: int  # parameters that one active part brings into play


class Active(NamedTuple):
    """The (token, part) pairs that were active in one module in one pass."""

    rows: Int[Tensor, "active"]  # token, counted through the batch of sequences
    cols: Int[Tensor, "active"]  # part

    @staticmethod
    def of(codes: Codes) -> "Active":
        """Entries of value 0 (a top-k larger than the number of positive pre-activations) are not active."""
        nonzero = codes.values != 0
        return Active(codes.rows[nonzero], codes.cols[nonzero])


Key = tuple[int, str]  # a layer, and the name of a group of its parts


class Sources(NamedTuple):
    """What an adversary chose, the same at every token: a number in [0, 1] for each part and for each remainder."""

    parts: Mapping[Key, Float[Tensor, "part"]]
    deltas: Mapping[Key, Float[Tensor, ""]]
    dealt: Mapping[Key, Int[Tensor, "part"]] = MappingProxyType(
        {}
    )  # whose gate each part gets; where none is told, its own

    def gates(self, key: Key, on: Float[Tensor, "*batch part"]) -> Float[Tensor, "*batch part"]:
        """The gates of a group, dealt."""
        return on[..., self.dealt[key]] if key in self.dealt else on

    def masks(self, key: Key, on: Float[Tensor, "*batch part"]) -> Float[Tensor, "*batch part"]:
        """m = g + (1 − g) s."""
        return torch.lerp(self.parts[key].expand_as(on), torch.ones_like(on), self.gates(key, on))


class Pass(ABC):
    """One forward pass with MLPs replaced: called at each of them, in order; `active` keeps what was at work."""

    def __init__(self, replacement: "Replacement") -> None:
        self.replacement = replacement
        self.active: dict[tuple[int, str], Active] = {}

    @property
    def reads_y(self) -> bool:
        """Whether it is given what the MLP itself writes on the running stream, at every position."""
        return self.replacement.reads_y

    @abstractmethod
    def __call__(
        self, layer: int, x: Float[Tensor, "batch seq d_in"], y: Float[Tensor, "batch own d_out"]
    ) -> Float[Tensor, "batch seq d_out"]:
        """What is written in place of y, the output of `layer`'s MLP at its input x."""


class Replacement(ABC):
    """A method in place of the MLPs of `layers`: it opens passes, and says what its parts cost."""

    method: str
    layers: tuple[int, ...]
    k: int | None = None  # active parts per token and layer by construction; None where nothing fixes it
    site: Site | None = "mlp_out"  # where it writes; None: wherever the target is read and written
    origin: Origin = UNKNOWN
    follows_stream: ClassVar[bool] = True  # False: `frozen`, `gates` and `free` are the same
    decides: bool = True  # False: nothing is decided on a token, so `gates` and `free` are the same
    reads_y: ClassVar[bool] = False  # True: it needs what the MLP itself writes, so the MLP counts as its own

    @property
    def reads(self) -> tuple[int, ...]:
        """Layers whose clean activations `captured` holds."""
        return self.layers

    @property
    def watches(self) -> tuple[str, ...]:
        """Other modules whose clean inputs `captured` holds."""
        return ()

    @abstractmethod
    def frozen(self, captured: Captured) -> Pass:
        """A pass in which every layer writes what it would on the clean stream (protocols `frozen` and `single`)."""

    @abstractmethod
    def gated(self, captured: Captured) -> Pass:
        """A pass whose decisions alone come from a clean pass; what is active reads the running stream (`gates`)."""

    @abstractmethod
    def free(self, captured: Captured, run: Callable[[Pass], object]) -> Pass:
        """A pass in which everything follows the running stream (protocol `free`).

        Gates that read layers which the stream has not reached `run` another pass before.
        """

    @abstractmethod
    def attacked(self, captured: Captured, sources: Sources) -> Pass:
        """A pass gated by a clean one in which inactive parts and remainders are let in as `sources` say (adversary.py)."""

    def part_groups(self, layers: Sequence[int]) -> list[PartGroup]:
        """The parts at work when only `layers` are replaced."""
        return []

    def surface(self, layers: Sequence[int]) -> dict[Key, int]:
        """What an adversary has: each remainder, and the number of parts before it."""
        return {(group.layer, group.name): group.n_parts for group in self.part_groups(layers)}

    def dense_parameters(self, layers: Sequence[int]) -> int:
        """Parameters in `layers` that work on every token: a skip's, a delta's, an affine map's; biases don't count."""
        return 0

    def active_parameters(self, l0: Mapping[tuple[int, str], float], layers: Sequence[int] | None = None) -> float:
        """Parameters at work per token, given the mean L0 of each (layer, group)."""
        layers = self.layers if layers is None else layers
        sparse = sum(l0[m.layer, m.name] * m.part_parameters for m in self.part_groups(layers))
        return sparse + self.dense_parameters(layers)

    def gate_parameters(self, layers: Sequence[int]) -> int | None:
        """Parameters that decide what is active when only `layers` are replaced; None where nothing is learnt."""
        return None

    def dead(self, layers: Sequence[int]) -> float | None:
        """Share of the parts at work when only `layers` are replaced that were silent at the end of training; None: not known."""
        return None


class Coded(Replacement):
    """A replacement by codes: sparse vectors of latents or neurons, which tell all that is written at a token."""

    part_name: ClassVar[str] = "latents"

    @abstractmethod
    def encode(self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "own d_out"]) -> Codes:
        """The codes of `layer` from its MLP's input x and output y."""

    @abstractmethod
    def write(
        self, pass_: "CodedPass", layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "own d_out"]
    ) -> Float[Tensor, "token d_out"]:
        """What stands in place of y, from the codes that `pass_.encode` gives."""

    @abstractmethod
    def values_at(
        self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "own d_out"], active: Codes
    ) -> Codes:
        """What the active parts of these codes are worth at the MLP's input x and output y."""

    @abstractmethod
    def with_least(self, least: Mapping[int, Float[Tensor, "part"]]) -> Self:
        """The same, but that a part is active where its value's size exceeds its own `least[layer]`, whatever was asked for."""

    @abstractmethod
    def sizes(self, layer: int, weights: Mapping[int, float]) -> Float[Tensor, "part"]:
        """√(Σ_j weights[j] ‖w_j‖²) of each part of `layer`, where w_j is what a unit of it writes to layer j."""

    def begin(self) -> "CodedPass":
        """A pass whose codes follow the running stream: all that `free` needs."""
        return CodedPass(self, None)

    def frozen(self, captured: Captured) -> "CodedPass":
        assert len(captured.inputs) == len(self.reads), f"{len(captured.inputs)=} {self.reads=}"
        return CodedPass(self, captured)

    def gated(self, captured: Captured) -> "CodedPass":
        return GatedPass(self, captured)

    def free(self, captured: Captured, run: Callable[[Pass], object]) -> "CodedPass":
        return self.begin()

    def attacked(self, captured: Captured, sources: Sources) -> "AttackedPass":
        return AttackedPass(self, captured, sources)


class CodedPass(Pass):
    """A forward pass by codes; `codes[layer]` is computed once, when first needed.

    With a clean pass, what each layer was given and wrote there stands in place of what the running stream gives it.
    """

    replacement: Coded

    def __init__(self, replacement: Coded, clean: Captured | None) -> None:
        super().__init__(replacement)
        self.clean = clean
        self.codes: dict[int, Codes] = {}

    @property
    def reads_y(self) -> bool:
        return self.replacement.reads_y and self.clean is None

    def __call__(
        self, layer: int, x: Float[Tensor, "batch seq d_in"], y: Float[Tensor, "batch own d_out"]
    ) -> Float[Tensor, "batch seq d_out"]:
        x, y = self.read(layer, x, y)
        return by_token(functools.partial(self.replacement.write, self, layer), x, y)

    def read(self, layer: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What is read in place of the running stream's x and y."""
        return (x, y) if self.clean is None else self._at(self.clean, layer)

    def encode(self, layer: int, x: Tensor | None = None, y: Tensor | None = None) -> Codes:
        """The codes of `layer`; x and y, which `read` gave, go unread where a clean pass is given."""
        if layer not in self.codes:
            if self.clean is not None:
                x, y = (rearrange(kept, "batch seq d -> (batch seq) d").float() for kept in self._at(self.clean, layer))
            assert x is not None and y is not None, f"layer {layer} is read before the running stream came by"
            self.keep(layer, self.replacement.encode(layer, x, y))
        return self.codes[layer]

    def keep(self, layer: int, codes: Codes) -> None:
        self.codes[layer] = codes
        self.active[layer, self.replacement.part_name] = Active.of(codes)

    def _at(self, clean: Captured, layer: int) -> tuple[Tensor, Tensor]:
        """The clean pass's input and output of a layer's MLP."""
        i = self.replacement.reads.index(layer)
        return clean.inputs[i], clean.outputs[i]


class GatedPass(CodedPass):
    """A forward pass in which a clean pass says which parts are active, and the running stream what they are worth."""

    @property
    def reads_y(self) -> bool:
        return self.replacement.reads_y

    def read(self, layer: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y

    def encode(self, layer: int, x: Tensor | None = None, y: Tensor | None = None) -> Codes:
        if layer not in self.codes:
            assert x is not None and y is not None, f"layer {layer} is read before the running stream came by"
            self.keep(layer, self.replacement.values_at(layer, x, y, super().encode(layer)))
        return self.codes[layer]


class AttackedPass(Pass):
    """A forward pass by codes whose inactive parts, and what all parts leave of the MLP, an adversary lets in."""

    replacement: Coded
    reads_y = True  # type: ignore[assignment]  # of the remainder

    def __init__(self, replacement: Coded, clean: Captured, sources: Sources) -> None:
        super().__init__(replacement)
        self.gates = CodedPass(replacement, clean)
        self.active = self.gates.active
        self.let_in, self.all_parts = CodedPass(replacement, None), CodedPass(replacement, None)
        self.sources = sources

    def __call__(
        self, layer: int, x: Float[Tensor, "batch seq d_in"], y: Float[Tensor, "batch seq d_out"]
    ) -> Float[Tensor, "batch seq d_out"]:
        return by_token(functools.partial(self._write, layer), x, y)

    def _write(
        self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]
    ) -> Float[Tensor, "token d_out"]:
        key = (layer, self.replacement.part_name)
        gates = self.gates.encode(layer)
        on = gates._replace(values=(gates.values != 0).to(x.dtype))
        every = FullLayout(gates.n_rows, gates.d_dict, x.device)
        parts = self.replacement.values_at(layer, x, y, Codes(x.new_ones(gates.n_rows * gates.d_dict), every))
        mask = self.sources.masks(key, to_dense(on))
        self.all_parts.codes[layer] = parts
        self.let_in.codes[layer] = parts._replace(values=parts.values * mask.flatten())
        rest = y - self.replacement.write(self.all_parts, layer, x, y)
        return self.replacement.write(self.let_in, layer, x, y) + self.sources.deltas[key] * rest


def by_token(
    write: Callable[[Float[Tensor, "token d_in"], Float[Tensor, "own d_out"]], Float[Tensor, "token d_out"]],
    x: Float[Tensor, "batch seq d_in"],
    y: Float[Tensor, "batch own d_out"],
) -> Float[Tensor, "batch seq d_out"]:
    """`write` of all tokens of a batch as rows, in float32."""
    written = write(*(rearrange(given, "batch seq d -> (batch seq) d").float() for given in (x, y)))
    return rearrange(written, "(batch seq) d_out -> batch seq d_out", batch=len(x)).to(y.dtype)


Observer = Callable[[int, Float[Tensor, "batch seq d_out"]], None]


def replaced_logits(
    target: TargetModel, tokens: Int[Tensor, "batch seq"], pass_: Pass, layers: Sequence[int], observe: Observer
) -> Float[Tensor, "batch seq vocab"]:
    """Logits with `layers` replaced at every position but the first; `observe(layer, y_hat)` sees what each wrote."""
    place = pass_.replacement.site
    if place not in (None, target.site):
        raise ValueError(
            f"{pass_.replacement.method} writes {place}, the target is read at {target.site}: use at_site(target, {place!r})"
        )

    def function(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        def write(x: Tensor, y: Tensor) -> Tensor:
            y_hat = pass_(layer, x, y)
            observe(layer, y_hat)
            return torch.cat([y[:, :1], y_hat[:, 1:]], dim=1)

        return write

    with patched(target, {layer: function(layer) for layer in layers}, first_only=not pass_.reads_y):
        return target.logits(tokens)


def method_name(method: str, top_k: int | None, variant: str) -> str:
    """The method, its variant, and -topk where the sparsity is not the trained one."""
    return "-".join(filter(None, [method, variant, "topk" if top_k is not None else ""]))


def jointly_named(method: str) -> str:
    """The name of a method where one threshold over all layers says what is active."""
    return f"{method.removesuffix('-topk')}-joint"
