"""Experiment 019, in miniature: capacities, seeds and SPD from the command line, and what is alive, found again or split."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from small import make_small_target, write_corpus
from torch.nn.functional import normalize
from unit_counts import Counted, assigned, children, children_rows, effective, nearest, over

import checkpoints
import target_models
from logs import read_csv
from recipes import SPDRecipe, train_decomposition

SCRIPT = Path(__file__).parents[1] / "experiments" / "exp_019_capacity_and_seeds" / "capacity_and_seeds.py"
SMALL = (
    "--target tiny --kinds sae clt --layers 0 1 --capacities 0.5 1 2 --d-dict 16 --k 3 --n-seeds 2 "
    "--tokens 2048 --batch 512 --eval-tokens 512 --count-tokens 8192 --match-tokens 2048 --components 4"
).split()


@pytest.mark.slow
def test_it_runs_from_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "checkpoints")
    (tmp_path / "corpus").mkdir()
    target, output = make_small_target(write_corpus(tmp_path / "corpus")), tmp_path / "output"
    recipe = SPDRecipe(components=8, gate_hidden=4, steps=1, batch=2)
    train_decomposition(target, recipe, layers=(0, 1), folder=tmp_path / "checkpoints" / target.name)
    monkeypatch.setattr(target_models, "load_target", lambda name, device: target)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    run(*SMALL, "--output", str(output))
    costs = read_csv(output / "costs.csv")
    assert [int(r["units"]) for r in costs if r["method"] == "clt" and r["seed"] == "1"] == [8, 16, 32]
    assert [int(r["units"]) for r in costs if r["method"] == "spd"] == [2, 4, 8]
    assert {r["train_tokens"] for r in costs} == {"2048"}
    alive = read_csv(output / "alive.csv")
    assert {r["rule"] for r in alive if r["method"] == "spd"} == {"g > 0", "g > 0.1", "g > 0.5", "mean g"}
    for row in alive:
        assert 0 <= int(row["alive"]) <= int(row["units"])
    shipped = {r["module"] for r in alive if r["method"] == "spd (shipped)"}
    assert shipped == {f"h.{layer}.mlp.{matrix}" for layer in (0, 1) for matrix in ("c_fc", "down_proj")}
    neighbours = read_csv(output / "neighbours.csv")
    assert {(r["other"], r["seed"]) for r in neighbours} == {("within", "0"), ("within", "1"), ("1", "0")}
    against = {(r["capacity"], r["against"]) for r in read_csv(output / "children.csv")}
    assert against == {("1.0", "null"), ("2.0", "null"), ("2.0", "larger")}
    readme = (output / "README.md").read_text()
    monkeypatch.setattr(target_models, "load_target", None)
    (output / "capacity.png").unlink()
    run("--target", "tiny", "--replot", "--output", str(output))
    assert (output / "README.md").read_text() == readme and (output / "capacity.png").exists()


def dictionary(decoder: torch.Tensor, tokens: list[set[int]]) -> Counted:
    rows, cols = zip(*((t, unit) for unit, own in enumerate(tokens) for t in own))
    return Counted(
        normalize(decoder, dim=1), csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, cols)), (10, len(tokens)))
    )


def test_a_child_points_alike_and_fires_alike_or_within() -> None:
    """A unit split into two halves of its tokens has no child by Jaccard and two contained ones; a copy is one by both."""
    x = torch.eye(4)
    parents = dictionary(x[:2], [{0, 1, 2, 3}, {6, 7, 8}])
    others = dictionary(
        torch.stack([x[0], x[0] + 0.1 * x[2], x[1], x[3], -x[1]]), [{0, 1}, {2, 3}, {6, 7, 8}, {6, 7, 8}, {6, 7, 8}]
    )
    found = children(parents, others)
    assert found["jaccard"].tolist() == [[False] * 5, [False, False, True, False, False]]
    assert found["contained"].tolist() == [[True, True, False, False, False], [False, False, True, False, False]]
    rows = children_rows("sae", 0, {0.5: [parents, parents], 1: [parents, parents], 2: [others, others]})
    assert {(r.capacity, r.against, r.rule): (r.mean, r.any, r.several) for r in rows if r.rule == "contained"} == {
        (1, "null", "contained"): (1, 1, 0), (2, "larger", "contained"): (1.5, 1, 0.5), (2, "null", "contained"): (1.5, 1, 0.5),
    }  # fmt: skip


def test_a_permuted_dictionary_is_found_again() -> None:
    g = torch.Generator().manual_seed(0)
    a = normalize(torch.randn(20, 6, generator=g), dim=1)
    torch.testing.assert_close(assigned(a, a[torch.randperm(20, generator=g)]), torch.ones(20))
    assert len(assigned(a, a[:7])) == 7 and assigned(a, a[:7]).min() > 0.999
    other = normalize(torch.randn(20, 6, generator=g), dim=1)
    greedy = (a @ other.T).amax(1)
    assert assigned(a, other).sum() <= greedy.sum() and assigned(a, other).sum() >= (a * other).sum()


def test_neighbours_and_effective_numbers() -> None:
    x = normalize(torch.tensor([[1.0, 0], [1, 1], [0, -1]]), dim=1)
    torch.testing.assert_close(nearest(x), torch.tensor([0.5, 0.5, 0]).sqrt())
    assert effective(torch.tensor([2.0, 2, 0, 2])) == pytest.approx(3) and effective(
        torch.tensor([5.0, 0])
    ) == pytest.approx(1)
    assert over(torch.tensor([0, 1, 2]) / 1_000_000, 1e-6) == 1  # more than ρ: a single firing in a million is not
