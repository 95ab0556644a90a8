"""Gates of SPD: networks that tell from a module's input how much each of its components matters there.

    z = gate(clean inputs),   g_lo = clamp(z, 0, 1),   g_up = max(z, 0) for z ≤ 1, 1 + α (z − 1) above

z, the pre-sigmoid importance, is (…, component). A gate reads one component's activation (`mlp`), its module's input
(`vector_mlp`, `shared_mlp`) or the inputs of all modules, or of its `taps` (`global_shared_mlp`, `global_shared_transformer`).
Any parameter may carry one leading axis `stack`: several seeds of one toy side by side.
"""

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from config import GateConfig
from llama_simple_mlp import rotary_tables, rotate


def align(p: Tensor, x: Tensor, inner: int) -> Tensor:
    """View p (`*stack`, then `inner` own axes) so that it broadcasts against x (`*stack`, batch axes, `inner` axes)."""
    stack = p.ndim - inner
    return p.view(*p.shape[:stack], *[1] * (x.ndim - p.ndim), *p.shape[stack:])


def dashed(path: str) -> str:
    """A module's path as checkpoints name it, h-0-mlp-c_fc for h.0.mlp.c_fc: torch allows no dot in a name."""
    return path.replace(".", "-")


# ------------------------------------------------------------------------------------------------------------- gates


