"""SPD in place of a target's MLPs: of each weight matrix only the components run that are active on a token.

    y = ((m − m_Δ) ⊙ (x V)) U + m_Δ · (x W) + b,    m_c = 1 where component c is active, else 0

Active parts are the rank-one components of `spd_model.py`; each weight matrix is a group of its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from checkpoints import Decomposition
from patching import Captured, kept_inputs
from replacement import UNKNOWN, Active, Origin, PartGroup, Pass, Replacement, Sources, method_name
from spd_model import ComponentModel, weight_map
from spd_runs import find_spd
from target_models import TargetModel, mlp_matrices


class SPDReplacement(Replacement):
    """Rank-one components of an MLP's weight matrices: active ones at full strength (mask 1), the others at none.

    Active: causal importance g_lo > threshold, or the top_k largest pre-sigmoid importances z. `delta` adds W − Σ U V.
    `frozen`: the MLP's input too is the clean pass's; within the MLP, the down projection reads what the first matrix wrote.
    `free`: a local gate reads its module's input on the masked stream. A global gate reads all layers at once, also
    those the stream has not reached, so it reads the stream of a first pass masked by the clean pass's gates: one step
    towards the fixed point, after which its input is the masked model's, not the original's. Where it reads modules that are in
    no MLP (Goodfire's runs decompose attention too) it reads them there as well, but they stay whole.
    """

    def __init__(
        self,
        target: TargetModel,
        model: ComponentModel,
        threshold: float = 0.0,
        top_k: int | None = None,
        delta: bool = False,
        layers: Sequence[int] | None = None,
        matrices: Sequence[str] | None = None,
        origin: Origin = UNKNOWN,
    ) -> None:
        """`layers` and `matrices` (last parts of module paths) restrict what is replaced; the rest stays as it is."""
        assert model.target_model is target.model, f"the decomposition is of another model than {target.name}"
        decomposed = {layer: self._paths(target, model, layer) for layer in range(target.n_layers)}
        self.decomposed = {layer: paths for layer, paths in decomposed.items() if paths}
        self.layers = tuple(self.decomposed if layers is None else layers)
        if missing := [layer for layer in self.layers if layer not in self.decomposed]:
            raise ValueError(f"layer {missing} has no decomposed MLP matrix: choose among {list(self.decomposed)}")
        self.paths = {
            layer: {n: p for n, p in self.decomposed[layer].items() if matrices is None or n in matrices}
            for layer in self.layers
        }
        if any(not paths for paths in self.paths.values()):
            known = list(decomposed[self.layers[0]])
            raise ValueError(f"no matrix named {matrices} is decomposed: choose among {known}")
        gate = [f"{threshold:g}"] if threshold and top_k is None else []
        variant = "-".join([*(matrices or ()), *(["delta"] if delta else []), *gate])
        self.method, self.k, self.origin = method_name("spd", top_k, variant), top_k, origin
        self.target, self.model, self.threshold, self.top_k, self.delta = target, model, threshold, top_k, delta

    @staticmethod
    def _paths(target: TargetModel, model: ComponentModel, layer: int) -> dict[str, str]:
        """Name → path of the layer's decomposed MLP matrices."""
        mlp = target.mlps[layer]
        paths = [path for path in model.paths if path == mlp.down or path.startswith(mlp.write + ".")]
        return {path.rpartition(".")[2]: path for path in paths}

    def gate_parameters(self, layers: Sequence[int]) -> int:
        """Of the matrices' own gates; a global gate decides for all matrices at once."""
        return self.model.importances.n_parameters(path for layer in layers for path in self.paths[layer].values())

    @property
    def reads(self) -> tuple[int, ...]:
        return self.layers if self.model.config.gate.local else tuple(self.decomposed)

    @property
    def watches(self) -> tuple[str, ...]:
        """What a global gate reads of modules in no MLP."""
        if self.model.config.gate.local:
            return ()
        inside = {path for paths in self.decomposed.values() for path in paths.values()}
        return tuple(path for path in self.model.importances.reads if path not in inside)

    def clean_importances(self, captured: Captured) -> "CleanImportances":
        """Of every decomposed matrix: what it reads in a clean pass, and its gate's logits there.

        `captured` spans `reads` and `watches`.
        """
        assert len(captured.inputs) == len(self.reads), f"{len(captured.inputs)=} {self.reads=}"
        assert captured.modules.keys() >= {*self.watches}, f"{captured.modules.keys()=} {self.watches=}"
        inputs = {path: captured.modules[path] for path in self.watches}
        for layer, x in zip(self.reads, captured.inputs):
            down = self.target.mlps[layer].down
            for path in self.decomposed[layer].values():
                inputs[path] = (self.target.hidden(layer, x) if path == down else x).float()
        return CleanImportances(inputs, self.model.importance_logits(inputs))

    def frozen(self, captured: Captured) -> "SPDPass":
        return self.opened(captured, *self.clean_importances(captured), dict(zip(self.reads, captured.inputs)))

    def gated(self, captured: Captured) -> "SPDPass":
        return self.opened(captured, *self.clean_importances(captured))

    def free(self, captured: Captured, run: Callable[[Pass], object]) -> "SPDPass":
        if self.model.config.gate.local:
            return self.opened(captured, {}, None)
        first = self.gated(captured)
        with kept_inputs(self.target.model, self.watches) as watched:
            run(first)
        return self.opened(captured, {}, self.model.importance_logits(first.inputs | watched))

    def opened(
        self,
        captured: Captured,
        inputs: dict[str, Tensor],
        z: dict[str, Tensor] | None,
        given: Mapping[int, Float[Tensor, "batch seq d_in"]] = MappingProxyType({}),
    ) -> "SPDPass":
        """The pass of whatever protocol, by what it is given; `captured` is the clean pass it belongs to."""
        return SPDPass(self, inputs, z, given)

    def attacked(self, captured: Captured, sources: Sources) -> "AttackedSPDPass":
        return AttackedSPDPass(self, *self.clean_importances(captured), sources)

    def on(self, path: str, z: Float[Tensor, "batch seq component"]) -> Bool[Tensor, "batch seq component"]:
        """Which components of a matrix are active where the importance logits are z."""
        if self.top_k is None:
            return self.model.lower(z) > self.threshold
        k = min(self.top_k, z.shape[-1])
        return torch.zeros_like(z, dtype=torch.bool).scatter(-1, z.topk(k, dim=-1).indices, True)

    def part_groups(self, layers: Sequence[int]) -> list[PartGroup]:
        shape = {path: weight_map(self.target.model.get_submodule(path)).shape for path in self.model.paths}
        return [
            PartGroup(layer, name, self.model.sizes[path], 1, sum(shape[path]))
            for layer in layers
            for name, path in self.paths[layer].items()
        ]

    def dense_parameters(self, layers: Sequence[int]) -> int:
        """The MLP's matrices that stay whole, and with `delta` those that are decomposed: their rest is as large."""
        dense = 0
        for layer in layers:
            mlp = self.target.model.get_submodule(self.target.mlps[layer].write)
            whole = sum(m.weight.numel() for m in mlp.modules() if isinstance(m, nn.Linear | Conv1D))
            parts = sum(self.target.model.get_submodule(p).weight.numel() for p in self.paths[layer].values())
            dense += whole if self.delta else whole - parts
        return dense


class CleanImportances(NamedTuple):
    """By path of each decomposed matrix, in one clean forward pass."""

    inputs: dict[str, Float[Tensor, "batch seq d_in"]]
    z: dict[str, Float[Tensor, "batch seq component"]]


class SPDPass(Pass):
    """A forward pass by components, with given importance logits z or each gate's own on its matrix' running input.

    `inputs` begins with the clean pass's and takes in what the replaced matrices read. `given` is what MLPs read in place of
    the running stream.
    """

    replacement: SPDReplacement

    def __init__(
        self,
        replacement: SPDReplacement,
        inputs: dict[str, Tensor],
        z: dict[str, Tensor] | None,
        given: Mapping[int, Float[Tensor, "batch seq d_in"]] = MappingProxyType({}),
    ) -> None:
        super().__init__(replacement)
        self.inputs, self.z, self.given = dict(inputs), z, given

    def __call__(
        self, layer: int, x: Float[Tensor, "batch seq d_in"], y: Float[Tensor, "batch own d_out"]
    ) -> Float[Tensor, "batch seq d_out"]:
        paths = self.replacement.paths[layer]
        masks = {path: functools.partial(self._mask, layer, name, path) for name, path in paths.items()}
        with self.replacement.model.masked(masks, self._deltas(layer)):
            return self.replacement.target.mlp(layer, self.given.get(layer, x)).to(y.dtype)

    def _deltas(self, layer: int) -> dict[str, Float[Tensor, ""] | float] | None:
        """The mask of what the components leave of each matrix."""
        return dict.fromkeys(self.replacement.paths[layer].values(), 1.0) if self.replacement.delta else None

    def _mask(self, layer: int, name: str, path: str, x: Tensor) -> Float[Tensor, "batch seq component"]:
        on = self.replacement.on(path, self.importance_logit(path, x))
        self.keep(layer, name, path, x, on)
        return on.to(x.dtype)

    def importance_logit(self, path: str, x: Tensor) -> Float[Tensor, "batch seq component"]:
        """z of a matrix: those given, or its gate's on its running input x."""
        return self.replacement.model.importance_logit(path, x.float()) if self.z is None else self.z[path]

    def keep(self, layer: int, name: str, path: str, x: Tensor, on: Bool[Tensor, "batch seq component"]) -> None:
        """Remember what a matrix read, and which of its components were active."""
        self.inputs[path] = x.float()
        by_token = rearrange(on, "batch seq component -> (batch seq) component")
        self.active[layer, name] = Active(*by_token.nonzero().unbind(1))


class AttackedSPDPass(SPDPass):
    """Gates are those of a clean pass; inactive components, and what components leave of a matrix, an adversary lets in."""

    def __init__(
        self, replacement: SPDReplacement, inputs: dict[str, Tensor], z: dict[str, Tensor], sources: Sources
    ) -> None:
        assert not replacement.delta, f"{replacement.method}: the adversary says how much of Δ is let in"
        super().__init__(replacement, inputs, z)
        self.sources = sources

    def _deltas(self, layer: int) -> dict[str, Float[Tensor, ""] | float]:
        return {path: self.sources.deltas[layer, name] for name, path in self.replacement.paths[layer].items()}

    def _mask(self, layer: int, name: str, path: str, x: Tensor) -> Float[Tensor, "batch seq component"]:
        on = super()._mask(layer, name, path, x)
        return self.sources.masks((layer, name), on)


def spd_replacements(
    target: TargetModel, decomposition: Decomposition, layers: Sequence[int], deltas: Sequence[bool] = (False, True)
) -> list[Replacement]:
    """The decomposition at its own thresholds, importance above 0 and above 0.5, without and with the delta component."""
    model, record = decomposition
    origin = Origin(record.seed, record.train_tokens, record.train_seconds, record.name)
    return [
        SPDReplacement(target, model, t, delta=delta, layers=layers, origin=origin)
        for t in (0.0, 0.5)
        for delta in deltas
    ]


def spd_sweep(
    target: TargetModel, layers: Sequence[int], top_k: Sequence[int], each_matrix: bool = False
) -> list[Replacement]:
    """Components ranked by pre-sigmoid importance, k of each matrix; `each_matrix` also replaces one matrix at a time."""
    model, record = find_spd(target, layers)
    origin = Origin(record.seed, record.train_tokens, record.train_seconds, record.name)
    names = [path.rpartition(".")[2] for path in mlp_matrices(target, layers[0])]
    groups = [None, *([name] for name in names)] if each_matrix else [None]
    largest = min(model.sizes.values())
    return [
        SPDReplacement(target, model, top_k=k, layers=layers, matrices=group, origin=origin)
        for group in groups for k in top_k if k <= largest
    ]  # fmt: skip
