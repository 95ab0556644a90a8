"""Experiment 015, in miniature: every kind of coder, every objective, every protocol, and what is read of the rows."""

import runpy
import sys
from pathlib import Path

import pytest
from small import make_small_target, write_corpus

import baselines
import checkpoints
import output_training
import target_models
from additivity import Cost, costs, split
from pareto import read_points
from recipes import SPDRecipe, train_decomposition

SCRIPT = Path(__file__).parents[1] / "experiments" / "exp_015_objective_by_protocol" / "objective_by_protocol.py"
SMALL = "--target tiny --layers 0 1 --top-k 4 --d-dict 48 --tokens 2048 --batch 512 --eval-tokens 1024".split()


@pytest.fixture
def rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the script as its command line does, on a small target."""
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(baselines, "BASELINE_TOKENS", 8192)
    monkeypatch.setattr(output_training, "STATISTICS_TOKENS", 512)
    (tmp_path / "corpus").mkdir()
    target = make_small_target(write_corpus(tmp_path / "corpus"))
    recipe = SPDRecipe(components=8, gate_hidden=4, steps=1, batch=2)
    train_decomposition(target, recipe, layers=(0, 1), folder=tmp_path / "checkpoints" / target.name)
    monkeypatch.setattr(target_models, "load_target", lambda name, device: target)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


@pytest.mark.slow
def test_it_runs_from_its_command_line(rerun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "output"
    rerun(*SMALL, "--kinds", "transcoder", "clt", "--tuned", "free", "mixed", "--output", str(output))
    points = read_points(output / "points.csv")
    trained_for = ("", "-kl-free", "-kl-mixed", "-kl-free-scratch")
    coders = [p for p in points if p.method.startswith(("transcoder", "clt"))]
    assert {p.method for p in coders} == {f"{kind}{name}" for kind in ("transcoder", "clt") for name in trained_for}
    assert {p.train_tokens for p in coders} == {2048}
    found = costs(points)
    assert {method for method, _ in found} >= {"spd", "spd-0.5", "neurons", "affine", "identity", "zero", "mean"}
    assert all(cost.single == cost.frozen == cost.free == 0 for cost in found["identity", None])
    readme = (output / "README.md").read_text()
    assert readme.count("| transcoder | free |") == 1 and readme.count("| clt | free-scratch |") == 1
    monkeypatch.setattr(target_models, "load_target", None)
    (output / "objectives.png").unlink()
    rerun("--target", "tiny", "--replot", "--output", str(output))
    assert (output / "README.md").read_text() == readme
    names = {"points.csv", "layers.csv", "pairs.csv", "settings.json", "objectives.png", "README.md"}
    assert {file.name for file in output.iterdir()} == names


def test_a_method_says_its_kind_and_objective() -> None:
    assert split("transcoder-skip-kl-free-scratch") == ("transcoder-skip", "free-scratch")
    assert split("sae") == ("sae", "local") and split("clt-kl-mixed") == ("clt", "mixed")


def test_additivity_is_all_together_over_each_alone() -> None:
    cost = Cost(l0=16, single=0.2, frozen=0.15, free=0.4, seconds=1.0)
    assert cost.additivity("frozen") == pytest.approx(0.75) and cost.additivity("free") == pytest.approx(2)
    assert cost._replace(single=-0.01).additivity("free") is None
