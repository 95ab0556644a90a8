"""What stands in for a target's MLPs: one interface for every method and baseline, under the same three protocols.

    y_hat = pass_(layer, x, y)      x: the MLP's input, y: the MLP's own output there, both on the stream as it runs

A `Replacement` opens a `Pass` for each forward pass. In a pass opened by `free` what is active is decided on the running
stream, which earlier replaced layers may have changed; in one opened by `frozen` it is decided on a clean pass, and only what
is not a decision (an affine skip, a delta, a component's own input) reads the running stream. `Coded` replacements decide by
codes: dictionaries, and an MLP's own neurons. Others (SPD, ablations) bring a pass of their own.
Only the identity, and an SAE whose codes follow the stream, read y beyond a sequence's first position, so the MLPs of all
others are not computed beyond it.
A pass remembers what was active, so that every method is counted by the same lines of `metrics.py`:

    active parts per MLP = Σ_groups L0 · writes / layers,    active parameters = Σ_groups L0 · part_parameters + dense

The first position of a sequence is left to the model by `replaced_logits`: coders never train on it, no metric counts it.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from config import Site
from patching import Captured, patched
from sparse_ops import Codes
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
    follows_stream: ClassVar[bool] = True  # False: `frozen` and `free` are the same
    reads_y: ClassVar[bool] = False  # True: it needs what the MLP itself writes on the running stream

    @property
    def reads(self) -> tuple[int, ...]:
        """Layers whose clean activations `captured` holds."""
        return self.layers

    @abstractmethod
    def frozen(self, captured: Captured) -> Pass:
        """A pass whose decisions come from a clean pass (protocols `frozen` and `single`)."""

    @abstractmethod
    def free(self, captured: Captured, run: Callable[[Pass], object]) -> Pass:
        """A pass whose decisions follow the running stream (protocol `free`).

        Gates that read layers which the stream has not reached `run` another pass before.
        """

    def part_groups(self, layers: Sequence[int]) -> list[PartGroup]:
        """The parts at work when only `layers` are replaced."""
        return []

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

    def dead(self) -> float | None:
        """Share of the parts that were silent over the last ≥ 1M training tokens; None where that is not known."""
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

    def begin(self) -> "CodedPass":
        """A pass whose codes follow the running stream: all that `free` needs."""
        return CodedPass(self, None)

    def frozen(self, captured: Captured) -> "CodedPass":
        assert len(captured.inputs) == len(self.reads), f"{len(captured.inputs)=} {self.reads=}"
        return CodedPass(self, captured)

    def free(self, captured: Captured, run: Callable[[Pass], object]) -> "CodedPass":
        return self.begin()


class CodedPass(Pass):
    """A forward pass by codes; `codes[layer]` is computed once, when first needed, from the clean or the running stream."""

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
        return by_token(functools.partial(self.replacement.write, self, layer), x, y)

    def encode(self, layer: int, x: Tensor | None = None, y: Tensor | None = None) -> Codes:
        """The codes of `layer`; x and y are the running stream's, and go unread where a clean pass is given."""
        if layer not in self.codes:
            if self.clean is not None:
                i = self.replacement.reads.index(layer)
                x, y = (rearrange(kept[i], "batch seq d -> (batch seq) d").float() for kept in self.clean)
            assert x is not None and y is not None, f"layer {layer} is read before the running stream came by"
            self.codes[layer] = self.replacement.encode(layer, x, y)
            self.active[layer, self.replacement.part_name] = Active.of(self.codes[layer])
        return self.codes[layer]


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
