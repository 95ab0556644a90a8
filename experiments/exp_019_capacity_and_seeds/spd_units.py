"""How many components of a decomposition live, by firing at several gate thresholds and by mean importance."""

import torch
from unit_counts import over
from unit_tables import RHO, Alive

from evaluation import clean_pass, held_out
from spd_replacement import SPDReplacement

TAU = (0.0, 0.1, 0.5)  # a component fires where its importance g exceeds it


@torch.inference_mode()
def spd_alive(method: str, capacity: float, spd: SPDReplacement, tokens: int) -> list[Alive]:
    """Of every matrix, on held-out tokens."""
    sizes = spd.model.sizes
    fired = {path: torch.zeros(len(TAU), n, dtype=torch.float64) for path, n in sizes.items()}
    total = {path: torch.zeros(n, dtype=torch.float64) for path, n in sizes.items()}
    text = held_out(spd.target, tokens).tokens
    for part in text.split(8):
        clean = clean_pass(spd.target, part.to(spd.target.device), spd.reads, spd.watches)
        for path, z in spd.clean_importances(clean.activations).z.items():
            g = spd.model.lower(z[:, 1:]).flatten(0, 1)
            total[path] += g.sum(0, dtype=torch.float64).cpu()
            fired[path] += torch.stack([(g > tau).sum(0) for tau in TAU]).cpu()
    n = text.numel() - len(text)
    found = []
    for path, units in sizes.items():
        rules = {f"g > {tau:g}": rates / n for tau, rates in zip(TAU, fired[path])} | {"mean g": total[path] / n}
        for rule, rates in rules.items():
            found += [Alive(method, capacity, path, units, rule, rho, over(rates, rho), None, n) for rho in RHO]
    return found
