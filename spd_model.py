"""Stochastic parameter decomposition: weights as sums of rank-one components, each with a causal importance per input.

    W ≈ Σ_c U_c V_cᵀ,   h = x V,   Δ = W − V U   (all as d_in × d_out maps: y = x W + b)
    y = (h ⊙ m) U + m_Δ · (x Δ) + b = ((m − m_Δ) ⊙ h) U + m_Δ · (x W) + b          (exact: neither Δ nor V U is formed)
    z = gate(clean inputs),   g_lo = clamp(z, 0, 1),   g_up = max(z, 0) for z ≤ 1, 1 + α (z − 1) above
    m = g_lo + (1 − g_lo) r,   r ~ U(0, 1);   routing: a position that keeps the original map has m = m_Δ = 1

SPD: arXiv 2506.20790, with the later gates of goodfire-ai/spd. Parameter names are those of Goodfire's checkpoints.
Any tensor may carry one leading axis `stack`: one toy with several seeds, trained side by side in batched products.
"""

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from config import GateConfig, SPDConfig
from llama_simple_mlp import rotary_tables, rotate


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


def _align(p: Tensor, x: Tensor, inner: int) -> Tensor:
    """View p (`*stack`, then `inner` own axes) so that it broadcasts against x (`*stack`, batch axes, `inner` axes)."""
    stack = p.ndim - inner
    return p.view(*p.shape[:stack], *[1] * (x.ndim - p.ndim), *p.shape[stack:])


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


# ------------------------------------------------------------------------------------------------------------- gates


