"""What stands in for a target's MLPs: one `Replacement` per method and baseline, all under the same three protocols.

    y_hat = pass_(layer, x, y)      x: the MLP's input, y: the MLP's own output there, both on the stream as it runs

A `Replacement` opens a `Pass` for each forward pass. In a pass opened by `begin()` codes are computed from the running
stream, which earlier replaced layers may have changed; in one opened by `frozen(captured)` they come from a clean
pass, and only what is not a code (an affine skip, a delta, a component's own input) reads the running stream.
Only an SAE and the identity read y beyond a sequence's first position, so the others' MLPs are not computed beyond it.
A pass remembers what was active, so that every method is counted by the same lines of `evaluation.py`:

    active parts per MLP = Σ_modules L0 · writes / layers,    active parameters = Σ_modules L0 · part_parameters + dense

The first position of a sequence is left to the model by `replaced`: coders never train on it, no metric counts it.
"""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clt import CrossLayerTranscoder
from config import Site, TopK, check_rule
from sae import BaseAutoencoder
from sparse_ops import Codes, Layout, decode
from sparsity import Coder
from spd_model import ComponentModel, weight_map
from target_models import Captured, TargetModel, patched
from transcoder import BaseTranscoder


class Origin(NamedTuple):
    """Where a replacement comes from: columns of the table, empty where they don't apply."""

    seed: int | None = None
    train_tokens: int | None = None
    train_seconds: float | None = None
    checkpoint: str = ""


UNKNOWN = Origin()


class Module(NamedTuple):
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


class Pass:
    """One forward pass; `codes[layer]` is computed once, when first needed, from the clean or the running stream."""

    def __init__(self, replacement: "Replacement", clean: Captured | None) -> None:
        self.replacement = replacement
        self.clean = clean
        self.codes: dict[int, Any] = {}
        self.active: dict[tuple[int, str], Active] = {}

    def __call__(
        self, layer: int, x: Float[Tensor, "batch seq d_in"], y: Float[Tensor, "batch own d_out"]
    ) -> Float[Tensor, "batch seq d_out"]:
        flat_x, flat_y = x.flatten(0, 1).float(), y.flatten(0, 1).float()
        return self.replacement.write(self, layer, flat_x, flat_y).view(*x.shape[:-1], -1).to(y.dtype)

    def encode(self, layer: int, x: Tensor | None = None, y: Tensor | None = None) -> Any:
        """The codes of `layer`; x and y are the running stream's, and go unread where a clean pass is given."""
        if layer not in self.codes:
            if self.clean is not None:
                i = self.replacement.reads.index(layer)
                x, y = (kept[i].flatten(0, 1).float() for kept in self.clean)
            assert x is not None and y is not None, f"layer {layer} is read before the running stream came by"
            self.codes[layer] = self.replacement.encode(layer, x, y)
            for name, active in self.replacement.active(layer, self.codes[layer]).items():
                self.active[layer, name] = active
        return self.codes[layer]


class Replacement(ABC):
    """`layers` replaced by `method`. Subclasses say what a code is, what it writes, and what a part costs."""

    method: str
    layers: tuple[int, ...]
    k: int | None = None  # active parts per token and layer by construction; None where nothing fixes it
    site: Site | None = "mlp_out"  # where it writes; None: wherever the target is read and written
    origin: Origin = UNKNOWN
    has_codes: ClassVar[bool] = True  # False: `frozen` and `free` are the same
    reads_y: ClassVar[bool] = False  # True: it needs what the MLP itself writes on the running stream

    @property
    def reads(self) -> tuple[int, ...]:
        """Layers whose clean activations a frozen pass needs."""
        return self.layers

    def begin(self) -> Pass:
        """A pass whose codes follow the running stream (protocol `free`)."""
        return Pass(self, None)

    def frozen(self, captured: Captured) -> Pass:
        """A pass whose codes come from a clean pass (protocols `frozen` and `single`); `captured` spans self.reads."""
        assert len(captured.inputs) == len(self.reads), f"{len(captured.inputs)=} {self.reads=}"
        return Pass(self, captured)

    def free(self, captured: Captured, run: Callable[[Pass], object]) -> Pass:
        """`begin()`, except for gates that read layers which the stream has not reached: they need a first `run`."""
        return self.begin()

    def encode(self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "own d_out"]) -> Any:
        raise AssertionError(f"{self.method} has no codes")

    def active(self, layer: int, codes: Any) -> dict[str, Active]:
        """What is active in each module of `layer`."""
        return {name: Active.of(codes) for name in self.module_names}

    module_names: ClassVar[tuple[str, ...]] = ("latents",)

    @abstractmethod
    def write(
        self, pass_: Pass, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "own d_out"]
    ) -> Float[Tensor, "token d_out"]: ...

    def modules(self, layers: Sequence[int]) -> list[Module]:
        """The modules at work when only `layers` are replaced."""
        return []

    def dense_parameters(self, layers: Sequence[int]) -> int:
        """Parameters in `layers` that work on every token: a skip's, a delta's, an affine map's; biases don't count."""
        return 0

    def active_parameters(self, l0: Mapping[tuple[int, str], float], layers: Sequence[int] | None = None) -> float:
        """Parameters at work per token, given the mean L0 of each (layer, module)."""
        layers = self.layers if layers is None else layers
        sparse = sum(l0[m.layer, m.name] * m.part_parameters for m in self.modules(layers))
        return sparse + self.dense_parameters(layers)

    def gate_parameters(self, layers: Sequence[int]) -> int | None:
        """Parameters that decide what is active when only `layers` are replaced; None where nothing is learnt."""
        return None

    def dead(self) -> float | None:
        """Share of the parts that were silent over the last ≥ 1M training tokens; None where that is not known."""
        return None


