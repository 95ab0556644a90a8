"""Stochastic parameter decomposition: weights as sums of rank-one components, each with a causal importance per input.

    W ≈ Σ_c U_c V_cᵀ,   h = x V,   Δ = W − V U   (all as d_in × d_out maps: y = x W + b)
    y = (h ⊙ m) U + m_Δ · (x Δ) + b = ((m − m_Δ) ⊙ h) U + m_Δ · (x W) + b          (exact: neither Δ nor V U is formed)

Masks m come from `spd_masks.py`, importances from the gates of `spd_gates.py`.
SPD: arXiv 2506.20790, with the later gates of goodfire-ai/spd. Parameter names are those of Goodfire's checkpoints.
Any tensor may carry one leading axis `stack`: one toy with several seeds, trained side by side in batched products.
"""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from config import GateConfig, SPDConfig
from patching import after, kept_inputs
from spd_gates import Importances, align, dashed, lower, upper
from spd_masks import Mask


class StackedLinear(nn.Module):
    """S independent linear layers held side by side: one toy with several seeds. y[s] = x[s] W[s]ᵀ + b[s]."""

    def __init__(self, weight: Float[Tensor, "stack d_out d_in"], bias: Float[Tensor, "stack d_out"] | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, False), None if bias is None else nn.Parameter(bias, False)

    def forward(self, x: Float[Tensor, "stack batch d_in"]) -> Float[Tensor, "stack batch d_out"]:
        y = x @ self.weight.mT
        return y if self.bias is None else y + self.bias[:, None]


def weight_map(module: nn.Module) -> Float[Tensor, "*stack d_in d_out"]:
    """The module's weight as a map from its input: y = x W (+ b). A view."""
    return module.weight if isinstance(module, Conv1D | nn.Embedding) else module.weight.mT  # type: ignore[union-attr,return-value]


# ------------------------------------------------------------------------------------------------------- components


class Components(nn.Module):
    """V: d_in × C ~ N(0, 1/d_in), U: C × d_out ~ N(0, 1/C)."""

    def __init__(self, module: nn.Module, n: int, stack: int | None, generator: torch.Generator) -> None:
        super().__init__()
        d_in, d_out = weight_map(module).shape[-2:]
        lead = () if stack is None else (stack,)
        self.V = nn.Parameter(torch.randn(*lead, d_in, n, generator=generator) / d_in**0.5)
        self.U = nn.Parameter(torch.randn(*lead, n, d_out, generator=generator) / n**0.5)
        bias = getattr(module, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())


