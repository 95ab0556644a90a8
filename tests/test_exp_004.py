"""Experiment 004's importances: counted as the ruler counts, written so that figures and words come from the table alone.

Its script, exp_004_train_spd_gpt2, runs in test_experiments.py.
"""

import re
from pathlib import Path

import pytest
import torch
from importance_figures import (
    BINS,
    Importances,
    draw_importances,
    measure_importances,
    read_importances,
    write_importances,
)
from small import LOCAL, clean, decomposition, each_by_itself, make_tiny, some_tokens

from config import GateConfig
from evaluation import evaluate
from spd_replacement import SPDReplacement

GLOBAL = GateConfig(kind="global_shared_mlp", hidden=(16,))


@pytest.mark.parametrize("gate", [LOCAL, GLOBAL])
def test_counts_are_of_every_token_and_component_and_those_above_0_are_the_rulers_l0(gate: GateConfig) -> None:
    target, tokens = make_tiny(2), some_tokens(10)
    model = decomposition(target, gate)
    spd = SPDReplacement(target, model)
    found = {f.matrix: f for f in measure_importances(spd, tokens)}
    assert found.keys() == model.sizes.keys()
    n = tokens.numel() - len(tokens)  # first positions are left to the model
    assert {path: sum(f.counts) for path, f in found.items()} == {path: n * c for path, c in model.sizes.items()}
    for row in evaluate(target, [spd], each_by_itself(tokens), ["frozen"]).layers:
        assert sum(found[f"h.{row.layer}.mlp.{row.module}"].counts[1:]) == round(row.l0 * n) > 0


def test_means_and_bins_are_those_of_the_gates() -> None:
    target, tokens = make_tiny(2), some_tokens(10)
    spd = SPDReplacement(target, decomposition(target))
    z = spd.clean_importances(clean(target, tokens, [0, 1])).z
    for f in measure_importances(spd, tokens):
        g = z[f.matrix][:, 1:].clamp(0, 1).flatten(0, 1)
        assert f.means == pytest.approx(g.mean(0).sort(descending=True).values.tolist(), rel=1e-5)
        assert f.counts[0] == (g == 0).sum() and f.counts[-1] == (g > 1 - 1 / BINS).sum()
        assert f.counts[1] == ((g > 0) & (g <= torch.tensor(1 / BINS))).sum()


def test_table_figures_and_words_are_of_one_measurement(tmp_path: Path) -> None:
    counts = [900, *[1] * (BINS - 1), 81]
    found = [
        Importances("h.0.mlp.c_fc", [0.5, 2e-6, 1e-7, 0.0], counts),
        Importances("h.0.mlp.down_proj", [1.0], counts),
    ]
    write_importances(tmp_path, found)
    assert read_importances(tmp_path) == found
    means, first, histograms, second = draw_importances(tmp_path)
    assert "h.0.mlp.c_fc 2 of 4; h.0.mlp.down_proj 1 of 1." in means
    assert "h.0.mlp.c_fc 90.0% and 8.10%;" in histograms
    drawn = {re.fullmatch(r"!\[.*\]\((.*)\)", image)[1] for image in (first, second)}
    assert {file.name for file in tmp_path.iterdir()} == drawn | {"importances.csv"}
