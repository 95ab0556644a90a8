"""Experiment 017, in miniature: every kind with every part pinned, what is kept of what training recovers, and the scores."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from random_dictionaries import shares
from small import make_small_target, write_corpus

import baselines
import checkpoints
import target_models
from evaluation import Measurement
from logs import read_csv
from metrics import document_draws
from pareto import ParetoPoint, read_points

SCRIPT = Path(__file__).parents[1] / "experiments" / "exp_017_random_dictionaries" / "random_dictionaries.py"
SMALL = (
    "--target tiny --layers 0 1 --layer 1 --top-k 4 6 --repeated-k 4 --n-seeds 1 --d-dict 48 --tokens 2048 --batch 512 "
    "--eval-tokens 1024 --score-tokens 8192 --latents 2"
).split()
PINS = ("", "-soft0.8-decoder", "-frozen-decoder", "-frozen-encoder")


@pytest.mark.slow
def test_it_runs_from_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(baselines, "BASELINE_TOKENS", 8192)
    (tmp_path / "corpus").mkdir()
    target, output = make_small_target(write_corpus(tmp_path / "corpus", documents=4000)), tmp_path / "output"
    monkeypatch.setattr(target_models, "load_target", lambda name, device: target)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    run(*SMALL, "--output", str(output))
    methods = {f"{kind}{pin}" for kind in ("sae", "transcoder", "clt") for pin in PINS}
    points = read_points(output / "points.csv")
    assert methods <= {p.method for p in points} and {p.train_tokens for p in points if p.method in methods} == {2048}
    rows = read_csv(output / "shares.csv")
    assert {(row["method"], row["k"]) for row in rows} == {(method, k) for method in methods for k in ("4", "6")}
    assert all(row["share"] in ("", "1.0") for row in rows if row["pin"] == "trained")
    assert {row["floor"] for row in rows if row["kind"] == "sae"} == {"mean"}
    scored = {row["method"] for row in read_csv(output / "scores.csv")}
    assert scored <= methods | {"transcoder-shuffled", "transcoder-random-target"} and "transcoder-shuffled" in scored
    readme = (output / "README.md").read_text()
    assert readme.count("| CLT | frozen-decoder |") == 2
    monkeypatch.setattr(target_models, "load_target", None)
    for figure in output.glob("*.png"):
        figure.unlink()
    run("--target", "tiny", "--replot", "--output", str(output))
    assert (output / "README.md").read_text() == readme
    assert {file.stem for file in output.glob("*.png")} == {"dictionaries", "intruder", "predictability"}


def test_what_is_kept_is_counted_from_floors_that_training_beats() -> None:
    """Of several seeds the mean, of single layers the sum; the affine map is no floor for a CLT that costs more."""

    def row(method: str, k: int | None, seed: int | None, layer: int) -> ParetoPoint:
        return ParetoPoint(
            target="t", method=method, layers=(layer,), k=k, seed=seed, protocol="single", tokens=1, l0=2.0, l0_p95=None,
            l0_per_mlp=None, active_params=None, bits_per_token=None, ce=0.0, ce_degradation=0.0, ce_low=0.0, ce_high=0.0,
            ce_recovered_zero=None, ce_recovered_mean=None, kl=0.0, fvu=0.5, mse=0.0, dead=None, train_tokens=None,
            gate_params=None, train_seconds=None, checkpoint="", commit=None,
        )  # fmt: skip

    said = [
        ("affine", None, None, 4.0),
        ("mean", None, None, 9.0),
        ("sae", 8, 0, 1.0),
        ("sae-frozen-encoder", 8, 0, 5.0),
    ]
    said += [("transcoder", 8, 0, 1.0), ("transcoder", 8, 1, 3.0), ("transcoder-frozen-decoder", 8, 0, 3.0)]
    said += [("clt", 8, 0, 5.0), ("clt-frozen-decoder", 8, 0, 7.0)]
    rows, costs = [], []
    for method, k, seed, cost in said:
        for layer in (0, 1):
            rows.append(row(method, k, seed, layer))
            costs.append(torch.full((3,), cost / 2))
    found = {
        (own.method, own.floor): own
        for own in shares(Measurement(rows, [], [], costs), document_draws(torch.arange(3), 50, 0))
    }
    assert found["sae-frozen-encoder", "mean"].share == pytest.approx(0.5) and found["sae", "mean"].share == 1
    assert ("sae", "affine") not in found
    trained = found["transcoder", "mean"]
    assert trained.ce == 2 and (trained.ce_least, trained.ce_largest) == (1, 3)
    assert found["transcoder-frozen-decoder", "mean"].share == pytest.approx(6 / 7)
    assert found["transcoder-frozen-decoder", "affine"].share == pytest.approx(0.5)
    assert found["transcoder-frozen-decoder", "affine"].low == pytest.approx(0.5)
    assert found["clt-frozen-decoder", "mean"].share == pytest.approx(0.5)
    assert found["clt-frozen-decoder", "affine"].share is None and found["clt", "affine"].share is None