class TiedComponents(nn.Module):
    """The components of a module whose weight is the transpose of another's: V = U_otherᵀ, U = V_otherᵀ."""

    def __init__(self, module: nn.Module, other: Components) -> None:
        super().__init__()
        self.__dict__["other"] = other  # not a submodule: its parameters are the other's
        bias = getattr(module, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def V(self) -> Tensor:
        return self.__dict__["other"].U.mT

    @property
    def U(self) -> Tensor:
        return self.__dict__["other"].V.mT


# --------------------------------------------------------------------------------------------------------- the model


class ComponentModel(nn.Module):
    """Components and gates beside a frozen target; `masked` runs the target's own forward with masked linear maps.

    Raises ValueError for a pattern that matches nothing, a module of an unsupported kind, two patterns claiming one
    module, C < 1 (by SPDConfig), or a tied pair with different C or shapes.
    """

    target_model: nn.Module  # not a submodule: a checkpoint holds the decomposition alone
    importances: Importances  # nor this one: its gates are submodules directly

    def __init__(self, target_model: nn.Module, config: SPDConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.__dict__["target_model"] = target_model
        sizes = match_patterns(target_model, config.components)
        self.paths = sorted(sizes)
        stacked = [
            m.weight.shape[0] for m in map(target_model.get_submodule, self.paths) if isinstance(m, StackedLinear)
        ]
        self.stack = stacked[0] if stacked else None
        tied = {b: a for a, b in config.tied}
        self._components = nn.ModuleDict()
        for path in sorted(self.paths, key=lambda path: path in tied):
            module = target_model.get_submodule(path)
            if path in tied:
                part: nn.Module = TiedComponents(module, self._tie(sizes, tied[path], path))
            else:
                part = Components(module, sizes[path], self.stack, generator)
            self._components[dashed(path)] = part
        self.sizes = sizes
        taps = config.gate.taps or ("*",)
        read = [path for path in self.paths if any(fnmatch.fnmatchcase(path, tap) for tap in taps)]
        if not read:
            raise ValueError(f"the gate's taps {taps} match none of the decomposed {self.paths}")
        widths = {path: sizes[path] if self._embeds(path) else self._weight(path).shape[-2] for path in read}
        ordered = {path: sizes[path] for path in self.paths}
        self.__dict__["importances"] = Importances(config.gate, widths, ordered, self.stack, generator)
        for name, gates in self.importances.named_children():
            self.add_module(name, gates)

    def with_gate(self, gate: GateConfig, generator: torch.Generator) -> "ComponentModel":
        """A decomposition with the same components, whose tensors it shares, and a fresh gate."""
        model = type(self)(self.target_model, dataclasses.replace(self.config, gate=gate), generator)
        model._components = self._components
        return model.to(next(self.parameters()).device)

    def _tie(self, sizes: dict[str, int], first: str, second: str) -> Components:
        for path in (first, second):
            if path not in sizes:
                raise ValueError(f"tied module {path!r} is not decomposed: add a pattern for it")
        if sizes[first] != sizes[second]:
            raise ValueError(
                f"tied modules {first!r} (C={sizes[first]}) and {second!r} (C={sizes[second]}) need the same C"
            )
        shapes = [tuple(self._weight(path).shape[-2:]) for path in (first, second)]
        if shapes[0] != shapes[1][::-1]:
            raise ValueError(f"tied modules {first!r} and {second!r} are not transposes: {shapes[0]} and {shapes[1]}")
        return self._components[dashed(first)]  # type: ignore[return-value]

    def _weight(self, path: str) -> Float[Tensor, "*stack d_in d_out"]:
        return weight_map(self.target_model.get_submodule(path))

    @property
    def components(self) -> dict[str, Components]:
        return {path: self._components[dashed(path)] for path in self.paths}  # type: ignore[misc]

    def component_activations(self, path: str, x: Tensor) -> Float[Tensor, "*batch component"]:
        """h = x V; for an embedding, x are token ids and h = V[x]."""
        V = self.components[path].V
        return V[x] if self._embeds(path) else x @ V

    def importance_logits(self, inputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "*batch component"]]:
        """z of every module from the inputs of all modules (local gates need only those they are asked for)."""
        if self.config.gate.local:
            return {path: self.importance_logit(path, x) for path, x in inputs.items()}
        read = {path: self._gate_input(path, x) for path, x in inputs.items() if path in self.importances.reads}
        return self.importances.together(read)

    def importance_logit(self, path: str, x: Tensor) -> Float[Tensor, "*batch component"]:
        """z of one module from its own input; only local gates can do this."""
        gate = self.importances.gate(path)
        h = self.component_activations(path, x) if self._embeds(path) or self.importances.read_activations else x
        return gate(h if self._embeds(path) else x, h)

    def _gate_input(self, path: str, x: Tensor) -> Tensor:
        """What a gate reads of a module: its input; of an embedding, whose input is ids, h."""
        return self.component_activations(path, x) if self._embeds(path) else x

    def _embeds(self, path: str) -> bool:
        return isinstance(self.target_model.get_submodule(path), nn.Embedding)

    def lower(self, z: Tensor) -> Tensor:
        return lower(z, self.config.alpha)

    def upper(self, z: Tensor) -> Tensor:
        return upper(z, self.config.alpha)

    def _masked(self, path: str, x: Tensor, y: Tensor | None, mask: Mask) -> Tensor:
        """y: the module's own output x W + b, needed where Δ is open."""
        part, h = self.components[path], self.component_activations(path, x)
        if mask.delta is None:
            out = (mask.components * h) @ part.U
            return out if part.bias is None else out + align(part.bias, out, 1)
        assert y is not None
        delta = mask.delta.to(h.dtype).expand(h.shape[:-1])[..., None]
        out = ((mask.components - delta) * h) @ part.U
        if part.bias is None:
            return torch.addcmul(out, delta, y.to(out.dtype))
        bias = align(part.bias, out, 1)
        return out + delta * (y - bias) + bias

    @contextlib.contextmanager
    def masked(
        self,
        masks: Mapping[str, Tensor | Callable[[Tensor], Tensor]],
        delta_masks: Mapping[str, Tensor | float] | None = None,
    ) -> Iterator[None]:
        """Inside, the target's own forward runs with the masked maps of the named modules; restored on any exit.

        A mask may be a function of the module's running input (a gate recomputed from the masked stream).
        `delta_masks` None, or a missing path: Δ closed.
        """
        with contextlib.ExitStack() as stack:
            for path, mask in masks.items():
                delta = None if delta_masks is None else delta_masks.get(path)
                hook = self._masking_hook(path, mask, delta)
                stack.enter_context(after(self.target_model.get_submodule(path), hook))
            yield

    def _masking_hook(
        self, path: str, mask: Tensor | Callable[[Tensor], Tensor], delta: Tensor | float | None
    ) -> Callable[[tuple[Tensor, ...], Tensor], Tensor]:
        def replace(args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            m = mask(args[0]) if callable(mask) else mask
            return self._masked(
                path, args[0], output, Mask(m, None if delta is None else torch.as_tensor(delta, device=m.device))
            )

        return replace

    def run_masked(self, masks: Mapping[str, Mask], *args: Tensor) -> Tensor:
        """The target's output with the given masks (its first output where it gives several)."""
        deltas = {path: mask.delta for path, mask in masks.items() if mask.delta is not None}
        with self.masked({path: mask.components for path, mask in masks.items()}, deltas):
            return first_output(self.target_model(*args))

    def inputs_capture(self, *args: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs of all decomposed modules, output) of one clean forward pass of the target."""
        with kept_inputs(self.target_model, self.paths) as seen:
            output = first_output(self.target_model(*args))
        return seen, output

    def deltas(self) -> dict[str, Float[Tensor, "*stack d_in d_out"]]:
        """Δ = W − V U of every module, with gradient in V and U."""
        return {path: self._weight(path) - part.V @ part.U for path, part in self.components.items()}

    def start_faithful(self) -> None:
        """Set U or V by least squares so that V U = W wherever C suffices: what faithfulness warm-up converges to."""
        with torch.no_grad():
            for path, part in self.components.items():
                W = self._weight(path)
                if isinstance(part, Components) and W.shape[-2] <= W.shape[-1]:
                    part.U += torch.linalg.pinv(part.V) @ (W - part.V @ part.U)
                elif isinstance(part, Components):
                    part.V += (W - part.V @ part.U) @ torch.linalg.pinv(part.U)

    def writes_neurons(self, path: str) -> bool:
        """Whether an MLP's matrix gives its neurons rather than reads them: they are its wider side."""
        d_in, d_out = self._weight(path).shape[-2:]
        assert d_in != d_out and self.stack is None, (
            f"no side of {path!r} is known as neurons: {d_in=} {d_out=} {self.stack=}"
        )
        return d_in < d_out

    def neuron_weights(self) -> dict[str, Float[Tensor, "component unit"]]:
        """What the components of every MLP matrix write to its neurons, or read from them."""
        return {path: part.U if self.writes_neurons(path) else part.V.mT for path, part in self.components.items()}

    @torch.no_grad()
    def start_neurons(self, generator: torch.Generator) -> None:
        """Each component becomes one neuron's weights, or a part of them, so that V U = W exactly; needs C ≥ neurons.

        A one-hot vector on the side of the neurons, the neuron's weights on the other. Where C exceeds them, neurons are
        repeated evenly (which one once more, at random), and the weights of a neuron split over its components in random
        disjoint sets of coordinates (goodfire-ai/param-decomp, targets/transformer.py).
        """
        for path, part in self.components.items():
            W, n = self._weight(path).cpu(), self.sizes[path]
            rows = W.mT if self.writes_neurons(path) else W
            units, d = rows.shape
            assert isinstance(part, Components) and n >= units, f"{n} components of {path!r} for {units} neurons"
            repeats = torch.full((units,), n // units)
            repeats[torch.randperm(units, generator=generator)[: n % units]] += 1
            unit = torch.arange(units).repeat_interleave(repeats)
            copy = torch.arange(n) - (repeats.cumsum(0) - repeats)[unit]
            rank = torch.rand(units, d, generator=generator).argsort(-1).argsort(-1)
            weights = rows[unit] * (rank[unit] % repeats[unit, None] == copy[:, None])
            one_hot = F.one_hot(unit, units).to(W.dtype)
            V, U = (weights, one_hot) if self.writes_neurons(path) else (one_hot, weights)
            part.V.copy_(V.mT)
            part.U.copy_(U)


def first_output(output: object) -> Tensor:
    if isinstance(output, tuple):
        output = output[0]
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined,no-any-return]


def match_patterns(model: nn.Module, patterns: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """Module path → C. Raises ValueError as `ComponentModel` says."""
    sizes: dict[str, int] = {}
    names = [name for name, _ in model.named_modules() if name]
    for pattern, n in patterns:
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise ValueError(
                f"pattern {pattern!r} matches no module of {type(model).__name__}: e.g. {names[-1]!r} is one"
            )
        for name in hits:
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear | Conv1D | nn.Embedding | StackedLinear):
                raise ValueError(
                    f"{name!r} ({pattern!r}) is a {type(module).__name__}: only linear maps and embeddings decompose"
                )
            if name in sizes:
                raise ValueError(f"{name!r} is matched twice, by {pattern!r} too: make the patterns disjoint")
            sizes[name] = n
    return sizes
