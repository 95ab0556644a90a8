"""Experiment 013, in miniature: its own gate and both transformer gates, and a leak that is planted and found."""

import math
import runpy
import sys
from pathlib import Path

import pytest
from small import make_small_target, write_corpus

import checkpoints
import target_models
from logs import read_csv
from recipes import SPDRecipe, train_decomposition

SCRIPT = Path(__file__).parents[1] / "experiments" / "exp_013_spd_mask_leak" / "spd_mask_leak.py"
SMALL = "--eval-tokens 640 --classes 16 --probe-steps 100 --probe-seeds 2 --gate-steps 1".split()


def test_it_runs_from_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "checkpoints")
    (tmp_path / "corpus").mkdir()
    target, output = make_small_target(write_corpus(tmp_path / "corpus", documents=1200)), tmp_path / "output"
    recipe = SPDRecipe(components=8, gate_hidden=4, steps=1, batch=2)
    train_decomposition(target, recipe, layers=(0, 1), folder=tmp_path / "checkpoints" / target.name)
    monkeypatch.setattr(target_models, "load_target", lambda name, device: target)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = {row["gate"]: row for row in read_csv(output / "points.csv")}
    honest = ["shared_mlp (its own)", "causal transformer", "bidirectional transformer"]
    assert list(rows) == [*honest, "shared_mlp (its own) and a planted leak"]
    assert [row["gate_steps"] for row in rows.values()] == ["", "1", "1", ""]
    assert len({(row["current_token_ce"], row["model_ce"]) for row in rows.values()}) == 1
    planted, possible = rows.pop(list(rows)[-1]), math.log(2)  # of random words nobody knows the parity
    assert float(planted["possible"]) == pytest.approx(possible, abs=0.05)
    assert 0.7 * possible < float(planted["told_least"]) <= float(planted["told"]) < 1.1 * possible
    assert all(abs(float(row["told"])) < 0.1 for row in rows.values())

    monkeypatch.setattr(target_models, "load_target", None)
    (output / "mask_leak.png").unlink()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--replot", "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert {file.name for file in output.iterdir()} == {"points.csv", "settings.json", "mask_leak.png", "README.md"}
