"""Baselines that need no dictionary: an MLP's own neurons, its best affine map, and mean, zero or no ablation.

    neurons    ŷ = Σ_{k largest |h_j| ‖W_out j‖} h_j W_out j + b;   neurons-joint: k on average, by one threshold (allocation.py)
    affine     ŷ = W x + b,   argmin Σ‖W x + b − y‖² over training tokens
    mean       ŷ = E y over training tokens;   zero   ŷ = 0;   identity   ŷ = y

x is the MLP's input, y its output and h its hidden activation, of one token.
"""

import copy
import functools
import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from einops import einsum
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor

from activation_store import ActivationsStore, DataConfig
from allocation import jointly
from devices import bf16_is_fast
from logs import atomic_path, cache_folder, code_fingerprint, read_tensors
from patching import Captured
from replacement import (
    UNKNOWN,
    Coded,
    CodedPass,
    Key,
    Origin,
    PartGroup,
    Pass,
    Replacement,
    Sources,
    by_token,
    jointly_named,
)
from sparse_ops import Codes, decode, from_dense
from target_models import TargetModel, mlp_matrices, writer_parameters
from token_stream import text_fingerprint

BASELINE_TOKENS = 131_072  # training tokens that fit the affine maps and the means


class NeuronsReplacement(Coded):
    """The MLP's own neurons: of each token, the k that contribute most, |h| · ‖W_out‖, or all whose |h| exceeds their `least`."""

    part_name = "neurons"

    def __init__(self, target: TargetModel, layers: Sequence[int], k: int) -> None:
        if not 1 <= k <= target.d_mlp:
            raise ValueError(f"k={k} neurons: {target.name} has {target.d_mlp} in a layer, choose 1 to that")
        self.method, self.layers, self.k, self.target = "neurons", tuple(layers), k, target
        self.least: Mapping[int, Float[Tensor, "neuron"]] | None = None
        self.W_out = {layer: target.down_weight(layer).T.float() for layer in self.layers}  # neuron, d_out
        origin = torch.zeros(1, target.d_model, device=target.device, dtype=next(target.model.parameters()).dtype)
        with torch.inference_mode():  # the MLP's output bias, told without knowing its architecture
            self.bias = {
                layer: target.mlp(layer, origin).float() - target.hidden(layer, origin).float() @ self.W_out[layer]
                for layer in self.layers
            }

    def encode(self, layer: int, x: Tensor, y: Tensor) -> Codes:
        h = self._hidden(layer, x)
        active = self._largest(layer, h) if self.least is None else h.abs() > self.least[layer]
        return from_dense(torch.where(active, h, 0.0), active)

    def _hidden(self, layer: int, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token neuron"]:
        return self.target.hidden(layer, x.to(self.target.down_weight(layer).dtype)).float()

    def _largest(self, layer: int, h: Float[Tensor, "token neuron"]) -> Bool[Tensor, "token neuron"]:
        """The k of each token that contribute most."""
        largest = (h.abs() * self.W_out[layer].norm(dim=1)).topk(self.k, dim=1).indices
        return torch.zeros_like(h, dtype=torch.bool).scatter(1, largest, True)

    def values_at(self, layer: int, x: Tensor, y: Tensor, active: Codes) -> Codes:
        h = self._hidden(layer, x)[active.rows, active.cols]
        return active._replace(values=torch.where(active.values != 0, h, 0.0))

    def with_least(self, least: Mapping[int, Float[Tensor, "neuron"]]) -> Self:
        view = copy.copy(self)
        view.method, view.least = jointly_named(self.method), least
        return view

    def sizes(self, layer: int, weights: Mapping[int, float]) -> Float[Tensor, "neuron"]:
        return weights[layer] ** 0.5 * self.W_out[layer].norm(dim=1)

    def write(self, pass_: CodedPass, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return decode(pass_.encode(layer, x, y), self.W_out[layer]) + self.bias[layer]

    def part_groups(self, layers: Sequence[int]) -> list[PartGroup]:
        """A neuron's parameters are its row or column of every matrix of its MLP: two, or three of a gated one."""
        n = self.target.d_mlp
        return [PartGroup(i, "neurons", n, 1, writer_parameters(self.target, i) // n) for i in layers]

    def gate_parameters(self, layers: Sequence[int]) -> int:
        """All that computes h, by which neurons are chosen: W_in, of a gated MLP W_gate too, and their biases."""
        inner = [path for layer in layers for path in mlp_matrices(self.target, layer)[:-1]]
        return sum(p.numel() for path in inner for p in self.target.model.get_submodule(path).parameters())


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
    cov_xx = xx / n - einsum(x_mean, x_mean, "layer a, layer b -> layer a b")
    cov_xy = xy / n - einsum(x_mean, y_mean, "layer d_in, layer d_out -> layer d_in d_out")
    weight = (torch.linalg.pinv(cov_xx.cpu(), rtol=1e-10, hermitian=True).to(xy.device) @ cov_xy).mT
    mapped = einsum(weight, x_mean, "layer d_out d_in, layer d_in -> layer d_out")
    return AffineMap(weight.float(), (y_mean - mapped).float(), y_mean.float())


class _Baseline(Replacement):
    """What an MLP writes, replaced by a function of what it reads or writes: no parts, nothing to decide."""

    follows_stream = False
    decides = False
    site = None

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)

    @abstractmethod
    def write(
        self, layer: int, x: Float[Tensor, "token d_in"], y: Float[Tensor, "own d_out"]
    ) -> Float[Tensor, "token d_out"]:
        """What stands in place of y, the MLP's output at its input x."""

    def begin(self) -> "_BaselinePass":
        """A pass that reads the running stream."""
        return _BaselinePass(self, None)

    def frozen(self, captured: Captured) -> "_BaselinePass":
        return _BaselinePass(self, captured)

    def gated(self, captured: Captured) -> "_BaselinePass":
        return self.begin()

    def free(self, captured: Captured, run: Callable[[Pass], object]) -> "_BaselinePass":
        return self.begin()

    def attacked(self, captured: Captured, sources: Sources) -> "_AttackedBaseline":
        return _AttackedBaseline(self, sources)

    def surface(self, layers: Sequence[int]) -> dict[Key, int]:
        """No parts, and what the function leaves of each MLP."""
        return {(layer, "mlp"): 0 for layer in layers}


class _BaselinePass(Pass):
    replacement: _Baseline

    def __init__(self, replacement: _Baseline, clean: Captured | None) -> None:
        super().__init__(replacement)
        self.clean = clean

    def __call__(
        self, layer: int, x: Float[Tensor, "batch seq d_in"], y: Float[Tensor, "batch own d_out"]
    ) -> Float[Tensor, "batch seq d_out"]:
        if self.clean is not None:
            x, y = (kept[self.replacement.reads.index(layer)] for kept in self.clean[:2])
        return by_token(functools.partial(self.replacement.write, layer), x, y)


class _AttackedBaseline(Pass):
    """What the baseline leaves of the MLP is let in as an adversary says."""

    replacement: _Baseline
    reads_y = True  # type: ignore[assignment]

    def __init__(self, replacement: _Baseline, sources: Sources) -> None:
        super().__init__(replacement)
        self.sources = sources

    def __call__(
        self, layer: int, x: Float[Tensor, "batch seq d_in"], y: Float[Tensor, "batch seq d_out"]
    ) -> Float[Tensor, "batch seq d_out"]:
        y_hat = by_token(functools.partial(self.replacement.write, layer), x, y)
        return torch.lerp(y_hat, y, self.sources.deltas[layer, "mlp"])


class AffineReplacement(_Baseline):
    """The least-squares affine map of each MLP: what a skip connection must beat."""

    method = "affine"
    follows_stream = True

    def __init__(self, layers: Sequence[int], maps: AffineMap, origin: Origin = UNKNOWN) -> None:
        super().__init__(layers)
        assert len(maps.weight) == len(self.layers), f"{len(maps.weight)=} {self.layers=}"
        self.maps, self.origin = maps, origin

    def write(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        i = self.layers.index(layer)
        return torch.addmm(self.maps.bias[i], x, self.maps.weight[i].T)

    def dense_parameters(self, layers: Sequence[int]) -> int:
        return len(layers) * self.maps.weight[0].numel()


class IdentityReplacement(_Baseline):
    """The MLP itself."""

    method = "identity"
    reads_y = True

    def write(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return y


class ZeroReplacement(_Baseline):
    """Nothing is written."""

    method = "zero"

    def write(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


class MeanReplacement(_Baseline):
    """Every token gets the MLP's mean output over training tokens."""

    method = "mean"

    def __init__(self, layers: Sequence[int], means: Float[Tensor, "layer d_out"]) -> None:
        super().__init__(layers)
        assert len(means) == len(self.layers), f"{len(means)=} {self.layers=}"
        self.means = means

    def write(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        return self.means[self.layers.index(layer)].expand_as(x)


def baselines(target: TargetModel, layers: Sequence[int], neurons: Sequence[int]) -> list[Replacement]:
    """Neurons at each k, an equal one in every layer and by one threshold over all layers; the least-squares affine map; and
    identity, zero and mean ablation, the last three at any site. What is fitted is kept for the next run (`kept`)."""
    made_by = (str(target.device), bf16_is_fast(target.device))
    about = [target.fingerprint, target.site, text_fingerprint(target.data), tuple(layers), made_by]
    maps = kept(["affine", *about], lambda: fit_affine(training_batches(target, layers))._asdict(), target.device)
    ablations = [IdentityReplacement(layers), ZeroReplacement(layers), MeanReplacement(layers, maps["y_mean"])]
    if target.site != "mlp_out":  # x is y there: nothing to map, and no neurons
        return ablations
    equal = [NeuronsReplacement(target, layers, k) for k in neurons]
    least = kept(["neurons", *about, tuple(neurons)], lambda: _thresholds(jointly(target, equal)), target.device)
    joint = [own.with_least({layer: least[f"{own.k} {layer}"] for layer in layers}) for own in equal]
    return [*equal, *joint, AffineReplacement(layers, AffineMap(**maps)), *ablations]


def _thresholds(joint: Sequence[NeuronsReplacement]) -> dict[str, Tensor]:
    """What |h| of each layer's neurons has to exceed, by "k layer"."""
    found = {}
    for own in joint:
        assert own.least is not None, f"{own.method} has no threshold"
        found |= {f"{own.k} {layer}": least for layer, least in own.least.items()}
    return found


def training_batches(target: TargetModel, layers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, outputs) of the MLPs on BASELINE_TOKENS tokens of training text."""
    data = DataConfig(layers=tuple(layers), batch_tokens=8192, buffer_tokens=16_384, model_batch=32)
    batches = itertools.islice(ActivationsStore(target, data), max(1, BASELINE_TOKENS // data.batch_tokens))
    return ((batch.inputs, batch.targets) for batch in batches)


def kept(about: Sequence[Any], fit: Callable[[], dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """What `fit` gives; from a file of the cache folder where the same code was asked about the same before."""
    name = hashlib.sha256(repr([code_fingerprint(), *about]).encode()).hexdigest()[:16]
    file = cache_folder() / "baselines" / f"{name}.safetensors"
    if not file.exists():
        fitted = {name: value.contiguous() for name, value in fit().items()}
        with atomic_path(file) as temporary:
            save_file(fitted, temporary)
    return {name: value.to(device) for name, value in read_tensors(file).items()}
