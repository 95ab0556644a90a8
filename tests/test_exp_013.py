"""Experiment 013, in miniature: its own gate and both transformer gates, and a leak that is planted and found."""

import math
import runpy
import sys
from pathlib import Path

import probes
import pytest
import torch
from small import make_small_target, write_corpus

import checkpoints
import target_models
from logs import read_csv
from recipes import SPDRecipe, train_decomposition

SCRIPT = Path(__file__).parents[1] / "experiments" / "exp_013_spd_mask_leak" / "spd_mask_leak.py"
SMALL = "--eval-tokens 1600 --classes 32 --probe-rounds 60 --gate-steps 1".split()


def test_the_probe_learns_a_table_of_pairs() -> None:
    """What follows each of 40 tokens, some of them rare: the entropy of the next one given this one, and nothing of noise."""
    g, n = torch.Generator().manual_seed(0), 30_000
    table = (2 * torch.randn(40, 16, generator=g)).softmax(1)
    current = (torch.rand(n, generator=g).square() * 40).long()
    y = torch.multinomial(table[current], 1, generator=g)[:, 0]
    part = torch.randint(3, (n,), generator=g)
    positions = probes.Positions(y, part == 0, part == 1, part == 2)
    nothing, noise = torch.zeros(n, 16), torch.rand(n, 300, generator=g) < 0.1
    entropy = -(table * table.log()).sum(1)[current[positions.test]].mean()
    learnt = probes.probe(positions, current[:, None] == torch.arange(40), nothing, rounds=200).mean()
    assert entropy * 0.98 < learnt < entropy * 1.03
    least = probes.probe(positions, probes.no_features(positions), nothing, rounds=0).mean()
    assert abs(probes.probe(positions, noise, nothing, rounds=200).mean() - least) < 0.01 < least - learnt


@pytest.mark.slow
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
    planted = rows.pop("shared_mlp (its own) and a planted leak")  # of random words nobody knows the parity: log 2 nats
    assert 0.6 * math.log(2) < float(planted["told_low"]) <= float(planted["told"]) < 1.2 * math.log(2)
    assert float(planted["possible"]) > 0.5
    assert all(abs(float(row["told"])) < 0.2 * math.log(2) for row in rows.values())

    monkeypatch.setattr(target_models, "load_target", None)
    (output / "mask_leak.png").unlink()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--replot", "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert {file.name for file in output.iterdir()} == {"points.csv", "settings.json", "mask_leak.png", "README.md"}
