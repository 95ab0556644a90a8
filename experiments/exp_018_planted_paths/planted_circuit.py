"""A target whose path is known: Boolean gates in a stack of three residual MLPs, built by hand; no attention, no training.

    r₀ = Σ_i bit_i e_i,   r ← r + W_out relu(W_in r + b) per layer;   all e_i and gates are orthonormal directions of the stream

    layer 0   four XORs of eight fair bits, two neurons each (a ∧ ¬b, ¬a ∧ b)
    layer 1   two ANDs of two XORs each
    layer 2   y, the AND of both

So y depends on the input through the gates of layer 0 alone, and through those of layer 1 alone. In every layer stand two
ANDs of two bits of their own (on with probability 1/4) beside the circuit, which nothing reads. Every neuron is 1 where it is on,
and where it is off its pre-activation is −1 or less. The idea is Lange et al.'s (2026), whose toy has two layers and sixteen
inputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_model import StackedLinear

LAYERS = 3
D_MODEL = 64
BITS = 8  # of the circuit
DISTRACTORS = 2  # in every layer
RARE = 0.25  # probability of a distractor's bit


class Neuron(NamedTuple):
    """relu(Σ weights · directions + bias), written to a direction; `planted`: it belongs to the circuit."""

    reads: tuple[int, ...]
    weights: tuple[float, ...]
    bias: float
    writes: int
    planted: bool


def and_neuron(a: int, b: int, gate: int, planted: bool) -> Neuron:
    return Neuron((a, b), (2.0, 2.0), -3.0, gate, planted)


def xor_neurons(a: int, b: int, gate: int) -> list[Neuron]:
    return [Neuron((a, b), weights, -1.0, gate, True) for weights in ((2.0, -2.0), (-2.0, 2.0))]


INPUTS = BITS + 2 * DISTRACTORS * LAYERS  # directions 0 to INPUTS − 1 are bits
GATES: tuple[tuple[int, ...], ...] = (tuple(range(INPUTS, INPUTS + 4)), (INPUTS + 4, INPUTS + 5), (INPUTS + 6,))
OUTPUT = GATES[2][0]  # the direction of y
DIRECTIONS = INPUTS + 7 + DISTRACTORS * LAYERS


def distractors(layer: int) -> list[Neuron]:
    numbers = [layer * DISTRACTORS + i for i in range(DISTRACTORS)]
    return [and_neuron(BITS + 2 * n, BITS + 2 * n + 1, INPUTS + 7 + n, False) for n in numbers]


CIRCUIT: tuple[list[Neuron], ...] = (
    [neuron for i, gate in enumerate(GATES[0]) for neuron in xor_neurons(2 * i, 2 * i + 1, gate)] + distractors(0),
    [and_neuron(GATES[0][2 * i], GATES[0][2 * i + 1], gate, True) for i, gate in enumerate(GATES[1])] + distractors(1),
    [and_neuron(*GATES[1], OUTPUT, True), *distractors(2)],
)


def directions(seed: int) -> Float[Tensor, "direction d"]:
    """A random orthonormal basis for bits and gates."""
    random = torch.randn(D_MODEL, DIRECTIONS, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(random).Q.T.contiguous()


class PlantedLayer(nn.Module):
    """One MLP of the stack: x W_in + b, rectified, to the gates' directions."""

    def __init__(self, neurons: Sequence[Neuron], basis: Float[Tensor, "stack direction d"]) -> None:
        super().__init__()
        reads, writes = torch.zeros(len(neurons), DIRECTIONS), torch.zeros(DIRECTIONS, len(neurons))
        for i, neuron in enumerate(neurons):
            reads[i, list(neuron.reads)], writes[neuron.writes, i] = torch.tensor(neuron.weights), 1.0
        bias = torch.tensor([neuron.bias for neuron in neurons]).expand(len(basis), -1).clone()
        self.mlp_in, self.mlp_out = StackedLinear(reads @ basis, bias), StackedLinear(basis.mT @ writes, None)

    def forward(self, r: Float[Tensor, "stack batch d"]) -> Float[Tensor, "stack batch d"]:
        return self.mlp_out(torch.relu(self.mlp_in(r)))


class PlantedStack(nn.Module):
    """The target: several seeds side by side, each with directions of its own."""

    basis: Float[Tensor, "stack direction d"]

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("basis", torch.stack([directions(seed) for seed in seeds]))
        self.layers = nn.ModuleList(PlantedLayer(neurons, self.basis) for neurons in CIRCUIT)

    def forward(self, r: Float[Tensor, "stack batch d"]) -> Float[Tensor, "stack batch d"]:
        for layer in self.layers:
            r = r + layer(r)
        return r

    def embed(self, bits: Float[Tensor, "stack batch bit"]) -> Float[Tensor, "stack batch d"]:
        return bits @ self.basis[:, :INPUTS]


class PlantedBatches:
    """Endless streams r₀ of all seeds, each draw its own."""

    def __init__(self, target: PlantedStack, batch: int, seed: int) -> None:
        self.target, self.shape = target, (len(target.basis), batch, INPUTS)
        self.generator = torch.Generator().manual_seed(seed)
        self.probability = torch.full((INPUTS,), RARE)
        self.probability[:BITS] = 0.5

    def __next__(self) -> Float[Tensor, "stack batch d"]:
        drawn = torch.rand(self.shape, generator=self.generator) < self.probability
        return self.target.embed(drawn.float())


class Activity(NamedTuple):
    """What the target does at each layer."""

    inputs: Float[Tensor, "layer batch d"]
    outputs: Float[Tensor, "layer batch d"]


@torch.no_grad()
def activity(target: PlantedStack, r: Float[Tensor, "1 batch d"]) -> Activity:
    """Of a stack of one seed."""
    inputs, outputs = [], []
    for layer in target.layers:
        inputs.append(r)
        outputs.append(layer(r))
        r = r + outputs[-1]
    return Activity(torch.cat(inputs), torch.cat(outputs))


def planted_columns(layer: int) -> Int[Tensor, "neuron"]:
    """Which neurons of a layer belong to the circuit."""
    return torch.tensor([i for i, neuron in enumerate(CIRCUIT[layer]) if neuron.planted])
