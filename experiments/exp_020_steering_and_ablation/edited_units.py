"""Units of every method in the original model: what each is worth on a text, what it would take away, what it can add.

    ablation   out − Σ_i w_i m_i c_i     m_i c_i: what part i writes when deployed, on the stream as it runs;  w_i in [0, 1]
    steering   out + Σ_i s_i d_i         d_i: what a unit of part i writes, at every token

With all w and s at 0 the model is the original one, exactly, whatever the method: what parts leave of it is kept. A CLT's latent
writes to all its targets in its own proportions. SPD's units are the components of both matrices of an MLP, and write there.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from patching import Captured
from replacement import Coded, CodedPass, Key, Pass, Replacement, by_token
from sparse_ops import Codes, FullLayout, to_dense
from spd_replacement import SPDPass, SPDReplacement
from target_models import TargetModel

Vectors = dict[str, Float[Tensor, "d"]]  # by the path of the module to whose output each is added


class Units(ABC):
    """The parts of one method, flat in one row: those of the first group, then of the next."""

    def __init__(self, target: TargetModel, replacement: Replacement) -> None:
        self.target, self.replacement, self.name = target, replacement, replacement.method
        self.groups: dict[Key, int] = replacement.surface(replacement.layers)

    @abstractmethod
    def values(self, captured: Captured) -> dict[Key, Float[Tensor, "batch seq unit"]]:
        """Deployed values of all units on a clean pass; 0 where one is not active."""

    @abstractmethod
    def sizes(self) -> dict[Key, Float[Tensor, "unit"]]:
        """‖d_i‖; of a CLT √Σ over targets."""

    @abstractmethod
    def ablated(self, w: Float[Tensor, "unit"]) -> Pass:
        """A pass in which each unit is taken away by its share w."""

    @abstractmethod
    def written(self, s: Float[Tensor, "unit"]) -> Vectors:
        """Σ_i s_i d_i at each module."""

    def by_group(self, row: Float[Tensor, "unit"]) -> dict[Key, Float[Tensor, "own"]]:
        return dict(zip(self.groups, row.split(list(self.groups.values()))))


class CodedUnits(Units):
    """Latents, and an MLP's own neurons."""

    replacement: Coded

    def values(self, captured: Captured) -> dict[Key, Float[Tensor, "batch seq unit"]]:
        pass_, batch = self.replacement.frozen(captured), captured.inputs.shape[1]
        codes = {key: to_dense(pass_.encode(key[0])) for key in self.groups}
        return {key: rearrange(a, "(batch seq) unit -> batch seq unit", batch=batch) for key, a in codes.items()}

    def sizes(self) -> dict[Key, Float[Tensor, "unit"]]:
        alike = dict.fromkeys(self.replacement.layers, 1.0)
        return {key: self.replacement.sizes(key[0], alike) for key in self.groups}

    def ablated(self, w: Float[Tensor, "unit"]) -> Pass:
        return _AblatedCodes(self.replacement, {key[0]: own for key, own in self.by_group(w).items()})

    def written(self, s: Float[Tensor, "unit"]) -> Vectors:
        full, none = CodedPass(self.replacement, None), CodedPass(self.replacement, None)
        vectors, x = {}, torch.zeros(1, self.target.d_model)
        for (layer, _), own in self.by_group(s).items():
            layout = FullLayout(1, len(own), own.device)
            full.codes[layer], none.codes[layer] = Codes(own, layout), Codes(torch.zeros_like(own), layout)
            both = (self.replacement.write(pass_, layer, x, x)[0] for pass_ in (full, none))
            vectors[self.target.mlps[layer].write] = next(both) - next(both)
        return vectors


class _AblatedCodes(Pass):
    """The MLP's own output, without a share of what some parts write."""

    replacement: Coded
    reads_y = True  # type: ignore[assignment]

    def __init__(self, replacement: Coded, w: Mapping[int, Float[Tensor, "unit"]]) -> None:
        super().__init__(replacement)
        self.w, self.whole, self.kept = w, CodedPass(replacement, None), CodedPass(replacement, None)

    def __call__(
        self, layer: int, x: Float[Tensor, "batch seq d_in"], y: Float[Tensor, "batch seq d_out"]
    ) -> Float[Tensor, "batch seq d_out"]:
        return by_token(functools.partial(self._write, layer), x, y)

    def _write(
        self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "token d_out"]
    ) -> Float[Tensor, "token d_out"]:
        codes = self.whole.encode(layer, x, y)
        self.kept.codes[layer] = codes._replace(values=codes.values * (1 - self.w[layer][codes.cols]))
        write = self.replacement.write
        return y + (write(self.kept, layer, x, y) - write(self.whole, layer, x, y))


class SPDUnits(Units):
    """Rank-one components of both matrices."""

    replacement: SPDReplacement

    def values(self, captured: Captured) -> dict[Key, Float[Tensor, "batch seq unit"]]:
        own, clean = self.replacement, self.replacement.clean_importances(captured)
        found = {}
        for layer, name in self.groups:
            path = own.paths[layer][name]
            found[layer, name] = own.on(path, clean.z[path]) * own.model.component_activations(path, clean.inputs[path])
        return found

    def sizes(self) -> dict[Key, Float[Tensor, "unit"]]:
        own = self.replacement
        return {
            (layer, name): own.model.components[own.paths[layer][name]].U.norm(dim=1) for layer, name in self.groups
        }

    def ablated(self, w: Float[Tensor, "unit"]) -> Pass:
        return _AblatedComponents(self.replacement, self.by_group(w))

    def written(self, s: Float[Tensor, "unit"]) -> Vectors:
        own = self.replacement
        paths = {key: own.paths[key[0]][key[1]] for key in self.groups}
        return {paths[key]: values @ own.model.components[paths[key]].U for key, values in self.by_group(s).items()}


class _AblatedComponents(SPDPass):
    """Every matrix as it is, without a share of its active components: mask 1 − w · on, and the remainder open."""

    def __init__(self, replacement: SPDReplacement, w: Mapping[Key, Float[Tensor, "unit"]]) -> None:
        super().__init__(replacement, {}, None)
        self.w = w

    def _deltas(self, layer: int) -> dict[str, Float[Tensor, ""] | float]:
        return dict.fromkeys(self.replacement.paths[layer].values(), 1.0)

    def _mask(self, layer: int, name: str, path: str, x: Tensor) -> Float[Tensor, "batch seq component"]:
        return 1 - self.w[layer, name] * super()._mask(layer, name, path, x)
