"""Units of dictionaries: how often they fire, how near their decoders lie to each other, and which are another's children."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm
from unit_tables import MATCHED, RHO, Alive, Children, Neighbours

from activation_store import ActivationsStore, DataConfig
from checkpoints import Checkpoint
from coder import Coder
from sparse_ops import Codes, fire_counts
from target_models import TargetModel

SIMILAR = 0.5  # least cosine, Jaccard index or contained share of a child
BATCH = 8192


class Counted(NamedTuple):
    """A dictionary of one layer, its live units alone."""

    decoder: Float[Tensor, "unit d"]  # of unit norm
    fires: csr_matrix  # token × unit, 0 or 1


def of_layer(own: Sequence[Checkpoint], layer: int) -> tuple[Coder, int]:
    """The coder that encodes at a layer, in eval mode, and which of its layers that is."""
    (coder,) = [c.coder for c in own if layer in c.coder.config.layers]
    return coder.eval(), coder.config.layers.index(layer)


def stream(target: TargetModel, layer: int) -> ActivationsStore:
    """Training tokens in another order than that of any training: equal for all."""
    return ActivationsStore(target, DataConfig(layers=(layer,), batch_tokens=BATCH, seed=1000))


@torch.inference_mode()
def codes_of(coder: Coder, i: int, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"]) -> Codes:
    read = y if coder.config.kind == "sae" else x
    return coder.encoders[i].encode(coder.encoder_inputs(i, read))


def counted(own: Sequence[Checkpoint], target: TargetModel, layer: int, tokens: int) -> Counted:
    """Which of a dictionary's units fire at all on so many tokens, and where."""
    coder, i = of_layer(own, layer)
    rows, cols, n = [], [], 0
    for batch in itertools.islice(stream(target, layer), -(-tokens // BATCH)):
        codes = codes_of(coder, i, batch.inputs[0], batch.targets[0])
        on = codes.values > 0
        rows.append((codes.rows[on] + n).cpu().numpy())
        cols.append(codes.cols[on].cpu().numpy())
        n += codes.n_rows
    rows, cols = np.concatenate(rows), np.concatenate(cols)
    live, cols = np.unique(cols, return_inverse=True)
    fires = csr_matrix((np.ones(len(cols), dtype=np.float32), (rows, cols)), shape=(n, len(live)))
    return Counted(normalize(coder.decoders[i].detach()[torch.from_numpy(live)].cpu(), dim=1), fires)


def alive_rows(
    method: str, by_capacity: Mapping[float, Sequence[Checkpoint]], target: TargetModel, layer: int, tokens: int
) -> list[Alive]:
    """Units by how often they fire, of every capacity on one stream."""
    coders = {capacity: of_layer(own, layer) for capacity, own in by_capacity.items()}
    counts = {c: torch.zeros(coder.config.d_dict, dtype=torch.int64) for c, (coder, _) in coders.items()}
    mass = {c: torch.zeros(len(count), dtype=torch.float64) for c, count in counts.items()}
    n = 0
    batches = itertools.islice(stream(target, layer), -(-tokens // BATCH))
    for batch in tqdm(batches, desc=f"{method} firing", total=-(-tokens // BATCH), unit="batch", mininterval=1.0):
        n += BATCH
        for capacity, (coder, i) in coders.items():
            codes = codes_of(coder, i, batch.inputs[0], batch.targets[0])
            counts[capacity] += fire_counts(codes).cpu()
            mass[capacity].index_add_(0, codes.cols.cpu(), codes.values.double().cpu())
    found = []
    for capacity, (coder, i) in coders.items():
        written = mass[capacity] * coder.decoders[i].detach().norm(dim=1).double().cpu()
        found += [
            Alive(method, capacity, f"layer {layer}", coder.config.d_dict, "fires", rho, over(counts[capacity] / n, rho),
                  effective(written), n)
            for rho in RHO
        ]  # fmt: skip
    return found


def over(values: Tensor, rho: float) -> int:
    """How many exceed it."""
    return int((values.double() > rho).sum())


def effective(mass: Float[Tensor, "unit"]) -> float:
    """exp(entropy of the shares): n where n units share the mass evenly."""
    share = mass / mass.sum()
    return torch.exp(-torch.xlogy(share, share).sum()).item()


def nearest(decoder: Float[Tensor, "unit d"]) -> Float[Tensor, "unit"]:
    """Each unit's largest cosine with another one."""
    return (decoder @ decoder.T).fill_diagonal_(-1).amax(1)


def assigned(a: Float[Tensor, "unit d"], b: Float[Tensor, "other d"]) -> Float[Tensor, "pair"]:
    """Cosines of the one-to-one pairs whose sum is largest; of the smaller dictionary every unit has one."""
    cosines = (a @ b.T).numpy()
    return torch.from_numpy(cosines[linear_sum_assignment(cosines, maximize=True)])


def neighbour_rows(method: str, layer: int, by_capacity: Mapping[float, Sequence[Counted]]) -> list[Neighbours]:
    """Within each dictionary, and of the first seed with each other one."""
    found = []
    for capacity, seeds in by_capacity.items():
        named = [(seed, "within", nearest(own.decoder)) for seed, own in enumerate(seeds)]
        named += [(0, str(seed), assigned(seeds[0].decoder, own.decoder)) for seed, own in enumerate(seeds) if seed]
        for seed, other, cosines in named:
            share = (cosines > MATCHED).double().mean().item()
            units = len(seeds[seed].decoder)
            found.append(Neighbours(method, capacity, layer, seed, other, units, cosines.mean().item(), share))
    return found


def children(parents: Counted, others: Counted) -> dict[str, Bool[Tensor, "parent other"]]:
    """Which units of another dictionary are each parent's children, by either rule."""
    both = torch.from_numpy((parents.fires.T @ others.fires).toarray())
    a, b = (torch.from_numpy(np.asarray(own.fires.sum(0)))[0] for own in (parents, others))
    near = parents.decoder @ others.decoder.T > SIMILAR
    jaccard = both / (a[:, None] + b - both)
    return {"jaccard": near & (jaccard > SIMILAR), "contained": near & (both / b > SIMILAR)}


def children_rows(method: str, layer: int, by_capacity: Mapping[float, Sequence[Counted]]) -> list[Children]:
    """Of the first seed at 1×, in every larger dictionary of that seed and of the next, and in the next seed's at 1×."""
    parents, found = by_capacity[1][0], []
    for capacity, seeds in by_capacity.items():
        for against, own in (("larger", seeds[0]), ("null", seeds[1] if len(seeds) > 1 else None)):
            if own is None or capacity < 1 or (capacity == 1 and against == "larger"):
                continue
            for rule, pairs in children(parents, own).items():
                n: Int[Tensor, "parent"] = pairs.sum(1)
                shares = [(n >= least).double().mean().item() for least in (1, 2)]
                mean = n.double().mean().item()
                found.append(Children(method, layer, capacity, against, rule, len(n), mean, *shares))
    return found
