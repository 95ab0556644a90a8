"""Figures of exp_012: importance matrices permuted to identity, and TMS 5-2's weight directions as arrows."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from recovered import permute_to_identity
from torch import Tensor

from pareto_figure import save_figure
from spd_model import ComponentModel, weight_map


def draw_importance(importances: dict[str, Float[Tensor, "stack feature component"]], path: Path, title: str) -> None:
    """One row per seed, one column per module; white 0, black 1. Columns beyond twice the features are left out."""
    seeds = next(iter(importances.values())).shape[0]
    figure, axes = plt.subplots(seeds, len(importances), figsize=(2.6 * len(importances), 2.2 * seeds), squeeze=False)
    for column, (name, g) in enumerate(importances.items()):
        for seed in range(seeds):
            shown = permute_to_identity(g[seed])[:, : 2 * g.shape[1]]
            axes[seed][column].imshow(shown, cmap="gray_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes[seed][column].set_title(f"{name}, seed {seed}", fontsize=8)
            axes[seed][column].tick_params(labelsize=6)
    figure.supxlabel("component, matched to features", fontsize=8)
    figure.supylabel("feature", fontsize=8)
    figure.suptitle(f"Causal importance of components, {title}", fontsize=9)
    _save(figure, path)


def draw_directions(model: ComponentModel, path: Path) -> None:
    """For each feature: its weight column (thick, grey) and the components with any importance to it (thin)."""
    W = weight_map(model.target_model.get_submodule("linear1"))
    part = model.components["linear1"]
    seeds = W.shape[0]
    figure, axes = plt.subplots(1, seeds, figsize=(3 * seeds, 3.2), squeeze=False)
    for seed in range(seeds):
        axis = axes[0][seed]
        products = part.V.detach()[seed][:, :, None] * part.U.detach()[seed][None]  # feature, component, hidden
        for j in range(W.shape[1]):
            axis.plot(*torch.stack([torch.zeros(2), W[seed, j]]).T, color="0.75", linewidth=6, solid_capstyle="round")
            for arrow in products[j][products[j].norm(dim=-1) > 0.05]:
                axis.annotate("", arrow.tolist(), (0, 0), arrowprops={"arrowstyle": "->", "color": f"C{j}"})
        axis.set(title=f"seed {seed}", aspect="equal", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))
    figure.suptitle("TMS 5-2: weights of each feature (grey) and its components", fontsize=9)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    save_figure(figure, path, dpi=130)