class _Affine(nn.Module):
    """x W + b with W: d_in × d_out; weights N(0, gain/d_in), bias 0."""

    def __init__(self, d_in: int, d_out: int, gain: float, lead: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(*lead, d_in, d_out, generator=generator) * (gain / d_in) ** 0.5)
        self.b = nn.Parameter(torch.zeros(*lead, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W + align(self.b, x, 1)


class _ParallelAffine(nn.Module):
    """One affine map per component, as a batched product. x: (..., C, d_in) → (..., C, d_out)."""

    def __init__(
        self, n: int, d_in: int, d_out: int, gain: float, lead: tuple[int, ...], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(*lead, n, d_in, d_out, generator=generator) * (gain / d_in) ** 0.5)
        self.b = nn.Parameter(torch.zeros(*lead, n, d_out))

    def forward(self, x: Tensor) -> Tensor:
        stack = "" if self.W.ndim == 3 else "stack "
        maps = f"{stack}... component d_in, {stack}component d_in d_out -> {stack}... component d_out"
        return einsum(x, self.W, maps) + align(self.b, x, 2)


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
    """(z, dz/dh), positions last. h: (*stack, C, N); w1, b1, w2: (hidden, *stack, C).

    Hidden units first, so that the compiler's vectors run over positions: it adds up hidden units without sums in a vector.
    """
    gelu, slope = _gelu_and_slope(h * w1[..., None] + b1[..., None])
    return (gelu * w2[..., None]).sum(0) + b2[..., None], (slope * (w1 * w2)[..., None]).sum(0)


def _scalar_backward(g: Tensor, h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w1, b1, w2, here (*stack, C, hidden); the hidden units recomputed."""
    gelu, slope = _gelu_and_slope(h[..., None, :] * w1[..., None] + b1[..., None])
    d = slope * g[..., None, :]
    return (d * h[..., None, :]).sum(-1) * w2, d.sum(-1) * w2, (gelu * g[..., None, :]).sum(-1)


@functools.cache
def _compiled(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """torch.compile takes seconds to be loaded: where no gate is compiled, it is not. A product and its sum are one operation."""
    return torch.compile(function, dynamic=False, options={"cpp.enable_floating_point_contract_flag": "fast"})


class _ScalarMLP(torch.autograd.Function):
    """`scalar_mlp` compiled: hidden units live in registers in both passes. Eager, they are written to memory many
    times over; as one compiled expression, their gradient is still written once, and computed twice."""

    @staticmethod
    def forward(ctx, h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        lead = w1.shape[:-2]
        flat = h.reshape(*lead, -1, h.shape[-1]).mT.contiguous()
        z, slope = _compiled(_scalar_forward)(flat, *(w.movedim(-1, 0).contiguous() for w in (w1, b1, w2)), b2)
        ctx.save_for_backward(flat, slope, w1, b1, w2)
        return z.mT.contiguous().view(h.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def,override]
        flat, slope, w1, b1, w2 = ctx.saved_tensors
        g = grad.reshape(*w1.shape[:-2], -1, grad.shape[-1]).mT.contiguous()
        return (
            (g * slope).mT.contiguous().view(grad.shape),
            *_compiled(_scalar_backward)(g, flat, w1, b1, w2),
            g.sum(-1),
        )


class ComponentGate(nn.Module):
    """`mlp` (reads h_c), `vector_mlp` (reads x; one MLP per component) or `shared_mlp` (reads x; one MLP x → C)."""

    compiled = False  # set by `Importances.compile_gates`

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
        w1, b1 = align(first.W[..., 0, :], h[..., None], 2), align(first.b, h[..., None], 2)
        w2, b2 = align(last.W[..., 0], h[..., None], 2), align(last.b[..., 0], h, 1)
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
            rearrange(project(x), "batch seq (heads head) -> batch heads seq head", heads=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (t.to(x) for t in rotary_tables(x.shape[1], q.shape[-1], 10_000.0, x.device))
        z = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=self.causal)
        return self.out_proj(rearrange(z, "batch heads seq head -> batch seq (heads head)"))


class _GateBlock(nn.Module):
    def __init__(self, d: int, heads: int, hidden: int, causal: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.attn = _GateAttention(d, heads, causal, generator)
        self.mlp = _mlp([d, hidden, d], (), generator)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(F.rms_norm(x, x.shape[-1:]))
        return x + self.mlp(F.rms_norm(x, x.shape[-1:]))


class GlobalTransformerGate(nn.Module):
    """`global_shared_transformer`: module inputs, concatenated → pre-norm blocks with RoPE → all components.

    Each module's input is RMS-normed before, unless the configuration says that it is read as it is.
    A bidirectional gate (Goodfire's) sees future tokens, so its masks can carry the next token; a causal one cannot.
    """

    def __init__(self, d_in: int, n: int, gate: GateConfig, generator: torch.Generator) -> None:
        super().__init__()
        assert gate.d_model % (2 * gate.heads) == 0, f"{gate.d_model=} must be a multiple of 2·{gate.heads=}"
        self.norm_inputs = gate.norm_inputs
        self._input_projector = _Affine(d_in, gate.d_model, 1.0, (), generator)
        self._blocks = nn.ModuleList(
            _GateBlock(gate.d_model, gate.heads, gate.hidden[0], gate.causal, generator) for _ in range(gate.blocks)
        )
        self._output_head = _Affine(gate.d_model, n, 1.0, (), generator)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        read = [F.rms_norm(x, x.shape[-1:]) for x in inputs] if self.norm_inputs else inputs
        x = self._input_projector(torch.cat(read, -1))
        for block in self._blocks:
            x = block(x)
        return self._output_head(x)


class Importances(nn.Module):
    """All gates of a decomposition: from the modules' inputs to the importance logit z of every component.

    A local gate serves one module, a global one all of them at once. Parameters: `_ci_fns.<path, . → ->` or `_global_ci_fn`,
    as in Goodfire's checkpoints.
    """

    def __init__(
        self,
        config: GateConfig,
        widths: Mapping[str, int],
        sizes: Mapping[str, int],
        stack: int | None,
        g: torch.Generator,
    ) -> None:
        """`widths`: of what the gates read of each module, in that order; `sizes`: numbers of components, in the order of z."""
        super().__init__()
        self.config, self.reads, self.sizes = config, list(widths), dict(sizes)
        lead = () if stack is None else (stack,)
        d_in, n = sum(widths.values()), sum(sizes.values())
        if config.local:
            self._ci_fns = nn.ModuleDict({
                dashed(path): ComponentGate(config.kind, widths[path], sizes[path], config.hidden, lead, g)
                for path in sizes
            })  # fmt: skip
        elif config.kind == "global_shared_mlp":
            self._global_ci_fn = GlobalMLPGate(d_in, n, config.hidden, lead, g)
        else:
            assert stack is None, "a transformer gate reads positions: it does not decompose stacked toys"
            self._global_ci_fn = GlobalTransformerGate(d_in, n, config, g)

    @property
    def read_activations(self) -> bool:
        """Whether the gates read what each component reads, h = x V, and not the module's input alone."""
        return self.config.kind in ("mlp", "vector_mlp")

    def gate(self, path: str) -> ComponentGate:
        """The gate of one module; a global gate is none."""
        assert self.config.local, f"a {self.config.kind} gate reads all modules at once"
        return self._ci_fns[dashed(path)]  # type: ignore[return-value]

    def together(self, inputs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "*batch component"]]:
        """z of every module by a global gate, from all that it reads."""
        assert set(inputs) == set(self.reads), f"the global gate reads all of {self.reads}, got {sorted(inputs)}"
        z = self._global_ci_fn([inputs[path] for path in self.reads])
        return dict(zip(self.sizes, z.split(list(self.sizes.values()), -1)))

    def n_parameters(self, paths: Iterable[str]) -> int:
        """Parameters of the gates that decide for these modules: their own, or the one that decides for all."""
        gates = [self.gate(path) for path in paths] if self.config.local else [self._global_ci_fn]
        return sum(p.numel() for gate in gates for p in gate.parameters())

    def compile_gates(self) -> None:
        """Compile the per-component MLPs (`mlp` gates of one hidden layer, fp32), where there is a C++ compiler."""
        assert self.config.kind == "mlp" and len(self.config.hidden) == 1, f"{self.config=}"
        compiler = os.environ.get("CXX", "g++")  # torch's own choice
        if shutil.which(compiler) is None:
            print(
                f"no C++ compiler {compiler!r} ($CXX): SPD's gates run uncompiled, at about half the speed",
                file=sys.stderr,
            )
            return
        for path in self.sizes:
            self.gate(path).compiled = True


# ---------------------------------------------------------------------------------------------------------- sigmoids


def _compare(relation: Callable[..., Tensor], z: Tensor, bound: float) -> Tensor:
    """1 where the relation holds, else 0, in z's type: on a processor a fortieth of the time of `where`, which branches."""
    return relation(z, bound, out=torch.empty_like(z))


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
        return torch.lerp(below, grad, _compare(torch.gt, z, 0)) * _compare(torch.le, z, 1), None


class _Upper(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, alpha: float) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return torch.add(z.clamp(0, 1), (z - 1).clamp_min(0), alpha=alpha)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
        (z,) = ctx.saved_tensors
        above = _compare(torch.gt, z, 1)
        return grad * (_compare(torch.ge, z, 0) - above).add_(above, alpha=ctx.alpha), None


def lower(z: Float[Tensor, "*batch"], alpha: float = 0.01) -> Float[Tensor, "*batch"]:
    """clamp(z, 0, 1). Gradient G passes for 0 < z ≤ 1; αG for z ≤ 0 if G < 0; nothing above 1."""
    return _Lower.apply(z, alpha)  # type: ignore[no-any-return]


def upper(z: Float[Tensor, "*batch"], alpha: float = 0.01) -> Float[Tensor, "*batch"]:
    """max(z, 0) up to 1, leaking with slope α above."""
    return _Upper.apply(z, alpha)  # type: ignore[no-any-return]
