"""How well a decomposition of a toy finds the mechanisms that the toy is known to have.

MMCS = mean_j max_c cos(U_c V_cj, W_j),  ML2R = mean_j ‖U_c V_cj‖ / ‖W_j‖ at that c, W_j the weights read by feature j.

c goes over the components whose importance for feature j alone is above IMPORTANT: one that is never used may point anywhere.
A feature that has none counts 0 in both. In few dimensions some random direction is always near: the null is what components of
the same shapes get at their initialisation, all of them counted.
"""

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from spd_model import ComponentModel, weight_map
from toy_models import Toy

IMPORTANT = 0.1


def _reads(toy: Toy, model: ComponentModel) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(W, V, U) of each module that reads features, W and V's input axis taken to the feature basis."""
    target, parts = model.target_model, model.components
    paths = ["linear1"] if toy.kind == "tms" else [f"layers.{i}.mlp_in" for i in range(toy.layers)]
    out = {}
    for path in paths:
        W, V, U = weight_map(target.get_submodule(path)), parts[path].V.detach(), parts[path].U.detach()
        out[path] = (W, V, U) if toy.kind == "tms" else (target.W_E @ W, target.W_E @ V, U)
    return out


def recovery(
    toy: Toy, model: ComponentModel, importances: dict[str, Float[Tensor, "stack feature component"]] | None
) -> tuple[Float[Tensor, "stack"], Float[Tensor, "stack"]]:
    """(MMCS, ML2R) of each seed, W_j what feature j feeds to one layer; means over layers. None: all components count."""
    cosines, ratios = [], []
    for path, (W, V, U) in _reads(toy, model).items():
        dot = V * (W @ U.mT)  # ⟨U_c V_cj, W_j⟩: stack, feature, component
        norm, length = V.abs() * U.norm(dim=-1)[:, None], W.norm(dim=-1, keepdim=True)
        counts = torch.ones_like(dot, dtype=torch.bool) if importances is None else importances[path] > IMPORTANT
        cosine = (dot / (norm * length).clamp_min(1e-12)).masked_fill(~counts, -torch.inf)
        best, index = cosine.max(-1, keepdim=True)
        found = best.isfinite()
        cosines.append(best.masked_fill(~found, 0).mean((-1, -2)))
        ratios.append(((norm / length).gather(-1, index) * found).mean((-1, -2)))
    return torch.stack(cosines).mean(0), torch.stack(ratios).mean(0)


def importance_matrix(toy: Toy, model: ComponentModel) -> dict[str, Float[Tensor, "stack feature component"]]:
    """g_lo of every module for each feature alone, at 0.75."""
    x = 0.75 * torch.eye(toy.features).expand(model.stack, -1, -1)
    with torch.no_grad():
        z = model.importance_logits(model.inputs_capture(x)[0])
    return {path: model.lower(logit) for path, logit in z.items()}


def permute_to_identity(g: Float[Tensor, "feature component"]) -> Float[Tensor, "feature component"]:
    """Columns reordered so that the diagonal is as large as it can be (Hungarian); unmatched columns last, by mass."""
    _, match = linear_sum_assignment(g.numpy(), maximize=True)
    rest = [c for c in g.sum(0).argsort(descending=True).tolist() if c not in set(match)]
    return g[:, list(match) + rest]


def identity_error(g: Float[Tensor, "feature component"], tolerance: float) -> int:
    """Entries off the diagonal above the tolerance, plus entries on it below 1 − tolerance, after permuting."""
    g = permute_to_identity(g)
    diagonal = g.diagonal()
    off = (g > tolerance).sum() - (diagonal > tolerance).sum()
    return int(off + (diagonal < 1 - tolerance).sum())


def dense_error(g: Float[Tensor, "feature component"], k: int, tolerance: float) -> int:
    """The k columns of most mass need an entry ≥ 1 − tolerance; any entry above the tolerance elsewhere is an error."""
    g = g[:, g.sum(0).argsort(descending=True)]
    return int((g[:, :k].amax(0) < 1 - tolerance).sum() + (g[:, k:] > tolerance).sum())


def importance_errors(toy: Toy, g: dict[str, Float[Tensor, "stack feature component"]], tolerance: float) -> list[int]:
    """Per seed, summed over modules: features read and written one by one; identities and ResidMLP outputs dense.

    In a ResidMLP of several layers each input matrix has an identity of its own (features are spread over all layers)
    and each output matrix is dense of its layer's width.
    """
    stack = next(iter(g.values())).shape[0]
    if toy.kind == "tms":
        ones, dense = ["linear1", "linear2"], [path for path in g if path.startswith("hidden")]
    else:
        ones, dense = ([path for path in g if path.endswith(end)] for end in ("mlp_in", "mlp_out"))
    return [
        sum(identity_error(g[p][s], tolerance) for p in ones)
        + sum(dense_error(g[p][s], toy.width, tolerance) for p in dense)
        for s in range(stack)
    ]
