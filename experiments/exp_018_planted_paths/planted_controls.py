"""Dictionaries of the planted circuit that are written down, not trained: one that follows its path, and one that looks it up.

    exact    transcoders whose latents are the circuit's neurons                      R 1, B 0, H 0
    lookup   a CLT all of whose latents stand in layer 0 and write to every later MLP R 0, B 1, H 1

The lookup's latents: layer 0's own neurons, the four inputs of each half on which its AND of two XORs is on, for layer 1, the
sixteen on which y is, for layer 2, and the distractors of later layers. relu(2 Σ literals − 2 n + 1) is 1 where
all n literals hold, and its argument −1 or less where one does not.
"""

import itertools

import torch
from planted_circuit import BITS, CIRCUIT, D_MODEL, DIRECTIONS, GATES, LAYERS, OUTPUT, Neuron, PlantedStack

from clt import CrossLayerTranscoder
from config import CLTConfig, EncoderConfig, Relu
from transcoder import BaseTranscoder, build_transcoder


@torch.no_grad()
def exact_transcoders(target: PlantedStack) -> list[BaseTranscoder]:
    """Of a stack of one seed."""
    coders = []
    for layer, module in enumerate(target.layers):
        W_in, W_out = module.mlp_in.weight[0], module.mlp_out.weight[0]
        config = EncoderConfig(layer=layer, d_in=D_MODEL, d_out=D_MODEL, d_dict=len(W_in), rule=Relu(0.0))
        coder = build_transcoder(config, torch.Generator())
        coder.encoder.W_enc.copy_(W_in)
        coder.encoder.b_enc.copy_(module.mlp_in.bias[0])
        coder.W_dec.copy_(W_out.T)
        coders.append(coder)
    return coders


def minterm(first: int, literals: tuple[int, ...], gate: int) -> Neuron:
    """On where bit `first` + i is literals[i] for all i."""
    weights = tuple(4.0 * literal - 2 for literal in literals)
    return Neuron(tuple(range(first, first + len(literals))), weights, 1.0 - 2 * sum(literals), gate, True)


def looked_up() -> list[tuple[Neuron, int]]:
    """The lookup's latents, each with the layer that it writes to."""
    differ = ((0, 1), (1, 0))  # a XOR b
    halves = [sum(pairs, ()) for pairs in itertools.product(differ, repeat=2)]
    own = [(neuron, 0) for neuron in CIRCUIT[0]]
    later = [(neuron, layer) for layer in range(1, LAYERS) for neuron in CIRCUIT[layer] if not neuron.planted]
    ands = [(minterm(i * BITS // 2, half, gate), 1) for i, gate in enumerate(GATES[1]) for half in halves]
    y = [(minterm(0, first + second, OUTPUT), 2) for first, second in itertools.product(halves, repeat=2)]
    return own + later + ands + y


@torch.no_grad()
def lookup_clt(target: PlantedStack) -> CrossLayerTranscoder:
    """Of a stack of one seed; the latents of layers 1 and 2 never fire."""
    basis, latents = target.basis[0], looked_up()
    config = CLTConfig(
        layers=tuple(range(LAYERS)), d_in=D_MODEL, d_out=D_MODEL, d_dict=len(latents), rule=Relu(0.0)
    )  # fmt: skip
    clt = CrossLayerTranscoder(config, torch.Generator())
    for encoder in clt.encoders:
        encoder.W_enc.zero_()
        encoder.b_enc.fill_(-1.0)
    for i, (neuron, layer) in enumerate(latents):
        read = torch.zeros(DIRECTIONS)
        read[list(neuron.reads)] = torch.tensor(neuron.weights)
        clt.encoders[0].W_enc[i] = read @ basis
        clt.encoders[0].b_enc[i] = neuron.bias
        clt.W_dec[0].view(len(latents), LAYERS, D_MODEL)[i, layer] = basis[neuron.writes]
    return clt