Observer = Callable[[int, Float[Tensor, "batch seq d_out"]], None]


def replaced(
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

    with patched(target, {layer: function(layer) for layer in layers}, first_only=not pass_.replacement.reads_y):
        return target.logits(tokens)


# ---------------------------------------------------------------------------------------------------------- coders


def deployed(coder: Coder, top_k: int | None) -> Any:
    """The coder's deployed face as a view that shares its tensors; `top_k` puts TopK(top_k) in place of its rule.

    The view's codes are then the top_k largest positive pre-activations of each token, whatever the threshold.
    """
    shared = {id(t): t for t in chain(coder.parameters(), coder.buffers())}
    view = copy.deepcopy(coder, shared).eval()
    for encoder in view.encoders if top_k is not None else ():
        check_rule(TopK(top_k), encoder.d_dict)
        encoder.rule = TopK(top_k)
    return view


def _common_k(coders: Sequence[Coder], top_k: int | None) -> int | None:
    ks = {coder.k for coder in coders}
    return top_k if top_k is not None else ks.pop() if len(ks) == 1 else None


def _name(method: str, top_k: int | None, variant: str) -> str:
    """The method, its variant, and -topk where the sparsity is not the trained one."""
    return "-".join(filter(None, [method, variant, "topk" if top_k is not None else ""]))


def _dead(coders: Sequence[Coder], origin: Origin) -> float | None:
    if not origin.train_tokens or origin.train_tokens < 1_000_000:
        return None
    return sum(coder.dead_fraction(1_000_000) for coder in coders) / len(coders)


def by_layer(coders: Iterable[Any]) -> dict[int, Any]:
    """Layer → coder, in order. Raises ValueError where two coders stand for one layer."""
    ordered = sorted(coders, key=lambda coder: coder.config.layer)
    layers = [coder.config.layer for coder in ordered]
    if len(set(layers)) != len(layers):
        raise ValueError(f"one coder per layer, not layers {layers}: measure the others as a replacement of their own")
    return dict(zip(layers, ordered))


class _PerLayer(Replacement):
    """One coder per layer."""

    def __init__(self, method: str, coders: Iterable[Coder], top_k: int | None, variant: str, origin: Origin) -> None:
        originals = by_layer(coders)
        self.method = _name(method, top_k, variant)
        self.layers = tuple(originals)
        self.k = _common_k(list(originals.values()), top_k)
        self.origin = origin
        self.coders = {layer: deployed(coder, top_k) for layer, coder in originals.items()}

    def gate_parameters(self, layers: Sequence[int]) -> int:
        return sum(self.coders[layer].gate_parameters for layer in layers)

    def dead(self) -> float | None:
        return _dead(list(self.coders.values()), self.origin)


class SAE(_PerLayer):
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

    def encode(self, layer: int, x: Tensor, y: Tensor) -> Codes:
        return self.coders[layer].encode(y)  # type: ignore[no-any-return]

    def write(self, pass_: Pass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return self.coders[layer].decode(pass_.encode(layer, x, y))  # type: ignore[no-any-return]

    def modules(self, layers: Sequence[int]) -> list[Module]:
        configs = [self.coders[layer].config for layer in layers]
        return [Module(c.layer, "latents", c.d_dict, 1, c.d_in + c.d_out) for c in configs]


class Transcoder(_PerLayer):
    """Per-layer transcoders, each in place of its MLP."""

    def __init__(
        self, coders: Iterable[BaseTranscoder], top_k: int | None = None, variant: str = "", origin: Origin = UNKNOWN
    ) -> None:
        coders = list(coders)
        skip = "skip" if any(coder.config.skip for coder in coders) else ""
        super().__init__("transcoder", coders, top_k, "-".join(filter(None, [skip, variant])), origin)

    def encode(self, layer: int, x: Tensor, y: Tensor) -> Codes:
        return self.coders[layer].encode(x)  # type: ignore[no-any-return]

    def write(self, pass_: Pass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return self.coders[layer].reconstruct(pass_.encode(layer, x, y), x)  # type: ignore[no-any-return]

    def modules(self, layers: Sequence[int]) -> list[Module]:
        configs = [self.coders[layer].config for layer in layers]
        return [Module(c.layer, "latents", c.d_dict, 1, c.d_in + c.d_out) for c in configs]

    def dense_parameters(self, layers: Sequence[int]) -> int:
        configs = [self.coders[layer].config for layer in layers]
        return sum(c.d_in * c.d_out for c in configs if c.skip)


class CLT(Replacement):
    """A cross-layer transcoder. With one layer replaced, earlier layers' codes are those of the clean pass."""

    def __init__(
        self, coder: CrossLayerTranscoder, top_k: int | None = None, variant: str = "", origin: Origin = UNKNOWN
    ) -> None:
        self.method = _name("clt", top_k, variant)
        self.layers = coder.config.layers
        self.k = _common_k([coder], top_k)
        self.origin = origin
        self.coder: CrossLayerTranscoder = deployed(coder, top_k)

    def gate_parameters(self, layers: Sequence[int]) -> int:
        """Of every layer that writes to one of `layers`."""
        sources = zip(self.layers, self.coder.encoders)
        return sum(p.numel() for i, encoder in sources if i <= max(layers) for p in encoder.parameters())

    def encode(self, layer: int, x: Tensor, y: Tensor) -> Codes:
        return self.coder.encode_layer(self.layers.index(layer), x)

    def write(self, pass_: Pass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        j = self.layers.index(layer)
        pass_.encode(layer, x, y)
        return self.coder.decode_layer(j, [pass_.encode(source) for source in self.layers[: j + 1]])

    def modules(self, layers: Sequence[int]) -> list[Module]:
        c = self.coder.config
        targets = {source: sum(layer >= source for layer in layers) for source in self.layers}
        return [Module(i, "latents", c.d_dict, n, c.d_in + n * c.d_out) for i, n in targets.items() if n]

    def dead(self) -> float | None:
        return _dead([self.coder], self.origin)


# ------------------------------------------------------------------------------------------------------------- SPD


class SPD(Replacement):
    """Rank-one components of an MLP's weight matrices: active ones at full strength (mask 1), the others at none.

    Active: causal importance g_lo > threshold, or the top_k largest pre-sigmoid importances z. `delta` adds W − Σ U V.
    `free`: a local gate reads its module's input on the masked stream. A global gate reads all layers at once, also
    those the stream has not reached, so it reads the stream of a first pass masked by the clean pass's gates: one step
    towards the fixed point, after which its input is the masked model's, not the original's.
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
        inside = {path for paths in self.decomposed.values() for path in paths.values()}
        if not model.config.gate.local and (outside := sorted(set(model.paths) - inside)):
            raise ValueError(f"the gate reads {outside[0]!r}, which is in no MLP: the ruler replaces MLPs alone")
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
        self.method, self.k, self.origin = _name("spd", top_k, variant), top_k, origin
        self.target, self.model, self.threshold, self.top_k, self.delta = target, model, threshold, top_k, delta

    @staticmethod
    def _paths(target: TargetModel, model: ComponentModel, layer: int) -> dict[str, str]:
        """Name → path of the layer's decomposed MLP matrices."""
        site = target.sites[layer]
        paths = [path for path in model.paths if path == site.down or path.startswith(site.write + ".")]
        return {path.rpartition(".")[2]: path for path in paths}

    def gate_parameters(self, layers: Sequence[int]) -> int:
        """Of the matrices' own gates; a global gate decides for all matrices at once."""
        if not self.model.config.gate.local:
            return self.model.gate_parameters
        return sum(self.model.gate_parameters_of(path) for layer in layers for path in self.paths[layer].values())

    @property
    def reads(self) -> tuple[int, ...]:
        return self.layers if self.model.config.gate.local else tuple(self.decomposed)

    def begin(self) -> "SPDPass":
        assert self.model.config.gate.local, "a global gate cannot follow the stream alone: open the pass with `free`"
        return SPDPass(self, None)

    def frozen(self, captured: Captured) -> "SPDPass":
        assert len(captured.inputs) == len(self.reads), f"{len(captured.inputs)=} {self.reads=}"
        inputs: dict[str, Tensor] = {}
        for layer, x in zip(self.reads, captured.inputs):
            down = self.target.sites[layer].down
            for path in self.decomposed[layer].values():
                inputs[path] = (self.target.hidden(layer, x) if path == down else x).float()
        return SPDPass(self, self.model.importance_logits(inputs), inputs)

    def free(self, captured: Captured, run: Callable[[Pass], object]) -> "SPDPass":
        if self.model.config.gate.local:
            return self.begin()
        first = self.frozen(captured)
        run(first)
        return SPDPass(self, self.model.importance_logits(first.inputs))

    def on(self, z: Float[Tensor, "batch seq component"]) -> Bool[Tensor, "batch seq component"]:
        if self.top_k is None:
            return self.model.lower(z) > self.threshold
        k = min(self.top_k, z.shape[-1])
        return torch.zeros_like(z, dtype=torch.bool).scatter(-1, z.topk(k, dim=-1).indices, True)

    def write(self, pass_: Pass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("an SPDPass writes by itself")

    def modules(self, layers: Sequence[int]) -> list[Module]:
        shape = {path: weight_map(self.target.model.get_submodule(path)).shape for path in self.model.paths}
        return [
            Module(layer, name, self.model.sizes[path], 1, sum(shape[path]))
            for layer in layers
            for name, path in self.paths[layer].items()
        ]

    def dense_parameters(self, layers: Sequence[int]) -> int:
        """The MLP's matrices that stay whole, and with `delta` those that are decomposed: their rest is as large."""
        dense = 0
        for layer in layers:
            mlp = self.target.model.get_submodule(self.target.sites[layer].write)
            whole = sum(m.weight.numel() for m in mlp.modules() if isinstance(m, nn.Linear | Conv1D))
            parts = sum(self.target.model.get_submodule(p).weight.numel() for p in self.paths[layer].values())
            dense += whole if self.delta else whole - parts
        return dense


class SPDPass(Pass):
    """Masks given by z, or by each gate on its module's running input; `inputs` keeps what the modules read."""

    replacement: SPD

    def __init__(self, replacement: SPD, z: dict[str, Tensor] | None, inputs: dict[str, Tensor] | None = None) -> None:
        super().__init__(replacement, None)
        self.z = z
        self.inputs = dict(inputs or {})

    def __call__(
        self, layer: int, x: Float[Tensor, "batch seq d_in"], y: Float[Tensor, "batch own d_out"]
    ) -> Float[Tensor, "batch seq d_out"]:
        paths = self.replacement.paths[layer]
        masks = {path: functools.partial(self._mask, layer, name, path) for name, path in paths.items()}
        delta = dict.fromkeys(masks, 1.0) if self.replacement.delta else None
        with self.replacement.model.masked(masks, delta):
            return self.replacement.target.mlp(layer, x).to(y.dtype)

    def _mask(self, layer: int, name: str, path: str, x: Tensor) -> Float[Tensor, "batch seq component"]:
        z = self.replacement.model.importance_logit(path, x.float()) if self.z is None else self.z[path]
        on = self.replacement.on(z)
        self.inputs[path] = x.float()
        self.active[layer, name] = Active(*on.flatten(0, 1).nonzero().unbind(1))
        return on.to(x.dtype)


# ------------------------------------------------------------------------------------------------------- baselines


class Neurons(Replacement):
    """The MLP's own neurons: of each token, the k that contribute most, |h| · ‖W_out‖."""

    module_names = ("neurons",)

    def __init__(self, target: TargetModel, layers: Sequence[int], k: int) -> None:
        if not 1 <= k <= target.d_mlp:
            raise ValueError(f"k={k} neurons: {target.name} has {target.d_mlp} in a layer, choose 1 to that")
        self.method, self.layers, self.k, self.target = "neurons", tuple(layers), k, target
        self.W_out = {layer: target.down_weight(layer).T.float() for layer in self.layers}  # neuron, d_out
        origin = torch.zeros(1, target.d_model, device=target.device, dtype=next(target.model.parameters()).dtype)
        with torch.inference_mode():  # the MLP's output bias, told without knowing its architecture
            self.bias = {
                layer: target.mlp(layer, origin).float() - target.hidden(layer, origin).float() @ self.W_out[layer]
                for layer in self.layers
            }

    def encode(self, layer: int, x: Tensor, y: Tensor) -> Codes:
        h = self.target.hidden(layer, x.to(self.target.down_weight(layer).dtype)).float()
        cols = (h.abs() * self.W_out[layer].norm(dim=1)).topk(self.k, dim=1).indices.sort(dim=1).values
        rows = torch.arange(len(h), device=h.device).repeat_interleave(self.k, output_size=len(h) * self.k)
        return Codes(h.gather(1, cols).flatten(), Layout(rows, cols.flatten(), *h.shape))

    def write(self, pass_: Pass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return decode(pass_.encode(layer, x, y), self.W_out[layer]) + self.bias[layer]

    def modules(self, layers: Sequence[int]) -> list[Module]:
        t = self.target
        return [Module(layer, "neurons", t.d_mlp, 1, 2 * t.d_model) for layer in layers]


class AffineMap(NamedTuple):
    weight: Float[Tensor, "layer d_out d_in"]
    bias: Float[Tensor, "layer d_out"]
    y_mean: Float[Tensor, "layer d_out"]  # of the targets it was fitted to


def fit_affine(
    batches: Iterable[tuple[Float[Tensor, "layer batch d_in"], Float[Tensor, "layer batch d_out"]]],
) -> AffineMap:
    """argmin Σ‖W x + b − y‖² for each layer, from one stream of (inputs, targets) of training tokens.

    Second moments are summed in float64; directions that the inputs never take get no weight (minimum norm).
    """
    n, x_sum, y_sum, xx, xy = 0, 0.0, 0.0, 0.0, 0.0
    for inputs, targets in batches:
        x, y = inputs.double(), targets.double()
        n += x.shape[1]
        x_sum, y_sum = x_sum + x.sum(1), y_sum + y.sum(1)
        xx, xy = xx + x.mT @ x, xy + x.mT @ y
    if n == 0:
        raise ValueError("fit_affine got no activations: give it at least one batch of training tokens")
    x_mean, y_mean = x_sum / n, y_sum / n
    cov_xx = xx / n - x_mean[:, :, None] * x_mean[:, None, :]
    cov_xy = xy / n - x_mean[:, :, None] * y_mean[:, None, :]
    weight = (torch.linalg.pinv(cov_xx.cpu(), rtol=1e-10, hermitian=True).to(xy.device) @ cov_xy).mT
    return AffineMap(weight.float(), (y_mean - (weight @ x_mean[:, :, None])[..., 0]).float(), y_mean.float())


class _Baseline(Replacement):
    """No codes: a function of the running stream alone."""

    has_codes = False
    site = None

    def __init__(self, layers: Sequence[int]) -> None:
        self.method, self.layers = type(self).__name__.lower(), tuple(layers)


class Affine(_Baseline):
    """The least-squares affine map of each MLP: what a skip connection must beat."""

    def __init__(self, layers: Sequence[int], maps: AffineMap, origin: Origin = UNKNOWN) -> None:
        super().__init__(layers)
        assert len(maps.weight) == len(self.layers), f"{len(maps.weight)=} {self.layers=}"
        self.maps, self.origin = maps, origin

    def write(self, pass_: Pass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        i = self.layers.index(layer)
        return torch.addmm(self.maps.bias[i], x, self.maps.weight[i].T)

    def dense_parameters(self, layers: Sequence[int]) -> int:
        return len(layers) * self.maps.weight[0].numel()


class Identity(_Baseline):
    """The MLP itself."""

    reads_y = True

    def write(self, pass_: Pass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return y


class Zero(_Baseline):
    """Nothing is written."""

    def write(self, pass_: Pass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Mean(_Baseline):
    """Every token gets the MLP's mean output over training tokens."""

    def __init__(self, layers: Sequence[int], means: Float[Tensor, "layer d_out"]) -> None:
        super().__init__(layers)
        assert len(means) == len(self.layers), f"{len(means)=} {self.layers=}"
        self.means = means

    def write(self, pass_: Pass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return self.means[self.layers.index(layer)].expand_as(x)
