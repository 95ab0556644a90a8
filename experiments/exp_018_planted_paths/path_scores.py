"""How much of a replacement's effect on the output travels the path that was planted: by swapping what lies on it.

The stream after layer l is given the gates z_l of a chosen input along their directions, all else as the replacement has it:

    Y_l(x, z) = ⟨r₃, u_y⟩ of the replacement run free on input x, with ⟨r, u_g⟩ = z_g after layer l

In the target Y_l(x, z) depends on z alone. Over pairs of inputs (x, z), (x′, z′):

    mediation R_l = 1 − E(Δ − Δ*)² / E Δ*²,   Δ = Y_l(x, z′) − Y_l(x, z), Δ* the target's
    bypass    B_l = E|Y_l(x′, z) − Y_l(x, z)| / E|Y*(x′) − Y*(x)|
    one-hop share H = E Σ_{l<2} |w_l| / E Σ_l |w_l|,   w_l: what layer l's parts write along u_y, over all their targets

A faithful replacement has R 1, B 0, H 0; one that looks the answer up at layer 0 has R 0, B 1, H 1. Behaviour first: the FVU
of y, and its balanced accuracy at 1/2. Recall: the share of the circuit's neurons that some part fires with (F1 ≥ 0.9, each
part matched once); deep recall: of the three neurons behind layer 0.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from path_methods import Method, Reading
from planted_circuit import GATES, LAYERS, OUTPUT, PlantedStack, activity, planted_columns
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MATCHED = 0.9  # F1 from which a part and a planted neuron fire alike


class Run(NamedTuple):
    y: Float[Tensor, "batch"]
    readings: list[Reading]


def run(
    method: Method, target: PlantedStack, r: Float[Tensor, "batch d"], after: int | None = None, z: Tensor | None = None
) -> Run:
    """The replacement run free; with `after`, the gates of that layer are set to z (batch, gate) in the stream after it."""
    read, readings = method.begin(), []
    for layer in range(LAYERS):
        readings.append(read(layer, r))
        r = r + readings[-1].y_hat
        if layer == after:
            u = target.basis[0, list(GATES[layer])]
            r = r + (z - r @ u.T) @ u
    return Run(r @ target.basis[0, OUTPUT], readings)


class PathScores(NamedTuple):
    """One replacement of one seed's target; R and B by the layer after which gates are swapped."""

    fvu: float  # of y
    accuracy: float  # balanced
    local_fvu: float  # of what the MLPs wrote, mean over layers, run free
    l0: float  # active parts per layer and token (SPD: of both matrices together)
    one_hop: float
    mediation: float  # mean of the two below
    bypass: float
    mediation_0: float
    mediation_1: float
    bypass_0: float
    bypass_1: float
    recall: float
    deep_recall: float


@torch.no_grad()
def scores(method: Method, target: PlantedStack, r: Float[Tensor, "1 batch d"]) -> PathScores:
    """Each input is paired with its neighbour in the batch, whose inputs are drawn one by one."""
    assert len(r) == 1, f"one seed at a time, not {len(r)}"
    true, x = activity(target, r), r[0]
    other = x.roll(1, 0)
    streams = true.inputs + true.outputs
    mediation, bypass = [], []
    y = streams[-1] @ target.basis[0, OUTPUT]
    for layer in range(LAYERS - 1):
        z = streams[layer] @ target.basis[0, list(GATES[layer])].T
        own, swapped, restored = (
            run(method, target, given, layer, gates).y
            for given, gates in ((x, z), (x, z.roll(1, 0)), (other, z))
        )  # fmt: skip
        effect = y.roll(1, 0) - y  # the target's, which passes through z alone
        mediation.append(1 - ((swapped - own - effect).square().mean() / effect.square().mean()).item())
        bypass.append(((restored - own).abs().mean() / effect.abs().mean()).item())
    free = run(method, target, x)
    written = torch.stack([reading.y_hat for reading in free.readings])
    error = (written - true.outputs).square().sum((1, 2))
    spread = (true.outputs - true.outputs.mean(1, keepdim=True)).square().sum((1, 2))
    direct = [reading.direct.abs().mean().item() for reading in free.readings]
    found = [matched(reading.fires, _neurons(target, true.inputs[i], i)) for i, reading in enumerate(free.readings)]
    return PathScores(
        fvu=((free.y - y).square().mean() / (y - y.mean()).square().mean()).item(),
        accuracy=balanced_accuracy(free.y > 0.5, y > 0.5),
        local_fvu=(error / spread).mean().item(),
        l0=sum(reading.l0 for reading in free.readings) / LAYERS,
        one_hop=sum(direct[:-1]) / max(sum(direct), 1e-12),
        mediation=sum(mediation) / len(mediation),
        bypass=sum(bypass) / len(bypass),
        mediation_0=mediation[0],
        mediation_1=mediation[1],
        bypass_0=bypass[0],
        bypass_1=bypass[1],
        recall=sum(found) / sum(len(planted_columns(layer)) for layer in range(LAYERS)),
        deep_recall=sum(found[1:]) / sum(len(planted_columns(layer)) for layer in range(1, LAYERS)),
    )


def balanced_accuracy(said: Bool[Tensor, "batch"], true: Bool[Tensor, "batch"]) -> float:
    """Mean of the shares of right answers where the truth is yes and where it is no."""
    return sum((said[true == side] == side).double().mean().item() for side in (True, False)) / 2


def _neurons(target: PlantedStack, r: Float[Tensor, "batch d"], layer: int) -> Bool[Tensor, "batch neuron"]:
    """On which inputs each of the circuit's neurons of a layer fires."""
    return (target.layers[layer].mlp_in(r[None])[0] > 0.5)[:, planted_columns(layer)]


def matched(fires: Bool[Tensor, "batch part"], neurons: Bool[Tensor, "batch neuron"]) -> int:
    """How many of the neurons have a part of their own that fires with them, F1 = 2 |both| / (|part| + |neuron|) ≥ 0.9."""
    a, b = fires.double(), neurons.double()
    f1 = 2 * (a.T @ b) / (a.sum(0)[:, None] + b.sum(0)).clamp_min(1)
    alike = f1 >= MATCHED
    return int(alike[linear_sum_assignment(alike.numpy(), maximize=True)].sum())
