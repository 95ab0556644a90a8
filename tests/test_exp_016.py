"""Experiment 016, in miniature: every method under the attack, from the command line."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from adversarial_all_methods import halves
from small import make_small_target, write_corpus

import baselines
import checkpoints
import target_models
from logs import read_csv
from recipes import SPDRecipe, train_decomposition
from token_stream import HeldOutText

SCRIPT = Path(__file__).parents[1] / "experiments" / "exp_016_adversarial_all_methods" / "adversarial_all_methods.py"
SMALL = "--target tiny --layers 0 1 --k 4 --d-dict 48 --tokens 2048 --batch 512 --eval-tokens 1024 --ladder 1 3".split()
METHODS = ("--methods", "transcoder", "spd", "neurons-joint", "affine")


@pytest.mark.slow
def test_it_runs_from_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(baselines, "BASELINE_TOKENS", 8192)
    (tmp_path / "corpus").mkdir()
    target, output = make_small_target(write_corpus(tmp_path / "corpus")), tmp_path / "output"
    recipe = SPDRecipe(components=8, gate_hidden=4, steps=1, batch=2)
    train_decomposition(target, recipe, layers=(0, 1), folder=tmp_path / "checkpoints" / target.name)
    monkeypatch.setattr(target_models, "load_target", lambda name, device: target)
    for more in ([], ["--replot"]):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, *METHODS, "--output", str(output), *more])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = read_csv(output / "adversarial.csv")
    coded = {"transcoder", "spd", "neurons-joint"}
    assert {row["method"] for row in rows} == coded | {"affine"}
    for method in coded:
        for gates, delta in (("own", "attacked"), ("own", "closed"), ("dealt", "attacked")):
            own = [r for r in rows if (r["method"], r["gates"], r["delta"]) == (method, gates, delta)]
            assert [row["steps"] for row in own] == ["0", "1", "3"]
            assert float(own[1]["kl"]) <= float(own[2]["kl"]) + 1e-9
            assert all(float(row["ce_low"]) <= float(row["ce"]) <= float(row["ce_high"]) for row in own)
    assert (output / "README.md").read_text().count("| transcoder |") == 3 and (output / "adversarial.png").exists()


def test_what_is_attacked_and_what_is_not_share_no_document() -> None:
    text = HeldOutText(torch.arange(12).view(6, 2), torch.tensor([0, 0, 1, 2, 3, 3]))
    first, second = halves(text)
    assert first.documents.tolist() == [0, 0, 1] and second.documents.tolist() == [2, 3, 3]
    assert torch.cat([first.tokens, second.tokens]).equal(text.tokens)