class _Affine(nn.Module):
    """x W + b with W: d_in × d_out; weights N(0, gain/d_in), bias 0."""

    def __init__(self, d_in: int, d_out: int, gain: float, lead: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(*lead, d_in, d_out, generator=generator) * (gain / d_in) ** 0.5)
        self.b = nn.Parameter(torch.zeros(*lead, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W + _align(self.b, x, 1)


class _ParallelAffine(nn.Module):
    """One affine map per component, as a batched product. x: (..., C, d_in) → (..., C, d_out)."""

    def __init__(
        self, n: int, d_in: int, d_out: int, gain: float, lead: tuple[int, ...], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(*lead, n, d_in, d_out, generator=generator) * (gain / d_in) ** 0.5)
        self.b = nn.Parameter(torch.zeros(*lead, n, d_out))

    def forward(self, x: Tensor) -> Tensor:
        lead = self.W.shape[:-3]
        batch = x.shape[len(lead) : -2]
        flat = x.reshape(*lead, -1, *x.shape[-2:]).transpose(-3, -2)  # (*lead, C, N, d_in)
        y = flat @ self.W + self.b[..., None, :]
        return y.transpose(-3, -2).reshape(*lead, *batch, *y.shape[-3:-2], y.shape[-1])


def _mlp(
    sizes: list[int], lead: tuple[int, ...], generator: torch.Generator, parallel: int | None = None
) -> nn.Sequential:
    """Affine maps with GELU between; He-normal hidden weights (gain 2), LeCun-normal output (gain 1)."""
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(zip(sizes, sizes[1:])):
        gain = 1.0 if i == len(sizes) - 2 else 2.0
        make = _Affine(d_in, d_out, gain, lead, generator) if parallel is None else _ParallelAffine(
            parallel, d_in, d_out, gain, lead, generator)  # fmt: skip
        layers += [make, nn.GELU()]
    return nn.Sequential(*layers[:-1])


def scalar_mlp(
    h: Float[Tensor, "*#batch component"],
    w1: Float[Tensor, "*#batch component hidden"],
    b1: Float[Tensor, "*#batch component hidden"],
    w2: Float[Tensor, "*#batch component hidden"],
    b2: Float[Tensor, "*#batch component"],
) -> Float[Tensor, "*batch component"]:
    """Per component, a one-hidden-layer MLP on the scalar h_c: z = Σ_k w2_k gelu(w1_k h + b1_k) + b2."""
    return (F.gelu(h[..., None] * w1 + b1) * w2).sum(-1) + b2


# Φ(u) − ½ and gelu′(u) − ½ are odd: u P(u²)/Q(u²), fitted on |u| ≤ 5.5, where both have reached ±½. Error in float32 below 5e-7.
_CDF = ((0.398942235, 0.0338527866, 0.00467726962, 0.000168827147, 6.35213218e-06, 2.27493234e-08),
        (1.0, 0.25152227, 0.0286459528, 0.00188445314, 7.36479966e-05, 1.19750376e-06))  # fmt: skip
_SLOPE = ((0.79788532, -0.0309439119, 0.0142190387, 2.05932732e-05, 3.58031937e-05, 1.90872134e-07),
          (1.0, 0.294558746, 0.0409885194, 0.00352182007, 0.000192060362, 8.88711771e-06))  # fmt: skip


def _polynomial(s: Tensor, a: tuple[float, ...]) -> Tensor:
    return a[0] + s * (a[1] + s * (a[2] + s * (a[3] + s * (a[4] + s * a[5]))))


def _gelu_and_slope(u: Tensor) -> tuple[Tensor, Tensor]:
    """(gelu(u), gelu′(u)) without an exponential: a third of the time on a processor with AVX2."""
    v = u.clamp(-5.5, 5.5)
    s = v * v
    cdf, slope = (0.5 + v * (_polynomial(s, P) / _polynomial(s, Q)) for P, Q in (_CDF, _SLOPE))
    return u * cdf, slope


def _scalar_forward(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """(z, dz/dh), positions last. h: (*stack, C, N); w1, b1, w2: (*stack, C, hidden)."""
    gelu, slope = _gelu_and_slope(h[..., None, :] * w1[..., None] + b1[..., None])
    return (gelu * w2[..., None]).sum(-2) + b2[..., None], (slope * (w1 * w2)[..., None]).sum(-2)


def _scalar_backward(g: Tensor, h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w1, b1, w2, the hidden units recomputed."""
    gelu, slope = _gelu_and_slope(h[..., None, :] * w1[..., None] + b1[..., None])
    d = slope * g[..., None, :]
    return (d * h[..., None, :]).sum(-1) * w2, d.sum(-1) * w2, (gelu * g[..., None, :]).sum(-1)


_compiled_forward = torch.compile(_scalar_forward, dynamic=False)
_compiled_backward = torch.compile(_scalar_backward, dynamic=False)


class _ScalarMLP(torch.autograd.Function):
    """`scalar_mlp` compiled: hidden units live in registers in both passes. Eager, they are written to memory many
    times over; as one compiled expression, their gradient is still written once, and computed twice."""

    @staticmethod
    def forward(ctx, h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        lead = w1.shape[:-2]
        flat = h.reshape(*lead, -1, h.shape[-1]).mT.contiguous()
        z, slope = _compiled_forward(flat, w1, b1, w2, b2)
        ctx.save_for_backward(flat, slope, w1, b1, w2)
        return z.mT.reshape(h.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def,override]
        flat, slope, w1, b1, w2 = ctx.saved_tensors
        g = grad.reshape(*w1.shape[:-2], -1, grad.shape[-1]).mT.contiguous()
        return (g * slope).mT.reshape(grad.shape), *_compiled_backward(g, flat, w1, b1, w2), g.sum(-1)


class ComponentGate(nn.Module):
    """`mlp` (reads h_c), `vector_mlp` (reads x; one MLP per component) or `shared_mlp` (reads x; one MLP x → C)."""

    compiled = False  # set by `ComponentModel.compile_gates`

    def __init__(
        self, kind: str, d_in: int, n: int, hidden: tuple[int, ...], lead: tuple[int, ...], g: torch.Generator
    ) -> None:
        super().__init__()
        self.kind = kind
        self.layers = {
            "mlp": lambda: _mlp([1, *hidden, 1], lead, g, n),
            "vector_mlp": lambda: _mlp([d_in, *hidden, 1], lead, g, n),
            "shared_mlp": lambda: _mlp([d_in, *hidden, n], lead, g),
        }[kind]()

    def forward(
        self, x: Float[Tensor, "*batch d_in"], h: Float[Tensor, "*batch own"]
    ) -> Float[Tensor, "*batch component"]:
        """z from the module's input x and its components' activations h, which a `shared_mlp` does not read."""
        if self.kind == "shared_mlp":
            return self.layers(x)
        if self.kind == "vector_mlp":
            return self.layers(x[..., None, :].expand(*h.shape, -1)).squeeze(-1)
        if len(self.layers) != 3:
            return self.layers(h[..., None]).squeeze(-1)
        first, last = self.layers[0], self.layers[2]
        if self.compiled:
            return _ScalarMLP.apply(h, first.W.squeeze(-2), first.b, last.W.squeeze(-1), last.b.squeeze(-1))
        w1, b1 = _align(first.W[..., 0, :], h[..., None], 2), _align(first.b, h[..., None], 2)
        w2, b2 = _align(last.W[..., 0], h[..., None], 2), _align(last.b[..., 0], h, 1)
        return scalar_mlp(h, w1, b1, w2, b2)


class GlobalMLPGate(nn.Module):
    """`global_shared_mlp`: all module inputs, concatenated in the order of their names → MLP → all components."""

    def __init__(
        self, d_in: int, n: int, hidden: tuple[int, ...], lead: tuple[int, ...], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.layers = _mlp([d_in, *hidden, n], lead, generator)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.layers(torch.cat(inputs, -1))


class _GateAttention(nn.Module):
    def __init__(self, d: int, heads: int, causal: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear = nn.Linear(d, d, bias=False)
            linear.weight.data = torch.randn(d, d, generator=generator) / d**0.5
            self.add_module(name, linear)

    def forward(self, x: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch seq d"]:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (t.to(x) for t in rotary_tables(x.shape[1], q.shape[-1], 10_000.0, x.device))
        z = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=self.causal)
        return self.out_proj(z.transpose(1, 2).flatten(-2))


class _GateBlock(nn.Module):
    def __init__(self, d: int, heads: int, hidden: int, causal: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.attn = _GateAttention(d, heads, causal, generator)
        self.mlp = _mlp([d, hidden, d], (), generator)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(F.rms_norm(x, x.shape[-1:]))
        return x + self.mlp(F.rms_norm(x, x.shape[-1:]))


class GlobalTransformerGate(nn.Module):
    """`global_shared_transformer`: RMS-normed module inputs, concatenated → pre-norm blocks with RoPE → all components.

    A bidirectional gate (Goodfire's) sees future tokens, so its masks can carry the next token; a causal one cannot.
    """

    def __init__(self, d_in: int, n: int, gate: GateConfig, generator: torch.Generator) -> None:
        super().__init__()
        assert gate.d_model % (2 * gate.heads) == 0, f"{gate.d_model=} must be a multiple of 2·{gate.heads=}"
        self._input_projector = _Affine(d_in, gate.d_model, 1.0, (), generator)
        self._blocks = nn.ModuleList(
            _GateBlock(gate.d_model, gate.heads, gate.hidden[0], gate.causal, generator) for _ in range(gate.blocks)
        )
        self._output_head = _Affine(gate.d_model, n, 1.0, (), generator)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        x = self._input_projector(torch.cat([F.rms_norm(x, x.shape[-1:]) for x in inputs], -1))
        for block in self._blocks:
            x = block(x)
        return self._output_head(x)


# ---------------------------------------------------------------------------------------------------------- sigmoids


class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, alpha: float) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
        (z,) = ctx.saved_tensors
        below = ctx.alpha * grad.clamp(max=0)  # only gradients that would raise g leak through
        return torch.where(z <= 0, below, torch.where(z <= 1, grad, 0.0)), None


def lower(z: Float[Tensor, "*batch"], alpha: float = 0.01) -> Float[Tensor, "*batch"]:
    """clamp(z, 0, 1). Gradient G passes for 0 < z ≤ 1; αG for z ≤ 0 if G < 0; nothing above 1."""
    return _Lower.apply(z, alpha)  # type: ignore[no-any-return]


def upper(z: Float[Tensor, "*batch"], alpha: float = 0.01) -> Float[Tensor, "*batch"]:
    """max(z, 0) up to 1, leaking with slope α above."""
    return torch.where(z > 1, 1 + alpha * (z - 1), z.clamp_min(0))


# ------------------------------------------------------------------------------------------------- masks and routing


class Mask(NamedTuple):
    """One module's mask; `delta` None: the path through Δ is closed."""

    components: Float[Tensor, "*batch component"]
    delta: Float[Tensor, "*batch"] | None


def stochastic_masks(g_lo: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Mask]:
    """m = g_lo + (1 − g_lo) r and m_Δ, all draws U(0, 1) per position."""
    return {
        path: Mask(_blend(g, torch.rand(g.shape, generator=generator, device=g.device)),
                   torch.rand(g.shape[:-1], generator=generator, device=g.device))
        for path, g in g_lo.items()
    }  # fmt: skip


def source_masks(
    g_lo: Mapping[str, Tensor], sources: Mapping[str, Float[Tensor, "*batch component+1"]]
) -> dict[str, Mask]:
    """m = g_lo + (1 − g_lo) r with given sources r; the last channel is m_Δ."""
    return {
        path: Mask(_blend(g, sources[path][..., :-1]), sources[path][..., -1].expand(g.shape[:-1]))
        for path, g in g_lo.items()
    }


def _blend(g: Tensor, r: Tensor) -> Tensor:
    return torch.lerp(g, torch.ones_like(g), r.to(g.dtype)) if r.shape == g.shape else g + (1 - g) * r


Routing = dict[str, Float[Tensor, "*batch"]]  # 1 where a position of a module goes through the decomposition


def route_subset(paths: list[str], shape: tuple[int, ...], generator: torch.Generator) -> Routing:
    """uniform-k-subset: k ~ U{1..M} per position, then k of the M modules, uniformly."""
    k = torch.randint(1, len(paths) + 1, shape, generator=generator, device=generator.device)
    rank = torch.rand(len(paths), *shape, generator=generator, device=generator.device).argsort(0).argsort(0)
    return {path: (rank[i] < k).float() for i, path in enumerate(paths)}


def routed(masks: Mapping[str, Mask], routing: Routing) -> dict[str, Mask]:
    """Where a position is not routed, its mask is all ones with m_Δ = 1: the original map, by the Δ identity."""
    out = {}
    for path, (m, delta) in masks.items():
        r = routing[path]
        original = 1 - r if delta is None else 1 - r + r * delta
        out[path] = Mask(torch.lerp(torch.ones_like(m), m, r[..., None].to(m.dtype)), original)
    return out


# --------------------------------------------------------------------------------------------------------- the model


class ComponentModel(nn.Module):
    """Components and gates beside a frozen target; `masked` runs the target's own forward with masked linear maps.

    Raises ValueError for a pattern that matches nothing, a module of an unsupported kind, two patterns claiming one
    module, C < 1 (by SPDConfig), or a tied pair with different C or shapes.
    """

    def __init__(self, target_model: nn.Module, config: SPDConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.__dict__["target_model"] = target_model  # not a submodule: a checkpoint holds the decomposition alone
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
            self._components[path.replace(".", "-")] = part
        self.sizes = sizes
        self._build_gates(config.gate, generator)

    def _tie(self, sizes: dict[str, int], first: str, second: str) -> Components:
        for path in (first, second):
            if path not in sizes:
                raise ValueError(f"tied module {path!r} is not decomposed: add a pattern for it")
        if sizes[first] != sizes[second]:
            raise ValueError(
                f"tied modules {first!r} (C={sizes[first]}) and {second!r} (C={sizes[second]}) need the same C"
            )
        shapes = [tuple(weight_map(self.target_model.get_submodule(p)).shape[-2:]) for p in (first, second)]
        if shapes[0] != shapes[1][::-1]:
            raise ValueError(f"tied modules {first!r} and {second!r} are not transposes: {shapes[0]} and {shapes[1]}")
        return self._components[first.replace(".", "-")]  # type: ignore[return-value]

    def _build_gates(self, gate: GateConfig, generator: torch.Generator) -> None:
        lead = () if self.stack is None else (self.stack,)
        total = sum(self.sizes.values())
        if gate.kind in ("mlp", "vector_mlp", "shared_mlp"):
            self._ci_fns = nn.ModuleDict({
                path.replace(".", "-"): ComponentGate(
                    gate.kind, self._gate_width(path), self.sizes[path], gate.hidden, lead, generator
                )
                for path in self.paths
            })  # fmt: skip
        elif gate.kind == "global_shared_mlp":
            width = sum(self._gate_width(path) for path in self.paths)
            self._global_ci_fn = GlobalMLPGate(width, total, gate.hidden, lead, generator)
        else:
            assert self.stack is None, "a transformer gate reads positions: it does not decompose stacked toys"
            width = sum(self._gate_width(path) for path in self.paths)
            self._global_ci_fn = GlobalTransformerGate(width, total, gate, generator)

    def _gate_width(self, path: str) -> int:
        """Embeddings feed their gate h (C wide); everything else its input."""
        module = self.target_model.get_submodule(path)
        return self.sizes[path] if isinstance(module, nn.Embedding) else weight_map(module).shape[-2]

    def compile_gates(self) -> None:
        """Compile the per-component MLPs (`mlp` gates of one hidden layer, fp32); needs a C++ compiler on CPU."""
        assert self.config.gate.kind == "mlp" and len(self.config.gate.hidden) == 1, f"{self.config.gate=}"
        for gate in self._ci_fns.values():
            gate.compiled = True

    @property
    def components(self) -> dict[str, Components]:
        return {path: self._components[path.replace(".", "-")] for path in self.paths}  # type: ignore[misc]

    @property
    def gates(self) -> nn.Module:
        return self._ci_fns if self.config.gate.local else self._global_ci_fn

    @property
    def gate_parameters(self) -> int:
        return sum(p.numel() for p in self.gates.parameters())

    def gate_parameters_of(self, path: str) -> int:
        """Of one module's own gate."""
        assert self.config.gate.local, f"a {self.config.gate.kind} gate belongs to no module"
        return sum(p.numel() for p in self._ci_fns[path.replace(".", "-")].parameters())

    def component_activations(self, path: str, x: Tensor) -> Float[Tensor, "*batch component"]:
        """h = x V; for an embedding, x are token ids and h = V[x]."""
        V = self.components[path].V
        return V[x] if isinstance(self.target_model.get_submodule(path), nn.Embedding) else x @ V

    def importance_logits(self, inputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "*batch component"]]:
        """z of every module from the inputs of all modules (local gates need only those they are asked for)."""
        if self.config.gate.local:
            return {path: self.importance_logit(path, x) for path, x in inputs.items()}
        assert set(inputs) == set(self.paths), f"a global gate reads all of {self.paths}, got {sorted(inputs)}"
        z = self._global_ci_fn([self._gate_input(path, inputs[path]) for path in self.paths])
        return dict(zip(self.paths, z.split([self.sizes[path] for path in self.paths], -1)))

    def importance_logit(self, path: str, x: Tensor) -> Float[Tensor, "*batch component"]:
        """z of one module from its own input; only local gates can do this."""
        assert self.config.gate.local, f"a {self.config.gate.kind} gate reads all modules at once"
        gate = self._ci_fns[path.replace(".", "-")]
        reads_h = self.config.gate.kind != "shared_mlp" or x.dtype == torch.int64
        h = self.component_activations(path, x) if reads_h else x
        return gate(h if x.dtype == torch.int64 else x, h)

    def _gate_input(self, path: str, x: Tensor) -> Tensor:
        embeds = isinstance(self.target_model.get_submodule(path), nn.Embedding)
        return self.component_activations(path, x) if embeds else x

    def lower(self, z: Tensor) -> Tensor:
        return lower(z, self.config.alpha)

    def upper(self, z: Tensor) -> Tensor:
        return upper(z, self.config.alpha)

    def linear(
        self,
        path: str,
        x: Tensor,
        mask: Float[Tensor, "*batch component"],
        delta_mask: Float[Tensor, "*batch"] | float = 0.0,
    ) -> Float[Tensor, "*batch d_out"]:
        """The masked module on its own input; delta_mask 0.0 closes the path through Δ."""
        module = self.target_model.get_submodule(path)
        closed = isinstance(delta_mask, float) and delta_mask == 0.0
        return self._masked(
            path, x, None if closed else module(x), Mask(mask, None if closed else torch.as_tensor(delta_mask))
        )

    def _masked(self, path: str, x: Tensor, y: Tensor | None, mask: Mask) -> Tensor:
        """y: the module's own output x W + b, needed where Δ is open."""
        part, h = self.components[path], self.component_activations(path, x)
        if mask.delta is None:
            out = (mask.components * h) @ part.U
            return out if part.bias is None else out + _align(part.bias, out, 1)
        assert y is not None
        delta = mask.delta.to(h.dtype).expand(h.shape[:-1])[..., None]
        out = ((mask.components - delta) * h) @ part.U
        if part.bias is None:
            return torch.addcmul(out, delta, y.to(out.dtype))
        bias = _align(part.bias, out, 1)
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
                stack.callback(self.target_model.get_submodule(path).register_forward_hook(hook).remove)
            yield

    def _masking_hook(
        self, path: str, mask: Tensor | Callable[[Tensor], Tensor], delta: Tensor | float | None
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def replace(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            m = mask(args[0]) if callable(mask) else mask
            return self._masked(
                path, args[0], output, Mask(m, None if delta is None else torch.as_tensor(delta, device=m.device))
            )

        return replace

    def run_masked(self, masks: Mapping[str, Mask], *args: Tensor) -> Tensor:
        """The target's output with the given masks (its first output where it gives several)."""
        deltas = {path: mask.delta for path, mask in masks.items() if mask.delta is not None}
        with self.masked({path: mask.components for path, mask in masks.items()}, deltas):
            return _first(self.target_model(*args))

    def inputs_capture(self, *args: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs of all decomposed modules, output) of one clean forward pass of the target."""
        seen: dict[str, Tensor] = {}

        def keep(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _module, args: seen.__setitem__(path, args[0])

        with contextlib.ExitStack() as stack:
            for path in self.paths:
                stack.callback(self.target_model.get_submodule(path).register_forward_pre_hook(keep(path)).remove)
            output = _first(self.target_model(*args))
        return seen, output

    def deltas(self) -> dict[str, Float[Tensor, "*stack d_in d_out"]]:
        """Δ = W − V U of every module, with gradient in V and U."""
        return {
            path: weight_map(self.target_model.get_submodule(path)) - part.V @ part.U
            for path, part in self.components.items()
        }

    def start_faithful(self) -> None:
        """Set U or V by least squares so that V U = W wherever C suffices: what faithfulness warm-up converges to."""
        with torch.no_grad():
            for path, part in self.components.items():
                W = weight_map(self.target_model.get_submodule(path))
                if isinstance(part, Components) and W.shape[-2] <= W.shape[-1]:
                    part.U += torch.linalg.pinv(part.V) @ (W - part.V @ part.U)
                elif isinstance(part, Components):
                    part.V += (W - part.V @ part.U) @ torch.linalg.pinv(part.U)


def _first(output: object) -> Tensor:
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


# ------------------------------------------------------------------------------------------------------- adversaries


Objective = Callable[[dict[str, Tensor]], Tensor]


def pgd_sources(objective: Objective, sources: dict[str, Tensor], steps: int, step_size: float) -> dict[str, Tensor]:
    """r ← clamp(r + η · sign ∇_r objective, 0, 1), `steps` times; the best r met is returned, so that the objective
    never falls below its start (published code returns the last one)."""
    best, best_value = sources, next(iter(sources.values())).new_full((), -torch.inf)
    for step in range(steps + 1):
        leaves = {path: r.detach().requires_grad_() for path, r in sources.items()}
        value = objective(leaves)
        better = value.detach() > best_value  # stays on the device
        best = {path: torch.where(better, r.detach(), best[path]) for path, r in leaves.items()}
        best_value = torch.where(better, value.detach(), best_value)
        if step < steps:
            grads = torch.autograd.grad(value, list(leaves.values()))
            sources = {p: (r + step_size * g.sign()).clamp(0, 1).detach() for (p, r), g in zip(leaves.items(), grads)}
    return best


class PersistentSources(nn.Module):
    """Adversarial sources r ∈ [0, 1] kept across training steps; Adam ascent, clamped. State travels in checkpoints.

    `shape`: () one vector for all positions, (seq,) one per position index, (batch, seq) one per batch slot.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        shape: tuple[int, ...],
        lr: float,
        betas: tuple[float, float],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.r = nn.ParameterDict(
            {
                p.replace(".", "-"): nn.Parameter(torch.rand(*shape, n + 1, generator=generator, device=generator.device))
                for p, n in sizes.items()
            }
        )
        self.optimiser = torch.optim.Adam(self.r.values(), lr=lr, betas=betas, maximize=True)

    def sources(self) -> dict[str, Tensor]:
        return {key.replace("-", "."): r for key, r in self.r.items()}

    def ascend(self, value: Tensor, retain_graph: bool = False) -> None:
        """One step of ascent on the gradient of `value`; the other leaves of the graph get none."""
        params = list(self.r.values())
        for p, g in zip(params, torch.autograd.grad(value, params, retain_graph=retain_graph)):
            p.grad = g
        self.optimiser.step()
        with torch.no_grad():
            for p in params:
                p.clamp_(0, 1)
                p.grad = None
